"""With keys, a token's dropout mask is its own: in any batch, order and split, and in no other step or layer."""

from dataclasses import replace

import pytest
import torch

from flex.data.packing import collate
from flex.kernels.lora_linear.dropout import keep_mask
from flex.model.adapters import FusedLora, add_adapters
from flex.model.dropout_keys import Keys, current, dropout_keys, key_of, row_ids
from flex.padding import pad_packed
from flex.step import keyed_dropout
from tests.flex.test_step import EXAMPLES, Parts, config
from tests.tiny import tiny_model

DROPOUT = {"lora": {"dropout": 0.3}}


def adapted(dropout=0.3):
    model = add_adapters(tiny_model(), config(lora={"dropout": dropout}).lora, seed=0)
    return model, [m for m in model.modules() if isinstance(m, FusedLora)]


def hidden(layer, rows, keys):
    """(rows, K) bool: which inputs of each row the layer hides from A."""
    with dropout_keys(keys):
        seed, ids = layer.mask_key(torch.empty(rows, layer.in_features))
    return keep_mask(seed, rows, layer.in_features, 0.3, torch.device("cpu"), ids) == 0


@pytest.mark.parametrize("split", [{"accumulation": 2}, {"accumulation": 4}], ids=str)
@pytest.mark.parametrize("batching", ["packed", "grouped"])
@pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
def test_a_step_hides_the_same_in_any_layout_and_split(optimizer, batching, split):
    """Sophia's curvature squares micro-batches, so its two runs share the split."""
    ends = []
    same = split if optimizer == "sophia" else {}
    for layout, train in (("packed", same), (batching, split)):
        data = {"batching": layout}
        cfg = config(optimizer, data=data, train=train, optim={"lr": 3e-3}, **DROPOUT)
        parts = Parts(cfg)
        losses = [report.loss for report in parts.run()]
        ends.append((losses, torch.cat([v.flatten() for v in parts.values().values()])))
    (losses, values), (others, theirs) = ends
    assert others == pytest.approx(losses, rel=1e-5)
    assert (values - theirs).norm() <= 1e-4 * values.norm()


def test_dropout_is_at_work_there():
    runs = [Parts(config(lora={"dropout": p})).run(1)[0].grad_norm for p in (0.0, 0.3)]
    assert abs(runs[0] - runs[1]) > 0.01 * runs[0]


def test_the_global_generator_decides_nothing():
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append([report.loss for report in Parts(config(**DROPOUT)).run(3)])
    assert ends[0] == ends[1]


def test_recomputed_activations_hide_the_same():
    ends = []
    for recomputed in (False, True):
        parts = Parts(config(**DROPOUT))
        if recomputed:
            parts.model.enable_input_require_grads()
            parts.model.gradient_checkpointing_enable({"use_reentrant": False})
        parts.run(3)
        ends.append(parts.values())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-7)


def test_ids_are_of_the_document_and_the_place_in_it():
    places = [7, 3, 12, 9]
    rows = [EXAMPLES[i] for i in (0, 4, 2, 7)]
    packed = collate(rows, places, "packed", 0)
    grouped = collate(rows, places, "grouped", 0)
    ids = row_ids(packed)
    assert ids.dtype == torch.int32 and len(ids) == packed.num_positions
    assert len(ids.unique()) == len(ids)
    assert torch.equal(row_ids(grouped)[grouped.attention_mask.flatten()], ids)
    assert torch.equal(row_ids(pad_packed(packed))[: len(ids)], ids)
    order = [2, 0, 3, 1]
    moved = row_ids(collate([rows[i] for i in order], [places[i] for i in order], "packed", 0))
    assert torch.equal(moved.sort().values, ids.sort().values) and not torch.equal(moved, ids)


def test_ids_of_a_large_batch_do_not_meet():
    places = torch.arange(1000)[:, None] + 123_456_789
    batch = replace(
        collate(EXAMPLES[:1], [0], "grouped", 0),
        example_ids=places.flatten(),
        position_ids=torch.arange(2048).repeat(1000, 1),
    )
    ids = row_ids(batch)
    assert len(ids.unique()) == len(ids) == 2_048_000


def test_masks_of_layers_steps_and_purposes_are_unrelated():
    _, layers = adapted()
    wide = [layer for layer in layers if layer.in_features == layers[0].in_features][:2]
    ids = torch.arange(400, dtype=torch.int32)
    draws = [key_of(0, 1, "train"), key_of(0, 2, "train"), key_of(0, 1, "refresh"), key_of(1, 1)]
    masks = [hidden(layer, 400, Keys(draw, ids)) for layer in wide for draw in draws]
    signs = torch.stack([mask.double().flatten() for mask in masks])
    signs = (signs - 0.3) / (0.3 * 0.7) ** 0.5
    overlap = signs @ signs.T / signs.shape[1]
    assert (overlap - torch.eye(len(masks))).abs().max() < 5 / signs.shape[1] ** 0.5
    assert torch.equal(hidden(wide[0], 400, Keys(draws[0], ids)), masks[0])


def test_keys_hold_for_the_block_and_no_longer():
    cfg = config(**DROPOUT)
    batch = collate(EXAMPLES[:2], [0, 1], "packed", 0)
    with pytest.raises(KeyError), keyed_dropout(cfg, batch, 3, "train"):
        assert current() is not None
        raise KeyError
    assert current() is None
    with keyed_dropout(config(), batch, 3, "train"):
        assert current() is None  # no dropout, no keys


def test_rows_that_are_no_tokens_draw_from_the_generator():
    """Such as those that a router sends to an expert."""
    _, layers = adapted()
    with dropout_keys(Keys(5, torch.arange(10, dtype=torch.int32))):
        before = torch.get_rng_state()
        seed, ids = layers[0].mask_key(torch.empty(2, 5, 8))
        assert seed == 5 ^ layers[0].flex_key and len(ids) == 10
        assert torch.equal(torch.get_rng_state(), before)
        seed, ids = layers[0].mask_key(torch.empty(7, 8))
        assert ids is None and not torch.equal(torch.get_rng_state(), before)


def test_layers_are_known_by_their_names():
    first, again = (adapted()[1] for _ in range(2))
    keys = [layer.flex_key for layer in first]
    assert keys == [layer.flex_key for layer in again]
    assert len(set(keys)) == len(keys) > 1 and all(0 <= key < 2**63 for key in keys)
