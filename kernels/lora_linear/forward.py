"""Triton functions of the forward pass: S = drop(x) A^T, and the GEMM with S (sB)^T in it.

Legend: M rows of x, K inputs, N outputs, R rank padded to a power of two >= 16 and masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ranges import ranged
from .dropout import dropped_lanes
from .tiles import column_keys, ids_of_rows, keep_tile, padded_rank, precision, row_keys, row_major

# Rows and inputs of a tile. 64 x 64 of x is 8 KB in bf16: three stages in flight take 24 KB, so that
# several programs share an SM and 2048 rows still make 32 of them. Not timed on a GPU.
DOWN = {"BLOCK_M": 64, "BLOCK_K": 64}
DOWN_LAUNCH = {"num_warps": 4, "num_stages": 3}
GEMM = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
GEMM_LAUNCH = {"num_warps": 8, "num_stages": 3}
# Full fp32 dots run on the FMA units, out of registers: smaller tiles.
GEMM_FP32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
GEMM_FP32_LAUNCH = {"num_warps": 8, "num_stages": 2}
STEP_R = 64  # of a larger rank the GEMMs take so much at a time


@triton.jit(do_not_specialize=["seed", "dropped"])
def down_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    row_ids_ptr,
    seed,
    dropped,
    rows,
    inputs,
    rank,
    stride_xm,
    stride_ar,
    HAS_DROPOUT: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """S (M, R) = drop(x) A^T, x read once."""
    pid_m = tl.program_id(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < rows
    mask_r = offs_r < rank
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + offs_r.to(tl.int64)[:, None] * stride_ar
    if HAS_DROPOUT:
        ids_M = ids_of_rows(row_ids_ptr, offs_m, mask_m, HAS_ROW_IDS)
        a_M, m_M = row_keys(seed, ids_M)
    acc_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < inputs
        x_MK = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a_RK = tl.load(a_rows + offs_k[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        if HAS_DROPOUT:
            b_K, n_K = column_keys(seed, offs_k)
            x_MK = tl.where(keep_tile(a_M, m_M, b_K, n_K, offs_k, dropped), x_MK, 0.0)
        acc_MR = tl.dot(x_MK, tl.trans(a_RK.to(x_MK.dtype)), acc_MR, input_precision=PRECISION)
    s_MR = acc_MR.to(s_ptr.dtype.element_ty)
    s_at = s_ptr + offs_m.to(tl.int64)[:, None] * rank + offs_r[None, :]
    tl.store(s_at, s_MR, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def forward_gemm_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    y_ptr,
    rows,
    inputs,
    outputs,
    rank,
    stride_xm,
    stride_wn,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP_R: tl.constexpr,
):
    """y (M, N) = S (sB)^T + x W^T + bias: the low-rank term starts the accumulator, fp32 throughout.

    b_ptr holds s B, (N, R) in x's dtype. HAS_LORA=False is the frozen GEMM alone, for comparison.
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows
    mask_n = offs_n < outputs
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_LORA:
        for first in tl.static_range(0, BLOCK_R, STEP_R):
            offs_r = first + tl.arange(0, STEP_R)
            mask_r = offs_r < rank
            s_at = s_ptr + offs_m.to(tl.int64)[:, None] * rank + offs_r[None, :]
            b_at = b_ptr + offs_n.to(tl.int64)[:, None] * rank + offs_r[None, :]
            s_MR = tl.load(s_at, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            b_NR = tl.load(b_at, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
            acc_MN = tl.dot(s_MR, tl.trans(b_NR), acc_MN, input_precision=PRECISION)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    w_rows = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn
    for start in range(0, inputs, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < inputs
        x_MK = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w_NK = tl.load(w_rows + offs_k[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, input_precision=PRECISION)
    if HAS_BIAS:
        bias_N = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        acc_MN += bias_N[None, :]
    y_at = y_ptr + offs_m.to(tl.int64)[:, None] * outputs + offs_n[None, :]
    y_MN = acc_MN.to(y_ptr.dtype.element_ty)
    tl.store(y_at, y_MN, mask=mask_m[:, None] & mask_n[None, :])


@ranged(
    "lora_linear/s",
    lambda x, a, *_: x.nbytes + a.nbytes + x.shape[0] * a.shape[0] * x.element_size(),
)
def down(
    x: Tensor,
    lora_a: Tensor,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None = None,
) -> Tensor:
    """S = drop(x) A^T: x (M, K), A (r, K) any float dtype -> (M, r) in x's dtype, unscaled."""
    x, lora_a = row_major(x), row_major(lora_a)
    rows, rank = x.shape[0], lora_a.shape[0]
    s = x.new_empty(rows, rank)
    blocks, launch = down_config(padded_rank(rank))
    if rows:
        grid = (triton.cdiv(rows, blocks["BLOCK_M"]),)
        down_kernel[grid](
            x,
            lora_a,
            s,
            x if row_ids is None else row_ids,
            seed or 0,
            dropped_lanes(dropout_p),
            rows,
            x.shape[1],
            rank,
            x.stride(0),
            lora_a.stride(0),
            HAS_DROPOUT=dropout_p > 0,
            HAS_ROW_IDS=row_ids is not None,
            PRECISION=precision(x.dtype),
            BLOCK_R=padded_rank(rank),
            **blocks,
            **launch,
        )
    return s


@ranged("lora_linear/gemm")
def forward_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor | None, scaled_b: Tensor | None
) -> Tensor:
    """x W^T + bias, with S (sB)^T in the accumulator unless `s` is None.

    x (M, K), W (N, K), bias (N,), s (M, r), scaled_b (N, r), all of x's dtype but bias -> (M, N).
    """
    x, weight = row_major(x), row_major(weight)
    rows, outputs = x.shape[0], weight.shape[0]
    rank = 1 if s is None else s.shape[1]
    y = x.new_empty(rows, outputs)
    blocks, launch = gemm_config(x.dtype, padded_rank(rank))
    if rows:
        grid = (triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(outputs, blocks["BLOCK_N"]))
        forward_gemm_kernel[grid](
            x,
            weight,
            x if bias is None else bias,
            x if s is None else s,
            x if scaled_b is None else scaled_b.contiguous(),
            y,
            rows,
            x.shape[1],
            outputs,
            rank,
            x.stride(0),
            weight.stride(0),
            HAS_BIAS=bias is not None,
            HAS_LORA=s is not None,
            PRECISION=precision(x.dtype),
            BLOCK_R=padded_rank(rank),
            **blocks,
            **launch,
        )
    return y


def down_config(block_r: int) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes and launch options of `down_kernel` for a padded rank."""
    if block_r > 64:
        return {"BLOCK_M": 64, "BLOCK_K": 32}, {"num_warps": 8, "num_stages": 2}
    return DOWN, DOWN_LAUNCH


def gemm_config(dtype: torch.dtype, block_r: int) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes and launch options of the GEMMs for x's dtype and a padded rank."""
    blocks, launch = (
        (GEMM_FP32, GEMM_FP32_LAUNCH) if dtype == torch.float32 else (GEMM, GEMM_LAUNCH)
    )
    return {**blocks, "STEP_R": min(block_r, STEP_R)}, launch
