"""Packed attention: what each document computes is what it would compute alone."""

import logging

import pytest
import torch
import torch.nn.functional as F

from flex.model import attention, attention_cpu
from flex.model.attention_cpu import make_plan, packed_attention_cpu
from tests.oracle import assert_within_budget
from tests.tiny import VOCAB, tiny_model

HEADS = [(4, 4), (6, 2), (3, 1)]


def draw(lengths, heads, kv_heads, dtype=torch.float64, width=8):
    generator = torch.Generator().manual_seed(0)

    def normal(h):
        x = torch.randn(sum(lengths), h, width, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    return normal(heads), normal(kv_heads), normal(kv_heads), normal(heads).detach()


def one_by_one(query, key, value, lengths, scale):
    """Each document alone, softmax spelt out."""
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", p, v))
    return torch.cat(outputs)


def results(function, tensors, upstream):
    y = function(*tensors)
    return y.detach(), *torch.autograd.grad(y, tensors, upstream.to(y.dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(
    "lengths",
    [(1,), (17,), (5, 1, 17, 16, 30, 7), (9, 9, 9), (20, 3), (40, 12, 41, 1)],
)
def test_output_and_gradients_in_fp64(lengths, heads, kv_heads, monkeypatch, poison):
    monkeypatch.setattr(attention_cpu, "MAX_LENGTH", 32)  # 40 and 41 go to flash attention
    monkeypatch.setattr(attention_cpu, "ALONE", 18)  # 20 and 30 are products by themselves
    make_plan.cache_clear()
    *tensors, upstream = draw(lengths, heads, kv_heads)
    found = results(lambda *t: packed_attention_cpu(*t, lengths, 0.3), tensors, upstream)
    truth = results(lambda *t: one_by_one(*t, lengths, 0.3), tensors, upstream)
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lengths", [(30, 28, 64, 5), (1, 150, 1, 97), (1000, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_attention(dtype, lengths):
    make_plan.cache_clear()
    *tensors, upstream = draw(lengths, 6, 2, dtype, width=16)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    found = results(lambda *t: packed_attention_cpu(*t, lengths, 0.25), tensors, upstream)
    plain = results(lambda *t: one_by_one(*t, lengths, 0.25), tensors, upstream)
    truth = results(lambda *t: one_by_one(*t, lengths, 0.25), wide, upstream.double())
    for name, a, b, c in zip(("output", "dq", "dk", "dv"), found, plain, truth, strict=True):
        assert_within_budget(a, b, c, name)


def test_no_probabilities_are_kept():
    lengths = (60, 60)
    q, k, v, _ = draw(lengths, 6, 2)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        packed_attention_cpu(q, k, v, lengths, 0.3)
    assert sum(t.numel() for t in kept.values()) == q.numel() + k.numel() + v.numel()


def test_gradcheck():
    lengths = (3, 5, 2)
    *tensors, _ = draw(lengths, 2, 1, width=3)
    assert torch.autograd.gradcheck(lambda *t: packed_attention_cpu(*t, lengths, 0.5), tensors)


def test_a_plan_covers_every_position_once_and_wastes_little():
    lengths = (5, 60, 70, 7, 71, 300, 58, 5)
    row = torch.arange(sum(lengths))
    taken = [row[bucket.rows] for bucket in make_plan(lengths)]
    counted = [
        rows if bucket.valid is None else rows[bucket.valid]
        for rows, bucket in zip(taken, make_plan(lengths), strict=True)
    ]
    assert torch.equal(torch.cat(counted).sort().values, row)
    assert sum(map(len, taken)) <= attention_cpu.PADDING * sum(lengths)
    assert [bucket.length for bucket in make_plan(lengths)] == [300, 71, 60, 7, 5]


def test_a_documents_padding_never_leaks(monkeypatch):
    """NaN in one document stays in it, although others are padded with its positions."""
    lengths = (4, 5, 5)
    *tensors, _ = draw(lengths, 2, 2)
    with torch.no_grad():
        tensors[2][:4] = torch.nan  # the packed row's first position pads the shorter ones
    y = packed_attention_cpu(*(t.detach() for t in tensors), lengths, 0.3)
    assert y[:4].isnan().all() and not y[4:].isnan().any()


def packed_row(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    return documents, torch.cat(documents)[None], positions, cu_seqlens


def flex_model(**overrides):
    attention.register()
    model = tiny_model(**overrides)
    model.set_attn_implementation(attention.NAME)
    return model


def test_a_packed_row_equals_its_documents_alone():
    documents, row, positions, cu_seqlens = packed_row([7, 1, 12, 5])
    model, plain = flex_model(), tiny_model()
    logits = model(
        input_ids=row, position_ids=positions, cu_seqlens=cu_seqlens, use_cache=False
    ).logits[0]
    alone = [plain(input_ids=d[None], use_cache=False).logits[0] for d in documents]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_one_model_still_pads_and_generates_as_transformers_does():
    model, plain = flex_model(), tiny_model()
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    for kwargs in ({"attention_mask": mask}, {}):
        a, b = (m(input_ids=ids, **kwargs).logits for m in (model, plain))
        torch.testing.assert_close(a[:, :6], b[:, :6], atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(m.generate(ids[:1], **options) for m in (model, plain)))


def test_no_mask_of_the_whole_row_is_built(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a T x T mask was built")

    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    _, row, positions, cu_seqlens = packed_row([7, 12])
    flex_model()(input_ids=row, position_ids=positions, cu_seqlens=cu_seqlens, use_cache=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "covers 5 positions"),
        ({"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, "exclude each other"),
        ({"softcap": 30.0}, "softcap"),
        ({"sliding_window": 3}, "sliding_window"),
    ],
)
def test_what_it_does_not_do_is_refused(change, message):
    x = torch.zeros(1, 2, 8, 4)
    call = {"attention_mask": None, "cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        attention.packed_attention(torch.nn.Module(), x, x, x, **(call | change))


def test_attention_dropout_on_a_cpu_goes_document_by_document(caplog):
    caplog.set_level(logging.INFO, "flex.model")
    x = torch.randn(1, 2, 8, 4)
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    torch.manual_seed(0)
    y, _ = attention.packed_attention(
        torch.nn.Module(), x, x, x, None, dropout=0.5, cu_seqlens=cu_seqlens
    )
    assert y.shape == (1, 8, 2, 4) and (y == 0).any()
