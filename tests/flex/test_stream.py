"""Loading tensor by tensor: the same model as from_pretrained's, the same blocks as bitsandbytes', the same errors."""

import json
import logging
import shutil

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from flex.config import ModelConfig
from flex.errors import ConfigError, ModelError
from flex.model import places
from flex.model.base import load_model
from flex.model.places import Place
from flex.model.stream import stream_model
from flex.model.tensors import INDEX, SINGLE, HeldTensor, checkpoint_tensors
from tests.tiny import tiny_model

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(params=["single", "sharded"])
def files(request):
    return {"single": "5GB", "sharded": "20KB"}[request.param]


def folder_of(path, files="5GB", **fields):
    tiny_model(**fields).save_pretrained(path, max_shard_size=files)
    assert (path / INDEX).exists() == (files != "5GB")
    return path


def streamed(folder, dtype=torch.float32, place=None):
    config = AutoConfig.from_pretrained(folder)
    tensors = checkpoint_tensors(folder)
    return stream_model(str(folder), tensors, config, dtype, place or Place("cpu"), "sdpa")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_weights_and_buffers_are_those_of_from_pretrained(tmp_path, files, tied, dtype):
    folder = folder_of(tmp_path / "m", files, tie_word_embeddings=tied)
    ours, info = streamed(folder, dtype)
    assert not any(info.values())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    mine, saved = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == saved.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in saved.items())
    assert all(mine[name].dtype == tensor.dtype for name, tensor in saved.items())
    frequencies = dict(theirs.named_buffers())
    assert "model.rotary_emb.inv_freq" in frequencies
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, frequencies[name]) and buffer.dtype == frequencies[name].dtype
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad for p in ours.parameters())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)


def test_long_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("flex.model.tensors._PIECE", 100)
    folder = folder_of(tmp_path / "m")
    source = checkpoint_tensors(folder)[UP]
    saved = load_file(folder / SINGLE)[UP].view(-1)
    for start, stop in ((0, 2048), (37, 1999), (2047, 2048)):
        part = torch.empty(stop - start, dtype=torch.float64)
        source.read_into(part, start)
        assert torch.equal(part, saved[start:stop].double())


def test_a_checkpoint_with_the_tied_weight_under_its_other_name(tmp_path, caplog):
    folder = folder_of(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(folder / SINGLE)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": embedding}, folder / SINGLE, {"format": "pt"})
    model, info = streamed(folder)
    assert not any(info.values()) and torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    both = tensors | {"model.embed_tokens.weight": embedding}
    save_file(both | {"lm_head.weight": embedding + 1}, folder / SINGLE, {"format": "pt"})
    model, info = streamed(folder)
    assert "differ in the checkpoint" in caplog.text and not any(info.values())
    assert torch.equal(model.lm_head.weight, embedding + 1)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("double", [True, False])
def test_nf4_blocks_are_those_of_bitsandbytes(tmp_path, monkeypatch, double, dtype):
    monkeypatch.setattr(places, "_PIECE", 128)  # 2048 numbers a matrix: many pieces
    folder = folder_of(tmp_path / "m", files="20KB")
    cfg = ModelConfig(name=str(folder), dtype=dtype, quantise="nf4", double_quant=double)
    model = load_model(cfg)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).state_dict()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 14 and model.is_loaded_in_4bit
    for name, layer in layers.items():
        blocks, state = quantize_4bit(
            saved[f"{name}.weight"], quant_type="nf4", compress_statistics=double
        )
        assert torch.equal(layer.weight.data, blocks), name
        ours = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(ours, dequantize_4bit(blocks, state)), name
        assert layer.weight.quant_state.nested is double
        assert layer.compute_dtype == getattr(torch, dtype)
    kept = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers}
    assert "lm_head.weight" in kept and "model.norm.weight" in kept
    assert all(torch.equal(p, saved[name]) for name, p in kept.items())
    x = torch.randn(3, 32, dtype=getattr(torch, dtype), requires_grad=True)
    name = "model.layers.0.mlp.up_proj"
    w = dequantize_4bit(layers[name].weight.data, layers[name].weight.quant_state)
    torch.testing.assert_close(layers[name](x), x @ w.T)


