"""The specification of one update with the spectral penalty in it: eager PyTorch, any dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..sophia_update.reference import sophia_reference
from ..spectral_penalty.reference import Spectrum, spectral_penalty_reference


class Reference(NamedTuple):
    """p, m: after the update. clipped: coordinates. value: weight P before it. square: |q|^2."""

    p: Tensor
    m: Tensor
    clipped: Tensor
    value: Tensor
    square: Tensor


def penalised_reference(
    p: Tensor,
    m: Tensor,
    h: Tensor,
    g: Tensor,
    spectrum: Spectrum,
    *,
    role: str,
    weight: float,
    start: Tensor | None = None,
    factor: float = 1.0,
    **scalars: float,
) -> Reference:
    """One update of one matrix, out of place.

    q  = weight grad P(p - start)
    p', m' = sophia_reference(p, m, h, factor g + q)

    `factor` clips the gradient of the data alone; see api.py for the reason.
    """
    w = (p if start is None else p - start).detach().requires_grad_()
    value = weight * spectral_penalty_reference(w, spectrum, role)
    (q,) = torch.autograd.grad(value, w)
    return Reference(
        *sophia_reference(p, m, h, factor * g + q, **scalars), value.detach(), q.square().sum()
    )
