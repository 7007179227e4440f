"""The configurations that kernel.py launches on the lengths of common models, for the report."""

from __future__ import annotations

import triton.language as tl

from ..runtime import Shipped
from ..spectral_penalty.shipped import TABLES, TARGETS, plans
from ..spectral_penalty.tables import Plan
from . import kernel

SIGNATURE = {
    "owner_ptr": "*i32",
    "table_ptr": "*i64",
    "scalars_ptr": "*fp32",
    "control_ptr": "*fp32",
    "values_ptr": "*fp32",
    "squares_ptr": "*fp32",
    "clipped_ptr": "*i32",
    **dict.fromkeys(TABLES, "*fp32"),
    "weight": "fp32",
}


def _config(name: str, spec: Plan, unit: bool, start: bool, rounded: bool = False) -> Shipped:
    types = dict.fromkeys(("P_TYPE", "M_TYPE", "H_TYPE", "G_TYPE"), tl.float32)
    if rounded:
        types["G_TYPE"] = tl.bfloat16
    return Shipped(
        f"penalised_update/{name}",
        kernel._penalised_kernel,
        SIGNATURE,
        {
            **types,
            "START_TYPE": tl.float32 if start else None,
            "COPY_TYPE": tl.bfloat16 if rounded else None,
            "HAS_CONTROL": True,
            "UNIT": unit,
            **kernel.constants(spec, start),
        },
        num_warps=spec.chip.num_warps,
        mma=True,
        wide_loads=unit,
        targets=TARGETS[spec.chip],
    )


def shipped() -> list[Shipped]:
    """Every plan that fits, in fp32: rows (A) and columns (B), with the start subtracted and without.

    Full precision ("edge") is compiled with the start only, which takes more registers. And at the
    most common length, fp32 masters with bf16 gradients and a bf16 copy.
    """
    found = []
    for label, end, spec in plans():
        if not kernel.fits(spec):
            continue
        name = f"{spec.length}-{label}"
        for role, start in (("A", False), ("A", True), ("B", False), ("B", True)):
            if start or label == "ramp":
                more = f"-{role}" + ("-start" if start else "")
                found.append(_config(f"{name}{more}{end}", spec, role == "A", start))
        if name == "4096-ramp":
            found.append(_config(f"{name}-A-start-copy-bf16{end}", spec, True, True, True))
    return found
