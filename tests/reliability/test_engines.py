"""One run on every engine: plain PyTorch and ZeRO 0-3 agree, and what comes out is the same adapter.

A run of two processes imports everything twice and takes half a minute of a core. Quick: every
engine with Sophia, whose state is compared too. Slow: the same with AdamW, started by DeepSpeed's
launcher, and the variants.
"""

import functools
import json

import pytest
import torch

from tests.runs import ROOT, TINY, checkpoint, losses, run, run_well, write_rows

STEPS = 20
# At this rate rounding stays rounding: fp32 runs differ by 3e-7 in the curvature. At 1e-2 Sophia's
# updates overshoot and grow the last bit to 1e-4, or until one sampled label differs (6e-2).
OPTIMIZERS = {"sophia": "optim.lr=3e-3", "adamw": "optim.lr=3e-3"}
# fp32, one micro-batch per process: what differs is only who holds which part. Dropout hides the same everywhere.
OPTIONS = (
    *TINY,
    "lora.dropout=0.1",
    "optim.curvature.every=4",
    f"train.steps={STEPS}",
    "train.batch_size=8",
)


def start(folder, rows, name, optimizer, *more, **where):
    options = (f"dir={folder}", f"name={name}", f"data.path={rows}", f"optim.name={optimizer}")
    run_well(*OPTIONS, *options, OPTIMIZERS[optimizer], *more, **where)
    return folder / name


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, rows):
    """The run in one process, by optimizer; each is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def get(optimizer):
        return start(folder, rows, optimizer, optimizer)

    return get


def assert_same_run(ours, reference, optimizer):
    a, b = losses(ours), losses(reference)
    assert len(a) == len(b) == STEPS
    assert b[-1] < b[0] - 0.1, "the reference learns nothing, so agreement proves nothing"
    for step, (x, y) in enumerate(zip(a, b, strict=True), start=1):
        assert x == pytest.approx(y, rel=1e-4), f"step {step}"
    for stem in ("adapter", "optimizer") if optimizer == "sophia" else ("adapter",):
        mine, theirs = (checkpoint(folder, STEPS, stem) for folder in (ours, reference))
        assert mine.keys() == theirs.keys()
        key = "exp_avg_sq" if stem == "optimizer" else ""
        parts = [name for name in theirs if name.endswith(key)]
        difference = torch.cat([(mine[n] - theirs[n]).flatten() for n in parts]).norm()
        size = torch.cat([theirs[n].flatten() for n in parts]).norm()
        assert size > 0 and difference <= 1e-4 * size, (stem, float(difference / size))


@pytest.mark.parametrize("optimizer", ["sophia", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3"])
def test_two_processes_equal_one(tmp_path, rows, plain, engine, optimizer):
    ours = start(tmp_path, rows, "ours", optimizer, engine=engine, launcher=optimizer == "adamw")
    assert_same_run(ours, plain(optimizer), optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2_offload", "zero3_offload", "zero3_offload_param"])
def test_offload_changes_nothing(tmp_path, rows, plain, engine):
    ours = start(tmp_path, rows, "ours", "sophia", engine=engine)
    assert_same_run(ours, plain("sophia"), "sophia")


@pytest.mark.slow
def test_a_second_copy_per_node_changes_nothing(tmp_path, rows, plain):
    """hpZ, with both processes as one node."""
    config = json.loads((ROOT / "ds_configs/zero3_hpz.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(config))
    ours = start(tmp_path, rows, "ours", "sophia", engine=str(tmp_path / "hpz"))
    assert_same_run(ours, plain("sophia"), "sophia")


@pytest.mark.parametrize("engine", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_the_decoupled_penalty_moves_whole_matrices_on_partitions(tmp_path, rows, engine):
    options = ("penalty.coupling=decoupled", "penalty.weight=5.0")
    reference = start(tmp_path, rows, "plain", "adamw", *options)
    ours = start(tmp_path, rows, "ours", "adamw", *options, engine=engine)
    assert_same_run(ours, reference, "adamw")


def test_accumulation_is_the_same_mathematics(tmp_path, rows, plain):
    ours = start(tmp_path, rows, "ours", "adamw", "train.accumulation=4")
    assert_same_run(ours, plain("adamw"), "adamw")


@pytest.mark.slow  # tests/flex/test_dry_run.py has the refusal itself
def test_eight_bit_adamw_is_refused_under_partitioning(tmp_path, rows):
    options = (f"dir={tmp_path}", "name=run", f"data.path={rows}", "optim.name=adamw8bit")
    done = run(*OPTIONS, *options, engine="zero1")
    assert done.returncode != 0
    assert "optim.name=adamw8bit with ZeRO stage 1-3" in done.stderr and "fix:" in done.stderr
    assert not (tmp_path / "run").exists()
