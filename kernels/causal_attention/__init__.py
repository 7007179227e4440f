"""Causal attention over documents laid end to end, with rotary embedding, on a CPU with bf16 dot products.

from flex.kernels.causal_attention import causal_attention
"""

from .api import causal_attention, takes
from .reference import causal_attention_reference, rotated

__all__ = ["causal_attention", "causal_attention_reference", "rotated", "takes"]
