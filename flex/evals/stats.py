"""What a number of tasks can and cannot show: pass@k, intervals, paired tests, power.

The task is the unit throughout: samples of one task are not independent, so whatever is resampled
or flipped is a whole task. Scores are shares in [0, 1], not per cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 10_000  # bootstrap; the limits of a 95 % interval then move by some 2 % of its width
FLIPS = 100_000  # Monte Carlo sign flips: a p-value of 0.05 is known to 0.0007
SEED = 0
LEVEL = 0.95  # of confidence intervals
ALPHA = 0.05  # a p-value below it shows a difference
ENUMERATE = 16  # tasks that differ: up to 2 ** 16 sign patterns are all looked at
_CHUNK = 2_000_000  # elements of a block of draws: 16 MB

Method = Literal["wilson", "bootstrap", "wilson over tasks"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """`value` with its confidence limits."""

    value: float
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Test:
    """A two-sided p-value, and how it came about."""

    p: float
    method: str

    __test__ = False  # not a test case of pytest


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that of k completions at least one passes, when c of n did: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code"
    (arXiv 2107.03374), as its running product, which neither overflows nor cancels.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n = {n}, c = {c}, k = {k}: needs 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    if k == 1:
        return c / n  # the same number, exactly
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def wilson(passed: float, total: int, level: float = LEVEL) -> Interval:
    """The Wilson score interval of `passed` of `total` independent tasks.

    E. B. Wilson, JASA 22 (1927). Raises ValueError for no task, or a count outside of 0..total.
    """
    if total < 1 or not 0 <= passed <= total:
        raise ValueError(f"{passed} of {total}: needs 0 <= passed <= total, and a task")
    z = _quantile((1 + level) / 2)
    share = passed / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    low = 0.0 if passed == 0 else max(0.0, middle - half)
    high = 1.0 if passed == total else min(1.0, middle + half)
    return Interval(share, low, high, "wilson")


def score_interval(scores: ArrayLike, samples: int, level: float = LEVEL) -> Interval:
    """The mean of one score in [0, 1] per task, shape (tasks,), each from `samples` completions.

    One sample: Wilson. More: the bootstrap over tasks. If all tasks score the same, resampling them
    shows no spread at all; then Wilson over tasks, which assumes the largest spread that a score in
    [0, 1] of this mean can have.
    """
    values = _vector(scores)
    value = _mean(values)
    if samples == 1:
        return wilson(math.fsum(values), len(values), level)
    if np.all(values == values[0]):
        limits = wilson(value * len(values), len(values), level)
        return Interval(value, limits.low, limits.high, "wilson over tasks")
    return bootstrap(values, level)


def bootstrap(
    values: ArrayLike, level: float = LEVEL, draws: int = DRAWS, seed: int = SEED
) -> Interval:
    """The mean of `values`, shape (tasks,), and its percentile interval over resampled tasks.

    For paired differences give the differences: a task then takes both systems along.
    """
    vector = _vector(values)
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // len(vector))
    means = [
        vector[rng.integers(0, len(vector), (min(size, draws - at), len(vector)))].mean(axis=1)
        for at in range(0, draws, size)
    ]
    low, high = _percentiles(np.concatenate(means), level)
    return Interval(_mean(vector), low, high, "bootstrap")


def bootstrap_groups(
    first: ArrayLike,
    second: ArrayLike,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Interval:
    """mean(second) - mean(first) of two methods, over resampled training runs and resampled tasks.

    Args:
        first, second: shapes (runs, tasks), at least 2 runs each, the same tasks in the same order.

    Tasks are drawn once for both methods, runs for each on its own. Deviations of drawn runs are
    stretched by sqrt(runs / (runs - 1)) (Rao and Wu, JASA 83, 1988): with 3 runs the plain bootstrap
    shows only two thirds of the variance between them.

    Raises ValueError for shapes that do not fit.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"shapes {a.shape} and {b.shape}: needs (runs >= 2, tasks) twice")
    tasks = a.shape[1]
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // tasks)
    means = []
    for at in range(0, draws, size):
        rows = min(size, draws - at)
        difference = _run_weights(rng, rows, len(b)) @ b - _run_weights(rng, rows, len(a)) @ a
        drawn = rng.integers(0, tasks, (rows, tasks))
        means.append(np.take_along_axis(difference, drawn, axis=1).mean(axis=1))
    low, high = _percentiles(np.concatenate(means), level)
    return Interval(
        _mean(b.mean(axis=0) - a.mean(axis=0)), low, high, "bootstrap of runs and tasks"
    )


def mcnemar(lost: int, gained: int) -> Test:
    """Exact McNemar: `lost` tasks only the first system solved, `gained` only the second.

    If the two were equal, each of these tasks would be a fair coin. Raises ValueError below 0.
    """
    if min(lost, gained) < 0:
        raise ValueError(f"lost = {lost}, gained = {gained}: counts are not negative")
    # Python's whole numbers have no largest one, numpy's do
    n, few = index(lost) + index(gained), index(min(lost, gained))
    tail = sum(math.comb(n, i) for i in range(few + 1))
    p = 1.0 if 2 * tail >= 1 << n else (2 * tail) / (1 << n)  # whole numbers up to the division
    return Test(p, "exact McNemar")


