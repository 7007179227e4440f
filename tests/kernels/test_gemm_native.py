"""Products of bf16 in C: errors against fp64, edges, threads, the low-rank term that joins, seeded bugs.

The C is called straight, whatever its users would choose: its cases are small.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flex.kernels import gemm_native, gemm_source, native_build, processor, products
from flex.kernels.lora_linear import lora_linear, skinny_native, torch_path
from flex.kernels.lora_linear.dropout import keep_mask
from tests.kernels.test_lora_linear import Case, check, operands, row_ids
from tests.mutants import compiled_from, load_copy
from tests.oracle import assert_within_budget

CPU, SEED, P = torch.device("cpu"), 2**40 + 3, 0.3
pytestmark = pytest.mark.skipif(
    gemm_native.compiled() is None, reason="needs AVX-512 bf16 dot products and a compiler"
)
# rows, depth, columns, rank: whole tiles; ends of every kind; one of everything; more than one panel, packed at a time
CASES = [
    (12, 64, 128, 8),
    (10, 33, 70, 3),
    (1, 1, 1, 1),
    (5, 2, 17, 17),
    (7, 95, 191, 16),
    (9, 700, 200, 5),
]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def among_nan(x: Tensor) -> Tensor:
    """x with NaN behind its rows and columns in memory."""
    room = torch.full((len(x) + 1, x.shape[1] + 1), torch.nan).bfloat16()
    return room[:-1, :-1].copy_(x)


def turned(x: Tensor) -> Tensor:
    return among_nan(x.t()).t()


def check_case(rows: int, depth: int, columns: int, rank: int) -> None:
    """Every kind of start, with right operands of either order, rows apart in memory, nothing written elsewhere."""
    a = normal(rows, depth + 3, seed=0)[:, :depth]
    p, q = normal(rows, rank, seed=1), normal(rank, columns, seed=2)
    b, y, bias = (
        normal(depth, columns, seed=3),
        normal(rows, columns, seed=4),
        normal(columns, seed=5),
    )
    keep = keep_mask(SEED, rows, columns, P, CPU, row_ids(rows)).bool()
    mask = skinny_native.mask_keys(P, SEED, row_ids(rows), rows, columns)
    for right, joined in ((among_nan(b), turned(q)), (turned(b), among_nan(q))):
        for given, start in (
            ({}, lambda t: 0),
            ({"bias": bias}, lambda t: t(bias)),
            ({"add": True}, lambda t: t(y)),
            ({"low": (p, joined)}, lambda t: t(p) @ t(q)),
            (
                {"low": (p, joined), "mask": mask, "bias": bias},
                lambda t: torch.where(keep, t(p) @ t(q), 0) + t(bias),
            ),
        ):
            room = torch.full((rows + 2, columns + 7), torch.nan).bfloat16()
            out = room[1:-1, 2 : columns + 2]
            out.copy_(y)
            gemm_native.multiply(out, a, right, **given)
            exact = start(Tensor.double) + a.double() @ b.double()
            eager = start(lambda t: t) + a @ b
            assert_within_budget(out, eager, exact, f"{sorted(given)} of {rows, depth, columns}")
            out.fill_(torch.nan)
            assert room.isnan().all(), "written beyond its place"


def check_all() -> None:
    for case in CASES:
        check_case(*case)


def test_results_are_within_their_budgets():
    check_all()


def test_a_number_is_rounded_once_and_to_even():
    one = torch.ones(1, 2).bfloat16()
    for small, expected in (
        (2.0**-8, 1.0),
        (3 * 2.0**-8, 1 + 2.0**-6),
        (2.0**-8 + 2.0**-11, 1 + 2.0**-7),
    ):
        b = torch.tensor([[1.0], [small]]).bfloat16()
        y = gemm_native.multiply(torch.empty(1, 1).bfloat16(), one, b)
        assert float(y) == expected


def test_a_row_does_not_depend_on_the_rows_beside_it():
    a, b = normal(40, 129, seed=0), normal(129, 70, seed=1)
    whole = gemm_native.multiply(torch.empty(40, 70).bfloat16(), a, b)
    for first in range(12):
        part = gemm_native.multiply(torch.empty(40 - first, 70).bfloat16(), a[first:], b)
        assert torch.equal(part, whole[first:])


@pytest.mark.parametrize("even", [0, 1000], ids=["columns", "rows"])
@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads, even, monkeypatch):
    a, b = normal(40, 700, seed=0), normal(700, 450, seed=1)
    alone = gemm_native.multiply(torch.empty(40, 450).bfloat16(), a, b)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native_build, "ELEMENTS_PER_THREAD", 1)
    monkeypatch.setattr(gemm_native, "EVEN", even)
    assert torch.equal(gemm_native.multiply(torch.empty(40, 450).bfloat16(), a, b), alone)


def test_infinities_and_nan_stay_where_they_belong():
    a, b = normal(8, 64, seed=0), normal(64, 80, seed=1)
    a[3, 5], a[6, 63], b[7, 70] = torch.inf, torch.nan, torch.nan
    y = gemm_native.multiply(torch.empty(8, 80).bfloat16(), a, b)
    expected = a.float() @ b.float()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


def test_no_rows():
    assert gemm_native.multiply(
        torch.empty(0, 64).bfloat16(), normal(0, 64, seed=0), normal(64, 64, seed=1)
    ).shape == (0, 64)


def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(gemm_native, "has_bf16_dots_alone", lambda: True)
    a, b = normal(64, 64, seed=0), normal(64, 64, seed=1)
    assert gemm_native.takes(a, b) and gemm_native.takes(a, b.t()) and gemm_native.takes(a[::2], b)
    for left, right in (
        (a.float(), b.float()),
        (a.half(), b.half()),
        (a[:31], b),
        (a, b[:, :31]),
        (a[:, :31], b[:31]),
        (a.t(), b),
        (a, b.repeat(2, 2)[::2, ::2]),
        (a.to("meta"), b.to("meta")),
    ):
        assert not gemm_native.takes(left, right)
    monkeypatch.setattr(products, "_has_units", lambda dtype: False)
    assert gemm_native.takes(a, b) and not products.in_c(a, b)


def test_amx_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not processor.has_bf16_dots_alone()
    assert not gemm_native.takes(normal(64, 64, seed=0), normal(64, 64, seed=1))


@pytest.fixture
def ours(monkeypatch):
    """The layer's frozen products here, whatever the processor."""
    monkeypatch.setattr(gemm_native, "has_bf16_dots_alone", lambda: True)
    monkeypatch.setattr(products, "_has_units", lambda dtype: True)


