"""The dropout mask on a CPU in one pass: torch's operations write it five times, as words and as lanes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..native_build import INT, LONG, POINTER, compile_or_warn, in_shares

SOURCE = r"""
#include <stdint.h>

/* Rows [begin, end) of a mask of two 16-bit lanes a word: all bits of a lane are set where it is kept.
   keys: additive then multiplicative, each of all rows and then of all words. */
void keep_mask(const uint32_t *restrict keys, int64_t rows, int64_t words, int32_t least,
               uint32_t *restrict mask, int64_t begin, int64_t end)
{
    const uint32_t *add = keys + rows, *multiply = add + words + rows;
    for (int64_t row = begin; row < end; row++) {
        const uint32_t a = keys[row], m = keys[rows + words + row];
        uint32_t *out = mask + row * words;
        for (int64_t i = 0; i < words; i++) {
            const uint32_t word = (a + add[i]) * (m + multiply[i]);
            const int32_t low = (int32_t)(word << 16) >> 16, high = (int32_t)word >> 16;
            out[i] = (low >= least ? 0xffffu : 0u) | (high >= least ? 0xffff0000u : 0u);
        }
    }
}
"""


@functools.cache  # one attempt per process
def native_mask() -> Callable[..., None] | None:
    """`keep_mask` of SOURCE; None, and one line in the log, if it cannot be compiled or loaded."""
    what = "lora_linear: the C source of the dropout mask"
    arguments = {"keep_mask": (POINTER, LONG, LONG, INT, POINTER, LONG, LONG)}
    library = compile_or_warn("dropout", SOURCE, arguments, what, "PyTorch's operations")
    return None if library is None else library.keep_mask


def mask_of_keys(run: Callable[..., None], keys: Tensor, rows: int, least: int) -> Tensor:
    """(rows, 2 words) int16 of keys (2, rows + words) int32 on a CPU; lanes below `least` are dropped."""
    words = keys.shape[1] - rows
    mask = torch.empty(rows, 2 * words, dtype=torch.int16)
    start, out = keys.data_ptr(), mask.data_ptr()
    in_shares(lambda a, b: run(start, rows, words, least, out, a, b), rows, mask.numel())
    return mask
