"""What this machine can do, measured in the session that measures the figures: bandwidth and GEMM rate.

A ceiling is the fastest of its rounds: a limit that something once passed is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.harness.figure import Work
from flex.kernels import products

ROUNDS = 5
TINY_BYTES = 2**20
LEAST_BYTES = 2**28  # beyond most caches; CACHES x the largest one where that is known
CACHES = 2
GEMM = (2048, 4096, 4096)  # M, N, K
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes/s read and written. gemm: FLOP/s by dtype's name. buffer: bytes that were copied."""

    bandwidth: float
    gemm: dict[str, float]
    buffer: int

    def floor(self, work: Work) -> float:
        """Seconds below which the work cannot be done here; 0 if nothing was counted."""
        return max(work.bytes / self.bandwidth, work.flops / self.gemm[work.dtype])

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in self.gemm.items())
        size = f"{self.buffer / 2**20:.0f} MiB"
        return f"{self.bandwidth / 1e9:.1f} GB/s (copy or sum of {size}), GEMM {rates}"


def measure(device: torch.device, tiny: bool) -> Ceilings:
    """About 3 s on two cores; memory: two buffers.

    Args:
        tiny: numbers without meaning, at once, for a trial of the code.
    """
    size = TINY_BYTES if tiny else buffer_bytes()
    bandwidth = _bandwidth(size, device)
    m, n, k = (64, 64, 64) if tiny else GEMM
    gemm = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(s, device=device).to(dtype) for s in ((m, k), (n, k)))
        with torch.no_grad():
            seconds = min(
                _fastest(lambda a=a, b=b: torch.nn.functional.linear(a, b), device),
                _fastest(lambda a=a, b=b: products.mm(a, b.t()), device),
            )
        gemm[name] = 2.0 * m * n * k / seconds
    return Ceilings(bandwidth, gemm, size)


def _bandwidth(size: int, device: torch.device) -> float:
    """Bytes/s: both directions of a copy count; a sum in place reads two and writes one."""
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    return max(2 * size / copy, 3 * size / _fastest(lambda: target.add_(source), device))


def buffer_bytes() -> int:
    """Much larger than the last cache, and never more than a sixteenth of the memory."""
    wanted = max(LEAST_BYTES, CACHES * last_cache())
    return min(wanted, psutil.virtual_memory().total // 16) // 4096 * 4096


def last_cache() -> int:
    """Bytes of the largest cache of the first core as Linux tells them; 0 where it does not."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text("ascii").strip()
        found.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(found)


def _fastest(step: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):  # the first also touches fresh pages; it is never the fastest
        wait(device)
        begin = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
