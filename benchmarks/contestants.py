"""Who takes part in the throughput contest, and one run of each in processes of its own.

All train the same model on the same examples, the same ones in each step, with AdamW at the same constant rate, no
weight decay and clipping at 1. A run's losses are compared with FLeX's (`losses_apart`): a contestant that does not
train, or that trains on something else, is fast for nothing and is "not comparable".
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "flex/recipes/mbpp-smollm2.yaml"
SMOLLM2, SMOLLM2_VOCABULARY = "smollm2-135m", 49_152
BATCH = 16  # examples a step
LR = "1e-3"  # as peer_common.LR
SAME_UPDATE = (
    *("optim.schedule=constant", "optim.warmup=0", f"optim.lr={LR}", "optim.weight_decay=0"),
    *("optim.name=adamw", "penalty.preset=off"),
)
# Step losses of runs that differ in dropout's masks, in A's draw and in rounding, as a share of the loss. Seen in the
# second step of SmolLM2-135M on MBPP: peers 1.427-1.430 whatever A they draw, FLeX 1.401, 2.1 % apart, and both 1.455
# at a rate of 0. In fp32 the loop has 1.402. So it is the sum in PEFT: it adds the adapter's output to one that is
# already rounded, which loses about half of so small an update. FLeX rounds once (kernels/lora_linear/torch_path.py).
LOSS_LIMIT = 0.03


@dataclass(frozen=True)
class Setup:
    """One way to run one side.

    Attributes:
        side: flex, or the script peer_<side>.py.
        options: of the side. attention, accumulation, ...: what makes it fast or slow.
        competes: same numerics, so that its speed may be compared; others are shown.
    """

    name: str
    side: str
    processes: int
    options: tuple[str, ...] = ()
    accumulation: int = 1
    competes: bool = True

    @property
    def settings(self) -> str:
        parts = f"{self.processes} x {self.accumulation} x {self.rows} rows a step"
        return ", ".join([parts, *(o.removeprefix("--") for o in self.options)])

    @property
    def rows(self) -> int:
        return BATCH // self.processes // self.accumulation


@dataclass(frozen=True)
class Job:
    """What everyone trains: a model, examples, and for how long.

    Attributes:
        model: a folder, or a name that FLeX knows.
        examples: of all steps in FLeX's data order, one JSON line each.
        data: FLeX's options that name the same data.
        steps: timed ones; one more warms up.
        python: of the TRL peer, where TRL lives in an environment of its own.
    """

    model: str
    examples: Path
    data: tuple[str, ...]
    steps: int
    python: str = sys.executable


@dataclass(frozen=True)
class Run:
    """One run's timed steps; losses has the warm-up step's first. Memory: peak resident bytes of all processes."""

    setup: str
    seconds: list[float]
    targets: list[int]
    positions: list[int]
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def seconds_per_target(self) -> list[float]:
        """Of each timed step."""
        return [s / t for s, t in zip(self.seconds, self.targets, strict=True)]

    @property
    def targets_per_second(self) -> float:
        return sum(self.targets) / sum(self.seconds)

    @property
    def positions_per_second(self) -> float:
        return sum(self.positions) / sum(self.seconds)


def losses_apart(ours: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two runs' step losses as a share of ours; inf unless each step has a finite one."""
    if len(ours) != len(other) or not ours or not all(map(math.isfinite, (*ours, *other))):
        return math.inf
    return max(abs(a - b) / a for a, b in zip(ours, other, strict=True))


def missing(setup: Setup, job: Job) -> str | None:
    """Why a set-up cannot run here; None if it can."""
    if setup.side != "trl" or job.python != sys.executable:
        return None
    return None if importlib.util.find_spec("trl") else "not installed"


def measure(setup: Setup, job: Job) -> Run:
    """Run a set-up once for 1 + `job.steps` steps. Raises RuntimeError with its output if it fails."""
    return (run_flex if setup.side == "flex" else run_peer)(setup, job)


