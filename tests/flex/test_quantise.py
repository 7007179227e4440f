"""`python -m flex quantise`: a base in NF4 that transformers loads by itself, and that trains here."""

import contextlib
import importlib
import io
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from flex import calibrate, commands, dry_run, quantise
from flex.config import LoraSection, ModelConfig
from flex.config_io import load_config
from flex.data.loader import load_data
from flex.errors import ConfigError, DataError, ModelError
from flex.evals.subject import Subject
from flex.kernels import products
from flex.model.adapters import FALLBACKS, FusedLora, adapter_parameters, add_adapters
from flex.model.base import is_quantised, load_model, load_tokenizer
from flex.model.export import merge, save_adapter
from flex.model.places import Quantised
from flex.plan import plan
from flex.plan_memory import frozen_bytes
from flex.step import target_loss
from tests.flex.saved import contents, make_base, siblings
from tests.mutants import load_copy
from tests.runs import ROOT, losses, run, run_well, write_rows

bnb = pytest.importorskip("bitsandbytes")

from flex.model import nf4_store  # noqa: E402  # it imports bitsandbytes

FIELDS = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}
PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(base, rows, *more):
    options = (
        f"model.name={base}",
        "model.dtype=float32",
        "data.name=jsonl",
        f"data.path={rows}",
        "train.batch_size=8",
        *more,
    )
    return load_config(None, list({o.partition("=")[0]: o for o in options}.values()))


class Made:
    """One run of the command: its folder, the matrices that it chose by name, and what it printed."""

    def __init__(self, root):
        self.base = make_base(root / "base", **FIELDS)
        self._give_biases_values()
        self.rows = write_rows(root / "rows.jsonl")
        self.out, printed = root / "nf4", io.StringIO()
        self.matrices, self.hessians = [], []
        own = calibrate.round_matrix

        def watched(weight, hessian, *rest):
            found = own(weight, hessian, *rest)
            self.matrices.append(nf4_store.read_back(found.packed, found.state).clone())
            self.hessians.append(hessian)
            return found

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(calibrate, "round_matrix", watched)
            assert quantise.quantise_command(self.config(), self.out, 100_000) == 0
        self.printed = printed.getvalue()
        # q, k and v read the same input, and so do gate and up: the order of the calls
        self.names = [
            f"model.layers.{i}.{'mlp' if place.partition('_')[0] in ('gate', 'up', 'down') else 'self_attn'}.{place}"
            for i in range(2)
            for place in PLACES
        ]

    def _give_biases_values(self):
        model = AutoModelForCausalLM.from_pretrained(self.base)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.data = torch.linspace(-0.1, 0.2, len(p))
        model.save_pretrained(self.base)

    def config(self, *more):
        return config(self.base, self.rows, *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


# ---- the folder ----


def test_stock_transformers_reads_exactly_those_matrices(made):
    model = AutoModelForCausalLM.from_pretrained(made.out)
    assert not any(type(m).__module__.startswith("flex.") for m in model.modules())
    found = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert sorted(found) == sorted(made.names) and len(made.matrices) == 14
    base = AutoModelForCausalLM.from_pretrained(made.base)
    for name, matrix in zip(made.names, made.matrices, strict=True):
        weight = found[name].weight
        stock = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert stock.dtype == torch.float32 and torch.equal(stock, matrix), name
        dense = base.get_submodule(name).weight
        assert 0 < (stock - dense).abs().max() < 0.5 * dense.abs().max(), name
    for name, p in base.named_parameters():
        if name.removesuffix(".weight") not in found:
            assert torch.equal(model.get_parameter(name), p), name
    text = "def f(x):\n    return x\n"
    tokens = [AutoTokenizer.from_pretrained(f)(text).input_ids for f in (made.out, made.base)]
    assert tokens[0] == tokens[1]
    logits = model.eval()(torch.tensor([tokens[0]])).logits
    assert torch.isfinite(logits).all()


def test_its_configuration_is_the_bases_and_how_it_was_quantised(made):
    mine, theirs = (json.loads((f / "config.json").read_text()) for f in (made.out, made.base))
    how = mine.pop("quantization_config")
    assert mine == theirs
    assert how["load_in_4bit"] and how["bnb_4bit_quant_type"] == "nf4"
    assert how["bnb_4bit_use_double_quant"] and how["llm_int8_skip_modules"] == ["lm_head"]
    card = (made.out / "README.md").read_text()
    assert "14 matrices" in card and "training split of `jsonl`" in card
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in made.out.iterdir())


