"""RMSNorm, SwiGLU, causal softmax in C: the error budget against fp64, NaN, threads, no compiler, seeded bugs."""

import logging
import platform

import pytest
import torch

from flex.kernels.budget import budget_used
from flex.kernels.pointwise import (
    api,
    causal_softmax_,
    causal_softmax_backward_,
    causal_softmax_backward_reference,
    causal_softmax_reference,
    cross_entropy_into,
    native,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)
from tests.mutants import compiled_anew, load_copy, without_a_compiler

SOFTMAX = [(1, 1, 1), (2, 16, 1), (1, 17, 3), (3, 2, 4), (2, 67, 2)]  # batch, length, groups
SHAPES = [(1, 1), (3, 17), (2, 5, 64), (1, 7, 576), (130, 33)]
EPS = 1e-5


def bf16(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).bfloat16()


def with_gradients(function, inputs, dy):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves)]


def check(function, reference, inputs, dy) -> None:
    """Output and gradients within the budget that plain bf16 operations set."""
    found = with_gradients(function, inputs, dy)
    eager = with_gradients(reference, inputs, dy)
    exact = with_gradients(reference, [x.double() for x in inputs], dy)
    for got, plain, truth in zip(found, eager, exact, strict=True):
        assert budget_used(got, plain, truth) <= 1


def check_rms_norm(shape) -> None:
    weight = 1 + bf16(shape[-1], seed=1, scale=0.3)
    check(
        lambda x: rms_norm(x, weight.to(x.dtype), EPS),
        lambda x: rms_norm_reference(x, weight.to(x.dtype), EPS),
        [bf16(*shape, seed=0, scale=2.0)],
        bf16(*shape, seed=2),
    )


def check_swiglu(shape) -> None:
    inputs = [bf16(*shape, seed=0, scale=4.0), bf16(*shape, seed=1)]
    check(swiglu, swiglu_reference, inputs, bf16(*shape, seed=2))


def check_softmax(batch: int, length: int, groups: int) -> None:
    """Forward and backward; what a row does not see is NaN before, is never read, and is 0 after."""
    scores, dp = (bf16(batch, length * groups, length, seed=s, scale=6.0) for s in (0, 1))
    eager, exact = (causal_softmax_reference(x, groups, 0.3) for x in (scores, scores.double()))
    hidden = torch.arange(length) > torch.arange(length * groups)[:, None] // groups
    p = causal_softmax_(scores.masked_fill(hidden, torch.nan), groups, 0.3)
    assert budget_used(p, eager, exact) <= 1
    eager, exact = (
        causal_softmax_backward_reference(p.to(t), dp.to(t), groups, 0.3)
        for t in (torch.bfloat16, torch.float64)
    )
    ds = causal_softmax_backward_(p, dp.masked_fill(hidden, torch.nan), groups, 0.3)
    assert budget_used(ds, eager, exact) <= 1


@pytest.mark.parametrize("shape", SOFTMAX, ids=str)
def test_causal_softmax_within_the_budget_of_plain_operations(shape):
    check_softmax(*shape)


def test_causal_softmax_of_large_scores_and_of_nan():
    check_large_scores()


def check_large_scores() -> None:
    scores = bf16(1, 40, 40, seed=0, scale=3e4)
    scores[0, 30, 2] = torch.nan
    p = causal_softmax_(scores.clone(), 1, 1.0).float()
    assert p[0, 30, :31].isnan().all() and p.isnan().sum() == 31
    p[0, 30], scores[0, 30] = 0, 0
    truth = causal_softmax_reference(scores.float(), 1, 1.0)
    torch.testing.assert_close(p[:, :30], truth[:, :30], atol=2**-9, rtol=2**-8)


def test_a_softmax_of_another_shape_is_refused_and_other_dtypes_take_the_reference():
    with pytest.raises(ValueError, match="scores.shape"):
        causal_softmax_(bf16(1, 6, 4, seed=0), 2, 1.0)
    with pytest.raises(ValueError, match="dp.shape"):
        causal_softmax_backward_(bf16(1, 4, 4, seed=0), bf16(1, 3, 3, seed=0), 1, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        causal_softmax_(bf16(1, 4, 4, seed=0).transpose(1, 2), 1, 1.0)
    x = torch.randn(2, 6, 3)
    assert torch.equal(causal_softmax_(x.clone(), 2, 0.5), causal_softmax_reference(x, 2, 0.5))
    long = torch.zeros(1, native.LONGEST + 1, native.LONGEST + 1, dtype=torch.bfloat16)
    assert causal_softmax_(long, 1, 1.0)[0, 1, 1] == 0.5


def check_cross_entropy(rows: int, size: int) -> None:
    """Value and gradient against fp64, into another tensor and into the logits themselves."""
    logits = bf16(rows, size, seed=0, scale=4.0)
    labels = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(1))
    leaf = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(leaf, labels, reduction="sum")
    (truth,) = torch.autograd.grad(0.37 * exact, leaf)
    grad = torch.empty_like(logits)
    value = cross_entropy_into(logits, labels, 0.37, grad)
    torch.testing.assert_close(value, exact.detach(), rtol=1e-6, atol=1e-6)
    # rounded once, from fp32
    torch.testing.assert_close(grad.double(), truth, rtol=2**-8, atol=1e-9)
    assert torch.equal(cross_entropy_into(logits.clone(), labels, 0.37, None), value)
    inside = logits.clone()
    assert torch.equal(cross_entropy_into(inside, labels, 0.37, inside), value)
    assert torch.equal(inside, grad)