def run_flex(setup: Setup, job: Job) -> Run:
    """`python -m flex train`, or two processes under ZeRO-0."""
    from flex.metrics_file import read_metrics

    # One step more than is timed: the last one's record comes after a validation.
    options = [f"train.steps={job.steps + 2}", f"train.batch_size={BATCH}", "train.eval_every=0"]
    options += ["train.save_every=0", "train.sample_prompt=false", f"model.name={job.model}"]
    # a set-up's own options win: FLeX refuses one that is given twice
    own = {option.partition("=")[0] for option in setup.options}
    options += [o for o in (*SAME_UPDATE, *job.data) if o.partition("=")[0] not in own]
    options += setup.options
    with tempfile.TemporaryDirectory() as folder:
        options += [f"dir={folder}", "name=run"]
        if setup.processes == 1:
            command = [sys.executable, "-m", "flex", "train", "--config", RECIPE, *options]
        else:
            command = [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]
            command += ["--num_accelerators", str(setup.processes), "flex/train.py"]
            command += ["--config", RECIPE, "deepspeed=ds_configs/zero0.json", *options]
        call(command, threads=None)
        records = [r for r in read_metrics(Path(folder) / "run/metrics.jsonl") if "loss" in r]
    ends = [r["elapsed_seconds"] for r in records[:-1]]
    timed = records[1:-1]
    return Run(
        setup.name,
        [b - a for a, b in zip(ends[:-1], ends[1:], strict=True)],
        [r["tokens"] for r in timed],
        [r["positions"] for r in timed],
        [r["loss"] for r in records[:-1]],
        setup.processes * int(timed[-1]["memory_bytes"]),  # rank 0's; the others hold as much
    )


def run_peer(setup: Setup, job: Job) -> Run:
    """`peer_<side>.py`, under torchrun if it takes several processes."""
    arguments = ["--model", job.model, "--examples", str(job.examples), "--lr", LR]
    arguments += ["--steps", str(job.steps + 1), "--batch", str(setup.rows)]
    arguments += ["--accumulation", str(setup.accumulation), *setup.options]
    script = str(ROOT / f"benchmarks/peer_{setup.side}.py")
    python = job.python if setup.side == "trl" else sys.executable
    command = [python, script, *arguments]
    if setup.processes > 1:
        launcher = [python, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc_per_node", str(setup.processes), *command[1:]]
    cores = len(os.sched_getaffinity(0))
    output = call(command, threads=max(1, cores // setup.processes))
    # Found, not split by lines: the processes' and transformers' own output may share one.
    records = [json.loads(found) for found in re.findall(r'\{"seconds".*?\}', output)]
    if len(records) != setup.processes:
        raise RuntimeError(f"{setup.name}: {len(records)} records\n{output[-4000:]}")
    targets, positions = (
        [sum(column) for column in zip(*(r[key] for r in records), strict=True)][1:]
        for key in ("targets", "positions")
    )
    first = records[0]
    losses = max((r["losses"] for r in records), key=len)  # the Trainer's rank 0 alone logs
    peak = sum(r["peak_bytes"] for r in records)
    return Run(setup.name, first["seconds"][1:], targets, positions, losses, peak)


def call(command: list[str], threads: int | None) -> str:
    """Run from the checkout's root; returns stdout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"exit status {done.returncode}: {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout


def make_job(
    folder: Path,
    steps: int,
    mbpp: Path | None,
    model: str = SMOLLM2,
    python: str | None = None,
) -> Job:
    """A model on MBPP's training rows (on the built-in tasks without a file).

    Args:
        folder: where the examples (and a shape's random weights) are written.
        mbpp: mbpp.jsonl, or None.
        model: SmolLM2-135M, or `shape:<preset>`, which has SmolLM2's tokenizer if its vocabulary is as large.
        python: of the TRL peer; none: this one.
    """
    from flex.config_io import load_config
    from flex.data.loader import SampleSequence, load_data
    from flex.model.base import load_tokenizer, resolve

    data = [f"data.path={mbpp}"] if mbpp else ["data.name=builtin"]
    where = model if model == SMOLLM2 else str(write_model(folder / "model", model))
    cfg = load_config(str(ROOT / RECIPE), [*data, f"model.name={where}"])
    tokenizer = load_tokenizer(cfg.model)
    examples = load_data(cfg, tokenizer).train
    sequence = SampleSequence(len(examples), BATCH, cfg.seed)
    path = folder / "examples.jsonl"
    with path.open("w") as file:
        for step in range(steps + 1):
            rows = [examples[row] for _, row in sequence.draws(step)]
            for example in sorted(rows, key=lambda e: -len(e.input_ids)):
                labels = [-100, *example.labels.tolist()[:-1]]
                row = {"input_ids": example.input_ids.tolist(), "labels": labels}
                file.write(json.dumps(row) + "\n")
    return Job(resolve(cfg.model), path, tuple(data), steps, python or sys.executable)


def write_model(folder: Path, shape: str) -> Path:
    """`shape:<preset>` with random weights, as a folder that every side can load."""
    from flex.config import ModelConfig
    from flex.model.base import load_tokenizer
    from flex.model.shapes import write_shape

    write_shape(shape.removeprefix("shape:"), folder)
    if json.loads((folder / "config.json").read_text())["vocab_size"] >= SMOLLM2_VOCABULARY:
        for file in folder.glob("*token*"):
            file.unlink()
        load_tokenizer(ModelConfig(name=SMOLLM2)).save_pretrained(folder)
    return folder
