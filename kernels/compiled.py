"""What the compiler made of every shipped configuration, read from the binary; no GPU is needed.

Triton compiles for a target that is not there, and its wheel carries cuobjdump and nvdisasm. The
compiler does not refuse what cannot be launched: shared memory is held against the chip's limit
here.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import disassembly
from .runtime import Shipped

# Shared memory of one program at most, bytes. NVIDIA: CUDA programming guide, "Technical
# Specifications per Compute Capability", the largest per block. gfx942: 64 KiB of LDS.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_MEMORY_LIMIT = 512  # columns, of an sm_100
TARGETS = tuple(SHARED_LIMIT)
KERNELS = ("lora_linear", "spectral_penalty", "sophia_update", "penalised_update")

MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": r"UTC\w*MMA", "gfx942": "v_mfma"}


@dataclass(frozen=True)
class Resources:
    """What one configuration takes on one target, and which instructions it became.

    Attributes:
        registers: per thread.
        spills: instructions that go to local memory and back; gfx942: registers spilled.
        stack: bytes of local memory per thread.
        shared: bytes per program.
        tensor_memory: columns per program, on sm_100.
        mma: tensor-core instructions.
        wide_loads: global loads of 128 bits or more; TMA counts.
        narrow_loads: the other global loads.
        narrow_loops: loops that load from global memory, but never 128 bits at once.
        instructions: of the whole function; its size.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    tensor_memory: int
    mma: int
    wide_loads: int
    narrow_loads: int
    narrow_loops: int
    instructions: int

    def as_dict(self) -> dict[str, int]:
        """The fields, for JSON."""
        return asdict(self)


def all_shipped() -> list[Shipped]:
    """Every configuration that the kernels launch, in a fixed order.

    Raises: ValueError if two have one name.
    """
    package = __package__
    found = [
        config
        for kernel in KERNELS
        for config in importlib.import_module(f".{kernel}.shipped", package).shipped()
    ]
    twice = [name for name, n in Counter(config.name for config in found).items() if n > 1]
    if twice:
        raise ValueError(f"shipped configurations share the name {twice[0]}; names must be unique")
    return found


def compile_shipped(config: Shipped, target: str) -> Resources:
    """Compile one configuration ahead of time for a target and read the binary.

    Raises:
        ValueError: a target that is not in TARGETS.
        RuntimeError: TRITON_INTERPRET is set, so that `config.fn` is not a compilable function; or
            a tool of the compiler failed.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise ValueError(f"target is {target}; it must be one of {', '.join(TARGETS)}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"{config.name} cannot be compiled: TRITON_INTERPRET is set, so Triton functions are "
            "interpreted; unset it before starting Python"
        )
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    names = config.fn.arg_names
    source = ASTSource(
        config.fn,
        signature={name: config.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in config.constants.items()},
        attrs={(i,): found for i in range(len(names)) if (found := _attributes(config, i, nvidia))},
    )
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=gpu, options=options)
    return (_read_cubin if nvidia else _read_amdgcn)(compiled, target)


def _attributes(config: Shipped, index: int, nvidia: bool) -> list[list[Any]]:
    """What the launcher would find out about an argument: aligned to 16; AMD: below 2 GiB."""
    parameter = config.fn.params[index]
    pointer = config.signature.get(parameter.name, "").startswith("*")
    if parameter.do_not_specialize or not (pointer or parameter.name in config.divisible):
        return []
    aligned = [] if parameter.do_not_specialize_on_alignment else [["tt.divisibility", 16]]
    return aligned + ([["tt.pointer_range", 32]] if pointer and not nvidia else [])


def problems(config: Shipped, target: str, found: Resources) -> list[str]:
    """What is wrong with a configuration on a target, whatever the golden file says."""
    wrong = []
    if found.spills or found.stack:
        wrong.append(f"{found.spills} spill instructions, {found.stack} bytes of stack")
    if found.shared > SHARED_LIMIT[target]:
        wrong.append(f"shared memory {found.shared} is over the limit {SHARED_LIMIT[target]}")
    if found.tensor_memory > TENSOR_MEMORY_LIMIT:
        wrong.append(f"tensor memory {found.tensor_memory} is over the limit {TENSOR_MEMORY_LIMIT}")
    if config.mma and not found.mma:
        wrong.append("no tensor-core instruction")
    if config.wide_loads and not found.wide_loads:
        wrong.append("no 128-bit global load")
    elif config.wide_loads and found.narrow_loops:
        wrong.append(f"{found.narrow_loops} loops without a 128-bit global load")
    return wrong


def binaries() -> Iterator[tuple[str, Shipped, str]]:
    """Every shipped configuration on each of its targets, in order: "<name> <target>", and both."""
    for config in _configurations():
        for target in config.targets:
            yield f"{config.name} {target}", config, target


def representative(recorded: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Binaries that stand for all, in order: of every Triton function one on each target.

    On one target that is the one which takes the most registers, on the others the shortest, which
    compiles fastest. What is not recorded yet counts as the shortest.

    Args:
        recorded: resources by "<name> <target>", as fields of `Resources`.
    """

    def size(key: str, field: str) -> int:
        return recorded[key][field] if key in recorded else 0

    of_function: dict[str, dict[str, list[str]]] = {}
    for key, config, target in binaries():
        function = f"{config.fn.fn.__module__}.{config.fn.fn.__qualname__}"
        of_function.setdefault(function, {}).setdefault(target, []).append(key)
    chosen = set()
    for by_target in of_function.values():
        everywhere = [key for keys in by_target.values() for key in keys]
        largest = max(everywhere, key=lambda key: size(key, "registers"))
        chosen.add(largest)
        for keys in by_target.values():
            if largest not in keys:
                chosen.add(min(keys, key=lambda key: size(key, "instructions")))
    return [key for key, _, _ in binaries() if key in chosen]


