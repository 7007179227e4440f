"""DeepSpeed ZeRO 0-3, with and without CPU offload.

Facts this file rests on (DeepSpeed 0.19): `managed_gradient_accumulation: false` makes `engine.step()` the
boundary, so a curvature micro-batch is one backward and one step. ZeRO 1-3 hand the optimizer flat fp32
partitions, several times per step in stage 3. Stage 0 with fp32 adapters calls the optimizer itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import RunConfig
from .ds_file import read_ds_config
from .engine import Engine, OptimizerState, Update, clip_gradients, missing_state, restore_counters
from .errors import ConfigError
from .optim import Lion, Sophia


def partitioned_config(cfg: RunConfig) -> dict[str, Any] | None:
    """The ds_config of a run under ZeRO-3, whose base is loaded in partitions; None for other runs."""
    config = None if cfg.deepspeed is None else read_ds_config(cfg.deepspeed)
    if config is None or config.get("zero_optimization", {}).get("stage", 0) != 3:
        return None
    return config


# What the run's own configuration decides; a ds_config that says it too could contradict it silently.
OWNED_BY_THE_RUN = {
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.clip_norm",
    "gradient_accumulation_steps": "train.accumulation",
    "train_batch_size": "train.batch_size",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}


def check_ds_config(
    config: Mapping[str, Any], cfg: RunConfig, largest_adapter: int | None = None
) -> int:
    """Refuse a ds_config that contradicts the run, before anything is built. Returns the ZeRO stage."""
    where = cfg.deepspeed
    for key, ours in OWNED_BY_THE_RUN.items():
        if key in config:
            raise ConfigError(
                f"{where} sets {key}",
                f"the run decides that by {ours}",
                f"delete {key} from it and set {ours}",
            )
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    needed: list[tuple[bool, str, str]] = [
        (
            config.get("managed_gradient_accumulation", True) is False,
            '"managed_gradient_accumulation": false',
            "the trainer decides when gradients are complete, and curvature needs a boundary per micro-batch",
        ),
        (
            stage == 0 or config.get("zero_allow_untested_optimizer", False) is True,
            '"zero_allow_untested_optimizer": true',
            "ZeRO admits only DeepSpeed's own optimizers without it",
        ),
        (
            "offload_optimizer" not in zero
            or config.get("zero_force_ds_cpu_optimizer", True) is False,
            '"zero_force_ds_cpu_optimizer": false',
            "offload would insist on DeepSpeed's CPU Adam",
        ),
    ]
    for ok, setting, why in needed:
        if not ok:
            raise ConfigError(
                f"{where} lacks {setting}", why, f"add {setting}, as in ds_configs/zero{stage}.json"
            )
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    if (
        stage == 3
        and isinstance(threshold, int)
        and largest_adapter is not None
        and threshold < largest_adapter
    ):
        raise ConfigError(
            f"{where}: stage3_param_persistence_threshold is {threshold}, the largest adapter has {largest_adapter}",
            "the spectral penalty needs whole matrices on every process",
            f"set stage3_param_persistence_threshold to {max(1_000_000, largest_adapter)} or more",
        )
    if cfg.model.quantise != "none" and stage == 3:
        raise ConfigError(
            f"model.quantise={cfg.model.quantise} with ZeRO stage 3",
            "bitsandbytes' blocks cannot be cut into partitions",
            "use ds_configs/zero2.json (the quantised base is small), or model.quantise=none",
        )
    if cfg.optim.name == "adamw8bit" and stage > 0:
        raise ConfigError(
            "optim.name=adamw8bit with ZeRO stage 1-3",
            "its quantised state has no whole-matrix form that a checkpoint could hold",
            "use optim.name=adamw, or ds_configs/zero0.json",
        )
    return int(stage)


class ZeroEngine(Engine):
    """DeepSpeed around the same model, optimizer and adapters. See `Engine` for the calls."""

    whole_gradients = False

    def __init__(
        self,
        cfg: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, Tensor],
    ) -> None:
        import deepspeed

        assert cfg.deepspeed is not None
        super().__init__(model, optimizer, parameters, cfg.optim.clip_norm)
        config = read_ds_config(cfg.deepspeed)
        self.stage = check_ds_config(config, cfg, max(p.numel() for p in parameters.values()))
        if self.stage > 0:
            config["gradient_clipping"] = cfg.optim.clip_norm
        self.engine, self._wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )
        if self.stage == 3:
            _name_what_layers_read(model)
        self.model = self.engine
        self.rank, self.world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        self._stage0_norm = 0.0
        if self.stage == 0:
            self.copies = self.world
            optimizer.register_step_pre_hook(self._before_step)
        else:
            self._allocate_state()

    def _allocate_state(self) -> None:
        """Make the optimizer's state before the first step.

        ZeRO 1 and 2 link the state of all groups to their matrices after the step of the first group; what the
        other groups make later would never be found (DeepSpeed 0.19).
        """
        self._flats = (
            self._wrapped.fp32_partitioned_groups_flat
            if self.stage == 3
            else self._wrapped.single_partition_of_fp32_groups
        )
        for flat in self._flats:
            allocate_state(self.optimizer, flat)
        if self.stage < 3:
            self._wrapped._lazy_init_hp_params_optimizer_state()

    # ---- training ----

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def discard_gradients(self) -> None:
        """Leave them: they may lie reduced in ZeRO's own buffers, and zeros add nothing."""

    def gather(self) -> None:
        # Even parameters below the persistence threshold are partitioned while ZeRO-3 records a trace, which it
        # does anew whenever the modules run in another order, as between validation and training.
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if self.stage == 3:
            missing = [
                p
                for p in self.parameters.values()
                if p.ds_status == ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
            ]
            if missing:
                missing[0].all_gather(missing)  # type: ignore[attr-defined]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Stage 0 has no norm and no guard of its own: here gradients are reduced and the step has not begun."""
        curvature = isinstance(optimizer, Sophia) and optimizer.num_targets is not None
        bound = 0.0 if curvature else self.clip_norm
        self._stage0_norm, finite = clip_gradients(self._gradients(), bound)
        if not finite:
            self._clear_gradients()  # the optimizer passes over parameters without a gradient

    def update(self, lr: float) -> Update:
        self._set_lr(lr)
        self.engine.step()
        norm = float(self._stage0_norm if self.stage == 0 else self._wrapped._global_grad_norm)
        return Update(norm, skipped=not math.isfinite(norm))

    @torch.no_grad()
    def shift(self, deltas: Mapping[nn.Parameter, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for p, delta in deltas.items():
            p.add_(delta)
            if self.stage == 3:
                safe_set_local_fp32_param(p, self._partition(p.detach()))
            elif self.stage > 0:
                safe_set_full_fp32_param(p, p.detach())

    # ---- curvature ----

    def add_curvature(self, num_targets: int) -> None:
        assert isinstance(self.optimizer, Sophia)
        self.optimizer.num_targets = num_targets
        if self.stage > 0:
            self._wrapped.clip_grad = 0.0  # clipping would shrink h by the square of the factor
        try:
            self.engine.step()
        finally:
            self.optimizer.num_targets = None
            if self.stage > 0:
                self._wrapped.clip_grad = self.clip_norm

    # ---- state ----

    def full_parameters(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage == 0:
            return super().full_parameters()
        return {
            name: safe_get_full_fp32_param(p).cpu().clone() for name, p in self.parameters.items()
        }

    def optimizer_state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return super().optimizer_state()
        state = next(iter(self.optimizer.state.values()))
        keys = [k for k, v in state.items() if k != "step" and isinstance(v, Tensor)]
        tensors = {
            f"{name}/{key}": safe_get_full_optimizer_state(p, key).cpu().clone()
            for name, p in self.parameters.items()
            for key in keys
        }
        return OptimizerState(tensors, {k: float(v) for k, v in state.items() if k not in keys})

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            return super().load_optimizer_state(saved)
        for flat in self._flats:
            restore_counters(self.optimizer, flat, saved.counters)
        for name, p in self.parameters.items():
            prefix = f"{name}/"
            mine = {k[len(prefix) :]: v for k, v in saved.tensors.items() if k.startswith(prefix)}
            if not mine:
                raise missing_state(name)
            for key, value in mine.items():
                if self.stage == 3:
                    safe_set_local_optimizer_state(p, self._partition(value), key)
                else:
                    safe_set_full_optimizer_state(p, value, key)
        return None

    def _partition(self, full: Tensor) -> Tensor:
        """This process's slice of a whole tensor as ZeRO-3 cuts it: equal parts, the last one zero-padded."""
        numel = -(-full.numel() // self.world)
        padded = full.new_zeros(numel * self.world)
        padded[: full.numel()] = full.reshape(-1)
        return padded.narrow(0, numel * self.rank, numel)

    def close(self) -> None:
        self.engine.destroy()
        del self.engine, self._wrapped
        if self.stage > 0:
            del self._flats
        super().close()


def _name_what_layers_read(model: nn.Module) -> None:
    """Tell ZeRO-3 that a fused layer's forward reads its sub-modules' parameters.

    DeepSpeed finds that out by itself, but only in calls of the engine. A sample before the first step calls the
    model inside it, and would find empty weights.
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    from .model.adapters import FusedLora

    for layer in model.modules():
        if isinstance(layer, FusedLora):
            for p in layer.parameters():
                register_external_parameter(layer, p)


def allocate_state(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    """State of a flat partition as the optimizer itself would make it at the first step."""
    if isinstance(optimizer, Sophia | Lion):
        optimizer.allocate(p)
    else:
        zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p].update(zeros, step=torch.zeros((), device=p.device))
