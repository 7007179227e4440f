"""Modules of ours in the place of a model's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn


def replace(
    model: nn.Module,
    ours: Callable[[nn.Module], type[nn.Module] | None],
    opaque: tuple[type, ...] = (),
) -> Counter[str]:
    """Put ours in the place of each module for which `ours` names a class; `model` itself stays.

    Args:
        model: changed in place.
        ours: a subclass of the module's class; its instance shares the module's whole state: parameters, hooks, names.
        opaque: classes whose insides stay as they are.

    Returns: how many of each class were replaced.
    """
    replaced: Counter[str] = Counter()
    for name, child in list(model.named_children()):
        if isinstance(child, opaque):
            continue
        if (kind := ours(child)) is not None:
            stand_in = kind.__new__(kind)
            stand_in.__dict__ = child.__dict__
            setattr(model, name, stand_in)
            replaced[type(child).__name__] += 1
        replaced += replace(child, ours, opaque)
    return replaced


def family_of(kind: type[nn.Module], families: Collection[str]) -> str | None:
    """Which of transformers' families (`llama`, ...) has a class in its modeling file; None if none of `families`."""
    family = kind.__module__.removeprefix("transformers.models.").partition(".")[0]
    known = family in families and kind.__module__.startswith("transformers.models.")
    return family if known else None


def named(replaced: Mapping[str, int]) -> str:
    """How many of each class, for the log."""
    return ", ".join(f"{count} {name}" for name, count in replaced.items())


def sample_of(model: nn.Module) -> Tensor | None:
    """An empty tensor of the dtype of the model's norms and products, whatever a quantised weight is stored as, on its
    device; None if it has no parameters."""
    first = next(model.parameters(), None)
    if first is None:
        return None
    dtype = cast(torch.dtype, getattr(model, "dtype", torch.float32))
    return torch.empty(0, dtype=dtype, device=first.device)
