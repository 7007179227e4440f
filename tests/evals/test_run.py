"""Whole evaluations: the result, and the same bytes after a kill anywhere."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from flex.errors import ConfigError, DataError, ModelError
from flex.evals.generate import Generator
from flex.evals.journal import journal_path
from flex.evals.results import load, timing_path
from flex.evals.run import SamplingPlan
from flex.evals.sampling import Sampling, sample_seed
from tests.evals.made_evaluation import FakeRunner, benchmark, evaluation

CHILD = """
import sys, time
from pathlib import Path
from tests.evals.made_evaluation import FakeRunner, evaluation
import flex.evals.journal as journal
pause = float(sys.argv[2])
write = journal.Journal._write
def slow(self, record):
    write(self, record)
    time.sleep(pause)
journal.Journal._write = slow
evaluation(FakeRunner()).run(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "r.json"
    return out, evaluation().run(out)


def test_the_result(whole):
    out, report = whole
    assert load(out) == report and not journal_path(out).exists()
    assert [task.task_id for task in report.tasks] == [f"T/{i}" for i in range(6)]
    runner = FakeRunner()
    for task in report.tasks:
        assert len(task.samples) == 4
        assert [s.seed for s in task.samples] == [sample_seed(0, task.task_id, n) for n in range(4)]
        for sample in task.samples:
            program = next(t for t in benchmark().tasks if t.task_id == task.task_id).program(
                sample.text
            )
            assert program.source == f"before:{sample.text}:after"
            assert next(runner.run_many([(0, program)]))[1].kind == sample.verdict
    assert report.protocol == {
        **{"stops": ["Z"], "prompt": "plain", "max_new_tokens": 8, "samples": 4, "seed": 0},
        **{"temperature": 1.0, "top_p": 0.95},
    }
    assert report.benchmark["tasks"] == 6 and report.benchmark["language"] == "py"
    assert report.engine["context"] == 1024 and report.engine["batch_size"] == 3
    assert (report.sandbox, report.toolchain, report.unsolvable) == ("fake", "Fake 1.0", None)
    assert report.model["id"] == "shape:tiny" and report.model["dtype"] == "bfloat16"
    assert b'"tokens_per_second": ' in timing_path(out).read_bytes()


@pytest.mark.parametrize("lines", [16, 34])
def test_killed_it_goes_on_to_the_same_bytes(whole, tmp_path, repository, lines):
    out = tmp_path / "r.json"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), "0.02"],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if journal_path(out).exists() and journal_path(out).read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    assert child.poll() is None, "it ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = journal_path(out).read_bytes()
    assert there.count(b"\n") >= lines and not out.exists()
    evaluation().run(out)
    assert out.read_bytes() == whole[0].read_bytes()


def test_nothing_is_made_or_run_twice(tmp_path):
    out, stopped = tmp_path / "r.json", []

    def stop():
        stopped.append(1)
        if len(stopped) == 10:
            raise KeyboardInterrupt

    first = FakeRunner(before=stop)
    with pytest.raises(KeyboardInterrupt):
        evaluation(first).run(out)

    class NoEngine:
        def describe(self):
            return evaluation().engine.describe()

        def generate(self, requests, done):
            raise AssertionError("all completions are there")

    second = FakeRunner()
    report = evaluation(second, engine=NoEngine()).run(out)
    ran = first.sources + second.sources
    texts = {(t.task_id, s.text) for t in report.tasks for s in t.samples}
    assert len(ran) == len(texts) and len(first.sources) == 9


def test_equal_completions_run_once(tmp_path):
    runner = FakeRunner()

    class Same:
        def describe(self):
            return evaluation().engine.describe()

        def generate(self, requests, done):
            from flex.evals.journal import Generated

            for request in requests:
                yield request.key, Generated(request.seed, f"x{request.sample // 3}", 2, "eos")

    report = evaluation(runner, engine=Same()).run(tmp_path / "r.json")
    assert len(runner.sources) == 12
    for task in report.tasks:
        assert len({s.verdict for s in task.samples[:3]}) == 1


def test_a_result_that_is_there(whole, tmp_path):
    out, report = whole
    before = out.read_bytes()
    runner = FakeRunner()
    journal_path(out).write_bytes(b"left by a kill")
    assert evaluation(runner).run(out) == report and runner.sources == []
    assert not journal_path(out).exists()
    for other, key in [
        (evaluation(seed=1), "protocol.seed"),
        (evaluation(dtype="float32"), "model.dtype"),
        (evaluation(batch_size=4), "engine.batch_size"),
        (evaluation(tasks=5), "benchmark.tasks"),
        (evaluation(FakeRunner(level="none")), "sandbox"),
        (evaluation(FakeRunner(toolchain="Fake 2.0")), "toolchain"),
        (evaluation(probe=lambda: ()), "unsolvable"),
    ]:
        with pytest.raises(DataError, match=f"exists and differs in {key}"):
            other.run(out)
    assert out.read_bytes() == before


def test_a_missing_tool_chain_keeps_the_completions(tmp_path, whole, caplog):
    out = tmp_path / "r.json"
    report = evaluation(FakeRunner(toolchain=None)).run(out)
    assert report.missing == 24 and report.toolchain is None
    assert "no tool chain for py" in caplog.text and journal_path(out).exists()
    with pytest.raises(DataError, match=r"protocol\.seed"):
        evaluation(FakeRunner(), seed=1).run(out)
    evaluation(FakeRunner()).run(out)
    assert out.read_bytes() == whole[0].read_bytes() and not journal_path(out).exists()


def test_the_unsolvable_are_probed(tmp_path):
    report = evaluation(probe=lambda: ("T/1",)).run(tmp_path / "r.json")
    assert report.unsolvable == ("T/1",)


def test_plans_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="samples = 0"):
        SamplingPlan(samples=0)
    with pytest.raises(ConfigError, match="2 samples with temperature 0"):
        SamplingPlan(samples=2)
    assert replace(SamplingPlan(), samples=2, sampling=Sampling(0.2)).samples == 2


def test_no_memory_says_what_to_type(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("flex.evals.generate.SlotCache", full)
    with pytest.raises(ModelError, match="3 completions at once") as told:
        evaluation().run(tmp_path / "r.json")
    assert "--batch-size" in told.value.fix


def test_the_engine_repeats_windows_as_they_were_and_says_if_the_bits_changed(whole, caplog):
    engine, requests = evaluation().engine, evaluation().plan.requests(benchmark())
    made = dict(engine.generate(requests, {}))
    first = dict(list(made.items())[:5])  # of a window of 6
    computed = []
    inner = Generator._take

    def take(self, row, token):
        if not row.completion.ids:
            computed.append(row.job.request.key)
        return inner(self, row, token)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "_take", take)
        assert dict(engine.generate(requests, first)) == {
            key: value for key, value in made.items() if key not in first
        }
    assert len(computed) == 24 and "made again" not in caplog.text
    spoilt = {key: replace(value, text="other") for key, value in first.items()}
    list(engine.generate(requests, spoilt))
    assert "5 of 5 completions that were made again came out otherwise" in caplog.text
