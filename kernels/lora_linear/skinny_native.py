"""The low-rank products on a CPU, bf16: x, dY and what the frozen GEMM accumulates onto pass through memory once.

torch's GEMM takes 1.3 to 1.5 ms for a product of rank 8 over 1728 x 1536 (one core, Sapphire Rapids), five times what
its bytes take, and its dropout is a mask and a masked copy besides. Legend: api.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import products
from ..native_build import FLOAT, INT, LONG, POINTER, compile_or_warn, in_shares
from .dropout import dropped_lanes, philox_keys
from .skinny_source import SOURCE

# Where the low-rank products of a layer took less than by torch (1728 x 576 x 1536): r 8 less by a third to a half, 16
# less with dropout but a quarter more without, 32 a tenth more with it.
MAX_RANK, MAX_RANK_WITHOUT_DROPOUT = 16, 8
LANES = 32  # columns of a vector: 16 words of two bf16
RANKS = 8  # of a panel: 16 accumulators with the even and the odd columns
BLOCK = 256  # rows whose part of dA and dB is summed on its own, however many threads there are

# The vectors are explicit: -O2 is as fast as -O3 and compiles in half the time.
FLAGS = ("-O2", "-ffp-contract=fast", "-mprefer-vector-width=512", "-Wno-psabi")
ARGUMENTS = {
    "pack": (POINTER, *[LONG] * 4, POINTER),
    "pack_down": (POINTER, *[LONG] * 4, POINTER),
    "dots": (),
    "unpack": (POINTER, *[LONG] * 3, FLOAT, POINTER, LONG, LONG),
    "fill_keys": (ctypes.c_uint64, POINTER, LONG, LONG, POINTER),
    "forward": (POINTER, *[LONG] * 5, *[POINTER] * 4, INT, *[POINTER] * 2, LONG, LONG),
    "backward": (
        POINTER,
        LONG,
        POINTER,
        *[LONG] * 5,
        *[POINTER] * 4,
        INT,
        *[POINTER] * 3,
        LONG,
        LONG,
    ),
}


@functools.cache  # one attempt per process
def library() -> ctypes.CDLL | None:
    """The compiled SOURCE; None, and one line in the log, if it cannot be compiled or loaded."""
    what = "lora_linear: the C source of the low-rank products"
    sizes = (f"-DRANKS={RANKS}", f"-DBLOCK={BLOCK}")
    found = compile_or_warn(
        "skinny", SOURCE, ARGUMENTS, what, "PyTorch's products", (*FLAGS, *sizes)
    )
    if found is not None:
        found.dots.restype = INT
    return found


def library_for(like: Tensor, rank: int, dropout_p: float) -> ctypes.CDLL | None:
    """The library, if it takes `like` (x or dY) and is faster at this rank: bf16 on a CPU, few ranks.

    Not where products are computed in fp32: with 16 short registers the sums do not fit, and backward at rank 8 takes
    twice as long as by torch (one core of a Zen 3).
    """
    limit = MAX_RANK if dropout_p > 0 else MAX_RANK_WITHOUT_DROPOUT
    takes = like.device.type == "cpu" and like.dtype == torch.bfloat16 and rank <= limit
    return library() if takes and not products.widens(like) else None


def forward(
    run: ctypes.CDLL,
    x: Tensor,
    lora_a: Tensor,
    scaled_b: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S (sB)^T + bias (M, N) and S (M, r): x (M, K), A (r, K), sB (N, r), bias (N,), all bf16."""
    y = x.new_empty(len(x), len(scaled_b))
    b, row = _packed(run, scaled_b.t()), None if bias is None else _packed(run, bias[None])
    return y, _forward(run, x, lora_a, (b, row, y), dropout_p, seed, row_ids)


def down(
    run: ctypes.CDLL,
    x: Tensor,
    lora_a: Tensor,
    dropout_p: float = 0.0,
    seed: int | None = None,
    row_ids: Tensor | None = None,
) -> Tensor:
    """S of `forward`, alone. Of dY and (sB)^T it is dS."""
    return _forward(run, x, lora_a, (None, None, None), dropout_p, seed, row_ids)


