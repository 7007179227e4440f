"""`lora_linear` on Triton: exact at the corners, bytes as the closed forms say, no seeded bug survives."""

from __future__ import annotations

from math import ceil
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flex.kernels.lora_linear import backward, forward, lora_linear, tiles, triton_path
from flex.kernels.lora_linear.dropout import keep_mask
from flex.kernels.runtime import interpreting
from tests.counting import count_traffic
from tests.kernels.test_lora_linear import DTYPES, SEED, Case, check, operands, row_ids
from tests.mutants import load_copy

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
ROUTES = ("skinny", "fused")


def on_triton(route: str):
    def run(*arguments: object, **options: object) -> Tensor:
        return lora_linear(*arguments, impl="triton", route=route, **options)

    return run


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "dropout"), [(1, 0.1), (4, 0.0), (8, 0.1), (17, 0.1), (64, 0.0)])
def test_rank_dtype_dropout(poison, route, dtype, rank, dropout):
    case = Case(rows=(19,), rank=rank, dtype=dtype, dropout=dropout, inputs=48, outputs=40)
    check(on_triton(route), case)


@pytest.mark.parametrize("rank", [128, 256])
def test_wide_ranks(poison, rank):
    case = Case(rows=(20,), rank=rank, dtype=torch.bfloat16, inputs=40, outputs=70)
    check(on_triton("fused"), case)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [((1,), 9, 5), ((63,), 65, 127), ((64,), 64, 128), ((65,), 63, 129), ((2, 5, 7), 33, 37)],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_shapes(poison, route, rows, inputs, outputs, bias):
    dtype = torch.bfloat16 if bias else torch.float32
    check(on_triton(route), Case(rows, inputs, outputs, rank=4, dtype=dtype, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_operands(poison, dtype):
    check(on_triton("fused"), Case(rows=(3, 11), dtype=dtype, strided=True))


def test_rows_beyond_one_chunk(poison):
    """Two partial sums of dA and dB, the second of a single row."""
    check(on_triton("skinny"), Case(rows=(backward.CHUNK + 1,), inputs=24, outputs=20, rank=4))


@pytest.mark.parametrize("route", ROUTES)
def test_no_rows(route):
    x, w, bias, a, b, _ = operands(Case(rows=(3,)))
    a.requires_grad_(), b.requires_grad_()
    y = lora_linear(x[:0], w, bias, a, b, 1.0, 0.1, SEED, impl="triton", route=route)
    y.sum().backward()
    assert y.shape == (0, 32)
    assert not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("wanted", [{"x"}, {"a"}, {"b"}, {"x", "b"}])
@pytest.mark.parametrize("route", ROUTES)
def test_only_wanted_gradients_are_computed(wanted, route):
    x, w, bias, a, b, dy = operands(Case(dtype=torch.bfloat16))
    leaves = {"x": x, "a": a, "b": b}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = on_triton(route)(x, w, bias, a, b, 1.75, 0.1, SEED)
    full = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    y = on_triton(route)(x, w, bias, a, b, 1.75, 0.1, SEED)
    with count_traffic() as traffic:
        grads = torch.autograd.grad(y, [leaves[name] for name in sorted(wanted)], dy)
    for name, grad in zip(sorted(wanted), grads, strict=True):
        assert torch.equal(grad, full[name]), name
    assert traffic.launches["grad_x_kernel"] == ("x" in wanted)
    assert traffic.launches["grad_a_kernel"] == ("a" in wanted)
    reductions = ("a" in wanted) + ("b" in wanted) + bool(wanted & {"x", "a"})
    assert traffic.launches["reduce_kernel"] == reductions


def test_checkpointing_recomputes_the_same_mask():
    x, w, bias, a, b, dy = operands(Case(dtype=torch.bfloat16))

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        seed = int(torch.randint(2**63 - 1, ()))
        return lora_linear(x, w, bias, a, b, 1.75, 0.5, seed, impl="triton")

    results = []
    for wrapped in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        torch.manual_seed(0)
        y = checkpoint(layer, *leaves, use_reentrant=False) if wrapped else layer(*leaves)
        torch.rand(3)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**32 + 5, 2**63 - 1])
def test_the_mask_is_torchs_bit_for_bit(seed):
    """dX of dY = 0 W and dS A = 1 everywhere is the mask itself."""
    rows, columns, p = 70, 131, 0.3
    ds, a = torch.ones(rows, 1), torch.ones(1, columns)
    w = torch.zeros(1, columns)
    dx = backward.grad_x(torch.zeros(rows, 1), w, ds, a, p, seed, None, with_gemm=False)
    expected = keep_mask(seed, rows, columns, p, torch.device("cpu")) != 0
    assert torch.equal(dx != 0, expected)
    assert 0.25 < 1 - expected.double().mean() < 0.35


