"""The vLLM engine against a module of the same names: what it asks for, what it makes of the answer.
That vLLM itself answers so has not been tested here."""

import sys
import types
from types import SimpleNamespace

import pytest

from flex.errors import ConfigError
from flex.evals.generate import Request
from flex.evals.journal import Generated
from flex.evals.sampling import Sampling
from flex.evals.subject import Subject

ANSWERS = {"def a": "x = 1\n#rest", "def b": "y</s>", "def c": "zz"}


@pytest.fixture
def asked(monkeypatch):
    seen = {"params": [], "calls": []}

    class LLM:
        def __init__(self, **options):
            seen["options"] = options

        def generate(self, prompts, params, lora_request, use_tqdm):
            seen["calls"].append(len(prompts))
            seen["params"] += params
            out = []
            for prompt in prompts:
                text = bytes(prompt["prompt_token_ids"])
                out.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer(text))]))
            return out

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **fields: fields
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("flex.evals.vllm_engine.versions", lambda *names: {})
    return seen


def tokens(text):
    return Subject(model="shape:tiny").tokenizer()(text).input_ids


def answer(text):
    prompts = {bytes(tokens(prompt)): reply for prompt, reply in ANSWERS.items()}
    return tokens(prompts[text])


def test_completions_are_cut_and_named_as_by_the_other_engine(asked):
    from flex.evals.vllm_engine import VllmEngine

    engine = VllmEngine(Subject(model="shape:tiny"), Sampling(0.2, 0.95), 64, 8)
    requests = [Request(f"T/{p}", 0, 7, p, ("\n#",)) for p in ANSWERS]
    done = {("T/def c", 0): Generated(7, "zz", 2, "length")}
    found = dict(engine.generate(requests, done))
    assert found == {
        ("T/def a", 0): Generated(7, "x = 1", 11, "stop"),
        ("T/def b", 0): Generated(7, "y", 2, "eos"),
    }
    assert dict(engine.generate(requests[2:], {})) == {("T/def c", 0): done["T/def c", 0]}
    assert asked["calls"] == [2, 1]
    first = asked["params"][0]
    assert (first["temperature"], first["top_p"], first["seed"]) == (0.2, 0.95, 7)
    assert (first["max_tokens"], first["stop"]) == (64, ["\n#"])
    assert asked["options"]["trust_remote_code"] is False and asked["options"]["max_num_seqs"] == 8
    assert engine.describe()["name"] == "vllm"


def test_a_merged_subject_goes_through_a_folder(asked):
    from flex.evals.vllm_engine import VllmEngine

    with pytest.raises(ConfigError, match="--engine vllm with --merged"):
        VllmEngine(Subject(model="m", adapter="a", merged=True), Sampling(), 64, 8)
