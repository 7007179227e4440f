"""Leaving in good order: signals and trigger files become one small code that the ranks agree on.

    SIGTERM, SIGINT, <run>/STOP   save after the current step and leave
    SIGUSR1, <run>/SAVE           save after the current step and go on
    a second SIGINT               leave at once, exit code 130, nothing saved

The engine takes the maximum of `poll()` over all ranks, so a signal to one rank stops all of them
at the same step. Handlers only set flags: logging from a handler can deadlock.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger("flex.stop")


class Stop(IntEnum):
    """What to do after this step. The maximum over the ranks is the common decision."""

    GO = 0
    SAVE = 1
    STOP = 2


class StopSignal:
    """Context manager around the training loop.

    Args:
        folder: where the files STOP and SAVE are looked for; None: signals only.

    Outside the main thread Python cannot install handlers; then, logged once, only the files work.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._stop: str | None = None  # the first cause
        self._save: str | None = None
        self._told = False
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            log.warning("not in the main thread: signals are not handled, the file STOP still is")
            return self
        handlers: dict[int, Callable[[int, FrameType | None], None]] = {
            signal.SIGTERM: self._on_stop,
            signal.SIGINT: self._on_interrupt,
            signal.SIGUSR1: self._on_save,
        }
        for number, handler in handlers.items():
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: the old handler was not set from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._stop is not None

    def poll(self) -> Stop:
        """This rank's wish, logged once per cause. A save is asked for once, a stop for good."""
        if self._folder is not None:
            if self._stop is None and self._take("STOP"):
                self._stop = "the file STOP"
            if self._take("SAVE"):
                self._save = "the file SAVE"
        if self._stop is not None:
            if not self._told:
                log.info("%s: saving, then leaving", self._stop)
                self._told = True
            return Stop.STOP
        if self._save is not None:
            log.info("%s: saving, then going on", self._save)
            self._save = None
            return Stop.SAVE
        return Stop.GO

    def _take(self, name: str) -> bool:
        """Whether the trigger file is there; it is removed so that it acts once."""
        assert self._folder is not None
        try:
            os.unlink(self._folder / name)
        except FileNotFoundError:
            return False
        return True

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = self._stop or signal.Signals(number).name

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            os._exit(130)  # at once: saves are atomic, so there is nothing to tidy
        self._interrupted = True
        self._on_stop(number, frame)
        os.write(2, b"\nleaving after this step; press Ctrl-C again to leave at once\n")

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = "SIGUSR1"
