"""The specification of Sophia-G's two element-wise updates: eager PyTorch, any dtype, any shape."""

from __future__ import annotations

import torch
from torch import Tensor


def sophia_reference(
    p: Tensor,
    m: Tensor,
    h: Tensor,
    g: Tensor,
    *,
    lr: float,
    beta1: float,
    gamma: float,
    eps: float,
    weight_decay: float,
    m_scale: float = 1.0,
    h_scale: float = 1.0,
    h_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update (Liu et al. 2023, arXiv 2305.14342, algorithm 3), out of place.

    m' = beta1 m + (1 - beta1) g
    d  = max(gamma (h h_scale + h_offset), eps)
    p' = p (1 - lr weight_decay) - lr clip(m' m_scale / d, -1, 1)

    `m_scale` and `h_scale` are the bias corrections 1 / (1 - beta^t); `h_offset` is curvature that the
    likelihood does not see (the penalty's constant). Returns (p', m', number of clipped coordinates).
    """
    m = beta1 * m + (1 - beta1) * g
    ratio = m * m_scale / (gamma * (h * h_scale + h_offset)).clamp_min(eps)
    p = p * (1 - lr * weight_decay) - lr * ratio.clamp(-1, 1)
    return p, m, (ratio.abs() > 1).sum()


def curvature_reference(h: Tensor, estimate: Tensor, beta2: float) -> Tensor:
    """h' = beta2 h + (1 - beta2) estimate, where estimate = B g^2 of sampled labels. Out of place."""
    return torch.lerp(estimate, h, beta2)
