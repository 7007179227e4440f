"""Small models of the families whose modules have stand-ins of ours."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SMALL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "use_cache": False},
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def made(family: str, dtype: torch.dtype = torch.bfloat16, **options) -> nn.Module:
    """A frozen model of random weights, of SMALL's sizes but for `options`; no norm's weight is all ones."""
    config, model = FAMILIES[family]
    torch.manual_seed(0)
    found = model(config(**{**SMALL, **options})).to(dtype)
    for name, p in found.named_parameters():
        if "norm" in name:
            p.data += 0.3 * torch.randn(p.shape).to(dtype)
    return found.requires_grad_(False)
