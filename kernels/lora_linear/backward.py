"""Triton functions of the backward pass. Deterministic: partial sums are added in a fixed order.

    dS = dY (sB), dB = s dY^T S   in one pass over dY        dA = dS^T drop(x)   in one pass over x
    dX = keep * (dS A) + dY W     the mask made again in the epilogue

Legend: M rows of x, K inputs, N outputs, R rank padded to a power of two >= 16 and masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ranges import ranged
from .dropout import dropped_lanes
from .forward import gemm_config
from .tiles import column_keys, ids_of_rows, keep_tile, padded_rank, precision, row_keys, row_major

# A program of `grad_sb_kernel` owns a panel of BLOCK_N outputs, so that dB of the panel stays in
# registers, and walks through CHUNK rows. dS is then N / BLOCK_N partial sums, dB M / CHUNK: at M = N
# = 4096, r = 16 with 256 and 512 the two workspaces are 6.3 MB beside 33.6 MB of dY, and fit into L2.
# Not timed on a GPU.
BLOCK_M = 64
CHUNK = 512
BLOCK_K = 128  # inputs that a program of `grad_a_kernel` owns
REDUCE = {"BLOCK": 1024}
LAUNCH = {"num_warps": 8, "num_stages": 2}


def grad_sb_config(block_r: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and launch of `grad_sb_kernel`: fewer outputs a program where R or the dtype is wide.

    Of a rank above 64 a program takes 64, so that nothing spills; dY is then read rank / 64 times.
    """
    block_n = {16: 256, 32: 128}.get(block_r, 64) // (2 if dtype == torch.float32 else 1)
    return {
        "CHUNK": CHUNK,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": block_n,
        "BLOCK_R": min(block_r, 64),
    }, LAUNCH


