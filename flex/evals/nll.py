"""`python -m flex nll`: how likely a model finds the reference solutions of a benchmark.

The loss moves before pass@1 does, and is known for every task, so two systems can be told apart with
far fewer tasks. It is no substitute: a likely reference is not yet a program that passes.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from flex.data.encode import completion_ids, prompt_ids
from flex.errors import DataError
from flex.evals.generate import context_of
from flex.evals.journal import differing
from flex.evals.progress import Meter
from flex.evals.results import write_asked
from flex.evals.stats import Interval, Test, bootstrap, sign_flip
from flex.evals.tasks import Benchmark

if TYPE_CHECKING:
    from pydantic import TypeAdapter

log = logging.getLogger("flex.evals")

FORMAT = "flex-nll-1"
_STRICT: Any = {"strict": True, "extra": "forbid"}


@dataclass(frozen=True)
class TaskNll:
    """One reference solution: `nll` in nats, summed over its `tokens`; `size` in UTF-8 bytes."""

    __pydantic_config__ = _STRICT
    benchmark: str
    task_id: str
    language: str
    nll: float
    tokens: int
    size: int


@dataclass(frozen=True, kw_only=True)
class NllReport:
    """What a file of this kind holds: one system on one or more benchmarks."""

    __pydantic_config__ = _STRICT
    format: str = FORMAT
    benchmarks: tuple[dict[str, Any], ...]
    model: dict[str, Any]
    engine: dict[str, Any]
    tasks: tuple[TaskNll, ...]


@dataclass(frozen=True)
class Figure:
    """One language: nats per token with limits over tasks, and bits per byte, which may be compared
    between tokenizers."""

    language: str
    tasks: int
    per_token: Interval
    bits_per_byte: float


@dataclass(frozen=True)
class Difference:
    """Second minus first, in nats per token; below 0 the second finds the references likelier."""

    language: str
    tasks: int
    difference: Interval
    test: Test


@torch.no_grad()
def solution_nll(
    model: Any, tokenizer: PreTrainedTokenizerBase, context: str, solution: str
) -> tuple[float, int]:
    """(nats, tokens): -log p(solution | context), summed over the solution's tokens, no EOS.

    The two are tokenised apart, as in training. Raises DataError: an empty solution or context, or
    more tokens than the model can see.
    """
    before, after = prompt_ids(context, tokenizer), completion_ids(solution, tokenizer)
    limit = context_of(model.config)
    if not before or not after or (limit is not None and len(before) + len(after) > limit):
        raise DataError(
            f"context of {len(before)} and solution of {len(after)} tokens",
            f"both need tokens, and the model sees {limit}",
            "leave the task out of --data, or choose a model with a longer context",
        )
    device = next(model.parameters()).device
    ids = torch.tensor([before + after], device=device)
    kept = len(after) + 1
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0, :-1]
    targets = ids[0, len(before) :]
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return float(losses.double().sum()), len(after)


def measure(
    model: Any, tokenizer: PreTrainedTokenizerBase, benchmarks: Sequence[Benchmark]
) -> tuple[TaskNll, ...]:
    """The likelihood of every reference. Tasks without one are left out, and counted in the log.

    Raises DataError: no task has a reference, or one that does not fit, by its id.
    """
    wanted = [(b, task) for b in benchmarks for task in b.tasks if task.reference is not None]
    without = sum(len(b.tasks) for b in benchmarks) - len(wanted)
    if not wanted:
        raise DataError(
            f"no task of {', '.join(b.name for b in benchmarks)} has a reference solution",
            "its likelihood is what is measured",
            "choose a benchmark with solutions, such as humaneval or builtin-java",
        )
    if without:
        log.warning("%d tasks have no reference solution and are left out", without)
    found = []
    with Meter("reading", len(wanted)) as meter:
        for benchmark, task in wanted:
            assert task.reference is not None
            context, solution = task.reference
            try:
                nll, tokens = solution_nll(model, tokenizer, context, solution)
            except DataError as error:
                raise DataError(f"{task.task_id}: {error.what}", error.why, error.fix) from error
            size = len(solution.encode())
            found.append(TaskNll(benchmark.name, task.task_id, task.language, nll, tokens, size))
            meter.add(tokens)
    return tuple(found)


def figures(report: NllReport) -> list[Figure]:
    """One figure for each language of a report, in the order of the tasks."""
    table = []
    for language, tasks in _by_language(report.tasks).items():
        nll = np.array([task.nll for task in tasks])
        tokens = np.array([task.tokens for task in tasks], dtype=float)
        bits = float(nll.sum() / math.log(2) / sum(task.size for task in tasks))
        table.append(Figure(language, len(tasks), ratio_interval(nll, tokens), bits))
    return table


def compare(first: NllReport, second: NllReport) -> list[Difference]:
    """Paired by task, one entry for each language. Raises DataError: other tasks or tokens."""
    keys = sorted(differing(list(first.benchmarks), list(second.benchmarks)))
    shape = [[(t.benchmark, t.task_id, t.tokens) for t in r.tasks] for r in (first, second)]
    if keys or shape[0] != shape[1]:
        raise DataError(
            "the two files are not of the same solutions in the same tokens",
            "a paired difference per token needs both",
            "measure both on the same benchmarks; between tokenizers compare bits per byte",
        )
    table = []
    others = _by_language(second.tasks)
    for language, tasks in _by_language(first.tasks).items():
        tokens = np.array([task.tokens for task in tasks], dtype=float)
        gaps = np.array([b.nll - a.nll for a, b in zip(tasks, others[language], strict=True)])
        test = sign_flip(gaps / tokens.mean())
        table.append(Difference(language, len(tasks), ratio_interval(gaps, tokens), test))
    return table


def ratio_interval(sums: np.ndarray, tokens: np.ndarray) -> Interval:
    """sum(sums) / sum(tokens) and its bootstrap limits over tasks.

    The ratio is linearised about its value: a drawn task brings its tokens along.
    """
    ratio = float(sums.sum() / tokens.sum())
    found = bootstrap(ratio + (sums - ratio * tokens) / tokens.mean())
    return Interval(ratio, found.low, found.high, found.method)


def _by_language(tasks: Sequence[TaskNll]) -> dict[str, list[TaskNll]]:
    groups: dict[str, list[TaskNll]] = defaultdict(list)
    for task in tasks:
        groups[task.language].append(task)
    return dict(groups)


def save(report: NllReport, path: Path) -> None:
    """Write a report. Raises DataError: the disk refuses."""
    summary = [asdict(figure) for figure in figures(report)]
    write_asked(path, {"summary": summary, **asdict(report)})


def load(path: Path) -> NllReport:
    """Read a report. Raises DataError: it is not one."""
    from pydantic import TypeAdapter, ValidationError

    adapter: TypeAdapter[NllReport] = TypeAdapter(NllReport)
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"no file of the format {FORMAT}")
        data.pop("summary", None)
        return adapter.validate_json(json.dumps(data))
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(
            f"{path}: {str(error).splitlines()[0]}",
            "it should be the result of `python -m flex nll`",
            "give a file that --json wrote",
        ) from error
