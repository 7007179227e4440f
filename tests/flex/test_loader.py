import json
import logging
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from flex.config import RunConfig
from flex.data.ledger import Ledger
from flex.data.loader import DataBundle, SampleSequence, StepLoader, load_data, validation_batches
from flex.errors import ConfigError, DataError
from flex.state import IGNORE, Example
from tests.flex.tiny_tokenizer import byte_tokenizer


def make_examples(n):
    """Example i has a length of its own and starts with the token 1000 + i."""
    lengths = [2 + (37 * i) % 61 for i in range(n)]
    examples = []
    for i, length in enumerate(lengths):
        ids = torch.arange(length) + 1
        ids[0] = 1000 + i
        labels = torch.full_like(ids, IGNORE)
        first = 1 + i % (length - 1)
        labels[first - 1 : -1] = ids[first:]
        examples.append(Example(ids, labels, row=f"r:{i}"))
    return examples


EXAMPLES = make_examples(50)


def config(batching="packed", refresh_share=0.5, **train):
    optim = {"curvature": {"share": refresh_share}}
    return RunConfig(data={"batching": batching}, train=train, optim=optim)


def loader(rank=0, world=1, batching="packed", examples=EXAMPLES, **train):
    return StepLoader(examples, config(batching, **train), rank, world, pad_id=0)


def documents(batch):
    """(example_id, tokens, labels) of each document of a batch, whatever its layout."""
    if batch.cu_seqlens is None:
        rows = zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True)
        cut = [(ids[real].tolist(), labels[real].tolist()) for ids, labels, real in rows]
    else:
        lengths = batch.cu_seqlens.diff().tolist()
        rows = zip(batch.input_ids[0].split(lengths), batch.labels[0].split(lengths), strict=True)
        cut = [(ids.tolist(), labels.tolist()) for ids, labels in rows]
    return [(i, *doc) for i, doc in zip(batch.example_ids.tolist(), cut, strict=True)]


def global_batch(step, world=1, **options):
    loaders = [loader(rank, world, **options) for rank in range(world)]
    return sorted(doc for each in loaders for b in each.micro_batches(step) for doc in documents(b))


