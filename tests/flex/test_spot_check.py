"""Pass@1 while training: it counts what passes, and changes nothing."""

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from flex.config import EvalSection, ModelConfig
from flex.errors import DataError
from flex.evals import spot_check
from flex.evals.builtin_tasks import load
from flex.evals.journal import Generated
from flex.evals.spot_check import PassRate, SpotCheck
from flex.metrics_file import read_metrics
from flex.model.base import load_tokenizer
from tests.runs import TINY, losses, run_well, write_rows
from tests.tiny import tiny_model

TOKENIZER = load_tokenizer(ModelConfig(name="shape:tiny"))


def test_it_counts_the_completions_that_pass_their_tests(monkeypatch):
    solved = {task.task_id: task.solution for task in load("builtin-python").tasks[:5:2]}

    class Scripted:
        def __init__(self, model, tokenizer, **options):
            assert not model.training and options["max_new_tokens"] == 9

        def generate(self, requests):
            for request in requests:
                text = solved.get(request.task_id, "    return None\n")
                yield request.key, Generated(request.seed, text, 9, "stop")

    monkeypatch.setattr(spot_check, "Generator", Scripted)
    engine = SimpleNamespace(peft_model=tiny_model(), device=torch.device("cpu"))
    cfg = EvalSection(every=1, benchmark="builtin-python", limit=5, max_new_tokens=9)
    with closing(SpotCheck(cfg, TOKENIZER, rank=0)) as check:
        assert check.run(engine) == PassRate(passed=3, tasks=5)
    assert engine.peft_model.training


def test_what_cannot_be_run_is_said_before_training(monkeypatch):
    with pytest.raises(DataError, match="there is no benchmark builtin-pyhton"):
        SpotCheck(EvalSection(every=1, benchmark="builtin-pyhton"), TOKENIZER, rank=0)
    runner = SimpleNamespace(toolchain=None, missing="javac is not installed", close=lambda: None)
    monkeypatch.setattr(spot_check, "Runner", lambda language: runner)
    with pytest.raises(DataError, match="javac is not installed"):
        SpotCheck(EvalSection(every=1, benchmark="builtin-java"), TOKENIZER, rank=0)


@pytest.mark.parametrize("engine", [None, "zero3"])
def test_a_run_with_spot_checks_is_the_same_run(tmp_path, engine):
    data = f"data.path={write_rows(tmp_path / 'rows.jsonl')}"
    common = (*TINY, data, f"dir={tmp_path}", "train.steps=5", "train.batch_size=4")
    looks = ("eval.every=2", "eval.limit=2", "eval.max_new_tokens=4")
    run_well(*common, *looks, "name=with", engine=engine)
    found = {
        r["step"]: (r["passed"], r["evaluated"])
        for r in read_metrics(tmp_path / "with/metrics.jsonl")
        if "passed" in r
    }
    assert found == {2: (0, 2), 4: (0, 2), 5: (0, 2)}
    if engine is None:  # dropout is on: the generators must not have moved
        run_well(*common, "name=without")
        assert losses(tmp_path / "with") == losses(tmp_path / "without")
