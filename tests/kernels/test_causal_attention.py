"""Causal attention in C: the error budget against fp64, documents kept apart, NaN, threads, scratch, seeded bugs."""

import ctypes
import logging

import pytest
import torch

from flex.kernels.budget import budget_used
from flex.kernels.causal_attention import (
    api,
    causal_attention,
    causal_attention_reference,
    native,
    source,
    takes,
)
from tests.mutants import compiled_from, without_a_compiler

needs_c = pytest.mark.skipif(
    native.compiled() is None, reason="needs a processor with AVX-512 bf16 dot products"
)
# query heads, key heads, width, angles, lengths: edges of vectors (16), of tiles of rows (48), of one position
CASES = [
    (1, 1, 16, False, (1,)),
    (9, 3, 64, True, (17, 1, 50, 2)),
    (4, 4, 32, True, (48, 49, 15)),
    (8, 2, 48, False, (16, 33, 12, 13)),
    (48, 1, 16, False, (3, 19)),
    (7, 1, 96, True, (31,)),
    (2, 2, 128, True, (130,)),
    (5, 1, 80, False, (64, 65)),
]


@pytest.fixture(autouse=True)
def _also_beside_amx(monkeypatch):
    monkeypatch.setattr(native, "library", native.compiled)


def draw(heads, kv_heads, width, turned, lengths, scale=1.0):
    """Query, key, value, dy in bf16, and cosines and sines of angles."""
    generator = torch.Generator().manual_seed(0)
    count = sum(lengths)

    def normal(h):
        return (scale * torch.randn(count, h, width, generator=generator)).bfloat16()

    tensors = [normal(heads), normal(kv_heads), normal(kv_heads)]
    dy = normal(heads)
    if not turned:
        return tensors, dy, None
    half = 6.0 * torch.rand(count, width // 2, generator=generator)
    angle = torch.cat([half, half], -1)
    return tensors, dy, (angle.cos().bfloat16(), angle.sin().bfloat16())


def results(function, tensors, dy, lengths, angles, scale):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, lengths, scale, angles)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def wide(tensors):
    return None if tensors is None else tuple(t.double() for t in tensors)


def check(heads, kv_heads, width, turned, lengths) -> None:
    tensors, dy, angles = draw(heads, kv_heads, width, turned, lengths)
    assert takes(*tensors, angles)
    scale = width**-0.5
    found = results(causal_attention, tensors, dy, lengths, angles, scale)
    eager = results(causal_attention_reference, tensors, dy, lengths, angles, scale)
    exact = results(
        causal_attention_reference, wide(tensors), dy.double(), lengths, wide(angles), scale
    )
    for name, got, plain, truth in zip(("y", "dq", "dk", "dv"), found, eager, exact, strict=True):
        assert budget_used(got, plain, truth) <= 1, name


@needs_c
@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_budget_of_plain_operations(case, poison):
    check(*case)


def test_the_reference_passes_gradcheck():
    tensors, _, angles = draw(4, 2, 4, True, (3, 5))
    leaves = [t.double().requires_grad_() for t in tensors]
    turns = wide(angles)
    assert torch.autograd.gradcheck(
        lambda *t: causal_attention(*t, (3, 5), 0.5, turns), leaves
    )  # fp64 takes the reference


@needs_c
def test_large_scores_neither_overflow_nor_lose_the_largest():
    check_large_scores()


def check_large_scores() -> None:
    tensors, dy, _ = draw(2, 1, 32, False, (40,), scale=60.0)
    found = results(causal_attention, tensors, dy, (40,), None, 1.0)
    exact = results(causal_attention_reference, wide(tensors), dy.double(), (40,), None, 1.0)
    assert all(t.isfinite().all() for t in found)
    # one probability is 1, the others 0, to far below a bf16
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2**-8, atol=0.0)


@needs_c
def test_nan_stays_in_its_document_and_its_later_positions():
    check_nan()


def check_nan() -> None:
    tensors, dy, _ = draw(4, 2, 32, False, (20, 30, 20))
    tensors[1][30, 0, 3] = torch.nan  # position 10 of the second document, the first key head
    y, _, _, _ = results(causal_attention, tensors, dy, (20, 30, 20), None, 0.2)
    bad = y.isnan().any(-1)
    expected = torch.zeros_like(bad)
    expected[30:50, :2] = True
    assert torch.equal(bad, expected)


@needs_c
def test_what_is_kept_of_a_row_is_fp32():
    check_kept()


