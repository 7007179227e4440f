"""fuse_adapters on stock PEFT models: PEFT's numbers, names and files, by another forward."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import flex
from flex.config import LoraSection, ModelConfig
from flex.errors import ModelError
from flex.fuse import fuse_adapters, unfuse_adapters
from flex.model import adapters
from flex.model.adapters import FALLBACKS, FlexLoraLinear, add_adapters
from flex.model.base import load_model
from tests.flex.saved import contents
from tests.oracle import assert_within_budget, max_error
from tests.tiny import VOCAB, tiny_model

TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def _fresh_count():
    FALLBACKS.clear()
    yield
    FALLBACKS.clear()


def fill(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def stock(r=4, p=0.0, base=None, **fields):
    """A PEFT model that FLeX had no hand in, with adapters that matter."""
    fields = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"} | fields
    base = tiny_model() if base is None else base
    return fill(get_peft_model(base, LoraConfig(r=r, lora_alpha=6, lora_dropout=p, **fields)))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def reasons(report):
    return {row.reason for row in report.rows}


# ---- the Hugging Face Trainer ----


def trained(model, folder, checkpointing, steps=10):
    """Losses (steps,) of the stock Trainer with its default optimizer on a few repetitive rows."""
    ids = torch.randint(3, 250, (6, 4), generator=torch.Generator().manual_seed(1)).repeat(1, 6)
    rows = [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in ids]
    losses = []

    def loss_of(outputs, labels, num_items_in_batch=None):
        # the model's own would round an fp64 model's logits to fp32
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        losses.append(loss.detach().clone())
        return loss

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, compute_loss_func=loss_of).train()
    return torch.stack(losses)


def on_shape_tiny(r, p=0.0, dtype=torch.float32):
    """PEFT's own start: B is zero."""
    base = load_model(ModelConfig(name="shape:tiny", dtype="float32", attention="sdpa"))
    config = LoraConfig(r=r, lora_alpha=16, lora_dropout=p, target_modules=list(TARGETS))
    torch.manual_seed(0)
    return get_peft_model(base, config).to(dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("r", [8, 17])
def test_the_trainers_losses_are_those_of_plain_peft(r, checkpointing, tmp_path, monkeypatch):
    truth = trained(on_shape_tiny(r, dtype=torch.float64), tmp_path, checkpointing)
    plain = on_shape_tiny(r)
    eager = trained(plain, tmp_path, checkpointing)
    model = on_shape_tiny(r)
    originals = layers(model)
    before = logits(model)
    calls = []
    kernel = adapters.lora_linear
    monkeypatch.setattr(adapters, "lora_linear", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    report = flex.fuse_adapters(model)
    assert report.fused == len(report.rows) == len(originals) == 12
    found = trained(model, tmp_path, checkpointing)
    assert len(calls) == 10 * 12 * (2 if checkpointing else 1) and not FALLBACKS

    assert truth[-1] < truth[0] - 0.2, "it does not learn, so equal losses prove nothing"
    assert_within_budget(found, eager, truth, "losses")
    assert unfuse_adapters(model) == 12
    assert all(layer is originals[name] for name, layer in layers(model).items())
    assert not torch.equal(logits(model), before)  # the training stayed
    twin = on_shape_tiny(r)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(twin))


def test_it_trains_with_dropout_and_evaluates_as_peft_does(tmp_path):
    model = on_shape_tiny(8, p=0.2)
    fuse_adapters(model)
    losses = trained(model, tmp_path, checkpointing=True, steps=20)
    assert losses.isfinite().all() and losses[-1] < losses[0] - 0.2
    plain = on_shape_tiny(8, p=0.2).eval()
    plain.load_state_dict(model.state_dict())
    truth = copy.deepcopy(plain).double()
    assert_within_budget(logits(model.eval()), logits(plain), logits(truth), "logits")
    assert not torch.equal(logits(model.train()), logits(model))


# ---- one state, two objects ----


def test_nothing_but_the_class_changes():
    model = stock(p=0.1)
    names = [name for name, _ in model.named_modules()]
    modules = dict(model.named_modules())
    parameters, state = dict(model.named_parameters()), dict(model.state_dict())
    fuse_adapters(model)
    assert [name for name, _ in model.named_modules()] == names
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            assert type(module) is FlexLoraLinear and type(modules[name]) is Linear
            assert module.scaling is modules[name].scaling
        else:
            assert module is modules[name]
    after = dict(model.named_parameters())
    assert list(after) == list(parameters) and all(after[n] is p for n, p in parameters.items())
    assert list(model.state_dict()) == list(state)


def test_results_and_gradients_are_pefts_with_hooks_on_the_layer():
    model = stock(r=17)
    seen = []
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))

    def run():
        seen.clear()
        model.zero_grad()
        output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        assert seen == ["forward", "backward"]
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return {"logits": output.logits.detach()} | gradients

    plain = run()
    fuse_adapters(model)
    for name, value in run().items():
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-5)
    assert not FALLBACKS
    assert unfuse_adapters(model) == len(layers(model))
    for name, value in run().items():
        assert torch.equal(value, plain[name]), name


