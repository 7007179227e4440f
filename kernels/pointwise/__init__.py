"""What stands between a decoder's products and behind them: RMSNorm, SwiGLU, attention's softmax, the loss, on a
CPU in one pass each, forward and backward.

from flex.kernels.pointwise import rms_norm, swiglu
"""

from .api import (
    causal_softmax_,
    causal_softmax_backward_,
    cross_entropy_into,
    rms_norm,
    swiglu,
    takes,
)
from .reference import (
    causal_softmax_backward_reference,
    causal_softmax_reference,
    rms_norm_reference,
    swiglu_reference,
)

__all__ = [
    "causal_softmax_",
    "causal_softmax_backward_",
    "causal_softmax_backward_reference",
    "causal_softmax_reference",
    "cross_entropy_into",
    "rms_norm",
    "rms_norm_reference",
    "swiglu",
    "swiglu_reference",
    "takes",
]
