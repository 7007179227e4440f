"""The frozen base: what is refused and in which words, and what a loaded model is like."""

import json
import logging
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flex.config import LoraSection, ModelConfig
from flex.errors import ModelError
from flex.model import attention, base
from flex.model.adapters import adapter_parameters, add_adapters
from flex.model.base import load_config, load_model, load_tokenizer, resolve
from flex.model.export import save_adapter
from flex.model.presets import BOS, EOS, PAD, byte_tokenizer, shape_config
from tests.tiny import tiny_model

WEIGHTS = "model.safetensors"


def config(name, **fields):
    return ModelConfig(**{"name": str(name), "dtype": "float32"} | fields)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny model and its tokenizer, as save_pretrained leaves them."""
    path = tmp_path_factory.mktemp("original") / "model"
    tiny_model(vocab_size=259).save_pretrained(path)
    byte_tokenizer(256).save_pretrained(path)
    return path


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(original, tmp_path / "model")


def edit(path, **changes):
    """Set fields of a JSON file; None takes one away."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def refused(call, *what, why="", fix=""):
    """`call` must raise a ModelError whose three parts say these things."""
    with pytest.raises(ModelError) as caught:
        call()
    error = caught.value
    for text in what:
        assert text in error.what
    assert why in error.why and fix in error.fix
    assert error.why and error.fix
    assert "\n" not in error.what
    return error


# ---- what a name may be ----


@pytest.mark.parametrize(
    "form", ["{}/missing", "./missing", "../missing", "~/missing", "a/b/c", "a/"]
)
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(form, in_tmp, monkeypatch):
    monkeypatch.setenv("HOME", str(in_tmp))
    name = form.format(in_tmp)
    refused(lambda: resolve(config(name)), f"no folder {name}", fix="correct model.name")


@pytest.mark.parametrize("name", ["gpt2", "owner/model"])
def test_a_name_that_can_be_a_hub_id_is_kept(name, in_tmp):
    assert resolve(config(name)) == name


def test_a_folder_wins_over_a_hub_id_and_becomes_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert resolve(config(f"{folder.parent.name}/model")) == str(folder.resolve())


def test_an_unreachable_hub_id_says_what_to_check(in_tmp):
    for load in (load_config, load_model, load_tokenizer):
        refused(
            lambda load=load: load(config("nobody/nothing")),
            "cannot load nobody/nothing",
            fix="check spelling, network",
        )


def test_an_adapter_is_not_a_base(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    refused(
        lambda: resolve(config(folder)),
        f"{folder} holds an adapter, not a model",
        why="difference to a base",
        fix="python -m flex merge",
    )


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    refused(
        lambda: resolve(config(folder)),
        f"{folder} has no config.json",
        why="architecture is unknown",
        fix="config.json and *.safetensors",
    )


def test_an_unknown_shape_is_answered_with_the_list():
    error = refused(lambda: resolve(config("shape:huge")), "no shape:huge", why="from a preset")
    named = re.findall(r"shape:[\w.-]+\w", error.fix)
    assert {"shape:tiny", "shape:small", "shape:codellama-7b", "shape:llama-70b"} <= set(named)
    for name in named:
        assert resolve(config(name)) == name


def test_smollm2_is_the_converted_folder(monkeypatch, folder):
    monkeypatch.setattr(base, "smollm2_folder", lambda: folder)
    assert resolve(config("smollm2-135m")) == str(folder)


# ---- what a folder must hold ----


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        "{}",
        '{"model_type": "unheard-of"}',
        '{"model_type": "llama", "hidden_size": "x"}',
    ],
)
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    for load in (load_config, load_model):
        refused(
            lambda load=load: load(config(folder)),
            f"cannot load {folder}: ",
            fix="check the files of that folder",
        )


