"""`python -m flex merge-check`: is a merged adapter the same model as the adapter beside its base?

On paper it is. In half precision the sums are rounded at other places, so logits move, near-ties
flip, and a greedy completion that flips once goes its own way. Here that is measured, on the same
adapter, so that a difference between scores is not taken for an effect of merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flex.data.encode import completion_ids, prompt_ids
from flex.errors import DataError
from flex.evals.generate import Generator, Request, context_of
from flex.evals.progress import Meter
from flex.evals.sampling import Sampling
from flex.evals.tasks import Benchmark


@dataclass(frozen=True)
class MergeCheck:
    """What two models had in common; differences are of logits, fp32.

    Attributes:
        prompts, positions: texts read and their tokens (teacher-forced: prompt, and the reference
            solution where there is one).
        agreeing: positions where both find the same token likeliest.
        largest: the largest difference between two logits.
        mean: the mean over positions of a position's largest difference.
        scale: the largest logit.
        completions: greedy completions of both models.
        diverged: for each completion that differs, (task_id, new tokens before they part).
    """

    prompts: int
    positions: int
    agreeing: int
    largest: float
    mean: float
    scale: float
    completions: int
    diverged: tuple[tuple[str, int], ...]


def check(
    unmerged: Any,
    merged: Any,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    max_new_tokens: int = 128,
    batch_size: int = 16,
) -> MergeCheck:
    """Compare two models over the prompts of a benchmark.

    Args:
        unmerged, merged: on one device each; both are kept in memory.
        max_new_tokens: of the greedy completions, which stop at EOS only.

    Raises DataError: a text that is longer than the models' context.
    """
    texts = [_text(task, tokenizer) for task in benchmark.tasks]
    limit = context_of(merged.config)
    for task, ids in zip(benchmark.tasks, texts, strict=True):
        if limit is not None and len(ids) > limit:
            raise DataError(
                f"{task.task_id}: {len(ids)} tokens, the model's context is {limit}",
                "its logits cannot be compared",
                "use --limit, or leave the task out of --data",
            )
    agreeing, positions, largest, total, scale = 0, 0, 0.0, 0.0, 0.0
    with Meter("reading", len(texts)) as meter:
        for ids in texts:
            one, other = _logits(unmerged, ids), _logits(merged, ids)
            gaps = (one - other).abs().amax(-1)
            agreeing += int((one.argmax(-1) == other.argmax(-1)).sum())
            positions += len(ids)
            largest = max(largest, float(gaps.max()))
            total += float(gaps.double().sum())
            scale = max(scale, float(one.abs().max()))
            meter.add(len(ids))
    requests = [Request(task.task_id, 0, 0, task.prompt, ()) for task in benchmark.tasks]
    made = [
        _greedy(model, tokenizer, requests, max_new_tokens, batch_size)
        for model in (unmerged, merged)
    ]
    diverged = [
        (request.task_id, place)
        for request in requests
        if (place := parting(made[0][request.task_id], made[1][request.task_id])) is not None
    ]
    return MergeCheck(
        *(len(texts), positions, agreeing, largest, total / positions, scale),
        *(len(requests), tuple(diverged)),
    )


def parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """How many tokens two completions share before they differ; None if they do not.

    >>> parting([1, 2, 3], [1, 2, 4]), parting([1], [1, 2]), parting([1], [1])
    (2, 1, None)
    """
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _text(task: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if task.reference is None:
        return prompt_ids(task.prompt, tokenizer)
    context, solution = task.reference
    return prompt_ids(context, tokenizer) + completion_ids(solution, tokenizer)


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> Tensor:
    """(T, vocabulary) fp32."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    return logits[0].float()


def _greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, list[int]]:
    generator = Generator(model, tokenizer, Sampling(), max_new_tokens, batch_size)
    with Meter("generating", len(requests)) as meter:
        found = {}
        for key, ids in generator.token_ids(requests):
            found[key[0]] = ids
            meter.add(len(ids))
    return found
