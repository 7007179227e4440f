"""`lora_linear` as two operators that torch.compile takes for granted: no graph break, no tracing inside.

Eager code does not come here: its autograd Function keeps the parameter objects themselves, which
ZeRO-3 needs and which a compiled graph does not know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("flex::lora_linear", mutates_args=())
def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
    impl: str,
    route: str,
    row_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (..., N) and S (M, r); arguments as of `lora_linear`, seed -1 for none."""
    from . import api

    known = None if seed < 0 else seed
    route = api.resolve(impl, route, x, weight, lora_a, lora_b, scale, dropout_p, known)
    with torch.no_grad():
        forward, _ = api.path(route)
        y, s = forward(
            x.reshape(-1, x.shape[-1]),
            weight,
            bias,
            lora_a,
            lora_b,
            scale / (1 - dropout_p),
            dropout_p,
            known,
            row_ids,
        )
    return y.view(*x.shape[:-1], weight.shape[0]), s


@lora_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(x.shape[:-1].numel(), lora_a.shape[0])


@torch.library.custom_op("flex::lora_linear_backward", mutates_args=())
def lora_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
    impl: str,
    route: str,
    row_ids: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dA, dB; an empty tensor for each that is not needed."""
    from . import api

    known = None if seed < 0 else seed
    route = api.resolve(impl, route, x, weight, lora_a, lora_b, scale, dropout_p, known)
    with torch.no_grad():
        _, backward = api.path(route)
        dx, da, db = backward(
            dy.reshape(-1, dy.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            s,
            weight,
            lora_a,
            lora_b,
            scale / (1 - dropout_p),
            dropout_p,
            known,
            row_ids,
            (need_x, need_a, need_b),
        )
    none = dy.new_empty(0)
    return (
        none if dx is None else dx.view(x.shape),
        none.clone() if da is None else da,
        none.clone() if db is None else db,
    )


@lora_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
    impl: str,
    route: str,
    row_ids: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        lora_a.new_empty(lora_a.shape if need_a else (0,)),
        lora_b.new_empty(lora_b.shape if need_b else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, *ctx.rest, row_ids = inputs
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b, row_ids)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, ds: Tensor) -> tuple[Tensor | None, ...]:
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5])
    *tensors, row_ids = ctx.saved_tensors
    found = lora_backward(dy, *tensors, *ctx.rest, row_ids, *needs)
    dx, da, db = (g if need else None for g, need in zip(found, needs, strict=True))
    return dx, None, None, da, db, None, None, None, None, None, None


lora_forward.register_autograd(_backward, setup_context=_setup)
