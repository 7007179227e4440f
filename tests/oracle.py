"""How close a kernel must come to the truth: one error budget for all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def max_error(actual: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, taken in fp64; infinite where `actual` is not finite."""
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - reference.double()).abs()
    return float(torch.where(difference.isfinite(), difference, torch.inf).max())


def error_budget(eager: Tensor, reference: Tensor) -> float:
    """2 x (error of the plain computation in the same dtype + eps(dtype) x max |reference|)."""
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    return 2 * (max_error(eager, reference) + torch.finfo(eager.dtype).eps * largest)


def assert_within_budget(
    actual: Tensor, eager: Tensor, reference: Tensor, name: str = "result"
) -> None:
    """Fail unless `actual` is as good as a plain computation in `eager`'s dtype.

    Args:
        actual: what the kernel gave, any dtype.
        eager: the reference evaluated in the kernel's dtype; its error sets the budget.
        reference: the reference evaluated in fp64.
        name: for the message.
    """
    assert reference.dtype == torch.float64, (
        f"the reference of {name} must be fp64, not {reference.dtype}"
    )
    assert actual.shape == reference.shape, (
        f"{name}: shape {tuple(actual.shape)} != {tuple(reference.shape)}"
    )
    assert bool(reference.isfinite().all()), (
        f"the reference of {name} is not finite: the case proves nothing"
    )
    assert reference.numel() == 0 or bool(reference.any()), (
        f"the reference of {name} is all zero: proves nothing"
    )
    error, budget = max_error(actual, reference), error_budget(eager, reference)
    assert error <= budget, (
        f"{name}: error {error:.3e} is over its budget {budget:.3e} ({eager.dtype})"
    )
