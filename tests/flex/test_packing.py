import itertools
import random

import pytest
import torch

from flex.data.packing import collate, group_by_length, split_micro_batches
from flex.state import IGNORE, Example


def example(length, prompt=1, start=10):
    ids = torch.arange(start, start + length)
    labels = torch.full_like(ids, IGNORE)
    labels[prompt - 1 : -1] = ids[prompt:]
    return Example(ids, labels, row=f"r:{length}")


def numbered(lengths):
    return [(100 + i, example(n)) for i, n in enumerate(lengths)]


def loads(parts):
    return [sum(len(e.input_ids) for _, e in part) for part in parts]


def test_packed_lays_documents_end_to_end():
    batch = collate([example(3), example(2, start=20)], [7, 4], "packed", pad_id=0)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21]]
    assert batch.labels.tolist() == [[11, 12, IGNORE, 21, IGNORE]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and batch.cu_seqlens.dtype == torch.int32
    assert batch.attention_mask is None
    assert batch.example_ids.tolist() == [7, 4]
    assert (batch.num_targets, batch.num_positions) == (3, 5)


def test_grouped_pads_at_the_right():
    batch = collate([example(3), example(2, start=20)], [7, 4], "grouped", pad_id=99)
    assert batch.input_ids.tolist() == [[10, 11, 12], [20, 21, 99]]
    assert batch.labels.tolist() == [[11, 12, IGNORE], [21, IGNORE, IGNORE]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.cu_seqlens is None
    assert (batch.num_targets, batch.num_positions) == (3, 5)


@pytest.mark.parametrize("layout", ["packed", "grouped"])
def test_tensors_are_int64_and_targets_per_example_survive(layout):
    batch = collate([example(6, prompt=4), example(5, prompt=2)], [0, 1], layout, pad_id=0)
    for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.example_ids):
        assert tensor.dtype == torch.int64
    assert batch.targets_per_example() == [2, 3]
    assert batch.num_targets == 5


def test_collate_refuses_nothing_and_a_wrong_number_of_ids():
    for examples, ids in (([], []), ([example(2)], [1, 2])):
        with pytest.raises(ValueError):
            collate(examples, ids, "packed", 0)


def test_split_by_hand():
    parts = split_micro_batches(numbered([3, 9, 4, 8, 5, 3]), 3)
    assert loads(parts) == [12, 11, 9]
    assert [[place for place, _ in part] for part in parts] == [[101, 105], [100, 103], [102, 104]]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_split_is_a_balanced_partition(n, seed):
    rng = random.Random(seed)
    examples = numbered([rng.randint(2, 300) for _ in range(16)])
    parts = split_micro_batches(examples, n)
    assert all(parts) and len(parts) == n
    places = sorted(place for part in parts for place, _ in part)
    assert places == [place for place, _ in examples]
    assert loads(parts) == sorted(loads(parts), reverse=True)
    total, longest = sum(loads(parts)), max(len(e.input_ids) for _, e in examples)
    assert max(loads(parts)) <= 4 / 3 * max(total / n, longest) + 1
    assert all(part == sorted(part, key=lambda item: item[0]) for part in parts)


def test_split_depends_on_nothing_but_lengths_and_ids():
    examples = numbered([5, 5, 5, 2, 9])
    reference = split_micro_batches(examples, 2)
    for order in itertools.permutations(examples):
        assert split_micro_batches(order, 2) == reference


def test_split_into_more_parts_than_examples_is_refused():
    assert all(split_micro_batches(numbered([1000, 1, 1]), 3))
    with pytest.raises(ValueError, match="2 examples"):
        split_micro_batches(numbered([4, 4]), 3)


def test_groups_are_neighbours_in_length():
    parts = group_by_length(numbered([5, 100, 6, 90, 7, 95, 1]), 3)
    assert [[len(e.input_ids) for _, e in part] for part in parts] == [
        [100, 95],
        [90, 7],
        [6, 5, 1],
    ]
    assert group_by_length(numbered([4]), 3).count([]) == 2
