"""A folder appears whole or not at all, and what was there before is never lost."""

import errno
import os
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from flex.errors import ModelError
from flex.model.folder import whole_folder


def write(folder, text="new"):
    (folder / "a.txt").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text(text)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


NEW, OLD = ({"a.txt": text, "sub/b.txt": text} for text in ("new", "old"))


@pytest.fixture
def old(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    write(target, "old")
    return target


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_nothing_is_seen_before_all_is_there(tmp_path):
    target = tmp_path / "deep" / "down" / "target"
    with whole_folder(target) as draft:
        assert draft.parent == target.parent and draft.name.startswith(".target.")
        assert list(draft.iterdir()) == []
        write(draft)
        assert not target.exists()
    assert contents(target) == NEW
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("replace", [False, True])
def test_an_error_inside_leaves_nothing(tmp_path, error, replace):
    with pytest.raises(error, match="stop"), whole_folder(tmp_path / "t", replace=replace) as draft:
        write(draft)
        raise error("stop")
    assert names(tmp_path) == []


def test_an_error_inside_leaves_the_old_folder(old):
    with pytest.raises(RuntimeError), whole_folder(old, replace=True) as draft:
        write(draft)
        raise RuntimeError
    assert contents(old) == OLD and names(old.parent) == ["target"]


def test_replacing_is_of_the_whole_folder(old):
    (old / "more").write_text("old")
    with whole_folder(old, replace=True) as draft:
        write(draft)
        assert contents(old) == {**OLD, "more": "old"}
    assert contents(old) == NEW and names(old.parent) == ["target"]


def test_a_file_can_be_replaced(tmp_path):
    (tmp_path / "target").write_text("a file")
    with whole_folder(tmp_path / "target", replace=True) as draft:
        write(draft)
    assert contents(tmp_path / "target") == NEW and names(tmp_path) == ["target"]


def test_replacing_a_link_leaves_what_it_points_to(old):
    link = old.parent / "link"
    link.symlink_to(old)
    with whole_folder(link, replace=True) as draft:
        write(draft)
    assert contents(link) == NEW and not link.is_symlink()
    assert contents(old) == OLD and names(old.parent) == ["link", "target"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_what_is_there_is_not_overwritten_unasked(old, kind):
    target = old.parent / "other"
    {
        "folder": lambda: old.rename(target),
        "file": lambda: target.write_text("old"),
        "link": lambda: target.symlink_to(old),
        "dangling link": lambda: target.symlink_to(old.parent / "nowhere"),
    }[kind]()
    before = names(old.parent)
    with pytest.raises(ModelError) as error, whole_folder(target):
        pytest.fail("the block was entered")
    assert error.value.what == f"{target} exists and is not empty"
    assert "overwritten" in error.value.why and "another folder" in error.value.fix
    assert names(old.parent) == before
    if kind == "folder":
        assert contents(target) == OLD


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "target").mkdir()
    with whole_folder(tmp_path / "target") as draft:
        write(draft)
    assert contents(tmp_path / "target") == NEW and names(tmp_path) == ["target"]


@pytest.mark.parametrize("below", ["target", "deep/target"])
def test_a_parent_that_cannot_be_written(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError) as error, whole_folder(tmp_path / "file" / below):
        pytest.fail("the block was entered")
    assert f"cannot write to {tmp_path / 'file'}" in error.value.what
    assert error.value.fix == "name another folder"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", [".", "..", "/", "sub/.."])
def test_a_path_without_a_name_of_its_own_is_refused(in_tmp, name):
    with pytest.raises(ModelError, match="no name of a new folder"), whole_folder(Path(name)):
        pytest.fail("the block was entered")
    assert names(in_tmp) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_as_readable_as_the_folder(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "target") as draft:
            write(draft)
            (draft / "a.txt").chmod(0o600)  # as safetensors does
            (draft / "sub" / "b.txt").chmod(0o755)
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "target").stat().st_mode)
    assert mode == 0o777 & ~umask
    for name in NEW:
        assert stat.S_IMODE((tmp_path / "target" / name).stat().st_mode) == 0o666 & ~umask


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, renamed = [], []
    fsync, rename = os.fsync, Path.rename

    def remember_sync(handle):
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    def remember_rename(self, target):
        renamed.append(list(synced))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", remember_sync)
    monkeypatch.setattr(Path, "rename", remember_rename)
    target = tmp_path / "target"
    with whole_folder(target) as draft:
        write(draft)
    inodes = {p.stat().st_ino for p in (target, *target.rglob("*"))}
    assert len(inodes) == 4 and inodes == set(renamed[0])
    assert synced[-1] == tmp_path.stat().st_ino and len(renamed) == 1


def refuse(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["in the block", "at the end", "in safetensors"])
def test_a_full_disk_is_told_and_leaves_the_old_folder(old, monkeypatch, where):
    if where == "at the end":
        monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ModelError) as error, whole_folder(old, replace=True) as draft:
        write(draft)
        if where == "in the block":
            refuse()
        if where == "in safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert f"cannot write {old}" in error.value.what and "No space left" in error.value.what
    assert contents(old) == OLD and names(old.parent) == ["target"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(old, monkeypatch):
    rename = Path.rename

    def fail(self, target):
        return refuse() if "new" in contents(self).values() else rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ModelError), whole_folder(old, replace=True) as draft:
        write(draft)
    assert contents(old) == OLD and names(old.parent) == ["target"]
