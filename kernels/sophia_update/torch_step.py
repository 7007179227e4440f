"""The update in PyTorch: list operations, or on a CPU the C update of `native.py` where it takes the tensors.

Which of them a call takes depends on dtypes and strides alone, so a resumed run takes the same. The two
differ by rounding: torch's lerp contracts a product and a sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .native import native_step, native_update, takes


def torch_update(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    grads: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    row: tuple[float, ...],
    factor: float,
) -> Tensor:
    """Update one group in place. row: `Scalars.row`; factor: of the gradient. Returns the count, int64."""
    lists = (list(params), list(exp_avgs), list(curvatures), list(grads))
    step = native_step() if takes(lists) else None
    clipped = (
        _foreach(*lists, row, factor) if step is None else native_update(step, *lists, row, factor)
    )
    if copies is not None:
        torch._foreach_copy_(list(copies), lists[0])
    return clipped


def _foreach(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    curvatures: list[Tensor],
    grads: list[Tensor],
    row: tuple[float, ...],
    factor: float,
) -> Tensor:
    lr, lr_decay, beta1_rest, m_scale, h_factor, h_offset, eps = row[:7]
    if factor != 1.0:
        grads = list(torch._foreach_mul(grads, factor))
    # lerp takes one dtype: a bf16 gradient is widened to m's, an fp32 one of a bf16 m rounded
    grads = [g.to(m.dtype) for g, m in zip(grads, exp_avgs, strict=True)]
    torch._foreach_lerp_(exp_avgs, grads, beta1_rest)
    floors = torch._foreach_mul(curvatures, h_factor)
    if h_offset:
        torch._foreach_add_(floors, h_offset)
    torch._foreach_clamp_min_(floors, eps)
    ratios = torch._foreach_mul(exp_avgs, m_scale)
    torch._foreach_div_(ratios, floors)
    clipped = torch.stack([torch.count_nonzero(r.abs() > 1) for r in ratios]).sum()
    torch._foreach_clamp_min_(ratios, -1.0)
    torch._foreach_clamp_max_(ratios, 1.0)
    if lr_decay:
        torch._foreach_mul_(params, 1 - lr_decay)
    torch._foreach_add_(params, ratios, alpha=-lr)
    return clipped
