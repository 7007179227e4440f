"""`python -m flex data show`: what the model will be trained on, and what was lost on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from flex.config import RunConfig
from flex.data.loader import DataBundle, StepLoader, load_data
from flex.state import IGNORE, Example

BINS, BAR = 8, 40  # histogram rows, and characters of its longest bar
PERCENTILES = (50, 90, 95, 99)


def show(cfg: RunConfig, n: int) -> None:
    """Print the first `n` training examples, lengths, padding and the account. Loads no model."""
    from flex.model.base import load_tokenizer

    tokenizer = load_tokenizer(cfg.model)
    show_bundle(load_data(cfg, tokenizer), cfg, tokenizer, n, Console(highlight=False))


def show_bundle(
    bundle: DataBundle, cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, n: int, console: Console
) -> None:
    """The printing half of `show`. Titles mark the runs of tokens: clear without colour too."""
    lines = [
        *(example_text(example, tokenizer) for example in bundle.train[:n]),
        Text(f"account: {bundle.ledger.summary()}", style="bold"),
        *(
            Text(f"  dropped {drop}", style="red")
            for reason in bundle.ledger.dropped
            for drop in bundle.ledger.first(reason)
        ),
        f"examples: {len(bundle.train)} train, {len(bundle.validation)} validation",
        *_lengths(bundle.train),
        *_tokens(bundle.train, cfg),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def example_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """One example as text: runs of tokens with or without loss, each under a title; EOS by name."""
    ids = example.input_ids.tolist()
    # Position t - 1 predicts token t, so that is where token t's label is.
    bears_loss = [False, *(example.labels[:-1] != IGNORE).tolist()]
    cut = ", CUT at data.max_length, no EOS" if example.truncated else ""
    title = f"=== {example.row}: {len(ids)} tokens, {example.num_targets} bear loss{cut} ===\n"
    text = Text().append(title, "bold")
    for loss, places in groupby(range(len(ids)), key=bears_loss.__getitem__):
        run = [ids[t] for t in places]
        ends = loss and not example.truncated and run[-1] == tokenizer.eos_token_id
        text.append(f"--- {'loss' if loss else 'no loss'}, {len(run)} tokens ---\n", "bold cyan")
        body = tokenizer.decode(run[:-1] if ends else run, clean_up_tokenization_spaces=False)
        text.append(str(body), "green" if loss else "dim")
        text.append(str(tokenizer.eos_token) if ends else "", "reverse green")
        text.append("\n")
    return text


def padding(examples: Sequence[Example], cfg: RunConfig) -> dict[str, tuple[int, int]]:
    """Layout -> (positions computed, of which padding) over the first epoch in one process.

    `fixed` pads every example to data.max_length, as the published loader did for APPS.
    """
    counts: dict[str, tuple[int, int]] = {}
    for layout in ("packed", "grouped"):
        data = cfg.data.model_copy(update={"batching": layout})
        loader = StepLoader(examples, cfg.model_copy(update={"data": data}), 0, 1, pad_id=0)
        steps = range(math.ceil(len(examples) / cfg.train.batch_size))
        batches = [batch for step in steps for batch in loader.micro_batches(step)]
        real = sum(batch.num_positions for batch in batches)
        computed = sum(batch.input_ids.numel() for batch in batches)
        counts[layout] = computed, computed - real
        fixed = sum(len(batch.example_ids) for batch in batches) * cfg.data.max_length
    return {**counts, "fixed": (fixed, fixed - real)}


def _lengths(examples: Sequence[Example]) -> list[str]:
    lengths = sorted(len(example.input_ids) for example in examples)
    ranks = {f"p{p}": lengths[math.ceil(p / 100 * len(lengths)) - 1] for p in PERCENTILES}
    figures = {"min": lengths[0], **ranks, "max": lengths[-1]}
    span = lengths[-1] - lengths[0] + 1
    width = math.ceil(span / BINS)
    counts = [0] * math.ceil(span / width)
    for length in lengths:
        counts[(length - lengths[0]) // width] += 1
    lines = ["tokens per example: " + ", ".join(f"{key} {n}" for key, n in figures.items())]
    for i, count in enumerate(counts):
        low = lengths[0] + i * width
        bar = "#" * math.ceil(BAR * count / max(counts))
        lines.append(f"  {low:5d}-{low + width - 1:<5d} {count:6d} {bar}".rstrip())
    return lines


def _tokens(examples: Sequence[Example], cfg: RunConfig) -> list[str]:
    tokens = sum(len(example.input_ids) for example in examples)
    targets = sum(example.num_targets for example in examples)
    return [
        f"tokens that bear loss: {targets} of {tokens} ({targets / tokens:.1%})",
        *(
            f"padding, {layout}: {lost} of {computed} positions ({lost / computed:.1%})"
            for layout, (computed, lost) in padding(examples, cfg).items()
        ),
    ]
