"""The LoRA linear layer, forward and backward: what it costs over the frozen product, and PEFT's layer beside it.

Shapes are those of real models; M, the tokens, is 2048 for the layer of the aim and less where a CPU would take too
long. The overhead is ours / frozen - 1: the aims are 12 % without dropout and 25 % with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

from benchmarks.cases import CODE_LLAMA_7B, LLAMA_3_8B, QWEN_CODER_7B, SMOLLM2_135M, Model, normal
from benchmarks.harness import Bench, Gate, Work
from flex.kernels.budget import budget_used
from flex.kernels.lora_linear import lora_linear, lora_linear_siblings
from flex.kernels.lora_linear.dropout import keep_mask
from flex.kernels.lora_linear.reference import lora_linear_reference

RANK, ALPHA, SEED = 16, 32, 4321
SCALE = ALPHA / RANK
BF16 = torch.bfloat16
AIMS = {0.0: 1.12, 0.05: 1.25}
TINY = (32, 64, 96, 16)  # M, K, N, r


@dataclass(frozen=True)
class Case:
    model: Model
    projection: str
    tokens: int
    dropout: float
    aimed: bool = False

    def __str__(self) -> str:
        return f"{self.model.name}, {self.projection}, p {self.dropout:g}"


CASES = [
    Case(CODE_LLAMA_7B, "q", 2048, 0.0, aimed=True),
    Case(CODE_LLAMA_7B, "q", 2048, 0.05, aimed=True),
    Case(CODE_LLAMA_7B, "gate", 512, 0.05),
    Case(LLAMA_3_8B, "down", 512, 0.05),
    Case(QWEN_CODER_7B, "gate", 512, 0.05),
    Case(SMOLLM2_135M, "gate", 2048, 0.05),
]
SIBLINGS = [Case(CODE_LLAMA_7B, "gate up", 512, 0.0), Case(CODE_LLAMA_7B, "gate up", 512, 0.05)]


class Layer:
    """Operands of one projection: W (N, K) bf16 and frozen, A (r, K) and B (N, r) fp32."""

    def __init__(self, bench: Bench, k: int, n: int, rank: int, seed: int, tokens: int) -> None:
        (weight,) = normal([(n, k)], seed, bench.device, BF16)
        a, b = normal([(rank, k), (n, rank)], seed + 1, bench.device, torch.float32)
        self.weight = weight.mul_(k**-0.5)
        self.a, self.b = (a * k**-0.5).requires_grad_(), (b * rank**-0.5).requires_grad_()
        (self.dy,) = normal([(tokens, n)], seed + 2, bench.device, BF16)

    def peft(self, dropout: float, adapters: torch.dtype) -> PeftLinear:
        """PEFT's own layer over the same W, A and B."""
        n, k = self.weight.shape
        base = torch.nn.Linear(k, n, bias=False, device="meta")
        base.weight = torch.nn.Parameter(self.weight, requires_grad=False)
        rank = self.a.shape[0]
        config = LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=dropout)
        layer = PeftLinear(base, "default", config, r=rank, lora_alpha=SCALE * rank)
        for module, value in ((layer.lora_A, self.a), (layer.lora_B, self.b)):
            module["default"].weight = torch.nn.Parameter(value.detach().to(adapters))
        return layer.train()


def sizes(bench: Bench, case: Case, projection: str) -> tuple[int, int, int, int]:
    """M, K, N, r."""
    if bench.tiny:
        return TINY
    return (case.tokens, *case.model.projections()[projection], RANK)


def both_ways(forward: Callable[[], Tensor], dy: Tensor, leaves: list[Tensor]) -> Callable:
    """A forward and a backward to `leaves`."""
    return lambda: torch.autograd.grad(forward(), leaves, dy)


