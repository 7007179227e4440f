"""The machine's card: what a reader must know to judge a number, and to tell two machines apart."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

# flags that change which product a matrix library picks
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "sve")
PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "deepspeed")
ROOT = Path(__file__).resolve().parents[2]


def card(threads: int) -> dict[str, Any]:
    """Processor, memory, GPU, threads, versions; "id" is a digest of all of these."""
    model, flags = _processor()
    found: dict[str, Any] = {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "flags": [f for f in FLAGS if f in flags],
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "versions": {name: version(name) or "not installed" for name in PACKAGES},
    }
    digest = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()
    return {"id": digest[:8], **found}


def describe(card: dict[str, Any]) -> str:
    """One line of it."""
    versions = card["versions"]
    return (
        f"machine {card['id']}: {card['cpu']}, {card['cores']} cores, {card['threads']} threads, "
        f"{' '.join(card['flags'])}; {card['memory_gib']} GiB; GPU {card['gpu']}; "
        f"torch {versions['torch']}, triton {versions['triton']}, python {card['python']}"
    )


def version(package: str) -> str | None:
    """Of an installed distribution, None if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of the checkout, with "-dirty" if tracked files differ; "unknown" outside of git."""
    try:
        short = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return short + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()


def _processor() -> tuple[str, set[str]]:
    """Model name and flags, from Linux; elsewhere what Python says, and no flag."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine(), set()
    lines = dict(
        [part.strip() for part in line.split(":", 1)] for line in text.splitlines() if ":" in line
    )
    model = lines.get("model name", platform.machine())
    return model, set(lines.get("flags", lines.get("Features", "")).split())
