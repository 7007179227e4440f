"""Programs pass only by reaching their end with exit status 0, and failures are told apart."""

import json
import os
from pathlib import Path

import pytest

from flex.errors import DataError
from flex.evals.execute import Runner
from flex.evals.tasks import Program


@pytest.fixture(scope="module")
def runner():
    with Runner("py", seconds=2, memory_bytes=256 << 20, allow_unsandboxed=True) as made:
        yield made


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("assert 1 + 1 == 2\nassert __name__ == '__main__'", "passed"),
        ("assert 1 + 1 == 3", "wrong"),
        ("assert False, 'two\\nlines'", "wrong"),
        ("def f(:", "compile"),
        ("x = '\0'", "compile"),
        ("x = '\ud800'", "compile"),
        ("exec('def f(:')", "exception"),
        ("1 / 0", "exception"),
        ("import sys; sys.exit(0)", "exception"),
        ("import os; os._exit(0)", "exception"),
        ("while True: pass", "timeout"),
        ("x = bytearray(2 << 30)", "limit"),
    ],
)
def test_each_kind_of_end(runner, source, kind):
    assert runner.run(Program("py", source)).kind == kind


def test_detail_is_the_end_of_the_error(runner):
    outcome = runner.run(Program("py", "raise KeyError('here')"))
    assert outcome.detail.endswith("KeyError: 'here'")
    assert len(outcome.detail) <= 300


def test_many_keep_their_keys(runner):
    programs = ((n, Program("py", f"assert {n} % 3")) for n in range(7))
    got = {key: outcome.kind for key, outcome in runner.run_many(programs)}
    assert got == {n: "passed" if n % 3 else "wrong" for n in range(7)}


def test_an_unknown_language_names_the_known():
    with pytest.raises(DataError, match="java"):
        Runner("cobol")


@pytest.mark.parametrize("language", ["py", "java", "js", "cpp", "rs", "sh", "pl"])
def test_controls(language):
    folder = os.environ.get("FLEX_DATA")
    if not folder:
        pytest.skip("FLEX_DATA is not set")
    path = Path(folder) / "multipl_e_controls" / f"{language}-HumanEval53.json"
    row = json.loads(path.read_text("utf-8"))
    with Runner(language, allow_unsandboxed=True) as runner:
        if runner.toolchain is None:
            pytest.skip(runner.run(Program(language, "")).detail)
        ends = [
            runner.run(Program(language, row["prompt"] + text + "\n" + row["tests"])).kind
            for text in row["completions"][:2]
        ]
    assert ends[0] == "passed"
    assert ends[1] in ("compile", "exception", "wrong")


@pytest.mark.parametrize("jar", [True, False])
def test_java_programs_may_use_pairs(monkeypatch, jar):
    if not jar:
        monkeypatch.setattr("flex.evals.execute.TUPLES", "/nowhere.jar")
        monkeypatch.setattr("flex.evals.languages.TUPLES", "/nowhere.jar")
    source = (
        "import org.javatuples.*; class Problem { public static void main(String[] a) {"
        ' assert Pair.with(1, "x").equals(new Pair<Integer, String>(1, "x"));'
        " assert Pair.with(1, 2).getValue1() == 2; } }"
    )
    with Runner("java", allow_unsandboxed=True) as runner:
        if runner.toolchain is None:
            pytest.skip("no javac")
        assert runner.run(Program("java", source)).kind == "passed"


def java(body: str, rest: str = "") -> Program:
    source = f"class Problem {{ public static void main(String[] a) {{ {body} }} {rest} }}"
    return Program("java", source, main_class="Problem")


@pytest.fixture(scope="module")
def jvm():
    with Runner("java", allow_unsandboxed=True) as made:
        if made.toolchain is None:
            pytest.skip("no javac")
        yield made


@pytest.mark.parametrize(
    ("body", "rest", "kind"),
    [
        ("assert 1 + 1 == 2;", "", "passed"),
        ("assert 1 + 1 == 3;", "", "wrong"),
        ("int x = null;", "", "compile"),
        ("throw new IllegalStateException();", "", "exception"),
        ("new Inner().f.run();", "static class Inner { Runnable f = () -> {}; }", "passed"),
    ],
)
def test_java_ends(jvm, body, rest, kind):
    outcome = jvm.run(java(body, rest))
    assert outcome.kind == kind
    assert kind != "compile" or "incompatible types" in outcome.detail


def test_java_classes_of_one_program_are_not_seen_by_the_next(jvm):
    assert jvm.run(java("", "static class Left {} } class Other {")).kind == "passed"
    assert jvm.run(java("new Other();")).kind == "compile"


def test_the_java_compiler_is_started_anew_when_it_dies_or_hangs(jvm, monkeypatch):
    first = jvm._java._process
    first.kill()
    first.wait()
    assert jvm.run(java("")).kind == "passed"
    monkeypatch.setattr("flex.evals.java_compiler._ask", lambda *_: None)  # so no answer comes
    with pytest.raises(TimeoutError):
        jvm._java.compile({}, seconds=0.2)
    monkeypatch.undo()
    assert jvm.run(java("")).kind == "passed"


def test_a_program_that_kills_the_compiler_twice_does_not_compile(jvm, monkeypatch):
    def dies(process):
        raise EOFError

    monkeypatch.setattr("flex.evals.java_compiler._answer", dies)
    outcome = jvm.run(java(""))
    assert (outcome.kind, outcome.detail) == ("compile", "the compiler died twice")
    monkeypatch.undo()
    assert jvm.run(java("")).kind == "passed"


def test_compile_only_runs_nothing(jvm, runner):
    assert jvm.compile_only(java("assert false;")).kind == "passed"
    assert jvm.compile_only(java("int x = null;")).kind == "compile"
    assert runner.compile_only(Program("py", "assert False")).kind == "passed"


def test_a_missing_tool_chain_is_said(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None if name == "node" else f"/bin/{name}")
    with Runner("js", allow_unsandboxed=True) as runner:
        assert runner.toolchain is None
        outcome = runner.run(Program("js", ""))
        assert (outcome.kind, outcome.detail) == ("missing", "node is not installed")


def test_a_tool_chain_that_does_not_work_in_the_sandbox_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "bin" / "node"
    broken.parent.mkdir()
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo v20 || exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:{os.environ['PATH']}")
    with pytest.raises(DataError, match="node"):
        Runner("js", allow_unsandboxed=True)
