"""How a C function's work is shared out among threads."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch

from flex.kernels import native_build
from tests.mutants import load_copy


@pytest.fixture(autouse=True, params=["torch's threads", "new threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(native_build, "ELEMENTS_PER_THREAD", 1)
    if request.param == "new threads":
        monkeypatch.setattr(native_build, "_openmp", lambda: None)
    elif native_build._openmp() is None:
        pytest.skip("torch does not run on GNU's OpenMP")
    return request.param


def with_threads(monkeypatch, count):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)


def check_shares(module, monkeypatch):
    for count in (1, 2, 3, 5):
        with_threads(monkeypatch, count)
        for total in (1, 2, 4, 17):
            spans = []
            module.in_shares(lambda a, b, spans=spans: spans.append((a, b)), total, 10 * total)
            assert len(spans) == min(count, total)
            assert Counter(i for a, b in spans for i in range(a, b)) == Counter(range(total))


def test_each_element_is_in_one_share(monkeypatch):
    check_shares(native_build, monkeypatch)


def test_few_elements_take_few_threads(monkeypatch):
    with_threads(monkeypatch, 4)
    monkeypatch.setattr(native_build, "ELEMENTS_PER_THREAD", 100)
    for elements, shares in ((99, 1), (250, 2), (10_000, 4)):
        spans = []
        native_build.in_shares(lambda a, b, spans=spans: spans.append((a, b)), 50, elements)
        assert len(spans) == shares


def test_shares_run_side_by_side(monkeypatch):
    with_threads(monkeypatch, 2)
    both = threading.Barrier(2)
    native_build.in_shares(lambda a, b: both.wait(timeout=30), 2, 2)


def test_a_failure_is_raised_once_all_have_ended(monkeypatch):
    with_threads(monkeypatch, 3)
    ended = []

    def work(begin, end):
        if begin == 2:
            raise ValueError("the last share")
        ended.append(begin)

    with pytest.raises(ValueError, match="the last share"):
        native_build.in_shares(work, 3, 3)
    assert sorted(ended) == [0, 1]
    native_build.in_shares(lambda a, b: ended.append(a), 3, 3)  # nothing is left over
    assert sorted(ended) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("threads", ["torch's threads"], indirect=True)
def test_an_interrupt_that_ctypes_drops_is_not_lost(monkeypatch):
    """What a signal's handler raises before a callback's first line is printed and forgotten."""
    own = native_build._REGION
    monkeypatch.setattr(native_build, "_REGION", lambda body: own(lambda _: None))
    with_threads(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        native_build.in_shares(lambda a, b: None, 2, 2)


def check_nested(module, monkeypatch):
    with_threads(monkeypatch, 2)
    seen = []

    def work(begin, end):
        module.in_shares(lambda a, b: seen.append((begin, a, b)), 4, 4)

    module.in_shares(work, 2, 2)
    found = Counter((outer, i) for outer, a, b in seen for i in range(a, b))
    assert found == Counter((outer, i) for outer in (0, 1) for i in range(4))


def test_shares_within_shares(monkeypatch):
    check_nested(native_build, monkeypatch)


def test_torchs_own_threads_do_the_work(threads, monkeypatch):
    """The same ones each time, where threads of our own would be new."""
    with_threads(monkeypatch, 2)
    ids = []
    for _ in range(3):
        both = threading.Barrier(2)

        def work(begin, end, both=both):
            both.wait(timeout=30)  # a thread that had ended could leave its number to the next
            ids.append(threading.get_native_id())
            both.wait(timeout=30)

        native_build.in_shares(work, 2, 2)
    assert threading.get_native_id() in ids and len(ids) == 6
    if threads == "torch's threads":
        assert len(set(ids)) == 2


ALIKE = {  # whoever does the work
    "shares overlap": ("total * (i + 1) // shares)", "total * (i + 2) // shares)"),
    "one share too many": ("min(threads, total, ", "min(threads, total + 1, "),
}
BUGS = {
    "torch's threads": {
        **ALIKE,
        "a share beyond the team is lost": (
            "range(openmp.omp_get_thread_num(), shares, openmp.omp_get_num_threads())",
            "tuple(range(shares))[openmp.omp_get_thread_num() :][:1]",
        ),
    },
    "new threads": {**ALIKE, "the first share alone": ("range(1, shares)", "range(1, 1)")},
}


def test_seeded_bugs_are_seen(threads, tmp_path, monkeypatch):
    for number, bug in enumerate(BUGS[threads].values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        mutant = load_copy(folder, native_build, *bug)
        mutant.ELEMENTS_PER_THREAD = 1
        if threads == "new threads":
            mutant._openmp = lambda: None
        # a lost share is also noticed where it is lost
        with pytest.raises((AssertionError, KeyboardInterrupt)):
            check_shares(mutant, monkeypatch)
            check_nested(mutant, monkeypatch)
