"""`python -m flex quantise`: the base of a run in NF4, rounded on the run's training data, as a folder of its own."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import loss_head, processes
from .config import RunConfig
from .data.loader import DataBundle, StepLoader, load_data, validation_batches
from .errors import ConfigError, ModelError
from .meters import format_duration
from .model import linear
from .model.base import load_config, load_model, load_tokenizer, resolve
from .model.folder import whole_folder
from .model.nf4_folder import write_nf4
from .model.places import Quantised
from .state import Batch
from .step import target_loss

log = logging.getLogger("flex.quantise")

TOKENS = 131_072  # to calibrate on: GPTQ takes 262,144 of a general text; here they are of the task itself


def quantise_command(cfg: RunConfig, out: Path, tokens: int) -> int:
    """Quantise, write, load again, and print what each of the three models makes of the validation rows. Returns 0.

    Args:
        cfg: model and data of the run. Its model section must not quantise.
        out: a folder that does not exist or is empty.
        tokens: whole batches of the first epoch are taken until they hold so many.

    Raises:
        ConfigError: a count below 1, or the configuration quantises the base itself.
        DataError: as `load_data`.
        ModelError: `out` is not empty; the base is quantised already or cannot be calibrated.
    """
    _check(cfg, tokens)
    device = processes.local_device()
    processes.share_cores()
    start = time.monotonic()
    with whole_folder(out) as draft:
        place = _place(cfg, device)
        from .calibrate import linear_layers, round_model  # needs bitsandbytes, as `place` does

        tokenizer = load_tokenizer(cfg.model)
        data = load_data(cfg, tokenizer)
        batches = calibration_batches(data, cfg, tokenizer, tokens)
        positions = sum(batch.num_positions for batch in batches)
        log.info(
            "calibration: %s positions of %d training rows, none of the validation split",
            f"{positions:,}",
            sum(len(batch.example_ids) for batch in batches),
        )
        model = load_model(cfg.model, device)
        names = linear_layers(model)
        validation = [
            batch.to(device)
            for batch in validation_batches(data.validation, cfg, 0, 1, tokenizer.pad_token_id)
        ]
        _ready(model)
        dense = measure(model, validation)
        log.info("validation loss of the dense base: %s", _loss(dense))
        round_model(model, [batch.to(device) for batch in batches], place, names)
        write_nf4(model, tokenizer, draft, place, _card(cfg, positions, len(names)))
        del model
    seconds = time.monotonic() - start
    found = cfg.model.model_copy(update={"name": str(out)})
    losses = {
        f"dense ({cfg.model.dtype})": dense,
        "NF4, nearest rounding": _nearest(cfg, device, validation),
        f"NF4, calibrated ({out})": measure(_ready(load_model(found, device)), validation),
    }
    width = max(map(len, losses))
    print(f"validation loss before training, {len(data.validation)} rows:")
    for name, loss in losses.items():
        print(f"  {name:<{width}}  {_loss(loss, dense)}")
    print(f"{len(names)} matrices, {positions:,} calibration positions, {format_duration(seconds)}")
    print(f"train it with: model.name={out}", flush=True)
    return 0


def calibration_batches(
    data: DataBundle, cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> list[Batch]:
    """Micro-batches of the first epoch's whole steps, as the run has them, until they hold `tokens` positions."""
    loader = StepLoader(data.train, cfg, 0, 1, tokenizer.pad_token_id)
    batches: list[Batch] = []
    for step in range(max(1, len(data.train) // cfg.train.batch_size)):
        for batch in loader.micro_batches(step):
            if sum(b.num_positions for b in batches) >= tokens:
                return batches
            batches.append(batch)
    return batches


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy per target token in nats; NaN without targets."""
    count = sum(batch.num_targets for batch in batches)
    total = sum(float(target_loss(model, batch)) for batch in batches)
    return total / count if count else math.nan


def _check(cfg: RunConfig, tokens: int) -> None:
    if tokens < 1:
        raise ConfigError(
            f"--tokens is {tokens}", "calibration needs some of the data", "set --tokens 1 or more"
        )
    if cfg.model.quantise != "none":
        raise ConfigError(
            f"model.quantise={cfg.model.quantise}",
            "this command rounds the dense base itself, and must read it whole",
            "add model.quantise=none",
        )
    if cfg.model.dtype == "float64":
        raise ConfigError(
            "model.dtype=float64",
            "bitsandbytes computes in 16 or 32 bits",
            "set model.dtype=bfloat16",
        )
    if getattr(load_config(cfg.model), "quantization_config", None) is not None:
        raise ModelError(
            f"{cfg.model.name} is quantised already",
            "what its first rounding lost cannot be found again",
            "point model.name to the model in bf16, fp16 or fp32",
        )


def _place(cfg: RunConfig, device: torch.device) -> Quantised:
    dtype: torch.dtype = getattr(torch, cfg.model.dtype)
    return Quantised(device, "nf4", cfg.model.double_quant, dtype)


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """As the trainer computes with it: 4-bit weights as they are stored, loss block by block."""
    from .model.adapters_quantised import keep_layout

    keep_layout(model)
    loss_head.install(model)
    linear.install(model)
    return model


def _nearest(cfg: RunConfig, device: torch.device, validation: Sequence[Batch]) -> float | str:
    """What model.quantise=nf4 starts from, or why it cannot be said."""
    section = cfg.model.model_copy(update={"quantise": "nf4"})
    try:
        return measure(_ready(load_model(section, device)), validation)
    except ModelError as error:
        return f"not measured: {error.what}"


def _loss(loss: float | str, dense: float | None = None) -> str:
    if isinstance(loss, str):
        return loss
    if math.isnan(loss):
        return "no validation rows"
    return (
        f"{loss:.4f}" if dense is None or loss == dense else f"{loss:.4f} ({loss / dense - 1:+.1%})"
    )


def _card(cfg: RunConfig, positions: int, matrices: int) -> str:
    base = resolve(cfg.model)
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [code, flex, nf4, bitsandbytes, gptq]",
            "---",
            "# A base model in NF4, rounded on data",
            "",
            f"- made from `{base}` by `python -m flex quantise`",
            f"- {matrices} matrices, codes chosen as GPTQ does (arXiv 2210.17323), aimed at the dense model's outputs "
            f"(GPTAQ, arXiv 2504.02692), on {positions:,} positions of the training split of `{cfg.data.name}`",
            f"- scales {'in 8 bits' if cfg.model.double_quant else 'in fp32'}; the other weights in "
            f"{cfg.model.dtype}",
            "- files: bitsandbytes' own 4-bit format; nothing of FLeX is needed to load it",
            "",
            "An adapter trained on it is merged into the dense base: "
            "`python -m flex merge --adapter DIR --base BASE --out DIR`.",
            "",
        ]
    )
