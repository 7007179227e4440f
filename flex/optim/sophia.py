"""Sophia-G: momentum, divided by a curvature estimate, clipped (Liu et al. 2023, arXiv 2305.14342)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..kernels.sophia_update import (
    Scalars,
    UpdateGroup,
    add_estimates,
    curvature_update,
    sophia_update_groups,
)


class Sophia(torch.optim.Optimizer):
    """Sophia-G by the paper: h in natural units (B g^2), refreshed before the first update, bias-corrected.

    Usable alone in any loop. Before the first `step()` and then every k steps, feed it the gradient of
    labels that the model itself samples (`flex.optim.sample_labels`), one micro-batch at a time:

        cross_entropy(logits, sample_labels(logits, keys), reduction="mean").backward()
        optimizer.accumulate_curvature(num_targets); optimizer.zero_grad()     # for each micro-batch
        optimizer.commit_curvature()                                           # then once

    Squaring per micro-batch and averaging has noise sqrt(2/M) where the square of the average has sqrt(2).
    It is element-wise, so it is right on ZeRO's flat partitions. ZeRO calls `step()` without arguments, once
    per partition; so an engine that cannot call `accumulate_curvature` sets `num_targets` instead, and then
    `step()` accumulates curvature and leaves the parameters alone.

    Args:
        params: parameters or groups. A group may set `curvature_offset`, the constant second derivative of a
            quadratic penalty in the loss, which sampled labels cannot see.
        lr: every clipped coordinate moves by lr (form C of the official code, form B of the paper).
        betas: (momentum, curvature average per refresh); the second is the same for all groups, because
            ZeRO-3 leaves groups empty between steps, when the curvature is committed.
        gamma: coordinates with |m| < gamma h are not clipped; choose it so that 10-50 % are not.
        eps: floor of gamma h.
        weight_decay: decoupled, outside the clip.
        impl: "auto", "torch" or "triton", as of `flex.kernels.sophia_update`.

    State per parameter: `exp_avg` (m), `exp_avg_sq` (h, as ZeRO's universal checkpoints name it), and the ints
    `step` and `refreshes`. All tensors have the parameter's shape and dtype.

    Raises: ValueError on arguments out of range; CurvatureError if it steps before any refresh.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        gamma: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        impl: str = "auto",
    ) -> None:
        for name, value, ok in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= b < 1 for b in betas)),
            ("gamma", gamma, gamma > 0),
            ("eps", eps, eps > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not ok:
                raise ValueError(
                    f"{name} is {value}; allowed: lr, weight_decay >= 0; 0 <= betas < 1; gamma, eps > 0"
                )
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "curvature_offset": 0.0,
        }
        super().__init__(params, defaults)
        self.impl = impl
        self.num_targets: int | None = None  # set: step() accumulates curvature
        self.control: Tensor | None = None  # see step()
        self.clipped: Tensor | None = (
            None  # 0-dim int64 count of the last update, over this process's share
        )
        self._estimates: dict[Tensor, Tensor] = {}  # sum over micro-batches of B g^2, until commit
        self._micro_batches: dict[Tensor, int] = {}

    def allocate(self, p: Tensor) -> dict[str, Any]:
        """State of one parameter, made on first use; zeros."""
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] = 0
            state["refreshes"] = 0
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; or accumulate curvature while `num_targets` is set.

        With `control` set to a result of `flex.kernels.sophia_update.gradient_norm`, gradients are scaled by
        its factor as they are read, and if they are not finite no tensor changes; the host need not wait
        to know. Call `undo_count()` once it is known that they were not.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.num_targets is not None:
            self.accumulate_curvature(self.num_targets)
            return loss
        groups = []
        for group in self.param_groups:
            by_age: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    state = self.allocate(p)
                    if state["refreshes"] == 0:
                        raise CurvatureError(
                            "Sophia.step() came before any curvature refresh",
                            "with h = 0 every coordinate is clipped and the run is sign-momentum",
                            "call accumulate_curvature(num_targets) and commit_curvature() before the first step",
                        )
                    state["step"] += 1
                    by_age.setdefault((state["step"], state["refreshes"]), []).append(p)
            groups += [self._update_group(group, *age, p) for age, p in by_age.items()]
        if groups:
            clipped = sophia_update_groups(groups, control=self.control, impl=self.impl)
            self.clipped = clipped if self.clipped is None else self.clipped + clipped
        return loss

    def undo_count(self) -> None:
        """Take back the step number of the last `step()`, which changed nothing: bias corrections go by it."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] -= 1

    def _update_group(
        self, group: dict[str, Any], step: int, refreshes: int, params: list[Tensor]
    ) -> UpdateGroup:
        """Parameters of one group and age, with their bias corrections."""
        beta1, beta2 = group["betas"][0], self.defaults["betas"][1]
        scalars = Scalars(
            lr=group["lr"],
            beta1=beta1,
            gamma=group["gamma"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            m_scale=1 / (1 - beta1**step),
            h_scale=1 / (1 - beta2**refreshes),
            h_offset=group["curvature_offset"],
        )
        return UpdateGroup(
            params,
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [p.grad for p in params],  # type: ignore[misc]
            scalars,
        )

    @torch.no_grad()
    def accumulate_curvature(self, num_targets: int) -> None:
        """Add B g^2 of one micro-batch; .grad holds the gradient of the mean loss over B = num_targets
        sampled labels. The gradients must not be clipped."""
        if num_targets < 1:
            raise ValueError(
                f"num_targets is {num_targets}; it must be the number of loss tokens, >= 1"
            )
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        fresh = [p for p in params if p not in self._estimates]
        for p in fresh:
            self._estimates[p] = torch.empty_like(self.allocate(p)["exp_avg_sq"])
        added = [p for p in params if self._micro_batches.get(p)]
        for chosen, first in ((fresh, True), (added, False)):
            add_estimates(
                [self._estimates[p] for p in chosen],
                [p.grad for p in chosen],
                num_targets,
                first=first,
                impl=self.impl,
            )
        for p in params:
            self._micro_batches[p] = self._micro_batches.get(p, 0) + 1

    @torch.no_grad()
    def commit_curvature(self) -> None:
        """Fold the mean of the accumulated estimates into h."""
        by_count: dict[int, list[Tensor]] = {}
        for p, count in self._micro_batches.items():
            by_count.setdefault(count, []).append(p)
        for count, params in by_count.items():
            curvature_update(
                [self.state[p]["exp_avg_sq"] for p in params],
                [self._estimates[p] for p in params],
                self.defaults["betas"][1],
                scale=1 / count,
                impl=self.impl,
            )
            for p in params:
                self.state[p]["refreshes"] += 1
        self.discard_curvature()

    def discard_curvature(self) -> None:
        """Forget estimates that were accumulated but not committed."""
        self._estimates.clear()
        self._micro_batches.clear()

    def curvature_sums(self) -> Tensor:
        """fp64 tensor [sum, sum of squares, max] of the bias-corrected h over this process's share."""
        parts = []
        for state in self.state.values():
            if state.get("refreshes") and state["exp_avg_sq"].numel():
                h = state["exp_avg_sq"].double() / (
                    1 - self.defaults["betas"][1] ** state["refreshes"]
                )
                parts.append(torch.stack([h.sum(), h.square().sum(), h.max()]).cpu())
        if not parts:
            return torch.zeros(3, dtype=torch.float64)
        total, squares, largest = torch.stack(parts).T.tolist()
        # exactly rounded: a resumed run holds its states in another order
        sums = [math.fsum(total), math.fsum(squares), max(largest)]
        return torch.tensor(sums, dtype=torch.float64)
