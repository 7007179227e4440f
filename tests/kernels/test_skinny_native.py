"""The C source of the low-rank products: its numbers, its mask, any number of threads, and no compiler."""

from __future__ import annotations

import logging
import platform
from typing import Any

import pytest
import torch
from torch import Tensor

from flex.kernels import native_build, products
from flex.kernels.lora_linear import skinny_native as native
from flex.kernels.lora_linear import skinny_source
from flex.kernels.lora_linear.dropout import apply_mask, keep_mask, philox_keys
from flex.kernels.lora_linear.torch_path import backward, forward
from tests.kernels.test_lora_linear import row_ids
from tests.mutants import compiled_anew, compiled_from, load_copy, without_a_compiler
from tests.oracle import assert_within_budget

CPU = torch.device("cpu")
SCALE, SEED = 1.7, 2**40 + 3
# rows, inputs, outputs, rank, dropout, bias: two blocks of rows; one row; odd numbers; ends of vectors
CASES = [
    (300, 64, 96, 8, 0.1, True),
    (1, 1, 1, 1, 0.0, True),
    (45, 33, 70, 3, 0.3, False),
    (257, 31, 65, 16, 0.3, True),
    (33, 40, 32, 17, 0.3, False),
    (34, 96, 7, 8, 0.0, False),
]


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes where the processor multiplies bf16, and is right anywhere; test_gemm_native.py has it with ours."""
    monkeypatch.setattr(products, "_has_units", lambda dtype: True)
    monkeypatch.setattr(products, "in_c", lambda a, b: False)


def operands(rows: int, inputs: int, outputs: int, rank: int, bias: bool) -> list[Any]:
    made = torch.Generator().manual_seed(rows + inputs)
    shapes = [(rows, inputs), (rows, outputs), (outputs, inputs), (rank, inputs), (outputs, rank)]
    x, dy, w, a, b = (torch.randn(s, generator=made).bfloat16() for s in shapes)
    return [x, dy, w / 8, a, b, torch.randn(outputs, generator=made).bfloat16() if bias else None]


def truth(case: tuple[Any, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every result by plain products in `dtype`, from the operands in bf16."""
    rows, inputs, outputs, rank, p, bias = case
    x, dy, w, a, b, row = [t if t is None else t.to(dtype) for t in operands(*case[:4], bias)]
    keep = keep_mask(SEED, rows, inputs, p, CPU, row_ids(rows)) if p else None
    kept = x if keep is None else torch.where(keep.bool(), x, 0.0)
    s = kept @ a.t()
    ds = SCALE * (dy @ b)
    dx = ds @ a if keep is None else torch.where(keep.bool(), ds @ a, 0.0)
    y = SCALE * (s @ b.t()) + (0 if row is None else row) + x @ w.t()
    return {"y": y, "s": s, "dx": dx + dy @ w, "da": ds.t() @ kept, "db": SCALE * (dy.t() @ s)}


def found(case: tuple[Any, ...]) -> dict[str, Tensor | None]:
    x, dy, w, a, b, row = operands(*case[:4], case[5])
    factors = (a.float(), b.float(), SCALE, case[4], SEED, row_ids(case[0]))
    y, s = forward(x, w, row, *factors)
    dx, da, db = backward(dy, x, s, w, *factors, (True, True, True))
    return {"y": y, "s": s, "dx": dx, "da": da, "db": db}


def check() -> None:
    check_budgets()
    check_rounding()


def check_budgets() -> None:
    for case in CASES:
        eager, exact = truth(case, torch.bfloat16), truth(case, torch.float64)
        for name, value in found(case).items():
            assert value is not None
            assert_within_budget(value, eager[name], exact[name], f"{name} of {case}")


def check_rounding() -> None:
    """Rank 1: every number is one product, rounded to the nearest, ties to even, as torch does."""
    run = native.library()
    assert run is not None
    ds, a = (torch.arange(n).bfloat16().add(129)[:, None] for n in (40, 64))
    dx, _, _ = native.backward(run, ds, None, None, ds, a.t(), 1.0, 0.0, None, None, need_x=True)
    assert dx is not None and torch.equal(dx, (ds.float() * a.float().t()).bfloat16())


X86 = platform.machine() in ("x86_64", "AMD64")
WITHOUT_DOTS = (*native.FLAGS, *["-mno-avx512bf16"] * X86)  # as for an older processor


