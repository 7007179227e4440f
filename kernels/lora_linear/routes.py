"""Which route is faster for a shape: measured at first use on a GPU, remembered on disk.

Nothing here has run on a GPU yet; the tests drive it with a clock of their own.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("flex.kernels")

CANDIDATES = ("skinny", "fused")
REPEATS = 5  # after one call that compiles; the median counts
_known: dict[str, dict[str, float]] = {}  # key -> route -> milliseconds


def fastest(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int | None,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> str:
    """The fastest of CANDIDATES for one forward and backward of these operands; x is (..., K).

    Measured once per device, dtype, K, N, r and power of two of M, and kept in `cache_file()`; a
    file that cannot be read or written costs a measurement and a warning, not the run.
    """
    key = _key(x, weight, lora_a.shape[0], dropout_p > 0)
    if key not in _known:
        _load()
    if key not in _known:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            _known[key] = {
                route: (clock or _milliseconds)(
                    functools.partial(
                        _once, route, x, weight, lora_a, lora_b, scale, dropout_p, seed
                    )
                )
                for route in CANDIDATES
            }
        log.info("lora_linear route for %s: %s", key, _verdict(_known[key]))
        _save()
    return _best(_known[key])


def table() -> str:
    """One line per shape measured so far: the key, the route taken, milliseconds of each."""
    lines = [f"{key}: {_verdict(times)}" for key, times in sorted(_known.items())]
    return "\n".join(lines) or "no route has been measured"


def cache_file() -> Path:
    """Where the measurements are kept: FLEX_ROUTES, or the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FLEX_ROUTES") or Path(cache) / "flex/lora_routes.json")


def _key(x: Tensor, weight: Tensor, rank: int, dropout: bool) -> str:
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type
    rows = x.shape[:-1].numel()
    bucket = 1 << max(0, rows - 1).bit_length()
    outputs, inputs = weight.shape
    kind = str(x.dtype).removeprefix("torch.")
    return f"{device} {kind} M{bucket} K{inputs} N{outputs} r{rank}{' dropout' if dropout else ''}"


def _once(
    route: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: int | None,
) -> None:
    from . import triton_path

    x = x.reshape(-1, x.shape[-1])
    factors = (lora_a, lora_b, scale, dropout_p, seed, None)
    y, s = triton_path.forward(x, weight, None, *factors, route=route)
    triton_path.backward(y, x, s, weight, *factors, (True, True, True), route=route)


def _milliseconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[REPEATS // 2]


def _best(times: dict[str, float]) -> str:
    return min(times, key=lambda route: times[route])


def _verdict(times: dict[str, float]) -> str:
    figures = ", ".join(f"{route} {ms:.3f} ms" for route, ms in times.items())
    return f"{_best(times)} ({figures})"


def _load() -> None:
    path = cache_file()
    try:
        saved = json.loads(path.read_text("utf-8"))
        for key, times in saved.items():
            if set(times) == set(CANDIDATES):
                _known.setdefault(key, {route: float(times[route]) for route in CANDIDATES})
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s cannot be read (%s): routes are measured anew", path, error)


def _save() -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(_known, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("%s cannot be written (%s): routes will be measured again", path, error)
