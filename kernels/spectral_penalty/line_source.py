"""The C source of the penalty over lines on a CPU (line_native.py): LANES vectors side by side, all steps in cache."""

# Legend: N = P Q the length, Q >= 8 a power of two; n = Q n1 + n2 a place, k = k1 + P k2 a frequency; H = P / 2 + 1 the
# k1 that are transformed, since x is real: P - k1 is the conjugate.
#     Y[k1, n2] = w_N^(k1 n2) sum_n1 w_P^(k1 n1) x[Q n1 + n2]      from_lines: a product with a small matrix
#     Z[k1, k2] = sum_n2 w_Q^(k2 n2) Y[k1, n2]                     transform: FFTs of Q points, in place
# and the way back with sigma in between. Pairs x[n1] +- x[P - n1] halve the product: EVEN = H sums, ODD differences.
# The frequencies of an FFT are left in the order it leaves them in; sigma is stored in that order.
SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define AT_ONCE 4  /* results of a small product that are summed together */
#define MOST 63    /* of P, at most */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef double wide __attribute__((vector_size(8 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(4 * LANES)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

/* A plan: sizes and tables, all fp32 (line_native.py makes them). */
typedef struct {
    int64_t p, q;
    const float *cosines, *sines;  /* (ceil(H / AT_ONCE), EVEN or ODD, AT_ONCE) of 2 pi k1 n1 / P */
    const float *twiddles;         /* (Q, H, 2): w_N^(k1 n2) */
    const float *stages;           /* of each radix-4 stage, (L / 4, 6): w_L^j, w_L^2j, w_L^3j */
    const float *sigma;            /* (H, Q), in the order of the FFT */
} plan;

/* A vector's elements: w, w0 (or NULL) and g with the strides between them. */
typedef struct { const float *w, *w0; float *g; int64_t w_step, w0_step, g_step; } line;
/* The vectors of a matrix: their number, the first, and the strides between them. */
typedef struct { int64_t lines; line first; int64_t w_apart, w0_apart, g_apart; } matrix;

static line line_of(const matrix *m, int64_t i)
{
    line l = m->first;
    l.w += i * m->w_apart;
    l.w0 = l.w0 ? l.w0 + i * m->w0_apart : NULL;
    l.g += i * m->g_apart;
    return l;
}

/* Rows of a square to its columns: halves, quarters, then single lanes change places. */
static inline __attribute__((always_inline)) void turn(vec r[LANES])
{
#define SWAP(apart, low, high)                          \
    for (int i = 0; i < LANES; i++)                     \
        if (!(i & apart)) {                             \
            const vec a = r[i], b = r[i + apart];       \
            r[i] = SHUFFLE(a, b, low);                  \
            r[i + apart] = SHUFFLE(a, b, high);         \
        }
#define LOW_4 0, 1, 2, 3, 8, 9, 10, 11
#define HIGH_4 4, 5, 6, 7, 12, 13, 14, 15
#define LOW_2 0, 1, 8, 9, 4, 5, 12, 13
#define HIGH_2 2, 3, 10, 11, 6, 7, 14, 15
#define LOW_1 0, 8, 2, 10, 4, 12, 6, 14
#define HIGH_1 1, 9, 3, 11, 5, 13, 7, 15
    SWAP(4, LOW_4, HIGH_4)
    SWAP(2, LOW_2, HIGH_2)
    SWAP(1, LOW_1, HIGH_1)
}

/* Whether all lanes are taken and each line's elements lie one behind the other. */
static int are_rows(const line *lines, int count)
{
    int all = count == LANES;
    for (int v = 0; v < count; v++)
        all &= lines[v].w_step == 1 && lines[v].g_step == 1 && (!lines[v].w0 || lines[v].w0_step == 1);
    return all;
}

/* x holds place Q n1 + n2 at (Q + 2) n1 + n2: a power of two apart, all n1 would lie in one set of the cache. */
static inline vec *row_of(float *x, const plan *t, int64_t n1) { return (vec *)x + n1 * (t->q + 2); }

