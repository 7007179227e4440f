"""The output embedding as a place to compute the loss, a block of target positions at a time.

8,192 targets over a vocabulary of 128,256 in bf16 are 2.1 GB of logits and as much again for their gradient. Where
only the loss is wanted, a block of rows is widened to logits, judged, and turned into the gradient of its hidden
states; the embedding is frozen, so nothing else is needed of the logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flex.kernels import products
from flex.model.linear import FrozenLinear

from .errors import ModelError
from .loss import loss_and_gradient
from .optim import sample_labels

log = logging.getLogger("flex.loss_head")

# Logits of one block; fewer are made in one piece, which needs no second copy of the hidden states.
BLOCK_BYTES = 256 * 1024**2
MARK = 1.0  # beside the loss: a model that scales or caps its logits changes it
# Of the config: Gemma's cap, Cohere's and Granite's scales, Falcon-H1's multiplier.
CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class Request:
    """What the next forward call is to return in place of logits."""

    keep: Tensor  # (rows, columns) bool: which positions bear loss
    labels: Tensor  # (n,) int64, of those positions
    draws: Tensor | None  # (n,) uniform: sample the labels in place of those given
    scale: float


class LossHead(FrozenLinear):
    """A linear layer over the same parameters; while a request is open it returns [loss, MARK].

    The model calls it where it would call the linear layer, so that ZeRO-3's hooks gather the weight.
    """

    request: Request | None
    trusted: bool  # the model was seen to return what the head gives it

    @classmethod
    def around(cls, linear: nn.Linear) -> LossHead:
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight = linear.weight
        head.register_parameter("bias", linear.bias)
        head.train(linear.training)
        head.request, head.trusted = None, False
        return head

    def block_rows(self, dtype: torch.dtype) -> int:
        """Rows of logits in `dtype` that make a block; at least 1."""
        return max(1, BLOCK_BYTES // (self.out_features * dtype.itemsize))

    @contextmanager
    def asked(self, request: Request) -> Iterator[None]:
        """Calls of the model in this context return the loss as their `logits`."""
        self.request = request
        try:
            yield
        finally:
            self.request = None

    def forward(self, input: Tensor) -> Tensor:
        if self.request is None:
            return super().forward(input)
        r = self.request
        hidden = input.flatten(0, 1) if bool(r.keep.all()) else input[r.keep]
        rows = self.block_rows(input.dtype)
        return cast(
            Tensor,
            _BlockLoss.apply(hidden, self.weight, self.bias, r.labels, r.draws, r.scale, rows),
        )


class _BlockLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        draws: Tensor | None,
        scale: float,
        rows: int,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            logits = products.mm(hidden[block], weight.t(), bias)
            label = labels[block] if draws is None else sample_labels(logits, draws[block])
            # the gradient takes the place of the logits
            value = loss_and_gradient(logits, label, scale, None if grad is None else logits)
            total += value
            if grad is not None:
                products.mm(logits, weight, out=grad[block])
        ctx.save_for_backward(grad)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return torch.stack([total * scale, torch.full_like(total, MARK)]).to(wide).view(1, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * upstream[0, 0, 0].to(grad.dtype), None, None, None, None, None, None


def install(model: nn.Module) -> None:
    """Put a LossHead in the place of the output embedding, if the logits are that layer's output and no more.

    Args:
        model: a PeftModel. Where its output embedding has an adapter, hooks, or is followed by a scale or a cap, it
            stays, and logits are made in one piece; the log says so.
    """
    base: Any = _base(model)
    reason = why_not(base)
    if reason is None:
        base.set_output_embeddings(LossHead.around(base.get_output_embeddings()))
    else:
        log.info("logits of a micro-batch are made in one piece: %s", reason)


def why_not(base: nn.Module) -> str | None:
    """Why the loss cannot be computed in the output embedding of `base`; None if it can."""
    linear: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None  # type: ignore[operator]
    if type(linear) not in (nn.Linear, FrozenLinear):
        return f"the output embedding is a {type(linear).__name__}"
    if any(p.requires_grad for p in linear.parameters()):
        return "the output embedding is trained"
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return "the output embedding has hooks"
    config: Any = getattr(base, "config", None)
    for name in CHANGES_LOGITS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"{name} is {getattr(config, name)}"
    return None


def find(model: nn.Module) -> LossHead | None:
    """The model's LossHead, through DeepSpeed's and PEFT's wrappers; None if there is none."""
    base: Any = _base(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return head if isinstance(head, LossHead) else None


def _base(model: nn.Module) -> nn.Module:
    inner: Any = getattr(model, "module", model)  # DeepSpeedEngine
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def loss_of(head: LossHead, output: Tensor) -> Tensor:
    """The loss in what the model returned for a request.

    Raises:
        ModelError: the model changed it on the way, in a manner that its config does not name. Not a second try in
            one piece: under ZeRO-3 the other processes would wait for ever.
    """
    if not head.trusted:
        if output.numel() != 2 or float(output.detach().flatten()[1]) != MARK:
            raise ModelError(
                "this model changes its logits after the output embedding",
                "the loss of a large micro-batch is computed block by block in that layer",
                f"raise train.accumulation until a micro-batch has at most "
                f"{head.block_rows(head.weight.dtype)} target tokens",
            )
        head.trusted = True
    return output[0, 0, 0]
