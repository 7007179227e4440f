"""Bytes of a run by component, on one device, from closed forms over the model's shape.

Legend: T positions of a micro-batch, n of them bear loss, h hidden, f FFN, a = heads x head size,
k = key heads x head size, r rank, V vocabulary, b bytes of the base's dtype. RMSNorm works in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .chips import has_bf16_dot_products
from .plan_job import Job, gradient_flow

# Stated, not derived. A process that has imported torch, transformers, PEFT, bitsandbytes and
# DeepSpeed, without a model: 541 MB of VmRSS (torch 2.13 for CPUs, transformers 5.23, x86-64 Linux).
PROCESS = 541e6
CUDA_CONTEXT = 600e6  # context, loaded kernels and cuBLAS's workspace
NCCL = 300e6  # buffers, where there are other devices
FRAGMENTATION = 0.03  # of what torch allocates: rounding and holes
# Holes that glibc leaves between tensors on a CPU, as a share of a step's: 0.35 for SmolLM2-135M and
# 1,024 positions (peak 2.18 GB; 1.85 GB with MALLOC_MMAP_THRESHOLD_=262144, which leaves none). With it
# peaks of a 7B (r 8 on gate, up, down; 512 positions a step; ckpt: activation checkpointing) are, in GB:
#     NF4 7.02 planned, 6.96 measured; NF4 ckpt 5.29, 5.77; bf16 16.5, 15.9; bf16 ckpt 14.8, 14.8; bf16 ckpt in two
#     ZeRO-3 processes 20.3, 20.9
HEAP = 0.35

FP32 = 4
STATE = {"sophia": 8, "adamw": 8, "adamw8bit": 2, "lion": 4, "signum": 4}  # bytes per parameter
NF4_BLOCK, DOUBLE_BLOCK, INT8_SCALE = 64, 256, 4
SHORT = 640  # on a CPU longer documents take flash attention (flex/model/attention_cpu.py)
CPU_ROWS, GPU_ROWS = 32, 4096  # of logits widened to fp32 at a time (flex/loss.py)
LOSS_BLOCK = 256 * 1024**2  # bytes of logits that exist at a time (flex/loss_head.py)
PENALTY_CHUNK = 2**20  # elements that the penalty's torch path transforms at a time


@dataclass(frozen=True)
class Component:
    """A part of a device's memory. bytes on the device, or on the host if `host`."""

    name: str
    bytes: float
    note: str = ""
    host: bool = False


def frozen_bytes(job: Job) -> float:
    """The whole frozen base as it is stored, not split."""
    model = job.model
    return (
        linear_bytes(job, model.linear_weights, model.layers) + job.width * model.other_parameters
    )


def linear_bytes(job: Job, weights: int, layers: int = 0) -> float:
    """Linear weights as stored; `layers`: how many layers' int8 row scales to count."""
    quantise = job.cfg.model.quantise
    if quantise == "none":
        return float(job.width * weights)
    if quantise == "int8":
        return weights + INT8_SCALE * layers * sum(linear.outputs for linear in job.model.linears)
    scales = weights / NF4_BLOCK
    if not job.cfg.model.double_quant:
        return weights / 2 + FP32 * scales
    return weights / 2 + scales + FP32 * scales / DOUBLE_BLOCK


def layer_activations(job: Job, layer: int, device: str) -> float:
    """What autograd keeps of one layer from forward to backward, each storage once."""
    model, t, b, r = job.model, job.positions, job.width, job.cfg.lora.r
    adapted, live = job.adapters[layer], gradient_flow(job)[layer]
    norm = _norm(job, device)
    total = 0.0
    # attention
    if "self_attn.q_proj" in live:
        total += norm
    if any(f"self_attn.{name}_proj" in adapted for name in "qkv"):
        total += b * t * model.hidden
    if "self_attn.o_proj" in live:
        total += _attention(job, device)
    # on a GPU it is the attention's output, kept already
    if "self_attn.o_proj" in adapted and (device == "cpu" or "self_attn.o_proj" not in live):
        total += b * t * model.attention_width
    # MLP
    gate = "mlp.gate_proj" in live or "mlp.gate_proj" in adapted
    up = "mlp.up_proj" in live or "mlp.up_proj" in adapted
    if "mlp.gate_proj" in live:
        total += norm
    if adapted & {"mlp.gate_proj", "mlp.up_proj"}:
        total += b * t * model.hidden
    if _one_pass(job, device):
        again = gate or up  # down_proj's input is made of them again
        total += b * t * model.ffn * 2 * again
    else:  # gate for SiLU and up for the product; SiLU's output for up
        again = False
        total += b * t * model.ffn * (2 * gate + up)
    if "mlp.down_proj" in adapted and not again:
        total += b * t * model.ffn
    return total + b * t * r * len(adapted)


