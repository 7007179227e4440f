"""Llama's RMSNorm and MLP with their pointwise chains computed by `flex.kernels.pointwise`.

On a CPU these chains, not the products, are the largest part of a training step where the processor has matrix units
(AMX): 25 % of it for SmolLM2-135M.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from flex.kernels.lora_linear import remakable
from flex.kernels.pointwise import rms_norm, swiglu, takes
from flex.model.stand_in import family_of, named, replace, sample_of

log = logging.getLogger("flex.model")

# transformers' families whose RMSNorm and MLP are Llama's, line by line.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class _Norm(nn.Module):
    """In the place of a family's RMSNorm, over its state."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:  # the family's own promotes
            return cast(Tensor, super().forward(hidden_states))
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _Mlp(nn.Module):
    """In the place of a family's MLP, over its state."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        h = swiglu(gate, up)
        if h.requires_grad and takes(h):  # its own backward keeps what one pass makes it of
            remakable(h, swiglu, gate, up)
        return cast(Tensor, self.down_proj(h))


def install(model: nn.Module) -> Counter[str]:
    """Put ours in the place of each RMSNorm and MLP of a known family, if the C functions take the model's weights.

    Each of ours is a subclass of the class it stands for and shares its whole state: parameters, hooks and names stay.

    Args:
        model: on its device, in its dtype; changed in place.

    Returns: how many of each class were replaced; empty on GPUs, in fp32, without a C compiler.
    """
    sample = sample_of(model)
    if sample is None or not takes(sample):
        return Counter()
    replaced = replace(model, _ours_if_silu)
    if replaced:
        log.info("pointwise chains in one pass each: %s", named(replaced))
    return replaced


def _ours_if_silu(module: nn.Module) -> type[nn.Module] | None:
    ours = _ours(type(module))  # type: ignore[arg-type]  # a class is hashable
    other = ours is not None and issubclass(ours, _Mlp) and not _is_silu(cast(Any, module).act_fn)
    return None if other else ours


def _is_silu(activation: object) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


@cache
def _ours(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of ours for exactly this class; None if it is of no known family."""
    family = family_of(kind, FAMILIES)
    if family is None:
        return None
    for suffix, ours in (("RMSNorm", _Norm), ("MLP", _Mlp)):
        if kind.__name__.lower() == f"{family}{suffix}".lower():
            return type(f"Flex{kind.__name__}", (ours, kind), {})
    return None