static void gather(const plan *t, const line *lines, int count, float *restrict x)
{
    const int64_t q = t->q;
    const line l = lines[0];
    int side_by_side = count == LANES;
    for (int v = 1; v < count; v++)
        side_by_side &= lines[v].w == l.w + v && lines[v].w_step == l.w_step
            && (l.w0 ? lines[v].w0 == l.w0 + v && lines[v].w0_step == l.w0_step : !lines[v].w0);
    const int rows = are_rows(lines, count);
    for (int64_t n1 = 0; n1 < t->p; n1++) {
        vec *to = row_of(x, t, n1);
        const int64_t at = n1 * q;
        if (side_by_side) {
            for (int64_t i = 0; i < q; i++)
                to[i] = *(const loose *)(l.w + (at + i) * l.w_step);
            for (int64_t i = 0; l.w0 && i < q; i++)
                to[i] -= *(const loose *)(l.w0 + (at + i) * l.w0_step);
        } else if (rows) {
            for (int64_t i = 0; i < q; i += LANES) {
                for (int v = 0; v < LANES; v++) {
                    to[i + v] = *(const loose *)(lines[v].w + at + i);
                    if (lines[v].w0)
                        to[i + v] -= *(const loose *)(lines[v].w0 + at + i);
                }
                turn(to + i);
            }
        } else {
            memset(to, 0, sizeof(vec) * q);
            for (int v = 0; v < count; v++) {
                const line m = lines[v];
                for (int64_t i = 0; i < q; i++)
                    to[i][v] = m.w[(at + i) * m.w_step];
                for (int64_t i = 0; m.w0 && i < q; i++)
                    to[i][v] -= m.w0[(at + i) * m.w0_step];
            }
        }
    }
}

static void scatter(const plan *t, const line *lines, int count, float *restrict x, int add)
{
    const int64_t q = t->q;
    const line l = lines[0];
    int side_by_side = count == LANES;
    for (int v = 1; v < count; v++)
        side_by_side &= lines[v].g == l.g + v && lines[v].g_step == l.g_step;
    const int rows = are_rows(lines, count);
    for (int64_t n1 = 0; n1 < t->p; n1++) {
        vec *from = row_of(x, t, n1);
        const int64_t at = n1 * q;
        if (side_by_side)
            for (int64_t i = 0; i < q; i++) {
                loose *g = (loose *)(l.g + (at + i) * l.g_step);
                *g = add ? (vec)*g + from[i] : from[i];
            }
        else if (rows)
            for (int64_t i = 0; i < q; i += LANES) {
                turn(from + i);
                for (int v = 0; v < LANES; v++) {
                    loose *g = (loose *)(lines[v].g + at + i);
                    *g = add ? (vec)*g + from[i + v] : from[i + v];
                }
            }
        else
            for (int v = 0; v < count; v++) {
                const line m = lines[v];
                for (int64_t i = 0; i < q; i++) {
                    float *g = m.g + (at + i) * m.g_step;
                    *g = add ? *g + from[i][v] : from[i][v];
                }
            }
    }
}

/* even[m] = sum_j cosines[m, j] e[j], odd[m] = sum_j sines[m, j] o[j], for AT_ONCE m. */
static inline __attribute__((always_inline)) void products(
    const plan *t, int64_t block, const vec *restrict e, const vec *restrict o, vec even[AT_ONCE], vec odd[AT_ONCE])
{
    const int64_t evens = t->p / 2 + 1, odds = (t->p - 1) / 2;
    const float *c = t->cosines + block * evens * AT_ONCE, *s = t->sines + block * odds * AT_ONCE;
    for (int m = 0; m < AT_ONCE; m++) {
        even[m] = c[m] * e[0];
        odd[m] = (vec){0};
    }
    for (int64_t j = 0; j < odds; j++)
        for (int m = 0; m < AT_ONCE; m++) {
            even[m] += c[(j + 1) * AT_ONCE + m] * e[j + 1];
            odd[m] += s[j * AT_ONCE + m] * o[j];
        }
    for (int m = 0; evens > odds + 1 && m < AT_ONCE; m++)
        even[m] += c[(odds + 1) * AT_ONCE + m] * e[odds + 1];
}

