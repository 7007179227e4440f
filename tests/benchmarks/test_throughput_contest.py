"""The throughput contest's referee: who is comparable, who is fastest, what the ratios are."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import contestants
import cost_scaling
import step_profile
import train_throughput as contest

OURS = [1.434, 1.430, 1.390]


def run(name: str, seconds: float = 1.0, losses=OURS, peak: int = 10) -> contestants.Run:
    return contestants.Run(name, [seconds, seconds], [100, 50], [300, 150], list(losses), peak)


def names(side: str, competes: bool = True) -> list[str]:
    return [s.name for s in contest.SETUPS if s.side == side and s.competes is competes]


def test_losses_agree_within_noise_or_not_at_all():
    apart = contestants.losses_apart
    assert apart(OURS, OURS) == 0
    assert apart([2.0, 4.0], [2.0, 4.2]) == pytest.approx(0.05)
    assert apart([2.0, 4.0], [1.8, 4.0]) == pytest.approx(0.1)
    for other in ([1.434, 1.430], [], [1.434, math.nan, 1.390], [1.434, math.inf, 1.390]):
        assert apart(OURS, other) == math.inf
    # what seeds and rounding do (two runs seen), and a run that does not train
    assert apart([1.4315, 1.4296], [1.4337, 1.4304]) < contestants.LOSS_LIMIT / 5


def test_a_fast_run_that_does_not_train_is_not_the_fastest():
    flex, (slow, fast) = names("flex")[0], names("loop")[:2]
    found = [run(flex, 0.5), run(slow, 1.0), run(fast, 0.1, [1.434, 1.46, 1.47])]
    assert contest.fastest(found)["loop"].name == slow
    assert contest.ratios(found)["loop"][0] == pytest.approx(2.0)
    assert "not comparable" in contest.table_row(found[2], found)
    assert "not comparable" not in contest.table_row(found[1], found)


def test_set_ups_with_other_numbers_are_shown_and_do_not_compete():
    flex, (trainer,) = names("flex")[0], names("trainer")[:1]
    bf16 = names("trainer", competes=False)[0]
    found = [run(flex), run(trainer, 2.0), run(bf16, 0.5)]
    assert contest.fastest(found)["trainer"].name == trainer


def test_ratios_are_of_all_runs_of_the_fastest_of_each_side():
    flex, trainer = names("flex")[0], names("trainer")[0]
    found = [run(flex, 1.0, peak=6), run(trainer, 3.0, peak=10), run(flex, 1.0, peak=6)]
    found.append(run(trainer, 5.0, peak=10))
    speed, memory = contest.ratios(found)["trainer"]
    assert speed == pytest.approx(150 / ((50 + 30) / 2))
    assert memory == pytest.approx(0.6)
    words = contest.verdict(found)
    assert f"{speed:.2f} x the tokens" in words and "trl: no comparable run" in words
    job = contestants.Job("m", Path("x"), ("data.name=builtin",), 2)
    kept = json.loads(contest.record(found, job, "shape:m"))
    assert (
        kept["model"] == "shape:m"
        and kept["runs"][1]["peak_bytes"] == 10
        and kept["ratios"]["trainer"]["memory"] == 0.6
    )


def test_nothing_is_said_without_a_run_of_ours():
    found = [run(names("loop")[0])]
    assert contest.ratios(found) == {} and contest.fastest(found) == {}


def test_the_fast_set_has_one_competing_set_up_of_each_side():
    setups = contest.fast_setups()
    assert sorted(s.side for s in setups) == sorted(contest.TITLES)
    assert all(s.competes for s in setups)
    assert all(s.rows * s.processes * s.accumulation == contestants.BATCH for s in contest.SETUPS)


def test_a_job_of_a_shape(tmp_path):
    """A folder that every side can load, and FLeX's examples in FLeX's order, longest first within a step."""
    job = contestants.make_job(tmp_path, 1, None, "shape:tiny")
    model = AutoModelForCausalLM.from_pretrained(job.model)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    assert len(tokenizer) <= model.config.vocab_size == 384
    rows = [json.loads(line) for line in job.examples.read_text().splitlines()]
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(rows) == 2 * contestants.BATCH
    for step in (lengths[: contestants.BATCH], lengths[contestants.BATCH :]):
        assert step == sorted(step, reverse=True) and len(set(step)) > 1
    for row in rows:
        told = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
        assert told == [label for label in row["labels"] if label >= 0] and told


def test_a_shape_of_smollm2s_vocabulary_has_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(contestants, "SMOLLM2", "shape:small")  # no network in a test
    monkeypatch.setattr(contestants, "SMOLLM2_VOCABULARY", 384)
    contexts = {"tiny": 1024, "small": 2048}
    folder = contestants.write_model(tmp_path / "large", "shape:tiny")
    assert AutoTokenizer.from_pretrained(folder).model_max_length == contexts["small"]
    monkeypatch.setattr(contestants, "SMOLLM2_VOCABULARY", 385)
    folder = contestants.write_model(tmp_path / "less", "shape:tiny")
    assert AutoTokenizer.from_pretrained(folder).model_max_length == contexts["tiny"]


def test_fits_find_the_exponent():
    sizes = [1, 2, 4, 8]
    square = cost_scaling.fit(sizes, [3.0 * s**2 for s in sizes])
    assert square.exponent == pytest.approx(2) and square.low == pytest.approx(2)
    noisy = cost_scaling.fit(sizes, [1.0, 2.4, 3.6, 8.8])
    assert noisy.low < 1 < noisy.high and noisy.low > 0.5
    assert cost_scaling.fit([1, 2], [1.0, 0.5]).exponent == pytest.approx(-1)
    with pytest.raises(ValueError, match="two sizes"):
        cost_scaling.fit([1], [1.0])
    with pytest.raises(ValueError, match="above 0"):
        cost_scaling.fit([1, 2], [1.0, 0.0])


PARTS = {
    "frozen GEMM": [("aten::addmm_", [[7, 5], [7, 3], [3, 5]]), ("lora_linear/forward", [])],
    "frozen GEMM ": [("gemm/3x5 142", []), ("lora_linear/forward", [])],
    "loss and LM head ": [("gemm/3x97 1000", []), ("forward", [])],
    "LoRA": [("aten::mm", [[7, 3], [3, 8]]), ("lora_linear/forward", [])],
    "loss and LM head": [("aten::mm", [[7, 3], [3, 97]]), ("forward", [])],
    "attention": [("aten::bmm", [[2, 7, 8], [2, 8, 7]]), ("_BucketedAttention", [])],
    "norms and pointwise": [("_RmsNorm", [[7, 3], [3]]), ("forward", [])],
    "optimizer": [("aten::mul_", [[8, 3]]), ("optimizer", [])],
    "penalty": [("aten::_fft_r2c", [[24]]), ("penalty", []), ("step", [])],
    "rest": [("forward", [])],
}


@pytest.mark.parametrize("part", PARTS)
def test_events_belong_to_their_part(part):
    assert step_profile.part_of(PARTS[part], rank=8, vocabulary=97) == part.strip()


def test_a_refresh_counts_with_its_share():
    found = step_profile.Profiled(
        {"frozen GEMM": 3.0, "rest": 1.0}, 4.0, 5.0, 5, {}, 1.0, 10.0, 30.0
    )
    shares = found.shares()
    assert found.average == 5.0 and shares["refresh"] == 0.2 and shares["frozen GEMM"] == 0.6
    assert sum(shares.values()) == pytest.approx(1)


def test_products_are_counted_once():
    flops = step_profile.product_flops
    assert flops("aten::addmm_", [[7, 5], [7, 3], [3, 5]]) == 2 * 7 * 3 * 5
    assert flops("aten::bmm", [[4, 7, 3], [4, 3, 5]]) == 4 * 2 * 7 * 3 * 5
    assert flops("gemm/3x5 142", []) == 2 * 7 * 3 * 5
    assert flops("aten::linear", [[7, 3], [5, 3]]) == 0  # the product inside it counts
    assert flops("aten::mul", [[7, 3], [3, 5]]) == 0