def test_what_one_object_is_told_both_know():
    model = stock(p=0.5)
    original = layers(model)
    fuse_adapters(model)
    model.train()
    assert all(layer.training for layer in original.values())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    fill(model)
    model.set_adapter("second")
    model.eval()
    fused = logits(model)
    unfuse_adapters(model)
    assert layers(model).keys() == original.keys()
    for name, layer in layers(model).items():
        assert layer is original[name] and not layer.training
        assert layer.active_adapters == ["second"]
        assert "flex_impl" not in vars(layer)
    torch.testing.assert_close(logits(model), fused, atol=1e-5, rtol=1e-5)


def test_twice_is_once():
    model = stock()
    first = fuse_adapters(model)
    objects = layers(model)
    assert fuse_adapters(model) == first
    assert all(layer is objects[name] for name, layer in layers(model).items())
    assert unfuse_adapters(model) == 12 and unfuse_adapters(model) == 0
    assert fuse_adapters(model) == first


def test_a_model_that_is_flex_already():
    model = fill(
        add_adapters(tiny_model(), LoraSection(r=4, alpha=6, dropout=0, targets=TARGETS), 0)
    )
    objects, before = layers(model), logits(model)
    assert fuse_adapters(model, impl="torch").fused == 12
    assert all(layer is objects[name] for name, layer in layers(model).items())
    assert {layer.flex_impl for layer in objects.values()} == {"torch"}
    assert unfuse_adapters(model) == 12
    assert {type(layer) for layer in layers(model).values()} == {Linear}
    plain = stock()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(plain))
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_a_copy_of_a_fused_model_stands_alone():
    model = stock()
    fuse_adapters(model)
    before = logits(model)
    twin = fill(copy.deepcopy(model), seed=9)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    assert unfuse_adapters(twin) == 12
    assert {type(layer) for layer in layers(twin).values()} == {Linear}
    assert {type(layer) for layer in layers(model).values()} == {FlexLoraLinear}
    unfuse_adapters(model)


def test_a_fused_model_is_freed():
    model = stock()
    fuse_adapters(model)
    watched = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in watched)


def test_a_layer_with_two_parents_is_replaced_in_both():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleList([nn.Linear(4, 4)])
            self.b = nn.ModuleDict({"again": self.a[0]})

        def forward(self, x):
            return self.b["again"](self.a[0](x))

    model = Tied()
    inner = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    layer = inner.base_model.model[0]
    model.a[0] = model.b["again"] = layer
    assert len(fuse_adapters(model).rows) == 1
    assert model.a[0] is model.b["again"] and type(model.a[0]) is FlexLoraLinear
    assert unfuse_adapters(model) == 1
    assert model.a[0] is layer and model.b["again"] is layer


# ---- PEFT's own operations afterwards ----


def test_saved_files_are_the_same_to_the_byte(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path / "plain")
    fuse_adapters(model)
    model.save_pretrained(tmp_path / "fused")
    plain, fused = contents(tmp_path / "plain"), contents(tmp_path / "fused")
    assert plain == fused and "adapter_model.safetensors" in plain
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "fused").eval()
    expected = logits(loaded)
    fuse_adapters(loaded)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_merging_and_unloading():
    expected = logits(stock().merge_and_unload())
    model = stock()
    fuse_adapters(model)
    model.merge_adapter()
    report = fuse_adapters(model)
    assert reasons(report) == {"the adapters are merged"} and report.fused == 0
    model.unmerge_adapter()
    assert fuse_adapters(model).fused == 12
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert not layers(merged)
    base = stock()
    fuse_adapters(base)
    assert torch.equal(logits(base.unload()), logits(tiny_model()))


