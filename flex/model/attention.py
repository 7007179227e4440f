"""Attention over packed documents: each attends to itself alone, and no T x T mask is ever built.

Registered with transformers as `flex_varlen`. A call that carries `cu_seqlens`, as in
`model(input_ids=..., position_ids=..., cu_seqlens=..., use_cache=False)`, takes the packed path;
every other call (generation, padded batches) is transformers' own `sdpa` with its usual mask. One
loaded model does both.
"""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flex.kernels.causal_attention import rotated
from flex.model.attention_cpu import packed_attention_cpu

log = logging.getLogger("flex.model")

NAME = "flex_varlen"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
# cu_seqlens -> lengths: one device synchronisation per batch, not one per layer.
_LENGTHS = WeakTensorKeyDictionary()


def register() -> None:
    """Make `attn_implementation="flex_varlen"` known to transformers. Harmless when repeated."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seqlens: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a packed row; transformers' attention interface.

    Args:
        query: (1, H, T, D); any B without `cu_seqlens`.
        key, value: (1, H_kv, T, D), H a multiple of H_kv.
        attention_mask: what `_mask` returned.
        cu_seqlens: (documents + 1,) int32, 0 first and T last, never changed in place; none: defer
            to `sdpa`.
        angles: cos and sin (1, T, D) of the rotary embedding, only with `cu_seqlens`: query and key are not turned
            yet (rotary.py).

    Returns:
        (1, T, H, D) in the dtype of `query`, and None (no attention weights).

    Raises:
        ValueError: `cu_seqlens` with a batch it does not describe, a mask, or a feature the packed
            path lacks.
    """
    if cu_seqlens is None:
        if isinstance(attention_mask, partial):
            attention_mask = attention_mask()
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    lengths = _lengths(cu_seqlens)
    if query.shape[0] != 1 or key.shape[2] != query.shape[2] or sum(lengths) != query.shape[2]:
        raise ValueError(
            f"cu_seqlens covers {sum(lengths)} positions of one row; "
            f"query is {tuple(query.shape)}, key {tuple(key.shape)}"
        )
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            "attention_mask and cu_seqlens exclude each other: packed rows have no padding"
        )
    present = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    if window is not None and window < max(lengths):
        present.append("sliding_window")
    if present:
        raise ValueError(
            f"packed attention does not support {', '.join(present)}; set model.attention=sdpa"
        )

    grouped = key.shape[1] != query.shape[1]
    if query.device.type == "cpu" and dropout == 0.0:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        turns = None if angles is None else (angles[0][0], angles[1][0])
        return packed_attention_cpu(q, k, v, lengths, scale, turns)[None], None
    if angles is not None:
        query, key = (_turned(x, *angles) for x in (query, key))
    if query.is_cuda and query.dtype != torch.float32 and dropout == 0.0:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
        options: Any = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": grouped}
        longest = max(lengths)
        output: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
        return output[None], None
    if query.is_cuda:
        _say_once(
            "packed attention makes one call per document: "
            "the fused kernel wants half precision and no attention dropout"
        )
    # split, not slices: the backward of a slice fills a whole (1, H, T, D) with zeros.
    documents = zip(
        query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    )
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        ).transpose(1, 2)
        for q, k, v in documents
    ]
    return torch.cat(outputs, dim=1), None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(1, H, T, D) by angles (1, T, D)."""
    return rotated(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None]


def _lengths(cu_seqlens: Tensor) -> tuple[int, ...]:
    if cu_seqlens not in _LENGTHS:
        _LENGTHS[cu_seqlens] = tuple(cu_seqlens.diff().tolist())
    return _LENGTHS[cu_seqlens]


def _mask(
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Any:
    """transformers' sdpa mask, but put off for a packed row.

    A mask function does not see `cu_seqlens`. transformers takes position ids that restart, with no
    attention mask, for a packed row and forbids the causal shortcut: exactly then the T x T mask is
    left to `packed_attention`, which builds it only if the caller gave no `cu_seqlens`.
    """
    build = partial(
        sdpa_mask,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    packed = attention_mask is None and not allow_is_causal_skip and q_length == kv_length > 1
    return build if packed else build()


@cache
def _say_once(message: str) -> None:
    log.info(message)
