"""Statistics against scipy, exact fractions, and the figures of a published table."""

import math
import time
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from flex.evals import stats
from flex.evals.stats import (
    bootstrap,
    bootstrap_groups,
    detectable,
    holm,
    least_flips,
    mcnemar,
    pass_at_k,
    permutation_floor,
    permute_runs,
    score_interval,
    sign_flip,
    unseen_rate,
    wilson,
)

counts = st.integers(1, 60).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))
)


@given(counts)
def test_pass_at_k_is_the_chance_of_a_draw_without_replacement(counts):
    n, c, k = counts
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-13)


@given(counts)
def test_pass_at_k_grows_with_c_and_with_k(counts):
    n, c, k = counts
    here = pass_at_k(n, c, k)
    assert 0 <= here <= 1
    assert (here == 0) == (c == 0)
    if c < n:
        assert pass_at_k(n, c + 1, k) >= here
    if k < n:
        assert pass_at_k(n, c, k + 1) >= here - 1e-15


def test_pass_at_k_with_many_samples():
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(200, 199, 2) == 1.0
    # the binomials have 2,000 digits
    exact = 1 - Fraction(math.comb(9990, 100), math.comb(10_000, 100))
    assert pass_at_k(10_000, 10, 100) == pytest.approx(float(exact), rel=1e-12)
    assert pass_at_k(20, 7, 1) == 7 / 20


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6), (0, 0, 1)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts):
    passed, total = counts
    ours = wilson(passed, total)
    theirs = scipy_stats.binomtest(passed, total).proportion_ci(0.95, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


# The published table: per cent of 164 HumanEval or 158 Java tasks, and its 95 % limits.
TABLE = [
    *[(34.2, 164, 27.3, 41.7), (38.4, 164, 31.3, 46.0), (40.1, 164, 33.0, 47.9)],
    *[(39.8, 164, 32.5, 47.3), (36.6, 164, 29.6, 44.2)],
    *[(33.3, 158, 26.7, 41.2), (35.4, 158, 28.4, 43.2), (31.5, 158, 24.9, 39.3)],
    *[(32.9, 158, 26.1, 40.6), (42.1, 158, 35.0, 50.2)],
]


@pytest.mark.parametrize(("score", "tasks", "low", "high"), TABLE)
def test_limits_of_the_published_table(score, tasks, low, high):
    nearest = {math.floor(score * tasks / 100), math.ceil(score * tasks / 100)}
    limits = [wilson(passed, tasks) for passed in nearest]
    assert (low, high) in [(round(100 * x.low, 1), round(100 * x.high, 1)) for x in limits]
    assert all(7.1 < 50 * (x.high - x.low) < 7.7 for x in limits)


def test_which_published_scores_a_single_run_can_have():
    def possible(score, tasks):
        return any(round(100 * c / tasks, 1) == score for c in range(tasks + 1))

    single = [(score, tasks) for score, tasks, *_ in TABLE if possible(score, tasks)]
    assert single == [(38.4, 164), (36.6, 164), (35.4, 158), (32.9, 158)]
    assert possible(34.2, 158)  # the literature's Java score, in the table's HumanEval column
    assert possible(33.3, 159)  # its TypeScript score, in the Java column


# A difference of so many tasks is significant only with at most that many discordant ones.
@pytest.mark.parametrize(
    ("difference", "most"), [(14, 44), (13, 37), (11, 25), (15, 51), (17, 67), (10, 20)]
)
def test_mcnemar_thresholds_of_the_published_table(difference, most):
    def p(discordant):
        return mcnemar((discordant - difference) // 2, (discordant + difference) // 2).p

    # discordant and difference are both odd or both even
    reachable = [n for n in range(difference, 159) if (n - difference) % 2 == 0]
    assert max(n for n in reachable if p(n) < 0.05) in (most, most - 1)


def test_three_points_of_164_are_never_significant():
    assert mcnemar(0, 3).p == 0.25
    assert mcnemar(0, 5).p == 0.0625


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_scipys_binomial_test(lost, gained):
    ours = mcnemar(lost, gained)
    expected = scipy_stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert ours.p == pytest.approx(expected, rel=1e-9)
    assert ours.p == mcnemar(gained, lost).p


def test_mcnemar_of_thousands_of_tasks():
    assert mcnemar(np.int64(28), np.int64(52)) == mcnemar(28, 52)  # 2 ** 80 fits no int64
    assert mcnemar(2400, 2600).p == pytest.approx(scipy_stats.binomtest(2400, 5000).pvalue)
    assert mcnemar(0, 5000).p < 1e-300
    with pytest.raises(ValueError, match="lost = -1"):
        mcnemar(-1, 3)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 30))
