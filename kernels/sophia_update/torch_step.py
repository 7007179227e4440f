"""The update in PyTorch: list operations, and on a CPU one compiled pass over large tensors.

List operations (`torch._foreach_*`) read and write memory about ten times per step. The compiled step
does it once, 24 bytes per fp32 parameter, at the price of a compilation that takes seconds, so it is
for many parameters only. The two differ by rounding: torch's lerp contracts a product and a sum.
Which of them a call takes depends on sizes and dtypes alone, so a resumed run takes the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("flex.kernels")

# Elements of a call from which on it is compiled. Compiling takes 5 to 40 s with cold caches and
# 2 s with warm ones; on two cores of an EPYC (Zen 4, torch 2.13) it saves 2.3 ms a million elements and
# step (448 matrices of 40 M in all: 49 ms, list operations 141). At 8 million that repays warm caches
# in 110 steps and cold ones in 300 to 2,200; below, a short run would wait longer than it trains.
COMPILE_FROM = 8_000_000
SLOTS = 16  # tensors per call of the compiled step: 5 us a tensor, where one at a time costs 25


def torch_update(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    grads: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    row: tuple[float, ...],
    factor: float,
    compiled: bool,
) -> Tensor:
    """Update one group in place. row: `Scalars.row`; factor: of the gradient. Returns the count, int64."""
    p, m, h, g = list(params), list(exp_avgs), list(curvatures), list(grads)
    step = compiled_step() if compiled else None
    update = _foreach if step is None else functools.partial(_in_slots, step)
    clipped = update(p, m, h, g, row, factor)
    if copies is not None:
        torch._foreach_copy_(list(copies), p)
    return clipped


def compilable(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the compiled step takes these tensors, by device, dtype and strides."""
    return all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous()
        for tensors in lists
        for t in tensors
    )


def _foreach(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    curvatures: list[Tensor],
    grads: list[Tensor],
    row: tuple[float, ...],
    factor: float,
) -> Tensor:
    lr, lr_decay, beta1_rest, m_scale, h_factor, h_offset, eps = row[:7]
    if factor != 1.0:
        grads = list(torch._foreach_mul(grads, factor))
    torch._foreach_lerp_(exp_avgs, grads, beta1_rest)
    floors = torch._foreach_mul(curvatures, h_factor)
    if h_offset:
        torch._foreach_add_(floors, h_offset)
    torch._foreach_clamp_min_(floors, eps)
    ratios = torch._foreach_mul(exp_avgs, m_scale)
    torch._foreach_div_(ratios, floors)
    clipped = torch.stack([torch.count_nonzero(r.abs() > 1) for r in ratios]).sum()
    torch._foreach_clamp_min_(ratios, -1.0)
    torch._foreach_clamp_max_(ratios, 1.0)
    if lr_decay:
        torch._foreach_mul_(params, 1 - lr_decay)
    torch._foreach_add_(params, ratios, alpha=-lr)
    return clipped


def _one(p: Tensor, m: Tensor, h: Tensor, g: Tensor, scalars: tuple[Tensor, ...]) -> Tensor:
    """`sophia_reference` in place on one vector; returns the count, int32."""
    lr, lr_decay, beta1_rest, m_scale, h_factor, h_offset, eps, factor = scalars
    new_m = m + beta1_rest * (g * factor - m)
    ratio = new_m * m_scale / torch.maximum(h * h_factor + h_offset, eps)
    new_p = p - (lr * ratio.clamp(-1.0, 1.0) + lr_decay * p)
    # int32: half the registers of int64, and a tensor of 2^31 elements is not a LoRA matrix
    clipped = (ratio.abs() > 1.0).sum(dtype=torch.int32)
    m.copy_(new_m)
    p.copy_(new_p)
    return clipped


def _step(
    p: list[Tensor], m: list[Tensor], h: list[Tensor], g: list[Tensor], scalars: Tensor
) -> Tensor:
    unbound = scalars.unbind()
    items = zip(p, m, h, g, strict=True)
    return torch.stack([_one(p_i, m_i, h_i, g_i, unbound) for p_i, m_i, h_i, g_i in items])


@functools.cache  # one attempt per process
def compiled_step() -> Callable[..., Tensor] | None:
    """`_step` compiled for SLOTS vectors of any sizes above 1; None, and a line in the log, if it cannot be.

    Scalars are a tensor, so a new learning rate compiles nothing. Sizes are symbols, each its own
    because the vectors compiled with differ. It is compiled on tensors of no use: a failure harms none.
    """
    step: Callable[..., Tensor] = torch.compile(
        _step,
        dynamic=True,
        fullgraph=True,
        options={
            "compile_threads": 1,  # no pool of worker processes for one kernel
            "cpp.dynamic_threads": True,  # else the number of threads now is compiled in
            "size_asserts": False,  # 64 tensors a call: checking costs more than dispatching
            "alignment_asserts": False,
        },
    )
    # Large enough that the compiler parallelises the loops, which it decides by these sizes.
    vectors = [[torch.zeros(65536 + 16 * i) for i in range(SLOTS)] for _ in range(4)]
    try:
        with torch.no_grad():
            step(*vectors, torch.ones(8))
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(
            "sophia_update: torch.compile failed (%s); list operations take its place, several times "
            "slower. A C++ compiler on the PATH mends it",
            first,
        )
        return None
    return step


@functools.cache
def _fillers() -> tuple[list[Tensor], ...]:
    """Distinct tensors for slots that a call leaves empty."""
    return tuple([torch.ones(2) for _ in range(SLOTS)] for _ in range(4))


def _in_slots(
    step: Callable[..., Any],
    params: list[Tensor],
    exp_avgs: list[Tensor],
    curvatures: list[Tensor],
    grads: list[Tensor],
    row: tuple[float, ...],
    factor: float,
) -> Tensor:
    """All tensors of one group through the compiled step, SLOTS at a time."""
    lists = (params, exp_avgs, curvatures, grads)
    # The compiler takes sizes 0 and 1 for constants, and would compile anew for them.
    large = [i for i, p in enumerate(params) if p.numel() > 1]
    clipped = torch.zeros((), dtype=torch.int64)
    single = [[x[i] for i, p in enumerate(params) if p.numel() == 1] for x in lists]
    if single[0]:
        clipped += _foreach(single[0], single[1], single[2], single[3], row, factor)
    scalars = torch.tensor([*row[:7], factor])
    for start in range(0, len(large), SLOTS):
        chosen = large[start : start + SLOTS]
        vectors = [[x[i].detach().view(-1) for i in chosen] for x in lists]
        for vector, filler in zip(vectors, _fillers(), strict=True):
            vector += filler[len(vector) :]
        clipped = clipped + step(*vectors, scalars)[: len(chosen)].sum(dtype=torch.int64)
    return clipped
