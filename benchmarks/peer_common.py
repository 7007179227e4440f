"""What the peers of the throughput contest share: arguments, rows, adapters and the record that they print.

None of FLeX's training code is used. The rows (token ids and labels) come from a file that the contest writes,
in FLeX's data order: `--batch` x `--accumulation` x processes of them are a step, the longest first in each, so that
micro-batches pad little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

LR = 1e-3  # constant, no weight decay: a few steps suffice to see whether a contestant trains
IGNORE = -100
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--examples", required=True, type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=16, help="rows a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--lr", type=float, default=LR)
    return parser


def read_rows(args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """The rows of all steps. Labels are unshifted, as in transformers."""
    needed = args.steps * args.batch * args.accumulation * WORLD
    rows = [json.loads(line) for line in args.examples.read_text().splitlines()]
    if len(rows) < needed:
        raise ValueError(f"{args.examples} has {len(rows)} rows; {args.steps} steps take {needed}")
    return rows[:needed]


def lora_model(args: argparse.Namespace, fp32_adapters: bool) -> PeftModel:
    """The bf16 base with PEFT's adapters. fp32 is PEFT's default for them."""
    torch.manual_seed(RANK)
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, attn_implementation=args.attention
    )
    model.config.use_cache = False
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["gate_proj", "up_proj", "down_proj"],
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=fp32_adapters)


def per_step(counts: list[int], accumulation: int, steps: int) -> list[int]:
    """Counts of micro-batches summed up to steps; what was prefetched beyond the last step is left out."""
    return [sum(counts[i * accumulation : (i + 1) * accumulation]) for i in range(steps)]


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_record(
    seconds: list[float], targets: list[int], positions: list[int], losses: list[float]
) -> None:
    """One JSON line: per step wall seconds, this process's targets and positions, the mean loss of all processes."""
    record: dict[str, Any] = {"seconds": seconds, "targets": targets, "positions": positions}
    record |= {"losses": losses, "peak_bytes": peak_bytes()}
    print(json.dumps(record), flush=True)
