"""Forward and backward by the Triton kernels: x is read once each way, dY once. Legend: api.py."""

from __future__ import annotations

from torch import Tensor

from .backward import grad_a, grad_s_and_b, grad_x
from .forward import down, forward_gemm
from .torch_path import output as skinny_output
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
    row_ids: Tensor | None,
    route: str,
) -> tuple[Tensor, Tensor]:
    """`torch_path.forward` by the Triton kernels."""
    s_mr = down(x, lora_a.to(x.dtype), dropout_p, seed, row_ids)
    scaled_b = scaled(lora_b, scale, x.dtype)
    return output(x, weight, bias, s_mr, scaled_b, route), s_mr


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
        da = grad_a(x, ds, dropout_p, seed, row_ids, lora_a.dtype)
    if need_x:
        dx = grad_input(dy, weight, ds, lora_a, dropout_p, seed, row_ids, route)
    return dx, da, db


def output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s_mr: Tensor,
    scaled_b: Tensor,
    route: str,
) -> Tensor:
    """`torch_path.output`, the low-rank term in our GEMM's accumulator where the route is "fused"."""
    compute = forward_gemm if route == "fused" else skinny_output
    return compute(x, weight, bias, s_mr, scaled_b)


def grad_input(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor | None,
    lora_a: Tensor,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None,
    route: str,
    add_to: Tensor | None = None,
) -> Tensor:
    """dX (M, K) = keep * (dS A) + dY W; with `add_to`, (M, K), that is added to and returned."""
    fused = route == "fused"
    a = lora_a.to(dy.dtype)
    dx = grad_x(dy, weight, ds, a, dropout_p, seed, row_ids, fused, add_to)
    return dx if fused else dx.addmm_(dy, weight)
