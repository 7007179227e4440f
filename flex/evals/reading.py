"""A benchmark's rows: from a local file or from the Hub, with what is needed to find them again.

Reading is strict. An evaluation that leaves out a row measures another benchmark, so the first row
that breaks its schema is an error that names the row and the key.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex.data.ledger import BadRow
from flex.data.reading import existing_file, parse_line
from flex.errors import DataError
from flex.evals.tasks import Task

log = logging.getLogger("flex.evals")

SANITIZED = "mbpp's sanitized set"  # recognised, not evaluated
WHY = "a benchmark is read whole and strictly: a row left out would make it another benchmark"


@dataclass(frozen=True)
class Rows:
    """Rows, each with its place (`file, row 3`), and their `source` as it goes into the result."""

    rows: tuple[tuple[str, dict[str, Any]], ...]
    source: dict[str, Any]


@dataclass(frozen=True)
class HubSet:
    """Where a benchmark lies on the Hub.

    Attributes:
        repository: id of the data set.
        files: patterns of file names; the first that matches any file is used.
        revision: commit; None is the newest one, which is recorded.
    """

    repository: str
    files: tuple[str, ...]
    revision: str | None = None


def read_rows(data: Path | None, hub: HubSet, name: str) -> Rows:
    """Rows of `data` if given, else of the Hub.

    Raises:
        DataError: not there, not readable, or without rows.
    """
    return read_file(data) if data is not None else read_hub(hub, name)


def read_file(path: Path | str) -> Rows:
    """Rows of a .json, .jsonl or .parquet file, each also with .gz (parquet without).

    Raises:
        DataError: the file is missing, damaged, of another kind, or holds no rows.
    """
    try:
        path = existing_file(path)
        raw = path.read_bytes()
    except DataError as error:
        fix = error.fix if "did you mean" in error.fix else "give --data an existing file"
        raise DataError(error.what, "the benchmark is read from it", fix) from error
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise DataError(what, "the benchmark is read from it", "check its permissions") from error
    source = {"file": path.name, "sha256": hashlib.sha256(raw).hexdigest()}
    return Rows(tuple(_parse(path, raw)), source)


def read_hub(hub: HubSet, name: str) -> Rows:
    """Rows of a data set on the Hub, or of the local copy that an earlier download left.

    Only data files are fetched: no code of the data set runs.

    Raises:
        DataError: no network and no copy, or the files are not there.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                hub.repository,
                repo_type="dataset",
                revision=hub.revision,
                allow_patterns=list(hub.files),
            )
        )
    except Exception as error:  # a dozen unrelated types stand for "not there" or "no network"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"{name} cannot be loaded from the Hub ({hub.repository}): {reason}",
            "without a local file the benchmark is downloaded, and that failed",
            "give --data FILE with a local copy of the benchmark, or connect to the network",
        ) from error
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    for pattern in hub.files:
        if found := fnmatch.filter(names, pattern):
            break
    else:
        raise DataError(
            f"{hub.repository} at {folder.name} holds none of {', '.join(hub.files)}",
            f"{name} is read from there",
            "give --data FILE with a local copy of the benchmark",
        )
    parts = [read_file(folder / part) for part in found]
    rows = [(f"{hub.repository}/{where}", row) for part in parts for where, row in part.rows]
    source = {"hub": hub.repository, "revision": folder.name, "files": found}
    return Rows(tuple(rows), source)


def make_tasks(
    name: str, rows: Rows, kind: str, make: Callable[[dict[str, Any]], Task | None]
) -> tuple[Task, ...]:
    """One task of each row; `make` gives None for a row that the benchmark leaves out.

    Raises:
        DataError: the rows are of another kind of benchmark, break the schema (BadRow of `make`),
            or give an id twice.
    """
    first = rows.rows[0][1]
    like, benchmark = looks_like(first)
    if like and like != kind:  # also where a key too many is all that differs
        other = f"evaluate {benchmark}, or " if like != SANITIZED else ""
        raise DataError(
            f"the rows are not {name}'s: they look like those of {benchmark} "
            f"(keys: {', '.join(list(first)[:8])})",
            WHY,
            f"{other}give --data the file of {name}",
        )
    tasks: list[Task] = []
    places: dict[str, str] = {}
    for where, row in rows.rows:
        try:
            task = make(row)
        except BadRow as bad:
            moved = bad.reason == "wrong language"
            fix = f"evaluate {looks_like(row)[1]}" if moved else "repair the row"
            fix += f", or give --data the file of {name}"
            raise DataError(f"{where}: {bad.reason}: {bad.detail}", WHY, fix) from bad
        if task is None:
            continue
        if task.task_id in places:
            what = f"{where}: task {task.task_id} was already in {places[task.task_id]}"
            raise DataError(what, "a task counts once", "remove one of the rows")
        places[task.task_id] = where
        tasks.append(task)
    if not tasks:
        what = f"{rows.rows[0][0]} and all the others: no row belongs to {name}"
        raise DataError(what, "there is nothing to evaluate", f"give --data the file of {name}")
    left = len(rows.rows) - len(tasks)
    log.info("%s: %d tasks%s", name, len(tasks), f", {left} rows left out" if left else "")
    return tuple(tasks)


