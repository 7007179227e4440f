"""The digest of a binary's sources: it changes with each thing that changes the binary, and with nothing else."""

import importlib
import sys
from dataclasses import replace

import pytest

from flex.kernels.compile_digest import digest
from flex.kernels.runtime import Shipped

HELPER = """
import triton
import triton.language as tl

SHIFT = tl.constexpr({shift})

@triton.jit
def helper(x):
    return x + {helper}
"""
KERNEL = """
import triton
import triton.language as tl
from digest_helper import helper
import digest_helper as other
{above}
FACTOR = {factor}
UNUSED = {unused}

@triton.jit
def kernel(x_ptr, BLOCK_N: tl.constexpr):
    offsets = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + offsets) * FACTOR + other.SHIFT
    tl.store(x_ptr + offsets, helper(x){inside})
"""
PLAIN = {
    "shift": 1,
    "helper": 1,
    "above": "",
    "factor": 2,
    "unused": 1,
    "inside": "",
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The configuration of a kernel written with some words replaced."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**words):
        words = PLAIN | words
        (tmp_path / "digest_helper.py").write_text(HELPER.format(**words))
        (tmp_path / "digest_kernel.py").write_text(KERNEL.format(**words))
        for name in ("digest_helper", "digest_kernel"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        fn = importlib.import_module("digest_kernel").kernel
        return Shipped("k", fn, {"x_ptr": "*fp32"}, {"BLOCK_N": 64})

    yield make
    for name in ("digest_helper", "digest_kernel"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "words",
    [{"shift": 3}, {"helper": 3}, {"factor": 3}, {"inside": " + 1"}],
    ids=["global of a module", "function reached", "global", "kernel"],
)
def test_what_the_binary_depends_on_changes_it(made, words):
    before = digest(made(), "sm_90")
    assert digest(made(**words), "sm_90") != before


@pytest.mark.parametrize(
    "words", [{"above": "\n\n# a line"}, {"unused": 2}], ids=["lines", "global"]
)
def test_what_it_does_not_depend_on_leaves_it(made, words):
    before = digest(made(), "sm_90")
    assert digest(made(**words), "sm_90") == before


@pytest.mark.parametrize(
    "change",
    [
        {"signature": {"x_ptr": "*bf16"}},
        {"constants": {"BLOCK_N": 128}},
        {"num_warps": 8},
        {"num_stages": 2},
        {"divisible": ("n",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_configuration_changes_it(made, change):
    config = made()
    assert digest(replace(config, **change), "sm_90") != digest(config, "sm_90")


def test_each_target_has_its_own(made):
    config = made()
    assert len({digest(config, target) for target in ("sm_80", "sm_90", "gfx942")}) == 3


def test_a_value_that_prints_its_address_is_refused(made):
    with pytest.raises(TypeError, match="FACTOR is <object"):
        digest(made(factor="object()"), "sm_90")
