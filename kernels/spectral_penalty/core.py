"""C w on a tile of registers: a discrete Fourier transform as two small dots, times sigma, and back.

Legend: q = q1 * q2 the core's length, j = j1 * q2 + j2 a place, k = k1 + q1 * k2 a frequency; Q1, Q2
are q1, q2 padded to powers of two, the tables being zero in the padding. With t = exp(-2 pi i / q)

    X[k1 + q1 k2] = sum_j2 exp(-2 pi i j2 k2 / q2) t^(j2 k1) sum_j1 exp(-2 pi i j1 k1 / q1) x[j1, j2]

so it is a dot along axis 0, a twiddle and a dot along axis 1; frequencies stay in (k1, k2) order and
sigma is stored in it. A complex dot is one real dot with the stacked table [[Re, -Im], [Im, Re]] on
[Re; Im]: sixteen separate dots spill. The way back is the conjugate of the way there on the
conjugate, so it takes the same tables in the other order: F^H x = conj(F conj(x)).

C is real: two real rows a, b make one complex row, C(a + ib) = C a + i C b.

A row longer than a core is cut into S blocks x_l[j] = w[l q + j]. The frequencies S k + c of one
residue class c need only

    y_c[j] = exp(-2 pi i c j / n) * sum_l exp(-2 pi i l c / S) x_l[j]

so: butterfly, then class by class twist, core with sigma[S k + c], untwist, in place, and the
inverse butterfly. Of a real row, classes c and S - c are conjugates: one stands for both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stacked_table(ptr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """The (2 Q, 2 Q) stacked table of a DFT of at most Q points: its TF32 part, and the rest."""
    offs_Q = tl.arange(0, 2 * Q)
    ptr += offs_Q[:, None] * (2 * Q) + offs_Q[None, :]
    high = tl.load(ptr)
    low = high if PRECISION == "tf32" else tl.load(ptr + 4 * Q * Q)
    return high, low


@triton.jit
def _plane(ptr, Q1: tl.constexpr, Q2: tl.constexpr):
    """One (Q1, Q2) plane of a table."""
    offs_Q1, offs_Q2 = tl.arange(0, Q1), tl.arange(0, Q2)
    # volatile: else the compiler loads it once for all classes, keeps it in registers, and spills
    return tl.load(ptr + offs_Q1[:, None] * Q2 + offs_Q2[None, :], volatile=True)


@triton.jit
def _turn(re, im, table_ptr, SIGN: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr):
    """(re + i im) times the table (2, Q1, Q2) of cosines and sines, or its conjugate for SIGN -1."""
    cos, sin = _plane(table_ptr, Q1, Q2), _plane(table_ptr + Q1 * Q2, Q1, Q2)
    if SIGN > 0:
        return re * cos - im * sin, re * sin + im * cos
    else:
        return re * cos + im * sin, im * cos - re * sin


@triton.jit
def _multiply(parts, re, im, R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Stacked table (2 R, 2 R), as its TF32 part and the rest, times re + i im (R, C)."""
    high, low = parts
    x = tl.reshape(tl.permute(tl.join(re, im), (2, 0, 1)), (2 * R, C))
    if PRECISION == "tf32":
        x = tl.dot(high, x, input_precision="tf32")
    else:
        # three products of TF32 parts, as "tf32x3" would be; but the table's parts come from memory
        x_high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 10 bits
        acc = tl.dot(low, x_high, input_precision="tf32")
        acc = tl.dot(high, x - x_high, acc, input_precision="tf32")
        x = tl.dot(high, x_high, acc, input_precision="tf32")
    return tl.split(tl.permute(tl.reshape(x, (2, R, C)), (1, 2, 0)))