def grad_a_config(block_r: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and launch of `grad_a_kernel`."""
    block_k = BLOCK_K // 2 if block_r > 64 or dtype == torch.float32 else BLOCK_K
    return {"CHUNK": CHUNK, "BLOCK_M": BLOCK_M, "BLOCK_K": block_k, "BLOCK_R": block_r}, LAUNCH


def transposed(blocks: dict[str, int]) -> dict[str, int]:
    """Block sizes of a GEMM whose outputs are the inputs: N and K change places."""
    return {**blocks, "BLOCK_N": blocks["BLOCK_K"], "BLOCK_K": blocks["BLOCK_N"]}


@triton.jit
def grad_sb_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    ds_ptr,
    db_ptr,
    rows,
    outputs,
    rank,
    stride_dm,
    NEED_DS: tl.constexpr,
    NEED_DB: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial sums: ds (panels, M, R) of dY (sB), db (chunks, N, R) of dY^T S; dY read once."""
    pid_c, pid_n = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = offs_n < outputs
    mask_r = offs_r < rank
    mask_NR = mask_n[:, None] & mask_r[None, :]
    at_NR = offs_n.to(tl.int64)[:, None] * rank + offs_r[None, :]
    if NEED_DS:
        b_NR = tl.load(b_ptr + at_NR, mask=mask_NR, other=0.0)
        ds_panel = ds_ptr + pid_n.to(tl.int64) * rows * rank
    acc_NR = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(pid_c * CHUNK, min(rows, (pid_c + 1) * CHUNK), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        dy_at = dy_ptr + offs_m.to(tl.int64)[:, None] * stride_dm + offs_n[None, :]
        dy_MN = tl.load(dy_at, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        at_MR = offs_m.to(tl.int64)[:, None] * rank + offs_r[None, :]
        mask_MR = mask_m[:, None] & mask_r[None, :]
        if NEED_DS:
            ds_MR = tl.dot(dy_MN, b_NR, input_precision=PRECISION)
            tl.store(ds_panel + at_MR, ds_MR, mask=mask_MR)
        if NEED_DB:
            s_MR = tl.load(s_ptr + at_MR, mask=mask_MR, other=0.0)
            acc_NR = tl.dot(tl.trans(dy_MN), s_MR, acc_NR, input_precision=PRECISION)
    if NEED_DB:
        db_chunk = db_ptr + pid_c.to(tl.int64) * outputs * rank
        tl.store(db_chunk + at_NR, acc_NR, mask=mask_NR)


@triton.jit(do_not_specialize=["seed", "dropped"])
def grad_a_kernel(
    x_ptr,
    ds_ptr,
    da_ptr,
    row_ids_ptr,
    seed,
    dropped,
    rows,
    inputs,
    rank,
    stride_xm,
    HAS_DROPOUT: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial sums da (chunks, R, K) of dS^T drop(x); x read once, its mask made again."""
    pid_c, pid_k = tl.program_id(0), tl.program_id(1)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = offs_k < inputs
    mask_r = offs_r < rank
    if HAS_DROPOUT:
        b_K, n_K = column_keys(seed, offs_k)
    # this way round: a rank of 16 is too few rows for a tensor core's tile
    acc_KR = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(pid_c * CHUNK, min(rows, (pid_c + 1) * CHUNK), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        ids_M = ids_of_rows(row_ids_ptr, offs_m, mask_m, HAS_ROW_IDS)
        x_at = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
        x_MK = tl.load(x_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if HAS_DROPOUT:
            a_M, m_M = row_keys(seed, ids_M)
            x_MK = tl.where(keep_tile(a_M, m_M, b_K, n_K, offs_k, dropped), x_MK, 0.0)
        ds_at = ds_ptr + offs_m.to(tl.int64)[:, None] * rank + offs_r[None, :]
        ds_MR = tl.load(ds_at, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        acc_KR = tl.dot(tl.trans(x_MK), ds_MR, acc_KR, input_precision=PRECISION)
    da_at = da_ptr + (pid_c.to(tl.int64) * rank + offs_r[:, None]) * inputs + offs_k[None, :]
    tl.store(da_at, tl.trans(acc_KR), mask=mask_r[:, None] & mask_k[None, :])


@triton.jit
def reduce_kernel(parts_ptr, out_ptr, scale, parts, size, BLOCK: tl.constexpr):
    """out (size,) = scale * sum of parts (parts, size), in order."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        at = parts_ptr + tl.cast(part, tl.int64) * size + offs
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(out_ptr + offs, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "dropped"])
def grad_x_kernel(
    dy_ptr,
    w_ptr,
    ds_ptr,
    a_ptr,
    dx_ptr,
    row_ids_ptr,
    seed,
    dropped,
    rows,
    inputs,
    outputs,
    rank,
    stride_dm,
    stride_wn,
    stride_ar,
    HAS_DROPOUT: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    HAS_GEMM: tl.constexpr,
    HAS_LORA: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP_R: tl.constexpr,
):
    """dX (M, K) = keep * (dS A) [+ dY W with HAS_GEMM], the low-rank term first, fp32 throughout.

    ADD: what dX holds is added, as for a projection whose sibling wrote it.
    """
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = offs_m < rows
    mask_k = offs_k < inputs
    acc_MK = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if HAS_LORA:
        for first in tl.static_range(0, BLOCK_R, STEP_R):
            offs_r = first + tl.arange(0, STEP_R)
            mask_r = offs_r < rank
            ds_at = ds_ptr + offs_m.to(tl.int64)[:, None] * rank + offs_r[None, :]
            a_at = a_ptr + offs_r.to(tl.int64)[:, None] * stride_ar + offs_k[None, :]
            ds_MR = tl.load(ds_at, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            a_RK = tl.load(a_at, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            acc_MK = tl.dot(ds_MR, a_RK.to(ds_MR.dtype), acc_MK, input_precision=PRECISION)
        if HAS_DROPOUT:
            ids_M = ids_of_rows(row_ids_ptr, offs_m, mask_m, HAS_ROW_IDS)
            a_M, m_M = row_keys(seed, ids_M)
            b_K, n_K = column_keys(seed, offs_k)
            acc_MK = tl.where(keep_tile(a_M, m_M, b_K, n_K, offs_k, dropped), acc_MK, 0.0)
    if HAS_GEMM:
        dy_rows = dy_ptr + offs_m.to(tl.int64)[:, None] * stride_dm
        for start in range(0, outputs, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < outputs
            dy_at = dy_rows + offs_n[None, :]
            w_at = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn + offs_k[None, :]
            dy_MN = tl.load(dy_at, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            w_NK = tl.load(w_at, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            acc_MK = tl.dot(dy_MN, w_NK, acc_MK, input_precision=PRECISION)
    dx_at = dx_ptr + offs_m.to(tl.int64)[:, None] * inputs + offs_k[None, :]
    if ADD:
        before_MK = tl.load(dx_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc_MK += before_MK.to(tl.float32)
    dx_MK = acc_MK.to(dx_ptr.dtype.element_ty)
    tl.store(dx_at, dx_MK, mask=mask_m[:, None] & mask_k[None, :])


@ranged("lora_linear/ds_db", lambda dy, b, *_, **__: dy.nbytes + 2 * b.nbytes)
def grad_s_and_b(
    dy: Tensor,
    scaled_b: Tensor,
    s: Tensor | None,
    scale: float,
    b_dtype: torch.dtype,
    need_ds: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dS (M, r) in dy's dtype and dB (N, r) in `b_dtype`; None for dB without `s`, for dS if unneeded.

    dy (M, N), scaled_b = s B (N, r) and s = S (M, r) of dy's dtype.
    """
    dy, scaled_b = row_major(dy), scaled_b.contiguous()
    rows, outputs = dy.shape
    rank = scaled_b.shape[1]
    need_db = s is not None
    if not rows:
        ds = dy.new_zeros(0, rank) if need_ds else None
        return ds, dy.new_zeros(outputs, rank, dtype=b_dtype) if need_db else None
    blocks, launch = grad_sb_config(padded_rank(rank), dy.dtype)
    chunks, panels = triton.cdiv(rows, blocks["CHUNK"]), triton.cdiv(outputs, blocks["BLOCK_N"])
    ds_parts = dy.new_empty((panels, rows, rank) if need_ds else (1,), dtype=torch.float32)
    db_parts = dy.new_empty((chunks, outputs, rank) if need_db else (1,), dtype=torch.float32)
    grad_sb_kernel[(chunks, panels, triton.cdiv(rank, blocks["BLOCK_R"]))](
        dy,
        scaled_b,
        dy if s is None else s,
        ds_parts,
        db_parts,
        rows,
        outputs,
        rank,
        dy.stride(0),
        NEED_DS=need_ds,
        NEED_DB=need_db,
        PRECISION=precision(dy.dtype),
        **blocks,
        **launch,
    )
    ds = _reduce(ds_parts, dy.dtype, 1.0) if need_ds else None
    return ds, _reduce(db_parts, b_dtype, scale) if need_db else None


def grad_a(
    x: Tensor,
    ds: Tensor,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dA = dS^T drop(x): x (M, K), ds (M, r) of x's dtype -> (r, K) in `dtype`."""
    x = row_major(x)
    (rows, inputs), rank = x.shape, ds.shape[1]
    if not rows:
        return x.new_zeros(rank, inputs, dtype=dtype)
    blocks, launch = grad_a_config(padded_rank(rank), x.dtype)
    chunks = triton.cdiv(rows, blocks["CHUNK"])
    parts = x.new_empty((chunks, rank, inputs), dtype=torch.float32)
    grad_a_kernel[(chunks, triton.cdiv(inputs, blocks["BLOCK_K"]))](
        x,
        ds,
        parts,
        x if row_ids is None else row_ids,
        seed or 0,
        dropped_lanes(dropout_p),
        rows,
        inputs,
        rank,
        x.stride(0),
        HAS_DROPOUT=dropout_p > 0,
        HAS_ROW_IDS=row_ids is not None,
        PRECISION=precision(x.dtype),
        **blocks,
        **launch,
    )
    return _reduce(parts, dtype, 1.0)


@ranged("lora_linear/dx")
def grad_x(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor | None,
    lora_a: Tensor,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None,
    with_gemm: bool,
    add_to: Tensor | None = None,
) -> Tensor:
    """keep * (dS A), (M, K), and dY W added to it if `with_gemm`; without `ds` the GEMM alone.

    With `add_to`, (M, K) contiguous, the sum of that and this, in its place.
    """
    dy, weight, lora_a = row_major(dy), row_major(weight), row_major(lora_a)
    (rows, outputs), inputs = dy.shape, lora_a.shape[1]
    rank = lora_a.shape[0]
    dx = dy.new_empty(rows, inputs) if add_to is None else add_to
    sizes, launch = gemm_config(dy.dtype, padded_rank(rank))
    blocks = transposed(sizes)
    if rows:
        grid = (triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(inputs, blocks["BLOCK_K"]))
        grad_x_kernel[grid](
            dy,
            weight,
            dy if ds is None else ds,
            lora_a,
            dx,
            dy if row_ids is None else row_ids,
            seed or 0,
            dropped_lanes(dropout_p),
            rows,
            inputs,
            outputs,
            rank,
            dy.stride(0),
            weight.stride(0),
            lora_a.stride(0),
            HAS_DROPOUT=dropout_p > 0,
            HAS_ROW_IDS=row_ids is not None,
            HAS_GEMM=with_gemm,
            HAS_LORA=ds is not None,
            ADD=add_to is not None,
            PRECISION=precision(dy.dtype),
            BLOCK_R=padded_rank(rank),
            **blocks,
            **launch,
        )
    return dx


def _reduce(parts: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """scale * sum over the first axis, in order, in `dtype`."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    size = out.numel()
    grid = (triton.cdiv(size, REDUCE["BLOCK"]),)
    reduce_kernel[grid](parts, out, scale, parts.shape[0], size, **REDUCE, num_warps=4)
    return out
