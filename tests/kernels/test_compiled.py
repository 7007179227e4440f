"""The compile matrix: every shipped configuration on every target, against the golden file.

What a binary depends on is recorded as a digest. While it is the same, so is the binary; of every
Triton function some are compiled all the same. The slow test compiles all.
"""

import re
import subprocess
import sys

import pytest

from flex import kernel_report
from flex.kernel_report import (
    Golden,
    Sources,
    compare_with_golden,
    compiled_resources,
    current_sources,
    read_golden,
    write_golden,
)
from flex.kernels.compiled import (
    SHARED_LIMIT,
    TARGETS,
    Resources,
    all_shipped,
    binaries,
    problems,
    representative,
)
from flex.kernels.runtime import Shipped

TO_ACCEPT = "\nto accept: make kernels-report ARGS=--update"
GOOD = {"registers": 100, "spills": 0, "stack": 0, "shared": 0, "mma": 4, "wide_loads": 2}
REST = {"tensor_memory": 0, "narrow_loads": 0, "narrow_loops": 0, "instructions": 9}


@pytest.fixture(scope="module")
def golden():
    return read_golden()


@pytest.fixture(scope="module")
def sources():
    return current_sources()


@pytest.fixture(scope="module")
def compiled(golden, sources):
    """Of every function one binary on each target; all of them if another Triton compiles."""
    if sources.triton != golden.triton:
        print(f"Triton {sources.triton} compiles all; recorded is {golden.triton}")
        return compiled_resources()
    return compiled_resources(representative(golden.resources))


@pytest.fixture(scope="module")
def rows(golden, compiled):
    """The whole matrix: what is recorded, and in its place what was compiled just now."""
    fresh = {f"{row['name']} {row['target']}": row for row in compiled}
    found = []
    for key, config, target in binaries():
        if key in fresh:
            found.append(fresh[key])
        elif key in golden.resources:
            fields = {k: v for k, v in golden.resources[key].items() if k != "reason"}
            wrong = problems(config, target, Resources(**fields))
            found.append({"name": config.name, "target": target, "problems": wrong} | fields)
    return found


def test_the_golden_file_was_made_from_these_sources(golden, sources):
    assert golden.triton == sources.triton, "Triton's release changed" + TO_ACCEPT
    stale, gone = golden.stale(sources), golden.gone(sources)
    lines = [f"{key}: new, or its sources changed since it was recorded" for key in stale]
    lines += [f"{key}: recorded, but no longer shipped" for key in gone]
    assert not lines, "\n".join(lines) + TO_ACCEPT


def test_a_binary_of_every_function_and_target_is_as_recorded(compiled, golden):
    found = compare_with_golden(compiled, golden.resources)
    assert not found, "\n".join(found) + TO_ACCEPT
    by_name = {config.name: config for config in all_shipped()}
    functions = {(by_name[row["name"]].fn, row["target"]) for row in compiled}
    assert functions == {(config.fn, target) for _, config, target in binaries()}


@pytest.mark.slow
def test_every_binary_is_as_recorded(golden):
    rows = compiled_resources()
    assert {f"{row['name']} {row['target']}" for row in rows} == golden.resources.keys()
    found = compare_with_golden(rows, golden.resources)
    assert not found, "\n".join(found) + TO_ACCEPT


def test_what_is_recorded_is_within_every_bound(rows, golden):
    assert not compare_with_golden(rows, golden.resources)


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
    configs = {c.name: c for c in all_shipped() if c.name.startswith("spectral_penalty/")}
    assert {c.name for c in configs.values() if not c.wide_loads} == {"spectral_penalty/sum"}
    # "<length>-<label>" and, where it is not Hopper's, "-<target>"
    pairs = [(n, re.sub(r"(ramp|edge)", r"\1-start", n)) for n in configs if "-start" not in n]
    checked = [(n, s, t) for n, s in pairs if s != n for t in configs[n].targets]
    assert len(checked) == 2 * 12 + 6 + 12
    for name, with_start, target in checked:
        constants = configs[name].constants
        vectors, blocks = (2, 1) if constants["SPLIT"] == 1 else (1, constants["SPLIT"])
        if constants["Q1"] * constants["Q2"] < 4 * 256:
            assert name.endswith("edge-sm_80")  # two elements a thread: 64 bits
            continue
        elements = vectors * blocks * constants["q1"] * constants["q2"]
        added = wide[with_start, target] - wide[name, target]
        assert added * 256 * 4 >= elements, (name, target)


