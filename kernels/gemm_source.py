"""The C source of gemm_native.py: AVX-512 with its bf16 dot products.

A word is two bf16; a dot product takes words whose halves are neighbours along the axis that is summed over. The right
operand is packed so: panels of WIDTH columns, in each the words of two rows, the columns side by side. A few panels at
a time, as many as stay in the second cache, meet all rows of the left operand, which is read where it lies, STEP rows
at a time: their STEP x WIDTH sums are 24 registers.
"""

from __future__ import annotations

SOURCE = r"""
#include <stdint.h>
#include <string.h>
typedef uint16_t bf16;
typedef uint32_t word;

/* a (rows, depth) b (depth, columns): rows of a are contiguous, and of b's strides one is 1 */
typedef struct {
    const bf16 *a, *b;
    int64_t stride_a, stride_k, stride_n, depth;
} Product;

/* y = [y +] bias + keep * low + main; of NULL or a depth of 0, nothing. keys: of `keep_mask`, the additive ones of all
   rows and then of words, then the others. */
typedef struct {
    Product low, main;
    const bf16 *bias;
    bf16 *y;
    const word *keys;
    int64_t stride_y, rows, columns, words;
    int32_t add, least;
} Job;

#ifndef __AVX512BF16__
int32_t supported(void) { return 0; }
void multiply(const Job *job, int64_t begin, int64_t end, int64_t top, int64_t bottom, word *packed, int64_t panels) {}
#else
#include <immintrin.h>
enum { STEP = 6, LANES = 16, VECTORS = 4, WIDTH = LANES * VECTORS };
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

int32_t supported(void) { return 1; }

INLINE int64_t pairs_of(const Product p) { return (p.depth + 1) / 2; }

/* Of the 16 columns from `first` on, those that there are. */
INLINE __mmask16 some(int64_t columns, int64_t first)
{
    const int64_t left = columns - first;
    return left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
}
INLINE __m512 wide(__mmask16 mask, const bf16 *from)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
}
INLINE __m512bh pair(const bf16 *from)
{
    int32_t two;
    memcpy(&two, from, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}
INLINE __m512bh last(const bf16 *from) { return (__m512bh)_mm512_set1_epi32(*from); }

/* sums += a few rows of a times a packed panel of b */
INLINE void sum_up(const int rows, const Product p, int64_t row, const word *b, __m512 sums[STEP][VECTORS])
{
    const bf16 *a = p.a + row * p.stride_a;
    for (int64_t k = 0; k + 1 < p.depth; k += 2, b += WIDTH) {
        __m512bh right[VECTORS];
        EACH(v, VECTORS) right[v] = (__m512bh)_mm512_loadu_si512(b + LANES * v);
        EACH(i, rows) {
            const __m512bh left = pair(a + i * p.stride_a + k);
            EACH(v, VECTORS) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], left, right[v]);
        }
    }
    if (p.depth % 2) EACH(i, rows) EACH(v, VECTORS)
        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], last(a + i * p.stride_a + p.depth - 1),
                                      (__m512bh)_mm512_loadu_si512(b + LANES * v));
}

/* Dropped sums become 0: the 16 from `column` on, of one row. */
INLINE __m512 kept(const Job *job, __m512 sums, int64_t row, int64_t column)
{
    const word *add = job->keys, *multiply = add + job->rows + job->words;
    const int64_t at = job->rows + column / 2, left = job->words - column / 2;
    const __mmask8 there = left >= 8 ? 0xff : left > 0 ? (1u << left) - 1 : 0;
    const __m256i a = _mm256_add_epi32(_mm256_maskz_loadu_epi32(there, add + at), _mm256_set1_epi32((int)add[row]));
    const __m256i m =
        _mm256_add_epi32(_mm256_maskz_loadu_epi32(there, multiply + at), _mm256_set1_epi32((int)multiply[row]));
    const __m256i lanes = _mm256_mullo_epi32(a, m);
    const __mmask16 keep = _mm256_cmpge_epi16_mask(lanes, _mm256_set1_epi16((int16_t)job->least));
    return _mm512_maskz_mov_ps(keep, sums);
}

INLINE void tile(const int rows, const Job *job, int64_t row, int64_t column, const word *b)
{
    __m512 sums[STEP][VECTORS];
    EACH(i, rows) EACH(v, VECTORS) sums[i][v] = _mm512_setzero_ps();
    if (job->low.depth) {
        sum_up(rows, job->low, row, b, sums);
        b += pairs_of(job->low) * WIDTH;
        if (job->keys) EACH(i, rows) EACH(v, VECTORS)
            sums[i][v] = kept(job, sums[i][v], row + i, column + LANES * v);
    }
    bf16 *y = job->y + row * job->stride_y + column;
    EACH(v, VECTORS) {
        const __mmask16 there = some(job->columns, column + LANES * v);
        if (job->bias) {
            const __m512 bias = wide(there, job->bias + column + LANES * v);
            EACH(i, rows) sums[i][v] = _mm512_add_ps(sums[i][v], bias);
        }
        if (job->add) EACH(i, rows)
            sums[i][v] = _mm512_add_ps(sums[i][v], wide(there, y + i * job->stride_y + LANES * v));
    }
    sum_up(rows, job->main, row, b, sums);
    EACH(v, VECTORS) {
        const __mmask16 there = some(job->columns, column + LANES * v);
        EACH(i, rows) _mm256_mask_storeu_epi16(y + i * job->stride_y + LANES * v, there,
                                               (__m256i)_mm512_cvtneps_pbh(sums[i][v]));
    }
}
#define OF_ROWS(n)                                                                                          \
    static __attribute__((noinline)) void tile_##n(const Job *job, int64_t row, int64_t column, const word *b) \
    {                                                                                                       \
        tile(n, job, row, column, b);                                                                       \
    }
OF_ROWS(6) OF_ROWS(3) OF_ROWS(1)

/* 16 words each of 16 rows, `stride` words apart in steps of half a word, with rows and columns exchanged */
INLINE void transposed(const bf16 *in, int64_t stride, word *out)
{
    __m512i r[LANES], t[LANES];
    EACH(i, 16) r[i] = _mm512_loadu_si512(in + i * stride);
    EACH(i, 8) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    EACH(i, 4) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    EACH(j, 4) {
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_si512(out + j * WIDTH, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_storeu_si512(out + (4 + j) * WIDTH, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_storeu_si512(out + (8 + j) * WIDTH, _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_storeu_si512(out + (12 + j) * WIDTH, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
}

/* The words of b from column `first` on, 16 columns of pairs [begin, end), one at a time; 0 beyond the ends. */
static void pack_slowly(const Product p, int64_t columns, int64_t first, int64_t begin, int64_t end, word *out)
{
    for (int64_t pair = begin; pair < end; pair++)
        for (int64_t j = 0; j < LANES; j++) {
            const bf16 *at = p.b + 2 * pair * p.stride_k + (first + j) * p.stride_n;
            const int low = first + j < columns, high = low && 2 * pair + 1 < p.depth;
            out[pair * WIDTH + j] = (low ? *at : 0) | (high ? (word)at[p.stride_k] << 16 : 0);
        }
}

static void pack(const Product p, int64_t columns, int64_t column, word *out)
{
    const int64_t pairs = pairs_of(p);
    for (int64_t first = column; first < column + WIDTH; first += LANES, out += LANES) {
        int64_t pair = 0;
        if (p.stride_n == 1)
            for (; pair < pairs; pair++) {
                const bf16 *at = p.b + 2 * pair * p.stride_k + first;
                const __mmask16 there = some(columns, first), also = 2 * pair + 1 < p.depth ? there : 0;
                const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at));
                const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(also, at + p.stride_k));
                _mm512_storeu_si512(out + pair * WIDTH, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        else if (first + LANES <= columns)
            for (; 2 * pair + 2 * LANES <= p.depth; pair += LANES)
                transposed(p.b + 2 * pair + first * p.stride_n, p.stride_n, out + pair * WIDTH);
        pack_slowly(p, columns, first, pair, pairs, out);
    }
}

/* Panels [begin, end) of rows [top, bottom) of y, `panels` of them packed at a time. */
void multiply(const Job *job, int64_t begin, int64_t end, int64_t top, int64_t bottom, word *packed, int64_t panels)
{
    const int64_t low = pairs_of(job->low) * WIDTH, size = low + pairs_of(job->main) * WIDTH;
    for (int64_t first = begin; first < end; first += panels) {
        const int64_t stop = first + panels < end ? first + panels : end;
        for (int64_t j = first; j < stop; j++) {
            word *out = packed + (j - first) * size;
            if (job->low.depth) pack(job->low, job->columns, j * WIDTH, out);
            pack(job->main, job->columns, j * WIDTH, out + low);
        }
        int64_t row = top;
        for (; row + 6 <= bottom; row += 6)
            for (int64_t j = first; j < stop; j++) tile_6(job, row, j * WIDTH, packed + (j - first) * size);
        for (; row + 3 <= bottom; row += 3)
            for (int64_t j = first; j < stop; j++) tile_3(job, row, j * WIDTH, packed + (j - first) * size);
        for (; row < bottom; row++)
            for (int64_t j = first; j < stop; j++) tile_1(job, row, j * WIDTH, packed + (j - first) * size);
    }
}
#endif
"""
