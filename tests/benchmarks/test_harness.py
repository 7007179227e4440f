"""The benchmark harness: gates, intervals, floors, the CSV, and the comparison of two runs."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare
from benchmarks.harness import (
    Bench,
    Figure,
    Gate,
    Missing,
    RedGate,
    SchemaError,
    Work,
    as_csv,
    read_csv,
    statistics,
    timing,
)
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.session import NO_GPU, Session
from benchmarks.harness.table import render
from benchmarks.harness.timing import in_turns, peak_memory

GREEN = Gate("difference", 0.5, 1.0)
CPU = torch.device("cpu")
WORDS = {"shape": "8 x 8", "dtype": "fp32"}


class FakeBenchmark:
    """pytest-benchmark's pedantic mode, in short."""

    enabled = True

    def __init__(self):
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target, setup, rounds, iterations):
        for i in range(rounds):
            setup()
            target()
            self.stats.stats.data.append(1.0 + i)


@pytest.fixture
def session(tmp_path) -> Session:
    found = Session("cpu", True, 1, 0.01, tmp_path / "results")
    found.ceilings = Ceilings(1e9, {"fp32": 1e9, "bf16": 4e9}, 2**20)
    found.card = {"id": "0123abcd"}
    found.commit = "abc"
    return found


@pytest.fixture
def bench(session) -> Bench:
    fake = FakeBenchmark()
    request = SimpleNamespace(config=None, getfixturevalue=lambda name: fake)
    return Bench(session, "suite", request)


@pytest.mark.parametrize("error", [1.5, math.nan, math.inf], ids=["over", "nan", "inf"])
def test_a_red_gate_times_nothing_and_tells_no_speed(bench, session, error):
    calls = []
    with pytest.raises(RedGate, match="no speed"):
        bench.compare(
            "f",
            lambda: calls.append(1),
            {"peer": lambda: calls.append(2)},
            lambda: Gate("difference", error, 1.0),
            **WORDS,
        )
    assert calls == []
    assert [f.status for f in read_csv(session.csv)] == ["red gate"] * 2
    assert all(f.median is None and f.ratio is None and not f.samples for f in session.figures)


def test_an_assertion_in_a_gate_is_a_red_gate(bench, session):
    def gate() -> Gate:
        raise AssertionError("gradients differ\nby much")

    with pytest.raises(AssertionError, match="gradients differ"):
        bench.compare("f", lambda: None, {}, gate, **WORDS)
    assert (session.figures[0].status, session.figures[0].gate) == ("red gate", "gradients differ")


def test_red_samples_from_elsewhere_are_not_kept(bench, session):
    with pytest.raises(RedGate):
        bench.record("f", {"ours": [1.0]}, Gate("losses", 0.03, 0.02), **WORDS)
    assert session.figures[0].median is None


def test_ratio_of_the_medians_and_a_peer_that_is_missing(bench):
    samples = {"ours": [1.0, 1.0, 1.0], "peer": [4.0, 4.0, 4.0], "gone": Missing()}
    ours, peer, gone = bench.record("f", samples, GREEN, aims={"peer": 0.5}, **WORDS)
    assert (peer.ratio, peer.ratio_low, peer.ratio_high, peer.aim) == (0.25, 0.25, 0.25, 0.5)
    assert (ours.median, ours.ratio, gone.status, gone.median) == (1.0, None, "not installed", None)


def test_words_for_a_variant_that_is_not_there_are_refused(bench):
    with pytest.raises(ValueError, match="aims of .*'per'"):
        bench.record("f", {"ours": [1.0], "peer": [1.0]}, GREEN, aims={"per": 1.0}, **WORDS)


