"""Sophia as a torch optimizer: the clip, bias correction, curvature bookkeeping, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

from flex.errors import CurvatureError
from flex.optim import CurvatureStats, Lion, Signum, Sophia, parameter_groups, sample_labels
from flex.optim.curvature import uniform_draws


def refresh(optimizer, p, grad, num_targets=1):
    p.grad = grad.clone()
    optimizer.accumulate_curvature(num_targets)
    optimizer.commit_curvature()


def test_first_update_uses_natural_units_and_bias_correction():
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    optimizer = Sophia([p], lr=0.1, betas=(0.9, 0.99), gamma=0.05, weight_decay=0.5)
    refresh(optimizer, p, torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64), num_targets=10)
    g = torch.tensor([0.1, 3.0, 0.0], dtype=torch.float64)
    p.grad = g.clone()
    optimizer.step()
    h = torch.tensor(
        [40.0, 2.5, 0.0], dtype=torch.float64
    )  # B g^2, although the moving average holds 1 % of it
    u = (g / (0.05 * h).clamp_min(1e-12)).clamp(-1, 1)
    assert torch.allclose(p, 1.0 * (1 - 0.1 * 0.5) - 0.1 * u, rtol=1e-12)
    assert optimizer.clipped.item() == 1  # 3.0 > 0.05 * 2.5; 0/0 is not clipped and not NaN


def test_square_per_micro_batch_then_average():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = Sophia([p], betas=(0.9, 0.0))
    for g in (1.0, -3.0):
        p.grad = torch.tensor([g])
        optimizer.accumulate_curvature(7)
    optimizer.commit_curvature()
    assert optimizer.state[p]["exp_avg_sq"].item() == pytest.approx(7 * (1 + 9) / 2)


def test_mode_for_zero_accumulates_and_leaves_parameters():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Sophia([p], betas=(0.9, 0.5))
    p.grad = torch.full((3,), 2.0)
    optimizer.num_targets = 4
    optimizer.step()
    optimizer.num_targets = None
    optimizer.commit_curvature()
    assert p.tolist() == [1, 1, 1]
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [8, 8, 8]
    assert (optimizer.state[p]["step"], optimizer.state[p]["refreshes"]) == (0, 1)


def test_step_before_refresh_raises():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(CurvatureError, match="before any curvature refresh"):
        Sophia([p]).step()


def test_flat_partition_equals_matrices():
    """Element-wise: ZeRO's view of the same numbers gives the same result bit for bit."""
    torch.manual_seed(0)
    a, b = torch.randn(5, 7), torch.randn(3, 2)
    whole = [torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())]
    flat = torch.nn.Parameter(torch.cat([a.flatten(), b.flatten()]))
    one, two = Sophia(whole, lr=0.01), Sophia([flat], lr=0.01)
    for step in range(4):
        grads = [torch.randn_like(p) for p in whole]
        joined = torch.cat([g.flatten() for g in grads])
        for accumulate in [True, False] if step % 2 == 0 else [False]:
            for p, g in zip(whole, grads, strict=True):
                p.grad = g.clone()
            flat.grad = joined.clone()
            for optimizer in (one, two):
                if accumulate:
                    optimizer.accumulate_curvature(5)
                    optimizer.commit_curvature()
                else:
                    optimizer.step()
    assert torch.equal(torch.cat([p.detach().flatten() for p in whole]), flat.detach())


def test_curvature_estimate_is_unbiased_for_the_gauss_newton_diagonal():
    """Softmax regression has a closed form: diag(H)_{cj} = mean_i x_ij^2 p_ic (1 - p_ic)."""
    torch.manual_seed(0)
    n, d, classes = 64, 4, 5
    x = torch.randn(n, d) + 0.5  # non-zero mean: shared noise between examples would show
    w = torch.nn.Parameter(torch.randn(classes, d) * 0.3)
    prob = torch.softmax(x @ w.detach().T, -1)
    exact = ((prob * (1 - prob)).T @ x.square()) / n
    optimizer = Sophia([w], betas=(0.9, 0.0))
    for trial in range(600):
        logits = x @ w.T
        draws = uniform_draws(0, trial, list(range(n)), [1] * n)
        w.grad = None
        F.cross_entropy(logits, sample_labels(logits, draws)).backward()
        optimizer.accumulate_curvature(n)
    optimizer.commit_curvature()
    ratio = optimizer.state[w]["exp_avg_sq"] / exact
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.05)
    assert ratio.std().item() < 0.25


