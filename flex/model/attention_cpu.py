"""Causal attention over packed short documents on a CPU, as batched matrix products.

torch's CPU flash attention is slow in backward at a few hundred positions: 16 documents of 170 (9 heads of 64 over
3 key heads, bf16, two cores of a Zen 4, torch 2.13) take 82 ms forward and backward as a loop over documents, the
batched products below 20 ms. The price is the probabilities, kept for backward: heads x length^2 elements per
document and layer, so documents above MAX_LENGTH stay with flash attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flex.kernels.pointwise import causal_softmax_, causal_softmax_backward_

MAX_LENGTH = (
    640  # 9 heads x 640^2 bf16 = 7 MB a document and layer; above it flash attention is as fast
)
PADDING = 1.15  # documents share a batch if the longest is at most this much longer


@dataclass(frozen=True)
class _Bucket:
    """Documents padded to one length, as rows of the packed row; padding repeats its first position."""

    length: int
    index: Tensor  # (docs * length,) positions in the packed row
    valid: Tensor | None  # (docs * length, 1, 1) bool; none: nothing is padded


@dataclass(frozen=True)
class Plan:
    """How the documents of one packed row are batched; `inverse` (T,) finds each position in the buckets' rows."""

    buckets: tuple[_Bucket, ...]
    inverse: Tensor


@lru_cache(maxsize=16)  # all layers of a step, forward and backward, share the plan of its batch
def make_plan(lengths: tuple[int, ...]) -> Plan:
    """Buckets of documents alike in length, for documents of `lengths` end to end."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups: list[list[int]] = []
    for d in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        if groups and lengths[groups[-1][0]] <= PADDING * lengths[d]:
            groups[-1].append(d)
        else:
            groups.append([d])
    buckets, inverse, before = [], torch.empty(starts[-1], dtype=torch.int64), 0
    for group in groups:
        longest = lengths[group[0]]
        steps = torch.arange(longest)
        begin = torch.tensor([starts[d] for d in group])[:, None]
        valid = steps < torch.tensor([lengths[d] for d in group])[:, None]
        index = torch.where(valid, begin + steps, 0)
        inverse[index[valid]] = before + valid.flatten().nonzero().squeeze(1)
        before += valid.numel()
        mask = None if bool(valid.all()) else valid.view(-1, 1, 1)
        buckets.append(_Bucket(longest, index.flatten(), mask))
    return Plan(tuple(buckets), inverse)


def bucketed_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
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
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """`bucketed_attention` of runs of short documents, torch's flash attention of each longer one; shapes as there."""
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
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    return y[0].transpose(0, 1)


class _BucketedAttention(torch.autograd.Function):
    """Legend: J key heads, each shared by G query heads; a batch entry is a (key head, document), its query rows
    are (position, query head), so that heads which share a key are one product and dK, dV need no sum over them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
    ) -> Tensor:
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        outputs, saved = [], []
        for bucket in plan.buckets:
            q, k, v = (_take(x, bucket, heads) for x in (query, key, value))
            p = causal_softmax_(torch.bmm(q, k.transpose(1, 2)), groups, scale)
            outputs.append(_rows(torch.bmm(p, v), heads, groups))
            saved += [q, k, v, p]
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.scale, ctx.heads, ctx.groups = plan, scale, heads, groups
        return _put(outputs, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        found: tuple[list[Tensor], ...] = ([], [], [])
        for bucket, q, k, v, p in zip(ctx.plan.buckets, saved, saved, saved, saved, strict=True):
            g = _take(grad, bucket, ctx.heads, clear_padding=True)
            dv = torch.bmm(p.transpose(1, 2), g)
            dp = torch.bmm(g, v.transpose(1, 2))
            ds = causal_softmax_backward_(p, dp, ctx.groups, ctx.scale)
            dq = torch.bmm(ds, k)
            dk = torch.bmm(ds.transpose(1, 2), q)
            for rows, part, groups in zip(found, (dq, dk, dv), (ctx.groups, 1, 1), strict=True):
                rows.append(_rows(part, ctx.heads, groups))
        dq, dk, dv = (_put(parts, ctx.plan) for parts in found)
        return dq, dk, dv, None, None


def _take(x: Tensor, bucket: _Bucket, heads: int, clear_padding: bool = False) -> Tensor:
    """(T, J G, D) -> (J docs, length G, D), the bucket's positions; padding holds another's values, or zeros."""
    rows = x.unflatten(1, (heads, -1)).transpose(0, 1).index_select(1, bucket.index)
    if clear_padding and bucket.valid is not None:
        rows *= bucket.valid
    return rows.view(heads * (len(bucket.index) // bucket.length), -1, x.shape[-1])


def _rows(x: Tensor, heads: int, groups: int) -> Tensor:
    """(J docs, length G, D) -> (J, docs length, G, D), a view."""
    return x.view(heads, -1, groups, x.shape[-1])


def _put(parts: list[Tensor], plan: Plan) -> Tensor:
    """The buckets' rows (J, docs length, G, D) back in the packed row's order, (T, J G, D)."""
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return rows.transpose(0, 1).index_select(0, plan.inverse).flatten(1, 2)
