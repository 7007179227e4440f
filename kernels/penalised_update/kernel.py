"""The `axis` penalty's gradient and Sophia's update in one pass: p, m, h, g read, p and m written.

Blocks as in spectral_penalty/kernel.py: one program takes two feature vectors of a matrix (split 1)
or one, transforms them in registers, and updates them where they lie: 24 bytes per fp32 parameter
and 4 for a start. m, h and g are loaded after the transform, so that each waits in registers for
nobody. p is kept through the transform; but for a vector in eight blocks with a start (`holds`), which is read
again, 4 bytes per parameter that were in this program's cache some microseconds before.

The table of a launch, (matrices, COLUMNS) int64: addresses of p, m, h, g; the first program;
addresses of w0 and of the copy; the number of vectors; the row of scalars; the strides between
vectors and between elements, equal for all tensors of a matrix; and a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launching import ALIGNMENT, TL_DTYPES
from ..runtime import require
from ..sophia_update.kernel import sophia_step
from ..sophia_update.scalars import SCALARS
from ..spectral_penalty.core import (
    circulant_class,
    circulant_eight,
    circulant_four,
    stacked_table,
)
from ..spectral_penalty.kernel import constants as plan_constants
from ..spectral_penalty.kernel import on_device, own_piece, owners
from ..spectral_penalty.tables import Plan, Tables

COLUMNS = 12


@triton.jit
def _offsets(row_ptr, SHAPE: tl.constexpr, UNIT: tl.constexpr, HIDDEN: tl.constexpr):
    """offs_Q1 and offs_Q2 of a block. SHAPE: q1, q2, Q1, Q2.

    HIDDEN adds a zero that the compiler cannot know: else it keeps what it computed for p's first
    load through the transform, and spills.
    """
    offs_Q1, offs_Q2 = tl.arange(0, SHAPE[2]), tl.arange(0, SHAPE[3])
    if HIDDEN:
        zero = tl.load(row_ptr + 11, volatile=True).to(tl.int32)
        if UNIT:
            zero = tl.multiple_of(zero, 16)
        offs_Q1 += zero
        offs_Q2 += zero
    return offs_Q1, offs_Q2


@triton.jit
def _inside(row_ptr, SHAPE: tl.constexpr, UNIT: tl.constexpr, HIDDEN: tl.constexpr):
    """Which elements of a block are not padding."""
    offs_Q1, offs_Q2 = _offsets(row_ptr, SHAPE, UNIT, HIDDEN)
    return (offs_Q1[:, None] < SHAPE[0]) & (offs_Q2[None, :] < SHAPE[1])


@triton.jit
def _places(row_ptr, SHAPE: tl.constexpr, UNIT: tl.constexpr, HIDDEN: tl.constexpr):
    """Offsets (Q1, Q2) within a block, in elements of memory.

    32 bits, which the launcher checks: 64-bit addresses of every element spill.
    """
    offs_Q1, offs_Q2 = _offsets(row_ptr, SHAPE, UNIT, HIDDEN)
    place = offs_Q1[:, None] * SHAPE[1] + offs_Q2[None, :]
    if UNIT:
        return place
    else:
        return place * tl.load(row_ptr + 10).to(tl.int32)


@triton.jit
def _start(
    row_ptr,
    which,
    COLUMN: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHAPE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Pointer to the first element of block BLOCK of vector `which` of a tensor."""
    pointer = tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    stride_v = tl.load(row_ptr + 9)
    if UNIT:
        pointer, stride_v = tl.multiple_of(pointer, 16), tl.multiple_of(stride_v, 16)
        return pointer + which * stride_v + BLOCK * SHAPE[0] * SHAPE[1]
    else:
        stride_e = tl.load(row_ptr + 10)
        return pointer + which * stride_v + (BLOCK * SHAPE[0] * SHAPE[1]) * stride_e