LAYER = Case((45,), 72, 80, dtype=torch.bfloat16, ids=True)


@pytest.mark.parametrize("rank", [1, 8, 17])  # the last one's other products are torch's
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_layers_low_rank_term_joins(ours, rank, dropout):
    check(lora_linear, Case((45,), 72, 80, rank, torch.bfloat16, dropout=dropout, ids=True))


def test_factors_and_a_bias_that_lie_apart_in_memory(ours):
    x, w, bias, a, b, dy = operands(replace(LAYER, rank=40))
    a, b = a.bfloat16(), b.bfloat16()
    expected = lora_linear(x, w, bias, a, b, 1.0, 0.1, SEED)
    apart = [torch.stack([t, t], -1)[..., 0] for t in (bias, a, b)]
    assert torch.equal(lora_linear(x, w, *apart, 1.0, 0.1, SEED), expected)
    x, apart[1] = x.requires_grad_(), apart[1].requires_grad_()
    found = [
        torch.autograd.grad(lora_linear(x, w, bias, f, b, 1.0, 0.1, SEED), (x, f), dy)
        for f in (a.requires_grad_(), apart[1])
    ]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


LAYER_BUGS = {
    "bias missing": ("x, weight.t(), bias=row, low=low", "x, weight.t(), low=low"),
    "low-rank term missing in y": ("x, weight.t(), bias=row, low=low", "x, weight.t(), bias=row"),
    "low-rank term missing in dx": ("dy, weight, low=low, mask=mask", "dy, weight"),
    "mask missing in dx": ("dy, weight, low=low, mask=mask", "dy, weight, low=low"),
    "another seed's mask": ("mask_keys(dropout_p, seed,", "mask_keys(dropout_p, seed + 1,"),
    "ids of rows forgotten": ("seed, row_ids, len(dy)", "seed, None, len(dy)"),
    "S without its mask": ("skinny_native.down(run, x, a, *mask)", "x @ a.t()"),
}


