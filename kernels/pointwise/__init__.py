"""What stands between a decoder's products: RMSNorm and SwiGLU, forward and backward in one pass each, on a CPU.

from flex.kernels.pointwise import rms_norm, swiglu
"""

from .api import rms_norm, swiglu, takes
from .reference import rms_norm_reference, swiglu_reference

__all__ = ["rms_norm", "rms_norm_reference", "swiglu", "swiglu_reference", "takes"]
