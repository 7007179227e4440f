"""Public function for projections that share their input, and its autograd Function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ranges import named
from ..runtime import require
from .api import check, lora_linear, resolve, without_autocast
from .torch_path import scaled


def lora_linear_siblings(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    dropout_p: float = 0.0,
    seeds: Sequence[int] | None = None,
    impl: str = "auto",
    route: str = "auto",
    row_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(`lora_linear(x, W_i, ...)` for each of 2 or 3 projections), with x read once for all on Triton.

    Args:
        x: (..., K). weights: W_i (N_i, K). biases: (N_i,) or None. lora_as: A_i (r, K), of one rank.
        lora_bs: B_i (N_i, r). scales, seeds: one each; seeds are needed if dropout_p > 0, and a
            projection's mask is that of `lora_linear` with its seed.
        impl, route, row_ids: as of `lora_linear`. The torch implementation calls it once per projection.

    Returns: y_i (..., N_i), x's dtype. All W_i must be whole at once, which ZeRO-3 does not promise.

    Raises: as `lora_linear`; ValueError also if the lists do not match, or the ranks differ.
    """
    count = len(weights)
    require(2 <= count <= 3, "len(weights)", count, "2 or 3")
    lists = {"biases": biases, "lora_as": lora_as, "lora_bs": lora_bs, "scales": scales}
    lists |= {} if seeds is None else {"seeds": seeds}
    for name, values in lists.items():
        require(len(values) == count, f"len({name})", len(values), f"{count}, as many as weights")
    ranks = [a.shape[0] for a in lora_as]
    require(len(set(ranks)) == 1, "ranks", ranks, "equal")
    each = [None] * count if seeds is None else list(seeds)
    projections = list(zip(weights, biases, lora_as, lora_bs, scales, each, strict=True))
    for weight, bias, a, b, scale, seed in projections:
        check(x, weight, bias, a, b, scale, dropout_p, seed, row_ids)
    first = (x, weights[0], lora_as[0], lora_bs[0], scales[0], dropout_p, each[0])
    route = resolve(impl, route, *first)
    if route == "torch":
        return tuple(
            lora_linear(
                x, weight, bias, a, b, scale, dropout_p, seed, impl="torch", row_ids=row_ids
            )
            for weight, bias, a, b, scale, seed in projections
        )
    options = (tuple(scales), dropout_p, tuple(seed or 0 for seed in each), row_ids, route)
    outputs = _Siblings.apply(x, options, *weights, *biases, *lora_as, *lora_bs)
    return tuple(outputs)


class _Siblings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any, *tensors: Any) -> tuple[Tensor, ...]:
        from .siblings import down_siblings
        from .triton_path import output

        ctx.options = scales, dropout_p, seeds, row_ids, route = options
        count = ctx.count = len(scales)
        weights, biases, lora_as, lora_bs = (tensors[i * count : (i + 1) * count] for i in range(4))
        x_mk = x.reshape(-1, x.shape[-1])
        outputs = []
        with without_autocast(x.device.type), named("lora_linear/siblings/forward"):
            s = down_siblings(x_mk, lora_as, dropout_p, seeds, row_ids)
            for i in range(count):
                b = scaled(lora_bs[i], scales[i] / (1 - dropout_p), x.dtype)
                y = output(x_mk, weights[i], biases[i], s[i], b, route)
                outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(x, s, *weights, *lora_as, *lora_bs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        from .backward import grad_s_and_b
        from .siblings import grad_a_siblings
        from .triton_path import grad_input

        x, s, *tensors = ctx.saved_tensors
        scales, dropout_p, seeds, row_ids, route = ctx.options
        count = ctx.count
        weights, lora_as, lora_bs = (tensors[i * count : (i + 1) * count] for i in range(3))
        x_mk = x.reshape(-1, x.shape[-1])
        dx: Tensor | None = None
        all_ds, dbs = [], []
        with without_autocast(x.device.type), named("lora_linear/siblings/backward"):
            for i in range(count):
                dy = dys[i].reshape(-1, dys[i].shape[-1])
                scale = scales[i] / (1 - dropout_p)
                b = scaled(lora_bs[i], scale, x.dtype)
                ds, db = grad_s_and_b(dy, b, s[i], scale, lora_bs[i].dtype, need_ds=True)
                assert ds is not None
                all_ds.append(ds)
                dbs.append(db)
                if ctx.needs_input_grad[0]:
                    mask = (dropout_p, seeds[i], row_ids)
                    dx = grad_input(dy, weights[i], ds, lora_as[i], *mask, route, add_to=dx)
            mask = (dropout_p, seeds, row_ids)
            das = grad_a_siblings(x_mk, torch.stack(all_ds), *mask, lora_as[0].dtype)
        frozen = [None] * (2 * count)
        return None if dx is None else dx.view(x.shape), None, *frozen, *das.unbind(), *dbs
