"""FILE.partial.jsonl: what an evaluation in progress has made so far, so that a kill loses nothing.

One line each, in the order in which things ended:

    {"format": "flex-journal-1", "generation": {...}}             the first line
    {"execution": {...}}                                          verdicts before this line are void
    {"sample": ["HumanEval/0", 0], "seed": 1, "text": ..., "new_tokens": 9, "finish": "stop"}
    {"verdict": ["HumanEval/0", 0], "kind": "passed", "seconds": 0.1, "detail": ""}

Samples belong to what generated them (model, benchmark, protocol, engine); verdicts also to what
ran them (sandbox, tool chain). Another tool chain therefore costs the verdicts, not the samples.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from flex.errors import DataError

log = logging.getLogger("flex.evals")

FORMAT = "flex-journal-1"
_START = b'{"format": "flex-journal-'
KINDS = ("passed", "compile", "exception", "wrong", "timeout", "limit", "missing")
FINISHES = ("stop", "eos", "length")

Key = tuple[str, int]  # task_id, sample


@dataclass(frozen=True)
class Generated:
    """A completion: `seed` of its draws, `new_tokens` made, `finish` one of FINISHES."""

    seed: int
    text: str
    new_tokens: int
    finish: str


@dataclass(frozen=True)
class Outcome:
    """What running a completion gave: `kind` is one of KINDS, `seconds` its time."""

    kind: str
    seconds: float
    detail: str = ""


def journal_path(out: Path | str) -> Path:
    """Where the journal of the result file `out` lies: beside it."""
    out = Path(out)
    return out.with_name(out.name + ".partial.jsonl")


class Journal:
    """The open journal of one result file; a context manager that lets go of the lock.

    Args:
        path: see `journal_path`; begun if it is not there, else continued.
        generation: all that a sample depends on; JSON values.
        execution: all that a verdict depends on besides; JSON values.

    Attributes:
        samples, verdicts: what is there, by (task_id, sample). A verdict "missing" of an earlier
            session is left out, so that it is tried again.

    Raises:
        DataError: another process holds it, it was made under another `generation`, or a line
            other than the last is damaged.
    """

    def __init__(
        self, path: Path | str, generation: Mapping[str, Any], execution: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.samples: dict[Key, Generated] = {}
        self.verdicts: dict[Key, Outcome] = {}
        self._execution: Any = None
        self._thread_lock = threading.Lock()
        self._file = _open_locked(self.path)
        try:
            self._resume(_plain(generation), _plain(execution))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_sample(self, key: Key, sample: Generated) -> None:
        """Append a completion. Raises ValueError for a second one of that key, or half a surrogate
        pair in its text; DataError: the disk."""
        with self._thread_lock:
            self._put_sample(key, sample)
            try:
                self._write({"sample": list(key), **sample.__dict__})
            except BaseException:
                del self.samples[key]
                raise

    def add_verdict(self, key: Key, outcome: Outcome) -> None:
        """Append a verdict. Raises ValueError if its sample is not there, or it has one; DataError: the disk."""
        with self._thread_lock:
            self._put_verdict(key, outcome)
            try:
                self._write({"verdict": list(key), **outcome.__dict__})
            except BaseException:
                del self.verdicts[key]
                raise

    def close(self) -> None:
        """Let go of the file and its lock; it stays on the disk."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def delete(self) -> None:
        """Remove the file: the result is saved, nothing is left to resume."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _put_sample(self, key: Key, sample: Generated) -> None:
        if key in self.samples:
            raise ValueError(f"a second sample of {key}")
        if sample.finish not in FINISHES:
            raise ValueError(f"finish = {sample.finish!r}, not one of {', '.join(FINISHES)}")
        sample.text.encode()  # UnicodeEncodeError: neither a program nor a result file could hold it
        self.samples[key] = sample

    def _put_verdict(self, key: Key, outcome: Outcome) -> None:
        if key not in self.samples:
            raise ValueError(f"a verdict on {key}, which has no sample")
        if key in self.verdicts:
            raise ValueError(f"a second verdict on {key}")
        if outcome.kind not in KINDS:
            raise ValueError(f"kind = {outcome.kind!r}, not one of {', '.join(KINDS)}")
        self.verdicts[key] = outcome

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            if os.write(self._file, line) != len(line):
                raise OSError("the disk is full")
        except OSError as error:
            os.ftruncate(self._file, end)  # no half line before the next one
            raise DataError(
                f"{self.path}: cannot be written: {error}",
                "a sample that is not on the disk would have to be made again",
                "make room; the same command then goes on where it stopped",
            ) from error

    def _resume(self, generation: Any, execution: Any) -> None:
        data = _read_all(self._file)
        *lines, torn = data.split(b"\n")
        if lines or not _START.startswith(torn[: len(_START)]):  # nothing is done to a foreign file
            self._check_header(lines[0] if lines else torn, generation)
        if torn:
            log.warning("%s: a line cut short by a kill is dropped", self.path)
            os.ftruncate(self._file, len(data) - len(torn))
        if not lines:
            self._write({"format": FORMAT, "generation": generation})
        for number, line in enumerate(lines[1:], start=2):
            self._replay(number, line)
        self._retry_missing()
        if self._execution != execution:
            if self.verdicts:
                log.warning(
                    "%s: %d verdicts are dropped and run again: %s differs",
                    self.path,
                    len(self.verdicts),
                    ", ".join(sorted(differing(self._execution, execution))),
                )
            self.verdicts.clear()
            self._write({"execution": execution})
            self._execution = execution
        if self.samples:
            counts = len(self.samples), len(self.verdicts)
            log.info("%s: goes on with %d samples and %d verdicts", self.path, *counts)

    def _check_header(self, line: bytes, generation: Any) -> None:
        header = _json(line)
        if header.get("format") != FORMAT or "generation" not in header:
            raise DataError(
                f"{self.path}: not a journal of the format {FORMAT}",
                "an evaluation cannot go on from it",
                "move it away, or give another --out",
            )
        keys = sorted(differing(header["generation"], generation))
        if keys:
            raise DataError(
                f"{self.path}: begun with other settings: {', '.join(keys)}",
                "samples of two settings cannot stand in one result",
                "repeat the settings of that evaluation, give another --out, or delete the file to begin anew",
            )

    def _replay(self, number: int, line: bytes) -> None:
        record = _json(line)
        try:
            if record.keys() == {"execution"}:
                self._execution = record["execution"]
                self.verdicts.clear()
            elif "sample" in record:
                key, sample = _key(record.pop("sample")), Generated(**record)
                _check_types(sample, (int, str, int, str))
                self._put_sample(key, sample)
            else:
                key, outcome = _key(record.pop("verdict")), Outcome(**record)
                _check_types(outcome, (str, int | float, str))
                if key in self.verdicts and self.verdicts[key].kind == "missing":
                    del self.verdicts[key]
                self._put_verdict(key, outcome)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.path}, line {number}: {line[:80]!r}: {error}",
                "the file is damaged; what follows may belong to something else",
                f"cut the file before that line (head -n {number - 1}), or delete it to begin anew",
            ) from error

    def _retry_missing(self) -> None:
        missing = [key for key, outcome in self.verdicts.items() if outcome.kind == "missing"]
        for key in missing:
            del self.verdicts[key]
        if missing:
            log.info("%s: %d samples without a tool chain are tried again", self.path, len(missing))


def differing(one: Any, other: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys at which two JSON values differ; a value that is no object is one key.

    >>> sorted(differing({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}, "d": 3}))
    ['a.c', 'd']
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            where = f"{prefix}.{key}" if prefix else key
            if (key in one) != (key in other):
                yield where
            else:
                yield from differing(one[key], other[key], where)
    # 1 == True and 1 == 1.0 in Python: neither is the same setting in JSON's eyes but for numbers
    elif isinstance(one, bool) != isinstance(other, bool) or one != other:
        yield prefix or "everything"


def _open_locked(path: Path) -> int:
    """A descriptor for reading and appending, with an exclusive lock on the file that `path` names."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be opened: {error.strerror}",
                "an evaluation writes its progress beside its result",
                "create the folder of --out, or give another --out",
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise DataError(
                f"{path}: in use by another process",
                "two evaluations would write into each other's result",
                "wait for it to end, or give another --out",
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): let only one process use it", path, error)
        try:
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        os.close(file)  # its last owner deleted it between our two calls


def _read_all(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _plain(value: Mapping[str, Any]) -> Any:
    """As it comes back from JSON: tuples are lists, keys are text."""
    return json.loads(json.dumps(dict(value), allow_nan=False))


def _json(line: bytes) -> dict[str, Any]:
    """The object of a line; of damage, an empty one, which has none of the keys that are asked for."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _key(value: Any) -> Key:
    task_id, sample = value
    if type(task_id) is not str or type(sample) is not int:
        raise ValueError(f"the key {value!r} is not [task_id, sample]")
    return task_id, sample


def _check_types(record: Generated | Outcome, types: tuple[Any, ...]) -> None:
    for (name, value), kind in zip(record.__dict__.items(), types, strict=True):
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name} = {value!r}")
