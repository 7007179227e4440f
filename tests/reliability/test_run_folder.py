"""One run per folder, resumed only with the options it began with, nothing ever overwritten."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch

from flex.checkpoint import save_checkpoint
from flex.config import RunConfig
from flex.config_io import config_hash, load_config
from flex.errors import CheckpointError, ConfigError
from flex.run_folder import open_run
from flex.state import TrainState

DATA = "5eed"  # hash of the training examples


@pytest.fixture
def cfg(tmp_path) -> RunConfig:
    return RunConfig(dir=str(tmp_path), name="r")


def changed(cfg: RunConfig, **options) -> RunConfig:
    return RunConfig.model_validate({**cfg.model_dump(), **options})


def checkpoint(folder: Path, step: int) -> Path:
    tensors = {"adapter": {"lora_A": torch.ones(2)}}
    return save_checkpoint(folder / "checkpoints", TrainState(step=step), tensors, {}, 5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def ran(cfg: RunConfig, step: int = 3) -> Path:
    """A run that was stopped at `step`."""
    with open_run(cfg, 0, DATA) as run:
        checkpoint(run.path, step)
        run.metrics.write_text('{"step": 1}\n')
    return run.path


def test_a_new_run_records_its_options_and_surroundings(cfg):
    with open_run(cfg, 0, DATA) as run:
        assert run.resume_from is None and not run.finished
        assert load_config(str(run.path / "config.yaml")) == cfg
        environment = json.loads((run.path / "environment.json").read_text())
        assert environment["config_hash"] == config_hash(cfg) == run.config_hash
        session = environment["sessions"][0]
        assert session["versions"]["torch"] == torch.__version__
        assert session["threads"] == torch.get_num_threads()


def test_continues_from_the_newest_checkpoint(cfg, caplog):
    caplog.set_level(logging.INFO)
    folder = ran(cfg, step=3)
    checkpoint(folder, 7)
    with open_run(cfg, 0, DATA) as run:
        assert run.resume_from.step == 7
        assert len(json.loads((folder / "environment.json").read_text())["sessions"]) == 2
    assert "continues after step 7" in caplog.text


def test_other_versions_are_told_when_resuming(cfg, caplog):
    folder = ran(cfg)
    file = folder / "environment.json"
    file.write_text(file.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    open_run(cfg, 0, DATA).close()
    assert f"torch 1.0 -> {torch.__version__}" in caplog.text


def test_options_that_do_not_change_the_maths_may_change(cfg):
    folder = ran(cfg)
    other = changed(cfg, train={**cfg.train.model_dump(), "log_every": 5})
    with open_run(other, 0, DATA) as run:
        assert run.resume_from.step == 3
    assert load_config(str(folder / "config.yaml")).train.log_every == 5


def test_another_configuration_is_refused_by_name_and_nothing_changes(cfg):
    folder = ran(cfg)
    before = contents(folder)
    other = changed(cfg, seed=5, lora={**cfg.lora.model_dump(), "r": 4})
    with pytest.raises(ConfigError) as error:
        open_run(other, 0, DATA)
    assert "seed 0 -> 5" in error.value.what and "lora.r 8 -> 4" in error.value.what
    assert "name=OTHER" in error.value.fix
    assert contents(folder) == before
    open_run(cfg, 0, DATA).close()  # the refusal let go of the lock


def test_other_data_is_refused_and_nothing_changes(cfg):
    folder = ran(cfg)
    before = contents(folder)
    with pytest.raises(ConfigError, match="the training examples have changed"):
        open_run(cfg, 0, "another")
    assert contents(folder) == before


def test_the_same_data_at_another_place_is_the_same_run(cfg):
    ran(cfg)
    moved = changed(cfg, data={**cfg.data.model_dump(), "path": "elsewhere/rows.jsonl"})
    with open_run(moved, 0, DATA) as run:
        assert run.resume_from.step == 3


def test_an_edited_config_does_not_pass_for_the_original(cfg):
    folder = ran(cfg)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 5"))
    with pytest.raises(ConfigError, match="edited"):
        open_run(changed(cfg, seed=5), 0, DATA)


@pytest.mark.parametrize("trace", ["checkpoints/step-000003", "metrics.jsonl"])
def test_never_refuses_whatever_is_there(cfg, trace):
    folder = ran(cfg)
    for other in {"checkpoints/step-000003", "metrics.jsonl"} - {trace}:
        (folder / other).rename(folder.parent / "elsewhere")
    before = contents(folder)
    with pytest.raises(ConfigError, match="resume=never"):
        open_run(changed(cfg, resume="never"), 0, DATA)
    assert contents(folder) == before


def test_never_accepts_a_run_that_failed_before_its_first_step(cfg):
    open_run(cfg, 0, DATA).close()
    open_run(changed(cfg, resume="never", seed=9), 0, DATA).close()


def test_a_run_without_checkpoint_says_that_it_starts_again(cfg, caplog):
    with open_run(cfg, 0, DATA) as run:
        run.metrics.write_text('{"step": 1}\n')
    with open_run(cfg, 0, DATA) as run:
        assert run.resume_from is None
    assert "starts again at step 0" in caplog.text


def test_a_run_with_only_damaged_checkpoints_does_not_start_again(cfg):
    folder = ran(cfg)
    (folder / "checkpoints/step-000003/adapter.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="all 1 checkpoints"):
            open_run(cfg, 0, DATA)


def test_a_finished_run_says_so(cfg, caplog):
    caplog.set_level(logging.INFO)
    with open_run(cfg, 0, DATA) as run:
        checkpoint(run.path, 9)
        run.finish({"step": 9, "loss": 1.5})
    before = contents(run.path)
    with open_run(cfg, 0, DATA) as again:
        assert again.finished
    assert contents(run.path) == before
    assert "is finished" in caplog.text and "name=OTHER" in caplog.text


def test_other_ranks_touch_nothing(cfg, tmp_path):
    run = open_run(cfg, 1, DATA)
    assert run.path == tmp_path / "r" and run.resume_from is None
    assert list(tmp_path.iterdir()) == []


# ---- the lock ------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(cfg):
    with open_run(cfg, 0, DATA) as run:
        before = contents(run.path)
        with pytest.raises(ConfigError) as error:
            open_run(cfg, 0, DATA)
        assert f"process {os.getpid()}" in error.value.what
        assert contents(run.path) == before
    open_run(cfg, 0, DATA).close()


def test_a_killed_runs_lock_is_free(cfg):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        open_run(cfg, 0, DATA)
        os.write(writer, b"locked")
        signal.pause()
    assert os.read(reader, 6) == b"locked"
    with pytest.raises(ConfigError, match=f"in use by process {child}"):
        open_run(cfg, 0, DATA)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    open_run(cfg, 0, DATA).close()


@pytest.mark.parametrize("name", [".", ".."])
def test_a_name_cannot_leave_the_folder_of_runs(cfg, name):
    with pytest.raises(ConfigError, match="name="):
        open_run(changed(cfg, name=name), 0, DATA)


def test_a_folder_that_cannot_be_made_is_three_parts(cfg, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used") as error:
        open_run(changed(cfg, dir=str(tmp_path / "file")), 0, DATA)
    assert "dir=FOLDER" in error.value.fix
