"""MBXP (mxeval) and HumanEval-X: MBPP and HumanEval with tests written in the target language.

Their data close the function, and in Java its class, as part of the solution. Here a completion
ends before the first `}` at the start of a line, so that helpers inside the class count, and text
that the model writes after the function does not; the program puts the brace back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flex.data.ledger import BadRow
from flex.data.reading import text_field
from flex.evals.humaneval import STOPS, python_tests
from flex.evals.reading import HubSet, make_tasks, read_rows, warn_if_partial
from flex.evals.tasks import Benchmark, Task

MBXP_FILES = {"py": "mbpp", "java": "mbjp", "js": "mbjsp", "cpp": "mbcpp"}
HUMANEVAL_X_FOLDERS = {"py": "python", "java": "java", "js": "js", "cpp": "cpp"}
HUMANEVAL_X_TASKS = 164
BRACE = "\n}"
_LANGUAGE = {"python": "py", "javascript": "js"}  # what the data call a language
# The one function of lodash that MBXP's tests use. lodash takes 0 and -0 for equal, node does not.
# Of the 938 solutions in the data one is judged otherwise: within a set lodash takes [1, 2] and
# [2, 1] for equal (MBJSP/490).
LODASH = """\
const _ = (() => {
    const plain = (x) => Object.is(x, -0) ? 0 : Array.isArray(x) ? x.map(plain) : x;
    const deep = require("node:util").isDeepStrictEqual;
    return { isEqual: (a, b) => deep(plain(a), plain(b)) };
})();
"""
# Node's own prints a message and goes on: without this line every program passes.
CONSOLE_ASSERT = 'console.assert = require("node:assert").ok;\n'
# What HumanEval-X's authors put before every C++ program.
_HEADERS = "stdlib.h algorithm math.h stdio.h vector string climits cstring iostream"
HEADERS = "".join(f"#include <{header}>\n" for header in _HEADERS.split())


def load_mbxp(name: str, language: str, data: Path | None = None) -> Benchmark:
    """MBXP of one of MBXP_FILES. Raises DataError."""
    stem = MBXP_FILES[language]
    files = tuple(f"*{stem}_release_v{version}.jsonl" for version in ("1.2", "1.1", "1"))
    rows = read_rows(data, HubSet("mxeval/mbxp", files), name)

    def make(row: dict[str, Any]) -> Task:
        found = text_field(row, "language")
        if _LANGUAGE.get(found, found) != language:
            raise BadRow("wrong language", f"`language` is {found}, not {language}")
        if language == "py":
            return _task(row, language, python_tests(row))
        test = text_field(row, "test")
        if language == "js":
            test = test.replace('const _ = require("lodash")\n', LODASH, 1)
        return _task(row, language, f"{BRACE}\n{test}\n")

    tasks = make_tasks(name, rows, "mbxp", make)
    return Benchmark(name, language, tasks, rows.source, _protocol(language))


def load_humaneval_x(name: str, language: str, data: Path | None = None) -> Benchmark:
    """HumanEval-X of one of HUMANEVAL_X_FOLDERS. Raises DataError."""
    folder = HUMANEVAL_X_FOLDERS[language]
    hub = HubSet("THUDM/humaneval-x", (f"data/{folder}/data/humaneval.jsonl",))
    rows = read_rows(data, hub, name)
    after: Callable[[str], str] = {
        "py": lambda test: f"\n{test}\n",
        "java": lambda test: f"{BRACE}\n\n{test}\n",
        "js": lambda test: f"{BRACE}\n\n{CONSOLE_ASSERT}{test}\n",
        "cpp": lambda test: f"{BRACE}\n\n{test}\n",
    }[language]

    def make(row: dict[str, Any]) -> Task:
        text_field(row, "declaration")
        found = text_field(row, "task_id").partition("/")[0].lower()
        found = {"python": "py", "javascript": "js"}.get(found, found)
        if found != language:
            raise BadRow("wrong language", f"`task_id` is {row['task_id']}, not of {language}")
        headers = HEADERS if language == "cpp" else ""
        return _task(row, language, after(text_field(row, "test")), headers)

    tasks = make_tasks(name, rows, "humaneval-x", make)
    warn_if_partial(name, tasks, HUMANEVAL_X_TASKS)
    return Benchmark(name, language, tasks, rows.source, _protocol(language))


def _protocol(language: str) -> dict[str, Any]:
    brace = "" if language == "py" else " closing brace,"
    equal = "; lodash.isEqual and console.assert replaced" if language == "js" else ""
    return {
        "prompt": "as in the data, not stripped",
        "program": f"prompt, completion,{brace} test{equal}",
        "stops": list(_stops(language)),
    }


def _stops(language: str) -> tuple[str, ...]:
    return STOPS if language == "py" else (BRACE,)


def _task(row: dict[str, Any], language: str, after: str, headers: str = "") -> Task:
    prompt = text_field(row, "prompt")
    # mxeval's machine-made solutions are null where none passed.
    known = row.get("canonical_solution") is not None
    solution = text_field(row, "canonical_solution") if known else None
    reference = (prompt, solution) if solution is not None else None
    if solution is not None and language != "py":
        solution = solution.rstrip()
        if not solution.endswith("}"):
            raise BadRow("wrong form", "`canonical_solution` does not end with a closing brace")
        solution = solution[:-1].rstrip()
    return Task(
        task_id=text_field(row, "task_id"),
        language=language,
        prompt=prompt,
        stops=_stops(language),
        before=headers + prompt,
        after=after,
        solution=solution,
        reference=reference,
        main_class="Main" if language == "java" else "",
    )
