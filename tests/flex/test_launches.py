"""What one optimizer step launches, whatever the number of adapter matrices.

Counted: Triton launches, and torch operations that would launch a kernel if the tensors were on a GPU. Not
counted: allocations and views; a number that the host reads back; tables that the host builds out of sizes,
addresses and scalars and copies over (a copy is no kernel); and what Triton's interpreter does with torch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flex.engine import Engine
from flex.kernels.sophia_update import table
from flex.kernels.spectral_penalty import kernel, tables
from flex.optim import Sophia
from flex.penalty import LoraPair, SpectralPenalty

BUDGET = 8
WIDTH, INNER, RANK, LAYERS = 64, 172, 2, 32
LINEARS = ((WIDTH, WIDTH),) * 4 + ((INNER, WIDTH),) * 2 + ((WIDTH, INNER),)  # (out, in)
BUILDERS = ((tables, "tables"), (kernel, "owners"), (table, "_layout"))
FREE = {
    *("empty", "empty_like", "new_empty", "detach", "view", "select", "slice", "split", "unbind"),
    *("t", "lift_fresh", "_local_scalar_dense", "_record_function_enter_new"),
    *("_record_function_exit", "split_with_sizes"),
}


class Operations(TorchDispatchMode):
    """Counts torch operations that would launch a kernel, by name, while it is not paused."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.paused = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        if not self.paused and name not in FREE:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    def pausing(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, with nothing counted in it."""

        def paused(*args: Any, **options: Any) -> Any:
            self.paused += 1
            try:
                return run(*args, **options)
            finally:
                self.paused -= 1

        return paused


@contextlib.contextmanager
def count_launches() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """(Triton launches, torch operations) of the block, by name."""
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    mode, launches = Operations(), Counter[str]()
    call = mode.pausing(executor.__call__)

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        launches[self.fn.__name__] += 1
        return call(self, *args, **options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(executor, "__call__", counted))
        for module, name in BUILDERS:
            built = mode.pausing(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, built))
        stack.enter_context(mode)
        yield launches, mode.found


def make_step() -> tuple[SpectralPenalty, Engine]:
    """A penalty and an engine before the update, gradients in place."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator))

    pairs = [
        LoraPair(f"{i}.A", randn(RANK, k), f"{i}.B", randn(n, RANK))
        for i, (n, k) in enumerate(LINEARS * LAYERS)
    ]
    named = {name: w for p in pairs for name, w in ((p.a_name, p.a), (p.b_name, p.b))}
    penalty = SpectralPenalty(pairs, transform="axis", weight=0.02, impl="triton")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, offset in penalty.curvature_constants().items():
        groups.setdefault(offset, []).append(named[name])
    optimizer = Sophia(
        [{"params": params, "curvature_offset": offset} for offset, params in groups.items()],
        impl="torch",
    )
    engine = Engine(nn.Module(), optimizer, named, clip_norm=1.0)
    for w in named.values():
        w.grad = torch.randn(w.shape, generator=generator)
    optimizer.accumulate_curvature(8)
    optimizer.commit_curvature()
    optimizer.impl = "triton"
    for w in named.values():
        w.data.mul_(1.1)
    return penalty, engine


def test_a_step_over_448_matrices_is_at_most_8_launches() -> None:
    penalty, engine = make_step()
    params = list(engine.parameters.values())
    assert len(params) == 448
    before = [w.detach().clone() for w in params]
    with count_launches() as (launches, operations):
        report = penalty.add_gradients()
        update = engine.update(1e-3)
    assert not update.skipped and report.grad_norm > 0
    assert all((w != old).any() for w, old in zip(params, before, strict=True))
    assert all(w.grad is None for w in params)
    assert launches["_penalty_kernel"] == 2, "one for each length of the feature axis"
    assert launches.total() + operations.total() <= BUDGET, (launches, operations)
    assert launches.total() == 7 and operations == {"sum": 1}, (launches, operations)
