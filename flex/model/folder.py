"""Folders that appear whole or not at all: write into a temporary sibling, fsync, rename."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flex.errors import ModelError
from flex.files import fsync_path


@contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; leaving the block without an error renames it to
    `target`.

    An error inside the block removes the temporary folder and leaves `target` as it was. With
    `replace`, an existing `target` is moved aside first and deleted last.

    Raises:
        ModelError: `target` holds something and `replace` is false, or the disk refuses (an OSError
            in the block is taken for that).
    """
    if target.name in ("", ".."):
        raise ModelError(
            f"{target} is no name of a new folder",
            "the result is renamed to it when it is complete",
            "give a name",
        )
    filled = not target.is_dir() or any(target.iterdir())
    if not replace and os.path.lexists(target) and filled:
        raise ModelError(
            f"{target} exists and is not empty",
            "nothing is ever overwritten without being asked",
            "name another folder, or remove this one yourself",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = _sibling(target)
        draft.mkdir()
    except OSError as error:
        raise ModelError(
            f"cannot write to {target.parent}: {error}",
            "the result has nowhere to go",
            "name another folder",
        ) from error
    try:
        yield draft
        _settle(draft)
        _put(draft, target)
    except (OSError, SafetensorError) as error:  # safetensors does not raise OSError on a full disk
        raise ModelError(
            f"cannot write {target}: {error}",
            "the result is not on the disk as a whole",
            "check the disk, or name another folder",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put(draft: Path, target: Path) -> None:
    if os.path.lexists(target):
        aside = _sibling(target)
        target.rename(aside)
        try:
            draft.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink()
    else:
        draft.rename(target)
    fsync_path(target.parent)


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")


def _settle(folder: Path) -> None:
    """A rename survives a power cut only if what it names is on the disk before it."""
    readable = folder.stat().st_mode & 0o666  # safetensors writes its files for this user alone
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readable)
        fsync_path(path)
    fsync_path(folder)
