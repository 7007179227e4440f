"""TensorBoard, W&B, MLflow and trackio, through accelerate's tracker classes.

Trackers are a convenience: metrics.jsonl has every record anyway. So one that is asked for but is
not installed is an error before training, and one that fails during it is dropped, not fatal.
Nothing is sent over a network unless the user's own settings say so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, tracking, utils

from .errors import ConfigError

log = logging.getLogger("flex.trackers")

PROJECT = "flex"
_INSTALLED: dict[str, Callable[[], bool]] = {
    "tensorboard": utils.is_tensorboard_available,
    "wandb": utils.is_wandb_available,
    "mlflow": utils.is_mlflow_available,
    "trackio": utils.is_trackio_available,
}


class Tracker:
    """One of accelerate's trackers; after its first failure it only counts what it missed."""

    def __init__(self, inner: tracking.GeneralTracker) -> None:
        self.name = inner.name
        self._inner = inner
        self._missed = 0

    def log(self, record: dict[str, Any], step: int) -> None:
        """Send the numbers of a record (see `meters`) under its step."""
        if self._missed:
            self._missed += 1
            return
        try:
            self._inner.log({k: v for k, v in record.items() if k != "step"}, step=step)
        except Exception as err:  # whatever a tracker raises, it must not end the run
            self._missed = 1
            log.error("tracker %s dropped at step %d: %r; training goes on", self.name, step, err)

    def finish(self) -> None:
        if self._missed:
            log.error("tracker %s missed %d records, see metrics.jsonl", self.name, self._missed)
        try:
            self._inner.finish()
        except Exception as err:
            log.error("tracker %s did not close: %r", self.name, err)


def require_installed(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker that is asked for is not installed."""
    absent = [name for name in names if not _INSTALLED[name]()]
    if absent:
        raise ConfigError(
            f"track={','.join(names)}, but {', '.join(absent)} is not installed",
            "the run would not be tracked as asked",
            "pip install -e '.[track]', or drop it from `track` (metrics.jsonl is always written)",
        )


def open_trackers(
    names: Sequence[str], run_dir: Path, config: dict[str, Any], step: int = 0
) -> list[Tracker]:
    """Start the named trackers. Call on rank 0 only, after the process group is up.

    Args:
        config: the resolved configuration, nested; sent as the run's hyperparameters.
        step: where the run continues; TensorBoard hides what an earlier attempt logged after it.

    Raises:
        ConfigError: a tracker is not installed or does not start.
    """
    require_installed(names)
    if names:
        _accelerate_state()
    return [_start(name, run_dir, dict(_flat(config)), step) for name in names]


def _start(name: str, run_dir: Path, config: dict[str, Any], step: int) -> Tracker:
    try:
        inner = _build(name, run_dir, step)
        inner.start()
        inner.store_init_configuration(config)
    except Exception as err:
        raise ConfigError(
            f"tracker {name} does not start: {err!r}",
            "the run would not be tracked as asked",
            f"drop {name} from `track` (metrics.jsonl is always written), or repair its set-up",
        ) from err
    return Tracker(inner)


def _build(name: str, run_dir: Path, step: int) -> tracking.GeneralTracker:
    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", run_dir, purge_step=step + 1)
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        return tracking.WandBTracker(PROJECT, name=run_dir.name, dir=str(run_dir), mode=mode)
    if name == "trackio":
        return tracking.TrackioTracker(PROJECT, name=run_dir.name, resume="allow")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{run_dir.resolve()}/mlflow.db")
    return tracking.MLflowTracker(PROJECT, run_name=run_dir.name)


def _accelerate_state() -> None:
    """accelerate's trackers log through a logger that insists on a PartialState.

    Making one would start a process group if the launcher's environment asks for it and there is
    none (and hang, on one rank), and may change torch's thread count: neither is for us to do.
    """
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not grouped:
        raise RuntimeError("open_trackers needs the process group; build the engine first")
    threads = torch.get_num_threads()
    PartialState()
    torch.set_num_threads(threads)


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections -> `section.key`; what a tracker cannot take as a number is text."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, (bool, int, float, str)) else str(value)