def test_int8_rows_are_those_of_bitsandbytes(tmp_path):
    folder = folder_of(tmp_path / "m")
    model = load_model(ModelConfig(name=str(folder), quantise="int8"))
    layer = model.get_submodule(UP.removesuffix(".weight"))
    assert type(layer) is bitsandbytes.nn.Linear8bitLt and model.is_loaded_in_8bit
    weight = load_file(folder / SINGLE)[UP].bfloat16().half()
    rows, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    assert torch.equal(layer.weight.data, rows) and torch.equal(layer.weight.SCB, scales)
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    expected = x.float() @ (rows.float() * scales[:, None] / 127).T
    torch.testing.assert_close(layer(x).float(), expected, atol=0.02, rtol=0.05)


def test_a_random_shape_is_quantised_too():
    plain = load_model(ModelConfig(name="shape:tiny", dtype="float32"))
    model = load_model(ModelConfig(name="shape:tiny", dtype="float32", quantise="nf4"))
    layer = model.get_submodule(UP.removesuffix(".weight"))
    blocks, _ = quantize_4bit(plain.get_parameter(UP).data, quant_type="nf4")
    assert torch.equal(layer.weight.data, blocks)
    assert model.name_or_path == "shape:tiny"


# ---- what is refused ----


def spoilt(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return ModelConfig(name=str(folder), quantise="nf4")


def test_a_missing_weight(tmp_path):
    cfg = spoilt(folder_of(tmp_path / "m"), lambda t: t.pop(UP))
    with pytest.raises(ModelError, match=f"lacks 1 weights, first {UP}"):
        load_model(cfg)


def test_a_weight_of_another_shape(tmp_path):
    cfg = spoilt(folder_of(tmp_path / "m"), lambda t: t.update({UP: torch.zeros(32, 64)}))
    with pytest.raises(ModelError, match=rf"first {UP}, \(32, 64\) for \(64, 32\)"):
        load_model(cfg)


def test_a_weight_too_many_is_left_out_with_a_count(tmp_path, caplog):
    caplog.set_level(logging.INFO, "flex.model")
    load_model(spoilt(folder_of(tmp_path / "m"), lambda t: t.update(visitor=torch.ones(2))))
    assert "1 weights of" in caplog.text


@pytest.mark.parametrize("keep", [0, 5, 900, -1])
def test_a_truncated_shard(tmp_path, keep):
    folder = folder_of(tmp_path / "m", "20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ModelError, match=f"cannot load {folder}"):
        load_model(ModelConfig(name=str(folder), quantise="nf4"))


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    folder = folder_of(tmp_path / "m")
    source = checkpoint_tensors(folder)[UP]
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[: source.offset + 10])
    with pytest.raises(ModelError, match=f"ends within {UP}"):
        source.read_into(torch.empty(source.numel))


def test_a_missing_shard_and_an_index_that_promises_too_much(tmp_path):
    folder = folder_of(tmp_path / "m", "20KB")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["more.weight"] = index["weight_map"][UP]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 1 weights that its index names, first more\.we"):
        checkpoint_tensors(folder)
    (folder / index["weight_map"][UP]).unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_model(ModelConfig(name=str(folder), quantise="nf4"))
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ModelError, match="has neither model.safetensors nor"):
        checkpoint_tensors(folder)


def test_weights_that_only_from_pretrained_puts_together(tmp_path):
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"experts\.0\.w1\.weight must be converted"):
        load_model(ModelConfig(name=str(tmp_path / "m"), quantise="nf4"))


def test_a_checkpoint_that_is_quantised_already(tmp_path):
    config = AutoConfig.from_pretrained(folder_of(tmp_path / "m"))
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ModelError, match="quantised already"):
        stream_model("m", {}, config, torch.float32, Place("cpu"))


def test_quantised_blocks_have_no_partitions():
    cfg = ModelConfig(name="shape:tiny", quantise="nf4")
    with pytest.raises(ModelError, match="quantise=nf4 with ZeRO stage 3"):
        load_model(cfg, ds_config={"zero_optimization": {"stage": 3}})
    from flex.config import RunConfig
    from flex.engine_zero import check_ds_config

    run = RunConfig(model=cfg, deepspeed="zero3.json")
    config = {
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3},
    }
    with pytest.raises(ConfigError, match="quantise=nf4 with ZeRO stage 3"):
        check_ds_config(config, run)


def test_fp64_is_not_quantised():
    with pytest.raises(ValueError, match="quantise=int8 with dtype=float64"):
        ModelConfig(name="shape:tiny", dtype="float64", quantise="int8")


def test_held_tensors_are_read_in_part():
    held = HeldTensor(torch.arange(12.0).view(3, 4))
    part = torch.empty(5, dtype=torch.bfloat16)
    held.read_into(part, 4)
    assert part.tolist() == [4, 5, 6, 7, 8] and held.shape == (3, 4) and held.numel == 12