def test_without_the_gpu_gates_run_and_nothing_is_timed(bench, session, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    session.device, calls = "cuda", []
    bench = Bench(session, "suite", bench._request)
    assert (bench.device, bench.tiny, bench.impl) == (CPU, True, "triton")

    def gate() -> Gate:
        calls.append("gate")
        return GREEN

    peers = {"peer": lambda: calls.append("peer"), "gone": Missing()}
    rows = bench.compare("f", lambda: calls.append("ours"), peers, gate, **WORDS)
    assert calls == ["gate"]
    assert [f.status for f in rows] == [NO_GPU, NO_GPU, "not installed"]


def test_floors():
    ceilings = Ceilings(1e9, {"fp32": 1e9, "bf16": 4e9}, 0)
    assert ceilings.floor(Work(bytes=2e9)) == 2.0
    assert ceilings.floor(Work(bytes=2e9, flops=8e9, dtype="fp32")) == 8.0
    assert ceilings.floor(Work(bytes=2e9, flops=4e9, dtype="bf16")) == 2.0


def test_share_of_the_floor(bench):
    (row,) = bench.record("f", {"ours": [4.0, 5.0, 6.0]}, GREEN, work=Work(bytes=1e9), **WORDS)
    assert (row.floor, row.floor_share) == (1.0, 0.2)


def test_limits_hold_what_they_promise():
    """Of made-up data: 95 % of the intervals hold the true ratio, and pairs cancel what they share."""
    chance, held = random.Random(1), 0
    for _ in range(200):
        ours = [chance.lognormvariate(math.log(0.8), 0.1) for _ in range(15)]
        other = [chance.lognormvariate(0.0, 0.1) for _ in range(15)]
        found = statistics.ratio(ours, other)
        held += found.low <= 0.8 <= found.high
    assert 180 <= held <= 200
    rounds = [chance.lognormvariate(0.0, 0.5) for _ in range(15)]
    paired = statistics.ratio([0.8 * x for x in rounds], rounds)
    assert paired.high - paired.low < 1e-12 < paired.value == pytest.approx(0.8)
    apart = statistics.independent_ratio([0.8 * x for x in rounds], rounds)
    assert apart.high - apart.low > 0.1


def test_the_median_and_samples_that_are_none():
    assert statistics.median([3.0, 1.0, 2.0]).value == 2.0
    for samples in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite"):
            statistics.median(samples)


@pytest.mark.parametrize("seed", [0, 3, 9])  # with 3 and 9 some come after the last of ours
def test_every_variant_runs_once_a_round_in_changing_order(monkeypatch, seed):
    monkeypatch.setattr(timing, "SEED", seed)
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in ("ours", "a", "b")}
    found = in_turns(FakeBenchmark(), steps, CPU, seconds=0.0)
    assert {name: len(times) for name, times in found.items()} == {"ours": 5, "a": 5, "b": 5}
    timed = order[6:]  # two warm each up
    assert sorted(timed) == sorted(["ours", "a", "b"] * 5)
    assert found["ours"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    starts = [i for i, name in enumerate(timed) if name == "ours"]
    assert len({b - a for a, b in zip(starts, starts[1:], strict=False)}) > 1, "one fixed order"


def test_peak_memory_sees_what_is_freed_again():
    def step() -> None:
        first = torch.zeros(2**20)
        del first
        torch.zeros(2**18)

    assert peak_memory(step, CPU) == pytest.approx(4 * 2**20, rel=0.01)


def figure(samples, **changes) -> Figure:
    middle = statistics.median(samples)
    found = Figure(*("suite", "f", "cpu", "8", "fp32", "ours"), median=middle.value)
    return replace(found, samples=tuple(samples), machine="m", commit="c", **changes)


def test_csv_round_trip(tmp_path):
    rows = [
        figure([1.0, 2.5], peak_memory=3e9, settings='a, "b"\nc', gate="g", gate_error=0.5),
        Figure("s", "n", "cuda", "8", "bf16", "peer", status="not installed", ratio=None),
    ]
    path = tmp_path / "a.csv"
    path.write_text(as_csv(rows), "utf-8")
    assert read_csv(path) == rows


@pytest.mark.parametrize(
    "old, new", [("schema,", "scheme,"), ("\n1,", "\n2,")], ids=["column", "number"]
)
def test_another_schema_is_refused(tmp_path, capsys, old, new):
    path = tmp_path / "a.csv"
    path.write_text(as_csv([figure([1.0])]).replace(old, new, 1), "utf-8")
    with pytest.raises(SchemaError, match="this version reads schema 1"):
        read_csv(path)
    assert compare.main([str(path), str(path)]) == 2
    assert "Measure again" in capsys.readouterr().err


def noisy(scale: float, seed: int) -> list[float]:
    chance = random.Random(seed)
    return [scale * chance.lognormvariate(0.0, 0.04) for _ in range(20)]


def test_compare_flags_a_slow_down_and_not_noise(tmp_path, capsys):
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    before.write_text(as_csv([figure(noisy(1.0, 1))]), "utf-8")
    for scale, verdict, status in ((1.0, "same", 0), (1.2, "slower", 1), (0.7, "faster", 0)):
        after.write_text(as_csv([figure(noisy(scale, 2))]), "utf-8")
        assert compare.main([str(before), str(after)]) == status
        assert f"\n{verdict}" in capsys.readouterr().out


def test_compare_of_two_machines_goes_by_the_ratio_to_the_peer():
    def rows(seconds: float, ratio: float, machine: str) -> list[Figure]:
        limits = {"ratio": ratio, "ratio_low": 0.98 * ratio, "ratio_high": 1.02 * ratio}
        ours = figure([seconds] * 5)
        peer = replace(figure([seconds / ratio] * 5, **limits), variant="peer")
        return [replace(f, machine=machine) for f in (ours, peer)]

    old = rows(1.0, 0.5, "m")
    ours, peer = compare.changes(old, rows(3.0, 0.5, "n"))
    assert (ours.verdict, peer.verdict, peer.beside) == ("-", "same", 1.0)
    assert compare.changes(old, rows(3.0, 0.7, "n"))[1].verdict == "slower"
    assert "The machines differ (m and n)" in "\n".join(
        compare.lines(old, rows(3.0, 0.5, "n"), 0.05)
    )


def test_compare_names_what_was_lost():
    gone = replace(figure([1.0]), status="red gate", median=None, samples=())
    assert compare.lost([figure([1.0])], [gone]) == ["suite: f, ours: red gate"]
    assert compare.lost([figure([1.0])], []) == ["suite: f, ours: not run"]


def test_runs_never_share_a_file(session):
    other = Session("cpu", True, 1, 0.01, session.results, started=session.started)
    other.commit = session.commit
    assert session.csv != other.csv
    assert {session.csv.parent, other.csv.parent} == {session.results}


def test_the_table_names_ratio_aim_floor_and_what_was_not_measured(bench, session):
    session.card = {
        **{"id": "x", "cpu": "c", "cores": 2, "threads": 2, "flags": [], "memory_gib": 1},
        **{"gpu": "none", "python": "3", "versions": {"torch": "2", "triton": "3"}},
    }
    samples = {"ours": [2.0] * 5, "peer": [4.0] * 5, "gone": Missing()}
    aims = {"peer": 0.4}
    bench.record("f", samples, GREEN, work=Work(bytes=1e9), aims=aims, **WORDS)
    text = "\n".join(render(session))
    assert "0.500 [0.500, 0.500]" in text and "0.4 missed" in text
    assert "50 %" in text and "not installed" in text
    assert {p.suffix for p in session.close()} == {".csv", ".json", ".png"}
