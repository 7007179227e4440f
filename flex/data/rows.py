"""Data sets to rows with fixed splits: built-in tasks, MBPP, APPS, CodeSearchNet, JSON Lines."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from flex.config import DataConfig
from flex.data.ledger import BadRow, Ledger
from flex.data.reading import field, int_field, read_jsonl, text_field, text_list
from flex.errors import DataError

logger = logging.getLogger("flex.data")

MBPP_TRAIN = range(601, 975)  # the Hub's cut; 11-510 is the test split, 1-10 the few-shot prompts
MBPP_VALIDATION = range(511, 601)
MAX_VALIDATION = 500  # unless the user gives a file; more costs more time than it tells

# Hub id, configuration, revision. APPS still has a loading script on its main branch, which
# `datasets` refuses to run; the Hub's own Parquet conversion holds the same rows.
_HUB: dict[str, tuple[str, str | None, str | None]] = {
    "mbpp": ("google-research-datasets/mbpp", "full", None),
    "apps": ("codeparrot/apps", "all", "refs/convert/parquet"),
    "codesearchnet": ("code-search-net/code_search_net", None, None),
}


@dataclass(frozen=True)
class Row:
    """One row of any data set, before a template makes a prompt of it.

    kind: task (MBPP's schema), problem (APPS), function (CodeSearchNet), pair (as given).
    """

    kind: Literal["task", "problem", "function", "pair"]
    id: str  # "mbpp:601"; unique within a file
    origin: str  # "mbpp.jsonl:12"
    text: str  # task, question, docstring or prompt
    code: str  # solution, function or completion
    language: str = "python"
    tests: tuple[str, ...] = ()
    starter: str = ""


@dataclass(frozen=True)
class Rows:
    """The two splits, and the account of what was read; it is completed by `encode_all`."""

    train: list[Row]
    validation: list[Row]
    ledger: Ledger


# A parser turns an object into a row and the split that it is declared for: "train", "validation",
# None (not declared), or any other string: the reason why the row is set aside.
_Parser = Callable[[dict[str, Any], str, DataConfig], tuple[Row, str | None]]


@dataclass(frozen=True)
class _Source:
    objects: Iterable[tuple[str, dict[str, Any]]]
    default: str | None  # split of the rows that declare none
    accepts: tuple[str | None, ...]


def load_rows(cfg: DataConfig) -> Rows:
    """Read, check and split the configured data set.

    Validation rows are those of `validation_path` if given; else those that the data set itself
    declares (MBPP by task_id, CodeSearchNet by `partition`); else one in ten by content hash.

    Raises:
        DataError: no file, no Hub, unusable rows (see `on_bad_row`), no training row.
    """
    ledger = Ledger()
    parse = _PARSERS[cfg.name]
    splits: dict[str | None, list[Row]] = {"train": [], "validation": [], None: []}
    for source in _sources(cfg, ledger):
        seen: dict[str, str] = {}
        for origin, obj in source.objects:
            try:
                row, declared = parse(obj, origin, cfg)
                if row.id in seen:
                    raise BadRow("duplicate id", f"{row.id} was {seen[row.id]}")
            except BadRow as bad:
                ledger.drop(origin, bad.reason, bad.detail)
                continue
            seen[row.id] = origin
            split = source.default if declared is None else declared
            if split in source.accepts:
                splits[split].append(row)
            else:
                ledger.set_aside[str(split)] += 1
    fix = "repair these rows, or count them with data.on_bad_row=skip"
    ledger.settle(cfg.on_bad_row, fix, damaged=True)

    train, validation = splits["train"] + splits[None], splits["validation"]
    if cfg.validation_path is None:
        if not validation:
            train, validation = split_by_hash(train)
        beyond = f"validation beyond the first {MAX_VALIDATION}"
        validation = _first(validation, MAX_VALIDATION, beyond, ledger)
    train = _first(train, cfg.limit, "beyond data.limit", ledger)
    if not train:
        raise DataError(
            f"data.name={cfg.name} gives no training row ({ledger.summary()})",
            "there is nothing to train on",
            "check data.path, data.language and data.difficulty",
        )
    if not validation:
        logger.warning("no validation rows, so no validation loss; give data.validation_path")
    return Rows(train, validation, ledger)


def split_by_hash(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Split off about 10 % by a hash of the content: equal rows stay together, others do not count.

    Where none (or each) falls into the tenth, the content with the smallest hash is taken.
    """
    contents = [json.dumps([row.text, row.code]).encode() for row in rows]
    keys = [int.from_bytes(hashlib.sha256(content).digest()[:8]) for content in contents]
    distinct = set(keys)
    held_out = {key for key in distinct if key % 10 == 0}
    if len(held_out) in (0, len(distinct)):
        held_out = {min(distinct)} if len(distinct) > 1 else set()
    train = [row for row, key in zip(rows, keys, strict=True) if key not in held_out]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in held_out]


def _first(rows: list[Row], limit: int | None, reason: str, ledger: Ledger) -> list[Row]:
    if limit is not None and len(rows) > limit:
        ledger.set_aside[reason] += len(rows) - limit
    return rows[:limit]


