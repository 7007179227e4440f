"""The training step against a plain loop: stock PEFT, one document at a time, torch's own loss and optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from flex.config import RunConfig
from flex.data.loader import StepLoader, validation_batches
from flex.engine import Engine, build_engine, clip_gradients
from flex.errors import CurvatureError
from flex.kernels.spectral_penalty.reference import spectral_penalty_reference
from flex.model import attention
from flex.model.adapters import adapter_parameters, add_adapters
from flex.optim import build_optimizer, learning_rate
from flex.optim.curvature import sample_labels, uniform_draws
from flex.penalty import SpectralPenalty
from flex.state import IGNORE, Example
from flex.step import refresh_is_due, target_logits, train_step, validation_loss
from tests.tiny import VOCAB, tiny_model

STEPS = 6


def make_examples(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        length = 5 + (11 * i) % 17
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = torch.full_like(ids, IGNORE)
        labels[2:-1] = ids[3:]
        examples.append(Example(ids, labels, row=f"r:{i}"))
    return examples


EXAMPLES = make_examples()


def config(optimizer="adamw", **sections):
    sections = {k: dict(v) for k, v in sections.items()}
    lora = {"r": 4, "dropout": 0.0} | sections.pop("lora", {})
    train = {"steps": STEPS, "batch_size": 4} | sections.pop("train", {})
    optim = {"name": optimizer, "lr": 1e-2} | sections.pop("optim", {})
    return RunConfig(lora=lora, train=train, optim=optim, **sections)


class Parts:
    """What a run is made of, on a tiny model."""

    def __init__(self, cfg):
        attention.register()
        model = tiny_model()
        model.set_attn_implementation(attention.NAME)
        self.cfg = cfg
        self.model = add_adapters(model, cfg.lora, cfg.seed)
        self.parameters = adapter_parameters(self.model)
        self.penalty = None
        offsets = None
        if cfg.penalty.active:
            self.penalty = SpectralPenalty.from_model(self.model, cfg.penalty)
            if cfg.penalty.coupling == "gradient" and cfg.optim.name == "sophia":
                offsets = self.penalty.curvature_constants()
        self.optimizer = build_optimizer(cfg.optim, self.parameters, offsets)
        self.engine = build_engine(cfg, self.model, self.optimizer, self.parameters)
        self.loader = StepLoader(EXAMPLES, cfg, 0, 1, pad_id=0)

    def step(self, index):
        total = self.loader.total_steps
        return train_step(self.cfg, self.engine, self.loader, self.penalty, index, total)[0]

    def run(self, steps=STEPS):
        return [self.step(i) for i in range(steps)]

    def values(self):
        return {name: p.detach().clone() for name, p in self.parameters.items()}


def plain_loop(cfg, steps=STEPS):
    """Losses and final adapters of the same training, written out with nothing of ours but the reference penalty."""
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.lora.r,
        lora_alpha=cfg.lora.alpha,
        target_modules=list(cfg.lora.targets),
    )
    model = get_peft_model(tiny_model(), lora)
    start = Parts(cfg).values()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(start[name])
    spectrum = SpectralPenalty.from_model(model, cfg.penalty).spectrum
    optimizer = torch.optim.AdamW(
        parameters.values(), betas=cfg.optim.betas, weight_decay=cfg.optim.weight_decay
    )
    sequence = StepLoader(EXAMPLES, cfg, 0, 1, pad_id=0).sequence
    losses = []
    for step in range(steps):
        rows = [EXAMPLES[row] for _, row in sequence.draws(step)]
        count = sum(row.num_targets for row in rows)
        loss = torch.zeros(())
        for row in rows:
            logits = model(input_ids=row.input_ids[None]).logits[0]
            loss = loss + F.cross_entropy(logits, row.labels, ignore_index=IGNORE, reduction="sum")
        loss = loss / count
        losses.append(loss.item())
        penalty = sum(
            spectral_penalty_reference(
                p - start[name], spectrum, role="A" if "lora_A" in name else "B"
            )
            for name, p in parameters.items()
        )
        optimizer.zero_grad()
        (loss + cfg.penalty.weight * penalty).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), cfg.optim.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(cfg.optim, step, steps)
        optimizer.step()
    return losses, {name: p.detach() for name, p in parameters.items()}


def assert_close(ours, theirs, tolerance=2e-4):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = (ours[name] - value).norm()
        assert difference <= tolerance * value.norm() + 1e-7, (name, float(difference))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"data": {"batching": "grouped"}},
        {"train": {"accumulation": 2}},
        {"penalty": {"weight": 2.0}},
        {"penalty": {"weight": 2.0, "transform": "axis"}, "train": {"accumulation": 4}},
        {"optim": {"clip_norm": 0.05}},
    ],
    ids=str,
)
def test_equals_a_plain_loop(sections):
    cfg = config(**sections)
    parts = Parts(cfg)
    losses = [report.loss for report in parts.run()]
    expected, adapters = plain_loop(cfg)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.01
    assert_close(parts.values(), adapters)


@pytest.mark.parametrize("optimizer", ["sophia", "adamw", "lion", "signum"])
def test_lambda_zero_is_off_bit_for_bit(optimizer):
    ends = []
    for penalty in ({"preset": "off"}, {"preset": "flex", "weight": 0.0}):
        parts = Parts(config(optimizer, penalty=penalty, lora={"dropout": 0.1}))
        torch.manual_seed(3)
        parts.run()
        ends.append(parts.values())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("coupling", ["gradient", "decoupled"])
@pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
def test_two_lambdas_give_two_adapters(optimizer, coupling):
    ends = []
    for weight in (0.02, 2.0):
        penalty = {"weight": weight, "coupling": coupling}
        parts = Parts(config(optimizer, penalty=penalty))
        reports = parts.run()
        ends.append(parts.values())
        assert reports[-1].penalty > 0
        assert reports[-1].penalty_weighted == pytest.approx(weight * reports[-1].penalty)
    moved = {name: (a - ends[1][name]).norm() / a.norm() for name, a in ends[0].items()}
    assert max(moved.values()) > 1e-3


def test_the_penalty_shows_its_share_of_the_gradient():
    parts = Parts(config(penalty={"weight": 2.0}, optim={"clip_norm": 0.0}))
    parts.run(3)
    before = parts.values()
    figures = parts.penalty.measure()
    report = parts.step(3)
    assert report.penalty == pytest.approx(figures.value, rel=1e-6)
    with_penalty = report.grad_norm
    assert report.penalty_share == pytest.approx(figures.grad_norm / with_penalty, rel=1e-5)
    off = Parts(config(penalty={"preset": "off"}, optim={"clip_norm": 0.0}))
    with torch.no_grad():
        for name, p in off.parameters.items():
            p.copy_(before[name])
    task = off.step(3).grad_norm
    assert abs(task - figures.grad_norm) <= with_penalty <= task + figures.grad_norm


@pytest.mark.parametrize("accumulation", [1, 2])
def test_curvature_is_b_times_the_squared_gradient_of_sampled_labels(accumulation):
    """By hand: labels drawn from the model's softmax, per micro-batch B g^2, their mean."""
    cfg = config("sophia", penalty={"preset": "off"}, train={"accumulation": accumulation})
    parts = Parts(cfg)
    with torch.no_grad():  # B = 0 would leave no gradient in A
        for p in parts.parameters.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    expected = {name: torch.zeros_like(p) for name, p in parts.parameters.items()}
    reference = copy.deepcopy(parts.model)
    theirs = adapter_parameters(reference)
    batches = parts.loader.refresh_micro_batches(0)
    for batch, _ in batches:
        reference.zero_grad()
        loss = torch.zeros(())
        for example_id in batch.example_ids.tolist():
            row = EXAMPLES[dict(parts.loader.sequence.draws(0))[example_id]]
            logits = reference(input_ids=row.input_ids[None], use_cache=False).logits[0]
            logits = logits[row.labels != IGNORE]
            labels = sample_labels(logits, uniform_draws(cfg.seed, 0, [example_id], [len(logits)]))
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        (loss / batch.num_targets).backward()
        for name, p in theirs.items():
            expected[name] += p.grad.square() * batch.num_targets / len(batches)
    report = parts.step(0)
    beta = cfg.optim.betas[1]
    found = {
        name: parts.optimizer.state[p]["exp_avg_sq"] / (1 - beta)
        for name, p in parts.parameters.items()
    }
    assert_close(found, expected, tolerance=1e-4)
    mean = torch.cat([h.flatten() for h in expected.values()]).mean()
    assert report.curvature_mean == pytest.approx(mean.item(), rel=1e-4) and report.refreshed


