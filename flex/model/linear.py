"""Frozen linear layers without an adapter, where 16-bit products are not left to torch (`flex.kernels.products`).

Adapted layers and the loss go the same way by themselves.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flex.kernels import products
from flex.kernels.frozen_linear import frozen_linear
from flex.kernels.lora_linear.packed import is_packed, why_not_dense
from flex.model.stand_in import replace, sample_of

log = logging.getLogger("flex.model")


class FrozenLinear(nn.Linear):
    """In the place of an nn.Linear, over its state; nn.Linear itself for what is left to torch."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        ours = products.are_ours_of(input)
        if not ours or weight.requires_grad or weight.dtype != input.dtype:
            return super().forward(input)
        return frozen_linear(input, weight, self.bias)


class _Frozen4bit(nn.Module):
    """In the place of bitsandbytes' 4-bit layer, over its state."""

    weight: Any
    bias: Tensor | None
    compute_dtype: torch.dtype | None

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
        ours = dtype == x.dtype and products.widens(x) and is_packed(self.weight)
        if not ours or why_not_dense(self.weight) is not None:
            return cast(Tensor, super().forward(x))
        return frozen_linear(x, self.weight, None if self.bias is None else self.bias.to(dtype))


def install(model: nn.Module) -> int:
    """Put ours in the place of every linear layer without an adapter where products are not left to torch.

    That is plain ones, and bitsandbytes' 4-bit ones on a processor without 16-bit products.

    Each is a subclass of the class it stands for and shares its whole state, as `stand_in.replace` says.

    Args:
        model: on its device, in its dtype, with its adapters; changed in place.

    Returns: how many were replaced.
    """
    sample = sample_of(model)
    if sample is None or not products.are_ours(sample):
        return 0
    # A layer with an adapter reads its base layer, and its adapters are trained.
    widens = products.widens(sample)
    kinds = replace(model, lambda module: _ours(type(module), widens), (BaseTunerLayer,))  # type: ignore[arg-type]
    replaced = kinds.total()
    dtype, how = str(sample.dtype).removeprefix("torch."), "in C, faster than PyTorch's"
    if widens:
        how = "in float32 and rounded, for this processor has none"
    log.info(
        "%s products are computed %s (%d linear layers without an adapter, adapted ones, loss)",
        dtype,
        how,
        replaced,
    )
    return replaced


@cache
def _ours(kind: type[nn.Module], widens: bool) -> type[nn.Module] | None:
    if kind is nn.Linear:
        return FrozenLinear
    bitsandbytes = sys.modules.get("bitsandbytes")
    if widens and bitsandbytes is not None:
        bnb = bitsandbytes.nn
        if kind in (bnb.Linear4bit, bnb.LinearNF4, bnb.LinearFP4):
            return type(f"Frozen{kind.__name__}", (_Frozen4bit, kind), {})
    return None
