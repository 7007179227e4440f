"""`python -m flex plan`: what a run needs and the least time a step takes, from its configuration.

No weights, no GPU, and no torch: the answer comes at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from . import plan_cost, plan_memory
from .chips import CHIPS, MEMORIES, Chip, find_chip
from .config import RunConfig
from .ds_file import read_ds_config
from .errors import ConfigError
from .model.architecture import Stored, read_architecture
from .plan_job import Job, make_job

log = logging.getLogger("flex.plan")


def plan_command(
    cfg: RunConfig, gpus: int | None, chip: str | None, tokens: int | None, targets: int | None
) -> int:
    """Print the plan of `cfg`. `gpus` None: WORLD_SIZE, else 1; `chip` None: all that are known.

    Raises:
        ConfigError: a count below 1, an unknown chip, or what `make_job` refuses.
        ModelError: the architecture cannot be found, or is not Llama-like.
    """
    world = int(os.environ.get("WORLD_SIZE", 1)) if gpus is None else gpus
    for option, value in (("--gpus", world), ("--tokens", tokens), ("--targets", targets)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}", "a plan is for at least 1", f"set {option} 1")
    chips = list(CHIPS.values()) if chip is None else [find_chip(chip)]
    job = plan(cfg, world, tokens, targets)
    # a pipe gets whole lines
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    show(job, chips, console)
    return 0


def plan(
    cfg: RunConfig, world: int = 1, tokens: int | None = None, targets: int | None = None
) -> Job:
    """The job that the figures are of; see `make_job`. A base that is quantised already is planned as such."""
    ds_config = None if cfg.deepspeed is None else read_ds_config(cfg.deepspeed)
    model = read_architecture(cfg.model)
    if model.stored is not None:
        cfg = _as_stored(cfg, model.stored)
    return make_job(cfg, model, ds_config, world, tokens, targets)


def _as_stored(cfg: RunConfig, stored: Stored) -> RunConfig:
    if cfg.model.quantise != "none":
        raise ConfigError(
            f"model.quantise={cfg.model.quantise}, and {cfg.model.name} is quantised already ({stored.kind})",
            "its weights are blocks, which cannot be quantised again",
            "set model.quantise=none",
        )
    found = {"quantise": stored.kind, "double_quant": stored.double_quant}
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=found)})


def show(job: Job, chips: Sequence[Chip], console: Console) -> None:
    """Print memory, work, traffic and bounds."""
    cfg, model = job.cfg, job.model
    console.print(
        f"{cfg.model.name}: {model.parameters:,} parameters, {job.adapter_parameters:,} in adapters "
        f"of rank {cfg.lora.r}\n"
        f"{_engine(job)}; a micro-batch holds at most {job.positions:,} positions "
        f"({job.targets:,} bear loss) in documents of {job.document:,}; "
        f"{cfg.train.accumulation} a step and process\n"
    )
    console.print(_memory_table(job))
    console.print(*fits(job), sep="\n")
    console.print(_work_table(job))
    console.print(_launches(job))
    for name, moved in plan_cost.traffic(job).items():
        console.print(f"sent per device and step: {size(moved)}, {name}")
    console.print()
    console.print(_bounds(job, chips))
    console.print(
        "Bounds: published peaks of the data sheets (dense bf16); part by part, the longer of arithmetic"
        "\nand memory; no elementwise passes. A real step takes longer."
    )


def _engine(job: Job) -> str:
    devices = f"{job.world} GPU{'s' if job.world > 1 else ''}"
    if job.sharding.stage is None:
        return f"{devices}, plain PyTorch"
    return f"{devices}, ZeRO {job.stage} ({job.cfg.deepspeed})"


def _memory_table(job: Job) -> Table:
    table = _table("memory per process", "GPU", "CPU", "")
    on = {device: plan_memory.memory(job, device) for device in ("cuda", "cpu")}
    for name in dict.fromkeys(c.name for found in on.values() for c in found):
        both = [next((c for c in on[d] if c.name == name), None) for d in ("cuda", "cpu")]
        one = next(c for c in both if c is not None)
        note = f"{one.note}; on the host" if one.host else one.note
        table.add_row(name, *(size(c.bytes) if c else "-" for c in both), note)
    peaks = [plan_memory.total(on[device]) for device in ("cuda", "cpu")]
    hosts = plan_memory.total(on["cuda"], host=True)
    table.add_row(
        "peak", size(peaks[0]), size(peaks[1] + hosts), f"host: {size(hosts)}" if hosts else ""
    )
    return table


def fits(job: Job) -> list[str]:
    """One line per class of device: whether the peak fits, and what is left or lacking."""
    peak = plan_memory.total(plan_memory.memory(job, "cuda"))
    return [
        f"{memory / 1e9:.0f} GB: "
        + (
            f"fits, {size(memory - peak)} free"
            if peak <= memory
            else f"too small by {size(peak - memory)}"
        )
        for memory in MEMORIES
    ] + [""]


def _work_table(job: Job) -> Table:
    table = _table("work per step and device", "FLOPs", "bytes", "")
    parts = plan_cost.step(job)
    for part in parts:
        table.add_row(part.name, f"{part.flops:.3g}", size(part.bytes), "")
    whole = plan_cost.Part("total", sum(p.flops for p in parts), sum(p.bytes for p in parts))
    table.add_row(whole.name, f"{whole.flops:.3g}", size(whole.bytes), "")
    return table


def _launches(job: Job) -> str:
    counts = plan_cost.launches(job)
    known = sum(count or 0 for count in counts.values())
    text = ", ".join(f"{name} {count or 'torch'}" for name, count in counts.items())
    return f"launches of the optimizer's step on a GPU: {known} counted ({text})"


def _bounds(job: Job, chips: Sequence[Chip]) -> Table:
    table = _table("step at least", "compute s", "traffic s", "positions/s", "memory")
    peak = plan_memory.total(plan_memory.memory(job, "cuda"))
    positions = job.positions * job.cfg.train.accumulation * job.world
    for chip in chips:
        compute, sent = plan_cost.bound(job, chip)
        rate = positions / max(compute, sent)
        enough = "fits" if peak <= chip.memory else "too small"
        table.add_row(chip.name, f"{compute:.3f}", f"{sent:.3f}", f"{rate:,.0f}", enough)
    return table


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, header in enumerate(headers):
        last = place == len(headers) - 1
        table.add_column(header, justify="left" if place == 0 or last else "right")
    return table


def size(count: float) -> str:
    """Bytes in decimal units, as data sheets count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:.0f} B"
