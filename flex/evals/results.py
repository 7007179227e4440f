"""The result file: one system on one benchmark, every sample of it, and what was needed to make it.

It holds no clock time, so that an evaluation that was killed and went on ends with the same bytes;
times and what failing programs printed go to FILE.timing.json.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flex.errors import DataError
from flex.evals.journal import Journal, differing
from flex.evals.stats import pass_at_k
from flex.evals.summary import summarise, without_intervals
from flex.files import fsync_path, write_atomic

if TYPE_CHECKING:
    from pydantic import TypeAdapter

log = logging.getLogger("flex.evals")

FORMAT = "flex-eval-1"

# Keys without which nobody could repeat the figure; more may be there.
REQUIRED: dict[str, dict[str, Any]] = {
    "benchmark": {"name": str, "source": dict, "tasks": int},
    "protocol": {
        **{"max_new_tokens": int, "samples": int, "seed": int},
        **{"temperature": int | float, "top_p": int | float},
    },
    "model": {
        **{"id": str, "revision": str | None, "adapter": str | None},
        **{"merged": bool, "dtype": str, "quantised": bool | str | None},
    },
}

_STRICT: Any = {"strict": True, "extra": "forbid"}  # pydantic: no coercion, no key ignored


@dataclass(frozen=True)
class Sample:
    """One completion and its verdict. `seed` of its draws; `new_tokens` includes stop and EOS."""

    __pydantic_config__ = _STRICT
    seed: int
    text: str
    new_tokens: int
    finish: Literal["stop", "eos", "length"]
    verdict: Literal["passed", "compile", "exception", "wrong", "timeout", "limit", "missing"]


@dataclass(frozen=True)
class TaskResult:
    """The samples of one task, in the order of their numbers."""

    __pydantic_config__ = _STRICT
    task_id: str
    samples: tuple[Sample, ...]

    @property
    def passed(self) -> int:
        return sum(sample.verdict == "passed" for sample in self.samples)


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What a result file holds.

    Attributes:
        benchmark: name, source (Hub id and revision, or file name and sha256), number of tasks.
        protocol: prompt form, stop sequences, sampling.
        model: id, revision, sha256 of the adapter, merged, dtype, quantised.
        engine: what generated, with library versions.
        sandbox: its level; None if nothing was run.
        toolchain: version line of the compiler or interpreter; None if it is missing.
        unsolvable: tasks whose stub does not compile, so that nothing can pass; None if not probed.
        tasks: in the benchmark's order.
    """

    __pydantic_config__ = _STRICT
    benchmark: dict[str, Any]
    protocol: dict[str, Any]
    model: dict[str, Any]
    engine: dict[str, Any]
    sandbox: str | None
    toolchain: str | None
    unsolvable: tuple[str, ...] | None = None
    tasks: tuple[TaskResult, ...]

    @property
    def samples(self) -> int:
        """Completions for each task."""
        return int(self.protocol["samples"])

    @property
    def missing(self) -> int:
        """Samples that no tool chain was there to run."""
        return sum(s.verdict == "missing" for task in self.tasks for s in task.samples)

    def scores(self, k: int = 1, solvable_only: bool = False) -> np.ndarray:
        """pass@k of each task, shape (tasks,), float64."""
        left_out = set(self.unsolvable or ()) if solvable_only else set()
        kept = [task for task in self.tasks if task.task_id not in left_out]
        return np.array([pass_at_k(self.samples, task.passed, k) for task in kept])


@dataclass(frozen=True, kw_only=True)
class _File(EvalReport):
    format: str
    summary: dict[str, Any]


@functools.cache
def _adapter() -> TypeAdapter[_File]:
    from pydantic import TypeAdapter

    return TypeAdapter(_File)


def timing_path(out: Path | str) -> Path:
    """Where the times of the result file `out` lie: beside it."""
    out = Path(out)
    return out.with_name(out.name + ".timing.json")


def tasks_from(journal: Journal, task_ids: Iterable[str], samples: int) -> tuple[TaskResult, ...]:
    """A complete journal as tasks, in the order of `task_ids`. Raises ValueError if it is not complete."""
    results = []
    for task_id in task_ids:
        keys = [(task_id, number) for number in range(samples)]
        for key in keys:
            if key not in journal.samples or key not in journal.verdicts:
                raise ValueError(f"{journal.path}: {key} has no verdict yet")
        results.append(
            TaskResult(
                task_id,
                tuple(
                    Sample(**asdict(journal.samples[key]), verdict=_kind(journal, key))
                    for key in keys
                ),
            )
        )
    return tuple(results)


def _kind(journal: Journal, key: tuple[str, int]) -> Any:
    return journal.verdicts[key].kind


def save_timing(
    out: Path | str, journal: Journal, task_ids: Iterable[str], samples: int, **figures: Any
) -> None:
    """Write FILE.timing.json: `figures` (such as tokens_per_second), then for each sample the seconds
    that running it took and what the program said. Raises DataError."""
    tasks = [
        {
            "task_id": task_id,
            "samples": [
                {"seconds": outcome.seconds, "detail": outcome.detail}
                for outcome in (journal.verdicts[task_id, number] for number in range(samples))
            ],
        }
        for task_id in task_ids
    ]
    _write(timing_path(out), {**figures, "tasks": tasks})


