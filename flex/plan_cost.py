"""FLOPs, bytes moved and bytes between devices of one optimizer step, by part, per device.

Products of (M, K) and (K, N) count 2 M K N FLOPs. Bytes are those that must cross the device's
memory: operands read once, results written once. Elementwise passes (norms, RoPE, SwiGLU) are not
counted, so that times from these figures stay lower bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .chips import Chip
from .plan_job import Job, gradient_flow
from .plan_memory import FP32, frozen_bytes, linear_bytes

# Bytes per adapter parameter and FLOPs of an update: parameter and states read and written,
# gradient and curvature read. Sophia also reads the gradient for its norm, as every clipping does.
UPDATE_BYTES = {"sophia": 24, "adamw": 28, "adamw8bit": 16, "lion": 20, "signum": 20}
UPDATE_FLOPS = 12
# Triton launches: the norm's square sums and their sum, the update of all matrices, the clipped count.
SOPHIA_LAUNCHES = 4


@dataclass(frozen=True)
class Part:
    """Work of one step on one device."""

    name: str
    flops: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        """The roofline's bound: whichever of arithmetic and memory takes longer."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)

    def times(self, factor: float, name: str | None = None) -> Part:
        return Part(name or self.name, self.flops * factor, self.bytes * factor)


def micro_batch(job: Job, device: str = "cuda") -> list[Part]:
    """Forward and backward of one micro-batch."""
    found = [*_forward(job, device), *_backward(job, device), _loss(job)]
    if job.cfg.model.gradient_checkpointing:
        found.append(_recompute(job, device))
    return merge(found)


def _recompute(job: Job, device: str) -> Part:
    """The layers' forward again; it stops at the last tensor to be kept, ahead of a frozen down_proj."""
    layers = _sum("recompute", [p for p in _forward(job, device) if p.name != "logits"])
    down = job.shapes["mlp.down_proj"]
    spared = sum(down.name not in adapted for adapted in job.adapters)
    moved = _weight_traffic(job, down.weights)
    moved += job.width * job.positions * (down.inputs + down.outputs)
    flops = layers.flops - spared * 2.0 * job.positions * down.weights
    return Part("recompute", flops, layers.bytes - spared * moved)


def _weight_traffic(job: Job, weights: int) -> float:
    """One pass over frozen weights; quantised ones are read, written dense and read again."""
    stored = linear_bytes(job, weights)
    return stored if job.cfg.model.quantise == "none" else stored + 2 * job.width * weights


def _forward(job: Job, device: str) -> list[Part]:
    model, t, b, n = job.model, job.positions, job.width, job.targets
    flops = bytes_ = 0.0
    for linear in model.linears:
        flops += 2.0 * t * linear.weights
        bytes_ += _weight_traffic(job, linear.weights) + b * t * (linear.inputs + linear.outputs)
    head = model.hidden * model.vocabulary
    return [
        Part("frozen GEMM, forward", model.layers * flops, model.layers * bytes_),
        _lora_forward(job),
        _attention(job, device, model.layers, backward=False),
        Part("logits", 2.0 * n * head, b * (head + n * (model.hidden + model.vocabulary))),
    ]


def _lora_forward(job: Job) -> Part:
    flops = bytes_ = 0.0
    for adapted in job.adapters:
        for name in adapted:
            linear = job.shapes[name]
            flops += 2.0 * job.positions * job.cfg.lora.r * (linear.inputs + linear.outputs)
            bytes_ += job.width * job.positions * linear.inputs  # x once more, for S
    return Part("LoRA", flops, bytes_)


def _backward(job: Job, device: str) -> list[Part]:
    model, t, b, r = job.model, job.positions, job.width, job.cfg.lora.r
    dx, dx_bytes, lora, lora_bytes, attention = 0.0, 0.0, 0.0, 0.0, 0
    for adapted, live in zip(job.adapters, gradient_flow(job), strict=True):
        attention += "self_attn.o_proj" in live
        for linear in model.linears:
            if linear.name in live:
                dx += 2.0 * t * linear.weights
                dx_bytes += _weight_traffic(job, linear.weights)
                dx_bytes += b * t * (linear.inputs + linear.outputs)
            if linear.name in adapted:  # dB, dS, dA, and dX where something below wants it
                lora += 2.0 * t * r * (2 * linear.outputs + linear.inputs)
                lora += 2.0 * t * r * linear.inputs * (linear.name in live)
                lora_bytes += b * t * (linear.inputs + linear.outputs)
    head, n = model.hidden * model.vocabulary, job.targets
    return [
        Part("frozen GEMM, dX", dx, dx_bytes),
        Part("LoRA", lora, lora_bytes),
        _attention(job, device, attention, backward=True),
        Part("logits", 2.0 * n * head, b * (head + n * (model.hidden + model.vocabulary))),
    ]


def _attention(job: Job, device: str, layers: int, backward: bool) -> Part:
    """Computes the scores again in backward (eager keeps them); on a GPU the causal half, on a CPU all of them."""
    model, t, b = job.model, job.positions, job.width
    length = job.document if job.cfg.model.attention == "auto" else t
    product = 2.0 * t * length * model.attention_width
    products = 2.0 if not backward else 4.0 if job.cfg.model.attention == "eager" else 5.0
    products = products / 2 if device == "cuda" else products
    moved = b * t * (2 * model.attention_width + 2 * model.kv_width) * (2 if backward else 1)
    return Part("attention", layers * product * products, layers * moved)


