"""`lora_linear` over a weight in bitsandbytes' 4 or 8 bits (QLoRA): the dense path, on a dense copy
of W that lives for one product in forward and is made again in backward. Legend: api.py.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ranges import named
from ..runtime import require
from .api import check, gradients, made_of, path, resolve, without_autocast
from .packed import dense, packed_shape, packed_tensor

log = logging.getLogger("flex.kernels")

_told: set[str] = set()


def lora_linear_packed(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int | None,
    impl: str,
    route: str,
    row_ids: Tensor | None,
) -> Tensor:
    """`lora_linear` of bitsandbytes' weight: the same numbers, to the bit, as of `dense(weight)`.

    Keeps the packed weight for backward, never the dense one. Raises as `lora_linear`.
    """
    # A view of one element stands for W: it has its shape, dtype and device, and no memory.
    stand_in = x.new_empty(()).expand(packed_shape(weight))
    check(x, stand_in, bias, lora_a, lora_b, scale, dropout_p, seed, row_ids)
    stored = packed_tensor(weight)
    require(stored.device == x.device, "weight.device", stored.device, f"x's, {x.device}")
    options = (scale, dropout_p, seed, impl, route, row_ids)
    return _PackedLoraLinear.apply(x, weight, bias, lora_a, lora_b, *options)


@torch.compiler.disable
def lora_linear_packed_eager(*args: Any) -> Tensor:
    """`lora_linear_packed` for code under torch.compile: a break in the graph.

    In the graph, the dense weight would be kept for backward, and that of every layer at once.
    """
    if "compile" not in _told:
        _told.add("compile")
        log.info("lora_linear over a quantised weight stays out of torch.compile's graph")
    return lora_linear_packed(*args)


class _PackedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Any,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        dropout_p: float,
        seed: int,
        impl: str,
        route: str,
        row_ids: Tensor | None,
    ) -> Tensor:
        x_mk = x.reshape(-1, x.shape[-1])
        with without_autocast(x.device.type), named("lora_linear/forward"):
            w = dense(weight, x.dtype)
            route = resolve(impl, route, x, w, lora_a, lora_b, scale, dropout_p, seed)
            scale = scale / (1 - dropout_p)
            forward, _ = path(route)
            factors = (lora_a, lora_b, scale, dropout_p, seed, row_ids)
            y_mn, s_mr = forward(x_mk, w, bias, *factors)
        need_a, need_b = ctx.needs_input_grad[3:5]
        ctx.make_x, sources = made_of(x) if need_a else (None, ())
        ctx.save_for_backward(*sources, s_mr if need_b else None, lora_a, lora_b)
        # The object itself: what autograd saves may come back without its quantisation state.
        ctx.weight = weight
        ctx.x_shape, ctx.scale, ctx.dropout_p, ctx.seed = x.shape, scale, dropout_p, seed
        ctx.row_ids, ctx.route = row_ids, route
        return y_mn.view(*x.shape[:-1], y_mn.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *sources, s_mr, lora_a, lora_b = ctx.saved_tensors
        x = ctx.make_x(*sources) if sources else None

        def weight() -> Tensor | None:
            return dense(ctx.weight, dy.dtype) if ctx.needs_input_grad[0] else None

        dx, da, db = gradients(ctx, dy, x, s_mr, weight, lora_a, lora_b)
        return dx, None, None, da, db, None, None, None, None, None, None
