"""lambda * gradient of the `axis` penalty added into gradients in place: one launch per length.

Blocks: one program takes two feature vectors of one matrix (split 1) or one. A feature vector is a
row of an A or a column of a B: both are a start and a stride, so they share a launch. Memory: w and
g (and w0) are read once and g is written once; tables come from L2.

The table of a launch, (matrices, COLUMNS) int64: addresses of w, g, w0; the number of vectors; the
first program; then between vectors and between elements the strides of w, g and w0; a zero; and
whether elements lie side by side and aligned, so that they are read and written 128 bits at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import ALIGNMENT, TL_DTYPES, to_device
from ..runtime import require
from .core import circulant_class, circulant_eight, circulant_four, stacked_table
from .tables import Plan, Tables

COLUMNS = 13
SUM_BLOCK = 1024  # partial values that the summing program reads at a time
SUM_WARPS = 4


@triton.jit
def _block(
    row_ptr,
    which,
    WHICH: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHAPE: tl.constexpr,
    UNIT: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Pointers (Q1, Q2) to block BLOCK of vector `which` of w, g or w0. SHAPE: q1, q2, Q1, Q2.

    HIDDEN adds a zero that the compiler cannot know: else it keeps w's offsets through the
    transform, and spills.
    """
    pointer = tl.load(row_ptr + WHICH).to(tl.pointer_type(DTYPE))
    stride_v = tl.load(row_ptr + 5 + 2 * WHICH)
    offs_Q1, offs_Q2 = tl.arange(0, SHAPE[2]), tl.arange(0, SHAPE[3])
    if HIDDEN:
        zero = tl.load(row_ptr + 11, volatile=True).to(tl.int32)
        if UNIT:
            zero = tl.multiple_of(zero, 16)
        offs_Q1 += zero
        offs_Q2 += zero
    place = offs_Q1[:, None] * SHAPE[1] + offs_Q2[None, :]
    if UNIT:
        pointer, stride_v = tl.multiple_of(pointer, 16), tl.multiple_of(stride_v, 16)
        return pointer + which * stride_v + BLOCK * SHAPE[0] * SHAPE[1] + place
    else:
        stride_e = tl.load(row_ptr + 6 + 2 * WHICH)
        start = pointer + which * stride_v + (BLOCK * SHAPE[0] * SHAPE[1]) * stride_e
        # 32 bits inside a block, which the launcher checks: 64-bit addresses of every element spill
        return start + place * stride_e.to(tl.int32)