def test_an_epoch_draws_each_row_once_and_epochs_differ():
    sequence = SampleSequence(10, 4, seed=0)
    draws = [draw for step in range(5) for draw in sequence.draws(step)]
    assert [place for place, _ in draws] == list(range(20))
    first, second = [row for _, row in draws[:10]], [row for _, row in draws[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != list(range(10))


def test_the_sequence_is_a_pure_function_of_seed_rows_and_batch_size():
    sequence = SampleSequence(50, 8, seed=3)
    forwards = [sequence.draws(step) for step in range(20)]
    assert [SampleSequence(50, 8, seed=3).draws(step) for step in range(19, -1, -1)] == forwards[
        ::-1
    ]
    assert SampleSequence(50, 8, seed=4).draws(0) != forwards[0]
    torch.manual_seed(1)
    assert SampleSequence(50, 8, seed=3).draws(7) == forwards[7]


def test_neighbouring_seeds_share_no_epoch():
    orders = {
        tuple(row for _, row in SampleSequence(20, 20, seed).draws(epoch))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_the_sequence_never_changes():
    """A change would break the resumption of every run on disk."""
    sequence = SampleSequence(8, 8, seed=0)
    assert [row for _, row in sequence.draws(0)] == [1, 4, 5, 2, 6, 7, 0, 3]
    assert [row for _, row in sequence.draws(1)] == [0, 5, 3, 1, 2, 4, 6, 7]


def test_a_batch_larger_than_the_data_runs_over_epochs():
    assert Counter(row for _, row in SampleSequence(3, 9, seed=0).draws(4)) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize("batching", ["packed", "grouped", "auto"])
@pytest.mark.parametrize("step", [0, 3, 11])
def test_the_global_batch_is_the_same_at_any_world_size_and_accumulation(batching, step):
    reference = global_batch(step, batch_size=16)
    expected = SampleSequence(50, 16, seed=0).draws(step)
    assert [(place, ids[0] - 1000) for place, ids, _ in reference] == expected
    for world in (1, 2, 4):
        for accumulation in (1, 2, 4):
            options = {"batching": batching, "batch_size": 16, "accumulation": accumulation}
            assert global_batch(step, world, **options) == reference


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_every_rank_gets_the_same_number_of_filled_micro_batches(batching):
    for rank in range(2):
        batches = loader(rank, 2, batching, batch_size=7, accumulation=3).micro_batches(2)
        assert len(batches) == 3
        assert all(len(batch.example_ids) for batch in batches)


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_counts_are_known_without_communication(batching):
    loaders = [loader(r, 2, batching, batch_size=16, accumulation=4) for r in range(2)]
    for step in (0, 5):
        batches = [each.micro_batches(step) for each in loaders]
        total = sum(batch.num_targets for rank in batches for batch in rank)
        assert {each.targets(step) for each in loaders} == {total}
        positions = sum(batch.num_positions for rank in batches for batch in rank)
        assert {each.positions(step) for each in loaders} == {positions}


@pytest.mark.parametrize("batching", ["packed", "grouped"])
@pytest.mark.parametrize(("share", "count"), [(0.5, 8), (0.3, 5), (1.0, 16)])
def test_a_refresh_takes_the_same_examples_at_any_world_size_and_accumulation(
    batching, share, count
):
    expected = [place for place, _ in SampleSequence(50, 16, seed=0).draws(3)][:count]
    for world, accumulation in ((1, 1), (2, 1), (1, 4), (2, 2)):
        options = {"batch_size": 16, "accumulation": accumulation, "refresh_share": share}
        ranks = [loader(r, world, batching, **options) for r in range(world)]
        found = [each.refresh_micro_batches(3) for each in ranks]
        assert {len(each) for each in found} == {math.ceil(share * accumulation)}
        places = [p for each in found for batch, _ in each for p in batch.example_ids.tolist()]
        assert sorted(places) == expected
        for micro_step in zip(*found, strict=True):
            total = sum(batch.num_targets for batch, _ in micro_step)
            assert {targets for _, targets in micro_step} == {total}
        largest = max(b.input_ids.numel() for each in ranks for b in each.micro_batches(3))
        assert max(b.input_ids.numel() for each in found for b, _ in each) <= 1.34 * largest
        tokens = sum(batch.num_positions for each in found for batch, _ in each)
        assert {each.refresh_positions(3) for each in ranks} == {tokens}


def test_each_process_has_an_example_in_a_refresh():
    ranks = [loader(r, 4, batch_size=4, refresh_share=0.1) for r in range(4)]
    assert [len(each.refresh_micro_batches(0)[0][0].example_ids) for each in ranks] == [1] * 4


def test_packed_ranks_carry_about_the_same():
    ranks = [loader(r, 2, batch_size=32, accumulation=2) for r in range(2)]
    for step in range(5):
        loads = [[b.num_positions for b in each.micro_batches(step)] for each in ranks]
        assert abs(sum(loads[0]) - sum(loads[1])) <= 0.05 * sum(map(sum, loads))
        flat = sum(loads, [])
        assert max(flat) <= 1.1 * sum(flat) / 4


def test_grouped_wastes_less_than_the_order_of_the_sample_sequence():
    padded = lambda parts: sum(p.input_ids.numel() - p.num_positions for p in parts)  # noqa: E731
    each = loader(batching="grouped", batch_size=32, accumulation=4)
    whole = loader(batching="grouped", batch_size=8)
    grouped = sum(padded(each.micro_batches(step)) for step in range(3))
    ungrouped = sum(padded(whole.micro_batches(step)) for step in range(12))
    assert grouped < 0.5 * ungrouped


def test_grouped_ranks_of_one_micro_step_are_alike_in_length():
    ranks = [
        loader(r, 2, "grouped", batch_size=32, accumulation=4).micro_batches(0) for r in (0, 1)
    ]
    widths = [[batch.input_ids.shape[1] for batch in rank] for rank in ranks]
    assert [a > b for a, b in zip(*widths, strict=True)] == [True, False, True, False]
    order = [
        w
        for m, pair in enumerate(zip(*widths, strict=True))
        for w in (pair[::-1] if m % 2 else pair)
    ]
    assert order == sorted(order, reverse=True)


def test_a_batch_smaller_than_its_micro_batches_is_an_error():
    with pytest.raises(ConfigError, match="train.batch_size=7") as caught:
        loader(world=4, batch_size=7, accumulation=2)
    assert "train.batch_size=8" in caught.value.fix
    assert len(loader(3, 4, batch_size=8, accumulation=2).micro_batches(0)) == 2


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"epochs": 3, "batch_size": 16}, 10),
        ({"epochs": 0.1, "batch_size": 16}, 1),
        ({"epochs": 2, "batch_size": 50}, 2),
        ({"steps": 7, "epochs": 3}, 7),
    ],
)
def test_steps_come_from_epochs_unless_given(train, steps):
    assert loader(**train).total_steps == steps


