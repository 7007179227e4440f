"""Frozen linear layers whose products are not torch's: same state, same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flex import loss_head
from flex.config import LoraSection
from flex.kernels import gemm_native, products
from flex.kernels.budget import budget_used
from flex.model import linear
from flex.model.adapters import add_adapters
from tests.flex.test_quantised import bnb, fill, quantised
from tests.tiny import VOCAB, tiny_model

SECTION = LoraSection(r=4, alpha=6, dropout=0.0, targets=("gate_proj", "down_proj"))
IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(4))
PLAIN_LAYERS = 5  # of a layer, without an adapter: q, k, v, o, up


@pytest.fixture
def no_units(monkeypatch):
    monkeypatch.setattr(products, "_has_units", lambda dtype: False)


def adapted(model: nn.Module) -> nn.Module:
    found = add_adapters(model, SECTION, seed=0)
    fill(found)
    return found


def logits_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.float().logsumexp(-1).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [logits.detach(), *grads]


def test_numbers_and_names_stay_and_no_16_bit_product_is_torchs(no_units, monkeypatch):
    model = adapted(tiny_model().bfloat16())
    exact = logits_and_gradients(adapted(tiny_model().bfloat16().double()))
    with monkeypatch.context() as m:
        m.setattr(products, "_has_units", lambda dtype: True)
        m.setattr(products, "in_c", lambda a, b: False)
        m.setattr(products, "are_ours", lambda x: False)
        plain, names = logits_and_gradients(model), list(model.state_dict())
        assert linear.install(model) == 0
    layers = model.config.num_hidden_layers
    assert linear.install(model) == PLAIN_LAYERS * layers + 1  # and the head
    assert linear.install(model) == 0
    assert list(model.state_dict()) == names
    with Seen() as seen:
        found = logits_and_gradients(model)
    assert not seen.narrow
    for got, yardstick, truth in zip(found, plain, exact, strict=True):
        assert budget_used(got, yardstick, truth) <= 1


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Which products of 16-bit tensors torch computed itself."""

    NAMES = (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::linear",
        "aten::matmul",
    )

    def __enter__(self):
        self.narrow: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if func.name().partition(".")[0] in self.NAMES and tensors[-1].dtype == torch.bfloat16:
            self.narrow.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_torchs_products():
    with Seen() as seen:
        logits_and_gradients(adapted(tiny_model().bfloat16()))
    assert len(seen.narrow) > 10


def test_the_head_of_large_losses_keeps_its_place(no_units):
    model = adapted(tiny_model().bfloat16())
    loss_head.install(model)
    assert linear.install(model) == PLAIN_LAYERS * model.config.num_hidden_layers
    assert loss_head.find(model) is not None
    with Seen() as seen:
        model(input_ids=IDS)
    assert not seen.narrow


def test_four_bit_layers_without_an_adapter(no_units, monkeypatch):
    model = adapted(quantised("4bit", torch.bfloat16, torch.bfloat16))
    with monkeypatch.context() as m:
        m.setattr(products, "_has_units", lambda dtype: True)
        plain = logits_and_gradients(model)
    assert linear.install(model) == PLAIN_LAYERS * model.config.num_hidden_layers + 1
    with Seen() as seen:
        found = logits_and_gradients(model)
    assert not seen.narrow
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) > 0
    for got, yardstick in zip(found, plain, strict=True):
        assert (got - yardstick).norm() <= 0.02 * yardstick.norm()  # both are rounded to 8 bits


def test_a_trained_layer_gets_its_gradient(no_units):
    layer = nn.Sequential(nn.Linear(5, 3)).bfloat16()
    assert linear.install(layer) == 0  # it does not say what dtype it is in
    ours = linear.FrozenLinear(5, 3).bfloat16()
    ours(torch.ones(6, 5).bfloat16()).sum().backward()
    assert ours.weight.grad is not None


def test_frozen_layers_go_to_our_products_where_those_are_faster(monkeypatch):
    if gemm_native.compiled() is None:
        pytest.skip("needs AVX-512 bf16 dot products and a compiler")
    monkeypatch.setattr(gemm_native, "has_bf16_dots_alone", lambda: True)
    monkeypatch.setattr(gemm_native, "LEAST", 8)
    exact = logits_and_gradients(adapted(tiny_model().bfloat16().double()))
    model = adapted(tiny_model().bfloat16())
    with monkeypatch.context() as m:
        m.setattr(products, "in_c", lambda a, b: False)
        plain = logits_and_gradients(model)
    assert linear.install(model) == PLAIN_LAYERS * model.config.num_hidden_layers + 1
    calls, multiply = [], gemm_native.multiply
    monkeypatch.setattr(
        gemm_native, "multiply", lambda *a, **k: calls.append(1) or multiply(*a, **k)
    )
    found = logits_and_gradients(model)
    assert len(calls) >= 2 * PLAIN_LAYERS
    with (
        monkeypatch.context() as m
    ):  # a decoding step's few rows are read past, not through, our Function
        m.setattr(gemm_native, "LEAST", 23)
        m.setattr(linear, "frozen_linear", None)
        model(input_ids=IDS)
    for got, yardstick, truth in zip(found, plain, exact, strict=True):
        assert budget_used(got, yardstick, truth) <= 1
