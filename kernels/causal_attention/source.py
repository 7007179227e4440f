"""The C source of native.py: AVX-512 with its bf16 dot products.

A word is two bf16. A dot product takes words whose halves are neighbours along the axis that is summed over, one of
the left operand against sixteen of the right one. So each right operand is laid out by that axis: K and V for Q K^T and
dY V^T by the width ("columns": words along the width, keys side by side), for P V and dS K by keys ("pairs": words of
two keys); Q and dY for dS^T Q and P^T dY by rows.

A task is a document and a key head. Its rows are (position, query head), ROWS at a time: the heads that share a key are
rows of one product, and rows see no key beyond the last one's position. Scores of a tile are whole rows, in fp32.
"""

from __future__ import annotations

SOURCE = r"""
#include <stdint.h>
#include <string.h>
#ifndef __AVX512BF16__
int32_t supported(void) { return 0; }
int64_t scratch_bytes(int64_t length, int64_t width, int32_t back) { return 0; }
void forward(const void *job, const int64_t *documents, int64_t count, int64_t *next, char *scratch) {}
void backward(const void *job, const int64_t *documents, int64_t count, int64_t *next, char *scratch) {}
#else
#include <immintrin.h>
enum { ROWS = 48, STEP = 6, LANES = 16 };
typedef uint16_t bf16;
typedef uint32_t word;
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

/* Strides in elements, of positions and of heads; what is written is contiguous. cos, sin: NULL or (positions, width).
   stats: of each row, its largest score and one over its sum. */
typedef struct {
    const bf16 *q, *k, *v, *dy, *cos, *sin;
    bf16 *y, *dq, *dk, *dv;
    float *stats;
    int64_t q_position, q_head, k_position, k_head, v_position, v_head, dy_position, dy_head;
    int64_t heads, groups, width;
    float scale;
} Job;

int32_t supported(void) { return 1; }

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE __m512 wide(const bf16 *from)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}
INLINE __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
INLINE void put(bf16 *to, __m512 v) { _mm256_storeu_si256((__m256i *)to, narrow(v)); }
INLINE __m512i joined(__m256i low, __m256i high)
{
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

/* exp(z), z <= 0, to about 2 ulp. The order of max's operands lets NaN through. */
INLINE __m512 exponential(__m512 z)
{
    z = _mm512_max_ps(_mm512_set1_ps(-100.0f), z);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(z, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), z);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* c (STEP, 16 vectors) = or += sum over p of a[i * across + p * along] . b[p * width + j] */
INLINE void tile(const int vectors, const int add, const word *a, int64_t across, int64_t along, const word *b,
                 int64_t width, int64_t pairs, float *c, int64_t stride)
{
    __m512 acc[STEP][4];
    EACH(i, STEP) EACH(v, vectors) acc[i][v] = add ? _mm512_loadu_ps(c + i * stride + LANES * v) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh right[4];
        EACH(v, vectors) right[v] = (__m512bh)_mm512_loadu_si512(b + p * width + LANES * v);
        EACH(i, STEP) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[i * across + p * along]);
            EACH(v, vectors) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], left, right[v]);
        }
    }
    EACH(i, STEP) EACH(v, vectors) _mm512_storeu_ps(c + i * stride + LANES * v, acc[i][v]);
}

/* rows a multiple of STEP, columns of LANES */
INLINE void product(const int add, const word *a, int64_t across, int64_t along, const word *b, int64_t width,
                    int64_t pairs, float *c, int64_t stride, int64_t rows, int64_t columns)
{
    for (int64_t j = 0; j < columns; j += 4 * LANES)
        for (int64_t i = 0; i < rows; i += STEP) {
            const word *left = a + i * across, *right = b + j;
            float *to = c + i * stride + j;
            switch ((columns - j) / LANES) {
            case 1: tile(1, add, left, across, along, right, width, pairs, to, stride); break;
            case 2: tile(2, add, left, across, along, right, width, pairs, to, stride); break;
            case 3: tile(3, add, left, across, along, right, width, pairs, to, stride); break;
            default: tile(4, add, left, across, along, right, width, pairs, to, stride);
            }
        }
}
static __attribute__((noinline)) void multiply(const word *a, int64_t across, int64_t along, const word *b,
    int64_t width, int64_t pairs, float *c, int64_t stride, int64_t rows, int64_t columns)
{
    product(0, a, across, along, b, width, pairs, c, stride, rows, columns);
}
static __attribute__((noinline)) void multiply_add(const word *a, int64_t across, int64_t along, const word *b,
    int64_t width, int64_t pairs, float *c, int64_t stride, int64_t rows, int64_t columns)
{
    product(1, a, across, along, b, width, pairs, c, stride, rows, columns);
}

/* Two halves of a head's vector, from element d on, turned by its position's angles, or turned back. */
INLINE void turned(const Job *job, int64_t position, __m512 low, __m512 high, int64_t d, const int back, bf16 *to)
{
    const int64_t half = job->width / 2, at = position * job->width + d;
    const __m512 cos_low = wide(job->cos + at), cos_high = wide(job->cos + at + half);
    const __m512 sin_low = wide(job->sin + at), sin_high = wide(job->sin + at + half);
    if (back) {
        put(to + d, _mm512_fmadd_ps(high, sin_high, _mm512_mul_ps(low, cos_low)));
        put(to + d + half, _mm512_fnmadd_ps(low, sin_low, _mm512_mul_ps(high, cos_high)));
    } else {
        put(to + d, _mm512_fnmadd_ps(high, sin_low, _mm512_mul_ps(low, cos_low)));
        put(to + d + half, _mm512_fmadd_ps(low, sin_high, _mm512_mul_ps(high, cos_high)));
    }
}
INLINE void take(const Job *job, const bf16 *from, int64_t position, const int turn, bf16 *to)
{
    if (!turn || !job->cos) memcpy(to, from, 2 * job->width);
    else
        for (int64_t d = 0; d < job->width / 2; d += LANES)
            turned(job, position, wide(from + d), wide(from + d + job->width / 2), d, 0, to);
}
INLINE void give(const Job *job, const float *from, int64_t position, const int turn, bf16 *to)
{
    if (!turn || !job->cos)
        for (int64_t d = 0; d < job->width; d += LANES) put(to + d, _mm512_loadu_ps(from + d));
    else
        for (int64_t d = 0; d < job->width / 2; d += LANES)
            turned(job, position, _mm512_loadu_ps(from + d), _mm512_loadu_ps(from + d + job->width / 2), d, 1, to);
}

/* x (rows, width) to (width / 2, stride) words, 0 in the columns beyond `rows` */
static void columns_of(const bf16 *x, int64_t rows, int64_t width, word *to, int64_t stride)
{
    const word *from = (const word *)x;
    const int64_t words = width / 2;
    for (int64_t i = 0; i < stride; i += LANES)
        for (int64_t d = 0; d < words; d++) {
            word *line = to + d * stride + i;
            EACH(l, LANES) line[l] = i + l < rows ? from[(i + l) * words + d] : 0;
        }
}
/* x (rows, width), rows even, to (rows / 2, width) words */
static void pairs_of(const bf16 *x, int64_t rows, int64_t width, word *to)
{
    for (int64_t i = 0; i < rows; i += 2)
        for (int64_t d = 0; d < width; d += LANES)
            _mm512_storeu_si512(to + i / 2 * width + d,
                                joined(_mm256_loadu_si256((const __m256i *)(x + i * width + d)),
                                       _mm256_loadu_si256((const __m256i *)(x + (i + 1) * width + d))));
}

/* One document and key head; keys: its length in whole vectors. */
typedef struct { const Job *job; int64_t start, length, head, keys; } Task;

/* A document's K or V: (keys, width), 0 beyond its length. */
static void take_keys(const Task *t, const bf16 *from, int64_t position, int64_t head, const int turn, bf16 *to)
{
    const int64_t width = t->job->width;
    for (int64_t i = 0; i < t->length; i++)
        take(t->job, from + (t->start + i) * position + t->head * head, t->start + i, turn, to + i * width);
    memset(to + t->length * width, 0, 2 * (t->keys - t->length) * width);
}
/* `count` rows of a tile from `first` on, of Q or dY: (ROWS, width), 0 beyond them. */
static void take_rows(const Task *t, const bf16 *from, int64_t position, int64_t head, int64_t first, int64_t count,
                      const int turn, bf16 *to)
{
    const int64_t width = t->job->width, groups = t->job->groups;
    for (int64_t r = 0; r < count; r++) {
        const int64_t at = t->start + first + r / groups;
        take(t->job, from + at * position + (t->head * groups + r % groups) * head, at, turn, to + r * width);
    }
    memset(to + count * width, 0, 2 * (ROWS - count) * width);
}
INLINE int64_t row_of(const Task *t, int64_t first, int64_t r)
{
    const int64_t groups = t->job->groups;
    return (t->start + first + r / groups) * t->job->heads * groups + t->head * groups + r % groups;
}

static void forward_task(const Task *t, char *scratch)
{
    const Job *job = t->job;
    const int64_t width = job->width, keys = t->keys, positions = ROWS / job->groups;
    word *k_columns = (word *)scratch, *v_pairs = k_columns + width / 2 * keys;
    bf16 *x = (bf16 *)(v_pairs + keys / 2 * width), *rows = x + keys * width, *p = rows + ROWS * width;
    float *s = (float *)(p + ROWS * keys), *y = s + ROWS * keys;
    take_keys(t, job->k, job->k_position, job->k_head, 1, x);
    columns_of(x, t->length, width, k_columns, keys);
    take_keys(t, job->v, job->v_position, job->v_head, 0, x);
    pairs_of(x, keys, width, v_pairs);
    for (int64_t first = 0; first < t->length; first += positions) {
        const int64_t here = t->length - first < positions ? t->length - first : positions;
        const int64_t count = here * job->groups, seen = up(first + here, LANES);
        take_rows(t, job->q, job->q_position, job->q_head, first, count, 1, rows);
        multiply((word *)rows, width / 2, 1, k_columns, keys, width / 2, s, keys, up(count, STEP), seen);
        for (int64_t r = 0; r < count; r++) {
            const int64_t own = first + r / job->groups + 1;
            float *line = s + r * keys;
            __m512 most = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < own; i += LANES) {
                const __mmask16 mask = own - i < LANES ? (1u << (own - i)) - 1 : 0xffff;
                const __m512 z = _mm512_mul_ps(_mm512_loadu_ps(line + i), _mm512_set1_ps(job->scale));
                most = _mm512_mask_max_ps(most, mask, z, most);
                _mm512_storeu_ps(line + i, z);
            }
            const float largest = _mm512_reduce_max_ps(most);
            for (int64_t i = 0; i < seen; i += LANES) {
                const __mmask16 mask = own - i < LANES ? own <= i ? 0 : (1u << (own - i)) - 1 : 0xffff;
                const __m512 z = _mm512_sub_ps(_mm512_loadu_ps(line + i), _mm512_set1_ps(largest));
                const __m512 e = _mm512_maskz_mov_ps(mask, exponential(z));
                sum = _mm512_add_ps(sum, e);
                put(p + r * keys + i, e);
            }
            float *stats = job->stats + 2 * row_of(t, first, r);
            stats[0] = largest, stats[1] = 1.0f / _mm512_reduce_add_ps(sum);
        }
        multiply((word *)p, keys / 2, 1, v_pairs, width, seen / 2, y, width, up(count, STEP), width);
        for (int64_t r = 0; r < count; r++) {
            const int64_t row = row_of(t, first, r);
            const __m512 share = _mm512_set1_ps(job->stats[2 * row + 1]);
            for (int64_t d = 0; d < width; d += LANES)
                put(job->y + row * width + d, _mm512_mul_ps(_mm512_loadu_ps(y + r * width + d), share));
        }
    }
}
static void backward_task(const Task *t, char *scratch)
{
    const Job *job = t->job;
    const int64_t width = job->width, keys = t->keys, positions = ROWS / job->groups;
    const int64_t line_words = keys + LANES; /* of the transposed tiles: keys are taken STEP at a time */
    word *k_columns = (word *)scratch, *v_columns = k_columns + width / 2 * keys;
    word *k_pairs = v_columns + width / 2 * keys;
    word *q_pairs = k_pairs + keys / 2 * width, *dy_pairs = q_pairs + ROWS / 2 * width;
    word *p_pairs = dy_pairs + ROWS / 2 * width, *ds_pairs = p_pairs + ROWS / 2 * line_words;
    float *s = (float *)(ds_pairs + ROWS / 2 * line_words), *dp = s + ROWS * keys, *dq = dp + ROWS * keys;
    float *dk = dq + ROWS * width, *dv = dk + line_words * width;
    bf16 *x = (bf16 *)(dv + line_words * width), *q = x + keys * width, *dy = q + ROWS * width, *ds = dy + ROWS * width;
    take_keys(t, job->v, job->v_position, job->v_head, 0, x);
    columns_of(x, t->length, width, v_columns, keys);
    take_keys(t, job->k, job->k_position, job->k_head, 1, x);
    columns_of(x, t->length, width, k_columns, keys);
    pairs_of(x, keys, width, k_pairs);
    memset(dk, 0, 4 * 2 * line_words * width); /* and dv */
    for (int64_t first = 0; first < t->length; first += positions) {
        const int64_t here = t->length - first < positions ? t->length - first : positions;
        const int64_t count = here * job->groups, seen = up(first + here, LANES), rows = up(count, STEP);
        take_rows(t, job->q, job->q_position, job->q_head, first, count, 1, q);
        take_rows(t, job->dy, job->dy_position, job->dy_head, first, count, 0, dy);
        multiply((word *)q, width / 2, 1, k_columns, keys, width / 2, s, keys, rows, seen);
        multiply((word *)dy, width / 2, 1, v_columns, keys, width / 2, dp, keys, rows, seen);
        float dots[ROWS];
        for (int64_t r = 0; r < rows; r++) {
            float *line = s + r * keys, *up_line = dp + r * keys;
            if (r >= count) { /* padding: the products left 0 in dp */
                memset(line, 0, 4 * seen);
                dots[r] = 0.0f;
                continue;
            }
            const float *stats = job->stats + 2 * row_of(t, first, r);
            const int64_t own = first + r / job->groups + 1;
            const __m512 most = _mm512_set1_ps(stats[0]), share = _mm512_set1_ps(stats[1]);
            __m512 dot = _mm512_setzero_ps();
            for (int64_t i = 0; i < seen; i += LANES) {
                const __mmask16 mask = own - i < LANES ? own <= i ? 0 : (1u << (own - i)) - 1 : 0xffff;
                const __m512 z = _mm512_fmsub_ps(_mm512_loadu_ps(line + i), _mm512_set1_ps(job->scale), most);
                const __m512 prob = _mm512_maskz_mul_ps(mask, exponential(z), share);
                dot = _mm512_mask3_fmadd_ps(prob, _mm512_loadu_ps(up_line + i), dot, mask);
                _mm512_storeu_ps(line + i, prob);
            }
            dots[r] = _mm512_reduce_add_ps(dot);
        }
        for (int64_t r = 0; r < rows; r += 2) {
            word *p_line = p_pairs + r / 2 * line_words, *ds_line = ds_pairs + r / 2 * line_words;
            for (int64_t i = 0; i < seen; i += LANES) {
                __m256i prob[2], slope[2];
                EACH(e, 2) {
                    const int64_t at = (r + e) * keys + i;
                    const __m512 pr = _mm512_loadu_ps(s + at);
                    /* a score that is not seen has p = 0, but its dp may be anything */
                    const __mmask16 mask = _mm512_cmp_ps_mask(pr, _mm512_setzero_ps(), _CMP_NEQ_UQ);
                    const __m512 off = _mm512_sub_ps(_mm512_loadu_ps(dp + at), _mm512_set1_ps(dots[r + e]));
                    prob[e] = narrow(pr);
                    slope[e] = narrow(_mm512_maskz_mul_ps(mask, _mm512_mul_ps(pr, _mm512_set1_ps(job->scale)), off));
                    _mm256_storeu_si256((__m256i *)(ds + at), slope[e]);
                }
                _mm512_storeu_si512(p_line + i, joined(prob[0], prob[1]));
                _mm512_storeu_si512(ds_line + i, joined(slope[0], slope[1]));
            }
            memset(p_line + seen, 0, 4 * STEP);
            memset(ds_line + seen, 0, 4 * STEP);
        }
        pairs_of(q, rows, width, q_pairs);
        pairs_of(dy, rows, width, dy_pairs);
        multiply((word *)ds, keys / 2, 1, k_pairs, width, seen / 2, dq, width, rows, width);
        multiply_add(p_pairs, 1, line_words, dy_pairs, width, rows / 2, dv, width, up(seen, STEP), width);
        multiply_add(ds_pairs, 1, line_words, q_pairs, width, rows / 2, dk, width, up(seen, STEP), width);
        for (int64_t r = 0; r < count; r++)
            give(job, dq + r * width, t->start + first + r / job->groups, 1, job->dq + row_of(t, first, r) * width);
    }
    for (int64_t i = 0; i < t->length; i++) {
        const int64_t at = ((t->start + i) * job->heads + t->head) * width;
        give(job, dk + i * width, t->start + i, 1, job->dk + at);
        give(job, dv + i * width, t->start + i, 0, job->dv + at);
    }
}
/* Of one thread, for documents of at most `length`: what forward_task and backward_task cut up. */
int64_t scratch_bytes(int64_t length, int64_t width, int32_t back)
{
    const int64_t keys = up(length, LANES), more = keys + LANES;
    if (!back) return 4 * keys * width + 2 * (keys + ROWS) * width + 2 * ROWS * keys + 4 * ROWS * (keys + width);
    const int64_t words = 3 * (keys / 2) * width + ROWS * width + ROWS * more;
    const int64_t floats = 2 * ROWS * keys + ROWS * width + 2 * more * width;
    return 4 * (words + floats) + 2 * (keys * width + 2 * ROWS * width + ROWS * keys);
}

/* documents (count, 2): first position and length. Threads share `next`, a count of the tasks that were taken. */
INLINE void run(const Job *job, const int64_t *documents, int64_t count, int64_t *next, char *scratch, const int back)
{
    for (;;) {
        const int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (i >= count * job->heads) return;
        const int64_t *document = documents + 2 * (i / job->heads);
        const Task task = {job, document[0], document[1], i % job->heads, up(document[1], LANES)};
        if (back) backward_task(&task, scratch);
        else forward_task(&task, scratch);
    }
}
void forward(const Job *job, const int64_t *documents, int64_t count, int64_t *next, char *scratch)
{
    run(job, documents, count, next, scratch, 0);
}
void backward(const Job *job, const int64_t *documents, int64_t count, int64_t *next, char *scratch)
{
    run(job, documents, count, next, scratch, 1);
}
#endif
"""
