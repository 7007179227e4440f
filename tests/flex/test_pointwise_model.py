"""Our stand-ins for RMSNorm and MLP: same state, same numbers, only where they are known to be Llama's."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM

from flex.kernels import native_build
from flex.kernels.budget import budget_used
from flex.kernels.pointwise import native
from flex.model import pointwise
from tests.flex.made_families import FAMILIES, SMALL, made

IDS = torch.arange(2 * 19).view(2, 19) % 97


def logits_and_gradient(model: nn.Module) -> list[torch.Tensor]:
    """Logits, and the gradient of the embeddings' output, which passes every norm and MLP."""
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=x).logits
    logits.float().logsumexp(-1).sum().backward()
    return [logits.detach(), x.grad]


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_stay_within_the_budget_of_the_familys_own(family):
    model = made(family)
    exact = logits_and_gradient(made(family).double())
    eager = logits_and_gradient(model)
    names, layers = list(model.state_dict()), SMALL["num_hidden_layers"]
    replaced = pointwise.install(model)
    norms = 2 * layers + 1 + (2 * layers if family == "qwen3" else 0)  # of queries and keys too
    assert sorted(replaced.values()) == sorted([norms, layers])
    assert list(model.state_dict()) == names
    for got, plain, truth in zip(logits_and_gradient(model), eager, exact, strict=True):
        assert not torch.equal(got, torch.zeros_like(got))
        assert budget_used(got, plain, truth) <= 1


def test_hooks_and_parameters_are_the_same_objects():
    model, seen = made("llama"), []
    norm = model.model.norm
    norm.register_forward_hook(lambda *_: seen.append(1))
    pointwise.install(model)
    assert model.model.norm is not norm and model.model.norm.weight is norm.weight
    assert isinstance(model.model.norm, type(norm))
    model(IDS)
    assert seen == [1]
    assert not pointwise.install(model)  # nothing is replaced twice


def test_others_stay_as_they_are(monkeypatch, caplog):
    gemma = GemmaForCausalLM(GemmaConfig(**SMALL)).bfloat16()  # its norm multiplies by 1 + weight
    assert not pointwise.install(gemma)
    assert not pointwise.install(made("llama", torch.float32))
    replaced = pointwise.install(made("llama", hidden_act="gelu"))
    assert set(replaced) == {"LlamaRMSNorm"}
    monkeypatch.setattr(
        native_build, "compile_c", lambda *_: (_ for _ in ()).throw(OSError("none"))
    )
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "flex.kernels"):
            assert not pointwise.install(made("llama"))
        assert "C compiler" in caplog.text
    finally:
        native.library.cache_clear()


def test_a_loaded_model_has_them():
    from flex.config import ModelConfig
    from flex.model.base import load_model

    model = load_model(ModelConfig(name="shape:tiny", dtype="bfloat16"))
    assert type(model.model.norm).__name__ == "FlexLlamaRMSNorm"
    assert type(model.model.layers[0].mlp).__name__ == "FlexLlamaMLP"


def test_the_product_of_gate_and_up_is_not_kept_for_an_adapted_down_proj():
    from flex.config import LoraSection
    from flex.model.adapters import adapter_parameters, add_adapters

    results = []
    for marks in (False, True):
        model = made("llama")
        pointwise.install(model)
        targets = ("gate_proj", "up_proj", "down_proj")
        model = add_adapters(model, LoraSection(r=4, dropout=0.1, targets=targets), seed=0)
        parameters = adapter_parameters(model)
        for name, p in parameters.items():
            if "lora_B" in name:
                p.data.fill_(0.1)
        kept = {}
        with pytest.MonkeyPatch.context() as patch:
            if not marks:
                patch.setattr(pointwise, "remakable", lambda *_: None)
            torch.manual_seed(5)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.setdefault(t.data_ptr(), t), lambda t: t
            ):
                logits = model(input_ids=IDS).logits
        size = sum(t.numel() * t.element_size() for t in kept.values())
        gradients = torch.autograd.grad(logits.float().sum(), list(parameters.values()))
        results.append((size, gradients))
    (whole, plain), (less, again) = results
    layers, bf16 = SMALL["num_hidden_layers"], 2
    assert whole - less == layers * IDS.numel() * SMALL["intermediate_size"] * bf16
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
