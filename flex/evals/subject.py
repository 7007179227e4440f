"""What is evaluated: a base model, perhaps with an adapter, merged or not, in some precision."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from flex.config import ModelConfig
from flex.errors import ConfigError, ModelError
from flex.model import linear
from flex.model.base import load_config, load_model, load_tokenizer, reason, resolve
from flex.model.export import adapter_config, cast_weights, load_adapted
from flex.model.hub_code import refuse

log = logging.getLogger("flex.evals")

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
_AnyAuto: Any = AutoModelForCausalLM


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One system.

    Attributes:
        model: as `model.name` of a training run: a Hub id, a folder, `smollm2-135m`, `shape:<preset>`.
        adapter: folder of an adapter in PEFT's format.
        merged: add the adapter to the weights, in fp32 before they are cast; else stock PEFT
            computes it beside them.
        dtype: of the base weights.
        quantise: "4bit" (bitsandbytes, NF4). Not with `merged`: that would round the adapter too.
        revision: of a Hub id.
        device: "cpu", "cuda"; none: a GPU if there is one.

    Raises ConfigError for a combination that does not go together.
    """

    model: str
    adapter: str | None = None
    merged: bool = False
    dtype: Dtype = "float32"
    quantise: Literal["4bit"] | None = None
    revision: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.merged and self.adapter is None:
            raise ConfigError(
                "--merged without --adapter",
                "there is nothing to merge",
                "give the adapter's folder, or leave --merged out",
            )
        if self.merged and self.quantise is not None:
            raise ConfigError(
                f"--merged with --quantise {self.quantise}",
                "merging would round the adapter to the base's few bits",
                "leave one of them out; merge-check --quantise tells what merging in full precision "
                "changes",
            )
        if self.quantise is not None and self.model.startswith("shape:"):
            raise ConfigError(
                f"--quantise with {self.model}",
                "bitsandbytes quantises weights as it loads them, and these are made up",
                "choose a model with files",
            )

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            name=self.model, revision=self.revision, dtype=self.dtype, attention="sdpa"
        )

    @property
    def where(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def describe(self) -> dict[str, Any]:
        """The `model` section of a result: JSON values, with the sha256 of files that lie here.

        Raises ModelError: the model or the adapter is not there.
        """
        source = resolve(self.config)
        found: dict[str, Any] = {
            "id": self.model,
            "revision": self.revision,
            "adapter": self.adapter,
            "merged": self.merged,
            "dtype": self.dtype,
            "quantised": self.quantise,
        }
        if Path(source).is_dir():
            found["sha256"] = _digests(Path(source))
        elif not source.startswith("shape:"):
            found["revision"] = self.architecture()._commit_hash or self.revision
        if self.adapter is not None:
            adapter_config(Path(self.adapter))  # says what is missing
            found["adapter_sha256"] = _digests(Path(self.adapter), "adapter_")
        return found

    def architecture(self) -> PreTrainedConfig:
        """The configuration of the base, without its weights. Raises ModelError."""
        return load_config(self.config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer. Raises ModelError."""
        return load_tokenizer(self.config)

    def load(self) -> Any:
        """The model in eval mode: of transformers, or a PeftModel of stock PEFT around one.

        Raises ModelError: it cannot be loaded, or the adapter does not fit it.
        """
        model = self._load()
        linear.install(model)
        return model

    def _load(self) -> Any:
        if self.adapter is None:
            return self._base(self.dtype)
        adapter = Path(self.adapter)
        trained_on = adapter_config(adapter).base_model_name_or_path
        if trained_on not in (self.model, resolve(self.config)):
            log.warning(
                "%s was trained on %s and is evaluated on %s", adapter, trained_on, self.model
            )
        exact = self.merged and self.dtype != "float64"
        model = load_adapted(self._base("float32" if exact else self.dtype), adapter)
        if self.merged:
            merged: Any = model.merge_and_unload(safe_merge=True)
            if exact:
                cast_weights(merged, getattr(torch, self.dtype))
            return merged.eval()
        return model.eval()

    def _base(self, dtype: Dtype) -> Any:
        if self.quantise is None:
            return load_model(self.config.model_copy(update={"dtype": dtype}), self.where)
        source = resolve(self.config)
        refuse()
        try:
            model = _AnyAuto.from_pretrained(
                source,
                revision=self.revision or "main",
                dtype=getattr(torch, dtype),
                device_map=str(self.where),
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_compute_dtype=getattr(torch, dtype),
                ),
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
            )
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{source} cannot be loaded in 4 bits: {reason(error)}",
                "bitsandbytes does the quantising",
                "pip install bitsandbytes, or leave --quantise out",
            ) from error
        return model.requires_grad_(False).eval()


def _digests(folder: Path, prefix: str = "") -> dict[str, str]:
    """sha256 by name of what decides a model: configuration, weights, tokenizer."""
    found = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        whole = name.endswith(".safetensors") or name in ("config.json", "tokenizer.json")
        if name.startswith(prefix) and (whole or name == "adapter_config.json"):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
