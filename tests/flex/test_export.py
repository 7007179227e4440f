"""Adapters leave the trainer: stock PEFT reads them in a process without FLeX, and damage is found."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from flex.config import LoraSection
from flex.errors import ModelError
from flex.model import export
from flex.model.adapters import adapter_parameters, add_adapters
from flex.model.export import probe_logits, save_adapter, self_test
from tests.flex.saved import (
    IDS,
    MODELS,
    TARGETS,
    WEIGHTS,
    change_a_weight,
    contents,
    cut_rank,
    drop,
    load,
    make_base,
    rename,
    siblings,
    spoil,
    trained,
)

# ---- a process that does not know FLeX ----

STOCK = """
import json, sys, warnings
warnings.simplefilter("always")
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ids = torch.tensor([json.loads(sys.argv[1])])
for base, adapter, out in json.loads(sys.argv[2]):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        logits = {"base": plain(ids).logits}
        model = PeftModel.from_pretrained(plain, adapter)
        logits["adapted"] = model(ids).logits
        logits["auto"] = AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits
    said = [str(w.message) for w in said]
    assert not [s for s in said if "missing" in s or "unexpected" in s or "adapter" in s], said
    saved = load_file(adapter + "/adapter_model.safetensors")
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert saved.keys() == expected.keys(), saved.keys() ^ expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    save_file(logits, out)
assert not any(m == "flex" or m.startswith("flex.") for m in sys.modules)
"""


def test_stock_peft_reads_our_adapters_in_a_process_without_flex(bases, tmp_path):
    cases, ours = [], []
    for name, (_, targets) in MODELS.items():
        model = trained(bases[name], targets)
        path = save_adapter(model, tmp_path / name, str(bases[name]))
        cases.append([str(bases[name]), str(path), str(tmp_path / f"{name}.safetensors")])
        ours.append(probe_logits(model, IDS))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, json.dumps(IDS[0].tolist()), json.dumps(cases)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for (base, _, out), expected in zip(cases, ours, strict=True):
        found = load_file(out)
        assert (found["adapted"] - found["base"]).abs().max() > 0.01, base
        torch.testing.assert_close(found["adapted"], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["auto"], expected, atol=1e-5, rtol=1e-5)


# ---- saving ----


def test_an_adapter_is_pefts_files_and_a_card(adapter, model, base):
    assert sorted(contents(adapter)) == ["README.md", "adapter_config.json", WEIGHTS]
    saved = load_file(adapter / WEIGHTS)
    own = {name.replace(".default", ""): p for name, p in adapter_parameters(model).items()}
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], p) for name, p in own.items())
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.05)
    assert sorted(config["target_modules"]) == sorted(TARGETS)
    assert config["task_type"] == "CAUSAL_LM" and config["inference_mode"] is True


def test_saving_leaves_the_model_as_it_was(model, tmp_path):
    config = model.peft_config["default"]
    before = config.to_dict()
    path = save_adapter(model, tmp_path / "adapter", "owner/name")
    saved = json.loads((path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "owner/name" != before["base_model_name_or_path"]
    assert model.peft_config["default"] is config and config.to_dict() == before
    assert len(adapter_parameters(model)) == 16


@pytest.mark.parametrize(
    ("name", "base_model"),
    [("owner/name", "owner/name"), ("/somewhere/here", None), ("shape:tiny", None)],
)
def test_the_card_names_a_base_that_others_can_find(model, tmp_path, name, base_model):
    card = (save_adapter(model, tmp_path / "adapter", name) / "README.md").read_text()
    _, front, text = card.split("---\n")
    assert yaml.safe_load(front).get("base_model") == base_model
    assert f"base model: `{name}`" in text
    assert "rank 4, alpha 6" in text and "down_proj, q_proj, up_proj, v_proj" in text
    assert "No scores are stated" in text


def test_gathered_tensors_take_the_place_of_the_models_own(model, adapter, base, tmp_path):
    """Under ZeRO-3 the model's parameters are empty; the mapping alone is saved."""
    tensors = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    for p in adapter_parameters(model).values():
        p.data = p.data.new_empty(0)
    path = save_adapter(
        model, tmp_path / "gathered", str(base), {**tensors, "other": torch.ones(1)}
    )
    assert (path / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def without(tensors, name):
    del tensors[name]


def emptied(tensors, name):
    tensors[name] = tensors[name].new_empty(0)


def put(value):
    def change(tensors, name):
        tensors[name][1, 2] = value

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without, "missing"),
        (emptied, "empty"),
        (put(float("nan")), "not finite"),
        (put(float("-inf")), "not finite"),
    ],
)
def test_a_tensor_that_is_not_whole_is_refused_and_the_old_adapter_stays(
    model, adapter, base, change, problem
):
    before = contents(adapter)
    tensors = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    names = [list(tensors)[3], list(tensors)[9]]
    for name in names:
        change(tensors, name)
    with pytest.raises(ModelError) as error:
        save_adapter(model, adapter, str(base), tensors)
    assert error.value.what == f"2 of 16 adapter tensors are {problem}, first {names[0]}"
    assert "load without complaint and be wrong" in error.value.why
    assert "last good checkpoint" in error.value.fix
    assert contents(adapter) == before and siblings(adapter) == ["adapter"]


