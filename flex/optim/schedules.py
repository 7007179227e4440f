"""Learning-rate schedules as a pure function: no state to save, none to restore wrongly."""

from __future__ import annotations

import math

from ..config import OptimConfig


def learning_rate(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of update `step` (0-based) of `total_steps`.

    Linear warm-up over ceil(warmup * total_steps) updates, the first of which already moves; then cosine or linear
    down to min_lr_ratio * lr at the last update, or constant.
    """
    assert cfg.lr is not None
    warmup = math.ceil(cfg.warmup * total_steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    if cfg.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif cfg.schedule == "linear":
        factor = 1 - progress
    else:
        return cfg.lr
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * factor)
