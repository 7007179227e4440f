"""Causal attention over packed documents with rotary embedding, forward and backward, on a CPU.

Peers turn queries and keys by torch's operations, as transformers does: then one call of torch's attention for each
document, or this project's batched products, which processors without bf16 dot products (or with AMX) take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import normal
from benchmarks.harness import Bench, Gate, Work
from flex.kernels.budget import budget_used
from flex.kernels.causal_attention import (
    causal_attention,
    causal_attention_reference,
    rotated,
    takes,
)
from flex.model.attention_cpu import bucketed_attention, make_plan

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    heads: int
    kv_heads: int
    width: int
    lengths: tuple[int, ...]


CASES = [
    Case("SmolLM2-135M", 9, 3, 64, (170,) * 16),
    Case("Llama 3 8B", 32, 8, 128, (2048,)),
]


def operands(case: Case, seed: int) -> tuple[list[Tensor], Tensor, Angles]:
    count, device = sum(case.lengths), torch.device("cpu")
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    shapes = [(count, h, case.width) for h in heads]
    *inputs, dy = normal(shapes, seed, device, torch.bfloat16)
    (angle,) = normal([(count, case.width // 2)], seed, device, torch.float32)
    whole = torch.cat([angle, angle], -1)
    return inputs, dy, (whole.cos().bfloat16(), whole.sin().bfloat16())


def by_torch(q: Tensor, k: Tensor, v: Tensor, case: Case, scale: float, angles: Angles) -> Tensor:
    turned = (rotated(q, *angles), rotated(k, *angles), v)
    outputs = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in document),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
        for document in zip(*(x.split(case.lengths) for x in turned), strict=True)
    ]
    return torch.cat(outputs)


def gate(case: Case, scale: float) -> Gate:
    """One key head's share of the last document, against fp64."""
    groups = case.heads // case.kv_heads
    inputs, dy, angles = operands(Case("", groups, 1, case.width, case.lengths[-1:]), seed=1)

    def results(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        turns = tuple(t.to(dtype) for t in angles)
        y = function(*leaves, case.lengths[-1:], scale, turns)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    ours = results(causal_attention, torch.bfloat16)
    eager = results(causal_attention_reference, torch.bfloat16)
    exact = results(causal_attention_reference, torch.float64)
    used = [budget_used(a, b, c) for a, b, c in zip(ours, eager, exact, strict=True)]
    return Gate("y, dq, dk, dv: share of the error budget", max(used))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(case: Case, bench: Bench):
    if bench.device.type != "cpu":
        pytest.skip("on a GPU it is torch's own")
    if bench.tiny:
        case = Case(case.name, case.heads, case.kv_heads, case.width, (17, 5))
    inputs, dy, angles = operands(case, seed=0)
    if not takes(*inputs, angles):
        pytest.skip("needs a processor with AVX-512 bf16 dot products and no AMX")
    scale, plan = case.width**-0.5, make_plan(case.lengths)
    leaves = [x.requires_grad_() for x in inputs]

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bucketed_attention(rotated(q, *angles), rotated(k, *angles), v, plan, scale)

    def pass_of(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, dy)

    pairs = sum(n * (n + 1) // 2 for n in case.lengths)
    moved = 3 * (2 * leaves[0].nbytes + 2 * leaves[1].nbytes)
    bench.compare(
        f"attention: {case.name}",
        pass_of(lambda *x: causal_attention(*x, case.lengths, scale, angles)),
        {
            "torch SDPA by document": pass_of(lambda *x: by_torch(*x, case, scale, angles)),
            "batched products": pass_of(products),
        },
        lambda: gate(case, scale),
        shape=f"{len(case.lengths)} x {case.lengths[0]}, {case.heads} heads of {case.width} over {case.kv_heads}",
        dtype="bf16",
        work=Work(flops=7 * 2 * case.heads * case.width * pairs, bytes=moved, dtype="bf16"),
    )