def _one_pass(job: Job, device: str) -> bool:
    """Whether flex/model/pointwise.py computes norms and SwiGLU; supposes a C compiler."""
    return device == "cpu" and job.cfg.model.dtype == "bfloat16"


def _norm(job: Job, device: str) -> float:
    """What an RMSNorm keeps: x, widened by transformers' own, and 1 / rms in fp32."""
    width = job.width if _one_pass(job, device) else FP32
    return job.positions * (width * job.model.hidden + FP32)


def _attention_in_c(job: Job, device: str) -> bool:
    """Whether flex.kernels.causal_attention computes attention on this machine; supposes a C compiler."""
    model = job.cfg.model
    fits = job.model.head_dim % 32 == 0 and model.attention == "auto"
    return device == "cpu" and model.dtype == "bfloat16" and fits and has_bf16_dot_products()


def _attention(job: Job, device: str) -> float:
    model, t, b = job.model, job.positions, job.width
    query, keys = b * t * model.attention_width, 2 * b * t * model.kv_width
    if job.cfg.model.attention == "eager":  # fp32 and narrow probabilities over the whole row
        return query + keys + (FP32 + b) * model.heads * t * t
    if _attention_in_c(job, device):
        largest_and_sum = 2 * FP32 * model.heads * t
        return query + keys + largest_and_sum
    if device == "cuda" or job.document > SHORT:
        return 2 * query + keys + FP32 * model.heads * t  # and the output, log-sum-exp
    return query + keys


def activations(job: Job, device: str) -> float:
    """Everything kept for backward when the loss is reached, without the logits."""
    model, t, b = job.model, job.positions, job.width
    layers = range(model.layers)
    tail = _norm(job, device) + 2 * b * t * model.head_dim  # final norm; cos and sin
    if job.cfg.model.gradient_checkpointing:
        return model.layers * b * t * model.hidden + tail
    return sum(layer_activations(job, layer, device) for layer in layers) + tail


def backward_workspace(job: Job, device: str) -> float:
    """What one layer's backward holds beside what forward kept; the layer itself if recomputed."""
    model, t, b = job.model, job.positions, job.width
    inner = b * t * (3 * model.ffn + 2 * model.hidden)  # three gradients in the MLP, two residual
    if device == "cpu" and job.cfg.lora.dropout > 0:
        inner += (4 + b) * t * model.ffn  # dropout's mask and the masked input of down_proj
    again = layer_activations(job, model.layers - 1, device)
    return inner + (again if job.cfg.model.gradient_checkpointing else 0.0)


def weight_workspace(job: Job, device: str) -> tuple[float, str]:
    """Dense copies of frozen weights: one layer dequantised, or what ZeRO-3 holds gathered.

    Gathered ahead is a bucket that the last weight in it overshoots; while it is on its way it is held again in the
    buffer that all of it arrives in, and by gloo, on a CPU, in one more.
    """
    if job.cfg.model.quantise != "none":
        return job.width * max(linear.weights for linear in job.model.linears), "one layer dense"
    if job.stage == 3:
        bucket = job.sharding.prefetch + max(linear.weights for linear in job.model.linears)
        held = min(job.model.parameters, job.sharding.live + bucket)
        on_the_way = min(job.model.parameters, bucket) * (2 if device == "cpu" else 1)
        why = "gathered: stage3_max_live_parameters, and on the way"
        return job.width * (held + on_the_way), why
    return 0.0, ""


