"""The configurations that kernel.py launches on the lengths of common models, for the report."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from ..runtime import Shipped
from . import kernel
from .tables import Plan, plan

LENGTHS = (4096, 5120, 8192, 11008, 13824, 14336)
TARGETS = ("sm_90", "sm_100")
REFUSED = {(n, "tf32x3") for n in (11008, 13824, 14336)}  # a core of more than 32 x 32 spills
TABLES = ("dft1_ptr", "dft2_ptr", "twiddle_ptr", "sigma_ptr", "twist_ptr")
SIGNATURE = {
    "owner_ptr": "*i32",
    "table_ptr": "*i64",
    "values_ptr": "*fp32",
    "squares_ptr": "*fp32",
    **dict.fromkeys(TABLES, "*fp32"),
    "weight": "fp32",
}


def _config(name: str, spec: Plan, w: object, g: object, start: object) -> Shipped:
    types = {"W_TYPE": w, "G_TYPE": g, "START_TYPE": start}
    return Shipped(
        f"spectral_penalty/{name}",
        kernel._penalty_kernel,
        SIGNATURE,
        {**types, **kernel.constants(spec)},
        num_warps=kernel.NUM_WARPS,
        mma=True,
        # rows; columns, in the other branch of the same function, are read 32 bits at a time
        wide_loads=True,
        targets=TARGETS,
    )


def _lengths() -> Iterator[tuple[str, Plan]]:
    for length in LENGTHS:
        for label, precision in (("ramp", "tf32"), ("edge", "tf32x3")):
            if (length, precision) not in REFUSED:
                yield f"{length}-{label}", plan(length, precision)


def shipped() -> list[Shipped]:
    """Every length in fp32, without and with the start subtracted, by the precisions that fit."""
    fp32 = tl.float32
    found = [_config(name, spec, fp32, fp32, None) for name, spec in _lengths()]
    found += [_config(f"{name}-start", spec, fp32, fp32, fp32) for name, spec in _lengths()]
    found.append(
        Shipped(
            "spectral_penalty/sum",
            kernel._sum_kernel,
            {"partials_ptr": "*fp32", "spans_ptr": "*i64", "values_ptr": "*fp32"},
            {"BLOCK_N": kernel.SUM_BLOCK},
            num_warps=kernel.SUM_WARPS,
            wide_loads=False,  # a matrix has at most some hundred partial values
            targets=TARGETS,
        )
    )
    return found
