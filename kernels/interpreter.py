"""Makes Triton's interpreter right for bfloat16, where it is silently wrong.

The interpreter keeps bf16 as the uint16 that holds its bits. Three of its operations take those
integers for numbers or round badly (triton 3.6 to 3.9): `tl.dot` multiplies bit patterns, casts
other than to and from fp32 convert the integer, and fp32 -> bf16 cuts the mantissa off and turns
some NaNs into infinity. Arithmetic on bf16 itself stays wrong: kernels widen straight after a load.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.cache  # once per process
def install() -> None:
    """Replace the three operations on the interpreter's builder. Harmless when repeated."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl
    bf16 = tl.bfloat16

    def widened(x: Any) -> Any:
        return handle(to_float32(x.data), tl.float32) if x.dtype.scalar == bf16 else x

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == bf16:
            src = widened(src)
        if dst_type.scalar == bf16:
            return handle(to_bfloat16(src.data.astype(np.float32)), bf16)
        return src if src.dtype.scalar == dst_type.scalar else plain_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if bf16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return plain_fp_to_fp(self, src, dst_type, rounding_mode)

    plain_fp_to_fp = builder.create_fp_to_fp
    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_to_fp = create_fp_to_fp


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bf16 held as uint16 -> the same numbers as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> bf16 held as uint16: round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # an overflow carries into infinity
    quiet = (bits >> 16) | 0x0040
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16)