def trainable(job: Job) -> list[Component]:
    """Adapters, gradients, optimizer and penalty, whose size no micro-batch changes."""
    p, n, zero = job.adapter_parameters, job.world, job.stage > 0
    share = math.ceil(p / n) if zero else p
    host = job.sharding.offload_optimizer
    optim, penalty = job.cfg.optim, job.cfg.penalty
    copies = p + (share if zero else 0)  # ZeRO steps an fp32 copy of its share
    grads = FP32 * p if job.stage < 2 else FP32 * (share + min(p, job.sharding.bucket))
    found = [
        Component(
            "adapters", FP32 * (p if host else copies), "fp32" + (" + ZeRO's copy" if zero else "")
        ),
        Component("gradients", grads, "fp32"),
        Component("optimizer state", STATE[optim.name] * share, optim.name, host),
    ]
    if host:
        found.append(Component("adapters (ZeRO's copy)", FP32 * share, "fp32", host))
    if optim.name == "sophia":
        found.append(Component("curvature estimates", FP32 * share, "while h is refreshed", host))
    if penalty.active:
        kept = FP32 * p if penalty.target != "factors" else 0
        found.append(Component("penalty: start", kept, "A0 and B0" if kept else "no start kept"))
        found.append(Component("penalty: workspace", _penalty_workspace(job), "transforms"))
    return found


def _penalty_workspace(job: Job) -> float:
    penalty = job.cfg.penalty
    if penalty.target == "delta_w" or job.stage > 0:  # stacked: weights, gradient, a spectrum
        return 4 * FP32 * job.adapter_parameters / (job.world if penalty.target != "delta_w" else 1)
    largest = job.cfg.lora.r * max(max(x.inputs, x.outputs) for x in job.model.linears)
    chunk = max(largest, min(PENALTY_CHUNK, job.adapter_parameters))
    return 4 * FP32 * chunk


def loss_rows(job: Job) -> int:
    """Targets whose logits exist at a time: those of one block of the loss."""
    return max(1, LOSS_BLOCK // (job.width * job.model.vocabulary))


def memory(job: Job, device: str) -> list[Component]:
    """All components of a process on `device` ("cuda" or "cpu") at the step's peak."""
    b, v = job.width, job.model.vocabulary
    targets = min(job.targets, loss_rows(job))
    rows = min(targets, GPU_ROWS if device == "cuda" else CPU_ROWS)
    logits = b * targets * v
    if targets < job.targets:  # in blocks, whose gradients take the logits' place
        loss = FP32 * rows * v + b * job.targets * job.model.hidden
    else:  # its gradient, the upstream product (GPU), a block in fp32
        loss = logits * (2 if device == "cuda" else 1) + FP32 * rows * v
    held, why = weight_workspace(job, device)
    split = job.world if job.stage == 3 else 1
    found = [
        Component(
            "frozen weights",
            frozen_bytes(job) / split,
            job.cfg.model.quantise if job.cfg.model.quantise != "none" else job.cfg.model.dtype,
            job.sharding.offload_param,
        ),
        *trainable(job),
        Component("activations", activations(job, device), "kept for backward"),
        Component("logits", logits, f"{targets} of {job.targets} targets x {v}"),
        Component(
            "workspace: step",
            max(loss, backward_workspace(job, device)),
            "the larger of the loss and one layer's backward",
        ),
    ]
    if held:
        found.append(Component("workspace: weights", held, why))
    of_step = sum(c.bytes for c in found if c.name in _STEP)
    extra = _validation(job) - of_step
    if extra > 0:
        found.append(Component("validation", extra, f"{job.validation} positions, beyond a step"))
    on_device = sum(c.bytes for c in found if not c.host)
    if device == "cuda":
        overhead = CUDA_CONTEXT + (NCCL if job.world > 1 else 0) + FRAGMENTATION * on_device
        found.append(Component("overhead", overhead, "assumed: context, fragmentation, NCCL"))
    else:
        found.append(Component("process", PROCESS, "libraries, measured"))
        note = "assumed: holes; none with MALLOC_MMAP_THRESHOLD_=262144"
        found.append(Component("heap", HEAP * (of_step + held), note))
    return found


_STEP = ("activations", "logits", "workspace: step")


def _validation(job: Job) -> float:
    """Logits and one layer's forward of a validation batch, without gradients."""
    model, t, b = job.model, job.validation, job.width
    # the same share bears loss
    targets = min(t * job.targets / job.positions, loss_rows(job))
    layer = t * (3 * b * model.ffn + 2 * FP32 * model.hidden)
    return max(layer, b * targets * model.vocabulary + FP32 * CPU_ROWS * model.vocabulary)


def total(components: list[Component], host: bool = False) -> float:
    """Bytes of those on the device, or on the host."""
    return sum(c.bytes for c in components if c.host == host)
