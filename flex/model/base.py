"""The frozen base model and its tokenizer, from a name."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flex.config import ModelConfig
from flex.errors import ModelError
from flex.model import attention, pointwise, rotary
from flex.model.hub_code import refuse
from flex.model.places import Partitioned, Place, Quantised
from flex.model.presets import byte_tokenizer, shape_config
from flex.model.shapes import is_big, shape_folder
from flex.model.smollm2 import smollm2_folder
from flex.model.stream import stream_model
from flex.model.tensors import HeldTensor, Source, checkpoint_tensors

log = logging.getLogger("flex.model")

_SHAPE = "shape:"
# What transformers raises over a bad folder; a config.json of the wrong kind is TypeError and the like.
_ERRORS = (
    *(OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError),
    *(SafetensorError, StrictDataclassError),
)
_AnyAuto: Any = AutoModelForCausalLM  # its annotations leave out output_loading_info


def resolve(cfg: ModelConfig) -> str:
    """Where `cfg.name` lives: a local folder (absolute), a Hub id, or `shape:<preset>` as it is.

    `smollm2-135m` is fetched and converted here, the first time.

    Raises:
        ModelError: a local folder that is missing or holds no model.
    """
    name = cfg.name
    if name.startswith(_SHAPE):
        shape_config(name.removeprefix(_SHAPE))
        return name
    if name == "smollm2-135m":
        return str(smollm2_folder())
    folder = Path(name).expanduser()
    # A Hub id is `name` or `owner/name`; anything else can only be a path.
    if not folder.exists() and (
        name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/")
    ):
        raise ModelError(
            f"model.name: no folder {name}", "the base model is read from it", "correct model.name"
        )
    if not folder.exists():
        return name
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ModelError(
            f"model.name: {folder} holds an adapter, not a model",
            "an adapter is a difference to a base model",
            "set model.name to the base, or merge first: python -m flex merge",
        )
    if not (folder / "config.json").exists():
        raise ModelError(
            f"model.name: {folder} has no config.json",
            "without it the model's architecture is unknown",
            "point model.name to a folder that holds config.json and *.safetensors",
        )
    return str(folder.resolve())


def load_config(cfg: ModelConfig) -> PreTrainedConfig:
    """The architecture of `cfg.name`, without its weights.

    Raises:
        ModelError: as `load_model`.
    """
    source = resolve(cfg)
    if source.startswith(_SHAPE):
        return shape_config(source.removeprefix(_SHAPE))
    with _explained(source):
        return AutoConfig.from_pretrained(
            source, revision=cfg.revision or "main", trust_remote_code=False
        )


def load_model(
    cfg: ModelConfig,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    ds_config: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the base: frozen, in eval mode, without a KV cache, in `cfg.dtype`, on `device`.

    The weights of a `shape:` model are made in memory; those of a big one (1 G parameters or more) are written
    once into the cache and read as a real checkpoint's are.

    Args:
        cfg: the model section. `attention=auto` is `flex_varlen` where the architecture allows it.
        device: where the weights go; `meta` allocates nothing (shape models).
        seed: of the weights of a `shape:` model. Not the run's seed: two runs should share one
            base.
        ds_config: DeepSpeed's configuration with ZeRO stage 3, its processes started: each keeps its part of
            every weight, and no process ever holds the whole model. None: every process holds all of it.

    Raises:
        ModelError: the weights are missing, not safetensors, need code from the Hub, do not fit the config, or
            cannot be quantised or partitioned.
    """
    source = resolve(cfg)
    config = load_config(cfg)
    dtype = getattr(torch, cfg.dtype)
    streamed = cfg.quantise != "none" or ds_config is not None
    folder, in_memory = source, False
    if source.startswith(_SHAPE):
        preset = source.removeprefix(_SHAPE)
        in_memory = str(device) == "meta" or not is_big(preset)
        if not in_memory:
            folder = str(shape_folder(preset, seed))
    with _explained(source):
        if streamed and str(device) != "meta":
            random = None
            if in_memory:
                whole = _random_model(config, dtype, torch.device("cpu"), seed, None)
                random = {name: HeldTensor(t) for name, t in whole.state_dict().items()}
            model = _streamed(cfg, folder, random, config, dtype, torch.device(device), ds_config)
        elif in_memory:
            model = _random_model(
                config, dtype, torch.device(device), seed, _attention(cfg, config)
            )
        else:
            model = _pretrained(cfg, folder, config, dtype, device)
    if source.startswith(_SHAPE):
        model.name_or_path = source
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    pointwise.install(model)
    rotary.install(model)
    if cfg.gradient_checkpointing:
        # Non-reentrant: gradients reach the adapters although the embeddings are frozen, and
        # dropout is replayed.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def empty_model(cfg: ModelConfig) -> PreTrainedModel:
    """The architecture of `cfg.name` on `meta`: modules and shapes, no weights and no memory for them.

    Raises:
        ModelError: as `load_config`.
    """
    config = load_config(cfg)
    with _explained(cfg.name):
        dtype = getattr(torch, cfg.dtype)
        return _random_model(config, dtype, torch.device("meta"), 0, _attention(cfg, config))


