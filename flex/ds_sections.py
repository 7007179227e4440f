"""What a ds_config asks of this machine and of DeepSpeed itself, checked before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import ConfigError

_QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


def check_zero_section(where: str, config: Mapping[str, Any], world: int) -> None:
    """Refuse settings that DeepSpeed or this machine does not take.

    Args:
        where: the file, for messages.
        config: the whole ds_config.
        world: number of processes of the run.

    Raises:
        ConfigError: DeepSpeed refuses a setting; hpZ groups do not divide the processes; NVMe has no folder or no
            async_io; weights quantised for the gather where there is no GPU.
    """
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(
            f"{where}: zero_optimization is not an object",
            "the stage and its settings stand in it",
            "start from ds_configs/zero2.json",
        )
    _check_hpz(where, zero, world)
    _check_nvme(where, zero)
    _check_quantised(where, zero)
    _ask_deepspeed(where, zero)


def _check_hpz(where: str, zero: Mapping[str, Any], world: int) -> None:
    size = zero.get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size > 1 and world % size:
        raise ConfigError(
            f"{where}: zero_hpz_partition_size is {size}, the run has {world} processes",
            "each group of that size holds a whole second copy of the weights, so groups must come out even",
            "set it to the number of GPUs of one node, or use ds_configs/zero3.json",
        )


def _check_nvme(where: str, zero: Mapping[str, Any]) -> None:
    on_nvme = [
        key
        for key in ("offload_param", "offload_optimizer")
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme"
    ]
    if not on_nvme:
        return
    if "offload_optimizer" in on_nvme:
        raise ConfigError(
            f"{where}: offload_optimizer.device is nvme",
            "checkpoints read the optimizer's state whole, and adapters' state is some 100 MB",
            'set offload_optimizer.device to "cpu"',
        )
    path = zero["offload_param"].get("nvme_path")
    if not path:
        raise ConfigError(
            f"{where}: offload_param.nvme_path is not set",
            "only you know which folder lies on a local NVMe drive",
            f'copy {where} and set "nvme_path": "/folder/on/the/drive"',
        )
    if not (Path(path).is_dir() and os.access(path, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"{where}: offload_param.nvme_path {path} is no folder that can be written",
            "the partitions of the weights are written there",
            "create it on every node, or correct nvme_path",
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            f"{where} offloads to NVMe, but DeepSpeed's async_io cannot be built here",
            "it needs libaio with its headers; every read and write goes through it",
            "apt-get install libaio-dev, or use ds_configs/zero3_offload_param.json (host memory)",
        )


def _check_quantised(where: str, zero: Mapping[str, Any]) -> None:
    import torch

    asked = [key for key in _QUANTISED if zero.get(key)]
    if asked and not torch.cuda.is_available():
        raise ConfigError(
            f"{where} sets {asked[0]}, but there is no GPU",
            "DeepSpeed quantises what it gathers with GPU kernels only",
            f"delete {asked[0]} from it",
        )


def _ask_deepspeed(where: str, zero: Mapping[str, Any]) -> None:
    """DeepSpeed's own reading of the section; it would raise the same later, with a traceback."""
    from deepspeed.runtime.zero.config import get_zero_config

    try:
        get_zero_config({"zero_optimization": dict(zero)})
    except (ValidationError, ValueError, AssertionError, TypeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        if isinstance(error, ValidationError):
            item = error.errors()[0]
            first = f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
        raise ConfigError(
            f"{where}: DeepSpeed refuses zero_optimization: {first}",
            "the engine cannot be built from it",
            "mend the setting, or start from a file of ds_configs/",
        ) from error
