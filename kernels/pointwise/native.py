"""The C source: bf16 in and out, fp32 inside, a row at a time, so that a row is read from memory once.

PyTorch makes of transformers' RMSNorm seven operations forward and nine backward, of SwiGLU two and three, each of
which reads and writes the whole tensor, half of them in fp32.
"""

from __future__ import annotations

import ctypes
import functools

from ..native_build import FLOAT, INT, LONG, POINTER, compile_or_warn

SOURCE = r"""
#include <stdint.h>
typedef uint16_t bf16;

static inline float wide(bf16 b)
{
    union { uint32_t u; float f; } v = { .u = (uint32_t)b << 16 };
    return v.f;
}

/* To the nearest, ties to even; NaN stays one. */
static inline bf16 narrow(float f)
{
    union { float f; uint32_t u; } v = { .f = f };
    const uint32_t rounded = (v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16;
    return (bf16)((v.u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* exp(z) to about 2 ulp: 2^n exp(r), |r| <= ln(2)/2, a polynomial of degree 6. Beyond 60 it stays exp(60): compilers
   compute both sides of a clamp, and a side with subnormal products takes ten times the time of all else. */
static inline float exponential(float z)
{
    z = z < -60.0f ? -60.0f : z;
    z = z > 60.0f ? 60.0f : z;
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    const float n = (z * 1.44269504f + magic) - magic;
    const float r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { uint32_t u; float f; } scale = { .u = (uint32_t)((int32_t)n + 127) << 23 };
    return p * scale.f;
}

static inline float sigmoid(float z) { return 1.0f / (1.0f + exponential(-z)); }

/* y = w * bf16(x * scale), scale = 1 / sqrt(mean(x^2) + eps), kept for backward. */
void rms_norm(const bf16 *restrict x, const bf16 *restrict w, bf16 *restrict y, float *restrict scale,
              int64_t begin, int64_t end, int32_t size, float eps)
{
    for (int64_t row = begin; row < end; row++) {
        const bf16 *in = x + row * size;
        bf16 *out = y + row * size;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int32_t i = 0; i < size; i++) sum += wide(in[i]) * wide(in[i]);
        const float s = 1.0f / __builtin_sqrtf(sum / (float)size + eps);
        for (int32_t i = 0; i < size; i++) out[i] = narrow(wide(w[i]) * wide(narrow(wide(in[i]) * s)));
        scale[row] = s;
    }
}

/* dx = scale (w dy - x scale^2 mean(w dy x)) */
void rms_norm_backward(const bf16 *restrict x, const bf16 *restrict w, const bf16 *restrict dy,
                       const float *restrict scale, bf16 *restrict dx, int64_t begin, int64_t end, int32_t size)
{
    for (int64_t row = begin; row < end; row++) {
        const bf16 *in = x + row * size, *up = dy + row * size;
        bf16 *out = dx + row * size;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int32_t i = 0; i < size; i++) dot += wide(w[i]) * wide(up[i]) * wide(in[i]);
        const float s = scale[row], along = dot / (float)size * s * s;
        for (int32_t i = 0; i < size; i++) out[i] = narrow(s * (wide(w[i]) * wide(up[i]) - wide(in[i]) * along));
    }
}

/* Sixteen at a time, where a processor narrows by itself (subnormal numbers to 0): two thirds of the compiler's time.
   They return where they stop, short of `end`. */
#ifdef __AVX512BF16__
#include <immintrin.h>
#define INLINE static inline __attribute__((always_inline))
INLINE __m512 wide_16(const bf16 *from)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}
INLINE void narrow_16(bf16 *to, __m512 v) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(v)); }

INLINE __m512 sigmoid_16(__m512 z)
{
    const __m512 one = _mm512_set1_ps(1.0f), magic = _mm512_set1_ps(12582912.0f);
    /* as `exponential` of -z; the order of max's and min's operands lets NaN through */
    const __m512 x = _mm512_min_ps(_mm512_set1_ps(60.0f), _mm512_max_ps(_mm512_set1_ps(-60.0f), -z));
    const __m512 n = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), magic) - magic;
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, one);
    p = _mm512_fmadd_ps(p, r, one);
    return one / (one + _mm512_scalef_ps(p, n));
}

static int64_t swiglu_16(const bf16 *gate, const bf16 *up, bf16 *h, int64_t i, int64_t end)
{
    for (; i + 16 <= end; i += 16) {
        const __m512 g = wide_16(gate + i);
        bf16 silu[16];
        narrow_16(silu, g * sigmoid_16(g));
        narrow_16(h + i, wide_16(silu) * wide_16(up + i));
    }
    return i;
}

static int64_t swiglu_backward_16(const bf16 *gate, const bf16 *up, const bf16 *dh, bf16 *dgate, bf16 *dup, int64_t i,
                                  int64_t end)
{
    const __m512 one = _mm512_set1_ps(1.0f);
    for (; i + 16 <= end; i += 16) {
        const __m512 g = wide_16(gate + i), d = wide_16(dh + i), s = sigmoid_16(g);
        narrow_16(dup + i, d * (g * s));
        narrow_16(dgate + i, d * wide_16(up + i) * (s * (one + g * (one - s))));
    }
    return i;
}
#else
static int64_t swiglu_16(const bf16 *g, const bf16 *u, bf16 *h, int64_t i, int64_t end) { return i; }
static int64_t swiglu_backward_16(const bf16 *g, const bf16 *u, const bf16 *dh, bf16 *dg, bf16 *du, int64_t i,
                                  int64_t end) { return i; }
#endif

/* h = bf16(silu(g)) u */
void swiglu(const bf16 *restrict gate, const bf16 *restrict up, bf16 *restrict h, int64_t begin, int64_t end)
{
    for (int64_t i = swiglu_16(gate, up, h, begin, end); i < end; i++) {
        const float g = wide(gate[i]);
        h[i] = narrow(wide(narrow(g * sigmoid(g))) * wide(up[i]));
    }
}

/* du = dh silu(g), dg = dh u silu'(g) */
void swiglu_backward(const bf16 *restrict gate, const bf16 *restrict up, const bf16 *restrict dh,
                     bf16 *restrict dgate, bf16 *restrict dup, int64_t begin, int64_t end)
{
    for (int64_t i = swiglu_backward_16(gate, up, dh, dgate, dup, begin, end); i < end; i++) {
        const float g = wide(gate[i]), d = wide(dh[i]), s = sigmoid(g);
        dup[i] = narrow(d * (g * s));
        dgate[i] = narrow(d * wide(up[i]) * (s * (1.0f + g * (1.0f - s))));
    }
}

/* Row r sees the first r / groups % length + 1 of its `length` scores. In place: the others become 0. */
void causal_softmax(bf16 *restrict scores, int64_t begin, int64_t end, int32_t length, int32_t groups, float scale)
{
    float e[LONGEST];
    for (int64_t row = begin; row < end; row++) {
        bf16 *p = scores + row * length;
        const int32_t seen = (int32_t)(row / groups % length) + 1;
        /* Whole vectors: the odd ends would be half of a short row. Exponents of -inf add exp(-60), below a sum's
           last bit. */
        const int32_t whole = (seen + 15) / 16 * 16, here = whole < length ? whole : length;
        float most = -__builtin_inff(), sum = 0.0f;
        for (int32_t i = 0; i < here; i++) e[i] = scale * wide(p[i]);
        for (int32_t i = seen; i < whole; i++) e[i] = -__builtin_inff();
#pragma omp simd reduction(max : most)
        for (int32_t i = 0; i < whole; i++) most = e[i] > most ? e[i] : most;
#pragma omp simd reduction(+ : sum)
        for (int32_t i = 0; i < whole; i++) sum += e[i] = exponential(e[i] - most);
        const float share = 1.0f / sum;
        for (int32_t i = 0; i < here; i++) p[i] = narrow(e[i] * share);
        for (int32_t i = seen; i < length; i++) p[i] = 0;
    }
}

/* In place: dp becomes scale p (dp - sum(p dp)), 0 where the row does not see. */
void causal_softmax_backward(const bf16 *restrict probabilities, bf16 *restrict dp, int64_t begin, int64_t end,
                             int32_t length, int32_t groups, float scale)
{
    for (int64_t row = begin; row < end; row++) {
        const bf16 *p = probabilities + row * length;
        bf16 *d = dp + row * length;
        const int32_t seen = (int32_t)(row / groups % length) + 1;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int32_t i = 0; i < seen; i++) dot += wide(p[i]) * wide(d[i]);
        for (int32_t i = 0; i < seen; i++) d[i] = narrow(scale * wide(p[i]) * (wide(d[i]) - dot));
        for (int32_t i = seen; i < length; i++) d[i] = 0;
    }
}

/* Of each row its largest logit and the sum of exp(logit - largest). grad, if not NULL, may be the logits:
   scale (softmax - onehot(label)). */
void cross_entropy(const bf16 *logits, const int64_t *labels, bf16 *grad, float *stats, int64_t begin, int64_t end,
                   int32_t size, float scale)
{
    enum { BLOCK = 2048 }; /* elements whose sum is taken in fp32 */
    for (int64_t row = begin; row < end; row++) {
        const bf16 *in = logits + row * size;
        const float picked = wide(in[labels[row]]);
        float most = -__builtin_inff();
#pragma omp simd reduction(max : most)
        for (int32_t i = 0; i < size; i++) most = wide(in[i]) > most ? wide(in[i]) : most;
        double total = 0.0;
        for (int32_t start = 0; start < size; start += BLOCK) {
            const int32_t stop = size - start < BLOCK ? size : start + BLOCK;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int32_t i = start; i < stop; i++) sum += exponential(wide(in[i]) - most);
            total += sum;
        }
        stats[2 * row] = most;
        stats[2 * row + 1] = (float)total;
        if (!grad) continue;
        bf16 *out = grad + row * size;
        const float share = scale / (float)total;
#pragma GCC ivdep
        for (int32_t i = 0; i < size; i++) out[i] = narrow(exponential(wide(in[i]) - most) * share);
        out[labels[row]] = narrow(exponential(picked - most) * share - scale);
    }
}
"""
LONGEST = 4096  # scores of a row: 16 KiB of a thread's stack
# simd: sums may be taken in another order; no OpenMP runtime comes with it. Contracted products: a quarter
# to a half of SwiGLU's time, and everything is rounded to bf16 afterwards.
FLAGS = ("-fopenmp-simd", "-ffp-contract=fast", f"-DLONGEST={LONGEST}")
ARGUMENTS = {
    "rms_norm": (*[POINTER] * 4, LONG, LONG, INT, FLOAT),
    "rms_norm_backward": (*[POINTER] * 5, LONG, LONG, INT),
    "swiglu": (*[POINTER] * 3, LONG, LONG),
    "swiglu_backward": (*[POINTER] * 5, LONG, LONG),
    "causal_softmax": (POINTER, LONG, LONG, INT, INT, FLOAT),
    "causal_softmax_backward": (POINTER, POINTER, LONG, LONG, INT, INT, FLOAT),
    "cross_entropy": (*[POINTER] * 4, LONG, LONG, INT, FLOAT),
}


@functools.cache  # one attempt per process
def library() -> ctypes.CDLL | None:
    """The compiled SOURCE; None, and one line in the log, if it cannot be compiled or loaded."""
    what = "pointwise: the C source of RMSNorm, SwiGLU, attention's softmax and the loss"
    return compile_or_warn("pointwise", SOURCE, ARGUMENTS, what, "PyTorch's operations", FLAGS)