def looks_like(row: dict[str, Any]) -> tuple[str, str]:
    """(kind, benchmark) that has rows of these keys, such as ("mbxp", "mbxp-java"); "" if none."""
    kind = next((kind for kind, needed in _SCHEMAS if needed <= set(row)), "")
    language = str(row.get("language", "")) if kind in ("multipl-e", "mbxp") else ""
    if kind == "humaneval-x":
        language = str(row["task_id"]).partition("/")[0].lower()
    language = language.removesuffix("_test.go")  # MultiPL-E's Go
    return kind, f"{kind}-{language}" if language else kind


def plain_text(row: dict[str, Any], key: str) -> str:
    """The string under `key`, of any size, empty or not; BadRow."""
    if key not in row:
        raise BadRow("missing key", f"`{key}` (the row has: {', '.join(list(row)[:8])})")
    value = row[key]
    if not isinstance(value, str):
        raise BadRow("wrong type", f"`{key}` is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a pair; no program can hold it
        raise BadRow("lone surrogate", f"character {error.start} of `{key}`") from error
    return value


def warn_if_partial(name: str, tasks: Sequence[Task], whole: int) -> None:
    """Log if the file holds other than the `whole` number of tasks."""
    if len(tasks) != whole:
        log.warning("%s: %d tasks; the published set has %d", name, len(tasks), whole)


# The first that fits, so the more special come first.
_SCHEMAS: tuple[tuple[str, set[str]], ...] = (
    ("multipl-e", {"name", "language", "prompt", "tests", "stop_tokens"}),
    ("humaneval-x", {"task_id", "prompt", "declaration", "canonical_solution", "test"}),
    ("mbxp", {"task_id", "prompt", "entry_point", "test", "language"}),
    ("humaneval", {"task_id", "prompt", "entry_point", "test", "canonical_solution"}),
    (SANITIZED, {"task_id", "prompt", "code", "test_imports", "test_list"}),
    ("mbpp", {"task_id", "text", "code", "test_list"}),
    ("apps", {"question", "input_output"}),
)


def _parse(path: Path, raw: bytes) -> Iterable[tuple[str, dict[str, Any]]]:
    kind = path.suffix
    if kind == ".gz":
        kind = Path(path.stem).suffix
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, f"not a whole gzip file: {error}") from error
    if kind == ".parquet":
        values: list[Any] = _parquet(path)
    elif kind == ".json":
        try:
            value = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"not JSON: {error}") from error
        values = value if isinstance(value, list) else [value]
    elif kind == ".jsonl":
        return _lines(path, raw)
    else:
        raise DataError(
            f"{path.name} is of no known kind",
            "the kind is told by the end of the name",
            "use .json, .jsonl, .json.gz, .jsonl.gz or .parquet",
        )
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise _damaged(path, f"row {number} is {type(value).__name__}, not an object")
    return _some(path, [(f"{path.name}, row {n}", v) for n, v in enumerate(values, start=1)])


def _lines(path: Path, raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(raw.rstrip().split(b"\n"), start=1):
        try:
            if not line.strip():
                raise BadRow("blank line", "in the middle of the file")
            rows.append((f"{path.name}, row {number}", parse_line(line)))
        except BadRow as bad:
            if raw.strip():
                raise _damaged(path, f"row {number}: {bad.reason}: {bad.detail}") from bad
    return _some(path, rows)


def _some(path: Path, rows: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    if not rows:
        raise DataError(
            f"{path.name} holds no rows",
            "there is nothing to evaluate",
            "give --data the file of the benchmark",
        )
    return rows


def _parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, f"not a parquet file: {error}") from error


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path.name}: {what}", WHY, "fetch the file again, or repair it")
