"""The C source of skinny_native.py, in the compiler's vectors of 64 bytes, which any processor has in pieces.

Where there are bf16 dot products (`dots`), sums over columns and over rows are theirs; half as many instructions.

A vector is 16 words of two bf16: the even columns are its low halves, shifted, the odd ones its high halves, masked.
So nothing crosses lanes, and the dropout mask's words fall onto the words that they mask. RANKS and BLOCK (rows with
their own partial sums) come from skinny_native.py.
"""

from __future__ import annotations

SOURCE = r"""
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#define TILE 32   /* rows that stay in the cache between two uses */
typedef uint16_t bf16;
typedef uint32_t words __attribute__((vector_size(64)));
typedef int16_t lanes __attribute__((vector_size(64)));
typedef float vec __attribute__((vector_size(64)));
typedef float half __attribute__((vector_size(32)));
typedef vec panel[RANKS][2]; /* 8 ranks of 32 columns: the even ones, then the odd ones */
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

/* Dropout: keys as of `keep_mask`; `add` is NULL without. */
typedef struct { const uint32_t *row_add, *row_mul, *add, *mul; int16_t least; } keys;

INLINE keys keys_of(const uint32_t *all, int64_t rows, int64_t blocks, int32_t least)
{
    if (!all) return (keys){0};
    const int64_t count = rows + 16 * blocks;
    return (keys){all, all + count, all + rows, all + count + rows, (int16_t)least};
}

static __attribute__((noinline)) words load_some(const bf16 *from, int64_t count)
{
    words w = {0};
    memcpy(&w, from, 2 * count);
    return w;
}

/* 16 words of a row, 0 beyond its end */
INLINE words load(const bf16 *row, int64_t block, int64_t size)
{
    const int64_t left = size - 32 * block;
    if (__builtin_expect(left < 32, 0)) return load_some(row + 32 * block, left);
    words w;
    memcpy(&w, row + 32 * block, 64);
    return w;
}

INLINE void store(words w, bf16 *row, int64_t block, int64_t size)
{
    const int64_t left = size - 32 * block;
    if (__builtin_expect(left >= 32, 1)) memcpy(row + 32 * block, &w, 64);
    else memcpy(row + 32 * block, &w, 2 * left);
}

/* Dropped lanes become +0. */
INLINE words dropped(words w, const keys k, int64_t row, int64_t block)
{
    if (!k.add) return w;
    words add, mul;
    memcpy(&add, k.add + 16 * block, 64);
    memcpy(&mul, k.mul + 16 * block, 64);
    const words random = (k.row_add[row] + add) * (k.row_mul[row] + mul);
    return w & (words)((lanes)random >= k.least);
}

INLINE vec even(words w) { return (vec)(w << 16); }
INLINE vec odd(words w) { return (vec)(w & 0xffff0000u); }

/* To the nearest, ties to even. NaN stays one: its low half is 0, for it came from a bf16. */
INLINE words nearest(vec v)
{
    const words w = (words)v;
    return w + 0x7fffu + ((w >> 16) & 1u);
}
INLINE words joined(vec e, vec o) { return (nearest(e) >> 16) | (nearest(o) & 0xffff0000u); }
INLINE bf16 narrow(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
INLINE uint32_t as_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
INLINE float wide(bf16 b)
{
    const uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE float sum(vec v)
{
    half h[2];
    memcpy(h, &v, 64);
    h[0] += h[1];
    const half a = h[0] + __builtin_shuffle(h[0], (__attribute__((vector_size(32))) int32_t){4, 5, 6, 7, 0, 1, 2, 3});
    return (a[0] + a[2]) + (a[1] + a[3]);
}

#ifdef __AVX512BF16__
int32_t dots(void) { return 1; }

INLINE vec dot(vec sums, words a, words b) { return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b); }

/* The sums of 8 vectors, side by side. */
INLINE half sums_of(const vec *v)
{
    __m512 t[4], u[2];
    EACH(i, 4) {
        const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    EACH(i, 2) {
        const __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
        u[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    const __m512 lanes =
        _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x44), _mm512_shuffle_f32x4(u[0], u[1], 0xee));
    const __m512 both = _mm512_add_ps(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xb1));
    return (half)_mm512_castps512_ps256(_mm512_shuffle_f32x4(both, both, 0x08));
}

/* As `pack`, of words: each rank's 16 of a block. */
void pack_down(const bf16 *a, int64_t stride_r, int64_t stride_k, int64_t rank, int64_t size, uint32_t *out)
{
    const int64_t blocks = (size + 31) / 32, chunks = (rank + RANKS - 1) / RANKS;
    for (int64_t c = 0; c < chunks; c++)
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t r = c * RANKS; r < (c + 1) * RANKS; r++)
                for (int64_t column = 32 * b; column < 32 * b + 32; column += 2) {
                    const bf16 *at = a + r * stride_r + column * stride_k;
                    const int low = r < rank && column < size, high = low && column + 1 < size;
                    *out++ = (low ? *at : 0) | (high ? (uint32_t)at[stride_k] << 16 : 0);
                }
}

/* s (rows, ranks) = drop(x) a^T of a few rows from `row` on and one chunk of ranks */
INLINE void down_rows(const int rows, const bf16 *x, int64_t stride, int64_t row, int64_t size, const void *packed,
                      const keys k, float *s, int64_t ranks)
{
    const words *a = packed;
    vec acc[2][RANKS] = {0};
    for (int64_t b = 0; 32 * b < size; b++, a += RANKS) {
        words w[2];
        EACH(i, rows) w[i] = dropped(load(x + (row + i) * stride, b, size), k, row + i, b);
        EACH(r, RANKS) EACH(i, rows) acc[i][r] = dot(acc[i][r], w[i], a[r]);
    }
    EACH(i, rows) {
        const half found = sums_of(acc[i]);
        memcpy(s + i * ranks, &found, 32);
    }
}
#else
int32_t dots(void) { return 0; }

/* s (rows, ranks) = drop(x) a^T of a few rows from `row` on and one chunk of ranks */
INLINE void down_rows(const int rows, const bf16 *x, int64_t stride, int64_t row, int64_t size, const void *packed,
                      const keys k, float *s, int64_t ranks)
{
    const panel *a = packed;
    vec acc[2][RANKS] = {0};
    for (int64_t b = 0; 32 * b < size; b++) {
        vec e[2], o[2];
        EACH(i, rows) {
            const words w = dropped(load(x + (row + i) * stride, b, size), k, row + i, b);
            e[i] = even(w), o[i] = odd(w);
        }
        EACH(r, RANKS) EACH(i, rows) acc[i][r] += e[i] * a[b][r][0];
        EACH(r, RANKS) EACH(i, rows) acc[i][r] += o[i] * a[b][r][1];
    }
    EACH(i, rows) EACH(r, RANKS) s[i * ranks + r] = sum(acc[i][r]);
}
#endif

static void down(const bf16 *x, int64_t stride, int64_t begin, int64_t end, int64_t size, const void *packed,
                 const keys k, float *s, int64_t ranks)
{
    const int64_t chunk = (size + 31) / 32 * RANKS * (dots() ? sizeof(words) : 2 * sizeof(vec));
    const char *a = packed;
    for (int64_t c = 0; c < ranks / RANKS; c++, a += chunk) {
        int64_t row = begin;
        for (; row + 2 <= end; row += 2)
            down_rows(2, x, stride, row, size, a, k, s + (row - begin) * ranks + c * RANKS, ranks);
        if (row < end) down_rows(1, x, stride, row, size, a, k, s + (row - begin) * ranks + c * RANKS, ranks);
    }
}

/* y (rows, size) = drop(s a + bias) */
INLINE void up_rows(const int rows, bf16 *y, int64_t row, int64_t size, const panel *a, const panel *bias,
                    const keys k, const float *s, int64_t ranks)
{
    const int64_t blocks = (size + 31) / 32;
    for (int64_t b = 0; b < blocks; b++) {
        vec e[8], o[8];
        EACH(i, rows) {
            e[i] = bias ? bias[b][0][0] : (vec){0};
            o[i] = bias ? bias[b][0][1] : (vec){0};
        }
        for (int64_t c = 0; c < ranks / RANKS; c++) {
            const panel *p = a + c * blocks + b;
            EACH(r, RANKS) EACH(i, rows) {
                e[i] += s[i * ranks + c * RANKS + r] * (*p)[r][0];
                o[i] += s[i * ranks + c * RANKS + r] * (*p)[r][1];
            }
        }
        EACH(i, rows) store(dropped(joined(e[i], o[i]), k, row + i, b), y + (row + i) * size, b, size);
    }
}

static void up(bf16 *y, int64_t begin, int64_t end, int64_t size, const panel *a, const panel *bias, const keys k,
               const float *s, int64_t ranks)
{
    int64_t row = begin;
    for (; row + 8 <= end; row += 8) up_rows(8, y, row, size, a, bias, k, s + (row - begin) * ranks, ranks);
    for (; row < end; row++) up_rows(1, y, row, size, a, bias, k, s + (row - begin) * ranks, ranks);
}

/* sums = s^T drop(x), added to what is there unless `first` */
static void outer(const bf16 *x, int64_t stride, int64_t begin, int64_t end, int64_t size, const keys k,
                  const float *s, int64_t ranks, panel *sums, int first)
{
    const int64_t blocks = (size + 31) / 32;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t c = 0; c < ranks / RANKS; c++) {
            vec acc[RANKS][2] = {0};
            if (!first) EACH(r, RANKS) EACH(h, 2) acc[r][h] = sums[c * blocks + b][r][h];
            int64_t row = begin;
#ifdef __AVX512BF16__
            /* a word of two rows, by columns; of s, the words of the same two */
            for (; row + 2 <= end; row += 2) {
                const words one = dropped(load(x + row * stride, b, size), k, row, b);
                const words two = dropped(load(x + (row + 1) * stride, b, size), k, row + 1, b);
                const words e = (one & 0xffffu) | (two << 16), o = (one >> 16) | (two & 0xffff0000u);
                const float *f = s + (row - begin) * ranks + c * RANKS;
                EACH(r, RANKS) {
                    const uint32_t both = as_bits(f[r]) >> 16 | as_bits(f[ranks + r]);
                    const words factor = (words){0} + both;
                    acc[r][0] = dot(acc[r][0], e, factor), acc[r][1] = dot(acc[r][1], o, factor);
                }
            }
#endif
            for (; row < end; row++) {
                const words w = dropped(load(x + row * stride, b, size), k, row, b);
                const vec e = even(w), o = odd(w);
                const float *f = s + (row - begin) * ranks + c * RANKS;
                EACH(r, RANKS) acc[r][0] += f[r] * e, acc[r][1] += f[r] * o;
            }
            EACH(r, RANKS) EACH(h, 2) sums[c * blocks + b][r][h] = acc[r][h];
        }
}

static void widened(const bf16 *s16, int64_t rows, int64_t rank, float *s, int64_t ranks)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t r = 0; r < ranks; r++) s[i * ranks + r] = r < rank ? wide(s16[i * rank + r]) : 0.0f;
}

/* Panels of a (rank, size): chunks of 8 ranks, each of all blocks of 32 columns; 0 beyond the ends. */
void pack(const bf16 *a, int64_t stride_r, int64_t stride_k, int64_t rank, int64_t size, float *out)
{
    const int64_t blocks = (size + 31) / 32, chunks = (rank + RANKS - 1) / RANKS;
    for (int64_t c = 0; c < chunks; c++)
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t r = c * RANKS; r < (c + 1) * RANKS; r++)
                for (int64_t h = 0; h < 2; h++)
                    for (int64_t i = 0; i < 16; i++) {
                        const int64_t column = 32 * b + 2 * i + h;
                        *out++ = r < rank && column < size ? wide(a[r * stride_r + column * stride_k]) : 0.0f;
                    }
}

#ifndef __AVX512BF16__
void pack_down(const bf16 *a, int64_t stride_r, int64_t stride_k, int64_t rank, int64_t size, float *out)
{
    pack(a, stride_r, stride_k, rank, size, out);
}
#endif

/* out (rank, size) = scale * the sum of all parts, in their order */
void unpack(const float *parts, int64_t count, int64_t rank, int64_t size, float scale, float *out,
            int64_t stride_r, int64_t stride_k)
{
    const int64_t blocks = (size + 31) / 32, chunks = (rank + RANKS - 1) / RANKS, all = chunks * blocks * RANKS * 2;
    for (int64_t v = 0; v < all; v++) {
        const int64_t r = v / 2 % RANKS + v / (2 * RANKS * blocks) * RANKS, b = v / (2 * RANKS) % blocks;
        if (r >= rank) continue;
        vec total = {0}, part;
        for (int64_t p = 0; p < count; p++) {
            memcpy(&part, parts + (p * all + v) * 16, 64);
            total += part;
        }
        for (int64_t i = 0; i < 16; i++) {
            const int64_t column = 32 * b + 2 * i + v % 2;
            if (column < size) out[r * stride_r + column * stride_k] = scale * total[i];
        }
    }
}

/* The keys of a mask, additive and then multiplicative, each of all rows and then of all words: Philox4x32-7 of the
   row's id (its place if `row_ids` is NULL) or the word's place. */
void fill_keys(uint64_t seed, const uint32_t *restrict row_ids, int64_t rows, int64_t columns, uint32_t *restrict out)
{
    for (int64_t i = 0; i < rows + columns; i++) {
        uint32_t c0 = i >= rows ? i - rows : row_ids ? row_ids[i] : i, c1 = i >= rows, c2 = 0, c3 = 0;
        uint32_t k0 = seed, k1 = seed >> 32;
        for (int round = 0; round < 7; round++) {
            const uint64_t wide_0 = (uint64_t)c0 * 0xD2511F53u, wide_2 = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(wide_2 >> 32) ^ c1 ^ k0;
            c2 = (uint32_t)(wide_0 >> 32) ^ c3 ^ k1;
            c1 = (uint32_t)wide_2, c3 = (uint32_t)wide_0;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        out[i] = c0;
        out[rows + columns + i] = i < rows ? c1 | 1u : c1 & ~1u;
    }
}

/* Blocks of rows [begin, end): s = drop(x) a^T as bf16, unless x is NULL and s is given; y = s b^T + bias, unless y is
   NULL. */
void forward(const bf16 *x, int64_t stride, int64_t rows, int64_t inputs, int64_t outputs, int64_t rank,
             const void *a, const void *b, const void *bias, const uint32_t *all_keys, int32_t least, bf16 *s16,
             bf16 *y, int64_t begin, int64_t end)
{
    const keys k = keys_of(all_keys, rows, (inputs + 31) / 32, least), none = {0};
    const int64_t ranks = (rank + RANKS - 1) / RANKS * RANKS, last = end * BLOCK < rows ? end * BLOCK : rows;
    float s[TILE * ranks];
    for (int64_t row = begin * BLOCK; row < last; row += TILE) {
        const int64_t stop = row + TILE < last ? row + TILE : last;
        if (x) {
            down(x, stride, row, stop, inputs, a, k, s, ranks);
            for (int64_t i = 0; i < stop - row; i++)
                for (int64_t r = 0; r < rank; r++) s16[(row + i) * rank + r] = narrow(s[i * ranks + r]);
        }
        if (!y) continue;
        widened(s16 + row * rank, stop - row, rank, s, ranks);
        up(y, row, stop, outputs, b, bias, none, s, ranks);
    }
}

/* Blocks of rows [begin, end): db = s^T dy, da = ds^T drop(x), dx = drop(ds a). What is NULL of s16, x and dx is
   not needed. Each block of rows has its own part of db and of da. */
void backward(const bf16 *dy, int64_t stride_dy, const bf16 *x, int64_t stride, int64_t rows, int64_t inputs,
              int64_t outputs, int64_t rank, const void *a, const bf16 *s16, const bf16 *ds16,
              const uint32_t *all_keys, int32_t least, float *db, float *da, bf16 *dx, int64_t begin, int64_t end)
{
    const int64_t in_blocks = (inputs + 31) / 32, out_blocks = (outputs + 31) / 32;
    const keys k = keys_of(all_keys, rows, in_blocks, least), none = {0};
    const int64_t ranks = (rank + RANKS - 1) / RANKS * RANKS;
    float s[TILE * ranks];
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * BLOCK, last = first + BLOCK < rows ? first + BLOCK : rows;
        panel *block_db = (panel *)db + block * (ranks / RANKS) * out_blocks;
        panel *block_da = (panel *)da + block * (ranks / RANKS) * in_blocks;
        for (int64_t row = first; row < last; row += TILE) {
            const int64_t stop = row + TILE < last ? row + TILE : last;
            if (s16) {
                widened(s16 + row * rank, stop - row, rank, s, ranks);
                outer(dy, stride_dy, row, stop, outputs, none, s, ranks, block_db, row == first);
            }
            if (ds16) widened(ds16 + row * rank, stop - row, rank, s, ranks);
            if (x) outer(x, stride, row, stop, inputs, k, s, ranks, block_da, row == first);
            if (dx) up(dx, row, stop, inputs, a, 0, k, s, ranks);
        }
    }
}
"""
