"""Child process of check_tasks: runs Python programs it is given. Standard library only; never imported.

Reads jobs from standard input, each a line of JSON: a task with "mutants" and "all". Writes a line for
each: the task_id, a tab and JSON {"error", "killed", "run", "survivors"}. A job's mutants are run until
one is killed, or all of them with "all". The programs are the project's own, but a mutant may loop for ever
or grow without bound: each has a limit of CPU time and a wider one of time, the process one of memory.
"""

import contextlib
import io
import json
import resource
import signal
import sys
from typing import Any

SOLUTION_SECONDS, MUTANT_SECONDS = 5.0, 0.5  # CPU time; a solution takes milliseconds
WAIT = 10  # times as long for a program that sleeps or waits
MEMORY_BYTES = 1 << 30


class OutOfTime(BaseException):
    """Not an Exception, so that a program that catches those does not survive its limit."""


def _expire(signum: int, frame: Any) -> None:
    raise OutOfTime("too slow")


def run(code: str, tests: list[str], seconds: float) -> str | None:
    """What went wrong when `code` and then each of `tests` ran in one namespace, or None."""
    doing = "the solution"
    space: dict[str, Any] = {"__name__": "task"}
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds * WAIT)
        try:
            exec(compile(code, "solution", "exec"), space)
            for doing in tests:
                exec(compile(doing, "test", "exec"), space)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as error:  # SystemExit and OutOfTime count as failures as well
        return f"{type(error).__name__} {error} in: {doing}"
    return None


def work(job: dict[str, Any]) -> dict[str, Any]:
    error = run(job["code"], job["test_list"], SOLUTION_SECONDS)
    killed, ran, survivors = 0, 0, []
    for change, mutant in [] if error else job["mutants"]:
        if killed and not job["all"]:
            break
        ran += 1
        if run(mutant, job["test_list"], MUTANT_SECONDS):
            killed += 1
        else:
            survivors.append(change)
    return {"error": error, "killed": killed, "run": ran, "survivors": survivors}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGVTALRM, _expire)
    signal.signal(signal.SIGALRM, _expire)
    out = sys.stdout
    for job in map(json.loads, sys.stdin.read().splitlines()):
        with contextlib.redirect_stdout(io.StringIO()):
            result = work(job)
        out.write(f"{job['task_id']}\t{json.dumps(result)}\n")
        out.flush()


if __name__ == "__main__":
    main()
