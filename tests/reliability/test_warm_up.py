"""Under ZeRO, two processes: training is the same to the bit with the warm-up and without."""

from pathlib import Path

import pytest
import torch

from tests.runs import TINY, checkpoint, losses, run_well, write_rows


@pytest.mark.parametrize("engine", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_a_warm_up_changes_no_bit_under_zero(tmp_path: Path, engine: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    options = (*TINY, f"dir={tmp_path}", f"data.path={rows}", "train.steps=3", "train.batch_size=8")
    for wish in ("always", "never"):
        run_well(*options, f"name={wish}", f"train.warm_up_longest={wish}", engine=engine)
    ours, theirs = tmp_path / "always", tmp_path / "never"
    assert losses(ours) == losses(theirs)
    for stem in ("adapter", "optimizer"):
        found, expected = checkpoint(ours, 3, stem), checkpoint(theirs, 3, stem)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
