"""The C source of the penalty over lines: its numbers, any number of threads, what it leaves to torch."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flex.kernels import native_build
from flex.kernels.spectral_penalty import (
    Spectrum,
    line_native,
    line_source,
    spectral_penalty,
    spectral_penalty_into,
    spectral_penalty_reference,
)
from tests.mutants import compiled_from, load_copy, without_a_compiler
from tests.oracle import assert_within_budget

RAMP = Spectrum(transform="axis")
WEIGHT = 0.7
# spectrum (the last flat), matrices (role, feature axis, rank), start, gradient to add to: P odd, even and prime;
# Q = 8, 16, 32, 64; lanes that are full, shared by two matrices, or partly empty
CASES = [
    (RAMP, [("A", 72, 8), ("B", 72, 8)], True, True),
    (RAMP, [("A", 43 * 16, 5), ("B", 43 * 16, 5)], False, True),
    (RAMP, [("A", 128, 4)], True, False),
    (RAMP, [("B", 10 * 32, 8), ("B", 10 * 32, 17)], True, True),
    (RAMP, [("B", 10 * 32, 16)], False, False),
    (RAMP, [("B", 72, 4), ("B", 72, 4)], True, True),
    (RAMP, [("A", 72, 3), ("B", 72, 6), ("A", 72, 1), ("A", 72, 9), ("B", 72, 2)], False, True),
    (Spectrum(), [("A", 2**14, 4)], False, True),
    (RAMP, [("A", 63 * 8, 9), ("B", 63 * 8, 3), ("A", 63 * 8, 1)], True, True),
    (Spectrum("shuffled", transform="axis", norm="mean"), [("A", 12 * 8, 6)], False, True),
    (Spectrum("hard_cutoff", transform="axis"), [("B", 14 * 64, 7)], True, True),
    (Spectrum(one_sided=True, norm="sum"), [("A", 24, 8), ("B", 12, 16)] * 3, True, True),
]


Matrix = tuple[Tensor, Tensor | None, Tensor, str]  # w, w0, g, role


def made(case: Any, dtype: torch.dtype = torch.float32) -> list[Matrix]:
    _, kinds, moved, _ = case
    generator = torch.Generator().manual_seed(len(kinds) + kinds[0][1])
    found = []
    for role, length, rank in kinds:
        shape = (rank, length) if role == "A" else (length, rank)
        w, w0, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        if rank % 2:
            w0 = w0.t().contiguous().t()  # other strides than w
        found.append((w, w0 if moved else None, g, role))
    return found


def exact(case: Any, dtype: torch.dtype) -> list[Tensor]:
    """values, squares, then what each gradient becomes, by autograd through the formula."""
    spectrum, _, _, add = case
    values, squares, sums = [], [], []
    for w, w0, g, role in made(case, dtype):
        update = (w if w0 is None else w - w0).requires_grad_()
        value = WEIGHT * spectral_penalty_reference(update, spectrum, role)
        (gradient,) = torch.autograd.grad(value, update)
        values.append(value.detach())
        squares.append(gradient.square().sum())
        sums.append(g + gradient if add else gradient)
    return [torch.stack(values), torch.stack(squares), *sums]


def by_lines(matrices: list[Matrix], spectrum: Spectrum, add: bool) -> Tensor:
    for *matrix, role in matrices:
        assert line_native.takes(tuple(matrix), role, spectrum)
    return line_native.penalty(
        [m[:3] for m in matrices], [m[3] for m in matrices], spectrum, WEIGHT, add
    )


def check() -> None:
    for case in CASES:
        matrices = made(case)
        found = by_lines(matrices, case[0], case[3])
        results = [found[0], found[1], *(g for _, _, g, _ in matrices)]
        eager, truth = (exact(case, t) for t in (torch.float32, torch.float64))
        for result, rough, true in zip(results, eager, truth, strict=True):
            assert_within_budget(result, rough, true, str(case[:3]))


def test_values_squares_and_gradients() -> None:
    check()


@pytest.mark.parametrize("length", [576, 1536, 4096, 5120, 8192, 11008, 13824, 14336])
def test_lengths_of_real_models(length: int) -> None:
    case = (RAMP, [("A", length, 8)], False, False)
    ((w, _, g, _),) = matrices = made(case)
    before = w.clone()
    found = by_lines(matrices, RAMP, False)
    eager, truth = (exact(case, t) for t in (torch.float32, torch.float64))
    for result, rough, true in zip([*found, g], eager, truth, strict=True):
        assert_within_budget(result, rough, true)
    assert torch.equal(w, before)


def test_the_public_functions_take_it() -> None:
    (a, a0, grad_a, _), (b, b0, grad_b, _) = matrices = made(CASES[0])
    found = by_lines([(w, w0, g.clone(), role) for w, w0, g, role in matrices], RAMP, True)
    arguments = (RAMP, ["A", "B"], WEIGHT, [a0, b0])
    assert torch.equal(spectral_penalty_into([a, b], [grad_a, grad_b], *arguments), found.float())
    for w, role in ((a, "A"), (b, "B")):
        alone = torch.empty_like(w)
        values, _ = by_lines([(w, None, alone, role)], RAMP, False)
        batch = torch.stack([w, 2 * w])
        value, gradient = spectral_penalty(batch, RAMP, role=role, weight=WEIGHT)
        assert torch.equal(gradient[0], alone) and torch.equal(gradient[1], 2 * alone)
        assert torch.equal(value, torch.stack([values[0], 4 * values[0]]).float())


def test_strides_and_neighbours_change_no_bit() -> None:
    """Rows that lie apart, transposed storage, other lines in the same lanes."""
    spectrum = RAMP
    for role in "AB":
        w, w0 = made((spectrum, [(role, 128, 8)], True, True))[0][:2]
        assert w0 is not None
        plain, apart = torch.zeros_like(w), torch.zeros(3 * w.shape[0], 2 * w.shape[1])
        by_lines([(w, w0, plain, role)], spectrum, True)
        places = apart[1::3, ::2]
        turned = [t.t().contiguous().t() for t in (w, w0)]
        by_lines([(turned[0], turned[1], places, role)], spectrum, True)
        assert torch.equal(places, plain)
        assert apart.count_nonzero() == plain.count_nonzero()
        few, other = torch.zeros_like(w), torch.full((3, 128), 1e4)
        by_lines([(other, None, other.clone(), "A"), (w, w0, few, role)], spectrum, True)
        assert torch.equal(few, plain)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = (RAMP, [("A", 128, 20), ("B", 128, 21)], True, True)
    alone, shared = made(case), made(case)
    values = by_lines(alone, RAMP, True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native_build, "ELEMENTS_PER_THREAD", 1)
    assert torch.equal(by_lines(shared, RAMP, True), values)
    for (_, _, one, _), (_, _, other, _) in zip(alone, shared, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_line(value: float) -> None:
    w, _, g, _ = made((RAMP, [("A", 128, 8)], False, False))[0]
    clean = g.clone()
    by_lines([(w, None, clean, "A")], RAMP, False)
    w[3, 5] = value
    found = by_lines([(w, None, g, "A")], RAMP, False)
    assert not found.isfinite().any() and not g[3].isfinite().any()
    assert torch.equal(g[:3], clean[:3]) and torch.equal(g[4:], clean[4:])


class Fake(Tensor):
    """Its address means nothing."""


LEFT = {
    "fp64": lambda w: ((w.double(), None, w.double()), RAMP),
    "bf16 gradient": lambda w: ((w, None, w.bfloat16()), RAMP),
    "bf16 start": lambda w: ((w, w.bfloat16(), w), RAMP),
    "fft2": lambda w: ((w, None, w), Spectrum(transform="fft2")),
    "flat, not contiguous": lambda w: ((w, None, torch.ones(8, 256)[:, ::2]), Spectrum()),
    "prime length": lambda w: ((w[:, :101], None, w[:, :101]), RAMP),
    "large prime factor": lambda w: ((torch.ones(8, 67 * 8), None, torch.ones(8, 67 * 8)), RAMP),
    "gradient that overlaps": lambda w: ((w, None, torch.zeros(1, 128).expand(8, 128)), RAMP),
    "meta": lambda w: ((w.to("meta"), None, w.to("meta")), RAMP),
    "subclass": lambda w: ((w.as_subclass(Fake), None, w), RAMP),
    "negated view": lambda w: ((torch.complex(w, w).conj().imag, None, w), RAMP),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_torch(case: str) -> None:
    matrix, spectrum = LEFT[case](torch.ones(8, 128))
    assert not line_native.takes(matrix, "A", spectrum)


def test_c_and_torch_in_one_call() -> None:
    """Lengths and dtypes in any order; a gradient that is given twice gets both."""
    kinds = [("A", 101, 3), ("B", 72, 8), ("A", 72, 2), ("B", 101, 4), ("A", 128, 5)]
    matrices = made((RAMP, kinds, True, True))
    matrices[2] = tuple(
        t.double() if isinstance(t, Tensor) else t
        for t in matrices[2]  # type: ignore[assignment]
    )
    w, w0, g, roles = (list(column) for column in zip(*matrices, strict=True))
    before = [x.clone() for x in g]
    found = spectral_penalty_into(w, g, RAMP, roles, WEIGHT, w0)
    for i, role in enumerate(roles):
        update = w[i].double() - w0[i].double()
        values, gradient = spectral_penalty(update[None], RAMP, role=role, weight=WEIGHT)
        torch.testing.assert_close(
            g[i].double() - before[i].double(), gradient[0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(found[0, i], values[0])
    shared = torch.zeros_like(g[1])
    spectral_penalty_into([w[1], w[1]], [shared, shared], RAMP, ["B", "B"], WEIGHT)
    _, once = spectral_penalty(w[1][None], RAMP, role="B", weight=WEIGHT)
    torch.testing.assert_close(shared, 2 * once[0])


def test_the_default_dtype_does_not_matter() -> None:
    """Not for the memory that C gets, and not for the tables that are kept."""
    w = made((RAMP, [("A", 152, 8)], False, False))[0][0]
    for forget in (line_native._tables, line_native._sigma):
        forget.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        value, gradient = spectral_penalty(w[None], RAMP)
    finally:
        torch.set_default_dtype(torch.float32)
    for forget in (line_native._tables, line_native._sigma):
        forget.cache_clear()
    fresh = spectral_penalty(w[None], RAMP)
    assert torch.equal(gradient, fresh[1]) and torch.equal(value, fresh[0])


@pytest.mark.parametrize("p,q", [(9, 8), (10, 512), (16, 256), (43, 2048)])
def test_tables_are_rounded_once(p: int, q: int) -> None:
    cosines, sines, twiddles, stages = line_native._tables(p, q)
    root = np.exp(-2j * np.pi * np.arange(p * q) / (p * q))
    k1, n2 = np.arange(p // 2 + 1), np.arange(q)
    expected = root[n2[:, None] * k1 % (p * q)]
    for part, exact in ((twiddles[..., 0], expected.real), (twiddles[..., 1], expected.imag)):
        assert np.abs(part.double().numpy() - exact).max() <= 2**-25
    assert cosines.shape[0] * line_native.AT_ONCE >= len(k1) and cosines.shape[1] == len(k1)
    assert sines.shape[1] == (p - 1) // 2 and stages.abs().max() <= 1


def test_under_torch_compile_torch_transforms() -> None:
    w = made((RAMP, [("A", 72, 8)], False, False))[0][0]
    compiled = torch.compile(lambda x: spectral_penalty(x, RAMP)[1], backend="eager")
    torch.testing.assert_close(compiled(w[None]), spectral_penalty(w[None], RAMP)[1])


def test_a_gradient_that_is_needed_for_backward_is_missed() -> None:
    """As after any change in place."""
    w, _, g, _ = made((RAMP, [("A", 72, 8)], False, True))[0]
    leaf = torch.ones_like(g, requires_grad=True)
    product = (leaf * g).sum()
    by_lines([(w, None, g, "A")], RAMP, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(
    "length,found",
    [
        (11008, (43, 256)),
        (4096, (16, 256)),
        (14336, (14, 1024)),
        (88064, (43, 2048)),
        (63 * 8, (63, 8)),
        (9 * 4, None),
        (65 * 64, None),
        (2**19, None),
        (1, None),
        (8, None),
    ],
)
def test_factors(length: int, found: tuple[int, int] | None) -> None:
    assert line_native.factors(length) == found


def test_without_a_compiler_torch_transforms(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    w = made(CASES[0])[0][0]
    with_c = spectral_penalty(w[None], RAMP)
    with without_a_compiler(line_native.library, monkeypatch):
        with caplog.at_level(logging.WARNING, "flex.kernels"):
            without = [spectral_penalty(w[None], RAMP) for _ in range(2)][0]
        assert caplog.text.count("C source of its transforms") == 1
    for one, other in zip(with_c, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


BUGS = {
    "w0 left out": ("to[i][v] -= m.w0[(at + i) * m.w0_step];", ";"),
    "w0 left out of neighbours": ("to[i] -= *(const loose *)(l.w0 + (at + i) * l.w0_step);", ";"),
    "stride of w0 is that of w": ("m.w0[(at + i) * m.w0_step]", "m.w0[(at + i) * m.w_step]"),
    "neighbours by the first two lanes": (
        "for (int v = 1; v < count; v++)\n        side_by_side &= lines[v].w ",
        "for (int v = 1; v < 2; v++)\n        side_by_side &= lines[v].w ",
    ),
    "g is not added to": ("*g = add ? (vec)*g + from[i + v]", "*g = add ? from[i + v]"),
    "g of neighbours is not added to": ("*g = add ? (vec)*g + from[i] :", "*g = add ? from[i] :"),
    "not turned back": ("turn(from + i);", ""),
    "g is always added to": ("*g = add ? *g + from[i][v] :", "*g = 1 ? *g + from[i][v] :"),
    "the Nyquist row of an even P": ("if (p % 2 == 0)", "if (0)"),
    "its cosine": ("evens > odds + 1 && m < AT_ONCE", "0 && m < AT_ONCE"),
    "sign of the sine": ("to[1] = even[m] * w[1] - odd", "to[1] = even[m] * w[1] + odd"),
    "twiddle not conjugated": ("o[k - 1] = im * w[0] - re", "o[k - 1] = im * w[0] + re"),
    "squares of a row that stands for two": (
        "2 * k == t->p ? 1.0 : 2.0",
        "2 * k == t->p ? 1.0 : 1.0",
    ),
    "squares of the Nyquist row": ("k == 0 || 2 * k == t->p", "k == 0"),
    "sums of half the radix 2": ("weigh(both + 2, sigma[1]", "weigh(both, sigma[1]"),
    "radix 4, forward": ("br = dr + ei, bi = di - er, cr", "br = dr - ei, bi = di + er, cr"),
    "radix 4, back": ("b[0] = dr - ei;", "b[0] = dr + ei;"),
    "radix 2 left out": ("if (size == 2)", "if (0)"),
    "sigma of the first row": ("t->sigma + k * t->q, both", "t->sigma, both"),
    "a share begins at the first matrix": ("within -= matrices->lines;", "within = 0;"),
    "value of a neighbour": ("energies[first] = sums[0][v]", "energies[first] = sums[0][0]"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_killed(bug: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = load_copy(tmp_path, line_source, *BUGS[bug])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(native_build, "ELEMENTS_PER_THREAD", 1)
    with (
        compiled_from(copy.SOURCE, line_native, line_native.library, monkeypatch),
        pytest.raises(AssertionError),
    ):
        check()
