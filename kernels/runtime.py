"""What kernels share: which implementation runs where, their dtypes, how they refuse.

Triton runs on a GPU, or on CPU tensors in its interpreter when TRITON_INTERPRET=1 was set before
triton was first imported (tests do that); the interpreter is exact and very slow.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

log = logging.getLogger("flex.kernels")

IMPLS = ("auto", "torch", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Kernels that have a Triton implementation, and the dtypes it takes.
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_KERNELS: frozenset[str] = frozenset(
    {"lora_linear", "spectral_penalty", "sophia_update", "penalised_update"}
)


@dataclass(frozen=True)
class Shipped:
    """One configuration of a Triton function that is launched in production.

    The kernels report compiles it ahead of time for every target and holds the result against
    tests/golden: registers, spills, shared memory, MMA instructions, width of global loads.

    Attributes:
        name: "<kernel>/<function>/<what distinguishes the configuration>", unique.
        fn: the `@triton.jit` function.
        signature: Triton type by name for every argument that is not a constexpr, in order: "*fp32",
            "*bf16", "i32", "i64", "fp32", ... All pointers and the integers in `divisible` are
            taken as divisible by 16, as the launcher would find them on real shapes.
        constants: value by name of every constexpr.
        num_warps, num_stages: launch options.
        divisible: names of integer arguments divisible by 16 on real shapes.
        mma: the function has a dot of useful size, so tensor-core instructions must appear.
        wide_loads: it streams through memory, so 128-bit global loads must appear.
        targets: of "sm_80", "sm_90", "sm_100", "gfx942": those it ships for.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    mma: bool = False
    wide_loads: bool = True
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


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
        NotImplementedError: Triton is asked for and the kernel has none, or cannot run there.
    """
    require_one_of("impl", impl, IMPLS)
    if impl == "auto":
        return _auto(kernel, device.type)
    if impl == "triton":
        if kernel not in TRITON_KERNELS:
            raise NotImplementedError(
                f"{kernel} has no Triton implementation yet; use impl='auto' or impl='torch'"
            )
        if not interpreting() and device.type != "cuda":
            raise NotImplementedError(
                f"{kernel}: Triton does not run on {device.type}; use impl='auto' or impl='torch', "
                "or set TRITON_INTERPRET=1 before starting Python (exact, very slow)"
            )
    return impl


@functools.cache  # decided when triton is first imported, as its own functions are
def interpreting() -> bool:
    """Whether Triton functions run in the interpreter, on tensors of any device; if so, mends it."""
    import triton

    from . import interpreter

    if triton.knobs.runtime.interpret:
        interpreter.install()
    return bool(triton.knobs.runtime.interpret)


@functools.cache  # the cache is what makes the log line appear once
def _auto(kernel: str, device_type: str) -> str:
    has_triton = kernel in TRITON_KERNELS
    impl = "triton" if has_triton and device_type == "cuda" else "torch"
    why = f"the device is {device_type}" if has_triton else "the only implementation"
    log.info("%s on %s: %s (%s)", kernel, device_type, impl, why)
    return impl
