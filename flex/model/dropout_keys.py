"""Which dropout mask a token has in an adapter: a function of the run, the step, the layer and the token.

Inside `dropout_keys` a layer's mask is neither drawn nor counted, so that a step hides the same numbers at any number
of processes, in any layout of the batch and in any split into micro-batches; in a recomputed forward it is the same
again. Elsewhere, as in a loop of one's own, layers draw their seeds from torch's generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flex.state import Batch

# Of the golden ratio: k * SPREAD mod 2^32 is at least 2^32 / 3k away from 0 for k <= 10,000, so the ids of documents
# up to 1,000 places apart do not meet within a million positions.
SPREAD = 0x9E3779B1


@dataclass(frozen=True)
class Keys:
    """What the masks of one pass are drawn from."""

    draw: int  # names the pass, in [0, 2^63)
    row_ids: Tensor  # (B * T,) int32, names the tokens

    def seed(self, layer: int) -> int:
        """The seed of a layer's mask; `layer` names it, in [0, 2^63)."""
        return self.draw ^ layer


_keys: Keys | None = None  # not a context variable: autograd's threads recompute forwards


def current() -> Keys | None:
    """The keys in force."""
    return _keys


@contextmanager
def dropout_keys(keys: Keys) -> Iterator[None]:
    """Layers with a key of their own draw their masks from `keys`, until the end of the block.

    It must hold the forward and its backward. Not for two threads at a time.
    """
    global _keys
    before, _keys = _keys, keys
    try:
        yield
    finally:
        _keys = before


def key_of(*parts: object) -> int:
    """A number in [0, 2^63) for what the parts' text says: the same in every process, unrelated to that of others."""
    text = "\n".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def row_ids(batch: Batch) -> Tensor:
    """(B * T,) int32 ids of a batch's positions: of the document's place in the run and the position in the document.

    Padding of the grouped layout shares the id of its document's first position.
    """
    documents = batch.example_ids
    if batch.cu_seqlens is not None:
        lengths = batch.cu_seqlens.diff()
        whole = batch.position_ids.numel()  # told, so that a GPU need not be asked
        documents = documents.repeat_interleave(lengths, output_size=whole)
    ids = documents.view(batch.position_ids.shape[0], -1) * SPREAD + batch.position_ids
    return ids.to(torch.int32).flatten()
