"""Promises R2 (crash-safe save), R3 (corruption found), R4 (disk full) and R12 (no unsafe load)."""

import builtins
import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from flex import checkpoint
from flex.checkpoint import (
    capture_rng,
    damage,
    find_latest,
    load_checkpoint,
    restore_rng,
    save_checkpoint,
)
from flex.errors import CheckpointError
from flex.state import TrainState

EXTRA = {"config_hash": "abc", "optimizer": {"step": 7}}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    value = torch.arange(6.0).reshape(2, 3) + step
    return {
        "adapter": {"lora_A": value, "lora_B": value.T.bfloat16()},
        "optimizer": {"exp_avg": value * 0.1, "count": torch.tensor(step)},
    }


def save(root: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(
        root, TrainState(step=step, tokens=10 * step), tensors(step), EXTRA, keep
    )


def assert_latest(root: Path, allowed: set[int]) -> None:
    found = find_latest(root)
    assert found is not None and found.step in allowed
    loaded = load_checkpoint(found.path)
    assert loaded.state.step == found.step
    assert torch.equal(
        loaded.tensors["adapter"]["lora_A"], tensors(found.step)["adapter"]["lora_A"]
    )


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


# ---- what is saved comes back ----------------------------------------------------------------


def test_round_trip_is_bit_exact(tmp_path):
    awkward = {
        "float64": torch.tensor([1 / 3, float("nan"), float("-inf"), -0.0], dtype=torch.float64),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "bfloat16": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(2**60),
        "flag": torch.tensor([True, False]),
    }
    state = TrainState(3, 1000, 2000, 1.5, 1, 2, {"cpu:0": "AAA="}, float("nan"))
    path = save_checkpoint(tmp_path / "new" / "checkpoints", state, {"adapter": awkward}, EXTRA, 1)
    loaded = load_checkpoint(path)
    for name, tensor in awkward.items():
        back = loaded.tensors["adapter"][name]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        assert (
            back.contiguous()
            .view(torch.uint8 if back.ndim else back.dtype)
            .equal(tensor.contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype))
        )
    assert str(loaded.state) == str(state)  # by text, for nan is not equal to itself
    assert loaded.extra == EXTRA


def test_an_empty_tensor_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="adapter: lora_A"):
        save_checkpoint(tmp_path, TrainState(), {"adapter": {"lora_A": torch.zeros(0)}}, {}, 1)
    assert names(tmp_path) == []


def test_files_are_on_disk_before_they_are_promised(tmp_path, monkeypatch):
    """A power cut keeps what was fsynced; so: files, manifest, folder, rename, parent."""
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".tmp-")[0])
        real_fsync(handle)

    def rename(source, target):
        events.append(f"rename to {Path(target).name}")
        real_rename(source, target)

    save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 2, keep=2)
    assert events == [
        "state.json",
        "adapter.safetensors",
        "optimizer.safetensors",
        "manifest.json",
        "step-000002",
        "rename to step-000002",
        tmp_path.name,
    ]


# ---- R2 and R4: killed, or refused by the disk, at every boundary -----------------------------


class Faults:
    """Counts the calls that touch the disk; at the n-th, kills the process or raises ENOSPC."""

    CALLS = ("open", "close", "fsync", "rename", "mkdir", "unlink", "rmdir")

    def __init__(self, at: int, kill: bool):
        self.at, self.kill, self.count = at, kill, 0

    def boundary(self) -> None:
        self.count += 1
        if self.count == self.at:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in self.CALLS:
            patch.setattr(os, name, self.wrap(getattr(os, name)))
        patch.setattr(checkpoint, "open", self.open, raising=False)

    def wrap(self, call):
        def wrapped(*args, **kwargs):
            if call.__name__ == "close":  # a close always closes, or handles would pile up
                call(*args, **kwargs)
                return self.boundary()
            self.boundary()
            return call(*args, **kwargs)

        return wrapped

    def open(self, path, mode, **kwargs):
        self.boundary()
        stream = builtins.open(path, mode, **kwargs)  # noqa: SIM115
        return HalfWriter(stream, self) if "x" in mode else stream


