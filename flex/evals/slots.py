"""A key-value cache with one slot for each completion, none of them padded.

A row's keys stand in the columns 0, 1, ..., so a token's column is its position. Rows of different
lengths share a step: each writes to its own next column, and a mask hides the columns it has not
reached. Against a cache that grows by concatenation this saves copying all of it at every step, and
a row can leave or join without the others moving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class SlotCache(Cache):
    """Slots for `rows` completions of up to `columns` tokens, prompt included.

    Usage: `put` a prompt's keys and values, then `begin_step`, then one forward of the model with
    one new token for each active row. Active rows are always the first ones.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(layers=[])
        self._slots: list[_SlotLayer] = self.layers  # type: ignore[assignment]
        self.rows, self.columns = rows, columns
        self.index = torch.zeros(0, dtype=torch.int64)
        self.places = self.index
        self.span = 0

    def put(self, row: int, prompt: DynamicCache) -> None:
        """Copy the keys and values of a prompt, batch 1, into a row."""
        for number, theirs in enumerate(prompt.layers):
            if len(self._slots) <= number:
                self._slots.append(_SlotLayer(self))
            assert isinstance(theirs, CacheLayerMixin)
            assert theirs.keys is not None and theirs.values is not None
            self._slots[number].put(row, theirs.keys, theirs.values)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of a row over another row."""
        for layer in self._slots:
            for tensor in (layer.keys, layer.values):
                assert tensor is not None
                tensor[target, :, :length] = tensor[source, :, :length]

    def begin_step(self, lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Say where the next token of each active row goes: to column lengths[row].

        Returns: positions (rows, 1) int64 and the mask (rows, 1, 1, columns) bool, true where a row
        may look.
        """
        self.places = torch.tensor(lengths, dtype=torch.int64, device=device)
        self.index = torch.arange(len(lengths), device=device)
        self.span = max(lengths) + 1
        reached = torch.arange(self.span, device=device) <= self.places[:, None]
        return self.places[:, None], reached[:, None, None]


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def put(self, row: int, keys: Tensor, values: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.keys is not None and self.values is not None
        self.keys[row, :, : keys.shape[2]] = keys[0]
        self.values[row, :, : values.shape[2]] = values[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros: what the mask hides is multiplied by 0, and 0 * NaN is NaN
        shape = (self._cache.rows, key_states.shape[1], self._cache.columns)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        cache = self._cache
        assert self.keys is not None and self.values is not None
        self.keys[cache.index, :, cache.places] = key_states[:, :, 0]
        self.values[cache.index, :, cache.places] = value_states[:, :, 0]
        active = len(cache.index)
        return self.keys[:active, :, : cache.span], self.values[:active, :, : cache.span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.span, 0

    def get_seq_length(self) -> int:
        return max(self._cache.span - 1, 0)

    def get_max_length(self) -> int:
        return self._cache.columns
