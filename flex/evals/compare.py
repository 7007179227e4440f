"""Two systems on the same tasks: what differs, and whether chance explains it. Differences are
second - first, in shares of tasks."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flex.errors import DataError
from flex.evals.journal import KINDS, differing
from flex.evals.results import EvalReport
from flex.evals.stats import (
    ALPHA,
    Interval,
    Test,
    bootstrap,
    detectable,
    holm,
    least_flips,
    mcnemar,
    score_interval,
    sign_flip,
)


@dataclass(frozen=True)
class System:
    """A report under the name that messages give it: its file."""

    name: str
    report: EvalReport


@dataclass(frozen=True)
class Flip:
    """A task that the two systems solve unequally often: passes of each, of the same samples."""

    task_id: str
    first: int
    second: int


@dataclass(frozen=True)
class Side:
    """One system's figures; `solvable` is its score over tasks that can be solved at all."""

    name: str
    score: Interval
    solvable: Interval | None
    verdicts: dict[str, int]
    compile_rate: float


@dataclass(frozen=True)
class Comparison:
    """Two systems on one benchmark, task by task.

    Attributes:
        k: of pass@k.
        difference: second - first with its bootstrap limits.
        p_holm: `test.p`, corrected for all comparisons of the table.
        comparisons: how many those are.
        detectable: the smallest difference that this test would show with 80 % power; None if no task
            differs.
        solvable: the difference over tasks that can be solved at all; None if not probed, or there is none.
        gained, lost: tasks that the second solves more or less often, largest change first.
        texts_differ: completions that are not the same text, whatever their verdicts.
        notes: settings that differ and do not forbid the comparison.
    """

    benchmark: str
    tasks: int
    samples: int
    k: int
    first: Side
    second: Side
    difference: Interval
    test: Test
    p_holm: float
    comparisons: int
    detectable: float | None
    solvable_tasks: int | None
    solvable: Interval | None
    gained: tuple[Flip, ...]
    lost: tuple[Flip, ...]
    texts_differ: int
    notes: tuple[str, ...]

    @property
    def shown(self) -> bool:
        """Whether the test, after correction, shows a difference."""
        return self.p_holm < ALPHA


def compare(pairs: Sequence[tuple[System, System]], k: int = 1) -> list[Comparison]:
    """Compare the systems of each pair; p-values are corrected for all pairs (Holm).

    Raises DataError if a pair was not evaluated in the same way, see `check_comparable`, or has fewer
    samples than k.
    """
    for pair in pairs:
        check_comparable(pair, k)
    done = [_compare(first, second, k, ALPHA / len(pairs)) for first, second in pairs]
    corrected = holm([comparison.test.p for comparison in done])
    return [
        replace(comparison, p_holm=p, comparisons=len(pairs))
        for comparison, p in zip(done, corrected, strict=True)
    ]


def check_comparable(systems: Sequence[System], k: int = 1) -> None:
    """Raise DataError unless all have the benchmark, its source, the protocol and the tasks of the
    first, and every sample was run. The seed of sampling may differ: that is a note."""
    first = systems[0]
    for other in systems[1:]:
        for section in ("benchmark", "protocol"):
            mine, theirs = _identity(first.report, section), _identity(other.report, section)
            keys = sorted(differing(mine, theirs))
            if keys:
                told = "; ".join(_told(first, other, f"{section}.{key}") for key in keys)
                raise DataError(
                    f"{first.name} and {other.name} differ in {told}",
                    "what differs between the figures could be that, not the models",
                    "evaluate both with the same options and the same data",
                )
        ids = [{task.task_id for task in system.report.tasks} for system in (first, other)]
        if ids[0] != ids[1]:
            some = sorted(ids[0] ^ ids[1])
            raise DataError(
                f"{first.name} and {other.name} have {len(some)} tasks not in common, such as {some[0]!r}",
                "a paired comparison needs each task from both",
                "evaluate both on the same benchmark without, or with the same, --limit",
            )
    for system in systems:
        if system.report.missing:
            raise DataError(
                f"{system.name}: {system.report.missing} samples were not run, their tool chain was missing",
                "a program that nobody ran has neither passed nor failed",
                "install the tool chain (python -m flex doctor) and repeat the evaluation",
            )
        if not 1 <= k <= system.report.samples:
            raise DataError(
                f"k = {k}, but {system.name} has {system.report.samples} samples per task",
                "pass@k needs at least k samples",
                f"give --k of 1 to {system.report.samples}",
            )


def _identity(report: EvalReport, section: str) -> dict[str, Any]:
    kept = dict(getattr(report, section))
    if section == "protocol":
        del kept["seed"]
    return kept


