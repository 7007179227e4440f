"""Tasks that no completion can solve: does a body that does nothing compile?

Translated benchmarks hold tasks whose signature or tests are no valid program (45 of mbpp-java's
386). A score is therefore given on all tasks, and beside it on those whose stub compiles.
"""

from __future__ import annotations

import logging
import re
from typing import Protocol

from flex.errors import DataError
from flex.evals.journal import Outcome
from flex.evals.tasks import Benchmark, Program, Task

log = logging.getLogger("flex.evals")

# Throwing fits a function of any type; the compilers take it for an end of the function.
STUBS = {
    "py": "    pass",
    "java": "        throw new RuntimeException();",
    "cs": "        throw new System.Exception();",
    "js": '    throw new Error("stub");',
    "ts": '    throw new Error("stub");',
    "cpp": "    throw 1;",
    "rs": "    panic!();",
    "php": "    throw new Exception();",
    "sh": "    return 1",
}
_IN_CLASS = ("java", "cs")


class Compiler(Protocol):
    """The part of execute.Runner that is used here."""

    def compile_only(self, program: Program) -> Outcome: ...


def stub(task: Task) -> str | None:
    """A completion that compiles, if any does, and solves nothing; None: unknown for the language.

    Whether the function is still open is told by the prompt (indented) and by what follows.
    """
    body = STUBS.get(task.language)
    if body is None:
        return None
    if not task.before or task.quoted:  # a whole module is asked for
        return body.strip() if task.language == "py" else None
    if task.language == "py" and (indent := re.search(r"\n([ \t]+)\S[^\n]*\s*\Z", task.before)):
        body = indent.group(1) + "pass"
    if task.language in _IN_CLASS and re.match(r"\s*^}", task.after, re.M):
        body += "\n    }"  # what follows closes the class only
    elif task.language in ("js", "ts", "php") and not re.match(r"\s*}", task.after):
        body += "\n}"  # MultiPL-E's completions end behind these functions, not within them
    return "\n" + body


def unsolvable(benchmark: Benchmark, runner: Compiler) -> tuple[str, ...]:
    """Ids of the tasks whose stub does not compile; empty where no stub is known.

    Raises:
        DataError: the language's tools are not installed.
    """
    found, unclear = [], []
    for task in benchmark.tasks:
        completion = stub(task)
        if completion is None:
            log.info("%s: no stub for %s, so no task is probed", benchmark.name, task.language)
            return ()
        outcome = runner.compile_only(task.program(completion))
        if outcome.kind == "missing":
            what = f"{benchmark.name} cannot be probed: {outcome.detail}"
            raise DataError(what, "the stubs are to be compiled", "install it, or do not probe")
        if outcome.kind == "compile":
            found.append(task.task_id)
        elif outcome.kind != "passed":
            unclear.append(f"{task.task_id} ({outcome.kind})")
    if unclear:
        log.warning("%s: stubs neither compile nor fail: %s", benchmark.name, ", ".join(unclear))
    log.info("%s: %d of %d stubs do not compile", benchmark.name, len(found), len(benchmark.tasks))
    return tuple(found)