def check_kept() -> None:
    """The largest score and one over the sum, where a bf16 result would hide a poor exponential."""
    (q, k, v), _, _ = draw(2, 1, 32, False, (40,), scale=2.0)
    _, stats = native.forward(q, k, v, (40,), 0.2, ())
    scores = torch.einsum("qhd,kd->qhk", q.double(), k[:, 0].double()) * 0.2
    seen = torch.ones(40, 40, dtype=torch.bool).tril()[:, None]
    largest = scores.masked_fill(~seen, -torch.inf).amax(-1)
    share = 1 / ((scores - largest[..., None]).exp() * seen).sum(-1)
    torch.testing.assert_close(
        stats.double(), torch.stack([largest, share], -1), rtol=1e-5, atol=1e-5
    )


@needs_c
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_and_neighbours_change_no_bit(threads, monkeypatch):
    lengths = (200, 31, 90, 170)
    tensors, dy, angles = draw(6, 2, 64, True, lengths)
    alone = results(causal_attention, tensors, dy, lengths, angles, 0.125)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    together = results(causal_attention, tensors, dy, lengths, angles, 0.125)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    part = slice(200, 231)
    own = results(
        causal_attention,
        [t[part] for t in tensors],
        dy[part],
        (31,),
        tuple(t[part] for t in angles),
        0.125,
    )
    assert all(torch.equal(a, b[part]) for a, b in zip(own, alone, strict=True))


