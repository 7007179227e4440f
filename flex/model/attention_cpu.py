"""Causal attention over packed short documents on a CPU, as batched matrix products.

torch's CPU flash attention is slow in backward at a few hundred positions: 8 documents of 150
(9 heads of 64, bf16, two cores of a Zen 4) take 28 ms forward and backward, a loop over documents
41 ms, the batched products below 7 ms. The price is the probabilities, kept for backward:
heads x length^2 elements per document and layer, so long documents stay with flash attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LENGTH = 512  # 9 heads x 512^2 bf16 = 4.7 MB a document and layer
PADDING = 1.15  # documents share a batch if the longest is at most this much longer


@dataclass(frozen=True)
class _Bucket:
    """Documents padded to one length: `index` (docs * length,) into the packed row, the first row for padding."""

    length: int
    index: Tensor
    valid: Tensor | None  # (1, docs * length, 1) bool, or none if nothing is padded


@dataclass(frozen=True)
class Plan:
    """How the documents of one packed row are batched; `inverse` (T,) finds a position in the buckets' rows."""

    buckets: tuple[_Bucket, ...]
    inverse: Tensor


def make_plan(lengths: Sequence[int]) -> Plan:
    """Buckets of documents alike in length, for documents of `lengths` end to end."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    groups: list[list[int]] = []
    for d in order:
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
        mask = None if bool(valid.all()) else valid.flatten()[None, :, None]
        buckets.append(_Bucket(longest, index.flatten(), mask))
    return Plan(tuple(buckets), inverse)


def bucketed_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
) -> Tensor:
    """softmax(scale Q K^T, causal within each document) V.

    Args:
        query: (H, T, D). key, value: (H_kv, T, D), H a multiple of H_kv. One dtype; scores are
            rounded to it, the softmax is in fp32 inside (as in transformers' eager attention).
        plan: `make_plan` of lengths that sum up to T.

    Returns: (H, T, D). Not twice differentiable.
    """
    return _BucketedAttention.apply(query, key, value, plan, scale)


class _BucketedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
    ) -> Tensor:
        outputs, saved = [], []
        for bucket in plan.buckets:
            q = _take(query, bucket)
            k, v = (_take(x, bucket, query.shape[0]) for x in (key, value))
            scores = torch.baddbmm(
                _causal(bucket.length, q.dtype), q, k.transpose(1, 2), alpha=scale
            )
            p = torch.softmax(scores, -1)
            outputs.append(torch.bmm(p, v).view(query.shape[0], -1, query.shape[2]))
            saved += [q, k, v, p]
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.scale, ctx.heads = plan, scale, (query.shape[0], key.shape[0])
        return _put(outputs, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, kv_heads = ctx.heads
        saved = iter(ctx.saved_tensors)
        found: tuple[list[Tensor], ...] = ([], [], [])
        for bucket, q, k, v, p in zip(ctx.plan.buckets, saved, saved, saved, saved, strict=True):
            g = _take(grad, bucket)
            if bucket.valid is not None:  # padding read another position's gradient
                g = (g.view(heads, -1, g.shape[-1]) * bucket.valid).view(g.shape)
            dv = torch.bmm(p.transpose(1, 2), g)
            dp = torch.bmm(g, v.transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq = torch.bmm(ds, k).mul_(ctx.scale)
            dk = torch.bmm(ds.transpose(1, 2), q).mul_(ctx.scale)
            for gathered, part in zip(found, (dq, dk, dv), strict=True):
                gathered.append(part.view(heads, -1, part.shape[-1]))
        dq, dk, dv = (_put(parts, ctx.plan) for parts in found)
        if kv_heads != heads:  # heads that share a key: their gradients add up
            dk, dv = (x.view(kv_heads, heads // kv_heads, *x.shape[1:]).sum(1) for x in (dk, dv))
        return dq, dk, dv, None, None


def _take(x: Tensor, bucket: _Bucket, heads: int | None = None) -> Tensor:
    """(H, T, D) -> (heads * docs, length, D): the bucket's rows, each head repeated up to `heads`."""
    rows = x.index_select(1, bucket.index)
    if heads is not None and heads != x.shape[0]:
        rows = rows.repeat_interleave(heads // x.shape[0], 0)
    return rows.view(-1, bucket.length, x.shape[2])


def _put(parts: list[Tensor], plan: Plan) -> Tensor:
    """The buckets' rows (H, docs * length, D) back in the packed row's order, (H, T, D)."""
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return rows.index_select(1, plan.inverse)


def _causal(length: int, dtype: torch.dtype) -> Tensor:
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)
