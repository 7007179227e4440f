"""From configuration to optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import OptimConfig
from .lion import Lion, Signum
from .sophia import Sophia


def parameter_groups(
    parameters: Mapping[str, Tensor], curvature_offsets: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """One group per factor (A or B) and shape, in order of first appearance.

    ZeRO flattens each group into one vector, after which a matrix cannot be told from its neighbour. What is
    constant over the matrices of one shape, such as the penalty's curvature, can then still be a number of the group.

    Args:
        parameters: adapter parameters by name; names hold `lora_A` or `lora_B`.
        curvature_offsets: by name; must agree within a group, else ValueError.
    """
    groups: dict[tuple[str, torch.Size], dict[str, Any]] = {}
    for name, p in parameters.items():
        factor = "A" if "lora_A" in name else "B"
        shape = getattr(p, "ds_shape", p.shape)  # ZeRO-3 hides the shape of a partitioned parameter
        offset = (curvature_offsets or {}).get(name, 0.0)
        group = groups.setdefault(
            (factor, shape), {"params": [], "factor": factor, "curvature_offset": offset}
        )
        if group["curvature_offset"] != offset:
            raise ValueError(
                f"{name} has curvature offset {offset}; its group has {group['curvature_offset']}"
            )
        group["params"].append(p)
    return list(groups.values())


def build_optimizer(
    cfg: OptimConfig,
    parameters: Mapping[str, Tensor],
    curvature_offsets: Mapping[str, float] | None = None,
    impl: str = "auto",
) -> torch.optim.Optimizer:
    """The optimizer that `cfg.name` says, over the groups of `parameter_groups`.

    `impl` ("auto", "torch", "triton") is Sophia's; the others have one implementation.
    """
    groups = parameter_groups(parameters, curvature_offsets)
    for group in groups:
        group["lr_ratio"] = cfg.lr_ratio_b if group["factor"] == "B" else 1.0
    assert cfg.lr is not None and cfg.betas is not None
    common: dict[str, Any] = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    if cfg.name == "sophia":
        assert cfg.curvature.gamma is not None
        return Sophia(
            groups,
            betas=cfg.betas,
            gamma=cfg.curvature.gamma,
            eps=cfg.curvature.eps,
            impl=impl,
            **common,
        )
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, betas=cfg.betas, eps=cfg.eps, fused=True, **common)
    if cfg.name == "adamw8bit":
        import bitsandbytes  # slow to import, and only this optimizer needs it

        return bitsandbytes.optim.AdamW8bit(groups, betas=cfg.betas, eps=cfg.eps, **common)
    return {"lion": Lion, "signum": Signum}[cfg.name](groups, betas=cfg.betas, **common)