@triton.jit
def _load(
    row_ptr,
    which,
    mask,
    BLOCK: tl.constexpr,
    TYPES: tl.constexpr,
    SHAPE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Block BLOCK of vector `which` of w - w0, fp32. TYPES: of w, g, w0."""
    w_ptr = _block(row_ptr, which, 0, TYPES[0], BLOCK, SHAPE, UNIT, False)
    w = tl.load(w_ptr, mask=mask, other=0.0).to(tl.float32)
    if TYPES[2] is not None:
        start_ptr = _block(row_ptr, which, 2, TYPES[2], BLOCK, SHAPE, UNIT, True)
        w -= tl.load(start_ptr, mask=mask, other=0.0).to(tl.float32)
    return w


@triton.jit
def _add(
    row_ptr,
    which,
    mask,
    x,
    BLOCK: tl.constexpr,
    TYPES: tl.constexpr,
    SHAPE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """g += x for one block."""
    g_ptr = _block(row_ptr, which, 1, TYPES[1], BLOCK, SHAPE, UNIT, True)
    g = tl.load(g_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr, (g + x).to(TYPES[1]), mask=mask)


@triton.jit
def _load_block(
    row_ptr, which, mask, unit, BLOCK: tl.constexpr, TYPES: tl.constexpr, SHAPE: tl.constexpr
):
    """`_load` by 128 bits where the matrix allows it; a branch of the whole program."""
    if unit:
        w = _load(row_ptr, which, mask, BLOCK, TYPES, SHAPE, True)
    else:
        w = _load(row_ptr, which, mask, BLOCK, TYPES, SHAPE, False)
    return w


@triton.jit
def _add_block(
    row_ptr, which, mask, unit, x, BLOCK: tl.constexpr, TYPES: tl.constexpr, SHAPE: tl.constexpr
):
    """`_add` by 128 bits where the matrix allows it; returns the sum of x^2."""
    if unit:
        _add(row_ptr, which, mask, x, BLOCK, TYPES, SHAPE, True)
    else:
        _add(row_ptr, which, mask, x, BLOCK, TYPES, SHAPE, False)
    return tl.sum(tl.sum(tl.where(mask, x * x, 0.0), axis=1), axis=0)


@triton.jit
def own_piece(owner_ptr, table_ptr, COLUMNS: tl.constexpr):
    """This program's row of the table and its place among the matrix's programs (int64).

    volatile, and found anew for the gradient: what is kept through the transform spills.
    """
    pid = tl.program_id(0)
    row_ptr = table_ptr + tl.load(owner_ptr + pid, volatile=True) * COLUMNS
    return row_ptr, pid - tl.load(row_ptr + 4, volatile=True)


@triton.jit
def _penalty_kernel(
    owner_ptr,
    table_ptr,
    values_ptr,
    squares_ptr,
    dft1_ptr,
    dft2_ptr,
    twiddle_ptr,
    sigma_ptr,
    twist_ptr,
    weight,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    START_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    q1: tl.constexpr,
    q2: tl.constexpr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
    APART: tl.constexpr,  # classes of a transform share no registers
    COLUMNS: tl.constexpr,
):
    """g += x = 2 weight C (w - w0) for this program's vectors; its weight <w, C w> and |x|^2."""
    pid = tl.program_id(0)
    row_ptr, piece = own_piece(owner_ptr, table_ptr, COLUMNS)
    vectors = tl.load(row_ptr + 3)
    SHAPE: tl.constexpr = (q1, q2, Q1, Q2)
    TYPES: tl.constexpr = (W_TYPE, G_TYPE, START_TYPE)
    offs_Q1, offs_Q2 = tl.arange(0, Q1), tl.arange(0, Q2)
    mask = (offs_Q1[:, None] < q1) & (offs_Q2[None, :] < q2)
    dft1 = stacked_table(dft1_ptr, Q1, PRECISION)
    dft2 = dft1
    if q1 != q2:
        dft2 = stacked_table(dft2_ptr, Q2, PRECISION)
    tl.debug_barrier()  # tables are in shared memory before w is loaded: else both take registers
    tables = (dft1, dft2, twiddle_ptr, sigma_ptr, twist_ptr, row_ptr + 11)
    unit = tl.load(row_ptr + 12) != 0
    if SPLIT == 1:
        pair = mask & (piece * 2 + 1 < vectors)
        re = _load_block(row_ptr, piece * 2, mask, unit, 0, TYPES, SHAPE)
        im = _load_block(row_ptr, piece * 2 + 1, pair, unit, 0, TYPES, SHAPE)
        re, im, energy = circulant_class(re, im, tables, 0, Q1, Q2, PRECISION)
        xs = (re, im)
    elif SPLIT == 4:
        x0 = _load_block(row_ptr, piece, mask, unit, 0, TYPES, SHAPE)
        x1 = _load_block(row_ptr, piece, mask, unit, 1, TYPES, SHAPE)
        x2 = _load_block(row_ptr, piece, mask, unit, 2, TYPES, SHAPE)
        x3 = _load_block(row_ptr, piece, mask, unit, 3, TYPES, SHAPE)
        x0, x1, x2, x3, energy = circulant_four(x0, x1, x2, x3, tables, Q1, Q2, PRECISION, APART)
        xs = (x0, x1, x2, x3)  # type: ignore[assignment]
    else:
        x0 = _load_block(row_ptr, piece, mask, unit, 0, TYPES, SHAPE)
        x1 = _load_block(row_ptr, piece, mask, unit, 1, TYPES, SHAPE)
        x2 = _load_block(row_ptr, piece, mask, unit, 2, TYPES, SHAPE)
        x3 = _load_block(row_ptr, piece, mask, unit, 3, TYPES, SHAPE)
        x4 = _load_block(row_ptr, piece, mask, unit, 4, TYPES, SHAPE)
        x5 = _load_block(row_ptr, piece, mask, unit, 5, TYPES, SHAPE)
        x6 = _load_block(row_ptr, piece, mask, unit, 6, TYPES, SHAPE)
        x7 = _load_block(row_ptr, piece, mask, unit, 7, TYPES, SHAPE)
        x0, x1, x2, x3, x4, x5, x6, x7, energy = circulant_eight(
            x0, x1, x2, x3, x4, x5, x6, x7, tables, Q1, Q2, PRECISION, APART
        )
        xs = (x0, x1, x2, x3, x4, x5, x6, x7)  # type: ignore[assignment]
    row_ptr, piece = own_piece(owner_ptr, table_ptr, COLUMNS)
    unit = tl.load(row_ptr + 12) != 0
    square = 0.0
    for i in tl.static_range(2 if SPLIT == 1 else SPLIT):
        x = 2.0 * weight * xs[i]
        if SPLIT == 1:
            second = mask & (piece * 2 + i < vectors)
            square += _add_block(row_ptr, piece * 2 + i, second, unit, x, 0, TYPES, SHAPE)
        else:
            square += _add_block(row_ptr, piece, mask, unit, x, i, TYPES, SHAPE)
    tl.store(values_ptr + pid, weight * energy)
    tl.store(squares_ptr + pid, square)


@triton.jit
def _sum_kernel(partials_ptr, spans_ptr, values_ptr, BLOCK_N: tl.constexpr):
    """values[place] = the sum of one matrix's partials, in a fixed order.

    spans: (matrices, 3) int64: first partial, end, place in values.
    """
    pid = tl.program_id(0)
    start, end = tl.load(spans_ptr + 3 * pid), tl.load(spans_ptr + 3 * pid + 1)
    acc_N = tl.zeros((BLOCK_N,), tl.float32)
    for at in range(start, end, BLOCK_N):
        offs_N = at + tl.arange(0, BLOCK_N)
        acc_N += tl.load(partials_ptr + offs_N, mask=offs_N < end, other=0.0)
    tl.store(values_ptr + tl.load(spans_ptr + 3 * pid + 2), tl.sum(acc_N, axis=0))


@dataclass(frozen=True)
class Vectors:
    """A matrix as `count` feature vectors: strides in elements, between vectors and within one."""

    w: Tensor
    g: Tensor
    w0: Tensor | None
    role: str

    def axes(self, t: Tensor) -> tuple[int, int]:
        across, along = t.stride()
        return (across, along) if self.role == "A" else (along, across)

    @property
    def count(self) -> int:
        return self.w.shape[0] if self.role == "A" else self.w.shape[1]

    @property
    def length(self) -> int:
        return self.w.shape[1] if self.role == "A" else self.w.shape[0]

    @property
    def unit(self) -> bool:
        """Whether 128-bit loads are allowed."""
        tensors = [t for t in (self.w, self.g, self.w0) if t is not None]
        aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in tensors)
        strides = [self.axes(t) for t in tensors]
        return aligned and all(along == 1 and across % 16 == 0 for across, along in strides)


