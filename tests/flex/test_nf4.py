"""Rounding one matrix to NF4 on data: against GPTQ written out in fp64, and as bitsandbytes stores it."""

import pytest
import torch
from torch.testing import assert_close

from flex.model import nf4
from tests.mutants import load_copy

bnb = pytest.importorskip("bitsandbytes").functional

from flex.model import nf4_store  # noqa: E402  # it imports bitsandbytes

# K is no multiple of 64, so blocks begin within rows, and is more than one panel of columns.
ROWS, COLUMNS = 6, 200


def case(rows=ROWS, columns=COLUMNS, samples=400, seed=0):
    """A matrix and the Hessian of correlated inputs, one of which is always 0; fp64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    loud = torch.rand(columns, generator=generator, dtype=torch.float64) * 3
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mix * loud
    inputs[:, 5] = 0
    return weight, inputs.t() @ inputs


def nearest(values, scales):
    """Level by level, which is the nearest."""
    table = torch.tensor(bnb.get_4bit_type("nf4", device="cpu").tolist(), dtype=torch.float64)
    return (values[..., None] - table * scales[..., None]).abs().argmin(-1)


def spread(scales, shape):
    rows, columns = shape
    place = torch.arange(rows * columns).view(rows, columns)
    return scales[place // 64]


def gptq(weight, scales, hessian):
    """Frantar et al. 2022, equation 2: each column's error goes into all later ones by the inverse of what is left
    of H, which is inverted anew for every column."""
    table = torch.tensor(bnb.get_4bit_type("nf4", device="cpu").tolist(), dtype=torch.float64)
    left, size = weight.clone(), spread(scales, weight.shape)
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    order = sorted(range(len(h)), key=lambda k: -float(hessian[k, k]))
    for i, j in enumerate(order):
        rest = order[i:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        found = nearest(left[:, j], size[:, j])
        codes[:, j] = found.to(torch.uint8)
        error = (left[:, j] - table[found] * size[:, j]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return codes


WEIGHT, HESSIAN = case()
SCALES = nf4.block_maxima(WEIGHT) * 0.9
CODES = gptq(WEIGHT, SCALES, HESSIAN)


def check_rounding(module):
    codes, damping = module.calibrated_codes(WEIGHT, SCALES, HESSIAN)
    assert torch.equal(codes, CODES) and damping == 0.01


def check_search(module):
    """Of the factors 0.7, 0.725 ... 1.05 of each block's maximum, the first of least weighted error."""
    importance = module.damped(HESSIAN).diagonal()
    found = module.search_scales(WEIGHT, importance)
    flat, weigh = WEIGHT.flatten(), importance.repeat(ROWS)
    for block in range(len(found)):
        part = slice(64 * block, 64 * block + 64)
        errors = {}
        for i in range(15):
            scale = flat[part].abs().max() * (0.7 + 0.025 * i)
            levels = module.levels(WEIGHT)[nearest(flat[part], scale.expand(len(flat[part])))]
            errors[float(scale)] = float((weigh[part] * (levels * scale - flat[part]) ** 2).sum())
        assert float(found[block]) == pytest.approx(min(errors, key=errors.get), rel=1e-12)


def drifted(samples=400, columns=COLUMNS):
    """Inputs X of a layer and those of the dense model's, Z, which a linear map makes of them up to some noise."""
    generator = torch.Generator().manual_seed(3)
    rounded = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    noise = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    return rounded, rounded + 0.3 * rounded @ mix + 0.1 * noise


def check_target(module):
    """The ridge regression of the dense model's outputs on X, drawn to W instead of to 0."""
    rounded, dense = drifted()
    hessian, drift = rounded.t() @ rounded, (dense - rounded).t() @ rounded
    found = WEIGHT + WEIGHT @ module.shift_matrix(hessian, drift)
    pull = (0.01 * hessian.diagonal().mean()).sqrt() * torch.eye(COLUMNS, dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([rounded, pull]), torch.cat([dense @ WEIGHT.t(), pull @ WEIGHT.t()])
    ).solution.t()
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not module.shift_matrix(hessian, 0 * drift).any()


# ---- the mathematics ----


def test_the_target_is_a_regression_on_the_dense_models_outputs():
    check_target(nf4)


def test_outputs_are_nearer_to_the_dense_models_shifted_than_without():
    rounded, dense = drifted(1000)
    weight = case(48)[0]
    hessian, drift = rounded.t() @ rounded, (dense - rounded).t() @ rounded
    errors = []
    for given in (nf4.shift_matrix(hessian, drift), None):
        found = nf4_store.round_matrix(weight, hessian, True, torch.float32, given)
        matrix = nf4_store.read_back(found.packed, found.state).double()
        errors.append(float((dense @ weight.t() - rounded @ matrix.t()).square().sum()))
    assert errors[0] < 0.3 * errors[1]


