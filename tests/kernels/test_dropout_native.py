"""The C mask is torch's, bit for bit, in any number of threads; without a compiler torch makes it."""

import logging

import pytest
import torch

from flex.kernels.lora_linear import dropout
from flex.kernels.lora_linear import dropout_native as native
from tests.mutants import load_copy, without_a_compiler

CPU = torch.device("cpu")
CASES = [(1, 1, 0.5), (7, 33, 0.1), (64, 576, 0.05), (3, 8, 0.0), (5, 64, 0.99999), (0, 8, 0.5)]


def by_torch(monkeypatch, *case):
    with monkeypatch.context() as patch:
        patch.setattr(dropout, "native_mask", lambda: None)
        return dropout.keep_mask(*case, CPU)


def check(monkeypatch) -> None:
    for seed, (rows, columns, p) in enumerate(CASES):
        found = dropout.keep_mask(seed * 2**31 + 1, rows, columns, p, CPU)
        assert torch.equal(found, by_torch(monkeypatch, seed * 2**31 + 1, rows, columns, p))


def test_every_bit_is_torchs(monkeypatch):
    assert native.native_mask() is not None
    check(monkeypatch)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads, monkeypatch):
    alone = dropout.keep_mask(5, 1001, 900, 0.1, CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(dropout.keep_mask(5, 1001, 900, 0.1, CPU), alone)


def test_without_a_compiler_torch_makes_it(monkeypatch, caplog):
    expected = dropout.keep_mask(5, 10, 20, 0.1, CPU)
    with without_a_compiler(native.native_mask, monkeypatch):
        with caplog.at_level(logging.WARNING, "flex.kernels"):
            assert torch.equal(dropout.keep_mask(5, 10, 20, 0.1, CPU), expected)
            dropout.keep_mask(5, 10, 20, 0.1, CPU)
        assert caplog.text.count("take its place") == 1


BUGS = {
    "lanes swapped": ("(low >= least ? 0xffffu", "(high >= least ? 0xffffu"),
    "unsigned lanes": ("(int32_t)word >> 16", "(int32_t)(word >> 16)"),
    "one too many": ("high >= least", "high > least + 900"),
    "row key left out": ("(a + add[i])", "(add[i])"),
    "multiplier left out": ("(m + multiply[i])", "(m)"),
    "last word missed": ("i < words; i++", "i < words - 1; i++"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_killed(bug, tmp_path, monkeypatch):
    copy = load_copy(tmp_path, native, *BUGS[bug])
    assert copy.native_mask() is not None
    monkeypatch.setattr(dropout, "native_mask", copy.native_mask)
    with pytest.raises(AssertionError):
        check(monkeypatch)
