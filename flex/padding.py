"""Counts of rows that recur, so that a CPU's matrix products are compiled once and not in every step.

oneDNN generates a kernel for each shape and keeps 1024 of them. Packed rows are of another length in each step, so
each step made its kernels anew: with SmolLM2-135M about 50 MB a step stayed, and a product's first call took twice
its time (torch 2.13, AMX).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import IGNORE, Batch

LARGEST = 64  # rows; a few dozen lengths are left at 4,000 positions
SHARE = 32  # of the rows at most 1 / SHARE is padding


def pays(batch: Batch) -> bool:
    """Whether rounded counts are worth their padding: of packed rows on a CPU."""
    return batch.cu_seqlens is not None and batch.input_ids.device.type == "cpu"


def rounded(rows: int) -> int:
    """`rows` rounded up to a multiple of a power of two, by less than 1 / SHARE of it and less than LARGEST."""
    multiple = min(LARGEST, 1 << max(0, (rows // SHARE).bit_length() - 1))
    return -(-rows // multiple) * multiple


def pad_packed(batch: Batch) -> Batch:
    """The packed batch with one more document, of token 0 and without loss, up to the rounded length.

    Attention keeps documents apart, so the others' results stay. `num_positions` does not count it.
    """
    assert batch.cu_seqlens is not None
    length = batch.input_ids.shape[1]
    more = rounded(length) - length
    if not more:
        return batch
    positions = torch.arange(more, device=batch.position_ids.device)[None]
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, more)),
        labels=F.pad(batch.labels, (0, more), value=IGNORE),
        position_ids=torch.cat([batch.position_ids, positions], 1),
        example_ids=F.pad(batch.example_ids, (0, 1), value=-1),
        cu_seqlens=F.pad(batch.cu_seqlens, (0, 1), value=length + more),
    )


def pad_columns(columns: Tensor) -> Tensor:
    """Column numbers (n,), n > 0, with the last one repeated up to the rounded count."""
    more = rounded(len(columns)) - len(columns)
    return torch.cat([columns, columns[-1:].expand(more)]) if more else columns
