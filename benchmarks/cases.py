"""Shapes of real models, and operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder's projections. keys: outputs of k and of v, which groups of queries share."""

    name: str
    layers: int
    hidden: int
    keys: int
    inner: int

    def projections(self) -> dict[str, tuple[int, int]]:
        """(K inputs, N outputs) of the seven of a layer."""
        h, k, i = self.hidden, self.keys, self.inner
        attention = {"q": (h, h), "k": (h, k), "v": (h, k), "o": (h, h)}
        return {**attention, "gate": (h, i), "up": (h, i), "down": (i, h)}

    def adapters(self, rank: int) -> list[tuple[int, int]]:
        """A (r, K) and B (N, r) of every projection, in turns."""
        pairs = [((rank, k), (n, rank)) for k, n in self.projections().values()]
        return [shape for pair in pairs * self.layers for shape in pair]


CODE_LLAMA_7B = Model("Code Llama 7B", 32, 4096, 4096, 11008)
LLAMA_3_8B = Model("Llama 3 8B", 32, 4096, 1024, 14336)
QWEN_CODER_7B = Model("Qwen2.5-Coder 7B", 28, 3584, 512, 18944)
SMOLLM2_135M = Model("SmolLM2-135M", 30, 576, 192, 1536)
TINY = Model("tiny", 2, 64, 64, 128)  # for a trial of the code


def normal(
    shapes: Sequence[tuple[int, ...]], seed: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
