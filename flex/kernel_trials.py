"""What each public kernel function is tried on: operands, its results, the formula's, what is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from flex.kernels.lora_linear import lora_linear
from flex.kernels.lora_linear.dropout import keep_mask
from flex.kernels.lora_linear.reference import lora_linear_reference
from flex.kernels.penalised_update import penalised_reference, penalised_update
from flex.kernels.runtime import choose_impl
from flex.kernels.sophia_update import (
    Scalars,
    UpdateGroup,
    curvature_update,
    gradient_norm,
    sophia_update,
)
from flex.kernels.sophia_update.reference import curvature_reference, sophia_reference
from flex.kernels.sophia_update.scalars import NORM_FLOOR
from flex.kernels.spectral_penalty import (
    Spectrum,
    spectral_penalty_into,
    spectral_penalty_reference,
)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
DTYPES = (F32, BF16)
SCALARS = Scalars(
    lr=1e-3, beta1=0.9, gamma=0.5, eps=0.3, weight_decay=0.1, m_scale=1.7, h_scale=3, h_offset=0.2
)
SCALE, DROPOUT, SEED, WEIGHT, MAX_NORM, BETA2 = 2.0, 0.1, 4321, 0.3, 1.0, 0.95

Results = dict[str, Tensor]
Step = Callable[[], object]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Sizes:
    """tokens: rows of x. inputs, outputs: K and N. adapters: pairs of A (rank, K) and B (N, rank)."""

    tokens: int
    inputs: int
    outputs: int
    rank: int
    adapters: int

    def __str__(self) -> str:
        return (
            f"x {self.tokens} x {self.inputs}, W {self.outputs} x {self.inputs}, rank {self.rank}; "
            f"updates of {self.adapters} adapters, {self.elements / 1e6:.2g} M elements"
        )

    @property
    def elements(self) -> int:
        return self.adapters * self.rank * (self.inputs + self.outputs)


# a CPU gets through all of them in seconds; a GPU is busy with a layer of a 7B
CPU_SIZES = Sizes(tokens=64, inputs=2048, outputs=5632, rank=16, adapters=2)
GPU_SIZES = Sizes(tokens=8192, inputs=4096, outputs=11008, rank=16, adapters=8)


@dataclass(frozen=True)
class Trial:
    """One public function on one dtype.

    Attributes:
        function: its name. case: which of its cases, "" for the only one.
        impl: what `auto` picks for it here: "torch" or "triton".
        results: calls the function on fresh operands; what it returns and writes, by name.
        eager: the same by the reference in the function's own dtype. exact: in fp64.
        ours: a call to be timed.
        plain: given a wrapper (none, or torch.compile), the formula in eager PyTorch as a call to
            be timed.
    """

    function: str
    case: str
    dtype: torch.dtype
    impl: str
    results: Callable[[], Results]
    eager: Callable[[], Results]
    exact: Callable[[], Results]
    ours: Step
    plain: Callable[[Wrap], Step]


def trials(device: torch.device, sizes: Sizes) -> Iterator[Trial]:
    """Every public kernel function, fp32 first. Operands are made when a trial is asked for."""
    for dtype in DTYPES:
        make = Maker(device, sizes, dtype)
        yield _lora_linear(make)
        yield _sophia(make)
        yield _norm(make)
        yield _curvature(make)
        yield _penalty(make, Spectrum(transform="axis"))
        yield _penalised(make)
        yield _penalty(make, Spectrum())


class Maker:
    """Random operands, the same on every device, on every call."""

    def __init__(self, device: torch.device, sizes: Sizes, dtype: torch.dtype) -> None:
        self.device, self.sizes, self.dtype = device, sizes, dtype
        pair = [(sizes.rank, sizes.inputs), (sizes.outputs, sizes.rank)]
        self.shapes = pair * sizes.adapters
        self.roles = ["A", "B"] * sizes.adapters

    def normal(self, *shapes: tuple[int, ...], seed: int, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        found = [torch.randn(shape, generator=generator) for shape in shapes]
        return [x.to(self.device, dtype) for x in found]

    def matrices(self, seed: int) -> list[Tensor]:
        return self.normal(*self.shapes, seed=seed, dtype=self.dtype)

    def state(self) -> tuple[list[Tensor], ...]:
        """p, m, h (not negative) and g of all adapters."""
        p, m, h, g = (self.matrices(seed) for seed in range(4))
        return p, m, [x.square() for x in h], g

    def impl(self, kernel: str) -> str:
        return choose_impl(kernel, "auto", self.device)


def _named(**lists: Sequence[Tensor]) -> Results:
    return {f"{name}[{i}]": t for name, found in lists.items() for i, t in enumerate(found)}


def _rounded(found: Results, dtype: torch.dtype) -> Results:
    return {name: t.to(dtype) for name, t in found.items()}


def _lora_linear(make: Maker) -> Trial:
    sizes, dtype = make.sizes, make.dtype
    k, n, r = sizes.inputs, sizes.outputs, sizes.rank
    x, weight, dy = make.normal((sizes.tokens, k), (n, k), (sizes.tokens, n), seed=0, dtype=dtype)
    weight.mul_(k**-0.5)
    a, b = make.normal((r, k), (n, r), seed=1, dtype=F32)
    a, b = (a * k**-0.5).requires_grad_(), (b * r**-0.5).requires_grad_()
    x.requires_grad_()
    keep = keep_mask(SEED, sizes.tokens, k, DROPOUT, make.device).view(x.shape) != 0

    def gradients(y: Tensor, *leaves: Tensor) -> Results:
        dx, da, db = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return {"y": y.detach(), "dx": dx, "dA": da, "dB": db}

    def ours() -> Results:
        return gradients(lora_linear(x, weight, None, a, b, SCALE, DROPOUT, SEED), x, a, b)

    def reference(wide: torch.dtype) -> Results:
        # A and B are rounded to x's dtype for the products
        wx, wa, wb = (t.detach().to(wide).requires_grad_() for t in (x, a, b))
        y = lora_linear_reference(wx, weight.to(wide), None, wa, wb, SCALE, DROPOUT, keep)
        return _rounded(gradients(y, wx, wa, wb), wide)

    def peft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = linear(dropout(x, DROPOUT), a.to(x.dtype))
        return linear(x, weight) + SCALE * linear(low, b.to(x.dtype))

    def plain(wrap: Wrap) -> Step:
        forward = wrap(peft)
        return lambda: gradients(forward(x, weight, a, b), x, a, b)

    return Trial(
        "lora_linear",
        "forward + backward",
        dtype,
        make.impl("lora_linear"),
        ours,
        lambda: reference(dtype),
        lambda: reference(F64),
        ours,
        plain,
    )


def _total(params: list[Tensor], roles: list[str], spectrum: Spectrum) -> Tensor:
    """The way to write it down: the penalty of each matrix, summed for autograd."""
    each = [
        spectral_penalty_reference(p, spectrum, role) for p, role in zip(params, roles, strict=True)
    ]
    return WEIGHT * torch.stack(each).sum()


def _penalty(make: Maker, spectrum: Spectrum) -> Trial:
    params, timed = make.matrices(0), make.matrices(1)
    impl = make.impl("spectral_penalty") if spectrum.transform == "axis" else "torch"

    def into(grads: list[Tensor]) -> object:
        return spectral_penalty_into(params, grads, spectrum, make.roles, WEIGHT)

    def results() -> Results:
        grads = make.matrices(1)
        into(grads)
        return _named(gradient=grads)

    def reference(wide: torch.dtype) -> Results:
        leaves = [p.to(wide).requires_grad_() for p in params]
        found = torch.autograd.grad(_total(leaves, make.roles, spectrum), leaves)
        before = make.matrices(1)
        return _named(gradient=[g.to(wide) + q for g, q in zip(before, found, strict=True)])

    def plain(wrap: Wrap) -> Step:
        value, leaves = wrap(_total), [p.float().requires_grad_() for p in params]

        def step() -> None:
            found = torch.autograd.grad(value(leaves, make.roles, spectrum), leaves)
            torch._foreach_add_(timed, [q.to(make.dtype) for q in found])

        return step

    return Trial(
        # no FFT in half precision: the plain computation widens, and rounds what it stores
        "spectral_penalty",
        spectrum.transform,
        make.dtype,
        impl,
        results,
        lambda: _rounded(reference(F32), make.dtype),
        lambda: reference(F64),
        lambda: into(timed),
        plain,
    )


def _plain_sophia(p: list[Tensor], m: list[Tensor], h: list[Tensor], g: list[Tensor]) -> None:
    for one in zip(p, m, h, g, strict=True):
        new_p, new_m, _ = sophia_reference(*one, **vars(SCALARS))
        one[0].copy_(new_p)
        one[1].copy_(new_m)


def _sophia(make: Maker) -> Trial:
    timed = make.state()

    def results() -> Results:
        state = make.state()
        sophia_update(*state, **vars(SCALARS))
        return _named(p=state[0], m=state[1])

    def reference(wide: torch.dtype) -> Results:
        state = [[t.to(wide) for t in found] for found in make.state()]
        _plain_sophia(*state)
        return _named(p=state[0], m=state[1])

    def plain(wrap: Wrap) -> Step:
        step, state = wrap(_plain_sophia), make.state()
        return lambda: step(*state)

    return Trial(
        "sophia_update",
        "",
        make.dtype,
        make.impl("sophia_update"),
        results,
        lambda: reference(make.dtype),
        lambda: reference(F64),
        lambda: sophia_update(*timed, **vars(SCALARS)),
        plain,
    )


def _plain_norm(grads: list[Tensor], wide: torch.dtype) -> Tensor:
    norm = torch.stack([g.to(wide).norm() for g in grads]).norm()
    factor = (MAX_NORM / (norm + NORM_FLOOR)).clamp(max=1.0)
    return torch.stack([norm, factor, norm.isfinite().to(wide)])


def _norm(make: Maker) -> Trial:
    grads = make.matrices(0)

    def named(control: Tensor) -> Results:
        return dict(zip(("norm", "factor", "finite"), control, strict=True))

    def plain(wrap: Wrap) -> Step:
        norm = wrap(_plain_norm)
        return lambda: norm(grads, F32)

    return Trial(
        "gradient_norm",
        "",
        make.dtype,
        make.impl("sophia_update"),
        lambda: named(gradient_norm(grads, MAX_NORM)),
        lambda: named(_plain_norm(grads, F32)),
        lambda: named(_plain_norm(grads, F64)),
        lambda: gradient_norm(grads, MAX_NORM),
        plain,
    )


def _curvature(make: Maker) -> Trial:
    _, _, timed, estimates = make.state()
    estimates = [e.abs() for e in estimates]

    def update(curvatures: list[Tensor], estimates: list[Tensor]) -> None:
        for h, e in zip(curvatures, estimates, strict=True):
            h.copy_(curvature_reference(h, e, BETA2))

    def results() -> Results:
        curvatures = make.state()[2]
        curvature_update(curvatures, estimates, BETA2)
        return _named(h=curvatures)

    def reference(wide: torch.dtype) -> Results:
        curvatures = [h.to(wide) for h in make.state()[2]]
        update(curvatures, [e.to(wide) for e in estimates])
        return _named(h=curvatures)

    def plain(wrap: Wrap) -> Step:
        step, curvatures = wrap(update), make.state()[2]
        return lambda: step(curvatures, estimates)

    return Trial(
        "curvature_update",
        "",
        make.dtype,
        make.impl("sophia_update"),
        results,
        lambda: reference(make.dtype),
        lambda: reference(F64),
        lambda: curvature_update(timed, estimates, BETA2),
        plain,
    )


def _penalised(make: Maker) -> Trial:
    spectrum, timed = Spectrum(transform="axis"), make.state()

    def update(state: Sequence[list[Tensor]]) -> Results:
        p, m, h, g = state
        group = UpdateGroup(p, m, h, g, SCALARS)
        found = penalised_update([group], spectrum, make.roles, WEIGHT)
        sums = {"value": list(found.values), "square": list(found.squares)}
        return _named(p=p, m=m, **sums)

    def reference(wide: torch.dtype, stored: torch.dtype) -> Results:
        state = [[t.to(wide) for t in found] for found in make.state()]
        found = [
            penalised_reference(p, m, h, g, spectrum, role=role, weight=WEIGHT, **vars(SCALARS))
            for p, m, h, g, role in zip(*state, make.roles, strict=True)
        ]
        return _named(
            p=[f.p.to(stored) for f in found],
            m=[f.m.to(stored) for f in found],
            value=[f.value for f in found],
            square=[f.square for f in found],
        )

    def plain(wrap: Wrap) -> Step:
        value, step, (p, m, h, g) = wrap(_total), wrap(_plain_sophia), make.state()

        def both() -> None:
            leaves = [x.float().detach().requires_grad_() for x in p]
            found = torch.autograd.grad(value(leaves, make.roles, spectrum), leaves)
            step(p, m, h, [x + q.to(x.dtype) for x, q in zip(g, found, strict=True)])

        return both

    return Trial(
        "penalised_update",
        "axis",
        make.dtype,
        make.impl("penalised_update"),
        lambda: update(make.state()),
        lambda: reference(F32, make.dtype),
        lambda: reference(F64, F64),
        lambda: update(timed),
        plain,
    )
