"""One run of a race, from a configuration to a final validation loss and what it cost."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flex.build import build_update
from flex.config import RunConfig
from flex.data.loader import DataBundle, StepLoader, load_data, validation_batches
from flex.engine import Engine
from flex.errors import CurvatureError
from flex.model.adapters import adapter_parameters, add_adapters
from flex.model.base import load_model, load_tokenizer
from flex.optim import Sophia
from flex.step import train_step, validation_loss


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        loss: validation cross-entropy per target token after the last update, nats; inf if the run
            diverged, which is a result too.
        steps: optimizer updates.
        positions: tokens through forward and backward, those of curvature refreshes included.
        cpu_seconds, wall_seconds: of the training steps; validation is not counted.
        clipped: Sophia's mean share of coordinates at the clip; None for others.
    """

    loss: float
    steps: int
    positions: int
    cpu_seconds: float
    wall_seconds: float
    clipped: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values; JSON has no infinity, so a diverged loss is the string "inf"."""
        return asdict(self) | ({} if math.isfinite(self.loss) else {"loss": "inf"})

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Outcome:
        """The inverse of `to_json`."""
        return cls(**record | {"loss": float(record["loss"])})


def run(cfg: RunConfig, permuted: bool = False) -> Outcome:
    """Train as `cfg` says on plain PyTorch in this process, and validate at the end.

    Nothing is written. The data and tokenizer are kept for the next call with the same `cfg.data`.

    Args:
        cfg: the run; its `train.steps` must be set.
        permuted: shuffle the coordinates of Sophia's curvature, within each matrix and once for all.
    """
    data, pad = _data(cfg.model.model_dump_json(), cfg.data.model_dump_json())
    base = load_model(cfg.model)
    model = add_adapters(base, cfg.lora, cfg.seed, cfg.kernels.impl)
    parameters = adapter_parameters(model)
    penalty, optimizer = build_update(cfg, model, parameters)
    if permuted:
        assert isinstance(optimizer, Sophia)
        permute_curvature(optimizer, cfg.seed)
    engine = Engine(model, optimizer, parameters, cfg.optim.clip_norm)
    loader = StepLoader(data.train, cfg, 0, 1, pad)
    held_out = validation_batches(data.validation, cfg, 0, 1, pad)
    torch.manual_seed(cfg.seed)
    steps = positions = 0
    clipped: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.suppress(CurvatureError):  # dead or infinite: diverged
        for step in range(loader.total_steps):
            report, _ = train_step(cfg, engine, loader, penalty, step, loader.total_steps)
            if not math.isfinite(report.loss):
                break
            steps += 1
            positions += report.positions
            if report.refreshed:
                positions += loader.refresh_positions(step)
            if report.clipped_fraction is not None:
                clipped.append(report.clipped_fraction)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finished = steps == loader.total_steps
    loss = validation_loss(engine, held_out) if finished else math.inf
    return Outcome(
        loss if math.isfinite(loss) else math.inf,
        steps,
        positions,
        round(cpu, 3),
        round(wall, 3),
        sum(clipped) / len(clipped) if clipped else None,
    )


def permute_curvature(optimizer: Sophia, seed: int) -> None:
    """Make `optimizer` fold shuffled estimates into h: a placebo with the same distribution.

    One permutation per tensor, the same at every refresh, so that h is exactly the permuted h.
    """
    order: dict[Tensor, Tensor] = {}
    commit = optimizer.commit_curvature

    def commit_permuted() -> None:
        for index, (p, estimate) in enumerate(optimizer._estimates.items()):
            if p not in order:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
                order[p] = torch.randperm(estimate.numel(), generator=generator)
            estimate.copy_(estimate.flatten()[order[p]].view_as(estimate))
        commit()

    optimizer.commit_curvature = commit_permuted  # type: ignore[method-assign]


@lru_cache(maxsize=1)
def _data(model: str, data: str) -> tuple[DataBundle, int]:
    cfg = RunConfig.model_validate_json(f'{{"model": {model}, "data": {data}}}')
    tokenizer = load_tokenizer(cfg.model)
    return load_data(cfg, tokenizer), tokenizer.pad_token_id
