"""Reference solutions of the whole published sets pass in the sandbox. FLEX_DATA names the folder
with humaneval/HumanEval.jsonl.gz, mbpp/mbpp.jsonl and multipl_e/."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flex.evals.benchmarks import load_benchmark
from flex.evals.probe import unsolvable

execute = pytest.importorskip("flex.evals.execute")
needs_data = pytest.mark.skipif(
    "FLEX_DATA" not in os.environ, reason="FLEX_DATA names no folder with the benchmarks' files"
)


def published(name: str) -> Path:
    path = Path(os.environ["FLEX_DATA"]) / name
    if not path.is_file():
        pytest.skip(f"FLEX_DATA holds no {name}")
    return path


def failing(name: str, data: Path | None) -> tuple[int, dict[str, str]]:
    """Number of tasks with a solution, and the verdicts of those that do not pass."""
    benchmark = load_benchmark(name, data)
    programs = [(t.task_id, t.program(t.solution)) for t in benchmark.tasks if t.solution]
    with execute.Runner(benchmark.language) as runner:
        if runner.toolchain is None:
            pytest.skip(f"no tool chain for {benchmark.language}")
        outcomes = dict(runner.run_many(programs))
    assert len(outcomes) == len(programs)
    return len(programs), {
        key: f"{outcome.kind}: {outcome.detail}"
        for key, outcome in outcomes.items()
        if outcome.kind != "passed"
    }


@needs_data
def test_humaneval():
    assert failing("humaneval", published("humaneval/HumanEval.jsonl.gz")) == (164, {})


@needs_data
@pytest.mark.slow
def test_mbpp():
    assert failing("mbpp-all", published("mbpp/mbpp.jsonl")) == (974, {})


@pytest.mark.slow
@pytest.mark.parametrize("language", ["python", "java"])
def test_builtin(language: str):
    assert failing(f"builtin-{language}", None) == (168, {})


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("base", "tasks", "bad"), [("humaneval", 158, 0), ("mbpp", 386, 45)])
def test_tasks_that_no_java_program_can_solve(base: str, tasks: int, bad: int):
    data = published(f"multipl_e/{base}-java-reworded.json")
    benchmark = load_benchmark("multipl-e-java", data)
    with execute.Runner("java") as runner:
        if runner.toolchain is None:
            pytest.skip("no JDK is installed")
        found = unsolvable(benchmark, runner)
    assert (len(benchmark.tasks), len(found)) == (tasks, bad)
