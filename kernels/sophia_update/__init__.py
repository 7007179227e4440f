"""Sophia's clipped update, its curvature's average and the clip factor. See kernels/README.md."""

from .api import (
    UpdateGroup,
    add_estimates,
    curvature_update,
    gradient_norm,
    sophia_update,
    sophia_update_groups,
)
from .scalars import Scalars

__all__ = [
    "Scalars",
    "UpdateGroup",
    "add_estimates",
    "curvature_update",
    "gradient_norm",
    "sophia_update",
    "sophia_update_groups",
]
