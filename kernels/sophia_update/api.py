"""Sophia's element-wise updates over lists of tensors, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import choose_impl


def _check_lists(**lists: Sequence[Tensor]) -> None:
    names = list(lists)
    first = lists[names[0]]
    for name in names[1:]:
        if len(lists[name]) != len(first):
            raise ValueError(
                f"{name} has {len(lists[name])} tensors; it must have as many as {names[0]}, {len(first)}"
            )
        for i, (a, b) in enumerate(zip(first, lists[name], strict=True)):
            if a.shape != b.shape:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(b.shape)}; it must be {names[0]}'s, {tuple(a.shape)}"
                )


@torch.no_grad()
def sophia_update(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    gamma: float,
    eps: float,
    weight_decay: float,
    m_scale: float = 1.0,
    h_scale: float = 1.0,
    h_offset: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """One clipped update of every tensor, in place (`sophia_reference` is the specification).

    Args:
        params, exp_avgs, curvatures, grads: equally long lists of equally shaped float tensors; the first two
            are updated in place. Shapes are free: whole matrices or the flat partitions of ZeRO.
        lr, beta1, gamma, eps, weight_decay, m_scale, h_scale, h_offset: see `sophia_reference`.
        impl: "auto", "torch" or "triton".

    Returns: 0-dim int64 tensor, the number of clipped coordinates (no host sync).

    Raises: ValueError if the lists do not match or eps is not positive.
    """
    _check_lists(params=params, exp_avgs=exp_avgs, curvatures=curvatures, grads=grads)
    if eps <= 0:
        raise ValueError(f"eps is {eps}; it must be > 0, or 0/0 makes NaN where nothing is known")
    choose_impl("sophia_update", impl, params[0].device if params else torch.device("cpu"))
    if not params:
        return torch.zeros((), dtype=torch.int64)
    params, exp_avgs = list(params), list(exp_avgs)
    torch._foreach_lerp_(exp_avgs, list(grads), 1 - beta1)
    floors = torch._foreach_mul(list(curvatures), gamma * h_scale)
    if h_offset:
        torch._foreach_add_(floors, gamma * h_offset)
    torch._foreach_clamp_min_(floors, eps)
    ratios = torch._foreach_mul(exp_avgs, m_scale)
    torch._foreach_div_(ratios, floors)
    clipped = torch.stack([torch.count_nonzero(r.abs() > 1) for r in ratios]).sum()
    torch._foreach_clamp_min_(ratios, -1.0)
    torch._foreach_clamp_max_(ratios, 1.0)
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, ratios, alpha=-lr)
    return clipped


@torch.no_grad()
def curvature_update(
    curvatures: Sequence[Tensor], estimates: Sequence[Tensor], beta2: float, impl: str = "auto"
) -> None:
    """h <- beta2 h + (1 - beta2) estimate for every tensor, in place (`curvature_reference`).

    Raises: ValueError if the lists do not match.
    """
    _check_lists(curvatures=curvatures, estimates=estimates)
    if curvatures:
        choose_impl("sophia_update", impl, curvatures[0].device)
        torch._foreach_lerp_(list(curvatures), list(estimates), 1 - beta2)
