"""Merged against unmerged: equal in fp32, counted in bf16, seen when it is another model."""

import pytest
import torch

from flex.errors import ConfigError, DataError, ModelError
from flex.evals.merge_check import check, parting
from flex.evals.subject import Subject
from flex.model.export import save_adapter
from tests.evals.made_evaluation import benchmark
from tests.flex.saved import WEIGHTS, make_base, trained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    base = make_base(root / "base")
    return str(base), str(save_adapter(trained(base), root / "adapter", str(base)))


def subject(saved, **fields):
    return Subject(model=saved[0], adapter=saved[1], device="cpu", **fields)


def checked(saved, other=None, **fields):
    one = subject(saved, **fields)
    two = subject(saved, merged=True, **fields) if other is None else other
    return check(one.load(), two.load(), one.tokenizer(), benchmark(5), 12, 3)


def test_in_fp32_it_is_one_model(saved):
    found = checked(saved)
    text = sum(len(c) + len(s) for c, s in (t.reference for t in benchmark(5).tasks))
    assert (found.prompts, found.positions, found.completions) == (5, text, 5)
    assert found.agreeing == found.positions and found.diverged == ()
    assert 0 < found.mean <= found.largest < 1e-4 * found.scale


def test_in_bf16_rounding_is_measured(saved):
    found = checked(saved, dtype="bfloat16")
    assert 1e-4 * found.scale < found.largest < 0.3 * found.scale
    assert 0.5 * found.positions < found.agreeing <= found.positions


def test_the_base_without_the_adapter_is_another_model(saved):
    found = checked(saved, Subject(model=saved[0], device="cpu"))
    assert found.largest > 0.1 and found.agreeing < found.positions
    assert len(found.diverged) > 0
    assert all(0 <= place < 12 for _, place in found.diverged)


def test_merging_adds_in_fp32_and_casts_the_weights_only(saved):
    model = subject(saved, merged=True, dtype="bfloat16").load()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = subject(saved, merged=True).load()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(name), exact.get_parameter(name).bfloat16())
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2], [1, 2, 3], 2), ([1, 9, 3], [1, 2, 3], 1), ([], [1], 0)],
)
def test_parting(one, other, place):
    assert parting(one, other) == place


def test_the_description_names_the_files(saved):
    import hashlib
    from pathlib import Path

    found = subject(saved, merged=True).describe()
    weights = hashlib.sha256(Path(saved[1], WEIGHTS).read_bytes()).hexdigest()
    assert found["adapter_sha256"][WEIGHTS] == weights
    assert set(found["adapter_sha256"]) == {WEIGHTS, "adapter_config.json"}
    assert set(found["sha256"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (found["id"], found["adapter"], found["merged"]) == (*saved, True)
    assert Subject(model="shape:tiny").describe()["adapter"] is None


def test_subjects_that_do_not_go_together(saved, tmp_path):
    with pytest.raises(ConfigError, match="--merged without --adapter"):
        Subject(model=saved[0], merged=True)
    with pytest.raises(ConfigError, match="--merged with --quantise 4bit"):
        Subject(model=saved[0], adapter=saved[1], merged=True, quantise="4bit")
    with pytest.raises(ConfigError, match="--quantise with shape:tiny"):
        Subject(model="shape:tiny", quantise="4bit")
    with pytest.raises(ModelError, match="adapter_model.safetensors"):
        Subject(model=saved[0], adapter=str(tmp_path)).describe()


def test_a_text_longer_than_the_context_is_named(saved, tmp_path):
    short = str(make_base(tmp_path / "short", max_position_embeddings=20))
    model = Subject(model=short, device="cpu")
    with pytest.raises(DataError, match="T/0: "):
        check(model.load(), model.load(), model.tokenizer(), benchmark(2))
