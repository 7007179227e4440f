"""The walk over a model's decoder layers that rounds each to NF4 on what the rounded ones before it make of the data.

What each is to give is what the dense model's gives, so the data go along twice, through the layers rounded so far and
through the dense ones. One pass of the dense model records what each layer is called with; from then on only the
activations between two layers (twice), one layer's dense copy and two (K, K) sums are held beside the model.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ModelError
from .meters import format_duration
from .model.nf4 import BLOCK, DAMPING, NotPositive, shift_matrix
from .model.nf4_store import Rounded, read_back, round_matrix
from .model.places import Quantised
from .state import Batch
from .step import forward_at

log = logging.getLogger("flex.calibrate")

_INSTEAD = "use model.quantise=nf4 (nearest rounding) for this model"


class _Enough(Exception):
    """The layer has been followed as far as was asked."""


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
class Recorded:
    """A batch on its way: its hidden states, which of its positions are real, and the calls of the layers to come."""

    hidden: Tensor  # of the rounded layers
    dense: Tensor  # of the dense ones
    real: Tensor  # (rows, T) bool
    calls: list[Call]
    dense_calls: list[Call]

    def through(self, layer: nn.Module) -> Tensor:
        """What the next layer makes of the hidden states."""
        return self.calls[0](layer, self.hidden)

    def through_dense(self, reference: nn.Module) -> Tensor:
        """What the next layer's dense copy makes of the dense hidden states."""
        return self.dense_calls[0](reference, self.dense)

    def advance(self, layer: nn.Module, reference: nn.Module) -> None:
        """Both go through the next layer."""
        self.hidden, self.dense = self.through(layer), self.through_dense(reference)
        del self.calls[0], self.dense_calls[0]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the model's decoder layers, and its name.

    Raises ModelError: there is not exactly one list of as many modules with linear layers as the config says.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(any(isinstance(m, nn.Linear) for m in layer.modules()) for layer in module)
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(found)} lists of {count} decoder layers with linear layers",
            "calibration goes through them one by one, in the order in which the model does",
            _INSTEAD,
        )
    return found[0]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of what is to be rounded; what stays dense is logged, but for the output head.

    Linear layers within the decoder layers whose rows hold whole blocks: over others, bitsandbytes 0.50's code for
    CPUs with AVX512 begins a block with each row, and reads another matrix than was stored.

    Raises ModelError: there are none, or no decoder layers are found.
    """
    prefix, _ = decoder_layers(model)
    head = model.get_output_embeddings()
    found: list[str] = []
    outside: list[str] = []
    ragged: list[str] = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            inside, whole = name.startswith(f"{prefix}."), module.in_features % BLOCK == 0
            (outside if not inside else found if whole else ragged).append(name)
    for names, why in (
        (outside, "they are outside the decoder layers"),
        (
            ragged,
            f"their inputs are no multiple of {BLOCK}, which some CPUs read wrongly in 4 bits",
        ),
    ):
        if names:
            log.warning("%d linear layers stay dense, first %s: %s", len(names), names[0], why)
    if not found:
        raise ModelError(
            f"no linear layer of {type(model).__name__} can be rounded",
            f"they must be within its decoder layers and have a multiple of {BLOCK} inputs",
            _INSTEAD,
        )
    return found


@torch.no_grad()
def round_model(
    model: PreTrainedModel, batches: Sequence[Batch], place: Quantised, names: Sequence[str]
) -> None:
    """Replace the linear layers `names` by 4-bit ones, rounded so that the outputs on `batches` change least.

    Args:
        model: dense, in eval mode; changed in place.
        batches: on the model's device.
        place: kind nf4.
        names: as `linear_layers` gave them, before anything took the linear layers' place.

    Raises:
        ModelError: a weight or an activation is not finite, or the layers do not follow one another.
    """
    prefix, layers = decoder_layers(model)
    _refuse_unusable(model, names)
    on_the_way = _record(model, layers, batches)
    start = time.monotonic()
    for i, layer in enumerate(layers):
        inside = f"{prefix}.{i}."
        own = [name.removeprefix(inside) for name in names if name.startswith(inside)]
        reference = copy.deepcopy(layer)
        rounded = _round_layer(layer, reference, own, on_the_way, place, inside)
        for batch in on_the_way:
            batch.advance(layer, reference)
        for name, found in rounded.items():
            old = layer.get_submodule(name)
            new = place.layer(old)
            if isinstance(old.bias, nn.Parameter):
                new.register_parameter("bias", old.bias)
            place.hold(new, found.packed, found.state)
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, new)
        seconds = time.monotonic() - start
        left = seconds / (i + 1) * (len(layers) - i - 1)
        log.info("layer %d/%d | %s", i + 1, len(layers), _told(rounded, seconds, left))


def _round_layer(
    layer: nn.Module,
    reference: nn.Module,
    names: Sequence[str],
    on_the_way: Sequence[Recorded],
    place: Quantised,
    inside: str,
) -> dict[str, Rounded]:
    """Round the layer's matrices, those that read the same input together, in the order in which they are called."""
    rounded: dict[str, Rounded] = {}
    for group, once in _groups(layer, names, on_the_way[0]):
        hessian, drift = _sums(layer, reference, group[0], on_the_way, once)
        if not bool(hessian.isfinite().all() and drift.isfinite().all()):
            raise ModelError(
                f"the inputs of {inside}{group[0]} are not finite",
                "the layer cannot be calibrated, and the model overflows on this data",
                "use model.dtype=bfloat16 or float32",
            )
        shift = None
        with suppress(NotPositive):  # `_round` says so, of each matrix
            shift = shift_matrix(hessian, drift)
        for name in group:
            rounded[name] = _round(layer, name, hessian, shift, place, inside)
    return rounded


