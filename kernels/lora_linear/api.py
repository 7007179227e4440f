"""Public function, argument checks and the autograd Function, over either implementation.

Legend: M rows of x (tokens), K inputs, N outputs, r rank. S = x^ A^T (M, r) with x^ = x where kept,
else 0; s = scale / (1 - p). Then, with dS = s dY B (M, r):

    y = S (s B)^T + bias + x W^T      dx = keep * (dS A) + dY W      dA = dS^T x^      dB = s dY^T S

torch_path.py and triton_path.py compute them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ranges import named
from ..runtime import DTYPES, TRITON_DTYPES, choose_impl, require, require_one_of
from . import torch_path
from .packed import is_packed

SEEDS = 2**63  # seeds lie in [0, SEEDS)
MAX_TRITON_RANK = 256  # a tile of B with more does not fit beside the others
Remake = tuple[Callable[..., Tensor], tuple[Tensor, ...]]  # a function and what it makes x of
ROUTES = ("auto", "skinny", "fused")


def lora_linear(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: int | None = None,
    impl: str = "auto",
    route: str = "auto",
    row_ids: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * drop(x) A^T B^T (`lora_linear_reference` is the specification).

    Args:
        x: (..., K) input, bf16, fp16, fp32 or fp64.
        weight: W (N, K), frozen: a Tensor of x's dtype, or bitsandbytes' Params4bit, Int8Params or
            MatmulLtState, which is made dense in x's dtype for each product (`packed.dense`).
        bias: (N,), frozen, or None.
        lora_a: A (r, K), any float dtype; cast to x's dtype for the products, its gradient is in
            its own dtype.
        lora_b: B (N, r), likewise.
        scale: alpha / r.
        dropout_p: probability that an element of x is hidden from A, in [0, 1).
        seed: decides the dropout mask; an int in [0, 2^63), needed if dropout_p > 0. Draw it from
            torch's generator, which activation checkpointing restores: the recomputed mask is the
            same. So is that of the other implementation, and of another device.
        impl: "auto", "torch" or "triton" (bf16, fp16, fp32; rank 1 to 256).
        route: how Triton joins the low-rank term and the frozen product. "skinny": the vendor's
            GEMM accumulates onto it; "fused": our GEMM starts its accumulator with it, which moves
            the fewest bytes; "auto": on a GPU the faster one as measured at first use of a shape
            (`routes.table()` shows what was chosen), elsewhere skinny.
        row_ids: (M,) int32, what the mask of each row of x is drawn from beside the seed; its place
            if None. Named by what it holds, a row keeps its mask in whatever batch it comes.

    Returns: y (..., N) in x's dtype, whatever autocast says.

    Keeps for backward: x (unless `remakable`), S, and the objects `weight`, `lora_a`, `lora_b` themselves, never a view
    or a cast of them (ZeRO-3 releases and gathers parameters behind the object). No mask, no copy
    of x. Not twice differentiable.

    Raises:
        ValueError: an argument is out of its set; the message names it, its value and the set.
        NotImplementedError: impl="triton" on a device that Triton does not run on.
    """
    require_one_of("route", route, ROUTES)
    if type(weight) is not torch.nn.Parameter and is_packed(weight):
        from . import quantised

        rest = (scale, dropout_p, seed, impl, route, row_ids)
        eager = not torch.compiler.is_compiling()
        call = quantised.lora_linear_packed if eager else quantised.lora_linear_packed_eager
        return call(x, weight, bias, lora_a, lora_b, *rest)
    check(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, row_ids)
    if torch.compiler.is_compiling():
        from .ops import lora_forward

        options = (scale, dropout_p, -1 if seed is None else seed, impl, route, row_ids)
        return lora_forward(x, weight, bias, lora_a, lora_b, *options)[0]
    route = resolve(impl, route, x, weight, lora_a, lora_b, scale, dropout_p, seed)
    return _LoraLinear.apply(
        x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, route, row_ids
    )


def remakable(x: Tensor, function: Callable[..., Tensor], *sources: Tensor) -> None:
    """Mark x as function(*sources): `lora_linear` of it keeps the sources for backward, and makes x again there.

    For a cheap function of what is kept anyway; it must give the same bits each time. The mark is on the object: an
    operation on x, such as a hook of ZeRO-3, loses it, and then x is kept.
    """
    x._flex_remake = (function, tuple(t.detach() for t in sources))  # type: ignore[attr-defined]


def made_of(x: Tensor) -> Remake:
    """What x is made of in backward: itself, unless it is `remakable`."""
    return getattr(x, "_flex_remake", (_itself, (x,)))


def _itself(x: Tensor) -> Tensor:
    return x