# --- bytes


@pytest.mark.parametrize(("dropout", "named"), [(0.0, False), (0.1, False), (0.1, True)])
def test_bytes_are_the_closed_form(dropout, named):
    """Over the frozen GEMM on the same kernels, forward and backward: 4MK + 2MN and small terms."""
    rows, inputs, outputs, rank, e = 640, 256, 320, 16, 2
    case = Case((rows,), inputs, outputs, rank, torch.bfloat16, bias=False, dropout=dropout)
    x, w, _, a, b, dy = operands(case)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    with count_traffic() as with_lora:
        ids = row_ids(rows) if named else None
        y = lora_linear(
            x, w, None, a, b, 1.0, dropout, SEED, impl="triton", route="fused", row_ids=ids
        )
        torch.autograd.grad(y, leaves, dy)
    with count_traffic() as frozen:
        forward.forward_gemm(x.detach(), w, None, None, None)
        backward.grad_x(dy, w, None, a.detach().bfloat16(), 0.0, None, None, with_gemm=True)
    extra = with_lora.loaded + with_lora.stored - frozen.loaded - frozen.stored

    gemm, _ = forward.gemm_config(x.dtype, 16)
    down, _ = forward.down_config(16)
    sb, _ = backward.grad_sb_config(16, x.dtype)
    ga, _ = backward.grad_a_config(16, x.dtype)
    mr, rk, nr = rows * rank, rank * inputs, outputs * rank
    row_blocks = ceil(rows / gemm["BLOCK_M"])
    chunks, panels = ceil(rows / backward.CHUNK), ceil(outputs / sb["BLOCK_N"])
    small = e * (ceil(rows / down["BLOCK_M"]) * rk + mr)  # A for each row block, S
    small += e * (ceil(outputs / gemm["BLOCK_N"]) * mr + row_blocks * nr)  # S, sB into the GEMM
    small += e * (chunks * nr + panels * mr) + 8 * (panels * mr + chunks * nr)  # sB, S, partials
    small += e * mr + 4 * nr  # dS, dB
    small += e * ceil(inputs / ga["BLOCK_K"]) * mr + 8 * chunks * rk + 4 * rk  # dS, partials, dA
    small += e * (ceil(inputs / gemm["BLOCK_N"]) * mr + row_blocks * rk)  # dS, A into dX
    if named:  # ids into S, into each panel of dA and each tile of dX
        readers = 1 + ceil(inputs / ga["BLOCK_K"]) + ceil(inputs / gemm["BLOCK_N"])
        small += 4 * rows * readers
    assert extra == 4 * rows * inputs + 2 * rows * outputs + small


def test_launches():
    x, w, bias, a, b, dy = operands(Case(dtype=torch.bfloat16))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    with count_traffic() as traffic:
        y = on_triton("fused")(x, w, bias, a, b, 1.0, 0.1, SEED)
        torch.autograd.grad(y, leaves, dy)
    assert traffic.launches == {
        "down_kernel": 1,
        "forward_gemm_kernel": 1,
        "grad_sb_kernel": 1,
        "grad_a_kernel": 1,
        "grad_x_kernel": 1,
        "reduce_kernel": 3,
    }