static void from_lines(const plan *t, float *restrict x, vec *restrict y)
{
    const int64_t p = t->p, q = t->q, h = p / 2 + 1, odds = (p - 1) / 2, row = 2 * (q + 1);
    vec e[MOST / 2 + 1], o[MOST / 2 + 1], even[AT_ONCE], odd[AT_ONCE];
    for (int64_t n2 = 0; n2 < q; n2++) {
        e[0] = row_of(x, t, 0)[n2];
        for (int64_t j = 1; j <= odds; j++) {
            const vec a = row_of(x, t, j)[n2], b = row_of(x, t, p - j)[n2];
            e[j] = a + b;
            o[j - 1] = a - b;
        }
        if (p % 2 == 0)
            e[p / 2] = row_of(x, t, p / 2)[n2];
        for (int64_t k = 0; k < h; k += AT_ONCE) {
            products(t, k / AT_ONCE, e, o, even, odd);
            for (int m = 0; m < AT_ONCE && k + m < h; m++) {  /* (even - i odd) (re + i im) */
                const float *w = t->twiddles + (n2 * h + k + m) * 2;
                vec *to = y + (k + m) * row + 2 * n2;
                to[0] = even[m] * w[0] + odd[m] * w[1];
                to[1] = even[m] * w[1] - odd[m] * w[0];
            }
        }
    }
}

/* The way back; the gradient's line takes the place of x. */
static void to_lines(const plan *t, float *restrict x, const vec *restrict y)
{
    const int64_t p = t->p, q = t->q, h = p / 2 + 1, row = 2 * (q + 1);
    vec e[MOST / 2 + 1], o[MOST / 2 + 1], even[AT_ONCE], odd[AT_ONCE];
    for (int64_t n2 = 0; n2 < q; n2++) {
        for (int64_t k = 0; k < h; k++) {  /* times the conjugate of the twiddle */
            const float *w = t->twiddles + (n2 * h + k) * 2;
            const vec re = y[k * row + 2 * n2], im = y[k * row + 2 * n2 + 1];
            e[k] = re * w[0] + im * w[1];
            if (k)
                o[k - 1] = im * w[0] - re * w[1];
        }
        for (int64_t n1 = 0; n1 < h; n1 += AT_ONCE) {
            products(t, n1 / AT_ONCE, e, o, even, odd);
            for (int m = 0; m < AT_ONCE && n1 + m < h; m++) {
                const int64_t near = n1 + m, far = p - near;
                row_of(x, t, near)[n2] = even[m] - odd[m];
                if (near)
                    row_of(x, t, far)[n2] = even[m] + odd[m];
            }
        }
    }
}

/* Z times sigma, with sums of sigma |Z|^2 and sigma^2 |Z|^2. */
static inline __attribute__((always_inline)) void weigh(vec *z, float sigma, vec *energy, vec *square)
{
    const vec re = z[0] * sigma, im = z[1] * sigma;
    *energy += z[0] * re + z[1] * im;
    *square += re * re + im * im;
    z[0] = re;
    z[1] = im;
}

/* A row of Q points there, times sigma, and back; decimation in frequency, then in time: no reordering. To `sums` are
   added those of `weigh`. */
