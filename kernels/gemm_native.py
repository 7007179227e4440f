"""Matrix products of bf16 on a CPU in C: the right operand is packed in pieces, a low-rank term joins in registers.

One core of a Zen 4, both at work, 235 GFLOP/s at most: 776 x 576 x 1536 with 224 GFLOP/s forward and backward, by torch
206 and 214; 1024 x 2048 x 8064 with 206 and 210, by torch 187 and 170. Layout: gemm_source.py.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .gemm_source import SOURCE
from .native_build import INT, LONG, POINTER, compile_with_dots, in_shares
from .processor import has_bf16_dots_alone
from .ranges import named

STEP, WIDTH = 6, 64  # rows of a tile and columns of a panel, as in SOURCE
EVEN = 32  # so many panels are shared out evenly enough
LEAST = 32  # rows, columns and depth: below, torch's products
DEEPEST = 16_384  # a panel of it is 2 MB
CACHE = 1 << 18  # bytes of panels that are packed at a time


class _Product(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("a", "b")] + [
        (name, LONG) for name in ("stride_a", "stride_k", "stride_n", "depth")
    ]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, _Product) for name in ("low", "main")),
        *((name, POINTER) for name in ("bias", "y", "keys")),
        *((name, LONG) for name in ("stride_y", "rows", "columns", "words")),
        *((name, INT) for name in ("add", "least")),
    ]


@functools.cache  # one attempt per process
def compiled() -> ctypes.CDLL | None:
    """The compiled SOURCE; None where the processor has no bf16 dot products, or, with one line in the log, if it
    cannot be compiled or loaded."""
    arguments = {"multiply": (POINTER, *[LONG] * 4, POINTER, LONG)}
    return compile_with_dots("gemm", SOURCE, arguments, "products: their C source")


def suits(x: Tensor) -> bool:
    """Whether products of x's dtype on its device are computed here, if they are not small."""
    bf16_on_cpu = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    able = bf16_on_cpu and has_bf16_dots_alone() and not torch.compiler.is_compiling()
    return able and compiled() is not None


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether a (M, K) @ b (K, N) is computed here: bf16 on a CPU that suits, not small, rows of a and either rows or
    columns of b contiguous."""
    rows, depth = a.shape
    large = min(rows, b.shape[1]) >= LEAST <= depth <= DEEPEST
    return large and a.stride(1) == 1 and 1 in b.stride() and b.dtype == a.dtype and suits(a)


def multiply(
    y: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    add: bool = False,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor] | None = None,
    mask: tuple[Tensor | None, int] = (None, 0),
) -> Tensor:
    """y = [y +] bias + keep * (p @ q) + a @ b, summed in fp32 and rounded once; bit-equal in any number of threads.

    The sum of a row does not depend on the rows beside it.

    Args:
        y: (M, N), rows contiguous. a: (M, K). b: (K, N). All bf16 and as `takes` says.
        add: whether what y holds is added to.
        bias: (N,) bf16.
        low: p (M, r), rows contiguous, and q (r, N), bf16.
        mask: dropout on p @ q: the keys (2, M + words) int32, or None, and the least lane that is kept (`keep_mask`).
    """
    run = compiled()
    assert run is not None
    rows, columns = y.shape
    job = _Job(
        main=_product(a, b), y=y.data_ptr(), stride_y=y.stride(0), rows=rows, columns=columns
    )
    job.add = add
    pairs = (a.shape[1] + 1) // 2
    if bias is not None:
        bias = bias.contiguous()
        job.bias = bias.data_ptr()
    if low is not None:
        p, q = low
        q = q if 1 in q.stride() else q.contiguous()
        job.low = _product(p, q)
        pairs += (p.shape[1] + 1) // 2
    keys, job.least = mask
    if keys is not None:
        job.keys, job.words = keys.data_ptr(), keys.shape[1] - rows
    panels, panel = -(-columns // WIDTH), 4 * WIDTH * pairs
    at_once = min(panels, max(1, CACHE // panel))
    # Shares of columns pack their own; few panels do not come out even, then each share packs all for its rows.
    by_rows = panels < EVEN and panels % torch.get_num_threads() > 0
    total = -(-rows // STEP) if by_rows else panels

    def work(begin: int, end: int) -> None:
        packed = torch.empty(panel * at_once, dtype=torch.uint8, device="cpu")
        share = (
            (0, panels, STEP * begin, min(rows, STEP * end)) if by_rows else (begin, end, 0, rows)
        )
        run.multiply(ctypes.byref(job), *share, packed.data_ptr(), at_once)

    depth = a.shape[1]
    least_bytes = 2 * (rows * depth + depth * columns + rows * columns)
    with named(f"gemm/{depth}x{columns}", least_bytes):
        in_shares(work, total, rows * columns * pairs // 16)
    return y


def _product(a: Tensor, b: Tensor) -> _Product:
    stride_k, stride_n = b.stride()
    return _Product(a.data_ptr(), b.data_ptr(), a.stride(0), stride_k, stride_n, a.shape[1])
