"""Runs of a race in processes of their own, one thread each: two on two cores finish sooner than one
after the other on both. JSON lines go in and come out; a worker keeps its data for its next run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import Queue
from typing import Any

from flex.config import RunConfig
from flex.errors import FlexError
from flex.race.single import Outcome, run


@dataclass(frozen=True)
class Job:
    """A run to make; `key` comes back with its outcome."""

    key: str
    config: RunConfig
    permuted: bool = False


class WorkerError(FlexError):
    """A worker ended without an answer."""


def run_all(jobs: Iterable[Job], workers: int) -> Iterator[tuple[str, Outcome]]:
    """Make the runs, `workers` at once, and yield each outcome as it comes.

    Raises WorkerError: a run failed or its process died; what was yielded before stands.
    """
    waiting: Queue[Job | None] = Queue()
    count = 0
    for job in jobs:
        waiting.put(job)
        count += 1
    found: Queue[tuple[str, Outcome | WorkerError]] = Queue()
    processes = [_start() for _ in range(min(workers, count))]
    threads = []
    for process in processes:
        waiting.put(None)
        thread = threading.Thread(target=_feed, args=(process, waiting, found), daemon=True)
        thread.start()
        threads.append(thread)
    try:
        for _ in range(count):
            key, outcome = found.get()
            if isinstance(outcome, WorkerError):
                raise outcome
            yield key, outcome
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start() -> subprocess.Popen[str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.Popen(
        [sys.executable, "-m", "flex.race.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads},
    )


def _feed(
    process: subprocess.Popen[str],
    waiting: Queue[Job | None],
    found: Queue[tuple[str, Outcome | WorkerError]],
) -> None:
    assert process.stdin is not None and process.stdout is not None
    while (job := waiting.get()) is not None:
        request = {"config": job.config.model_dump(mode="json"), "permuted": job.permuted}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            answer = {"error": f"the process ended with status {process.wait()}"}
        if "error" in answer:
            error = WorkerError(
                f"{job.key}: {answer['error']}",
                "a race with a hole in it has no result",
                "mend the cause; the same command continues with what is left",
            )
            found.put((job.key, error))
            return
        found.put((job.key, Outcome.from_json(answer)))


def serve() -> None:
    """Answer each line on stdin, a job, with a line on stdout: its outcome or {"error": text}."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("flex").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft)\b.*")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not pass for an answer
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        config = RunConfig.model_validate_json(json.dumps(request["config"]))
        try:
            answer = run(config, request["permuted"]).to_json()
        except FlexError as error:
            answer = {"error": f"{error.what}; {error.fix}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
