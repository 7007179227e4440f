"""Rounding a matrix to NF4 so that what it computes changes least, not its entries.

Of a linear layer y = x W^T with inputs X (tokens, K), rounding W to Q changes the outputs by

    |X (W - Q)^T|^2 = sum over rows of (w - q) H (w - q)^T,    H = X^T X

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds one column after the other and moves what each got wrong into the
columns that are still to come. With U upper triangular, U^T U = (H + damping * mean(diag H) * I)^-1:

    q_j = nearest(w_j)        w_k -= (w_j - q_j) / U_jj * U_jk   for k > j

in the order of falling H_jj, so that the inputs that weigh most are rounded while most can still make up for it. The
scales of the blocks are chosen before (`search_scales`), and are those that will be stored, rounding included.

Where the layers before have been rounded, the layer reads X while the dense model's reads Z. What is wanted of it is
still Z W^T (the aim of GPTAQ, Li et al. 2025, arXiv 2504.02692), and

    |Z W^T - X Q^T|^2 = |X (W' - Q)^T|^2 + what no Q changes,    W' = W + W D H^-1,    D = (Z - X)^T X

so it is W' that is rounded; D H^-1 is `shift_matrix`, one for all matrices that read X.

Shapes: W (N, K); H and D (K, K); scales (ceil(N K / 64),), the blocks running over W's rows as bitsandbytes has them,
so that one may begin in a row and end in the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # elements that share a scale
DAMPING = 0.01  # of H's mean diagonal; what GPTQ takes
MOST_DAMPING = 10.0  # beyond it H says nothing any more
_PANEL = 128  # columns whose errors reach the later ones in one product
_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022833234, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Of a block's largest entry: below 1 that entry is cut and the others are rounded more finely.
_FACTORS = tuple(0.7 + 0.025 * i for i in range(15))


class NotPositive(ValueError):
    """H has no Cholesky factor, whatever is added to its diagonal: it is not finite, or not of the form X^T X."""


def levels(like: Tensor) -> Tensor:
    """The 16 values of NF4 in rising order, in the dtype and on the device of `like`."""
    return torch.tensor(_LEVELS, dtype=like.dtype, device=like.device)


def nearest_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """The index of the level nearest to weight / scale, elementwise, uint8; of 0 / 0, that of level 0."""
    table = levels(weight)
    middle = (table[1:] + table[:-1]) / 2
    return torch.bucketize((weight / scales).nan_to_num_(0.0), middle, out_int32=True).to(
        torch.uint8
    )


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes and scales (of every element) stand for, in the scales' dtype."""
    return levels(scales)[codes.int()] * scales


def spread(scales: Tensor, shape: torch.Size | tuple[int, int]) -> Tensor:
    """The scale of every element of a matrix, (N, K)."""
    rows, columns = shape
    return scales.repeat_interleave(BLOCK)[: rows * columns].view(rows, columns)


def in_blocks(matrix: Tensor) -> Tensor:
    """(blocks, 64) of the entries in the order of rows, the last block filled with zeros."""
    flat = matrix.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def block_maxima(weight: Tensor) -> Tensor:
    """What nearest rounding takes for scales: each block's largest magnitude."""
    return in_blocks(weight).abs().amax(1)


def search_scales(weight: Tensor, importance: Tensor) -> Tensor:
    """Of some scales around each block's largest magnitude, those with the least sum of importance_k (w - q)^2.

    Args:
        weight: (N, K), fp32 or fp64.
        importance: (K,), not negative: H's diagonal, damped so that no block weighs nothing.
    """
    blocks, weigh = in_blocks(weight), in_blocks(importance.to(weight.dtype).expand_as(weight))
    largest = blocks.abs().amax(1)
    best, chosen = torch.full_like(largest, torch.inf), largest.clone()
    for factor in _FACTORS:
        scales = (largest * factor).unsqueeze(1)
        error = decode(nearest_codes(blocks, scales), scales).sub_(blocks).square_().mul_(weigh)
        total = error.sum(1)
        better = total < best
        best, chosen = torch.where(better, total, best), torch.where(better, scales[:, 0], chosen)
    return chosen


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """H + damping * mean(diag H) * I: an input that was always 0 leaves H singular, and any sample of X is small."""
    found = hessian.clone()
    found.diagonal().add_(damping * hessian.diagonal().mean())
    return found


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """U upper triangular with U^T U = damped(H)^-1, and the damping that it took.

    With the rows and columns in reverse, H = R R^T for an upper triangular R; U is R's inverse. More damping, ten times
    at a time, is tried where rounding errors keep H from being positive.

    Raises NotPositive: no damping up to MOST_DAMPING helps.
    """
    while damping <= MOST_DAMPING * 1.001:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping).flip(0, 1))
        if not failed and bool(lower.isfinite().all()):
            one = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True), damping
        damping *= 10
    raise NotPositive(f"H ({len(hessian)} inputs) is not positive")


def calibrated_codes(weight: Tensor, scales: Tensor, hessian: Tensor) -> tuple[Tensor, float]:
    """Codes (N, K) uint8 that GPTQ chooses, and the damping that it took.

    Args:
        weight: (N, K), fp32 or fp64; the arithmetic is in its dtype.
        scales: (blocks,), as they will be read back.
        hessian: (K, K), fp64.

    Raises NotPositive: see `inverse_factor`.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor, damping = inverse_factor(hessian[order][:, order])
    factor = factor.to(weight.dtype)
    # transposed: a column of W is contiguous
    left = weight[:, order].t().contiguous()
    size = spread(scales.to(weight.dtype), weight.shape)[:, order].t().contiguous()
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for start in range(0, len(left), _PANEL):
        stop = min(start + _PANEL, len(left))
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            codes[j] = nearest_codes(left[j], size[j])
            error = (left[j] - decode(codes[j], size[j])) / factor[j, j]
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
            errors[j - start] = error
        left[stop:] -= factor[start:stop, stop:].t() @ errors
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t().contiguous(), damping


def shift_matrix(hessian: Tensor, drift: Tensor) -> Tensor:
    """D H^-1 (K, K) fp64: W + W D H^-1 is, of all matrices, the one whose outputs are nearest to the dense model's.

    Damped as the rounding is, so that it moves W little where the data say little.

    Args:
        hessian, drift: H and D (K, K), fp64.

    Raises NotPositive: see `inverse_factor`.
    """
    factor, _ = inverse_factor(hessian)
    return drift @ factor.t() @ factor


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """sum over rows of d H d^T: what the difference of two matrices makes of the outputs, squared and summed."""
    wide = difference.to(hessian.dtype)
    return float(((wide @ hessian) * wide).sum())
