"""lambda * gradient of the `axis` penalty added into gradients in place: one launch per length.

Blocks: one program takes two feature vectors of one matrix (split 1) or one. A feature vector is a
row of an A or a column of a B: both are a start and a stride, so they share a launch. Memory: w and
g (and w0) are read once and g is written once; tables come from L2.

The table of a launch, (matrices, COLUMNS) int64: addresses of w, g, w0; the number of vectors; the
first program; then between vectors and between elements the strides of w, g and w0; and a zero.
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

from ..launching import TL_DTYPES, to_device
from ..runtime import require
from .core import circulant_class, circulant_eight, circulant_four, stacked_table
from .tables import Plan, Tables

COLUMNS = 12
NUM_WARPS = 8
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
    zero,
):
    """Pointers (Q1, Q2) to block BLOCK of vector `which` of w, g or w0. SHAPE: q1, q2, Q1, Q2."""
    pointer = tl.load(row_ptr + WHICH).to(tl.pointer_type(DTYPE))
    stride_v, stride_e = tl.load(row_ptr + 5 + 2 * WHICH), tl.load(row_ptr + 6 + 2 * WHICH)
    offs_Q1, offs_Q2 = tl.arange(0, SHAPE[2]), tl.arange(0, SHAPE[3])
    place = (offs_Q1 + zero)[:, None] * SHAPE[1] + (offs_Q2 + zero)[None, :]
    start = pointer + which * stride_v + (BLOCK * SHAPE[0] * SHAPE[1]) * stride_e
    # 32 bits inside a block, which the launcher checks: 64-bit addresses of every element spill
    return start + place * stride_e.to(tl.int32)


@triton.jit
def _load_block(
    row_ptr,
    which,
    mask,
    BLOCK: tl.constexpr,
    W_TYPE: tl.constexpr,
    START_TYPE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Block BLOCK of vector `which` of w - w0, fp32."""
    w_ptr = _block(row_ptr, which, 0, W_TYPE, BLOCK, SHAPE, 0)
    w = tl.load(w_ptr, mask=mask, other=0.0).to(tl.float32)
    if START_TYPE is not None:
        zero = tl.load(row_ptr + 11, volatile=True).to(tl.int32)  # as in _add_block
        start_ptr = _block(row_ptr, which, 2, START_TYPE, BLOCK, SHAPE, zero)
        w -= tl.load(start_ptr, mask=mask, other=0.0).to(tl.float32)
    return w


@triton.jit
def _add_block(
    row_ptr, which, mask, x, BLOCK: tl.constexpr, G_TYPE: tl.constexpr, SHAPE: tl.constexpr
):
    """g += x for one block; returns the sum of x^2."""
    # a zero that the compiler cannot know: else it keeps w's offsets through the transform, and spills
    zero = tl.load(row_ptr + 11, volatile=True).to(tl.int32)
    g_ptr = _block(row_ptr, which, 1, G_TYPE, BLOCK, SHAPE, zero)
    g = tl.load(g_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr, (g + x).to(G_TYPE), mask=mask)
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
    COLUMNS: tl.constexpr,
):
    """g += x = 2 weight C (w - w0) for this program's vectors; its weight <w, C w> and |x|^2."""
    pid = tl.program_id(0)
    row_ptr, piece = own_piece(owner_ptr, table_ptr, COLUMNS)
    vectors = tl.load(row_ptr + 3)
    SHAPE: tl.constexpr = (q1, q2, Q1, Q2)
    offs_Q1, offs_Q2 = tl.arange(0, Q1), tl.arange(0, Q2)
    mask = (offs_Q1[:, None] < q1) & (offs_Q2[None, :] < q2)
    dft1 = stacked_table(dft1_ptr, Q1, PRECISION)
    dft2 = dft1
    if q1 != q2:
        dft2 = stacked_table(dft2_ptr, Q2, PRECISION)
    tl.debug_barrier()  # tables are in shared memory before w is loaded: else both take registers
    tables = (dft1, dft2, twiddle_ptr, sigma_ptr, twist_ptr)
    if SPLIT == 1:
        first, second = piece * 2, piece * 2 + 1
        pair = mask & (second < vectors)
        re = _load_block(row_ptr, first, mask, 0, W_TYPE, START_TYPE, SHAPE)
        im = _load_block(row_ptr, second, pair, 0, W_TYPE, START_TYPE, SHAPE)
        re, im, energy = circulant_class(re, im, tables, 0, Q1, Q2, PRECISION)
        row_ptr, piece = own_piece(owner_ptr, table_ptr, COLUMNS)
        square = _add_block(row_ptr, first, mask, 2.0 * weight * re, 0, G_TYPE, SHAPE)
        square += _add_block(row_ptr, second, pair, 2.0 * weight * im, 0, G_TYPE, SHAPE)
    elif SPLIT == 4:
        x0 = _load_block(row_ptr, piece, mask, 0, W_TYPE, START_TYPE, SHAPE)
        x1 = _load_block(row_ptr, piece, mask, 1, W_TYPE, START_TYPE, SHAPE)
        x2 = _load_block(row_ptr, piece, mask, 2, W_TYPE, START_TYPE, SHAPE)
        x3 = _load_block(row_ptr, piece, mask, 3, W_TYPE, START_TYPE, SHAPE)
        x0, x1, x2, x3, energy = circulant_four(x0, x1, x2, x3, tables, Q1, Q2, PRECISION)
        row_ptr, piece = own_piece(owner_ptr, table_ptr, COLUMNS)
        square = _add_block(row_ptr, piece, mask, 2.0 * weight * x0, 0, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x1, 1, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x2, 2, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x3, 3, G_TYPE, SHAPE)
    else:
        x0 = _load_block(row_ptr, piece, mask, 0, W_TYPE, START_TYPE, SHAPE)
        x1 = _load_block(row_ptr, piece, mask, 1, W_TYPE, START_TYPE, SHAPE)
        x2 = _load_block(row_ptr, piece, mask, 2, W_TYPE, START_TYPE, SHAPE)
        x3 = _load_block(row_ptr, piece, mask, 3, W_TYPE, START_TYPE, SHAPE)
        x4 = _load_block(row_ptr, piece, mask, 4, W_TYPE, START_TYPE, SHAPE)
        x5 = _load_block(row_ptr, piece, mask, 5, W_TYPE, START_TYPE, SHAPE)
        x6 = _load_block(row_ptr, piece, mask, 6, W_TYPE, START_TYPE, SHAPE)
        x7 = _load_block(row_ptr, piece, mask, 7, W_TYPE, START_TYPE, SHAPE)
        x0, x1, x2, x3, x4, x5, x6, x7, energy = circulant_eight(
            x0, x1, x2, x3, x4, x5, x6, x7, tables, Q1, Q2, PRECISION
        )
        row_ptr, piece = own_piece(owner_ptr, table_ptr, COLUMNS)
        square = _add_block(row_ptr, piece, mask, 2.0 * weight * x0, 0, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x1, 1, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x2, 2, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x3, 3, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x4, 4, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x5, 5, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x6, 6, G_TYPE, SHAPE)
        square += _add_block(row_ptr, piece, mask, 2.0 * weight * x7, 7, G_TYPE, SHAPE)
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
        rows.append((*addresses, matrix.count, first, *strides, 0))
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
        num_warps=NUM_WARPS,
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
