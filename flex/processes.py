"""The processes of a run: who they are, how they start, and the few collectives the trainer uses.

Without torch.distributed every collective is the identity of a world of one.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import RunConfig


def rank() -> int:
    """This process, as the launcher numbered it."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def share_cores() -> None:
    """Split the CPU's cores between this machine's processes, unless OMP_NUM_THREADS says otherwise.

    Two processes that each take all cores run several times slower than two that take half.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))


def check(cfg: RunConfig, count: int) -> None:
    """Raise ConfigError if `count` processes are launched and the run names no engine for them."""
    if cfg.deepspeed is None and count > 1:
        raise ConfigError(
            f"{count} processes were launched, but no ds_config is given",
            "each would train the same model alone",
            "add deepspeed=ds_configs/zero2.json, or launch one process: python -m flex train",
        )


def start(cfg: RunConfig) -> None:
    """Join the other processes, or become a world of one that DeepSpeed can live in.

    Raises:
        ConfigError: see `check`.
    """
    check(cfg, world())
    if cfg.deepspeed is None:
        return
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
    import deepspeed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    if backend == "gloo":
        _unlink_shared_memory()


def _unlink_shared_memory() -> None:
    """Take the name off DeepSpeed's shared memory on CPUs: 67 MB a process that it never removes.

    Every process has mapped it by now and keeps it; without a name it goes with the last of them, however they end.
    """
    if Path("/dev/shm").is_dir():
        dist.barrier()
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank()}"
        Path("/dev/shm", name).unlink(missing_ok=True)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor: Tensor, largest: bool = False) -> Tensor:
    """Sum (or maximum) over processes, a new tensor on the same device."""
    if not dist.is_initialized():
        return tensor
    shared = tensor.detach().to(local_device(), copy=True)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return shared.to(tensor.device)


def gather_text(text: str) -> list[str]:
    """One string of every process, by rank. Tensors travel, not objects: those would be pickled."""
    if not dist.is_initialized():
        return [text]
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=local_device())
    count = dist.get_world_size()
    sizes = torch.zeros(count, dtype=torch.int64)
    sizes[dist.get_rank()] = len(mine)
    lengths = all_reduce(sizes).tolist()
    padded = mine.new_zeros(max(lengths))
    padded[: len(mine)] = mine
    rows = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(rows, padded)
    return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, lengths, strict=True)]
