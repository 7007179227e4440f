"""The penalty over lines on a CPU, fp32: LANES vectors at a time through the whole of C w, in cache, by C.

Adapters of a 7B at r 8, axis, 2 cores of a Zen 4: 88 ms by torch's FFTs, of which 11008 = 43 * 256 points take most, 32
by this. Legend and maths: line_source.py.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..native_build import INT, LONG, POINTER, compile_or_warn, in_shares
from .line_source import SOURCE
from .reference import Spectrum
from .transform import line_table

LANES, AT_ONCE = 8, 4  # as in SOURCE
# A small P gives the rows of 0 and P / 2, which stand for no conjugate, a large share of the work.
LEAST_P, MOST_P = 9, 63
MOST_LENGTH = 2**18  # LANES lines twice are 16 MB


class _Plan(ctypes.Structure):
    _fields_ = [("p", LONG), ("q", LONG)] + [
        (name, POINTER) for name in ("cosines", "sines", "twiddles", "stages", "sigma")
    ]


@functools.cache  # one attempt per process
def library() -> ctypes.CDLL | None:
    """The compiled SOURCE; None, and one line in the log, if it cannot be compiled or loaded."""
    arguments = {"add_circulant": (POINTER, POINTER, INT, POINTER, POINTER, POINTER, LONG, LONG)}
    flags = ("-ffp-contract=fast", "-Wno-psabi")
    what = "spectral_penalty: the C source of its transforms"
    return compile_or_warn("lines", SOURCE, arguments, what, "PyTorch's FFTs", flags)


def factors(length: int) -> tuple[int, int] | None:
    """(P, Q) of a length, LEAST_P <= P <= MOST_P and Q >= LANES a power of two; None where it has no such factors."""
    q = length & -length
    p = length // q
    while p < LEAST_P and q > LANES:
        p, q = 2 * p, q // 2
    return (p, q) if LEAST_P <= p <= MOST_P and q >= LANES and length <= MOST_LENGTH else None


def _counted(n: int) -> Tensor:
    """0 .. n - 1, whatever the default device is."""
    return torch.arange(n, device="cpu")


@functools.lru_cache(maxsize=32)
def _tables(p: int, q: int) -> tuple[Tensor, ...]:
    """cosines, sines, twiddles and stages of a plan: rounded once, from float64."""
    h = p // 2 + 1
    n = _counted(h)

    def small(columns: Tensor, wave: Callable[[Tensor], Tensor]) -> Tensor:
        """(ceil(h / AT_ONCE), columns, AT_ONCE): the small product's matrix, AT_ONCE of its rows side by side."""
        rows = _counted(-(-h // AT_ONCE) * AT_ONCE)
        angle = (rows[:, None] * columns % p).double() * (2 * math.pi / p)
        found = wave(angle) * (rows < h)[:, None]
        return found.view(-1, AT_ONCE, len(columns)).transpose(1, 2)

    def roots(exponents: Tensor, order: int) -> Tensor:
        """exp(-2 pi i e / order) as (..., 2)."""
        angle = (exponents % order).double() * (-2 * math.pi / order)
        return torch.stack([angle.cos(), angle.sin()], -1)

    steps, size = [], q
    while size >= 4:
        steps.append(roots(_counted(size // 4)[:, None] * (1 + _counted(3)), size).flatten())
        size //= 4
    found = (
        small(n, torch.cos),
        small(n[1 : (p - 1) // 2 + 1], torch.sin),
        roots(_counted(q)[:, None] * n, p * q),
        torch.cat(steps),
    )
    return tuple(t.float().contiguous() for t in found)


def _order(q: int) -> Tensor:
    """Which frequency the in-place FFT leaves at each place."""
    if q < 4:
        return _counted(q)
    quarter = _order(q // 4)
    return torch.cat([4 * quarter + i for i in range(4)])


@functools.lru_cache(maxsize=32)
def _sigma(spectrum: Spectrum, p: int, q: int, factor: float) -> Tensor:
    """factor * sigma as (H, Q), in the FFT's order; twice it in the rows that stand for their conjugates too."""
    k1 = _counted(p // 2 + 1)[:, None]
    k = k1 + p * _order(q)
    sigma = factor * line_table(spectrum, p * q, torch.device("cpu"), torch.float64)
    times = 2 - ((k1 == 0) | (2 * k1 == p)).int()
    return (sigma[torch.minimum(k, p * q - k)] * times).float()


@dataclass(frozen=True)
class Lines:
    """Lines of one length of several matrices.

    table: (M, 10) int64, C's `matrix`: how many; the addresses of the first's w, w0 (or 0) and g; the strides in
        elements along a line of each; those between lines.
    owner: (count,) the matrix of each line.
    """

    table: Tensor
    owner: Tensor

    @classmethod
    def of(cls, matrices: Sequence[tuple[Tensor, Tensor | None, Tensor]], axes: Sequence) -> Lines:
        """Of (w, w0, g) each: its rows (axis 1), its columns (axis 0), or all of it, contiguous, as one (None)."""
        numbers, owner = [], []
        for i, (tensors, axis) in enumerate(zip(matrices, axes, strict=True)):
            at = [0 if t is None else t.data_ptr() for t in tensors]
            if axis is None:
                count, steps, apart = 1, [1] * 3, [0] * 3
            else:
                count = tensors[0].shape[1 - axis]
                strides = [(0, 0) if t is None else t.stride() for t in tensors]
                steps, apart = ([s[a] for s in strides] for a in (axis, 1 - axis))
            numbers.append([count, *at, *steps, *apart])
            owner += [i] * count
        return cls(torch.tensor(numbers, device="cpu"), torch.tensor(owner, device="cpu"))

    def per_matrix(self, values: Tensor) -> Tensor:
        """Sums of `values` (count,) over each matrix's lines."""
        return values.new_zeros(len(self.table)).index_add_(0, self.owner, values)


def line(shape: Sequence[int], spectrum: Spectrum, role: str) -> tuple[int, int | None]:
    """The length of a matrix's lines, and their axis: None where all of it is one line."""
    if spectrum.transform == "flat":
        return shape[0] * shape[1], None
    axis = 1 if role == "A" else 0
    return shape[axis], axis


def _addressable(t: Tensor) -> bool:
    """Whether C finds fp32 values at the tensor's address: on a CPU, no fake or other subclass, no lazy negation."""
    plain = type(t) in (Tensor, nn.Parameter)
    return plain and t.device.type == "cpu" and t.dtype == torch.float32 and not t.is_neg()


def takes(matrix: tuple[Tensor, Tensor | None, Tensor], role: str, spectrum: Spectrum) -> bool:
    """Whether `penalty` computes this (w, w0, g): fp32 in memory of this process, a length with factors, no fft2."""
    if spectrum.transform == "fft2" or torch.compiler.is_compiling():
        return False
    w, w0, g = matrix
    for t in [w, g] if w0 is None else [w, w0, g]:
        if not _addressable(t):
            return False
        if spectrum.transform == "flat" and not t.is_contiguous():
            return False
    apart = all(size == 1 or step for size, step in zip(g.shape, g.stride(), strict=True))
    return apart and factors(line(w.shape, spectrum, role)[0]) is not None and library() is not None


def batch_penalty(
    w: Tensor, spectrum: Spectrum, role: str, weight: float
) -> tuple[Tensor, Tensor] | None:
    """Values and the gradient of weight * P of a batch (M, rows, columns); None where C does not take it."""
    if not _addressable(w):
        return None
    grad = torch.empty_like(w, memory_format=torch.contiguous_format)
    matrices = [(x, None, g) for x, g in zip(w, grad, strict=True)]
    if not takes(matrices[0], role, spectrum):
        return None
    values, _ = penalty(matrices, [role] * len(w), spectrum, weight, add=False)
    return values.float(), grad


def penalty(
    matrices: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    roles: Sequence[str],
    spectrum: Spectrum,
    weight: float,
    add: bool,
) -> Tensor:
    """The gradient of weight * P(w - w0) of each (w, w0, g) into g, or added to it.

    The same bits on every run of a machine, whatever else is in the list and however many threads; another compiler or
    processor may round otherwise, as torch's FFTs do.

    Args:
        matrices: that C `takes`, of any mix of shapes; no g twice.

    Returns: (2, M) float64: values, and squares of the gradients.
    """
    kinds = [line(w.shape, spectrum, role) for (w, _, _), role in zip(matrices, roles, strict=True)]
    groups: dict[int, list[int]] = {}
    for i, (length, _) in enumerate(kinds):
        groups.setdefault(length, []).append(i)
    results = torch.empty(2, len(matrices), dtype=torch.float64, device="cpu")
    for length, index in groups.items():
        lines = Lines.of([matrices[i] for i in index], [kinds[i][1] for i in index])
        energies, squares = add_circulant(lines, length, spectrum, 2.0 * weight, add)
        results[:, index] = torch.stack([0.5 * energies, squares])
    torch.autograd.graph.increment_version([g for _, _, g in matrices])
    return results


def add_circulant(
    lines: Lines, length: int, spectrum: Spectrum, factor: float, add: bool
) -> tuple[Tensor, Tensor]:
    """g = factor * C (w - w0), or g += it, line by line.

    Returns: <w - w0, factor * C (w - w0)> and |factor * C (w - w0)|^2 of each matrix, float64.
    """
    run, (p, q) = library(), factors(length) or (0, 0)
    assert run is not None and p
    # Without GNU's OpenMP no torch function here may wake torch's threads: they would spin on the cores that C needs.
    tables = (*_tables(p, q), _sigma(spectrum, p, q, factor))
    plan = _Plan(p, q, *(t.data_ptr() for t in tables))
    count = len(lines.owner)
    sums = torch.empty(2, count, dtype=torch.float64, device="cpu")
    room = LANES * (p * (q + 2) + 2 * (p // 2 + 1) * (q + 1))

    def work(first: int, last: int) -> None:
        scratch = torch.empty(room, dtype=torch.float32, device="cpu")
        out = (sums[0].data_ptr(), sums[1].data_ptr(), scratch.data_ptr())
        span = (first * LANES, min(last * LANES, count))
        run.add_circulant(ctypes.byref(plan), lines.table.data_ptr(), add, *out, *span)

    in_shares(work, -(-count // LANES), count * length)
    return lines.per_matrix(sums[0]), lines.per_matrix(sums[1])
