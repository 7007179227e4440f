"""Spectral penalty sum_k rho(k) |F(w)_k|^2 of matrices and its exact gradient, without autograd."""

from .api import (
    curvature_constant,
    high_band_energy,
    spectral_penalty,
    spectral_penalty_delta,
    spectral_penalty_into,
)
from .reference import Spectrum, rho, spectral_penalty_reference

__all__ = [
    "Spectrum",
    "curvature_constant",
    "high_band_energy",
    "rho",
    "spectral_penalty",
    "spectral_penalty_delta",
    "spectral_penalty_into",
    "spectral_penalty_reference",
]
