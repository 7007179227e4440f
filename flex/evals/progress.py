"""How far an evaluation is: a bar on a terminal, a log line every half minute elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

log = logging.getLogger("flex.evals")

_EVERY = 30.0  # seconds between log lines


class Meter:
    """Counts what is done; a context manager.

    Args:
        label: what is counted, such as "generating".
        total: how many there are; `done` of them were there before.

    Attributes:
        made, tokens, seconds: of this session.
    """

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.made, self.tokens = label, total, 0, 0
        self._before, self._start = done, time.monotonic()
        self._told = self._start
        self._end: float | None = None
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end = time.monotonic()
        if self._bar is not None:
            self._bar.stop()
        if self.made:
            log.info("%s: %s", self.label, self)

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self._end is None else self._end) - self._start

    @property
    def rate(self) -> float | None:
        """New tokens per second in this session; None if there were none."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None

    def add(self, tokens: int = 0) -> None:
        """One more is done, with so many new tokens."""
        self.made += 1
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=str(self))
        elif (now := time.monotonic()) - self._told > _EVERY:
            self._told = now
            log.info("%s: %s", self.label, self)

    def __str__(self) -> str:
        done = self._before + self.made
        text = f"{done} of {self.total}"
        if self.rate is not None:
            text += f", {self.rate:.0f} tokens/s"
        if self.made and done < self.total:
            left = self.seconds / self.made * (self.total - done)
            text += f", about {clock(left)} left"
        return text


def clock(seconds: float) -> str:
    """
    >>> clock(59.7), clock(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
