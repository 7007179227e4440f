"""Where the time of an optimizer step goes: torch.profiler's events, each given to one part of the step.

An event's own time (without that of the calls inside it) belongs to the first part that its name, its shapes or those
of the calls around it tell, from the inside out. What no rule knows is "rest": Python between operators is not seen
by the profiler and is the difference of the step's time and all events.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flex.config import RunConfig
    from flex.engine import Engine
    from flex.penalty import SpectralPenalty

PARTS = (
    "frozen GEMM",
    "LoRA",
    "attention",
    "loss and LM head",
    "norms and pointwise",
    "optimizer",
    "penalty",
    "refresh",
    "rest",
)
GEMMS = re.compile(r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|addmm_)$")
# Our own GEMM's range: K, N and its least bytes, of 16-bit numbers.
OURS = re.compile(r"^gemm/(\d+)x(\d+) (\d+)$")
# Whole phases and kernels: whatever runs inside is theirs, if nothing further in says otherwise.
RANGES = (
    (re.compile(r"^penalty$|^penalised_update|^spectral_penalty"), "penalty"),
    (re.compile(r"^optimizer$|^Optimizer\.|^sophia_update"), "optimizer"),
    (re.compile(r"Attention|scaled_dot_product"), "attention"),
    (re.compile(r"CrossEntropy|BlockLoss|cross_entropy"), "loss and LM head"),
    (re.compile(r"lora_linear|_LoraLinear|_Siblings"), "LoRA"),
    (re.compile(r"_RmsNorm|_SwiGlu"), "norms and pointwise"),
)
POINTWISE = re.compile(
    r"aten::(mul|add|sub|neg|silu|silu_backward|pow|rsqrt|mean|sum|cat|copy|_to_copy|to|div|cos|sin|fill|clone|"
    r"slice_backward|native_dropout|_fused_rms_norm|rms_norm|contiguous|expand|reshape|zero|zeros|empty|index|"
    r"index_select|index_put|_index_put_impl|embedding|embedding_dense_backward|stack|ones_like|constant_pad_nd)_?$"
)


@dataclass
class Profiled:
    """Mean over the profiled steps without a refresh, and what one refresh takes.

    Attributes:
        seconds: by part, "refresh" not among them. Their sum is `step`.
        refresh: one refresh. every: steps between refreshes; 0: never.
        flops: of the matrix products of a part, counted from their shapes, per step.
        targets, positions: per step, of the batches that were profiled.
        documents: lengths of the documents of one step.
    """

    seconds: dict[str, float]
    step: float
    refresh: float
    every: int
    flops: dict[str, float]
    loss: float
    targets: float
    positions: float
    documents: list[list[int]] = field(default_factory=list)

    @property
    def average(self) -> float:
        """Seconds of a step with its share of a refresh."""
        return self.step + self.refresh_share_seconds

    @property
    def refresh_share_seconds(self) -> float:
        return self.refresh / self.every if self.every else 0.0

    def shares(self) -> dict[str, float]:
        """Of the average step, by part."""
        seconds = {**self.seconds, "refresh": self.refresh_share_seconds}
        return {part: seconds.get(part, 0.0) / self.average for part in PARTS}


def part_of(chain: Sequence[tuple[str, Sequence[Any]]], rank: int, vocabulary: int) -> str:
    """The part that an event belongs to.

    Args:
        chain: (name, input shapes) of the event, then of the calls around it, the innermost first.
        rank: of the adapters: a product with that inner or outer size is LoRA's.
        vocabulary: tokens: a product with that size is the LM head's.
    """
    for name, shapes in chain:
        if ours := OURS.search(name):
            return "loss and LM head" if str(vocabulary) in ours.groups()[:2] else "frozen GEMM"
        if GEMMS.search(name):
            sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
            if vocabulary in sizes:
                return "loss and LM head"
            inside = {
                part for outer, _ in chain for pattern, part in RANGES if pattern.search(outer)
            }
            if inside & {"attention", "penalty", "optimizer"}:
                break
            return "LoRA" if rank in sizes else "frozen GEMM"
    for name, _ in chain:
        for pattern, part in RANGES:
            if pattern.search(name):
                return part
    return "norms and pointwise" if POINTWISE.search(chain[0][0]) else "rest"


def product_flops(name: str, shapes: Sequence[Any]) -> float:
    """2 M N K of an innermost matrix product, 0 of anything else."""
    if ours := OURS.search(name):
        depth, columns, least_bytes = map(int, ours.groups())
        return 2.0 * (least_bytes / 2 - depth * columns) / (depth + columns) * depth * columns
    found = re.search(r"aten::(mm|addmm_|addmm|bmm|baddbmm)$", name)
    if not found:
        return 0.0
    first = 1 if found[1] in ("addmm", "addmm_", "baddbmm") else 0
    if len(shapes) < first + 2 or len(shapes[first]) < 2 or len(shapes[first + 1]) < 2:
        return 0.0
    a, b = shapes[first], shapes[first + 1]
    batch = a[0] if len(a) == 3 else 1
    return 2.0 * batch * a[-2] * a[-1] * b[-1]


def chain_of(event: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    while event is not None:
        yield event.name, event.input_shapes or ()
        event = event.cpu_parent


def make_engine(cfg: RunConfig) -> tuple[Engine, SpectralPenalty | None, int]:
    """What `train_step` needs of a configuration, in this process; and the model's number of tokens."""
    from flex.build import build_update
    from flex.engine import build_engine
    from flex.model.adapters import adapter_parameters, add_adapters
    from flex.model.base import load_model

    model = add_adapters(load_model(cfg.model), cfg.lora, cfg.seed, cfg.kernels.impl)
    parameters = adapter_parameters(model)
    penalty, optimizer = build_update(cfg, model, parameters)
    engine = build_engine(cfg, model, optimizer, parameters)
    return engine, penalty, int(model.get_base_model().config.vocab_size)


