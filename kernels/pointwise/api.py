"""RMSNorm, SwiGLU, causal attention's softmax, the loss: in C where the tensors allow it, else references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..native_build import in_shares
from ..runtime import require
from .native import LONGEST, library
from .reference import (
    causal_softmax_backward_reference,
    causal_softmax_reference,
    rms_norm_reference,
    swiglu_reference,
)


def takes(*tensors: Tensor) -> bool:
    """Whether the C functions take these: bf16 on a CPU, outside torch.compile, and a C compiler was found."""
    plain = all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors)
    return plain and not torch.compiler.is_compiling() and library() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last dimension, forward and backward in one pass each.

    Args:
        x: (..., H). weight: (H,), frozen on the fast path (one that is trained takes the reference).
        eps: in the units of x^2.

    Raises: ValueError: the weight does not fit x.
    """
    require(weight.shape == x.shape[-1:], "weight.shape", tuple(weight.shape), f"({x.shape[-1]},)")
    if weight.requires_grad or not takes(x, weight):
        return rms_norm_reference(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; two tensors of one shape. Raises ValueError if the shapes differ."""
    require(gate.shape == up.shape, "up.shape", tuple(up.shape), f"gate's, {tuple(gate.shape)}")
    if not takes(gate, up):
        return swiglu_reference(gate, up)
    return _SwiGlu.apply(gate, up)


def causal_softmax_(scores: Tensor, groups: int, scale: float) -> Tensor:
    """softmax(scale * scores) over what each row sees, 0 elsewhere; not differentiable by itself.

    Args:
        scores: (B, length * groups, length), contiguous; row r is of position r // groups and sees the positions up
            to its own. Overwritten on the fast path. What a row does not see has no say, so it may be NaN.

    Returns: (B, length * groups, length), `scores` itself on the fast path.

    Raises: ValueError: the shape is not that, or not contiguous.
    """
    _require_scores(scores, groups)
    if not takes(scores) or scores.shape[-1] > LONGEST:
        return causal_softmax_reference(scores, groups, scale)
    run, pointer, length = _c().causal_softmax, scores.data_ptr(), scores.shape[-1]
    rows = scores.numel() // max(1, length)
    in_shares(lambda a, b: run(pointer, a, b, length, groups, scale), rows, scores.numel())
    return scores


def causal_softmax_backward_(
    probabilities: Tensor, dp: Tensor, groups: int, scale: float
) -> Tensor:
    """The scores' gradient, from what `causal_softmax_` returned and its gradient, `dp`, overwritten on the fast path.

    Raises: ValueError: the shapes differ, or are not `causal_softmax_`'s.
    """
    require(dp.shape == probabilities.shape, "dp.shape", tuple(dp.shape), "the probabilities'")
    _require_scores(dp, groups)
    if not takes(probabilities, dp):
        return causal_softmax_backward_reference(probabilities, dp, groups, scale)
    probabilities = probabilities.contiguous()
    p, d, length = probabilities.data_ptr(), dp.data_ptr(), dp.shape[-1]
    run, rows = _c().causal_softmax_backward, dp.numel() // max(1, length)
    in_shares(lambda a, b: run(p, d, a, b, length, groups, scale), rows, dp.numel())
    return dp


def cross_entropy_into(logits: Tensor, labels: Tensor, scale: float, grad: Tensor | None) -> Tensor:
    """Summed cross-entropy in nats, 0-dim fp64, not scaled; into `grad` scale * (softmax(logits) - onehot(labels)).

    Args:
        logits: (n, V), contiguous, of a dtype that the C functions take (`takes`).
        labels: (n,) int64, each in [0, V).
        grad: (n, V), contiguous, of the logits' dtype, or None. It may be `logits` itself, which are then overwritten.

    Raises: ValueError: the shapes do not fit, a label is outside [0, V), or the C functions do not take the logits.
    """
    rows, size = logits.shape
    require(labels.shape == (rows,), "labels.shape", tuple(labels.shape), f"({rows},)")
    for name, t in (("logits", logits), ("grad", grad)):
        if t is not None:
            require(t.shape == logits.shape, f"{name}.shape", tuple(t.shape), "the logits'")
            require(takes(t) and t.is_contiguous(), name, t.dtype, "contiguous bf16 on a CPU")
    if rows == 0:
        return torch.zeros((), dtype=torch.float64)
    inside = int(labels.min()) >= 0 and int(labels.max()) < size
    require(inside, "a label", f"outside [0, {size})", "a token of the vocabulary")
    labels, stats = labels.contiguous(), torch.empty(rows, 2)
    picked = logits.gather(1, labels[:, None])[:, 0].float()  # before they are overwritten
    at = (logits.data_ptr(), labels.data_ptr(), None if grad is None else grad.data_ptr())
    run, out = _c().cross_entropy, stats.data_ptr()
    in_shares(lambda a, b: run(*at, out, a, b, size, scale), rows, logits.numel())
    most, total = stats.unbind(1)
    return (total.log() + (most - picked)).sum(dtype=torch.float64)


def _require_scores(scores: Tensor, groups: int) -> None:
    rows, length = scores.shape[-2:]
    require(rows == length * groups, "scores.shape", tuple(scores.shape), f"{length * groups} rows")
    require(scores.is_contiguous(), "scores.stride", scores.stride(), "contiguous")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        rows, size = x.numel() // max(1, x.shape[-1]), x.shape[-1]
        scale = torch.empty(rows)
        pointers = [t.data_ptr() for t in (x, weight, y, scale)]
        run = _c().rms_norm
        in_shares(lambda a, b: run(*pointers, a, b, size, eps), rows, x.numel())
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        pointers = [t.data_ptr() for t in (x, weight, dy, scale, dx)]
        run, size = _c().rms_norm_backward, x.shape[-1]
        in_shares(lambda a, b: run(*pointers, a, b, size), len(scale), x.numel())
        return dx, None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        h = torch.empty_like(gate)
        pointers = [t.data_ptr() for t in (gate, up, h)]
        run = _c().swiglu
        in_shares(lambda a, b: run(*pointers, a, b), h.numel(), h.numel())
        ctx.save_for_backward(gate, up)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dh = dh.contiguous()
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        pointers = [t.data_ptr() for t in (gate, up, dh, dgate, dup)]
        run = _c().swiglu_backward
        in_shares(lambda a, b: run(*pointers, a, b), dh.numel(), dh.numel())
        return dgate, dup


def _c() -> Any:
    found = library()
    assert found is not None  # `takes` has looked
    return found