class HalfWriter:
    """A file whose write has a boundary in its middle."""

    def __init__(self, stream, faults):
        self.stream, self.faults = stream, faults

    def write(self, data):
        self.stream.write(data[: len(data) // 2])
        self.stream.flush()
        self.faults.boundary()
        self.stream.write(data[len(data) // 2 :])

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def in_child(work) -> int:
    """Run `work` in a forked child; its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# (steps there before, step being saved, keep)
SCENES = {
    "first": ((), 1, 2),
    "second": ((1,), 2, 2),
    "rotating": ((1, 2), 3, 2),
    "keep-one": ((1,), 2, 1),
    "same-step": ((1, 2), 2, 2),
}


@pytest.mark.parametrize("before, step, keep", SCENES.values(), ids=SCENES.keys())
def test_a_kill_at_any_boundary_loses_at_most_the_save_in_progress(tmp_path, before, step, keep):
    at, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        at += 1
        root = tmp_path / str(at) / "checkpoints"
        for earlier in before:
            save(root, earlier)

        def killed_save(root=root, at=at):
            Faults(at, kill=True).install(pytest.MonkeyPatch())
            save(root, step, keep)

        code = in_child(killed_save)
        if before:
            assert_latest(root, {before[-1], step})
        else:
            assert find_latest(root) is None or find_latest(root).step == step
        save(root, 9, keep=3)
        assert all(re.fullmatch(r"step-\d{6}", n) for n in names(root)), (
            f"stray after boundary {at}"
        )
    assert code == 0
    assert at > 20, "the faults were not injected"


@pytest.mark.parametrize("before, step, keep", SCENES.values(), ids=SCENES.keys())
def test_a_full_disk_at_any_boundary_is_an_error_that_cleans_up(tmp_path, before, step, keep):
    at, fault, refused = 0, None, 0
    while fault is None or fault.count >= at:
        at += 1
        root = tmp_path / str(at) / "checkpoints"
        for earlier in before:
            save(root, earlier)
        fault = Faults(at, kill=False)
        with pytest.MonkeyPatch.context() as patch:
            fault.install(patch)
            try:
                save(root, step, keep)
            except CheckpointError as err:
                assert "No space left on device" in err.what
                refused += 1
                if root.exists():
                    assert not [n for n in names(root) if ".tmp-" in n]
        if before:
            assert_latest(root, {before[-1], step})
        save(root, 9, keep=3)
        assert all(re.fullmatch(r"step-\d{6}", n) for n in names(root))
    assert refused >= 15


def test_kills_at_200_random_moments(tmp_path):
    root, rng, step = tmp_path / "checkpoints", random.Random(0), 1
    save(root, step)
    for _ in range(200):

        def saves(start=step):
            for number in range(1, 1000):
                save(root, start + number)

        child = os.fork()
        if child == 0:
            saves()
            os._exit(1)
        time.sleep(rng.uniform(0, 0.012))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert len([n for n in names(root) if ".damaged" in n]) == 0
        found = find_latest(root)
        assert found is not None and found.step >= step
        load_checkpoint(found.path)
        step = found.step
    save(root, step + 1)
    assert names(root) == [f"step-{s:06d}" for s in (step, step + 1)]


def test_a_disk_that_fills_at_any_byte(tmp_path):
    """The kernel itself refuses: a limit on the file size, in a child."""
    root = tmp_path / "checkpoints"
    save(root, 1)
    largest = max(p.stat().st_size for p in (root / "step-000001").iterdir())

    def limited_save(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError, match="could not be written"):
            save(root, 2)

    for limit in range(0, largest, max(largest // 24, 1)):
        assert in_child(lambda limit=limit: limited_save(limit)) == 0
        assert names(root) == ["step-000001"]
    assert_latest(root, {1})


# ---- R3: corruption is found before any state is touched --------------------------------------


@pytest.fixture
def two(tmp_path) -> Path:
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


FILES = ("state.json", "adapter.safetensors", "optimizer.safetensors", "manifest.json")


def assert_rejected(path: Path) -> None:
    assert damage(path) is not None
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(two, name):
    file = two / "step-000002" / name
    good = file.read_bytes()
    for bit in random.Random(name).sample(range(8 * len(good)), 64):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        assert_rejected(file.parent)
    file.write_bytes(good)
    assert damage(file.parent) is None


@pytest.mark.parametrize("name", FILES)
def test_truncation_deletion_and_swaps_are_found(two, name):
    file, other = two / "step-000002" / name, two / "step-000001" / name
    good = file.read_bytes()
    for size in (0, 1, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:size])
        assert_rejected(file.parent)
    file.write_bytes(good + b"\0")
    assert_rejected(file.parent)
    file.write_bytes(other.read_bytes())
    assert_rejected(file.parent)
    file.unlink()
    assert_rejected(file.parent)


def test_a_folder_under_another_steps_name_is_found(two):
    (two / "step-000002").rename(two / "step-000007")
    assert "step 2" in damage(two / "step-000007")


@pytest.mark.parametrize("name", FILES)
def test_falls_back_to_the_previous_and_keeps_the_damaged_one(two, name, caplog):
    (two / "step-000002" / name).write_bytes(b"")
    assert_latest(two, {1})
    assert names(two) == ["step-000001", "step-000002.damaged-1"]
    assert "step-000002 rejected" in caplog.text and name in caplog.text
    save(two, 2)
    (two / "step-000002" / name).unlink()
    assert_latest(two, {1})
    assert "step-000002.damaged-2" in names(two)


def test_a_step_whose_replacement_never_arrived_comes_back(two):
    (two / "step-000002").rename(two / "step-000002.old-0123456789ab")
    assert_latest(two, {2})
    assert names(two) == ["step-000001", "step-000002"]
    (two / "step-000002").rename(two / "step-000002.old-0123456789ab")
    save(two, 3, keep=2)
    assert names(two) == ["step-000002", "step-000003"]


def test_nothing_there(tmp_path):
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "absent") is None
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "step-000001")


def test_another_format_is_an_error_not_damage(two, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        save(two, 3)
    with pytest.raises(CheckpointError, match="format 2"):
        find_latest(two)
    assert "step-000003" in names(two)


# ---- rotation ------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-000005"]


def test_saving_a_step_again_replaces_it(two):
    again = save_checkpoint(two, TrainState(step=2, tokens=99), tensors(2), EXTRA, keep=2)
    assert load_checkpoint(again).state.tokens == 99
    assert names(two) == ["step-000001", "step-000002"]


def test_a_damaged_one_does_not_count_as_kept(two):
    (two / "step-000002" / "adapter.safetensors").write_bytes(b"\0" * 8)
    save(two, 3, keep=2)
    assert names(two) == ["step-000001", "step-000002.damaged-1", "step-000003"]


def test_the_one_just_written_is_never_pruned(two):
    save(two, 0, keep=1)
    assert "step-000000" in names(two)


def test_steps_beyond_six_digits_sort_by_number(tmp_path):
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    assert find_latest(tmp_path).step == 1_000_000


# ---- R12: nothing executes -------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def forge(folder: Path) -> None:
    """Rewrite the manifest to fit the files, as an attacker would."""
    import hashlib

    files = [
        {
            "name": p.name,
            "size": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in sorted(folder.iterdir())
        if p.name != "manifest.json"
    ]
    step = int(folder.name.removeprefix("step-"))
    (folder / "manifest.json").write_bytes(checkpoint._encode_manifest(step, files))


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_never_executes(two, name):
    folder, fired = two / "step-000002", two / "fired"
    (folder / name).write_bytes(pickle.dumps(Bomb(fired)))
    if name != "manifest.json":
        forge(folder)
    assert_rejected(folder)
    torch.save({"x": Bomb(fired)}, folder / name)
    if name != "manifest.json":
        forge(folder)
    assert_rejected(folder)
    assert_latest(two, {1})
    assert not fired.exists()
    pickle.loads(pickle.dumps(Bomb(fired)))
    assert fired.exists(), "the bomb is a dud, so the test proves nothing"


def test_a_manifest_cannot_reach_out_of_its_folder(two):
    folder = two / "step-000002"
    shutil.copy(folder / "adapter.safetensors", two / "outside.safetensors")
    document = json.loads((folder / "manifest.json").read_bytes())
    for entry in document["files"]:
        if entry["name"] == "adapter.safetensors":
            entry["name"] = "../outside.safetensors"
    (folder / "manifest.json").write_bytes(checkpoint._encode_manifest(2, document["files"]))
    assert "outside" in damage(folder)


# ---- generators ------------------------------------------------------------------------------


def test_generators_continue_where_they_were():
    torch.manual_seed(1)
    torch.rand(3)
    saved = json.loads(json.dumps(capture_rng("cpu", rank=1)))
    expected = torch.rand(5)
    torch.manual_seed(2)
    assert restore_rng(saved, "cpu", rank=1)
    assert torch.equal(torch.rand(5), expected)


def test_a_rank_without_a_saved_generator_is_told(caplog):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert not restore_rng(capture_rng("cpu", rank=0), "cpu", rank=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert "cpu:4" in caplog.text
