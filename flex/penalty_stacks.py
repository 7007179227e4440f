"""Adapter matrices of the spectral penalty, grouped so that equal ones are computed together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flex.errors import ModelError
from flex.kernels.spectral_penalty import Spectrum, spectral_penalty, spectral_penalty_delta


@dataclass(frozen=True)
class LoraPair:
    """One adapted linear: A (r, d_in), B (d_out, r), scale = alpha / r; the model's names."""

    a_name: str
    a: nn.Parameter
    b_name: str
    b: nn.Parameter
    scale: float = 1.0


class Stack:
    """Matrices of one role, shape, dtype and device; `start` (M, rows, columns) is w0, or none."""

    def __init__(self, role: str, names: list[str], params: list[nn.Parameter], keep: bool) -> None:
        self.role, self.names, self.params = role, tuple(names), tuple(params)
        self.trainable = params[0].requires_grad
        self.start = self.current() if keep else None
        self.shape = (params[0].shape[0], params[0].shape[1])

    @classmethod
    def of(cls, role: str, pairs: list[LoraPair], keep: bool) -> Stack:
        if role == "A":
            return cls(role, [p.a_name for p in pairs], [p.a for p in pairs], keep)
        return cls(role, [p.b_name for p in pairs], [p.b for p in pairs], keep)

    def current(self, span: slice = slice(None)) -> Tensor:
        """w (m, rows, columns), a copy."""
        for name, param in zip(self.names[span], self.params[span], strict=True):
            require_whole(name, param)
        return torch.stack([p.detach() for p in self.params[span]])

    def update(self, span: slice = slice(None)) -> Tensor:
        """w - w0, or w when no start is kept."""
        w = self.current(span)
        return w if self.start is None else w.sub_(self.start[span])


class Group:
    """What is computed together: one stack, or for delta_w the A's and B's of equal pairs."""

    def __init__(self, stacks: list[Stack], scale: float = 1.0) -> None:
        self.stacks, self.scale = stacks, scale
        self.unit_elements = sum(s.params[0].numel() for s in stacks)
        self.trainable = [p for s in stacks if s.trainable for p in s.params]
        self.note_start()

    def __len__(self) -> int:
        return len(self.stacks[0].params)

    def note_start(self) -> None:
        """B0 = 0, as PEFT starts, spares delta_w the terms of B0 A0."""
        start = self.stacks[-1].start
        self.moved = start is not None and bool(start.any())

    def gradients(
        self, span: slice, spectrum: Spectrum, weight: float, impl: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """weight * P (m,) and its gradient per stack, for the members in `span`."""
        if len(self.stacks) == 1:
            (s,) = self.stacks
            value, grad = spectral_penalty(
                s.update(span), spectrum, role=s.role, weight=weight, impl=impl
            )
            return value, (grad,)
        a, b = self.stacks
        a0, b0 = (s.start[span] if self.moved and s.start is not None else None for s in (a, b))
        w_a, w_b = a.current(span), b.current(span)
        value, *grads = spectral_penalty_delta(
            w_a, w_b, spectrum, a0=a0, b0=b0, scale=self.scale, weight=weight, impl=impl
        )
        return value, tuple(grads)


def stack_equal_shapes(pairs: Iterable[LoraPair], target: str) -> list[Group]:
    """Trainable matrices that are equal in role, shape, dtype and device, a group each; for
    `delta_w` all matrices of pairs that are equal in both and in scale.

    Args:
        target: penalty.target; the present weights are kept as the start unless it is "factors".

    Raises:
        ModelError: ZeRO-3 has partitioned a matrix.
    """
    keep = target != "factors"
    members: dict[tuple, list[LoraPair]] = {}
    if target == "delta_w":
        for p in pairs:
            members.setdefault((*_kind(p.a), *_kind(p.b), p.scale), []).append(p)
        return [
            Group([Stack.of(role, m, keep) for role in "AB"], m[0].scale) for m in members.values()
        ]
    for p in pairs:
        for role, w in (("A", p.a), ("B", p.b)):
            if w.requires_grad:
                members.setdefault((role, *_kind(w)), []).append(p)
    return [Group([Stack.of(key[0], m, keep)]) for key, m in members.items()]


def require_whole(name: str, w: Tensor) -> None:
    """Refuse a matrix whose elements are not in this process.

    Raises:
        ModelError: it has none.
    """
    if w.numel() == 0:
        how = "partitioned by ZeRO-3" if hasattr(w, "ds_id") else "empty"
        raise ModelError(
            f"{name} is {how} (0 elements here)",
            "a transform needs the whole matrix; the penalty would silently be 0",
            'set "stage3_param_persistence_threshold" to 1e6 or more in the ds_config',
        )


def _kind(w: Tensor) -> tuple:
    require_whole("a LoRA matrix", w)
    return (*w.shape, w.dtype, w.device, w.requires_grad)