def save(report: EvalReport, path: Path | str) -> None:
    """Write the result file, atomically and in one way only. Raises DataError: it would not load again,
    or the disk refuses."""
    path = Path(path)
    _check(path, report)
    held = set(report.unsolvable or ())
    passed = [task.task_id for task in report.tasks if task.passed and task.task_id in held]
    if passed:
        log.warning(
            "%d tasks passed although their stub does not compile; the solvable subset leaves them out: %s",
            len(passed),
            ", ".join(passed),
        )
    _write(
        path,
        {
            "format": FORMAT,
            "summary": summarise(report),
            **{
                name: _ordered(value) for name, value in _shallow(report).items() if name != "tasks"
            },
            "tasks": [asdict(task) for task in report.tasks],
        },
    )


def load(path: Path | str) -> EvalReport:
    """Read a result file. Raises DataError that names the file and the key: an unknown, missing or
    mistyped key, counts that do not fit, a summary that does not follow from the tasks."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}",
            "it should be the result of an evaluation",
            "give the file that `python -m flex eval --out` wrote",
        ) from error
    try:
        raw = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_second_key)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"not JSON: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise _broken(path, f"format = {found!r}, this version of FLeX reads {FORMAT}")
    from pydantic import ValidationError

    try:
        file = _adapter().validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"])
        value = "" if isinstance(first["input"], dict) else f" = {str(first['input'])[:60]!r}"
        raise _broken(path, f"{where.lstrip('.')}{value}: {first['msg']}") from error
    report = EvalReport(**_shallow(file, EvalReport))
    _check(path, report)
    expected = json.loads(json.dumps(summarise(report, intervals=False)))
    for key in differing(expected, without_intervals(file.summary)):
        raise _broken(path, f"summary.{key} does not follow from the tasks")
    return report


def _check(path: Path, report: EvalReport) -> None:
    """What the types do not say."""
    for section, keys in REQUIRED.items():
        values = getattr(report, section)
        for key, kind in keys.items():
            if key not in values:
                raise _broken(path, f"{section}.{key} is missing")
            mistaken = isinstance(values[key], bool) and kind in (int, int | float)
            if mistaken or not isinstance(values[key], kind):
                raise _broken(path, f"{section}.{key} = {values[key]!r}: of another type")
    if not report.benchmark["source"]:
        raise _broken(path, "benchmark.source is empty")
    if report.samples < 1:
        raise _broken(path, f"protocol.samples = {report.samples}")
    if not report.tasks or len(report.tasks) != report.benchmark["tasks"]:
        held = f"benchmark.tasks = {report.benchmark['tasks']}"
        raise _broken(path, f"{held}, but tasks holds {len(report.tasks)}")
    for number, task in enumerate(report.tasks):
        if len(task.samples) != report.samples:
            held = f"protocol.samples = {report.samples}"
            raise _broken(path, f"tasks[{number}].samples holds {len(task.samples)}, where {held}")
    ids = Counter(task.task_id for task in report.tasks)
    _no_twice(path, "tasks", ids)
    unsolvable = Counter(report.unsolvable or ())
    _no_twice(path, "unsolvable", unsolvable)
    if unknown := sorted(unsolvable.keys() - ids.keys()):
        raise _broken(path, f"unsolvable: {unknown[0]!r} is no task")


def _no_twice(path: Path, key: str, ids: Counter[str]) -> None:
    for task_id, count in ids.items():
        if count > 1:
            raise _broken(path, f"{key}: {task_id!r} stands there {count} times")


def _broken(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what}",
        "a figure from a file that does not hold together cannot be trusted",
        "run the evaluation again; a result file is not for editing",
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _no_second_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = Counter(key for key, _ in pairs)
    for key, count in keys.items():
        if count > 1:
            raise ValueError(f"the key {key!r} stands there {count} times")
    return dict(pairs)


def _ordered(value: Any) -> Any:
    """Keys sorted: however the caller put a section together, the bytes are the same."""
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value)}
    return value


def _shallow(report: EvalReport, kind: type = EvalReport) -> dict[str, Any]:
    return {field.name: getattr(report, field.name) for field in fields(kind)}


def write_asked(path: Path, value: Mapping[str, Any], what: str = "result") -> None:
    """Write what the option --json of a command asks for, atomically. Raises DataError: the disk refuses."""
    try:
        write_atomic(path, _bytes(value))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror}",
            f"--json asks for the {what} in that file",
            "make room or create the folder, or give another file",
        ) from error


def _bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


def _write(path: Path, value: Mapping[str, Any]) -> None:
    try:
        write_atomic(path, _bytes(value))
        fsync_path(path.parent)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror}",
            "the result would be lost",
            "make room, or give another --out; what was generated is kept beside it",
        ) from error
