"""Row counts rounded up on a CPU: how far, and that nothing else changes."""

import pytest
import torch

from flex.data.packing import collate
from flex.loss import cross_entropy_sum
from flex.model import attention
from flex.padding import LARGEST, SHARE, pad_columns, pad_packed, rounded
from flex.state import IGNORE, Example
from flex.step import target_logits, target_loss
from tests.tiny import tiny_model


def example(length, prompt):
    ids = torch.randint(3, 120, (length + 1,), generator=torch.Generator().manual_seed(length))
    labels = ids[1:].clone()
    labels[: prompt - 1] = IGNORE
    labels[-1] = IGNORE
    return Example(ids[:-1], labels, row=f"made:{length}")


def packed(*lengths):
    return collate([example(n, 3) for n in lengths], list(range(len(lengths))), "packed", 0)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 1000, 2047, 2048, 2049, 40_000])
def test_rounding_is_small_and_leaves_few_counts(rows):
    assert 0 <= rounded(rows) - rows < min(LARGEST, max(1, rows / SHARE))
    assert rounded(rounded(rows)) == rounded(rows)


def test_few_counts_are_left():
    assert len({rounded(n) for n in range(2000, 4000)}) <= 2000 // LARGEST + 3
    assert [rounded(n) for n in (63, 65, 129)] == [63, 66, 132]


def test_the_padding_is_a_document_of_its_own_without_loss():
    batch = packed(61, 66)
    more = pad_packed(batch)
    assert (rounded(127), rounded(129)) == (128, 132) and more.input_ids.shape == (1, 128)
    assert more.cu_seqlens.tolist() == [0, 61, 127, 128]
    assert more.labels[0, 127:].tolist() == [IGNORE] and more.position_ids[0, 127:].tolist() == [0]
    assert more.targets_per_example() == [*batch.targets_per_example(), 0]
    assert (more.num_positions, more.num_targets) == (batch.num_positions, batch.num_targets)
    assert pad_packed(more) is more
    assert pad_columns(torch.arange(65)).tolist() == [*range(65), 64]


def test_rows_without_a_label_bear_no_loss_and_get_no_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    labels = torch.tensor([1, 2, 3])
    loss = cross_entropy_sum(logits, labels, 0.5)
    loss.backward()
    alone = logits.detach()[:3].clone().requires_grad_()
    cross_entropy_sum(alone, labels, 0.5).backward()
    assert torch.equal(loss, cross_entropy_sum(alone, labels, 0.5))
    assert torch.equal(logits.grad, torch.cat([alone.grad, torch.zeros(2, 7)]))


def test_loss_logits_and_gradients_stay(monkeypatch):
    """Against the same batch unpadded: equal up to the rounding of fp64."""
    attention.register()
    model = tiny_model().double()
    model.set_attn_implementation(attention.NAME)
    batch = packed(61, 66, 80, 68)  # 275 positions, 263 targets

    def run():
        model.zero_grad()
        loss = target_loss(model, batch, 1 / batch.num_targets)
        loss.backward()
        return (
            loss.detach(),
            target_logits(model, batch)[0].detach(),
            [p.grad.clone() for p in model.parameters()],
        )

    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["input_ids"].shape[1], len(kwargs["logits_to_keep"]))
        ),
        with_kwargs=True,
    )
    loss, logits, grads = run()
    assert seen[0] == (rounded(275), rounded(batch.num_targets)) == (280, 264)
    monkeypatch.setattr("flex.padding.LARGEST", 1)
    plain_loss, plain_logits, plain_grads = run()
    assert seen[-1] == (275, batch.num_targets)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits, plain_logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads, plain_grads, rtol=1e-10, atol=1e-12)