@needs_c
def test_strides_are_followed():
    lengths = (25, 40)
    tensors, dy, angles = draw(4, 2, 32, True, lengths)
    plain = results(causal_attention, tensors, dy, lengths, angles, 0.2)
    across = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (*tensors, dy)]
    found = results(causal_attention, across[:3], across[3], lengths, angles, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    spread = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    found = results(causal_attention, spread, dy.sum(2, True).expand_as(dy), lengths, angles, 0.2)
    assert torch.equal(plain[0], found[0]) and all(t.isfinite().all() for t in found)


@needs_c
def test_scratch_is_as_large_as_what_is_written():
    lengths = (49, 17)
    tensors, dy, angles = draw(9, 3, 64, True, lengths)
    c = native.compiled()
    documents = torch.tensor([[0, 49], [49, 17]])
    y, stats = torch.empty_like(tensors[0]), torch.empty(66, 9, 2)
    outputs = {
        "y": y,
        "stats": stats,
        **dict(zip(("dq", "dk", "dv"), map(torch.empty_like, tensors), strict=True)),
    }
    given = {**dict(zip("qkv", tensors, strict=True)), "dy": dy, **outputs}
    job = native._job(given, angles, 0.125)
    for what in ("forward", "backward"):
        room = c.scratch_bytes(49, 64, what == "backward")
        scratch = torch.full((room + 4096,), 7, dtype=torch.uint8)
        taken = torch.zeros(1, dtype=torch.int64)
        at = (documents.data_ptr(), 2, taken.data_ptr(), scratch.data_ptr())
        getattr(c, what)(ctypes.byref(job), *at)
        assert (scratch[room:] == 7).all()
        assert not (scratch[room - 64 : room] == 7).all()


@needs_c
def test_inputs_and_two_numbers_a_row_are_kept():
    lengths = (60, 60)
    tensors, _, _ = draw(6, 2, 32, False, lengths)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        causal_attention(*(t.requires_grad_() for t in tensors), lengths, 0.3)
    assert sum(t.nbytes for t in kept.values()) == sum(t.nbytes for t in tensors) + 120 * 6 * 8


def test_what_does_not_fit_is_refused():
    (q, k, v), _, angles = draw(4, 2, 32, True, (5, 3))
    for arguments, message in (
        ((q, k, v, (5, 2), 1.0), "sum"),
        ((q, k, v, (9, -1), 1.0), "lengths"),
        ((q, k[:4], v, (5, 3), 1.0), "key.shape"),
        ((q, k, v[:, :1], (5, 3), 1.0), "value.shape"),
        ((q[:, :3], k, v, (5, 3), 1.0), "heads"),
        ((q, k, v, (5, 3), 1.0, (angles[0][:4], angles[1])), "angles.shape"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_attention(*arguments)


def test_what_c_does_not_take_is_the_reference():
    (q, k, v), _, angles = draw(4, 2, 24, True, (5, 3))
    assert not takes(q, k, v)  # no multiple of 16
    assert not takes(q[..., :16], k[..., :16], v[..., :16], tuple(t[:, :16] for t in angles))
    assert not takes(q[..., :16].float(), k[..., :16].float(), v[..., :16].float())
    many = torch.zeros(2, 49, 16, dtype=torch.bfloat16)
    assert not takes(many, many[:, :1], many[:, :1])
    expected = causal_attention_reference(q, k, v, (5, 3), 0.2, angles)
    assert torch.equal(causal_attention(q, k, v, (5, 3), 0.2, angles), expected)


@needs_c
def test_nothing_and_empty_documents():
    (q, k, v), _, _ = draw(4, 2, 32, False, (6,))
    assert causal_attention(q[:0], k[:0], v[:0], (), 1.0).shape == (0, 4, 32)
    y = causal_attention(q, k, v, (0, 6, 0), 1.0)
    assert torch.equal(y, causal_attention(q, k, v, (6,), 1.0))


@needs_c
def test_without_a_compiler_plain_operations_take_its_place(monkeypatch, caplog):
    (q, k, v), _, _ = draw(4, 2, 32, False, (6,))
    with without_a_compiler(native.compiled, monkeypatch):
        with caplog.at_level(logging.WARNING, "flex.kernels"):
            found = causal_attention(q, k, v, (6,), 1.0)
            causal_attention(q, k, v, (6,), 1.0)
        assert torch.equal(found, causal_attention_reference(q, k, v, (6,), 1.0))
        assert caplog.text.count("take its place") == 1


BUGS = {
    "own position not seen": (
        "const int64_t own = first + r / job->groups + 1;\n            float",
        "const int64_t own = first + r / job->groups;\n            float",
    ),
    "one position too many seen": (
        "const int64_t own = first + r / job->groups + 1;\n            const",
        "const int64_t own = first + r / job->groups + 2;\n            const",
    ),
    "heads of another key": ("t->head * groups + r % groups) * head", "r % groups) * head"),
    "scores not scaled": ("job->scale));\n                most", "1.0f));\n                most"),
    "backward's scores not scaled": (
        "_mm512_set1_ps(job->scale), most)",
        "_mm512_set1_ps(1.0f), most)",
    ),
    "gradient of the scores not scaled": ("_mm512_mul_ps(pr, _mm512_set1_ps(job->scale))", "pr"),
    "the projection left out": (", _mm512_set1_ps(dots[r + e]))", ", _mm512_setzero_ps())"),
    "not divided by the sum": (
        "(y + r * width + d), share)",
        "(y + r * width + d), _mm512_set1_ps(1.0f))",
    ),
    "turned back the wrong way": (
        "put(to + d, _mm512_fmadd_ps(high, sin_high,",
        "put(to + d, _mm512_fnmadd_ps(high, sin_high,",
    ),
    "turned the wrong way": (
        "put(to + d, _mm512_fnmadd_ps(high, sin_low,",
        "put(to + d, _mm512_fmadd_ps(high, sin_low,",
    ),
    "every document's first angles": ("at = position * job->width + d;", "at = d;"),
    "values turned": ("job->v_head, 0, x);\n    pairs", "job->v_head, 1, x);\n    pairs"),
    "pairs the wrong way round": ("x + (i + 1) * width + d", "x + i * width + d"),
    "a tile's edge of dk missed": (
        "dk, width, up(seen, STEP), width",
        "dk, width, seen / STEP * STEP, width",
    ),
    "stale words beyond what is seen": ("memset(p_line + seen, 0, 4 * STEP);", ""),
    "keys beyond the end": (
        "line[l] = i + l < rows ? from[(i + l) * words + d] : 0",
        "line[l] = from[d]",
    ),
    "dk of the first tile only": ("multiply_add(ds_pairs", "multiply(ds_pairs"),
    "a short polynomial": ("r, _mm512_set1_ps(0.5f))", "r, _mm512_set1_ps(0.4f))"),
    "the largest of the first vector": ("_mm512_mask_max_ps(most, mask, z, most)", "i ? most : z"),
}


@needs_c
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_killed(bug, monkeypatch, poison):
    old, new = BUGS[bug]
    assert source.SOURCE.count(old) == 1
    mutant = source.SOURCE.replace(old, new)
    with compiled_from(mutant, native, native.compiled, monkeypatch), pytest.raises(AssertionError):
        for case in CASES:
            check(*case)
        check_large_scores()
        check_kept()
        check_nan()


def test_where_there_is_amx_torch_keeps_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert native.library() is None
    (q, k, v), _, _ = draw(4, 2, 32, False, (6,))
    assert not api.takes(q, k, v)
