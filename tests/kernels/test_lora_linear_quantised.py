"""`lora_linear` over bitsandbytes' weights: the dense path's numbers to the bit, and one dense copy."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flex.kernels.lora_linear import lora_linear, packed, quantised
from flex.kernels.lora_linear.reference import lora_linear_reference
from tests.kernels.test_lora_linear import row_ids
from tests.oracle import assert_within_budget

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

SEED = 4321
N, K, RANK = 48, 128, 8
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight_of(kind: str, n: int = N, k: int = K, made_from: torch.dtype = torch.bfloat16, **fields):
    """A packed weight as its layer holds it, of random numbers with rows of unequal size."""
    g = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=g) * k**-0.5 * torch.linspace(0.5, 4, n)[:, None]
    if kind in ("nf4", "fp4", "nf4 double"):
        double = kind == "nf4 double"
        weight = bitsandbytes.nn.Params4bit(
            w.to(made_from), quant_type=kind[:3], compress_statistics=double, **fields
        )
        return weight.to("cpu")
    weight = bitsandbytes.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False).to("cpu")
    if kind == "int8":
        return weight
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB = weight.CB, weight.SCB
    return state


KINDS = ["nf4", "nf4 double", "fp4", "int8", "int8 state"]


def by_definition(weight) -> Tensor:
    """W (N, K) fp32, spelt out: no bitsandbytes product, no blocks, no scratch."""
    if not hasattr(weight, "quant_state"):
        return packed.packed_tensor(weight).float() * (weight.SCB[:, None] * (1.0 / 127.0))
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        blocks = torch.arange(absmax.numel()) // inner.blocksize
        absmax = inner.code[absmax.long()] * inner.absmax[blocks] + state.offset
    stored = weight.detach().reshape(-1).view(torch.uint8)
    pairs = torch.stack([stored >> 4, stored & 15], 1).reshape(-1)
    flat = state.code[pairs.long()]
    flat = flat * absmax.repeat_interleave(state.blocksize)[: flat.numel()]
    return flat.view(state.shape)


def operands(dtype: torch.dtype, n: int = N, k: int = K, rows: tuple[int, ...] = (3, 7)):
    g = torch.Generator().manual_seed(7)
    x = torch.randn(*rows, k, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(n, generator=g).to(dtype)
    a = (torch.randn(RANK, k, generator=g) * k**-0.5).requires_grad_()
    b = (torch.randn(n, RANK, generator=g) * RANK**-0.5).requires_grad_()
    return x, bias, a, b, torch.randn(*rows, n, generator=g).to(dtype)


def results(weight, dtype, p=0.1, layer=None, impl="torch", n=N, k=K) -> dict[str, Tensor]:
    x, bias, a, b, dy = operands(dtype, n, k)

    def plain(x, a, b):
        return lora_linear(x, weight, bias, a, b, 1.75, p, SEED, impl, row_ids=row_ids(21))

    y = (layer or (lambda f, *t: f(*t)))(plain, x, a, b)
    gradients = torch.autograd.grad(y, (x, a, b), dy)
    return dict(zip(("y", "dx", "da", "db"), (y.detach(), *gradients), strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert value.any(), f"{name} is zero: it proves nothing"
        assert torch.equal(found[name], value), name


# --- the dense form


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_definition(kind, dtype) -> None:
    weight = weight_of(kind)
    found, expected = packed.dense(weight, dtype), by_definition(weight)
    assert found.dtype == dtype and found.is_contiguous()
    # one rounding; double quantisation may round its sum otherwise
    torch.testing.assert_close(found, expected.to(dtype))
    assert (found.float() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("k", [32, 96, 100, 160])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_run_over_the_ends_of_rows(kind, k) -> None:
    """Where bitsandbytes' own CPU dequantisation of (N, K) starts a block at every row."""
    weight = weight_of(kind, k=k)
    torch.testing.assert_close(packed.dense(weight, torch.float32), by_definition(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_do_not_change_a_bit(kind, monkeypatch) -> None:
    weight = weight_of(kind)
    whole = packed.dense(weight, torch.bfloat16).clone()
    monkeypatch.setattr(packed, "STEP", 4096 // 8 * 3)  # the last step is short
    assert torch.equal(packed.dense(weight, torch.bfloat16), whole)


def test_other_storage_is_the_same_weight() -> None:
    """FSDP stores four bits as bf16 or the like."""
    one, other = weight_of("nf4"), weight_of("nf4", quant_storage=torch.bfloat16)
    assert other.dtype == torch.bfloat16
    assert torch.equal(packed.dense(other, torch.float32), packed.dense(one, torch.float32))


# --- the layer


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_dense_path_to_the_bit(kind, dtype, p) -> None:
    weight = weight_of(kind)
    dense = packed.dense(weight, dtype).clone()
    assert_equal(results(weight, dtype, p), results(dense, dtype, p))


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_gradients_are_those_of_the_specification(kind) -> None:
    weight = weight_of(kind)
    x, bias, a, b, dy = operands(torch.float32)

    def reference(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, a, b)]
        dense = by_definition(weight).to(dtype)
        y = lora_linear_reference(
            leaves[0], dense, bias.to(dtype), leaves[1], leaves[2], 1.75, 0.0, None
        )
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

    found = results(weight, torch.float32, 0.0)
    for (name, value), eager, truth in zip(
        found.items(), reference(torch.float32), reference(torch.float64), strict=True
    ):
        assert_within_budget(value, eager, truth, name)


def test_the_triton_path_takes_it_too() -> None:
    weight = weight_of("nf4 double")
    dense = packed.dense(weight, torch.float32).clone()
    found = results(weight, torch.float32, impl="triton")
    assert_equal(found, results(dense, torch.float32, impl="triton"))


@pytest.mark.parametrize("kind", ["nf4", "int8 state"])
def test_checkpointing_gives_the_same_bits(kind) -> None:
    weight = weight_of(kind)
    plain = results(weight, torch.bfloat16)
    wrapped = results(
        weight, torch.bfloat16, layer=lambda f, *t: checkpoint(f, *t, use_reentrant=False)
    )
    assert_equal(wrapped, plain)


def test_two_layers_do_not_share_a_result(monkeypatch) -> None:
    """The scratch memory of one is overwritten by the next, before either's backward."""
    monkeypatch.setattr(packed, "STEP", 4096)
    first, second = weight_of("nf4"), weight_of("nf4 double")

    def both(one, other):
        x, bias, a, b, dy = operands(torch.bfloat16)
        ys = [lora_linear(x, w, bias, a, b, 1.0, 0.1, SEED) for w in (one, other)]
        return [*ys, *torch.autograd.grad(ys, (x, a, b), (dy, 2 * dy))]

    found = both(first, second)
    dense = [packed.dense(w, torch.bfloat16).clone() for w in (first, second)]
    assert all(torch.equal(f, e) for f, e in zip(found, both(*dense), strict=True))


# --- what is kept, and when W is made


def counted(monkeypatch) -> list[torch.dtype]:
    calls: list[torch.dtype] = []
    dense = quantised.dense
    monkeypatch.setattr(quantised, "dense", lambda w, d: calls.append(d) or dense(w, d))
    return calls


def test_the_dense_weight_is_not_kept_for_backward(monkeypatch) -> None:
    calls = counted(monkeypatch)
    weight = weight_of("nf4")
    x, bias, a, b, _ = operands(torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, weight, bias, a, b, 1.0)
    assert calls == [torch.bfloat16]
    assert max(t.numel() for t in saved) < N * K
    y.sum().backward()
    assert calls == [torch.bfloat16] * 2
    assert weight.grad is None


def test_no_dense_weight_in_backward_where_no_dx_is_needed(monkeypatch) -> None:
    calls = counted(monkeypatch)
    weight = weight_of("nf4")
    x, bias, a, b, dy = operands(torch.bfloat16)
    y = lora_linear(x.detach(), weight, bias, a, b, 1.0)
    found = torch.autograd.grad(y, (a, b), dy)
    assert len(calls) == 1
    dense = packed.dense(weight, torch.bfloat16).clone()
    y = lora_linear(x.detach(), dense, bias, a, b, 1.0)
    assert all(map(torch.equal, found, torch.autograd.grad(y, (a, b), dy)))


# --- refusals


def test_what_cannot_be_made_dense_is_refused() -> None:
    x, bias, a, b, _ = operands(torch.bfloat16)
    raw = torch.randn(N, K)

    def call(weight, x=x, bias=bias):
        return lora_linear(x, weight, bias, a, b, 1.0)

    with pytest.raises(ValueError, match="4-bit weight is not quantised yet"):
        call(bitsandbytes.nn.Params4bit(raw))
    with pytest.raises(ValueError, match="8-bit weight is not quantised yet"):
        call(bitsandbytes.nn.Int8Params(raw, requires_grad=False))
    with pytest.raises(ValueError, match=r"weight.shape is \(48, 128\)"):
        call(weight_of("nf4"), x[..., :64])
    with pytest.raises(ValueError, match="x.dtype over a 4-bit weight"):
        call(weight_of("nf4"), x.double(), bias.double())
    repacked = weight_of("nf4", n=64)
    repacked.quant_state = copy.copy(repacked.quant_state)
    repacked.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked"):
        lora_linear(x, repacked, None, a, torch.randn(64, RANK), 1.0)


# --- torch.compile


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_works_under_torch_compile(caplog) -> None:
    weight = weight_of("nf4")
    plain = results(weight, torch.bfloat16)
    torch.compiler.reset()
    quantised._told.clear()
    with caplog.at_level(logging.INFO, "flex.kernels"):
        found = results(
            weight,
            torch.bfloat16,
            layer=lambda f, *t: torch.compile(lambda *u: 1 * f(*u), backend="aot_eager")(*t),
        )
    assert_equal(found, plain)
    assert [r.message for r in caplog.records if "stays out" in r.message]


# --- bitsandbytes' own products: they may repack the weight, or run code from the Hub


def test_only_the_dequantisation_is_bitsandbytes_own(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a product of bitsandbytes was called")

    for name in ("gemv_4bit", "_convert_weight_packed_for_cpu"):
        monkeypatch.setattr(functional, name, refuse)
    for name in ("matmul_4bit", "matmul"):
        monkeypatch.setattr(bitsandbytes, name, refuse)
    for kind in KINDS:
        weight = weight_of(kind)
        before = packed.packed_tensor(weight).clone()
        x, bias, a, b, _ = operands(torch.bfloat16, rows=(1,))
        with torch.no_grad():
            lora_linear(x, weight, bias, a, b, 1.0)
        results(weight, torch.bfloat16)
        assert torch.equal(packed.packed_tensor(weight), before)
