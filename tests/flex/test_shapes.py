"""A shape written as a checkpoint: what from_pretrained and we read of it, and what it costs to write."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flex.config import ModelConfig
from flex.errors import ModelError
from flex.model import base, shapes
from flex.model.presets import byte_tokenizer
from flex.model.shapes import is_big, skeleton, write_shape
from flex.model.tensors import INDEX


@pytest.fixture
def small_shards(tmp_path):
    write_shape("small", tmp_path / "small", seed=3, shard_bytes=500_000)
    return tmp_path / "small"


def test_the_folder_is_a_whole_sharded_checkpoint(small_shards):
    index = json.loads((small_shards / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 4 and files == sorted(p.name for p in small_shards.glob("*.safetensors"))
    assert all((small_shards / f).stat().st_size < 600_000 for f in files)
    model, info = AutoModelForCausalLM.from_pretrained(
        small_shards, dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = "def f(x): return x"
    ids = AutoTokenizer.from_pretrained(small_shards)(text).input_ids
    assert ids == byte_tokenizer(2048)(text).input_ids


def test_weights_are_normal_numbers_of_the_seed(tmp_path, small_shards):
    state = torch.get_rng_state()
    write_shape("small", tmp_path / "again", seed=3)  # other shards, the same numbers
    assert torch.equal(torch.get_rng_state(), state)
    mine = {n: t for f in small_shards.glob("*.safetensors") for n, t in load_file(f).items()}
    (one,) = (tmp_path / "again").glob("*.safetensors")
    again = load_file(one)
    assert mine.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in mine.items())
    a, b = (mine[f"model.layers.{i}.mlp.up_proj.weight"].float() for i in (0, 1))
    assert float(a.std()) == pytest.approx(0.02, rel=0.02) and abs(float(a.mean())) < 2e-4
    assert abs(float((a * b).mean())) < 0.02**2 * 0.02  # no copy of each other
    assert float(mine["model.norm.weight"].min()) == 1.0


def test_pieces_longer_than_the_block_keep_the_deviation(monkeypatch):
    monkeypatch.setattr(shapes, "_BLOCK", 1009)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1009, generator=generator).bfloat16()
    out = shapes._fill((64, 331), block, generator).float()
    assert float(out.std()) == pytest.approx(float(block.float().std()), rel=0.02)
    assert float((out[:-1] * out[1:]).mean().abs()) < 0.05
    assert not torch.equal(out.view(-1)[:1009], out.view(-1)[1009:2018])


def test_a_disk_too_small_is_found_before_anything_is_written(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10_000_000_000)
    monkeypatch.setattr(shapes.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ModelError, match=r"takes 13\.5 GB on the disk, 10\.0 GB are free"):
        write_shape("codellama-7b", tmp_path / "new" / "model")
    assert not (tmp_path / "new").exists()


def test_big_shapes_are_read_from_the_cache_and_small_ones_are_not(tmp_path, monkeypatch):
    assert is_big("llama-1b") and is_big("codellama-7b") and not is_big("smollm2-135m")
    assert sum(p.numel() for p in skeleton("llama-1b").parameters()) == 1_235_814_400
    monkeypatch.setenv("FLEX_CACHE", str(tmp_path))
    cfg = ModelConfig(name="shape:tiny", dtype="float32")
    base.load_model(cfg)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shapes, "BIG", 1000)
    model = base.load_model(cfg)
    (folder,) = (tmp_path / "shapes").glob("tiny-*/")
    (file,) = folder.glob("*.safetensors")
    saved = load_file(file)
    assert torch.equal(
        model.model.layers[1].mlp.up_proj.weight, saved["model.layers.1.mlp.up_proj.weight"].float()
    )
    assert model.name_or_path == "shape:tiny" and base.resolve(cfg) == "shape:tiny"
    written = file.stat().st_mtime_ns
    base.load_model(cfg)
    assert file.stat().st_mtime_ns == written
