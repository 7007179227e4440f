"""The run folder: one run at a time, never another run's results overwritten.

runs/<name>/config.yaml        every option, resolved
            environment.json   hashes of options and data; versions, commit, device and threads of each session
            metrics.jsonl      one record per step
            checkpoints/       see checkpoint.py
            finished.json      written last
            .lock              held while a run is alive; a dead process holds nothing
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .checkpoint import Found, damage, find_latest
from .config import RunConfig
from .config_io import config_hash, dump_config, flatten, load_config
from .errors import CheckpointError, ConfigError
from .files import write_atomic

log = logging.getLogger("flex.run_folder")

_PACKAGES = (
    *("torch", "triton", "transformers", "peft", "deepspeed", "accelerate", "bitsandbytes"),
    *("safetensors", "tokenizers", "flex-lora"),
)


class RunFolder:
    """An open run folder; a context manager that lets go of the lock.

    Attributes:
        path: the folder.
        config_hash: of the options that affect the maths; belongs into every checkpoint.
        data_hash: of the training examples.
        resume_from: the checkpoint to continue from, on rank 0 only: broadcast it.
        finished: the run had already ended; there is nothing left to do. On rank 0 only.
    """

    def __init__(self, path: Path, config_hash: str, data_hash: str) -> None:
        self.path, self.config_hash, self.data_hash = path, config_hash, data_hash
        self.checkpoints, self.metrics = path / "checkpoints", path / "metrics.jsonl"
        self.resume_from: Found | None = None
        self.finished = False
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished; call after everything else is on disk."""
        write_atomic(self.path / "finished.json", _json(summary))
        self.finished = True

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def open_run(cfg: RunConfig, rank: int, data_hash: str) -> RunFolder:
    """Create or continue `<dir>/<name>`. Ranks other than 0 only learn the path.

    Raises:
        ConfigError: the folder is in use, cannot be written, holds a run with other options or
            data, or holds one at all and resume=never. Nothing was overwritten.
        CheckpointError: every checkpoint in it is damaged.
    """
    if cfg.name in (".", ".."):
        raise ConfigError(f"name={cfg.name}", "it is not the name of a folder", "name=ANOTHER")
    run = RunFolder(Path(cfg.dir) / cfg.name, config_hash(cfg), data_hash)
    if rank != 0:
        return run
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run._lock = _take_lock(run.path)
    except OSError as err:
        raise ConfigError(
            f"the run folder {run.path} cannot be used: {err}",
            "checkpoints and metrics go there",
            "choose another with dir=FOLDER or name=OTHER, or repair its permissions",
        ) from err
    try:
        _open(run, cfg)
    except BaseException:
        run.close()
        raise
    return run


def inspect_run(cfg: RunConfig, data_hash: str | None) -> str:
    """What `open_run` would find, without a trace of the look.

    Args:
        cfg: the run's.
        data_hash: of the training examples; None where they could not be read: then not compared.

    Returns: one line for a person.

    Raises:
        ConfigError: as `open_run`.
    """
    path = Path(cfg.dir) / cfg.name
    stored = None
    if path.exists():
        run = RunFolder(path, config_hash(cfg), "")
        stored = str(_environment(run).get("data_hash"))
    run = RunFolder(path, config_hash(cfg), stored or "" if data_hash is None else data_hash)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"the run folder {path} cannot be used: no right to write in {there}",
            "checkpoints and metrics go there",
            "choose another with dir=FOLDER or name=OTHER, or repair its permissions",
        )
    _refuse_if_in_use(path)
    traces = _traces(run) if path.exists() else []
    if traces:
        _refuse_a_foreign_run(run, cfg, traces)
    if (path / "finished.json").exists():
        return f"{path} is finished: nothing would be trained"
    steps = sorted(p for p in run.checkpoints.glob("step-*") if "." not in p.name)
    whole = [p for p in steps if damage(p) is None]
    if steps and not whole:
        raise CheckpointError(
            f"all {len(steps)} checkpoints in {run.checkpoints} are damaged",
            "going on would quietly start again at step 0",
            "bring back a copy of one as step-NNNNNN, or start anew with name=OTHER",
        )
    if whole:
        damaged = f", {len(steps) - len(whole)} damaged" if len(whole) < len(steps) else ""
        return f"{path} would continue after {whole[-1].name}{damaged}"
    return f"{path} " + ("has no checkpoint: would start at step 0" if traces else "would be new")


def _refuse_if_in_use(path: Path) -> None:
    try:
        handle = os.open(path / ".lock", os.O_RDONLY)
    except OSError:
        return  # no lock, no run
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, handle) from None
    except OSError as err:
        log.warning("%s cannot be locked (%s): take care that only one run uses it", path, err)
    finally:
        os.close(handle)