@triton.jit
def _load_block(
    row_ptr,
    which,
    mask,
    BLOCK: tl.constexpr,
    TYPES: tl.constexpr,
    SHAPE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Block BLOCK of vector `which`: (p, p - w0), fp32. TYPES: of p, m, h, g, w0 and the copy."""
    p_ptr = _start(row_ptr, which, 0, TYPES[0], BLOCK, SHAPE, UNIT)
    p_ptr += _places(row_ptr, SHAPE, UNIT, False)
    p = tl.load(p_ptr, mask=mask, other=0.0).to(tl.float32)
    w = p
    if TYPES[4] is not None:
        start_ptr = _start(row_ptr, which, 5, TYPES[4], BLOCK, SHAPE, UNIT)
        start_ptr += _places(row_ptr, SHAPE, UNIT, True)
        w = p - tl.load(start_ptr, mask=mask, other=0.0).to(tl.float32)
    return p, w


@triton.jit
def _step_block(
    row_ptr,
    which,
    mask,
    x,
    p,
    factor,
    finite,
    scalars_ptr,
    BLOCK: tl.constexpr,
    TYPES: tl.constexpr,
    SHAPE: tl.constexpr,
    UNIT: tl.constexpr,
    HOLDS: tl.constexpr,
):
    """Sophia's update of one block with the gradient g * factor + x.

    Returns (coordinates clipped, sum of x^2). Where `finite` is 0 nothing is written.
    """
    square = tl.sum(tl.sum(tl.where(mask, x * x, 0.0), axis=1), axis=0)
    # the sum makes a block of the flag, because the interpreter cannot spread a boolean
    mask = mask & (tl.zeros((SHAPE[2], SHAPE[3]), tl.float32) + finite != 0.0)
    places = _places(row_ptr, SHAPE, UNIT, True)
    p_ptr = _start(row_ptr, which, 0, TYPES[0], BLOCK, SHAPE, UNIT) + places
    m_ptr = _start(row_ptr, which, 1, TYPES[1], BLOCK, SHAPE, UNIT) + places
    h_ptr = _start(row_ptr, which, 2, TYPES[2], BLOCK, SHAPE, UNIT) + places
    g_ptr = _start(row_ptr, which, 3, TYPES[3], BLOCK, SHAPE, UNIT) + places
    if not HOLDS:
        p = tl.load(p_ptr, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptr, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr, mask=mask, other=0.0).to(tl.float32)
    p, m, over = sophia_step(p, m, h, g * factor + x, scalars_ptr)
    tl.store(p_ptr, p.to(TYPES[0]), mask=mask)
    tl.store(m_ptr, m.to(TYPES[1]), mask=mask)
    if TYPES[5] is not None:
        copy_ptr = _start(row_ptr, which, 6, TYPES[5], BLOCK, SHAPE, UNIT) + places
        tl.store(copy_ptr, p.to(TYPES[5]), mask=mask)
    return tl.sum(tl.sum((over & mask).to(tl.int32), axis=1), axis=0), square


@triton.jit
def _penalised_kernel(
    owner_ptr,
    table_ptr,
    scalars_ptr,
    control_ptr,
    values_ptr,
    squares_ptr,
    clipped_ptr,
    dft1_ptr,
    dft2_ptr,
    twiddle_ptr,
    sigma_ptr,
    twist_ptr,
    weight,
    P_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    H_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    START_TYPE: tl.constexpr,  # None: w0 = 0
    COPY_TYPE: tl.constexpr,  # None: no rounded copy is kept
    HAS_CONTROL: tl.constexpr,
    UNIT: tl.constexpr,  # elements lie side by side and aligned: wide loads
    HOLDS: tl.constexpr,
    APART: tl.constexpr,  # classes of a transform share no registers
    SCALARS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    q1: tl.constexpr,
    q2: tl.constexpr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Update this program's vectors; its weight <w, C w>, |2 weight C w|^2 and clipped count."""
    pid = tl.program_id(0)
    row_ptr, piece = own_piece(owner_ptr, table_ptr, COLUMNS)
    vectors = tl.load(row_ptr + 7)
    SHAPE: tl.constexpr = (q1, q2, Q1, Q2)
    TYPES: tl.constexpr = (P_TYPE, M_TYPE, H_TYPE, G_TYPE, START_TYPE, COPY_TYPE)
    mask = _inside(row_ptr, SHAPE, UNIT, False)
    dft1 = stacked_table(dft1_ptr, Q1, PRECISION)
    dft2 = dft1
    if q1 != q2:
        dft2 = stacked_table(dft2_ptr, Q2, PRECISION)
    tl.debug_barrier()  # tables are in shared memory before p is loaded: else both take registers
    tables = (dft1, dft2, twiddle_ptr, sigma_ptr, twist_ptr, row_ptr + 11)
    if SPLIT == 1:
        pair = mask & (piece * 2 + 1 < vectors)
        p0, re = _load_block(row_ptr, piece * 2, mask, 0, TYPES, SHAPE, UNIT)
        p1, im = _load_block(row_ptr, piece * 2 + 1, pair, 0, TYPES, SHAPE, UNIT)
        re, im, energy = circulant_class(re, im, tables, 0, Q1, Q2, PRECISION)
        ps, xs = (p0, p1), (re, im)
    elif SPLIT == 4:
        p0, x0 = _load_block(row_ptr, piece, mask, 0, TYPES, SHAPE, UNIT)
        p1, x1 = _load_block(row_ptr, piece, mask, 1, TYPES, SHAPE, UNIT)
        p2, x2 = _load_block(row_ptr, piece, mask, 2, TYPES, SHAPE, UNIT)
        p3, x3 = _load_block(row_ptr, piece, mask, 3, TYPES, SHAPE, UNIT)
        x0, x1, x2, x3, energy = circulant_four(x0, x1, x2, x3, tables, Q1, Q2, PRECISION, APART)
        ps, xs = (p0, p1, p2, p3), (x0, x1, x2, x3)  # type: ignore[assignment]
    else:
        p0, x0 = _load_block(row_ptr, piece, mask, 0, TYPES, SHAPE, UNIT)
        p1, x1 = _load_block(row_ptr, piece, mask, 1, TYPES, SHAPE, UNIT)
        p2, x2 = _load_block(row_ptr, piece, mask, 2, TYPES, SHAPE, UNIT)
        p3, x3 = _load_block(row_ptr, piece, mask, 3, TYPES, SHAPE, UNIT)
        p4, x4 = _load_block(row_ptr, piece, mask, 4, TYPES, SHAPE, UNIT)
        p5, x5 = _load_block(row_ptr, piece, mask, 5, TYPES, SHAPE, UNIT)
        p6, x6 = _load_block(row_ptr, piece, mask, 6, TYPES, SHAPE, UNIT)
        p7, x7 = _load_block(row_ptr, piece, mask, 7, TYPES, SHAPE, UNIT)
        x0, x1, x2, x3, x4, x5, x6, x7, energy = circulant_eight(
            x0, x1, x2, x3, x4, x5, x6, x7, tables, Q1, Q2, PRECISION, APART
        )
        ps = (p0, p1, p2, p3, p4, p5, p6, p7)  # type: ignore[assignment]
        xs = (x0, x1, x2, x3, x4, x5, x6, x7)  # type: ignore[assignment]
    row_ptr, piece = own_piece(owner_ptr, table_ptr, COLUMNS)
    mask = _inside(row_ptr, SHAPE, UNIT, UNIT)
    scalars_ptr += tl.load(row_ptr + 8) * SCALARS
    factor, finite = 1.0, 1.0
    if HAS_CONTROL:
        factor, finite = tl.load(control_ptr + 1), tl.load(control_ptr + 2)
    ROWS: tl.constexpr = 2 if SPLIT == 1 else 1
    clipped, square = 0, 0.0
    for i in tl.static_range(ROWS * SPLIT):
        which, inside = piece, mask
        if ROWS == 2:
            which = piece * 2 + i
            inside = mask & (which < vectors)
        count, part = _step_block(
            row_ptr,
            which,
            inside,
            2.0 * weight * xs[i],
            ps[i],
            factor,
            finite,
            scalars_ptr,
            0 if ROWS == 2 else i,
            TYPES,
            SHAPE,
            UNIT,
            HOLDS,
        )
        clipped += count
        square += part
    tl.store(values_ptr + pid, weight * energy)
    tl.store(squares_ptr + pid, square)
    tl.store(clipped_ptr + pid, clipped)


@dataclass(frozen=True)
class Item:
    """One matrix: p, m, h, g, w0 and the copy (or None), with equal strides; its row of scalars."""

    p: Tensor
    m: Tensor
    h: Tensor
    g: Tensor
    start: Tensor | None
    copy: Tensor | None
    role: str
    scalars: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the kernel's types."""
        return self.p, self.m, self.h, self.g, self.start, self.copy

    @property
    def count(self) -> int:
        """Feature vectors."""
        return self.p.shape[0] if self.role == "A" else self.p.shape[1]

    @property
    def length(self) -> int:
        """Elements of a feature vector."""
        return self.p.shape[1] if self.role == "A" else self.p.shape[0]

    @property
    def strides(self) -> tuple[int, int]:
        """Between vectors, between elements."""
        across, along = self.p.stride()
        return (across, along) if self.role == "A" else (along, across)

    @property
    def unit(self) -> bool:
        """Whether 128-bit loads are allowed."""
        aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in self.tensors if t is not None)
        return aligned and self.strides[1] == 1 and self.strides[0] % 16 == 0

    @property
    def key(self) -> tuple[Any, ...]:
        """What is equal within one launch."""
        return self.length, self.unit, *(None if t is None else t.dtype for t in self.tensors)


