"""The compile matrix: every shipped configuration on every target, against the golden file."""

import json
import subprocess
import sys

import pytest

from flex.kernel_report import compare_with_golden, compiled_resources, read_golden
from flex.kernels.compiled import SHARED_LIMIT, TARGETS, Resources, all_shipped, problems
from flex.kernels.runtime import Shipped

GOOD = {"registers": 100, "spills": 0, "stack": 0, "shared": 0, "mma": 4, "wide_loads": 2}
REST = {"tensor_memory": 0, "narrow_loads": 0, "narrow_loops": 0, "instructions": 9}


@pytest.fixture(scope="module")
def rows():
    return compiled_resources()


def test_every_binary_is_as_recorded(rows):
    found = compare_with_golden(rows, read_golden())
    assert not found, "\n".join(found) + "\nto accept: make kernels-report ARGS=--update"


def test_nothing_spills_on_hopper_and_blackwell(rows):
    spilling = [r for r in rows if r["target"] in ("sm_90", "sm_100") and r["spills"] + r["stack"]]
    assert not spilling


def test_shared_memory_is_within_each_chips_limit(rows):
    assert not [r for r in rows if r["shared"] > SHARED_LIMIT[r["target"]]]


def test_what_claims_a_dot_uses_tensor_cores(rows):
    claims = {config.name for config in all_shipped() if config.mma}
    checked = [r for r in rows if r["name"] in claims and r["target"] == "sm_90"]
    assert checked and all(r["mma"] for r in checked)


def test_rows_of_the_penalty_are_read_128_bits_at_a_time(rows):
    """Tables are, anyhow; so count what the start adds: 256 threads take 4 elements at once."""
    wide = {(r["name"], r["target"]): r["wide_loads"] for r in rows}
    configs = [c for c in all_shipped() if c.name.startswith("spectral_penalty/")]
    assert {c.name for c in configs if not c.wide_loads} == {"spectral_penalty/sum"}
    checked = [
        (c, t) for c in configs if f"{c.name}-start" in {d.name for d in configs} for t in c.targets
    ]
    assert len(checked) == 18
    for c, target in checked:
        vectors, blocks = (2, 1) if c.constants["SPLIT"] == 1 else (1, c.constants["SPLIT"])
        elements = vectors * blocks * c.constants["q1"] * c.constants["q2"]
        added = wide[f"{c.name}-start", target] - wide[c.name, target]
        assert added * 256 * 4 >= elements, (c.name, target)


def test_every_kernel_is_compiled_for_both_hopper_and_blackwell(rows):
    compiled = {(r["name"], r["target"]) for r in rows}
    for config in all_shipped():
        assert {(config.name, t) for t in ("sm_90", "sm_100")} <= compiled


# --- the checker itself


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 1}, "1 spill"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 10**6}, "over the limit"),
        ({"mma": 0}, "no tensor-core"),
        ({"wide_loads": 0}, "no 128-bit"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_bad_binary_is_a_problem(target, change, message):
    config = Shipped("k", None, {}, mma=True)
    assert not problems(config, target, Resources(**REST, **GOOD))
    found = problems(config, target, Resources(**REST, **{**GOOD, **change}))
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 120}, "registers 120, recorded 100"),
        ({"spills": 3}, "spills 3, recorded 0"),
        ({"shared": 1024}, "shared 1024, recorded 0"),
        ({"mma": 0}, "mma 0, recorded 4"),
        ({"wide_loads": 0}, "wide_loads 0, recorded 2"),
        ({"wide_loads": 1}, "wide_loads 1, recorded 2"),
        ({"problems": ["no tensor-core instruction"]}, "no tensor-core"),
        ({"name": "other"}, "not in the golden file"),
    ],
)
def test_worse_than_recorded_is_found(change, message):
    row = {"name": "k", "target": "sm_90", "problems": [], **GOOD}
    golden = {"k sm_90": GOOD}
    assert not compare_with_golden([row], golden)
    assert message in "\n".join(compare_with_golden([{**row, **change}], golden))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_reason_excuses_spills_of_old_chips_only(target):
    row = {"name": "k", "target": target, "problems": ["4 spill instructions"], **GOOD}
    found = compare_with_golden([row], {f"k {target}": {**GOOD, "reason": "why"}})
    assert bool(found) == (target != "sm_80")


def test_what_is_no_longer_shipped_is_found():
    assert "no longer shipped" in compare_with_golden([], {"k sm_90": GOOD})[0]


def test_interpreted_functions_are_refused():
    code = "from flex.kernels.compiled import *; compile_shipped(Shipped('k', None, {}), 'sm_90')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"TRITON_INTERPRET": "1", "PATH": "", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "unset it before starting Python" in done.stderr


def test_the_golden_file_has_every_reason_filled_in():
    for key, entry in read_golden().items():
        if entry["spills"] or entry["stack"]:
            assert entry.get("reason"), f"{key} spills and gives no reason"
    assert json.dumps(read_golden())