ENTROPIES = [(1, 1), (3, 17), (5, 2048), (4, 2049), (2, 5003)]


@pytest.mark.parametrize("shape", ENTROPIES, ids=str)
def test_cross_entropy(shape, poison):
    check_cross_entropy(*shape)


def test_cross_entropy_of_large_logits_and_of_nan():
    logits = torch.tensor([[3e4, -3e4, 0.0], [0.0, 0.0, 3e4]]).bfloat16()
    grad = torch.empty_like(logits)
    value = cross_entropy_into(logits, torch.tensor([1, 2]), 1.0, grad)
    assert value == 2 * logits[0, 0].double()
    torch.testing.assert_close(
        grad.float(), torch.tensor([[1.0, -1, 0], [0, 0, 0]]), atol=1e-20, rtol=0
    )
    logits[0, 2] = torch.nan
    assert cross_entropy_into(logits, torch.tensor([0, 0]), 1.0, grad).isnan()
    assert grad[0].isnan().all() and not grad[1].isnan().any()


def test_cross_entropy_refuses_what_it_cannot_read():
    logits, labels = bf16(2, 5, seed=0), torch.tensor([0, 4])
    for bad in (torch.tensor([0, 5]), torch.tensor([-100, 0])):
        with pytest.raises(ValueError, match="a label"):
            cross_entropy_into(logits, bad, 1.0, None)
    with pytest.raises(ValueError, match="labels.shape"):
        cross_entropy_into(logits, labels[:1], 1.0, None)
    with pytest.raises(ValueError, match="grad"):
        cross_entropy_into(logits, labels, 1.0, logits.float())
    with pytest.raises(ValueError, match="logits"):
        cross_entropy_into(logits.t().contiguous().t(), labels, 1.0, None)
    assert cross_entropy_into(logits[:0], labels[:0], 1.0, None) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("check_one", [check_rms_norm, check_swiglu], ids=["rms_norm", "swiglu"])
def test_within_the_budget_of_plain_operations(check_one, shape):
    assert native.library() is not None
    check_one(shape)


def test_every_bf16_number_has_its_swiglu():
    check_every_gate()


