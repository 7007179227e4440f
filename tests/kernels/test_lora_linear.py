"""`lora_linear`: error against fp64, memory, gradients, and bugs that must not survive."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flex.kernels import runtime
from flex.kernels.lora_linear import api, lora_linear, torch_path
from flex.kernels.lora_linear.dropout import apply_mask, keep_mask
from flex.kernels.lora_linear.reference import lora_linear_reference
from tests.mutants import load_copy
from tests.oracle import assert_within_budget

CPU = torch.device("cpu")
SEED = 4321


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...] = (31,)
    inputs: int = 32
    outputs: int = 32  # square by default: a transposed operand changes numbers, not shapes
    rank: int = 8
    dtype: torch.dtype = torch.float32
    bias: bool = True
    dropout: float = 0.1
    strided: bool = False  # x and W as every second column of something wider
    ids: bool = False  # rows are named for their masks, not counted


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """x, W, bias, A, B, dy. The low-rank term is as large as the base's: no bug in it hides."""
    g = torch.Generator().manual_seed(case.rank + 100 * case.inputs)
    step = 2 if case.strided else 1

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * size

    x = normal(*case.rows, case.inputs * step).to(case.dtype)[..., ::step]
    w = normal(case.outputs, case.inputs * step, size=case.inputs**-0.5).to(case.dtype)[:, ::step]
    bias = normal(case.outputs).to(case.dtype) if case.bias else None
    a = normal(case.rank, case.inputs, size=case.inputs**-0.5)
    b = normal(case.outputs, case.rank, size=case.rank**-0.5)
    if case.dtype == torch.float64:
        a, b = a.double(), b.double()
    return x, w, bias, a, b, normal(*case.rows, case.outputs).to(case.dtype)


