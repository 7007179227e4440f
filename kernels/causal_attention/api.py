"""Checks and autograd: the C functions where they take the tensors, else the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ranges import named
from ..runtime import require
from . import native
from .reference import causal_attention_reference

Angles = tuple[Tensor, Tensor]


def takes(query: Tensor, key: Tensor, value: Tensor, angles: Angles | None = None) -> bool:
    """Whether the C functions take these: bf16 on a CPU that has dot products for it (and no AMX, see native.py),
    outside torch.compile; D a multiple of 16, with `angles` of 32; at most 48 query heads a key head."""
    tensors = (query, key, value, *(angles or ()))
    plain = all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors)
    if not plain or torch.compiler.is_compiling():
        return False
    width, groups = query.shape[2], query.shape[1] // max(1, key.shape[1])
    fits = width > 0 and width % (native.LANES * (1 if angles is None else 2)) == 0
    turned = angles is None or all(t.shape[-1] == width and not t.requires_grad for t in angles)
    return fits and turned and 1 <= groups <= native.ROWS and native.library() is not None


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float,
    angles: Angles | None = None,
) -> Tensor:
    """softmax(scale Q K^T) V, each position over those of its document up to its own.

    Scores and sums are fp32, probabilities are rounded to the inputs' dtype for their products; Q and K are rounded
    once after they are turned. The number of threads changes no bit, nor do a document's neighbours.

    Args:
        query: (T, H, D), any strides. key, value: (T, H_kv, D), H a multiple of H_kv.
        lengths: of the documents, which lie end to end; their sum is T.
        scale: of the scores, usually D ** -0.5.
        angles: cos and sin (T, D) of rotary embedding, of no gradient (`rotated`), for query and key; None: they
            are turned already, or not to be.

    Returns: (T, H, D), contiguous. Not twice differentiable.

    Raises: ValueError: the shapes or lengths do not fit each other.
    """
    count, heads, width = query.shape
    require(sum(lengths) == count, "sum(lengths)", sum(lengths), f"query's positions, {count}")
    require(min(lengths, default=0) >= 0, "lengths", tuple(lengths), "none below 0")
    for name, t in (("key", key), ("value", value)):
        wanted = (count, key.shape[1], width)
        require(t.shape == wanted, f"{name}.shape", tuple(t.shape), f"{wanted}")
    require(heads % max(1, key.shape[1]) == 0, "query's heads", heads, "a multiple of key's")
    for t in angles or ():
        require(t.shape == (count, width), "angles.shape", tuple(t.shape), f"{(count, width)}")
    if not takes(query, key, value, angles):
        return causal_attention_reference(query, key, value, lengths, scale, angles)
    q, k, v = (_rows(t) for t in (query, key, value))
    turns = [t.contiguous() for t in angles or ()]
    return _CausalAttention.apply(q, k, v, tuple(lengths), scale, *turns)


def _rows(x: Tensor) -> Tensor:
    """x with a head's elements side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        *angles: Tensor,
    ) -> Tensor:
        with named("causal_attention/forward", bytes=lambda: _bytes(q, k, v, q)):
            y, stats = native.forward(q, k, v, lengths, scale, angles)
        ctx.save_for_backward(q, k, v, stats, *angles)
        ctx.lengths, ctx.scale = lengths, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, stats, *angles = ctx.saved_tensors
        dy = _rows(dy)
        with named("causal_attention/backward", bytes=lambda: 2 * _bytes(q, k, v) + dy.nbytes):
            grads = native.backward(q, k, v, dy, stats, ctx.lengths, ctx.scale, angles)
        return (*grads, None, None, *(None for _ in angles))


def _bytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)
