"""Batched decoding gives, token for token, what one row without a cache gives."""

import pytest
import torch

from flex.config import ModelConfig
from flex.errors import ConfigError, DataError, ModelError
from flex.evals.generate import Generator, Request, context_of, end_tokens
from flex.evals.sampling import Sampling, choose, sample_seed, uniform
from flex.evals.stops import cut
from flex.model.base import load_model, load_tokenizer
from tests.tiny import tiny_model

PROMPTS = [
    "def f(x):\n",
    "a",
    "class A:\n    def g(self):\n        return",
    "\n\n",
    "# ü\nx =",
    "if 1:",
]
STOPS = ("é", "\x00", "ZZ")


@pytest.fixture(scope="module", params=["float64", "float32"])
def tiny(request):
    cfg = ModelConfig(name="shape:tiny", dtype=request.param, attention="sdpa")
    model, tokenizer = load_model(cfg), load_tokenizer(cfg)
    with torch.no_grad():  # untrained, it repeats one token: other sizes give texts with variety
        for p in model.parameters():
            p.mul_(6 if p.dim() > 1 else 1)
    return model, tokenizer


def requests(samples=1, prompts=PROMPTS, stops=STOPS):
    return [
        Request(f"T/{i}", n, sample_seed(0, f"T/{i}", n), text, stops)
        for i, text in enumerate(prompts)
        for n in range(samples)
    ]


def slow(model, tokenizer, request, sampling, limit):
    """One row, the whole text again for every token."""
    prompt = tokenizer(request.prompt, add_special_tokens=False).input_ids
    made = []
    while True:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + made])).logits[:, -1]
        made += choose(logits, sampling, [uniform(request.seed, len(made))])
        text = tokenizer.decode(made, skip_special_tokens=True)
        if made[-1] in tokenizer.all_special_ids:
            return text, len(made), "eos"
        if any(stop in text for stop in request.stops):
            return cut(text, request.stops), len(made), "stop"
        if len(made) == limit:
            return text, len(made), "length"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 0.9)])
def test_against_one_row_without_a_cache(tiny, sampling):
    model, tokenizer = tiny
    wanted = requests(3 if sampling.temperature else 1)
    expected = {r.key: slow(model, tokenizer, r, sampling, 14) for r in wanted}
    for batch_size in (1, 4, 32):
        found = dict(Generator(model, tokenizer, sampling, 14, batch_size).generate(wanted))
        told = {k: (g.text, g.new_tokens, g.finish) for k, g in found.items()}
        assert told == expected
        assert {key: g.seed for key, g in found.items()} == {r.key: r.seed for r in wanted}


def test_the_ways_to_end(tiny):
    model, tokenizer = tiny
    made = dict(Generator(model, tokenizer, Sampling(2.0), 40, 16).generate(requests(8)))
    assert {g.finish for g in made.values()} == {"eos", "stop", "length"}
    for g in made.values():
        assert (g.new_tokens == 40) if g.finish == "length" else g.new_tokens <= 40
        assert not any(stop in g.text for stop in STOPS)


def test_samples_differ_and_seeds_decide(tiny):
    model, tokenizer = tiny
    make = Generator(model, tokenizer, Sampling(1.0), 12, 8).generate
    wanted = requests(4, PROMPTS[:2], ())
    first = dict(make(wanted))
    assert len({g.text for key, g in first.items() if key[0] == "T/0"}) == 4
    other = [Request(r.task_id, r.sample, r.seed + 1, r.prompt, r.stops) for r in wanted]
    assert dict(make(wanted)) == first
    assert {k: g.text for k, g in make(other)} != {k: g.text for k, g in first.items()}


def test_what_is_done_is_not_yielded_and_a_done_window_not_computed(tiny, monkeypatch):
    model, tokenizer = tiny
    generator = Generator(model, tokenizer, Sampling(1.0), 10, 4)
    wanted = requests(4)  # 24 completions, windows of 8
    whole = list(generator.generate(wanted))
    read = []
    inner = generator._read
    monkeypatch.setattr(generator, "_read", lambda ids: read.append(ids) or inner(ids))
    keys = [key for key, _ in whole]
    done, repeated = keys[:11], {}
    rest = dict(generator.generate(wanted, done, repeated.__setitem__))
    assert rest == dict(whole[11:]) and repeated == dict(whole[8:11])
    assert len(read) == 4  # two windows of two prompts each, of six prompts
    assert dict(generator.generate(wanted, keys)) == {}


def test_half_precision_is_the_same_bits_when_windows_are_repeated():
    cfg = ModelConfig(name="shape:tiny", dtype="bfloat16", attention="sdpa")
    model, tokenizer = load_model(cfg), load_tokenizer(cfg)
    generator = Generator(model, tokenizer, Sampling(0.9), 16, 3)
    wanted = requests(5)
    whole = list(generator.generate(wanted))
    for count in (1, 5, 13, 29):
        done = [key for key, _ in whole[:count]]
        again = []
        rest = list(generator.generate(wanted, done, lambda *made, to=again: to.append(made)))
        assert rest == whole[count:] and set(again) <= set(whole[:count])


def test_prompts_are_not_cut_and_the_context_limits_new_tokens(caplog):
    model = tiny_model(
        max_position_embeddings=20, vocab_size=384, pad_token_id=258, bos_token_id=256
    )
    tokenizer = load_tokenizer(ModelConfig(name="shape:tiny"))
    generator = Generator(model, tokenizer, max_new_tokens=16)
    assert context_of(model.config) == 20
    made = dict(generator.generate(requests(1, ["a" * 14, "b" * 3], ())))
    assert made["T/0", 0].new_tokens == 6 and made["T/0", 0].finish == "length"
    assert made["T/1", 0].new_tokens == 16
    assert "1 of 2 tasks get fewer than 16 new tokens" in caplog.text
    with pytest.raises(DataError, match="T/1: the prompt has 20 tokens, the model's context 20"):
        next(generator.generate(requests(1, ["a", "b" * 20], ())))
    with pytest.raises(DataError, match="T/0: the prompt has no tokens"):
        next(generator.generate(requests(1, [""], ())))


def test_a_model_of_another_kind_is_refused():
    tokenizer = load_tokenizer(ModelConfig(name="shape:tiny"))
    model = tiny_model()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        Generator(model, tokenizer)
    model.config.layer_types, model.config.sliding_window = ["sliding_attention"] * 2, 8
    with pytest.raises(ModelError, match="attends to 8 tokens"):
        next(Generator(model, tokenizer).generate(requests()))


def test_ends_and_limits(tiny):
    model, tokenizer = tiny
    assert end_tokens(tokenizer, model.generation_config) == (256, 257, 258)
    for bad in ({"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="0"):
            Generator(model, tokenizer, **bad)
