"""StepReport -> one console line and one record of metrics.jsonl.

    step 12/280 | loss 1.234 | val 1.500 | penalty 0.12 (lambda*P 2.4e-03, 0.3% of grad)
    | lr 9.8e-05 | gnorm 0.83 | clipped 41% | 1,234 tok/s | 2.1 GB | eta 3m12s    (all one line)

tok/s counts target tokens (those that bear loss) over the last `WINDOW` steps. What is not finite
is shown as nan or inf, never hidden.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from .metrics_file import MetricsFile, truncate_after
from .state import StepReport

WINDOW = 20  # steps: long enough to smooth ragged batches, short enough to show a slowdown


class Meter:
    """Shows and records a run's steps; on ranks other than 0 it only computes.

    Use as a context manager: it closes the file and the progress bar, which there is only if stderr
    is a terminal.

    Args:
        path: metrics.jsonl.
        total: steps of the whole run.
        resumed: step of the checkpoint continued from; later lines of an earlier attempt are cut.
            None: a fresh start, all lines are.
        device: whose peak memory is shown where the report does not say.
    """

    def __init__(
        self,
        path: Path,
        total: int,
        *,
        rank: int = 0,
        resumed: int | None = None,
        log_every: int = 1,
        penalty: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self._total, self._log_every, self._penalty = total, log_every, penalty
        self._device = device
        self._start = time.monotonic()
        self._window: deque[tuple[int, int, float]] = deque(maxlen=WINDOW)
        self._file: MetricsFile | None = None
        self._bar: Progress | None = None
        if rank == 0:
            truncate_after(path, -1 if resumed is None else resumed)
            self._file = MetricsFile(path)
            if sys.stderr.isatty():
                self._bar = _progress_bar()
                self._task = self._bar.add_task("steps", total=total, completed=resumed or 0)

    def __enter__(self) -> Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._file:
            self._file.close()

    def validation(self, step: int, loss: float) -> None:
        """Record a validation that belongs to no step: the one before training."""
        self._emit(
            {"step": step, "validation_loss": loss}, f"step {step}/{self._total} | val {loss:.3f}"
        )

    def update(self, report: StepReport) -> dict[str, Any]:
        """Record one step, print it if it is due, and return the record for the trackers.

        Due: each `log_every`-th step, the last one, and any that validated, ran tasks or was skipped.
        """
        self._window.append((report.tokens, report.positions, report.seconds))
        tokens, positions, seconds = (sum(column) for column in zip(*self._window, strict=True))
        record = _flatten(report)
        record["memory_bytes"] = report.memory_bytes or peak_memory(self._device)
        record["tokens_per_second"] = tokens / seconds if seconds > 0 else math.nan
        record["positions_per_second"] = positions / seconds if seconds > 0 else math.nan
        remaining = max(self._total - report.step, 0)
        record["eta_seconds"] = remaining * seconds / len(self._window)
        # Wall time of this session, validation, saving and logging included: what a benchmark must count.
        record["elapsed_seconds"] = time.monotonic() - self._start
        due = report.step % self._log_every == 0 or report.step == self._total
        due = due or report.skipped or report.validation_loss is not None
        due = due or report.passed is not None
        self._emit(record, format_line(record, self._total, self._penalty) if due else None)
        if self._bar:
            self._bar.update(self._task, completed=report.step)
        return record

    def _emit(self, record: dict[str, Any], line: str | None) -> None:
        if self._file:  # rank 0
            self._file.append(record)
            if line is not None:
                print(line, flush=True)


def format_line(record: dict[str, Any], total: int, penalty: bool = True) -> str:
    """The console line of one record (see the module's docstring)."""
    parts = [f"step {record['step']}/{total}", f"loss {record['loss']:.3f}"]
    if "validation_loss" in record:
        parts.append(f"val {record['validation_loss']:.3f}")
    if "passed" in record:
        parts.append(f"passed {record['passed']}/{record['evaluated']}")
    if penalty:
        parts.append(
            f"penalty {record['penalty']:.3g} (lambda*P {record['penalty_weighted']:.1e}, "
            f"{record['penalty_share']:.1%} of grad)"
        )
    parts += [f"lr {record['lr']:.1e}", f"gnorm {record['grad_norm']:.3g}"]
    if "clipped_fraction" in record:
        parts.append(f"clipped {record['clipped_fraction']:.0%}")
    if "curvature_mean" in record:
        parts.append(f"h {record['curvature_mean']:.1e}")
    parts += [
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"{record['memory_bytes'] / 1e9:.1f} GB",
        f"eta {format_duration(record['eta_seconds'])}",
    ]
    if record["skipped"]:
        parts.append("SKIPPED: gradient not finite, nothing updated")
    return " | ".join(parts)


def format_duration(seconds: float) -> str:
    """12s, 3m12s, 2h05m, 3d04h."""
    if not math.isfinite(seconds):
        return str(seconds)
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{minutes}m{s:02d}s" if minutes else f"{s}s"


def peak_memory(device: torch.device | str) -> int:
    """Bytes: the allocator's maximum on a GPU, this process's largest resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _flatten(report: StepReport) -> dict[str, Any]:
    """Fields of the report in order, absent ones left out, `high_band` spread over its keys."""
    record = {k: v for k, v in vars(report).items() if v is not None and k != "high_band"}
    return record | {f"high_band_{name}": share for name, share in report.high_band.items()}


def _progress_bar() -> Progress:
    # Lines printed to stdout must stay on stdout when that is a file or a pipe.
    return Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
        transient=True,
    )
