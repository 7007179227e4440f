"""A run that was cut goes on in a new process and ends bit for bit like the run that was not."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from flex.metrics_file import read_metrics
from tests.runs import (
    ROOT,
    TINY,
    checkpoint,
    command,
    losses,
    one_at_a_time,
    run,
    run_well,
    write_rows,
)

STEPS = 12
TIMINGS = {
    *("seconds", "elapsed_seconds", "eta_seconds", "memory_bytes"),
    *("tokens_per_second", "positions_per_second"),
}


def options(folder, name="run"):
    """Sophia that refreshes every third step, dropout on, two micro-batches: all that a resume could get wrong."""
    return (
        *TINY,
        f"dir={folder}",
        f"name={name}",
        f"data.path={folder / 'rows.jsonl'}",
        "lora.dropout=0.2",
        "optim.lr=1e-2",
        "optim.curvature.every=3",
        f"train.steps={STEPS}",
        "train.batch_size=8",
        "train.accumulation=2",
        "train.eval_every=4",
        "train.save_every=1",
        "train.keep=20",
    )


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    write_rows(folder / "rows.jsonl")
    run_well(*options(folder))
    assert losses(folder / "run")[-1] < losses(folder / "run")[0]
    return folder


def cut_after(uncut, folder, step):
    """The uncut run's folder as it was when a crash came during update `step` + 1."""
    shutil.copy(uncut / "rows.jsonl", folder)
    shutil.copytree(uncut / "run", folder / "run", ignore=shutil.ignore_patterns(".lock"))
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(folder / f"run/checkpoints/step-{later:06d}")
    shutil.rmtree(folder / "run/adapter")
    (folder / "run/finished.json").unlink()


def assert_same_end(folder, uncut):
    last = f"run/checkpoints/step-{STEPS:06d}"
    for file in ("adapter.safetensors", "optimizer.safetensors", "penalty.safetensors"):
        assert (folder / last / file).read_bytes() == (uncut / last / file).read_bytes(), file
    a, b = (
        [
            {k: v for k, v in r.items() if k not in TIMINGS}
            for r in read_metrics(x / "run/metrics.jsonl")
        ]
        for x in (folder, uncut)
    )
    assert a == b
    ours, theirs = (
        json.loads((x / last / "state.json").read_bytes())["state"] for x in (folder, uncut)
    )
    assert {k: v for k, v in ours.items() if k != "seconds"} == {
        k: v for k, v in theirs.items() if k != "seconds"
    }
    exported = "run/adapter/adapter_model.safetensors"
    assert (folder / exported).read_bytes() == (uncut / exported).read_bytes()


# refreshes come before updates 1, 4, 7 and 10: quick are the cuts right before and right after one,
# and one between that is also an evaluation's step
QUICK = {6, 7, 8}


@pytest.mark.parametrize(
    "step",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in range(1, STEPS)],
)
def test_bit_equal_after_a_cut_at_any_step(uncut, tmp_path, step):
    cut_after(uncut, tmp_path, step)
    run_well(*options(tmp_path))
    assert_same_end(tmp_path, uncut)


def wait_for_step(process, folder, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(r["step"] >= step for r in read_metrics(folder / "run/metrics.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: status {process.poll()}")


@pytest.mark.parametrize(("engine", "number"), [(None, signal.SIGKILL), ("zero3", signal.SIGTERM)])
def test_bit_equal_after_a_signal(uncut, tmp_path, engine, number):
    shutil.copy(uncut / "rows.jsonl", tmp_path)
    all_lines = (*options(tmp_path), "train.log_every=1")
    where = {"engine": engine}
    if engine is not None:  # its own reference: sums over processes round differently
        uncut = tmp_path / "reference"
        uncut.mkdir()
        shutil.copy(tmp_path / "rows.jsonl", uncut)
        run_well(*options(uncut), **where)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with one_at_a_time() if engine else contextlib.nullcontext():
        process = subprocess.Popen(
            command(*all_lines, **where),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for_step(process, tmp_path, 5)
            asked = time.monotonic()
            os.killpg(process.pid, number)
            process.wait(timeout=60)
            took = time.monotonic() - asked
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert took < 10
    assert not (tmp_path / "run/finished.json").exists()
    run_well(*all_lines, **where)
    assert_same_end(tmp_path, uncut)


def test_a_finished_run_is_left_alone(uncut):
    before = {p: p.stat().st_mtime_ns for p in (uncut / "run").rglob("*") if p.name != ".lock"}
    done = run(*options(uncut))
    assert done.returncode == 0 and "finished" in done.stderr
    assert before == {
        p: p.stat().st_mtime_ns for p in (uncut / "run").rglob("*") if p.name != ".lock"
    }


@pytest.mark.slow
def test_a_run_goes_through_engines_and_world_sizes(tmp_path):
    """Two processes under ZeRO-2, one, two under ZeRO-3, one: as if it had been one all along.

    Not bit-equal, since sums over processes round differently.
    """
    others = {
        "optim.lr": 3e-3,  # at 1e-2 updates overshoot and grow the last bit
        # curvature squares micro-batches over all processes, and two would be cut otherwise
        "train.accumulation": 1,
    }

    def train(folder, engine):
        settings = dict(o.split("=") for o in options(folder)) | others
        run_well(*(f"{key}={value}" for key, value in settings.items()), engine=engine)

    folders = [tmp_path / name for name in ("alone", "zero2", "plain", "zero3", "end")]
    for folder in folders[:2]:
        folder.mkdir()
        write_rows(folder / "rows.jsonl")
    train(folders[0], None)
    train(folders[1], "zero2")
    legs = zip(folders[1:], folders[2:], (3, 6, 9), (None, "zero3", None), strict=False)
    for before, after, step, engine in legs:
        after.mkdir()
        cut_after(before, after, step)
        train(after, engine)
    alone, end = folders[0], folders[-1]
    assert losses(end / "run") == pytest.approx(losses(alone / "run"), rel=1e-4)
    for stem in ("adapter", "optimizer", "penalty"):
        ours, theirs = (checkpoint(f / "run", STEPS, stem) for f in (end, alone))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), (stem, name)
