"""Adapters on a base in bitsandbytes' 4 or 8 bits: PEFT's numbers, names and files, by our kernel."""

import subprocess
import sys
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from flex.config import LoraSection
from flex.errors import ModelError
from flex.evals.subject import Subject
from flex.fuse import fuse_adapters, unfuse_adapters
from flex.model import adapters
from flex.model.adapters import (
    FALLBACKS,
    FusedLora,
    adapter_parameters,
    add_adapters,
    factor_pairs,
    why_not_fused,
)
from flex.model.export import merge, save_adapter
from tests.flex.saved import load, make_base
from tests.oracle import assert_within_budget
from tests.tiny import VOCAB, tiny_model

bnb = pytest.importorskip("bitsandbytes")

TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SECTION = LoraSection(r=4, alpha=6, dropout=0.0, targets=TARGETS)
IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(4))
KINDS = ["4bit", "8bit"]
CLASSES = {"4bit": "FlexLoraLinear4bit", "8bit": "FlexLoraLinear8bitLt"}


@pytest.fixture(autouse=True)
def _fresh_count():
    FALLBACKS.clear()
    yield
    FALLBACKS.clear()


def quantised(kind, dtype=torch.float32, compute_dtype=None, **fields):
    """The tiny model, its layers' projections quantised. Rows hold whole blocks of 64, for
    bitsandbytes' own forward is wrong on some CPUs where they do not."""
    model = tiny_model(hidden_size=64, intermediate_size=128, **fields).to(dtype)
    return quantise(model, kind, compute_dtype)


def quantise(model, kind, compute_dtype=None):
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, packed(child, kind, compute_dtype))
    setattr(model, f"is_loaded_in_{kind}", True)  # as transformers marks it, for stock PEFT
    return model.requires_grad_(False)


def packed(linear, kind, compute_dtype):
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    if kind == "4bit":
        made = bnb.nn.Linear4bit(*shape, compute_dtype, True, "nf4")
    else:
        made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    if linear.bias is not None:
        made.bias.data = linear.bias.data.clone()
    return made.to("cpu")


def fill(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def ours(kind, dtype=torch.float32, section=SECTION, **fields):
    return fill(add_adapters(quantised(kind, dtype, **fields), section, seed=0))


def stock(kind, dtype=torch.float32, base=None, **fields):
    """A PEFT model that FLeX had no hand in."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return fill(get_peft_model(base or quantised(kind, dtype, **fields), config))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def learned(model):
    """The loss and the gradients of all adapters, in training mode: there bitsandbytes' 8-bit
    forward does not round its input on a CPU."""
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    adapted = adapter_parameters(model)
    return {"loss": loss.detach()} | dict(
        zip(adapted, torch.autograd.grad(loss, list(adapted.values())), strict=True)
    )


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), f"{name} is zero: it proves nothing"
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


# ---- adapters ----


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_a_quantised_base_are_ours(kind, monkeypatch):
    calls = []
    kernel = adapters.lora_linear
    monkeypatch.setattr(adapters, "lora_linear", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    model = ours(kind)
    found = layers(model)
    assert len(found) == 12 and {type(m).__name__ for m in found.values()} == {CLASSES[kind]}
    assert all(why_not_fused(m) is None for m in found.values())
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
        adapter_parameters(model)
    )
    pairs = factor_pairs(model)
    assert len(pairs) == 12 and {(a.shape[0], b.shape[1], s) for _, a, b, s in pairs} == {
        (4, 4, 1.5)
    }
    learned(model)
    assert len(calls) == 12 and not FALLBACKS


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_pefts(kind, bias):
    fields = {"attention_bias": bias, "mlp_bias": bias}
    found, expected = learned(ours(kind, **fields)), learned(stock(kind, **fields))
    assert_close(found, expected, 2e-5)
    assert not FALLBACKS


def test_in_bf16_they_are_as_near_as_pefts():
    """Of the 4-bit base's own weights, in fp64: both round in bf16, neither more than the other."""
    truth = dequantised(stock("4bit", torch.bfloat16)).double()
    reference = truth(input_ids=IDS).logits.detach()
    found, eager = logits(ours("4bit", torch.bfloat16)), logits(stock("4bit", torch.bfloat16))
    assert found.dtype == torch.bfloat16 and not torch.equal(found, eager)
    assert_within_budget(found, eager, reference, "logits")
    assert not FALLBACKS


def dequantised(model):
    """`model` with plain layers of the weights that its 4 bits stand for."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                plain = nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight.data = bnb.functional.dequantize_4bit(
                    child.weight.data, child.weight.quant_state
                ).float()
                setattr(parent, name, plain)
    return model


def test_it_computes_in_the_base_layers_dtype():
    """bnb_4bit_compute_dtype, which for transformers is float32 unless set."""
    model = ours("4bit", torch.bfloat16, compute_dtype=torch.float32)
    layer = next(iter(layers(model).values()))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, wide = layer(x), layer(x.float())
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())
    layer.base_layer.compute_dtype = None
    assert not torch.equal(layer(x), found) and not FALLBACKS


def test_dropout_and_checkpointing():
    section = SECTION.model_copy(update={"dropout": 0.2})
    results = []
    for checkpointing in (False, True):
        model = ours("4bit", torch.bfloat16, section)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        results.append(learned(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    assert not torch.equal(results[0]["loss"], learned(ours("4bit", torch.bfloat16))["loss"])


def test_the_weights_keep_their_layout_where_the_kernel_does_not_compute():
    """With the adapters disabled, bitsandbytes' own forward runs; in eval mode it may repack."""
    model = ours("4bit").eval()
    before = {n: m.base_layer.weight.data.clone() for n, m in layers(model).items()}
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)
    assert FALLBACKS == {"the adapters are disabled": 12}
    assert all(torch.equal(m.base_layer.weight, before[n]) for n, m in layers(model).items())
    assert torch.equal(logits(model), expected)


