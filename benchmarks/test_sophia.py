"""Sophia's update of 40 M fp32 parameters, the adapters of a 7B at rank 16, beside other optimizers' steps.

As 448 matrices and as the one flat vector that ZeRO hands over. The aim is the time of torch's fused AdamW, which moves
28 bytes an element where Sophia moves 24. Peers update copies of their own of the same parameters.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from benchmarks.cases import CODE_LLAMA_7B, TINY, normal
from benchmarks.harness import Bench, Gate, Missing, Work
from flex.kernels.budget import budget_used
from flex.kernels.sophia_update import sophia_update
from flex.kernels.sophia_update.reference import sophia_reference

RANK, BYTES, AIM = 16, 24, 1.0  # p, m, h, g in; p, m out
SOPHIA = {"lr": 1e-4, "beta1": 0.9, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.01}
AIMED = "torch AdamW, fused"
CHECKED = 2**20  # elements at both ends of the first and the last tensor
BUILD_SECONDS = 240
log = logging.getLogger(__name__)

Step = Callable[[], object]


def parameters(values: list[Tensor], grads: list[Tensor]) -> list[torch.nn.Parameter]:
    found = [torch.nn.Parameter(x.clone()) for x in values]
    for parameter, grad in zip(found, grads, strict=True):
        parameter.grad = grad
    return found


def fused_adamw(p: list[Tensor], g: list[Tensor]) -> Step:
    return torch.optim.AdamW(parameters(p, g), lr=1e-4, fused=True).step


def deepspeed_adam(p: list[Tensor], g: list[Tensor], tiny: bool) -> Step | Missing:
    """DeepSpeed's AVX Adam. A process of its own compiles it first: a build that hangs then has an end."""
    if p[0].device.type != "cpu":
        return Missing("a CPU's")
    if tiny:
        return Missing("not built for --tiny")
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
    build = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, errors = build.communicate(timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(build.pid, signal.SIGKILL)  # the compilers too
        build.communicate()
        # its lock stays, and the next build would wait for it
        log.warning("DeepSpeedCPUAdam: remove cpu_adam of torch's extensions before you try again")
        return Missing(f"not built in {BUILD_SECONDS} s")
    if build.returncode:
        log.warning("DeepSpeedCPUAdam was not built: %s", errors.decode(errors="replace")[-300:])
        return Missing("not built")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters(p, g), lr=1e-4).step


def sophia_opt(p: list[Tensor], g: list[Tensor]) -> Step | Missing:
    """The package sophia-opt: the published SophiaG, a loop over tensors."""
    try:
        SophiaG = import_module("sophia_opt").SophiaG
    except ImportError:
        return Missing()
    return SophiaG(parameters(p, g), lr=1e-4).step


def sophia_h(p: list[Tensor], g: list[Tensor]) -> Step | Missing:
    """SophiaH of pytorch_optimizer, between its Hessian estimates (one is asked for once)."""
    try:
        SophiaH = import_module("pytorch_optimizer").SophiaH
    except ImportError:
        return Missing()
    optimizer = SophiaH(parameters(p, g), lr=1e-4, weight_decay=0.01, update_period=10**9)
    optimizer.step(hessian=[x.square() for x in g])
    return optimizer.step


@pytest.mark.parametrize("matrices", [True, False], ids=["matrices", "flat"])
def test_sophia_update(matrices: bool, bench: Bench):
    shapes = (TINY if bench.tiny else CODE_LLAMA_7B).adapters(RANK)
    elements = sum(a * b for a, b in shapes)
    operands = shapes if matrices else [(elements,)]
    p, m, h, g = (normal(operands, seed, bench.device, torch.float32) for seed in range(4))
    h = [x.square_() for x in h]

    peers = {AIMED: fused_adamw(p, g), "DeepSpeedCPUAdam": deepspeed_adam(p, g, bench.tiny)}
    peers |= {"sophia-opt SophiaG": sophia_opt(p, g), "pytorch_optimizer SophiaH": sophia_h(p, g)}
    bench.compare(
        f"sophia_update, {len(operands)} tensors",
        lambda: sophia_update(p, m, h, g, **SOPHIA, impl=bench.impl),
        peers,
        lambda: gate(p, m, h, g, bench.impl),
        shape=f"{elements / 1e6:.3g} M",
        dtype="fp32",
        work=Work(bytes=BYTES * elements),
        aims={AIMED: AIM},
    )


def gate(p: list[Tensor], m: list[Tensor], h: list[Tensor], g: list[Tensor], impl: str) -> Gate:
    """One update, on copies, against fp64."""
    new_p, new_m = ([x.clone() for x in found] for found in (p, m))
    sophia_update(new_p, new_m, h, g, **SOPHIA, impl=impl)
    worst = 0.0
    for index in (0, -1):
        for part in (slice(0, CHECKED), slice(-CHECKED, None)):
            operands = [found[index].flatten()[part] for found in (p, m, h, g)]
            exact = sophia_reference(*(x.double() for x in operands), **SOPHIA)
            eager = sophia_reference(*operands, **SOPHIA)
            for k, new in enumerate((new_p, new_m)):
                used = budget_used(new[index].flatten()[part], eager[k], exact[k])
                worst = max(worst, used)
    return Gate("p and m: share of the error budget", worst)
