"""Public functions: checks, grouping by dtype, choice of implementation. No autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..ranges import named
from ..runtime import TRITON_DTYPES, choose_impl, require
from .scalars import CONTROL, NORM_FLOOR, Scalars
from .torch_step import torch_update

KERNEL = "sophia_update"


@dataclass(frozen=True)
class UpdateGroup:
    """Tensors that share their scalars.

    params, exp_avgs, curvatures, grads: equally long lists of equally shaped floating tensors on one
    device. Shapes are free: whole matrices or the flat partitions of ZeRO. copies: none, or tensors
    that the new parameters are rounded into: with fp32 masters as `params`, the bf16 weights.
    """

    params: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    curvatures: Sequence[Tensor]
    grads: Sequence[Tensor]
    scalars: Scalars
    copies: Sequence[Tensor] | None = None

    def lists(self) -> list[Sequence[Tensor]]:
        """p, m, h, g and, where there are any, the copies."""
        found = [self.params, self.exp_avgs, self.curvatures, self.grads]
        return found if self.copies is None else [*found, self.copies]


@torch.no_grad()
def sophia_update(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    gamma: float,
    eps: float,
    weight_decay: float,
    m_scale: float = 1.0,
    h_scale: float = 1.0,
    h_offset: float = 0.0,
    copies: Sequence[Tensor] | None = None,
    control: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """One clipped update of every tensor, in place (`sophia_reference` is the specification).

    Args:
        params, exp_avgs, curvatures, grads, copies: see `UpdateGroup`; params, exp_avgs and copies
            are written.
        lr, beta1, gamma, eps, weight_decay, m_scale, h_scale, h_offset: see `sophia_reference`.
        control, impl: see `sophia_update_groups`.

    Returns: 0-dim int64 tensor, the number of clipped coordinates (no host sync).

    Raises: ValueError if the lists do not match or eps is not positive.
    """
    scalars = Scalars(lr, beta1, gamma, eps, weight_decay, m_scale, h_scale, h_offset)
    group = UpdateGroup(params, exp_avgs, curvatures, grads, scalars, copies)
    return sophia_update_groups([group], control=control, impl=impl)


@torch.no_grad()
def sophia_update_groups(
    groups: Sequence[UpdateGroup], *, control: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """`sophia_update` for groups with scalars of their own: under Triton one launch for all of them.

    Tensors of other dtypes make another launch. Under Triton p, m, h and copies must be contiguous,
    and a gradient that is not is copied. Parameters in bf16 without a master are computed in fp32 and rounded:
    changes below half a unit in the last place are lost.

    Args:
        control: fp32 (3,) from `gradient_norm`: gradients are multiplied by its factor, and if it
            is not finite nothing at all changes. Triton reads it on the device, torch on the host.
        impl: "auto", "torch" or "triton". "auto" is torch for fp64, which Triton does not take.

    Returns: 0-dim int64 tensor, the number of clipped coordinates (0 if nothing changed).

    Raises: ValueError: lists that do not match, eps not positive, or a dtype, device or stride
        that the implementation does not take. NotImplementedError: see `choose_impl`.
    """
    for group in groups:
        check_group(group)
    groups = [group for group in groups if len(group.params)]
    if not groups:
        choose_impl(KERNEL, impl, torch.device("cpu"))
        return torch.zeros((), dtype=torch.int64)
    device = groups[0].params[0].device
    check_control(control, device)
    chosen = _resolve(impl, device, (t for group in groups for x in group.lists() for t in x))
    with named("sophia_update/update", bytes=lambda: sum(map(_moved, groups))):
        if chosen == "triton":
            return _triton_update(groups, control)
        factor = 1.0
        if control is not None:
            _, factor, finite = control.tolist()
            if not finite:
                return torch.zeros((), dtype=torch.int64, device=device)
        counts = [
            torch_update(
                *(group.params, group.exp_avgs, group.curvatures, group.grads, group.copies),
                group.scalars.row(),
                factor,
            )
            for group in groups
        ]
        return torch.stack(counts).sum()


@torch.no_grad()
def gradient_norm(
    grads: Sequence[Tensor], max_norm: float, *, scale: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """The control tensor of an update: global norm, what to multiply gradients by, whether it is finite.

    Args:
        grads: any tensors on one device; none of them is written.
        max_norm: bound of the norm; 0: never clip. The clip factor is max_norm / (norm + 1e-6), at
            most 1, as DeepSpeed's.
        scale: one number on the device that every gradient is to be multiplied by first (one over a
            loss scale).
        impl: "auto", "torch" or "triton" (one launch per dtype, and one).

    Returns: fp32 (3,) on the device: [norm after `scale`, scale * clip factor, 1.0 or 0.0]. No host sync.

    Raises: ValueError: max_norm is negative, or `scale` is not one number.
    """
    require(max_norm >= 0, "max_norm", max_norm, ">= 0")
    require(scale is None or scale.numel() == 1, "scale", scale, "one number in a tensor")
    if not len(grads):
        return torch.tensor([0.0, 1.0, 1.0])
    device = grads[0].device
    chosen = _resolve(impl, device, grads)
    with named(
        "sophia_update/norm", bytes=lambda: sum(g.numel() * g.element_size() for g in grads)
    ):
        if chosen == "triton":
            from .norm import norm_launch

            lists = _by_dtype([g.contiguous() for g in grads], lambda g: [g])
            return norm_launch(lists, max_norm, scale, device)
        # norms of 16-bit gradients in fp32: rounded to bf16 each would be off by up to 0.4 %
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        norms = torch._foreach_norm(list(grads), 2, dtype=wide)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if scale is not None:
            norm = norm * scale.reshape(()).abs()
        factor = torch.ones_like(norm)
        if max_norm > 0:
            factor = 1.0 / ((norm + NORM_FLOOR) / max_norm).clamp_min(1.0)
        if scale is not None:
            factor = factor * scale.reshape(())
        return torch.stack([norm, factor, norm.isfinite().to(norm.dtype)]).float()


@torch.no_grad()
def curvature_update(
    curvatures: Sequence[Tensor],
    estimates: Sequence[Tensor],
    beta2: float,
    *,
    scale: float = 1.0,
    impl: str = "auto",
) -> None:
    """h <- beta2 h + (1 - beta2) scale * estimate for every tensor, in place (`curvature_reference`).

    `scale` is one over the number of micro-batches that were added up in `estimates`.

    Raises: ValueError if the lists do not match.
    """
    _check_lists(curvatures=curvatures, estimates=estimates)
    if not len(curvatures):
        return
    chosen = _resolve(impl, curvatures[0].device, (*curvatures, *estimates))
    with named("sophia_update/curvature", bytes=lambda: sum(3 * h.nbytes for h in curvatures)):
        if chosen == "triton":
            from .kernel import curvature_launch

            pairs = [(h, e.contiguous()) for h, e in zip(curvatures, estimates, strict=True)]
            _require_contiguous(curvatures=curvatures)
            for items in _by_dtype(pairs, lambda pair: pair):
                h, e = _columns(items)
                curvature_launch(h, e, beta2, scale)
            return
        if scale != 1.0:
            estimates = torch._foreach_mul(list(estimates), scale)
        torch._foreach_lerp_(list(curvatures), list(estimates), 1 - beta2)


@torch.no_grad()
def add_estimates(
    estimates: Sequence[Tensor],
    grads: Sequence[Tensor],
    num_targets: float,
    *,
    first: bool,
    impl: str = "auto",
) -> None:
    """estimate += num_targets * g^2 for every tensor, in place; `first`: = in place of +=.

    Raises: ValueError if the lists do not match; under Triton if an estimate is not fp32.
    """
    _check_lists(estimates=estimates, grads=grads)
    if not len(estimates):
        return
    chosen = _resolve(impl, estimates[0].device, (*estimates, *grads))
    with named("sophia_update/estimate", bytes=lambda: sum(2 * e.nbytes for e in estimates)):
        if chosen == "triton":
            from .kernel import estimate_launch

            _require_contiguous(estimates=estimates)
            pairs = [(e, g.contiguous()) for e, g in zip(estimates, grads, strict=True)]
            for items in _by_dtype(pairs, lambda pair: pair):
                e, g = _columns(items)
                estimate_launch(e, g, num_targets, first)
            return
        for estimate, grad in zip(estimates, grads, strict=True):
            if first:
                estimate.copy_(grad)
                estimate.square_().mul_(num_targets)
            else:
                estimate.addcmul_(grad, grad, value=num_targets)


def _triton_update(groups: Sequence[UpdateGroup], control: Tensor | None) -> Tensor:
    from .kernel import sophia_launch

    rows = [group.scalars for group in groups]
    items: list[tuple[Tensor, ...]] = []
    row_of: list[int] = []
    for index, group in enumerate(groups):
        _require_contiguous(
            params=group.params, exp_avgs=group.exp_avgs, curvatures=group.curvatures
        )
        _require_contiguous(copies=group.copies or ())
        lists = group.lists()
        lists[3] = [g.contiguous() for g in group.grads]
        items += zip(*lists, strict=True)
        row_of += [index] * len(group.params)
    total: Tensor | None = None
    for chosen in _by_dtype(range(len(items)), lambda i: items[i]):
        p, m, h, g, *copies = _columns([items[i] for i in chosen])
        count = sophia_launch(
            p, m, h, g, copies[0] if copies else None, rows, [row_of[i] for i in chosen], control
        )
        total = count if total is None else total + count
    assert total is not None
    return total


T = TypeVar("T")


def _by_dtype(items: Iterable[T], tensors: Callable[[T], Sequence[Tensor]]) -> list[list[T]]:
    """Items grouped by the dtypes of their tensors, in order of first appearance."""
    found: dict[tuple[torch.dtype, ...], list[T]] = {}
    for item in items:
        found.setdefault(tuple(t.dtype for t in tensors(item)), []).append(item)
    return list(found.values())


def _columns(items: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*items, strict=True)]


def _resolve(impl: str, device: torch.device, tensors: Iterable[Tensor]) -> str:
    """`choose_impl`, held against what Triton takes."""
    others = {t.dtype for t in tensors} - set(TRITON_DTYPES)
    if others and impl == "auto":
        impl = "torch"
    chosen = choose_impl(KERNEL, impl, device)
    if chosen == "triton" and others:
        raise ValueError(
            f"a tensor is {next(iter(others))}; under impl='triton' it must be one of "
            f"{', '.join(map(str, TRITON_DTYPES))}; impl='torch' takes any floating dtype"
        )
    return chosen


def _moved(group: UpdateGroup) -> int:
    """Bytes that the update of a group must move: p, m, h, g in, p, m and the copy out."""
    lists = group.lists()
    return sum(t.nbytes for x in (*lists, group.params, group.exp_avgs) for t in x)


def check_group(group: UpdateGroup) -> None:
    _check_lists(
        params=group.params,
        exp_avgs=group.exp_avgs,
        curvatures=group.curvatures,
        grads=group.grads,
        **({} if group.copies is None else {"copies": group.copies}),
    )
    eps = group.scalars.eps
    if eps <= 0:
        raise ValueError(f"eps is {eps}; it must be > 0, or 0/0 makes NaN where nothing is known")


def check_control(control: Tensor | None, device: torch.device) -> None:
    if control is not None:
        found = (tuple(control.shape), control.dtype, control.device)
        wanted = ((CONTROL,), torch.float32, device)
        require(found == wanted, "control", found, f"{wanted}, from gradient_norm")


def _require_contiguous(**lists: Sequence[Tensor]) -> None:
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if not t.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(t.shape)} and strides {t.stride()}; under "
                    "impl='triton' it must be contiguous; impl='torch' takes any strides"
                )


def _check_lists(**lists: Sequence[Tensor]) -> None:
    names = list(lists)
    first = lists[names[0]]
    for name in names[1:]:
        if len(lists[name]) != len(first):
            raise ValueError(
                f"{name} has {len(lists[name])} tensors; it must have as many as {names[0]}, {len(first)}"
            )
        for i, (a, b) in enumerate(zip(first, lists[name], strict=True)):
            if a.shape != b.shape:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(b.shape)}; it must be {names[0]}'s, {tuple(a.shape)}"
                )
