"""Public functions: argument checks, dtype rules, choice of implementation. No autograd."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .reference import ROLES, Spectrum
from .transform import apply_operator, line_table, plane_table, product_gradients

IMPLEMENTATIONS = ("auto", "torch", "triton")
log = logging.getLogger("flex.kernels")


def spectral_penalty(
    weights: Tensor, spectrum: Spectrum, *, role: str = "A", weight: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """weight * P of each matrix of a batch, and its exact gradient: 2 C w by one rfft and one
    irfft.

    Args:
        weights: (M, r, K) for role "A", (M, N, r) for role "B"; float16, bfloat16, float32 or
            float64.
        spectrum: frequency weights, transform and norm; the formula is in reference.py.
        role: which axis is the feature axis (`axis` and `fft2`): the last of an A, the first of a
            B.
        weight: lambda; multiplies values and gradients.
        impl: "auto" | "torch" ("triton" does not exist yet).

    Returns:
        values (M,), = <w, gradient> / 2, and the contiguous gradient in the shape of `weights`;
        both float32, or float64 when the input is. Computed outside autocast and without a graph.

    Raises:
        ValueError: a wrong role, shape, dtype or impl. NotImplementedError: impl="triton".
    """
    _check_impl(impl)
    _check_batch("weights", weights)
    if role not in ROLES:
        raise ValueError(f"role={role!r}; allowed: {', '.join(ROLES)}")
    turned = role == "B" and spectrum.transform != "flat"
    with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
        w = _computable(weights)
        w = w.mT.contiguous() if turned else w
        grad = apply_operator(w, spectrum, 2.0 * weight)
        values = (w * grad).sum((-2, -1)).mul_(0.5)
        return values, grad.mT.contiguous() if turned else grad


def spectral_penalty_delta(
    a: Tensor,
    b: Tensor,
    spectrum: Spectrum,
    *,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scale: float = 1.0,
    weight: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """weight * P(scale * (B A - B0 A0)) of each adapter of a batch, and its gradients, with no N x
    K matrix.

    Args:
        a, b: (M, r, K) and (M, N, r). a0, b0: the same shapes; both or none (then B0 A0 = 0).
        scale: the adapter's alpha / r.

    Returns:
        values (M,), gradient of a (M, r, K), gradient of b (M, N, r); float32, or float64 when the
        input is. Matrix products follow torch's float32 matmul precision. `flat` costs as much as
        transforming the dense product; `axis` and `fft2` cost FFTs of the factors.

    Raises:
        ValueError: shapes that do not multiply, or only one of a0, b0. NotImplementedError:
            impl="triton".
    """
    _check_impl(impl)
    _check_batch("a", a)
    _check_batch("b", b)
    if a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
        raise ValueError(
            f"a {tuple(a.shape)}, b {tuple(b.shape)}; allowed: (M, r, K) and (M, N, r)"
        )
    if (a0 is None) != (b0 is None):
        raise ValueError("a0 and b0: only one given; allowed: both or none")
    rank = a.shape[1]
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        v, u = _computable(a), _computable(b).mT
        if a0 is not None and b0 is not None:
            # B A - B0 A0 = (B - B0) A + B0 (A - A0): exactly 0 at the start, no difference of two
            # large products
            v0, u0 = _computable(a0), _computable(b0).mT
            u, v = torch.cat([u - u0, u0], 1), torch.cat([v, v - v0], 1)
        values, grad_u, grad_v = product_gradients(u.contiguous(), v, spectrum)
        if a0 is not None:
            grad_v = grad_v[:, :rank] + grad_v[:, rank:]
        factor = weight * scale**2
        return values * factor, grad_v * factor, (grad_u[:, :rank].mT * factor).contiguous()


def curvature_constant(shape: tuple[int, int], spectrum: Spectrum, *, role: str = "A") -> float:
    """Every diagonal entry of P's Hessian for one matrix: they are all equal, because 2 C is
    circulant.

    2 * c * sum of count * rho over the transform's bins, e.g. 2 * mean(rho) for a two-sided ortho
    transform.
    """
    height, length = shape if role == "A" else shape[::-1]
    device, dtype = torch.device("cpu"), torch.float64
    if spectrum.transform == "fft2":
        table = plane_table(spectrum, height, length, device, dtype)
    else:
        length = height * length if spectrum.transform == "flat" else length
        table = line_table(spectrum, length, device, dtype)
    paired = table[..., 1 : (length + 1) // 2]  # sigma of a paired bin stands for two
    return 2.0 * float(table.sum() + paired.sum())


def high_band_energy(
    weights: Tensor, spectrum: Spectrum, *, role: str = "A"
) -> tuple[Tensor, Tensor]:
    """(energy above the threshold, energy) of each matrix: two (M,) tensors, sums of squares of
    the elements.

    The high band is x >= 1 (`fft2`: along either axis), filtered out directly: as "total minus
    low" it would drown in rounding. Only transform and threshold of `spectrum` matter.
    """
    band = replace(
        spectrum, schedule="hard_cutoff", phi_low=1.0, phi_high=0.0, norm="ortho", one_sided=False
    )
    _, grad = spectral_penalty(
        weights, band, role=role, weight=0.5
    )  # the band itself: C is its projector
    return grad.square().sum((-2, -1)), _computable(weights).detach().square().sum((-2, -1))


def _computable(w: Tensor) -> Tensor:
    return w if w.dtype == torch.float64 else w.float()  # never an FFT in half precision


def _check_batch(name: str, w: Tensor) -> None:
    if w.ndim != 3 or w.numel() == 0 or not w.is_floating_point():
        raise ValueError(
            f"{name}: shape {tuple(w.shape)}, {w.dtype}; "
            "allowed: (M, rows, columns), floating, not empty"
        )


def _check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}; allowed: {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton":
        raise NotImplementedError(
            "spectral_penalty has no Triton kernel yet; use impl='torch' or 'auto'"
        )
    if impl == "auto":
        _announce()


@lru_cache(maxsize=1)
def _announce() -> None:
    log.info("spectral_penalty: torch.fft (the only implementation so far)")