def base_bytes(cfg: ModelConfig) -> int:
    """Bytes that the whole base takes in `cfg.dtype`, not quantised. Raises ModelError as `load_config`."""
    return sum(p.numel() * p.element_size() for p in empty_model(cfg).parameters())


def is_quantised(model: nn.Module) -> bool:
    """Whether a base, or a PeftModel's, has bitsandbytes' layers, made while it was loaded or found in its folder."""
    return any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `cfg.name`; it always has an EOS and a padding token.

    Raises:
        ModelError: no tokenizer there, or one without an EOS token.
    """
    source = resolve(cfg)
    if source.startswith(_SHAPE):
        return byte_tokenizer(shape_config(source.removeprefix(_SHAPE)).max_position_embeddings)
    with _explained(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=cfg.revision or "main", trust_remote_code=False
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source} has no EOS token",
            "a completion must end with one, or the model never learns to stop",
            "set eos_token in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        log.info("%s has no padding token: EOS pads (padding bears no loss)", source)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _complete(source: str, info: dict[str, Any]) -> None:
    """transformers only warns of missing weights, and fills them with random numbers."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{source} lacks {len(missing)} weights, first {missing[0]}",
            "they would be random numbers",
            "check that config.json and the safetensors belong together",
        )
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise ModelError(
            f"{source}: {len(info['mismatched_keys'])} weights have another shape than its "
            f"config says, first {name}, {tuple(found)} for {tuple(expected)}",
            "they would be random numbers",
            "check that config.json and the safetensors belong together",
        )
    if info["unexpected_keys"]:
        log.info(
            "%d weights of %s belong to no layer and are left out",
            len(info["unexpected_keys"]),
            source,
        )


def _attention(cfg: ModelConfig, config: PreTrainedConfig) -> str | None:
    if cfg.attention != "auto":
        return cfg.attention
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if family is not None and family._supports_attention_backend and family._supports_sdpa:
        attention.register()
        return attention.NAME
    log.info(
        "attention: %s keeps transformers' default, packed attention does not fit it",
        config.model_type,
    )
    return None


def _pretrained(
    cfg: ModelConfig,
    folder: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PreTrainedModel:
    """transformers' own loading: a file in the dtype asked for is mapped, so it takes its size once."""
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None:
        refuse()
        if isinstance(stored, dict) and stored.get("quant_method") == "bitsandbytes":
            # As with model.quantise: the file's own would be the dtype of whoever wrote it.
            wanted: Any = config
            wanted.quantization_config = {**stored, "bnb_4bit_compute_dtype": cfg.dtype}
    model, info = _AnyAuto.from_pretrained(
        folder,
        config=config,
        revision=cfg.revision or "main",
        dtype=dtype,
        device_map=str(device),
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=_attention(cfg, config),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `_complete` names them; transformers' error does not
    )
    _complete(folder, info)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{folder} holds an adapter beside the model",
            "transformers would apply it and say nothing: the base would not be the base",
            "move adapter_config.json away, or merge first: python -m flex merge",
        )
    return model


def _streamed(
    cfg: ModelConfig,
    folder: str,
    tensors: Mapping[str, Source] | None,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    ds_config: Mapping[str, Any] | None,
) -> PreTrainedModel:
    """Our own loading, tensor by tensor, into quantised layers or ZeRO-3's partitions."""
    place: Place
    if ds_config is None:
        assert cfg.quantise != "none"
        place = Quantised(device, cfg.quantise, cfg.double_quant, dtype)
    elif cfg.quantise == "none":
        place = Partitioned(device, ds_config)
    else:
        raise ModelError(
            f"model.quantise={cfg.quantise} with ZeRO stage 3",
            "bitsandbytes' blocks cannot be cut into partitions",
            "use ZeRO stage 0-2, or model.quantise=none",
        )
    if tensors is None:
        path = Path(folder)
        if not path.is_dir():
            wanted = ["*.json", "model*.safetensors"]
            found = snapshot_download(
                folder, revision=cfg.revision or "main", allow_patterns=wanted
            )
            path = Path(found)
        tensors = checkpoint_tensors(path)
    model, info = stream_model(folder, tensors, config, dtype, place, _attention(cfg, config))
    _complete(folder, info)
    model.name_or_path = folder
    return model


def _random_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    implementation: str | None,
) -> PreTrainedModel:
    """Random weights straight in `dtype` on `device`: a 7B model never exists in fp32."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=implementation
        )


def reason(error: BaseException) -> str:
    """The first line of a library's message, with the next one if it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn the libraries' errors into one that says what to type."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"no memory for {source} on the device",
            "the frozen base must fit beside the adapters and the activations",
            "free the device, use model.dtype=bfloat16 or a smaller model",
        ) from error
    except _ERRORS as error:
        raise ModelError(
            f"cannot load {source}: {reason(error)}",
            "only safetensors are read, and code from the Hub is never run",
            "check the files of that folder"
            if os.path.isdir(source)
            else "it is no folder here; as a Hub id: check spelling, network and `hf auth login`",
        ) from error
