"""What this machine's processor has."""

from __future__ import annotations

import torch


def has_bf16_dots_alone() -> bool:
    """Whether it has AVX-512's bf16 dot products and no AMX: torch's products use AMX's tiles, our C does not, and
    which of them is faster there was not measured."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
