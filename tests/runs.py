"""Whole runs in processes of their own, as a user starts them, on a tiny model and a tiny data set."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from flex.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "model.name=shape:tiny",
    "model.dtype=float32",
    "data.name=jsonl",
    "lora.r=4",
    "train.sample_prompt=false",
)


def write_rows(path: Path, count: int = 40) -> Path:
    """A JSON Lines file of short prompts and completions of different lengths."""
    with path.open("w") as file:
        for i in range(count):
            prompt = f"# add {i % 7}\n" * (1 + i % 3)
            completion = f"def f{i}(x):\n    return x + {i % 7}\n" + "    # done\n" * (i % 4)
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return path


def command(*options: str, engine: str | None = None, processes: int = 2) -> list[str]:
    """The command line of a run; `engine` names a file of ds_configs/, none is plain PyTorch in one process."""
    if engine is None:
        return [sys.executable, "-m", "flex", "train", "--config", os.devnull, *options]
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]
    launcher += ["--num_accelerators", str(processes), "--master_port", str(free_port())]
    settings = f"deepspeed={ROOT / 'ds_configs' / engine}.json"
    return [*launcher, str(ROOT / "flex/train.py"), settings, *options]


def one_at_a_time() -> FileLock:
    """Held by a test while it has several processes: they wait for each other in loops that burn a core, so
    two such tests beside each other, in two of pytest's workers, take many times as long."""
    return FileLock(Path(tempfile.gettempdir()) / f"flex-tests-{os.getuid()}.lock")


def run(
    *options: str, engine: str | None = None, processes: int = 2, launcher: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run to the end from the checkout's root; output is captured, the status is the caller's to judge.

    With `launcher`, DeepSpeed's starts the processes, as a user's would; it imports everything twice before, so
    else they are started here, with what the launcher would tell them.
    """
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    if engine is None or launcher:
        with one_at_a_time() if engine else contextlib.nullcontext():
            return subprocess.run(
                command(*options, engine=engine, processes=processes),
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
    settings = f"deepspeed={ROOT / 'ds_configs' / engine}.json"
    words = [sys.executable, "-u", str(ROOT / "flex/train.py"), settings, *options]
    port = str(free_port())
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_SIZE": str(processes)}
    environment |= {"WORLD_SIZE": str(processes)}
    with one_at_a_time(), tempfile.TemporaryDirectory() as folder:
        status = _run_ranks(words, environment, processes, Path(folder))
        if status == 0:
            left = list(Path("/dev/shm").glob(f"*_{port}_*"))
            assert not left, f"shared memory outlives the run: {left}"
        out, err = (
            "".join(
                (Path(folder) / f"{rank}.{kind}").read_text("utf-8") for rank in range(processes)
            )
            for kind in ("out", "err")
        )
    return subprocess.CompletedProcess(words, status, out, err)


def _run_ranks(words: list[str], environment: dict[str, str], count: int, folder: Path) -> int:
    """Run `count` processes; the first status that is not 0, after which the others are killed, or 0."""
    with contextlib.ExitStack() as stack:
        started = []
        for rank in range(count):
            out, err = (
                stack.enter_context((folder / f"{rank}.{k}").open("w")) for k in ("out", "err")
            )
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(
                subprocess.Popen(words, cwd=ROOT, env=environment | numbers, stdout=out, stderr=err)
            )
        deadline = time.monotonic() + 300
        try:
            while time.monotonic() < deadline:
                statuses = [process.poll() for process in started]
                failed = [status for status in statuses if status]
                if None not in statuses:
                    return failed[0] if failed else 0
                if failed:  # the others may have more to say, or wait for it for ever
                    deadline = min(deadline, time.monotonic() + 5)
                time.sleep(0.1)
            if failed:
                return failed[0]
            raise subprocess.TimeoutExpired(words, 300)
        finally:
            for process in started:
                process.kill()
                process.wait()


def run_well(*options: str, **where: Any) -> str:
    """`run`, which must succeed; returns stdout."""
    done = run(*options, **where)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def losses(folder: Path) -> list[float]:
    """Training loss of every step of a run."""
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def checkpoint(folder: Path, step: int, stem: str) -> dict[str, Tensor]:
    """Tensors of one file of a run's checkpoint: adapter, optimizer or penalty."""
    return load_file(folder / f"checkpoints/step-{step:06d}/{stem}.safetensors")


def free_port() -> int:
    """A port that nothing listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
