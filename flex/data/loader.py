"""Which rows a step uses, and how they are dealt to processes and micro-batches.

The sample sequence depends on (seed, rows, batch size) alone. World size and accumulation only cut
a step's global batch into parts, so they change memory and speed but not the mathematics.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerBase

from flex.config import RunConfig
from flex.data.encode import encode_all
from flex.data.ledger import Ledger
from flex.data.packing import Layout, Numbered, collate, group_by_length, split_micro_batches
from flex.data.rows import load_rows
from flex.errors import ConfigError, DataError
from flex.state import IGNORE, Batch, Example

logger = logging.getLogger("flex.data")

Draw = tuple[int, int]  # (example_id: place in the sample sequence, row index)


@dataclass(frozen=True)
class DataBundle:
    """Tokenised splits, and the account of all rows."""

    train: list[Example]
    validation: list[Example]
    ledger: Ledger

    def fingerprint(self) -> str:
        """sha256 over what is trained on, tokens and labels in order: a resumed run must find the same."""
        digest = hashlib.sha256()
        for example in self.train:
            digest.update(len(example.input_ids).to_bytes(8))
            digest.update(example.input_ids.numpy().tobytes() + example.labels.numpy().tobytes())
        return digest.hexdigest()


def load_data(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> DataBundle:
    """Read, render and tokenise the configured data; log the account of all rows in one line.

    Raises:
        DataError: see `load_rows` and `encode_all`; or no training example is left.
    """
    rows = load_rows(cfg.data)
    train, ledger = encode_all(rows.train, tokenizer, cfg.data, rows.ledger)
    validation, ledger = encode_all(rows.validation, tokenizer, cfg.data, ledger)
    account = ledger.summary()
    if not train:
        raise DataError(
            f"no training example is left ({account})",
            "there is nothing to train on",
            f"raise data.max_length (now {cfg.data.max_length})",
        )
    sizes = f"{len(train)} train, {len(validation)} validation"
    logger.info("data %s: %s; %s", cfg.data.name, sizes, account)
    return DataBundle(train, validation, ledger)


class SampleSequence:
    """The endless order of training rows: one seeded permutation per epoch, end to end."""

    def __init__(self, n_rows: int, batch_size: int, seed: int) -> None:
        if n_rows < 1:
            raise ValueError("n_rows must be at least 1")
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def draws(self, step: int) -> list[Draw]:
        """(example_id, row index) of each draw of the 0-based step; ids count from the start."""
        first = step * self.batch_size
        return [(place, self._row(place)) for place in range(first, first + self.batch_size)]

    def _row(self, place: int) -> int:
        return self._permutation(place // self.n_rows)[place % self.n_rows]

    def _make_permutation(self, epoch: int) -> list[int]:
        # Hashed: with seed + epoch, runs of neighbouring seeds would share most of their epochs.
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return torch.randperm(self.n_rows, generator=generator).tolist()


class StepLoader:
    """Training micro-batches of one process.

    Args:
        examples: all training examples, the same on every process.
        cfg: batch size, accumulation, seed, steps or epochs, and layout are used.
        rank: this process.
        world: number of processes.
        pad_id: token for padding.

    Raises:
        ConfigError: the batch has fewer examples than there are micro-batches.
    """

    def __init__(
        self, examples: Sequence[Example], cfg: RunConfig, rank: int, world: int, pad_id: int
    ) -> None:
        size, accumulation = cfg.train.batch_size, cfg.train.accumulation
        if size < world * accumulation:
            raise ConfigError(
                f"train.batch_size={size} is less than {world} processes x "
                f"train.accumulation={accumulation}",
                "some micro-batch of each step would be empty",
                f"set train.batch_size={world * accumulation} or more, or lower the accumulation",
            )
        self.examples, self.rank, self.world, self.pad_id = examples, rank, world, pad_id
        self.accumulation, self.layout = accumulation, layout_of(cfg)
        self._share_of = cfg.optim.curvature.share_of
        self.sequence = SampleSequence(len(examples), size, cfg.seed)
        self.total_steps = cfg.train.steps or math.ceil(cfg.train.epochs * len(examples) / size)
        self._targets = [example.num_targets for example in examples]
        self._parts = lru_cache(maxsize=2)(self._deal_step)

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's `train.accumulation` micro-batches of the 0-based step."""
        return [self._collate(parts[self.rank]) for parts in self._parts(step)]

    def refresh_micro_batches(self, step: int) -> list[tuple[Batch, int]]:
        """(this process's micro-batch, target tokens over all processes) of the refresh before the 0-based step.

        The step's first draws, `optim.curvature.share` of them, so the same examples at any world size (unless
        some process would have none), in micro-batches that are no larger than the step's.
        """
        micro_steps = self._refresh_parts(step)
        return [
            (
                self._collate(ranks[self.rank]),
                sum(self._targets[row] for part in ranks for _, row in part),
            )
            for ranks in micro_steps
        ]

    def refresh_positions(self, step: int) -> int:
        """Tokens of the refresh before the 0-based step over all processes, padding not counted."""
        rows = [row for ranks in self._refresh_parts(step) for part in ranks for _, row in part]
        return sum(len(self.examples[row].input_ids) for row in rows)

    def _refresh_parts(self, step: int) -> list[list[list[Draw]]]:
        count, micro_steps = map(self._share_of, (self.sequence.batch_size, self.accumulation))
        draws = self.sequence.draws(step)[: max(count, micro_steps * self.world)]
        return self._deal(draws, micro_steps)

    def largest(self, start: int = 0) -> tuple[int, int]:
        """(0-based step, micro-step) of this process's largest micro-batch from step `start` on.

        The largest has most positions, padding counted; of equal ones, most targets; then the first.
        """
        found, place = (-1, -1), (start, 0)
        for step in range(start, self.total_steps):
            for m, ranks in enumerate(self._deal_step(step)):
                part = ranks[self.rank]
                size = (self._size(part), sum(self._targets[row] for _, row in part))
                if size > found:
                    found, place = size, (step, m)
        return place

    def targets(self, step: int) -> int:
        """Target tokens of the step over all processes: the loss's denominator."""
        return sum(self._targets[row] for _, row in self.sequence.draws(step))

    def positions(self, step: int) -> int:
        """Tokens of the step over all processes, padding not counted."""
        return sum(len(self.examples[row].input_ids) for _, row in self.sequence.draws(step))

    def largest_micro_batch(self, steps: int) -> tuple[int, int]:
        """(positions, 1-based step) of the largest micro-batch of any process in the first `steps` steps.

        Padding counts where the layout pads. What fits this one fits them all.
        """
        sizes = (
            (self._size(part), step + 1)
            for step in range(steps)
            for ranks in self._parts(step)
            for part in ranks
        )
        return max(sizes, key=lambda found: found[0])

    def _size(self, part: list[Draw]) -> int:
        """Positions of a micro-batch, padding counted."""
        lengths = [len(self.examples[row].input_ids) for _, row in part]
        return max(lengths) * len(lengths) if self.layout == "grouped" else sum(lengths)

    def _collate(self, part: list[Draw]) -> Batch:
        examples = [self.examples[row] for _, row in part]
        return collate(examples, [place for place, _ in part], self.layout, self.pad_id)

    def _deal_step(self, step: int) -> list[list[list[Draw]]]:
        return self._deal(self.sequence.draws(step), self.accumulation)

    def _deal(self, draws: list[Draw], count: int) -> list[list[list[Draw]]]:
        """[micro-step][rank] -> draws, of `count` micro-steps.

        Parts of like weight share a micro-step, at the end of which processes wait for each other;
        the heaviest come first, so that a lack of memory shows at once. Every other micro-step is
        turned round, so that no process has the heavier part each time.
        """
        rows = dict(draws)
        numbered: list[Numbered] = [(place, self.examples[row]) for place, row in rows.items()]
        split = group_by_length if self.layout == "grouped" else split_micro_batches
        parts = split(numbered, self.world * count)
        dealt = [[(place, rows[place]) for place, _ in part] for part in parts]
        micro_steps = [dealt[i : i + self.world] for i in range(0, len(dealt), self.world)]
        return [ranks[::-1] if m % 2 else ranks for m, ranks in enumerate(micro_steps)]


def validation_batches(
    examples: Sequence[Example], cfg: RunConfig, rank: int, world: int, pad_id: int
) -> list[Batch]:
    """This process's validation batches: up to `train.eval_batch_size` examples, alike in length.

    Every process gets the same number of batches, since ZeRO-3 gathers parameters in lockstep;
    where examples do not suffice, a batch of two padding tokens with no target and no counted
    position fills in. `example_ids` are the places in `examples`, -1 in a filler.
    """
    per_rank = math.ceil(len(examples) / (world * cfg.train.eval_batch_size))
    parts = group_by_length(list(enumerate(examples)), per_rank * world) if per_rank else []
    layout = layout_of(cfg)
    nothing = Example(torch.full((2,), pad_id), torch.full((2,), IGNORE), row="filler")
    filler = replace(collate([nothing], [-1], layout, pad_id), num_positions=0)
    return [
        collate([example for _, example in part], [place for place, _ in part], layout, pad_id)
        if part
        else filler
        for part in parts[rank::world]
    ]


def layout_of(cfg: RunConfig) -> Layout:
    """The layout of micro-batches: `auto` is packed, which computes no padding at all."""
    return "grouped" if cfg.data.batching == "grouped" else "packed"
