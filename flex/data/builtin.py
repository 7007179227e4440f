"""The built-in task set: small original programming tasks in Python and Java, in MBPP's row schema.

`tasks/<topic>.yaml` holds them. A Python program is `code`, then the asserts of `test_list`. A Java
program is `java_code` and a class of the same package that sees `java.util.*` and runs the asserts
of `java_tests`. `python -m flex.data.check_tasks` proves the solutions against the tests.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from flex.errors import DataError

FOLDER = Path(__file__).with_name("tasks")
KEYS = ("task_id", "entry_point", "text", "code", "test_list", "java_code", "java_tests")
TESTS = 3  # MBPP's number
HELD_OUT = 6  # every 6th task of a topic is validation
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster


class _Loader(_Base):
    """YAML that refuses a key given twice, which PyYAML resolves silently to the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"`{name}` is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_constructor(
    "tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node, deep=True)
)


def load_tasks() -> list[dict[str, Any]]:
    """All tasks, ordered by topic and then by id; the files are read and checked once.

    Keys: task_id (int), text, code, test_list, test_setup_code (""), challenge_test_list ([]) as in
    MBPP, then java_code, java_tests, topic, entry_point.

    Raises:
        DataError: a file is missing, is no YAML or breaks the schema.
    """
    return [dict(task) for task in _load(FOLDER)]


def split_tasks() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, validation): every 6th task of each topic, in order of its ids, is validation."""
    train: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    place: dict[str, int] = {}
    for task in load_tasks():
        place[task["topic"]] = place.get(task["topic"], 0) + 1
        (train if place[task["topic"]] % HELD_OUT else validation).append(task)
    return train, validation


@cache
def _load(folder: Path) -> tuple[dict[str, Any], ...]:
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise _broken(f"no tasks in {folder}", "the installation is incomplete")
    tasks = [task for file in files for task in _read(file)]
    for key in ("task_id", "entry_point", "text"):
        seen: dict[Any, str] = {}
        for task in tasks:
            value, topic = task[key], task["topic"]
            if value in seen:
                where = f"{seen[value]}.yaml and {topic}.yaml"
                raise _broken(f"{key} {value!r} is used twice, in {where}", "it must be unique")
            seen[value] = topic
    return tuple(tasks)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        rows = yaml.load(file.read_text("ascii"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _broken(f"{file.name} cannot be read: {error}", "it must be ASCII YAML") from error
    if not isinstance(rows, list) or not rows:
        raise _broken(f"{file.name} holds no list of tasks", f"each item has the keys {KEYS}")
    for index, row in enumerate(rows, start=1):
        if complaint := _complaint(row):
            name = row.get("task_id", "?") if isinstance(row, dict) else "?"
            raise _broken(f"{file.name}, item {index} (task {name}): {complaint}", "see the schema")
    return [_to_mbpp(row, file.stem) for row in sorted(rows, key=lambda row: row["task_id"])]


def _to_mbpp(row: dict[str, Any], topic: str) -> dict[str, Any]:
    return {
        "task_id": row["task_id"],
        "text": row["text"].strip(),
        "code": row["code"].rstrip(),
        "test_list": row["test_list"],
        "test_setup_code": "",
        "challenge_test_list": [],
        "java_code": row["java_code"].rstrip(),
        "java_tests": row["java_tests"],
        "topic": topic,
        "entry_point": row["entry_point"],
    }


def _complaint(row: Any) -> str | None:
    """What is wrong with one item of a file, or None."""
    if not isinstance(row, dict) or tuple(row) != KEYS:
        return f"the keys must be {', '.join(KEYS)}, in this order"
    number, name = row["task_id"], row["entry_point"]
    if type(number) is not int or number < 1:
        return f"task_id {number!r} is not a positive integer"
    for key in ("entry_point", "text", "code", "java_code"):
        if not isinstance(row[key], str) or not row[key].strip():
            return f"{key} is not a text"
    for key in ("test_list", "java_tests"):
        tests = row[key]
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            return f"{key} is not a list of texts"
        if len(set(tests)) != TESTS:
            return f"{key} must hold {TESTS} different tests"
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        return f"entry_point {name!r} is not in snake_case"
    if not row["text"].startswith("Write a function to ") or "\n" in row["text"].strip():
        return "text must be one line that starts with 'Write a function to '"
    return _python_complaint(row) or _java_complaint(row)


def _python_complaint(row: dict[str, Any]) -> str | None:
    try:
        program = ast.parse(row["code"])
        asserts = [ast.parse(test).body for test in row["test_list"]]
    except SyntaxError as error:
        return f"Python: {error}"
    if row["entry_point"] not in {n.name for n in program.body if isinstance(n, ast.FunctionDef)}:
        return f"code defines no function {row['entry_point']}"
    for test, body in zip(row["test_list"], asserts, strict=True):
        if len(body) != 1 or not isinstance(body[0], ast.Assert):
            return f"not one assert: {test}"
        if not any(
            isinstance(n, ast.Name) and n.id == row["entry_point"] for n in ast.walk(body[0])
        ):
            return f"the test does not call {row['entry_point']}: {test}"
    return None


def _java_complaint(row: dict[str, Any]) -> str | None:
    head, found, _ = row["java_code"].partition("class Solution {")
    if not found or any(not re.fullmatch(r"(import [\w.*]+;)?", x) for x in head.splitlines()):
        return "java_code must be import lines, then `class Solution {`"
    words = row["entry_point"].split("_")
    method = words[0] + "".join(word.capitalize() for word in words[1:])
    if not re.search(rf"static [^=;{{]*\b{method}\(", row["java_code"]):
        return f"java_code defines no static method {method}"
    for test in row["java_tests"]:
        if not re.fullmatch(r"assert .*;", test) or f"Solution.{method}(" not in test:
            return f"not an assert on Solution.{method}: {test}"
    return None


def _broken(what: str, why: str) -> DataError:
    return DataError(
        f"built-in tasks: {what}",
        why,
        "reinstall the package, or repair the file in flex/data/tasks",
    )
