"""Public functions: argument checks, dtype rules, choice of implementation. No autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..runtime import TRITON_DTYPES, choose_impl, require
from . import line_native
from .chips import chip_of
from .reference import ROLES, Spectrum
from .transform import apply_operator, line_table, plane_table, product_gradients

KERNEL = "spectral_penalty"
# Elements that torch transforms at once: spectrum, gradient and copy then stay in cache. Adapters of a 7B
# at r 8, 2 cores of a Xeon, axis: 149 ms without a bound, 86 at 2^20, 91 at 2^19, 114 at 2^18; flat 109, 101, 128, 180
# (each transform plans anew).
CHUNK = 2**20


def spectral_penalty(
    weights: Tensor, spectrum: Spectrum, *, role: str = "A", weight: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """weight * P of each matrix of a batch, and its exact gradient: 2 C w by one transform and one
    back.

    Args:
        weights: (M, r, K) for role "A", (M, N, r) for role "B"; float16, bfloat16, float32 or
            float64.
        spectrum: frequency weights, transform and norm; the formula is in reference.py.
        role: which axis is the feature axis (`axis` and `fft2`): the last of an A, the first of a
            B.
        weight: lambda; multiplies values and gradients.
        impl: "auto" | "torch" | "triton" (`axis` only, 16- or 32-bit, and lengths that factor:
            tables.plan). Here "auto" is torch; `spectral_penalty_into` is the fast form.

    Returns:
        values (M,), = <w, gradient> / 2, and the contiguous gradient in the shape of `weights`;
        both float32, or float64 when the input is. Computed outside autocast and without a graph.

    Raises:
        ValueError: a wrong role, shape, dtype or impl, or a length that the kernel cannot take.
        NotImplementedError: impl="triton" with another transform than `axis`.
    """
    _check_batch("weights", weights)
    if role not in ROLES:
        raise ValueError(f"role={role!r}; allowed: {', '.join(ROLES)}")
    if impl != "auto" and choose_impl(KERNEL, impl, weights.device) == "triton":
        _check_triton([weights], spectrum)
        w = weights.detach()
        grad = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
        roles = [role] * len(w)
        return _into_triton(list(w), list(grad), spectrum, roles, weight, [None] * len(w))[0], grad
    require(impl in ("auto", "torch"), "impl", impl, "one of auto, torch, triton")
    turned = role == "B" and spectrum.transform != "flat"
    with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
        w = _computable(weights)
        found = line_native.batch_penalty(w, spectrum, role, weight)
        if found is not None:
            return found
        w = w.mT.contiguous() if turned else w
        grad = apply_operator(w, spectrum, 2.0 * weight)
        values = (w * grad).sum((-2, -1)).mul_(0.5)  # a dot product's bits depend on addresses
        return values, grad.mT.contiguous() if turned else grad


def spectral_penalty_into(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    spectrum: Spectrum,
    roles: Sequence[str],
    weight: float,
    starts: Sequence[Tensor | None] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Add weight * grad P(w - w0) into gradients in place, for matrices of any mix of shapes.

    The Triton path is one launch per length of the feature axis (and per mix of dtypes) and one for
    values and squares: 12 bytes per fp32 element, no copy of a matrix.

    Args:
        params: M matrices, (r, K) for role "A", (N, r) for "B"; any strides.
        grads: of the same shapes; changed.
        spectrum, weight: as in `spectral_penalty`.
        roles: "A" or "B" of each.
        starts: w0 of each, or None for 0.
        impl: "auto" | "torch" | "triton". "auto" is Triton on a GPU for `axis` and torch for the
            rest: other transforms, fp64, lengths that do not factor or that are too long for the
            GPU's registers (chips.py; a hard edge takes full precision, and more of them).

    Returns:
        (2, M): values of weight * P, and squares |weight * grad P|^2 before a gradient's dtype
        rounds; float32, or float64 when a matrix is.

    Raises:
        ValueError: lists or shapes that do not match, a wrong role or impl; for impl="triton" also
            a dtype or a length that the kernel cannot take.
        NotImplementedError: impl="triton" with another transform than `axis`.
    """
    require(len(params) > 0, "the number of matrices", len(params), "at least 1")
    starts = [None] * len(params) if starts is None else starts
    for name, found in (("grads", grads), ("roles", roles), ("starts", starts)):
        require(len(found) == len(params), f"len({name})", len(found), f"{len(params)}")
    for w, g, role, w0 in zip(params, grads, roles, starts, strict=True):
        require(role in ROLES, "role", repr(role), " or ".join(ROLES))
        require(w.ndim == 2 and w.numel() > 0, "a matrix's shape", tuple(w.shape), "two axes > 0")
        for t in (g, w if w0 is None else w0):
            require(t.shape == w.shape, "a shape", tuple(t.shape), f"{tuple(w.shape)}, as its w")
    chosen = choose_impl(KERNEL, impl, params[0].device)
    fits = [chosen == "triton"] * len(params)
    if impl == "triton":
        _check_triton([*params, *grads, *(s for s in starts if s is not None)], spectrum)
    elif chosen == "triton":
        fits = [_fits(*m, spectrum) for m in zip(params, grads, roles, starts, strict=True)]
    with torch.no_grad(), torch.autocast(params[0].device.type, enabled=False):
        if all(fits) or not any(fits):
            runner = _into_triton if fits[0] else _into_torch
            return runner(params, grads, spectrum, roles, weight, starts)
        results = _results(params)
        for runner, on_kernel in ((_into_triton, True), (_into_torch, False)):
            index = [i for i, fit in enumerate(fits) if fit == on_kernel]
            part = runner(
                [params[i] for i in index],
                [grads[i] for i in index],
                spectrum,
                [roles[i] for i in index],
                weight,
                [starts[i] for i in index],
            )
            results[:, index] = part.to(results.dtype)
    return results


