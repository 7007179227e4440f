"""The spectral penalty kernel against finite differences, numpy and Parseval."""

import importlib.util
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flex.kernels.spectral_penalty import (
    Spectrum,
    curvature_constant,
    high_band_energy,
    rho,
    spectral_penalty,
    spectral_penalty_delta,
    spectral_penalty_reference,
)

SCHEDULES = ("linear_ramp", "hard_cutoff", "power", "sigmoid", "uniform", "shuffled")
TRANSFORMS = ("flat", "axis", "fft2")
NORMS = ("sum", "ortho", "mean")
SHAPES = ((3, 10), (4, 7), (1, 5), (2, 1), (5, 8))  # (r, features): odd, even and length 1


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def central_differences(f, w):
    """Gradient of f at w; exact for a quadratic up to rounding, whatever the step."""
    grad = torch.empty_like(w)
    for i in range(w.numel()):
        step = torch.zeros_like(w).view(-1)
        step[i] = 0.5
        step = step.view(w.shape)
        grad.view(-1)[i] = f(w + step) - f(w - step)
    return grad


def assert_close(actual, expected, rtol=1e-10):
    scale = expected.abs().max().clamp(min=1e-30)
    assert ((actual - expected).abs().max() / scale).item() <= rtol


# ---- the weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 9, 16, 101])
@pytest.mark.parametrize("low,high,threshold", [(1.0, 0.1, 0.5), (0.8, 0.3, 0.25), (0.2, 0.9, 1.0)])
def test_schedules_are_the_written_formulas(length, low, high, threshold):
    bins = length // 2 + 1
    x = np.arange(bins) / (bins * threshold)
    ramp = np.minimum(1.0, x)
    mult = np.array([1 if k in (0, length / 2) else 2 for k in range(bins)])
    shapes = {
        "linear_ramp": ramp,
        "hard_cutoff": np.where(np.arange(bins) < bins * threshold, 0.0, 1.0),
        "power": ramp**3,
        "sigmoid": 1 / (1 + np.exp(-7 * (x - 1))),
        "uniform": np.full(bins, (mult * ramp).sum() / mult.sum()),
    }
    options = {"phi_low": low, "phi_high": high, "threshold": threshold}
    for name, g in shapes.items():
        spectrum = Spectrum(name, exponent=3.0, sharpness=7.0, **options)
        expected = 1.0 - (low + (high - low) * g)
        np.testing.assert_allclose(rho(spectrum, torch.arange(bins), length), expected, atol=1e-12)
    once = rho(Spectrum("uniform", one_sided=True, **options), torch.arange(bins), length)
    np.testing.assert_allclose(once, 1.0 - (low + (high - low) * ramp.mean()), atol=1e-12)


