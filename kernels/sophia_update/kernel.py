"""Sophia's update and the average of its curvature in Triton: one launch for all tensors.

Blocks: N elements of one tensor, found through the table of table.py. Everything is element-wise and
memory-bound, 24 bytes per fp32 parameter: read p, m, h, g, write p, m. Each program also counts its
clipped coordinates; counts are integers, so their sum does not depend on its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import TL_DTYPES
from .scalars import SCALARS, Scalars
from .table import BLOCK, META_COLUMNS, Layout, addresses, layout, scalar_rows

NUM_WARPS = 4
SUM_BLOCK = 4096  # partial results that the one finishing program reads at a time
SUM_WARPS = 8
TL_NAMES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}


@triton.jit
def piece(owner_ptr, meta_ptr, META: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's tensor, its elements offs_N and mask_N, and its row of scalars."""
    pid = tl.program_id(0)
    tensor = tl.load(owner_ptr + pid)
    size = tl.load(meta_ptr + tensor * META)
    first = tl.load(meta_ptr + tensor * META + 1)
    group = tl.load(meta_ptr + tensor * META + 2)
    if ALIGNED:
        size = tl.multiple_of(size, 16)  # else a mask may end inside four elements: no wide loads
    start = (pid - first) * BLOCK_N  # int64, as `first` is
    offs_N = start + tl.arange(0, BLOCK_N)
    return tensor, offs_N, offs_N < size, group


