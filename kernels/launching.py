"""What launchers of Triton kernels share."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # bytes: what a 128-bit load needs
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: pageable memory would make it wait for the device."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
