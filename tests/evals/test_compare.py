"""`compare`: what it refuses, what it finds, and the words for it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from flex.errors import DataError
from flex.evals.compare import System, compare
from flex.evals.compare_groups import compare_groups
from flex.evals.results import TaskResult
from flex.evals.stats import wilson
from flex.evals.tables import group_words, words
from tests.evals.made_reports import changed, judged, made, paired, runs


def one(first, second, k=1):
    """The only comparison of two reports."""
    return compare([(System("a.json", first), System("b.json", second))], k)[0]


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 12), st.integers(0, 12), st.integers(1, 30))
def test_greedy_counts(both, lost, gained, neither):
    found = compare([paired(both, lost, gained, neither)])[0]
    tasks = both + lost + gained + neither
    assert found.difference.value == pytest.approx((gained - lost) / tasks)
    assert (len(found.lost), len(found.gained)) == (lost, gained)
    expected = scipy_stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1
    assert found.test.p == found.p_holm == pytest.approx(expected)
    assert found.first.score.value == pytest.approx((both + lost) / tasks)
    assert found.difference.low <= found.difference.value <= found.difference.high
    assert words(found)  # whatever the counts


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9))
def test_several_samples(counts):
    first, second = zip(*counts, strict=True)
    found = one(made(first, 4), made(second, 4))
    back = one(made(second, 4), made(first, 4))
    differences = np.array(second) - np.array(first)
    if np.any(differences):
        theirs = scipy_stats.permutation_test(
            (differences,), np.sum, permutation_type="samples", n_resamples=np.inf
        )
        assert found.test.p == pytest.approx(theirs.pvalue, abs=1e-9)
    assert found.test == back.test
    assert found.difference.value == pytest.approx(-back.difference.value)
    assert [flip.task_id for flip in found.gained] == [flip.task_id for flip in back.lost]
    for k in (2, 4):
        assert words(one(made(first, 4), made(second, 4), k))


def test_interval_is_scipys_on_two_adapters():
    rng = np.random.default_rng(9)
    first = rng.binomial(20, rng.beta(1, 2, 158))
    second = np.clip(first + rng.integers(-2, 5, 158), 0, 20)
    found = one(made(first, 20, "a"), made(second, 20, "b"))
    theirs = scipy_stats.bootstrap(
        (second / 20, first / 20),
        lambda b, a, axis: np.mean(b - a, axis=axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    noise = 0.05 * (theirs.high - theirs.low)
    assert (found.difference.low, found.difference.high) == pytest.approx(
        (theirs.low, theirs.high), abs=noise
    )
    drawn = scipy_stats.permutation_test(
        (second / 20 - first / 20,),
        np.sum,
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    )
    assert found.test.p == pytest.approx(drawn.pvalue, abs=0.01)
    assert found.test.method == "exact sign flips"


def test_flips_by_id_largest_first():
    found = one(made([0, 4, 2, 1], 4), made([1, 0, 2, 4], 4))
    assert [(f.task_id, f.first, f.second) for f in found.gained] == [("T/3", 1, 4), ("T/0", 0, 1)]
    assert [(f.task_id, f.first, f.second) for f in found.lost] == [("T/1", 4, 0)]


def test_tasks_in_another_order_are_paired_by_id():
    first, second = made([1, 0, 0]), made([1, 1, 0])
    found = one(first, replace(second, tasks=second.tasks[::-1]))
    assert [flip.task_id for flip in found.gained] == ["T/1"]
    assert found.lost == ()


def test_kinds_compile_rates_and_texts():
    first = judged(judged(made([1, 0, 0, 0]), 1, "compile"), 2, "timeout")
    second = judged(made([1, 0, 0, 0]), 1, "exception")
    found = one(first, second)
    assert (found.first.verdicts["compile"], found.second.verdicts["compile"]) == (1, 0)
    assert (found.first.compile_rate, found.second.compile_rate) == (0.75, 1.0)
    assert found.test.p == 1.0
    assert found.texts_differ == 0  # of made_reports: the verdict changed, the text did not
    assert one(made([1, 0]), made([1, 1])).texts_differ == 1


def test_the_solvable_subset():
    first, second = made([1, 0, 0, 0]), made([1, 1, 0, 0])
    probed = [replace(report, unsolvable=("T/3",)) for report in (first, second)]
    found = one(*probed)
    assert found.solvable_tasks == 3
    assert found.solvable.value == pytest.approx(1 / 3)
    assert found.first.solvable == wilson(1, 3)
    assert found.second.solvable == wilson(2, 3)
    assert found.difference.value == pytest.approx(1 / 4)
    assert one(first, second).solvable is None
    assert (
        one(*(replace(r, unsolvable=("T/0", "T/1", "T/2", "T/3")) for r in probed)).solvable is None
    )
    half = one(first, probed[1])
    assert half.solvable is None
    assert 'unsolvable: null / ["T/3"]' in half.notes


REFUSED = {
    "another benchmark": (
        lambda r: changed(r, "benchmark", name="mbpp"),
        'benchmark.name: "humaneval" / "mbpp"',
    ),
    "another file": (
        lambda r: changed(r, "benchmark", source={"file": "h.jsonl", "sha256": "cd"}),
        'benchmark.source.sha256: "ab" / "cd"',
    ),
    "a revision in place of a file": (
        lambda r: changed(r, "benchmark", source={"hub": "x", "revision": "1"}),
        'benchmark.source.revision: "(none)" / "1"',
    ),
    "other stops": (
        lambda r: changed(r, "protocol", stops=["\n"]),
        r'protocol.stops: ["\nclass", "\ndef"] / ["\n"]',
    ),
    "a key more": (
        lambda r: changed(r, "protocol", **{"chat.template": "x"}),
        'protocol.chat.template: "(none)" / "x"',
    ),
    "new tokens": (
        lambda r: changed(r, "protocol", max_new_tokens=256),
        "protocol.max_new_tokens: 512 / 256",
    ),
}


@pytest.mark.parametrize(("change", "told"), REFUSED.values(), ids=REFUSED)
def test_unlike_evaluations_are_refused(change, told):
    first = made([1, 0])
    with pytest.raises(DataError) as error:
        one(first, change(first))
    assert told in error.value.what
    assert "a.json and b.json differ in" in error.value.what


def test_all_differing_keys_are_named():
    first = made([1, 0])
    second = changed(changed(first, "protocol", temperature=0.2), "protocol", top_p=0.95)
    with pytest.raises(DataError, match=r"protocol\.temperature.*protocol\.top_p"):
        one(first, second)


def test_other_tasks_are_refused():
    first, second = made([1, 0]), made([1, 0])
    second = replace(second, tasks=(second.tasks[0], TaskResult("T/x", second.tasks[1].samples)))
    with pytest.raises(DataError, match="2 tasks not in common, such as 'T/1'"):
        one(first, second)


def test_missing_tool_chains_are_refused():
    with pytest.raises(DataError, match=r"b\.json: 1 samples were not run"):
        one(made([1, 0]), judged(made([1, 0]), 0, "missing"))


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(DataError, match=f"k = {k}, but a.json has 4 samples") as error:
        one(made([1], 4), made([1], 4), k)
    assert "1 to 4" in error.value.fix


def test_what_may_differ_is_noted():
    second = changed(made([1, 0]), "protocol", seed=1)
    second = changed(second, "engine", batch_size=1, versions={"torch": "2"})
    second = changed(second, "model", merged=True)
    second = replace(second, sandbox="none", toolchain="x" * 200)
    notes = one(made([1, 0]), second).notes
    assert notes[:-2] == (
        "model.merged: false / true",
        "engine.batch_size: 8 / 1",
        'engine.versions: "(none)" / {"torch": "2"}',
        'sandbox: "bubblewrap" / "none"',
    )
    assert notes[-2].startswith('toolchain: "Python 3.11.2" / "xxx')
    assert len(notes[-2]) < 130
    assert notes[-1] == "protocol.seed: 0 / 1"
    assert one(made([1, 0]), made([1, 1])).notes == ()


def test_holm_over_the_table():
    strong, weak, none = paired(10, 0, 12, 20), paired(10, 1, 9, 22), paired(10, 3, 3, 26)
    found = compare([weak, strong, none])
    assert [c.comparisons for c in found] == [3, 3, 3]
    alone = [c.test.p for c in found]
    assert [c.p_holm for c in found] == pytest.approx([2 * alone[0], 3 * alone[1], alone[2]])
    assert [c.shown for c in found] == [True, True, False]
    assert "after Holm's correction for 3 comparisons" in words(found[0])
    # the smallest detectable difference is that of the corrected test
    assert found[0].detectable > compare([weak])[0].detectable


def test_what_the_correction_takes_away_is_not_shown():
    found = compare([paired(10, 0, 6, 20)] * 2)[0]
    assert (found.test.p, found.p_holm, found.shown) == (0.03125, 0.0625, False)
    assert words(found).startswith("No difference was shown")
    assert "fewer than 7 cannot show anything" in words(found)


def test_words_for_a_difference():
    text = words(compare([paired(44, 15, 29, 70)])[0])  # 14 of 158 tasks, 44 discordant
    assert text.startswith("A difference was shown: b.json scores 8.9 points higher than a.json")
    assert "exact McNemar, p = 0.049" in text


def test_words_for_no_difference():
    text = words(compare([paired(43, 16, 30, 69)])[0])  # the same 14, 46 discordant
    assert text.startswith("No difference was shown between b.json and a.json: +8.9 points")
    assert "p = 0.054" in text
    assert "A true difference below about 12.0 points would mostly go unseen" in text
    assert "these 158 tasks (80 % power)" in text


def test_words_for_lower():
    assert "b.json scores 8.9 points lower than a.json" in words(
        compare([paired(44, 29, 15, 70)])[0]
    )


def test_words_for_too_few_flips():
    found = compare([paired(60, 0, 5, 93)])[0]
    text = words(found)
    assert not found.shown
    assert "The interval leaves out 0, but the test decides." in text
    assert "5 tasks differ; fewer than 6 cannot show anything" in text
    # by the normal approximation 4.0 points, which is more than 6 of 158 tasks
    assert found.detectable >= 6 / 158
    assert compare([paired(60, 0, 1, 97)])[0].detectable == 6 / 158


def test_words_for_the_same_adapter_merged():
    report = made([1] * 60 + [0] * 98)
    found = one(report, changed(report, "model", merged=True))
    assert (found.gained, found.lost, found.texts_differ) == ((), (), 0)
    assert (found.difference.low, found.difference.high, found.test.p) == (0, 0, 1)
    assert words(found).startswith("No difference: all 158 tasks have the same result. Up to 1.9 %")


def test_pass_counts_that_differ_where_pass_at_k_does_not():
    found = one(made([3, 0], 4), made([4, 0], 4), k=2)
    assert found.detectable is None
    assert words(found).startswith("No difference was shown")


def test_methods_by_their_runs():
    found = compare_groups([runs("base", [10, 12, 11, 13]), runs("flex", [20, 24, 22, 26])])[0]
    assert found.first.scores == (0.2, 0.24, 0.22, 0.26)
    assert found.second.mean == pytest.approx(0.46)
    assert found.second.deviation == pytest.approx(np.std([0.4, 0.48, 0.44, 0.52], ddof=1))
    assert found.difference.value == pytest.approx(0.23)
    assert found.test.p == found.least_p == pytest.approx(2 / 70)
    assert found.shown
    assert "flex scores 23.0 points higher than base" in group_words(found)


def test_runs_that_agree_on_few_tasks_are_not_enough():
    """All runs of one method solve tasks 0 to 9, all of the other 39 to 49: other tasks could turn it."""
    name, systems = runs("flex", [39] * 4)
    turned = [
        replace(s, report=replace(made([0] * 39 + [1] * 11), model=s.report.model)) for s in systems
    ]
    found = compare_groups([runs("base", [10] * 4), (name, turned)])[0]
    assert found.p_holm < 0.05
    assert found.difference.low < 0 < found.difference.value == pytest.approx(0.02)
    assert not found.shown
    assert "The permutation of the runs alone would show it" in group_words(found)


def test_three_runs_each_cannot_show_a_difference():
    found = compare_groups([runs("base", [10, 11, 12]), runs("flex", [40, 41, 42])])[0]
    assert not found.shown
    text = group_words(found)
    assert text.startswith("No difference was shown between flex and base: +60.0 points")
    assert (
        "3 and 3 training runs cannot show one: their smallest p is 0.100; it takes 4 of each."
        in text
    )


def test_two_methods_against_a_base_take_more_runs():
    three = [runs(name, [10 + i, 11, 12, 13]) for i, name in enumerate("abc")]
    found = compare_groups(three)
    assert [c.comparisons for c in found] == [2, 2]
    assert "it takes 5 of each" in group_words(found[0])


def test_groups_are_refused():
    with pytest.raises(DataError, match="'flex' has 1 result"):
        compare_groups([runs("base", [1, 2]), runs("flex", [3])])
    name, systems = runs("flex", [3, 4])
    twice = [systems[0], System("again.json", systems[0].report)]
    with pytest.raises(DataError, match=r"flex-0\.json and again\.json are of the same model"):
        compare_groups([runs("base", [1, 2]), (name, twice)])
    with pytest.raises(DataError, match="tasks not in common|benchmark"):
        compare_groups([runs("base", [1, 2]), runs("flex", [3, 4], tasks=40)])
