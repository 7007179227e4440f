"""The kernels on this machine: how much of its error budget each public function uses, and its time.

Held against the formula in eager PyTorch (reference.py of each kernel) and, where a compiler is there, against
torch.compile of that formula. Small sizes: this says whether an installation is right and roughly what it
gains; the benchmarks measure.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from flex.kernel_operands import CPU_SIZES, GPU_SIZES, Sizes, Step, Trial
from flex.kernel_trials import trials
from flex.kernels.budget import budget_used

ROUNDS = 5
COMPILE_SECONDS = 25.0  # for all functions together, so that the check stays under a minute
NO_COMPILER = "not measured: no compiler"


@dataclass(frozen=True)
class Finding:
    """One function on one dtype.

    Attributes:
        used: the largest error over its budget; None if the function raised.
        worst: which result that is of; of a function that raised, the error.
        ours, eager, compiled: median milliseconds; of what was not measured, why.
    """

    trial: Trial
    used: float | None
    worst: str
    ours: float | str
    eager: float | str
    compiled: float | str

    @property
    def failed(self) -> bool:
        return self.used is None or not self.used <= 1.0


class Compiler:
    """torch.compile while the time for it lasts, and why not where it does not."""

    def __init__(self, seconds: float) -> None:
        self.left = self.seconds = seconds
        self.missing = None if shutil.which(os.environ.get("CXX", "g++")) else NO_COMPILER

    def step(self, trial: Trial) -> Step | str:
        """The trial's formula, compiled and called once; or the reason for that there is none."""
        if self.missing:
            return self.missing
        if self.left <= 0:
            return f"not measured: {self.seconds:.0f} s of compiling are over"
        begin = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it leaves the FFTs to eager
                step = trial.plain(torch.compile)
                step()
                step()  # a second call may compile once more, for dynamic shapes
        except Exception as error:  # whatever the compiler raises is the answer
            return f"not measured: {_first_line(error)}"
        finally:
            self.left -= time.perf_counter() - begin
        return step


def check(device: torch.device, sizes: Sizes, compile_seconds: float) -> Iterator[Finding]:
    """Try every public kernel function as `impl="auto"` runs it on a device.

    Args:
        sizes: of the operands.
        compile_seconds: after so long no other formula is given to torch.compile; 0: none is.
    """
    compiler = Compiler(compile_seconds)
    for trial in trials(device, sizes):
        try:
            used, worst = _accuracy(trial)
        except Exception as error:  # a function that cannot run is what this is to find
            yield Finding(trial, None, _first_line(error), *["not measured: it failed"] * 3)
            continue
        if not used <= 1.0:  # NaN as well; the time of a wrong result says nothing
            yield Finding(trial, used, worst, *["not measured: it failed"] * 3)
            continue
        compiled = compiler.step(trial)
        steps = [trial.ours, trial.plain(lambda f: f)]
        times = _medians(device, [*steps, *([] if isinstance(compiled, str) else [compiled])])
        last = compiled if isinstance(compiled, str) else times[2]
        yield Finding(trial, used, worst, times[0], times[1], last)


def _accuracy(trial: Trial) -> tuple[float, str]:
    """The largest share of a budget that is used, and which result's."""
    results, eager, exact = trial.results(), trial.eager(), trial.exact()
    if results.keys() != exact.keys():
        raise ValueError(f"it gave {sorted(results)}, not {sorted(exact)}")
    return max((budget_used(results[n], eager[n], exact[n]), n) for n in exact)


def _medians(device: torch.device, steps: Sequence[Step]) -> list[float]:
    """Milliseconds of each, called in turns."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(ROUNDS + 1):
        for step, found in zip(steps, seconds, strict=True):
            _wait(device)
            begin = time.perf_counter()
            step()
            _wait(device)
            if turn:  # the first warms up
                found.append(time.perf_counter() - begin)
    return [1e3 * statistics.median(found) for found in seconds]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def table(findings: Sequence[Finding]) -> Table:
    """A row per function and dtype."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "function",
        "case",
        "dtype",
        "auto",
        "budget used",
        "ms",
        "eager",
        "torch.compile",
        "",
    ):
        right = title in ("budget used", "ms", "eager", "torch.compile")
        found.add_column(title, justify="right" if right else "left")
    for f in findings:
        found.add_row(
            *(f.trial.function, f.trial.case, str(f.trial.dtype).removeprefix("torch.")),
            *(f.trial.impl, "" if f.used is None else f"{f.used:.2f}"),
            *(f"{f.ours:.2f}" if isinstance(f.ours, float) else "", _beside(f.eager, f.ours)),
            *(_beside(f.compiled, f.ours), f"FAILED: {f.worst}" if f.failed else "OK"),
            style="red" if f.failed else "",
        )
    return found


def _beside(other: float | str, ours: float | str) -> str:
    """Another's time, and how many times ours it is."""
    if isinstance(other, str) or isinstance(ours, str):
        return "-"
    return f"{other:.2f} ({other / ours:.2f} x)"


def main(sizes: Sizes | None = None, compile_seconds: float = COMPILE_SECONDS) -> int:
    """Check this machine's device and print the table; status 1 if a function is over its budget."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"Kernels on {where}, {torch.get_num_threads()} threads: {sizes}")
    findings = list(check(device, sizes, compile_seconds))
    # a pipe gets a line per row, so that it can be searched
    Console(width=None if sys.stdout.isatty() else 200).print(table(findings))
    print(
        "budget used: error against fp64 over its budget, 2 x (eager's error in this dtype + eps x max). "
        f"Times: medians of {ROUNDS} rounds in turns; (x): how many times as long as ours."
    )
    for reason in dict.fromkeys(f.compiled for f in findings if isinstance(f.compiled, str)):
        these = [f for f in findings if f.compiled == reason]
        names = ", ".join(f"{f.trial.function} {f.trial.case} {f.trial.dtype}" for f in these)
        print(f"torch.compile, {reason}: {names}")
    if device.type != "cuda":
        print("The Triton kernels: not measured on a GPU, there is none here.")
    failed = sum(f.failed for f in findings)
    print(f"{len(findings)} checks, {failed} FAILED")
    return 1 if failed else 0