def programs(spec: Plan, matrix: Vectors) -> int:
    """How many programs a matrix takes."""
    return -(-matrix.count // spec.rows)


def constants(spec: Plan) -> dict[str, Any]:
    """The constexprs that a plan fixes."""
    q1, q2 = spec.padded
    return {
        "PRECISION": spec.precision,
        "SPLIT": spec.split,
        "q1": spec.q1,
        "q2": spec.q2,
        "Q1": q1,
        "Q2": q2,
        "APART": spec.apart,
        "COLUMNS": COLUMNS,
    }


def penalty_launch(
    matrices: Sequence[Vectors], spec: Plan, found: Tables, weight: float, partials: Tensor
) -> None:
    """One launch over matrices of one length, whose w, g, w0 each have one dtype.

    partials: (2, n) fp32, values and squares of every program in order; filled.
    """
    w, g, w0 = matrices[0].w, matrices[0].g, matrices[0].w0
    for matrix in matrices:
        for t in (matrix.w, matrix.g, *(() if matrix.w0 is None else (matrix.w0,))):
            reach = spec.length // spec.split * abs(matrix.axes(t)[1])
            require(reach < 2**31, "the stride of a matrix", t.stride(), "under 2**31 / a block")
    counts = tuple(programs(spec, m) for m in matrices)
    rows, first = [], 0
    for matrix, count in zip(matrices, counts, strict=True):
        start = matrix.w if matrix.w0 is None else matrix.w0
        strides = [s for t in (matrix.w, matrix.g, start) for s in matrix.axes(t)]
        addresses = [matrix.w.data_ptr(), matrix.g.data_ptr(), start.data_ptr()]
        rows.append((*addresses, matrix.count, first, *strides, 0, int(matrix.unit)))
        first += count
    _penalty_kernel[(first,)](
        owners(counts, w.device),
        on_device(tuple(rows), w.device),
        *partials,
        *found.pointers,
        float(weight),
        W_TYPE=TL_DTYPES[w.dtype],
        G_TYPE=TL_DTYPES[g.dtype],
        START_TYPE=None if w0 is None else TL_DTYPES[w0.dtype],
        **constants(spec),
        num_warps=spec.chip.num_warps,
    )


def sum_launch(partials: Tensor, counts: Sequence[int], order: Sequence[int]) -> Tensor:
    """Sums of consecutive runs of partials, run i to values[order[i]]: fp32, one launch."""
    spans, first = [], 0
    for count, place in zip(counts, order, strict=True):
        spans.append((first, first + count, place))
        first += count
    values = partials.new_empty(len(counts))
    table = on_device(tuple(spans), partials.device)
    _sum_kernel[(len(counts),)](partials, table, values, BLOCK_N=SUM_BLOCK, num_warps=SUM_WARPS)
    return values


@lru_cache(maxsize=64)
def owners(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(programs,) int32: the matrix that a program works on."""
    index = torch.arange(len(counts), dtype=torch.int32)
    return to_device(index.repeat_interleave(torch.tensor(counts)), device)


@lru_cache(maxsize=64)  # parameters do not move, and gradients seldom
def on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """A table as int64 on the device."""
    return to_device(torch.tensor(rows, dtype=torch.int64), device)
