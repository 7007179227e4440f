"""The run's largest micro-batch before its first step, so that a lack of memory shows at once."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from .errors import ConfigError, ModelError
from .ranges import named
from .step import target_loss

if TYPE_CHECKING:
    from .config import RunConfig
    from .data.loader import StepLoader
    from .engine import Engine
    from .state import Batch

log = logging.getLogger("flex.warm_up")


def is_wanted(cfg: RunConfig, device: torch.device) -> bool:
    """Whether the run warms up: `auto` is on a GPU, whose memory is small and does not swap."""
    wish = cfg.train.warm_up_longest
    return wish == "always" or (wish == "auto" and device.type == "cuda")


def warm_up(cfg: RunConfig, engine: Engine, loader: StepLoader, step: int) -> None:
    """Forward and backward of this process's largest micro-batch of the run from `step` (0-based) on.

    Nothing is left of it: the loss is scaled by 0, so that what ZeRO has reduced and keeps for the
    first step is 0 too, gradients are cleared, and torch's generators are restored. Every process
    must call it.

    Raises:
        ConfigError: the device's memory does not suffice.
    """
    start = time.perf_counter()
    place = loader.largest(step)
    batch = loader.micro_batches(place[0])[place[1]].to(engine.device)
    engine.model.train()
    cuda = [engine.device] if engine.device.type == "cuda" else []
    try:
        with named("warm-up"), torch.random.fork_rng(devices=cuda):
            engine.backward(target_loss(engine.model, batch, 0.0))
        engine.discard_gradients()
    except torch.OutOfMemoryError as error:
        raise too_large(cfg, engine, batch) from error
    log.info(
        "warm-up: the largest micro-batch, %d positions of step %d, fits (%.1f s)",
        batch.num_positions,
        place[0] + 1,
        time.perf_counter() - start,
    )


def too_large(cfg: RunConfig, engine: Engine, batch: Batch) -> ConfigError:
    """What to say when `batch` does not fit, with the plan's figures."""
    device = engine.device
    memory = ""
    if device.type == "cuda":
        memory = f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB"
    return ConfigError(
        f"the run's largest micro-batch ({batch.input_ids.numel()} positions, "
        f"{batch.num_targets} of which bear loss) does not fit into the memory{memory}",
        f"some step would stop the run with it; {_planned(cfg, engine, batch)}",
        f"raise train.accumulation (now {cfg.train.accumulation}), set "
        "model.gradient_checkpointing=true, lower data.max_length or quantise the base "
        "(model.quantise=nf4)",
    )


def _planned(cfg: RunConfig, engine: Engine, batch: Batch) -> str:
    """The plan's memory of this batch in one line, largest first."""
    from .ds_file import read_ds_config
    from .model.architecture import architecture_of
    from .plan import size
    from .plan_job import make_job
    from .plan_memory import memory, total

    try:
        model = architecture_of(cfg.model.name, engine.peft_model.config.to_dict())
    except ModelError as error:
        return f"there is no plan for it: {error.what}"
    ds_config = None if cfg.deepspeed is None else read_ds_config(cfg.deepspeed)
    positions = batch.input_ids.numel()
    job = make_job(cfg, model, ds_config, engine.world, positions, max(batch.num_targets, 1))
    parts = [c for c in memory(job, engine.device.type) if not c.host]
    largest = sorted(parts, key=lambda part: -part.bytes)[:5]
    named_parts = ", ".join(f"{part.name} {size(part.bytes)}" for part in largest)
    return f"planned peak {size(total(parts))}: {named_parts}"
