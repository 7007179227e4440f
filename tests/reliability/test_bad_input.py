"""Bad input is an error of three parts before any training step, and nothing that exists is overwritten."""

import json
import os
import subprocess
import sys

import pytest

from flex import trackers
from flex.commands import main
from flex.step import train_step
from tests.runs import ROOT, TINY, write_rows

GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 12)


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a training step was made")

    monkeypatch.setattr("flex.loop.train_step", refuse)


def fails(capsys, tmp_path, *options):
    """The error of `python -m flex train`; all three parts are there and the run folder is not."""
    given = {option.partition("=")[0] for option in options}
    defaults = [option for option in TINY if option.partition("=")[0] not in given]
    config = tmp_path / "empty.yaml"
    config.write_text("")
    where = [f"dir={tmp_path}", "name=run"]
    status = main(["train", "--config", str(config), *defaults, *where, *options])
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.count("\n  why: ") == error.count("\n  fix: ") == 1, error
    return error[error.index("error: ") :]


def written(tmp_path):
    return [p.name for p in (tmp_path / "run").rglob("*")] if (tmp_path / "run").exists() else None


def jsonl(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"data.path={path}"


LONG = json.dumps({"prompt": "x" * 600, "completion": "y"}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no training"),
        ("\n\n", "no training"),
        ('{"prompt": "a", "compl', "bad.jsonl:1: not JSON"),
        (GOOD * 20 + '{"prompt": "a"}\n', "bad.jsonl:21: missing key: `completion`"),
        (GOOD * 20 + '{"prompt": "a", "completion": 3}\n', "bad.jsonl:21: wrong type"),
        (GOOD * 20 + LONG, "bad.jsonl:21: no target tokens: the prompt alone fills 512 tokens"),
        (GOOD.encode() + b'{"prompt": "\xff", "completion": "b"}\n', "bad.jsonl:2: not UTF-8"),
        (b"\x00\x01\x02", "NUL character"),
    ],
)
def test_data_files(tmp_path, capsys, content, message):
    assert message in fails(capsys, tmp_path, jsonl(tmp_path, content))
    assert written(tmp_path) is None


def test_missing_files_name_the_nearest(tmp_path, capsys, rows):
    error = fails(capsys, tmp_path, f"data.path={tmp_path / 'row.jsonl'}")
    assert "does not exist" in error and f"did you mean {rows}?" in error
    assert main(["train", "--config", str(tmp_path / "nope.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora.r=0"], "lora.r"),
        (["lora.dropout=1"], "lora.dropout"),
        (["penalty.phi_high=1.5"], "penalty.phi_high"),
        (["penalty.phi_low=-0.1"], "penalty.phi_low"),
        (["penalty.threshold=0"], "penalty.threshold"),
        (["penalty.preset=off", "penalty.weight=1"], "preset `off`"),
        (["penalty.target=delta_w"], "no constant curvature"),
        (["optim.lr=-1"], "optim.lr"),
        (["optim.leraning_rate=1"], "did you mean `optim.lr`"),
        (["optim.name=adam"], "optim.name"),
        (["train.batch_size=2", "train.accumulation=4"], "train.batch_size=2 is less than"),
        (["model.name=shape:huge"], "there is no shape:huge"),
        (["deepspeed=ds_configs/zero9.json"], "no file ds_configs/zero9.json"),
    ],
    ids=str,
)
def test_options(tmp_path, capsys, rows, options, message):
    assert message in fails(capsys, tmp_path, f"data.path={rows}", *options)


def test_a_tracker_that_is_not_installed(tmp_path, capsys, rows, monkeypatch):
    monkeypatch.setitem(trackers._INSTALLED, "wandb", lambda: False)
    error = fails(capsys, tmp_path, f"data.path={rows}", "track=[wandb]", "train.batch_size=4")
    assert "wandb is not installed" in error


def test_an_unknown_target_module_names_those_there_are(tmp_path, capsys, rows):
    error = fails(capsys, tmp_path, f"data.path={rows}", "lora.targets=[gate_prj]")
    assert "did you mean 'gate_proj'?" in error and "down_proj" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "sets optimizer"),
        ({"gradient_clipping": 3.0}, "sets gradient_clipping"),
        ({"gradient_accumulation_steps": 4}, "sets gradient_accumulation_steps"),
        ({"bf16": {"enabled": True}}, "sets bf16"),
        ({"managed_gradient_accumulation": True}, '"managed_gradient_accumulation": false'),
        ({"zero_allow_untested_optimizer": False}, '"zero_allow_untested_optimizer": true'),
    ],
    ids=str,
)
def test_a_ds_config_that_contradicts_the_run(tmp_path, capsys, rows, change, message):
    settings = json.loads((ROOT / "ds_configs/zero2.json").read_text()) | change
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(settings))
    assert message in fails(capsys, tmp_path, f"data.path={rows}", f"deepspeed={path}")
    assert written(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense"])
def test_a_ds_config_that_is_none(tmp_path, capsys, rows, text):
    path = tmp_path / "engine.json"
    path.write_text(text)
    error = fails(capsys, tmp_path, f"data.path={rows}", f"deepspeed={path}")
    assert "is not JSON" in error or "is not a JSON object" in error


def test_a_run_folder_in_use(tmp_path, capsys, rows, monkeypatch):
    hold = (
        "import fcntl, os, sys, time; os.makedirs(sys.argv[1]);"
        "f = open(sys.argv[1] + '/.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "f.write('process 1 on elsewhere'); f.flush(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        error = fails(capsys, tmp_path, f"data.path={rows}")
        holder.kill()
    assert "is in use by process 1 on elsewhere" in error
    assert written(tmp_path) == [".lock"]


def test_a_run_folder_with_another_run(tmp_path, capsys, rows, monkeypatch):
    monkeypatch.setattr("flex.loop.train_step", train_step)
    config = tmp_path / "empty.yaml"
    config.write_text("")
    options = [*TINY, f"dir={tmp_path}", "name=run", f"data.path={rows}"]
    options += ["train.steps=1", "train.batch_size=4"]
    assert main(["train", "--config", str(config), *options]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    error = fails(capsys, tmp_path, *options[-3:], "seed=7")
    assert "seed 0 -> 7" in error and "name=OTHER" in error
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    lock = tmp_path / "run/.lock"
    assert {**before, lock: b""} == {**after, lock: b""}


def test_several_processes_say_it_once(tmp_path, rows):
    """Rank 1 fails as rank 0 does, and leaves the talking to it."""
    options = [*TINY, f"dir={tmp_path}", f"data.path={rows}", "lora.r=0"]
    for rank, shown in (("0", 1), ("1", 0)):
        done = subprocess.run(
            [sys.executable, str(ROOT / "flex/train.py"), *options],
            env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and done.stderr.count("error: ") == shown, done.stderr


def test_several_processes_need_an_engine(tmp_path, rows):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "flex/train.py"),
            *TINY,
            f"dir={tmp_path}",
            f"data.path={rows}",
        ],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "no ds_config is given" in done.stderr
    assert "deepspeed=ds_configs/zero2.json" in done.stderr
