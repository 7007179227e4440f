"""LoRA linear layer over a frozen weight: y = x W^T + bias + scale * drop(x) A^T B^T."""

from .api import lora_linear, remakable
from .api_siblings import lora_linear_siblings

__all__ = ["lora_linear", "lora_linear_siblings", "remakable"]
