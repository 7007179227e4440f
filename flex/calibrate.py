"""The walk over a model's decoder layers that rounds each to NF4 on what the rounded ones before it make of the data.

What each is to give is what the dense model's gives, so the data go along twice, through the layers rounded so far and
through the dense ones (`calibration_data`). Beside the model only these activations between two layers, one layer's
dense copy and two (K, K) sums are held.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration_data import INSTEAD, Enough, Recorded, Stream, record
from .errors import ModelError
from .meters import format_duration
from .model.nf4 import BLOCK, DAMPING, NotPositive, shift_matrix
from .model.nf4_store import Rounded, read_back, round_matrix
from .model.places import Quantised
from .state import Batch

log = logging.getLogger("flex.calibrate")


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
            INSTEAD,
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
            INSTEAD,
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
    on_the_way = record(model, layers, batches)
    start = time.monotonic()
    for i, layer in enumerate(layers):
        inside = f"{prefix}.{i}."
        own = [name.removeprefix(inside) for name in names if name.startswith(inside)]
        reference = copy.deepcopy(layer)
        rounded = _round_layer(layer, reference, own, on_the_way, place, inside)
        for batch in on_the_way:
            batch.rounded.advance(layer)
            batch.dense.advance(reference)
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
        batch.rounded.through(layer)
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
    device = on_the_way[0].real.device
    hessian = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
    drift = torch.zeros_like(hessian)
    for batch in on_the_way:
        rounded = _inputs(layer, name, batch.rounded, batch.real, once)
        dense = _inputs(reference, name, batch.dense, batch.real, once)
        for x, _ in rounded:
            hessian += (x.t() @ x).double()
        if len(rounded) == len(dense) == 1:
            (x, of_positions), (z, of_positions_too) = rounded[0], dense[0]
            if of_positions and of_positions_too:
                drift += ((z - x).t() @ x).double()
    return hessian, drift


def _inputs(
    layer: nn.Module, name: str, stream: Stream, real: Tensor, once: bool
) -> list[tuple[Tensor, bool]]:
    """What each call of a linear layer reads when a stream goes through the decoder layer: rows (n, K) fp32, and
    whether they are the real positions, without padding."""
    found: list[tuple[Tensor, bool]] = []

    def note(_: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        of_positions = len(rows) == real.numel()
        if of_positions:
            rows = rows[real.flatten()]
        found.append((rows.float(), of_positions))
        if once:
            raise Enough

    with _watching(layer, [name], note), suppress(Enough):
        stream.through(layer)
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
