"""Profiling of a few steps: named ranges around phases and kernels, a table of them and a trace.

`named("forward")` costs a look at one variable while nothing is profiled. In the steps of
`profile.steps` every range is timed here and marked for the tool of `profile.tool`: torch.profiler,
Triton's Proton or NVTX. Rank 0 alone profiles.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .config import ProfileConfig
from .errors import ConfigError
from .kernels.ranges import install, named

__all__ = ["Profile", "Recorder", "Span", "check_profile", "named"]

log = logging.getLogger("flex.profile")

STEP = "step"  # the range of one whole step: what shares are shares of
COPY_BYTES = 2**28  # per copy when bandwidth is measured: several times any cache
Marker = Callable[[str, int | None], AbstractContextManager[Any]]


@dataclass
class Span:
    """One passage through a range. Times are in seconds since the recorder began."""

    name: str
    thread: int
    start: float
    end: float
    bytes: int | None
    in_step: bool
    device_start: float | None = None  # on the GPU's own clock; None without a GPU
    device_end: float | None = None

    @property
    def seconds(self) -> float:
        """On the device the work ran on: from the GPU's events, or the host's clock without one."""
        if self.device_start is not None and self.device_end is not None:
            return self.device_end - self.device_start
        return self.end - self.start


class Recorder:
    """A factory of ranges that times them and marks each for a profiler.

    Args:
        mark: makes the tool's own mark of a range.
        cuda: whether to time on the GPU as well, by events on the current stream. They cover the
            time from the first launch inside a range to the end of the last, gaps included.
    """

    def __init__(self, mark: Marker, cuda: bool) -> None:
        self.mark, self.cuda = mark, cuda
        self.steps_open = 0
        self._spans: list[tuple[Span, Any, Any]] = []  # appended to from autograd's threads too
        self._zero = time.perf_counter()
        self._device_zero = self._event()

    def __call__(self, name: str, bytes: int | None = None) -> _Range:
        return _Range(self, name, bytes)

    def _event(self) -> Any:
        if not self.cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def now(self) -> float:
        return time.perf_counter() - self._zero

    def spans(self) -> list[Span]:
        """All finished ranges in the order they ended. Waits for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()
            for span, first, last in self._spans:
                span.device_start = self._device_zero.elapsed_time(first) / 1e3
                span.device_end = self._device_zero.elapsed_time(last) / 1e3
        return [span for span, _, _ in self._spans]


class _Range:
    __slots__ = ("bytes", "in_step", "mark", "name", "recorder", "start", "start_event")

    def __init__(self, recorder: Recorder, name: str, bytes: int | None) -> None:
        self.recorder, self.name, self.bytes = recorder, name, bytes
        self.mark = recorder.mark(name, bytes)

    def __enter__(self) -> None:
        recorder = self.recorder
        recorder.steps_open += self.name == STEP
        self.in_step = recorder.steps_open > 0
        self.mark.__enter__()
        self.start_event = recorder._event()
        self.start = recorder.now()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        recorder = self.recorder
        end, end_event = recorder.now(), recorder._event()
        self.mark.__exit__(kind, error, trace)
        recorder.steps_open -= self.name == STEP
        thread = threading.get_ident()
        span = Span(self.name, thread, self.start, end, self.bytes, self.in_step)
        recorder._spans.append((span, self.start_event, end_event))


# -- tools -----------------------------------------------------------------------------------------


def check_profile(cfg: ProfileConfig, total_steps: int) -> None:
    """Refuse what cannot be profiled, before any work is done.

    Raises:
        ConfigError: the tool does not run on this machine, or the run has no such steps.
    """
    if cfg.tool == "none":
        return
    gpu = torch.cuda.is_available()
    if cfg.tool == "proton" and importlib.util.find_spec("triton.profiler") is None:
        raise ConfigError(
            "profile.tool=proton, but this Triton has no profiler (triton.profiler)",
            "Proton is a part of Triton that some builds leave out",
            "install Triton's own wheel, or set profile.tool=torch",
        )
    if cfg.tool == "proton" and not gpu:
        raise ConfigError(
            "profile.tool=proton, but there is no GPU",
            "Proton sees what runs on a GPU and nothing else",
            "set profile.tool=torch, which profiles CPUs too",
        )
    if cfg.tool == "nvtx" and not (gpu and torch.version.cuda is not None):
        raise ConfigError(
            "profile.tool=nvtx, but there is no NVIDIA GPU",
            "NVTX ranges are marks for Nsight Systems, and torch has them only with CUDA",
            "set profile.tool=torch, which profiles CPUs too",
        )
    if cfg.last > total_steps:
        raise ConfigError(
            f"profile.steps={cfg.steps}, but the run has {total_steps} steps",
            "steps that never come cannot be profiled",
            f"set profile.steps within 1-{total_steps}, or train.steps={cfg.last} or more",
        )


class _Tool:
    """What a profiler does beside timing: mark ranges, start, stop and write its own files."""

    wrote_trace = False  # whether stop() leaves a trace.json

    def mark(self, name: str, bytes: int | None) -> AbstractContextManager[Any]:
        raise NotImplementedError

    def start(self, folder: Path) -> None: ...

    def stop(self, folder: Path) -> None: ...

    def operators(self) -> list[tuple[str, int, float]]:
        """(name, calls, seconds) of what ran inside, longest first; empty if it does not know."""
        return []