@pytest.mark.parametrize("batching", ["packed", "grouped"])
@pytest.mark.parametrize(("n", "world"), [(1, 1), (10, 1), (10, 4), (3, 4), (9, 2), (33, 4)])
def test_validation_covers_each_example_once_with_equal_counts(batching, n, world):
    cfg = config(batching, eval_batch_size=4)
    ranks = [validation_batches(EXAMPLES[:n], cfg, r, world, 0) for r in range(world)]
    counts = {len(rank) for rank in ranks}
    assert counts == {-(-n // (4 * world))}
    batches = [batch for rank in ranks for batch in rank]
    real = [batch for batch in batches if batch.num_positions]
    docs = sorted(doc for batch in real for doc in documents(batch))
    assert docs == [
        (i, e.input_ids.tolist(), e.labels.tolist()) for i, e in enumerate(EXAMPLES[:n])
    ]
    assert all(len(batch.example_ids) <= 4 for batch in batches)
    assert sum(b.num_targets for b in batches) == sum(e.num_targets for e in EXAMPLES[:n])


def test_a_validation_filler_contributes_nothing():
    batches = validation_batches(EXAMPLES[:1], config(), 0, 2, pad_id=5)
    batches += validation_batches(EXAMPLES[:1], config(), 1, 2, pad_id=5)
    filler = next(batch for batch in batches if not batch.num_targets)
    assert filler.input_ids.tolist() == [[5, 5]] and filler.labels.tolist() == [[IGNORE, IGNORE]]
    assert (filler.num_positions, filler.example_ids.tolist()) == (0, [-1])


def test_no_validation_examples_give_no_batches():
    assert validation_batches([], config(), 0, 2, 0) == []


def run_config(path, **data):
    return RunConfig(data={"name": "jsonl", "path": str(path), **data})


def test_load_data_accounts_for_every_row(tmp_path, caplog):
    lines = [json.dumps({"prompt": "p" * (i % 7 + 1), "completion": "c" * 9}) for i in range(299)]
    lines[50] = "{"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    cfg = run_config(path, on_bad_row="skip", max_length=6, limit=200)
    with caplog.at_level(logging.INFO, "flex.data"):
        bundle = load_data(cfg, byte_tokenizer())
    ledger = bundle.ledger
    assert ledger.read == 299
    assert ledger.used == len(bundle.train) + len(bundle.validation) == ledger.truncated
    assert ledger.read == ledger.used + ledger.set_aside.total() + ledger.dropped.total()
    assert set(ledger.dropped) == {"not JSON", "no target tokens"}
    assert ledger.summary() in caplog.text


def test_load_data_with_nothing_left_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "long prompt", "completion": "c"}\n')
    with pytest.raises(DataError, match="no training example is left") as caught:
        load_data(run_config(path, on_bad_row="skip", max_length=4), byte_tokenizer())
    assert "data.max_length (now 4)" in caught.value.fix


def test_the_fingerprint_is_of_what_is_trained_on():
    def bundle(examples):
        return DataBundle(examples, [], Ledger()).fingerprint()

    same = [replace(e, row="moved.jsonl:1") for e in EXAMPLES]
    assert bundle(EXAMPLES) == bundle(same)
    other_label = EXAMPLES[0].labels.clone()
    other_label[0] = 7
    for changed in (
        EXAMPLES[1:],
        [EXAMPLES[1], EXAMPLES[0], *EXAMPLES[2:]],
        [replace(EXAMPLES[0], labels=other_label), *EXAMPLES[1:]],
    ):
        assert bundle(changed) != bundle(EXAMPLES)
