"""Medians, their ratio, and the 95 % limits of both: percentile bootstrap over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 4000
SEED = 0  # the same samples give the same limits


@dataclass(frozen=True)
class Estimate:
    """A value with the limits of its interval; of a single sample both are the value."""

    value: float
    low: float
    high: float


def median(samples: Sequence[float]) -> Estimate:
    """The median of the rounds. Raises ValueError without a sample."""
    values = _checked(samples)
    return _estimate(np.median(values), _medians(values, _rounds(len(values))))


def ratio(ours: Sequence[float], other: Sequence[float]) -> Estimate:
    """median(ours) / median(other).

    Equally long: rounds are resampled as pairs, so that what slows a whole round down cancels. Else each side is
    resampled on its own. Raises ValueError without a sample.
    """
    a, b = _checked(ours), _checked(other)
    if len(a) != len(b):
        return independent_ratio(ours, other)
    rounds = _rounds(len(a))
    return _estimate(np.median(a) / np.median(b), _medians(a, rounds) / _medians(b, rounds))


def independent_ratio(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """median(first) / median(second) of two runs: rounds of one have nothing to do with those of the other."""
    a, b = _checked(first), _checked(second)
    draws = _medians(a, _rounds(len(a))) / _medians(b, _rounds(len(b), SEED + 1))
    return _estimate(np.median(a) / np.median(b), draws)


def _checked(samples: Sequence[float]) -> np.ndarray:
    values = np.asarray(samples, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"samples {samples!r}: needs one finite number or more")
    return values


def _rounds(count: int, seed: int = SEED) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (DRAWS, count))


def _medians(values: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    return np.median(values[rounds], axis=1)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    edge = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [edge, 1 - edge])
    return Estimate(float(value), float(low), float(high))
