"""A model built without memory and filled from its checkpoint tensor by tensor.

`from_pretrained` maps the files into memory, where their pages count beside what is made of them, and under ZeRO-3
rank 0 reads the whole checkpoint. Here a process holds what it keeps and one tensor. The largest come first, while
there is still room.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from flex.errors import ModelError
from flex.model.places import Place
from flex.model.tensors import Source, same_values

log = logging.getLogger("flex.model")

_AnyAuto: Any = AutoModelForCausalLM


def stream_model(
    source: str,
    tensors: Mapping[str, Source],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    place: Place,
    attention: str | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of `tensors`, its weights where `place` puts them, none requiring a gradient.

    Args:
        source: what errors call it.
        tensors: the weights by name, as `checkpoint_tensors` finds them.
        config: the architecture.
        dtype: of the weights that are not quantised, and of the arithmetic of those that are.
        place: what becomes of each weight.
        attention: name of transformers' implementation; none: its default.

    Returns:
        The model, and what was amiss in the words of transformers' `output_loading_info`: `missing_keys`,
        `mismatched_keys` (name, shape found, shape expected) and `unexpected_keys`. If a weight is missing or
        mismatched, nothing was read and the model is not usable.

    Raises:
        ModelError: the checkpoint is quantised already, its weights must be converted first, or a file is damaged.
    """
    refuse_quantised(source, config)
    with torch.device("meta"):
        model = _AnyAuto.from_config(config, dtype=dtype, attn_implementation=attention)
    _refuse_special_dtypes(model, dtype, source)
    wanted = _weights(model)
    found = _rename(model, tensors, wanted, source)
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    for copy, original in list(tied.items()):
        if copy in found and original in found and not same_values(found[copy], found[original]):
            log.warning(
                "%s: %s and %s are to be tied and differ in the checkpoint: both are kept",
                *(source, original, copy),
            )
            del tied[copy]
            continue
        if copy in found:  # some checkpoints hold both, some only the one that is tied to the other
            found.setdefault(original, found[copy])
            del found[copy]
        wanted.pop(copy, None)
    model.all_tied_weights_keys = tied
    info: dict[str, Any] = {
        "missing_keys": wanted.keys() - found.keys(),
        "mismatched_keys": {
            (name, found[name].shape, tuple(tensor.shape))
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tuple(tensor.shape)
        },
        "unexpected_keys": found.keys() - wanted.keys(),
    }
    if info["missing_keys"] or info["mismatched_keys"]:
        return model, info
    place.prepare(model)
    for name in sorted(wanted, key=lambda name: -found[name].numel):
        module, leaf = _owner(model, name)
        place.put(module, leaf, found[name], wanted[name].dtype)
        return_freed_memory()
    for copy, original in tied.items():
        module, leaf = _owner(model, copy)
        setattr(module, leaf, model.get_parameter(original))
    _fill_buffers(model, place.device)
    return model, info


def refuse_quantised(source: str, config: PreTrainedConfig) -> None:
    """Raise ModelError if the checkpoint is quantised: transformers alone loads such, and every process the whole."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{source} is quantised already",
            "its weights are blocks, which can be neither quantised again nor cut into partitions",
            "set model.quantise=none and ZeRO stage 0-2, or point model.name to the model in bf16, fp16 or fp32",
        )


def return_freed_memory() -> None:
    """Have glibc give freed memory back to the system; a no-op with other C libraries.

    It keeps what was freed between things that stay: 3.5 GB on one of two ranks after loading 13.5 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold: parameters and persistent buffers by name, tied ones by both names."""
    return dict(model.state_dict(keep_vars=True))


def _rename(
    model: PreTrainedModel,
    found: Mapping[str, Source],
    wanted: dict[str, torch.Tensor],
    source: str,
) -> dict[str, Source]:
    """`found` under the model's own names, as transformers renames them."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    renamed = {}
    for key, tensor in found.items():
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if pattern is not None and name in wanted:
            raise ModelError(
                f"{source}: {key} must be converted to become {name}",
                f"{model.config.model_type} stores some weights in other pieces than it computes with, and only "
                "from_pretrained puts them together",
                "use model.quantise=none and ZeRO stage 0-2 for it",
            )
        renamed[name] = tensor
    return renamed


def _refuse_special_dtypes(model: PreTrainedModel, dtype: torch.dtype, source: str) -> None:
    special = model._get_dtype_plan(dtype)
    if special:
        raise ModelError(
            f"{source}: {model.config.model_type} keeps {', '.join(sorted(special))} in fp32",
            f"loading tensor by tensor casts all weights to {dtype}".replace("torch.", ""),
            "use model.dtype=float32, or model.quantise=none and ZeRO stage 0-2",
        )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute what no checkpoint holds, such as RoPE's frequencies, as `from_pretrained` does.

    Only modules with such a buffer are initialised again; the flag keeps transformers off all weights.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
    for module in model.modules():
        empty = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        module._is_hf_initialized = not empty  # type: ignore[assignment]
    model.initialize_weights()
