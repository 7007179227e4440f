"""Projections of one input: as `lora_linear` of each, with x read once."""

from math import ceil

import pytest
import torch

from flex.kernels.lora_linear import backward, lora_linear, lora_linear_siblings, siblings
from flex.kernels.lora_linear.dropout import keep_mask
from flex.kernels.lora_linear.reference import lora_linear_reference
from flex.kernels.runtime import interpreting
from tests.counting import count_traffic
from tests.kernels.test_lora_linear import DTYPES, row_ids
from tests.mutants import load_copy
from tests.oracle import assert_within_budget

SEEDS, SCALES = (11, 2**40 + 3, 5), (1.5, 0.75, 2.0)
CPU = torch.device("cpu")


def operands(rows, inputs, outputs, rank, dtype):
    g = torch.Generator().manual_seed(rank)

    def normal(*shape, size=1.0):
        return torch.randn(*shape, generator=g) * size

    x = normal(rows, inputs).to(dtype)
    weights = [normal(n, inputs, size=inputs**-0.5).to(dtype) for n in outputs]
    biases = [normal(n).to(dtype) if i else None for i, n in enumerate(outputs)]
    lora_as = [normal(rank, inputs, size=inputs**-0.5) for _ in outputs]
    lora_bs = [normal(n, rank, size=rank**-0.5) for n in outputs]
    return x, weights, biases, lora_as, lora_bs, [normal(rows, n).to(dtype) for n in outputs]


