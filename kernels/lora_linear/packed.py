"""A frozen weight in bitsandbytes' 4 or 8 bits, and its dense form, which lives for one product.

    4 bits (NF4, FP4): W = code[index] * absmax of its block of 64, the blocks running over W's rows
    8 bits:            W_nk = CB_nk SCB_n / 127

Only bitsandbytes' dequantisation is called, never its products: those may repack the weight in
place, and on some CPUs they run code that bitsandbytes asks the Hub for.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor

from ..runtime import require, require_one_of

PACKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that 4 bits can be read in
# Elements made dense at once on a CPU: a multiple of every block size, and small enough for the
# allocator to hand out the same memory again. Writing 90 MB of fresh memory costs more than
# dequantising does: 11008 x 4096 NF4 to bf16 on one core of a Zen 4 takes 72 ms in these steps
# (27 of them bitsandbytes' own), 110 at once; to fp32 85 and 180.
STEP = 1 << 21

_scratch = threading.local()


def is_packed(weight: object) -> bool:
    """Whether `weight` is of bitsandbytes' classes. Does not import it: an object of them has."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return False
    kinds = (bitsandbytes.nn.Params4bit, bitsandbytes.nn.Int8Params, bitsandbytes.MatmulLtState)
    return isinstance(weight, kinds)


def packed_tensor(weight: Any) -> Tensor:
    """The stored numbers of a packed weight."""
    found: Tensor = weight if isinstance(weight, Tensor) else weight.CB
    return found


def packed_shape(weight: Any) -> tuple[int, int]:
    """(N, K) of a packed weight whose stored numbers have another shape.

    Raises ValueError: it is not quantised yet, or holds another layout than quantising gave it.
    """
    if (reason := why_not_dense(weight)) is not None:
        raise ValueError(f"weight: {reason}")
    if hasattr(weight, "quant_state"):
        outputs, inputs = weight.quant_state.shape
    else:
        outputs, inputs = packed_tensor(weight).shape
    return outputs, inputs


def why_not_dense(weight: Any) -> str | None:
    """Why a packed weight cannot be made dense; None if it can."""
    if not hasattr(weight, "quant_state"):
        cb, scb = packed_tensor(weight), weight.SCB
        if cb is None or scb is None or cb.dtype != torch.int8:
            return "the 8-bit weight is not quantised yet (moving its layer to a device does that)"
        return None
    state = weight.quant_state
    if state is None:
        return "the 4-bit weight is not quantised yet (moving its layer to a device does that)"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes' inference on the CPU has repacked the 4-bit weight"
    if len(state.shape) != 2:
        return f"the 4-bit weight has {len(state.shape)} dimensions"
    return None


def dense(weight: Any, dtype: torch.dtype) -> Tensor:
    """W (N, K) in `dtype`, rounded to it once, as bitsandbytes' own forward has it.

    On a CPU it lies in this thread's scratch memory, which the next call overwrites: take one
    product of it and let it go. On a GPU the caching allocator does the same.

    Raises ValueError: as `packed_shape`; 4 bits in another dtype than PACKED_DTYPES.
    """
    shape = packed_shape(weight)
    if hasattr(weight, "quant_state"):
        require_one_of("x.dtype over a 4-bit weight", dtype, PACKED_DTYPES)
        return _from_4_bits(weight, shape, dtype)
    return _from_8_bits(packed_tensor(weight), weight.SCB, dtype)


def _from_4_bits(weight: Any, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional as bnb

    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, quant_state=state.state2) + state.offset
    # A flat shape: over (N, K) with K no multiple of the block, bitsandbytes 0.50's CPU code for
    # AVX512 lets every row begin a block of its own, which quantising did not.
    stored = weight.detach().as_subclass(Tensor).reshape(-1).view(torch.uint8)
    count = shape[0] * shape[1]
    step = STEP if stored.device.type == "cpu" else count
    out = _room(count, dtype) if step < count else None
    for start in range(0, count, step):
        stop = min(start + step, count)
        part = bnb.QuantState(
            absmax=absmax[start // state.blocksize : -(-stop // state.blocksize)],
            shape=(stop - start,),
            dtype=dtype,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
        )
        made = bnb.dequantize_4bit(stored[start // 2 : (stop + 1) // 2], part).view(-1)
        if out is None:
            out = made
        else:
            out[start:stop] = made
    require(out is not None, "weight.shape", shape, "not empty")
    assert out is not None
    return out.view(shape)


def _from_8_bits(cb: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    scales = scb.unsqueeze(1).mul(1.0 / 127.0)
    if cb.device.type != "cpu":
        return cb.to(dtype).mul_(scales)
    out = _room(cb.numel(), dtype).view(cb.shape)
    rows = max(1, STEP // cb.shape[1])
    # in steps, for the product of two dtypes goes through copies in the wider one
    for start in range(0, cb.shape[0], rows):
        some = slice(start, start + rows)
        torch.mul(cb[some].to(dtype), scales[some], out=out[some])
    return out


def _room(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) of this thread's scratch memory on the CPU; it grows to the largest asked for."""
    size = count * dtype.itemsize
    kept = getattr(_scratch, "bytes", None)
    if kept is None or kept.numel() < size:
        _scratch.bytes = kept = None  # never both
        _scratch.bytes = kept = torch.empty(size, dtype=torch.uint8)
    return kept[:size].view(dtype)
