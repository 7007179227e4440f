"""Counts what interpreted Triton kernels move and how often they are launched."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass
class Traffic:
    """Bytes that lanes under their mask loaded and stored, in all and by kernel; launches by kernel."""

    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    kernel: str = ""  # the one that runs now

    @property
    def loaded(self) -> int:
        """Bytes loaded by all kernels."""
        return sum(self.loads.values())

    @property
    def stored(self) -> int:
        """Bytes stored by all kernels."""
        return sum(self.stores.values())

    @property
    def by_kernel(self) -> dict[str, tuple[int, int]]:
        """(loaded, stored) by kernel name."""
        return {name: (self.loads[name], self.stores[name]) for name in self.launches}


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count every interpreted launch inside the block. A GPU launch is not seen.

    All kinds of loads (pointers, block pointers, descriptors) end in the interpreter's masked load,
    and all stores in its masked store, so those two are counted. A lane that is masked off moves
    nothing. Caches are not modelled: an element loaded twice counts twice.
    """
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    executor: Any = interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    traffic = Traffic()

    def size(pointers: Any) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        traffic.loads[traffic.kernel] += int(mask.data.sum()) * size(ptrs)
        return load(self, ptrs, mask, *rest, **options)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stores[traffic.kernel] += int(mask.data.sum()) * size(ptrs)
        return store(self, ptrs, value, mask, *rest)

    def counted_call(self: Any, *args: Any, **options: Any) -> Any:
        traffic.kernel = self.fn.__name__
        traffic.launches[traffic.kernel] += 1
        return call(self, *args, **options)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(executor, "__call__", counted_call),
    ):
        yield traffic
