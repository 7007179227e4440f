"""The few calls the trainer makes of whatever runs the model: this file is plain PyTorch in one process,
`engine_zero.py` is DeepSpeed ZeRO."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from . import loss_head
from .errors import CheckpointError
from .kernels.sophia_update import gradient_norm
from .model import linear
from .optim import CurvatureStats, Sophia
from .processes import all_reduce

log = logging.getLogger("flex.engine")

if TYPE_CHECKING:
    from peft import PeftModel

    from .config import RunConfig


@dataclass(frozen=True)
class Update:
    """What an optimizer update did."""

    grad_norm: float  # global, before clipping
    skipped: bool  # the gradient was not finite and nothing changed


@dataclass
class OptimizerState:
    """Optimizer state of whole matrices, independent of how many processes held it.

    `tensors` maps `parameter name + "/" + key` to a CPU tensor; `counters` are the numbers that all parameters
    share (Adam's step, Sophia's refreshes).
    """

    tensors: dict[str, Tensor]
    counters: dict[str, float]


class Engine:
    """Plain PyTorch, one process.

    Args:
        model: the PEFT model; only `parameters` require gradients.
        optimizer: over exactly `parameters`.
        parameters: the adapters by name, fp32.
        clip_norm: bound of the global gradient norm; 0 turns it off. Never applied to curvature.
    """

    rank = 0
    world = 1
    copies = 1  # processes that hold each coordinate's optimizer state
    whole_gradients = True  # after backward `.grad` is the whole gradient of a whole matrix

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, Tensor],
        clip_norm: float,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.parameters = dict(parameters)
        self.clip_norm = clip_norm
        self._told = False  # what the first curvature looks like
        self.num_parameters = sum(
            getattr(p, "ds_numel", p.numel()) for p in self.parameters.values()
        )

    @property
    def peft_model(self) -> PeftModel:
        """The PEFT model itself, without what an engine wraps around it."""
        return cast("PeftModel", getattr(self.model, "module", self.model))

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    # ---- training ----

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. The mean of `loss` over processes is what is differentiated."""
        loss.backward()

    def update(self, lr: float) -> Update:
        """Clip, step and clear the gradients; or skip, if they are not finite."""
        self._set_lr(lr)
        grads = self._gradients()
        if isinstance(self.optimizer, Sophia):
            # Its kernel reads factor and flag on the device: no pass over the gradients, no wait.
            control = gradient_norm(grads, self.clip_norm, impl=self.optimizer.impl)
            self.optimizer.control = control
            self.optimizer.step()
            norm, _, finite = control.tolist()
            if not finite:
                self.optimizer.undo_count()
        else:
            norm, finite = clip_gradients(grads, self.clip_norm)
            if finite:
                self.optimizer.step()
        self._clear_gradients()
        return Update(norm, skipped=not finite)

    def discard_gradients(self) -> None:
        """Forget the gradients of a backward whose loss was scaled by 0."""
        self._clear_gradients()

    def gather(self) -> None:
        """Make every adapter whole on this process, to be read until the next forward. All processes must call it."""

    def _set_lr(self, lr: float) -> None:
        if isinstance(self.optimizer, Sophia):
            self.optimizer.clipped = None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def _clear_gradients(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def shift(self, deltas: Mapping[nn.Parameter, Tensor]) -> None:
        """Add to parameters outside the optimizer (the decoupled penalty)."""
        for p, delta in deltas.items():
            p.add_(delta)

    # ---- curvature ----

    def add_curvature(self, num_targets: int) -> None:
        """Feed the gradient of one micro-batch of sampled labels (over all processes) to Sophia, and clear it."""
        assert isinstance(self.optimizer, Sophia)
        if gradient_norm(self._gradients(), 0.0, impl=self.optimizer.impl)[2]:
            self.optimizer.accumulate_curvature(num_targets)
        self._clear_gradients()

    def commit_curvature(self) -> CurvatureStats:
        """Fold the accumulated curvature into Sophia's h. Raises CurvatureError if h is dead."""
        assert isinstance(self.optimizer, Sophia)
        self.optimizer.commit_curvature()
        sums = self.optimizer.curvature_sums()
        sums = torch.cat([all_reduce(sums[:2]) / self.copies, all_reduce(sums[2:], largest=True)])
        stats = CurvatureStats.from_sums(sums, self.num_parameters)
        stats.check()
        if not self._told:
            constant = max(group["curvature_offset"] for group in self.optimizer.param_groups)
            note = stats.beside_constant(constant)
            if note is not None:
                log.info("Sophia: %s", note)
            self._told = True
        return stats

    def clipped_fraction(self) -> float | None:
        """Share of coordinates that Sophia clipped in the last update; None for other optimizers."""
        if not isinstance(self.optimizer, Sophia):
            return None
        count = torch.zeros(()) if self.optimizer.clipped is None else self.optimizer.clipped.cpu()
        return all_reduce(count.double()).item() / (self.copies * self.num_parameters)

    # ---- state ----

    def full_parameters(self) -> dict[str, Tensor]:
        """The adapters as whole fp32 CPU tensors by name. Every process must call it."""
        return {name: p.detach().float().cpu().clone() for name, p in self.parameters.items()}

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state as whole CPU tensors. Every process must call it."""
        tensors, counters = {}, {}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state[p].items():
                if key == "step" or not isinstance(value, Tensor):
                    counters[key] = float(value)
                else:
                    tensors[f"{name}/{key}"] = value.detach().cpu().clone()
        return OptimizerState(tensors, counters)

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Restore what `optimizer_state` returned. Raises CheckpointError if a tensor is missing."""
        for name, p in self.parameters.items():
            prefix = f"{name}/"
            mine = {k[len(prefix) :]: v for k, v in saved.tensors.items() if k.startswith(prefix)}
            if not mine:
                raise missing_state(name)
            state = self.optimizer.state[p]
            state.update({key: value.to(p.device) for key, value in mine.items()})
            restore_counters(self.optimizer, p, saved.counters)

    def close(self) -> None:
        """Let go of model, optimizer and adapters: their memory is free afterwards. Every process must call it."""
        del self.model, self.optimizer
        self.parameters = {}
        gc.collect()  # modules and their hooks refer to each other


def missing_state(name: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint holds no optimizer state for {name}",
        "going on with fresh moments would not be the same run",
        "resume with the optimizer and adapters that the checkpoint was written with",
    )


def restore_counters(
    optimizer: torch.optim.Optimizer, p: Tensor, counters: Mapping[str, float]
) -> None:
    """Put the counters that all parameters share into the state of `p`, in the form the optimizer keeps them in."""
    for key, value in counters.items():
        # torch's fused AdamW keeps a float tensor on the parameter's device, bitsandbytes and Sophia an int.
        adamw = isinstance(optimizer, torch.optim.AdamW)
        optimizer.state[p][key] = torch.tensor(value, device=p.device) if adamw else int(value)


@torch.no_grad()
def clip_gradients(grads: list[Tensor], max_norm: float) -> tuple[float, bool]:
    """Scale gradients so that their global norm is at most max_norm (0: never); none, if it is not finite.

    Returns: the norm before, and whether it is finite. The factor is DeepSpeed's, so that engines agree.
    """
    norm, factor, finite = gradient_norm(grads, max_norm).tolist()
    if finite and factor != 1.0:
        torch._foreach_mul_(grads, factor)
    return norm, bool(finite)


def build_engine(
    cfg: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
) -> Engine:
    """The engine that `cfg.deepspeed` asks for, around a model that computes large losses in blocks."""
    loss_head.install(model)
    linear.install(model)
    if cfg.deepspeed is None:
        return Engine(model, optimizer, parameters, cfg.optim.clip_norm)
    from .engine_zero import ZeroEngine  # DeepSpeed takes seconds to import

    return ZeroEngine(cfg, model, optimizer, parameters)