def test_every_result_is_within_its_budget() -> None:
    assert native.library() is not None
    check()


def test_so_it_is_without_bf16_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", WITHOUT_DOTS)
    with compiled_anew(native.library):
        run = native.library()
        assert run is not None and not run.dots()
        check()


def test_the_keys_are_those_of_the_mask() -> None:
    run = native.library()
    assert run is not None
    keys = torch.empty(2, 1000 + 160, dtype=torch.int32)
    for seed in (0, SEED, 2**63 - 1):
        run.fill_keys(seed, None, 1000, 160, keys.data_ptr())
        assert torch.equal(keys, torch.from_numpy(philox_keys(seed, 1000, 160)))
        ids = row_ids(1000)
        run.fill_keys(seed, ids.data_ptr(), 1000, 160, keys.data_ptr())
        assert torch.equal(keys, torch.from_numpy(philox_keys(seed, 1000, 160, ids)))


@pytest.mark.parametrize("p", [2**-16, 0.05, 0.5, 0.99999])
def test_the_mask_is_that_of_keep_mask_bit_for_bit(p: float) -> None:
    run = native.library()
    assert run is not None
    rows, inputs = 67, 91
    ones, keep = torch.ones(rows, 1).bfloat16(), keep_mask(SEED, rows, inputs, p, CPU)
    a, dy = torch.ones(1, inputs).bfloat16(), torch.ones(rows, 2).bfloat16()
    dx, da, _ = native.backward(run, dy, ones * a, None, ones, a, 1.0, p, SEED, None, need_x=True)
    assert dx is not None and da is not None
    assert torch.equal(dx, apply_mask(ones * a, keep))
    assert torch.equal(da[0], (keep != 0).sum(0).float())
    _, s = native.forward(run, ones * a, a, torch.ones(2, 1).bfloat16(), None, p, SEED, None)
    assert torch.equal(s[:, 0], (keep != 0).sum(1).bfloat16())


def test_a_dropped_infinity_is_zero_and_nan_stays() -> None:
    run = native.library()
    assert run is not None
    keep = keep_mask(SEED, 40, 64, 0.5, CPU) != 0
    x, a = torch.full((40, 64), torch.inf).bfloat16(), torch.ones(1, 64).bfloat16()
    x[keep] = 1.0
    one = torch.ones(1, 1).bfloat16()
    y, s = native.forward(run, x, a, one, None, 0.5, SEED, None)
    assert torch.equal(s[:, 0], keep.sum(1).bfloat16())
    assert torch.equal(y, s)
    x[3, int(keep[3].nonzero()[0])] = torch.nan
    y, s = native.forward(run, x, a, one, None, 0.5, SEED, None)
    assert y.isnan().nonzero().tolist() == s.isnan().nonzero().tolist() == [[3, 0]]


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = (1100, 96, 64, 8, 0.1, True)
    alone = found(case)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native_build, "ELEMENTS_PER_THREAD", 1)
    for name, value in found(case).items():
        assert torch.equal(value, alone[name]), name


def test_strided_operands_and_part_of_the_gradients() -> None:
    case = CASES[0]
    x, dy, w, a, b, row = operands(*case[:4], case[5])
    whole = found(case)
    wide = torch.zeros(x.shape[0], 2 * x.shape[1]).bfloat16()
    beside, turned = wide[:, : x.shape[1]].copy_(x), dy.t().contiguous().t()
    factors = (a.float(), b.float(), SCALE, case[4], SEED, row_ids(case[0]))
    y, s = forward(beside, w, row, *factors)
    assert torch.equal(y, whole["y"])
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        parts = backward(turned, beside, s, w, *factors, needs)
        for need, name, part in zip(needs, ("dx", "da", "db"), parts, strict=True):
            assert (part is not None) == need
            if part is not None:
                assert_within_budget(part, whole[name], whole[name].double())


def test_without_a_compiler_torch_multiplies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with without_a_compiler(native.library, monkeypatch):
        with caplog.at_level(logging.WARNING, "flex.kernels"):
            check_budgets()
        assert caplog.text.count("C source of the low-rank products") == 1


