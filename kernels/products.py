"""Matrix products of 16-bit numbers on processors that have no instructions for them.

Without such units (AVX2 only: most desktops, Zen 1 to 3) torch's own bf16 GEMM runs at a ninth of the fp32 one: 512 x
576 x 1536 takes 131 ms where fp32, with both casts, takes 14 (one core of a Zen 3, torch 2.13). Here the operands are
widened a piece at a time, fp32 sums them up, and the result is rounded once, as the units would. Elsewhere every
function is torch's own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Elements of b widened at once: 8 MB of fp32 stay in the caches, and the allocator hands out the same memory again.
STEP = 1 << 21
FEW_ROWS = 4  # below it the product is bound by reading b, and widening reads it and more


def widens(x: Tensor) -> bool:
    """Whether products of x's dtype on its device are computed in fp32 here."""
    return x.device.type == "cpu" and x.element_size() == 2 and not _has_units(x.dtype)


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
    if not widens(a) or len(a) < FEW_ROWS:
        if bias is None:
            return torch.mm(a, b, out=out)
        return torch.addmm(bias, a, b, out=out)
    wide = _added(None if bias is None else bias.float().repeat(len(a), 1), a, b)
    return wide.to(a.dtype) if out is None else out.copy_(wide)


def addmm_(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y += a @ b in y's memory, added before the sum is rounded; shapes as in `mm`."""
    if not widens(a) or len(a) < FEW_ROWS:
        return y.addmm_(a, b)
    return y.copy_(_added(y.float(), a, b))


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of every batch entry: (B, M, K) by (B, K, N) -> (B, M, N)."""
    if not widens(a):
        return torch.bmm(a, b)
    return torch.bmm(a.float(), b.float()).to(a.dtype)


def _added(y: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """y + a @ b in fp32, y (fp32) in its memory; b widened by pieces along the dimension that is slow in memory."""
    a, (depth, width) = a.float(), b.shape
    if b.numel() <= STEP:
        return torch.mm(a, b.float()) if y is None else y.addmm_(a, b.float())
    if b.stride(0) < b.stride(1):
        y = a.new_zeros(len(a), width) if y is None else y
        for part in _pieces(width, depth):
            y[:, part].addmm_(a, b[:, part].float())
        return y
    for part in _pieces(depth, width):
        piece = b[part].float()
        y = torch.mm(a[:, part], piece) if y is None else y.addmm_(a[:, part], piece)
    assert y is not None
    return y


def _pieces(size: int, other: int) -> list[slice]:
    step = max(1, STEP // other)
    return [slice(start, start + step) for start in range(0, size, step)]
