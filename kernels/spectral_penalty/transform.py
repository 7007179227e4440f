"""The penalty as a symmetric circulant operator: P = <w, C w>, gradient = 2 C w (kernels/README.md
for the maths).

With the unnormalised DFT F, C = F^H diag(sigma) F, so C w = irfft(sigma * rfft(w)) with an
unscaled inverse. The inverse counts a paired bin twice by itself, so sigma = c * rho for two-sided
sums and c * rho / 2 on the paired bins of one-sided sums. FFTs run in the dtype of their input,
which the callers make float32 or float64.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .reference import Spectrum, bin_counts, phi, rho

# Complex elements per frequency block of the flattened product: 1 MB each in float32, so that a
# block's buffers stay in cache. N = K = 2048, r = 8 on one CPU core, torch 2.13: 72 ms at 2^17,
# 77 at 2^16, 82 at 2^14, 114 at 2^19.
BLOCK_ELEMENTS = 2**17


def circulant(x: Tensor, sigma: Tensor) -> Tensor:
    """C x along the last axis by one rfft and one irfft: x (..., N), sigma (..., N // 2 + 1)."""
    return torch.fft.irfft(_weighted(torch.fft.rfft(x), sigma), n=x.shape[-1], norm="forward")


def circulant_2d(x: Tensor, sigma: Tensor) -> Tensor:
    """C x over the last two axes: x (..., R, L) real, sigma (R, L // 2 + 1) real."""
    return torch.fft.irfft2(_weighted(torch.fft.rfft2(x), sigma), s=x.shape[-2:], norm="forward")


def _weighted(spectrum: Tensor, sigma: Tensor) -> Tensor:
    """spectrum * sigma, in place where that is the shape."""
    fits = torch.broadcast_shapes(spectrum.shape, sigma.shape) == spectrum.shape
    return spectrum.mul_(sigma) if fits else spectrum * sigma


def norm_factor(norm: str, length: int, bins: int) -> float:
    return {"sum": 1.0, "ortho": 1.0 / length, "mean": 1.0 / bins}[norm]


def _paired_share(length: int, one_sided: bool) -> Tensor:
    """count(k) over the multiplicity of bin k: 1, or 1/2 on paired bins that count once."""
    return bin_counts(length, one_sided) / bin_counts(length, one_sided=False)


@lru_cache(maxsize=256)
def line_table(spectrum: Spectrum, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """sigma of a 1-D transform of `length`: (length // 2 + 1,)."""
    bins = length // 2 + 1
    sigma = rho(spectrum, torch.arange(bins), length) * _paired_share(length, spectrum.one_sided)
    return (sigma * norm_factor(spectrum.norm, length, bins)).to(device, dtype)


@lru_cache(maxsize=256)
def plane_factors(
    spectrum: Spectrum, height: int, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sigma of fft2 as its two separable terms: (p, q), p (2, height // 2 + 1), q (2, length // 2
    + 1).

    sigma(k1, k2) = p[0, k1] q[0, k2] + p[1, k1] q[1, k2] = rho1 * 1 + phi1 * rho2, the norm inside
    q.
    """
    phi_1 = phi(spectrum, torch.arange(height // 2 + 1), height, one_sided=False)
    rho_2 = rho(spectrum, torch.arange(length // 2 + 1), length)
    share = _paired_share(length, spectrum.one_sided)
    share = share * norm_factor(spectrum.norm, height * length, height * len(share))
    p = torch.stack([1.0 - phi_1, phi_1])
    q = torch.stack([share, share * rho_2])
    return p.to(device, dtype), q.to(device, dtype)


@lru_cache(maxsize=256)
def plane_table(
    spectrum: Spectrum, height: int, length: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """sigma of fft2 for a whole matrix: (height, length // 2 + 1)."""
    p, q = plane_factors(spectrum, height, length, torch.device("cpu"), torch.float64)
    fold = torch.arange(height)
    return (p[:, torch.minimum(fold, height - fold)].mT @ q).to(device, dtype)


def apply_operator(x: Tensor, spectrum: Spectrum, factor: float) -> Tensor:
    """factor * C x for a batch (M, R, L) whose last axis is the feature axis.

    The factor goes into the table: a pass over a few bins instead of one over the batch.
    """
    if spectrum.transform == "fft2":
        table = plane_table(spectrum, x.shape[-2], x.shape[-1], x.device, x.dtype)
        return circulant_2d(x, table * factor)
    rows = x.reshape(len(x), 1, -1) if spectrum.transform == "flat" else x
    table = line_table(spectrum, rows.shape[-1], x.device, x.dtype)
    return circulant(rows, table * factor).view(x.shape)


def product_gradients(u: Tensor, v: Tensor, spectrum: Spectrum) -> tuple[Tensor, Tensor, Tensor]:
    """P(U V) per product with its gradients, no N x K matrix in memory.

    Args:
        u: (M, R, N), the left factor transposed. v: (M, R, K).

    Returns:
        values (M,), gradient of u (M, R, N), gradient of v (M, R, K).

    axis, fft2: P = sum_t tr[(U^T P_t U)(V Q_t V^T)], t over separable terms: FFTs of the factors
    and R x R Grams.
    """
    if spectrum.transform == "flat":
        parts = [_flat_product(u_i, v_i, spectrum) for u_i, v_i in zip(u, v, strict=True)]
        flat = [torch.stack(part) for part in zip(*parts, strict=True)]
        return flat[0], flat[1], flat[2]
    height, length = u.shape[-1], v.shape[-1]
    if spectrum.transform == "axis":
        cu = circulant(u, line_table(spectrum, height, u.device, u.dtype))
        cv = circulant(v, line_table(spectrum, length, v.device, v.dtype))
        terms = [(u, cv), (cu, v)]
    else:
        p, q = plane_factors(spectrum, height, length, u.device, u.dtype)
        cu = circulant(u, p[:, None, None, :])
        cv = circulant(v, q[:, None, None, :])
        terms = [(cu[0], cv[0]), (cu[1], cv[1])]
    values, grad_u, grad_v = u.new_zeros(len(u)), torch.zeros_like(u), torch.zeros_like(v)
    for pu, qv in terms:
        gram_u, gram_v = u @ pu.mT, v @ qv.mT
        values += (gram_u * gram_v).sum((-2, -1))
        grad_u.baddbmm_(gram_v, pu, alpha=2.0)
        grad_v.baddbmm_(gram_u, qv, alpha=2.0)
    return values, grad_u, grad_v


def _flat_product(u: Tensor, v: Tensor, spectrum: Spectrum) -> tuple[Tensor, Tensor, Tensor]:
    """P of the row-major flattening of U V and its gradients, by blocks of frequencies.

    The length is L = N K, and bin k = k1 + N k2 of the flattening is, with t(k1, j) = exp(-2 pi i
        k1 j / L), F(k) = FFT_j[ t(k1, j) * sum_r u^_r(k1) v_rj ](k2),  u^ = FFT of u along N,
    so a block of k1 needs one K-point FFT per k1, and one more for the gradients; conjugate
    symmetry halves the k1.
    Cost: two FFTs over the N K / 2 bins and three R-wide products, whatever the rank: N = K = 4096,
    r = 8 takes 0.3 s on a CPU core (autograd through the dense product 1.5 s, `axis` 0.5 ms), in
    memory of a few BLOCK_ELEMENTS. `shuffled` costs more: it permutes every bin anew.
    """
    rank, height = u.shape
    length = v.shape[-1]
    total = height * length
    u_hat = torch.fft.rfft(u).mT.contiguous()  # (N // 2 + 1, R)
    grad_hat = torch.empty_like(u_hat)
    grad_v = torch.zeros_like(v)
    value = u.new_zeros(())
    j = torch.arange(length, device=u.device)
    scale = norm_factor(spectrum.norm, total, total // 2 + 1)
    v_complex = v.to(u_hat.dtype)
    step = max(1, min(BLOCK_ELEMENTS // length, height // 8))
    for start in range(0, len(u_hat), step):
        k1 = torch.arange(start, min(start + step, len(u_hat)), device=u.device)[:, None]
        block = u_hat[start : start + step]
        k = k1 + height * j
        k = torch.minimum(k, total - k)
        sigma = rho(spectrum, k, total) * scale
        if spectrum.one_sided:
            sigma = torch.where((k == 0) | (2 * k == total), sigma, 0.5 * sigma)
        sigma = sigma.to(u.dtype)
        angle = (k1 * j % total).double() * (
            -2.0 * math.pi / total
        )  # exact integers first: k1 j passes 2^24
        twiddle = torch.polar(torch.ones_like(angle), angle).to(u_hat.dtype)
        freq = torch.fft.fft((block @ v_complex) * twiddle)
        mirrored = torch.where((k1 == 0) | (2 * k1 == height), 1.0, 2.0).to(
            u.dtype
        )  # k1 and N - k1
        weighted = freq.conj() * sigma
        value += (mirrored * (freq * weighted).real).sum()
        back = torch.fft.fft(weighted) * twiddle
        grad_hat[start : start + step] = back @ v_complex.mT
        grad_v += ((mirrored * block).mT @ back).real
    grad_u = torch.fft.irfft(grad_hat.mT.conj(), n=height, norm="forward")
    return value, 2.0 * grad_u, 2.0 * grad_v
