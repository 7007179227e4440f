"""What kernels share: which implementation runs where, their dtypes, how they refuse."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection

import torch

log = logging.getLogger("flex.kernels")

IMPLS = ("auto", "torch", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TRITON_KERNELS: frozenset[str] = frozenset()  # kernels that have a Triton implementation


def require(ok: bool, argument: str, value: object, allowed: str) -> None:
    """Unless `ok`, raise a ValueError that names the argument, its value and the allowed set."""
    if not ok:
        raise ValueError(f"{argument} is {value}; it must be {allowed}")


def require_one_of(argument: str, value: object, allowed: Collection[object]) -> None:
    """`require` for a value out of a finite set."""
    require(value in allowed, argument, value, "one of " + ", ".join(map(str, allowed)))


def choose_impl(kernel: str, impl: str, device: torch.device) -> str:
    """Resolve `impl` for a kernel on a device: "torch" or "triton".

    "auto" takes Triton where the kernel has it and the device is a GPU, else torch, and logs the
    choice once per kernel and device type. An explicit `impl` is obeyed or refused, never replaced.

    Raises:
        ValueError: `impl` is not one of IMPLS.
        NotImplementedError: Triton is asked for and the kernel has none.
    """
    require_one_of("impl", impl, IMPLS)
    if impl == "auto":
        return _auto(kernel, device.type)
    if impl == "triton" and kernel not in TRITON_KERNELS:
        raise NotImplementedError(
            f"{kernel} has no Triton implementation yet; use impl='auto' or impl='torch'"
        )
    return impl


@functools.cache  # the cache is what makes the log line appear once
def _auto(kernel: str, device_type: str) -> str:
    has_triton = kernel in TRITON_KERNELS
    impl = "triton" if has_triton and device_type == "cuda" else "torch"
    why = f"the device is {device_type}" if has_triton else "the only implementation"
    log.info("%s on %s: %s (%s)", kernel, device_type, impl, why)
    return impl
