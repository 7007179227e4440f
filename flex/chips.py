"""Published figures of accelerators (the vendors' data sheets, dense bf16 with fp32 accumulation); what a CPU has."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """Peak rates of one device; no program reaches them, so times from them are lower bounds."""

    name: str
    flops: float  # dense bf16 FLOP/s (without sparsity)
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes
    link: float  # bytes/s in one direction to the other devices of a machine: NVLink, else PCIe


# NVIDIA data sheets: Ada GPU architecture whitepaper (RTX 4090), L4, A10, A100, H100 and H200
# Tensor Core GPU. A10G: the A10's sheet at AWS's 70 TFLOP/s. PCIe 4.0 x16: 32 GB/s each way.
CHIPS = {
    "4090": Chip("RTX 4090", 165.2e12, 1008e9, 24e9, 32e9),
    "l4": Chip("L4", 121e12, 300e9, 24e9, 32e9),
    "a10g": Chip("A10G", 70e12, 600e9, 24e9, 32e9),
    "a100-40": Chip("A100 40 GB", 312e12, 1555e9, 40e9, 300e9),
    "a100-80": Chip("A100 80 GB", 312e12, 2039e9, 80e9, 300e9),
    "h100": Chip("H100 SXM", 989.4e12, 3350e9, 80e9, 450e9),
    "h200": Chip("H200", 989.4e12, 4800e9, 141e9, 450e9),
}
MEMORIES = (24e9, 40e9, 80e9, 141e9)  # bytes: the classes of devices that `plan` checks


def find_chip(name: str) -> Chip:
    """A chip by its short name. Raises ConfigError for another."""
    if name.lower() not in CHIPS:
        raise ConfigError(
            f"--chip {name} is not known",
            "the bound on the step's time needs its peak rates",
            f"use one of {', '.join(CHIPS)}",
        )
    return CHIPS[name.lower()]


@functools.cache
def has_bf16_dot_products() -> bool:
    """Whether this machine's processor is one that attention is computed on in C: AVX-512 with bf16, no AMX.

    From /proc/cpuinfo, without torch; False where there is none. `flex.kernels.causal_attention` asks torch.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return "avx512_bf16" in flags and "amx_tile" not in flags
