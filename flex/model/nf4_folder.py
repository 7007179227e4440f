"""A model whose linear layers are bitsandbytes' 4-bit ones, as a folder that transformers loads by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from flex.model.places import Quantised


def write_nf4(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    place: Quantised,
    card: str,
) -> None:
    """Write weights, configuration, tokenizer and model card into `folder`.

    Args:
        model: its 4-bit layers made by `place`; what else is linear stays as it is, and the configuration says so.
        folder: of `whole_folder`.
    """
    config: Any = model.config
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=place.double_quant,
        bnb_4bit_compute_dtype=place.dtype,
        llm_int8_skip_modules=dense_layers(model, place),
    )
    config.use_cache = True  # load_model turned it off for training
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def dense_layers(model: nn.Module, place: Quantised) -> list[str]:
    """The names of the linear layers that are not in 4 bits: transformers would take them for such."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, place.nn.Linear4bit)
    ]