def test_every_kernel_is_compiled_for_every_target(rows):
    """For Hopper and Blackwell every configuration, but those that are another target's own."""
    compiled = {(r["name"], r["target"]) for r in rows}
    reached = {}
    for config in all_shipped():
        reached.setdefault(config.fn, set()).update(config.targets)
        assert all((config.name, t) in compiled for t in config.targets)
        if not config.name.endswith(("-sm_80", "-gfx942")):
            assert {"sm_90", "sm_100"} <= set(config.targets)
    assert all(targets == set(TARGETS) for targets in reached.values())


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


def test_the_golden_file_has_every_reason_filled_in(golden):
    for key, entry in golden.resources.items():
        if entry["spills"] or entry["stack"]:
            assert entry.get("reason"), f"{key} spills and gives no reason"


# --- what has to be compiled anew


NOW = Sources("3.0", {"a sm_90": "1", "b sm_90": "2"})


@pytest.mark.parametrize(
    ("recorded", "stale", "gone"),
    [
        (Golden("3.0", {"a sm_90": GOOD, "b sm_90": GOOD}, NOW.digests), [], []),
        (Golden("2.9", {"a sm_90": GOOD, "b sm_90": GOOD}, NOW.digests), ["a", "b"], []),
        (
            Golden("3.0", {"a sm_90": GOOD, "b sm_90": GOOD}, {**NOW.digests, "b sm_90": "3"}),
            "b",
            [],
        ),
        (Golden("3.0", {"a sm_90": GOOD}, NOW.digests), ["b"], []),
        (
            Golden("3.0", dict.fromkeys(("a sm_90", "b sm_90", "c sm_90"), GOOD), NOW.digests),
            [],
            "c",
        ),
        (Golden("", {}, {}), ["a", "b"], []),
    ],
    ids=["none", "triton", "changed", "new", "gone", "nothing recorded"],
)
def test_stale_and_gone(recorded, stale, gone):
    assert recorded.stale(NOW) == [f"{key} sm_90" for key in stale]
    assert recorded.gone(NOW) == [f"{key} sm_90" for key in gone]


def test_an_update_keeps_what_did_not_change(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_report, "GOLDEN", tmp_path / "golden.json")
    rows = [{"name": n, "target": "sm_80", "problems": ["spills"], **GOOD} for n in "abc"]
    write_golden(rows, Sources("3.0", dict.fromkeys(["a sm_80", "b sm_80", "c sm_80"], "1")))
    text = kernel_report.GOLDEN.read_text().replace(
        '"wide_loads": 2', '"wide_loads": 2, "reason": "why"'
    )
    kernel_report.GOLDEN.write_text(text)
    changed = {**rows[1], "registers": 7}
    write_golden([changed], Sources("3.0", {"a sm_80": "1", "b sm_80": "2"}))
    excused = {**GOOD, "reason": "why"}
    after = read_golden()
    assert after.resources == {"a sm_80": excused, "b sm_80": {**excused, "registers": 7}}
    assert after.digests == {"a sm_80": "1", "b sm_80": "2"} and after.triton == "3.0"


def test_representatives_are_the_largest_and_elsewhere_the_shortest(golden):
    chosen = set(representative(golden.resources))
    by_function = {}
    for key, config, target in binaries():
        by_function.setdefault(config.fn, {}).setdefault(target, []).append(key)
    for by_target in by_function.values():
        found = {target: chosen & set(keys) for target, keys in by_target.items()}
        assert all(len(keys) == 1 for keys in found.values())
        most = max(golden.resources[k]["registers"] for keys in by_target.values() for k in keys)
        assert most in [golden.resources[k]["registers"] for keys in found.values() for k in keys]
    assert len(representative({})) == len(chosen)
