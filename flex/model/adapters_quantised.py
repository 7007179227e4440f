"""PEFT's LoRA layers over bitsandbytes' 4- and 8-bit layers, computed by our kernel (QLoRA).

Imported only where bitsandbytes is already: it takes seconds, and is optional.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from bitsandbytes import nn as bnb
from bitsandbytes.functional import has_avx512bf16
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from flex.kernels.lora_linear.packed import PACKED_DTYPES, why_not_dense
from flex.model.adapters import FusedLora


def keep_layout(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of `model`.

    In eval mode on a CPU with AVX512-BF16, its own forward puts the weight into another layout in
    place, its scales rounded to bf16 for good, whose product passes no gradient on: training would
    go on, after the first evaluation, without what flows through that layer.
    """
    for module in model.modules():
        if isinstance(module, bnb.Linear4bit):
            module.support_avx512bf16_for_cpu = False


class _OverPacked(FusedLora):
    def computes_in(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def cast(self, x: Tensor) -> Tensor:
        dtype = self.computes_in(x)
        return x if x.dtype == dtype else x.to(dtype)

    def why_not_dtype(self, x: Tensor) -> str | None:
        if self.computes_in(x) in PACKED_DTYPES and x.is_floating_point():
            return None
        return f"the input is {x.dtype}, the base weight quantised"


class FlexLoraLinear4bit(_OverPacked, Linear4bit):
    """`FusedLora` over NF4 or FP4. It computes in the base layer's `compute_dtype`, else in x's."""

    stock = Linear4bit
    bases = (bnb.Linear4bit, bnb.LinearNF4, bnb.LinearFP4)

    def computes_in(self, x: Tensor) -> torch.dtype:
        dtype = cast(Any, self.base_layer).compute_dtype
        return x.dtype if dtype is None else dtype

    def adopt(self) -> None:
        keep_layout(self.base_layer)

    def release(self) -> None:
        cast(Any, self.base_layer).support_avx512bf16_for_cpu = has_avx512bf16()

    @staticmethod
    def not_now(base: Any) -> str | None:
        if not isinstance(base.weight, bnb.Params4bit):
            return "the 4-bit weight has lost its quantisation state"
        return why_not_dense(base.weight)


class FlexLoraLinear8bitLt(_OverPacked, Linear8bitLt):
    """`FusedLora` over LLM.int8's weights. x is not rounded to 8 bits, as bitsandbytes' product does
    on a GPU and in eval mode: the result is nearer to the full-precision base's, not equal to it."""

    stock = Linear8bitLt
    bases = (bnb.Linear8bitLt,)

    def frozen(self) -> tuple[Any, Tensor | None]:
        base = cast(Any, self.base_layer)
        return _holder(base), base.bias

    @staticmethod
    def not_now(base: Any) -> str | None:
        return why_not_dense(_holder(base))


def _holder(base: Any) -> Any:
    """What holds an 8-bit layer's scales: its weight, and after the layer's first call its state."""
    return base.weight if base.state.SCB is None else base.state


FUSED: dict[type[LoraLayer], type[FusedLora]] = {
    kind.stock: kind for kind in (FlexLoraLinear4bit, FlexLoraLinear8bitLt)
}