# --- bugs that must not survive: (name, module, its text, what a careless author would have written)
KEPT = "keep_tile(a_M, m_M, b_K, n_K, offs_k, dropped)"
BUGS = (
    ("mask missing in S", forward, f"{KEPT}, x_MK", "x_MK == x_MK, x_MK"),
    ("all of A its first row", forward, "[:, None] * stride_ar", "[:, None] * 0"),
    ("low-rank term missing in y", forward, "acc_MN = tl.dot(s_MR,", "tl.dot(s_MR,"),
    ("frozen term missing in y", forward, "acc_MN = tl.dot(x_MK,", "tl.dot(x_MK,"),
    ("16-bit S", forward, "s_MR = acc_MR.to(", "s_MR = acc_MR.to(tl.float16).to("),
    ("bias missing", forward, "acc_MN += bias_N[None, :]", "acc_MN += 0 * bias_N[None, :]"),
    (
        "last column not written",
        forward,
        "mask_n = offs_n < outputs",
        "mask_n = offs_n + 1 < outputs",
    ),
    ("stride of W", forward, "[:, None] * stride_wn", "[:, None] * rank"),
    ("mask missing in dA", backward, f"{KEPT}, x_MK", "x_MK == x_MK, x_MK"),
    ("16-bit dA", backward, "tl.trans(acc_KR)", "tl.trans(acc_KR).to(tl.float16)"),
    ("chunks of dA overwritten", backward, "(pid_c.to(tl.int64) * rank", "(0 * pid_c * rank"),
    ("mask missing in dX", backward, f"{KEPT}, acc_MK", "acc_MK == acc_MK, acc_MK"),
    ("inverted mask in dX", backward, f"{KEPT}, acc_MK, 0.0", f"{KEPT}, 0.0, acc_MK"),
    ("frozen term missing in dX", backward, "acc_MK = tl.dot(dy_MN,", "tl.dot(dy_MN,"),
    ("stride of W in dX", backward, "[:, None] * stride_wn", "[:, None] * rank"),
    ("dX zeroed", backward, "dx_MK = acc_MK.to", "dx_MK = (0 * acc_MK).to"),
    (
        "dB unscaled",
        backward,
        "_reduce(db_parts, b_dtype, scale)",
        "_reduce(db_parts, b_dtype, 1.0)",
    ),
    ("first partial sum lost", backward, "in range(parts)", "in range(1, parts)"),
    ("panels of dS overwritten", backward, "pid_n.to(tl.int64) * rows", "0 * pid_n * rows"),
    ("odd lane never used", tiles, "(offs_k & 1) * 16", "(offs_k & 0) * 16"),
    ("lanes compared unsigned", tiles, "(lane_MK ^ 0x8000)", "(lane_MK ^ 0)"),
    ("row multiplier even", tiles, "return a, m | 1", "return a, m"),
    (
        "ids of rows not read",
        tiles,
        "ids_M = tl.load(row_ids_ptr + offs_m, mask=mask_m, other=0)",
        "pass",
    ),
    (
        "ids of rows forgotten in S",
        triton_path,
        "dropout_p, seed, row_ids)\n",
        "dropout_p, seed)\n",
    ),
    (
        "ids of rows forgotten in dA",
        triton_path,
        "seed, row_ids, lora_a.dtype",
        "seed, None, lora_a.dtype",
    ),
    ("ids of rows forgotten in dX", triton_path, "seed, row_ids, fused", "seed, None, fused"),
    ("scale of B left out", triton_path, "scaled(lora_b, scale, x.dtype)", "lora_b.to(x.dtype)"),
    ("B unscaled in dS", triton_path, "scaled(lora_b, scale, dy.dtype)", "lora_b.to(dy.dtype)"),
)


# fp32, so that rounding to 16 bits anywhere shows; two chunks and several panels
CASE = Case(rows=(backward.CHUNK + 30,), inputs=48, outputs=72, rank=17, ids=True)


def run_with(monkeypatch, mutant: ModuleType, module: ModuleType) -> None:
    """`check` over more than one chunk and panel, with the mutant's functions in the module's place."""
    monkeypatch.setattr(backward, "grad_sb_config", small_panels)
    if module is tiles:
        for user in (forward, backward):
            for name in ("ids_of_rows", "row_keys", "column_keys", "keep_tile"):
                monkeypatch.setattr(user, name, getattr(mutant, name))
    elif module is triton_path:
        for name in ("forward", "backward"):
            monkeypatch.setattr(triton_path, name, getattr(mutant, name))
    else:
        if hasattr(mutant, "grad_sb_config"):
            mutant.grad_sb_config = small_panels
        for name in ("down", "forward_gemm", "grad_a", "grad_s_and_b", "grad_x"):
            if hasattr(mutant, name):
                monkeypatch.setattr(triton_path, name, getattr(mutant, name))
    check(on_triton("fused"), CASE)


def small_panels(block_r: int, dtype: torch.dtype):
    return {"CHUNK": backward.CHUNK, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_R": block_r}, {}


@pytest.mark.parametrize(("bug", "module", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_bug_is_noticed(tmp_path, monkeypatch, bug, module, old, new):
    mutant = load_copy(tmp_path, module, old, new)
    with pytest.raises(AssertionError, match="over its budget|differs between two runs"):
        run_with(monkeypatch, mutant, module)


@pytest.mark.parametrize("module", [forward, backward, tiles, triton_path])
def test_unchanged_copy_passes(tmp_path, monkeypatch, module):
    """The harness of the bugs adds none of its own."""
    start = "from __future__ import annotations"
    run_with(monkeypatch, load_copy(tmp_path, module, start, start), module)
