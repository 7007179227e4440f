"""Many tensors in one launch: which program works on which piece of which tensor, and where that lies.

A launch over T tensors reads, in place of T pointers,

    owner (programs,) int32     the tensor that a program works on
    meta (T, 3) int64           elements of the tensor, its first program, its row of scalars
    a column (T,) int64         addresses, one column each for p, m, h, g, ...

Program k of a tensor works on its elements k * BLOCK to (k + 1) * BLOCK. `owner` and `meta` depend
on sizes alone and columns on addresses alone, so all are cached by value. Parameters and moments do
not move; where gradients do, one column of 8 bytes per tensor is copied to the device, without
waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..launching import ALIGNMENT, to_device

# Elements per program. 2048 fp32 over 128 threads are four 128-bit loads per thread and array, enough
# in flight to cover a DRAM access; the 40 bytes of table per program are 0.1 % of what it moves.
BLOCK = 2048
META_COLUMNS = 3


@dataclass(frozen=True)
class Layout:
    """Where each program works. `programs` is the grid; `owner` and `meta` are described above."""

    owner: Tensor
    meta: Tensor
    programs: int


def layout(tensors: Sequence[Tensor], groups: Sequence[int]) -> Layout:
    """The layout of a launch over `tensors` (on one device); groups[i] is the row of scalars of i."""
    sizes = tuple(t.numel() for t in tensors)
    return _layout(sizes, tuple(groups), tensors[0].device)


@lru_cache(maxsize=32)
def _layout(sizes: tuple[int, ...], groups: tuple[int, ...], device: torch.device) -> Layout:
    counts = [-(-size // BLOCK) for size in sizes]
    first, meta = 0, []
    for size, count, group in zip(sizes, counts, groups, strict=True):
        meta.append((size, first, group))
        first += count
    index = torch.arange(len(sizes), dtype=torch.int32)
    owner = index.repeat_interleave(torch.tensor(counts))
    table = torch.tensor(meta, dtype=torch.int64)
    return Layout(to_device(owner, device), to_device(table, device), first)


def addresses(tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """The column of a list of tensors, and whether all of them allow 128-bit loads."""
    return _column(tuple(t.data_ptr() for t in tensors), tensors[0].device)


@lru_cache(maxsize=64)
def _column(pointers: tuple[int, ...], device: torch.device) -> tuple[Tensor, bool]:
    column = torch.tensor(pointers, dtype=torch.int64)
    return to_device(column, device), all(p % ALIGNMENT == 0 for p in pointers)


def scalar_rows(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """fp32 (groups, scalars) on the device. Rounded from fp64 once, here."""
    return to_device(torch.tensor(rows, dtype=torch.float32), device)
