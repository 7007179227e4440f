"""What the spectral penalty is: the weight of every frequency bin, and the sum in eager PyTorch.

Legend: N length of a 1-D transform; n = N // 2 + 1 its rfft bins; k bin index; R x L a matrix
whose last axis is the feature axis (A as it is, B transposed).

    P(w)   = c * sum_k count(k) * rho(k) * |F(w)_k|^2
    rho(k) = 1 - phi(k),  phi(k) = phi_low + (phi_high - phi_low) * g(x),  x = k / (n * T)
    c      = 1 (norm sum) | 1 / transform length (ortho) | 1 / number of rfft bins (mean)
    count  = 1 (one_sided), else 2 for the bins that stand for a conjugate pair: exact Parseval

g by schedule: linear_ramp min(1, x) (the published one); hard_cutoff 1 if x >= 1 else 0; power
min(1, x)^p; sigmoid 1 / (1 + exp(-sharpness * (x - 1))); uniform the mean of the ramp's g over the
counted bins, so that white weights are penalised as strongly as by the ramp; shuffled the ramp
with its paired bins permuted by a fixed seed (the self-conjugate bins stay, so the strength is
exactly the ramp's).

Transforms:
    flat  one rfft of the row-major flattening (the published one).
    axis  one rfft per row of A (along K) and per column of B (along N), summed. For a product BA:
          both, over its rows and over its columns.
    fft2  rfft2 with the feature axis last. A 2-D bin is preserved if it is preserved along both
          axes: phi(k1, k2) = phi(x1) * phi(x2), that is rho = rho1 + phi1 * rho2: two separable
          terms, none negative. A radial rho would not be separable, and `delta_w` needs that to
          stay free of a dense matrix. x1 uses the folded index min(k1, R - k1). Only the last axis
          is one-sided.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHOICES = {
    "schedule": ("linear_ramp", "hard_cutoff", "power", "sigmoid", "uniform", "shuffled"),
    "transform": ("flat", "axis", "fft2"),
    "norm": ("sum", "ortho", "mean"),
}
ROLES = ("A", "B")


@dataclass(frozen=True)
class Spectrum:
    """How frequencies are weighted (see the module's formula). Hashable: it keys the cached tables.

    Raises:
        ValueError: an unknown schedule, transform or norm, phi outside [0, 1] (a reward, unbounded
            below), T outside (0, 1], exponent or sharpness not above 0.
    """

    schedule: str = "linear_ramp"
    phi_low: float = 1.0
    phi_high: float = 0.1
    threshold: float = 0.5
    exponent: float = 2.0
    sharpness: float = 20.0
    shuffle_seed: int = 0
    transform: str = "flat"
    norm: str = "ortho"
    one_sided: bool = False

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r}; allowed: {', '.join(allowed)}")
        for field in ("phi_low", "phi_high"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field}={getattr(self, field)!r}; allowed: 0 to 1")
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold={self.threshold!r}; allowed: above 0, at most 1")
        for field in ("exponent", "sharpness"):
            if not getattr(self, field) > 0.0:
                raise ValueError(f"{field}={getattr(self, field)!r}; allowed: above 0")


def bin_counts(length: int, one_sided: bool) -> Tensor:
    """How often each rfft bin of a length-N transform is counted: (N // 2 + 1,) float64."""
    counts = torch.ones(length // 2 + 1, dtype=torch.float64)
    if not one_sided:
        counts[1 : (length + 1) // 2] = 2.0
    return counts


def phi(spectrum: Spectrum, index: Tensor, length: int, one_sided: bool) -> Tensor:
    """phi at the rfft bins `index` (any shape, int64) of a length-N transform: same shape, float64.

    `one_sided` matters to `uniform` only: which bins its mean is taken over.
    """
    edge = (length // 2 + 1) * spectrum.threshold
    if spectrum.schedule == "shuffled":
        index = _shuffle(index, length, spectrum.shuffle_seed)
    x = index.double() / edge
    if spectrum.schedule == "hard_cutoff":
        g = (x >= 1.0).double()
    elif spectrum.schedule == "power":
        g = x.clamp(max=1.0) ** spectrum.exponent
    elif spectrum.schedule == "sigmoid":
        g = torch.sigmoid(spectrum.sharpness * (x - 1.0))
    elif spectrum.schedule == "uniform":
        g = torch.full_like(x, _ramp_mean(length, edge, one_sided))
    else:
        g = x.clamp(max=1.0)
    return spectrum.phi_low + (spectrum.phi_high - spectrum.phi_low) * g


def rho(spectrum: Spectrum, index: Tensor, length: int) -> Tensor:
    """Penalty weight 1 - phi at the rfft bins `index` of a length-N transform: float64."""
    return 1.0 - phi(spectrum, index, length, spectrum.one_sided)


def spectral_penalty_reference(weight: Tensor, spectrum: Spectrum, role: str = "A") -> Tensor:
    """P of one matrix as a differentiable 0-dim tensor; any real dtype that torch.fft takes, CPU
    or GPU.

    Args:
        weight: (r, K) for role "A", (N, r) for "B", (N, K) for "delta" (the dense product: tests
            only).
    """
    if spectrum.transform == "flat":
        return _line_sum(weight.reshape(1, -1), spectrum)
    if spectrum.transform == "axis":
        rows = [weight] * (role in ("A", "delta")) + [weight.mT] * (role in ("B", "delta"))
        return torch.stack([_line_sum(x, spectrum) for x in rows]).sum()
    w = weight.mT if role == "B" else weight
    height, length = w.shape
    fold = torch.arange(height)
    phi_1 = phi(spectrum, torch.minimum(fold, height - fold), height, one_sided=False)[:, None]
    phi_2 = phi(spectrum, torch.arange(length // 2 + 1), length, spectrum.one_sided)
    table = (1.0 - phi_1 * phi_2) * bin_counts(length, spectrum.one_sided)
    scale = {"sum": 1.0, "ortho": 1.0 / (height * length), "mean": 1.0 / table.numel()}[
        spectrum.norm
    ]
    return _energy(torch.fft.rfft2(w), scale * table)


def _line_sum(rows: Tensor, spectrum: Spectrum) -> Tensor:
    length = rows.shape[-1]
    counts = bin_counts(length, spectrum.one_sided)
    scale = {"sum": 1.0, "ortho": 1.0 / length, "mean": 1.0 / len(counts)}[spectrum.norm]
    table = scale * counts * rho(spectrum, torch.arange(len(counts)), length)
    return _energy(torch.fft.rfft(rows), table)


def _energy(spectrum: Tensor, table: Tensor) -> Tensor:
    return ((spectrum.real**2 + spectrum.imag**2) * table.to(spectrum.real)).sum()


def _ramp_mean(length: int, edge: float, one_sided: bool) -> float:
    """Mean of min(1, k / edge) over the counted bins; closed, as `delta_w` has N * K of them."""
    bins = length // 2 + 1
    below = min(bins, int(-(-edge // 1)))  # bins 0 .. below - 1 lie under the edge
    total = below * (below - 1) / (2.0 * edge) + (bins - below)
    if one_sided:
        return total / bins
    nyquist = min(1.0, (bins - 1) / edge) if length % 2 == 0 else 0.0  # bin 0 has g = 0
    return (2.0 * total - nyquist) / length


def _shuffle(index: Tensor, length: int, seed: int) -> Tensor:
    """A fixed pseudo-random permutation of the bins 1 .. (N - 1) // 2; bins outside stay.

    A four-round Feistel network on the next power of four, walked until it lands inside:
    computable per bin, because a permutation table for the flattened `delta_w` would be as large
    as the dense matrix.
    """
    count = (length - 1) // 2
    paired = (index >= 1) & (index <= count)
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2) if count > 0 else 1
    mask = (1 << half_bits) - 1
    keys = torch.randint(1 << 31, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    place = torch.where(paired, index - 1, 0)
    walking = paired.clone()
    while bool(walking.any()):
        left, right = place >> half_bits, place & mask
        for key in keys:
            mixed = (right + key) * 0x9E3779B1  # wraps in int64, which is as good
            left, right = right, left ^ ((mixed ^ (mixed >> 15)) & mask)
        place = torch.where(walking, (left << half_bits) | right, place)
        walking = walking & (place >= count)
    return torch.where(paired, place + 1, index)
