"""Examples to micro-batches: laid end to end without padding, or padded among their like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flex.state import IGNORE, Batch, Example

Layout = Literal["packed", "grouped"]
Numbered = tuple[int, Example]  # (place in the sample sequence, example)


def collate(
    examples: Sequence[Example], example_ids: Sequence[int], layout: Layout, pad_id: int
) -> Batch:
    """One micro-batch of the given examples, in this order. Shapes and dtypes: see Batch.

    packed: nothing is lost; a document's last label is IGNORE, so no loss crosses a boundary.
    grouped: right-padded with `pad_id`; padding has label IGNORE, position 0 and mask False.
    """
    if not examples or len(examples) != len(example_ids):
        raise ValueError(f"{len(examples)} examples and {len(example_ids)} ids; need as many, > 0")
    packed = layout == "packed"
    lengths = torch.tensor([len(example.input_ids) for example in examples])

    def join(parts: list[Tensor], padding: int) -> Tensor:
        return torch.cat(parts)[None] if packed else pad_sequence(parts, True, padding)

    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    return Batch(
        input_ids=join([example.input_ids for example in examples], pad_id),
        labels=join([example.labels for example in examples], IGNORE),
        position_ids=join([torch.arange(int(n)) for n in lengths], 0),
        num_targets=sum(example.num_targets for example in examples),
        num_positions=int(lengths.sum()),
        example_ids=torch.tensor(example_ids, dtype=torch.int64),
        cu_seqlens=bounds if packed else None,
        attention_mask=None if packed else real,
    )


def split_micro_batches(examples: Sequence[Numbered], n: int) -> list[list[Numbered]]:
    """Split into `n` non-empty parts of about equal token counts, the fullest first.

    Longest processing time first (Graham 1969): each example, longest first, goes to the emptiest
    part; the fullest part is at most 4/3 of the best possible. Depends only on lengths and ids; a
    part keeps the order of ids.
    """
    if len(examples) < n:
        raise ValueError(f"{len(examples)} examples cannot fill {n} micro-batches")
    parts: list[list[Numbered]] = [[] for _ in range(n)]
    loads = [0] * n
    for item in _longest_first(examples):
        emptiest = loads.index(min(loads))
        parts[emptiest].append(item)
        loads[emptiest] += len(item[1].input_ids)
    order = sorted(range(n), key=lambda i: -loads[i])
    return [sorted(parts[i], key=lambda item: item[0]) for i in order]


def group_by_length(examples: Sequence[Numbered], n: int) -> list[list[Numbered]]:
    """Split into `n` parts of neighbours in length, longest first; sizes differ by at most one.

    With fewer than `n` examples some parts are empty.
    """
    ordered = _longest_first(examples)
    cuts = [len(ordered) * i // n for i in range(n + 1)]
    return [ordered[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def _longest_first(examples: Sequence[Numbered]) -> list[Numbered]:
    return sorted(examples, key=lambda item: (-len(item[1].input_ids), item[0]))