def _round(
    layer: nn.Module,
    name: str,
    hessian: Tensor,
    shift: Tensor | None,
    place: Quantised,
    inside: str,
) -> Rounded:
    linear = cast(nn.Linear, layer.get_submodule(name))
    found = None
    if not bool(hessian.diagonal().any()):
        log.warning("%s%s reads nothing but zeros of the data: rounded to nearest", inside, name)
    else:
        try:
            found = round_matrix(linear.weight, hessian, place.double_quant, place.dtype, shift)
        except NotPositive as error:
            log.warning("%s%s: %s: rounded to nearest", inside, name, error)
    if found is None:
        found = round_matrix(linear.weight, None, place.double_quant, place.dtype)
    # A new tensor: the old one may be a page of the checkpoint's file, which then stays clean.
    dense = read_back(found.packed, found.state).to(linear.weight.dtype)
    linear.weight = nn.Parameter(dense, requires_grad=False)
    return found


def _groups(
    layer: nn.Module, names: Sequence[str], batch: Recorded
) -> list[tuple[list[str], bool]]:
    """The layer's linear layers by the input that they share, in the order of the calls; whether each has one call."""
    order: list[tuple[Tensor, list[str]]] = []
    calls: Counter[str] = Counter()

    def note(name: str, x: Tensor) -> None:
        calls[name] += 1
        if calls[name] > 1:
            return
        for seen, group in order:
            if seen is x:
                group.append(name)
                return
        order.append((x, [name]))

    with _watching(layer, names, note):
        batch.through(layer)
    found = [(group, calls[group[0]] == 1) for _, group in order]
    return found + [([name], False) for name in names if name not in calls]


def _sums(
    layer: nn.Module, reference: nn.Module, name: str, on_the_way: Sequence[Recorded], once: bool
) -> tuple[Tensor, Tensor]:
    """H = X^T X and D = (Z - X)^T X over all real positions: products in fp32, summed in fp64.

    X is what the linear layer reads, Z what it reads in the dense model. Where it is called more than once, or its
    inputs are not the positions (an expert's, say), the rows of X and Z need not belong together, and D is 0.

    Args:
        reference: the decoder layer's dense copy.
        once: the layer is called once; what the decoder layer computes after it is left out.
    """
    inputs = cast(nn.Linear, layer.get_submodule(name)).in_features
    device = on_the_way[0].hidden.device
    hessian = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
    drift = torch.zeros_like(hessian)
    for batch in on_the_way:
        rounded = _inputs(layer, name, batch.real, once, batch.through)
        dense = _inputs(reference, name, batch.real, once, batch.through_dense)
        for x, _ in rounded:
            hessian += (x.t() @ x).double()
        if len(rounded) == len(dense) == 1:
            (x, of_positions), (z, of_positions_too) = rounded[0], dense[0]
            if of_positions and of_positions_too:
                drift += ((z - x).t() @ x).double()
    return hessian, drift


def _inputs(
    layer: nn.Module, name: str, real: Tensor, once: bool, run: Callable[[nn.Module], object]
) -> list[tuple[Tensor, bool]]:
    """What each call of a linear layer reads in a run of the decoder layer: rows (n, K) fp32, and whether they are
    the real positions, without padding."""
    found: list[tuple[Tensor, bool]] = []

    def note(_: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        of_positions = len(rows) == real.numel()
        if of_positions:
            rows = rows[real.flatten()]
        found.append((rows.float(), of_positions))
        if once:
            raise _Enough

    with _watching(layer, [name], note), suppress(_Enough):
        run(layer)
    return found


@contextmanager
def _watching(
    layer: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """`see(name, x)` before each call of the named linear layers."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: see(name, args[0])

    handles = [layer.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
                _INSTEAD,
            )
        self.first = hidden if self.first is None else self.first
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        self.calls.append(Call(args[1:], rest, bool(args)))
        if self.first_only:
            raise _Enough

    def after(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.last = _hidden_of(output)


def _record(
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
            with suppress(_Enough):
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
                _INSTEAD,
            )
        alike = all(call.same(calls[0]) for call in calls)
        streams = _with_own_mappings(calls), _with_own_mappings(calls)
        found.append(Recorded(seen.first, seen.first, _real(batch, seen.first), *streams))
    return found


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


def _refuse_unusable(model: PreTrainedModel, names: Sequence[str]) -> None:
    """A weight that is not finite would be a scale that is not, and 64 weights that are not."""
    for name in names:
        if not bool(model.get_parameter(f"{name}.weight").isfinite().all()):
            raise ModelError(
                f"{name}.weight is not finite",
                "no scale fits its block, and the model's outputs are not finite either",
                "check the checkpoint, or its dtype: model.dtype=bfloat16 or float32",
            )


def _told(rounded: dict[str, Rounded], seconds: float, left: float) -> str:
    shares = [
        f"{name.rpartition('.')[2]} {'nearest' if r.error is None else format(r.error, '.2f')}"
        for name, r in rounded.items()
    ]
    more = {name: r.damping for name, r in rounded.items() if r.damping > 1.5 * DAMPING}
    told = f"output error, nearest rounding's as 1: {', '.join(shares)}"
    if more:
        told += f" | more damping: {', '.join(f'{n} {d:g}' for n, d in more.items())}"
    return f"{told} | {format_duration(seconds)} | eta {format_duration(left)}"