def compile_all(
    keys: Collection[str] | None = None, workers: int | None = None
) -> Iterator[tuple[Shipped, str, Resources]]:
    """Every shipped configuration on each of its targets, in order.

    Args:
        keys: "<name> <target>" of those that are wanted; None: all.
        workers: processes that compile; None: one per core that this process may use.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    configs = _configurations()
    jobs = [
        (i, target)
        for i, config in enumerate(configs)
        for target in config.targets
        if keys is None or f"{config.name} {target}" in keys
    ]
    workers = min(workers or len(os.sched_getaffinity(0)), max(len(jobs), 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for (i, target), found in zip(jobs, pool.map(_compile_job, jobs), strict=True):
            yield configs[i], target, found


def _compile_job(job: tuple[int, str]) -> Resources:
    return compile_shipped(_configurations()[job[0]], job[1])


@functools.cache
def _configurations() -> list[Shipped]:
    return all_shipped()


def _read_cubin(compiled: Any, target: str) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(path))
        # -ndf: no data flow analysis, a fifth of the time, which adds nothing to what is printed
        code = disassembly.read(_run("nvdisasm", "-ndf", str(path)))
    fields = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if "REG" not in fields or not code.instructions:
        raise RuntimeError(f"cuobjdump or nvdisasm printed nothing to read for {target}: {usage!r}")
    return Resources(
        registers=fields["REG"],
        spills=code.count(disassembly.SPILLS),
        stack=fields["STACK"] + fields["LOCAL"],
        # not the static share: on sm_90 and later that is the driver's own KiB, outside the limit
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size,
        **_counts(code, target),
    )


def _read_amdgcn(compiled: Any, target: str) -> Resources:
    text = compiled.asm["amdgcn"]
    fields = {key: int(n) for key, n in re.findall(r"\.(\w+_count|\w+_fixed_size):\s+(\d+)", text)}
    return Resources(
        registers=fields["vgpr_count"],
        spills=fields["vgpr_spill_count"],
        stack=fields["private_segment_fixed_size"],
        shared=max(compiled.metadata.shared, fields["group_segment_fixed_size"]),
        tensor_memory=0,
        **_counts(disassembly.read(text), target),
    )


def _counts(code: disassembly.Code, target: str) -> dict[str, int]:
    wide = code.count(disassembly.WIDE_LOADS)
    return {
        "mma": code.count(re.compile(MMA[target])),
        "wide_loads": wide,
        "narrow_loads": code.count(disassembly.LOADS) - wide,
        "narrow_loops": code.narrow_loops(),
        "instructions": len(code.instructions),
    }


def _run(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