@pytest.mark.parametrize("bug", LAYER_BUGS)
def test_seeded_bugs_of_the_layer_are_killed(bug, ours, tmp_path: Path, monkeypatch):
    from flex.kernels.lora_linear import api

    monkeypatch.setattr(api, "torch_path", load_copy(tmp_path, torch_path, *LAYER_BUGS[bug]))
    with pytest.raises(AssertionError, match="over its budget"):
        check(lora_linear, LAYER)


BUGS = {
    "last row of an odd depth missed": ("if (p.depth % 2) EACH", "if (0) EACH"),
    "odd depth read past its end": ("also = 2 * pair + 1 < p.depth ? there : 0", "also = there"),
    "odd depth, the other order": ("low && 2 * pair + 1 < p.depth", "low"),
    "columns beyond the end": (
        "left > 0 ? (1u << left) - 1 : 0;\n}\nINLINE __m512 w",
        "left > 0 ? 0xffff : 0;\n}\nINLINE __m512 w",
    ),
    "halves exchanged": (
        "_mm512_or_si512(low, _mm512_slli_epi32(high, 16))",
        "_mm512_or_si512(high, _mm512_slli_epi32(low, 16))",
    ),
    "rows of the square exchanged": (
        "out + (4 + j) * WIDTH",
        "out + (5 - j) % 4 * WIDTH + 4 * WIDTH",
    ),
    "whole squares missed": (
        "out += LANES) {\n        int64_t pair = 0",
        "out += LANES) {\n        int64_t pair = p.stride_n == 1 ? 0 : 1",
    ),
    "low-rank term packed as the first": (
        "packed + (j - first) * size);\n        for (; row + 3",
        "packed);\n        for (; row + 3",
    ),
    "three rows, the first panel": ("tile_3(job, row, j * WIDTH", "tile_3(job, row, first * WIDTH"),
    "last rows missed": ("for (; row < bottom; row++)", "for (; row + 1 < bottom; row++)"),
    "bias missing": ("if (job->bias)", "if (0)"),
    "sum not added to": ("if (job->add)", "if (0)"),
    "mask missing": ("if (job->keys)", "if (0)"),
    "mask on everything": (
        "        if (job->keys) EACH",
        "    }\n    sum_up(rows, job->main, row, b, sums);\n    if (job->low.depth) {\n        if (job->keys) EACH",
    ),
    "mask of another row": (
        "(int)multiply[row]",
        "(int)multiply[row + 1 < job->rows ? row + 1 : 0]",
    ),
    "mask of another column": ("at = job->rows + column / 2", "at = job->rows + column / 4"),
    "lanes compared unsigned": ("_mm256_cmpge_epi16_mask", "_mm256_cmpge_epu16_mask"),
    "panels packed into one another": (
        "word *out = packed + (j - first) * size",
        "word *out = packed + (j - first) * (size - low)",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_killed(bug, tmp_path: Path, monkeypatch):
    copy = load_copy(tmp_path, gemm_source, *BUGS[bug])
    with (
        compiled_from(copy.SOURCE, gemm_native, gemm_native.compiled, monkeypatch),
        pytest.raises(AssertionError),
    ):
        check_all()
