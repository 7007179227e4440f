"""What the function means, in any float dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in transformers' layout: dimension d is turned with d + D / 2.

    Args:
        x: (T, H, D). cos, sin: (T, D), of position times frequency, each half of them the same.
    """
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def causal_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale Q K^T) V over the positions of a row's document up to its own; shapes as in `causal_attention`."""
    if angles is not None:
        query, key = rotated(query, *angles), rotated(key, *angles)
    groups = query.shape[1] // key.shape[1]
    outputs = []
    parts = (x.split(list(lengths)) for x in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        later = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        p = scores.masked_fill(later, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", p, v))
    return torch.cat(outputs)
