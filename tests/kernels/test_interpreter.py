"""bf16 in Triton's interpreter, after the shim: as torch computes it."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from flex.kernels.interpreter import to_bfloat16
from flex.kernels.runtime import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")


@triton.jit
def product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(c_ptr + at, c.to(c_ptr.dtype.element_ty))


@triton.jit
def convert(x_ptr, y_ptr, n, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=at < n)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_dot_of_bf16(out):
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.full((32, 32), torch.nan, dtype=out)
    product[(1,)](a, b, c, N=32)
    expected = a.float() @ b.float()
    assert torch.allclose(c.float(), expected.to(out).float(), rtol=0.01, atol=1e-5)


SPECIAL = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, -3.3e38, 3.4e38, 1e-40, torch.inf, -torch.inf]


def test_rounding_to_bf16_is_torchs():
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 1e3
    x = torch.cat([noise, torch.tensor(SPECIAL), torch.arange(2**12).view(torch.float32) * 2**20])
    ours = torch.from_numpy(to_bfloat16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours, x.bfloat16())


def test_a_nan_whose_low_bits_only_are_set_stays_one():
    x = torch.tensor([0x7F800001, -8388607], dtype=torch.int32).view(torch.float32)
    assert x.isnan().all()
    bits = torch.from_numpy(to_bfloat16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert bits.isnan().all()


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
def test_conversions_are_torchs(source, target):
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(source)
    y = torch.full((64,), torch.nan, dtype=target)
    convert[(1,)](x, y, 64, N=64)
    assert torch.equal(y, x.to(target))
