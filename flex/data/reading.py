"""Strict reading: JSON Lines to objects, objects to fields. What is wrong is a BadRow."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flex.data.ledger import BadRow, Ledger
from flex.errors import DataError

MAX_CHARACTERS = 1_000_000  # of a field; a longer one is a dump, and would be cut at max_length
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def read_jsonl(path: str | Path, ledger: Ledger) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (origin, object) of each line; count lines in the ledger, and drop the bad ones there.

    A byte order mark at the start of a line, CRLF line ends and blank lines at the end of the file
    are tolerated.

    Raises:
        DataError: the file is missing or cannot be opened.
    """
    path = existing_file(path)
    blanks: list[str] = []
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                origin = f"{path.name}:{number}"
                if not raw.strip():
                    blanks.append(origin)
                    continue
                ledger.read += len(blanks) + 1
                for blank in blanks:
                    ledger.drop(blank, "blank line", "in the middle of the file")
                blanks.clear()
                try:
                    yield origin, parse_line(raw)
                except BadRow as bad:
                    ledger.drop(origin, bad.reason, bad.detail)
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise DataError(what, "the rows are read from it", "check its permissions") from error


def existing_file(path: str | Path) -> Path:
    """The path itself if it is a file; else a DataError that suggests the nearest name there."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        what, near = f"{path} is a folder, not a file", sorted(path.glob("*.jsonl"))[:1]
    elif path.parent.is_dir():
        names = sorted(other.name for other in path.parent.iterdir() if other.is_file())
        close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
        what, near = f"{path} does not exist", [path.parent / name for name in close]
    else:
        what, near = f"{path} does not exist, nor does the folder {path.parent}", []
    fix = f"did you mean {near[0]}?" if near else "set data.path=FILE.jsonl to an existing file"
    raise DataError(what, "the rows are read from it", fix)


def parse_line(raw: bytes) -> dict[str, Any]:
    """One line of bytes to one JSON object, or BadRow."""
    if b"\0" in raw:
        raise BadRow("NUL character", f"byte {raw.index(0)} of the line")
    try:
        value = json.loads(raw.decode("utf-8").rstrip().lstrip("\ufeff"))
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of the line is 0x{raw[error.start]:02x}"
        raise BadRow("not UTF-8", detail) from error
    except json.JSONDecodeError as error:
        raise BadRow("not JSON", f"{error.msg} at character {error.pos}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadRow("not JSON", str(error)) from error
    except RecursionError as error:
        raise BadRow("not JSON", "nested too deeply") from error
    if not isinstance(value, dict):
        raise BadRow("wrong type", f"the line is {_kind(value)}, not an object")
    return value


def text_field(row: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    """The string under `key`: present, encodable, of sane size, and not blank unless `empty`."""
    return _text(field(row, key), f"`{key}`", empty=empty)


def text_list(values: Any, key: str) -> tuple[str, ...]:
    """The list of strings that stood under `key`, each checked as in `text_field`."""
    if not isinstance(values, list):
        raise BadRow("wrong type", f"`{key}` is {_kind(values)}, not a list")
    return tuple(_text(value, f"`{key}[{i}]`") for i, value in enumerate(values))


def int_field(row: Mapping[str, Any], key: str) -> int:
    """The integer under `key`."""
    value = field(row, key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRow("wrong type", f"`{key}` is {_kind(value)}, not an integer")
    return value


def field(row: Mapping[str, Any], key: str) -> Any:
    """Whatever is under `key`, which must be there."""
    if key not in row:
        near = difflib.get_close_matches(key, list(row), n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise BadRow("missing key", f"`{key}` (the row has: {', '.join(list(row)[:8])}{hint})")
    return row[key]


def _text(value: Any, name: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{name} is {_kind(value)}, not a string")
    if len(value) > MAX_CHARACTERS:
        raise BadRow("too large", f"{name} has {len(value)} characters, over {MAX_CHARACTERS}")
    if "\0" in value:
        raise BadRow("NUL character", f"character {value.index(chr(0))} of {name}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a pair; no tokenizer can take it
        raise BadRow("lone surrogate", f"character {error.start} of {name}") from error
    if not empty and not value.strip():
        raise BadRow("empty field", name)
    return value


def _kind(value: Any) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)
