"""The penalty and the optimizer that a configuration asks for, over the adapters of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .optim import build_optimizer
from .penalty import SpectralPenalty

if TYPE_CHECKING:
    from peft import PeftModel

    from .config import RunConfig


def build_update(
    cfg: RunConfig, model: PeftModel, parameters: Mapping[str, Tensor]
) -> tuple[SpectralPenalty | None, torch.optim.Optimizer]:
    """Penalty (None if it has no weight) and optimizer; Sophia is told of the penalty's curvature.

    Args:
        parameters: the adapters of `model` by name.

    Raises as `SpectralPenalty.from_model` and `build_optimizer`.
    """
    impl = cfg.kernels.impl
    penalty = offsets = None
    if cfg.penalty.active:
        penalty = SpectralPenalty.from_model(model, cfg.penalty, impl=impl)
        if cfg.optim.name == "sophia" and cfg.penalty.coupling == "gradient":
            offsets = penalty.curvature_constants()
    return penalty, build_optimizer(cfg.optim, parameters, offsets, impl)
