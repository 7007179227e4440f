"""The update of fp32 tensors on a CPU: one pass over memory for any number of tensors, in C.

The list operations of `torch_step.py` read and write memory about ten times. torch.compile makes one pass of
a large vector, but for 448 matrices it takes 1.5 to 1.8 times torch's fused AdamW: guards, views and loops
cost per tensor. This source takes 0.9 times (40 M elements, 2 cores), and the system's compiler needs 0.1 s
for it. It follows the reference's order without contracted products, so that a result depends neither on the
machine, nor on the number of threads, nor on how ZeRO cuts the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..native_build import LONG, POINTER, compile_or_warn, in_shares

SOURCE = r"""
#include <stdint.h>
typedef struct { float *p, *m; const float *h, *g; int64_t size; } Item;

/* NaN goes through every comparison, as through torch's clamp. The count is as wide as a float, or the
   compiler would not vectorise. */
static int32_t update(float *restrict p, float *restrict m, const float *restrict h, const float *restrict g,
                      int32_t size, const float *row)
{
    const float lr = row[0], lr_decay = row[1], beta1_rest = row[2], m_scale = row[3];
    const float h_factor = row[4], h_offset = row[5], eps = row[6], factor = row[7];
    int32_t clipped = 0;
    for (int32_t i = 0; i < size; i++) {
        const float momentum = m[i] + beta1_rest * (g[i] * factor - m[i]);
        float floor = h[i] * h_factor + h_offset;
        floor = floor < eps ? eps : floor;
        float ratio = momentum * m_scale / floor;
        clipped += __builtin_fabsf(ratio) > 1.0f ? 1 : 0;
        ratio = ratio < -1.0f ? -1.0f : ratio;
        ratio = ratio > 1.0f ? 1.0f : ratio;
        m[i] = momentum;
        p[i] = p[i] - (lr * ratio + lr_decay * p[i]);
    }
    return clipped;
}

/* Coordinates [begin, end) of all tensors laid end to end. Returns how many were clipped. */
int64_t sophia_step(const Item *item, int64_t begin, int64_t end, const float *row)
{
    enum { BLOCK = 1 << 20 };
    int64_t clipped = 0;
    for (; end > 0; begin -= item->size, end -= item->size, item++) {
        int64_t i = begin > 0 ? begin : 0;
        const int64_t stop = end < item->size ? end : item->size;
        for (; i < stop; i += BLOCK)
            clipped += update(item->p + i, item->m + i, item->h + i, item->g + i,
                              (int32_t)(stop - i < BLOCK ? stop - i : BLOCK), row);
    }
    return clipped;
}
"""


def takes(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the C update takes these tensors, by device, dtype and strides."""
    return all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous()
        for tensors in lists
        for t in tensors
    )


@functools.cache  # one attempt per process
def native_step() -> Callable[..., int] | None:
    """`sophia_step` of SOURCE; None, and one line in the log, if it cannot be compiled or loaded."""
    arguments = {"sophia_step": (POINTER, LONG, LONG, POINTER)}
    what = "sophia_update: its C source"
    library = compile_or_warn("sophia", SOURCE, arguments, what, "list operations")
    if library is None:
        return None
    step = library.sophia_step
    step.restype = LONG
    return step


def native_update(
    step: Callable[..., int],
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    grads: Sequence[Tensor],
    row: tuple[float, ...],
    factor: float,
) -> Tensor:
    """All tensors of one group, cut into equal shares for torch's number of threads. Returns the count, int64."""
    items = zip(params, exp_avgs, curvatures, grads, strict=True)
    table = torch.tensor(
        [(*(t.data_ptr() for t in item), item[0].numel()) for item in items], dtype=torch.int64
    )
    scalars = torch.tensor([*row[:7], factor], dtype=torch.float32)
    total = int(table[:, 4].sum())
    counts: list[int] = []

    def work(begin: int, end: int) -> None:  # the call lets go of the GIL
        counts.append(step(table.data_ptr(), begin, end, scalars.data_ptr()))

    in_shares(work, total, total)
    return torch.tensor(sum(counts))