def test_it_is_gptq_written_out():
    check_rounding(nf4)
    assert not torch.equal(CODES, nf4.nearest_codes(WEIGHT, nf4.spread(SCALES, WEIGHT.shape)))


def test_scales_are_the_best_of_those_tried():
    check_search(nf4)
    plain = nf4.search_scales(WEIGHT, torch.ones(COLUMNS))
    assert not torch.equal(plain, nf4.search_scales(WEIGHT, HESSIAN.diagonal()))


def test_inputs_that_are_not_correlated_leave_nothing_to_compensate():
    """H diagonal: the codes nearest by the given scales, to the bit, in fp32 too."""
    diagonal = torch.diag(torch.rand(COLUMNS, dtype=torch.float64) + 0.1)
    for weight in (WEIGHT, WEIGHT.float()):
        codes, _ = nf4.calibrated_codes(weight, SCALES, diagonal)
        expected = nf4.nearest_codes(weight, nf4.spread(SCALES, WEIGHT.shape).to(weight.dtype))
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_change_less_than_with_nearest_rounding(seed, double_quant):
    weight, hessian = case(48, 192, seed=seed)
    found = nf4_store.round_matrix(weight, hessian, double_quant, torch.float32)
    near = nf4_store.round_matrix(weight, None, double_quant, torch.float32)
    wide = weight.float()
    errors = [
        nf4.output_error(nf4_store.read_back(r.packed, r.state) - wide, hessian)
        for r in (found, near)
    ]
    assert found.error == pytest.approx(errors[0] / errors[1], rel=1e-5)
    assert found.error < 0.6 and near.error is None


def test_fewer_samples_than_inputs():
    """H is singular, with an input that was never anything but 0; its weights are rounded to nearest."""
    weight, hessian = case(48, 192, samples=20)
    found = nf4_store.round_matrix(weight, hessian, True, torch.float32)
    assert found.damping == 0.01 and found.error < 0.2
    scales = nf4.block_maxima(weight)
    codes, _ = nf4.calibrated_codes(weight, scales, hessian)
    expected = nf4.nearest_codes(weight, nf4.spread(scales, weight.shape))
    assert torch.equal(codes[:, 5], expected[:, 5])


def test_a_hessian_that_rounding_made_indefinite_takes_more_damping():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    values = torch.ones(64, dtype=torch.float64)
    values[0] = -0.05
    hessian = basis @ torch.diag(values) @ basis.t()
    factor, damping = nf4.inverse_factor(hessian)
    assert damping == pytest.approx(0.1)
    assert_close(factor.t() @ factor, torch.linalg.inv(nf4.damped(hessian, damping)))
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_no_hessian_at_all(value):
    with pytest.raises(nf4.NotPositive, match="64 inputs"):
        nf4.inverse_factor(torch.eye(64, dtype=torch.float64) * value)


def test_zeros_stay_zeros():
    """A block of zeros among others: double quantisation gives it a scale that is not quite 0."""
    weight, hessian = case(4, 128)
    weight[1, :64] = 0
    found, near = (nf4_store.round_matrix(weight, h, True, torch.float32) for h in (hessian, None))
    assert nf4_store.read_back(found.packed, found.state)[1, :64].abs().max() < 0.02
    assert not nf4_store.read_back(near.packed, near.state)[1, :64].any()
    nothing = nf4_store.round_matrix(torch.zeros(4, 128), hessian, True, torch.float32)
    assert not nf4_store.read_back(nothing.packed, nothing.state).any() and nothing.error == 0


# ---- bitsandbytes' format ----


def check_store(module):
    """The codes are GPTQ's for the scales that are read back, and bitsandbytes reads what was meant."""
    weight, hessian = case(7, 51, seed=2)  # an odd number of elements, no row begins a block
    wide = weight.float()
    for double_quant in (True, False):
        found = module.round_matrix(weight, hessian, double_quant, torch.float32)
        absmax = found.state.absmax
        if double_quant:
            absmax = bnb.dequantize_blockwise(absmax, found.state.state2) + found.state.offset
        codes, _ = nf4.calibrated_codes(wide, absmax, hessian)
        meant = nf4.decode(codes, nf4.spread(absmax, wide.shape))
        assert torch.equal(module.read_back(found.packed, found.state), meant)
        chosen = nf4.search_scales(wide, nf4.damped(hessian).diagonal())
        assert (absmax - chosen).abs().max() <= 0.02 * chosen.abs().max()
    shift = nf4.shift_matrix(hessian, 0.1 * case(7, 51, seed=3)[1])
    shifted = module.round_matrix(weight, hessian, False, torch.float32, shift)
    target = (wide + wide.double() @ shift).float()
    assert_close(shifted.state.absmax, nf4.search_scales(target, nf4.damped(hessian).diagonal()))
    nearest = module.round_nearest(wide, False)[0]
    near = nf4.decode(nearest, nf4.spread(nf4.block_maxima(wide), wide.shape))
    found = module.read_back(shifted.packed, shifted.state)
    errors = [nf4.output_error(matrix - target, hessian) for matrix in (found, near)]
    assert shifted.error == pytest.approx(errors[0] / errors[1], rel=1e-5)


