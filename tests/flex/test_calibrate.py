"""The walk that rounds a base layer by layer: what it calibrates each matrix on, and what it refuses."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flex import calibration_data, quantise
from flex.errors import ModelError
from flex.model.base import load_model
from flex.model.places import Quantised
from tests.mutants import load_copy

bnb = pytest.importorskip("bitsandbytes")

from flex import calibrate  # noqa: E402  # it imports bitsandbytes
from flex.model import nf4_store  # noqa: E402
from tests.flex.made_nf4 import Made, loaded  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


def sums_by_hand(made, batches, names):
    """H = X^T X and D = (Z - X)^T X of every named layer, example by example: Z is what it reads in the plain model,
    X what it reads in one whose matrices are rounded as far as they stand before the layer."""
    dense, model = (AutoModelForCausalLM.from_pretrained(made.base) for _ in range(2))
    found = {}
    order = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    examples = [e for batch in batches for e in split(batch)]
    for i in range(2):
        for group in order:
            wanted = [n for n in names if f"layers.{i}." in n and n.rpartition(".")[2] in group]
            z, x = (inputs_of(m, wanted[0], examples) for m in (dense, model))
            for name in wanted:
                found[name] = x.t() @ x, (z - x).t() @ x
                matrix = made.matrices[made.names.index(name)]
                model.get_submodule(name).weight.data = matrix.clone()
    return found


def inputs_of(model, name, examples):
    """What the layer reads, (positions, K) fp64."""
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda m, args: inputs.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for ids in examples:
            model(ids[None])
    handle.remove()
    return torch.cat(inputs).double()


def split(batch):
    if batch.cu_seqlens is not None:
        return batch.input_ids[0].split(batch.cu_seqlens.diff().tolist())
    return [row[real] for row, real in zip(batch.input_ids, batch.attention_mask, strict=True)]


def check_sums(made, module):
    """Of both layouts, whose padding must not count."""
    for batching in ("packed", "grouped"):
        cfg = made.config(f"data.batching={batching}")
        data, tokenizer = loaded(made, f"data.batching={batching}")
        batches = quantise.calibration_batches(data, cfg, tokenizer, 100_000)
        model = load_model(cfg.model)
        names = module.linear_layers(model)
        assert names == made.names
        seen, places = [], iter(made.matrices)

        drifts = []

        def summed(hessian, drift, drifts=drifts):
            drifts.append(drift.clone())
            return torch.full_like(drift, len(drifts))  # whose it is

        def given(weight, hessian, double_quant, dtype, shift, seen=seen, drifts=drifts):
            assert bool((shift == len(drifts)).all())
            seen.append((hessian.clone(), drifts[-1]))
            return nf4_store.round_matrix(weight, None, double_quant, dtype)

        # the very matrices of `made`, so that what comes after them is known
        def read(packed, state, places=places):
            return next(places).clone()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "shift_matrix", summed)
            patch.setattr(module, "round_matrix", given)
            patch.setattr(module, "read_back", read)
            module.round_model(model, batches, Quantised("cpu", "nf4", True, torch.float32), names)
        expected = sums_by_hand(made, batches, names)
        assert len(seen) == 14
        for name, (hessian, drift) in zip(names, seen, strict=True):
            wanted, drifted = expected[name]
            error = (hessian - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-5, (batching, name, float(error))
            # the difference of two rounded numbers: as exact as they are
            error = (drift - drifted).abs().max() / wanted.abs().max()
            assert error < 1e-6, (batching, name, float(error))
            first = name.startswith("model.layers.0.self_attn.") and "o_proj" not in name
            assert bool(drift.any()) != first, name


def test_sums_are_of_the_rounded_prefix_and_of_no_padding(made):
    check_sums(made, calibrate)


BUGS = {
    "padding counts": ("rows = rows[real.flatten()]", "pass"),
    "the dense layer goes on": (
        "linear.weight = nn.Parameter(dense, requires_grad=False)",
        "del dense",
    ),
    "the hidden states stay": (
        "batch.rounded.advance(layer)",
        "batch.rounded.through(layer)",
    ),
    "the dense hidden states stay": (
        "batch.dense.advance(reference)",
        "batch.dense.through(reference)",
    ),
    "the dense copy is rounded too": ("reference = copy.deepcopy(layer)", "reference = layer"),
    "only the last batch counts": (
        "hessian += (x.t() @ x).double()",
        "hessian.copy_((x.t() @ x).double())",
    ),
    "only the last batch drifts": (
        "drift += ((z - x)",
        "drift[:] = ((z - x)",
    ),
    "the drift's sign": ("(z - x).t()", "(x - z).t()"),
    "the drift is read from the dense inputs": ("(z - x).t() @ x", "(z - x).t() @ z"),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_seeded_bug_is_seen(made, bug, tmp_path):
    with pytest.raises(AssertionError):
        check_sums(made, load_copy(tmp_path, calibrate, *bug))


def test_the_streams_do_not_meet_in_what_layers_share():
    """Some models hand all layers one dict, in which a layer leaves keys and values for later ones."""
    shared, mask = {"layer": 0}, torch.ones(1)
    calls = [
        calibration_data.Call((shared,), {"mask": mask, "shared": shared}, True) for _ in range(2)
    ]
    one, other = (calibration_data._with_own_mappings(calls) for _ in range(2))
    assert one[0].args[0] is one[0].kwargs["shared"] is one[1].kwargs["shared"]
    assert one[0].args[0] == shared and one[0].kwargs["mask"] is mask
    assert len({id(shared), id(one[0].args[0]), id(other[0].args[0])}) == 3


class Routed(torch.nn.Module):
    """Its linear layer reads the positions whose first entry is positive."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, hidden):
        rows = hidden.flatten(0, 1)
        self.linear(rows[rows[:, 0] > 0])
        return hidden