def gradients(function, x, weights, biases, lora_as, lora_bs, dys, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = x.to(dtype).requires_grad_()
    a, b = ([t.to(wide).requires_grad_() for t in ts] for ts in (lora_as, lora_bs))
    weights = [w.to(dtype) for w in weights]
    biases = [None if t is None else t.to(dtype) for t in biases]
    ys = function(x, weights, biases, a, b)
    grads = torch.autograd.grad(ys, [x, *a, *b], [dy.to(dtype) for dy in dys])
    return [*(y.detach() for y in ys), *grads]


def check(impl, route, rows=37, inputs=72, outputs=(40, 33), rank=8, dtype=torch.float32, p=0.1):
    tensors = operands(rows, inputs, outputs, rank, dtype)
    n = len(outputs)
    ids = row_ids(rows)
    keeps = [keep_mask(s, rows, inputs, p, CPU, ids) != 0 if p else None for s in SEEDS[:n]]

    def ours(x, *lists):
        options = {"impl": impl, "route": route, "row_ids": ids}
        return lora_linear_siblings(x, *lists, SCALES[:n], p, SEEDS[:n], **options)

    def reference(x, *lists):
        each = zip(*lists, SCALES[:n], keeps, strict=True)
        return tuple(
            lora_linear_reference(x, w, bias, a, b, s, p, k) for w, bias, a, b, s, k in each
        )

    actual = gradients(ours, *tensors, dtype)
    again = gradients(ours, *tensors, dtype)
    eager = gradients(reference, *tensors, dtype)
    exact = gradients(reference, *tensors, torch.float64)
    names = [f"{what}{i}" for what in ("y", "dx", "da", "db") for i in range(n)]
    names = [name for name in names if name not in ("dx1", "dx2")]
    for name, a, b, e, r in zip(names, actual, again, eager, exact, strict=True):
        assert_within_budget(a, e.to(dtype), r, name)
        assert torch.equal(a, b), f"{name} differs between two runs"


needs_interpreter = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")


@needs_interpreter
@pytest.mark.parametrize("route", ["skinny", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("outputs", "rank", "p"), [((40, 33), 8, 0.1), ((64, 16, 16), 17, 0.1), ((1, 5, 7), 1, 0.0)]
)
def test_on_triton(poison, route, dtype, outputs, rank, p):
    check("triton", route, outputs=outputs, rank=rank, dtype=dtype, p=p)


def test_on_torch():
    check("torch", "auto")


@needs_interpreter
def test_each_output_is_that_of_lora_linear():
    x, weights, biases, a, b, _ = operands(21, 40, (24, 8), 4, torch.float32)
    ys = lora_linear_siblings(x, weights, biases, a, b, SCALES[:2], 0.2, SEEDS[:2], impl="triton")
    for i, y in enumerate(ys):
        alone = lora_linear(
            x, weights[i], biases[i], a[i], b[i], SCALES[i], 0.2, SEEDS[i], impl="triton"
        )
        assert torch.allclose(y, alone, rtol=1e-6, atol=1e-6)


@needs_interpreter
def test_x_is_read_once_each_way():
    """x's own share of the bytes: 2 reads for all projections, where each alone takes 2."""
    rows, inputs, outputs, rank, e = 640, 256, (320, 64, 64), 16, 2
    x, weights, _, a, b, dys = operands(rows, inputs, outputs, rank, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, *a, *b)]
    with count_traffic() as traffic:
        ys = lora_linear_siblings(
            x, weights, [None] * 3, a, b, SCALES, 0.1, SEEDS, impl="triton", route="skinny"
        )
        torch.autograd.grad(ys, leaves, dys)
    down, _ = siblings.down_siblings_config(16, x.dtype)
    ga, _ = siblings.grad_a_siblings_config(16, x.dtype)
    row_blocks, chunks = ceil(rows / down["BLOCK_M"]), ceil(rows / backward.CHUNK)
    k_blocks = ceil(inputs / ga["BLOCK_K"])
    seeds = 8 * 3
    loaded, stored = traffic.by_kernel["down_siblings_kernel"]
    assert loaded == rows * inputs * e + row_blocks * (3 * rank * inputs * e + seeds)
    assert stored == 3 * rows * rank * e
    loaded, stored = traffic.by_kernel["grad_a_siblings_kernel"]
    programs = chunks * k_blocks
    assert loaded == rows * inputs * e + k_blocks * 3 * rows * rank * e + programs * seeds
    assert stored == chunks * 3 * rank * inputs * 4


MASK = "offs_k, dropped, HAS_DROPOUT)\n        "
KEYS = "a_M1, m_M1 = row_keys(seed_1,"
BUGS = (
    ("one mask for all", f"a_M1, m_M1, seed_1, {MASK}acc_MR1", f"a_M0, m_M0, seed_0, {MASK}acc_MR1"),
    ("third mask missing in S", f"_masked(x_MK, a_M2, m_M2, seed_2, {MASK}    acc_MR2", "x_MK\n            acc_MR2"),
    ("second A is the first", "a_rows + next_a + offs_k", "a_rows + offs_k"),
    ("third A is the second", "a_rows + 2 * next_a + offs_k", "a_rows + next_a + offs_k"),
    ("third S not written", "tl.store(s_at + 2 * next_s", "tl.store(s_at + next_s"),
    ("second dS is the first", "tl.load(ds_at + next_s", "tl.load(ds_at"),
    ("third dA on the second", "tl.store(da_at + 2 * next_a", "tl.store(da_at + next_a"),
    ("masks exchanged in dA", "\n        a_M2, m_M2 = row_keys(seed_2,", "\n        a_M2, m_M2 = row_keys(seed_1,"),
    ("ids of rows not read in S", f"\n    {KEYS} ids_M)", f"\n    {KEYS} offs_m)"),
    ("ids of rows not read in dA", f"\n        {KEYS} ids_M)", f"\n        {KEYS} offs_m)"),
    ("accumulators exchanged", "tl.trans(kept_MK), ds_MR, acc_KR1,", "tl.trans(kept_MK), ds_MR, acc_KR0,"),
)  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize(("bug", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_bug_is_noticed(tmp_path, monkeypatch, bug, old, new):
    copy = load_copy(tmp_path, siblings, old, new)
    for name in ("down_siblings", "grad_a_siblings"):
        monkeypatch.setattr(siblings, name, getattr(copy, name))
    with pytest.raises(AssertionError, match="over its budget|differs between two runs"):
        check("triton", "fused", outputs=(24, 24, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 1}, r"len\(weights\) is 1; it must be 2 or 3"),
        ({"lora_bs": 1}, r"len\(lora_bs\) is 1; it must be 2, as many"),
        ({"seeds": 1}, r"len\(seeds\) is 1"),
    ],
)
def test_lists_that_do_not_match(change, message):
    x, weights, biases, a, b, _ = operands(3, 8, (4, 4), 2, torch.float32)
    lists = {"weights": weights, "biases": biases, "lora_as": a, "lora_bs": b}
    lists |= {"scales": [1.0, 1.0], "seeds": [1, 2]}
    lists = {name: values[: change.get(name)] for name, values in lists.items()}
    with pytest.raises(ValueError, match=message):
        lora_linear_siblings(x, **lists, dropout_p=0.1)


def test_ranks_that_differ():
    x, weights, biases, a, b, _ = operands(3, 8, (4, 4), 2, torch.float32)
    with pytest.raises(ValueError, match=r"ranks is \[1, 2\]; it must be equal"):
        lora_linear_siblings(x, weights, biases, [a[0][:1], a[1]], b, [1.0, 1.0])


@needs_interpreter
@pytest.mark.parametrize("route", ["skinny", "fused"])
def test_a_bias_of_another_dtype_is_cast_as_lora_linear_does(route):
    x, weights, _, a, b, _ = operands(21, 40, (24, 8), 4, torch.bfloat16)
    biases = [torch.full((24,), 0.5), torch.full((8,), -0.25)]
    options = {"impl": "triton", "route": route}
    ys = lora_linear_siblings(x, weights, biases, a, b, SCALES[:2], **options)
    for i, y in enumerate(ys):
        alone = lora_linear(x, weights[i], biases[i], a[i], b[i], SCALES[i], **options)
        assert torch.equal(y, alone)
