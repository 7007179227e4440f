"""An adapter and its base become one model that plain transformers loads."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flex.errors import ModelError
from flex.model import export
from flex.model.export import merge, probe_logits, save_adapter
from flex.model.presets import byte_tokenizer
from tests.flex.saved import (
    IDS,
    MODELS,
    contents,
    cut_rank,
    drop,
    rename,
    siblings,
    spoil,
    trained,
)

# ---- merging ----


def digest(folder):
    return {
        p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns, p.stat().st_mode)
        for p in sorted(folder.iterdir())
    }


def plain_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_loads_a_merged_model(bases, name, tmp_path):
    base, targets = bases[name], MODELS[name][1]
    before, model = digest(base), trained(base, targets)
    adapter = save_adapter(model, tmp_path / "adapter", str(base))
    adapter_before = digest(adapter)
    report = merge(adapter, tmp_path / "merged")
    assert report.out_dir == tmp_path / "merged" and report.base == str(base)
    assert report.dtype == "float32" and 0 <= report.difference < 1e-4
    merged, unmerged = plain_logits(report.out_dir), probe_logits(model, IDS)
    torch.testing.assert_close(merged, unmerged, atol=1e-4, rtol=0)
    assert (merged - plain_logits(base)).abs().max() > 0.01
    assert digest(base) == before and digest(adapter) == adapter_before
    assert sorted(p.name for p in report.out_dir.iterdir()) == sorted(
        p.name for p in base.iterdir()
    )
    mine, theirs = (json.loads((f / "config.json").read_text()) for f in (report.out_dir, base))
    assert mine == theirs  # use_cache too, which training turns off
    saved, original = (load_file(f / "model.safetensors") for f in (report.out_dir, base))
    assert saved.keys() == original.keys()
    changed = {n.split(".")[-2] for n in saved if not torch.equal(saved[n], original[n])}
    assert changed == set(targets)
    tokenizer = AutoTokenizer.from_pretrained(report.out_dir)
    assert tokenizer("x = 1\n").input_ids == byte_tokenizer(256)("x = 1\n").input_ids
    assert tokenizer.eos_token == "</s>"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_reports_what_rounding_did(adapter, model, tmp_path, dtype):
    report = merge(adapter, tmp_path / "merged", dtype=dtype)
    saved = load_file(report.out_dir / "model.safetensors")
    assert {str(t.dtype) for t in saved.values()} == {f"torch.{dtype}"}
    ids = byte_tokenizer(256)(export.PROMPT, return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(report.out_dir)
    assert str(merged.dtype) == f"torch.{dtype}"
    actual = (probe_logits(merged, ids) - probe_logits(model, ids)).abs().max().item()
    assert report.difference == pytest.approx(actual, rel=1e-3)
    assert report.difference > 1e-4 and f"{report.difference:.1e}" in str(report)


def test_a_merge_into_the_base_that_is_named(adapter, model, bases, tmp_path):
    moved = shutil.copytree(bases["tied"], tmp_path / "moved")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no folder .*gone"):
        merge(adapter, tmp_path / "merged")
    report = merge(adapter, tmp_path / "merged", base=str(moved))
    torch.testing.assert_close(
        plain_logits(report.out_dir), probe_logits(model, IDS), atol=1e-4, rtol=0
    )


def test_an_adapter_that_names_no_base_needs_one(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not name its base"):
        merge(adapter, tmp_path / "merged")


def test_a_merge_never_overwrites(adapter, tmp_path):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(ModelError, match="is not empty") as error:
        merge(adapter, out)
    assert "another folder" in error.value.fix
    assert contents(out) == {"precious": b"mine"}
    (out / "precious").unlink()
    assert merge(adapter, out).out_dir == out  # an empty folder is as good as none


def test_a_quantised_base_is_refused(adapter, bases, tmp_path):
    quantised = shutil.copytree(bases["tied"], tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantised") as error:
        merge(adapter, tmp_path / "merged", base=str(quantised))
    assert "few bits" in error.value.why and "full precision" in error.value.fix
    assert siblings(quantised) == ["quantised", "run"]


@pytest.mark.parametrize("change", [rename, drop, cut_rank])
def test_a_merge_that_fails_leaves_nothing(adapter, tmp_path, change):
    spoil(adapter, change)
    with pytest.raises(ModelError):
        merge(adapter, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_merge_without_an_adapter(tmp_path):
    with pytest.raises(ModelError, match="has no adapter_config.json and no adapter_model"):
        merge(tmp_path, tmp_path / "merged")