def test_rows_that_are_not_the_positions_do_not_drift():
    """Of 12 positions 10 are real; the dense stream happens to route 10, the rounded one 9."""
    dense = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).abs()
    dense[1, 4:, 0] = -1
    rounded = dense.clone()
    rounded[0, 0, 0] = -1
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    call = calibration_data.Call((), {}, True)
    streams = (calibration_data.Stream(hidden, [call]) for hidden in (rounded, dense))
    batch = calibration_data.Recorded(*streams, real)
    hessian, drift = calibrate._sums(Routed(), Routed(), "linear", [batch], once=False)
    x = rounded.flatten(0, 1)
    x = x[x[:, 0] > 0].double()
    assert len(x) == 9 and not drift.any()
    torch.testing.assert_close(hessian, x.t() @ x, rtol=1e-6, atol=1e-6)


def walk(made, change, dtype=torch.float32):
    """Round the tiny base after `change`."""
    data, tokenizer = loaded(made)
    batches = quantise.calibration_batches(data, made.config(), tokenizer, 500)
    model = load_model(made.config().model)
    with torch.no_grad():
        change(model)
    names = calibrate.linear_layers(model)
    calibrate.round_model(model, batches, Quantised("cpu", "nf4", True, dtype), names)
    return model


def test_a_layer_that_reads_zeros_is_rounded_to_nearest(made, caplog):
    model = walk(made, lambda m: m.model.layers[1].input_layernorm.weight.zero_())
    told = [r.message for r in caplog.records if "rounded to nearest" in r.message]
    assert [line.split()[0] for line in told] == [
        f"model.layers.1.self_attn.{n}_proj" for n in "qkv"
    ]
    dense = load_model(made.config().model).model.layers[1].self_attn.q_proj.weight
    layer = model.model.layers[1].self_attn.q_proj
    expected, state = bnb.functional.quantize_4bit(
        dense, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(layer.weight.data, expected)
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(made, value):
    def spoil_weight(model):
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value

    def spoil_inputs(model):
        model.model.layers[1].post_attention_layernorm.weight[7] = value

    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight is not finite"):
        walk(made, spoil_weight)
    with pytest.raises(ModelError, match=r"inputs of model.layers.1.mlp.gate_proj are not finite"):
        walk(made, spoil_inputs)


def test_a_model_whose_layers_do_not_follow_one_another(made):
    def between(model):
        model.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0].clone(),))

    with pytest.raises(ModelError, match="layer 1 of LlamaForCausalLM does not read the output"):
        walk(made, between)
