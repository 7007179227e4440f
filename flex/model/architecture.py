"""The shape of a Llama-like model from its config.json alone: neither torch nor transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flex.config import ModelConfig
from flex.errors import ModelError
from flex.model.presets import shape_fields

log = logging.getLogger("flex.plan")

LLAMA_LIKE = ("llama", "mistral", "qwen2")
# Published models whose config.json equals a preset, for a machine without network or cache.
PUBLISHED = {
    "smollm2-135m": "smollm2-135m",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
    "codellama/CodeLlama-7b-hf": "codellama-7b",
    "codellama/CodeLlama-13b-hf": "codellama-13b",
    "codellama/CodeLlama-34b-hf": "codellama-34b",
    "meta-llama/Llama-2-7b-hf": "llama-7b",
    "meta-llama/Llama-2-13b-hf": "llama-13b",
    "meta-llama/Llama-2-70b-hf": "llama-70b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
}


@dataclass(frozen=True)
class LinearShape:
    """A linear layer: its name below the decoder layer, K inputs, N outputs."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Stored:
    """How bitsandbytes' linear layers lie in a checkpoint, in the words of `model.quantise` and `double_quant`."""

    kind: Literal["nf4", "int8"]  # FP4 takes NF4's room
    double_quant: bool = False


@dataclass(frozen=True)
class Architecture:
    """A decoder of equal layers: RMSNorm, attention, RMSNorm, gated MLP. Counts are in elements."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # lm_head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    stored: Stored | None = None  # its linear layers are quantised already
    linears: tuple[LinearShape, ...] = field(init=False)  # of one layer, in the order of forward

    def __post_init__(self) -> None:
        h, f, a, k = self.hidden, self.ffn, self.attention_width, self.kv_width
        linears = (
            LinearShape("self_attn.q_proj", h, a, self.qkv_bias),
            LinearShape("self_attn.k_proj", h, k, self.qkv_bias),
            LinearShape("self_attn.v_proj", h, k, self.qkv_bias),
            LinearShape("self_attn.o_proj", a, h, self.o_bias),
            LinearShape("mlp.gate_proj", h, f, self.mlp_bias),
            LinearShape("mlp.up_proj", h, f, self.mlp_bias),
            LinearShape("mlp.down_proj", f, h, self.mlp_bias),
        )
        object.__setattr__(self, "linears", linears)

    @property
    def attention_width(self) -> int:
        """Elements of all heads' queries of a position."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of all heads' keys of a position."""
        return self.kv_heads * self.head_dim

    @property
    def linear_weights(self) -> int:
        """Weights of all layers' linear layers, without lm_head and biases."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def other_parameters(self) -> int:
        """Embedding, lm_head unless tied, norms and biases: never quantised."""
        biases = self.layers * sum(linear.outputs for linear in self.linears if linear.bias)
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return tables + (2 * self.layers + 1) * self.hidden + biases

    @property
    def parameters(self) -> int:
        return self.linear_weights + self.other_parameters

    def targets(self, names: tuple[str, ...]) -> list[frozenset[str]]:
        """Per layer, the linear layers that `lora.targets` names, matched as PEFT does.

        Raises:
            ModelError: a name matches no linear layer of a decoder layer.
        """
        found: list[set[str]] = [set() for _ in range(self.layers)]
        for target in names:
            hit = False
            for layer, chosen in enumerate(found):
                for linear in self.linears:
                    full = f"model.layers.{layer}.{linear.name}"
                    if full == target or full.endswith(f".{target}"):
                        chosen.add(linear.name)
                        hit = True
            if not hit:
                raise ModelError(
                    f"lora.targets: {target!r} names no linear layer of a decoder layer",
                    "the plan would leave its adapters out",
                    f"choose among {', '.join(x.name.partition('.')[2] for x in self.linears)}",
                )
        return [frozenset(chosen) for chosen in found]


def architecture_of(source: str, config: Mapping[str, Any]) -> Architecture:
    """From the fields of a config.json.

    Args:
        source: names the model in an error.

    Raises:
        ModelError: another kind of model, or a field is missing.
    """
    kind = config.get("model_type")
    if kind not in LLAMA_LIKE:
        raise ModelError(
            f"{source} has the architecture {kind!r}, whose layers plan does not know",
            "what backward keeps and what a layer computes follow from its kind",
            f"known are {', '.join(LLAMA_LIKE)}; measure another with train.steps=1",
        )
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        attention_bias = bool(config.get("attention_bias", False))
        return Architecture(
            hidden=hidden,
            ffn=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or kind == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            stored=stored_of(source, config),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"the config.json of {source} lacks a usable {error}",
            "the model's size is unknown without it",
            "check that it is the config.json of a causal language model",
        ) from error


def stored_of(source: str, config: Mapping[str, Any]) -> Stored | None:
    """How the checkpoint is quantised, by a config.json's `quantization_config`; None if it is not.

    Raises:
        ModelError: by another library than bitsandbytes.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method")
    if method not in ("bitsandbytes", None):
        raise ModelError(
            f"{source} is quantised by {method}",
            "adapters go on plain linear layers and on bitsandbytes' only",
            "point model.name to the model in bf16, fp16 or fp32",
        )
    if found.get("load_in_8bit") or found.get("_load_in_8bit"):
        return Stored("int8")
    return Stored("nf4", bool(found.get("bnb_4bit_use_double_quant", False)))


def read_architecture(cfg: ModelConfig) -> Architecture:
    """The architecture of `cfg.name`: a preset, a folder's config.json, the Hub cache, or the Hub.

    Raises:
        ModelError: it cannot be found or read, or is not Llama-like.
    """
    if cfg.name.startswith("shape:"):
        return architecture_of(cfg.name, shape_fields(cfg.name.removeprefix("shape:")))
    folder = Path(cfg.name).expanduser()
    if folder.is_dir() or (folder / "config.json").exists():
        return architecture_of(cfg.name, _read(folder / "config.json", cfg.name))
    file = None
    if cfg.name.count("/") == 1 and not cfg.name.startswith((".", "/", "~")):
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(cfg.name, "config.json", revision=cfg.revision)
    if isinstance(file, str):
        return architecture_of(cfg.name, _read(Path(file), cfg.name))
    if cfg.name in PUBLISHED:
        log.info("%s: architecture as published, config.json is not here", cfg.name)
        return architecture_of(cfg.name, shape_fields(PUBLISHED[cfg.name]))
    return architecture_of(cfg.name, _read(_fetch(cfg), cfg.name))


def _read(file: Path, source: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
        return config
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read the config.json of {source}: {error}",
            "the model's architecture is read from it",
            "point model.name to a folder that holds config.json",
        ) from error


def _fetch(cfg: ModelConfig) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(cfg.name, "config.json", revision=cfg.revision))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"cannot fetch the config.json of {cfg.name}: {str(error).splitlines()[0]}",
            "it is no folder here, and the Hub's cache does not hold it",
            "check spelling, network and `hf auth login`; or plan with model.name=shape:<preset>",
        ) from error
