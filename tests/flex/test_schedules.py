"""Learning rates against closed forms."""

import math

import pytest
import torch

from flex.config import OptimConfig
from flex.engine import Engine
from flex.optim import build_optimizer, learning_rate


def test_cosine_reaches_peak_after_warmup_and_floor_at_the_end():
    cfg = OptimConfig(lr=1.0, warmup=0.1, min_lr_ratio=0.05)
    rates = [learning_rate(cfg, s, 100) for s in range(100)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[9] == pytest.approx(1.0)
        and rates[10] == pytest.approx(1.0)
    )
    assert rates[-1] == pytest.approx(0.05)
    middle = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (55 - 10) / 89))
    assert rates[55] == pytest.approx(middle)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_linear_and_constant():
    linear = OptimConfig(lr=2.0, warmup=0.0, min_lr_ratio=0.0, schedule="linear")
    assert [learning_rate(linear, s, 5) for s in range(5)] == pytest.approx(
        [2.0, 1.5, 1.0, 0.5, 0.0]
    )
    constant = OptimConfig(lr=2.0, warmup=0.4, schedule="constant")
    assert [learning_rate(constant, s, 5) for s in range(5)] == pytest.approx(
        [1.0, 2.0, 2.0, 2.0, 2.0]
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_one_step_run_moves(schedule):
    assert learning_rate(OptimConfig(lr=1.0, warmup=0.1, schedule=schedule), 0, 1) > 0


def test_lora_plus_moves_b_by_a_multiple_of_the_rate():
    cfg = OptimConfig(
        name="signum", lr=1e-3, lr_ratio_b=8.0, weight_decay=0.0, clip_norm=0.0, betas=(0.0, 0.0)
    )
    parameters = {
        f"x.lora_{factor}.weight": torch.nn.Parameter(torch.zeros(2, 3)) for factor in "AB"
    }
    engine = Engine(torch.nn.Module(), build_optimizer(cfg, parameters), parameters, 0.0)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    engine.update(5e-4)
    moved = {name: p.abs().max().item() for name, p in parameters.items()}
    assert moved == {
        "x.lora_A.weight": pytest.approx(5e-4),
        "x.lora_B.weight": pytest.approx(4e-3),
    }