def test_it_prints_what_three_models_make_of_the_validation_rows(made):
    data, tokenizer = loaded(made)
    batches = quantise.validation_batches(
        data.validation, made.config(), 0, 1, tokenizer.pad_token_id
    )
    expected = {}
    for name, section in {
        "dense": {"name": str(made.base)},
        "nearest": {"name": str(made.base), "quantise": "nf4"},
        "calibrated": {"name": str(made.out)},
    }.items():
        model = add_adapters(  # B is 0, and our layers compute
            load_model(ModelConfig(dtype="float32", **section)), LoraSection(targets=PLACES), 0
        )
        with torch.no_grad():
            sums = sum(target_loss(model, batch).item() for batch in batches)
        expected[name] = sums / sum(batch.num_targets for batch in batches)
    lines = {line.split("  ")[1]: line for line in made.printed.splitlines()[1:4]}
    for key, name in (("dense", "dense"), ("NF4, n", "nearest"), ("NF4, c", "calibrated")):
        line = next(line for start, line in lines.items() if start.startswith(key))
        assert f"{expected[name]:.4f}" in line, (line, expected)
    assert "validation loss before training, 5 rows:" in made.printed
    assert f"model.name={made.out}" in made.printed


def loaded(made, *more):
    tokenizer = load_tokenizer(ModelConfig(name=str(made.base)))
    return load_data(made.config(*more), tokenizer), tokenizer


@pytest.mark.parametrize("double", ["true", "false"])
def test_in_bf16_with_and_without_double_quantisation(made, tmp_path, double, caplog):
    caplog.set_level("INFO")
    cfg = made.config("model.dtype=bfloat16", f"model.double_quant={double}")
    quantise.quantise_command(cfg, tmp_path / "out", 1000)
    model = load_model(ModelConfig(name=str(tmp_path / "out")))
    assert is_quantised(model) and not is_quantised(load_model(cfg.model))
    layer = model.model.layers[1].mlp.down_proj
    assert layer.weight.quant_state.nested == (double == "true")
    assert layer.compute_dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.bfloat16
    stored = load_file(tmp_path / "out/model.safetensors")
    kept = stored["model.layers.1.mlp.down_proj.weight.absmax"].dtype
    assert kept == (torch.uint8 if double == "true" else torch.float32)
    lines = [r.message for r in caplog.records if r.name == "flex.calibrate"]
    assert [line.split(" | ")[0] for line in lines] == ["layer 1/2", "layer 2/2"]
    for line in lines:
        shares = line.split(" | ")[1].partition(": ")[2].split(", ")
        assert [share.split()[0] for share in shares] == list(PLACES) and "eta " in line
        assert all(float(share.split()[1]) < 0.7 for share in shares), line


def test_on_a_processor_without_16_bit_products(made, tmp_path, monkeypatch):
    """There our own linear layers stand in the place of torch's while the layers are rounded."""
    monkeypatch.setattr(products, "_has_units", lambda dtype: False)
    quantise.quantise_command(made.config("model.dtype=bfloat16"), tmp_path / "out", 500)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in stock.modules()) == 14


# ---- the data ----


def test_only_training_rows_are_calibrated_on(made, tmp_path):
    """Another validation split leaves the same bytes; another training row does not."""
    lines = made.rows.read_text().splitlines(keepends=True)
    written = {}
    for name, (train, validation) in {
        "first": (lines[:30], lines[30:]),
        "other validation": (lines[:30], lines[35:]),
        "other training": (lines[1:31], lines[30:]),
    }.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(train))
        (folder / "validation.jsonl").write_text("".join(validation))
        cfg = made.config(
            f"data.path={folder / 'train.jsonl'}",
            f"data.validation_path={folder / 'validation.jsonl'}",
        )
        quantise.quantise_command(cfg, folder / "out", 100_000)
        written[name] = (folder / "out/model.safetensors").read_bytes()
    assert written["first"] == written["other validation"] != written["other training"]


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_batches_are_the_first_epochs(made, batching):
    cfg = made.config(f"data.batching={batching}", "train.accumulation=2")
    data, tokenizer = loaded(made, f"data.batching={batching}")
    batches = quantise.calibration_batches(data, cfg, tokenizer, 100_000)
    seen = torch.cat([batch.example_ids for batch in batches]).tolist()
    assert sorted(seen) == list(range(32)) and len(batches) == 8  # 35 rows: 4 whole steps
    first = quantise.calibration_batches(data, cfg, tokenizer, 1)
    assert len(first) == 1 and torch.equal(first[0].input_ids, batches[0].input_ids)
    some = quantise.calibration_batches(data, cfg, tokenizer, 600)
    held = [batch.num_positions for batch in some]
    assert sum(held[:-1]) < 600 <= sum(held)


