"""What a plan is made for: the model, how it is split over devices, and a micro-batch's size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import RunConfig
from .errors import ConfigError
from .model.architecture import Architecture, LinearShape

WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Sharding:
    """The engine's settings that decide memory and traffic; DeepSpeed's defaults where unset."""

    stage: int | None = None  # ZeRO stage; None: plain PyTorch
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int = 500_000_000  # elements of gradients that are reduced together
    live: int = 1_000_000_000  # elements of gathered parameters kept at a time (ZeRO-3)
    prefetch: int = 50_000_000  # elements gathered ahead (ZeRO-3)

    @classmethod
    def from_ds_config(cls, config: Mapping[str, Any] | None) -> Sharding:
        """Of a ds_config's `zero_optimization`; None: no engine."""
        if config is None:
            return cls()
        zero = config.get("zero_optimization", {})

        def size(key: str, default: int) -> int:
            value = zero.get(key, default)
            return value if isinstance(value, int) else default  # "auto": DeepSpeed's own

        def offloaded(key: str) -> bool:
            return zero.get(key, {}).get("device", "none") != "none"

        return cls(
            stage=int(zero.get("stage", 0)),
            offload_optimizer=offloaded("offload_optimizer"),
            offload_param=offloaded("offload_param"),
            bucket=size("reduce_bucket_size", cls.bucket),
            live=size("stage3_max_live_parameters", cls.live),
            prefetch=size("stage3_prefetch_bucket_size", cls.prefetch),
        )


@dataclass(frozen=True)
class Job:
    """A run as the plan sees it.

    Sizes are of the largest micro-batch of one process, upper bounds unless they were given:
    `positions` tokens, `targets` of which bear loss, in documents of `document` tokens;
    `validation` positions of a validation batch.
    """

    cfg: RunConfig
    model: Architecture
    sharding: Sharding
    world: int
    positions: int
    targets: int
    document: int
    validation: int

    @property
    def width(self) -> int:
        """Bytes of an element of the base's dtype."""
        return WIDTHS[self.cfg.model.dtype]

    @property
    def stage(self) -> int:
        return self.sharding.stage or 0

    @property
    def adapters(self) -> list[frozenset[str]]:
        """The adapted linear layers of each layer."""
        return self.model.targets(self.cfg.lora.targets)

    @property
    def shapes(self) -> dict[str, LinearShape]:
        """The linear layers of one layer by name."""
        return {linear.name: linear for linear in self.model.linears}

    @property
    def adapter_parameters(self) -> int:
        shapes = self.shapes
        features = sum(
            shapes[n].inputs + shapes[n].outputs for names in self.adapters for n in names
        )
        return self.cfg.lora.r * features


def make_job(
    cfg: RunConfig,
    model: Architecture,
    ds_config: Mapping[str, Any] | None,
    world: int,
    tokens: int | None = None,
    targets: int | None = None,
) -> Job:
    """The job of a configuration on `world` devices.

    Args:
        tokens: positions per micro-batch and process; none: every example at data.max_length.
        targets: of which bear loss; none: all of them.

    Raises:
        ConfigError: several devices without a ds_config, or fewer examples than micro-batches.
    """
    train = cfg.train
    if world > 1 and ds_config is None:
        raise ConfigError(
            f"{world} GPUs, but no ds_config is given",
            "each would train the same model alone",
            "add deepspeed=ds_configs/zero2.json",
        )
    if train.batch_size < world * train.accumulation:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is less than {world} processes x "
            f"train.accumulation={train.accumulation}",
            "some micro-batch of each step would be empty",
            f"set train.batch_size={world * train.accumulation} or more, or lower the accumulation",
        )
    if (
        cfg.model.quantise != "none"
        and (ds_config or {}).get("zero_optimization", {}).get("stage") == 3
    ):
        raise ConfigError(
            f"a base in {cfg.model.quantise} with ZeRO-3",
            "blocks of 4 or 8 bits are not partitioned",
            "use ds_configs/zero2.json, or a base that is not quantised",
        )
    model.targets(cfg.lora.targets)  # refuses a name that matches nothing
    examples = math.ceil(train.batch_size / (world * train.accumulation))
    positions = examples * cfg.data.max_length if tokens is None else tokens
    return Job(
        cfg,
        model,
        Sharding.from_ds_config(ds_config),
        world,
        positions,
        positions if targets is None else min(targets, positions),
        min(positions, cfg.data.max_length),
        train.eval_batch_size * cfg.data.max_length,
    )


def gradient_flow(job: Job) -> list[frozenset[str]]:
    """Per layer, the linear layers whose input requires a gradient.

    Below the first adapter nothing does, so backward keeps nothing there and computes no dX. With
    gradient checkpointing the embeddings require one (PEFT sees to it).
    """
    flows, alive = [], job.cfg.model.gradient_checkpointing
    for adapted in job.adapters:
        qkv, ups = (
            {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
            {
                "mlp.gate_proj",
                "mlp.up_proj",
            },
        )
        inputs = set(qkv) if alive else set()
        if alive or adapted & qkv:
            inputs.add("self_attn.o_proj")
            alive = True
        alive = alive or "self_attn.o_proj" in adapted
        inputs |= ups if alive else set()
        if alive or adapted & ups:
            inputs.add("mlp.down_proj")
            alive = True
        alive = alive or "mlp.down_proj" in adapted
        flows.append(frozenset(inputs))
    return flows