static void transform(const plan *t, vec *restrict y, const float *sigma, wide sums[2])
{
    const int64_t q = t->q;
    vec energy = {0}, square = {0};
    const float *stage = t->stages;
    int64_t size = q;
    for (; size >= 4; stage += size / 4 * 6, size /= 4) {
        const int64_t quarter = size / 2;  /* in vec: re and im */
        for (int64_t j = 0; j < size / 4; j++) {
            const float *w = stage + 6 * j;
            const float w1r = w[0], w1i = w[1], w2r = w[2], w2i = w[3], w3r = w[4], w3i = w[5];
            for (vec *a = y + 2 * j; a < y + 2 * q; a += 2 * size) {
                vec *b = a + quarter, *c = b + quarter, *d = c + quarter;
                const vec sr = a[0] + c[0], si = a[1] + c[1], dr = a[0] - c[0], di = a[1] - c[1];
                const vec tr = b[0] + d[0], ti = b[1] + d[1], er = b[0] - d[0], ei = b[1] - d[1];
                a[0] = sr + tr;
                a[1] = si + ti;
                const vec br = dr + ei, bi = di - er, cr = sr - tr, ci = si - ti, fr = dr - ei, fi = di + er;
                b[0] = br * w1r - bi * w1i;
                b[1] = br * w1i + bi * w1r;
                c[0] = cr * w2r - ci * w2i;
                c[1] = cr * w2i + ci * w2r;
                d[0] = fr * w3r - fi * w3i;
                d[1] = fr * w3i + fi * w3r;
            }
        }
    }
    if (size == 2)
        for (vec *a = y; a < y + 2 * q; a += 4, sigma += 2) {
            vec both[4] = {a[0] + a[2], a[1] + a[3], a[0] - a[2], a[1] - a[3]};
            weigh(both, sigma[0], &energy, &square);
            weigh(both + 2, sigma[1], &energy, &square);
            a[0] = both[0] + both[2];
            a[1] = both[1] + both[3];
            a[2] = both[0] - both[2];
            a[3] = both[1] - both[3];
        }
    else
        for (int64_t k = 0; k < q; k++)
            weigh(y + 2 * k, sigma[k], &energy, &square);
    sums[0] += __builtin_convertvector(energy, wide);
    sums[1] += __builtin_convertvector(square, wide);
    for (size *= 4; size <= q; size *= 4) {
        const int64_t quarter = size / 2;
        stage -= size / 4 * 6;
        for (int64_t j = 0; j < size / 4; j++) {
            const float *w = stage + 6 * j;
            const float w1r = w[0], w1i = w[1], w2r = w[2], w2i = w[3], w3r = w[4], w3i = w[5];
            for (vec *a = y + 2 * j; a < y + 2 * q; a += 2 * size) {
                vec *b = a + quarter, *c = b + quarter, *d = c + quarter;
                const vec br = b[0] * w1r + b[1] * w1i, bi = b[1] * w1r - b[0] * w1i;
                const vec cr = c[0] * w2r + c[1] * w2i, ci = c[1] * w2r - c[0] * w2i;
                const vec fr = d[0] * w3r + d[1] * w3i, fi = d[1] * w3r - d[0] * w3i;
                const vec sr = a[0] + cr, si = a[1] + ci, dr = a[0] - cr, di = a[1] - ci;
                const vec tr = br + fr, ti = bi + fi, er = br - fr, ei = bi - fi;
                a[0] = sr + tr;
                a[1] = si + ti;
                b[0] = dr - ei;
                b[1] = di + er;
                c[0] = sr - tr;
                c[1] = si - ti;
                d[0] = dr + ei;
                d[1] = di - er;
            }
        }
    }
}

/* Lines [first, last) of `matrices`, LANES at a time: g = (add ? g : 0) + C (w - w0), energies <w - w0, C (w - w0)> and
   squares |C (w - w0)|^2 of each line. `scratch` holds P (Q + 2) + 2 H (Q + 1) vectors. */
void add_circulant(const plan *t, const matrix *matrices, int add, double *energies, double *squares, float *scratch,
    int64_t first, int64_t last)
{
    const int64_t h = t->p / 2 + 1, row = 2 * (t->q + 1);
    vec *y = row_of(scratch, t, t->p);
    int64_t within = first;
    for (; within >= matrices->lines; matrices++)
        within -= matrices->lines;
    while (first < last) {
        line lines[LANES];
        wide sums[2] = {{0}, {0}};
        int count = 0;
        for (; count < LANES && first + count < last; count++, within++) {
            for (; within >= matrices->lines; matrices++)
                within = 0;
            lines[count] = line_of(matrices, within);
        }
        gather(t, lines, count, scratch);
        from_lines(t, scratch, y);
        for (int64_t k = 0; k < h; k++) {
            wide both[2] = {{0}, {0}};
            transform(t, y + k * row, t->sigma + k * t->q, both);
            /* sigma holds a 2 where a row stands for its conjugate too */
            sums[0] += both[0];
            sums[1] += both[1] * (double)(t->p * t->q) / (k == 0 || 2 * k == t->p ? 1.0 : 2.0);
        }
        to_lines(t, scratch, y);
        scatter(t, lines, count, scratch, add);
        for (int v = 0; v < count; v++, first++) {
            energies[first] = sums[0][v];
            squares[first] = sums[1][v];
        }
    }
}
"""