def counted(m: int, k: int, n: int, r: int, projections: int = 1) -> Work:
    """Products of W and of A, B, forward and backward; x and dY in, W twice, y and dX out, in bf16.

    Siblings read x and write dX once; their A, B and gradients are left out.
    """
    flops = projections * (4.0 * m * n * k + 6.0 * m * r * (k + n))
    moved = 2.0 * (2 * m * k + projections * (2 * m * n + 2 * n * k))
    return Work(bytes=moved, flops=flops, dtype="bf16")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear(case: Case, bench: Bench):
    m, k, n, r = sizes(bench, case, case.projection)
    p, seed = case.dropout, SEED if case.dropout else None
    (x,) = normal([(m, k)], 0, bench.device, BF16)
    layer = Layer(bench, k, n, r, 1, m)
    x.requires_grad_()
    leaves = [x, layer.a, layer.b]

    def forward() -> Tensor:
        factors = (layer.a, layer.b, SCALE, p, seed)
        return lora_linear(x, layer.weight, None, *factors, impl=bench.impl)

    peers = {"frozen linear": both_ways(lambda: x @ layer.weight.T, layer.dy, [x])}
    for name, dtype in (("PEFT", torch.float32), ("PEFT, bf16 adapters", BF16)):
        peft = layer.peft(p, dtype)
        with_gradient = [x, *(w for w in peft.parameters() if w.requires_grad)]
        peers[name] = both_ways(lambda peft=peft: peft(x), layer.dy, with_gradient)
    bench.compare(
        str(case),
        both_ways(forward, layer.dy, leaves),
        peers,
        lambda: gate(forward, x, layer, p, seed),
        shape=f"M {m} K {k} N {n} r {r}",
        dtype="bf16",
        work=counted(m, k, n, r),
        aims={"frozen linear": AIMS[p]} if case.aimed else {},
        settings={"ours": "fp32 A and B", "frozen linear": "y and dX", "PEFT": "fp32 A and B"},
        memory=True,
    )


def gate(
    forward: Callable[[], Tensor], x: Tensor, layer: Layer, p: float, seed: int | None
) -> Gate:
    """y, dX, dA and dB of the timed call against fp64 with the same mask."""
    m, k = x.shape
    keep = None if seed is None else keep_mask(seed, m, k, p, x.device).view(m, k) != 0

    def reference(dtype: torch.dtype) -> list[Tensor]:
        wide = [t.detach().to(BF16).to(dtype).requires_grad_() for t in (x, layer.a, layer.b)]
        weight = layer.weight.to(dtype)
        y = lora_linear_reference(wide[0], weight, None, wide[1], wide[2], SCALE, p, keep)
        return [y.detach(), *torch.autograd.grad(y, wide, layer.dy.to(dtype))]

    y = forward()
    found = [y.detach(), *torch.autograd.grad(y, [x, layer.a, layer.b], layer.dy)]
    triples = zip(found, reference(BF16), reference(torch.float64), strict=True)
    return Gate("y, dX, dA, dB: share of the error budget", max(budget_used(*t) for t in triples))


@pytest.mark.parametrize("case", SIBLINGS, ids=str)
def test_siblings(case: Case, bench: Bench):
    """Two projections of one x, which the kernel reads once."""
    names = case.projection.split()
    m, k, n, r = sizes(bench, case, names[0])
    p, seeds = case.dropout, [SEED + i for i in range(len(names))] if case.dropout else None
    (x,) = normal([(m, k)], 0, bench.device, BF16)
    layers = [Layer(bench, k, n, r, 10 * i + 1, m) for i in range(len(names))]
    x.requires_grad_()
    dys = [layer.dy for layer in layers]
    factors = [layer.a for layer in layers], [layer.b for layer in layers]
    weights = [layer.weight for layer in layers]

    def forward() -> tuple[Tensor, ...]:
        rest = ([SCALE] * len(names), p, seeds)
        return lora_linear_siblings(
            x, weights, [None] * len(names), *factors, *rest, impl=bench.impl
        )

    def ours() -> object:
        return torch.autograd.grad(forward(), [x, *factors[0], *factors[1]], dys)

    def frozen() -> object:
        return torch.autograd.grad([x @ w.T for w in weights], [x], dys)

    modules = [layer.peft(p, torch.float32) for layer in layers]
    trained = [w for module in modules for w in module.parameters() if w.requires_grad]

    def peft() -> object:
        return torch.autograd.grad([f(x) for f in modules], [x, *trained], dys)

    bench.compare(
        str(case),
        ours,
        {"frozen linears": frozen, "PEFT": peft},
        lambda: siblings_gate(forward, x, layers, p, seeds),
        shape=f"M {m} K {k} N {len(names)} x {n} r {r}",
        dtype="bf16",
        work=counted(m, k, n, r, len(names)),
        settings={"ours": "fp32 A and B", "frozen linears": "y and dX", "PEFT": "fp32 A and B"},
        memory=True,
    )


def siblings_gate(
    forward: Callable, x: Tensor, layers: list[Layer], p: float, seeds: list[int] | None
) -> Gate:
    """Each output alone, with the gradients that come from it, as the single layer's gate."""
    worst = 0.0
    for i, layer in enumerate(layers):

        def one(i: int = i) -> Tensor:
            return forward()[i]

        worst = max(worst, gate(one, x, layer, p, None if seeds is None else seeds[i]).error)
    return Gate("y, dX, dA, dB of each alone: share of the error budget", worst)
