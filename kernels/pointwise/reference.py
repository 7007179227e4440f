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
