"""The numbers of an update as the implementations take them. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass

SCALARS = 8  # length of a row: 32 bytes
CONTROL = 3  # entries of a control tensor: [norm, factor, finite]
NORM_FLOOR = 1e-6  # added to the norm before dividing by it; DeepSpeed's, so that engines agree


@dataclass(frozen=True)
class Scalars:
    """What `sophia_reference` takes beside the tensors: equal for all tensors of a group."""

    lr: float
    beta1: float
    gamma: float
    eps: float
    weight_decay: float
    m_scale: float = 1.0
    h_scale: float = 1.0
    h_offset: float = 0.0

    def row(self) -> tuple[float, ...]:
        """(lr, lr wd, 1 - beta1, m_scale, gamma h_scale, gamma h_offset, eps, 0): products in fp64."""
        return (
            self.lr,
            self.lr * self.weight_decay,
            1 - self.beta1,
            self.m_scale,
            self.gamma * self.h_scale,
            self.gamma * self.h_offset,
            self.eps,
            0.0,
        )
