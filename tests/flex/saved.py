"""Base models and trained adapters on disk, for the tests of export and merge."""

import torch
from safetensors.torch import load_file, save_file

from flex.config import LoraSection, ModelConfig
from flex.model.adapters import adapter_parameters, add_adapters
from flex.model.base import load_model
from flex.model.presets import byte_tokenizer
from tests.tiny import tiny_model

WEIGHTS = "adapter_model.safetensors"
IDS = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(0))
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
# name -> (fields of the base's config, targets)
MODELS = {
    "tied": ({"tie_word_embeddings": True}, TARGETS),
    "biased": ({"attention_bias": True, "mlp_bias": True}, (*TARGETS, "lm_head")),
}


def make_base(path, **overrides):
    tiny_model(vocab_size=259, **overrides).save_pretrained(path)
    byte_tokenizer(256).save_pretrained(path)
    return path


def load(base, dtype="float32", **fields):
    return load_model(ModelConfig(name=str(base), dtype=dtype, **fields))


def trained(base, targets=TARGETS, dtype="float32", seed=1):
    """The base with adapters whose B is as large as A: they matter."""
    model = add_adapters(load(base, dtype), LoraSection(r=4, alpha=6, targets=targets), seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def contents(folder):
    """Every file below `folder` and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def siblings(path):
    return sorted(p.name for p in path.parent.iterdir())


def spoil(adapter, change):
    """Rewrite the weights file after `change` of its tensors."""
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})


def first_a(tensors):
    return next(name for name in sorted(tensors) if "lora_A" in name)


def change_a_weight(tensors):
    tensors[first_a(tensors)][0, 0] += 0.5


def rename(tensors):
    name = first_a(tensors)
    tensors[name.replace("lora_A", "lora_C")] = tensors.pop(name)


def drop(tensors):
    del tensors[first_a(tensors)]


def cut_rank(tensors):
    tensors[first_a(tensors)] = tensors[first_a(tensors)][:2].contiguous()
