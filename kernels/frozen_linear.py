"""A frozen linear layer without an adapter, through `products`: y = x W^T + bias, dX = dY W."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import products
from .lora_linear.api import without_autocast
from .lora_linear.packed import dense, is_packed


def frozen_linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """y (..., N) of x (..., K) in x's dtype, whatever autocast says; fp32 sums inside.

    Args:
        weight: W (N, K) of x's dtype, or bitsandbytes' 4-bit weight, made dense for each product. Kept for backward
            as the object it is (ZeRO-3 releases and gathers parameters behind it); x is not kept.
        bias: (N,) of x's dtype, or None. Neither gets a gradient. Not twice differentiable.
    """
    return cast(Tensor, _FrozenLinear.apply(x, weight, bias))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.packed = weight if is_packed(weight) else None
        # A packed one may come back from autograd without its quantisation state.
        ctx.save_for_backward(None if ctx.packed is not None else weight)
        with without_autocast(x.device.type):
            y = products.mm(x.reshape(-1, x.shape[-1]), _dense(weight, x.dtype).t(), bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight = ctx.saved_tensors[0] if ctx.packed is None else ctx.packed
        with without_autocast(dy.device.type):
            dx = products.mm(dy.reshape(-1, dy.shape[-1]), _dense(weight, dy.dtype))
        return dx.view(*dy.shape[:-1], dx.shape[-1]), None, None


def _dense(weight: Any, dtype: torch.dtype) -> Tensor:
    return dense(weight, dtype) if is_packed(weight) else cast(Tensor, weight)
