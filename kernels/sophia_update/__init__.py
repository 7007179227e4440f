"""Sophia's clipped update and the moving average of its curvature. See kernels/README.md."""

from .api import curvature_update, sophia_update

__all__ = ["curvature_update", "sophia_update"]