def test_one_sample_sign_flips_are_mcnemar(lost, gained, same):
    differences = np.array([-1] * lost + [1] * gained + [0] * (same + 1))
    assert sign_flip(differences).p == pytest.approx(mcnemar(lost, gained).p, rel=1e-12)
    assert sign_flip(differences.astype(float), flips=20).method.startswith(
        "exact" if lost + gained <= stats.ENUMERATE else "sign flips, 20"
    )


def by_hand(differences) -> Fraction:
    """Every sign pattern, in whole numbers."""
    observed, patterns = abs(sum(differences)), list(product((-1, 1), repeat=len(differences)))
    hits = sum(
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed
        for signs in patterns
    )
    return Fraction(hits, len(patterns))


@settings(deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
def test_sign_flips_are_every_pattern(differences):
    expected = float(by_hand(differences))
    assert sign_flip(np.array(differences)).p == pytest.approx(expected, abs=1e-12)
    # shares: sums that tie in whole numbers must still tie
    assert sign_flip(np.array(differences) / 20).p == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [8, 12])
def test_sign_flips_are_scipys_permutation_test(size):
    values = np.random.default_rng(size).normal(0.3, 1, size)
    theirs = scipy_stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(values).p == pytest.approx(theirs.pvalue, abs=1e-12)
    assert sign_flip(values).method == "exact sign flips"


def test_random_sign_flips_agree_with_the_exact_ones_and_repeat():
    counts = np.random.default_rng(3).integers(-7, 9, 150)
    exact, drawn = sign_flip(counts), sign_flip(counts / 20)
    assert drawn.method == "sign flips, 100000 random, seed 0"
    assert drawn.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p / 100_000))
    assert 0.001 < exact.p < 0.999
    assert sign_flip(counts / 20) == drawn


def test_a_random_p_is_never_zero():
    assert sign_flip(np.full(200, 0.5), flips=999).p == 1 / 1000
    assert sign_flip(np.full(200, 1)).p == pytest.approx(2.0**-199)


def test_no_difference_at_all_is_no_evidence():
    assert sign_flip(np.zeros(30)).p == sign_flip(np.zeros(30, int)).p == 1.0
    assert mcnemar(0, 0).p == 1.0


@pytest.mark.parametrize("values", [[], [[1.0]], [math.nan], [math.inf, 1.0]])
def test_values_that_are_no_scores_are_refused(values):
    for function in (sign_flip, bootstrap, detectable):
        with pytest.raises(ValueError, match="one finite number for each"):
            function(np.array(values, dtype=float))


@pytest.mark.parametrize("tasks", [20, 158])
def test_bootstrap_is_scipys(tasks):
    rng = np.random.default_rng(tasks)
    values = rng.choice([-0.35, 0.0, 0.0, 0.05, 0.6], tasks)
    ours = bootstrap(values)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    noise = 0.05 * (ours.high - ours.low)  # two sets of 10,000 draws
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=noise)
    assert ours.value == pytest.approx(values.mean())
    assert bootstrap(values) == ours


def test_bootstrap_draws_do_not_depend_on_the_size_of_blocks(monkeypatch):
    values = np.random.default_rng(0).random(100)
    whole = bootstrap(values)
    monkeypatch.setattr(stats, "_CHUNK", 7777)
    assert bootstrap(values) == whole


def test_paired_bootstrap_is_narrower_than_two_apart():
    rng = np.random.default_rng(1)
    base = rng.random(158)
    other = np.clip(base + rng.normal(0.02, 0.05, 158), 0, 1)
    paired = bootstrap(other - base)
    apart = [bootstrap(base, seed=1), bootstrap(other, seed=2)]
    assert paired.high - paired.low < 0.2 * sum(x.high - x.low for x in apart)


def test_bootstrap_of_a_thousand_tasks_takes_no_time():
    started = time.perf_counter()
    bootstrap(np.random.default_rng(0).random(1000))
    assert time.perf_counter() - started < 5  # 0.2 s alone


def test_score_intervals_say_how_they_were_made():
    assert score_interval([1, 0, 0, 1], samples=1) == wilson(2, 4)
    several = score_interval([0.5, 0.25, 0.0], samples=4)
    assert several.method == "bootstrap"
    none = score_interval([0.0] * 158, samples=20)
    # resampling zeros gives zeros, which would claim certainty
    assert (none.low, none.method) == (0.0, "wilson over tasks")
    assert none.high == wilson(0, 158).high > 0.02


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_textbook(p_values):
    adjusted = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    for rank, place in enumerate(order):
        steps = [(len(p_values) - i) * p_values[order[i]] for i in range(rank + 1)]
        assert adjusted[place] == pytest.approx(min(1.0, max(steps)))
        assert adjusted[place] >= p_values[place]


