"""The counter of bytes and launches counts what the interpreter really moved."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from flex.kernels.runtime import interpreting
from tests.counting import count_traffic

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")


@triton.jit
def widen(x_ptr, y_ptr, n, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(y_ptr + at, x.to(tl.float32), mask=at < n)


def test_lanes_under_the_mask_count_and_only_inside_the_block():
    x, y = torch.ones(50, dtype=torch.bfloat16), torch.empty(50)
    with count_traffic() as traffic:
        widen[(1,)](x, y, 37, N=64)
        widen[(1,)](x, y, 50, N=64)
    assert traffic.launches == {"widen": 2}
    assert traffic.by_kernel == {"widen": (2 * (37 + 50), 4 * (37 + 50))}
    assert (traffic.loaded, traffic.stored) == (174, 348)
    widen[(1,)](x, y, 50, N=64)
    assert traffic.loaded == 174


@triton.jit
def through_block_pointers(x_ptr, y_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (0, 0), (BM, BN), (1, 0))
    y = tl.make_block_ptr(y_ptr, (M, N), (N, 1), (0, 0), (BM, BN), (1, 0))
    tl.store(y, tl.load(x, boundary_check=(0, 1)).to(tl.float32), boundary_check=(0, 1))


@triton.jit
def through_descriptors(x_ptr, y_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, (M, N), (N, 1), (BM, BN))
    y = tl.make_tensor_descriptor(y_ptr, (M, N), (N, 1), (BM, BN))
    y.store([0, 0], x.load([0, 0]).to(tl.float32))


@triton.jit
def through_host_descriptors(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    y.store([0, 0], x.load([0, 0]).to(tl.float32))


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.parametrize(
    "kernel", [through_block_pointers, through_descriptors, through_host_descriptors]
)
def test_block_pointers_and_descriptors_count_what_lies_inside_the_tensor(kernel):
    x, y = torch.randn(5, 8).bfloat16(), torch.full((5, 8), torch.nan)
    arguments = (x, y)
    if kernel is through_host_descriptors:
        arguments = tuple(TensorDescriptor.from_tensor(tensor, [8, 16]) for tensor in (x, y))
    with count_traffic() as traffic:
        kernel[(1,)](*arguments, 5, 8, BM=8, BN=16)
    assert torch.equal(y, x.float())
    assert (traffic.loaded, traffic.stored) == (2 * 40, 4 * 40)


@triton.jit
def count_up(x_ptr, y_ptr):
    at = tl.arange(0, 8)
    tl.atomic_add(y_ptr + at, tl.load(x_ptr + at), mask=at < 5)
    tl.atomic_cas(y_ptr + 7, 0, 1)


def test_an_atomic_reads_and_writes():
    x, y = torch.ones(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with count_traffic() as traffic:
        count_up[(2,)](x, y)
    assert y.tolist() == [2, 2, 2, 2, 2, 0, 0, 1]
    assert traffic.by_kernel == {"count_up": (2 * 4 * (8 + 5 + 1), 2 * 4 * (5 + 1))}


@triton.jit
def one_each(x_ptr, y_ptr):
    pid = tl.program_id(0)
    tl.store(y_ptr + pid, tl.load(x_ptr + pid))


def test_scalars_count_and_a_grid_is_one_launch():
    x, y = torch.ones(3, dtype=torch.float16), torch.zeros(3, dtype=torch.float16)
    with count_traffic() as traffic:
        one_each[(3,)](x, y)
        widen[(1,)](x, torch.empty(3), 3, N=4)
    assert traffic.launches == {"one_each": 1, "widen": 1}
    assert traffic.by_kernel == {"one_each": (6, 6), "widen": (6, 12)}


def test_the_counter_goes_away_also_after_an_error():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = (vars(InterpreterBuilder).copy(), GridExecutor.__call__)
    with pytest.raises(ZeroDivisionError), count_traffic():
        raise ZeroDivisionError
    assert (vars(InterpreterBuilder).copy(), GridExecutor.__call__) == before
