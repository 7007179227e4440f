"""The spectral penalty over all adapters of a 7B at rank 8: value and gradient, against the naive ways.

The naive ways go from matrix to matrix and leave the gradient to autograd. "per-tensor rfft" keeps its tables of
weights; "as published" makes them anew on each call, as the published code does, which has no gradient: here it gets
one. The aim is a quarter of their time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.cases import CODE_LLAMA_7B, TINY, normal
from benchmarks.harness import Bench, Gate, Missing, Work
from flex.kernels.budget import budget_used
from flex.kernels.spectral_penalty import (
    Spectrum,
    spectral_penalty_into,
    spectral_penalty_reference,
)
from flex.kernels.spectral_penalty.reference import bin_counts, rho

RANK, WEIGHT = 8, 0.5
BYTES = 12  # of an fp32 element: w and its gradient in, the gradient out
AIM = 0.25


def ramp(w: Tensor, spectrum: Spectrum) -> Tensor:
    """Weights of the rfft bins of a matrix's transform, `ortho`: of the flattening or of each row."""
    length = w.numel() if spectrum.transform == "flat" else w.shape[-1]
    counts = bin_counts(length, spectrum.one_sided)
    return (counts * rho(spectrum, torch.arange(len(counts)), length) / length).to(w)


def energy(w: Tensor, table: Tensor, spectrum: Spectrum) -> Tensor:
    """The penalty of one matrix, its feature axis last."""
    found = torch.fft.rfft(w.reshape(-1) if spectrum.transform == "flat" else w)
    return (table * (found.real**2 + found.imag**2)).sum()


def per_tensor(params: list[Tensor], roles: list[str], spectrum: Spectrum) -> Callable[[], Tensor]:
    """Sum over matrices under autograd, tables made once."""

    def turned(w: Tensor, role: str) -> Tensor:
        return w.mT if role == "B" and spectrum.transform == "axis" else w

    pairs = list(zip(params, roles, strict=True))
    tables = [ramp(turned(w, role), spectrum) for w, role in pairs]

    def value() -> Tensor:
        each = zip(pairs, tables, strict=True)
        return WEIGHT * torch.stack([energy(turned(*pair), t, spectrum) for pair, t in each]).sum()

    return value


def as_published(params: list[Tensor], spectrum: Spectrum) -> Callable[[], Tensor]:
    """Weights made on each call, by the published formula; both-sided and `ortho`, as ours."""

    def one(w: Tensor) -> Tensor:
        found = torch.fft.rfft(w.flatten().float())
        bins = found.numel()
        k = torch.arange(bins, device=w.device, dtype=torch.float32)
        phi = 1.0 + (0.1 - 1.0) * torch.clamp(k / (bins * 0.5), max=1.0)
        counts = torch.full_like(k, 2.0)
        counts[0] = 1.0
        if w.numel() % 2 == 0:
            counts[-1] = 1.0
        return (counts * (1.0 - phi) * found.abs() ** 2).sum() / w.numel()

    return lambda: WEIGHT * torch.stack([one(w) for w in params]).sum()


@pytest.mark.parametrize("transform", ["axis", "flat"])
def test_penalty(transform: str, bench: Bench):
    # flat is torch's on every device; on a GPU lengths that its registers do not hold are, too
    impl = "torch" if transform == "flat" else "auto" if bench.device.type == "cuda" else bench.impl
    spectrum = Spectrum(transform=transform)
    shapes = (TINY if bench.tiny else CODE_LLAMA_7B).adapters(RANK)
    roles = ["A", "B"] * (len(shapes) // 2)
    params = normal(shapes, 0, bench.device, torch.float32)
    grads = [torch.zeros_like(p) for p in params]
    leaves = [p.clone().requires_grad_() for p in params]

    def with_gradient(value: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch._foreach_add_(grads, torch.autograd.grad(value(), leaves))

    def ours(into: list[Tensor] = grads) -> Tensor:
        return spectral_penalty_into(params, into, spectrum, roles, WEIGHT, impl=impl)

    naive = per_tensor(leaves, roles, spectrum)
    published = as_published(leaves, spectrum)

    def gate() -> Gate:
        """Our values and gradients, and those of the peers, against fp64."""
        fresh = [torch.zeros_like(p) for p in params]
        values = ours(fresh)[0]
        eager = torch.autograd.grad(naive(), leaves)
        others = torch.autograd.grad(published(), leaves) if transform == "flat" else eager
        worst = 0.0
        seen = set()
        for i, (w, role) in enumerate(zip(params, roles, strict=True)):
            if (w.shape, role) in seen:  # one of each shape: fp64 of all takes long
                continue
            seen.add((w.shape, role))
            wide = w.double().requires_grad_()
            exact = WEIGHT * spectral_penalty_reference(wide, spectrum, role)
            (gradient,) = torch.autograd.grad(exact, wide)
            worst = max(worst, budget_used(fresh[i], eager[i], gradient))
            # peers need not be as exact as ours, but they must compute the same
            apart = float((others[i] - gradient).abs().max() / gradient.abs().max())
            assert apart < 1e-4, f"a peer's gradient is {apart:.1e} of the largest away"
            off = abs(float(values[i]) / float(exact.detach()) - 1)
            assert off < 1e-5, f"the value of matrix {i} is off by {off:.1e}"
        return Gate("gradients: share of the error budget", worst)

    peers: dict[str, Callable[[], object] | Missing] = {"per-tensor rfft": with_gradient(naive)}
    if transform == "flat":
        peers["as published"] = with_gradient(published)
    elements = sum(p.numel() for p in params)
    bench.compare(
        f"penalty {transform}, {(TINY if bench.tiny else CODE_LLAMA_7B).name}",
        ours,
        peers,
        gate,
        shape=f"{len(params)} matrices, r {RANK}, {elements / 1e6:.3g} M",
        dtype="fp32",
        work=Work(bytes=BYTES * elements),
        aims=dict.fromkeys(peers, AIM),
        settings={"ours": "value and gradient, added to grads"}
        | dict.fromkeys(peers, "autograd, added to grads"),
        memory=True,
    )
