"""The configurations that kernel.py launches on the lengths of common models, for the report."""

from __future__ import annotations

from itertools import product

import triton.language as tl

from ..runtime import Shipped
from ..spectral_penalty.kernel import NUM_WARPS
from ..spectral_penalty.shipped import REFUSED, TABLES
from ..spectral_penalty.tables import Plan, plan
from . import kernel

LENGTHS = (4096, 5120, 11008, 13824, 14336)
TARGETS = ("sm_90", "sm_100")
PRECISIONS = {"ramp": "tf32", "edge": "tf32x3"}
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
        num_warps=NUM_WARPS,
        mma=True,
        wide_loads=unit,
        targets=TARGETS,
    )


def shipped() -> list[Shipped]:
    """Every length in fp32, rows (A) and columns (B), with the start subtracted and without.

    Full precision ("edge") is compiled with the start only, which takes more registers. And at the
    most common length, fp32 masters with bf16 gradients and a bf16 copy.
    """
    found = []
    for length, (label, precision) in product(LENGTHS, PRECISIONS.items()):
        if (length, precision) in REFUSED:
            continue
        spec = plan(length, precision)
        for (role, unit), start in product((("A", True), ("B", False)), (False, True)):
            spills = role == "B" and (length, start) in kernel.SPILLING_COLUMNS
            if spills or (label == "edge" and not start):
                continue
            name = f"{length}-{label}-{role}" + ("-start" if start else "")
            found.append(_config(name, spec, unit, start))
    spec = plan(LENGTHS[0], PRECISIONS["ramp"])
    found.append(_config(f"{LENGTHS[0]}-ramp-A-start-copy-bf16", spec, True, True, True))
    return found
