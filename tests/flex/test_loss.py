"""Cross-entropy with its gradient made on the way: against fp64, in every dtype, over block edges."""

import pytest
import torch
import torch.nn.functional as F

from flex import loss
from tests.oracle import assert_within_budget

SCALE = 0.37


def eager(logits, labels, scale):
    """The plain computation: widen, sum, round the gradient once."""
    x = logits.detach().requires_grad_()
    value = F.cross_entropy(
        x.to(torch.promote_types(x.dtype, torch.float32)), labels, reduction="sum"
    )
    (value * scale).backward()
    return (value * scale).detach(), x.grad


def ours(logits, labels, scale):
    x = logits.detach().requires_grad_()
    value = loss.cross_entropy_sum(x, labels, scale)
    value.backward()
    return value.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 97])
def test_value_and_gradient(dtype, rows, poison):
    generator = torch.Generator().manual_seed(rows)
    logits = (4 * torch.randn(rows, 257, generator=generator)).to(dtype)
    labels = torch.randint(257, (rows,), generator=generator)
    value, grad = ours(logits, labels, SCALE)
    plain_value, plain_grad = eager(logits, labels, SCALE)
    true_value, true_grad = eager(logits.double(), labels, SCALE)
    assert grad.dtype == dtype and value.dtype == torch.promote_types(dtype, torch.float32)
    assert_within_budget(value, plain_value, true_value, "loss")
    assert_within_budget(grad, plain_grad, true_grad, "gradient")


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (5,), generator=generator)
    assert torch.autograd.gradcheck(lambda x: loss.cross_entropy_sum(x, labels, SCALE), logits)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3e4, -3e4, 0.0], [0.0, 0.0, 3e4]])
    value, grad = ours(logits, torch.tensor([1, 2]), 1.0)
    assert value == 6e4 and torch.equal(grad, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_a_nan_logit_gives_a_nan_loss():
    logits = torch.zeros(2, 3)
    logits[1, 0] = torch.nan
    assert loss.cross_entropy_sum(logits, torch.tensor([0, 0])).isnan()


def test_an_upstream_factor_reaches_the_gradient():
    logits, labels = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 5, 2, 2])
    (3 * loss.cross_entropy_sum(logits, labels)).backward()
    _, single = ours(logits, labels, 1.0)
    torch.testing.assert_close(logits.grad, 3 * single)


def test_no_gradient_is_made_where_none_is_asked_for(monkeypatch):
    logits = torch.randn(3, 5)
    monkeypatch.setattr(torch, "empty_like", None)  # the gradient's buffer
    loss.cross_entropy_sum(logits, torch.tensor([0, 1, 2]))


def test_empty():
    value = loss.cross_entropy_sum(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert value == 0
