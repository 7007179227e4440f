"""`--dry-run`: everything that a run checks before its first step, but the weights; nothing is written.

The checks are the run's own functions, so the errors are the run's own. What cannot be looked at from here (no
network, no GPU) is listed as not checked, never as passed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from peft.tuners.lora.layer import LoraLayer

from . import processes
from .build import build_update
from .config import RunConfig
from .config_io import config_hash
from .data.loader import DataBundle, StepLoader, load_data
from .engine_zero import check_ds_config, partitioned_config, read_ds_config
from .errors import DataError, FlexError, ModelError
from .model.adapters import adapter_parameters, add_adapters
from .model.base import empty_model, load_tokenizer, resolve
from .model.stream import refuse_quantised
from .ranges import check_profile
from .run_folder import inspect_run
from .train import check_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS_LOOKED_AT = 1000  # for the largest micro-batch: dealing a step takes up to a millisecond
OFFLINE = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)


class Report:
    """Lines of what was found, and of what could not be looked at."""

    def __init__(self) -> None:
        self.passed: list[tuple[str, str]] = []
        self.unchecked: list[tuple[str, str]] = []

    def ok(self, what: str, found: str) -> None:
        self.passed.append((what, found))

    def not_checked(self, what: str, why: str) -> None:
        self.unchecked.append((what, why))

    def show(self) -> None:
        for what, found in self.passed:
            print(f"{'ok':<12} {what:<14} {found}")
        for what, why in self.unchecked:
            print(f"{'not checked':<12} {what:<14} {why}")
        left = f", {len(self.unchecked)} not checked" if self.unchecked else ""
        print(f"dry run: {len(self.passed)} checks passed{left}; nothing was written", flush=True)


def rehearse(cfg: RunConfig, world: int | None = None) -> int:
    """Check the run as `world` processes would start it (None: as launched); print a report, return 0.

    No process group, no weights, no file. On several processes each one looks, since each node has its own files;
    rank 0 reports.

    Raises:
        FlexError: what the run itself would raise.
    """
    report = Report()
    count = processes.world() if world is None else world
    check_settings(cfg, count)
    report.ok("configuration", f"{cfg.name}, {config_hash(cfg)[:12]}; {_method(cfg)}")
    report.ok(
        "engine", f"{cfg.deepspeed or 'plain PyTorch'}, {count} process{'es'[: 2 * (count > 1)]}"
    )
    _check_devices(count, report)
    tokenizer = _check_tokenizer(cfg, report)
    data = None
    if tokenizer is not None:
        data = _check_data(cfg, tokenizer, count, report)
        _check_model(cfg, report)
    report.ok("run folder", inspect_run(cfg, None if data is None else data.fingerprint()))
    if cfg.track:
        report.ok("trackers", ", ".join(cfg.track))
    report.not_checked("weights", "a dry run loads none; `python -m flex plan` says what fits")
    if processes.rank() == 0:
        report.show()
    return 0


def _method(cfg: RunConfig) -> str:
    penalty = f"penalty {cfg.penalty.weight:g}" if cfg.penalty.active else "no penalty"
    return f"{cfg.optim.name}, lr {cfg.optim.lr:g}, {penalty}, {cfg.model.dtype}, quantise {cfg.model.quantise}"


def _check_devices(count: int, report: Report) -> None:
    here = torch.cuda.device_count()
    if here:
        report.ok("devices", f"{here} x {torch.cuda.get_device_name(0)} here for {count} processes")
    else:
        report.not_checked("devices", "no GPU here: a run from here would be on the CPU")


def _check_tokenizer(cfg: RunConfig, report: Report) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = load_tokenizer(cfg.model)
    except ModelError as error:
        if not offline(error):
            raise
        report.not_checked("tokenizer", f"no network to fetch that of {cfg.model.name}")
        report.not_checked("data", "it cannot be encoded without the tokenizer")
        report.not_checked("architecture", f"no network to fetch that of {cfg.model.name}")
        return None
    report.ok("tokenizer", f"{len(tokenizer):,} tokens, EOS {tokenizer.eos_token!r}")
    return tokenizer


def _check_data(
    cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, world: int, report: Report
) -> DataBundle | None:
    try:
        data = load_data(cfg, tokenizer)
    except DataError as error:
        if not offline(error):
            raise
        report.not_checked("data", f"no network to fetch {cfg.data.name}; give data.path=FILE")
        return None
    sizes = f"{len(data.train)} train, {len(data.validation)} validation"
    report.ok("data", f"{sizes}; {data.ledger.summary()}")
    loader = StepLoader(
        data.train, cfg, min(processes.rank(), world - 1), world, tokenizer.pad_token_id
    )
    check_profile(cfg.profile, loader.total_steps)
    looked_at = min(loader.total_steps, STEPS_LOOKED_AT)
    targets = sum(loader.targets(step) for step in range(looked_at)) / looked_at
    positions = sum(loader.positions(step) for step in range(looked_at)) / looked_at
    report.ok(
        "steps",
        f"{loader.total_steps} of {cfg.train.batch_size} examples ({world} x {cfg.train.accumulation} "
        f"micro-batches), {positions:,.0f} tokens each, {targets:,.0f} of them targets",
    )
    longest, step = loader.largest_micro_batch(looked_at)
    of = "" if looked_at == loader.total_steps else f" of the first {looked_at}"
    report.ok("largest batch", f"{longest:,} tokens in one micro-batch, in step {step}{of}")
    if cfg.profile.tool != "none":
        report.ok("profile", f"{cfg.profile.tool}, steps {cfg.profile.steps}")
    return data


def _check_model(cfg: RunConfig, report: Report) -> None:
    """The architecture without its weights: targets, penalty, optimizer and the size of the adapters."""
    model = empty_model(cfg.model)
    source = resolve(cfg.model)
    if cfg.model.quantise != "none" or partitioned_config(cfg) is not None:
        refuse_quantised(source, model.config)
    if Path(source).is_dir():
        report.ok("weight files", f"{_check_files(Path(source))} safetensors in {source}")
    size = sum(p.numel() for p in model.parameters())
    kind = type(model).__name__
    peft_model = add_adapters(model, cfg.lora, cfg.seed, cfg.kernels.impl)
    for layer in peft_model.modules():
        if isinstance(
            layer, LoraLayer
        ):  # adapters are small, and the penalty looks at their values
            for factor in (layer.lora_A, layer.lora_B):
                factor.to_empty(device="cpu")
    parameters = adapter_parameters(peft_model)
    for parameter in parameters.values():
        parameter.data.zero_()
    if cfg.deepspeed is not None:
        largest = max(p.numel() for p in parameters.values())
        check_ds_config(read_ds_config(cfg.deepspeed), cfg, largest)
    build_update(cfg, peft_model, parameters)
    report.ok("architecture", f"{kind}, {size / 1e9:.2f} B parameters")
    trained = sum(p.numel() for p in parameters.values())
    targets = ", ".join(cfg.lora.targets)
    report.ok(
        "adapters",
        f"{len(parameters) // 2} on {targets}: {trained / 1e6:.1f} M parameters, r {cfg.lora.r}",
    )


def _check_files(folder: Path) -> int:
    """Number of safetensors files. Raises ModelError if there is none, or the index names one that is missing."""
    found = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    wanted: set[str] = set()
    if index.exists():
        try:
            wanted = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{index} cannot be read: {error}",
                "it says which file holds a weight",
                "fetch it again",
            ) from error
    missing = sorted(wanted - found)
    if missing or not found:
        raise ModelError(
            f"{folder} lacks {missing[0] if missing else 'safetensors files'}",
            "the weights are read from there, and from no other format",
            "fetch the model again, or point model.name to a whole copy",
        )
    return len(found)


def offline(error: FlexError) -> bool:
    """Whether the reason behind `error` is that there is no network, not that the name is wrong."""
    return any(
        isinstance(cause, OFFLINE)
        or type(cause).__module__.partition(".")[0] in ("httpx", "requests", "urllib3")
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