def test_sampled_labels_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1e4]]).expand(20_000, 4)
    labels = sample_labels(logits, uniform_draws(3, 1, [0], [20_000]))
    share = torch.bincount(labels, minlength=4) / 20_000
    assert torch.allclose(share, torch.softmax(logits[0], -1), atol=0.015)
    assert share[3] == 0


def test_draws_are_keyed_by_example_not_by_batch():
    together = uniform_draws(1, 5, [10, 11, 12], [3, 2, 4])
    apart = torch.cat([uniform_draws(1, 5, [e], [c]) for e, c in ((10, 3), (11, 2), (12, 4))])
    assert torch.equal(together, apart)
    others = [
        uniform_draws(2, 5, [10], [3]),
        uniform_draws(1, 6, [10], [3]),
        uniform_draws(1, 5, [11], [3]),
    ]
    assert not any(torch.equal(together[:3], other) for other in others)


@pytest.mark.parametrize(
    ("h", "message"),
    [([0.0, 0.0], "zero"), ([2.0, 2.0], "same number"), ([1.0, math.inf], "not finite")],
)
def test_dead_curvature_raises(h, message):
    h = torch.tensor(h, dtype=torch.float64)
    sums = torch.stack([h.sum(), h.square().sum(), h.max()])
    with pytest.raises(CurvatureError, match=message):
        CurvatureStats.from_sums(sums, len(h)).check()


def test_live_curvature_passes_even_when_half_is_zero():
    sums = torch.tensor([3.0, 5.0, 2.0], dtype=torch.float64)
    CurvatureStats.from_sums(sums, 4).check()


def test_a_penalty_that_rules_the_denominator_is_told():
    stats = CurvatureStats(mean=1e-5, std=1e-5, max=1e-3)
    assert "2.7e-02) is 2,700 x" in stats.beside_constant(2.7e-2)
    assert stats.beside_constant(1e-6) is None and stats.beside_constant(0.0) is None


def test_penalty_offset_enters_the_denominator():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Sophia(
        [{"params": [p], "curvature_offset": 4.0}], lr=1.0, betas=(0.0, 0.0), gamma=0.5
    )
    refresh(optimizer, p, torch.ones(1, dtype=torch.float64), num_targets=1)
    p.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    assert p.item() == pytest.approx(-1.0 / (0.5 * (1 + 4)))


def test_groups_by_factor_and_shape():
    params = {
        "x.lora_A.default.weight": torch.zeros(2, 3),
        "x.lora_B.default.weight": torch.zeros(3, 2),
        "y.lora_A.default.weight": torch.zeros(2, 3),
        "y.lora_B.default.weight": torch.zeros(2, 3),
    }
    groups = parameter_groups(
        params, {"x.lora_A.default.weight": 0.5, "y.lora_A.default.weight": 0.5}
    )
    assert [(g["factor"], len(g["params"]), g["curvature_offset"]) for g in groups] == [
        ("A", 2, 0.5),
        ("B", 1, 0.0),
        ("B", 1, 0.0),
    ]
    with pytest.raises(ValueError, match="curvature offset"):
        parameter_groups(params, {"x.lora_A.default.weight": 0.5})


@pytest.mark.parametrize(
    "bad", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"gamma": 0}, {"eps": 0}, {"weight_decay": -1}]
)
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sophia([torch.nn.Parameter(torch.zeros(1))], **bad)


def test_signum_and_lion_formulas():
    g = [torch.tensor([1.0, -2.0]), torch.tensor([-3.0, 1.0])]
    for cls, expected in ((Signum, [-0.1 + 0.1, 0.1 - -0.1]), (Lion, None)):
        p = torch.nn.Parameter(torch.zeros(2))
        optimizer = cls([p], lr=0.1, betas=(0.5, 0.5))
        for x in g:
            p.grad = x.clone()
            optimizer.step()
        if expected is None:  # u1 = sign(.5 g1), m1 = .5 g1; u2 = sign(.25 g1 + .5 g2)
            expected = [-0.1 + 0.1, 0.1 + 0.0]
        assert torch.allclose(p.detach()[0], torch.tensor(expected[0]), atol=1e-7), cls