def _forward(
    run: ctypes.CDLL,
    x: Tensor,
    lora_a: Tensor,
    up: tuple[Tensor | None, Tensor | None, Tensor | None],
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None,
) -> Tensor:
    """S, and with it y of `up`: packed sB, packed bias, y; each may be missing, y only with the others."""
    (rows, inputs), rank, (b, row, y) = x.shape, len(lora_a), up
    outputs = 0 if y is None else y.shape[1]
    keys, least = mask_keys(dropout_p, seed, row_ids, rows, inputs)
    if keys is None and not run.dots():  # nothing to mask: torch's product is faster
        kept, a, s = None, None, products.mm(x, lora_a.t()).contiguous()
    else:
        kept, a, s = _rows(x), _packed(run, lora_a, run.pack_down), x.new_empty(rows, rank)
    sizes = (_stride(kept), rows, inputs, outputs, rank)
    pointers = (_at(a), _at(b), _at(row), _at(keys), least, _at(s), _at(y))
    _over_blocks(
        lambda i, j: run.forward(_at(kept), *sizes, *pointers, i, j), rows, inputs + outputs
    )
    return s


def backward(
    run: ctypes.CDLL,
    dy: Tensor,
    x: Tensor | None,
    s_mr: Tensor | None,
    ds_mr: Tensor | None,
    lora_a: Tensor,
    scale: float,
    dropout_p: float,
    seed: int | None,
    row_ids: Tensor | None,
    need_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """keep * (dS A) (M, K) in bf16 if `need_x`, dA (r, K) of `x` and dB (N, r) of S, fp32, where they are given.

    Args: dy (M, N), x (M, K), s_mr (M, r), ds_mr (M, r) unless only dB is asked for, lora_a (r, K): bf16.
    """
    dy = _rows(dy)
    x = None if x is None else _rows(x)
    s_mr = None if s_mr is None else s_mr.contiguous()
    ds_mr = None if ds_mr is None else ds_mr.contiguous()
    (rank, inputs), (rows, outputs) = lora_a.shape, dy.shape
    a = _packed(run, lora_a) if need_x else None
    p = 0.0 if ds_mr is None else dropout_p
    keys, least = mask_keys(p, seed, row_ids, rows, inputs)
    dx = dy.new_empty(rows, inputs) if need_x else None
    db = None if s_mr is None else _parts(rows, rank, outputs)
    da = None if x is None else _parts(rows, rank, inputs)
    sizes = (_stride(x), rows, inputs, outputs, rank)
    pointers = (_at(a), _at(s_mr), _at(ds_mr), _at(keys), least, _at(db), _at(da), _at(dx))
    _over_blocks(
        lambda i, j: run.backward(_at(dy), dy.stride(0), _at(x), *sizes, *pointers, i, j),
        rows,
        inputs + outputs,
    )
    grad_a = None if da is None else _summed(run, da, torch.empty(rank, inputs), 1.0)
    grad_b = None if db is None else torch.empty(outputs, rank)
    if db is not None and grad_b is not None:
        _summed(run, db, grad_b.t(), scale)
    return dx, grad_a, grad_b


def _over_blocks(work: Callable[[int, int], None], rows: int, columns: int) -> None:
    if rows:
        in_shares(work, -(-rows // BLOCK), rows * columns)


def mask_keys(
    p: float, seed: int | None, row_ids: Tensor | None, rows: int, columns: int
) -> tuple[Tensor | None, int]:
    """The keys of `keep_mask`, of words up to the end of a vector, and the least lane that is kept."""
    if p == 0:
        return None, 0
    assert seed is not None
    words, run = -(-columns // LANES) * LANES // 2, library()
    if run is None:
        keys = torch.from_numpy(philox_keys(seed, rows, words, row_ids))
        return keys, dropped_lanes(p) - 32768
    keys = torch.empty(2, rows + words, dtype=torch.int32)
    run.fill_keys(seed, _at(row_ids), rows, words, _at(keys))
    return keys, dropped_lanes(p) - 32768


def _packed(run: ctypes.CDLL, a: Tensor, pack: Any = None) -> Tensor:
    """Panels of a (rank, size): fp32, RANKS by LANES of them. With `run.pack_down`, as S's sums take them."""
    rank, size = a.shape
    out = torch.empty(-(-rank // RANKS) * RANKS, -(-size // LANES) * LANES)
    (pack or run.pack)(_at(a), a.stride(0), a.stride(1), rank, size, _at(out))
    return out


def _parts(rows: int, rank: int, size: int) -> Tensor:
    return torch.empty(-(-rows // BLOCK), -(-rank // RANKS) * RANKS, -(-size // LANES) * LANES)


def _summed(run: ctypes.CDLL, parts: Tensor, out: Tensor, scale: float) -> Tensor:
    """out (rank, size) = scale * the sum of `parts`."""
    rank, size = out.shape
    run.unpack(_at(parts), len(parts), rank, size, scale, _at(out), out.stride(0), out.stride(1))
    return out


def _rows(x: Tensor) -> Tensor:
    """x with the elements of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
