"""Trackers are asked for, checked before training, and never end a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flex import trackers
from flex.config import RunConfig
from flex.errors import ConfigError
from flex.trackers import Tracker, open_trackers


def test_no_tracker_needs_nothing(tmp_path):
    assert open_trackers([], tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_not_installed_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._INSTALLED, "mlflow", lambda: False)
    with pytest.raises(ConfigError) as error:
        open_trackers(["mlflow"], tmp_path, {})
    assert "mlflow is not installed" in error.value.what
    assert "[track]" in error.value.fix
    assert list(tmp_path.iterdir()) == []


def test_one_that_does_not_start_is_an_error_before_training(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no server")

    monkeypatch.setattr(trackers, "_build", fail)
    monkeypatch.setitem(trackers._INSTALLED, "wandb", lambda: True)
    with pytest.raises(ConfigError, match="no server"):
        open_trackers(["wandb"], tmp_path, {})


class Fake:
    name = "fake"

    def __init__(self, fail_at=None):
        self.fail_at, self.seen, self.finished = fail_at, [], False

    def log(self, values, step):
        if step == self.fail_at:
            raise ConnectionError("server gone")
        self.seen.append((step, values))

    def finish(self):
        self.finished = True


def test_a_failing_tracker_is_dropped_with_a_count_and_the_run_goes_on(caplog):
    inner = Fake(fail_at=3)
    tracker = Tracker(inner)
    for step in range(1, 8):
        tracker.log({"step": step, "loss": 1.0}, step)
    tracker.finish()
    assert inner.seen == [(1, {"loss": 1.0}), (2, {"loss": 1.0})] and inner.finished
    first, last = (r.message for r in caplog.records)
    assert "fake dropped at step 3" in first and "server gone" in first
    assert "missed 5 records" in last


def test_wandb_stays_offline_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert trackers._build("wandb", tmp_path, 0).init_kwargs["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert trackers._build("wandb", tmp_path, 0).init_kwargs["mode"] == "online"


def test_other_ranks_process_group_is_never_started_here(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="process group"):
        open_trackers(["tensorboard"], tmp_path, {})
    assert not torch.distributed.is_initialized()


def test_nested_options_become_flat_names():
    flat = dict(trackers._flat(RunConfig().model_dump()))
    assert flat["optim.curvature.every"] == 10
    assert flat["lora.targets"] == "('gate_proj', 'up_proj', 'down_proj')"
    assert flat["model.revision"] == "None"
    assert all(isinstance(v, (bool, int, float, str)) for v in flat.values())


# In a process of its own: accelerate's state is a singleton that must not leak into other tests.
TENSORBOARD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(3)
from flex.config import RunConfig
from flex.trackers import open_trackers
(tracker,) = open_trackers(["tensorboard"], Path(sys.argv[1]), RunConfig().model_dump())
for step in (1, 2):
    tracker.log({"step": step, "loss": 2.0 / step, "skipped": False}, step)
tracker.finish()
assert torch.get_num_threads() == 3 and not torch.distributed.is_initialized()

import json
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(str(Path(sys.argv[1]) / "tensorboard")).Reload()
print(json.dumps([(e.step, e.value) for e in events.Scalars("loss")]))
"""


def test_tensorboard_holds_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    done = subprocess.run(
        [sys.executable, "-c", TENSORBOARD, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[1, 2.0], [2, 1.0]]
