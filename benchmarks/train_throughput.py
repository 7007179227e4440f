"""Tokens per second of whole training runs: FLeX against PEFT + the Hugging Face Trainer.

    python benchmarks/train_throughput.py --mbpp mbpp.jsonl

MBPP's training rows, SmolLM2-135M with a bf16 base, LoRA rank 8 on gate/up/down with dropout 0.05, 16 examples a
step, the same token ids and labels on both sides. Each contestant is tried in several set-ups, each in processes of
its own; the fastest of each side then run once more, in turns. A step's time is wall time from the end of the step
before, so data, logging and the optimizer count. The first step warms up and does not.

What both sides share: fp32 adapters over a bf16 base, AdamW (torch's fused one), clipping at 1. The peer's bf16
adapters are a faster set-up with other numbers (updates round away), so they are shown and do not compete.

Two ratios come out. Against the peer that takes each process's examples in one pass, as FLeX does; and against the
fastest peer there is, which splits them into micro-batches: sorted by length these pad less and fit the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RECIPE = "flex/recipes/mbpp-smollm2.yaml"
ADAMW = ("optim.name=adamw", "penalty.preset=off")


@dataclass(frozen=True)
class Setup:
    """One way to run one side. `competes`: same numerics, so its speed may be compared."""

    name: str
    side: str  # flex or peer
    processes: int
    options: tuple[str, ...]
    accumulation: int = 1
    competes: bool = True


EAGER, SDPA = "--attention=eager", "--attention=sdpa"
SETUPS = (
    Setup("FLeX, AdamW, 1 process", "flex", 1, ADAMW),
    Setup("FLeX, AdamW, ZeRO-0, 2 processes", "flex", 2, ADAMW),
    Setup("FLeX, Sophia + penalty, ZeRO-0, 2 processes", "flex", 2, (), competes=False),
    Setup("PEFT + Trainer, sdpa, 1 process, 16", "peer", 1, (SDPA,)),
    Setup("PEFT + Trainer, eager, DDP, 2 x 8", "peer", 2, (EAGER,)),
    Setup("PEFT + Trainer, eager, DDP, 2 x 2 x 4", "peer", 2, (EAGER,), 2),
    Setup("PEFT + Trainer, sdpa, DDP, 2 x 2 x 4", "peer", 2, (SDPA,), 2),
    Setup(
        "PEFT + Trainer, eager, DDP, 2 x 2 x 4, bf16 adapters",
        "peer",
        2,
        (EAGER, "--adapters=bf16"),
        2,
        competes=False,
    ),
)


@dataclass(frozen=True)
class Measurement:
    """Rates over the timed steps of one run."""

    setup: str
    targets_per_second: float
    positions_per_second: float
    seconds_per_step: float
    positions_per_step: float


def measure(setup: Setup, examples: Path, mbpp: Path | None, steps: int) -> Measurement:
    """Run a set-up once for 1 + `steps` steps."""
    run = run_flex if setup.side == "flex" else run_peer
    seconds, targets, positions = run(setup, examples, mbpp, steps)
    total = sum(seconds)
    return Measurement(
        setup.name,
        sum(targets) / total,
        sum(positions) / total,
        total / len(seconds),
        sum(positions) / len(seconds),
    )


def run_flex(
    setup: Setup, examples: Path, mbpp: Path | None, steps: int
) -> tuple[list[float], list[int], list[int]]:
    """Seconds, target tokens and positions of each timed step of `flex train`."""
    from flex.metrics_file import read_metrics

    # One step more than is timed: the last one's record comes after a validation.
    options = [f"train.steps={steps + 2}", "train.eval_every=0", "train.save_every=0"]
    options += ["train.sample_prompt=false", *setup.options]
    options += [f"data.path={mbpp}"] if mbpp else []
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
    seconds = [b - a for a, b in zip(ends[:-1], ends[1:], strict=True)]
    timed = records[1:-1]
    return seconds, [r["tokens"] for r in timed], [r["positions"] for r in timed]


def run_peer(
    setup: Setup, examples: Path, mbpp: Path | None, steps: int
) -> tuple[list[float], list[int], list[int]]:
    """The same of `peer_trainer.py`."""
    from flex.config import ModelConfig
    from flex.model.base import resolve

    batch = 16 // setup.processes // setup.accumulation
    arguments = ["--model", resolve(ModelConfig()), "--examples", str(examples)]
    arguments += ["--steps", str(steps + 1), "--batch", str(batch)]
    arguments += ["--accumulation", str(setup.accumulation), *setup.options]
    script = str(ROOT / "benchmarks/peer_trainer.py")
    if setup.processes == 1:
        command = [sys.executable, script, *arguments]
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        command = [*launcher, "--standalone", "--nproc_per_node", str(setup.processes), script]
        command += arguments
    cores = len(os.sched_getaffinity(0))
    output = call(command, threads=max(1, cores // setup.processes))
    # Found, not split by lines: the processes' and transformers' own output may share one.
    records = [json.loads(found) for found in re.findall(r'\{"seconds".*?\}', output)]
    assert len(records) == setup.processes, output
    targets, positions = (
        [sum(column) for column in zip(*(r[key] for r in records), strict=True)][1:]
        for key in ("targets", "positions")
    )
    return records[0]["seconds"][1:], targets, positions


def call(command: list[str], threads: int | None) -> str:
    """Run from the checkout's root, one at a time; returns stdout."""
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


