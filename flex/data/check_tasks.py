"""`python -m flex.data.check_tasks`: proves the built-in tasks against their tests.

Every solution must pass its tests, and at least one small fault put into it must fail them. Python
programs run in `check_child.py`; Java programs are compiled in one call, each in a package of its
own, and run one after another in one JVM. A program that overruns its limits ends the JVM, and the
next one goes on behind it. What could not be checked is said, and never counted as passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flex.data.builtin import load_tasks
from flex.data.mutants import java_mutants, python_mutants
from flex.errors import DataError, FlexError

CHILD = Path(__file__).with_name("check_child.py")
PROCESS_SECONDS = 900  # of any one process; the longest of a check of all mutants takes a minute
JAVA_SECONDS = 1.0  # CPU time of a program; a solution takes milliseconds
_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")  # they start fast, and fit one core
JAVA = ("java", "-ea", "-Xmx256m", "-XX:MaxMetaspaceSize=128m", *_JVM, "-cp", ".")
JAVAC = (
    *("javac", "-J-Xmx1g", "-J-Duser.language=en", *(f"-J{option}" for option in _JVM)),
    *("-proc:none", "-nowarn", "-Xmaxerrs", "100000", "-cp", ".", "-d", "."),
)
NO_JAVA = "java: not checked, javac and java are not both on the PATH (a JDK 17 or later has them)"

_TESTS = """\
package {package};

import java.util.*;

public class Tests implements java.util.concurrent.Callable<Object> {{
    int test;

    public String toString() {{ return "test " + test; }}

    public Object call() throws Exception {{
{body}
        return null;
    }}
}}
"""
# Reads the names of packages; writes a line "name, tab, what went wrong or nothing" for each.
_RUNNER = """\
import java.io.*;
import java.lang.management.ManagementFactory;
import java.util.concurrent.Callable;

class Runner {
    public static void main(String[] args) throws Exception {
        PrintStream out = System.out;
        System.setOut(new PrintStream(OutputStream.nullOutputStream()));
        double limit = Double.parseDouble(args[0]) * 1e9;
        var clock = ManagementFactory.getThreadMXBean();
        boolean late = false;
        for (String name : new String(System.in.readAllBytes()).split("\\n")) {
            var type = Class.forName(name + ".Tests");
            var tests = (Callable<?>) type.getDeclaredConstructor().newInstance();
            String[] result = new String[1];
            Thread thread = new Thread(() -> result[0] = run(tests));
            thread.setDaemon(true);
            thread.start();
            long start = System.nanoTime();
            while (thread.isAlive() && !late) {
                thread.join(20);
                late = clock.getThreadCpuTime(thread.getId()) > limit
                        || System.nanoTime() - start > 10 * limit;
            }
            out.println(name + "\\t" + (late ? "too slow" : result[0]));
            if (late) {
                break;
            }
        }
        Runtime.getRuntime().halt(0);
    }

