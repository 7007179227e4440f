"""The named types that flow between the trainer's parts (see the data flow in CONTRIBUTING.md)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # label of a position that bears no loss


@dataclass(frozen=True)
class Example:
    """One tokenised row: prompt + completion + EOS, cut to max_length.

    `input_ids` (T,) and `labels` (T,) are int64 on the CPU; labels are ALREADY SHIFTED: labels[t] is the token
    that position t must predict, or IGNORE. The last position never bears loss.
    """

    input_ids: Tensor
    labels: Tensor
    row: str  # where it came from, for messages: "mbpp:601" or "file.jsonl:12"
    truncated: bool = False

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class Batch:
    """A micro-batch in one of two layouts.

    packed:  B = 1, documents end to end, T = sum of lengths; `cu_seqlens` (docs + 1,) int32 gives the boundaries
             and `attention_mask` is None.
    grouped: B = docs, right-padded to the longest; `attention_mask` (B, T) bool and `cu_seqlens` is None.
    """

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, already shifted
    position_ids: Tensor  # (B, T) int64, restart at 0 in every document
    num_targets: int  # positions that bear loss
    num_positions: int  # real positions, padding not counted
    example_ids: Tensor  # (docs,) int64: place of each document in the run's sample sequence, world-independent
    cu_seqlens: Tensor | None = None
    attention_mask: Tensor | None = None

    def targets_per_example(self) -> list[int]:
        """Number of positions that bear loss in each document, in order."""
        bears_loss = self.labels != IGNORE
        if self.cu_seqlens is None:
            return bears_loss.sum(1).tolist()
        lengths = self.cu_seqlens.diff().tolist()
        return [int(part.sum()) for part in bears_loss[0].split(lengths)]

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass
class StepReport:
    """What one optimizer step did. Figures are over all processes."""

    step: int  # 1-based: the number of updates made so far
    loss: float  # mean cross-entropy per target token, nats
    lr: float
    grad_norm: float  # before clipping, penalty included
    tokens: int  # target tokens of the step
    positions: int  # all tokens of the step
    seconds: float
    penalty: float = 0.0  # P
    penalty_weighted: float = 0.0  # lambda * P
    penalty_share: float = 0.0  # |lambda * grad P| / |gradient|
    clipped_fraction: float | None = None  # Sophia: share of coordinates at the clip
    curvature_mean: float | None = None  # Sophia: mean of the bias-corrected h, on refresh steps
    high_band: dict[str, float] = field(
        default_factory=dict
    )  # share of energy above the threshold, "A" and "B"
    validation_loss: float | None = None
    passed: int | None = None  # greedy completions that solved their task, of `evaluated`
    evaluated: int | None = None
    refreshed: bool = False
    skipped: bool = False  # non-finite gradient: nothing was updated
    memory_bytes: int = 0


@dataclass
class TrainState:
    """Everything resumable that is neither adapter nor optimizer. Written as JSON."""

    step: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    skipped: int = 0
    refreshes: int = 0
    rng: dict[str, str] = field(
        default_factory=dict
    )  # base64 torch generator states, keyed "cpu:<rank>" etc.
    first_validation_loss: float | None = None
    last_validation_loss: float | None = None
