"""The likelihood of reference solutions: against cross_entropy, by hand, and paired."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from flex.config import ModelConfig
from flex.errors import DataError
from flex.evals import nll
from flex.evals.stats import bootstrap
from flex.model.base import load_model, load_tokenizer
from tests.evals.made_evaluation import benchmark
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def tiny():
    cfg = ModelConfig(name="shape:tiny", dtype="float64", attention="sdpa")
    return load_model(cfg), load_tokenizer(cfg)


def report(tasks, **fields):
    made = tuple(nll.TaskNll("made", f"T/{i}", *task) for i, task in enumerate(tasks))
    return nll.NllReport(
        **{"benchmarks": ({"name": "made"},), "model": {"id": "m"}, "engine": {}, "tasks": made}
        | fields
    )


@pytest.mark.parametrize(
    ("context", "solution"),
    [("def f():\n", "    return 1\n"), ("x", "y"), ("# ü\n", "é = '</s>'\n")],
)
def test_against_cross_entropy_with_ignored_positions(tiny, context, solution):
    model, tokenizer = tiny
    whole = torch.tensor([list((context + solution).encode())])
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokenizer.tokenize(context + solution))])
    if "</s>" in solution:  # special tokens spelt out in code stay text
        ids = torch.tensor([tokenizer(context + solution, split_special_tokens=True).input_ids])
    assert ids.shape == whole.shape  # a token for each byte
    labels = ids.clone()
    labels[:, : len(context.encode())] = -100
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[0, :-1].float(), labels[0, 1:], reduction="sum", ignore_index=-100
    )
    found, tokens = nll.solution_nll(model, tokenizer, context, solution)
    assert tokens == len(solution.encode())
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_measure_leaves_out_and_says_what_has_no_reference(tiny, caplog):
    made = benchmark(4)
    some = replace(made, tasks=(*made.tasks[:3], replace(made.tasks[3], reference=None)))
    found = nll.measure(*tiny, [some])
    assert [task.task_id for task in found] == ["T/0", "T/1", "T/2"]
    assert found[1].size == len("    return aa + 1\n") == found[1].tokens
    assert "1 tasks have no reference" in caplog.text
    bare = replace(made, tasks=tuple(replace(t, reference=None) for t in made.tasks))
    with pytest.raises(DataError, match="no task of made has a reference"):
        nll.measure(*tiny, [bare])


def test_what_does_not_fit_is_named(tiny):
    made = benchmark(2)
    with pytest.raises(DataError, match="T/0: context of 10 and solution of 18 tokens"):
        short = tiny_model(max_position_embeddings=20, vocab_size=384)
        nll.measure(
            short,
            tiny[1],
            [
                replace(
                    made,
                    tasks=(
                        replace(made.tasks[0], reference=("def f0(a):", "    return aa + 1\n")),
                    ),
                )
            ],
        )
    empty = replace(made.tasks[1], reference=("x", ""))
    with pytest.raises(DataError, match="T/1"):
        nll.measure(*tiny, [replace(made, tasks=(empty,))])


def test_figures_by_hand():
    py, java = nll.figures(report([("py", 2.0, 4, 8), ("java", 9.0, 3, 10), ("py", 10.0, 4, 16)]))
    assert (py.language, py.tasks, java.language, java.tasks) == ("py", 2, "java", 1)
    assert py.per_token.value == 12 / 8 and java.per_token.value == 3.0
    assert py.bits_per_byte == pytest.approx(12 / math.log(2) / 24)
    assert (py.per_token.low, py.per_token.high) == (0.5, 2.5)


def test_the_interval_of_a_ratio():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, 300).astype(float)
    found = nll.ratio_interval(1.5 * tokens, tokens)
    assert found.value == pytest.approx(1.5) and found.high - found.low < 1e-12
    sums = tokens * rng.normal(1.0, 0.3, 300)
    found = nll.ratio_interval(sums, tokens)
    assert found.value == pytest.approx(sums.sum() / tokens.sum())
    draws = [
        (sums[i].sum() / tokens[i].sum()) for i in (rng.integers(0, 300, 300) for _ in range(2000))
    ]
    assert [found.low, found.high] == pytest.approx(
        list(np.quantile(draws, [0.025, 0.975])), abs=0.01
    )
    same = np.full(300, 7.0)
    plain = bootstrap(sums)
    assert nll.ratio_interval(sums, same).low == pytest.approx(plain.low / 7)


def test_a_paired_difference():
    rng = np.random.default_rng(1)
    hard = rng.normal(50, 30, 60)  # tasks differ far more than the systems do
    first = report([("py", float(h), 20, 40) for h in hard])
    second = report([("py", float(h - 2 + rng.normal(0, 1)), 20, 40) for h in hard])
    (found,) = nll.compare(first, second)
    assert found.difference.value == pytest.approx(-0.1, abs=0.02)
    assert found.difference.high < -0.08 and found.test.p < 1e-3 and found.tasks == 60
    (none,) = nll.compare(first, first)
    assert none.difference.value == 0 and none.test.p == 1
    for other in (
        report([("py", 1.0, 21, 40)] * 60),
        report([("py", 1.0, 20, 40)] * 59),
        replace(first, benchmarks=({"name": "other"},)),
    ):
        with pytest.raises(DataError, match="not of the same solutions"):
            nll.compare(first, other)


def test_a_file_comes_back_and_another_is_refused(tmp_path):
    made, path = report([("py", 2.5, 4, 8), ("java", 1.0, 3, 9)]), tmp_path / "n.json"
    nll.save(made, path)
    assert nll.load(path) == made
    path.write_text(path.read_text().replace('"tokens": 4', '"tokens": "4"'))
    with pytest.raises(DataError, match="n.json"):
        nll.load(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="flex-nll-1"):
        nll.load(path)
    with pytest.raises(DataError, match="cannot be written"):
        nll.save(made, tmp_path / "no" / "n.json")
