"""How a length is factored, which precision it needs, and the kernel's constant tables.

Tables are computed in fp64 on the host and cached per (plan, spectrum, device). One length takes at
most 0.6 MB, which all programs share through L2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .chips import HOPPER, Chip
from .reference import Spectrum
from .transform import line_table

SMALLEST, LARGEST = 16, 64  # padded factors of a core: a dot takes 16
LONG_POINTS = 8192  # beyond them what a program transforms takes 64 registers of a thread
SPLITS = (1, 4, 8)
# d rho / dx of a sigmoid is at most sharpness / 4; the ramp has 1, power its exponent.
STEEPEST = 4.0


@dataclass(frozen=True)
class Plan:
    """n = split * q1 * q2, in cores of Q1 x Q2 registers; split 1 takes two rows, else one.

    Attributes:
        precision: of the dots; "tf32" (relative error of the gradient up to 1e-2, with little
            content at high frequencies) or "tf32x3" (below 5e-6 for a ramp, 5e-4 for a hard edge).
        chip: whose registers it was planned for.
    """

    length: int
    split: int
    q1: int
    q2: int
    precision: str
    chip: Chip = HOPPER

    @property
    def padded(self) -> tuple[int, int]:
        return _pad(self.q1), _pad(self.q2)

    @property
    def rows(self) -> int:
        """Rows that one program takes."""
        return 2 if self.split == 1 else 1

    @property
    def row_points(self) -> int:
        """Padded points of all blocks of a row."""
        q1, q2 = self.padded
        return self.split * q1 * q2

    @property
    def is_long(self) -> bool:
        """Whether values that wait for the end of the transform take too many registers."""
        return self.rows * self.row_points > LONG_POINTS

    @property
    def apart(self) -> bool:
        """Whether the classes must share no registers (core.py): three dots for one spill on sm_100 else."""
        return self.chip.always_apart or self.is_long or self.precision != "tf32"

    @property
    def classes(self) -> int:
        """Residue classes that are computed; the others are conjugates of these."""
        return self.split // 2 + 1 if self.split > 1 else 1


def precision_of(spectrum: Spectrum) -> str:
    """ "tf32" where rho is smooth, "tf32x3" (as good as fp32) where it has edges.

    A relative error of 1e-3 of the whole spectrum is harmless while every frequency is penalised
    about as its neighbours are. Behind an edge, where rho is 0 for the large low frequencies, it is
    as large as the result.
    """
    steepness = {
        "linear_ramp": 1.0,
        "uniform": 0.0,
        "power": spectrum.exponent,
        "sigmoid": spectrum.sharpness / 4.0,
    }
    return "tf32" if steepness.get(spectrum.schedule, math.inf) <= STEEPEST else "tf32x3"


@lru_cache(maxsize=256)
def plan(length: int, precision: str, chip: Chip = HOPPER, split: int | None = None) -> Plan:
    """The fewest blocks, then the least padding, within what the chip holds. `split` fixes the blocks (tests).

    Raises:
        ValueError: `length` is not split * q1 * q2 with factors that fit.
    """
    for blocks in SPLITS if split is None else (split,):
        found = []
        for q1 in range(1, LARGEST + 1):
            q2, rest = divmod(length, blocks * q1)
            if rest or not 1 <= q2 <= LARGEST:
                continue
            size_1, size_2 = _pad(q1), _pad(q2)
            points = size_1 * size_2
            is_full = blocks * points == chip.row and points == LARGEST**2 and q1 > chip.full_rows
            if points <= chip.core[precision] and blocks * points <= chip.row and not is_full:
                # square cores have the smallest tables; else the longer axis first, as sm_90's
                # tensor cores take 64 rows
                found.append((points, abs(size_1 - size_2), -size_1, abs(q1 - q2), q1, q2))
        if found:
            *_, q1, q2 = min(found)
            return Plan(length, blocks, q1, q2, precision, chip)
    if chip.row == 0:
        raise ValueError(f"the Triton kernel does not run on {chip.name}; use impl='torch'")
    raise ValueError(
        f"the feature axis has {length} elements; the Triton kernel takes s * q1 * q2 with s one of "
        f"{', '.join(map(str, SPLITS))} and q1, q2 at most {LARGEST} (on {chip.name} in {precision} padded "
        f"to powers of two, q1 * q2 at most {chip.core[precision]}, s * q1 * q2 at most {chip.row}); "
        "use impl='torch'"
    )


@dataclass(frozen=True)
class Tables:
    """fp32 device tensors; see core.py."""

    dft1: Tensor
    dft2: Tensor
    twiddle: Tensor
    sigma: Tensor
    twist: Tensor

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return self.dft1, self.dft2, self.twiddle, self.sigma, self.twist


@lru_cache(maxsize=64)
def tables(spec: Plan, spectrum: Spectrum, device: torch.device) -> Tables:
    """All tables of a plan; sigma (classes, Q2, Q1), twist (classes, 2, Q1, Q2)."""
    n, q1, q2 = spec.length, spec.q1, spec.q2
    core = q1 * q2
    j1, j2 = torch.arange(q1), torch.arange(q2)
    half = line_table(spectrum, n, torch.device("cpu"), torch.float64)
    frequency = j1[:, None] + q1 * j2
    place = j1[:, None] * q2 + j2
    sigma, twist = [], []
    for c in range(spec.classes):
        k = spec.split * frequency + c
        sigma.append(half[torch.minimum(k, n - k)])
        twist.append(_turns(c * place, n))
    found = (
        _stacked(q1, spec.precision != "tf32"),
        _stacked(q2, spec.precision != "tf32"),
        _padded(_turns(j1[:, None] * j2, core), spec.padded),
        _padded(torch.stack(sigma), spec.padded).mT,
        _padded(torch.stack(twist), spec.padded),
    )
    return Tables(*(t.to(device, torch.float32).contiguous() for t in found))


def _pad(q: int) -> int:
    return max(SMALLEST, 1 << (q - 1).bit_length())


def _turns(k: Tensor, n: int) -> Tensor:
    """exp(-2 pi i k / n) as (2, *k.shape) fp64; k is reduced as an integer first."""
    angle = (k % n).double() * (-2.0 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()])


def _stacked(q: int, split: bool) -> Tensor:
    """[[Re, -Im], [Im, Re]] of the DFT of q points, each quarter padded; and what `split` leaves
    beyond TF32: (2, 2 Q, 2 Q) fp64."""
    j = torch.arange(q)
    re, im = _padded(_turns(j[:, None] * j, q), (_pad(q), _pad(q)))
    table = torch.cat([torch.cat([re, -im], 1), torch.cat([im, re], 1)])
    high = round_tf32(table) if split else table
    return torch.stack([high, table - high])


def round_tf32(x: Tensor) -> Tensor:
    """To the nearest with 10 bits of mantissa, in fp64."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2048.0).round(), exponent - 11)


def _padded(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros behind the last two axes of x."""
    full = x.new_zeros(*x.shape[:-2], *shape)
    full[..., : x.shape[-2], : x.shape[-1]] = x
    return full
