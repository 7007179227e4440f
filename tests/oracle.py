"""How close a kernel must come to the truth, as an assertion. The budget itself is flex.kernels.budget."""

from __future__ import annotations

import torch
from torch import Tensor

from flex.kernels.budget import error_budget, max_error

__all__ = ["assert_within_budget", "error_budget", "max_error"]


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
