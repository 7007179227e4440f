"""The Triton kernel of the `axis` penalty: error against fp64, bytes, launches, seeded bugs."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flex.kernels.spectral_penalty import (
    Spectrum,
    api,
    chips,
    core,
    kernel,
    spectral_penalty,
    spectral_penalty_delta,
    spectral_penalty_into,
    spectral_penalty_reference,
    tables,
)
from tests.counting import count_traffic
from tests.oracle import assert_within_budget

AXIS = Spectrum(transform="axis")
EDGE = Spectrum("hard_cutoff", phi_high=0.0, transform="axis", one_sided=True)
WEIGHT = 0.3
CPU = torch.device("cpu")
PLAN = tables.plan


def matrices(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def exact(w: Tensor, g: Tensor, w0: Tensor | None, role: str, spectrum: Spectrum, dtype):
    """(g + weight * grad P, weight * P, |weight * grad P|^2) by autograd, computed in `dtype`."""
    x = w.to(dtype) - (0 if w0 is None else w0.to(dtype))
    x.requires_grad_()
    value = WEIGHT * spectral_penalty_reference(x, spectrum, role)
    (grad,) = torch.autograd.grad(value, x)
    return g.to(dtype) + grad, value.detach(), grad.square().sum()


def check(
    run: Callable[..., Tensor],
    shapes: list[tuple[int, int]],
    roles: str,
    spectrum: Spectrum = AXIS,
    w_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype = torch.float32,
    start: bool = False,
) -> None:
    """Hold gradients and values of `run` to the error budget; two runs must agree bit for bit."""
    params, before = matrices(shapes, w_dtype), matrices(shapes[::-1])[::-1]
    before = [g.to(g_dtype) for g in before]
    starts = [w * 0.5 + 0.1 for w in params] if start else [None] * len(params)
    grads, again = [g.clone() for g in before], [g.clone() for g in before]
    values, squares = run(params, grads, spectrum, list(roles), WEIGHT, starts, impl="triton")
    repeated = run(params, again, spectrum, list(roles), WEIGHT, starts, impl="triton")
    assert torch.equal(values, repeated[0]), "values differ between two runs"
    assert torch.equal(squares, repeated[1]), "squares differ between two runs"
    for i, (w, g, w0, role) in enumerate(zip(params, before, starts, roles, strict=True)):
        reference, value, square = exact(w, g, w0, role, spectrum, torch.float64)
        eager, eager_value, eager_square = exact(w, g, w0, role, spectrum, torch.float32)
        assert_within_budget(grads[i], eager.to(g_dtype), reference, f"gradient {i}")
        assert_within_budget(values[i], eager_value, value, f"value {i}")
        assert_within_budget(squares[i], eager_square, square, f"square {i}")
        assert torch.equal(grads[i], again[i]), f"gradient {i} differs between two runs"


def with_split(monkeypatch: pytest.MonkeyPatch, split: int, module: ModuleType = tables) -> None:
    """Make every plan take `split` blocks, so that short lengths go through the long ones' code."""
    monkeypatch.setattr(module, "plan", lambda n, precision, chip: PLAN(n, precision, chip, split))


# ---- the result


@pytest.mark.parametrize("length", (64, 96, 320, 448, 688))
@pytest.mark.parametrize("spectrum", (AXIS, EDGE), ids=("ramp", "edge"))
@pytest.mark.usefixtures("poison")
def test_lengths(length: int, spectrum: Spectrum) -> None:
    """Odd numbers of rows, A and B, in one call."""
    check(spectral_penalty_into, [(3, length), (length, 2)], "AB", spectrum)


