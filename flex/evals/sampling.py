"""From logits to tokens. The draws of a sample depend on its seed and the position alone, so the
same completion comes out whatever else is in the batch, and after a kill."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flex.errors import ConfigError

_FIRST = (
    256  # most nuclei are smaller: a full sort of a vocabulary takes longer than the model's step
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy: the likeliest token, the first of equals.

    Raises ConfigError: a temperature below 0, top_p outside of (0, 1], or top_p with greedy.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature = {self.temperature}",
                "logits are divided by it",
                "give 0 for greedy, or a number above it, such as 0.2",
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p = {self.top_p}",
                "it is the share of the probability that is drawn from",
                "give a number above 0 and up to 1, such as 0.95",
            )
        if self.greedy and self.top_p != 1:
            raise ConfigError(
                f"top_p = {self.top_p} with temperature 0",
                "greedy decoding draws nothing, so top_p would have no effect",
                "give a temperature too, or leave top_p out",
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def sample_seed(seed: int, task_id: str, sample: int) -> int:
    """The seed of a sample's draws, below 2^53 so that any JSON reader keeps it.

    It does not depend on the model: two systems draw the same numbers for the same sample.
    """
    text = f"{seed}\0{task_id}\0{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 11


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), from the seed and the number of the token: a counter, no state."""
    text = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return (word >> 11) * 2.0**-53


def choose(logits: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> list[int]:
    """One token for each row.

    Args:
        logits: (rows, vocabulary).
        uniforms: one number in [0, 1) for each row; not looked at when greedy.

    Raises ConfigError for logits with NaN, which no token could be drawn from.
    """
    if bool(torch.isnan(logits).any()):
        raise ConfigError(
            "the model's logits are NaN",
            "no token can be chosen from them",
            "try --dtype float32; if that gives NaN too, the weights are damaged",
        )
    if sampling.greedy:
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    weights = nucleus(torch.softmax(logits.double() / sampling.temperature, -1), sampling.top_p)
    # In the vocabulary's order, not by size: rounding then moves the borders between tokens by a
    # few ulps, where a sort would swap two tokens of nearly the same probability
    steps = weights.cumsum(-1)
    total = steps[:, -1:]
    drawn = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
    tokens: list[int] = torch.searchsorted(steps, drawn, right=True)[:, 0].tolist()
    return tokens


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero outside of the smallest set of likeliest tokens that holds `top_p`, shape as given.

    Tokens as likely as the least of the set belong to it too. Not normalised again.
    """
    if top_p >= 1:
        return probabilities
    first = min(_FIRST, probabilities.shape[-1])
    top = probabilities.topk(first, -1).values
    least = _least(top, top_p)
    for row in (top.sum(-1) < top_p).nonzero()[:, 0]:
        least[row] = _least(probabilities[row : row + 1].sort(-1, descending=True).values, top_p)
    return torch.where(probabilities >= least, probabilities, 0.0)


def _least(descending: Tensor, top_p: float) -> Tensor:
    """(rows, 1): the smallest probability of the nucleus."""
    count = (descending.cumsum(-1) < top_p).sum(-1, keepdim=True)
    return descending.gather(-1, count.clamp(max=descending.shape[-1] - 1))
