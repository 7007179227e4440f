"""The specification of `lora_linear`: plain differentiable PyTorch, any dtype."""

from __future__ import annotations

from torch import Tensor


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * drop(x) A^T B^T with drop(x) = x * keep / (1 - p).

    Hu et al. 2021 (LoRA), equation 3, with the dropout of their section 5 on the input of A.

    Shapes: x (..., K), weight W (N, K), bias (N,), lora_a A (r, K), lora_b B (N, r), keep (..., K)
    bool, y (..., N). Everything is computed in x's dtype; gradients by autograd.
    """
    dropped = x if keep is None else x * keep / (1 - dropout_p)
    y = x @ weight.T + scale * (dropped @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)
