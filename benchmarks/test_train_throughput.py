"""Whole training runs in processes of their own: FLeX against the best known set-up of each peer (contestants.py).

A sample is a step's seconds per target token; the n-th sample of all variants is the same step on the same examples.
`train_throughput.py` searches over all set-ups, and is how the best known ones are found.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness import Bench, Gate, Missing

sys.path.insert(0, str(Path(__file__).parent))
import contestants
import train_throughput as contest


@pytest.fixture
def found(bench: Bench, tmp_path, monkeypatch):
    """Runs of the fast set by side, and words for sides that have none."""
    if bench.session.lacks_gpu:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    steps = 2 if bench.tiny else bench.config.getoption("--steps")
    mbpp = bench.config.getoption("--mbpp")
    model = "shape:tiny" if bench.tiny else contestants.SMOLLM2
    job = contestants.make_job(tmp_path, steps, mbpp and mbpp.resolve(), model)
    runs: dict[str, contestants.Run | Missing] = {}
    for setup in contest.fast_setups():
        if bench.tiny:
            setup = replace(setup, processes=1)
        why = contestants.missing(setup, job)
        runs[setup.side] = Missing(why) if why else contestants.measure(setup, job)
    return runs


def test_tokens_per_second_of_whole_runs(bench: Bench, found):
    ours = found["flex"]
    runs = {side: run for side, run in found.items() if isinstance(run, contestants.Run)}
    aparts = {side: contestants.losses_apart(ours.losses, r.losses) for side, r in runs.items()}
    comparable = {side for side, apart in aparts.items() if apart <= contestants.LOSS_LIMIT}
    assert "flex" in comparable
    samples, memory, settings, aims = {}, {}, {}, {}
    setups = {setup.side: setup for setup in contest.fast_setups()}
    for side, run in found.items():
        name = "ours" if side == "flex" else contest.TITLES[side]
        if isinstance(run, Missing) or side in comparable:
            no_time = bench.tiny and bench.session.lacks_gpu
            samples[name] = Missing("not measured: no GPU") if no_time else run
        else:
            samples[name] = Missing(f"not comparable: losses {aparts[side]:.1%} apart")
        settings[name] = f"{setups[side].name}: {setups[side].settings}"
        if isinstance(samples[name], contestants.Run):
            samples[name], memory[name] = run.seconds_per_target, float(run.peak_bytes)
        if side in contest.AIMS:
            aims[name] = contest.AIMS[side]
    gate = Gate(
        "step losses apart from ours, of those that are told",
        max((aparts[side] for side in comparable), default=math.inf),
        contestants.LOSS_LIMIT,
    )
    bench.record(
        "training, seconds a target token",
        samples,
        gate,
        unit="s/token",
        shape=shape(bench),
        dtype="bf16",
        aims=aims,
        memory=memory,
        settings=settings,
    )


def shape(bench: Bench) -> str:
    data = "MBPP" if bench.config.getoption("--mbpp") else "built-in tasks"
    return f"{'tiny' if bench.tiny else 'smollm2-135m'}, {data}, r 8 on gate/up/down"
