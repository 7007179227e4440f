"""What the functions mean, in any float dtype. Rounding to the inputs' dtype is where transformers' Llama rounds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last dimension; x (..., H), weight (H,)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)); two tensors of one shape."""
    return silu(gate) * up


def causal_softmax_reference(scores: Tensor, groups: int, scale: float) -> Tensor:
    """softmax(scale * scores) over what a row sees: its own position and those before; 0 elsewhere.

    Args:
        scores: (B, length * groups, length); row r is of position r // groups.
    """
    rows, length = scores.shape[-2:]
    position = torch.arange(rows, device=scores.device) // groups
    later = torch.arange(length, device=scores.device) > position[:, None]
    return torch.softmax((scale * scores).masked_fill(later, float("-inf")), -1)


def causal_softmax_backward_reference(
    probabilities: Tensor, dp: Tensor, groups: int, scale: float
) -> Tensor:
    """The scores' gradient, scale * p * (dp - sum(p dp)); p is 0 where a row does not see."""
    return scale * torch._softmax_backward_data(dp, probabilities, -1, dp.dtype)
