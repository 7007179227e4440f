"""Causal attention of bf16 on a CPU in C, forward and backward: scores exist for 48 rows at a time, in cache.

16 documents of 170 positions (9 heads of 64 over 3 key heads), one core of a Zen 4: 15 ms forward and backward, by
torch's batched products and a softmax in C 35 ms. One of 2048 (32 heads of 128 over 8): 0.64 s, by torch's flash
attention 1.5 s. Maths and layout: source.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..native_build import FLOAT, INT, LONG, POINTER, compile_with_dots, in_shares
from ..processor import has_bf16_dots_alone
from .source import SOURCE

ROWS, LANES = 48, 16  # as in SOURCE: query heads of one key head at most; floats of a vector

_POINTERS = ("q", "k", "v", "dy", "cos", "sin", "y", "dq", "dk", "dv", "stats")
_STRIDED = ("q", "k", "v", "dy")


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in _POINTERS),
        *((f"{name}_{axis}", LONG) for name in _STRIDED for axis in ("position", "head")),
        *((name, LONG) for name in ("heads", "groups", "width")),
        ("scale", FLOAT),
    ]


@functools.cache  # one attempt per process
def compiled() -> ctypes.CDLL | None:
    """The compiled SOURCE; None where the processor has no bf16 dot products, or, with one line in the log, if it
    cannot be compiled or loaded."""
    run = (POINTER, POINTER, LONG, POINTER, POINTER)
    arguments = {
        "forward": run,
        "backward": run,
        "scratch_bytes": (LONG, LONG, INT),
    }
    found = compile_with_dots("attention", SOURCE, arguments, "causal_attention: its C source")
    if found is not None:
        found.scratch_bytes.restype = LONG
    return found


def library() -> ctypes.CDLL | None:
    """`compiled`, where it suits the processor."""
    return compiled() if has_bf16_dots_alone() else None


@functools.lru_cache(maxsize=16)  # all layers of a step share it
def _documents(lengths: tuple[int, ...]) -> Tensor:
    """(documents, 2) int64: first position and length, the longest first, so that no thread ends long after others."""
    start, found = 0, []
    for length in lengths:
        found.append((start, length))
        start += length
    found.sort(key=lambda document: -document[1])
    return torch.tensor(found, dtype=torch.int64, device="cpu").reshape(-1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    angles: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """y (T, H, D), and of every row (T, H, 2) its largest score and one over its sum, fp32."""
    y = q.new_empty(q.shape)
    stats = torch.empty(*q.shape[:2], 2, device="cpu", dtype=torch.float32)
    job = _job({"q": q, "k": k, "v": v, "y": y, "stats": stats}, angles, scale)
    _run("forward", job, lengths)
    return y, stats


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    stats: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    angles: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous."""
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    given = {"q": q, "k": k, "v": v, "dy": dy, "stats": stats, "dq": dq, "dk": dk, "dv": dv}
    _run("backward", _job(given, angles, scale), lengths)
    return dq, dk, dv


def _job(tensors: dict[str, Tensor], angles: Sequence[Tensor], scale: float) -> _Job:
    named = {**tensors, **dict(zip(("cos", "sin"), angles, strict=False))}
    job = _Job(**{name: t.data_ptr() for name, t in named.items()})
    for name in _STRIDED:
        if name in named:
            position, head, _ = named[name].stride()
            setattr(job, f"{name}_position", position)
            setattr(job, f"{name}_head", head)
    (_, rows, job.width), job.heads = named["q"].shape, named["k"].shape[1]
    job.groups, job.scale = rows // job.heads, scale
    return job


def _run(what: str, job: _Job, lengths: tuple[int, ...]) -> None:
    c = library()
    assert c is not None  # `takes` has looked
    documents, taken = _documents(lengths), torch.zeros(1, dtype=torch.int64, device="cpu")
    room = c.scratch_bytes(max(lengths, default=0), job.width, what == "backward")
    run = getattr(c, what)

    def work(begin: int, end: int) -> None:  # takes whichever task is next, until none is left
        scratch = torch.empty(room, dtype=torch.uint8, device="cpu")
        at = (documents.data_ptr(), len(documents), taken.data_ptr(), scratch.data_ptr())
        run(ctypes.byref(job), *at)

    scores = job.heads * job.groups * sum(n * n for n in lengths)
    in_shares(work, len(documents) * job.heads, scores)