@pytest.mark.parametrize(("length", "split"), ((64, 4), (96, 8), (320, 4), (320, 8), (688, 8)))
@pytest.mark.parametrize("spectrum", (AXIS, EDGE), ids=("ramp", "edge"))
@pytest.mark.usefixtures("poison")
def test_blocks(
    length: int, split: int, spectrum: Spectrum, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_split(monkeypatch, split)
    check(spectral_penalty_into, [(2, length), (length, 1)], "AB", spectrum, start=True)


@pytest.mark.parametrize("rank", (1, 17))
def test_ranks(rank: int) -> None:
    check(spectral_penalty_into, [(rank, 96), (96, rank)], "AB", start=True)


@pytest.mark.parametrize("w_dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("g_dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(w_dtype: torch.dtype, g_dtype: torch.dtype) -> None:
    check(spectral_penalty_into, [(3, 96), (96, 4)], "AB", EDGE, w_dtype, g_dtype, start=True)


def test_mixed_shapes_in_one_call() -> None:
    shapes = [(3, 64), (96, 5), (2, 96), (64, 1), (1, 320), (64, 4)]
    check(spectral_penalty_into, shapes, "ABABAB")


def test_the_common_length() -> None:
    check(spectral_penalty_into, [(2, 4096)], "A")


def test_strided_gradients_and_neighbours() -> None:
    """Views into something wider: what lies between is not touched."""
    w, wide = matrices([(3, 96), (3, 192)])
    grads = wide[:, ::2]
    before = wide.clone()
    spectral_penalty_into([w], [grads], AXIS, ["A"], WEIGHT, impl="triton")
    reference, *_ = exact(w, before[:, ::2], None, "A", AXIS, torch.float64)
    eager, *_ = exact(w, before[:, ::2], None, "A", AXIS, torch.float32)
    assert_within_budget(grads, eager, reference)
    assert torch.equal(wide[:, 1::2], before[:, 1::2])


def test_what_is_read_128_bits_at_a_time() -> None:
    """Rows whose every element lies beside the last, all of them aligned to 16 bytes."""
    w, g, wide = torch.zeros(3, 96), torch.zeros(3, 96), torch.zeros(3, 192)
    assert kernel.Vectors(w, g, None, "A").unit
    assert kernel.Vectors(w, g, wide[:, 4:100], "A").unit
    for other in (wide[:, ::2], wide[:, 1:97], torch.zeros(3, 100)[:, :96], w.mT.contiguous().mT):
        assert not kernel.Vectors(other, g, None, "A").unit
        assert not kernel.Vectors(w, other, None, "A").unit
        assert not kernel.Vectors(w, g, other, "A").unit
    assert not kernel.Vectors(w.mT.contiguous(), g.mT.contiguous(), None, "B").unit
    assert kernel.Vectors(w.mT, g.mT, None, "B").unit, "columns that lie as rows do"


@pytest.mark.parametrize("role", "AB")
def test_batched_form(role: str) -> None:
    w = torch.stack(matrices([(3, 64), (3, 64)]))
    w = w if role == "A" else w.mT
    values, grad = spectral_penalty(w, AXIS, role=role, weight=WEIGHT, impl="triton")
    eager_values, eager = spectral_penalty(w, AXIS, role=role, weight=WEIGHT)
    true_values, true = spectral_penalty(w.double(), AXIS, role=role, weight=WEIGHT)
    assert_within_budget(grad, eager, true)
    assert_within_budget(values, eager_values, true_values)


@pytest.mark.parametrize("transform", ("flat", "axis", "fft2"))
def test_torch_path(transform: str) -> None:
    spectrum = Spectrum(transform=transform)

    def run(*arguments, impl):
        return spectral_penalty_into(*arguments, impl="torch")

    check(run, [(3, 64), (17, 2), (5, 64), (3, 64)], "ABAA", spectrum, start=True)


# ---- what it costs


def test_launches_and_bytes() -> None:
    """One launch per length and one for the values; w and g are read once, g is written once."""
    shapes = [(16, 4096), (4096, 2), (4, 448)]
    params, grads = matrices(shapes), matrices(shapes)
    with count_traffic() as traffic:
        spectral_penalty_into(params, grads, AXIS, ["A", "B", "A"], WEIGHT, impl="triton")
    assert traffic.launches == {"_penalty_kernel": 2, "_sum_kernel": 1}
    elements = sum(w.numel() for w in params)
    programs = 9 + 2
    constants = 0
    for length, count in ((4096, 9), (448, 2)):
        found = tables.plan(length, "tf32")
        size_1, size_2 = found.padded
        dfts = (2 * size_1) ** 2 + (2 * size_2) ** 2 * (found.q1 != found.q2)
        constants += count * 4 * (dfts + 5 * size_1 * size_2)  # twiddles twice, sigma
    read, written = traffic.by_kernel["_penalty_kernel"]
    assert written == 4 * elements + 8 * programs
    assert 0 < read - constants - 8 * elements <= programs * 300  # the table: stays in L1
    assert read - constants + written <= 1.02 * 12 * elements


def test_table_size() -> None:
    found = tables.tables(tables.plan(4096, "tf32"), AXIS, CPU)
    assert sum(t.numel() * t.element_size() for t in found.pointers) <= 600_000


# ---- precision


def test_precision_follows_the_spectrum() -> None:
    smooth = ({}, {"schedule": "power"}, {"schedule": "uniform"})
    smooth += ({"schedule": "sigmoid", "sharpness": 16.0},)
    edges = ({"schedule": "hard_cutoff"}, {"schedule": "shuffled"}, {"schedule": "sigmoid"})
    edges += ({"schedule": "power", "exponent": 9.0},)
    assert {tables.precision_of(Spectrum(**options)) for options in smooth} == {"tf32"}
    assert {tables.precision_of(Spectrum(**options)) for options in edges} == {"tf32x3"}


def model(w: Tensor, spectrum: Spectrum, precision: str) -> Tensor:
    """The kernel's arithmetic (split 1, one row) in fp64, with operands of dots rounded to TF32."""
    spec = tables.Plan(len(w), 1, 64, 64, precision)
    found = tables.tables(spec, spectrum, CPU)
    (high_1, low_1), (high_2, low_2) = found.dft1.double(), found.dft2.double()

    def multiply(high: Tensor, low: Tensor, z: Tensor) -> Tensor:
        x = torch.cat([z.real, z.imag])
        x_high = tables.round_tf32(x)
        y = tables.round_tf32(high) @ x_high
        if precision == "tf32x3":
            y = y + low @ x_high + high @ tables.round_tf32(x - x_high)
        re, im = y.chunk(2)
        return torch.complex(re, im)

    twiddle = torch.complex(*found.twiddle.double())
    z = torch.complex(w, torch.zeros_like(w)).view(64, 64)
    z = multiply(high_2, low_2, (multiply(high_1, low_1, z) * twiddle).mT.contiguous())
    z = multiply(high_2, low_2, (z * found.sigma[0].double()).conj().resolve_conj())
    z = multiply(high_1, low_1, z.mT.contiguous() * twiddle)
    return 2.0 * z.real.reshape(-1)


@pytest.mark.parametrize(
    ("spectrum", "precision", "low", "high"),
    (
        (AXIS, "tf32", 1e-4, 2e-2),
        (AXIS, "tf32x3", 0.0, 5e-6),
        (EDGE, "tf32", 0.02, 1.0),  # why an edge is refused TF32
        (EDGE, "tf32x3", 0.0, 5e-4),
    ),
)
def test_error_of_tf32(spectrum: Spectrum, precision: str, low: float, high: float) -> None:
    """Relative error of the gradient of smooth weights with 1e-3 of high frequencies."""
    n = 4096
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(n, generator=generator, dtype=torch.float64)
    bins = torch.fft.rfft(white)
    bins[40:] *= 1e-3
    w = torch.fft.irfft(bins, n)
    _, reference = spectral_penalty(w[None, None], spectrum)
    error = (model(w, spectrum, precision) - reference[0, 0]).norm() / reference.norm()
    assert low <= float(error) <= high


# ---- what it takes


def test_plans() -> None:
    for n in (1, 4096, 5120, 8192, 11008, 13824, 14336):
        spec = tables.plan(n, "tf32")
        assert spec.split * spec.q1 * spec.q2 == n
    assert tables.plan(4096, "tf32").split == 1
    assert tables.plan(4096, "tf32x3").split == 4
    for n, precision in ((131, "tf32"), (32768, "tf32"), (11008, "tf32x3")):
        with pytest.raises(ValueError, match=rf"{n} elements.*q1 \* q2.*impl='torch'"):
            tables.plan(n, precision)


CHIPS = {
    chips.HOPPER: {
        "tf32": {4096: 1, 5120: 4, 8192: 4, 11008: 4, 13824: 8, 14336: 8},
        "tf32x3": {4096: 4, 5120: 8, 8192: 8},
    },
    chips.AMPERE: {"tf32": {4096: 4, 5120: 8, 8192: 8}, "tf32x3": {4096: 8}},
    chips.CDNA3: {
        "tf32": {4096: 1, 5120: 4, 8192: 4, 11008: 8, 13824: 8, 14336: 8},
        "tf32x3": {4096: 4, 5120: 8, 8192: 8},
    },
    chips.UNKNOWN: {"tf32": {}, "tf32x3": {}},
}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("precision", ("tf32", "tf32x3"))
def test_blocks_by_chip(chip: chips.Chip, precision: str) -> None:
    """What compiles without spills; the rest is refused by the chip's name."""
    for n in (4096, 5120, 8192, 11008, 13824, 14336):
        if n in CHIPS[chip][precision]:
            spec = tables.plan(n, precision, chip)
            assert spec.split * spec.q1 * spec.q2 == n and spec.chip is chip
            assert spec.split == CHIPS[chip][precision][n], n
        else:
            told = (
                rf"{n} elements.*on {chip.name} in {precision}" if chip.row else "does not run on"
            )
            with pytest.raises(ValueError, match=rf"{told}.*impl='torch'"):
                tables.plan(n, precision, chip)


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    (
        *(((8, minor), None, chips.AMPERE) for minor in (0, 6, 9)),
        ((9, 0), None, chips.HOPPER),
        *(((10, minor), None, chips.HOPPER) for minor in (0, 3)),
        ((12, 0), None, chips.AMPERE),
        ((7, 5), None, chips.UNKNOWN),
        ("gfx942:sramecc+:xnack-", "6.4", chips.CDNA3),
        ("gfx1100", "6.4", chips.UNKNOWN),
    ),
    ids=str,
)
def test_chip_of_a_device(
    capability: Any, hip: str | None, expected: chips.Chip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = SimpleNamespace(gcnArchName=capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    chip_of = chips.chip_of.__wrapped__  # without its cache
    assert chip_of(torch.device("cuda")) is expected
    assert chip_of(CPU) is chips.HOPPER


@pytest.mark.parametrize("chip", (chips.AMPERE, chips.CDNA3), ids=lambda chip: chip.name)
def test_the_result_by_chip(chip: chips.Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "chip_of", lambda device: chip)
    check(spectral_penalty_into, [(1, 4096), (96, 3)], "AB", start=True)


def test_refusals() -> None:
    w, g = matrices([(2, 64), (2, 64)])

    def run(spectrum: Spectrum = AXIS, w: Tensor = w, g: Tensor = g, role: str = "A", **options):
        return spectral_penalty_into([w], [g], spectrum, [role], 1.0, **options)

    for transform in ("flat", "fft2"):
        with pytest.raises(NotImplementedError, match=rf"{transform}.*impl='torch'"):
            run(Spectrum(transform=transform), impl="triton")
    with pytest.raises(NotImplementedError, match="spectral_penalty_delta"):
        spectral_penalty_delta(w[None], w.mT[None], AXIS, impl="triton")
    for bad in ({"role": "C"}, {"impl": "cuda"}, {"g": g[:1]}, {"w": w[0]}, {"starts": []}):
        with pytest.raises(ValueError, match="must be"):
            run(**bad)
    for bad in ({"w": w.double()}, {"w": torch.ones(2, 131), "g": torch.ones(2, 131)}):
        with pytest.raises(ValueError, match=r"float64|131"):
            run(**bad, impl="triton")


def test_auto_gives_the_rest_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, lengths that do not factor go to torch.fft, in the same call."""
    monkeypatch.setattr(
        api, "choose_impl", lambda _, impl, __: "triton" if impl == "auto" else impl
    )

    def run(*arguments, impl):
        return spectral_penalty_into(*arguments, impl="auto")

    with count_traffic() as traffic:
        check(run, [(3, 131), (64, 3), (2, 131)], "ABA", start=True)
    assert traffic.launches == {"_penalty_kernel": 2, "_sum_kernel": 2}  # `check` runs it twice
    monkeypatch.setattr(api, "chip_of", lambda device: chips.UNKNOWN)
    with count_traffic() as traffic:
        check(run, [(3, 64)], "A")
    assert not traffic.launches


# ---- bugs that must not survive: (name, module, its text, what a careless author would have written)
BUGS = (
    ("gradient not doubled", kernel, "2.0 * weight * xs[i]", "weight * xs[i]"),
    ("gradient overwritten", kernel, "(g + x).to(TYPES[1])", "x.to(TYPES[1])"),
    ("last row dropped", kernel, "(piece * 2 + 1 < vectors)", "(piece * 2 + 2 < vectors)"),
    ("value without lambda", kernel, "weight * energy)", "energy)"),
    ("sum for squares", kernel, "tl.where(mask, x * x", "tl.where(mask, x"),
    (
        "a block's square forgotten",
        kernel,
        "square += _add_block(row_ptr, piece, mask",
        "square = _add_block(row_ptr, piece, mask",
    ),
    ("start added", kernel, "w -= tl.load", "w += tl.load"),
    ("rows and columns swapped", kernel, 'if self.role == "A" else (along', "if True else (along"),
    ("last partial dropped", kernel, "mask=offs_N < end", "mask=offs_N < end - 1"),
    ("blocks of columns overlap", kernel, "(BLOCK * SHAPE[0] * SHAPE[1])", "(BLOCK * SHAPE[0])"),
    ("blocks of rows overlap", kernel, "BLOCK * SHAPE[0] * SHAPE[1] + place", "BLOCK + place"),
    ("columns as rows in memory", kernel, "int(matrix.unit)", "1"),
    ("wide where it must not be", kernel, "if unit:\n        w =", "if unit == 0:\n        w ="),
    ("twiddle conjugated", core, "re * cos - im * sin, re * sin", "re * cos + im * sin, re * sin"),
    ("no conjugate on the way back", core, "re * sigma, -im * sigma", "re * sigma, im * sigma"),
    ("energy without sigma", core, "(re * re + im * im) * sigma", "(re * re + im * im)"),
    ("class 3 forgotten in value", core, "e0 + e2 + 2.0 * e1", "e0 + e2 + e1"),
    ("class 3 forgotten", core, "u + v, u - v, 2.0 * re, 2.0 * im", "u + v, u - v, re, im"),
    ("eight: root missing", core, "(r1 - r3) * (2.0 * ROOT)", "(r1 - r3) * 2.0"),
    ("eight: class 2 turned", core, "(a0 - a2, a3 - a1, tables", "(a0 - a2, a1 - a3, tables"),
    ("low part dropped", core, "tl.dot(low, x_high, input", "0.0 * tl.dot(low, x_high, input"),
)


def mutant(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, old: str, new: str
) -> None:
    """Put a copy of a module with the one occurrence of `old` changed in the place of the module."""
    for changed in dict.fromkeys((module, kernel)):  # the kernel must import a changed core
        source = Path(str(changed.__file__)).read_text()
        if changed is module:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
            source = source.replace(old, new)
        path = folder / f"{changed.__name__.rpartition('.')[2]}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(changed.__name__, path)
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, changed.__name__, copy)
        monkeypatch.setattr(api_package(), changed.__name__.rpartition(".")[2], copy)
        spec.loader.exec_module(copy)


def api_package() -> ModuleType:
    return sys.modules[api.__name__.rpartition(".")[0]]


def check_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in (1, 4, 8):
        with_split(monkeypatch, split)
        check(spectral_penalty_into, [(3, 96), (96, 2)], "AB", EDGE, start=True)


def test_no_bug_is_noticed_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(monkeypatch)


@pytest.mark.parametrize(("bug", "module", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_bug_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bug: str,
    module: ModuleType,
    old: str,
    new: str,
) -> None:
    mutant(tmp_path, monkeypatch, module, old, new)
    with pytest.raises(AssertionError, match="over its budget|differ"):
        check_all(monkeypatch)


def test_padding_of_tables_is_zero() -> None:
    found = tables.tables(dataclasses.replace(tables.plan(96, "tf32")), AXIS, CPU)
    spec = tables.plan(96, "tf32")
    assert not found.sigma[:, spec.q2 :].any() and not found.sigma[:, :, spec.q1 :].any()
