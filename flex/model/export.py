"""Adapters leave the trainer: saved in PEFT's format, tested with stock PEFT, merged."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraConfig, LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from flex.config import ModelConfig
from flex.errors import ModelError
from flex.model.base import load_config, load_model, load_tokenizer, reason
from flex.model.folder import whole_folder

log = logging.getLogger("flex.model")

PROMPT = "def add(a, b):\n    return a + b\n"
# Of the largest logit, if that is above 1: two orders of summation differ by no more.
FP32_TOLERANCE = 1e-5


def save_adapter(
    model: PeftModel,
    out_dir: str | Path,
    base_name: str,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the adapter as stock PEFT reads it, with a model card.

    The folder appears whole or not at all; an adapter already there is replaced.

    Args:
        model: the model with its adapters; only names and configuration are read if `tensors` is
            given.
        out_dir: the adapter's folder.
        base_name: what `resolve` returned for the base; goes into adapter_config.json.
        tensors: whole adapter tensors by parameter name (`...lora_A.default.weight`), as gathered
            under ZeRO-3.

    Raises:
        ModelError: a tensor is missing, has no elements (a partition that was not gathered) or is
            not finite.
    """
    ours = {name: p for name, p in model.named_parameters() if "lora_" in name}
    found = ours if tensors is None else tensors
    whole = {name: found[name].detach().cpu() for name in ours if name in found}
    for problem, names in {
        "missing": sorted(ours.keys() - whole.keys()),
        "empty": [name for name, tensor in whole.items() if tensor.numel() == 0],
        "not finite": [
            name for name, tensor in whole.items() if not bool(torch.isfinite(tensor).all())
        ],
    }.items():
        if names:
            raise ModelError(
                f"{len(names)} of {len(ours)} adapter tensors are {problem}, first {names[0]}",
                "such an adapter would load without complaint and be wrong",
                "export from the last good checkpoint; under ZeRO-3, gather the tensors first",
            )
    out = Path(out_dir)
    config = model.peft_config["default"]
    with whole_folder(out, replace=True) as draft:
        named = copy.copy(config)
        named.base_model_name_or_path = base_name
        model.peft_config["default"] = named
        try:
            model.save_pretrained(str(draft), state_dict=whole, save_embedding_layers=False)
        finally:
            model.peft_config["default"] = config
        (draft / "README.md").write_text(_card(named, base_name))
    return out


@dataclass(frozen=True)
class SelfTest:
    """What stock PEFT made of an adapter; differences are the largest between two logits."""

    tensors: int
    dtype: str  # of the base
    difference: float  # stock PEFT against ours
    effect: float  # adapter against base
    largest: float  # logit

    def __str__(self) -> str:
        return (
            f"stock PEFT loads {self.tensors} tensors; logits differ from ours by "
            f"{self.difference:.1e} ({self.dtype}, largest logit {self.largest:.1f}), "
            f"from the base by {self.effect:.1e}"
        )


def probe_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits (1, T, vocabulary) in fp32 on the CPU for `input_ids` (1, T), in eval mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            return model(input_ids=input_ids.to(device), use_cache=False).logits.float().cpu()
    finally:
        model.train(training)


def self_test(
    adapter_dir: str | Path,
    input_ids: Tensor,
    our_logits: Tensor,
    base: PreTrainedModel | Callable[[], PreTrainedModel],
) -> SelfTest:
    """Load the adapter with stock PEFT, none of our classes, and compare.

    Args:
        adapter_dir: what `save_adapter` wrote.
        input_ids: (1, T) int64, any prompt.
        our_logits: `probe_logits(model, input_ids)` of the trained model.
        base: the bare base model (it is returned to that state, unless the adapter does not load),
            or a function that loads one. Only one base need be in memory at a time: pass
            `peft_model.unload()`, or a loader once the trained model is gone.

    Returns:
        The differences. In fp32 they are enforced; in half precision only measured, because
        rounding order rules them.

    Raises:
        ModelError: a key is missing or unexpected, a layer is not PEFT's own, logits differ from
            ours in fp32, or equal the base's although B is not zero.
    """
    bare = base if isinstance(base, PreTrainedModel) else base()
    stock = load_adapted(bare, Path(adapter_dir))
    try:
        with stock.disable_adapter():
            base_logits = probe_logits(stock, input_ids)
        logits = probe_logits(stock, input_ids)
        weights = get_peft_model_state_dict(stock, save_embedding_layers=False)
        foreign = {
            type(m).__qualname__
            for m in stock.modules()
            if isinstance(m, LoraLayer) and not type(m).__module__.startswith("peft.")
        }
    finally:
        stock.unload()
    report = SelfTest(
        tensors=len(weights),
        dtype=str(bare.dtype).removeprefix("torch."),
        difference=(logits - our_logits.float().cpu()).abs().max().item(),
        effect=(logits - base_logits).abs().max().item(),
        largest=our_logits.abs().max().item(),
    )
    trained = any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    exact = bare.dtype == torch.float32
    failure = None
    if foreign:
        failure = f"layers that are not PEFT's own answered: {', '.join(sorted(foreign))}"
    elif exact and not report.difference <= FP32_TOLERANCE * max(1.0, report.largest):
        failure = "its logits are not those of the trained model"
    elif trained and report.effect == 0.0:
        failure = "its logits are those of the base although B is not zero"
    if failure is not None:
        raise ModelError(
            f"the adapter in {adapter_dir} fails its self-test: {failure}",
            str(report),
            "do not use this adapter; report this with the run's config.yaml",
        )
    return report


