"""The sample completion: greedy, without dropout, and training goes on as if it had not been."""

import pytest
import torch

from flex.config import LoraSection, ModelConfig
from flex.engine import Engine
from flex.model import attention
from flex.model.adapters import adapter_parameters, add_adapters
from flex.model.base import load_model
from flex.model.presets import EOS, byte_tokenizer
from flex.sample import NEW_TOKENS, prompt_length, sample_completion
from flex.state import IGNORE, Example
from tests.tiny import tiny_model

TOKENIZER = byte_tokenizer(256)
PROMPT, COMPLETION = "def f(x):\n", "    return x\n"


def example(prompt=PROMPT, completion=COMPLETION):
    """Labels are shifted: the last position of the prompt bears the first loss."""
    start, end = (TOKENIZER(text).input_ids for text in (prompt, completion))
    ids = torch.tensor([*start, *end, EOS])
    labels = torch.full_like(ids, IGNORE)
    labels[len(start) - 1 : -1] = ids[len(start) :]
    return Example(ids, labels, "test:1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "model"
    model = tiny_model(vocab_size=259, eos_token_id=EOS, initializer_range=0.3)
    # what a model card may ask for must not reach the sample
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, max_length=5)
    model.save_pretrained(path)
    return path


def build(folder, seed=1, **fields):
    cfg = ModelConfig(**{"name": str(folder), "dtype": "float32"} | fields)
    lora = LoraSection(r=4, dropout=0.5, targets=("q_proj", "up_proj", "down_proj"))
    model = add_adapters(load_model(cfg), lora, seed=0)
    generator = torch.Generator().manual_seed(seed)
    parameters = adapter_parameters(model)
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    model.train()
    return Engine(model, torch.optim.AdamW(parameters.values()), parameters, 1.0)


def greedy(model, prompt, steps=NEW_TOKENS):
    """One whole forward per token, no cache."""
    ids = prompt[None]
    model.eval()
    with torch.no_grad():
        for _ in range(steps):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
            if following.item() == EOS:
                break
    return ids[0, len(prompt) :]


def text(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("prompt", "completion"), [("a", "b"), (PROMPT, COMPLETION), ("long " * 20, "")]
)
def test_the_prompt_ends_before_the_first_token_that_bears_loss(prompt, completion):
    e = example(prompt, completion)
    length = prompt_length(e)
    assert length == len(prompt)
    assert text(e.input_ids[:length]) == prompt
    assert e.labels[length - 1] == e.input_ids[length]


def test_a_truncated_completion_and_a_full_loss():
    e = example()
    cut = Example(e.input_ids[:14], e.labels[:14].clone(), "test:1", truncated=True)
    cut.labels[-1] = IGNORE
    assert prompt_length(cut) == len(PROMPT)
    everywhere = torch.cat([e.input_ids[1:], torch.tensor([IGNORE])])
    assert prompt_length(Example(e.input_ids, everywhere, "test:1")) == 1


@pytest.mark.parametrize(
    "fields",
    [{}, {"attention": "sdpa"}, {"gradient_checkpointing": True}],
    ids=["packed", "sdpa", "checkpointing"],
)
def test_the_sample_is_greedy(folder, fields):
    engine = build(folder, **fields)
    model = engine.peft_model
    packs = model.config._attn_implementation == attention.NAME
    assert packs is ("attention" not in fields)
    assert model.generation_config.do_sample and model.generation_config.max_length == 5
    prompt, completion = sample_completion(engine, TOKENIZER, example())
    assert prompt == PROMPT
    ids = example().input_ids[: len(PROMPT)]
    expected = greedy(model, ids)
    assert len(expected) == NEW_TOKENS and len(set(expected.tolist())) > 5
    assert completion == text(expected)
    generated = model.generate(
        input_ids=ids[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    assert torch.equal(generated[0, len(ids) :], expected)
    model.disable_adapter_layers()
    assert completion != text(greedy(model, ids))  # the adapters took part


def test_training_goes_on_as_if_there_had_been_no_sample(folder):
    engines = [build(folder) for _ in range(2)]
    ids = example().input_ids[None]
    losses = []
    for engine, sampled in zip(engines, (False, True), strict=True):
        torch.manual_seed(3)
        if sampled:
            sample_completion(engine, TOKENIZER, example())
        modules = [m for m in engine.model.modules() if not m.training]
        assert not modules
        loss = engine.model(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        losses.append(loss.item())
        assert all(p.grad.any() for p in engine.parameters.values())
    assert losses[0] == losses[1]  # dropout's random numbers are the same
    for a, b in zip(*(e.parameters.values() for e in engines), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_completion_stops_at_eos(folder):
    """Without that the text would go on to NEW_TOKENS."""
    engine = build(folder)
    model, ids = engine.peft_model, example().input_ids[: len(PROMPT)]
    fifth = int(greedy(model, ids)[4])
    first = greedy(model, ids).tolist().index(fifth)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[[fifth, EOS]] = head[[EOS, fifth]]
    _, completion = sample_completion(engine, TOKENIZER, example())
    assert completion == text(greedy(model, ids)) and len(greedy(model, ids)) == first + 1
