"""What the Triton functions of lora_linear share: the dropout mask of a tile, block sizes, checks.

Legend: M rows of x, K inputs, N outputs, R rank padded to a power of two >= 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import ROUNDS

PHILOX_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def ids_of_rows(row_ids_ptr, offs_m, mask_m, HAS_ROW_IDS: tl.constexpr):
    """What the keys of each row are made of, int32: its id where the caller gave one, else its place."""
    ids_M = offs_m
    if HAS_ROW_IDS:
        ids_M = tl.load(row_ids_ptr + offs_m, mask=mask_m, other=0)
    return ids_M


@triton.jit
def row_keys(seed, ids_M):
    """(additive, odd multiplier) of each row, uint32; dropout.py has the definition."""
    a, m, _, _ = tl.philox(seed, ids_M.to(tl.uint32, bitcast=True), 0, 0, 0, n_rounds=PHILOX_ROUNDS)
    return a, m | 1


@triton.jit
def column_keys(seed, offs_k):
    """(additive, even multiplier) of each column's word, uint32; two columns share a word."""
    word = (offs_k // 2).to(tl.uint32)
    b, n, _, _ = tl.philox(seed, word, 1, 0, 0, n_rounds=PHILOX_ROUNDS)
    return b, (n >> 1) << 1


@triton.jit
def keep_tile(a_M, m_M, b_K, n_K, offs_k, dropped):
    """(M, K) bool: True where an element is kept."""
    word_MK = (a_M[:, None] + b_K[None, :]) * (m_M[:, None] + n_K[None, :])
    lane_MK = (word_MK >> ((offs_k & 1) * 16).to(tl.uint32)[None, :]) & 0xFFFF
    return (lane_MK ^ 0x8000).to(tl.int32) >= dropped


def padded_rank(rank: int) -> int:
    """The rank as tensor cores take it: a power of two, at least 16; what is added is masked."""
    return max(16, triton.next_power_of_2(rank))


def row_major(x: Tensor) -> Tensor:
    """x with unit stride along its last axis; a copy only where it has not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def precision(dtype: torch.dtype) -> str:
    """Precision of dots: of fp32 operands full fp32; of 16-bit ones there is no choice."""
    return "ieee" if dtype == torch.float32 else "tf32"
