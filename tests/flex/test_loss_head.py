"""The loss in blocks of target positions against the loss of all logits in one piece."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM

from flex import loss_head
from flex.errors import ModelError
from flex.kernels import products
from flex.optim.curvature import uniform_draws
from flex.step import target_loss
from tests.flex.test_step import Parts, config
from tests.tiny import VOCAB, tiny_model


@pytest.fixture
def blocks(monkeypatch):
    """Sets the rows of a block, for 8-byte logits over the tiny vocabulary."""
    return lambda rows: monkeypatch.setattr(loss_head, "BLOCK_BYTES", rows * VOCAB * 8)


def parts_and_batch(batching):
    parts = Parts(config(data={"batching": batching}))
    parts.model.double().train()
    with torch.no_grad():
        for name, p in parts.parameters.items():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return parts, parts.loader.micro_batches(0)[0]


def gradients(parts, batch, draws):
    parts.model.zero_grad()
    loss = target_loss(parts.model, batch, 0.37, draws)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in parts.parameters.items()}


@pytest.mark.parametrize("batching", ["packed", "grouped"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_blocks_equal_one_piece(blocks, batching, sampled, rows):
    parts, batch = parts_and_batch(batching)
    draws = None
    if sampled:
        draws = uniform_draws(0, 3, batch.example_ids.tolist(), batch.targets_per_example())
    loss, grads = gradients(parts, batch, draws)
    blocks(rows)
    assert (batch.num_targets > rows) == (rows < 10_000)
    ours, our_grads = gradients(parts, batch, draws)
    assert loss.item() > 1
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        assert grad.norm() > 0
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-9, atol=1e-12)


def test_no_more_logits_exist_than_a_block(blocks, monkeypatch):
    parts, batch = parts_and_batch("packed")
    blocks(5)
    seen = []
    mm = products.mm

    def counted(a, b, *rest, **options):
        if b.shape[1] == VOCAB:
            seen.append(len(a))
        return mm(a, b, *rest, **options)

    monkeypatch.setattr(products, "mm", counted)
    target_loss(parts.model, batch).backward()
    assert max(seen) == 5 and sum(seen) == batch.num_targets


def test_validation_keeps_no_gradient(blocks):
    parts, batch = parts_and_batch("packed")
    with torch.no_grad():
        whole = target_loss(parts.model, batch)
        blocks(4)
        loss = target_loss(parts.model, batch)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)


def test_a_training_run_is_the_same(blocks):
    reports = {}
    for rows in (10_000, 3):
        blocks(rows)
        parts = Parts(config("sophia"))
        reports[rows] = parts.run()
    for a, b in zip(*reports.values(), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)


def test_small_micro_batches_take_the_plain_path(monkeypatch):
    parts, batch = parts_and_batch("packed")
    monkeypatch.setattr(loss_head.LossHead, "asked", None)
    target_loss(parts.model, batch)


def peft(model, targets=("down_proj",)):
    return get_peft_model(model, LoraConfig(r=2, target_modules=list(targets)))


def test_parameters_stay_the_same_objects_and_names():
    model = peft(tiny_model())
    before = dict(model.named_parameters())
    ids = torch.arange(3, 13)[None]
    logits = model(input_ids=ids).logits
    loss_head.install(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(after[n] is p for n, p in before.items())
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert isinstance(copy.deepcopy(model).get_base_model().lm_head, loss_head.LossHead)


@pytest.mark.parametrize("case", ["scale", "adapter", "trained", "hooks"])
def test_what_cannot_be_cut_stays_whole(case, caplog):
    model = tiny_model()
    if case == "scale":
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB}
        model = GraniteForCausalLM(GraniteConfig(**small, **heads, logits_scaling=4.0))
    wrapped = peft(model, ("lm_head",) if case == "adapter" else ("down_proj",))
    if case == "trained":
        model.lm_head.weight.requires_grad_(True)
    if case == "hooks":
        model.lm_head.register_forward_hook(lambda *_: None)
    with caplog.at_level("INFO", "flex.loss_head"):
        loss_head.install(wrapped)
    assert loss_head.find(wrapped) is None
    assert "made in one piece" in caplog.text


def test_a_model_that_scales_in_secret_is_refused(blocks, monkeypatch):
    parts, batch = parts_and_batch("packed")
    blocks(4)
    forward = type(parts.model.get_base_model()).forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(type(parts.model.get_base_model()), "forward", scaled)
    with pytest.raises(ModelError, match="changes its logits"):
        target_loss(parts.model, batch)


def test_a_bias_is_added(blocks):
    linear = nn.Linear(8, VOCAB).double().requires_grad_(False)
    head = loss_head.LossHead.around(linear)
    hidden = torch.randn(1, 6, 8, dtype=torch.float64)
    labels = torch.arange(6)
    blocks(2)
    with head.asked(loss_head.Request(torch.ones(1, 6, dtype=torch.bool), labels, None, 1.0)):
        loss = head(hidden)[0, 0, 0]
    expected = nn.functional.cross_entropy(linear(hidden)[0], labels, reduction="sum")
    torch.testing.assert_close(loss.double(), expected)
