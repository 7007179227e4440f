"""Where the time of a step goes, beside its floors, and how it grows with the work: waterfall.py, cost_scaling.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Bench, Gate, Missing, Work

sys.path.insert(0, str(Path(__file__).parent))
import cost_scaling
import step_profile
import waterfall

UNSEEN = 0.1  # of the step: what no rule of step_profile.py knows must stay below
AIM = "aim"


def on_cpu(bench: Bench) -> None:
    if bench.device.type != "cpu":
        pytest.skip("parts are told by the CPU profiler's events")


def told(bench: Bench, values: list[float]) -> list[float] | Missing:
    return Missing("not measured: no GPU") if bench.session.lacks_gpu else values


def test_where_the_time_of_a_step_goes(bench: Bench):
    on_cpu(bench)
    model = "shape:tiny" if bench.tiny else "smollm2-135m"
    mbpp = bench.config.getoption("--mbpp")
    options = [f"kernels.impl={bench.impl}"]
    if bench.impl == "triton":  # which has no flat transform
        options.append("penalty.transform=axis")
    cfg = waterfall.config(mbpp, model, options)
    found = step_profile.profile(cfg, steps=1)
    work, shares = waterfall.floors(found, cfg), found.shares()
    shape = f"{model.removeprefix('shape:')}, {'MBPP' if mbpp else 'built-in tasks'}, 16 a step"
    assert math.isfinite(found.loss)
    # Python between the operators and what no rule knows; the tiny model is all overhead
    limit = 1.0 if bench.tiny else UNSEEN
    gate = Gate("share of the step that no part explains", shares["rest"], limit)
    for part in step_profile.PARTS:
        bench.record(
            f"step: {part}",
            {"ours": told(bench, [shares[part] * found.average])},
            gate,
            work=work.get(part, Work()),
            shape=shape,
            dtype="bf16",
            settings={"ours": f"{shares[part]:.2%} of {found.average:.2f} s; under the profiler"},
        )
    for part, aim in waterfall.AIMS.items():
        bench.record(
            f"share of the step: {part}",
            {"ours": told(bench, [shares[part] / aim]), AIM: told(bench, [1.0])},
            gate,
            unit="1",
            shape=shape,
            dtype="bf16",
            aims={AIM: 1.0},
            settings={"ours": f"{shares[part]:.2%}, as a share of the {aim:.0%} aimed at"},
        )


@pytest.mark.parametrize("axis", list(cost_scaling.AXES))
def test_how_the_cost_grows(bench: Bench, axis):
    on_cpu(bench)
    model = "shape:tiny" if bench.tiny or bench.session.lacks_gpu else "shape:small"
    centre = cost_scaling.Size(32, 2) if bench.tiny else cost_scaling.Size()
    sizes = {"document length": (16, 32), "documents a batch": (1, 2)} if bench.tiny else {}
    if bench.tiny:
        sizes = {"rank": (4, 8), "adapted modules a layer": (1, 2), **sizes}
    rounds = 1 if bench.tiny else 3
    series = cost_scaling.grow(model, axis, rounds, centre, sizes.get(axis, ()))
    # Work is done: more of it never takes less memory.
    shrinks = max(a / b for a, b in zip(series.peak_bytes, series.peak_bytes[1:], strict=False))
    gate = Gate("memory of a size over that of the next", shrinks, 1.02)
    low, high = series.sizes[0], series.sizes[-1]
    for what, values, fitted in (
        ("time", series.exponents(), series.time_fit()),
        ("memory", [series.memory_fit().exponent], series.memory_fit()),
    ):
        bench.record(
            f"{what} ~ ({axis})^x",
            {"ours": told(bench, values)},
            gate,
            unit="1",
            shape=f"{model.removeprefix('shape:')}, {low} to {high}",
            dtype="bf16",
            settings={"ours": f"x = {fitted}"},
        )
