"""Atomic checkpoints: a folder is valid by its manifest, or it is not there.

Layout of `<run>/checkpoints/step-000500/`: one `<stem>.safetensors` per group of tensors (adapter,
optimizer, penalty), `state.json` (TrainState and extras) and `manifest.json` (name, size, sha256 of
each file, and its own digest). Only safetensors and JSON are ever read: nothing can execute.

Order of a save: files, fsync each, manifest, fsync, fsync folder, rename, fsync parent, and only
then prune. A process killed anywhere leaves either the previous or the new checkpoint, plus rubbish
that the next save sweeps:

    step-N.tmp-<id>      being written or being deleted: swept
    step-N.old-<id>      step-N while its replacement moves in: put back, or swept if that arrived
    step-N.damaged-<k>   set aside by `find_latest`: never touched again

One process (rank 0) saves and scans; the run folder's lock keeps other runs out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from .errors import CheckpointError
from .files import fsync_path
from .state import TrainState

log = logging.getLogger("flex.checkpoint")

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_STEP = re.compile(r"^step-(\d{6,})(\.old-[0-9a-f]+)?$")
_DEBRIS = re.compile(r"^(step-\d{6,})\.(tmp|old)-[0-9a-f]+$")
_FILE = re.compile(r"^[A-Za-z0-9_]+\.safetensors$")  # a manifest must not name a path


@dataclass(frozen=True)
class Found:
    """A checkpoint that passed verification."""

    path: Path
    step: int


@dataclass(frozen=True)
class Loaded:
    """The contents of a checkpoint; tensors are on the CPU, dtypes and shapes as saved."""

    state: TrainState
    tensors: dict[str, dict[str, Tensor]]  # file stem -> tensors
    extra: dict[str, Any]


class _Damaged(Exception):
    """Why a folder is not a valid checkpoint."""


def save_checkpoint(
    root: Path,
    state: TrainState,
    tensors: dict[str, dict[str, Tensor]],
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-<state.step>`, then prune all but the newest `keep` valid checkpoints.

    Args:
        tensors: file stem -> tensors, any device and dtype; every tensor whole and non-empty.
        extra: JSON-able; config hash, versions, scalars of the optimizer.

    Raises:
        CheckpointError: the disk refused, or a tensor is empty. Earlier checkpoints are intact and
            nothing half-written stays; the caller counts failures and decides when to stop.
    """
    _refuse_empty(tensors)
    final = root / f"step-{state.step:06d}"
    tmp = _sibling(final, "tmp")
    encoded_state = _json({"format": FORMAT, "state": asdict(state), "extra": extra})
    try:
        _make_root(root)
        _sweep(root)
        tmp.mkdir()
        _write_files(tmp, state.step, tensors, encoded_state)
        _move_in(tmp, final)
        fsync_path(root)
    except OSError as err:
        shutil.rmtree(tmp, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {err}",
            "the earlier checkpoints are intact, but the work since then is not on disk",
            "free disk space or check the permissions of the run folder",
        ) from err
    _prune(root, final, keep)
    return final


def find_latest(root: Path) -> Found | None:
    """The newest valid checkpoint below `root`, or None.

    Damaged ones on the way are logged and renamed to `*.damaged-<k>`.
    """
    candidates = [(int(m[1]), not m[2], p) for p in _folders(root) if (m := _STEP.match(p.name))]
    for step, _, path in sorted(candidates, reverse=True):
        try:
            reason = damage(path)
        except OSError as err:
            reason = f"cannot be read: {err}"
        if reason is not None:
            _quarantine(path, reason)
            continue
        if ".old-" in path.name:  # its replacement never arrived
            final = path.with_name(f"step-{step:06d}")
            os.rename(path, final)
            path = final
        return Found(path, step)
    return None


