"""Public function: checks, which matrices the kernel takes, the two passes for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ranges import named
from ..runtime import TRITON_DTYPES, choose_impl, require, require_one_of
from ..sophia_update import UpdateGroup, sophia_update_groups
from ..sophia_update.api import check_control, check_group
from ..spectral_penalty import Spectrum, spectral_penalty_into
from ..spectral_penalty.chips import chip_of
from ..spectral_penalty.reference import ROLES

if TYPE_CHECKING:  # it imports Triton
    from .kernel import Item

KERNEL = "penalised_update"


@dataclass(frozen=True)
class PenalisedUpdate:
    """What an update did, on the device; matrices in the order of the groups.

    Attributes:
        clipped: 0-dim int64, coordinates that Sophia clipped.
        values: (M,), weight * P of each matrix before the update.
        squares: (M,), |weight * grad P|^2 of each.
    """

    clipped: Tensor
    values: Tensor
    squares: Tensor


@torch.no_grad()
def penalised_update(
    groups: Sequence[UpdateGroup],
    spectrum: Spectrum,
    roles: Sequence[str],
    weight: float,
    *,
    starts: Sequence[Tensor | None] | None = None,
    control: Tensor | None = None,
    impl: str = "auto",
) -> PenalisedUpdate:
    """`sophia_update_groups` with weight * grad P(w - w0) added to each gradient, in place.

    `penalised_reference` is the specification. Gradients are read, not changed. The factor of
    `control` multiplies the gradient of the data and not the penalty's: a norm of their sum would
    have to be known before the pass that makes the sum, and would cost that pass. So with clipping
    this is another step than `spectral_penalty_into`, `gradient_norm`, `sophia_update_groups`,
    where one factor scales both; where the factor is 1, the three give the same.

    The Triton path is one launch per length of the feature axis, role and mix of dtypes, and two
    that sum: 24 bytes per fp32 parameter and 4 for a start. Vectors in eight blocks (13824, 14336)
    that have a start are read once more, mostly from the cache.

    Args:
        groups: matrices, (r, K) for role "A", (N, r) for "B", and their scalars. Under Triton p, m,
            h and copies must be contiguous; gradients and starts that are not are copied.
        spectrum, weight: as in `spectral_penalty`.
        roles, starts: "A" or "B" of each matrix and its w0, None for 0; over all groups in order.
        control: from `gradient_norm` of the data's gradients. If it is not finite no matrix
            changes; values and squares are still right.
        impl: "auto" | "torch" | "triton". torch takes the two existing passes. "auto" is Triton on
            a GPU for `axis` and the two passes for the rest: other transforms, fp64, lengths that
            do not factor or that spill on the GPU (spectral_penalty/chips.py).

    Raises:
        ValueError: lists or shapes that do not match, a wrong role or impl, eps not positive; for
            "triton" also a dtype, length or stride that the kernel cannot take.
        NotImplementedError: impl="triton" with another transform than `axis`, or where Triton
            cannot run.
    """
    for group in groups:
        check_group(group)
    singles = [single for group in groups for single in _singles(group)]
    require(len(singles) > 0, "the number of matrices", len(singles), "at least 1")
    starts = [None] * len(singles) if starts is None else list(starts)
    for name, given in (("roles", roles), ("starts", starts)):
        require(len(given) == len(singles), f"len({name})", len(given), f"{len(singles)}")
    for single, role, start in zip(singles, roles, starts, strict=True):
        p = single.params[0]
        require_one_of("role", role, ROLES)
        require(p.ndim == 2 and p.numel() > 0, "a matrix's shape", tuple(p.shape), "two axes > 0")
        if start is not None:
            require(start.shape == p.shape, "a start's shape", tuple(start.shape), f"{p.shape}")
    device = singles[0].params[0].device
    check_control(control, device)
    chosen = choose_impl(KERNEL, impl, device)
    fits = [chosen == "triton"] * len(singles)
    if chosen == "triton":
        refusals = [_refusal(*one, spectrum) for one in zip(singles, roles, starts, strict=True)]
        if impl == "triton":
            for error in refusals:
                if error is not None:
                    raise error
        fits = [error is None for error in refusals]
    if all(fits):
        return _by_kernel(singles, spectrum, roles, weight, starts, control)
    if not any(fits):
        return _by_passes(singles, spectrum, roles, weight, starts, control, impl)
    wide = any(single.params[0].dtype == torch.float64 for single in singles)
    results = torch.empty(
        2, len(singles), dtype=torch.float64 if wide else torch.float32, device=device
    )
    clipped = torch.zeros((), dtype=torch.int64, device=device)
    for on_kernel in (True, False):
        index = [i for i, fit in enumerate(fits) if fit == on_kernel]
        part = [singles[i] for i in index], spectrum, [roles[i] for i in index], weight
        rest = [starts[i] for i in index], control
        found = _by_kernel(*part, *rest) if on_kernel else _by_passes(*part, *rest, impl)
        results[0, index] = found.values.to(results.dtype)
        results[1, index] = found.squares.to(results.dtype)
        clipped = clipped + found.clipped
    return PenalisedUpdate(clipped, results[0], results[1])


def _by_kernel(
    singles: Sequence[UpdateGroup],
    spectrum: Spectrum,
    roles: Sequence[str],
    weight: float,
    starts: Sequence[Tensor | None],
    control: Tensor | None,
) -> PenalisedUpdate:
    """One launch per `Item.key`, one for values and squares, one for the count."""
    from ..sophia_update.kernel import count_launch
    from ..sophia_update.table import scalar_rows
    from ..spectral_penalty.kernel import sum_launch
    from ..spectral_penalty.tables import plan, precision_of, tables
    from .kernel import Item, update_launch

    rows = list(dict.fromkeys(single.scalars for single in singles))
    place = {row: i for i, row in enumerate(rows)}
    items = []
    for single, role, start in zip(singles, roles, starts, strict=True):
        p, m, h, g = (x[0] for x in single.lists()[:4])
        copy = None if single.copies is None else single.copies[0]
        start = None if start is None else start.contiguous()
        items.append(Item(p, m, h, g.contiguous(), start, copy, role, place[single.scalars]))
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.key, []).append(i)
    order = [i for index in groups.values() for i in index]
    precision, chip = precision_of(spectrum), chip_of(items[0].p.device)
    spec = {item.length: plan(item.length, precision, chip) for item in items}
    counts = [-(-items[i].count // spec[items[i].length].rows) for i in order]
    device = items[0].p.device
    sums = torch.empty(2, sum(counts), dtype=torch.float32, device=device)
    clipped = torch.empty(sum(counts), dtype=torch.int32, device=device)
    scalars = scalar_rows([row.row() for row in rows], device)
    done = first = 0
    with named("penalised_update/update", bytes=lambda: sum(map(_moved, items))):
        for index in groups.values():
            chosen, size = [items[i] for i in index], counts[done : done + len(index)]
            span = slice(first, first + sum(size))
            partials = sums[0, span], sums[1, span], clipped[span]
            found = spec[chosen[0].length]
            constant = tables(found, spectrum, device)
            update_launch(chosen, size, found, constant, weight, scalars, control, partials)
            done, first = done + len(index), span.stop
        both = [*order, *(len(items) + i for i in order)]
        values, squares = sum_launch(sums.view(-1), counts * 2, both).chunk(2)
        return PenalisedUpdate(count_launch(clipped), values, squares)


def _by_passes(
    singles: Sequence[UpdateGroup],
    spectrum: Spectrum,
    roles: Sequence[str],
    weight: float,
    starts: Sequence[Tensor | None],
    control: Tensor | None,
    impl: str,
) -> PenalisedUpdate:
    """The penalty's pass, then Sophia's, on gradients of their own."""
    params = [single.params[0] for single in singles]
    wide = [torch.promote_types(p.dtype, torch.float32) for p in params]
    found = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(params, wide, strict=True)]
    values, squares = spectral_penalty_into(params, found, spectrum, roles, weight, starts, impl)
    factor = 1.0
    if control is not None:
        _, factor, finite = control.tolist()
        if not finite:
            none = torch.zeros((), dtype=torch.int64, device=values.device)
            return PenalisedUpdate(none, values, squares)
    for q, single in zip(found, singles, strict=True):
        q.add_(single.grads[0], alpha=factor)
    summed = [replace(single, grads=[q]) for single, q in zip(singles, found, strict=True)]
    clipped = sophia_update_groups(_together(summed), impl=impl)
    return PenalisedUpdate(clipped, values, squares)


def _singles(group: UpdateGroup) -> list[UpdateGroup]:
    """The group's matrices, each as a group."""
    return [_like(group, [list(one)]) for one in zip(*group.lists(), strict=True)]


