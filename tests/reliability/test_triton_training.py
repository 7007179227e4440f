"""Whole runs on the Triton kernels, in the interpreter: as close to fp64 as the torch implementation is."""

import functools
import os
from pathlib import Path

import pytest
import torch

from tests.oracle import assert_within_budget
from tests.runs import TINY, checkpoint, losses, run_well, write_rows

STEPS = 10
OPTIONS = (
    *(option for option in TINY if not option.startswith("model.dtype")),
    "lora.dropout=0.1",
    "penalty.transform=axis",
    "optim.lr=3e-3",
    "optim.curvature.every=4",
    f"train.steps={STEPS}",
    "train.batch_size=4",
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def start(folder: Path, rows: Path, optimizer: str, impl: str, dtype: str, **where) -> Path:
    name = f"{optimizer}-{impl}-{dtype}"
    options = (f"dir={folder}", f"name={name}", f"data.path={rows}", f"optim.name={optimizer}")
    run_well(*OPTIONS, *options, f"kernels.impl={impl}", f"model.dtype={dtype}", **where)
    return folder / name


@pytest.fixture(scope="module")
def truth(tmp_path_factory, rows):
    """The torch implementation over an fp64 base, in one process, by optimizer, when asked for."""
    folder = tmp_path_factory.mktemp("truth")

    @functools.cache
    def get(optimizer: str) -> Path:
        return start(folder, rows, optimizer, "torch", "float64")

    return get


def assert_close_run(ours: Path, eager: Path, truth: Path) -> None:
    curves = [torch.tensor(losses(folder), dtype=torch.float64) for folder in (ours, eager, truth)]
    assert curves[2][-1] < curves[2][0] - 0.05, "nothing is learnt, so agreement proves nothing"
    assert_within_budget(curves[0], curves[1].float(), curves[2], "losses")
    a, b, c = (checkpoint(folder, STEPS, "adapter") for folder in (ours, eager, truth))
    assert a.keys() == b.keys() == c.keys()
    for kind in ("lora_A", "lora_B"):
        whole = [
            torch.cat([x[name].flatten() for name in sorted(x) if kind in name]) for x in (a, b, c)
        ]
        assert_within_budget(whole[0], whole[1], whole[2].double(), kind)


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "sophia"])
@pytest.mark.parametrize("engine", [None, "zero2"])
def test_ten_steps_on_triton_are_as_exact_as_on_torch(tmp_path, rows, truth, optimizer, engine):
    runs = [
        start(tmp_path, rows, optimizer, impl, "float32", engine=engine)
        for impl in ("triton", "torch")
    ]
    assert_close_run(*runs, truth(optimizer))