def test_clipping_does_not_touch_the_curvature():
    states = []
    for clip in (0.0, 1e-3):
        parts = Parts(config("sophia", optim={"clip_norm": clip}, penalty={"preset": "off"}))
        parts.step(0)
        states.append([parts.optimizer.state[p]["exp_avg_sq"] for p in parts.parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_the_curvature_is_refreshed_first_and_then_every_k_steps():
    cfg = config("sophia", optim={"curvature": {"every": 4, "warmup": 2}})
    assert [step for step in range(13) if refresh_is_due(cfg, step)] == [0, 1, 4, 8, 12]
    assert not refresh_is_due(config("adamw"), 0)
    reports = Parts(cfg).run()
    assert [r.refreshed for r in reports] == [True, True, False, False, True, False]
    assert [r.curvature_mean is not None for r in reports] == [r.refreshed for r in reports]


def test_a_refresh_uses_its_share_of_the_examples(monkeypatch):
    calls = []
    original = Engine.add_curvature
    monkeypatch.setattr(
        Engine, "add_curvature", lambda self, n: (calls.append(n), original(self, n))
    )
    cfg = config(
        "sophia",
        train={"accumulation": 4},
        optim={"curvature": {"every": 100, "share": 0.5}},
    )
    parts = Parts(cfg)
    parts.run(2)
    rows = [row for _, row in parts.loader.sequence.draws(0)][: cfg.train.batch_size // 2]
    assert len(calls) == 2
    assert sum(calls) == sum(EXAMPLES[row].num_targets for row in rows)


def test_a_dead_curvature_stops_the_run(monkeypatch):
    monkeypatch.setattr(
        "flex.step.cross_entropy_sum", lambda logits, labels, scale=1: logits.sum() * 0
    )
    with pytest.raises(CurvatureError, match="zero in every adapter"):
        Parts(config("sophia", penalty={"preset": "off"})).step(0)


@pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
@pytest.mark.parametrize("coupling", ["gradient", "decoupled"])
def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch, optimizer, coupling):
    parts = Parts(config(optimizer, penalty={"weight": 2.0, "coupling": coupling}))
    parts.run(2)
    before = parts.values()
    state = copy.deepcopy(parts.engine.optimizer_state())
    original = Engine.backward
    monkeypatch.setattr(Engine, "backward", lambda self, loss: original(self, loss * torch.inf))
    report = parts.step(2)
    assert report.skipped and report.clipped_fraction is None
    assert all(torch.equal(before[name], p) for name, p in parts.parameters.items())
    after = parts.engine.optimizer_state()
    assert after.counters == state.counters
    assert all(torch.equal(after.tensors[k], v) for k, v in state.tensors.items())
    monkeypatch.undo()
    assert not parts.step(3).skipped  # and the run goes on


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_logits_only_where_there_is_a_target(batching):
    parts = Parts(config(data={"batching": batching}))
    (batch,) = parts.loader.micro_batches(0)
    logits, labels = target_logits(parts.model, batch)
    rows = dict(parts.loader.sequence.draws(0))
    found = {}
    start = 0
    for example_id, count in zip(
        batch.example_ids.tolist(), batch.targets_per_example(), strict=True
    ):
        found[example_id] = logits[start : start + count], labels[start : start + count]
        start += count
    assert start == len(logits) == batch.num_targets
    for example_id, (some, wanted) in found.items():
        row = EXAMPLES[rows[example_id]]
        bears_loss = row.labels != IGNORE
        full = parts.model(input_ids=row.input_ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(some, full[bears_loss], atol=1e-5, rtol=1e-5)
        assert torch.equal(wanted, row.labels[bears_loss])


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_validation_is_the_mean_over_target_tokens(batching):
    cfg = config(data={"batching": batching}, train={"eval_batch_size": 5}, lora={"dropout": 0.5})
    parts = Parts(cfg)
    parts.model.train()
    batches = validation_batches(EXAMPLES, cfg, 0, 1, pad_id=0)
    total = torch.zeros((), dtype=torch.float64)
    parts.model.eval()
    for row in EXAMPLES:
        logits = parts.model(input_ids=row.input_ids[None], use_cache=False).logits[0].double()
        total += F.cross_entropy(logits, row.labels, ignore_index=IGNORE, reduction="sum").detach()
    expected = total / sum(row.num_targets for row in EXAMPLES)
    parts.model.train()
    assert validation_loss(parts.engine, batches) == pytest.approx(expected.item(), rel=1e-5)
    assert parts.model.training
    both = [b for rank in (0, 1) for b in validation_batches(EXAMPLES[:1], cfg, rank, 2, pad_id=0)]
    assert sorted(b.num_targets for b in both) == [0, EXAMPLES[0].num_targets]  # one is a filler
    alone = validation_batches(EXAMPLES[:1], cfg, 0, 1, pad_id=0)
    assert validation_loss(parts.engine, both) == validation_loss(parts.engine, alone)


def test_clipping_scales_to_the_bound_and_leaves_small_gradients_alone():
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]

    def clipped(bound):
        result = [g.clone() for g in grads]
        norm, finite = clip_gradients(result, bound)
        assert finite
        return norm, result

    for bound in (0.0, 7.0):
        norm, result = clipped(bound)
        assert norm == 5.0 and all(torch.equal(a, b) for a, b in zip(result, grads, strict=True))
    norm, result = clipped(1.0)
    assert norm == 5.0
    torch.testing.assert_close(
        torch.cat([g.flatten() for g in result]), torch.tensor([0.6, 0, 0.8])
    )


def test_saved_optimizer_state_continues_exactly():
    for optimizer in ("sophia", "adamw", "lion", "signum"):
        cfg = config(optimizer, optim={"curvature": {"every": 3}})
        whole = Parts(cfg)
        whole.run()
        first, second = Parts(cfg), Parts(cfg)
        first.run(3)
        with torch.no_grad():
            for name, p in second.parameters.items():
                p.copy_(first.parameters[name])
        second.penalty.load_state_dict(first.penalty.state_dict())
        second.engine.load_optimizer_state(first.engine.optimizer_state())
        for index in range(3, STEPS):
            second.step(index)
        assert all(torch.equal(second.values()[n], v) for n, v in whole.values().items()), optimizer