def _together(singles: Sequence[UpdateGroup]) -> list[UpdateGroup]:
    """Groups by scalars again: one call for many tensors."""
    found: dict[tuple[object, bool], list[UpdateGroup]] = {}
    for single in singles:
        found.setdefault((single.scalars, single.copies is None), []).append(single)
    return [
        _like(each[0], [[x[0] for x in one.lists()] for one in each]) for each in found.values()
    ]


def _like(group: UpdateGroup, matrices: Sequence[Sequence[Tensor]]) -> UpdateGroup:
    """A group with the scalars of another; each matrix is p, m, h, g and, if there is one, the copy."""
    p, m, h, g, *copies = (list(column) for column in zip(*matrices, strict=True))
    return UpdateGroup(p, m, h, g, group.scalars, copies[0] if copies else None)


def _refusal(
    single: UpdateGroup, role: str, start: Tensor | None, spectrum: Spectrum
) -> Exception | None:
    """Why the kernel cannot take a matrix; None if it can."""
    from ..spectral_penalty.tables import plan, precision_of
    from .kernel import fits

    if spectrum.transform != "axis":
        return NotImplementedError(
            f"{KERNEL}: transform={spectrum.transform} has no Triton implementation, only axis "
            "has; use impl='auto' or impl='torch', or transform='axis'"
        )
    tensors = [x[0] for x in single.lists()]
    p = tensors[0]
    for t in (*tensors, p if start is None else start):
        if t.dtype not in TRITON_DTYPES:
            return ValueError(f"a dtype is {t.dtype}; it must be a 16- or 32-bit float for Triton")
    for name, t in zip(("p", "m", "h", "copy"), (*tensors[:3], *tensors[4:]), strict=False):
        if not t.is_contiguous():
            return ValueError(
                f"{name} of shape {tuple(t.shape)} has strides {t.stride()}; under impl='triton' "
                "it must be contiguous; impl='torch' takes any strides"
            )
    length = p.shape[1] if role == "A" else p.shape[0]
    try:
        spec = plan(length, precision_of(spectrum), chip_of(p.device))
    except ValueError as error:
        return error
    if not fits(spec):
        return ValueError(
            f"the feature axis has {length} elements; on {spec.chip.name} in {spec.precision} the registers of "
            "one pass spill; use impl='auto' or impl='torch', which take two"
        )
    return None


def _moved(item: Item) -> int:
    """Bytes that the update of a matrix must move: p, m, h, g and w0 in, p, m and the copy out."""
    p, m, *rest = (t for t in item.tensors if t is not None)
    return 2 * (p.nbytes + m.nbytes) + sum(t.nbytes for t in rest)