def sign_flip(differences: ArrayLike, flips: int = FLIPS, seed: int = SEED) -> Test:
    """Permutation test of a paired mean difference: were the systems equal, each sign is a coin.

    Args:
        differences: one per task, shape (tasks,). Of an integer type (differences of pass counts)
            the test is exact at any size; else exact up to ENUMERATE tasks that differ, above that
            with `flips` random patterns, counting the observed one: (hits + 1) / (flips + 1).

    Raises ValueError for no task or a value that is not finite.
    """
    values = np.asarray(differences)
    _vector(values)
    if np.issubdtype(values.dtype, np.integer):
        return Test(_sign_flip_counts(values[values != 0]), "exact sign flips")
    nonzero = values[values != 0].astype(float)
    observed = abs(math.fsum(nonzero))
    # sums of one set in another order differ in their last bits, and a tie counts
    least = observed - 1e-9 * float(np.abs(nonzero).sum())
    m = len(nonzero)
    if m <= ENUMERATE:
        sums = np.zeros(1)
        for value in nonzero:
            sums = np.concatenate([sums - value, sums + value])
        return Test(float(np.mean(np.abs(sums) >= least)), "exact sign flips")
    rng = np.random.default_rng(seed)
    size, hits = max(1, _CHUNK // m), 0
    for at in range(0, flips, size):
        signs = rng.integers(0, 2, (min(size, flips - at), m)) * 2.0 - 1.0
        hits += int(np.count_nonzero(np.abs(signs @ nonzero) >= least))
    return Test((hits + 1) / (flips + 1), f"sign flips, {flips} random, seed {seed}")


def permute_runs(first: Sequence[float], second: Sequence[float], most: int = 200_000) -> Test:
    """Two methods by the mean scores of their training runs: every way of dealing the runs out.

    With r runs each the smallest p is 2 / C(2r, r): 0.1 at 3 runs, 0.029 at 4, 0.008 at 5.

    Raises ValueError for no run, or more than `most` ways.
    """
    from itertools import combinations

    scores = np.array([*first, *second], dtype=float)
    a, n = len(first), len(scores)
    ways = math.comb(n, a)
    if not a or a == n or ways > most:
        raise ValueError(f"{a} and {n - a} runs: needs some of both, and at most {most} ways")
    total = scores.sum()
    picked = scores[np.array(list(combinations(range(n), a)))].sum(axis=1)
    gaps = np.abs((total - picked) / (n - a) - picked / a)
    observed = abs(np.mean(scores[a:]) - np.mean(scores[:a]))
    least = observed - 1e-9 * max(1.0, float(np.abs(scores).max()))
    return Test(float(np.mean(gaps >= least)), f"exact permutation of runs, {ways} ways")


def permutation_floor(first: int, second: int) -> float:
    """The smallest p of `permute_runs` for that many runs; with equal numbers both orders tie."""
    return (2 if first == second else 1) / math.comb(first + second, first)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a whole table, each as if it were the only one (Holm, Scand. J. Statist. 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def detectable(differences: ArrayLike, alpha: float = ALPHA, power: float = 0.8) -> float | None:
    """The smallest true difference that a test at `alpha` would show with chance `power`.

    By the normal approximation, with the spread that these paired differences, shape (tasks,), have
    about zero; None if no task differs, which says nothing about the spread.
    """
    values = _vector(differences)
    spread = math.sqrt(_mean(values**2) / len(values))
    return (_quantile(1 - alpha / 2) + _quantile(power)) * spread if spread else None


def least_flips(alpha: float = ALPHA) -> int:
    """Tasks that must flip, all one way, before exact McNemar can fall below `alpha`: 6 at 5 %."""
    return math.floor(1 - math.log2(alpha)) + 1


def unseen_rate(tasks: int, level: float = LEVEL) -> float:
    """The share of tasks that may flip in truth although none of `tasks` did, one-sided at `level`."""
    return float(1 - (1 - level) ** (1 / tasks))


def _sign_flip_counts(nonzero: NDArray[np.integer]) -> float:
    """Share of sign patterns whose sum is at least as far from 0, from the sum's whole distribution.

    Adding one task splits each sum in two; all terms are positive, so nothing cancels.
    """
    sizes = [int(value) for value in np.abs(nonzero)]
    chance = np.ones(1)  # of the sums -total, -total + 2, ..., total of the tasks so far
    for size in sizes:
        both = np.zeros(len(chance) + size)
        both[: len(chance)] += chance / 2
        both[size:] += chance / 2
        chance = both
    total = sum(sizes)
    sums = np.arange(-total, total + 1, 2)
    observed = abs(int(nonzero.sum()))
    return min(1.0, math.fsum(chance[np.abs(sums) >= observed]))


def _run_weights(rng: np.random.Generator, rows: int, runs: int) -> Floats:
    """(rows, runs): the weights of drawn runs, each row summing to 1."""
    weights = rng.multinomial(runs, [1 / runs] * runs, rows) / runs
    stretched: Floats = 1 / runs + (weights - 1 / runs) * math.sqrt(runs / (runs - 1))
    return stretched


def _vector(values: ArrayLike) -> Floats:
    vector = np.asarray(values, dtype=float)
    if vector.ndim != 1 or not len(vector) or not np.all(np.isfinite(vector)):
        raise ValueError(f"shape {vector.shape}: needs one finite number for each of some tasks")
    return vector


def _mean(values: Floats) -> float:
    return math.fsum(values) / len(values)


def _percentiles(means: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