@triton.jit
def base(column_ptr, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor out of a column, as a pointer."""
    pointer = tl.load(column_ptr + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def sophia_step(p, m, h, g, row_ptr):
    """The update of a block of any shape in fp32; row_ptr: eight scalars, see `Scalars.row`.

    Returns (p', m', where it was clipped). Comparisons are written so that a NaN stays one.
    """
    lr = tl.load(row_ptr)
    lr_decay = tl.load(row_ptr + 1)
    beta1_rest = tl.load(row_ptr + 2)
    m_scale = tl.load(row_ptr + 3)
    h_factor = tl.load(row_ptr + 4)
    h_offset = tl.load(row_ptr + 5)
    eps = tl.load(row_ptr + 6)
    m += beta1_rest * (g - m)
    floor = h * h_factor + h_offset
    floor = tl.where(floor < eps, eps, floor)
    ratio = m * m_scale / floor
    over = tl.abs(ratio) > 1.0
    u = tl.where(over, tl.where(ratio > 0.0, 1.0, -1.0), ratio)
    return p - (lr * u + lr_decay * p), m, over


@triton.jit
def _sophia_kernel(
    owner_ptr,
    meta_ptr,
    p_column_ptr,
    m_column_ptr,
    h_column_ptr,
    g_column_ptr,
    copy_column_ptr,
    scalars_ptr,
    control_ptr,
    clipped_ptr,
    P_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    H_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    COPY_TYPE: tl.constexpr,  # None: no rounded copy is kept
    HAS_CONTROL: tl.constexpr,
    ALIGNED: tl.constexpr,
    META: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    tensor, offs_N, mask_N, group = piece(owner_ptr, meta_ptr, META, BLOCK_N, ALIGNED)
    factor = 1.0
    if HAS_CONTROL:
        factor = tl.load(control_ptr + 1)
        # Not finite: nothing is read or written. The sum makes a block of the flag, because the
        # interpreter cannot spread a boolean.
        finite_N = tl.zeros((BLOCK_N,), tl.float32) + tl.load(control_ptr + 2)
        mask_N = mask_N & (finite_N != 0.0)
    p_ptr = base(p_column_ptr, tensor, P_TYPE, ALIGNED) + offs_N
    m_ptr = base(m_column_ptr, tensor, M_TYPE, ALIGNED) + offs_N
    h_ptr = base(h_column_ptr, tensor, H_TYPE, ALIGNED) + offs_N
    g_ptr = base(g_column_ptr, tensor, G_TYPE, ALIGNED) + offs_N
    p_N = tl.load(p_ptr, mask=mask_N, other=0.0).to(tl.float32)
    m_N = tl.load(m_ptr, mask=mask_N, other=0.0).to(tl.float32)
    h_N = tl.load(h_ptr, mask=mask_N, other=0.0).to(tl.float32)
    g_N = tl.load(g_ptr, mask=mask_N, other=0.0).to(tl.float32)
    p_N, m_N, over_N = sophia_step(p_N, m_N, h_N, g_N * factor, scalars_ptr + group * SCALARS)
    tl.store(p_ptr, p_N.to(P_TYPE), mask=mask_N)
    tl.store(m_ptr, m_N.to(M_TYPE), mask=mask_N)
    if COPY_TYPE is not None:
        copy_ptr = base(copy_column_ptr, tensor, COPY_TYPE, ALIGNED) + offs_N
        tl.store(copy_ptr, p_N.to(COPY_TYPE), mask=mask_N)
    tl.store(clipped_ptr + pid, tl.sum((over_N & mask_N).to(tl.int32), axis=0))


@triton.jit
def _count_kernel(counts_ptr, total_ptr, n, BLOCK_N: tl.constexpr):
    """total = sum of counts (n,) int32 as int64; one program."""
    acc_N = tl.zeros((BLOCK_N,), tl.int64)
    full = n // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):  # without a mask: wide loads
        acc_N += tl.load(counts_ptr + start + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_N = full + tl.arange(0, BLOCK_N)
    acc_N += tl.load(counts_ptr + offs_N, mask=offs_N < n, other=0).to(tl.int64)
    tl.store(total_ptr, tl.sum(acc_N, axis=0))


@triton.jit
def _estimate_kernel(
    owner_ptr,
    meta_ptr,
    e_column_ptr,
    g_column_ptr,
    num_targets,
    G_TYPE: tl.constexpr,
    FIRST: tl.constexpr,  # e holds nothing yet and is not read
    ALIGNED: tl.constexpr,
    META: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """e += B g^2, B = num_targets."""
    tensor, offs_N, mask_N, _group = piece(owner_ptr, meta_ptr, META, BLOCK_N, ALIGNED)
    e_ptr = base(e_column_ptr, tensor, tl.float32, ALIGNED) + offs_N
    g_ptr = base(g_column_ptr, tensor, G_TYPE, ALIGNED) + offs_N
    g_N = tl.load(g_ptr, mask=mask_N, other=0.0).to(tl.float32)
    e_N = g_N * g_N * num_targets
    if not FIRST:
        e_N += tl.load(e_ptr, mask=mask_N, other=0.0)
    tl.store(e_ptr, e_N, mask=mask_N)


@triton.jit
def _curvature_kernel(
    owner_ptr,
    meta_ptr,
    h_column_ptr,
    e_column_ptr,
    beta2,
    e_factor,
    H_TYPE: tl.constexpr,
    E_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    META: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h = beta2 h + e_factor e, e_factor = (1 - beta2) / micro-batches."""
    tensor, offs_N, mask_N, _group = piece(owner_ptr, meta_ptr, META, BLOCK_N, ALIGNED)
    h_ptr = base(h_column_ptr, tensor, H_TYPE, ALIGNED) + offs_N
    e_ptr = base(e_column_ptr, tensor, E_TYPE, ALIGNED) + offs_N
    h_N = tl.load(h_ptr, mask=mask_N, other=0.0).to(tl.float32)
    e_N = tl.load(e_ptr, mask=mask_N, other=0.0).to(tl.float32)
    tl.store(h_ptr, (beta2 * h_N + e_factor * e_N).to(H_TYPE), mask=mask_N)


class Columns:
    """The table of one launch: a layout, columns of equally shaped lists, and what holds for all."""

    def __init__(self, lists: Sequence[Sequence[Tensor]], groups: Sequence[int] | None) -> None:
        first = lists[0]
        self.device = first[0].device
        self.layout: Layout = layout(first, groups or [0] * len(first))
        found = [addresses(tensors) for tensors in lists]
        self.columns = [column for column, _ in found]
        # One odd tensor takes wide loads from all: narrow ones still coalesce, and one launch stays one.
        sizes_fit = all(t.numel() % 16 == 0 for t in first)
        self.constants = {
            "ALIGNED": sizes_fit and all(aligned for _, aligned in found),
            "META": META_COLUMNS,
            "BLOCK_N": BLOCK,
        }

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Over all programs, one warp size; nothing where every tensor is empty."""
        if self.layout.programs:
            kernel[(self.layout.programs,)](
                self.layout.owner,
                self.layout.meta,
                *arguments,
                **self.constants,
                **constants,
                num_warps=NUM_WARPS,
            )


def sophia_launch(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    grads: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    rows: Sequence[Scalars],
    groups: Sequence[int],
    control: Tensor | None,
) -> Tensor:
    """Launch the update over contiguous tensors; lists of one dtype each. Returns the count, int64."""
    lists = [params, exp_avgs, curvatures, grads, *([copies] if copies is not None else [])]
    table = Columns(lists, groups)
    p, m, h, g = table.columns[:4]
    partials = torch.empty(table.layout.programs, dtype=torch.int32, device=table.device)
    table.launch(
        _sophia_kernel,
        p,
        m,
        h,
        g,
        table.columns[-1],
        scalar_rows([s.row() for s in rows], table.device),
        p if control is None else control,
        partials,
        P_TYPE=TL_DTYPES[params[0].dtype],
        M_TYPE=TL_DTYPES[exp_avgs[0].dtype],
        H_TYPE=TL_DTYPES[curvatures[0].dtype],
        G_TYPE=TL_DTYPES[grads[0].dtype],
        COPY_TYPE=None if copies is None else TL_DTYPES[copies[0].dtype],
        HAS_CONTROL=control is not None,
        SCALARS=SCALARS,
    )
    return count_launch(partials)


def count_launch(partials: Tensor) -> Tensor:
    """Sum of int32 counts (n,), 0-dim int64, without waiting for the device."""
    total = torch.empty((), dtype=torch.int64, device=partials.device)
    _count_kernel[(1,)](partials, total, partials.numel(), BLOCK_N=SUM_BLOCK, num_warps=SUM_WARPS)
    return total


def estimate_launch(
    estimates: Sequence[Tensor], grads: Sequence[Tensor], num_targets: float, first: bool
) -> None:
    """estimates (fp32) += num_targets * grads^2, or = where `first`."""
    table = Columns([estimates, grads], None)
    table.launch(
        _estimate_kernel,
        *table.columns,
        float(num_targets),
        G_TYPE=TL_DTYPES[grads[0].dtype],
        FIRST=first,
    )


def curvature_launch(
    curvatures: Sequence[Tensor], estimates: Sequence[Tensor], beta2: float, scale: float
) -> None:
    """curvatures = beta2 curvatures + (1 - beta2) scale estimates."""
    table = Columns([curvatures, estimates], None)
    table.launch(
        _curvature_kernel,
        *table.columns,
        float(beta2),
        (1.0 - beta2) * scale,
        H_TYPE=TL_DTYPES[curvatures[0].dtype],
        E_TYPE=TL_DTYPES[estimates[0].dtype],
    )
