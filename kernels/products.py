"""Matrix products of 16-bit numbers on a CPU: in C where that is faster than torch's, widened where there are no units.

With bf16 dot products and no AMX, products of bf16 that are not small are C (`gemm_native`).

Without any units for them (AVX2 only: most desktops, Zen 1 to 3) torch's own bf16 GEMM runs at a ninth of the fp32 one:
512 x 576 x 1536 takes 131 ms where fp32, with both casts, takes 14 (one core of a Zen 3, torch 2.13). Here the operands
are widened a piece at a time, fp32 sums them up, and the result is rounded once, as the units would.

Elsewhere every function is torch's own. None is differentiable: they are the insides of autograd Functions.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import gemm_native

# Elements of b widened at once: 8 MB of fp32 stay in the caches, and the allocator hands out the same memory again.
STEP = 1 << 21
FEW_ROWS = 4  # below it the product is bound by reading b, and widening reads it and more


def widens(x: Tensor) -> bool:
    """Whether products of x's dtype on its device are computed in fp32 here."""
    return x.device.type == "cpu" and x.element_size() == 2 and not _has_units(x.dtype)


def are_ours(x: Tensor) -> bool:
    """Whether products of x's dtype on its device are not left to torch."""
    return widens(x) or gemm_native.suits(x)


def are_ours_of(x: Tensor) -> bool:
    """`are_ours`, and x (..., K) has rows enough: with few, a product is bound by reading the matrix."""
    rows = x.shape[:-1].numel()
    return rows >= FEW_ROWS if widens(x) else rows >= gemm_native.LEAST and gemm_native.suits(x)


def in_c(a: Tensor, b: Tensor) -> bool:
    """Whether a (M, K) @ b (K, N) is `gemm_native`'s."""
    return not widens(a) and gemm_native.takes(a, b)


@functools.cache
def _has_units(dtype: torch.dtype) -> bool:
    ask = torch.ops.mkldnn
    known = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    return dtype not in known or bool(getattr(ask, known[dtype])())


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a @ b + bias, (M, K) by (K, N) -> (M, N), into `out` if given; all of one dtype, a and b of any strides."""
    if in_c(a, b) and _is_plain(bias, a) and _is_plain(out, a):
        y = a.new_empty(len(a), b.shape[1]) if out is None else out
        return gemm_native.multiply(y, a, b, bias=bias)
    if not widens(a) or len(a) < FEW_ROWS:
        if bias is None:
            return torch.mm(a, b, out=out)
        return torch.addmm(bias, a, b, out=out)
    return _product(a.new_empty(len(a), b.shape[1]) if out is None else out, bias, a, b)


def addmm_(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y += a @ b in y's memory, added before the sum is rounded; shapes as in `mm`."""
    if in_c(a, b) and _is_plain(y, a):
        return gemm_native.multiply(y, a, b, add=True)
    if not widens(a) or len(a) < FEW_ROWS:
        return y.addmm_(a, b)
    return _product(y, y, a, b)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of every batch entry: (B, M, K) by (B, K, N) -> (B, M, N)."""
    if not widens(a):
        return torch.bmm(a, b)
    return torch.bmm(a.float(), b.float()).to(a.dtype)


def _is_plain(operand: Tensor | None, like: Tensor) -> bool:
    return operand is None or (operand.dtype == like.dtype and operand.stride(-1) == 1)


def _product(out: Tensor, start: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """out = start + a @ b, start (M, N), (N,) or None; b in pieces of the dimension that is slow in memory."""
    a, (depth, width) = a.float(), b.shape
    if b.stride(0) < b.stride(1):
        for part in _pieces(width, depth):
            begin = None if start is None else start[..., part]
            out[:, part] = _added(begin, a, b[:, part].float())
        return out
    wide = start
    for part in _pieces(depth, width):
        wide = _added(wide, a[:, part], b[part].float())
    return out.zero_() if wide is None else out.copy_(wide)


def _added(start: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if start is None else torch.addmm(start.float(), a, b)


def _pieces(size: int, other: int) -> list[slice]:
    step = max(1, STEP // other)
    return [slice(start, start + step) for start in range(0, size, step)]