def _loss(job: Job) -> Part:
    logits = job.targets * job.model.vocabulary
    return Part("loss", 8.0 * logits, 3.0 * job.width * logits)  # logits, gradient out and in


def step(job: Job, device: str = "cuda") -> list[Part]:
    """One optimizer step of a process: all micro-batches, and the refresh spread over its period."""
    cfg, p = job.cfg, job.adapter_parameters
    share = p / job.world if job.stage > 0 else p
    once = micro_batch(job, device)
    found = [part.times(cfg.train.accumulation) for part in once]
    if cfg.optim.name == "sophia":
        estimate = Part("", 2.0 * share, 12.0 * share)
        work = cfg.optim.curvature.share_of(cfg.train.batch_size)
        passes = _sum("", once).times(cfg.train.accumulation * work / cfg.train.batch_size)
        estimates = estimate.times(refreshes(job) * cfg.optim.curvature.every)
        refresh = _sum("curvature refresh", [passes, estimates])
        found.append(refresh.times(1 / cfg.optim.curvature.every))
    if cfg.penalty.active:
        found.append(_penalty(job))
    norm = FP32 * share
    update = UPDATE_BYTES[cfg.optim.name] * share + norm
    found.append(Part(cfg.optim.name, UPDATE_FLOPS * share, update))
    return found


def refreshes(job: Job) -> float:
    """Micro-batches of a curvature refresh per optimizer step, on average; 0 without Sophia."""
    cfg = job.cfg
    if cfg.optim.name != "sophia":
        return 0.0
    curvature = cfg.optim.curvature
    return curvature.share_of(cfg.train.accumulation) / curvature.every


def _penalty(job: Job) -> Part:
    """A real transform and its inverse, 2.5 N log2 N FLOPs each, over each line of length N."""
    penalty, r = job.cfg.penalty, job.cfg.lora.r
    flops = 0.0
    for adapted in job.adapters:
        for name in adapted:
            for features in (job.shapes[name].inputs, job.shapes[name].outputs):
                line = features if penalty.transform == "axis" else r * features
                flops += 5.0 * r * features * math.log2(line)
    start = penalty.target != "factors"  # w, gradient in and out, and w0
    shares = job.world if job.stage > 0 or job.sharding.stage == 0 else 1
    moved = FP32 * (4 if start else 3) * job.adapter_parameters
    return Part("penalty", flops / shares, moved / shares)


def launches(job: Job) -> dict[str, int | None]:
    """Triton launches of the optimizer's step on a GPU, whatever the number of matrices.

    None: torch's own operations, which are not counted.
    """
    cfg, found = job.cfg, dict[str, int | None]()
    if cfg.penalty.active:
        lengths = {
            features
            for adapted in job.adapters
            for name in adapted
            for features in (job.shapes[name].inputs, job.shapes[name].outputs)
        }
        in_place = cfg.penalty.transform == "axis" and cfg.penalty.coupling == "gradient"
        fits = in_place and cfg.penalty.target != "delta_w" and job.sharding.stage is None
        # one for each length of the feature axis, one for their sums, and torch's sum of those
        found["penalty"] = len(lengths) + 2 if fits and cfg.kernels.impl != "torch" else None
    sophia = cfg.optim.name == "sophia" and cfg.kernels.impl != "torch"
    found[cfg.optim.name] = SOPHIA_LAUNCHES if sophia and job.sharding.stage is None else None
    return found


def traffic(job: Job) -> dict[str, float]:
    """Bytes that a device sends in one step, by part, on a ring of `world` devices."""
    n = job.world
    if n == 1:
        return {}
    ring = (n - 1) / n
    grads = FP32 * job.adapter_parameters * ring
    boundaries = 1 + refreshes(job)
    passes = job.cfg.train.accumulation + refreshes(job)
    if job.stage == 0:
        return {"adapter gradients (all-reduce)": 2 * grads * boundaries}
    reduces = passes if job.stage >= 2 else boundaries
    found = {
        "adapter gradients (reduce-scatter)": grads * reduces,
        "adapters (all-gather)": grads * boundaries,
    }
    if job.stage == 3:
        again = 3 if job.cfg.model.gradient_checkpointing else 2
        found[f"frozen weights (all-gather, {again} a micro-batch)"] = (
            again * passes * ring * frozen_bytes(job)
        )
    return found


def bound(job: Job, chip: Chip) -> tuple[float, float]:
    """Lower bounds in seconds of a step's computing, part by part, and of its traffic."""
    return sum(part.seconds(chip) for part in step(job)), sum(traffic(job).values()) / chip.link


def _sum(name: str, parts: list[Part]) -> Part:
    return Part(name, sum(p.flops for p in parts), sum(p.bytes for p in parts))


def merge(parts: list[Part]) -> list[Part]:
    """Parts of one name as one, in the order of first appearance."""
    names = dict.fromkeys(part.name for part in parts)
    return [_sum(name, [p for p in parts if p.name == name]) for name in names]