def _sources(cfg: DataConfig, ledger: Ledger) -> Iterator[_Source]:
    own_validation = cfg.validation_path is not None
    default = "train" if own_validation else None
    accepts = ("train",) if own_validation else ("train", "validation", None)
    if cfg.name == "builtin":
        yield _Source(_read_builtin("train", ledger), "train", ("train",))
        if not own_validation:
            yield _Source(_read_builtin("validation", ledger), "validation", ("validation",))
    elif cfg.path is not None:
        yield _Source(read_jsonl(cfg.path, ledger), default, accepts)
    elif cfg.name == "codesearchnet":
        train = f"train[:{cfg.limit}]" if cfg.limit else "train"
        yield _Source(_read_hub(cfg, train, ledger), "train", ("train",))
        if not own_validation:
            validation = _read_hub(cfg, f"validation[:{MAX_VALIDATION}]", ledger)
            yield _Source(validation, "validation", ("validation",))
    else:
        split = "train+validation" if cfg.name == "mbpp" else "train"
        yield _Source(_read_hub(cfg, split, ledger), default, accepts)
    if cfg.validation_path is not None:
        yield _Source(read_jsonl(cfg.validation_path, ledger), "validation", ("validation",))


def _read_builtin(split: str, ledger: Ledger) -> Iterator[tuple[str, dict[str, Any]]]:
    from flex.data.builtin import split_tasks

    train, validation = split_tasks()
    for task in train if split == "train" else validation:
        ledger.read += 1
        yield f"builtin:{task['task_id']}", dict(task)


def _read_hub(cfg: DataConfig, split: str, ledger: Ledger) -> Iterator[tuple[str, dict[str, Any]]]:
    name, config, revision = _HUB[cfg.name]
    config = cfg.language if cfg.name == "codesearchnet" else config
    try:
        from datasets import load_dataset

        dataset = load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # a dozen unrelated types stand for "not there" or "no network"
        raise DataError(
            f"{name} ({split}) cannot be loaded from the Hub: {type(error).__name__}: {error}",
            f"data.name={cfg.name} without data.path reads the Hub through the `datasets` package",
            "set data.path=FILE.jsonl to a local copy, or use data.name=builtin",
        ) from error
    for index, obj in enumerate(dataset):
        ledger.read += 1
        yield f"{name}/{split}:{index}", dict(obj)


def _task(obj: dict[str, Any], origin: str, cfg: DataConfig) -> tuple[Row, str | None]:
    number = int_field(obj, "task_id")
    java = cfg.name == "builtin" and cfg.language == "java"
    code, tests = ("java_code", "java_tests") if java else ("code", "test_list")
    row = Row(
        kind="task",
        id=f"{cfg.name}:{number}",
        origin=origin,
        text=text_field(obj, "text"),
        code=text_field(obj, code),
        language="java" if java else "python",
        tests=text_list(field(obj, tests), tests),
    )
    if cfg.name == "builtin":
        return row, None
    if number in MBPP_TRAIN:
        return row, "train"
    return row, "validation" if number in MBPP_VALIDATION else "test and few-shot tasks"


def _problem(obj: dict[str, Any], origin: str, cfg: DataConfig) -> tuple[Row, str | None]:
    solutions = field(obj, "solutions")
    if isinstance(solutions, str) and solutions:  # JSON on the Hub; other copies hold the list
        try:
            solutions = json.loads(solutions)
        except ValueError as error:
            raise BadRow("not JSON", f"`solutions`: {error}") from error
    if solutions in ("", []):
        raise BadRow("empty field", "`solutions`")
    difficulty = text_field(obj, "difficulty")
    row = Row(
        kind="problem",
        id=f"apps:{int_field(obj, 'problem_id')}",
        origin=origin,
        text=text_field(obj, "question"),
        code=text_list(solutions, "solutions")[0],
        starter=text_field(obj, "starter_code", empty=True),
    )
    other = cfg.difficulty not in ("all", difficulty)
    return row, f"difficulty other than {cfg.difficulty}" if other else None


def _function(obj: dict[str, Any], origin: str, cfg: DataConfig) -> tuple[Row, str | None]:
    """Both spellings of the columns: the original release's and the Hub's."""
    hub = "func_documentation_string" in obj
    language = text_field(obj, "language")
    row = Row(
        kind="function",
        id=origin,
        origin=origin,
        text=text_field(obj, "func_documentation_string" if hub else "docstring"),
        code=text_field(obj, "func_code_string" if hub else "code"),
        language=language,
    )
    if language != cfg.language:
        return row, f"language other than {cfg.language}"
    declared = obj.get("partition", obj.get("split_name"))
    if not isinstance(declared, str | None):
        raise BadRow("wrong type", "`partition` is not a string")
    return row, "validation" if declared == "valid" else declared


def _pair(obj: dict[str, Any], origin: str, cfg: DataConfig) -> tuple[Row, str | None]:
    if not isinstance(obj.get("id", 0), str | int):
        raise BadRow("wrong type", "`id` is neither a string nor a number")
    row = Row(
        kind="pair",
        id=f"jsonl:{obj['id']}" if "id" in obj else origin,
        origin=origin,
        text=text_field(obj, "prompt"),
        code=text_field(obj, "completion"),
    )
    return row, None


_PARSERS: dict[str, _Parser] = {
    "builtin": _task,
    "mbpp": _task,
    "apps": _problem,
    "codesearchnet": _function,
    "jsonl": _pair,
}