# ---- the table ----


def two_active(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=list(TARGETS)))
    model.base_model.set_adapter(["default", "second"])


def up_proj(model):
    return model.base_model.model.model.layers[0].mlp.up_proj


def one_hooked(model):
    up_proj(model).base_layer.register_forward_hook(lambda *_: None)


def one_forward(model):
    base = up_proj(model).base_layer
    base.forward = base.forward


def own_forward(model):
    up_proj(model).forward = up_proj(model).forward


def compiled(model):
    up_proj(model)._compiled_call_impl = lambda *_: None


def trainable(model):
    up_proj(model).base_layer.weight.requires_grad_()


def other_dropout(model):
    up_proj(model).lora_dropout["default"] = nn.AlphaDropout(0.1).eval()


def narrow(model):
    base = up_proj(model).base_layer
    base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn), requires_grad=False)


def odd_a(model):
    up_proj(model).lora_A["default"] = nn.Sequential(nn.Linear(32, 4))


def off(model):
    model.base_model.disable_adapter_layers()


@pytest.mark.parametrize(
    ("change", "fields", "reason", "count"),
    [
        (None, {"use_dora": True}, "the adapter is a LoRA variant (DoRA or the like)", 12),
        (None, {"lora_bias": True}, "lora_B has a bias", 12),
        (two_active, {}, "not exactly one adapter is active", 12),
        (off, {}, "the adapters are disabled", 12),
        (trainable, {}, "the base layer is trainable", 1),
        (one_hooked, {}, "a sub-module has hooks or a forward of its own", 1),
        (one_forward, {}, "a sub-module has hooks or a forward of its own", 1),
        (own_forward, {}, "its forward is replaced (by accelerate's hooks, say)", 1),
        (compiled, {}, "it is compiled by itself: fuse first", 1),
        (other_dropout, {}, "lora_dropout is a AlphaDropout", 1),
        (odd_a, {}, "lora_A is a Sequential, lora_B a Linear", 1),
        (narrow, {}, "the base weight is torch.float8_e4m3fn", 1),
    ],
)
def test_a_layer_that_is_not_covered_is_in_the_table_with_its_reason(change, fields, reason, count):
    base = tiny_model(attention_bias=True, mlp_bias=True) if "lora_bias" in fields else None
    model = stock(base=base, **fields)
    if change is not None:
        change(model)
    runs = change not in (compiled, narrow, odd_a)
    expected = logits(model) if runs else None
    report = fuse_adapters(model)
    left = [row for row in report.rows if row.path == "peft"]
    assert {row.reason for row in left} == {reason} and len(left) == count
    assert report.fused == 12 - count and len(report.rows) == 12
    assert all(row.reason == "" for row in report.rows if row.path == "fused")
    assert reason in str(report)
    if runs:  # and what the table says happens
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        assert sum(FALLBACKS.values()) in (count, 0 if change is own_forward else count)
    unfuse_adapters(model)
    if runs:
        assert torch.equal(logits(model), expected)


