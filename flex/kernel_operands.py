"""Operands of the kernel check, and what one trial of a function is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flex.kernels.runtime import choose_impl

Results = dict[str, Tensor]
Step = Callable[[], object]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Sizes:
    """tokens: rows of x. inputs, outputs: K and N. adapters: pairs of A (rank, K) and B (N, rank)."""

    tokens: int
    inputs: int
    outputs: int
    rank: int
    adapters: int

    def __str__(self) -> str:
        return (
            f"x {self.tokens} x {self.inputs}, W {self.outputs} x {self.inputs}, rank {self.rank}; "
            f"updates of {self.adapters} adapters, {self.elements / 1e6:.2g} M elements"
        )

    @property
    def elements(self) -> int:
        return self.adapters * self.rank * (self.inputs + self.outputs)


# a CPU gets through all of them in seconds; a GPU is busy with a layer of a 7B
CPU_SIZES = Sizes(tokens=64, inputs=2048, outputs=5632, rank=16, adapters=2)
GPU_SIZES = Sizes(tokens=8192, inputs=4096, outputs=11008, rank=16, adapters=8)


@dataclass(frozen=True)
class Trial:
    """One public function on one dtype.

    Attributes:
        function: its name. case: which of its cases, "" for the only one.
        impl: what `auto` picks for it here: "torch" or "triton".
        results: calls the function on fresh operands; what it returns and writes, by name.
        eager: the same by the reference in the function's own dtype. exact: in fp64.
        ours: a call to be timed.
        plain: given a wrapper (none, or torch.compile), the formula in eager PyTorch as a call to
            be timed.
    """

    function: str
    case: str
    dtype: torch.dtype
    impl: str
    results: Callable[[], Results]
    eager: Callable[[], Results]
    exact: Callable[[], Results]
    ours: Step
    plain: Callable[[Wrap], Step]


class Maker:
    """Random operands, the same on every device, on every call."""

    def __init__(self, device: torch.device, sizes: Sizes, dtype: torch.dtype) -> None:
        self.device, self.sizes, self.dtype = device, sizes, dtype
        pair = [(sizes.rank, sizes.inputs), (sizes.outputs, sizes.rank)]
        self.shapes = pair * sizes.adapters
        self.roles = ["A", "B"] * sizes.adapters

    def normal(self, *shapes: tuple[int, ...], seed: int, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        found = [torch.randn(shape, generator=generator) for shape in shapes]
        return [x.to(self.device, dtype) for x in found]

    def matrices(self, seed: int) -> list[Tensor]:
        return self.normal(*self.shapes, seed=seed, dtype=self.dtype)

    def state(self) -> tuple[list[Tensor], ...]:
        """p, m, h (not negative) and g of all adapters."""
        p, m, h, g = (self.matrices(seed) for seed in range(4))
        return p, m, [x.square() for x in h], g

    def impl(self, kernel: str) -> str:
        return choose_impl(kernel, "auto", self.device)


def named(**lists: Sequence[Tensor]) -> Results:
    return {f"{name}[{i}]": t for name, found in lists.items() for i, t in enumerate(found)}


def rounded(found: Results, dtype: torch.dtype) -> Results:
    return {name: t.to(dtype) for name, t in found.items()}