def test_bitsandbytes_reads_the_matrix_that_was_meant():
    check_store(nf4_store)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_whole_rows_are_read_in_their_own_shape_too(dtype):
    weight, hessian = case(8, 128)
    found = nf4_store.round_matrix(weight, hessian, True, dtype)
    stock = bnb.dequantize_4bit(found.packed, found.state)
    assert stock.dtype == dtype and stock.shape == (8, 128)
    assert torch.equal(stock, nf4_store.read_back(found.packed, found.state))


@pytest.mark.parametrize("shape", [(96, 192), (33, 80), (7, 51)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_without_data_it_is_bitsandbytes_own_rounding(shape, double_quant):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).bfloat16()
    found = nf4_store.round_matrix(weight, None, double_quant, torch.bfloat16)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    assert torch.equal(found.packed, packed)
    mine, theirs = (s.as_dict(packed=True) for s in (found.state, state))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- seeded bugs ----

MATHS = {
    "no compensation within a panel": (
        "left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error",
        "pass",
    ),
    "no compensation beyond it": ("left[stop:] -= factor[start:stop, stop:].t() @ errors", "pass"),
    "rising order": ("descending=True", "descending=False"),
    "columns stay permuted": ("found[order] = codes", "found[:] = codes"),
    "scales of other columns": ("weight.shape)[:, order].t()", "weight.shape).t()"),
    "undamped": ("damping * hessian.diagonal().mean()", "0 * hessian.diagonal().mean()"),
    "error not divided by the diagonal": (" / factor[j, j]", ""),
    "U is not inverted": (
        "return torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True), damping",
        "return lower.flip(0, 1), damping",
    ),
    "a level is wrong": ("0.16093020141124725", "0.17"),
}
SEARCH = {
    "all inputs weigh the same": (".square_().mul_(weigh)", ".square_()"),
    "the worst scale": ("better = total < best", "better = total > best"),
    "importance by rows": (
        "importance.to(weight.dtype).expand_as(weight)",
        "importance.to(weight.dtype).expand_as(weight).t()",
    ),
}
TARGET = {
    "the drift is transposed": ("return drift @", "return drift.t() @"),
    "H is not inverted": ("@ factor.t() @ factor", "@ hessian"),
    "its factor is transposed": ("@ factor.t() @ factor", "@ factor @ factor.t()"),
}
STORE = {
    "the weight is rounded, not the target": ("if shift is not None", "if False"),
    "the weight is left out": (
        "(wide + wide.to(shift.dtype) @ shift)",
        "(wide.to(shift.dtype) @ shift)",
    ),
    "scales before they are stored": (
        "nf4.calibrated_codes(wide, scales.read, hessian)",
        "nf4.calibrated_codes(wide, chosen, hessian)",
    ),
    "wrong nibble first": ("flat[0::2] << 4 | flat[1::2]", "flat[1::2] << 4 | flat[0::2]"),
    "the mean is not added": (
        "bnb.dequantize_blockwise(stored, nested) + offset, offset",
        "bnb.dequantize_blockwise(stored, nested), offset",
    ),
    "largest magnitudes for scales": (
        "nf4.search_scales(wide, nf4.damped(hessian).diagonal())",
        "nf4.block_maxima(wide) * 1.5",
    ),
}


@pytest.mark.parametrize(
    ("module", "check", "bug"),
    [
        *((nf4, check_rounding, bug) for bug in MATHS.values()),
        *((nf4, check_search, bug) for bug in SEARCH.values()),
        *((nf4, check_target, bug) for bug in TARGET.values()),
        *((nf4_store, check_store, bug) for bug in STORE.values()),
    ],
    ids=[*MATHS, *SEARCH, *TARGET, *STORE],
)
def test_a_seeded_bug_is_seen(module, check, bug, tmp_path):
    mutant = load_copy(tmp_path, module, *bug)
    # a copy's own error is another class than the module's
    with pytest.raises((AssertionError, ValueError)):
        check(mutant)