def _in_use(path: Path, handle: int) -> ConfigError:
    holder = os.read(handle, 100).decode(errors="replace").strip()
    return ConfigError(
        f"the run folder {path} is in use by {holder or 'another process'}",
        "two runs in one folder would destroy each other's checkpoints",
        "wait for it, stop it, or give name=OTHER",
    )


def _open(run: RunFolder, cfg: RunConfig) -> None:
    traces = _traces(run)
    if traces:
        _refuse_a_foreign_run(run, cfg, traces)
        run.resume_from = find_latest(run.checkpoints)
        _refuse_if_all_damaged(run)
    run.finished = (run.path / "finished.json").exists()
    if run.finished:
        log.info("run %s is finished; for another one, give name=OTHER", run.path)
        return
    if run.resume_from is not None:
        log.info("run %s continues after step %d", run.path, run.resume_from.step)
    elif traces:
        log.warning("run %s left no checkpoint: it starts again at step 0", run.path)
    write_atomic(run.path / "config.yaml", dump_config(cfg).encode())
    sessions = _environment(run).get("sessions", []) if traces else []
    session = describe_session()
    if sessions and (changed := _changes(sessions[-1]["versions"], session["versions"])):
        log.warning("versions changed, so resuming is not bit-exact: %s", ", ".join(changed))
    hashes = {"config_hash": run.config_hash, "data_hash": run.data_hash}
    document = {**hashes, "sessions": [*sessions, session]}
    write_atomic(run.path / "environment.json", _json(document))


def _traces(run: RunFolder) -> list[str]:
    """What an earlier run left that must not be lost; nothing if it died before step 1."""
    found = [name for name in ("finished.json", "adapter") if (run.path / name).exists()]
    if run.metrics.exists() and run.metrics.stat().st_size:
        found.append(run.metrics.name)
    if run.checkpoints.is_dir():
        found += sorted(p.name for p in run.checkpoints.iterdir() if ".tmp-" not in p.name)
    return found


def _refuse_a_foreign_run(run: RunFolder, cfg: RunConfig, traces: list[str]) -> None:
    shown = ", ".join(traces[:3]) + (", ..." if len(traces) > 3 else "")
    if cfg.resume == "never":
        raise ConfigError(
            f"{run.path} holds a run already ({shown}) and resume=never",
            "it would be overwritten",
            "give name=OTHER for a new run, or resume=auto to continue this one",
        )
    stored = _environment(run)
    if stored.get("config_hash") != run.config_hash:
        raise ConfigError(
            f"{run.path} holds a run with other options ({shown}): {_differences(run, cfg)}",
            "continuing it would mix two configurations in one result",
            "give name=OTHER for a new run, or the same options to continue this one",
        )
    if stored.get("data_hash") != run.data_hash:
        raise ConfigError(
            f"{run.path} holds a run on other data ({shown}): the training examples have changed",
            "the rest of the run would be on other rows than the start, in another order",
            "give name=OTHER for a new run, or bring the data back to continue this one",
        )


def _refuse_if_all_damaged(run: RunFolder) -> None:
    damaged = list(run.checkpoints.glob("*.damaged-*"))
    if run.resume_from is None and damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoints in {run.checkpoints} are damaged",
            "going on would quietly start again at step 0",
            "bring back a copy of one as step-NNNNNN, or start anew with name=OTHER",
        )


def _differences(run: RunFolder, cfg: RunConfig) -> str:
    """`optim.lr 0.0002 -> 0.0001` for every option that differs from the folder's config.yaml."""
    try:
        stored = flatten(load_config(str(run.path / "config.yaml")))
    except ConfigError as err:
        return f"its config.yaml cannot be compared, {err.what}"
    changed = _changes(stored, flatten(cfg))
    return ", ".join(changed) or "its config.yaml was edited after the run began"


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = [key for key in old | new if key not in ("name", "dir", "resume")]
    return [f"{k} {old.get(k)} -> {new.get(k)}" for k in keys if old.get(k) != new.get(k)]


def _environment(run: RunFolder) -> dict[str, Any]:
    try:
        return json.loads((run.path / "environment.json").read_bytes())
    except (OSError, ValueError):
        return {}  # then the hash differs and the run is refused


def describe_session() -> dict[str, Any]:
    """What a result may depend on besides its options: versions, commit, device, threads."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "versions": versions,
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _commit(root: Path) -> str | None:
    """The checkout's commit, with `+changes` if tracked files differ; None outside a checkout."""
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head, status = (
            subprocess.run(git + arguments, capture_output=True, text=True, timeout=10, check=True)
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError) as err:
        log.info("the commit is not recorded: %s", err)
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _take_lock(path: Path) -> int:
    """Lock `.lock` for the life of this process. The kernel drops the lock of a dead one."""
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        error = _in_use(path, handle)
        os.close(handle)
        raise error from None
    except OSError as err:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): take care that only one run uses it", path, err)
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
    return handle


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=True).encode() + b"\n"
