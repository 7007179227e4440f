"""The built-in benchmarks, whose solutions pass, and the stubs, which compile and do not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from flex.data.builtin import load_tasks, split_tasks
from flex.errors import DataError
from flex.evals.benchmarks import load_benchmark
from flex.evals.builtin_tasks import split_java
from flex.evals.journal import Outcome
from flex.evals.probe import stub, unsolvable
from flex.evals.tasks import Benchmark, Program, Task
from tests.evals.made_benchmarks import (
    HUMANEVAL,
    HUMANEVAL_X,
    HUMANEVAL_X_JAVA,
    MBJP,
    MBJSP,
    MBPP,
    MULTIPL_E,
    write,
)

needs_java = pytest.mark.skipif(
    not (shutil.which("javac") and shutil.which("java")), reason="no JDK is installed"
)
node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
RUN_ALL = """
import json, sys
for name, source in json.load(sys.stdin).items():
    try:
        exec(compile(source, name, "exec"), {"__name__": "__main__"})
    except Exception as error:
        print(name, repr(error))
"""
RUN_PACKAGES = """
class All {
    public static void main(String[] packages) throws Exception {
        for (String name : packages) {
            var main = Class.forName(name + ".Main").getDeclaredMethod("main", String[].class);
            main.setAccessible(true);
            try {
                main.invoke(null, (Object) null);
                System.out.println(name);
            } catch (java.lang.reflect.InvocationTargetException error) {
                System.out.println(name + " " + error.getCause());
            }
        }
    }
}
"""


def run_java(folder: Path, programs: Mapping[str, Program]) -> dict[str, str]:
    """What each program printed or threw; compiled in one call, each in a package of its own."""
    files = []
    for name, program in programs.items():
        (folder / name).mkdir()
        files.append(folder / name / "Main.java")
        files[-1].write_text(f"package {name};\n{program.source}", "utf-8")
    files.append(folder / "All.java")
    files[-1].write_text(RUN_PACKAGES)
    fast = "-XX:TieredStopAtLevel=1"
    command = ["javac", f"-J{fast}", "-proc:none", "-d", str(folder), *map(str, files)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    command = ["java", "-ea", fast, "-cp", str(folder), "All", *programs]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    return dict((line + " ").split(" ", 1) for line in out.splitlines())


def test_python_solutions_pass():
    benchmark = load_benchmark("builtin-python")
    assert len(benchmark.tasks) == len(load_tasks())
    sources = {task.task_id: task.program(task.solution or "").source for task in benchmark.tasks}
    sources["wrong"] = benchmark.tasks[0].program("def set_bit_positions(n): return []").source
    command = [sys.executable, "-I", "-c", RUN_ALL]
    done = subprocess.run(
        command, input=json.dumps(sources), capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split("\n") == ["wrong AssertionError()", ""]


@needs_java
def test_java_solutions_pass_and_stubs_do_not(tmp_path: Path):
    numbers = {f"builtin/{row['task_id']}" for row in split_tasks()[1][::4]}
    numbers |= {"builtin/344", "builtin/200", "builtin/226"}  # a record; private constants
    tasks = [task for task in load_benchmark("builtin-java").tasks if task.task_id in numbers]
    assert len(tasks) == len(numbers)
    programs = {f"p{i}": task.program(task.solution or "") for i, task in enumerate(tasks)}
    programs |= {f"s{i}": task.program(stub(task) or "") for i, task in enumerate(tasks)}
    result = run_java(tmp_path, programs)
    assert {result[f"p{i}"] for i in range(len(tasks))} == {""}
    assert {result[f"s{i}"] for i in range(len(tasks))} == {"java.lang.RuntimeException "}


def test_the_java_prompt_ends_in_the_method_and_hides_its_helpers():
    rows = {row["task_id"]: row for row in load_tasks()}
    prompt, solution = split_java(rows[200])
    assert prompt.endswith("    static int parseDuration(String text) {\n")
    assert "PART" not in prompt and "    private static final Pattern PART" in solution
    assert f"// {rows[200]['text']}\n    // {rows[200]['java_tests'][0]}\n" in prompt
    prompt, solution = split_java(rows[344])
    assert "record Road(" in prompt and "record" not in solution
    assert all("\n}" not in split_java(row)[1] for row in rows.values())  # the stop


def test_twins_share_their_context():
    python, java = load_benchmark("builtin-python"), load_benchmark("builtin-java")
    for one, other in zip(python.tasks, java.tasks, strict=True):
        assert one.task_id == other.task_id
        assert one.reference and other.reference and one.reference[0] == other.reference[0]
    assert "static" in java.tasks[0].reference[1] and "def " in python.tasks[0].reference[1]


def test_validation_is_what_nobody_trains_on():
    trained = {f"builtin/{row['task_id']}" for row in split_tasks()[0]}
    tasks = load_benchmark("builtin-java-validation").tasks
    assert tasks and not trained & {task.task_id for task in tasks}


def test_the_builtin_tasks_take_no_file(tmp_path: Path):
    with pytest.raises(DataError, match="leave out --data"):
        load_benchmark("builtin-python", write(tmp_path / "x.jsonl", MBPP))


def first(tmp_path: Path, name: str, row: dict) -> Task:
    return load_benchmark(name, write(tmp_path / "x.json", row)).tasks[0]


def test_python_stubs_compile(tmp_path: Path):
    python = {**MULTIPL_E, "language": "py", "prompt": HUMANEVAL["prompt"], "tests": "pass\n"}
    for name, row in (("humaneval", HUMANEVAL), ("mbpp", MBPP), ("multipl-e-py", python)):
        task = first(tmp_path, name, row)
        compile(task.program(stub(task) or "?").source, name, "exec")


@needs_java
def test_java_programs_close_what_their_data_leave_open(tmp_path: Path):
    helper = "        return help(x);\n    }\n\n    static int help(int x) {\n        return 2 * x;\n    }"
    programs = {}
    for name, row in (("mbxp-java", MBJP), ("humaneval-x-java", HUMANEVAL_X_JAVA)):
        task, short = first(tmp_path, name, row), name[0]
        programs[short + "solution"] = task.program(task.solution or "")
        programs[short + "helper"] = task.program(helper)  # within the class, so before the stop
        programs[short + "stub"] = task.program(stub(task) or "")
        programs[short + "wrong"] = task.program("        return 5;\n    }")
    task = first(tmp_path, "multipl-e-java", MULTIPL_E)
    source = task.program(stub(task) or "").source.replace("class Problem", "class Main")
    programs["multipl_e_stub"] = Program("java", source)
    result = run_java(tmp_path, programs)
    assert result.pop("mwrong") == "java.lang.Exception: 0 "
    assert result.pop("hwrong") == "java.lang.AssertionError "
    for name, found in result.items():
        assert found == ("java.lang.RuntimeException " if name.endswith("stub") else ""), name


@node
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mbxp-js", MBJSP),
        ("humaneval-x-js", HUMANEVAL_X),
        (
            "multipl-e-js",
            {
                **MULTIPL_E,
                "language": "js",
                "prompt": "function f(x){\n",
                "tests": "f(1);\n",
            },
        ),
    ],
)
def test_javascript_stubs_throw(tmp_path: Path, name: str, row: dict):
    task = first(tmp_path, name, row)
    source = task.program(stub(task) or "").source
    done = subprocess.run(["node", "-"], input=source, capture_output=True, text=True, timeout=60)
    assert "Error: stub" in done.stderr and "SyntaxError" not in done.stderr


class Compiler:
    """Stands in for execute.Runner: outcomes by a word of the program."""

    def compile_only(self, program: Program) -> Outcome:
        kind = next((k for k in ("compile", "missing", "timeout") if k in program.source), "passed")
        return Outcome(kind, 0.1, "javac is not installed")


def made(*words: str, language: str = "java") -> Benchmark:
    before = "class A {\n    void f() {\n"
    tasks = [Task(word, language, before, ("\n}",), before, f"\n}} // {word}") for word in words]
    return Benchmark("made", language, tuple(tasks), {})


def test_unsolvable_tasks_are_those_whose_stub_does_not_compile(caplog):
    assert unsolvable(made("ok", "compile 1", "timeout", "compile 2"), Compiler()) == (
        "compile 1",
        "compile 2",
    )
    assert "timeout (timeout)" in caplog.text  # unclear, and said


def test_a_missing_compiler_is_no_verdict():
    with pytest.raises(DataError, match="javac is not installed"):
        unsolvable(made("missing"), Compiler())


def test_languages_without_a_stub_are_not_probed(caplog):
    with caplog.at_level("INFO", "flex.evals"):
        assert unsolvable(made("compile", language="lua"), Compiler()) == ()
    assert "no stub for lua" in caplog.text