@triton.jit
def circulant_pair(
    re,
    im,
    dft1,
    dft2,
    twiddle_ptr,
    sigma_ptr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C (re + i im) and <w, C w> of the pair: (Q1, Q2), (Q1, Q2) and a scalar, fp32.

    Args:
        re, im: (Q1, Q2) fp32, zero in the padding.
        dft1, dft2: stacked tables (2 Q1, 2 Q1), (2 Q2, 2 Q2).
        twiddle_ptr: cos and sin planes (2, Q1, Q2) of t^(j2 k1).
        sigma_ptr: (Q2, Q1) at (k2, k1).
    """
    re, im = _multiply(dft1, re, im, Q1, Q2, PRECISION)
    re, im = _turn(re, im, twiddle_ptr, 1.0, Q1, Q2)
    re, im = _multiply(dft2, tl.trans(re), tl.trans(im), Q2, Q1, PRECISION)
    sigma = _plane(sigma_ptr, Q2, Q1)
    energy = tl.sum(tl.sum((re * re + im * im) * sigma, axis=1), axis=0)
    # the way back: conjugate, the same tables in the other order, conjugate. No transposed table
    re, im = _multiply(dft2, re * sigma, -im * sigma, Q2, Q1, PRECISION)
    re, im = _turn(tl.trans(re), tl.trans(im), twiddle_ptr, 1.0, Q1, Q2)
    re, im = _multiply(dft1, re, im, Q1, Q2, PRECISION)
    im = -im
    return re, im, energy


@triton.jit
def circulant_class(
    re,
    im,
    tables,
    CLASS: tl.constexpr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One residue class: twist, core with the class's sigma, untwist.

    tables: two, pointers to three, and a pointer to a zero (`_class_apart`).
    """
    dft1, dft2, twiddle_ptr, sigma_ptr, twist_ptr, _ = tables
    sigma_ptr += CLASS * Q1 * Q2
    if CLASS == 0:
        return circulant_pair(re, im, dft1, dft2, twiddle_ptr, sigma_ptr, Q1, Q2, PRECISION)
    else:
        twist_ptr += CLASS * 2 * Q1 * Q2
        re, im = _turn(re, im, twist_ptr, 1.0, Q1, Q2)
        re, im, energy = circulant_pair(
            re, im, dft1, dft2, twiddle_ptr, sigma_ptr, Q1, Q2, PRECISION
        )
        re, im = _turn(re, im, twist_ptr, -1.0, Q1, Q2)
        return re, im, energy


@triton.jit
def _class_apart(
    re,
    im,
    tables,
    CLASS: tl.constexpr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
):
    """`circulant_class`; if APART, under a condition that always holds, which nobody can know.

    So the compiler computes addresses anew for every class, instead of keeping them in registers
    from the first class to the last.
    """
    energy = 0.0
    if APART:
        if tl.load(tables[5], volatile=True) == 0:
            re, im, energy = circulant_class(re, im, tables, CLASS, Q1, Q2, PRECISION)
    else:
        re, im, energy = circulant_class(re, im, tables, CLASS, Q1, Q2, PRECISION)
    return re, im, energy


@triton.jit
def circulant_four(
    x0,
    x1,
    x2,
    x3,
    tables,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
):
    """Classes of stride 4 of one real row: C x as four blocks, and <x, C x>.

    Class 2 is of a real row too; class 1 stands for class 3.
    """
    a0, a1, b0, b1 = x0 + x2, x1 + x3, x0 - x2, x1 - x3
    u, v = a0 + a1, a0 - a1
    u, _, e0 = _class_apart(u, tl.zeros_like(u), tables, 0, Q1, Q2, PRECISION, APART)
    v, _, e2 = _class_apart(v, tl.zeros_like(v), tables, 2, Q1, Q2, PRECISION, APART)
    re, im, e1 = _class_apart(b0, -b1, tables, 1, Q1, Q2, PRECISION, APART)
    a0, a1, re, im = u + v, u - v, 2.0 * re, 2.0 * im
    return a0 + re, a1 - im, a0 - re, a1 + im, e0 + e2 + 2.0 * e1


@triton.jit
def circulant_eight(
    x0,
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    x7,
    tables,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
):
    """Classes of stride 8 of one real row: even ones from sums, odd ones from differences.

    Classes 0 and 4 are of a real row; 1, 2, 3 stand for 7, 6, 5.
    """
    ROOT: tl.constexpr = 0.7071067811865476
    a0, a1, a2, a3 = x0 + x4, x1 + x5, x2 + x6, x3 + x7
    b0, b1, b2, b3 = x0 - x4, x1 - x5, x2 - x6, x3 - x7
    d, s = (b1 - b3) * ROOT, (b1 + b3) * ROOT
    r1, i1, e1 = _class_apart(b0 + d, -b2 - s, tables, 1, Q1, Q2, PRECISION, APART)
    r3, i3, e3 = _class_apart(b0 - d, b2 - s, tables, 3, Q1, Q2, PRECISION, APART)
    energy = e1 + e3  # summed at once: every value that waits for the end takes a register
    r2, i2, e2 = _class_apart(a0 - a2, a3 - a1, tables, 2, Q1, Q2, PRECISION, APART)
    energy = 2.0 * (energy + e2)
    a0, a1 = a0 + a2, a1 + a3
    u, v = a0 + a1, a0 - a1
    u, _, e0 = _class_apart(u, tl.zeros_like(u), tables, 0, Q1, Q2, PRECISION, APART)
    v, _, e4 = _class_apart(v, tl.zeros_like(v), tables, 4, Q1, Q2, PRECISION, APART)
    energy += e0 + e4
    a0, a1 = u + v, u - v
    r2, i2 = 2.0 * r2, 2.0 * i2
    a0, a1, a2, a3 = a0 + r2, a1 - i2, a0 - r2, a1 + i2
    b0, b2 = 2.0 * (r1 + r3), 2.0 * (i3 - i1)
    d, s = (r1 - r3) * (2.0 * ROOT), (i1 + i3) * (2.0 * ROOT)
    b1, b3 = d - s, -d - s
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a0 - b0, a1 - b1, a2 - b2, a3 - b3, energy
