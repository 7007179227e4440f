"""The global gradient norm and what follows from it, left on the device: two launches.

The control tensor, fp32 (3,): [norm, factor, finite]. `factor` is what a gradient is multiplied by:
gradient scale times clip factor; `finite` is 0 where the norm is not finite, and then an update
that reads it does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import TL_DTYPES
from .kernel import SUM_BLOCK, SUM_WARPS, Columns, base, piece
from .scalars import CONTROL, NORM_FLOOR


@triton.jit
def _square_sum_kernel(
    owner_ptr,
    meta_ptr,
    g_column_ptr,
    partials_ptr,
    G_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    META: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partials[program] = sum of the squares of its elements; a fixed order."""
    pid = tl.program_id(0)
    tensor, offs_N, mask_N, _group = piece(owner_ptr, meta_ptr, META, BLOCK_N, ALIGNED)
    g_ptr = base(g_column_ptr, tensor, G_TYPE, ALIGNED) + offs_N
    g_N = tl.load(g_ptr, mask=mask_N, other=0.0).to(tl.float32)
    tl.store(partials_ptr + pid, tl.sum(g_N * g_N, axis=0))


@triton.jit
def _norm_kernel(
    partials_ptr,
    scale_ptr,
    control_ptr,
    n,
    max_norm,  # 0: never clip
    added,
    HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: control = [norm, factor, finite] out of n partial sums, in a fixed order."""
    acc_N = tl.zeros((BLOCK_N,), tl.float32)
    full = n // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):  # without a mask: wide loads
        acc_N += tl.load(partials_ptr + start + tl.arange(0, BLOCK_N))
    offs_N = full + tl.arange(0, BLOCK_N)
    acc_N += tl.load(partials_ptr + offs_N, mask=offs_N < n, other=0.0)
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    norm = tl.sqrt(tl.sum(acc_N, axis=0)) * tl.abs(scale)
    finite = norm < float("inf")  # false for NaN too
    clip = tl.where((max_norm > 0.0) & (norm + added > max_norm), max_norm / (norm + added), 1.0)
    tl.store(control_ptr, norm)
    tl.store(control_ptr + 1, scale * clip)
    tl.store(control_ptr + 2, tl.where(finite, 1.0, 0.0))


def norm_launch(
    lists: Sequence[Sequence[Tensor]], max_norm: float, scale: Tensor | None, device: torch.device
) -> Tensor:
    """The control tensor over the gradients of `lists`: one launch per list (of one dtype), and one."""
    tables = [Columns([grads], None) for grads in lists]
    counts = [table.layout.programs for table in tables]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=device)
    for grads, table, part in zip(lists, tables, partials.split(counts), strict=True):
        table.launch(_square_sum_kernel, *table.columns, part, G_TYPE=TL_DTYPES[grads[0].dtype])
    control = torch.empty(CONTROL, dtype=torch.float32, device=device)
    _norm_kernel[(1,)](
        partials,
        partials if scale is None else scale,
        control,
        sum(counts),
        float(max_norm),
        NORM_FLOOR,
        HAS_SCALE=scale is not None,
        BLOCK_N=SUM_BLOCK,
        num_warps=SUM_WARPS,
    )
    return control
