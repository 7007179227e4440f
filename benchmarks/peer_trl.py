"""A peer of the throughput contest: TRL's SFTTrainer with packing, without padding (`pip install trl`).

One process (or one of a torchrun group), one set-up; prints one JSON line. TRL packs a whole data set and so changes
which rows a step has. Here its own packer gets one micro-batch's rows at a time: the steps keep their rows, and what
the trainer sees (one row of documents, seq_lengths, position ids, no padding) is what packing=True makes.
"""

from __future__ import annotations

import tempfile

import peer_common as common
from datasets import Dataset, concatenate_datasets
from peer_trainer import Clock, Counting, report, settings
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, pack_dataset


def packed(rows: list[dict[str, list[int]]], size: int) -> Dataset:
    """Each `size` rows as one row of TRL's packing."""
    parts = []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        total = sum(len(row["input_ids"]) for row in group)
        part = pack_dataset(Dataset.from_list(group), total, strategy="bfd")
        if len(part) != 1:
            raise RuntimeError(f"TRL packed {size} rows of {total} tokens into {len(part)} rows")
        parts.append(part)
    return concatenate_datasets(parts)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--adapters", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    dataset = packed(common.read_rows(args), args.batch)
    model = common.lora_model(args, args.adapters == "fp32")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = settings(args, folder) | {"per_device_train_batch_size": 1}
        config = SFTConfig(
            **options,
            padding_free=True,
            max_length=None,
            bf16=False,  # the weights are bf16: autocast would only add casts
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model,
            config,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[clock],
        )
        collator = trainer.data_collator = Counting(trainer.data_collator)
        trainer.train()
    report(clock, collator, args.accumulation)


if __name__ == "__main__":
    main()