def _compare(first: System, second: System, k: int, alpha: float) -> Comparison:
    one, other = first.report, aligned(second.report, first.report)
    before, after = one.scores(k), other.scores(k)
    passes = [(a.task_id, a.passed, b.passed) for a, b in zip(one.tasks, other.tasks, strict=True)]
    flips = [Flip(*entry) for entry in passes if entry[1] != entry[2]]
    flips.sort(key=lambda flip: -abs(flip.second - flip.first))  # stable: then in tasks' order
    gained = tuple(flip for flip in flips if flip.second > flip.first)
    lost = tuple(flip for flip in flips if flip.second < flip.first)
    if one.samples == 1:
        test = mcnemar(len(lost), len(gained))
    elif k == 1:
        test = sign_flip(np.array([after - before for _, before, after in passes]))
    else:
        test = sign_flip(after - before)
    notes = tuple(notes_on(first, second))
    kept = _solvable(one, other)
    solvable = None if kept is None else bootstrap((after - before)[kept])
    return Comparison(
        benchmark=one.benchmark["name"],
        tasks=len(one.tasks),
        samples=one.samples,
        k=k,
        first=_side(System(first.name, one), k, kept),
        second=_side(System(second.name, other), k, kept),
        difference=bootstrap(after - before),
        test=test,
        p_holm=test.p,
        comparisons=1,
        detectable=_detectable(after - before, one.samples, alpha),
        solvable_tasks=None if kept is None else int(kept.sum()),
        solvable=solvable,
        gained=gained,
        lost=lost,
        texts_differ=sum(
            a.text != b.text
            for mine, theirs in zip(one.tasks, other.tasks, strict=True)
            for a, b in zip(mine.samples, theirs.samples, strict=True)
        ),
        notes=notes,
    )


def _detectable(differences: np.ndarray, samples: int, alpha: float) -> float | None:
    """`stats.detectable`, and of single samples no less than the flips that McNemar needs."""
    least = detectable(differences, alpha)
    if least is None or samples > 1:
        return least
    return max(least, least_flips(alpha) / len(differences))


def aligned(report: EvalReport, order: EvalReport) -> EvalReport:
    """The report with its tasks in another's order."""
    tasks = {task.task_id: task for task in report.tasks}
    return replace(report, tasks=tuple(tasks[task.task_id] for task in order.tasks))


def _solvable(one: EvalReport, other: EvalReport) -> np.ndarray | None:
    """Which tasks, (tasks,) bool, neither probe found unsolvable; None without both, or without one left."""
    if one.unsolvable is None or other.unsolvable is None:
        return None
    either = {*one.unsolvable, *other.unsolvable}
    kept = np.array([task.task_id not in either for task in one.tasks])
    return kept if kept.any() else None


def _side(system: System, k: int, kept: np.ndarray | None) -> Side:
    report, scores = system.report, system.report.scores(k)
    counts = Counter[str](s.verdict for task in report.tasks for s in task.samples)
    return Side(
        system.name,
        score_interval(scores, report.samples),
        None if kept is None else score_interval(scores[kept], report.samples),
        {kind: counts[kind] for kind in KINDS},
        1 - counts["compile"] / counts.total(),
    )


def notes_on(first: System, second: System, model: bool = True) -> Iterator[str]:
    """What differs and is no reason to refuse, in words."""
    sections = ("model", "engine", "sandbox", "toolchain", "unsolvable")
    for section in sections if model else sections[1:]:
        values = [_plain(getattr(system.report, section)) for system in (first, second)]
        for key in sorted(differing(*values)):
            where = section if key == "everything" else f"{section}.{key}"
            yield _told(first, second, where)
    if first.report.protocol["seed"] != second.report.protocol["seed"]:
        yield _told(first, second, "protocol.seed")


def _told(first: System, second: System, where: str) -> str:
    """`engine.dtype: "float32" / "bfloat16"`, for a dotted key of the reports."""
    values = []
    for system in (first, second):
        value: Any = dataclasses.asdict(replace(system.report, tasks=()))
        for key in _path(where, value):
            value = value.get(key, "(none)") if isinstance(value, dict) else "(none)"
        text = json.dumps(value)
        values.append(text if len(text) <= 80 else f"{text[:77]}...")
    return f"{where}: {values[0]} / {values[1]}"


def _path(where: str, value: Any) -> Iterator[str]:
    """The keys of a dotted path; a key may itself hold dots (a file's name, say)."""
    while where:
        keys = value.keys() if isinstance(value, dict) else ()
        fitting = [key for key in keys if where == key or where.startswith(f"{key}.")]
        key = max(fitting, key=len, default=where)
        yield key
        where = where[len(key) + 1 :]
        value = value.get(key) if isinstance(value, dict) else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
