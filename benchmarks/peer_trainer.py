"""A peer of the throughput contest: PEFT and the Hugging Face Trainer.

One process (or one of a torchrun group), one set-up; prints one JSON line. `--adapters` fp32 (PEFT's default) or bf16;
`--layout` padded or flat (padding-free: DataCollatorWithFlattening); `--compile` torch.compile through the Trainer.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import peer_common as common
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """Wall time between the ends of optimizer steps, data loading and logging and all; and the logged losses."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends[:-1], self.ends[1:], strict=True)]


class Counting:
    """A collator that notes how many tokens bear loss, and how many there are, in each batch it makes."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.targets, self.positions = inner, [], []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.targets.append(sum(documents_targets(row) for row in rows))
        self.positions.append(sum(len(row["input_ids"]) for row in rows))
        return self.inner(rows)


def documents_targets(row: dict[str, Any]) -> int:
    """Tokens that bear loss: no label before the first token of a document counts."""
    start, count = 0, 0
    for length in row.get("seq_lengths", [len(row["labels"])]):
        count += sum(t != common.IGNORE for t in row["labels"][start + 1 : start + length])
        start += length
    return count


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
            "labels": padded("labels", common.IGNORE),
            "attention_mask": torch.tensor(mask),
        }


def settings(args: Any, folder: str) -> dict[str, Any]:
    """What TrainingArguments and its subclasses are given."""
    return {
        "output_dir": folder,
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulation,
        "train_sampling_strategy": "sequential",
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "use_cpu": not torch.cuda.is_available(),
        "torch_compile": args.compile,
        "ddp_backend": None if torch.cuda.is_available() or common.WORLD == 1 else "gloo",
        "ddp_find_unused_parameters": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def report(clock: Clock, collator: Counting, accumulation: int) -> None:
    """Print the run's record."""
    seconds = clock.seconds()
    counts = (collator.targets, collator.positions)
    targets, positions = (common.per_step(c, accumulation, len(seconds)) for c in counts)
    common.print_record(seconds, targets, positions, clock.losses)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--adapters", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layout", choices=("padded", "flat"), default="padded")
    args = parser.parse_args()
    rows = common.read_rows(args)
    model = common.lora_model(args, args.adapters == "fp32")
    inner = DataCollatorWithFlattening() if args.layout == "flat" else Padding(pad_id=0)
    collator, clock = Counting(inner), Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(**settings(args, folder)),
            data_collator=collator,
            train_dataset=rows,
            callbacks=[clock],
        )
        trainer.train()
    report(clock, collator, args.accumulation)


if __name__ == "__main__":
    main()