def run(fn: Callable[..., Tensor], case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, dx, dA, dB of `fn(x, W, bias, A, B)` with everything but fp32 A and B in `dtype`."""
    x, w, bias, a, b, dy = operands(case)
    x = x.to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else a.dtype
    a, b = a.to(wide).requires_grad_(), b.to(wide).requires_grad_()
    y = fn(x, w.to(dtype), None if bias is None else bias.to(dtype), a, b)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy.to(dtype))
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


def row_ids(rows: int) -> Tensor:
    """(rows,) int32 of either sign, none in its place and two the same."""
    ids = torch.arange(rows, dtype=torch.int64).mul_(0x9E3779B1).add_(7).to(torch.int32)
    ids[:1] = ids[-1:].clone()
    return ids


def check(fn: Callable[..., Tensor], case: Case) -> dict[str, Tensor]:
    """Hold y and all gradients of `fn` to the error budget; two runs must agree bit for bit."""
    scale, p = 1.75, case.dropout
    rows = torch.Size(case.rows).numel()
    ids = row_ids(rows) if case.ids else None
    keep = (
        (keep_mask(SEED, rows, case.inputs, p, CPU, ids) != 0).view(*case.rows, -1) if p else None
    )

    def ours(*tensors: Tensor) -> Tensor:
        return fn(*tensors, scale, p, SEED, row_ids=ids)

    def reference(*tensors: Tensor) -> Tensor:
        return lora_linear_reference(*tensors, scale, p, keep)

    actual, again = run(ours, case, case.dtype), run(ours, case, case.dtype)
    eager, exact = run(reference, case, case.dtype), run(reference, case, torch.float64)
    for name, value in actual.items():
        # A and B are cast to x's dtype for the products, so that dtype sets the budget of their
        # gradients
        assert_within_budget(value, eager[name].to(case.dtype), exact[name], name)
        assert torch.equal(value, again[name]), f"{name} differs between two runs"
        assert value.dtype == (torch.float32 if name in ("da", "db") else case.dtype), name
    return actual


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", (1, 4, 8, 16, 17, 64))
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_rank_dtype_dropout(dtype: torch.dtype, rank: int, dropout: float) -> None:
    case = Case(rank=rank, dtype=dtype, dropout=dropout, inputs=48, outputs=40, ids=rank % 8 > 0)
    check(lora_linear, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ((1,), (31,), (2, 5, 7), (1, 1, 63), (65,)), ids=str)
@pytest.mark.parametrize("inputs", (1, 33, 64))
@pytest.mark.parametrize("bias", (True, False))
def test_shapes(dtype: torch.dtype, rows: tuple[int, ...], inputs: int, bias: bool) -> None:
    check(lora_linear, Case(rows=rows, inputs=inputs, outputs=37, rank=4, dtype=dtype, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_strided_operands(dtype: torch.dtype, dropout: float) -> None:
    check(lora_linear, Case(rows=(3, 11), dtype=dtype, dropout=dropout, strided=True))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_long_sums_are_accumulated_in_fp32(dtype: torch.dtype) -> None:
    """4096 rows into dA and dB: a 16-bit accumulator would be off by far more than one rounding."""
    check(lora_linear, Case(rows=(4096,), inputs=64, outputs=16, rank=2, dtype=dtype))


def test_no_rows() -> None:
    x, w, bias, a, b, _ = operands(Case(rows=(3,)))
    a.requires_grad_()
    y = lora_linear(x[:0], w, bias, a, b, 1.0, 0.1, SEED)
    y.sum().backward()
    assert y.shape == (0, 32)
    assert a.grad is not None and not a.grad.any()


def test_16_bit_factors_with_a_wide_input() -> None:
    """The scale is folded into B before any narrowing: B in bf16 must not cost an fp32 result."""
    x, w, bias, a, b, _ = operands(Case())
    a, b = a.bfloat16(), b.bfloat16()
    got = lora_linear(x, w, bias, a, b, 1.75)
    eager = lora_linear_reference(x, w, bias, a, b, 1.75)
    exact = lora_linear_reference(x.double(), w.double(), bias.double(), a, b, 1.75)
    assert_within_budget(got, eager, exact)


@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("bias", (True, False))
def test_gradcheck(dropout: float, bias: bool) -> None:
    case = Case(rows=(2, 3), inputs=5, outputs=4, rank=2, dtype=torch.float64, bias=bias)
    x, w, b0, a, b, _ = operands(case)
    keep = (keep_mask(SEED, 6, 5, dropout, CPU) != 0).view(2, 3, 5)
    leaves = tuple(t.requires_grad_() for t in (x, a, b))

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, w, b0, a, b, 1.75, dropout, SEED)

    def reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear_reference(x, w, b0, a, b, 1.75, dropout, keep)

    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradcheck(reference, leaves)


def test_reference_is_the_published_formula() -> None:
    """The specification against scalar loops, so that the two do not share a mistake."""
    x, w, bias, a, b, _ = operands(Case(rows=(3,), inputs=4, outputs=5, rank=2))
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    got = lora_linear_reference(x, w, bias, a, b, 0.5, 0.25, keep)
    for m in range(3):
        for n in range(5):
            y = float(bias[n]) + sum(float(x[m, k] * w[n, k]) for k in range(4))
            for i in range(2):
                s = sum(float(x[m, k] * a[i, k]) / 0.75 for k in range(4) if keep[m, k])
                y += 0.5 * s * float(b[n, i])
            assert float(got[m, n]) == pytest.approx(y, abs=1e-5)


# --- bugs that must not survive: (name, text in torch_path.py, what a careless author would write)
BUGS = (
    ("mask missing in dx", "apply_mask_(dx, keep)", "pass"),
    ("mask missing in dA", "x if keep is None else apply_mask(x, keep)", "x"),
    ("mask redrawn in backward", "keep_mask(seed, dy.shape[0]", "keep_mask(seed + 1, dy.shape[0]"),
    ("ids of rows forgotten in y", "x.device, row_ids)", "x.device)"),
    ("ids of rows forgotten in backward", "dy.device, row_ids)", "dy.device)"),
    ("scale missing in dB", "db.mul_(scale)", "pass"),
    ("scale missing in dS", "scaled(lora_b, scale, dy.dtype)", "lora_b.to(dy.dtype)"),
    ("scale squared in y", "scaled(lora_b, scale, x.dtype)", "scaled(lora_b, scale**2, x.dtype)"),
    (
        "W transposed in y",
        "products.addmm_(y_mn, x, weight.t())",
        "products.addmm_(y_mn, x, weight)",
    ),
    (
        "W transposed in dx",
        "products.addmm_(dx, dy, weight)",
        "products.addmm_(dx, dy, weight.t())",
    ),
    ("base term missing", "products.addmm_(y_mn, x, weight.t())", "y_mn"),
    ("bias missing", "products.mm(s_mr, scaled_b.t(), row)", "products.mm(s_mr, scaled_b.t())"),
    ("y zeroed", "products.addmm_(y_mn, x, weight.t())", "y_mn.zero_()"),
    ("dx zeroed", "products.addmm_(dx, dy, weight)", "dx.zero_()"),
    ("dA zeroed", "_wide_product(ds_mr.t(), kept_mk)", "_wide_product(0 * ds_mr.t(), kept_mk)"),
    ("A rounded", "products.mm(kept_mk, lora_a", "products.mm(kept_mk, lora_a.bfloat16()"),
)


def test_bug_in_the_scale_of_dropout_is_noticed(tmp_path: Path) -> None:
    broken = load_copy(tmp_path, api, "scale = scale / (1 - dropout_p)", "pass").lora_linear
    with pytest.raises(AssertionError, match="over its budget"):
        check(broken, Case())


@pytest.mark.parametrize(("bug", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_bug_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str, old: str, new: str
) -> None:
    monkeypatch.setattr(api, "torch_path", load_copy(tmp_path, torch_path, old, new))
    with pytest.raises(AssertionError, match="over its budget"):
        check(lora_linear, Case(ids=True))


@pytest.mark.parametrize("module", (torch_path, api))
def test_unchanged_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    """The harness of the bugs adds none of its own."""
    start = "from __future__ import annotations"
    copy = load_copy(tmp_path, module, start, start)
    monkeypatch.setattr(api, "torch_path", copy if module is torch_path else torch_path)
    check(lora_linear if module is torch_path else copy.lora_linear, Case())


# --- dropout


@pytest.mark.parametrize("p", (0.0, 2**-16, 0.05, 0.1, 0.5, 0.999999))
def test_keep_rate(p: float) -> None:
    kept = keep_mask(SEED, 1021, 577, p, CPU)
    assert kept.shape == (1021, 577)
    assert set(kept.unique().tolist()) <= {0, -1}
    n, q = kept.numel(), min(round(p * 65536), 65535) / 65536
    dropped = int((kept == 0).sum())
    assert abs(dropped - n * q) <= 5 * (n * q * (1 - q)) ** 0.5
    assert abs(q - p) <= 1 / 65536


@pytest.mark.parametrize("p", (0.05, 0.1, 0.5))
def test_mask_has_no_structure(p: float) -> None:
    """Rates, neighbours, rectangles, largest singular value: as of independent bits."""
    kept = (keep_mask(SEED, 512, 1024, p, CPU) != 0).double()
    z = (kept - (1 - p)) / (p * (1 - p)) ** 0.5  # zero mean, unit variance

    def score(products: Tensor) -> float:  # |standard normal| if independent
        return abs(float(products.sum())) / products.numel() ** 0.5

    assert float((z.sum(1) ** 2).mean()) / 1024 == pytest.approx(1, abs=0.3)
    assert float((z.sum(0) ** 2).mean()) / 512 == pytest.approx(1, abs=0.2)
    for shift in (1, 2, 3):  # columns 2j and 2j + 1 are the lanes of one word
        assert score(z[:, shift:] * z[:, :-shift]) < 5
        assert score(z[shift:] * z[:-shift]) < 5
    for lane in (0, 1):  # the sum a_i + b_j alone fails here, at 12 standard deviations and more
        corner = z[:, lane::2].reshape(256, 2, 256, 2)
        assert score(corner.prod(3).prod(1)) < 5
        largest = float(torch.linalg.svdvals(z[:, lane::2])[0])
        assert largest == pytest.approx(2 * 512**0.5, rel=0.06)  # Marchenko-Pastur edge


def test_masks_of_different_seeds_are_unrelated() -> None:
    masks = torch.stack([keep_mask(s, 64, 256, 0.5, CPU).flatten() for s in range(8)])
    signs = 2 * masks.double() + 1
    overlap = signs @ signs.T / signs.shape[1]
    assert float((overlap - torch.eye(8)).abs().max()) < 5 / signs.shape[1] ** 0.5
    assert torch.equal(masks[7], keep_mask(7, 64, 256, 0.5, CPU).flatten())


def test_a_named_row_has_its_mask_wherever_it_lies() -> None:
    whole = keep_mask(SEED, 64, 96, 0.3, CPU)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_mask(SEED, 64, 96, 0.3, CPU, order.int()), whole[order])
    part = torch.tensor([63, 5, 5], dtype=torch.int32)
    assert torch.equal(keep_mask(SEED, 3, 96, 0.3, CPU, part), whole[part.long()])
    high = keep_mask(SEED, 1, 96, 0.3, CPU, torch.tensor([-1], dtype=torch.int32))
    assert not any(torch.equal(high[0], row) for row in whole)


def test_dropped_values_are_zero_whatever_they_were() -> None:
    x = torch.tensor([[torch.inf, torch.nan, -3.0, -0.0]])
    got = apply_mask(x, torch.tensor([[0, 0, 0, -1]], dtype=torch.int16))
    assert got.view(torch.int32).tolist() == [[0, 0, 0, -(2**31)]]


def test_torch_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    check(lora_linear, Case())
    assert torch.equal(before, torch.get_rng_state())


def test_checkpointing_recomputes_the_same_mask() -> None:
    """The seed is drawn inside the checkpointed region, as the layer does."""
    x, w, bias, a, b, dy = operands(Case(dtype=torch.bfloat16))

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        seed = int(torch.randint(api.SEEDS - 1, ()))
        return lora_linear(x, w, bias, a, b, 1.75, 0.5, seed)

    results = []
    for wrapped in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        torch.manual_seed(0)
        y = checkpoint(layer, *leaves, use_reentrant=False) if wrapped else layer(*leaves)
        torch.rand(3)  # what follows moves the generator on before backward recomputes
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


# --- what is kept, what is skipped


@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_saved_tensors(dropout: float) -> None:
    """x, S and the three weights, as the very objects; no mask, no dropped or widened copy of x."""
    x, w, bias, a, b, _ = operands(Case(rows=(2, 20), inputs=32, rank=4, dtype=torch.bfloat16))
    x.requires_grad_()
    w = torch.nn.Parameter(w, requires_grad=False)
    a, b = torch.nn.Parameter(a), torch.nn.Parameter(b)
    saved: list[Tensor] = []
    unpacked: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: (unpacked.append(t), t)[1]):
        y = lora_linear(x, w, bias, a, b, 1.75, dropout, SEED)
    assert [t.data_ptr() for t in saved if t.numel() > 160] == [t.data_ptr() for t in (x, w)]
    small = [t for t in saved if t is not a and t is not b and t.numel() <= 160]
    assert [(tuple(t.shape), t.dtype) for t in small] == [((40, 4), torch.bfloat16)]
    y.sum().backward()
    for parameter in (w, a, b):
        assert any(t is parameter for t in unpacked)


def test_weights_replaced_behind_the_object_are_used_in_backward() -> None:
    """ZeRO-3 empties a parameter after forward and fills it again, elsewhere, before backward."""
    x, w, bias, a, b, dy = operands(Case())
    x.requires_grad_()
    weight = torch.nn.Parameter(w, requires_grad=False)
    y = lora_linear(x, weight, bias, a, b, 1.75)
    weight.data = torch.empty(0)
    weight.data = w.clone()
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_within_budget(dx, dx, dy.double() @ (w + 1.75 * b @ a).double())


@pytest.mark.parametrize("wanted", [{"x"}, {"a"}, {"b"}, {"x", "b"}, {"a", "b"}])
def test_only_wanted_gradients_are_computed(wanted: set[str]) -> None:
    """Each gradient equals that of a full run; the products of the others do not happen."""
    case = Case(rows=(31,), inputs=24, outputs=40, rank=4)
    x, w, bias, a, b, dy = operands(case)
    full = run(lambda *t: lora_linear(*t, 1.75, 0.1, SEED), case, torch.float32)
    leaves = {"x": x, "a": a, "b": b}
    for name in wanted:
        leaves[name].requires_grad_()
    y = lora_linear(x, w, bias, a, b, 1.75, 0.1, SEED)
    with torch.profiler.profile(record_shapes=True) as profile:
        grads = torch.autograd.grad(y, [leaves[name] for name in sorted(wanted)], dy)
    for name, grad in zip(sorted(wanted), grads, strict=True):
        assert torch.equal(grad, full["d" + name])
    products = [e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::addmm_")]
    expected = {"x": 2, "a": 1, "b": 1}
    ds = 1 if wanted & {"x", "a"} else 0
    assert len(products) == ds + sum(expected[name] for name in wanted), products


def test_autocast_changes_nothing() -> None:
    case = Case()
    plain = run(lambda *t: lora_linear(*t, 1.75, 0.1, SEED), case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(lambda *t: lora_linear(*t, 1.75, 0.1, SEED), case, torch.float32)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


def test_double_backward_is_refused() -> None:
    x, w, bias, a, b, _ = operands(Case())
    x.requires_grad_()
    y = lora_linear(x, w, bias, a, b, 1.0)
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(3, 32, dtype=torch.int64)}, r"x.dtype is torch.int64; it must be one of"),
        ({"x": torch.ones(3, 32).half()}, r"weight.dtype is torch.float32; .* x's, torch.float16"),
        ({"x": torch.tensor(1.0)}, r"x.shape is \(\); it must be \(..., K\)"),
        ({"weight": torch.ones(32, 31)}, r"weight.shape is \(32, 31\); it must be \(N, 32\)"),
        ({"weight": torch.empty(0)}, r"weight.shape is \(0,\); it must be \(N, 32\)"),
        ({"lora_a": torch.ones(8, 31)}, r"lora_a.shape is \(8, 31\); it must be \(r, 32\)"),
        ({"lora_a": torch.ones(0, 32)}, r"rank is 0; it must be at least 1"),
        ({"lora_b": torch.ones(8, 32)}, r"lora_b.shape is \(8, 32\); it must be \(32, 8\)"),
        ({"lora_b": torch.ones(32, 8).long()}, r"lora_b.dtype is torch.int64"),
        ({"bias": torch.ones(31)}, r"bias.shape is \(31,\); it must be \(32,\)"),
        ({"bias": torch.ones(32, device="meta")}, r"bias.device is meta; it must be x's, cpu"),
        ({"weight": torch.ones(32, 32, requires_grad=True)}, r"weight.requires_grad is True"),
        ({"scale": float("nan")}, r"scale is nan; it must be finite"),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0; it must be in \[0, 1\)"),
        ({"dropout_p": -0.1}, r"dropout_p is -0.1"),
        ({"dropout_p": 0.1}, r"seed is None; it must be an int in"),
        ({"dropout_p": 0.1, "seed": -1}, r"seed is -1"),
        (
            {"row_ids": torch.ones(3)},
            r"row_ids is \(\(3,\), torch.float32\); it must be \(\d+,\), torch.int32",
        ),
        ({"row_ids": torch.ones(2).int()}, r"row_ids is \(\(2,\), torch.int32\)"),
        ({"impl": "cuda"}, r"impl is cuda; it must be one of auto, torch, triton"),
    ],
)
def test_bad_argument(changes: dict[str, object], message: str) -> None:
    x, weight, bias, lora_a, lora_b, _ = operands(Case())
    good = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**good, "scale": 1.0, **changes})


def test_triton_is_refused_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "interpreting", lambda: False)
    x, w, bias, a, b, _ = operands(Case())
    with pytest.raises(NotImplementedError, match="Triton does not run on cpu.*TRITON_INTERPRET=1"):
        lora_linear(x, w, bias, a, b, 1.0, impl="triton")


@pytest.mark.parametrize(
    ("dtype", "rank", "message"),
    [(torch.float64, 4, "x.dtype is torch.float64"), (torch.float32, 257, "rank is 257")],
)
def test_what_triton_does_not_take(dtype: torch.dtype, rank: int, message: str) -> None:
    x, w, bias, a, b, _ = operands(Case(dtype=dtype, rank=rank))
    with pytest.raises(ValueError, match=message):
        lora_linear(x, w, bias, a, b, 1.0, impl="triton")
    lora_linear(x, w, bias, a, b, 1.0)


def test_auto_says_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    runtime._auto.cache_clear()
    x, w, bias, a, b, _ = operands(Case())
    with caplog.at_level(logging.INFO, "flex.kernels"):
        for _ in range(3):
            lora_linear(x, w, bias, a, b, 1.0)
    assert [r.message for r in caplog.records] == ["lora_linear on cpu: torch (the device is cpu)"]


# --- torch.compile


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("dropout", (0.0, 0.1))
@pytest.mark.parametrize("wanted", ({"x", "a", "b"}, {"a", "b"}), ids=("all", "a and b"))
def test_compiles_to_one_graph(impl: str, dropout: float, wanted: set[str]) -> None:
    if impl == "triton" and not runtime.interpreting():
        pytest.skip("needs TRITON_INTERPRET=1")
    x, w, bias, a, b, dy = operands(Case(rows=(3, 5)))
    ids = row_ids(15)
    leaves = {"x": x, "a": a, "b": b}
    for name in wanted:
        leaves[name].requires_grad_()

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(
            x.tanh(), w, bias, a, b, 1.75, dropout, SEED, impl=impl, row_ids=ids
        ).sin()

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = function(x, a, b)
        results.append((y, *torch.autograd.grad(y, [leaves[n] for n in sorted(wanted)], dy)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_the_operator_keeps_its_promises() -> None:
    """Schema, fake kernel, autograd registration: torch's own checks."""
    from flex.kernels.lora_linear.ops import lora_forward

    x, w, bias, a, b, _ = operands(Case(rows=(2, 5)))
    for leaf in (x, a, b):
        leaf.requires_grad_()
    options = (0.5, 0.1, 7, "torch", "auto")
    for ids in (None, row_ids(10)):
        torch.library.opcheck(lora_forward, (x, w, bias, a, b, *options, ids))