def test_an_evaluation_does_not_change_the_training_after_it():
    """k_proj has no adapter: bitsandbytes computes it, whose repacked product has no gradient."""
    model = ours("4bit")
    assert "k_proj" not in TARGETS
    before = learned(model)
    logits(model.eval())
    after = learned(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_repacked_weight_takes_pefts_path():
    model = ours("4bit")
    state = layers(model)["base_model.model.model.layers.0.mlp.up_proj"].base_layer.weight
    state.quant_state.packing_format_for_cpu = True
    assert [r.reason for r in fuse_adapters(model).rows if r.path == "peft"] == [
        "bitsandbytes' inference on the CPU has repacked the 4-bit weight"
    ]


def test_another_input_dtype_takes_pefts_path():
    layer = next(iter(layers(ours("8bit")).values()))
    assert layer.why_not_dtype(torch.ones(1, dtype=torch.float64)) is not None
    assert layer.why_not_dtype(torch.ones(1, dtype=torch.float16)) is None


def test_a_target_that_is_not_linear_is_still_refused():
    with pytest.raises(ModelError, match="names model.layers.0.mlp, a LlamaMLP"):
        add_adapters(quantised("4bit"), SECTION.model_copy(update={"targets": ("mlp",)}), seed=0)


# ---- fuse_adapters ----


@pytest.mark.parametrize("kind", KINDS)
def test_stock_qlora_is_fused_and_given_back(kind):
    expected = learned(stock(kind))
    model = stock(kind)
    originals = layers(model)
    flags = [getattr(m.base_layer, "support_avx512bf16_for_cpu", None) for m in originals.values()]
    before = learned(model)
    report = fuse_adapters(model, impl="torch")
    assert report.fused == len(report.rows) == 12
    assert {type(m).__name__ for m in layers(model).values()} == {CLASSES[kind]}
    assert_close(learned(model), expected, 2e-5)
    assert not FALLBACKS
    assert unfuse_adapters(model) == 12
    assert all(layer is originals[name] for name, layer in layers(model).items())
    assert flags == [
        getattr(m.base_layer, "support_avx512bf16_for_cpu", None) for m in originals.values()
    ]
    after = learned(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_ours_become_pefts_own_classes():
    model = ours("4bit")
    assert unfuse_adapters(model) == 12
    kinds = {f"{type(m).__module__}.{type(m).__name__}" for m in layers(model).values()}
    assert kinds == {"peft.tuners.lora.bnb.Linear4bit"}
    assert not any(isinstance(m, FusedLora) for m in model.modules())


# ---- files ----


def test_stock_peft_loads_what_was_trained_on_4_bits(tmp_path):
    model = ours("4bit").eval()
    folder = save_adapter(model, tmp_path / "adapter", "shape:tiny")
    loaded = PeftModel.from_pretrained(quantised("4bit"), str(folder)).eval()
    assert {type(m).__module__ for m in layers(loaded).values()} == {"peft.tuners.lora.bnb"}
    for module in loaded.modules():  # its scales would be rounded to bf16
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    found, expected = logits(loaded), logits(model)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    with loaded.disable_adapter():
        assert (logits(loaded) - expected).abs().max() > 0.01


def test_it_merges_into_the_full_precision_base(tmp_path):
    base = make_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    plain = load(base)
    model = fill(add_adapters(quantise(load(base), "4bit"), SECTION, seed=0))
    adapter = save_adapter(model, tmp_path / "adapter", str(base))
    report = merge(adapter, tmp_path / "merged")
    assert report.base == str(base) and report.difference < 1e-4
    merged = load(tmp_path / "merged")
    for name, a, b, scale in factor_pairs(model):
        name = name.removeprefix("base_model.model.") + ".weight"
        expected = plain.get_parameter(name) + scale * b @ a
        torch.testing.assert_close(merged.get_parameter(name), expected.detach())


# ---- code from the Hub ----

ASKED = """
import sys, types, importlib.machinery
asked = []
class Finder:  # Hugging Face's package, as if installed
    def find_spec(self, name, path=None, target=None):
        if name == "kernels":
            return importlib.machinery.ModuleSpec(name, self, origin="kernels/__init__.py")
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        module.get_kernel = lambda *a, **k: asked.append(a) or types.SimpleNamespace(
            gemm_4bit_forward=lambda *a: 1 / 0
        )
sys.meta_path.insert(0, Finder())
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", ASKED + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_flex_asks_the_hub_for_no_code():
    """bitsandbytes does at its import, on some CPUs, and PEFT imports it."""
    run(
        """
import flex.fuse
assert "bitsandbytes" in sys.modules and asked == [], asked
import kernels
assert kernels.get_kernel("x") and asked == [("x",)]  # others find it as before
from flex.model.hub_code import refuse
refuse()
"""
    )


def test_code_that_came_before_flex_is_refused(monkeypatch):
    backend = types.SimpleNamespace(gemm_4bit_forward_kernel=print)
    monkeypatch.setitem(sys.modules, "bitsandbytes.backends.cpu.ops", backend)
    with pytest.raises(ModelError, match="a compiled kernel from the Hub"):
        Subject(model="smollm2-135m", quantise="4bit")._base("float32")
