"""APPS: competition problems, solved by a whole program or by a function.

A task's tests are a program of their own (apps_program.py) that runs the completion once for each
input. Strict accuracy: a completion passes if it gives every output.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flex.data.ledger import BadRow
from flex.data.reading import int_field, text_field
from flex.evals.apps_program import CASE_SECONDS, tests_source
from flex.evals.reading import HubSet, make_tasks, plain_text, read_rows
from flex.evals.tasks import Benchmark, Task

log = logging.getLogger("flex.evals")

HUB = HubSet("codeparrot/apps", ("test.jsonl",))
DIFFICULTIES = ("introductory", "interview", "competition")
NAMES = ("apps", *(f"apps-{difficulty}" for difficulty in DIFFICULTIES))
STOPS = ("\nQUESTION", "\n---", "\nANSWER")  # those of BigCode's harness
MAX_NEW_TOKENS = 1024
START_SECONDS = 5.0  # of a task beside its cases


def load(name: str, data: Path | None = None) -> Benchmark:
    """The test split, or the problems of one difficulty. Raises DataError."""
    rows = read_rows(data, HUB, name)
    wanted = name.removeprefix("apps").removeprefix("-")
    untested: list[int] = []

    def make(row: dict[str, Any]) -> Task | None:
        difficulty = text_field(row, "difficulty")
        if difficulty not in DIFFICULTIES:
            raise BadRow(
                "wrong value", f"`difficulty` is {difficulty!r}, not one of {DIFFICULTIES}"
            )
        if wanted and difficulty != wanted:
            return None
        tests = _tests(row)
        if tests is None:
            untested.append(_number(row))
            return None
        return _task(row, tests)

    tasks = make_tasks(name, rows, "apps", make)
    source = dict(rows.source)
    if untested:
        log.warning(
            "%s: %d problems have no tests, or not one output for each input, and are left out: ids %s%s",
            name,
            len(untested),
            ", ".join(map(str, untested[:10])),
            ", ..." if len(untested) > 10 else "",
        )
        source["without_tests"] = len(untested)
    protocol = {
        "prompt": "QUESTION, starter code, format, ANSWER",
        "program": "every case runs the completion; all must pass (strict accuracy)",
        "comparison": "stdin: tokens, decimals within 1e-5; calls: as JSON values",
        "case_seconds": CASE_SECONDS,
        "stops": list(STOPS),
    }
    return Benchmark(name, "py", tasks, source, protocol, MAX_NEW_TOKENS)


def _number(row: dict[str, Any]) -> int:
    """The problem's number, which the Hub's own file calls `id`."""
    return int_field(row, "id" if "id" in row and "problem_id" not in row else "problem_id")


def _tests(row: dict[str, Any]) -> dict[str, Any] | None:
    """The cases of a problem, or None if nothing can be judged by them."""
    text = plain_text(row, "input_output")
    if not text.strip():
        return None
    # Some integers are longer than Python converts; here they need no value.
    tests = _json(text, "input_output", parse_int=lambda digits: 0)
    if not isinstance(tests, dict):
        raise BadRow("wrong type", "`input_output` is not an object")
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise BadRow("wrong type", "`inputs` and `outputs` of `input_output` are not both lists")
    return tests if inputs and len(inputs) == len(outputs) else None


def _task(row: dict[str, Any], tests: dict[str, Any]) -> Task:
    function = tests.get("fn_name")
    if function is not None and not isinstance(function, str):
        raise BadRow("wrong type", "`fn_name` of `input_output` is not a string")
    starter = plain_text(row, "starter_code")
    style = "Call-Based" if function else "Standard Input"
    prompt = f"\nQUESTION:\n{text_field(row, 'question')}{starter}\nUse {style} format\nANSWER:\n"
    written = plain_text(row, "solutions")
    solutions = _json(written, "solutions") if written.strip() else []
    if not isinstance(solutions, list) or not all(isinstance(s, str) for s in solutions):
        raise BadRow("wrong type", "`solutions` is not a list of texts")
    solution = solutions[0] if solutions else None
    return Task(
        task_id=f"APPS/{_number(row)}",
        language="py",
        prompt=prompt,
        stops=STOPS,
        before="SOLUTION = ",
        after=tests_source(row["input_output"]),
        solution=solution,
        reference=(prompt, solution) if solution is not None else None,
        seconds=START_SECONDS + CASE_SECONDS * len(tests["inputs"]),
        quoted=True,
    )


def _json(text: str, key: str, parse_int: Callable[[str], Any] | None = None) -> Any:
    try:
        return json.loads(text, parse_int=parse_int)
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", f"`{key}`: {error}") from error