class Mixed(nn.Module):
    """One of each kind that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.gpt2 = Conv1D(6, 6)
        self.linear = nn.Linear(6, 6)

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2).contiguous()
        return self.linear(self.gpt2(x))


def test_other_kinds_of_layers_stay_pefts():
    names = ["embedding", "conv", "gpt2", "linear"]
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=names))
    fill(model)
    ids = torch.arange(12).view(2, 6)
    expected = model(ids)
    report = fuse_adapters(model)
    found = {row.name.rpartition(".")[2]: (row.path, row.reason) for row in report.rows}
    assert found == {
        "embedding": ("peft", "it is PEFT's Embedding over a Embedding"),
        "conv": ("peft", "it is PEFT's Conv1d over a Conv1d"),
        "gpt2": ("peft", "the base layer is a Conv1D"),
        "linear": ("fused", ""),
    }
    torch.testing.assert_close(model(ids), expected)
    assert type(model.base_model.model.gpt2) is Linear  # it can never be fused: not replaced
    assert unfuse_adapters(model) == 1
    assert torch.equal(model(ids), expected)


def test_a_quantised_base_is_said_to_be_one():
    class GPTQLoraLinear(Linear):
        """As PEFT has one over layers of other libraries."""

    class QuantLinear(nn.Linear):
        pass

    net = nn.Sequential(QuantLinear(16, 16), nn.Linear(16, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"])
    config._register_custom_module({QuantLinear: GPTQLoraLinear, nn.Linear: Linear})
    report = fuse_adapters(get_peft_model(net, config))
    assert [row.path for row in report.rows] == ["peft", "fused"]
    assert report.rows[0].reason == "it is PEFT's GPTQLoraLinear over a QuantLinear, quantised"


def test_a_reason_that_passes_leaves_the_layer_fused():
    model = stock()
    two_active(model)
    assert fuse_adapters(model).fused == 0
    model.set_adapter("default")
    logits(model)
    assert not FALLBACKS and fuse_adapters(model).fused == 12


def test_zero_3s_hooks_do_not_matter():
    """It gathers what is read outside its module, too; see tests of whole runs under ZeRO-3."""

    def gather(*_):
        raise AssertionError("the sub-module was called")

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    model = stock()
    for module in (up_proj(model).base_layer, up_proj(model).lora_A["default"]):
        module.register_forward_pre_hook(gather)
    assert fuse_adapters(model).fused == 12
    logits(model)


def test_autocast_to_another_dtype_is_pefts():
    model = stock()
    expected = {}
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
        fuse_adapters(model)
        assert torch.equal(logits(model), expected)
    assert FALLBACKS
    assert all("autocast computes in" in r or "the input is" in r for r in FALLBACKS)


def test_the_table_in_print():
    model = stock()
    up_proj(model).base_layer.weight.requires_grad_()
    report = fuse_adapters(model)
    text = str(report)
    assert text.splitlines()[0] == "11 of 12 LoRA layers are fused (torch)"
    assert "base_model.model.model.layers.*.self_attn.q_proj  x 2  fused" in text
    (line,) = (line for line in text.splitlines() if "trainable" in line)
    assert "layers.*.mlp.up_proj" in line and "x 1" in line and "peft" in line
    assert report.__rich__().row_count == 7
    assert report.rows[0].name == "base_model.model.model.layers.0.self_attn.q_proj"


# ---- arguments ----


def test_impl_reaches_the_kernel(monkeypatch):
    seen = []
    kernel = adapters.lora_linear
    monkeypatch.setattr(
        adapters, "lora_linear", lambda *a, **k: seen.append(a[8]) or kernel(*a, **k)
    )
    model = stock()
    for impl in ("torch", "auto"):
        fuse_adapters(model, impl=impl)
        logits(model)
    assert seen == ["torch"] * 12 + ["auto"] * 12


def test_what_cannot_be_done_is_said_and_nothing_changes(monkeypatch):
    model = stock()
    with pytest.raises(ValueError, match="impl is fast; it must be one of auto, torch, triton"):
        fuse_adapters(model, impl="fast")
    monkeypatch.setattr("flex.kernels.runtime.interpreting", lambda: False)
    with pytest.raises(NotImplementedError, match="riton"):
        fuse_adapters(model, impl="triton")
    assert {type(layer) for layer in layers(model).values()} == {Linear}
    with pytest.raises(ModelError, match="holds no LoRA layer"):
        fuse_adapters(tiny_model())
    with pytest.raises(ModelError, match="holds no LoRA layer"):
        unfuse_adapters(tiny_model())
    with pytest.raises(ModelError, match="a LoRA layer itself"):
        fuse_adapters(up_proj(model))


def test_flex_offers_it_without_loading_torch():
    assert flex.fuse_adapters is fuse_adapters and flex.unfuse_adapters is unfuse_adapters
    code = "import sys, flex; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'fuse_everything'"):
        flex.fuse_everything  # noqa: B018


def test_under_torch_compile():
    model = fill(get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"])))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    fuse_adapters(model)
    assert max_error(torch.compile(model, backend="eager")(x), expected) < 1e-6
    assert not FALLBACKS
