"""Sophia's update with the spectral penalty's gradient in it, in one pass. See kernels/README.md."""

from .api import PenalisedUpdate, penalised_update
from .reference import penalised_reference

__all__ = ["PenalisedUpdate", "penalised_reference", "penalised_update"]