def check_every_gate() -> None:
    """All finite gates below 80: forward equals plain operations but for the last bit of exp."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.float().abs() < 80]
    plain, found = (f(gate, torch.ones_like(gate)).float() for f in (swiglu_reference, swiglu))
    assert ((plain - found).abs() <= 2**-7 * plain.abs() + 1e-24).all()
    normal = plain.abs() >= 2.0**-126  # the instruction that narrows makes others 0
    assert (plain == found)[normal].float().mean() > 0.99


def test_nan_stays_in_its_row():
    x = bf16(4, 32, seed=0)
    x[1, 3] = float("nan")
    y = rms_norm(x, torch.ones(32).bfloat16(), EPS)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    assert swiglu(x, torch.ones_like(x)).isnan().sum() == 1


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads, monkeypatch):
    x, weight = bf16(1100, 577, seed=0), torch.ones(577).bfloat16()
    scores = bf16(3, 500, 500, seed=1)

    def run():
        p = causal_softmax_(scores.clone(), 1, 2.0)
        loss = cross_entropy_into(x, torch.arange(1100) % 577, 0.5, grad := torch.empty_like(x))
        softmax = p, causal_softmax_backward_(p, p * p, 1, 2.0)
        return rms_norm(x, weight, EPS), swiglu(x, x), *softmax, loss, grad

    alone = run()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for a, b in zip(alone, run(), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs():
    wide = bf16(6, 64, seed=0)
    x = wide.t()
    assert torch.equal(swiglu(x, x), swiglu(x.contiguous(), x.contiguous()))
    weight = torch.ones(6).bfloat16()
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x.contiguous(), weight, EPS))


def test_what_the_c_functions_do_not_take_is_the_reference():
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))
    trained = torch.ones(8).bfloat16().requires_grad_()
    rms_norm(x.bfloat16(), trained, EPS).sum().backward()
    assert trained.grad is not None
    with pytest.raises(ValueError, match="weight.shape"):
        rms_norm(x, weight[:4], EPS)
    with pytest.raises(ValueError, match="up.shape"):
        swiglu(x, x[:1])


def test_without_a_compiler_plain_operations_take_its_place(monkeypatch, caplog):
    x = bf16(3, 8, seed=0)
    with without_a_compiler(native.library, monkeypatch):
        with caplog.at_level(logging.WARNING, "flex.kernels"):
            assert torch.equal(swiglu(x, x), swiglu_reference(x, x))
            swiglu(x, x)
        assert caplog.text.count("take its place") == 1


BUGS = {
    "eps left out": ("sum / (float)size + eps", "sum / (float)size + 0.1f"),
    "no weight": ("wide(w[i]) * wide(narrow(", "wide(narrow("),
    "last of a row missed": ("i < size; i++) sum +=", "i < size - 1; i++) sum +="),
    "projection left out": (" - wide(in[i]) * along", ""),
    "scale once": ("* s * s;", "* s;"),
    "truncated": ("(v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16", "v.u >> 16"),
    "gate's slope": ("(1.0f + g * (1.0f - s))", "1.0f"),
    "up's gradient": ("narrow(d * (g * s))", "narrow(d * g)"),
    "a position too many seen": ("length) + 1;\n        /*", "length) + 2;\n        /*"),
    "groups of rows": ("row / groups % length) + 1;\n        /*", "row % length) + 1;\n        /*"),
    "a vector's end seen": ("e[i] = -__builtin_inff();", "e[i] = 0.0f;"),
    "another's maximum": ("most = e[i] > most ? e[i] : most", "most = e[0]"),
    "the hidden half kept": ("p[i] = 0;", ";"),
    "the hidden gradient kept": ("d[i] = 0;", ";"),
    "scores not scaled": ("e[i] = scale * wide(p[i]);", "e[i] = wide(p[i]);"),
    "softmax's projection": ("(wide(d[i]) - dot)", "wide(d[i])"),
    "last of the sum missed": ("i < whole; i++) sum", "i < whole - 16; i++) sum"),
    "gradient's scale": ("narrow(scale * wide(p[i])", "narrow(wide(p[i])"),
    "a block's sum lost": ("total += sum;", "total = sum;"),
    "label left out": ("share - scale);", "share);"),
    "another row's label": ("in[labels[row]]", "in[labels[0]]"),
    "not the largest": ("wide(in[i]) > most ? wide(in[i]) : most", "0.0f"),
    "loss not scaled": ("scale / (float)total", "1.0f / (float)total"),
    "last of the gradient missed": (
        "i < size; i++) out[i] = narrow(exp",
        "i < size - 1; i++) out[i] = narrow(exp",
    ),
    "short polynomial": ("p = p * r + 0.5f;", "p = p * r + 0.4f;"),
}


SIXTEENS_BUGS = {
    "gate's slope": ("(one + g * (one - s))", "one"),
    "up's gradient": ("dup + i, d * (g * s)", "dup + i, d * g"),
    "up left out": ("wide_16(silu) * wide_16(up + i)", "wide_16(silu)"),
    "sign of the gate": ("_mm512_set1_ps(-60.0f), -z", "_mm512_set1_ps(-60.0f), z"),
    "short polynomial": ("p, r, _mm512_set1_ps(0.5f)", "p, r, _mm512_set1_ps(0.4f)"),
    "not clamped below": ("_mm512_max_ps(_mm512_set1_ps(-60.0f), -z)", "_mm512_max_ps(_mm512_set1_ps(0.0f), -z)"),
}  # fmt: skip
WITHOUT_BF16 = (*native.FLAGS, *["-mno-avx512bf16"] * (platform.machine() in ("x86_64", "AMD64")))


def check_all() -> None:
    for shape in SHAPES:
        check_rms_norm(shape)
        check_swiglu(shape)
    for sizes in SOFTMAX:
        check_softmax(*sizes)
    for shape in ENTROPIES:
        check_cross_entropy(*shape)
    check_large_scores()
    check_every_gate()


def test_so_it_is_without_bf16_instructions(monkeypatch):
    monkeypatch.setattr(native, "FLAGS", WITHOUT_BF16)
    with compiled_anew(native.library):
        assert native.library() is not None
        check_all()


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_killed(bug, tmp_path, monkeypatch):
    _kill(BUGS[bug], WITHOUT_BF16, tmp_path, monkeypatch)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="needs AVX-512 bf16 instructions"
)
@pytest.mark.parametrize("bug", SIXTEENS_BUGS)
def test_seeded_bugs_of_sixteens_are_killed(bug, tmp_path, monkeypatch):
    _kill(SIXTEENS_BUGS[bug], native.FLAGS, tmp_path, monkeypatch)


def _kill(bug, flags, folder, monkeypatch) -> None:
    copy = load_copy(folder, native, *bug)
    monkeypatch.setattr(copy, "FLAGS", flags)
    if copy.library() is None:
        pytest.fail("the mutant does not compile")
    monkeypatch.setattr(api, "library", copy.library)
    with pytest.raises(AssertionError):
        check_all()
