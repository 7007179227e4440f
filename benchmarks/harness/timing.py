"""Variants called in turns, in an order drawn anew for each round, and what one call needs in memory."""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.ceilings import wait
from benchmarks.harness.figure import OURS

Step = Callable[[], object]
WARM_UP = 2  # calls of each variant that do not count
LEAST, MOST = 5, 60  # rounds
SEED = 0  # of the orders


def in_turns(
    benchmark: Any, steps: Mapping[str, Step], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each step in each round. pytest-benchmark times "ours", which must be among them.

    Args:
        benchmark: pytest-benchmark's fixture, unused so far.
        seconds: about how long to measure; LEAST rounds are done however long they take.

    Returns: lists of equal length; empty ones if pytest-benchmark is disabled (each step ran WARM_UP times).
    """
    once = sum(_warm(step, device) for step in steps.values())
    rounds = max(LEAST, min(MOST, int(seconds / max(once, 1e-9))))
    others = [name for name in steps if name != OURS]
    found: dict[str, list[float]] = {name: [] for name in steps}
    chance, waiting = random.Random(SEED), list[str]()

    def others_of_round() -> None:
        """The rest of the last round, then those that come before ours in this one."""
        nonlocal waiting
        order = chance.sample(others, len(others))
        cut = chance.randint(0, len(others))
        for name in waiting + order[:cut]:
            found[name].append(_seconds(steps[name], device))
        waiting = order[cut:]

    def ours() -> None:
        steps[OURS]()
        wait(device)

    if not benchmark.enabled:
        return found
    gc.collect()
    benchmark.pedantic(ours, setup=others_of_round, rounds=rounds, iterations=1)
    for name in waiting:
        found[name].append(_seconds(steps[name], device))
    return {**found, OURS: list(benchmark.stats.stats.data)}


def _warm(step: Step, device: torch.device) -> float:
    return statistics.mean([_seconds(step, device) for _ in range(WARM_UP)][-1:])


def _seconds(step: Step, device: torch.device) -> float:
    wait(device)
    begin = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - begin


def peak_memory(step: Step, device: torch.device) -> float | None:
    """Bytes that torch had allocated at most during one call, beyond those before it.

    On a CPU torch's profiler tells each allocation; memory that a library takes by itself is not seen.
    None where the profiler tells none.
    """
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        wait(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    gc.collect()
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]"]
    changes.sort(key=lambda e: e["ts"])
    if not changes:
        return None
    now = most = 0
    for event in changes:
        now += event["args"]["Bytes"]
        most = max(most, now)
    return float(most)