@pytest.mark.parametrize("length", [*range(1, 40), 4608, 4607])
def test_shuffled_is_the_ramp_permuted(length):
    k = torch.arange(length // 2 + 1)
    ramp = rho(Spectrum(), k, length)
    shuffled = rho(Spectrum("shuffled", shuffle_seed=3), k, length)
    assert torch.equal(shuffled.sort().values, ramp.sort().values)
    assert shuffled[0] == ramp[0]  # strength two-sided is exactly the ramp's only if these stay
    if length % 2 == 0:
        assert shuffled[-1] == ramp[-1]
    if length > 4000:
        other = rho(Spectrum("shuffled", shuffle_seed=4), k, length)
        moved = shuffled - shuffled.mean()
        for unlike in (ramp, other):
            unlike = unlike - unlike.mean()
            assert abs(float((moved @ unlike) / (moved.norm() * unlike.norm()))) < 0.1
    again = rho(Spectrum("shuffled", shuffle_seed=3), k[3:9], length)  # any subset of bins alike
    assert torch.equal(again, shuffled[3:9])


# ---- value and gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_factor_gradient_matches_central_differences(schedule, transform):
    cases = itertools.product(SHAPES, "AB", (True, False))
    for norm, (shape, role, one_sided) in zip(itertools.cycle(NORMS), cases, strict=False):
        spectrum = Spectrum(
            schedule, 0.9, 0.1, 0.4, transform=transform, norm=norm, one_sided=one_sided
        )

        def penalty(v, spectrum=spectrum, role=role):
            return 0.7 * spectral_penalty_reference(v, spectrum, role)

        w = randn(2, *(shape if role == "A" else shape[::-1]))
        values, grad = spectral_penalty(w, spectrum, role=role, weight=0.7)
        assert_close(values, torch.stack([penalty(v) for v in w]))
        assert_close(grad[1], central_differences(penalty, w[1]), 1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_product_gradient_matches_central_differences(schedule, transform):
    shapes = [(3, 2, 5), (4, 1, 6), (5, 3, 4), (1, 1, 1)]
    cases = itertools.product(shapes, (True, False), (True, False))
    for norm, ((n, r, k), one_sided, started) in zip(itertools.cycle(NORMS), cases, strict=False):
        spectrum = Spectrum(
            schedule, 0.9, 0.1, 0.4, transform=transform, norm=norm, one_sided=one_sided
        )
        a, b = randn(2, r, k), randn(2, n, r, seed=1)
        start = {"a0": randn(2, r, k, seed=2), "b0": randn(2, n, r, seed=3)} if started else {}
        base = start["b0"][1] @ start["a0"][1] if started else 0.0
        arguments = {"scale": 1.5, "weight": 0.7, **start}
        values, grad_a, grad_b = spectral_penalty_delta(a, b, spectrum, **arguments)

        def penalty(x, y, spectrum=spectrum, base=base):
            return 0.7 * spectral_penalty_reference(1.5 * (y @ x - base), spectrum, "delta")

        numeric_a = central_differences(lambda x, f=penalty, y=b[1]: f(x, y), a[1])
        numeric_b = central_differences(lambda y, f=penalty, x=a[1]: f(x, y), b[1])
        assert_close(values[1], penalty(a[1], b[1]))
        assert_close(grad_a[1], numeric_a, 1e-9)
        assert_close(grad_b[1], numeric_b, 1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_autograd_through_the_reference_is_the_gradient(transform):
    for role, one_sided in itertools.product("AB", (True, False)):
        spectrum = Spectrum(transform=transform, one_sided=one_sided)
        w = randn(1, 4, 9).requires_grad_()
        spectral_penalty_reference(w[0], spectrum, role).backward()
        assert_close(spectral_penalty(w, spectrum, role=role)[1], w.grad)
        assert torch.autograd.gradcheck(
            lambda v, s=spectrum, r=role: spectral_penalty_reference(v, s, r),
            (w[0].detach().requires_grad_(),),
        )


def test_flat_reference_is_the_published_formula():
    n_elements, lam_t = 4 * 15, 0.5
    w = randn(4, 15)
    power = np.abs(np.fft.rfft(w.numpy().reshape(-1))) ** 2  # unnormalised
    n = n_elements // 2 + 1
    phi = 1.0 + (0.1 - 1.0) * np.minimum(1.0, np.arange(n) / (n * lam_t))
    literal = Spectrum(norm="sum", one_sided=True)
    expected = torch.tensor(((1.0 - phi) * power).sum())
    assert_close(spectral_penalty_reference(w, literal), expected)
    assert_close(spectral_penalty(w[None], literal)[0][0], expected)


def test_fft2_preserves_what_both_axes_preserve():
    w = randn(3, 6, 8)
    x = lambda k, n: np.minimum(1.0, np.minimum(k, n - k) / ((n // 2 + 1) * 0.5))  # noqa: E731
    phi_1 = 1.0 - 0.9 * x(np.arange(6), 6)
    phi_2 = 1.0 - 0.9 * x(np.arange(8), 8)
    weights = 1.0 - np.outer(phi_1, phi_2)
    expected = [(weights * np.abs(np.fft.fft2(m)) ** 2).sum() / 48 for m in w.numpy()]
    values, _ = spectral_penalty(w, Spectrum(transform="fft2"))
    np.testing.assert_allclose(values, expected, rtol=1e-12)


# ---- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(3, 10), (4, 7)])
def test_uniform_two_sided_ortho_is_l2(transform, shape):
    spectrum = Spectrum("uniform", transform=transform)
    constant = curvature_constant(shape, spectrum) / 2
    w = randn(2, *shape)
    values, grad = spectral_penalty(w, spectrum)
    assert_close(values, constant * w.square().sum((1, 2)))
    assert_close(grad, 2 * constant * w)
    ramp = Spectrum(transform=transform)  # equal strength on white weights: equal curvature
    assert curvature_constant(shape, ramp) == pytest.approx(2 * constant, rel=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("role", ["A", "B"])
def test_curvature_constant_is_the_hessian_diagonal(transform, role):
    for norm, one_sided, shape in itertools.product(NORMS, (True, False), [(3, 4), (2, 5)]):
        spectrum = Spectrum("power", transform=transform, norm=norm, one_sided=one_sided)
        hessian = torch.autograd.functional.hessian(
            lambda v, s=spectrum: spectral_penalty_reference(v, s, role), randn(*shape)
        )
        diagonal = hessian.reshape(hessian[0, 0].numel(), -1).diagonal()
        constant = curvature_constant(shape, spectrum, role=role)
        assert_close(torch.full_like(diagonal, constant), diagonal)


def test_axis_ignores_the_order_of_the_rank_one_terms_and_flat_does_not():
    order = torch.tensor([2, 0, 3, 1])
    a, b = randn(1, 4, 9), randn(1, 9, 4)
    axis, flat = Spectrum(transform="axis"), Spectrum()
    for w, permuted, role in ((a, a[:, order], "A"), (b, b[:, :, order], "B")):
        assert_close(
            spectral_penalty(permuted, axis, role=role)[0], spectral_penalty(w, axis, role=role)[0]
        )
        one = spectral_penalty(w, flat, role=role)[0]
        assert (spectral_penalty(permuted, flat, role=role)[0] - one).abs() > 1e-3 * one


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_axis_and_fft2_follow_the_role(transform):
    w = randn(1, 4, 9)
    spectrum = Spectrum(transform=transform)
    as_a, grad_a = spectral_penalty(w, spectrum, role="A")
    as_b, grad_b = spectral_penalty(w.mT, spectrum, role="B")
    if transform != "flat":  # B is A turned
        assert_close(as_b, as_a)
        assert_close(grad_b.mT, grad_a)


def test_high_band_is_not_lost_in_rounding():
    t = torch.arange(4096, dtype=torch.float64) / 4096
    smooth = torch.cos(2 * torch.pi * t) + 3.0
    ripple = 1e-5 * torch.cos(2 * torch.pi * 1500 * t)  # above bin 1024.5
    w = (smooth + ripple).float().view(1, 8, 512)
    high, total = high_band_energy(w, Spectrum())
    assert total.item() == pytest.approx(w.double().square().sum().item(), rel=1e-5)
    exact = np.abs(np.fft.rfft(w.double().numpy().reshape(-1))) ** 2 * 2 / 4096
    assert high.item() == pytest.approx(exact[1025:].sum(), rel=2e-2)  # share 1e-11 of the energy
    assert high.item() < 1e-10 * total.item()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_high_band_of_white_noise_counts_bins(transform):
    w = randn(64, 4, 64, dtype=torch.float32)
    high, total = (e.sum().item() for e in high_band_energy(w, Spectrum(transform=transform)))
    n, edges = {"flat": (256, 65), "axis": (64, 17), "fft2": (64, 17)}[transform]
    share = (2 * (n // 2 - edges) + 1) / n
    if transform == "fft2":
        share = 1 - (1 - share) * 0.75  # rank axis of 4: bins 0, 1, 2, 1 and the edge at 1.5
    assert high / total == pytest.approx(share, rel=0.03)


class Watch(TorchDispatchMode):
    """Counts operators and remembers the largest tensor made, in real numbers."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append(func.name())
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel() * (2 if t.is_complex() else 1))
        return out


@pytest.mark.parametrize("schedule", ["linear_ramp", "shuffled"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_product_never_becomes_a_dense_matrix(transform, schedule):
    n, k = 256, 320
    a, b = randn(1, 2, k, dtype=torch.float32), randn(1, n, 2, dtype=torch.float32)
    spectrum = Spectrum(schedule, transform=transform)
    with Watch() as watch:
        values, grad_a, _ = spectral_penalty_delta(a, b, spectrum)
    assert watch.largest < n * k / 2
    a64 = a.double().requires_grad_()
    dense = spectral_penalty_reference((b.double() @ a64)[0], spectrum, "delta")
    dense.backward()
    assert_close(values[0].double(), dense.detach(), 1e-5)
    assert_close(grad_a.double(), a64.grad, 1e-5)


@pytest.mark.parametrize("role", ["A", "B"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_batch_costs_two_transforms(transform, role):
    w = randn(30, 4, 6)
    spectral_penalty(w, Spectrum(transform=transform), role=role)  # fills the cached table
    with Watch() as watch:
        spectral_penalty(w, Spectrum(transform=transform), role=role)
    assert watch.calls.count("aten::_fft_r2c") == 1
    assert sum("fft" in call for call in watch.calls) <= 3  # fft2: the inverse is a c2c and a c2r
    assert len(watch.calls) <= 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_fp32(dtype):
    w = randn(2, 4, 9, dtype=torch.float32).to(dtype)
    exact, exact_grad = spectral_penalty(w.float(), Spectrum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, grad = spectral_penalty(w, Spectrum())
        _, half_a, _ = spectral_penalty_delta(w, w.mT, Spectrum(transform="axis"))
    assert grad.dtype == torch.float32
    assert torch.equal(values, exact) and torch.equal(grad, exact_grad)
    assert torch.equal(half_a, spectral_penalty_delta(w, w.mT, Spectrum(transform="axis"))[1])


@pytest.mark.parametrize(
    "options,named",
    [
        ({"schedule": "ramp"}, "schedule='ramp'"),
        ({"transform": "fft"}, "transform"),
        ({"norm": "l2"}, "norm"),
        ({"phi_low": 2.0}, "phi_low=2.0"),
        ({"phi_high": -0.1}, "phi_high"),
        ({"threshold": 0.0}, "threshold"),
        ({"exponent": 0.0}, "exponent"),
    ],
)
def test_bad_spectrum_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        Spectrum(**options)


def test_bad_arguments_are_refused():
    w = randn(1, 2, 3)
    for arguments in ({"role": "C"}, {"impl": "cuda"}):
        with pytest.raises(ValueError, match="allowed|must be"):
            spectral_penalty(w, Spectrum(), **arguments)
    for bad in (w[0], w[:0], w.long()):
        with pytest.raises(ValueError, match="weights"):
            spectral_penalty(bad, Spectrum())
    with pytest.raises(ValueError, match="both or none"):
        spectral_penalty_delta(w, w.mT, Spectrum(), a0=w)
    with pytest.raises(ValueError, match="a \\(1, 2, 3\\)"):
        spectral_penalty_delta(w, w, Spectrum())
    with pytest.raises(NotImplementedError, match="flat has no Triton implementation"):
        spectral_penalty(w, Spectrum(), impl="triton")


# ---- seeded bugs --------------------------------------------------------------------------------

SEEDED_BUGS = [
    ("transform.py", 'n=x.shape[-1], norm="forward")', "n=x.shape[-1])"),  # 1/N lost
    ("transform.py", "n=x.shape[-1], norm", "norm"),  # odd lengths come back one short
    (
        "transform.py",
        "_weighted(torch.fft.rfft(x), sigma)",
        "_weighted(torch.fft.rfft(x), 1 + sigma)",
    ),
    ("transform.py", "bin_counts(length, one_sided) / ", "bin_counts(length, False) / "),
    ("transform.py", "bin_counts(length, one_sided=False)", "2.0"),  # self-conjugate bins halved
    ("transform.py", '"ortho": 1.0 / length', '"ortho": length**-0.5'),
    ("transform.py", '"mean": 1.0 / bins', '"mean": 1.0 / length'),
    (
        "transform.py",
        "torch.stack([1.0 - phi_1, phi_1])",
        "torch.stack([1.0 - phi_1, 1.0 + 0 * phi_1])",
    ),
    ("transform.py", "torch.minimum(fold, height - fold)", "fold.clamp(max=height // 2)"),
    ("transform.py", "terms = [(u, cv), (cu, v)]", "terms = [(u, cv)]"),
    ("transform.py", "grad_v.baddbmm_(gram_u", "grad_v.baddbmm_(gram_v"),
    ("transform.py", "k = torch.minimum(k, total - k)", "pass"),
    ("transform.py", "(k1 == 0) | (2 * k1 == height)", "(k1 == 0)"),
    ("transform.py", "grad_hat.mT.conj()", "grad_hat.mT"),
    ("transform.py", "torch.fft.fft(weighted) * twiddle", "torch.fft.fft(weighted)"),
    ("api.py", 'turned = role == "B" and', 'turned = role == "A" and'),
    ("api.py", "spectrum, 2.0 * weight)", "spectrum, 2.0)"),
    ("api.py", "weight * scale**2", "weight * scale"),
    ("api.py", "grad_v[:, :rank] + grad_v[:, rank:]", "grad_v[:, :rank]"),
    ("api.py", "[u - u0, u0]", "[u, -u0]"),
    ("api.py", "table.sum() + paired.sum()", "2 * table.sum()"),
    ("api.py", "else w.float()", "else w.bfloat16().float()"),
    ("reference.py", "(length + 1) // 2] = 2.0", "length // 2 + 1] = 2.0"),
    ("reference.py", "(length // 2 + 1) * spectrum.threshold", "length * spectrum.threshold"),
]


def battery(kernel):
    """One pass over what the tests above check, against the reference of the real package."""
    shapes = [((3, 10), "A"), ((7, 4), "B")]
    for transform, one_sided, norm in itertools.product(TRANSFORMS, (True, False), NORMS):
        options = {"transform": transform, "one_sided": one_sided, "norm": norm, "phi_low": 0.9}
        theirs, ours = kernel.Spectrum(**options), Spectrum(**options)
        for shape, role in shapes:
            w = randn(1, *shape).requires_grad_()
            value = 0.7 * spectral_penalty_reference(w[0], ours, role)
            (grad,) = torch.autograd.grad(value, [w])
            values, actual = kernel.spectral_penalty(w, theirs, role=role, weight=0.7)
            assert_close(values[0], value.detach())
            assert_close(actual, grad)
            exact = curvature_constant(shape, ours, role=role)
            assert kernel.curvature_constant(shape, theirs, role=role) == pytest.approx(exact)
            single = w.detach().float()
            loss = kernel.spectral_penalty(single, theirs, role=role, weight=0.7)[1]
            assert_close(loss.double(), grad, 1e-5)
        a, b, a0, b0 = (randn(1, *s, seed=i) for i, s in enumerate([(2, 7), (6, 2)] * 2))
        a.requires_grad_(), b.requires_grad_()
        dense = 1.5 * (b[0] @ a[0] - b0[0] @ a0[0])
        value = 0.7 * spectral_penalty_reference(dense, ours, "delta")
        grads = torch.autograd.grad(value, [a, b])
        start = {"a0": a0, "b0": b0}
        found = kernel.spectral_penalty_delta(a, b, theirs, **start, scale=1.5, weight=0.7)
        for actual, expected in zip(found, (value.detach()[None], *grads), strict=True):
            assert_close(actual, expected)
    bins = torch.arange(9)
    assert_close(kernel.rho(kernel.Spectrum(), bins, 16), 0.9 * (bins.double() / 4.5).clamp(max=1))


def load_copy(folder, name, edit=None):
    shutil.copytree(Path(spectral_penalty.__code__.co_filename).parent, folder / name)
    if edit:
        file, old, new = edit
        source = (folder / name / file).read_text()
        assert source.count(old) >= 1, f"the seeded bug no longer applies: {old}"
        (folder / name / file).write_text(source.replace(old, new))
    # under its parent's name, for the relative imports of what kernels share
    name = f"flex.kernels.{name}"
    spec = importlib.util.spec_from_file_location(
        name, folder / name.rpartition(".")[2] / "__init__.py"
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_battery_passes_without_a_bug(tmp_path):
    battery(load_copy(tmp_path, "spectral_copy"))


@pytest.mark.parametrize("bug", range(len(SEEDED_BUGS)))
def test_seeded_bug_is_caught(bug, tmp_path):
    kernel = load_copy(tmp_path, f"spectral_bug_{bug}", SEEDED_BUGS[bug])
    with pytest.raises((AssertionError, RuntimeError)):
        battery(kernel)
