"""Causal attention over packed documents on a CPU: in C where `flex.kernels.causal_attention` takes them, else here.

Here short documents are batched matrix products. torch's CPU flash attention is slow in backward at a few hundred
positions: 16 documents of 170 (9 heads of 64 over 3 key heads, bf16, two cores of a Zen 4, torch 2.13) take 82 ms
forward and backward as a loop over documents, the batched products below 20 ms. Backward makes the probabilities again,
as flash attention does: kept, they would be a fifth of a step's activations (SmolLM2 on MBPP). They exist for one layer
at a time, heads x length^2 a document.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flex.kernels import products
from flex.kernels.causal_attention import causal_attention, rotated, takes
from flex.kernels.pointwise import causal_softmax_, causal_softmax_backward_

MAX_LENGTH = (
    640  # 9 heads x 640^2 bf16 = 7 MB a document and layer; above it flash attention is as fast
)
ALONE = 96  # longer documents are products by themselves: slices are cheaper than gathers, and nothing is padded
PADDING = 1.15  # shorter documents share a batch if the longest is at most this much longer


@dataclass(frozen=True)
class _Bucket:
    """Documents padded to one length, as rows of the packed row; padding repeats its first position."""

    length: int
    rows: Tensor | slice  # (docs * length,) positions in the packed row; a slice: one document
    valid: Tensor | None = None  # (docs * length,) bool; none: nothing is padded


@lru_cache(maxsize=16)  # all layers of a step, forward and backward, share the plan of its batch
def make_plan(lengths: tuple[int, ...]) -> tuple[_Bucket, ...]:
    """Long documents alone, buckets of short ones alike in length, for documents of `lengths` end to end."""
    starts = [0, *accumulate(lengths)]
    buckets, groups = [], list[list[int]]()
    for d in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        if lengths[d] > ALONE:
            buckets.append(_Bucket(lengths[d], slice(starts[d], starts[d + 1])))
        elif groups and lengths[groups[-1][0]] <= PADDING * lengths[d]:
            groups[-1].append(d)
        else:
            groups.append([d])
    for group in groups:
        longest = lengths[group[0]]
        steps = torch.arange(longest)
        begin = torch.tensor([starts[d] for d in group])[:, None]
        valid = steps < torch.tensor([lengths[d] for d in group])[:, None]
        rows = torch.where(valid, begin + steps, 0).flatten()
        buckets.append(_Bucket(longest, rows, None if bool(valid.all()) else valid.flatten()))
    return tuple(buckets)


def bucketed_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: tuple[_Bucket, ...], scale: float
) -> Tensor:
    """softmax(scale Q K^T, causal within each document) V.

    Args:
        query: (T, H, D), any strides. key, value: (T, H_kv, D), H a multiple of H_kv. One dtype; scores are
            rounded to it, the softmax is in fp32 inside (as in transformers' eager attention).
        plan: `make_plan` of lengths that sum up to T.

    Returns: (T, H, D). Not twice differentiable.
    """
    return _BucketedAttention.apply(query, key, value, plan, scale)


def packed_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale Q K^T, causal within each document) V; arguments as of `causal_attention`, which computes it where
    it can. Elsewhere `bucketed_attention` of runs of short documents, torch's flash attention of each longer one."""
    if takes(query, key, value, angles):
        return causal_attention(query, key, value, lengths, scale, angles)
    if angles is not None:
        query, key = rotated(query, *angles), rotated(key, *angles)
    runs = [(short, tuple(run)) for short, run in groupby(lengths, key=lambda n: n <= MAX_LENGTH)]
    if len(runs) == 1 and runs[0][0]:
        return bucketed_attention(query, key, value, make_plan(lengths), scale)
    cuts = [size for short, run in runs for size in ([sum(run)] if short else run)]
    plans = [p for short, run in runs for p in ([make_plan(run)] if short else [None] * len(run))]
    outputs = []
    # split, not slices: the backward of a slice fills a whole (T, H, D) with zeros.
    parts = zip(plans, query.split(cuts), key.split(cuts), value.split(cuts), strict=True)
    for plan, q, k, v in parts:
        if plan is not None:
            outputs.append(bucketed_attention(q, k, v, plan, scale))
        else:
            outputs.append(_flash(q, k, v, scale))
    return torch.cat(outputs)


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    shared = q.shape[1] != k.shape[1]
    dtype = q.dtype
    if products.widens(q):
        q, k, v = q.float(), k.float(), v.float()
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    return y[0].transpose(0, 1).to(dtype)


class _BucketedAttention(torch.autograd.Function):
    """Legend: J key heads, each shared by G query heads; a batch entry is a (key head, document), its query rows
    are (position, query head), so that heads which share a key are one product and dK, dV need no sum over them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: tuple[_Bucket, ...],
        scale: float,
    ) -> Tensor:
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        y, saved = torch.empty_like(query, memory_format=torch.contiguous_format), []
        for bucket in plan:
            q, k, v = (_take(x, bucket, heads) for x in (query, key, value))
            _put(y, products.bmm(_probabilities(q, k, groups, scale), v), bucket, heads)
            saved += [q, k, v]
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.scale, ctx.heads, ctx.groups = plan, scale, heads, groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        count, (width, heads) = len(grad), (grad.shape[2], ctx.heads)
        dquery = grad.new_empty(count, heads * ctx.groups, width)
        dkey, dvalue = grad.new_empty(count, heads, width), grad.new_empty(count, heads, width)
        for bucket, q, k, v in zip(ctx.plan, saved, saved, saved, strict=True):
            p = _probabilities(q, k, ctx.groups, ctx.scale)
            g = _take(grad, bucket, heads, clear_padding=True)
            _put(dvalue, products.bmm(p.transpose(1, 2), g), bucket, heads)
            dp = products.bmm(g, v.transpose(1, 2))
            ds = causal_softmax_backward_(p, dp, ctx.groups, ctx.scale)
            _put(dquery, products.bmm(ds, k), bucket, heads)
            _put(dkey, products.bmm(ds.transpose(1, 2), q), bucket, heads)
        return dquery, dkey, dvalue, None, None


def _probabilities(q: Tensor, k: Tensor, groups: int, scale: float) -> Tensor:
    """(B, length G, length) of (B, length G, D) and (B, length, D)."""
    return causal_softmax_(products.bmm(q, k.transpose(1, 2)), groups, scale)


def _take(x: Tensor, bucket: _Bucket, heads: int, clear_padding: bool = False) -> Tensor:
    """(T, J G, D) -> (J docs, length G, D), the bucket's positions; padding holds another's values, or zeros."""
    at = bucket.rows
    rows = x[at] if isinstance(at, slice) else x.index_select(0, at)
    rows = rows.unflatten(1, (heads, -1)).transpose(0, 1)
    if clear_padding and bucket.valid is not None:
        rows = rows * bucket.valid.view(-1, 1, 1)
    docs = rows.shape[1] // bucket.length
    return rows.reshape(heads * docs, -1, x.shape[-1])  # contiguous: bmm copies slices


def _put(to: Tensor, x: Tensor, bucket: _Bucket, heads: int) -> None:
    """The inverse of `_take`: (J docs, length G, D) into the bucket's positions of `to`, (T, J G, D)."""
    rows = x.view(heads, -1, to.shape[1] // heads, x.shape[-1]).transpose(0, 1)
    if isinstance(bucket.rows, slice):
        to[bucket.rows].unflatten(1, (heads, -1)).copy_(rows)
        return
    positions = bucket.rows
    if bucket.valid is not None:
        positions, rows = positions[bucket.valid], rows[bucket.valid]
    to.index_copy_(0, positions, rows.flatten(1, 2))
