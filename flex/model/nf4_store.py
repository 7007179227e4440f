"""One matrix in bitsandbytes' NF4: codes chosen by `flex.model.nf4`, packing and QuantState bitsandbytes' own.

Imported only where bitsandbytes is already: it takes seconds, and is optional.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from flex.model import nf4

_NESTED_BLOCK = 256  # scales that share a scale, where scales are quantised too


@dataclass(frozen=True)
class Scales:
    """The blocks' scales as they are stored, and as they are read back."""

    stored: Tensor  # fp32; with double quantisation uint8
    read: Tensor  # fp32
    offset: Tensor | None
    nested: bnb.QuantState | None


@dataclass(frozen=True)
class Rounded:
    """A matrix in NF4, as bitsandbytes keeps it.

    Attributes:
        error: what the rounding does to the layer's outputs as a share of what nearest rounding does, both against
            the best that any matrix can; None where there was no H, and nearest rounding is what was done.
        damping: what H's diagonal needed, see `nf4.inverse_factor`.
    """

    packed: Tensor  # (ceil(N K / 2), 1) uint8
    state: bnb.QuantState
    error: float | None = None
    damping: float = nf4.DAMPING


def store_scales(scales: Tensor, double_quant: bool) -> Scales:
    """Store scales (blocks,) fp32, in 8 bits if `double_quant`."""
    if not double_quant:
        return Scales(scales, scales, None, None)
    offset = scales.mean()
    stored, nested = bnb.quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCK)
    return Scales(stored, bnb.dequantize_blockwise(stored, nested) + offset, offset, nested)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the upper half: (ceil(n / 2), 1)."""
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_full((1,), 7)])
    return (flat[0::2] << 4 | flat[1::2]).unsqueeze(1)


def round_nearest(weight: Tensor, double_quant: bool) -> tuple[Tensor, Scales]:
    """What bitsandbytes' quantiser chooses: codes (N, K) nearest by the scales before they are stored."""
    largest = nf4.block_maxima(weight)
    codes = nf4.nearest_codes(weight, nf4.spread(largest, weight.shape))
    return codes, store_scales(largest, double_quant)


def round_matrix(
    weight: Tensor,
    hessian: Tensor | None,
    double_quant: bool,
    dtype: torch.dtype,
    shift: Tensor | None = None,
) -> Rounded:
    """Round a matrix (N, K) so that its outputs change least.

    Args:
        weight: finite, of any float dtype.
        hessian: (K, K) fp64, X^T X of its inputs; None: nearest rounding.
        double_quant: store the scales in 8 bits too. The codes are chosen by the scales as stored, so that they make
            up for that rounding as well.
        dtype: what bitsandbytes is to dequantise to.
        shift: (K, K) fp64, `nf4.shift_matrix`: the outputs are to be those of the dense model, whose inputs are
            others. None: the inputs are the dense model's.

    Raises:
        nf4.NotPositive: H is not finite, or not of the form X^T X.
    """
    wide = weight.detach().float()
    shape = wide.shape
    codes, scales = round_nearest(wide, double_quant)
    error, damping = None, nf4.DAMPING
    if hessian is not None:
        nearest = nf4.decode(codes, nf4.spread(scales.read, shape))
        if shift is not None:
            wide = (wide + wide.to(shift.dtype) @ shift).float()
        chosen = nf4.search_scales(wide, nf4.damped(hessian).diagonal())
        scales = store_scales(chosen, double_quant)
        codes, damping = nf4.calibrated_codes(wide, scales.read, hessian)
        found = nf4.decode(codes, nf4.spread(scales.read, shape))
        before = nf4.output_error(nearest - wide, hessian)
        after = nf4.output_error(found - wide, hessian)
        error = after / before if before > 0 else float(after > 0)
    state = bnb.QuantState(
        absmax=scales.stored,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=nf4.BLOCK,
        code=nf4.levels(scales.read),
        quant_type="nf4",
        offset=scales.offset,
        state2=scales.nested,
    )
    return Rounded(pack(codes), state, error, damping)


def read_back(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """The matrix that bitsandbytes makes of it, in the state's dtype.

    Over a flat shape: where K is no multiple of 64, its CPU code for AVX512 would begin a block with each row.
    """
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    flat = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size((state.shape.numel(),)),
        dtype=state.dtype,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
    )
    return bnb.dequantize_4bit(packed, flat).view(state.shape)