class _Torch(_Tool):
    wrote_trace = True

    def mark(self, name: str, bytes: int | None) -> AbstractContextManager[Any]:
        return torch.profiler.record_function(name, None if bytes is None else f"bytes={bytes}")

    def start(self, folder: Path) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()

    def stop(self, folder: Path) -> None:
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(folder / "trace.json"))

    def operators(self) -> list[tuple[str, int, float]]:
        gpu = torch.cuda.is_available()
        found = []
        for event in self.profiler.key_averages():
            on_gpu = event.device_type != torch.autograd.DeviceType.CPU
            spent = event.self_device_time_total if gpu else event.self_cpu_time_total
            if on_gpu == gpu and spent > 0 and not event.is_user_annotation:
                found.append((event.key, event.count, spent / 1e6))
        return sorted(found, key=lambda row: -row[2])


class _Proton(_Tool):
    def mark(self, name: str, bytes: int | None) -> AbstractContextManager[Any]:
        from triton.profiler import scope

        mark: AbstractContextManager[Any] = scope(name, {} if bytes is None else {"bytes": bytes})
        return mark

    def start(self, folder: Path) -> None:
        from triton.profiler import start

        self.session = start(str(folder / "proton"), hook="triton")

    def stop(self, folder: Path) -> None:
        from triton.profiler import finalize

        finalize(self.session)
        log.info("Proton's own tree: proton-viewer -m time/ms,bytes %s", folder / "proton.hatchet")


class _Nvtx(_Tool):
    def mark(self, name: str, bytes: int | None) -> AbstractContextManager[Any]:
        return _nvtx_range(name)

    def start(self, folder: Path) -> None:
        torch.cuda.cudart().cudaProfilerStart()
        log.info("NVTX ranges are on; seen by: nsys profile -c cudaProfilerApi -- COMMAND")

    def stop(self, folder: Path) -> None:
        torch.cuda.cudart().cudaProfilerStop()


@contextmanager
def _nvtx_range(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


_TOOLS: dict[str, type[_Tool]] = {"torch": _Torch, "proton": _Proton, "nvtx": _Nvtx}

# -- a run's profile -------------------------------------------------------------------------------


class Profile:
    """Profiles the steps that `cfg` names; a context manager that ends what is still open.

    Args:
        cfg: checked by `check_profile` before.
        folder: of the run; files go to its sub-folder `profile`.
        active: false on ranks other than 0, which profile nothing.
    """

    def __init__(self, cfg: ProfileConfig, folder: Path, active: bool = True) -> None:
        self.cfg, self.folder = cfg, folder / "profile"
        self.active = active and cfg.tool != "none"
        self.recorder: Recorder | None = None
        self._done: list[int] = []

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.recorder is not None:
            self._stop(write=kind is None)

    def step(self, number: int) -> AbstractContextManager[Any]:
        """The range of step `number` (from 1). The first of them starts the tool, the last stops it
        and prints the table; whatever the loop does in between is recorded too."""
        if not self.active:
            return nullcontext()
        if number > self.cfg.last and not self._done:
            log.warning(
                "profile.steps=%s lie behind step %d, where this session goes on: nothing is "
                "profiled",
                self.cfg.steps,
                number - 1,
            )
            self.active = False
        if not self.cfg.first <= number <= self.cfg.last:
            return nullcontext()
        return self._recorded(number)

    @contextmanager
    def _recorded(self, number: int) -> Iterator[None]:
        if self.recorder is None:
            self._start()
        with named(STEP):
            yield
        self._done.append(number)
        if number == self.cfg.last:
            self._stop(write=True)

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tool = _TOOLS[self.cfg.tool]()
        self.tool.start(self.folder)
        self.recorder = Recorder(self.tool.mark, torch.cuda.is_available())
        self._before = install(self.recorder)

    def _stop(self, write: bool) -> None:
        from .profile_table import print_tables, write_trace

        recorder, self.recorder, self.active = self.recorder, None, False
        assert recorder is not None
        install(self._before)
        spans = recorder.spans()
        self.tool.stop(self.folder)
        if not write:
            return
        if not self.tool.wrote_trace:
            write_trace(self.folder / "trace.json", spans)
        bandwidth = measure_bandwidth() if any(span.bytes for span in spans) else None
        steps = f"{self._done[0]}-{self._done[-1]}" if self._done else self.cfg.steps
        title = f"steps {steps} under profile.tool={self.cfg.tool}"
        print_tables(self.folder / "table.txt", title, spans, bandwidth, self.tool.operators())
        log.info(
            "profile of steps %s: %s, and for chrome://tracing or ui.perfetto.dev %s",
            steps,
            self.folder / "table.txt",
            self.folder / "trace.json",
        )


def measure_bandwidth() -> float:
    """Bytes per second, read plus written, of the best of five copies on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(COPY_BYTES // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):  # the first one pays for the pages
        recorder = Recorder(lambda name, bytes: nullcontext(), device == "cuda")
        with recorder("copy"):
            target.copy_(source)
        best = min(best, recorder.spans()[0].seconds)
    return COPY_BYTES / best
