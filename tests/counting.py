"""Counts what interpreted Triton kernels move and how often they are launched."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np


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
    and all stores in its masked store, so those two are counted; an atomic reads and writes. A lane
    that is masked off moves nothing. Caches are not modelled: an element loaded twice counts twice.
    """
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    executor: Any = interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas
    traffic = Traffic()

    def add(counter: Counter[str], pointers: Any, lanes: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        # a block pointer's mask is a bare array
        lanes = lanes if isinstance(lanes, np.ndarray) else lanes.data
        counter[traffic.kernel] += int(np.count_nonzero(lanes)) * width

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        add(traffic.loads, ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        add(traffic.stores, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def counted_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        add(traffic.loads, ptr, mask)
        add(traffic.stores, ptr, mask)
        return rmw(self, op, ptr, val, mask, *rest)

    def counted_cas(self: Any, ptr: Any, *rest: Any) -> Any:
        everywhere = np.ones_like(ptr.data, dtype=bool)
        add(traffic.loads, ptr, everywhere)
        add(traffic.stores, ptr, everywhere)
        return cas(self, ptr, *rest)

    def counted_call(self: Any, *args: Any, **options: Any) -> Any:
        traffic.kernel = self.fn.__name__
        traffic.launches[traffic.kernel] += 1
        return call(self, *args, **options)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_atomic_rmw", counted_rmw),
        mock.patch.object(builder, "create_atomic_cas", counted_cas),
        mock.patch.object(executor, "__call__", counted_call),
    ):
        yield traffic
