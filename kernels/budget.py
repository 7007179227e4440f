"""How close a kernel must come to the truth: one error budget for all of them.

The truth is the reference evaluated in fp64. The yardstick is the plain computation in the kernel's own dtype:
its error, plus one eps of the largest result for the rounding of what is stored; a kernel may have twice that.
"""

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


def budget_used(actual: Tensor, eager: Tensor, reference: Tensor) -> float:
    """Error of `actual` over its budget: at most 1 is as good as a plain computation.

    Args:
        actual: what the kernel gave, any dtype.
        eager: the reference evaluated in the kernel's dtype; its error sets the budget.
        reference: the reference evaluated in fp64.

    Raises: ValueError: the shapes differ, so that there is nothing to compare.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"shape {tuple(actual.shape)} is not {tuple(reference.shape)}")
    error, budget = max_error(actual, reference), error_budget(eager, reference)
    if error == 0.0:
        return 0.0
    return error / budget if budget > 0.0 else float("inf")