def resolve(
    impl: str,
    route: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int | None,
) -> str:
    """What computes: "torch", or the Triton route "skinny" or "fused".

    Raises: as `lora_linear` does over `impl`, and ValueError for what Triton does not take.
    """
    rank = lora_a.shape[0]
    if impl == "triton":
        require_one_of("x.dtype", x.dtype, TRITON_DTYPES)
        require(rank <= MAX_TRITON_RANK, "rank", rank, f"at most {MAX_TRITON_RANK} for Triton")
    elif impl == "auto" and (x.dtype not in TRITON_DTYPES or rank > MAX_TRITON_RANK):
        impl = "torch"
    if choose_impl("lora_linear", impl, x.device) == "torch":
        return "torch"
    if route != "auto":
        return route
    if not x.is_cuda or not x.numel():
        return "skinny"
    from .routes import fastest

    return fastest(x, weight, lora_a, lora_b, scale, dropout_p, seed)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        dropout_p: float,
        seed: int,
        route: str,
        row_ids: Tensor | None,
    ) -> Tensor:
        scale = scale / (1 - dropout_p)
        x_mk = x.reshape(-1, x.shape[-1])
        with without_autocast(x.device.type), named("lora_linear/forward"):
            forward, _ = path(route)
            factors = (lora_a, lora_b, scale, dropout_p, seed, row_ids)
            y_mn, s_mr = forward(x_mk, weight, bias, *factors)
        need_a, need_b = ctx.needs_input_grad[3:5]
        ctx.make_x, sources = made_of(x) if need_a else (None, ())
        ctx.save_for_backward(*sources, s_mr if need_b else None, weight, lora_a, lora_b)
        ctx.x_shape, ctx.scale, ctx.dropout_p, ctx.seed = x.shape, scale, dropout_p, seed
        ctx.row_ids, ctx.route = row_ids, route
        return y_mn.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *sources, s_mr, weight, lora_a, lora_b = ctx.saved_tensors
        x = ctx.make_x(*sources) if sources else None
        dx, da, db = gradients(ctx, dy, x, s_mr, lambda: weight, lora_a, lora_b)
        return dx, None, None, da, db, None, None, None, None, None


def gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor | None,
    s_mr: Tensor | None,
    weight: Callable[[], Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA, dB of a Function whose inputs begin with x, weight, bias, A, B; None where not needed.

    `weight` gives W (N, K), for the time of the call; it may give None if dX is not needed.
    """
    need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
    dy_mn = dy.reshape(-1, dy.shape[-1])
    x_mk = None if x is None else x.reshape(-1, x.shape[-1])
    with without_autocast(dy.device.type), named("lora_linear/backward"):
        _, backward = path(ctx.route)
        factors = (lora_a, lora_b, ctx.scale, ctx.dropout_p, ctx.seed, ctx.row_ids)
        needs = (need_x, need_a, need_b)
        dx, da, db = backward(dy_mn, x_mk, s_mr, weight(), *factors, needs)
    return None if dx is None else dx.view(ctx.x_shape), da, db


def path(route: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward that compute; Triton's are imported only where they are used."""
    if route == "torch":
        return torch_path.forward, torch_path.backward
    from . import triton_path

    return partial(triton_path.forward, route=route), partial(triton_path.backward, route=route)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The casts are ours: autocast would recast operands, and differently in backward."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None = None,
) -> None:
    """Refuse arguments out of their sets; the message names the argument, its value, the set."""
    require_one_of("x.dtype", x.dtype, DTYPES)
    require(x.dim() >= 1, "x.shape", tuple(x.shape), "(..., K)")
    require(weight.dtype == x.dtype, "weight.dtype", weight.dtype, f"x's, {x.dtype}")
    inputs, rank = x.shape[-1], lora_a.shape[0]
    require(
        weight.dim() == 2 and weight.shape[1] == inputs,
        "weight.shape",
        tuple(weight.shape),
        f"(N, {inputs})",
    )
    outputs = weight.shape[0]
    require(
        lora_a.dim() == 2 and lora_a.shape[1] == inputs,
        "lora_a.shape",
        tuple(lora_a.shape),
        f"(r, {inputs})",
    )
    require(rank >= 1, "rank", rank, "at least 1")
    require(
        lora_b.shape == (outputs, rank), "lora_b.shape", tuple(lora_b.shape), f"({outputs}, {rank})"
    )
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("lora_a", lora_a),
        ("lora_b", lora_b),
    ):
        if tensor is not None:
            require(tensor.device == x.device, f"{name}.device", tensor.device, f"x's, {x.device}")
            require_one_of(f"{name}.dtype", tensor.dtype, DTYPES)
    if bias is not None:
        require(bias.shape == (outputs,), "bias.shape", tuple(bias.shape), f"({outputs},)")
    if (
        torch.is_grad_enabled()
    ):  # no gradient is computed for these, so asking for one must not pass unnoticed
        require(
            not weight.requires_grad, "weight.requires_grad", True, "False: the weight is frozen"
        )
        require(
            bias is None or not bias.requires_grad,
            "bias.requires_grad",
            True,
            "False: the bias is frozen",
        )
    require(math.isfinite(scale), "scale", scale, "finite")
    require(0 <= dropout_p < 1, "dropout_p", dropout_p, "in [0, 1)")
    if dropout_p > 0:
        known = isinstance(seed, int) and 0 <= seed < SEEDS
        require(known, "seed", seed, f"an int in [0, {SEEDS}) when dropout_p > 0")
    if row_ids is not None:
        rows, kind = (x.shape[:-1].numel(),), (tuple(row_ids.shape), row_ids.dtype)
        require(kind == (rows, torch.int32), "row_ids", kind, f"{rows}, torch.int32")
        require(row_ids.is_contiguous(), "row_ids.stride()", row_ids.stride(), "(1,)")
        require(row_ids.device == x.device, "row_ids.device", row_ids.device, f"x's, {x.device}")
