"""Sign-momentum optimizers, the controls that Sophia must beat: with h = 0 it is one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675): u = sign(b1 m + (1-b1) g); m = b2 m + (1-b2) g.

    Decoupled weight decay. State: `exp_avg`, the parameter's shape and dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"lr {lr}, betas {betas}, weight_decay {weight_decay}: need >= 0 and 0 <= betas < 1"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def allocate(self, p: Tensor) -> dict[str, Any]:
        """State of one parameter, made on first use; zeros."""
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        return state

    @staticmethod
    def _directions(m: list[Tensor], g: list[Tensor], beta1: float, beta2: float) -> list[Tensor]:
        directions = torch._foreach_lerp(m, g, 1 - beta1)
        torch._foreach_lerp_(m, g, 1 - beta2)
        return list(directions)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            directions = self._directions(
                [self.allocate(p)["exp_avg"] for p in params],
                [p.grad for p in params],
                *group["betas"],
            )
            torch._foreach_sign_(directions)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-group["lr"])
        return loss


class Signum(Lion):
    """Signum (Bernstein et al. 2018, arXiv 1802.04434): m = b1 m + (1-b1) g; u = sign(m). betas[1] is unused."""

    @staticmethod
    def _directions(m: list[Tensor], g: list[Tensor], beta1: float, beta2: float) -> list[Tensor]:
        torch._foreach_lerp_(m, g, 1 - beta1)
        return [x.clone() for x in m]