    private static String run(Callable<?> tests) {
        try {
            tests.call();
            return "";
        } catch (Throwable error) {
            return tests + ": " + error.toString().replaceAll("[^ -~]+", " ");
        }
    }
}
"""


@dataclass
class Verdict:
    """What is known of one task in one language; `error` says how its solution fails."""

    language: str
    task_id: int
    error: str | None = None
    killed: int = 0
    run: int = 0
    survivors: list[str] = field(default_factory=list)

    @property
    def complaint(self) -> str | None:
        """One line on why the task is not proved, or None."""
        task = f"{self.language}, task {self.task_id}: "
        if self.error is not None:
            return f"{task}the solution fails: {' '.join(self.error.split())}"
        return None if self.killed else f"{task}the tests notice none of its {self.run} mutants"


@dataclass(frozen=True)
class _Program:
    task_id: int
    code: str
    tests: list[str]
    change: str | None = None  # of a mutant


def check_python(tasks: Sequence[dict[str, Any]], every: bool = False) -> list[Verdict]:
    """Run each task's Python solution, then its mutants until one is killed, or `every` one.

    Raises:
        DataError: the child process does not start or does not end.
    """
    jobs = {}
    for task in tasks:
        job = {**task, "mutants": list(python_mutants(task["code"])), "all": every}
        jobs[str(task["task_id"])] = json.dumps(job)
    # No site-packages: the tasks need the standard library only.
    command = (sys.executable, "-P", "-s", "-S", str(CHILD))
    with tempfile.TemporaryDirectory() as folder:
        answers = _answers(command, jobs, folder)
    return [
        Verdict("python", int(number), **(json.loads(text) if text[0] == "{" else {"error": text}))
        for number, text in answers.items()
    ]


def check_java(tasks: Sequence[dict[str, Any]], every: bool = False) -> list[Verdict]:
    """Compile and run each task's Java twin and its first mutant, the others if that one survives.

    With `every`, all of them in any case. Mutants that do not compile are not counted. Needs
    `has_java()`.

    Raises:
        DataError: javac or java does not work or does not end.
    """
    verdicts = {task["task_id"]: Verdict("java", task["task_id"]) for task in tasks}
    left = {task["task_id"]: list(java_mutants(task["java_code"])) for task in tasks}
    programs = [_Program(t["task_id"], t["java_code"], t["java_tests"]) for t in tasks]
    count = None if every else 1
    while True:
        for task in tasks:
            number = task["task_id"]
            if verdicts[number].error is None and not verdicts[number].killed:
                some, left[number] = left[number][:count], left[number][1:] if count else []
                programs += [_Program(number, m, task["java_tests"], change) for change, m in some]
        if not programs:
            return list(verdicts.values())
        for program, error in zip(programs, _run_java(programs), strict=True):
            verdict = verdicts[program.task_id]
            if program.change is None:
                verdict.error = error or None
            elif not error.startswith(("javac: ", "the process ")):
                verdict.run += 1
                verdict.killed += bool(error)
                verdict.survivors += [] if error else [program.change]
        programs, count = [], None


def has_java() -> bool:
    """Whether there are both a Java compiler and a JVM to run its output."""
    return shutil.which("javac") is not None and shutil.which("java") is not None


def _run_java(programs: Sequence[_Program]) -> list[str]:
    """What went wrong with each program, "" for nothing."""
    names = [f"p{index}" for index in range(len(programs))]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "Runner.java").write_text(_RUNNER, "ascii")
        for name, program in zip(names, programs, strict=True):
            body = "\n".join(f"test = {i}; {t}" for i, t in enumerate(program.tests, start=1))
            code = f"package {name};\n{program.code}\n"
            tests = _TESTS.format(package=name, body=body)
            (root / name).mkdir()
            (root / name / "Solution.java").write_text(code, "ascii")
            (root / name / "Tests.java").write_text(tests, "ascii")
        errors = _compile(root, names)
        jobs = {name: name for name in names if name not in errors}
        errors |= _answers((*JAVA, "Runner", str(JAVA_SECONDS)), jobs, folder)
    return [errors[name] for name in names]


def _compile(root: Path, names: list[str]) -> dict[str, str]:
    """Compile the packages; one with errors is left out, and returned with its first error."""
    errors: dict[str, str] = {}
    while True:
        files = [f"{name}/Solution.java {name}/Tests.java" for name in names if name not in errors]
        (root / "files").write_text("\n".join(["Runner.java", *files]), "ascii")
        done = _process((*JAVAC, "@files"), "", str(root))
        if done.returncode == 0:
            return errors
        found = re.findall(r"^(\w+)/(\w+\.java:\d+): error: (.*)$", done.stderr, re.MULTILINE)
        if not found:
            raise _broken("javac", done.stderr)
        for name, where, what in found:
            errors.setdefault(name, f"javac: {where}: {what}")


def _answers(command: Sequence[str], jobs: dict[str, str], folder: str) -> dict[str, str]:
    """Send jobs, one a line, and return the answers, which come as lines "name, tab, answer".

    A process that ends early is started anew for what is left. One that answers nothing died at its
    first job, which gets a text that says so for an answer.
    """
    answers: dict[str, str] = {}
    while left := [name for name in jobs if name not in answers]:
        done = _process(command, "\n".join(jobs[name] for name in left), folder)
        new = dict(line.split("\t", 1) for line in done.stdout.splitlines())
        last_words = " ".join(done.stderr.split())[-200:]
        answers |= new or {left[0]: f"the process died, status {done.returncode}: {last_words}"}
    return {name: answers[name] for name in jobs}


def _process(command: Sequence[str], text: str, folder: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=text,
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # one order of sets in all runs
            capture_output=True,
            text=True,
            timeout=PROCESS_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _broken(command[0], str(error)) from error


def _broken(program: str, what: str) -> DataError:
    return DataError(
        f"{program} failed: {what.strip()[-500:]}",
        "the built-in tasks cannot be checked without it",
        "repair it, or check one language: python -m flex.data.check_tasks --language python",
    )


def report(tasks: Sequence[dict[str, Any]], language: str, every: bool) -> int:
    """Check, print what is wrong and a summary, and return the exit status."""
    parts, failed = [], False
    for name in ("python", "java") if language == "all" else (language,):
        if name == "java" and not has_java():
            print(NO_JAVA)
            parts.append("java: not checked")
            failed |= language == "java"
            continue
        verdicts = (check_python if name == "python" else check_java)(tasks, every)
        for verdict in verdicts:
            if verdict.complaint:
                print(verdict.complaint)
            elif every and verdict.survivors:
                print(f"{name}, task {verdict.task_id}: unnoticed: {'; '.join(verdict.survivors)}")
        failed |= any(verdict.complaint for verdict in verdicts)
        passed = sum(verdict.error is None for verdict in verdicts)
        noticing = sum(verdict.killed > 0 for verdict in verdicts)
        mutants = f"{sum(v.killed for v in verdicts)} of {sum(v.run for v in verdicts)} mutants"
        parts.append(f"{name}: {passed} pass, {noticing} notice a mutant ({mutants} noticed)")
    print(f"{len(tasks)} built-in tasks; {'; '.join(parts)}")
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when all that was asked for is proved, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m flex.data.check_tasks", description=__doc__)
    parser.add_argument("--language", choices=("python", "java", "all"), default="all")
    help = "stop at a task's first noticed one, or run all and list those that go unnoticed"
    parser.add_argument("--mutants", choices=("first", "all"), default="first", help=help)
    args = parser.parse_args(argv)
    try:
        return report(load_tasks(), args.language, every=args.mutants == "all")
    except FlexError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