def fits(spec: Plan) -> bool:
    """Whether a program holds p, or reads it again, beside the transform without a spill."""
    padded = spec.row_points != spec.length
    within = spec.row_points <= spec.chip.row_update[spec.precision]
    return within and (spec.chip.pads_update or not padded)


def holds(spec: Plan, start: bool) -> bool:
    """Whether p stays in registers through the transform.

    With a start p and what is transformed differ from the first, and of a long row take 128 of the 255 registers of a
    thread. That is one too many where eight blocks wait for their turn (13824: 50 spill instructions on sm_90).
    """
    return not (start and spec.is_long and spec.split == 8)


def constants(spec: Plan, start: bool) -> dict[str, Any]:
    """The constexprs that a plan, and whether there is a start, fix."""
    own = {"COLUMNS": COLUMNS, "SCALARS": SCALARS, "HOLDS": holds(spec, start)}
    return {**plan_constants(spec), **own}


def update_launch(
    items: Sequence[Item],
    counts: Sequence[int],
    spec: Plan,
    found: Tables,
    weight: float,
    scalars: Tensor,
    control: Tensor | None,
    partials: tuple[Tensor, Tensor, Tensor],
) -> None:
    """One launch over matrices of one `key`.

    counts: programs of each matrix. partials: values and squares (fp32) and clipped coordinates
    (int32) of every program in order; filled.
    """
    rows, first = [], 0
    for item, count in zip(items, counts, strict=True):
        reach = spec.length // spec.split * item.strides[1]
        require(reach < 2**31, "the stride of a matrix", item.p.stride(), "under 2**31 / a block")
        p, m, h, g, start, copy = (0 if t is None else t.data_ptr() for t in item.tensors)
        rows.append((p, m, h, g, first, start, copy, item.count, item.scalars, *item.strides, 0))
        first += count
    types = [None if t is None else TL_DTYPES[t.dtype] for t in items[0].tensors]
    names = ("P_TYPE", "M_TYPE", "H_TYPE", "G_TYPE", "START_TYPE", "COPY_TYPE")
    device = items[0].p.device
    _penalised_kernel[(first,)](
        owners(tuple(counts), device),
        on_device(tuple(rows), device),
        scalars,
        scalars if control is None else control,
        *partials,
        *found.pointers,
        float(weight),
        **dict(zip(names, types, strict=True)),
        HAS_CONTROL=control is not None,
        UNIT=items[0].unit,
        **constants(spec, items[0].start is not None),
        num_warps=spec.chip.num_warps,
    )