@dataclass(frozen=True)
class MergeReport:
    out_dir: Path
    base: str
    dtype: str
    difference: float  # largest |logit| difference between merged, as saved, and unmerged in fp32

    def __str__(self) -> str:
        return (
            f"{self.out_dir}: merged in float32, saved in {self.dtype}; "
            f"logits differ from the unmerged by {self.difference:.1e}"
        )


def merge(
    adapter_dir: str | Path,
    out_dir: str | Path,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> MergeReport:
    """Add the adapter to its base in fp32 and save a model that plain transformers loads.

    Args:
        adapter_dir: an adapter in PEFT format.
        out_dir: a folder that does not exist or is empty.
        base: base model; none: the one that adapter_config.json names.
        dtype: of the saved weights. Half precision rounds the sum, and with it the adapter.

    Raises:
        ModelError: `out_dir` is not empty, the base cannot be found or is quantised, or the adapter
            does not fit it.
    """
    adapter, out = Path(adapter_dir), Path(out_dir)
    with whole_folder(out) as draft:
        name = base or adapter_config(adapter).base_model_name_or_path
        if not name:
            raise ModelError(
                f"{adapter} does not name its base model",
                "there is nothing to merge into",
                "give the base model",
            )
        cfg = ModelConfig(name=name, dtype="float32", attention="sdpa")
        if getattr(load_config(cfg), "quantization_config", None) is not None:
            raise ModelError(
                f"the base {name} is quantised",
                "merging would round the adapter to the base's few bits",
                "give the base model in full precision, with --base: the one that was quantised",
            )
        model, tokenizer = load_model(cfg), load_tokenizer(cfg)
        prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
        adapted = load_adapted(model, adapter)
        unmerged = probe_logits(adapted, prompt)
        merged = adapted.merge_and_unload(safe_merge=True)
        cast_weights(merged, getattr(torch, dtype))
        difference = (probe_logits(merged, prompt) - unmerged).abs().max().item()
        merged.config.use_cache = True  # load_model turned it off for training
        merged.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    report = MergeReport(out_dir=out, base=name, dtype=dtype, difference=difference)
    log.info("%s", report)
    return report


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters in place, as loading the saved model in `dtype` would.

    Not model.to(): it rounds RoPE's frequencies too, which are buffers.
    """
    for p in model.parameters():
        p.data = p.data.to(dtype)


def adapter_config(adapter: Path) -> PeftConfig:
    """The configuration of an adapter's folder. Raises ModelError: a file is missing or damaged."""
    missing = [
        name
        for name in ("adapter_config.json", "adapter_model.safetensors")
        if not (adapter / name).is_file()
    ]
    if missing:
        raise ModelError(
            f"{adapter} has no {' and no '.join(missing)}",
            "an adapter is these two files; weights in other formats are not read",
            "point to a folder that save_pretrained of PEFT wrote, such as runs/NAME/adapter",
        )
    try:
        return PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{adapter / 'adapter_config.json'} cannot be read: {error}",
            "it says where the adapter goes",
            "restore the file",
        ) from error


def load_adapted(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """Stock PEFT's own loading, with what it merely warns about made an error."""
    adapter_config(adapter)
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            saved = set(file.keys())
        model = PeftModel.from_pretrained(base, str(adapter))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"PEFT cannot load {adapter}: {reason(error)}",
            "the adapter must fit the base layer by layer",
            "use the base it was trained on (adapter_config.json names it)",
        ) from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if saved != expected:
        raise ModelError(
            f"{adapter}: {len(expected - saved)} tensors missing and {len(saved - expected)} "
            f"unexpected, first {min(saved ^ expected)}",
            "the adapter would be applied in part",
            "use the base it was trained on, or export it again",
        )
    return model


def _card(config: PeftConfig, base_name: str) -> str:
    base = Path(base_name)
    front = ["library_name: peft", "pipeline_tag: text-generation", "tags: [lora, code, flex]"]
    if not base.is_absolute() and not base_name.startswith("shape:"):
        front.append(f"base_model: {json.dumps(base_name)}")
    assert isinstance(config, LoraConfig)
    targets = ", ".join(sorted(config.target_modules or []))
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "# LoRA adapter trained with FLeX",
            "",
            f"- base model: `{base_name}`",
            f"- rank {config.r}, alpha {config.lora_alpha}, on {targets}",
            "- files: PEFT's own format; nothing of FLeX is needed to use it",
            "",
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")',
            "```",
            "",
            "No scores are stated: this card was written before any evaluation.",
            "",
        ]
    )