def test_the_reason_is_not_a_mere_headline(folder):
    edit(folder / "config.json", hidden_size="wide")
    refused(lambda: load_config(config(folder)), "hidden_size", "wide")


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_pickled_weights_are_refused_unread(folder, tmp_path):
    marker = tmp_path / "unpickled"
    state = dict(tiny_model(vocab_size=259).state_dict(), trap=Trap(marker))
    torch.save(state, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    refused(
        lambda: load_model(config(folder)),
        f"cannot load {folder}",
        "model.safetensors",
        why="only safetensors are read",
    )
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the trap does work
    assert marker.exists()


def test_a_missing_weight_is_refused_not_made_up(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refused(
        lambda: load_model(config(folder)),
        "lacks 2 weights, first model.layers.1.mlp.up_proj.weight",
        why="random numbers",
        fix="belong together",
    )


def test_a_weight_of_another_shape_is_refused_by_name(folder):
    edit(folder / "config.json", intermediate_size=48)
    refused(
        lambda: load_model(config(folder)),
        "6 weights have another shape",
        "first model.layers.0.mlp.down_proj.weight, (32, 64) for (32, 48)",
        why="random numbers",
    )


def test_a_weight_too_many_is_left_out_with_a_count(folder, caplog):
    caplog.set_level(logging.INFO, "flex.model")
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"visitor": torch.ones(3)}, folder / WEIGHTS, metadata={"format": "pt"})
    load_model(config(folder))
    assert "1 weights of" in caplog.text


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refused(lambda: load_model(config(folder)), f"cannot load {folder}", "deserializing header")


def test_an_adapter_beside_the_model_is_not_applied_in_silence(folder):
    model = add_adapters(load_model(config(folder)), LoraSection(), seed=0)
    adapter = save_adapter(model, folder.parent / "adapter", str(folder))
    for path in adapter.iterdir():
        shutil.copy(path, folder)
    refused(
        lambda: load_model(config(folder)),
        "holds an adapter beside the model",
        why="the base would not be the base",
        fix="merge first",
    )


@pytest.mark.parametrize("model_type", ["llama", "marked"])
def test_code_in_a_folder_never_runs(folder, tmp_path, model_type):
    marker = tmp_path / "ran"
    (folder / "marked.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    classes = {"AutoConfig": "marked.Config", "AutoModelForCausalLM": "marked.Model"}
    edit(folder / "config.json", model_type=model_type, auto_map=classes)
    classes = {"AutoTokenizer": ["marked.Tokenizer", "marked.Tokenizer"]}
    edit(folder / "tokenizer_config.json", auto_map=classes, tokenizer_class="MarkedTokenizer")
    for load in (load_config, load_model, load_tokenizer):
        if model_type == "llama" and load is not load_tokenizer:
            load(config(folder))  # transformers has a class of its own for it
        else:
            refused(
                lambda load=load: load(config(folder)), f"cannot load {folder}", why="never run"
            )
        assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", None), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")],
)
def test_a_missing_or_damaged_tokenizer(folder, name, text):
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    refused(lambda: load_tokenizer(config(folder)), f"cannot load {folder}", fix="check the files")


def test_a_tokenizer_without_eos(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)
    refused(
        lambda: load_tokenizer(config(folder)),
        "has no EOS token",
        why="never learns to stop",
        fix="tokenizer_config.json",
    )


def test_eos_pads_where_no_padding_token_is(folder, caplog):
    caplog.set_level(logging.INFO, "flex.model")
    assert load_tokenizer(config(folder)).pad_token_id == PAD
    assert not caplog.records
    edit(folder / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(config(folder)).pad_token_id == EOS
    assert "no padding token" in caplog.text


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory for", "model.dtype=bfloat16"),
        (RuntimeError(""), "RuntimeError", "check the files"),
        (RuntimeError("\n\n  Errors:\n\tweight 3 is bad\nmore"), "Errors: weight 3 is bad", ""),
    ],
)
def test_errors_of_the_libraries_are_explained(folder, monkeypatch, error, what, fix):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(base._AnyAuto, "from_pretrained", fail)
    assert refused(lambda: load_model(config(folder)), what, fix=fix).__cause__ is error


# ---- what is loaded ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_the_files_in_the_dtype_asked_for_and_frozen(folder, dtype):
    model = load_model(config(folder, dtype=dtype))
    saved = load_file(folder / WEIGHTS)
    loaded = model.state_dict()
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype)))
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.config.use_cache is False
    assert model(input_ids=torch.tensor([[5, 6]])).past_key_values is None


def test_the_attention_asked_for(folder):
    names = {
        value: load_model(config(folder, attention=value)).config._attn_implementation
        for value in ("auto", "sdpa", "eager")
    }
    assert names == {"auto": attention.NAME, "sdpa": "sdpa", "eager": "eager"}


@pytest.mark.parametrize("family", ["Bloom", "Falcon"])
def test_an_architecture_that_cannot_pack_keeps_its_own_attention(tmp_path, caplog, family):
    caplog.set_level(logging.INFO, "flex.model")
    fields = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    small = getattr(transformers, f"{family}Config")(num_attention_heads=2, n_head=2, **fields)
    getattr(transformers, f"{family}ForCausalLM")(small).save_pretrained(tmp_path / "model")
    model = load_model(config(tmp_path / "model"))
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert "packed attention does not fit" in caplog.text


