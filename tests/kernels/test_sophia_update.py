"""The in-place list update against its ten-line specification, and the bugs it must not have."""

import pytest
import torch

from flex.kernels import sophia_update as package
from flex.kernels.sophia_update import api
from flex.kernels.sophia_update.reference import curvature_reference, sophia_reference

SHAPES = [(1,), (7, 13), (8, 576), (64, 3), (0,)]
OPTIONS = {
    "lr": 0.01,
    "beta1": 0.9,
    "gamma": 0.05,
    "eps": 1e-12,
    "weight_decay": 0.1,
    "m_scale": 1.7,
    "h_scale": 3.0,
    "h_offset": 0.2,
}


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def make():
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]

    p, m, g = make(), make(), make()
    return p, m, [x.square() for x in make()], g


def worst_error(update, dtype=torch.float32, **changes):
    """Largest error of p and m against fp64, in units of the dtype's rounding at their size."""
    options = {**OPTIONS, **changes}
    p, m, h, g = tensors(dtype)
    expected = [
        sophia_reference(*(x.double() for x in item), **options)
        for item in zip(p, m, h, g, strict=True)
    ]
    clipped = update(p, m, h, g, **options)
    errors = [0.0]
    for got_p, got_m, (want_p, want_m, _) in zip(p, m, expected, strict=True):
        for got, want in ((got_p, want_p), (got_m, want_m)):
            if got.numel():
                errors.append(((got.double() - want).abs().max() / want.abs().max()).item())
    assert clipped.item() == sum(int(c) for _, _, c in expected)
    return max(errors) / torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes", [{}, {"weight_decay": 0.0}, {"h_offset": 0.0}, {"gamma": 5.0}, {"beta1": 0.0}]
)
def test_matches_the_reference(dtype, changes):
    assert worst_error(package.sophia_update, dtype, **changes) < 4


@pytest.mark.parametrize(
    ("moments", "grads"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_gradients_of_another_dtype(moments, grads):
    """A bf16 gradient is widened to fp32 moments, an fp32 one rounded to bf16 moments."""
    p, m, h, g = tensors(moments)
    g = [x.to(grads) for x in g]
    same = [[x.clone() for x in found] for found in (p, m, h)]
    package.sophia_update(p, m, h, g, **OPTIONS, impl="torch")
    api.torch_update(*same, [x.to(moments) for x in g], None, package.Scalars(**OPTIONS).row(), 1.0)
    for got, want in zip(p + m, same[0] + same[1], strict=True):
        torch.testing.assert_close(got, want)


def test_two_runs_are_bit_equal():
    results = []
    for _ in range(2):
        p, m, h, g = tensors()
        package.sophia_update(p, m, h, g, **OPTIONS)
        results.append(p)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_and_curvature_are_not_written():
    p, m, h, g = tensors()
    before = [x.clone() for x in h + g]
    package.sophia_update(p, m, h, g, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(before, h + g, strict=True))


def test_nan_gradient_is_not_hidden():
    p, m, h, g = tensors()
    g[1][0, 0] = float("nan")
    package.sophia_update(p, m, h, g, **OPTIONS)
    assert p[1].isnan().sum() == 1


MUTANTS = {
    "bias correction of m left out": {"m_scale": 1.0},
    "bias correction of h left out": {"h_scale": 1.0},
    "penalty curvature left out": {"h_offset": 0.0},
    "weight decay left out": {"weight_decay": 0.0},
    "gamma twice": {"gamma": 0.05**2},
    "beta1 swapped": {"beta1": 0.1},
    "step size halved": {"lr": 0.005},
}


@pytest.mark.parametrize("bug", MUTANTS)
def test_seeded_bugs_are_killed(bug):
    def broken(p, m, h, g, **options):
        return api.sophia_update(p, m, h, g, **{**options, **MUTANTS[bug]})

    with pytest.raises(AssertionError):
        assert worst_error(broken) < 4


def test_bug_adding_eps_in_place_of_a_floor_is_killed():
    p, m, h, g = (
        [torch.tensor([x])] for x in (0.0, 0.0, -1.0, 1.0)
    )  # a negative curvature (Hutchinson)
    package.sophia_update(p, m, h, g, **{**OPTIONS, "h_offset": 0.0, "weight_decay": 0.0})
    assert p[0].item() == pytest.approx(-0.01)


def test_curvature_update():
    _, _, h, estimate = tensors()
    expected = [
        curvature_reference(a.double(), b.double(), 0.9) for a, b in zip(h, estimate, strict=True)
    ]
    package.curvature_update(h, estimate, 0.9)
    for got, want in zip(h, expected, strict=True):
        assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_eps_must_be_positive(eps):
    p, m, h, g = tensors()
    with pytest.raises(ValueError, match="eps"):
        package.sophia_update(p, m, h, g, **{**OPTIONS, "eps": eps})


def test_mismatched_lists_are_refused():
    p, m, h, g = tensors()
    with pytest.raises(ValueError, match="grads has 4 tensors"):
        package.sophia_update(p, m, h, g[:-1], **OPTIONS)
    with pytest.raises(ValueError, match=r"exp_avgs\[1\] has shape"):
        package.sophia_update(p, [m[0], m[1].T, *m[2:]], h, g, **OPTIONS)
