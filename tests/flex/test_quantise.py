"""`python -m flex quantise`: a base in NF4 that transformers loads by itself, and that trains here."""

import importlib
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from flex import commands, dry_run, quantise
from flex.config import LoraSection, ModelConfig
from flex.config_io import load_config
from flex.errors import ConfigError, DataError, ModelError
from flex.evals.subject import Subject
from flex.kernels import products
from flex.model.adapters import FALLBACKS, FusedLora, adapter_parameters, add_adapters
from flex.model.base import is_quantised, load_model
from flex.model.export import merge, save_adapter
from flex.plan import plan
from flex.plan_memory import frozen_bytes
from flex.step import target_loss
from tests.flex.saved import contents, make_base, siblings
from tests.runs import ROOT, losses, run, run_well

bnb = pytest.importorskip("bitsandbytes")

from flex import calibrate  # noqa: E402  # it imports bitsandbytes
from tests.flex.made_nf4 import PLACES, Made, config, loaded  # noqa: E402


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
