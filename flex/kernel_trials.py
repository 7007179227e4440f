"""What each public kernel function is tried on: operands, its results, the formula's, what is timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flex.kernel_lora_trial import lora_trial
from flex.kernel_operands import Maker, Results, Sizes, Step, Trial, Wrap, named, rounded
from flex.kernels.penalised_update import penalised_reference, penalised_update
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
WEIGHT, MAX_NORM, BETA2 = 0.3, 1.0, 0.95


def trials(device: torch.device, sizes: Sizes) -> Iterator[Trial]:
    """Every public kernel function, fp32 first. Operands are made when a trial is asked for."""
    for dtype in DTYPES:
        make = Maker(device, sizes, dtype)
        yield lora_trial(make)
        yield _sophia(make)
        yield _norm(make)
        yield _curvature(make)
        yield _penalty(make, Spectrum(transform="axis"))
        yield _penalised(make)
        yield _penalty(make, Spectrum())


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
        return named(gradient=grads)

    def reference(wide: torch.dtype) -> Results:
        leaves = [p.to(wide).requires_grad_() for p in params]
        found = torch.autograd.grad(_total(leaves, make.roles, spectrum), leaves)
        before = make.matrices(1)
        return named(gradient=[g.to(wide) + q for g, q in zip(before, found, strict=True)])

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
        lambda: rounded(reference(F32), make.dtype),
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
        return named(p=state[0], m=state[1])

    def reference(wide: torch.dtype) -> Results:
        state = [[t.to(wide) for t in found] for found in make.state()]
        _plain_sophia(*state)
        return named(p=state[0], m=state[1])

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

    def parts(control: Tensor) -> Results:
        return dict(zip(("norm", "factor", "finite"), control, strict=True))

    def plain(wrap: Wrap) -> Step:
        norm = wrap(_plain_norm)
        return lambda: norm(grads, F32)

    return Trial(
        "gradient_norm",
        "",
        make.dtype,
        make.impl("sophia_update"),
        lambda: parts(gradient_norm(grads, MAX_NORM)),
        lambda: parts(_plain_norm(grads, F32)),
        lambda: parts(_plain_norm(grads, F64)),
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
        return named(h=curvatures)

    def reference(wide: torch.dtype) -> Results:
        curvatures = [h.to(wide) for h in make.state()[2]]
        update(curvatures, [e.to(wide) for e in estimates])
        return named(h=curvatures)

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
        return named(p=p, m=m, **sums)

    def reference(wide: torch.dtype, stored: torch.dtype) -> Results:
        state = [[t.to(wide) for t in found] for found in make.state()]
        found = [
            penalised_reference(p, m, h, g, spectrum, role=role, weight=WEIGHT, **vars(SCALARS))
            for p, m, h, g, role in zip(*state, make.roles, strict=True)
        ]
        return named(
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
