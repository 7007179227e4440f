"""Named ranges around kernels, for whatever profiler is on. Nothing is recorded unless one is.

    with named("lora_linear/forward", bytes=lambda: 2 * x.nbytes + y.nbytes):
        ...

Kernels only say where a range is and what it must move; who records it, and how, is set from
outside by `install`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
# (name, least number of bytes that must be read and written, or None where no closed form is known)
RangeFactory = Callable[[str, int | None], AbstractContextManager[Any]]

_OFF: AbstractContextManager[Any] = nullcontext()  # one for all: it holds nothing
_active: RangeFactory | None = None


def named(name: str, bytes: int | Callable[[], int] | None = None) -> AbstractContextManager[Any]:
    """A context manager that marks what runs inside as `name`.

    Args:
        name: "<kernel>/<part>" for kernels, a plain word for a phase of a step.
        bytes: the closed form of what the part must read and write at least, for the share of the
            floor; none where there is no closed form. A function of no arguments is called only
            if a profiler is on.
    """
    if _active is None:
        return _OFF
    return _active(name, bytes() if callable(bytes) else bytes)


def ranged(
    name: str, bytes: Callable[..., int] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`named` as a decorator; `bytes` gets the function's arguments, and only if a profiler is on."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            if _active is None:
                return function(*args, **kwargs)
            with _active(name, None if bytes is None else bytes(*args, **kwargs)):
                return function(*args, **kwargs)

        return inside

    return decorate


def install(factory: RangeFactory | None) -> RangeFactory | None:
    """Let `factory` make all ranges from now on; None turns them off. Returns the one before."""
    global _active
    before, _active = _active, factory
    return before