# ---- the walk ----


def hessians_by_hand(made, batches, names):
    """X^T X of every named layer in a plain model, example by example, whose matrices are rounded as far as they
    stand before the layer in the model."""
    model = AutoModelForCausalLM.from_pretrained(made.base)
    found = {}
    order = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    examples = [e for batch in batches for e in split(batch)]
    for i in range(2):
        for group in order:
            wanted = [n for n in names if f"layers.{i}." in n and n.rpartition(".")[2] in group]
            inputs = []
            module = model.get_submodule(wanted[0])
            handle = module.register_forward_pre_hook(
                lambda m, args, kept=inputs: kept.append(args[0].flatten(0, 1))
            )
            with torch.no_grad():
                for ids in examples:
                    model(ids[None])
            handle.remove()
            x = torch.cat(inputs).double()
            for name in wanted:
                found[name] = x.t() @ x
                matrix = made.matrices[made.names.index(name)]
                model.get_submodule(name).weight.data = matrix.clone()
    return found


def split(batch):
    if batch.cu_seqlens is not None:
        return batch.input_ids[0].split(batch.cu_seqlens.diff().tolist())
    return [row[real] for row, real in zip(batch.input_ids, batch.attention_mask, strict=True)]


def check_hessians(made, module):
    """Of both layouts, whose padding must not count."""
    for batching in ("packed", "grouped"):
        cfg = made.config(f"data.batching={batching}")
        data, tokenizer = loaded(made, f"data.batching={batching}")
        batches = quantise.calibration_batches(data, cfg, tokenizer, 100_000)
        model = load_model(cfg.model)
        names = module.linear_layers(model)
        assert names == made.names
        seen, places = [], iter(made.matrices)

        def given(weight, hessian, *rest, seen=seen):
            seen.append(hessian.clone())
            return nf4_store.round_matrix(weight, None, *rest)

        # the very matrices of `made`, so that what comes after them is known
        def read(packed, state, places=places):
            return next(places).clone()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "round_matrix", given)
            patch.setattr(module, "read_back", read)
            module.round_model(model, batches, Quantised("cpu", "nf4", True, torch.float32), names)
        expected = hessians_by_hand(made, batches, names)
        assert len(seen) == 14
        for name, hessian in zip(names, seen, strict=True):
            error = (hessian - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-5, (batching, name, float(error))


def test_hessians_are_of_the_rounded_prefix_and_of_no_padding(made):
    check_hessians(made, calibrate)


BUGS = {
    "padding counts": ("rows = rows[real.flatten()]", "pass"),
    "the dense layer goes on": (
        "linear.weight = nn.Parameter(dense, requires_grad=False)",
        "del dense",
    ),
    "the hidden states stay": ("batch.hidden = batch.through(layer)", "batch.through(layer)"),
    "only the last batch counts": (
        "total.add_((rows.t() @ rows).double())",
        "total.copy_((rows.t() @ rows).double())",
    ),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_seeded_bug_is_seen(made, bug, tmp_path):
    with pytest.raises(AssertionError):
        check_hessians(made, load_copy(tmp_path, calibrate, *bug))


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


# ---- what is not rounded, what is refused ----


def test_rows_that_hold_no_whole_blocks_stay_dense(tmp_path, made, caplog):
    base = make_base(tmp_path / "base", hidden_size=64, intermediate_size=96)
    quantise.quantise_command(config(base, made.rows), tmp_path / "out", 500)
    assert "2 linear layers stay dense, first model.layers.0.mlp.down_proj" in caplog.text
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in stock.model.layers:
        assert type(layer.mlp.down_proj) is torch.nn.Linear
        assert isinstance(layer.mlp.up_proj, bnb.nn.Linear4bit)
    dense = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(
        stock.model.layers[1].mlp.down_proj.weight, dense.model.layers[1].mlp.down_proj.weight
    )
    small = make_base(tmp_path / "small", hidden_size=32, intermediate_size=96)
    with pytest.raises(ModelError, match="no linear layer of LlamaForCausalLM can be rounded"):
        quantise.quantise_command(config(small, made.rows), tmp_path / "none", 500)


def test_a_model_without_decoder_layers_that_are_found(tmp_path, made, monkeypatch):
    fields = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 259, "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(**fields)).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made.base / name, tmp_path / "gpt2")
    monkeypatch.setattr(quantise, "measure", lambda *a: pytest.fail("work was done"))
    with pytest.raises(ModelError, match="GPT2LMHeadModel has 0 lists of 2 decoder layers"):
        quantise.quantise_command(
            config(tmp_path / "gpt2", made.rows, "model.attention=sdpa"), tmp_path / "out", 500
        )
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_overwritten(made, monkeypatch):
    before = contents(made.out)
    monkeypatch.setattr(quantise, "load_data", lambda *a: pytest.fail("work was done"))
    with pytest.raises(ModelError, match="nf4 exists and is not empty"):
        quantise.quantise_command(made.config(), made.out, 500)
    assert contents(made.out) == before


def test_what_cannot_be_quantised_is_refused(made, tmp_path):
    out = tmp_path / "new" / "out"
    for error, match, cfg, tokens in (
        (DataError, "gone.jsonl", made.config(f"data.path={tmp_path / 'gone.jsonl'}"), 500),
        (ModelError, "quantised already", config(made.out, made.rows), 500),
        (ConfigError, "model.quantise=nf4", made.config("model.quantise=nf4"), 500),
        (ConfigError, "model.dtype=float64", made.config("model.dtype=float64"), 500),
        (ConfigError, "--tokens is 0", made.config(), 0),
    ):
        with pytest.raises(error, match=match):
            quantise.quantise_command(cfg, out, tokens)
        assert not out.exists() and not list(tmp_path.rglob(".out*"))


def test_it_needs_bitsandbytes(made, tmp_path, monkeypatch):
    for name in ("flex.quantise", "flex.calibrate", "flex.model.nf4_store"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    fresh = importlib.import_module("flex.quantise")
    with pytest.raises(ModelError, match="needs bitsandbytes"):
        fresh.quantise_command(made.config(), tmp_path / "out", 500)


def test_a_failure_half_way_leaves_nothing(made, tmp_path, monkeypatch):
    own, calls = calibrate.round_matrix, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(calibrate, "round_matrix", fails)
    with pytest.raises(KeyboardInterrupt):
        quantise.quantise_command(made.config(), tmp_path / "out", 500)
    assert siblings(tmp_path / "out") == []


def test_the_command_line(made, tmp_path, capsys):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantise, "quantise_command", lambda *given: seen.append(given) or 0)
        patch.setattr("flex.train.set_up_logging", lambda: None)
        words = ["quantise", "--config", os.devnull, "--out", "new", f"model.name={made.base}"]
        assert commands.main(words) == 0
        assert commands.main([*words, "--tokens", "7"]) == 0
    assert [(str(out), tokens) for _, out, tokens in seen] == [("new", 131072), ("new", 7)]
    assert {cfg.model.name for cfg, _, _ in seen} == {str(made.base)}
    with pytest.raises(SystemExit):
        commands.main(["quantise", "--config", os.devnull])
    assert "--out" in capsys.readouterr().err


# ---- training on it ----


def test_two_steps_through_the_fused_layers(made):
    FALLBACKS.clear()
    section = ModelConfig(name=str(made.out), dtype="float32")
    targets = tuple(name for name in PLACES if name != "k_proj")  # which bitsandbytes computes
    model = add_adapters(load_model(section), LoraSection(r=4, dropout=0.0, targets=targets), 0)
    fused = [m for m in model.modules() if isinstance(m, FusedLora)]
    assert [type(m).__name__ for m in fused] == ["FlexLoraLinear4bit"] * 12
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    packed = [m.weight.data.clone() for m in layers]
    data, tokenizer = loaded(made)
    batch = quantise.calibration_batches(data, made.config(), tokenizer, 1)[0]
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    found = []
    for _ in range(3):
        model.train()
        loss = target_loss(model, batch, 1 / batch.num_targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        model.eval()
        with torch.no_grad():
            target_loss(model, batch)  # an evaluation between the steps changes nothing
    assert found[2] < found[1] < found[0] and not FALLBACKS
    assert len(layers) == 14
    assert all(torch.equal(m.weight, p) for m, p in zip(layers, packed, strict=True))


def options(made, folder, *more):
    return (
        *(f"model.name={made.out}", "model.dtype=float32", "data.name=jsonl"),
        *(f"data.path={made.rows}", f"dir={folder}", "name=run", "lora.r=4"),
        *("train.sample_prompt=false", "train.batch_size=8", "train.save_every=1", "train.steps=3"),
        *more,
    )


def test_a_run_on_it_resumes_exports_tests_itself_and_merges(made, tmp_path):
    run_well(*options(made, tmp_path))
    uncut = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    values = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    (tmp_path / "run/finished.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-000002")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000003")
    done = run(*options(made, tmp_path))
    assert done.returncode == 0 and "self-test: stock PEFT loads 12 tensors" in done.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == uncut
    assert losses(tmp_path / "run") == values and len(values) == 3
    adapter = tmp_path / "run/adapter"
    with pytest.raises(ModelError, match="nf4 is quantised") as error:
        merge(adapter, tmp_path / "merged")
    assert "--base" in error.value.fix and not (tmp_path / "merged").exists()
    assert merge(adapter, tmp_path / "merged", base=str(made.base)).difference < 1e-4


def test_an_adapter_on_it_is_evaluated(made, tmp_path):
    model = add_adapters(load_model(ModelConfig(name=str(made.out))), LoraSection(r=4), 0)
    adapter = save_adapter(model, tmp_path / "adapter", str(made.out))
    system = Subject(model=str(made.out), adapter=str(adapter), dtype="float32")
    assert is_quantised(system.load())


# ---- what is said of it before ----


def test_it_is_planned_as_what_it_is(made):
    cfg = made.config(f"model.name={made.out}", "model.dtype=bfloat16")
    job = plan(cfg)
    assert job.cfg.model.quantise == "nf4" and job.cfg.model.double_quant
    dense = plan(made.config("model.dtype=bfloat16"))
    weights = dense.model.linear_weights
    spared = 2 * weights - (weights / 2 + weights / 64 + 4 * weights / 64 / 256)
    assert frozen_bytes(dense) - frozen_bytes(job) == pytest.approx(spared)
    with pytest.raises(ConfigError, match=r"nf4 is quantised already \(nf4\)"):
        plan(made.config(f"model.name={made.out}", "model.quantise=int8"))
    with pytest.raises(ConfigError, match="a base in nf4 with ZeRO-3"):
        plan(made.config(f"model.name={made.out}", f"deepspeed={ROOT}/ds_configs/zero3.json"))


def test_what_another_library_quantised_is_not_planned(made, tmp_path):
    fields = json.loads((made.base / "config.json").read_text())
    for how, found in (
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
    ):
        text = json.dumps(fields | {"quantization_config": how})
        (tmp_path / "config.json").write_text(text)
        planned = plan(made.config(f"model.name={tmp_path}")).cfg.model
        assert planned.quantise == found and not planned.double_quant
    text = json.dumps(fields | {"quantization_config": {"quant_method": "gptq"}})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="is quantised by gptq"):
        plan(made.config(f"model.name={tmp_path}"))


def test_a_dry_run_says_what_the_run_would(made, tmp_path, capsys):
    given = [o for o in options(made, tmp_path / "runs") if not o.startswith("train.s")]
    assert dry_run.rehearse(load_config(None, given)) == 0
    assert "6 on gate_proj, up_proj, down_proj" in capsys.readouterr().out
    with pytest.raises(ModelError, match="quantised already"):
        dry_run.rehearse(load_config(None, [*given, "model.quantise=nf4"]))
    with pytest.raises(ModelError, match="quantised already") as error:
        load_model(ModelConfig(name=str(made.out), quantise="nf4"))
    assert "model.quantise=none and ZeRO stage 0-2" in error.value.fix