def test_what_it_does_not_take() -> None:
    x = torch.ones(2, 2)
    taken = native.library()
    for p, limit in ((0.1, native.MAX_RANK), (0.0, native.MAX_RANK_WITHOUT_DROPOUT)):
        assert native.library_for(x, 8, p) is None
        assert native.library_for(x.bfloat16(), limit + 1, p) is None
        assert native.library_for(x.bfloat16(), limit, p) is taken is not None


BUGS = {
    "mask missing in S": (
        "w = dropped(load(x + (row + i) * stride, b, size), k, row + i, b)",
        "w = load(x + (row + i) * stride, b, size)",
    ),
    "mask missing in dA": (
        "w = dropped(load(x + row * stride, b, size), k, row, b)",
        "w = load(x + row * stride, b, size)",
    ),
    "mask missing in dx": (
        "store(dropped(joined(e[i], o[i]), k, row + i, b)",
        "store(joined(e[i], o[i])",
    ),
    "mask of another row": ("k.row_add[row]", "k.row_add[row + 1]"),
    "ids of rows not read": ("row_ids ? row_ids[i] : i", "i"),
    "columns swapped": ("return (vec)(w << 16)", "return (vec)(w & 0xffff0000u)"),
    "rounded down": ("return w + 0x7fffu + ((w >> 16) & 1u)", "return w"),
    "last vector missed": (
        "for (int64_t b = 0; 32 * b < size; b++)",
        "for (int64_t b = 0; 32 * b + 31 < size; b++)",
    ),
    "last row missed": ("for (; row < end; row++) up_rows", "for (; row + 1 < end; row++) up_rows"),
    "second chunk of ranks missed": (
        "c < ranks / RANKS; c++, a += chunk",
        "c < 1; c++, a += chunk",
    ),
    "tiles forgotten": (
        "stop, inputs, k, s, ranks, block_da, row == first",
        "stop, inputs, k, s, ranks, block_da, 1",
    ),
    "blocks added to one": (
        "panel *block_db = (panel *)db + block *",
        "panel *block_db = (panel *)db + 0 *",
    ),
    "bias missing": ("e[i] = bias ? bias[b][0][0] : (vec){0}", "e[i] = (vec){0}"),
    "scale missing in dB": ("= scale * total[i]", "= total[i]"),
    "S not widened again": ("r < rank ? wide(s16[i * rank + r]) : 0.0f", "wide(s16[i * rank])"),
}


# of the parts that only a processor with bf16 dot products runs
DOTS_BUGS = {
    "mask missing in S": (
        "w[i] = dropped(load(x + (row + i) * stride, b, size), k, row + i, b)",
        "w[i] = load(x + (row + i) * stride, b, size)",
    ),
    "mask missing in dA": (
        "one = dropped(load(x + row * stride, b, size), k, row, b)",
        "one = load(x + row * stride, b, size)",
    ),
    "the first row's mask on both": ("b, size), k, row + 1, b)", "b, size), k, row, b)"),
    "columns exchanged": (
        "o = (one >> 16) | (two & 0xffff0000u)",
        "o = (one & 0xffffu) | (two << 16)",
    ),
    "rows exchanged": (
        "as_bits(f[r]) >> 16 | as_bits(f[ranks + r])",
        "as_bits(f[r]) | as_bits(f[ranks + r]) >> 16",
    ),
    "an odd row missed": (
        "            for (; row < end; row++) {\n",
        "            for (; row < end - end % 2; row++) {\n",
    ),
    "sums of another rank": ("shuffle_f32x4(both, both, 0x08)", "shuffle_f32x4(both, both, 0x02)"),
    "half of the lanes": (
        "lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xb1)",
        "lanes, _mm512_setzero_ps()",
    ),
    "last column missed": ("high = low && column + 1 < size;", "high = low && column + 2 < size;"),
    "second chunk of ranks missed": ("c++, a += chunk", "c++, a += 0 * chunk"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_killed(bug: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", WITHOUT_DOTS)
    _kill(BUGS[bug], tmp_path, monkeypatch)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="needs AVX-512 bf16 dot products"
)
@pytest.mark.parametrize("bug", DOTS_BUGS)
def test_seeded_bugs_of_dot_products_are_killed(
    bug: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kill(DOTS_BUGS[bug], tmp_path, monkeypatch)


def _kill(bug: tuple[str, str], folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_copy(folder, skinny_source, *bug).SOURCE
    with compiled_from(source, native, native.library, monkeypatch), pytest.raises(AssertionError):
        check()
