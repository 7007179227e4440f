"""Projections of one input, such as q, k, v or gate, up: x is read once for all of them.

    S_i = drop_i(x) A_i^T          dA_i = dS_i^T drop_i(x)          dX = sum_i of their dX_i

Each projection has its own mask, applied to the tile of x in registers. Everything else is each
projection's own, as in forward.py and backward.py. Legend: M rows of x, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ranges import ranged
from .backward import _reduce, grad_a_config
from .dropout import dropped_lanes
from .forward import down_config
from .tiles import column_keys, ids_of_rows, keep_tile, padded_rank, precision, row_keys, row_major


@triton.jit
def _masked(x_MK, a_M, m_M, seed, offs_k, dropped, HAS_DROPOUT: tl.constexpr):
    if HAS_DROPOUT:
        b_K, n_K = column_keys(seed, offs_k)
        x_MK = tl.where(keep_tile(a_M, m_M, b_K, n_K, offs_k, dropped), x_MK, 0.0)
    return x_MK


@triton.jit(do_not_specialize=["dropped"])
def down_siblings_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    row_ids_ptr,
    seeds_ptr,
    dropped,
    rows,
    inputs,
    rank,
    stride_xm,
    COUNT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """S (COUNT, M, R) = drop_i(x) A_i^T with A (COUNT, R, K), COUNT 2 or 3; x read once."""
    pid_m = tl.program_id(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < rows
    mask_r = offs_r < rank
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + offs_r.to(tl.int64)[:, None] * inputs
    next_a = tl.cast(rank, tl.int64) * inputs
    seed_0, seed_1, seed_2 = (
        tl.load(seeds_ptr),
        tl.load(seeds_ptr + 1),
        tl.load(seeds_ptr + COUNT - 1),
    )
    ids_M = ids_of_rows(row_ids_ptr, offs_m, mask_m, HAS_ROW_IDS)
    a_M0, m_M0 = row_keys(seed_0, ids_M)
    a_M1, m_M1 = row_keys(seed_1, ids_M)
    a_M2, m_M2 = row_keys(seed_2, ids_M)
    acc_MR0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc_MR1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc_MR2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < inputs
        mask_RK = mask_r[:, None] & mask_k[None, :]
        x_MK = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a_RK = tl.load(a_rows + offs_k[None, :], mask=mask_RK, other=0.0)
        kept_MK = _masked(x_MK, a_M0, m_M0, seed_0, offs_k, dropped, HAS_DROPOUT)
        acc_MR0 = tl.dot(kept_MK, tl.trans(a_RK), acc_MR0, input_precision=PRECISION)
        a_RK = tl.load(a_rows + next_a + offs_k[None, :], mask=mask_RK, other=0.0)
        kept_MK = _masked(x_MK, a_M1, m_M1, seed_1, offs_k, dropped, HAS_DROPOUT)
        acc_MR1 = tl.dot(kept_MK, tl.trans(a_RK), acc_MR1, input_precision=PRECISION)
        if COUNT == 3:
            a_RK = tl.load(a_rows + 2 * next_a + offs_k[None, :], mask=mask_RK, other=0.0)
            kept_MK = _masked(x_MK, a_M2, m_M2, seed_2, offs_k, dropped, HAS_DROPOUT)
            acc_MR2 = tl.dot(kept_MK, tl.trans(a_RK), acc_MR2, input_precision=PRECISION)
    s_at = s_ptr + offs_m.to(tl.int64)[:, None] * rank + offs_r[None, :]
    next_s = tl.cast(rows, tl.int64) * rank
    mask_MR = mask_m[:, None] & mask_r[None, :]
    tl.store(s_at, acc_MR0.to(s_ptr.dtype.element_ty), mask=mask_MR)
    tl.store(s_at + next_s, acc_MR1.to(s_ptr.dtype.element_ty), mask=mask_MR)
    if COUNT == 3:
        tl.store(s_at + 2 * next_s, acc_MR2.to(s_ptr.dtype.element_ty), mask=mask_MR)


@triton.jit(do_not_specialize=["dropped"])
def grad_a_siblings_kernel(
    x_ptr,
    ds_ptr,
    da_ptr,
    row_ids_ptr,
    seeds_ptr,
    dropped,
    rows,
    inputs,
    rank,
    stride_xm,
    COUNT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial sums da (chunks, COUNT, R, K) of dS_i^T drop_i(x), ds (COUNT, M, R); x read once."""
    pid_c, pid_k = tl.program_id(0), tl.program_id(1)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = offs_k < inputs
    mask_r = offs_r < rank
    next_s = tl.cast(rows, tl.int64) * rank
    seed_0, seed_1, seed_2 = (
        tl.load(seeds_ptr),
        tl.load(seeds_ptr + 1),
        tl.load(seeds_ptr + COUNT - 1),
    )
    acc_KR0 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    acc_KR1 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    acc_KR2 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(pid_c * CHUNK, min(rows, (pid_c + 1) * CHUNK), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        mask_MR = mask_m[:, None] & mask_r[None, :]
        ids_M = ids_of_rows(row_ids_ptr, offs_m, mask_m, HAS_ROW_IDS)
        a_M0, m_M0 = row_keys(seed_0, ids_M)
        a_M1, m_M1 = row_keys(seed_1, ids_M)
        a_M2, m_M2 = row_keys(seed_2, ids_M)
        x_at = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
        x_MK = tl.load(x_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        ds_at = ds_ptr + offs_m.to(tl.int64)[:, None] * rank + offs_r[None, :]
        ds_MR = tl.load(ds_at, mask=mask_MR, other=0.0)
        kept_MK = _masked(x_MK, a_M0, m_M0, seed_0, offs_k, dropped, HAS_DROPOUT)
        acc_KR0 = tl.dot(tl.trans(kept_MK), ds_MR, acc_KR0, input_precision=PRECISION)
        ds_MR = tl.load(ds_at + next_s, mask=mask_MR, other=0.0)
        kept_MK = _masked(x_MK, a_M1, m_M1, seed_1, offs_k, dropped, HAS_DROPOUT)
        acc_KR1 = tl.dot(tl.trans(kept_MK), ds_MR, acc_KR1, input_precision=PRECISION)
        if COUNT == 3:
            ds_MR = tl.load(ds_at + 2 * next_s, mask=mask_MR, other=0.0)
            kept_MK = _masked(x_MK, a_M2, m_M2, seed_2, offs_k, dropped, HAS_DROPOUT)
            acc_KR2 = tl.dot(tl.trans(kept_MK), ds_MR, acc_KR2, input_precision=PRECISION)
    da_rows = pid_c.to(tl.int64) * COUNT * rank + offs_r[:, None]
    da_at = da_ptr + da_rows * inputs + offs_k[None, :]
    next_a = tl.cast(rank, tl.int64) * inputs
    mask_RK = mask_r[:, None] & mask_k[None, :]
    tl.store(da_at, tl.trans(acc_KR0), mask=mask_RK)
    tl.store(da_at + next_a, tl.trans(acc_KR1), mask=mask_RK)
    if COUNT == 3:
        tl.store(da_at + 2 * next_a, tl.trans(acc_KR2), mask=mask_RK)


@ranged("lora_linear/siblings/s", lambda x, a, *_: x.nbytes + sum(t.nbytes for t in a))
def down_siblings(
    x: Tensor,
    lora_as: Sequence[Tensor],
    dropout_p: float,
    seeds: Sequence[int],
    row_ids: Tensor | None,
) -> Tensor:
    """S (n, M, r) of x (M, K) and n = 2 or 3 A's (r, K) of one shape, in x's dtype."""
    x, a = row_major(x), torch.stack([a.to(x.dtype) for a in lora_as])
    count, rank, inputs = a.shape
    s = x.new_empty(count, x.shape[0], rank)
    blocks, launch = down_siblings_config(padded_rank(rank), x.dtype)
    if x.shape[0]:
        down_siblings_kernel[(triton.cdiv(x.shape[0], blocks["BLOCK_M"]),)](
            x,
            a,
            s,
            x if row_ids is None else row_ids,
            _on_device(seeds, x),
            dropped_lanes(dropout_p),
            x.shape[0],
            inputs,
            rank,
            x.stride(0),
            **_constants(count, dropout_p, row_ids, x),
            **blocks,
            **launch,
        )
    return s


@ranged("lora_linear/siblings/da", lambda x, ds, *_: x.nbytes + ds.nbytes)
def grad_a_siblings(
    x: Tensor,
    ds: Tensor,
    dropout_p: float,
    seeds: Sequence[int],
    row_ids: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dA (n, r, K) in `dtype` of x (M, K) and ds (n, M, r) in x's dtype."""
    x = row_major(x)
    (rows, inputs), (count, _, rank) = x.shape, ds.shape
    if not rows:
        return x.new_zeros(count, rank, inputs, dtype=dtype)
    blocks, launch = grad_a_siblings_config(padded_rank(rank), x.dtype)
    chunks = triton.cdiv(rows, blocks["CHUNK"])
    parts = x.new_empty((chunks, count, rank, inputs), dtype=torch.float32)
    grad_a_siblings_kernel[(chunks, triton.cdiv(inputs, blocks["BLOCK_K"]))](
        x,
        ds,
        parts,
        x if row_ids is None else row_ids,
        _on_device(seeds, x),
        dropped_lanes(dropout_p),
        rows,
        inputs,
        rank,
        x.stride(0),
        **_constants(count, dropout_p, row_ids, x),
        **blocks,
        **launch,
    )
    return _reduce(parts, dtype, 1.0)


def down_siblings_config(block_r: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and launch of `down_siblings_kernel`: more warps, for three accumulators."""
    blocks, launch = down_config(block_r)
    if dtype == torch.float32:  # dots on the FMA units keep their operands in registers
        blocks = {**blocks, "BLOCK_K": 32}
    return {**blocks, "BLOCK_R": block_r}, {**launch, "num_warps": 8}


def grad_a_siblings_config(
    block_r: int, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and launch of `grad_a_siblings_kernel`: fewer inputs, for three accumulators."""
    blocks, launch = grad_a_config(block_r, dtype)
    return {**blocks, "BLOCK_K": 64}, launch


def _on_device(seeds: Sequence[int], x: Tensor) -> Tensor:
    return torch.tensor(list(seeds), dtype=torch.int64, device=x.device)


def _constants(count: int, dropout_p: float, row_ids: Tensor | None, x: Tensor) -> dict[str, Any]:
    return {
        "COUNT": count,
        "HAS_DROPOUT": dropout_p > 0,
        "HAS_ROW_IDS": row_ids is not None,
        "PRECISION": precision(x.dtype),
    }
