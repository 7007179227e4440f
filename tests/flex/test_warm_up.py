"""The warm-up: the run's largest micro-batch, to no effect on what follows."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from flex import warm_up as module
from flex.config import RunConfig
from flex.config_io import config_hash
from flex.data.loader import StepLoader
from flex.errors import ConfigError
from flex.loop import Trainer
from flex.meters import Meter
from flex.ranges import Profile
from flex.stop import StopSignal
from flex.warm_up import is_wanted, warm_up
from tests.flex.test_step import EXAMPLES, Parts, config


@pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
def test_training_after_it_is_the_same_to_the_bit(optimizer: str) -> None:
    runs = []
    for warms in (False, True):
        cfg = config(optimizer, lora={"dropout": 0.3}, train={"accumulation": 2})
        parts = Parts(cfg)
        torch.manual_seed(7)
        if warms:
            warm_up(cfg, parts.engine, parts.loader, 0)
        reports = [parts.step(i).loss for i in range(3)]
        runs.append((reports, parts.values(), torch.rand(())))
    (losses, values, draw), (warm_losses, warm_values, warm_draw) = runs
    assert losses == warm_losses and draw == warm_draw
    assert all(torch.equal(value, warm_values[name]) for name, value in values.items())


def test_it_runs_forward_and_backward_and_leaves_no_gradient() -> None:
    cfg = config()
    parts = Parts(cfg)
    with mock.patch.object(parts.engine, "backward", wraps=parts.engine.backward) as backward:
        warm_up(cfg, parts.engine, parts.loader, 0)
    assert backward.call_count == 1 and float(backward.call_args.args[0]) == 0.0
    assert all(p.grad is None for p in parts.parameters.values())


@pytest.mark.parametrize("batching", ["packed", "grouped"])
@pytest.mark.parametrize("start", [0, 3])
def test_the_largest_micro_batch_of_the_run_is_the_one_that_runs(batching: str, start: int) -> None:
    cfg = config(train={"accumulation": 2, "steps": 6}, data={"batching": batching})
    parts = Parts(cfg)
    seen = []
    original = module.target_loss
    with mock.patch.object(
        module, "target_loss", lambda m, b, scale: (seen.append(b), original(m, b, scale))[1]
    ):
        warm_up(cfg, parts.engine, parts.loader, start)
    all_batches = [b for step in range(start, 6) for b in parts.loader.micro_batches(step)]
    assert len(seen) == 1
    assert seen[0].input_ids.numel() == max(b.input_ids.numel() for b in all_batches)
    assert len({b.input_ids.numel() for b in all_batches}) > 1


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_runs_its_own_largest(rank: int) -> None:
    cfg = config(train={"accumulation": 2, "batch_size": 5, "steps": 6})
    loader = StepLoader(EXAMPLES, cfg, rank, 2, pad_id=0)
    step, m = loader.largest()
    sizes = [[b.num_positions for b in loader.micro_batches(s)] for s in range(6)]
    assert sizes[step][m] == max(size for row in sizes for size in row)


def test_out_of_memory_says_what_was_planned_and_what_to_change() -> None:
    cfg = config()
    parts = Parts(cfg)
    full = mock.Mock(side_effect=torch.OutOfMemoryError("full"))
    with mock.patch.object(parts.engine, "backward", full), pytest.raises(ConfigError) as raised:
        warm_up(cfg, parts.engine, parts.loader, 0)
    text = str(raised.value)
    assert "largest micro-batch" in text and "planned peak" in text
    assert "activations" in text and "model.gradient_checkpointing=true" in text


def test_auto_is_on_a_gpu_only() -> None:
    for wish, on_cpu, on_gpu in (("auto", 0, 1), ("always", 1, 1), ("never", 0, 0)):
        cfg = RunConfig.model_validate({"train": {"warm_up_longest": wish}})
        assert is_wanted(cfg, torch.device("cpu")) == on_cpu
        assert is_wanted(cfg, torch.device("cuda")) == on_gpu
        assert config_hash(cfg) == config_hash(
            RunConfig()
        )  # a run may be resumed with another wish


@pytest.mark.parametrize("done", [0, 2, 3])
def test_the_trainer_warms_up_before_its_first_step(tmp_path, done: int) -> None:
    cfg = config(train={"warm_up_longest": "always", "steps": 3})
    parts = Parts(cfg)
    trainer = Trainer(cfg, parts.engine, parts.loader, [], None, tmp_path, {})
    trainer.state.step = done
    events: list[object] = []
    with (
        mock.patch("flex.loop.warm_up", lambda *given: events.append(("warm-up", given[-1]))),
        mock.patch("flex.loop.train_step", side_effect=lambda *given: events.append("step")),
        pytest.raises(TypeError) if done < 3 else mock.MagicMock(),
    ):
        meter = mock.create_autospec(Meter, instance=True)
        stop = mock.create_autospec(StopSignal, instance=True)
        profile = mock.create_autospec(Profile, instance=True)
        profile.step.return_value = mock.MagicMock()
        trainer.fit(meter, [], stop, profile)  # the step that tells nothing ends it
    assert events == ([] if done == 3 else [("warm-up", done), "step"])
