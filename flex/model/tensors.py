"""Where weights come from: files read in part and without mapping them into memory, or tensors made here."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from flex.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PIECE = 8_000_000  # elements read at once: the buffer between the file and the place is small


class Source(Protocol):
    """One weight to be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def numel(self) -> int: ...

    def read_into(self, flat: Tensor, start: int = 0) -> None:
        """Fill `flat` (N,) of any dtype and device with the elements `start` to `start + N`."""


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def numel(self) -> int:
        return self.tensor.numel()

    def read_into(self, flat: Tensor, start: int = 0) -> None:
        flat.copy_(self.tensor.reshape(-1)[start : start + len(flat)])


@dataclass(frozen=True)
class FileTensor:
    """One tensor in a file; `offset` is where its first byte stands."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_into(self, flat: Tensor, start: int = 0) -> None:
        """Fill `flat` (N,) of any dtype and device with the elements `start` to `start + N`.

        Raises:
            ModelError: the file ends before them.
        """
        size = self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            for piece in flat.split(_PIECE):
                buffer = torch.empty(len(piece), dtype=self.dtype)
                view = memoryview(buffer.view(torch.uint8).numpy().data)
                done = 0
                while done < len(view):
                    got = os.preadv(file.fileno(), [view[done:]], self.offset + start * size + done)
                    if got == 0:
                        raise ModelError(
                            f"{self.path} ends within {self.key}",
                            "the rest of the weight would be whatever was in memory",
                            "fetch the file again",
                        )
                    done += got
                piece.copy_(buffer)
                start += len(piece)


def same_values(one: Source, other: Source) -> bool:
    """Whether both hold the same numbers (a NaN equals nothing); compared in fp64, piece by piece."""
    if one.shape != other.shape:
        return False
    for start in range(0, one.numel, _PIECE):
        a, b = torch.empty(2, min(_PIECE, one.numel - start), dtype=torch.float64)
        one.read_into(a, start)
        other.read_into(b, start)
        if not torch.equal(a, b):
            return False
    return True


def checkpoint_tensors(folder: Path) -> dict[str, FileTensor]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names, by key.

    Only headers are read; safetensors checks them against the size of the files.

    Raises:
        ModelError: neither file is there, a dtype is not one of a plain checkpoint, or the index promises a weight
            that its shard does not hold.
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not index.is_file():
        raise ModelError(
            f"{folder} has neither {SINGLE} nor {INDEX}",
            "only safetensors are read",
            "point model.name to a folder that holds them",
        )
    where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    found: dict[str, FileTensor] = {}
    for name in sorted(set(where.values())):
        found |= _header(folder / name)
    lost = sorted(where.keys() - found.keys())
    if lost:
        raise ModelError(
            f"{folder} lacks {len(lost)} weights that its index names, first {lost[0]}",
            "they would be random numbers",
            "fetch the shards and the index again, both from one revision",
        )
    return found


def _header(path: Path) -> dict[str, FileTensor]:
    with safe_open(path, framework="pt") as checked:  # raises on a damaged or truncated file
        names = list(checked.keys())
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    found = {}
    for name in names:
        entry = entries[name]
        if entry["dtype"] not in _DTYPES:
            raise ModelError(
                f"{path}: {name} is {entry['dtype']}",
                "such weights belong to a checkpoint that is quantised already",
                "point model.name to the model in bf16, fp16 or fp32",
            )
        found[name] = FileTensor(
            path,
            name,
            _DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
        )
    return found
