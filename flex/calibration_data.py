"""The calibration data on their way through a model's decoder layers.

One pass of the dense model records what each layer is called with. From then on a batch is its hidden states between
two layers, twice: what the layers rounded so far make of it, and what the dense ones do.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ModelError
from .state import Batch
from .step import forward_at

INSTEAD = "use model.quantise=nf4 (nearest rounding) for this model"


class Enough(Exception):
    """The model has been followed as far as was asked."""


@dataclass
class Call:
    """One decoder layer's call for one batch, but for its hidden states."""

    args: tuple[Any, ...]  # without the first, if that is where the hidden states were
    kwargs: dict[str, Any]  # without hidden_states
    positional: bool

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        if self.positional:
            return _hidden_of(layer(hidden, *self.args, **self.kwargs))
        return _hidden_of(layer(*self.args, hidden_states=hidden, **self.kwargs))

    def same(self, other: Call) -> bool:
        """Whether both calls have the very same arguments."""
        if len(self.args) != len(other.args) or self.kwargs.keys() != other.kwargs.keys():
            return False
        pairs = [*zip(self.args, other.args, strict=True)]
        pairs += [(value, other.kwargs[key]) for key, value in self.kwargs.items()]
        return all(a is b for a, b in pairs)


@dataclass
class Stream:
    """Hidden states between two layers, and the calls of the layers to come."""

    hidden: Tensor
    calls: list[Call]

    def through(self, layer: nn.Module) -> Tensor:
        """What the next layer makes of them."""
        return self.calls[0](layer, self.hidden)

    def advance(self, layer: nn.Module) -> None:
        """They go through the next layer."""
        self.hidden = self.through(layer)
        del self.calls[0]


@dataclass
class Recorded:
    """A batch on its way."""

    rounded: Stream
    dense: Stream
    real: Tensor  # (rows, T) bool: which positions are an example's


def record(
    model: PreTrainedModel, layers: nn.ModuleList, batches: Sequence[Batch]
) -> list[Recorded]:
    """What the dense model calls its layers with, batch by batch.

    The first batch goes through the whole model. Where it calls all layers with the same arguments, as most models
    do, the others stop at the first layer.

    Raises ModelError: the layers do not follow one another.
    """
    found: list[Recorded] = []
    alike = False
    for batch in batches:
        seen = _Recorder(model, first_only=alike)
        handles = [
            layer.register_forward_pre_hook(seen.before, with_kwargs=True) for layer in layers
        ]
        handles += [layer.register_forward_hook(seen.after) for layer in layers]
        try:
            with suppress(Enough):
                column = torch.zeros(1, dtype=torch.int64, device=batch.labels.device)
                forward_at(model, batch, column)
        finally:
            for handle in handles:
                handle.remove()
        calls = seen.calls * len(layers) if alike and len(seen.calls) == 1 else seen.calls
        if seen.first is None or len(calls) != len(layers):
            raise ModelError(
                f"{len(calls)} of {len(layers)} decoder layers of {seen.kind} were called",
                "calibration goes through all of them, once each",
                INSTEAD,
            )
        alike = all(call.same(calls[0]) for call in calls)
        rounded, dense = (Stream(seen.first, _with_own_mappings(calls)) for _ in range(2))
        found.append(Recorded(rounded, dense, _real(batch, seen.first)))
    return found


class _Recorder:
    """Hooks on the decoder layers that note what one batch calls them with; with `first_only`, the first one alone."""

    def __init__(self, model: PreTrainedModel, first_only: bool) -> None:
        self.kind, self.first_only = type(model).__name__, first_only
        self.calls: list[Call] = []
        self.first: Tensor | None = None
        self.last: Tensor | None = None

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        follows = self.last is None or hidden is self.last
        if not isinstance(hidden, Tensor) or not follows:
            raise ModelError(
                f"decoder layer {len(self.calls)} of {self.kind} does not read the output of the one before",
                "calibration hands each layer's output to the next",
                INSTEAD,
            )
        self.first = hidden if self.first is None else self.first
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        self.calls.append(Call(args[1:], rest, bool(args)))
        if self.first_only:
            raise Enough

    def after(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.last = _hidden_of(output)


def _with_own_mappings(calls: Sequence[Call]) -> list[Call]:
    """The calls with each mutable mapping replaced by one copy: some models let a layer leave keys and values there
    for later ones, and the two streams must not meet in it."""
    copies: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if not isinstance(value, MutableMapping):
            return value
        if id(value) not in copies:
            copies[id(value)] = copy.copy(value)
        return copies[id(value)]

    return [
        Call(
            tuple(own(v) for v in call.args),
            {key: own(v) for key, v in call.kwargs.items()},
            call.positional,
        )
        for call in calls
    ]


def _real(batch: Batch, hidden: Tensor) -> Tensor:
    """Which positions (rows, T) of the hidden states are an example's: `forward_at` may have padded a packed row."""
    if batch.attention_mask is not None:
        return batch.attention_mask
    real = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    real[:, : batch.input_ids.shape[1]] = True
    return real


def _hidden_of(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
