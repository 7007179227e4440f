"""16-bit products summed in fp32 where the processor has none of its own: numbers, pieces, gradients, seeded bugs."""

import pytest
import torch

from flex.kernels import products
from flex.kernels.budget import budget_used
from flex.kernels.frozen_linear import frozen_linear
from tests.mutants import load_copy

SHAPES = [(1, 5, 7), (3, 17, 4), (9, 1, 3), (130, 33, 65)]  # M, K, N
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_units(monkeypatch):
    monkeypatch.setattr(products, "_has_units", lambda dtype: False)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_products(code, m: int, k: int, n: int, dtype: torch.dtype) -> None:
    """Every function within the budget, for b as it lies and transposed."""
    a, y = normal(m, k, seed=0, dtype=dtype), normal(m, n, seed=2, dtype=dtype)
    bias = normal(n, seed=3, dtype=dtype)
    for b in (normal(k, n, seed=1, dtype=dtype), normal(n, k, seed=1, dtype=dtype).t()):
        product = a.double() @ b.double()
        room, sums = torch.full_like(y, torch.nan), y.clone()
        code.mm(a, b, out=room), code.addmm_(sums, a, b)
        for found, plain, exact in (
            (code.mm(a, b), a @ b, product),
            (code.mm(a, b, bias), torch.addmm(bias, a, b), product + bias.double()),
            (room, a @ b, product),
            (sums, torch.addmm(y, a, b), product + y.double()),
            (code.bmm(a[None], b[None])[0], a @ b, product),
        ):
            assert found.dtype == dtype
            assert budget_used(found, plain, exact) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", [1, 40, products.STEP])
def test_products_are_within_the_budget_in_pieces_of_any_size(shape, dtype, step, monkeypatch):
    monkeypatch.setattr(products, "STEP", step)
    monkeypatch.setattr(products, "FEW_ROWS", 0)
    check_products(products, *shape, dtype)


def test_the_sum_is_rounded_once():
    """1 + 2^-9 + 2^-9 is a bf16 number; rounded after each addition it would be 1."""
    y, a = torch.ones(4, 1).bfloat16(), torch.full((4, 2), 2.0**-9).bfloat16()
    b = torch.ones(2, 1).bfloat16()
    assert products.addmm_(y, a, b[:, :1])[0, 0] == 1 + 2.0**-8
    assert products.mm(a, b, torch.ones(1).bfloat16())[0, 0] == 1 + 2.0**-8


def test_out_and_addmm_write_into_the_memory_they_are_given():
    a, b, room = normal(6, 3, seed=0), normal(3, 4, seed=1), torch.zeros(10, 4).bfloat16()
    found = products.mm(a, b, out=room[2:8])
    assert found.data_ptr() == room[2:].data_ptr()
    assert torch.equal(room[2:8], products.mm(a, b)) and not room[:2].any() and not room[8:].any()
    products.addmm_(room[2:8], a, b)
    assert not torch.equal(room[2:8], products.mm(a, b))


def test_where_the_processor_has_units_torch_computes(monkeypatch):
    monkeypatch.setattr(products, "_has_units", lambda dtype: True)
    monkeypatch.setattr(products, "_added", None)  # would fail if it were called
    a, b = normal(6, 3, seed=0), normal(3, 4, seed=1)
    assert torch.equal(products.mm(a, b), a @ b)
    assert not products.widens(a)


def test_fp32_is_torchs_own():
    assert not products.widens(torch.empty(0)) and not products.widens(torch.empty(0).double())


@pytest.mark.parametrize("bias", [False, True])
def test_frozen_linear_is_a_linear_layer_and_keeps_the_weight_itself(bias):
    x, w = normal(2, 5, 17, seed=0), normal(33, 17, seed=1)
    b = normal(33, seed=2) if bias else None
    found, plain, exact = x.clone(), x.clone(), x.double()
    for leaf in (found, plain, exact):
        leaf.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen_linear(found, w, b)
    assert [t.data_ptr() for t in saved] == [w.data_ptr()]  # no x, no wide copy
    wide = None if b is None else b.double()
    y_plain = torch.nn.functional.linear(plain, w, b)
    y_exact = torch.nn.functional.linear(exact, w.double(), wide)
    assert budget_used(y.detach(), y_plain.detach(), y_exact.detach()) <= 1
    dy = normal(*y.shape, seed=4)
    y.backward(dy)
    y_plain.backward(dy)
    y_exact.backward(dy.double())
    assert budget_used(found.grad, plain.grad, exact.grad) <= 1


def test_autocast_changes_no_bit_of_the_frozen_layer():
    x, w = normal(40, 170, seed=0).requires_grad_(), normal(33, 170, seed=1)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = frozen_linear(x, w, None)
            found.append((y, *torch.autograd.grad(y, x, normal(40, 33, seed=2))))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


BUGS = {
    "the bias is left out": ("else out, bias, a, b)", "else out, None, a, b)"),
    "what was there is left out": ("_product(y, y, a, b)", "_product(y, None, a, b)"),
    "the last row of every piece is left out": (
        "slice(start, start + step)",
        "slice(start, start + step - 1)",
    ),
    "pieces of the sum overlap": (
        "_added(wide, a[:, part], b[part].float())",
        "_added(wide, a[:, max(0, part.start - 1) : part.stop], "
        "b[max(0, part.start - 1) : part.stop].float())",
    ),
    "the last piece is left out": ("range(0, size, step)", "range(0, size - step, step)"),
    "every piece begins anew": ("wide = _added(wide, a", "wide = _added(start, a"),
    "every piece begins with the first columns": (
        "start[..., part]",
        "start[..., : b[:, part].shape[1]]",
    ),
    "out is not written": ("out.copy_(wide)", "wide.to(out.dtype)"),
    "the sum stays at its start": (
        "torch.addmm(start.float(), a, b)",
        "start.float().expand(len(a), -1)",
    ),
}


@pytest.mark.parametrize("bug", [*BUGS, None])
def test_a_seeded_bug_is_found(bug, tmp_path):
    old, new = BUGS[bug] if bug else ("_has_units(x.dtype)\n", "_has_units(x.dtype)  #\n")
    code = load_copy(tmp_path, products, old, new)
    code._has_units, code.STEP, code.FEW_ROWS = (lambda dtype: False), 130, 0
    if bug is None:
        check_products(code, 130, 33, 65, torch.bfloat16)
        return
    with pytest.raises((AssertionError, RuntimeError)):
        check_products(code, 130, 33, 65, torch.bfloat16)
