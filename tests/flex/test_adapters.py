"""PEFT's adapters on our kernel: the same numbers as PEFT's own layers, and dropout that can be repeated."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from flex.config import LoraSection
from flex.errors import ModelError
from flex.kernels.lora_linear.reference import lora_linear_reference
from flex.model import adapters
from flex.model.adapters import (
    FALLBACKS,
    FlexLoraLinear,
    adapter_parameters,
    add_adapters,
    factor_pairs,
)
from tests.oracle import assert_within_budget
from tests.tiny import VOCAB, tiny_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
K, N = 24, 10


@pytest.fixture(autouse=True)
def _fresh_count():
    FALLBACKS.clear()
    yield
    FALLBACKS.clear()


def fill(model, seed=1, size=0.3):
    """Random numbers in every adapter tensor, B and DoRA's magnitudes included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(size * torch.randn(p.shape, generator=generator))
    return model


class Net(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.proj, self.other = nn.Linear(K, N, bias=bias), nn.Linear(N, K)

    def forward(self, x):
        return self.other(self.proj(x))


def layer_of(ours, *, bias=True, r=4, p=0.0, dtype=torch.float32, prepare=None, **fields):
    """One adapted linear layer, on our kernel or PEFT's own; otherwise the same to the bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net(bias).to(dtype)
    cfg = LoraConfig(r=r, lora_alpha=6, lora_dropout=p, target_modules=["proj"], **fields)
    if ours:
        cfg._register_custom_module({nn.Linear: FlexLoraLinear})
    model = fill(get_peft_model(net, cfg))
    if prepare is not None:
        prepare(model)
    layer = model.base_model.model.proj
    assert (type(layer) is FlexLoraLinear) is ours
    return layer


def draw(*shape, seed=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def results(layer, x, forward=None, **kwargs):
    """y, dx and the gradients of whatever is trainable, under a fixed random upstream gradient."""
    leaves = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    y = (forward or layer)(x, **kwargs)
    upstream = draw(*y.shape, seed=3, dtype=y.dtype).detach()
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream, allow_unused=True)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert value.any(), f"{name} is zero: it proves nothing"
            torch.testing.assert_close(
                *(found[name], value),
                atol=tolerance * max(1.0, float(value.abs().max())),
                rtol=0,
                msg=lambda text, name=name: f"{name}: {text}",
            )


# ---- the same numbers as PEFT ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [1, 8, 17])
def test_a_layer_computes_what_pefts_own_does(r, bias):
    x = draw(3, 7, K)
    ours, stock = (results(layer_of(own, r=r, bias=bias), x) for own in (True, False))
    assert ours.keys() >= {"y", "x", "lora_A.default.weight", "lora_B.default.weight"}
    assert_same(ours, stock, 1e-5)
    assert not FALLBACKS


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [1, 8, 17])
def test_a_model_computes_what_pefts_own_does(r, bias, monkeypatch):
    calls = []
    kernel = adapters.lora_linear
    monkeypatch.setattr(adapters, "lora_linear", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    overrides = {"attention_bias": bias, "mlp_bias": bias}
    lora = LoraSection(r=r, alpha=5.0, dropout=0.0, targets=ALL)
    ours = fill(add_adapters(tiny_model(**overrides), lora, seed=0))
    stock = get_peft_model(
        tiny_model(**overrides),
        LoraConfig(r=r, lora_alpha=5.0, target_modules=list(ALL), task_type="CAUSAL_LM"),
    )
    stock.load_state_dict(ours.state_dict())  # strict: every name is PEFT's
    ids = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(4))
    found = []
    for model in (ours, stock):
        output = model(input_ids=ids, labels=ids)
        parameters = adapter_parameters(model)
        gradients = torch.autograd.grad(output.loss, list(parameters.values()))
        found.append(
            {"logits": output.logits.detach()} | dict(zip(parameters, gradients, strict=True))
        )
    assert len(found[0]) == 1 + 2 * 2 * len(ALL)
    assert_same(*found, 1e-5)
    assert len(calls) == 2 * len(ALL) and not FALLBACKS
    assert not any(isinstance(m, FlexLoraLinear) for m in stock.modules())


def test_fp32_adapters_over_a_bf16_base():
    model = add_adapters(tiny_model(torch.bfloat16), LoraSection(targets=ALL), seed=0)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    fill(model).eval()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = draw(5, 32, dtype=torch.bfloat16)
    found = results(layer, x)
    name, a, b, scale = next(
        pair for pair in factor_pairs(model) if "layers.0.mlp.up_proj" in pair[0]
    )
    weight = layer.base_layer.weight
    assert weight.dtype == torch.bfloat16 and found["y"].dtype == torch.bfloat16
    assert found["lora_A.default.weight"].dtype == torch.float32

    def reference(dtype):
        tensors = [t.detach().to(dtype) for t in (x, a, b)]
        inputs = [t.requires_grad_() for t in tensors]
        y = lora_linear_reference(inputs[0], weight.detach().to(dtype), None, *inputs[1:], scale)
        upstream = draw(*y.shape, seed=3, dtype=torch.bfloat16).detach().to(dtype)
        return y.detach(), *torch.autograd.grad(y, inputs, upstream)

    names = ("y", "x", "lora_A.default.weight", "lora_B.default.weight")
    for key, eager, truth in zip(
        names, reference(torch.bfloat16), reference(torch.float64), strict=True
    ):
        assert_within_budget(found[key], eager, truth, key)


def test_adapters_are_fp32_over_any_base():
    model = add_adapters(tiny_model(torch.float64), LoraSection(), seed=0)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}


# ---- how adapters begin ----


def test_the_seed_alone_decides_a():
    lora = LoraSection(targets=ALL)
    torch.manual_seed(11)
    first = adapter_parameters(add_adapters(tiny_model(), lora, seed=3))
    torch.manual_seed(12)
    state = torch.get_rng_state()
    second = adapter_parameters(add_adapters(tiny_model(), lora, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    other = adapter_parameters(add_adapters(tiny_model(), lora, seed=4))
    half = adapter_parameters(add_adapters(tiny_model(torch.bfloat16), lora, seed=3))
    for name, p in first.items():
        assert torch.equal(second[name], p)
        if ".lora_A." in name:
            bound = p.shape[1] ** -0.5
            assert 0.9 * bound < p.abs().max() <= bound
            assert not torch.equal(other[name], p)
            # PEFT builds A in the base's dtype before it is widened
            assert torch.equal(half[name], p.bfloat16().float())
        else:
            assert not p.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_at_the_base_exactly(dtype):
    base, ids = tiny_model(dtype), torch.arange(3, 60)[None]
    logits = base(input_ids=ids).logits
    model = add_adapters(base, LoraSection(dropout=0.5, targets=ALL), seed=0)
    for mode in (model.train(), model.eval()):
        assert torch.equal(mode(input_ids=ids).logits, logits)
    assert not torch.equal(fill(model)(input_ids=ids).logits, logits)


def test_only_the_adapters_are_trained_and_the_log_says_how_many(caplog):
    caplog.set_level(logging.INFO, "flex.adapters")
    base = tiny_model()
    assert all(p.requires_grad for p in base.parameters())
    model = add_adapters(base, LoraSection(r=3, alpha=7.5, targets=("q_proj", "down_proj")), seed=0)
    parameters = adapter_parameters(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(parameters)
    count = 2 * (3 * (32 + 32) + 3 * (64 + 32))
    assert sum(p.numel() for p in parameters.values()) == count
    assert f"4 LoRA adapters of rank 3, scale 2.5: {count} trainable" in caplog.text
    assert [scale for *_, scale in factor_pairs(model)] == [2.5] * 4


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("up_proj", ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        ("1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_a_target_is_the_end_of_a_modules_name(target, expected):
    model = add_adapters(tiny_model(), LoraSection(targets=(target,)), seed=0)
    prefix = "base_model.model."
    assert [name for name, *_ in factor_pairs(model)] == [prefix + name for name in expected]


def test_parameters_and_pairs_are_the_models_own_in_the_order_of_names():
    model = add_adapters(
        tiny_model(), LoraSection(r=4, alpha=6.0, targets=("v_proj", "gate_proj")), 0
    )
    own = dict(model.named_parameters())
    parameters = adapter_parameters(model)
    assert list(parameters) == sorted(name for name in own if "lora_" in name)
    assert all(parameters[name] is own[name] for name in parameters)
    pairs = factor_pairs(model)
    assert [name for name, *_ in pairs] == sorted(
        f"base_model.model.model.layers.{i}.{part}"
        for i in (0, 1)
        for part in ("mlp.gate_proj", "self_attn.v_proj")
    )
    for name, a, b, scale in pairs:
        assert a is own[f"{name}.lora_A.default.weight"] and a.shape == (4, 32)
        assert b is own[f"{name}.lora_B.default.weight"] and b.shape[1] == 4
        assert scale == 1.5
    for p in parameters.values():
        p.requires_grad_(False)
    assert adapter_parameters(model) == {} and len(factor_pairs(model)) == 4


# ---- targets that are refused ----


@pytest.mark.parametrize(
    ("targets", "overrides", "what", "why", "fix"),
    [
        (
            ("q_proj", "gate_porj"),
            {},
            "'gate_porj' names no module",
            "linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
            "did you mean 'gate_proj'?",
        ),
        (("c_attn",), {}, "'c_attn' names no module", "linear layers are", "did you mean"),
        (("proj",), {}, "'proj' names no module", "linear layers are", "did you mean"),
        (("embed_tokens",), {}, "model.embed_tokens, a Embedding", "plain nn.Linear", "q_proj"),
        (("mlp",), {}, "model.layers.0.mlp, a LlamaMLP", "plain nn.Linear", "choose among"),
        (
            ("lm_head",),
            {"tie_word_embeddings": True},
            "'lm_head' shares its weight with the input embedding",
            "change the embedding too",
            "leave 'lm_head' out",
        ),
    ],
)
def test_targets_that_cannot_be_adapted(targets, overrides, what, why, fix):
    model = tiny_model(**overrides)
    with pytest.raises(ModelError) as error:
        add_adapters(model, LoraSection(targets=targets), seed=0)
    assert what in error.value.what and error.value.what.startswith("lora.targets: ")
    assert why in error.value.why
    assert fix in error.value.fix
    assert not any(isinstance(m, Linear) for m in model.modules())  # nothing was replaced


# ---- what the kernel does not cover ----


def second_adapter(model, targets=("proj",)):
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=list(targets)))
    fill(model, seed=5)


def both_active(model):
    second_adapter(model)
    model.base_model.set_adapter(["default", "second"])


def active_elsewhere(model):
    second_adapter(model, ["other"])
    model.set_adapter("second")


def trainable(name):
    return lambda model: getattr(model.base_model.model.proj.base_layer, name).requires_grad_(True)


class Odd(nn.Linear):
    """A subclass may compute something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def odd_base(model):
    model.base_model.model.proj.base_layer.__class__ = Odd


CASES = [
    ("the adapters are disabled", {"prepare": lambda m: m.base_model.disable_adapter_layers()}),
    ("the adapters are merged", {"prepare": lambda m: m.merge_adapter()}),
    ("the call has further arguments", {"call": {"adapter_names": ["default", "__base__"]}}),
    ("not exactly one adapter is active", {"prepare": both_active}),
    ("not exactly one adapter is active", {"prepare": active_elsewhere}),
    ("the adapter is a LoRA variant (DoRA or the like)", {"use_dora": True}),
    ("lora_B has a bias", {"lora_bias": True}),
    ("the base layer is a Odd", {"prepare": odd_base}),
    ("the base layer is trainable", {"prepare": trainable("weight")}),
    ("the base layer is trainable", {"prepare": trainable("bias")}),
    ("the input is torch.bfloat16, the base weight torch.float32", {"x": torch.bfloat16}),
]


@pytest.mark.parametrize(("reason", "case"), CASES)
def test_pefts_own_forward_takes_over_and_is_counted(reason, case, caplog):
    caplog.set_level(logging.WARNING, "flex.adapters")
    fields = dict(case)
    call, dtype = fields.pop("call", {}), fields.pop("x", torch.float32)
    x = draw(2, 5, K, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, stock = (layer_of(own, **fields).eval() for own in (True, False))
        found = results(ours, x, **call)
        assert dict(FALLBACKS) == {reason: 1}
        assert_same(found, results(stock, x, **call), 1e-6)
        ours(x, **call)
    assert dict(FALLBACKS) == {reason: 2}
    assert caplog.text.count(reason) == 1  # said once, counted always


def test_reasons_are_counted_apart():
    layer, x = layer_of(True), draw(2, K)
    layer.enable_adapters(False)
    layer(x)
    layer.enable_adapters(True)
    layer(x, adapter_names=None)  # nothing but None: the kernel
    layer.merge()
    for _ in range(3):
        layer(x)
    assert dict(FALLBACKS) == {"the adapters are disabled": 1, "the adapters are merged": 3}


def test_merging_and_back_leaves_the_numbers():
    layer, x = layer_of(True), draw(4, K)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert sum(FALLBACKS.values()) == 1


# ---- dropout ----


def seeded(layer, x, seed):
    torch.manual_seed(seed)
    return layer(x)


def test_dropout_is_a_function_of_torchs_seed():
    layer, x = layer_of(True, p=0.5).train(), draw(6, K)
    first = seeded(layer, x, 1)
    following = layer(x)
    assert torch.equal(seeded(layer, x, 1), first)
    assert torch.equal(layer(x), following)
    assert not torch.equal(following, first)
    assert not torch.equal(seeded(layer, x, 2), first)


def test_no_dropout_in_eval_mode_and_no_random_number_drawn():
    layer, plain, x = layer_of(True, p=0.5).eval(), layer_of(True).train(), draw(6, K)
    state = torch.get_rng_state()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(layer.train()(x), plain(x))


def test_the_mean_over_seeds_is_the_undropped_output():
    layer, x, draws = layer_of(True, p=0.4).train(), draw(3, K).detach(), 3000
    with torch.no_grad():
        y = torch.stack([seeded(layer, x, seed) for seed in range(draws)]).double()
        truth = layer.eval()(x).double()
    error, sigma = (y.mean(0) - truth).abs(), y.std(0) / draws**0.5
    assert (error < 5 * sigma).all()
    assert (sigma < 0.05 * truth.abs().mean()).all()  # a factor of 1 - p would show
    base = layer.base_layer(x)
    assert ((truth - base).abs().mean() > 20 * sigma.mean()).all()


def test_dropout_hides_inputs_from_the_adapter_only():
    """With A = B = 1 and x = 1 the adapter's part is the mask itself, times scale / (1 - p)."""
    layer = layer_of(True, r=N, p=0.25).train()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(torch.eye(N, K))
        b.copy_(torch.eye(N))
    x = torch.ones(4000, K)
    part = seeded(layer, x, 0) - layer.base_layer(x)
    whole = layer.scaling["default"] / 0.75
    kept = part > whole / 2
    torch.testing.assert_close(part, kept * whole, atol=1e-5, rtol=0)
    assert kept.float().mean() == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / kept.numel()) ** 0.5)


def test_recomputed_activations_see_the_same_mask():
    layer, x = layer_of(True, p=0.5).train(), draw(4, 9, K)
    forwards = []
    layer.register_forward_pre_hook(lambda *_: forwards.append(1))
    torch.manual_seed(6)
    plain = results(layer, x)
    assert len(forwards) == 1

    torch.manual_seed(6)
    again = results(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert len(forwards) == 3
    assert plain.keys() == again.keys() and len(plain) == 4
    for name, value in plain.items():
        assert torch.equal(again[name], value), name
    torch.manual_seed(7)
    assert not torch.equal(results(layer, x)["x"], plain["x"])
