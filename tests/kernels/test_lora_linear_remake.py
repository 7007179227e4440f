"""An input that is made again in backward: not kept, the same bits, over dense and packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from flex.kernels.lora_linear import lora_linear, remakable
from tests.kernels.test_lora_linear_quantised import weight_of

ROWS, K, N, RANK = 6, 64, 96, 4


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    u, v = (torch.randn(ROWS, K, generator=g).bfloat16().requires_grad_() for _ in range(2))
    a = (0.1 * torch.randn(RANK, K, generator=g)).requires_grad_()
    b = (0.1 * torch.randn(N, RANK, generator=g)).requires_grad_()
    return u, v, a, b


def weight(kind: str) -> Any:
    if kind != "dense":
        return weight_of(kind, N, K)
    return torch.randn(N, K, generator=torch.Generator().manual_seed(4)).bfloat16()


def layer(w: Any, marked: bool, times: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = u * v
        if marked:
            remakable(x, times, u, v)
        return lora_linear(x, w, None, a, b, 2.0, 0.1, 5)

    return run


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_bits_are_the_same_and_x_is_not_kept(kind: str, recompute: bool) -> None:
    calls: list[int] = []

    def times(u: Tensor, v: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        calls.append(1)
        return u * v

    w, found = weight(kind), []
    for marked in (False, True):
        kept: dict[int, int] = {}

        def pack(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.data_ptr()] = t.numel() * t.element_size()
            return t

        u, v, a, b = operands()
        run = layer(w, marked, times)
        with saved_tensors_hooks(pack, lambda t: t):
            y = checkpoint(run, u, v, a, b, use_reentrant=False) if recompute else run(u, v, a, b)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).bfloat16()
        first = torch.autograd.grad(y, (u, v, a, b), dy, retain_graph=not recompute)
        if not recompute:  # a second backward finds its sources still there
            for one, two in zip(first, torch.autograd.grad(y, (u, v, a, b), dy), strict=True):
                assert torch.equal(one, two)
        assert all(bool(g.any()) for g in first)
        found.append((first, sum(kept.values())))
    (plain, whole), (again, less) = found
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    assert len(calls) == (1 if recompute else 2)
    if not recompute:  # u and v are kept by their product anyway
        assert whole - less == ROWS * K * 2


def test_what_is_made_again_decides_the_gradient_of_a() -> None:
    """The function is really asked: a wrong one shows in dA, and in dA alone."""
    gradients = []
    for times in (torch.mul, torch.add):
        u, v, a, b = operands()
        y = layer(weight("dense"), True, times)(u, v, a, b)
        gradients.append(torch.autograd.grad(y.sum(), (u, v, a, b)))
    differ = [not torch.equal(one, two) for one, two in zip(*gradients, strict=True)]
    assert differ == [False, False, True, False]


def test_a_mark_does_not_outlive_an_operation_on_x() -> None:
    u, v, a, b = operands()
    x = u * v
    remakable(x, torch.add, u, v)  # wrong, and not asked
    y = lora_linear(x * 1, weight("dense"), None, a, b, 2.0)
    expected = lora_linear(u * v, weight("dense"), None, a, b, 2.0)
    (found,), (right,) = (torch.autograd.grad(t.sum(), (a,)) for t in (y, expected))
    assert torch.equal(found, right)


def test_without_a_gradient_for_a_nothing_is_made_again() -> None:
    u, v, a, b = operands()

    def never(*_: Tensor) -> Tensor:
        raise AssertionError

    x = u * v
    remakable(x, never, u, v)
    lora_linear(x, weight("dense"), None, a.detach(), b, 2.0).sum().backward()
    assert b.grad is not None and u.grad is not None