def test_holm_known_case():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize(("tasks", "points"), [(158, 8.6), (544, 4.7), (500, 4.9)])
def test_detectable_differences_at_15_per_cent_discordant(tasks, points):
    # half of the discordant tasks each way; parts of a task do not occur, so make many
    discordant = round(0.15 * tasks)
    values = [1] * (discordant // 2) + [-1] * (discordant - discordant // 2)
    values += [0] * (tasks - discordant)
    assert 100 * detectable(values) == pytest.approx(points, abs=0.1)


def test_detectable_is_about_what_the_exact_test_detects():
    """Power of exact McNemar at that difference: the approximation promises 80 %."""
    rng = np.random.default_rng(5)
    tasks, discordant = 400, 0.2
    values = np.repeat([1, -1, 0], [40, 40, 320])
    difference = detectable(values)
    up = (discordant + difference) / 2
    draws = rng.multinomial(tasks, [up, discordant - up, 1 - discordant], 2000)
    power = np.mean([mcnemar(lost, gained).p < 0.05 for gained, lost, _ in draws])
    assert 0.7 < power < 0.85


def test_nothing_is_detectable_where_nothing_differs():
    assert detectable(np.zeros(50)) is None
    assert 100 * unseen_rate(158) == pytest.approx(1.88, abs=0.005)
    # a rate at which no flip among 158 is seen in 5 % of cases
    assert (1 - unseen_rate(158)) ** 158 == pytest.approx(0.05)


def test_fewest_flips_that_can_show_anything():
    assert least_flips() == 6
    for alpha in (0.05, 0.05 / 3, 0.01, 1 / 16):
        flips = least_flips(alpha)
        assert mcnemar(0, flips).p < alpha <= mcnemar(0, flips - 1).p


def test_permutation_of_runs_is_scipys():
    rng = np.random.default_rng(2)
    first, second = rng.normal(0.3, 0.02, 5), rng.normal(0.34, 0.02, 4)
    theirs = scipy_stats.permutation_test(
        (first, second),
        lambda a, b: abs(np.mean(b) - np.mean(a)),
        alternative="greater",
        n_resamples=np.inf,
    )
    assert permute_runs(first, second).p == pytest.approx(theirs.pvalue)


def test_three_runs_can_never_show_a_difference():
    assert permute_runs([0.1, 0.11, 0.12], [0.9, 0.91, 0.92]).p == permutation_floor(3, 3) == 0.1
    assert permutation_floor(4, 4) == pytest.approx(2 / 70)
    assert permute_runs([1, 2, 3, 4], [5, 6, 7, 8]).p == pytest.approx(2 / 70)
    assert permute_runs([1, 2], [5, 6, 7]).p == pytest.approx(permutation_floor(2, 3))
    assert permute_runs([0.3, 0.3], [0.3, 0.3]).p == 1.0
    with pytest.raises(ValueError, match="at most 200000 ways"):
        permute_runs(range(20), range(20))


def test_group_bootstrap_has_the_variance_of_its_two_levels():
    """Runs that differ by a shift of all tasks: variance of run means / runs + of tasks / tasks."""
    rng = np.random.default_rng(4)
    tasks, noise = 300, rng.normal(0, 0.2, 300)
    first = np.array([0.30, 0.32, 0.37])[:, None] + np.zeros(tasks)
    second = np.array([0.40, 0.41, 0.46, 0.39])[:, None] + noise
    found = bootstrap_groups(first, second, draws=40_000)
    expected = np.var([0.30, 0.32, 0.37], ddof=1) / 3 + np.var([0.40, 0.41, 0.46, 0.39], ddof=1) / 4
    expected += noise.var() / tasks
    width = found.high - found.low
    assert width == pytest.approx(2 * 1.96 * math.sqrt(expected), rel=0.08)
    assert found.value == pytest.approx(second.mean() - first.mean())
    assert bootstrap_groups(second, first).value == pytest.approx(-found.value)


def test_group_bootstrap_of_runs_that_agree_is_the_paired_one():
    rng = np.random.default_rng(6)
    first, second = rng.random(200), rng.random(200)
    groups = bootstrap_groups(np.stack([first] * 3), np.stack([second] * 3))
    paired = bootstrap(second - first)
    assert (groups.low, groups.high) == pytest.approx((paired.low, paired.high), abs=0.005)


@pytest.mark.parametrize("shapes", [((1, 5), (2, 5)), ((2, 5), (2, 6)), ((5,), (2, 5))])
def test_group_bootstrap_refuses(shapes):
    with pytest.raises(ValueError, match="shapes"):
        bootstrap_groups(np.zeros(shapes[0]), np.zeros(shapes[1]))
