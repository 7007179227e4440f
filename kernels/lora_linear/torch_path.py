"""Forward and backward by `products`, on any device; on a CPU the low-rank ones in bf16 by skinny_native.py.

The skinny product comes first in y and in dx, and the frozen GEMM accumulates onto it: the low-rank
term is rounded at its own size, then added in the GEMM's fp32 accumulator, without a further pass
over (M, N) or (M, K). Where the frozen GEMM is our own C (`gemm_native`), the low-rank term starts its
accumulators and is written nowhere. Legend: api.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gemm_native, products
from . import skinny_native
from .dropout import apply_mask, apply_mask_, keep_mask


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and S (M, r) of x (M, K); `scale` is alpha / r / (1 - p)."""
    scaled_b = scaled(lora_b, scale, x.dtype)
    if (run := skinny_native.library_for(x, lora_a.shape[0], dropout_p)) is not None:
        a, mask = lora_a.to(x.dtype), (dropout_p, seed, row_ids)
        if products.in_c(x, weight.t()):
            s_mr = skinny_native.down(run, x, a, *mask)
            return output(x, weight, bias, s_mr, scaled_b), s_mr
        row = None if bias is None else bias.to(x.dtype)
        y_mn, s_mr = skinny_native.forward(run, x, a, scaled_b, row, *mask)
        return _with_base(y_mn, x, weight), s_mr
    kept_mk = x
    if dropout_p > 0:
        assert seed is not None
        keep = keep_mask(seed, x.shape[0], x.shape[1], dropout_p, x.device, row_ids)
        kept_mk = apply_mask(x, keep)
    s_mr = products.mm(kept_mk, lora_a.to(x.dtype).t())
    return output(x, weight, bias, s_mr, scaled_b), s_mr


def output(
    x: Tensor, weight: Tensor, bias: Tensor | None, s_mr: Tensor, scaled_b: Tensor
) -> Tensor:
    """S (sB)^T + bias + x W^T: x (M, K), s_mr (M, r), scaled_b = s B (N, r) of x's dtype -> (M, N)."""
    row = None if bias is None else bias.to(x.dtype)
    if products.in_c(x, weight.t()):
        y_mn, low = x.new_empty(len(x), len(weight)), (s_mr, scaled_b.t())
        return gemm_native.multiply(y_mn, x, weight.t(), bias=row, low=low)
    return _with_base(products.mm(s_mr, scaled_b.t(), row), x, weight)


def backward(
    dy: Tensor,
    x: Tensor | None,
    s_mr: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX (M, K), dA (r, K), dB (N, r), each None unless `needs` (x, A, B) says so."""
    need_x, need_a, need_b = needs
    run, ds_mr = skinny_native.library_for(dy, lora_a.shape[0], dropout_p), None
    if need_x or need_a:
        b = scaled(lora_b, scale, dy.dtype)
        ds_mr = products.mm(dy, b) if run is None else skinny_native.down(run, dy, b.t())
    x, s_mr = x if need_a else None, s_mr if need_b else None
    joined = need_x and products.in_c(dy, weight)
    options = (scale, dropout_p, seed, row_ids, need_x and not joined)
    if run is not None:
        cast = lora_a.to(dy.dtype)
        dx, da, db = skinny_native.backward(run, dy, x, s_mr, ds_mr, cast, *options)
    else:
        dx, da, db = _low_rank_gradients(dy, x, s_mr, ds_mr, lora_a, lora_b.dtype, *options)
    if joined:
        assert ds_mr is not None
        mask = skinny_native.mask_keys(dropout_p, seed, row_ids, len(dy), lora_a.shape[1])
        low = (ds_mr, lora_a.to(dy.dtype))
        dx = gemm_native.multiply(
            dy.new_empty(len(dy), weight.shape[1]), dy, weight, low=low, mask=mask
        )
    elif dx is not None:
        products.addmm_(dx, dy, weight)
    da = None if da is None else da.to(lora_a.dtype)
    return dx, da, None if db is None else db.to(lora_b.dtype)


def _low_rank_gradients(
    dy: Tensor,
    x: Tensor | None,
    s_mr: Tensor | None,
    ds_mr: Tensor | None,
    lora_a: Tensor,
    dtype_b: torch.dtype,
    scale: float,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None,
    need_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`skinny_native.backward` by torch's products, dB in `dtype_b`."""
    dx = da = db = keep = None
    if s_mr is not None:
        db_rn = _wide_product(s_mr.t(), dy)  # (S^T dY)^T: 0.22 ms where dY^T S takes 0.37
        db = db_rn.t().to(dtype_b, memory_format=torch.contiguous_format)
        db.mul_(scale)
    if ds_mr is None:
        return None, None, db
    if dropout_p > 0:
        assert seed is not None
        keep = keep_mask(seed, dy.shape[0], lora_a.shape[1], dropout_p, dy.device, row_ids)
    if x is not None:
        kept_mk = x if keep is None else apply_mask(x, keep)
        da = _wide_product(ds_mr.t(), kept_mk)
    if need_x:
        dx = products.mm(ds_mr, lora_a.to(dy.dtype))
        if keep is not None:
            apply_mask_(dx, keep)
    return dx, da, db


def _with_base(y_mn: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T, in y's memory."""
    return products.addmm_(y_mn, x, weight.t())


def scaled(lora_b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * B in `dtype`, rounded once: the scale meets (N, r) numbers instead of (M, N)."""
    return (lora_b.to(torch.promote_types(lora_b.dtype, dtype)) * scale).to(dtype)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of 16-bit inputs the fp32 accumulator itself where the GEMM can return it (CUDA)."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return products.mm(a, b)
