"""What an optimizer step costs on a CPU beside the gradients: Sophia against fused AdamW, the penalty against autograd.

    python -m pytest benchmarks/test_optimizer_pass.py

Adapters of all seven projections of Code Llama 7B: 448 matrices, 40 M elements at rank 16, 20 M at rank 8; and one
flat vector of as many, as ZeRO hands them over. Results are compared first; then both sides run in turns and the
ratio is of the medians. The floor is the bytes that ours must move, at the rate of a sum in place timed in the same
turns. On a busy machine the barriers of torch's threads distort both sides: set FLEX_THREADS=1 there. The aims:
Sophia no slower than AdamW, the penalty a quarter of autograd's time.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from flex.kernels.budget import budget_used
from flex.kernels.sophia_update import sophia_update
from flex.kernels.sophia_update.native import native_step
from flex.kernels.sophia_update.reference import sophia_reference
from flex.kernels.spectral_penalty import (
    Spectrum,
    spectral_penalty_into,
    spectral_penalty_reference,
)

LAYERS = 32
PROJECTIONS = (*[(4096, 4096)] * 4, *[(4096, 11008)] * 2, (11008, 4096))  # inputs, outputs
SOPHIA = {"lr": 1e-4, "beta1": 0.9, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.01}
WEIGHT = 0.5
ROUNDS = {"sophia": 25, "penalty": 9}
# bytes per fp32 element: p, m, h, g in, p, m out; AdamW's v is written too; w, gradient in, gradient out
SOPHIA_BYTES, ADAMW_BYTES, PENALTY_BYTES = 24, 28, 12
SUM = 2**25  # elements of the sum that the floor's rate is taken from: beyond any cache
LONGEST = 30.0  # seconds a case may be timed for, if three rounds are done

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def threads():
    """FLEX_THREADS or the whole machine, whatever OMP_NUM_THREADS says; put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("FLEX_THREADS", len(os.sched_getaffinity(0)))))
    yield
    torch.set_num_threads(before)


def adapter_shapes(rank: int) -> list[tuple[int, int]]:
    """A (r, K), B (N, r) of every projection."""
    pairs = [((rank, k), (n, rank)) for k, n in PROJECTIONS]
    return [shape for pair in pairs * LAYERS for shape in pair]


def normal(shapes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def in_turns(rounds: int, **steps: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each step in each round; an in-place sum runs among them as "sum"."""
    source, target = torch.zeros(SUM), torch.ones(SUM)
    steps = {**steps, "sum": lambda: target.add_(source)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    for turn in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn >= 2:  # two warm up
                seconds[name].append(time.perf_counter() - begin)
        if turn >= 4 and time.perf_counter() - started > LONGEST:
            break
    return seconds


def line(case: str, found: dict[str, list[float]], bytes_moved: int) -> tuple[str, float]:
    """Both medians, their ratio, that of the fastest rounds, the floor; and the ratio."""
    ours, other, plain = (statistics.median(times) for times in found.values())
    first, second, _ = (min(times) for times in found.values())
    rate = 12 * SUM / plain
    text = (
        f"{case:<34} {1e3 * ours:7.1f} ms {1e3 * other:7.1f} ms {ours / other:5.2f} x (fastest rounds "
        f"{first / second:.2f} x)  floor {1e3 * bytes_moved / rate:5.1f} ms: {bytes_moved / 1e6:.0f} MB at "
        f"{rate / 1e9:.1f} GB/s; {len(found['sum'])} rounds"
    )
    return text, ours / other


def machine() -> str:
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, load {load}"


@pytest.mark.parametrize("matrices", [False, True], ids=["one vector", "448 matrices"])
def test_sophia_is_no_slower_than_fused_adamw(matrices, capsys):
    shapes = adapter_shapes(16)
    size = sum(a * b for a, b in shapes)
    shapes = shapes if matrices else [(size,)]
    p, m, h, g = (normal(shapes, seed) for seed in range(4))
    h = [x.square_() for x in h]
    assert_right(p, m, h, g)
    parameters = [torch.nn.Parameter(x.clone()) for x in p]
    for parameter, grad in zip(parameters, g, strict=True):
        parameter.grad = grad
    adamw = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def sophia() -> object:
        return sophia_update(p, m, h, g, **SOPHIA, impl="torch")

    found = in_turns(ROUNDS["sophia"], ours=sophia, adamw=adamw.step)
    case = f"Sophia | fused AdamW, {len(shapes)} x fp32"
    text, ratio = line(case, found, SOPHIA_BYTES * size)
    with capsys.disabled():
        print(f"\n{machine()}{'' if native_step() else '; no C compiler: list operations'}")
        print(f"{text}; AdamW moves {ADAMW_BYTES / SOPHIA_BYTES:.2f} times the bytes")
    if ratio > 1.0:
        pytest.xfail(f"1.0 x fused AdamW is the aim, {ratio:.2f} x is measured")


def assert_right(p: list[Tensor], m: list[Tensor], h: list[Tensor], g: list[Tensor]) -> None:
    """One update, on copies, within the error budget: both ends of the first and the last tensor."""
    new_p, new_m = ([x.clone() for x in found] for found in (p, m))
    sophia_update(new_p, new_m, h, g, **SOPHIA, impl="torch")
    for index in (0, -1):
        for part in (slice(0, 2**20), slice(-(2**20), None)):
            operands = [found[index].flatten()[part] for found in (p, m, h, g)]
            exact = sophia_reference(*(x.double() for x in operands), **SOPHIA)
            eager = sophia_reference(*operands, **SOPHIA)
            for k, new in enumerate((new_p, new_m)):
                used = budget_used(new[index].flatten()[part], eager[k], exact[k])
                assert used <= 1.0, f"tensor {index}: {used:.2f} of the error budget"


@pytest.mark.parametrize("transform", ["flat", "axis"])
def test_the_penalty_takes_a_quarter_of_autograds_time(transform, capsys):
    spectrum, shapes = Spectrum(transform=transform), adapter_shapes(8)
    roles = ["A", "B"] * (len(shapes) // 2)
    params = normal(shapes, 0)
    grads = [torch.zeros(shape) for shape in shapes]
    leaves = [p.clone().requires_grad_() for p in params]

    def naive() -> None:
        for leaf in leaves:
            leaf.grad = None
        each = zip(leaves, roles, strict=True)
        value = sum(spectral_penalty_reference(w, spectrum, role) for w, role in each)
        (WEIGHT * value).backward()

    def ours() -> object:
        return spectral_penalty_into(params, grads, spectrum, roles, WEIGHT, impl="torch")

    naive()
    ours()
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        error = float((leaf.grad - grad).abs().max() / leaf.grad.abs().max())
        assert error < 1e-5, f"matrix {i}: gradients differ by {error:.1e} of the largest"
    found = in_turns(ROUNDS["penalty"], ours=ours, naive=naive)
    case = f"penalty, {transform} | autograd, {len(shapes)} x fp32"
    text, ratio = line(case, found, PENALTY_BYTES * sum(a * b for a, b in shapes))
    with capsys.disabled():
        print(f"\n{machine()}\n{text}")
    if ratio > 0.25:
        pytest.xfail(f"0.25 x autograd is the aim, {ratio:.2f} x is measured")