def profile(cfg: RunConfig, steps: int, warm_up: int = 1) -> Profiled:
    """Train a few steps of a configuration in this process and look at them.

    The first step (with its refresh) warms up; a refresh is looked at on its own, at the first step's batch.

    Args:
        steps: profiled ones, one each time, so that no trace grows long.
    """
    from flex.data.loader import StepLoader, load_data
    from flex.model.base import load_tokenizer
    from flex.step import refresh_curvature, train_step

    tokenizer = load_tokenizer(cfg.model)
    loader = StepLoader(load_data(cfg, tokenizer).train, cfg, 0, 1, tokenizer.pad_token_id or 0)
    engine, penalty, vocabulary = make_engine(cfg)
    torch.manual_seed(cfg.seed)
    total = loader.total_steps
    for step in range(warm_up):
        train_step(cfg, engine, loader, penalty, step, total)

    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    flops: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    found = Profiled(seconds, 0.0, 0.0, 0, flops, 0.0, 0.0, 0.0)
    if cfg.optim.name == "sophia":
        found.every = cfg.optim.curvature.every
        begin = time.perf_counter()
        refresh_curvature(cfg, engine, loader, 0)
        found.refresh = time.perf_counter() - begin
    plain = step_without_refresh(cfg)
    for step in range(warm_up, warm_up + steps):
        for part, (spent, work) in _profiled_step(
            lambda step=step: train_step(plain, engine, loader, penalty, step, total),
            cfg.lora.r,
            vocabulary,
            found,
        ).items():
            seconds[part] += spent / steps
            flops[part] += work / steps
        found.targets += loader.targets(step) / steps
        found.positions += loader.positions(step) / steps
        found.documents.append(
            [len(loader.examples[row].input_ids) for _, row in loader.sequence.draws(step)]
        )
    found.step = sum(seconds.values())
    engine.close()
    return found


def step_without_refresh(cfg: RunConfig) -> RunConfig:
    """The same run with its refreshes too far apart to come."""
    curvature = cfg.optim.curvature.model_copy(update={"every": 10**9, "warmup": 0})
    return cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"curvature": curvature})})


def _profiled_step(
    step: Any, rank: int, vocabulary: int, found: Profiled
) -> dict[str, tuple[float, float]]:
    """(seconds, flops) by part of one step under the profiler; "rest" holds what no event covers."""
    from flex.kernels.ranges import install

    activities = [torch.profiler.ProfilerActivity.CPU]
    before = install(
        lambda name, bytes: torch.profiler.record_function(
            f"{name} {bytes}" if name.startswith("gemm/") else name
        )
    )
    try:
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            begin = time.perf_counter()
            report, _ = step()
            took = time.perf_counter() - begin
    finally:
        install(before)
    found.loss = report.loss
    parts = {part: [0.0, 0.0] for part in PARTS}
    for event in profiler.events():
        part = part_of(list(chain_of(event)), rank, vocabulary)
        parts[part][0] += event.self_cpu_time_total / 1e6
        parts[part][1] += product_flops(event.name, event.input_shapes or ())
    parts["rest"][0] += max(0.0, took - sum(spent for spent, _ in parts.values()))
    return {part: (spent, work) for part, (spent, work) in parts.items()}
