"""Our stand-in for attention: same state, same numbers over packed documents, the family's own in every other call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flex.kernels.budget import budget_used
from flex.kernels.causal_attention import native
from flex.model import attention, rotary
from tests.flex import made_families

LENGTHS = (19, 1, 30)
IDS = torch.arange(50)[None] % 97
needs_c = pytest.mark.skipif(
    native.compiled() is None, reason="needs a processor with AVX-512 bf16 dot products"
)


@pytest.fixture(autouse=True)
def _also_beside_amx(monkeypatch):
    monkeypatch.setattr(native, "library", native.compiled)


def made(family: str, **options) -> nn.Module:
    """With our attention, and heads as wide as the C functions turn."""
    attention.register()
    found = made_families.made(family, head_dim=32, **options)
    found.set_attn_implementation(attention.NAME)
    return found


def packed() -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {"position_ids": positions, "cu_seqlens": ends}


def logits_and_gradient(model: nn.Module) -> list[torch.Tensor]:
    """Logits, and the gradient of the embeddings' output, which passes every query, key and value."""
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=x, **packed()).logits
    logits.float().logsumexp(-1).sum().backward()
    return [logits.detach(), x.grad]


@needs_c
@pytest.mark.parametrize("family", rotary.FAMILIES)
def test_numbers_stay_within_the_budget_of_the_familys_own(family, monkeypatch):
    model = made(family, sliding_window=64) if family == "mistral" else made(family)
    exact = logits_and_gradient(made(family).double())
    with monkeypatch.context() as without:
        without.setattr(native, "library", lambda: None)
        eager = logits_and_gradient(model)
    names = list(model.state_dict())
    replaced = rotary.install(model)
    assert list(replaced.values()) == [made_families.SMALL["num_hidden_layers"]]
    assert list(model.state_dict()) == names
    found = logits_and_gradient(model)
    for got, plain, truth in zip(found, eager, exact, strict=True):
        assert not torch.equal(got, plain)  # rounded elsewhere: ours did run
        assert budget_used(got, plain, truth) <= 1


@needs_c
def test_angles_follow_the_positions_of_each_document(monkeypatch):
    """A document alone gives what it gives behind others."""
    model = made("llama")
    rotary.install(model)
    with torch.no_grad():
        together = model(IDS, **packed()).logits[0, 20:]
        ends = torch.tensor([0, 30], dtype=torch.int32)
        position = torch.arange(30)[None]
        alone = model(IDS[:, 20:], position_ids=position, cu_seqlens=ends).logits[0]
    assert torch.equal(together, alone)


@needs_c
def test_padded_batches_and_generation_stay_the_familys_own():
    ours, plain = made("llama"), made("llama")
    rotary.install(ours)
    ids = IDS[:, :9].repeat(2, 1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    assert torch.equal(*(m(ids, attention_mask=mask).logits for m in (ours, plain)))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    assert torch.equal(*(m.generate(ids[:1], **options) for m in (ours, plain)))


@needs_c
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_shorter_than_a_document_is_refused(family):
    options = {"mistral": {}, "qwen2": {"use_sliding_window": True, "max_window_layers": 0}}
    model = made(family, sliding_window=16, **options[family])
    assert rotary.install(model)
    with pytest.raises(ValueError, match="sliding_window"):
        model(IDS, **packed())


@needs_c
def test_another_attention_is_left_to_the_family():
    model = made("llama")
    rotary.install(model)
    model.set_attn_implementation("eager")
    plain = made("llama")
    plain.set_attn_implementation("eager")
    assert torch.equal(*(m(IDS).logits for m in (model, plain)))


def test_others_stay_as_they_are(monkeypatch):
    assert not rotary.install(made("qwen3"))  # it has norms between projection and turn
    assert not rotary.install(made("llama").float())
    assert not rotary.install(nn.Module())
    monkeypatch.setattr(native, "library", lambda: None)
    assert not rotary.install(made("llama"))


@needs_c
def test_a_loaded_model_has_it():
    from flex.config import ModelConfig
    from flex.model.base import load_model

    model = load_model(ModelConfig(name="shape:tiny", dtype="bfloat16"))
    assert type(model.model.layers[0].self_attn).__name__ == "FlexLlamaAttention"
