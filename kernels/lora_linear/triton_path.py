"""Forward and backward by the Triton kernels: x is read once each way, dY once. Legend: api.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .backward import grad_a, grad_s_and_b, grad_x
from .forward import down, forward_gemm
from .torch_path import scaled


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int | None,
    route: str,
) -> tuple[Tensor, Tensor]:
    """`torch_path.forward` by the Triton kernels."""
    s_mr = down(x, lora_a.to(x.dtype), dropout_p, seed)
    scaled_b = scaled(lora_b, scale, x.dtype)
    if route == "fused":
        return forward_gemm(x, weight, bias, s_mr, scaled_b), s_mr
    b_rn = scaled_b.t()
    y_mn = s_mr @ b_rn if bias is None else torch.addmm(bias.to(x.dtype), s_mr, b_rn)
    return y_mn.addmm_(x, weight.t()), s_mr


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
    needs: tuple[bool, bool, bool],
    route: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`torch_path.backward` by the Triton kernels: dY and x are read once each."""
    need_x, need_a, need_b = needs
    scaled_b = scaled(lora_b, scale, dy.dtype)
    ds, db = grad_s_and_b(
        dy, scaled_b, s_mr if need_b else None, scale, lora_b.dtype, need_ds=need_x or need_a
    )
    dx = da = None
    if need_a:
        assert x is not None and ds is not None
        da = grad_a(x, ds, dropout_p, seed, lora_a.dtype)
    if need_x:
        fused = route == "fused"
        dx = grad_x(dy, weight, ds, lora_a.to(dy.dtype), dropout_p, seed, with_gemm=fused)
        if not fused:
            dx.addmm_(dy, weight)
    return dx, da, db
