"""Llama's attention on a CPU, with the rotary embedding left to packed attention.

transformers turns queries and keys by eight operations forward and as many backward, each of which reads and writes
all of them; `flex.kernels.causal_attention` turns a row when it loads it.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from flex.kernels.causal_attention import takes
from flex.model import attention
from flex.model.stand_in import family_of, named, replace, sample_of

log = logging.getLogger("flex.model")

# transformers' families whose attention is Llama's but for the window.
FAMILIES = ("llama", "mistral", "qwen2")


class _Attention(nn.Module):
    """In the place of a family's attention, over its state."""

    config: Any
    head_dim: int
    attention_dropout: float
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        packed = kwargs.get("cu_seqlens") is not None and past_key_values is None
        ours = self.config._attn_implementation == attention.NAME
        if not (packed and ours) or position_embeddings is None:
            return cast(
                "tuple[Tensor, Tensor | None]",
                super().forward(
                    hidden_states=hidden_states,
                    position_embeddings=position_embeddings,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    **kwargs,
                ),
            )
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in projections)
        output, weights = attention.packed_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=_window(self),
            angles=position_embeddings,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def install(model: nn.Module) -> Counter[str]:
    """Put ours in the place of each attention of a known family, if the C functions take the model's dtype.

    Args:
        model: on its device, in its dtype; changed in place. A call without `cu_seqlens` stays the family's own.

    Returns: how many of each class were replaced; empty on GPUs, in fp32, where `causal_attention` is not C.
    """
    sample = sample_of(model)
    if sample is None or not _in_c(sample.dtype, sample.device):
        return Counter()
    replaced = replace(model, lambda module: _ours(type(module)))  # type: ignore[arg-type]  # a class is hashable
    if replaced:
        log.info("attention with its rotary embedding in C: %s", named(replaced))
    return replaced


def _in_c(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `causal_attention` computes heads of a usual width in C there."""
    row = torch.empty(1, 1, 64, dtype=dtype, device=device)
    return takes(row, row, row, (row[:, 0], row[:, 0]))


def _window(module: Any) -> int | None:
    """Mistral's is the configuration's, Qwen2's the layer's own, Llama has none."""
    own = getattr(module.config, "sliding_window", None)
    return cast("int | None", getattr(module, "sliding_window", own))


@cache
def _ours(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of ours for exactly this class; None if it is of no known family."""
    family = family_of(kind, FAMILIES)
    if family is None or kind.__name__.lower() != f"{family}attention":
        return None
    return type(f"Flex{kind.__name__}", (_Attention, kind), {})