def adapter_gradients(folder, seed, **fields):
    """Loss and adapter gradients of one training step with dropout, B not zero."""
    lora = LoraSection(r=4, dropout=0.3, targets=("q_proj", "up_proj", "down_proj"))
    model = add_adapters(load_model(config(folder, **fields)), lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    parameters = adapter_parameters(model)
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    ids = torch.randint(0, 256, (2, 19), generator=generator)
    model.train()
    torch.manual_seed(seed)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


def test_gradient_checkpointing_changes_memory_not_gradients(folder, monkeypatch):
    calls = []
    from flex.model.adapters import FlexLoraLinear

    forward = FlexLoraLinear.forward
    monkeypatch.setattr(
        FlexLoraLinear, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k)
    )
    loss, plain = adapter_gradients(folder, seed=3)
    assert len(calls) == 6  # 2 layers x 3 targets
    again, recomputed = adapter_gradients(folder, seed=3, gradient_checkpointing=True)
    assert len(calls) == 6 + 12  # each is computed twice
    assert torch.equal(loss, again)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-6)
    other, _ = adapter_gradients(folder, seed=4, gradient_checkpointing=True)
    assert (loss - other).abs() > 1e-6  # dropout was on


# ---- shape models ----


def test_a_shape_models_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(7)
    first = load_model(config("shape:tiny"), seed=5).state_dict()
    torch.manual_seed(8)
    state = torch.get_rng_state()
    second = load_model(config("shape:tiny"), seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    other = load_model(config("shape:tiny"), seed=6).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert (first[name] != other[name]).float().mean() > 0.99
    assert first[name].std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_shape_model_in_half_precision_is_the_fp32_one_rounded(dtype):
    wide = load_model(config("shape:tiny")).state_dict()
    half = load_model(config("shape:tiny", dtype=dtype)).state_dict()
    for name, tensor in wide.items():
        assert torch.equal(half[name], tensor.to(getattr(torch, dtype))), name


def test_a_shape_model_names_itself():
    assert load_model(config("shape:tiny"), "meta").name_or_path == "shape:tiny"


def closed_form(c):
    """Parameters of a Llama: embedding and head, and per layer attention, MLP and two norms; one norm more."""
    head = c.hidden_size // c.num_attention_heads
    attention_ = c.hidden_size * head * 2 * (c.num_attention_heads + c.num_key_value_heads)
    layer = attention_ + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    matrices = 1 if c.tie_word_embeddings else 2
    return matrices * c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("codellama-7b", 6_738_546_688),
        ("llama-1b", 1_235_814_400),
        ("llama-7b", 6_738_415_616),
        ("codellama-34b", 33_743_970_304),
        ("llama3-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
        ("tiny", None),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, published):
    model = load_model(config(f"shape:{preset}", dtype="bfloat16"), "meta")
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    assert count == closed_form(shape_config(preset))
    assert published in (None, count)


TEXTS = [
    "def f(x):\n\treturn x  # two  spaces, trailing \r\n",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u05e2\u05d1",
    "".join(map(chr, range(256))),
    "don 't do that . Or , this ? <s> [INST] \u2581x\ufeff\ufffd\u0301e\u0301",
    "".join(map(chr, [*range(0xD7F0, 0xD800), *range(0xE000, 0xE010), 0x10FFFF])),
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_byte_tokenizer_is_lossless(text):
    tokenizer = load_tokenizer(config("shape:tiny"))
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    if "<s>" not in text:
        assert len(ids) == len(text.encode())
        assert max(ids, default=0) < 256


def test_the_byte_tokenizer_fits_the_shape_models():
    tokenizer = load_tokenizer(config("shape:small"))
    c = shape_config("small")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        BOS,
        EOS,
        PAD,
    )
    assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (BOS, EOS, PAD)
    assert tokenizer.model_max_length == c.max_position_embeddings == 2048
    assert len(tokenizer) <= c.vocab_size
    assert tokenizer("a</s>").input_ids[-1] == EOS
    assert (
        tokenizer.decode([*tokenizer("ab").input_ids, EOS, PAD], skip_special_tokens=True) == "ab"
    )


def test_the_byte_tokenizer_survives_saving(folder):
    mine, saved = byte_tokenizer(256), load_tokenizer(config(folder))
    for text in TEXTS:
        assert saved(text).input_ids == mine(text).input_ids
        assert saved.decode(saved(text).input_ids) == text
