"""The kernel check's trial of the LoRA linear layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from flex.kernel_operands import Maker, Results, Step, Trial, Wrap, rounded
from flex.kernels.lora_linear import lora_linear
from flex.kernels.lora_linear.dropout import keep_mask
from flex.kernels.lora_linear.reference import lora_linear_reference

SCALE, DROPOUT, SEED = 2.0, 0.1, 4321


def lora_trial(make: Maker) -> Trial:
    """Forward and backward against the reference with the same mask; timed beside PEFT's form of it."""
    sizes, dtype = make.sizes, make.dtype
    k, n, r = sizes.inputs, sizes.outputs, sizes.rank
    x, weight, dy = make.normal((sizes.tokens, k), (n, k), (sizes.tokens, n), seed=0, dtype=dtype)
    weight.mul_(k**-0.5)
    a, b = make.normal((r, k), (n, r), seed=1, dtype=torch.float32)
    a, b = (a * k**-0.5).requires_grad_(), (b * r**-0.5).requires_grad_()
    x.requires_grad_()
    keep = keep_mask(SEED, sizes.tokens, k, DROPOUT, make.device).view(x.shape) != 0

    def gradients(y: Tensor, *leaves: Tensor) -> Results:
        dx, da, db = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return {"y": y.detach(), "dx": dx, "dA": da, "dB": db}

    def ours() -> Results:
        return gradients(lora_linear(x, weight, None, a, b, SCALE, DROPOUT, SEED), x, a, b)

    def reference(wide: torch.dtype) -> Results:
        # A and B are rounded to x's dtype for the products
        wx, wa, wb = (t.detach().to(wide).requires_grad_() for t in (x, a, b))
        y = lora_linear_reference(wx, weight.to(wide), None, wa, wb, SCALE, DROPOUT, keep)
        return rounded(gradients(y, wx, wa, wb), wide)

    def peft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = linear(dropout(x, DROPOUT), a.to(x.dtype))
        return linear(x, weight) + SCALE * linear(low, b.to(x.dtype))

    def plain(wrap: Wrap) -> Step:
        forward = wrap(peft)
        return lambda: gradients(forward(x, weight, a, b), x, a, b)

    return Trial(
        "lora_linear",
        "forward + backward",
        dtype,
        make.impl("lora_linear"),
        ours,
        lambda: reference(dtype),
        lambda: reference(torch.float64),
        ours,
        plain,
    )