def _results(params: Sequence[Tensor]) -> Tensor:
    """Room for values and squares."""
    wide = any(w.dtype == torch.float64 for w in params)
    dtype = torch.float64 if wide else torch.float32
    return torch.empty(2, len(params), dtype=dtype, device=params[0].device)


def _into_torch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    spectrum: Spectrum,
    roles: Sequence[str],
    weight: float,
    starts: Sequence[Tensor | None],
) -> Tensor:
    """In place, line by line, where line_native takes them; the rest by the batched function: matrices of one shape and
    role are stacked, CHUNK elements at a time."""
    results = _results(params)
    matrices = list(zip(params, starts, grads, strict=True))
    # Two threads must not add to one gradient.
    distinct = len({id(g) for g in grads}) == len(grads)
    taken: list[int] = []
    groups: dict[tuple, list[int]] = {}
    for i, (w, role) in enumerate(zip(params, roles, strict=True)):
        if distinct and line_native.takes(matrices[i], role, spectrum):
            taken.append(i)
        else:
            groups.setdefault((role, w.shape, w.dtype), []).append(i)
    if taken:
        chosen, kinds = [matrices[i] for i in taken], [roles[i] for i in taken]
        found = line_native.penalty(chosen, kinds, spectrum, weight, add=True)
        results[:, taken] = found.to(results.dtype)
    for (role, shape, _), group in groups.items():
        at_once = max(1, CHUNK // shape.numel())
        for index in (group[k : k + at_once] for k in range(0, len(group), at_once)):
            stack = torch.stack([_computable(params[i].detach()) for i in index])
            for row, i in zip(stack, index, strict=True):
                if starts[i] is not None:
                    row -= starts[i]
            found, grad = spectral_penalty(stack, spectrum, role=role, weight=weight, impl="torch")
            _add([grads[i] for i in index], list(grad))
            squares = grad.square().sum((-2, -1))
            results[:, index] = torch.stack([found, squares]).to(results.dtype)
    return results


def _add(grads: list[Tensor], found: list[Tensor]) -> None:
    """grads += found, summed in the wider of the two dtypes and rounded once."""
    if all(a.dtype == b.dtype for a, b in zip(grads, found, strict=True)):
        torch._foreach_add_(grads, found)
        return
    for a, b in zip(grads, found, strict=True):
        a.copy_(a.to(b.dtype) + b)


def _into_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    spectrum: Spectrum,
    roles: Sequence[str],
    weight: float,
    starts: Sequence[Tensor | None],
) -> Tensor:
    """One launch per length and mix of dtypes, and one for values and squares."""
    from .kernel import Vectors, penalty_launch, programs, sum_launch
    from .tables import plan, precision_of, tables

    groups: dict[tuple, list[int]] = {}
    matrices = [Vectors(*m) for m in zip(params, grads, starts, roles, strict=True)]
    for i, m in enumerate(matrices):
        key = (m.length, m.w.dtype, m.g.dtype, None if m.w0 is None else m.w0.dtype)
        groups.setdefault(key, []).append(i)
    precision, chip = precision_of(spectrum), chip_of(params[0].device)
    plans = {key: plan(key[0], precision, chip) for key in groups}  # refuses before any work
    counts = [programs(plans[key], matrices[i]) for key, index in groups.items() for i in index]
    device = params[0].device
    partials = torch.empty(2, sum(counts), dtype=torch.float32, device=device)
    first = 0
    for key, index in groups.items():
        chosen = [matrices[i] for i in index]
        size = sum(programs(plans[key], m) for m in chosen)
        found = tables(plans[key], spectrum, device)
        penalty_launch(chosen, plans[key], found, weight, partials[:, first : first + size])
        first += size
    order = [i for index in groups.values() for i in index]
    both = [*order, *(len(matrices) + i for i in order)]
    return sum_launch(partials.view(-1), counts * 2, both).view(2, -1)


def _fits(w: Tensor, g: Tensor, role: str, w0: Tensor | None, spectrum: Spectrum) -> bool:
    """Whether "auto" gives a matrix to the kernel."""
    from .tables import plan, precision_of

    dtypes = {t.dtype for t in (w, g, w0) if t is not None}
    if spectrum.transform != "axis" or not dtypes <= set(TRITON_DTYPES):
        return False
    try:
        length = w.shape[1] if role == "A" else w.shape[0]
        plan(length, precision_of(spectrum), chip_of(w.device))
    except ValueError:
        return False
    return True


def _check_triton(tensors: Sequence[Tensor], spectrum: Spectrum) -> None:
    if spectrum.transform != "axis":
        raise NotImplementedError(
            f"spectral_penalty: transform={spectrum.transform} has no Triton implementation, only "
            "axis has; use impl='auto' or impl='torch', or transform='axis'"
        )
    for t in tensors:
        require(t.dtype in TRITON_DTYPES, "a dtype", t.dtype, "a 16- or 32-bit float for Triton")


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
    if impl == "triton":
        raise NotImplementedError(
            "spectral_penalty_delta has no Triton implementation; use impl='torch' or 'auto'"
        )
    require(impl in ("auto", "torch"), "impl", impl, "one of auto, torch, triton")
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
