"""The environment of a run, for a bug report: versions, device, threads, compilers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata

import flex

PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "peft", "accelerate", "deepspeed"),
    *("bitsandbytes", "liger-kernel", "safetensors", "pydantic", "gguf", "kernels"),
)


def report() -> Iterator[tuple[str, str]]:
    """(label, value) lines. Changes nothing and needs no network."""
    yield "flex", flex.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        yield name, _version(name)
    yield from _devices()
    yield "processors", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"
    yield "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")
    yield "disk free", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB here"
    for tool, flag in (("c++", "--version"), ("nvcc", "--version"), ("javac", "-version")):
        yield tool, _tool(tool, flag)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        yield "device", f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = f"{card.major}.{card.minor}"
        yield (
            f"cuda:{index}",
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, capability {capability}",
        )
    yield "cuda", torch.version.cuda or "not in this build of torch"
    yield "torch threads", str(torch.get_num_threads())


def _tool(name: str, flag: str) -> str:
    path = shutil.which(name)
    if path is None:
        return "not found"
    done = subprocess.run([path, flag], capture_output=True, text=True, timeout=20, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return f"{lines[0] if lines else 'no version'} ({path})"
