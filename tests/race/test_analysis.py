"""R from made-up curves whose answer is known."""

import math

import numpy as np
import pytest

from flex.evals.stats import Interval
from flex.race.analysis import Ratio, Table, Verdict, center, ratio, reached_at

COSTS = np.array([50.0, 70, 85, 100, 130])


def falling(scale, offsets=(0.0,)):
    """Losses of a - b log(scale * steps): as low as `scale` times the steps would be."""
    curve = 5 - 0.5 * np.log(scale * COSTS)
    return np.array([curve + offset for offset in offsets])


def table(losses, factor=1.0):
    return Table(losses, {"steps": COSTS, "compute": COSTS * factor, "time": COSTS * factor})


def test_a_log_curve_is_inverted_exactly():
    target = 5 - 0.5 * math.log(77)
    assert reached_at(COSTS, falling(1.0)[0], target) == pytest.approx(77, rel=1e-12)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1.0), (1.25, 0.8), (0.8, 1.25)])
def test_r_is_the_inverse_of_the_speed(scale, expected):
    offsets = np.linspace(-0.1, 0.1, 5)  # paired: a seed is as hard for both
    found = ratio(table(falling(1.0, offsets)), table(falling(scale, offsets)), 3, "steps", 200)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.low == pytest.approx(expected) and found.high == pytest.approx(expected)


def test_refreshes_count_in_compute_and_not_in_steps():
    baseline, other = table(falling(1.0)), table(falling(1.25), factor=1.1)
    assert ratio(baseline, other, 3, "steps", 10).value == pytest.approx(0.8)
    assert ratio(baseline, other, 3, "compute", 10).value == pytest.approx(0.88)


def test_what_lies_outside_the_budgets_is_not_made_up():
    assert math.isinf(ratio(table(falling(1.0)), table(falling(0.5)), 3, "steps", 10).value)
    early = ratio(table(falling(1.0)), table(falling(4.0)), 3, "steps", 10)
    assert early.value == early.floor == 0.5
    assert str(early) == "<= 0.50 [<= 0.50, <= 0.50]"
    assert str(Ratio(1.1, 0.9, math.inf, 0.5)) == "1.10 [0.90, not reached]"


def test_a_worse_loss_at_a_larger_budget_is_pooled():
    # 4.0 and 4.2 pool to 4.1: reached between the first and the second budget
    losses = np.array([5.0, 4.0, 4.2, 3.0, 2.0])
    expected = math.exp(math.log(50) + (5 - 4.5) / (5 - 4.1) * math.log(70 / 50))
    assert reached_at(COSTS, losses, 4.5) == pytest.approx(expected)


def test_a_diverged_run_is_kept_by_the_median():
    losses = falling(1.0, (0.0, 0.1, 0.2))
    losses[2, :] = math.inf
    assert center(losses) == pytest.approx(losses[1])
    losses[1, 0] = math.inf
    assert math.isinf(center(losses)[0])
    assert reached_at(COSTS, center(losses), losses[1, 2]) == pytest.approx(85)


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(3)
    covered, widths = 0, []
    for _ in range(100):
        noise = rng.normal(0, 0.01, (2, 10, len(COSTS)))
        first, second = table(falling(1.0) + noise[0]), table(falling(1.25) + noise[1])
        found = ratio(first, second, 3, "steps", 100)
        covered += found.low <= 0.8 <= found.high
        widths.append(found.high - found.low)
    # Two means of 10 over a slope of 0.5 nats: an SD of 0.7 % of R. A percentile bootstrap of 10
    # covers about 90 %.
    assert covered >= 80
    assert 0.01 < np.mean(widths) < 0.03


def verdict(steps, compute, time, placebo):
    ratios = {"steps": steps, "compute": compute, "time": time}
    return Verdict(3.0, ratios, {}, {"sophia-permuted": placebo})


def test_the_headline_is_the_worse_of_compute_and_time():
    good, bad, unclear = (
        Ratio(0.7, 0.6, 0.8, 0.5),
        Ratio(1.2, 1.1, 1.3, 0.5),
        Ratio(0.9, 0.8, 1.0, 0.5),
    )
    gap = Interval(0.01, 0.005, 0.02, "bootstrap")
    assert (
        verdict(good, good, good, gap).words()
        == "confirmed: at least 20% less budget, R = 0.70 [0.60, 0.80]"
    )
    assert verdict(good, good, bad, gap).words() == "slower: R = 1.20 [1.10, 1.30]"
    assert verdict(good, unclear, good, gap).words() == "not confirmed: R = 0.90 [0.80, 1.00]"


def test_a_placebo_that_ties_takes_the_cause_away():
    r = Ratio(0.7, 0.6, 0.8, 0.5)
    tie = Interval(0.001, -0.002, 0.004, "bootstrap")
    assert "not shown to help" in verdict(r, r, r, tie).cause()
    assert "the curvature helps" in verdict(r, r, r, Interval(0.01, 0.005, 0.02, "b")).cause()
    assert "not tested" in verdict(r, r, r, None).cause()