def test_the_models_own_tensors_are_checked_too(model, base, tmp_path):
    name, p = next(iter(adapter_parameters(model).items()))
    p.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=f"1 of 16 adapter tensors are not finite, first {name}"):
        save_adapter(model, tmp_path / "new" / "adapter", str(base))
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_replaced_whole(adapter, base):
    (adapter / "adapter_model.bin").write_bytes(b"older")
    (adapter / "notes").mkdir()
    (adapter / "notes" / "a.txt").write_text("older")
    other = trained(base, ("k_proj",), seed=7)
    assert save_adapter(other, adapter, str(base)) == adapter
    assert sorted(contents(adapter)) == ["README.md", "adapter_config.json", WEIGHTS]
    assert all("k_proj" in name for name in load_file(adapter / WEIGHTS))
    assert siblings(adapter) == ["adapter"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_adapter(model, adapter, monkeypatch, error):
    before, config = contents(adapter), model.peft_config["default"]
    save = PeftModel.save_pretrained

    def fail(self, folder, **kwargs):
        save(self, folder, **kwargs)  # the files are there, but not all of them
        assert siblings(adapter) != ["adapter"]
        raise error("stopped")

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    with pytest.raises(error, match="stopped"):
        save_adapter(model, adapter, "another/base")
    assert contents(adapter) == before and siblings(adapter) == ["adapter"]
    assert model.peft_config["default"] is config


@pytest.fixture
def full_disk():
    """Files end at 64 kB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_adapter(adapter, base, request):
    before = contents(adapter)
    large = add_adapters(load(base), LoraSection(r=64, targets=TARGETS), seed=0)
    request.getfixturevalue("full_disk")
    with pytest.raises(ModelError, match=f"cannot write {adapter}: .*File too large"):
        save_adapter(large, adapter, str(base))
    assert contents(adapter) == before and siblings(adapter) == ["adapter"]


# ---- self-test ----


def test_probing_restores_the_mode(model):
    model.train()
    first = probe_logits(model, IDS)
    assert model.training and torch.equal(probe_logits(model, IDS), first)  # no dropout
    model.eval()
    assert torch.equal(probe_logits(model, IDS), first) and not model.training
    assert first.dtype == torch.float32 and not first.requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_a_good_adapter_passes_and_the_base_comes_back_bare(bases, name, tmp_path):
    base, targets = bases[name], MODELS[name][1]
    model = trained(base, targets)
    adapter = save_adapter(model, tmp_path / "adapter", str(base))
    ours, bare = probe_logits(model, IDS), load(base, attention="sdpa")
    before = probe_logits(bare, IDS)
    for given in (bare, bare, lambda: bare):
        report = self_test(adapter, IDS, ours, given)
        assert report.tensors == len(adapter_parameters(model))
        assert report.difference <= 1e-5 * max(1, report.largest)
        assert report.effect == pytest.approx(float((ours - before).abs().max()), rel=1e-3)
        assert report.effect > 0.01 and report.largest == float(ours.abs().max())
        assert report.dtype == "float32" and f"{report.tensors} tensors" in str(report)
        assert not any(isinstance(m, LoraLayer) for m in bare.modules())
        assert torch.equal(probe_logits(bare, IDS), before)


def test_the_trained_model_gives_its_own_base(model, adapter):
    ours = probe_logits(model, IDS)
    assert self_test(adapter, IDS, ours, model.unload()).effect > 0.01


def test_an_untrained_adapter_passes_without_an_effect(base, tmp_path):
    model = add_adapters(load(base), LoraSection(targets=TARGETS), seed=0)
    adapter = save_adapter(model, tmp_path / "adapter", str(base))
    assert self_test(adapter, IDS, probe_logits(model, IDS), lambda: load(base)).effect == 0.0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_a_weight, "its logits are not those of the trained model"),
        (rename, "1 tensors missing and 1 unexpected, first base_model.model.model.layers.0"),
        (drop, "1 tensors missing and 0 unexpected"),
        (cut_rank, "size mismatch for base_model.model.model.layers.0.mlp.down_proj.lora_A"),
    ],
)
def test_a_damaged_adapter_fails(model, adapter, base, change, what):
    ours = probe_logits(model, IDS)
    spoil(adapter, change)
    with pytest.raises(ModelError) as error:
        self_test(adapter, IDS, ours, lambda: load(base))
    assert what in error.value.what and str(adapter) in error.value.what
    assert error.value.why and error.value.fix


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_adapter_fails(model, adapter, base, keep):
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(ModelError, match=r"PEFT cannot load .*deserializing header"):
        self_test(adapter, IDS, probe_logits(model, IDS), lambda: load(base))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_without_effect_fails_if_b_is_not_zero(base, tmp_path, dtype):
    model = trained(base, dtype=dtype)
    with torch.no_grad():
        for name, p in adapter_parameters(model).items():
            if ".lora_A." in name:
                p.zero_()
    adapter = save_adapter(model, tmp_path / "adapter", str(base))
    with pytest.raises(ModelError, match="those of the base although B is not zero"):
        self_test(adapter, IDS, probe_logits(model, IDS), lambda: load(base, dtype))


def test_logits_that_are_not_numbers_fail(model, adapter, base):
    with pytest.raises(ModelError, match="not those of the trained model"):
        self_test(adapter, IDS, probe_logits(model, IDS) * torch.nan, lambda: load(base))


def test_in_half_precision_the_difference_is_measured_not_judged(base, tmp_path):
    model = trained(base, dtype="bfloat16")
    adapter = save_adapter(model, tmp_path / "adapter", str(base))
    ours = probe_logits(model, IDS)
    good = self_test(adapter, IDS, ours, lambda: load(base, "bfloat16"))
    assert good.dtype == "bfloat16" and good.difference < 0.05 * good.largest
    spoil(adapter, change_a_weight)
    bad = self_test(adapter, IDS, ours, lambda: load(base, "bfloat16"))
    assert bad.difference > good.difference


def test_our_own_layers_do_not_vouch_for_themselves(model, adapter, monkeypatch):
    monkeypatch.setattr(export, "load_adapted", lambda base, path: model)
    with pytest.raises(ModelError, match="not PEFT's own answered: FlexLoraLinear"):
        self_test(adapter, IDS, probe_logits(model, IDS), model.base_model.model)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_an_adapter_is_two_files(adapter, model, base, name):
    (adapter / name).rename(adapter / "elsewhere")
    with pytest.raises(ModelError, match=f"{adapter} has no {name}"):
        self_test(adapter, IDS, probe_logits(model, IDS), lambda: load(base))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"peft_type": "NOPE"}', '{"peft_type": "LORA", "r": "x"}']
)
def test_a_damaged_adapter_config_fails(adapter, model, base, text):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError):
        self_test(adapter, IDS, probe_logits(model, IDS), lambda: load(base))


def test_another_base_fails(adapter, model, tmp_path):
    wider = make_base(tmp_path / "wider", intermediate_size=96)
    with pytest.raises(ModelError, match="size mismatch") as error:
        self_test(adapter, IDS, probe_logits(model, IDS), lambda: load(wider))
    assert "adapter_config.json names it" in error.value.fix
