"""From the runs of a race to R, the budget an entrant needs for AdamW's loss over AdamW's own.

R is found on curves of loss over log(cost) through the budgets' means, each point a decayed run of
its own. R = 0.7 says 30 % less. Intervals: paired bootstrap over seeds, the target drawn with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flex.evals.stats import Interval, bootstrap
from flex.race.protocol import BASELINE, CHALLENGER, RaceConfig
from flex.race.stages import Book

Floats = NDArray[np.float64]
Cost = Literal["steps", "compute", "time"]
COSTS: dict[Cost, str] = {
    "steps": "optimizer steps",
    "compute": "tokens through forward and backward, refreshes included",
    "time": "CPU seconds of the training steps",
}
DRAWS, SEED, LEVEL = 4000, 0, 0.95


@dataclass(frozen=True)
class Table:
    """An entrant's evaluation: `losses` (seeds, budgets), inf where diverged, and mean `costs` (budgets,)."""

    losses: Floats
    costs: dict[Cost, Floats]


@dataclass(frozen=True)
class Ratio:
    """R of one cost with its interval; `inf`: the loss was not reached at the largest budget, and a
    value equal to `floor`: it was reached at the smallest one already."""

    value: float
    low: float
    high: float
    floor: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return "not reached"
        return f"{self._text(self.value)} [{self._text(self.low)}, {self._text(self.high)}]"

    def _text(self, value: float) -> str:
        if math.isinf(value):
            return "not reached"
        return f"<= {value:.2f}" if value <= self.floor else f"{value:.2f}"


def table(race: RaceConfig, book: Book, entrant: str) -> Table:
    """The evaluation runs of an entrant, seeds in order."""
    losses: list[list[float]] = []
    costs: dict[Cost, list[float]] = {name: [] for name in COSTS}
    for budget in sorted(race.budgets):
        runs = sorted(book.of("evaluate", entrant, budget), key=lambda run: run.seed)
        losses.append([run.outcome.loss for run in runs])
        costs["steps"].append(race.steps_of(budget))
        # A run that diverged ended early: what the others cost is what the budget costs.
        whole = [r.outcome for r in runs if math.isfinite(r.outcome.loss)] or [
            r.outcome for r in runs
        ]
        costs["compute"].append(sum(o.positions for o in whole) / len(whole))
        costs["time"].append(sum(o.cpu_seconds for o in whole) / len(whole))
    return Table(np.array(losses).T, {name: np.array(each, float) for name, each in costs.items()})


def center(losses: Floats) -> Floats:
    """(seeds, budgets) -> (budgets,): means, or medians where a run diverged."""
    if np.isinf(losses).any():
        return np.median(losses, axis=0)
    return losses.mean(axis=0)


def reached_at(costs: Floats, losses: Floats, target: float) -> float:
    """Cost at which a curve through (costs, losses) reaches `target`, interpolated in log(cost).

    Args:
        costs: (budgets,), increasing.
        losses: (budgets,); made monotone first (pool adjacent violators), since more budget cannot
            be worse than chance.

    Returns: inf if the last loss is above the target; costs[0] if the first is at or below it.
    """
    falling = _monotone(losses)
    if falling[-1] > target:
        return math.inf
    if falling[0] <= target:
        return float(costs[0])
    after = int(np.argmax(falling <= target))
    x, y = np.log(costs[after - 1 : after + 1]), falling[after - 1 : after + 1]
    if math.isinf(y[0]):
        return float(costs[after])
    share = (y[0] - target) / (y[0] - y[1])
    return float(math.exp(x[0] + share * (x[1] - x[0])))


def ratio(baseline: Table, other: Table, full: int, cost: Cost, draws: int = DRAWS) -> Ratio:
    """R of `other` in one cost.

    Args:
        baseline: AdamW's table, the same seeds in the same order.
        full: index of the full budget, where the target is read.
    """
    whole, spent = baseline.costs[cost][full], other.costs[cost]

    def once(rows: Sequence[int] | NDArray[np.int_] | slice) -> float:
        target = float(center(baseline.losses[rows])[full])
        return reached_at(spent, center(other.losses[rows]), target) / whole

    rng = np.random.default_rng(SEED)
    seeds = len(baseline.losses)
    drawn = [once(rng.integers(0, seeds, seeds)) for _ in range(draws)]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    return Ratio(once(slice(None)), float(low), float(high), float(spent[0] / whole))


def difference(first: Table, second: Table, full: int) -> Interval | None:
    """Mean of second - first in final loss at the full budget over paired seeds; None if one diverged."""
    gaps = second.losses[:, full] - first.losses[:, full]
    return bootstrap(gaps) if np.isfinite(gaps).all() else None


@dataclass(frozen=True)
class Verdict:
    """What one race says. `ratios` are Sophia's; `controls` are differences to Sophia in final loss."""

    target: float
    ratios: dict[Cost, Ratio]
    others: dict[str, dict[Cost, Ratio]]
    controls: dict[str, Interval | None]

    @property
    def headline(self) -> Ratio:
        """The worse of compute and time."""
        return max((self.ratios["compute"], self.ratios["time"]), key=lambda r: (r.value, r.high))

    def words(self) -> str:
        """The claim, or that there is none."""
        found = self.headline
        if found.high < 1:
            return f"confirmed: at least {1 - found.high:.0%} less budget, R = {found}"
        if found.low > 1:
            return f"slower: R = {found}"
        return f"not confirmed: R = {found}"

    def cause(self) -> str:
        """Whether the curvature is why, as far as the placebo tells."""
        gap = self.controls.get("sophia-permuted")
        if gap is None:
            return "cause not tested: no placebo, or one diverged"
        if gap.low > 0:
            return f"permuted curvature is worse by {_signed(gap)}: the curvature helps"
        return f"permuted curvature is {_signed(gap)} away: the curvature is not shown to help"


def verdict(race: RaceConfig, book: Book) -> Verdict:
    """Judge a race whose runs are all there."""
    tables = {name: table(race, book, name) for name in race.entrants}
    full = sorted(race.budgets).index(1.0)
    baseline, sophia = tables[BASELINE], tables[CHALLENGER]
    every = {
        name: {cost: ratio(baseline, t, full, cost) for cost in COSTS}
        for name, t in tables.items()
        if name != BASELINE
    }
    controls = {
        name: difference(sophia, t, full) for name, t in tables.items() if name != CHALLENGER
    }
    others = {name: found for name, found in every.items() if name != CHALLENGER}
    return Verdict(float(center(baseline.losses)[full]), every[CHALLENGER], others, controls)


def _signed(gap: Interval) -> str:
    return f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"


def _monotone(losses: Floats) -> Floats:
    """The nearest falling sequence (least squares), by pooling adjacent violators; inf stays."""
    blocks: list[tuple[float, int]] = []
    for loss in losses.tolist():
        value, size = loss, 1
        while blocks and blocks[-1][0] < value and math.isfinite(value):
            before, count = blocks.pop()
            value, size = (before * count + value * size) / (count + size), count + size
        blocks.append((value, size))
    return np.array([value for value, size in blocks for _ in range(size)])
