"""The Gauss-Newton-Bartlett curvature estimate: labels sampled from the model itself, and a guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CurvatureError

SAMPLE_ROWS = 64  # rows of logits turned into probabilities at a time: 64 x 49,152 fp32 = 12.6 MB


def uniform_draws(
    seed: int, step: int, example_ids: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """One uniform number per target token, fp64 on the CPU, keyed by (seed, step, example).

    Keyed so, they are independent across examples and therefore ranks, and the same at any world size and
    any split into micro-batches. `counts[i]` target tokens belong to example `example_ids[i]`, in order.
    """
    draws = []
    for example_id, count in zip(example_ids, counts, strict=True):
        key = (
            (seed * 0x9E3779B97F4A7C15)
            ^ (step * 0xBF58476D1CE4E5B9)
            ^ (example_id * 0x94D049BB133111EB)
        ) % 2**63
        draws.append(
            torch.rand(count, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
        )
    return torch.cat(draws) if draws else torch.empty(0, dtype=torch.float64)


@torch.no_grad()
def sample_labels(logits: Tensor, draws: Tensor) -> Tensor:
    """Labels from the model's own softmax by inverting its cumulative distribution.

    Args:
        logits: (n, V), any float dtype.
        draws: (n,) uniform in [0, 1), from `uniform_draws` (or torch.rand in a loop of your own).

    Returns: (n,) int64. Bartlett's identity needs exactly these labels: with the true ones the squared gradient is
    the empirical Fisher, another quantity (Kunstner et al. 2019, arXiv 1905.12558).
    """
    if logits.dim() != 2 or draws.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and draws {tuple(draws.shape)} must be (n, V) and (n,)"
        )
    labels = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    draws = draws.to(logits.device)
    for start in range(0, len(logits), SAMPLE_ROWS):
        rows = slice(start, start + SAMPLE_ROWS)
        cumulative = torch.softmax(logits[rows].float(), dim=-1).cumsum(-1, dtype=torch.float64)
        # Scaled by the last entry: rounding leaves the total a little off 1.
        target = (draws[rows] * cumulative[:, -1]).unsqueeze(1)
        labels[rows] = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return labels.clamp_(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class CurvatureStats:
    """Moments of the bias-corrected h over all adapters."""

    mean: float
    std: float
    max: float

    @classmethod
    def from_sums(cls, sums: Tensor, count: int) -> CurvatureStats:
        """From [sum, sum of squares, max] over all processes and the number of adapter parameters."""
        total, squares, peak = sums.tolist()
        mean = total / count
        return cls(mean, max(squares / count - mean * mean, 0.0) ** 0.5, peak)

    def beside_constant(self, constant: float) -> str | None:
        """What to know of a constant second derivative (a quadratic penalty's) that is added to h; None if little."""
        if constant < self.mean:
            return None
        return (
            f"the penalty's constant curvature ({constant:.1e}) is {constant / self.mean:,.0f} x the mean of the "
            f"likelihood's ({self.mean:.1e}): it sets Sophia's step in most coordinates; a smaller penalty.weight or "
            "penalty.coupling=decoupled gives the likelihood's more say"
        )

    def check(self) -> None:
        """Raise CurvatureError if h is zero, constant or not finite: Sophia would be sign-momentum.

        Zero in all A is right while B = 0; only a curvature that is dead in every adapter raises.
        """
        fix = "check that the loss has target tokens and reaches the adapters; or set optim.name=adamw"
        if not (self.max < float("inf")):
            raise CurvatureError(
                f"Sophia's curvature is not finite (max {self.max})", "no update can be scaled", fix
            )
        if self.max <= 0:
            raise CurvatureError(
                "Sophia's curvature is zero in every adapter",
                "every coordinate would be clipped: sign-momentum",
                fix,
            )
        if self.std <= 1e-6 * self.mean:
            raise CurvatureError(
                f"Sophia's curvature is the same number ({self.mean:.3e}) in every coordinate",
                "a constant carries no curvature: this is sign-momentum or plain momentum in disguise",
                fix,
            )
