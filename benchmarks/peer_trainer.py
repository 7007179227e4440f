"""The peer of the throughput benchmark: PEFT and the Hugging Face Trainer, nothing of FLeX's training code.

One process, one variant; prints one JSON line of step times. The examples (token ids and labels) come from a
file that the benchmark writes, so that both sides train on the same tokens.

Variants: `adapters` fp32 (PEFT's default) or bf16; `layout` grouped (the Trainer's length grouping), random or
flat (padding-free: DataCollatorWithFlattening); `compile` torch.compile through the Trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Clock(TrainerCallback):
    """Wall time between the ends of optimizer steps: data loading, logging and all."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


class Counting:
    """A collator that notes how many tokens bear loss in each batch it makes."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.targets, self.positions = inner, [], []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.targets.append(sum(sum(t != -100 for t in row["labels"][1:]) for row in rows))
        self.positions.append(sum(len(row["input_ids"]) for row in rows))
        return self.inner(rows)


class Padding:
    """Right padding to the longest row of the batch."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

        mask = [[1] * len(row["input_ids"]) for row in rows]
        mask = [row + [0] * (longest - len(row)) for row in mask]
        return {
            "input_ids": padded("input_ids", self.pad_id),
            "labels": padded("labels", -100),
            "attention_mask": torch.tensor(mask),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--examples", required=True, type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--adapters", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layout", choices=("grouped", "random", "flat"), default="grouped")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    rows = [json.loads(line) for line in args.examples.read_text().splitlines()]
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
    model = get_peft_model(model, lora, autocast_adapter_dtype=args.adapters == "fp32")
    inner = DataCollatorWithFlattening() if args.layout == "flat" else Padding(pad_id=0)
    collator, clock = Counting(inner), Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulation,
            train_sampling_strategy="group_by_length" if args.layout == "grouped" else "random",
            learning_rate=2e-4,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            torch_compile=args.compile,
            ddp_backend=None if torch.cuda.is_available() or alone else "gloo",
            ddp_find_unused_parameters=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, settings, data_collator=collator, train_dataset=rows, callbacks=[clock]
        )
        trainer.train()
    seconds = [b - a for a, b in zip(clock.ends[:-1], clock.ends[1:], strict=True)]

    def per_step(counts: list[int]) -> list[int]:
        size, count = args.accumulation, len(seconds)
        return [sum(counts[i * size : (i + 1) * size]) for i in range(count)]

    record = {
        "seconds": seconds,
        "targets": per_step(collator.targets),
        "positions": per_step(collator.positions),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