def damage(path: Path) -> str | None:
    """Why `path` is not a valid checkpoint, or None. Reads every byte, in constant memory.

    Raises:
        CheckpointError: intact, but written in another format version.
        OSError: it cannot be read, which may pass.
    """
    try:
        for name, (size, digest) in _read_manifest(path).items():
            file = path / name
            if not file.is_file():
                raise _Damaged(f"{name} is missing")
            if file.stat().st_size != size:
                raise _Damaged(f"{name} has {file.stat().st_size} bytes, not {size}")
            with open(file, "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                    raise _Damaged(f"{name} does not match its sha256")
            if name == STATE:
                _decode_state(file.read_bytes())
            else:
                with safe_open(file, "pt"):
                    pass
    except (_Damaged, FileNotFoundError, SafetensorError) as err:
        return str(err)
    return None


def load_checkpoint(path: Path) -> Loaded:
    """Read a checkpoint; every byte is checked against the manifest before it is parsed.

    Raises:
        CheckpointError: missing, damaged, or of another format version. Nothing was changed.
    """
    tensors = {}
    try:
        for name, (_, digest) in _read_manifest(path).items():
            data = (path / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise _Damaged(f"{name} does not match its sha256")
            if name == STATE:
                state, extra = _decode_state(data)
            else:
                tensors[name.removesuffix(".safetensors")] = load(data)
    except (_Damaged, OSError, SafetensorError) as err:
        raise CheckpointError(
            f"checkpoint {path} cannot be loaded: {err}",
            "continuing from damaged state would train on garbage",
            "start again with resume=auto: it falls back to the newest valid checkpoint",
        ) from err
    return Loaded(state, tensors, extra)


def capture_rng(device: torch.device | str, rank: int = 0) -> dict[str, str]:
    """States of this process's torch generators, base64, keyed `cpu:<rank>` (and `cuda:<rank>`).

    Python's and numpy's generators are left out on purpose: no draw that matters comes from them.
    """
    states = {f"cpu:{rank}": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states[f"cuda:{rank}"] = torch.cuda.get_rng_state(device)
    return {
        key: base64.b64encode(value.numpy().tobytes()).decode() for key, value in states.items()
    }


def restore_rng(saved: dict[str, str], device: torch.device | str, rank: int = 0) -> bool:
    """Set this process's generators from `capture_rng`'s dict; False, logged, if not in there."""
    kinds = ["cpu", "cuda"] if torch.device(device).type == "cuda" else ["cpu"]
    missing = [f"{kind}:{rank}" for kind in kinds if f"{kind}:{rank}" not in saved]
    if missing:
        log.warning(
            "no saved generator state for %s (saved: %s): dropout will differ from the uncut run",
            ", ".join(missing),
            ", ".join(sorted(saved)) or "none",
        )
        return False
    for kind in kinds:
        state = torch.frombuffer(
            bytearray(base64.b64decode(saved[f"{kind}:{rank}"])), dtype=torch.uint8
        )
        if kind == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
    return True


# ---- writing ------------------------------------------------------------------------------


def _refuse_empty(tensors: dict[str, dict[str, Tensor]]) -> None:
    empty = [
        f"{s}: {name}" for s, group in tensors.items() for name, t in group.items() if not t.numel()
    ]
    if empty:
        raise CheckpointError(
            f"{len(empty)} tensors to save have no element, first {empty[0]}",
            "a sharded parameter was not gathered; the checkpoint would be empty",
            "report this as a bug, with the ds_config in use",
        )


def _write_files(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], encoded_state: bytes
) -> None:
    files = [_write(folder / STATE, encoded_state)]
    for stem, group in tensors.items():
        if not _FILE.match(f"{stem}.safetensors"):
            raise ValueError(f"file stem {stem!r} must be letters, digits and underscores")
        # One file in memory at a time; the digest is of what was meant to be written, not of what
        # a disk gave back.
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in group.items()})
        files.append(_write(folder / f"{stem}.safetensors", data))
    _write(folder / MANIFEST, _encode_manifest(step, files))
    fsync_path(folder)


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return {"name": path.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _move_in(tmp: Path, final: Path) -> None:
    """Rename `tmp` to `final`; a folder cannot replace another, so an earlier one steps aside."""
    if final.exists():
        os.rename(final, _sibling(final, "old"))  # pruned once the new one is safe
    os.rename(tmp, final)


def _make_root(root: Path) -> None:
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        fsync_path(root.parent)


def _sweep(root: Path) -> None:
    """Remove what a killed save left; put back a checkpoint whose replacement never arrived."""
    for path in _folders(root):
        if m := _DEBRIS.match(path.name):
            final = root / m[1]
            if m[2] == "old" and not final.exists():
                os.rename(path, final)
            else:
                shutil.rmtree(path)


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Delete all but `newest` and the `keep - 1` newest valid others.

    A failure here is only logged: the save itself succeeded.
    """
    others = [p for p in _folders(root) if _STEP.match(p.name) and p != newest]
    kept = 1
    for path in sorted(others, key=_step_of, reverse=True):
        try:
            if kept >= keep or ".old-" in path.name:
                _discard(path)
            elif (reason := damage(path)) is not None:
                _quarantine(path, reason)
            else:
                kept += 1
        except (OSError, CheckpointError) as err:
            log.warning("old checkpoint %s stays: %s", path, err)


def _discard(path: Path) -> None:
    """Delete a folder so that a kill half-way leaves rubbish to sweep, not a damaged checkpoint."""
    doomed = path.with_name(f"{path.name.split('.')[0]}.tmp-{uuid.uuid4().hex[:12]}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _quarantine(path: Path, reason: str) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name.split('.')[0]}.damaged-{number}")).exists():
        number += 1
    log.error("checkpoint %s rejected: %s; set aside as %s", path, reason, aside.name)
    try:
        os.rename(path, aside)
    except OSError as err:
        log.error("%s could not be set aside: %s", path, err)


# ---- reading ------------------------------------------------------------------------------


def _encode_manifest(step: int, files: list[dict[str, Any]]) -> bytes:
    body = {"format": FORMAT, "step": step, "files": files}
    return _json({**body, "sha256": hashlib.sha256(_json(body)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name -> (size, sha256). Only one encoding is valid, so any flipped bit shows."""
    raw = (path / MANIFEST).read_bytes()
    try:
        body = json.loads(raw)
        digest = body.pop("sha256")
        if (
            hashlib.sha256(_json(body)).hexdigest() != digest
            or _json({**body, "sha256": digest}) != raw
        ):
            raise _Damaged(f"{MANIFEST} does not match its own sha256")
        if body["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {body['format']}, this version reads {FORMAT}",
                "its contents may mean something else",
                "continue it with the version that wrote it, or start a new run with name=OTHER",
            )
        if body["step"] != _step_of(path):
            raise _Damaged(f"{MANIFEST} is of step {body['step']}")
        files = {f["name"]: (int(f["size"]), str(f["sha256"])) for f in body["files"]}
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise _Damaged(f"{MANIFEST} is not readable: {err}") from err
    stray = [name for name in files if name != STATE and not _FILE.match(name)]
    if stray or STATE not in files:
        raise _Damaged(
            f"{MANIFEST} names {stray[0]!r}" if stray else f"{MANIFEST} does not name {STATE}"
        )
    return files


def _decode_state(data: bytes) -> tuple[TrainState, dict[str, Any]]:
    try:
        document = json.loads(data)
        return TrainState(**document["state"]), dict(document["extra"])
    except (ValueError, KeyError, TypeError) as err:
        raise _Damaged(f"{STATE} is not readable: {err}") from err


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _folders(root: Path) -> Iterator[Path]:
    return iter([p for p in root.iterdir() if p.is_dir()] if root.is_dir() else [])


def _step_of(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step-"))


def _sibling(final: Path, kind: str) -> Path:
    return final.with_name(f"{final.name}.{kind}-{uuid.uuid4().hex[:12]}")
