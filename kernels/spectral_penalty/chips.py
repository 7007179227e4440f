"""How much of a transform a kind of GPU holds in registers without a spill.

Found by compiling (`make kernels-report` is the proof); no GPU was there to time any of it. The tensor cores of sm_90
and sm_100 read both operands from shared memory. Those of sm_80 take them from registers, where a core of 64 x 64 would
spill thousands of times; sm_86, sm_89 and sm_120 do the same, and what the report compiles for sm_80 compiled without
spills for them too when it was tried. A wavefront of gfx942 has 64 lanes of 512 registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, eq=False)
class Chip:
    """Bounds of `tables.plan`; points are padded ones.

    Attributes:
        name: the targets that it stands for.
        core: points of a core, by precision.
        row: points of all blocks of a row: they wait in registers for their turn.
        row_update: points of a row that `penalised_update` takes, by precision; 0 for none.
        pads_update: whether some of those may be padding, whose masks take registers.
        full_rows: the most rows of a 64 x 64 core that fills a row of `row` points: padding takes no registers.
        always_apart: classes never share registers (core.py); elsewhere only where they must not.
        num_warps: of a program, 256 threads.
    """

    name: str
    core: Mapping[str, int]
    row: int
    row_update: Mapping[str, int]
    pads_update: bool
    full_rows: int
    always_apart: bool
    num_warps: int


HOPPER = Chip(
    name="sm_90 and sm_100",
    core={"tf32": 64 * 64, "tf32x3": 32 * 32},
    row=16384,
    row_update={"tf32": 16384, "tf32x3": 16384},
    pads_update=True,
    full_rows=48,
    always_apart=False,
    num_warps=8,
)
AMPERE = Chip(
    name="sm_80, sm_86, sm_89 and sm_120",
    core={"tf32": 32 * 32, "tf32x3": 32 * 16},
    row=8192,
    row_update={"tf32": 4096, "tf32x3": 0},
    pads_update=False,
    full_rows=0,
    always_apart=True,
    num_warps=8,
)
CDNA3 = Chip(
    name="gfx942",
    core={"tf32": 64 * 64, "tf32x3": 32 * 32},
    row=16384,
    row_update={"tf32": 4096, "tf32x3": 4096},
    pads_update=False,
    full_rows=0,
    always_apart=False,
    num_warps=4,
)
UNKNOWN = Chip(
    name="a GPU that nothing was compiled for",
    core={"tf32": 0, "tf32x3": 0},
    row=0,
    row_update={"tf32": 0, "tf32x3": 0},
    pads_update=False,
    full_rows=0,
    always_apart=True,
    num_warps=8,
)


@cache
def chip_of(device: torch.device) -> Chip:
    """The kind of a GPU; for a CPU, where Triton's interpreter runs, HOPPER.

    A GPU that nothing was compiled for is UNKNOWN, which takes no length: torch's FFTs are used there.
    """
    if device.type != "cuda":
        return HOPPER
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return CDNA3 if name.startswith("gfx94") else UNKNOWN
    major, _ = torch.cuda.get_device_capability(device)
    return {8: AMPERE, 9: HOPPER, 10: HOPPER, 12: AMPERE}.get(major, UNKNOWN)
