"""The configurations that kernel.py launches on the lengths of common models, for the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import product

import triton.language as tl

from ..runtime import Shipped
from . import kernel
from .chips import AMPERE, CDNA3, HOPPER
from .tables import Plan, plan

LENGTHS = (3584, 4096, 5120, 8192, 8960, 11008, 13824, 14336)
PRECISIONS = {"ramp": "tf32", "edge": "tf32x3"}
# What each chip was found on; a name says the target where it is not Hopper's.
TARGETS = {HOPPER: ("sm_90", "sm_100"), AMPERE: ("sm_80",), CDNA3: ("gfx942",)}
TABLES = ("dft1_ptr", "dft2_ptr", "twiddle_ptr", "sigma_ptr", "twist_ptr")
SIGNATURE = {
    "owner_ptr": "*i32",
    "table_ptr": "*i64",
    "values_ptr": "*fp32",
    "squares_ptr": "*fp32",
    **dict.fromkeys(TABLES, "*fp32"),
    "weight": "fp32",
}


def plans() -> Iterator[tuple[str, str, Plan]]:
    """(label, name's end, plan) of every length, precision and chip that fit each other."""
    for chip, length, (label, precision) in product(TARGETS, LENGTHS, PRECISIONS.items()):
        with suppress(ValueError):  # too long for the chip in this precision
            spec = plan(length, precision, chip)
            yield label, "" if chip is HOPPER else f"-{TARGETS[chip][0]}", spec


def _config(name: str, spec: Plan, start: object) -> Shipped:
    types = {"W_TYPE": tl.float32, "G_TYPE": tl.float32, "START_TYPE": start}
    return Shipped(
        f"spectral_penalty/{name}",
        kernel._penalty_kernel,
        SIGNATURE,
        {**types, **kernel.constants(spec)},
        num_warps=spec.chip.num_warps,
        mma=True,
        # rows; columns, in the other branch of the same function, are read 32 bits at a time
        wide_loads=True,
        targets=TARGETS[spec.chip],
    )


def shipped() -> list[Shipped]:
    """Every plan in fp32, without and with the start subtracted."""
    found = [
        _config(f"{spec.length}-{label}{more}{end}", spec, start)
        for more, start in (("", None), ("-start", tl.float32))
        for label, end, spec in plans()
    ]
    found.append(
        Shipped(
            "spectral_penalty/sum",
            kernel._sum_kernel,
            {"partials_ptr": "*fp32", "spans_ptr": "*i64", "values_ptr": "*fp32"},
            {"BLOCK_N": kernel.SUM_BLOCK},
            num_warps=kernel.SUM_WARPS,
            wide_loads=False,  # a matrix has at most some hundred partial values
        )
    )
    return found