def write_examples(path: Path, mbpp: Path | None) -> None:
    """The recipe's training examples as the peer's Trainer takes them: unshifted labels."""
    from flex.config_io import load_config
    from flex.data.loader import load_data
    from flex.model.base import load_tokenizer

    cfg = load_config(str(ROOT / RECIPE), [f"data.path={mbpp}"] if mbpp else [])
    examples = load_data(cfg, load_tokenizer(cfg.model)).train
    with path.open("w") as file:
        for example in examples:
            labels = [-100, *example.labels.tolist()[:-1]]
            row = {"input_ids": example.input_ids.tolist(), "labels": labels}
            file.write(json.dumps(row) + "\n")


def contest(mbpp: Path | None, steps: int) -> Iterator[Measurement]:
    """Every set-up once, then again, in turns, those that the ratios are of."""
    with tempfile.TemporaryDirectory() as folder:
        examples = Path(folder) / "examples.jsonl"
        write_examples(examples, mbpp)
        found = []
        for setup in SETUPS:
            found.append(measure(setup, examples, mbpp, steps))
            yield found[-1]
        ours, peer, micro = finalists(found)
        for setup in (ours, peer, *([micro] if micro != peer else [])):
            yield measure(setup, examples, mbpp, steps)


def finalists(found: list[Measurement]) -> tuple[Setup, Setup, Setup]:
    """The fastest that compete: of FLeX, of the peers without micro-batches, of all peers."""
    speed = {m.setup: m.targets_per_second for m in found}

    def fastest(setups: list[Setup]) -> Setup:
        return max(setups, key=lambda s: speed[s.name])

    ours = [s for s in SETUPS if s.competes and s.side == "flex"]
    peers = [s for s in SETUPS if s.competes and s.side == "peer"]
    return fastest(ours), fastest([s for s in peers if s.accumulation == 1]), fastest(peers)


def ratios(found: list[Measurement]) -> dict[str, float]:
    """FLeX's mean rate over that of the fastest peer, "one_pass" and "any", all runs of each."""

    def mean(setup: Setup) -> float:
        rates = [m.targets_per_second for m in found if m.setup == setup.name]
        return sum(rates) / len(rates)

    ours, peer, micro = finalists(found)
    return {"one_pass": mean(ours) / mean(peer), "any": mean(ours) / mean(micro)}


def verdict(found: list[Measurement]) -> str:
    ours, peer, micro = finalists(found)
    return "\n".join(
        f"{value:.2f} x the tokens per second: {ours.name} / {other.name}"
        for value, other in zip(ratios(found).values(), (peer, micro), strict=True)
    )


def record(found: list[Measurement], steps: int) -> str:
    """What is kept of a contest, as JSON."""
    kept = {
        "ratios": ratios(found),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "steps": steps,
        "runs": [asdict(m) for m in found],
    }
    return json.dumps(kept, indent=2) + "\n"


def table_row(m: Measurement) -> str:
    return (
        f"{m.setup:56s} {m.targets_per_second:8.1f} {m.positions_per_second:8.1f} "
        f"{m.seconds_per_step:7.2f} {m.positions_per_step:7.0f}"
    )


HEADER = f"{'set-up':56s} {'target/s':>8s} {'pos/s':>8s} {'s/step':>7s} {'pos/st':>7s}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbpp", type=Path, metavar="FILE", help="mbpp.jsonl; none: the Hub")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps (10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    mbpp = args.mbpp.resolve() if args.mbpp else None
    print(HEADER, flush=True)
    found = []
    for measurement in contest(mbpp, args.steps):
        found.append(measurement)
        print(table_row(measurement), flush=True)
    print(f"\n{verdict(found)}")
    if args.out:
        args.out.write_text(record(found, args.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
