"""The penalty over all adapters of a model: in place, as a loss, by shares, decoupled, resumed."""

import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flex.config import PenaltyConfig
from flex.errors import CheckpointError, ConfigError, ModelError
from flex.kernels.spectral_penalty import Spectrum, spectral_penalty_reference
from flex.penalty import LoraPair, PenaltyReport, SpectralPenalty, find_pairs

SCHEDULES = ("linear_ramp", "hard_cutoff", "power", "sigmoid", "uniform", "shuffled")
TARGETS = ("factors", "factor_updates", "delta_w")
TRANSFORMS = ("flat", "axis", "fft2")
SHAPES = ((5, 4), (4, 7), (5, 4), (3, 6), (5, 4))  # (out, in): two alone, three alike


def make_pairs(moved=True, rank=2, seed=0):
    """fp64 pairs away from their start, A0 random and B0 = 0 (or random when `moved`)."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: nn.Parameter(torch.randn(*s, generator=g, dtype=torch.float64))  # noqa: E731
    pairs = [
        LoraPair(f"{i}.A", randn(rank, k), f"{i}.B", randn(n, rank), 1.5)
        for i, (n, k) in enumerate(SHAPES)
    ]
    if not moved:
        for p in pairs:
            p.b.data.zero_()
    return pairs


def move(pairs, seed=1):
    g = torch.Generator().manual_seed(seed)
    for w in parameters(pairs):
        w.data += torch.randn(w.shape, generator=g, dtype=w.dtype)


def parameters(pairs):
    return [w for p in pairs for w in (p.a, p.b)]


def by_reference(pairs, start, config):
    """lambda * P as a graph over the parameters, matrix by matrix, from the reference alone."""
    fields = Spectrum.__dataclass_fields__
    spectrum = Spectrum(**{f: getattr(config, f) for f in fields})
    terms = []
    for p in pairs:
        a0, b0 = start[p.a_name], start[p.b_name]
        if config.target == "delta_w":
            dense = p.scale * (p.b @ p.a - b0 @ a0)
            terms.append(spectral_penalty_reference(dense, spectrum, "delta"))
        else:
            raw = config.target == "factors"
            terms.append(spectral_penalty_reference(p.a if raw else p.a - a0, spectrum, "A"))
            terms.append(spectral_penalty_reference(p.b if raw else p.b - b0, spectrum, "B"))
    total = torch.stack(terms)
    return config.weight * (total.mean() if config.reduce == "mean" else total.sum())


def moved_penalty(zero_start=False, **options):
    pairs = make_pairs(moved=not zero_start)
    start = {n: w.detach().clone() for p in pairs for n, w in ((p.a_name, p.a), (p.b_name, p.b))}
    penalty = SpectralPenalty(pairs, **options)
    move(pairs)
    return pairs, start, penalty


def peft_model(**options):
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, (n, k) in (("up", (12, 8)), ("down", (8, 12)), ("again", (12, 8))):
        model.add_module(name, nn.Linear(k, n))
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": ["up", "down", "again"]} | options
    )
    return get_peft_model(model, config)


def assert_same(actual, expected, rtol=1e-10):
    assert (actual - expected).abs().max() <= rtol * expected.abs().max().clamp(min=1e-30)


# ---- the gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradient_matches_finite_differences(schedule, target, transform):
    for one_sided, reduce, zero_start in ((True, "sum", False), (False, "mean", True)):
        options = {"schedule": schedule, "target": target, "transform": transform}
        options |= {"phi_low": 0.9, "one_sided": one_sided, "reduce": reduce, "weight": 0.3}
        pairs, start, penalty = moved_penalty(zero_start, **options)
        report = penalty.add_gradients()
        params = parameters(pairs)
        config = PenaltyConfig(**options)
        value = by_reference(pairs, start, config)
        expected = torch.autograd.grad(value, params)
        for w, g in zip(params, expected, strict=True):
            assert_same(w.grad, g)
        assert report.weighted == pytest.approx(value.item(), rel=1e-10)
        assert report.value == pytest.approx(value.item() / 0.3, rel=1e-10)
        norm = torch.cat([g.flatten() for g in expected]).norm().item()
        assert report.grad_norm == pytest.approx(norm, rel=1e-10)
        for w in (params[2], params[7]):  # central differences along a few coordinates
            for i in range(3):
                with torch.no_grad():
                    w.view(-1)[i] += 0.25
                    up = by_reference(pairs, start, config)
                    w.view(-1)[i] -= 0.5
                    down = by_reference(pairs, start, config)
                    w.view(-1)[i] += 0.25
                numeric = ((up - down) / 0.5).item()
                scale = w.grad.abs().max().item()
                assert abs(numeric - w.grad.view(-1)[i].item()) <= 1e-6 * scale


def test_paper_literal_is_the_published_formula():
    pairs, _, penalty = moved_penalty(preset="paper-literal", weight=0.02)
    expected = []
    for w in parameters(pairs):
        power = np.abs(np.fft.rfft(w.detach().numpy().reshape(-1))) ** 2
        n = len(power)
        rho = 1.0 - (1.0 + (0.1 - 1.0) * np.minimum(1.0, np.arange(n) / (n * 0.5)))
        expected.append((rho * power).sum())
    report = penalty.add_gradients()
    assert report.value == pytest.approx(np.mean(expected), rel=1e-12)
    assert report.weighted == pytest.approx(0.02 * np.mean(expected), rel=1e-12)
    assert all(w.grad.abs().max() > 0 for w in parameters(pairs))


def test_adds_to_what_is_there_and_scales_with_lambda():
    grads = {}
    for weight in (0.02, 0.2):
        pairs, start, penalty = moved_penalty(weight=weight)
        value = by_reference(pairs, start, penalty.config)
        expected = torch.autograd.grad(value, parameters(pairs))
        params = parameters(pairs)
        for w in params[1:]:
            w.grad = torch.ones_like(w)
        penalty.add_gradients()
        grads[weight] = [params[0].grad, *(w.grad - 1.0 for w in params[1:])]
        for added, g in zip(grads[weight], expected, strict=True):
            assert_same(added, g)
    for small, large in zip(grads[0.02], grads[0.2], strict=True):
        assert_same(large, 10 * small)


def test_two_lambdas_train_two_adapters_and_zero_is_plain():
    results = {}
    for weight in (None, 0.0, 0.02, 0.2):
        model = peft_model()
        penalty = SpectralPenalty.from_model(model, weight=weight) if weight is not None else None
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=0.1)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if penalty is not None:
                penalty.add_gradients()
            optimizer.step()
        results[weight] = torch.cat([p.detach().flatten() for p in params])
    assert torch.equal(results[0.0], results[None])
    assert not torch.equal(results[0.02], results[None])
    assert not torch.equal(results[0.2], results[0.02])


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"preset": "off"}, {"preset": "repo-compat"}])
def test_inert_penalties_leave_gradients_bit_identical(options):
    pairs, _, penalty = moved_penalty(**options)
    params = parameters(pairs)
    for w in params[1:]:
        w.grad = torch.randn_like(w)
    before = [None, *(w.grad.clone() for w in params[1:])]
    report = penalty.add_gradients()
    (penalty.as_loss() + (params[1] * 0.0).sum()).backward()
    assert params[0].grad is None
    assert all(torch.equal(w.grad, g) for w, g in zip(params[1:], before[1:], strict=True))
    assert penalty.decoupled_deltas(0.1) == {}
    assert penalty.curvature_constants() == {}
    assert report.grad_norm == 0.0
    assert (report.value > 0) == (options.get("preset") == "repo-compat")


# ---- shares and the loss form -------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("world", [1, 2, 3, 40])
def test_mean_over_ranks_of_the_loss_form_is_the_whole(target, world):
    pairs, _, penalty = moved_penalty(target=target, reduce="mean")
    params = parameters(pairs)
    whole = penalty.add_gradients()
    expected = [w.grad for w in params]
    summed, owners = [torch.zeros_like(w) for w in params], [0] * len(params)
    sums = torch.zeros(2, dtype=torch.float64)
    for rank in range(world):
        for w in params:
            w.grad = None
        loss = penalty.as_loss(rank, world)
        assert loss.item() == 0.0 and loss.ndim == 0
        loss.backward()
        sums += penalty.last_report.sums
        for i, w in enumerate(params):
            if w.grad is not None:
                summed[i] += w.grad / world
                owners[i] += 1
    assert owners == [1] * len(params)  # every matrix on exactly one rank
    for s, e in zip(summed, expected, strict=True):
        assert_same(s, e)
    merged = PenaltyReport(sums, whole.weight)
    assert merged.weighted == pytest.approx(whole.weighted, rel=1e-10)
    assert merged.grad_norm == pytest.approx(whole.grad_norm, rel=1e-10)


def test_shares_are_balanced_and_the_same_every_time():
    pairs = [p for seed in range(6) for p in make_pairs(seed=seed)]
    largest, total = 14, sum(w.numel() for w in parameters(pairs))
    for world in (2, 3, 7):
        elements = []
        for rank in range(world):
            penalty = SpectralPenalty(pairs)
            for w in parameters(pairs):
                w.grad = None
            penalty.as_loss(rank, world).backward()
            elements.append(sum(w.numel() for w in parameters(pairs) if w.grad is not None))
        assert sum(elements) == total
        assert max(abs(e - total / world) for e in elements) <= largest
    with pytest.raises(ValueError, match="rank=2"):
        penalty.as_loss(2, 2)


def test_loss_form_adds_exactly_to_another_loss():
    pairs, _, penalty = moved_penalty()
    params = parameters(pairs)
    (task,) = torch.autograd.grad((params[3] ** 3).sum(), [params[3]])
    penalty.add_gradients()
    alone = [w.grad for w in params]
    for w in params:
        w.grad = None
    loss = (params[3] ** 3).sum()
    total = loss + penalty.as_loss()
    assert total.item() == loss.item()
    (total * 4.0).backward()  # the incoming gradient (loss scaling) multiplies both alike
    for i, (w, g) in enumerate(zip(params, alone, strict=True)):
        assert_same(w.grad, 4.0 * (g + task) if i == 3 else 4.0 * g, 1e-14)


def test_decoupled_deltas_are_the_gradient_times_minus_lr():
    pairs, _, penalty = moved_penalty()
    penalty.add_gradients()
    pairs_2, _, decoupled = moved_penalty(coupling="decoupled")
    deltas = decoupled.decoupled_deltas(0.1)
    assert len(deltas) == 2 * len(SHAPES)
    for w, twin in zip(parameters(pairs), parameters(pairs_2), strict=True):
        assert_same(deltas[twin], -0.1 * w.grad)
        assert twin.grad is None
    for wrong in (
        decoupled.add_gradients,
        decoupled.as_loss,
        lambda: penalty.decoupled_deltas(0.1),
    ):
        with pytest.raises(ConfigError, match="penalty.coupling"):
            wrong()


# ---- what others need to know -------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("target", ["factors", "factor_updates"])
def test_curvature_constants_are_the_hessian_diagonal(target, transform):
    for norm, reduce, one_sided in (("sum", "mean", True), ("ortho", "sum", False)):
        pairs, start, penalty = moved_penalty(
            target=target, transform=transform, norm=norm, reduce=reduce, one_sided=one_sided
        )
        constants = penalty.curvature_constants()
        assert len(constants) == 2 * len(SHAPES)
        value = by_reference(pairs, start, penalty.config)
        for name, w in ((n, w) for p in pairs[:2] for n, w in ((p.a_name, p.a), (p.b_name, p.b))):
            (g,) = torch.autograd.grad(value, [w], create_graph=True)
            for i in (0, w.numel() - 1):
                (row,) = torch.autograd.grad(g.reshape(-1)[i], [w], retain_graph=True)
                assert constants[name] == pytest.approx(row.reshape(-1)[i].item(), rel=1e-10)


def test_delta_w_has_no_curvature_constant():
    with pytest.raises(ConfigError, match="no constant curvature"):
        moved_penalty(target="delta_w")[2].curvature_constants()


def test_high_band_share_sees_the_update_only():
    k = torch.arange(24, dtype=torch.float64)
    a = nn.Parameter(torch.randn(2, 12, dtype=torch.float64))
    b = nn.Parameter(torch.zeros(12, 2, dtype=torch.float64))
    pair = LoraPair("a", a, "b", b)
    penalties = {w: SpectralPenalty([pair], weight=w) for w in (0.0, 0.02)}
    raw = SpectralPenalty([pair], target="factors")
    assert penalties[0.02].high_band_share() == {"A": 0.0, "B": 0.0}
    low, high = torch.cos(2 * torch.pi * 2 * k / 24), torch.cos(2 * torch.pi * 9 * k / 24)
    a.data += (3.0 * low + high).view(2, 12)  # energies 9 : 1
    b.data += (low + 2.0 * high).view(12, 2)
    for penalty in penalties.values():
        assert penalty.high_band_share() == pytest.approx({"A": 0.1, "B": 0.8}, rel=1e-9)
    power = np.abs(np.fft.fft(a.detach().numpy().reshape(-1))) ** 2
    frequency = np.minimum(np.arange(24), 24 - np.arange(24))
    expected = power[frequency >= 6.5].sum() / power.sum()
    assert raw.high_band_share()["A"] == pytest.approx(expected, rel=1e-9)


def test_start_warnings_name_their_reason(caplog):
    def fresh(**options):
        pairs = [
            LoraPair("a", nn.Parameter(torch.rand(8, 512)), "b", nn.Parameter(torch.zeros(512, 8)))
        ]
        with caplog.at_level(logging.WARNING, "flex.penalty"):
            found = SpectralPenalty(pairs, **options).warnings_at_start()
        assert [r.message for r in caplog.records] == found
        caplog.clear()
        return found

    assert fresh() == [] and fresh(preset="off") == []
    (literal,) = fresh(preset="paper-literal")
    assert "dwarfs" in literal
    (inert,) = fresh(preset="repo-compat")
    assert "no gradient" in inert
    (nothing,) = fresh(schedule="hard_cutoff", threshold=1.0)
    assert "inert" in nothing


# ---- models and state ---------------------------------------------------------------------------


def test_finds_every_trainable_pair_of_a_stock_peft_model():
    model = peft_model(alpha_pattern={"down": 2})
    pairs = find_pairs(model)
    named = dict(model.named_parameters())
    assert [p.scale for p in pairs] == [3.0, 1.0, 3.0]
    assert all(named[p.a_name] is p.a and named[p.b_name] is p.b for p in pairs)
    assert {p.a_name for p in pairs} | {p.b_name for p in pairs} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    penalty = SpectralPenalty.from_model(model, PenaltyConfig(target="factors", weight=1.0))
    report = penalty.add_gradients()
    expected = sum(spectral_penalty_reference(p.a, Spectrum()) for p in pairs)  # B = 0
    assert report.value == pytest.approx(expected.item(), rel=1e-5)


def test_frozen_factors_get_no_gradient():
    for target in TARGETS:
        pairs = make_pairs()
        for p in pairs:
            p.a.requires_grad_(False)
        penalty = SpectralPenalty(pairs, target=target)
        move(pairs)
        report = penalty.add_gradients()
        assert all(p.a.grad is None and p.b.grad.abs().max() > 0 for p in pairs)
        norm = torch.cat([p.b.grad.flatten() for p in pairs]).norm().item()
        assert report.grad_norm == pytest.approx(norm)
        penalty.as_loss().backward()


def test_layers_that_are_no_matrix_pairs_are_counted(caplog):
    model = nn.Sequential()
    model.add_module("up", nn.Linear(4, 4))
    model.add_module("conv", nn.Conv1d(2, 2, 3))
    model.add_module("emb", nn.Embedding(5, 4))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["up", "conv", "emb"]))
    with caplog.at_level(logging.WARNING, "flex.penalty"):
        assert len(find_pairs(model)) == 1
    assert "2 LoRA layers" in caplog.text


def test_refuses_no_adapters_and_partitioned_ones():
    with pytest.raises(ModelError, match="no trainable"):
        SpectralPenalty.from_model(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="weight"):
        SpectralPenalty(make_pairs(), PenaltyConfig(), weight=0.1)
    model = peft_model()
    penalty = SpectralPenalty.from_model(model)
    name, weight = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    weight.ds_id = 3
    weight.data = weight.data[:0]
    with pytest.raises(ModelError, match=f"{name} is partitioned by ZeRO-3"):
        penalty.add_gradients()
    with pytest.raises(ModelError, match="partitioned"):
        SpectralPenalty.from_model(model)


@pytest.mark.parametrize("target", ["factor_updates", "delta_w"])
def test_state_round_trip_measures_from_the_same_start(target):
    pairs, start, penalty = moved_penalty(target=target, transform="axis")
    before = penalty.add_gradients().value
    expected = [w.grad for w in parameters(pairs)]
    state = penalty.state_dict()
    assert all(torch.equal(state[n], start[n]) for n in start) and state.keys() == start.keys()
    for w in parameters(pairs):
        w.grad = None
    resumed = SpectralPenalty(pairs, penalty.config)  # snapshots the moved weights
    assert abs(resumed.measure().value) < 1e-12 * before
    resumed.load_state_dict(state)
    assert resumed.add_gradients().value == before
    assert all(torch.equal(w.grad, g) for w, g in zip(parameters(pairs), expected, strict=True))
    state["0.A"].zero_()  # a copy
    assert resumed.measure().value == pytest.approx(before, rel=1e-12)


def test_delta_w_from_a_zero_start_resumes_from_a_moved_one():
    pairs, _, penalty = moved_penalty(zero_start=True, target="delta_w")
    fresh = SpectralPenalty(make_pairs(moved=False), target="delta_w")
    fresh.load_state_dict({n: torch.randn_like(t) for n, t in penalty.state_dict().items()})
    assert fresh.measure().value > 0  # B = 0 now, B0 A0 is not


def test_a_state_that_does_not_fit_changes_nothing():
    _, _, penalty = moved_penalty()
    before = penalty.measure().value
    state = {n: t + 1 for n, t in penalty.state_dict().items()}
    for broken in (
        {n: t for n, t in state.items() if n != "1.B"},
        {**state, "9.A": torch.zeros(2, 2)},
        {**state, "1.B": torch.zeros(1, 2)},
    ):
        with pytest.raises(CheckpointError, match="do not fit"):
            penalty.load_state_dict(broken)
    assert penalty.measure().value == before
    assert moved_penalty(target="factors")[2].state_dict() == {}


def test_half_precision_parameters_keep_their_dtype():
    pairs = [
        LoraPair(
            "a",
            nn.Parameter(torch.randn(2, 9).bfloat16()),
            "b",
            nn.Parameter(torch.ones(5, 2).bfloat16()),
        )
    ]
    penalty = SpectralPenalty(pairs, target="factors", weight=1.0)
    exact = torch.autograd.grad(
        spectral_penalty_reference(pairs[0].a.float(), Spectrum()), [pairs[0].a]
    )[0]
    pairs[0].b.grad = torch.ones_like(pairs[0].b)
    penalty.add_gradients()
    assert pairs[0].a.grad.dtype == pairs[0].b.grad.dtype == torch.bfloat16
    assert_same(pairs[0].a.grad.float(), exact.float(), 1e-2)
    pairs[0].a.grad = None
    penalty.as_loss().backward()
    assert_same(pairs[0].a.grad.float(), exact.float(), 1e-2)
