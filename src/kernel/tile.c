#include "kernel/tile.h"
#include "kernel/load.h"
#include "kernel/vec.h"

/* Shape of the register tile: all accumulators, a row of B and a broadcast fit the registers. */
#define MR 6
#if V_REGISTERS == 32
#define NV 4
#else
#define NV 2
#endif
#define NR (NV * VW)

/* ---- Products ---- */

/* How rows of B and C lie: vectors b_step and c_step apart; after `run` rows of B (0: never) `skip` more numbers are left out. */
typedef struct spread {
    int64_t b_step, c_step, run, skip;
} spread;

VINLINE void micro(const int rows, const int vectors, int64_t k, const float *a, int64_t a_row, int64_t a_col,
                   const float *b, int64_t ldb, float *c, int64_t ldc, int last, int add, const spread y)
{
    int64_t left = y.run;
    vf acc[MR][NV];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            acc[i][j] = v_zero();
        }
    }
    for (int64_t l = 0; l < k; l++) {
        vf row[NV];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            row[j] = v_load(b + j * y.b_step);
        }
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            vf x = v_set1(a[i * a_row]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) {
                acc[i][j] = v_fma(x, row[j], acc[i][j]);
            }
        }
        a += a_col;
        b += ldb;
        if (y.run > 0 && --left == 0) {
            b += y.skip;
            left = y.run;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            float *to = c + i * ldc + j * y.c_step;
            int lanes = j == vectors - 1 ? last : VW;
            if (lanes == VW) {
                v_store(to, add ? v_add(v_load(to), acc[i][j]) : acc[i][j]);
            } else {
                v_store_n(to, add ? v_add(v_load_n(to, lanes), acc[i][j]) : acc[i][j], lanes);
            }
        }
    }
}

/* The number of rows and vectors as constants, so that the tile stays in registers. */
VINLINE void micro_rows(const int vectors, int rows, int64_t k, const float *a, int64_t a_row, int64_t a_col,
                        const float *b, int64_t ldb, float *c, int64_t ldc, int last, int add, const spread y)
{
    switch (rows) {
    case 6: micro(6, vectors, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
    case 5: micro(5, vectors, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
    case 4: micro(4, vectors, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
    case 3: micro(3, vectors, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
    case 2: micro(2, vectors, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
    default: micro(1, vectors, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
    }
}

VINLINE void micro_tile(int vectors, int rows, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                        float *c, int64_t ldc, int last, int add, const spread y)
{
    switch (vectors) {
#if NV == 4
    case 4: micro_rows(4, rows, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
    case 3: micro_rows(3, rows, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
#endif
    case 2: micro_rows(2, rows, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
    default: micro_rows(1, rows, k, a, a_row, a_col, b, ldb, c, ldc, last, add, y); break;
    }
}

static void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b,
                    int64_t ldb, int64_t b_panel, float *c, int64_t ldc, int add)
{
    for (int64_t j = 0; j < n; j += NR) {
        const float *panel = b + j / NR * b_panel;
        int64_t columns = n - j < NR ? n - j : NR;
        int vectors = (int)((columns + VW - 1) / VW), last = (int)(columns - (vectors - 1) * VW);
        for (int64_t i = 0; i < m; i += MR) {
            micro_tile(vectors, (int)(m - i < MR ? m - i : MR), k, a + i * a_row, a_row, a_col, panel, ldb, c + i * ldc + j, ldc, last,
                       add, (spread){VW, VW, 0, 0});
        }
    }
}

static void product_apart(int64_t m, int64_t vectors, int64_t k, const float *a, int64_t a_row, const float *b, int64_t ldb,
                          int64_t b_step, float *c, int64_t ldc, int64_t c_step)
{
    int64_t tiles = (vectors + NV - 1) / NV; /* of about equal width: a narrow one would wait for its own sums */
    for (int64_t t = 0, j, next = 0; t < tiles; t++) {
        j = next;
        next = vectors * (t + 1) / tiles;
        for (int64_t i = 0; i < m; i += MR) {
            micro_tile((int)(next - j), (int)(m - i < MR ? m - i : MR), k, a + i * a_row, a_row, 1,
                       b + j * b_step, ldb, c + i * ldc + j * c_step, ldc, VW, 0, (spread){b_step, c_step, 0, 0});
        }
    }
}

static void product_runs(int64_t m, int64_t n, int64_t runs, int64_t run, const float *a, int64_t a_row, const float *b, int64_t ldb,
                         int64_t b_run, float *c, int64_t ldc, int add)
{
    for (int64_t j = 0; j < n; j += NR) {
        for (int64_t i = 0; i < m; i += MR) {
            micro_tile((int)((n - j < NR ? n - j : NR) / VW), (int)(m - i < MR ? m - i : MR), runs * run, a + i * a_row, a_row, 1,
                       b + j, ldb, c + i * ldc + j, ldc, VW, add, (spread){VW, VW, run, b_run - run * ldb});
        }
    }
}

/* ---- Rows ---- */

static void exp2_row(float *s, int64_t count, float shift)
{
    vf by = v_set1(shift);
    int64_t j = 0;
    for (; j + VW <= count; j += VW) {
        v_store(s + j, v_exp2_weight(v_sub(v_load(s + j), by)));
    }
    if (j < count) {
        int rest = (int)(count - j);
        v_store_n(s + j, v_exp2_weight(v_sub(v_load_n(s + j, rest), by)), rest);
    }
}

#define TOGETHER 8 /* rows whose maxima come first: what is between the lanes of one hides behind the others, and their factors are vectors */

static void softmax(int64_t rows, float *s, int64_t lds, int64_t count, float *m, float *l, float *alpha)
{
    for (int64_t i = 0; i < rows; i++, s += lds) {
        for (int64_t r = i; i % TOGETHER == 0 && r < rows && r < i + TOGETHER; r++) {
            const float *row = s + (r - i) * lds;
            vf top = v_load(row);
            for (int64_t j = VW; j < count; j += VW) {
                top = v_max(top, v_load(row + j));
            }
            float before = m[r], now = v_top(top);
            m[r] = now > before ? now : before;
            alpha[r] = m[r] == before ? 0.0f : before - m[r];
        }
        if (i % TOGETHER == 0) {
            exp2_row(alpha + i, rows - i < TOGETHER ? rows - i : TOGETHER, 0);
        }
        /* A row that has seen nothing yet: any finite shift gives zeros. */
        vf shift = v_set1(m[i] == -INFINITY ? 0.0f : m[i]);
        vf sum0 = v_zero(), sum1 = v_zero();
        int64_t j = 0;
        for (; j + 2 * VW <= count; j += 2 * VW) {
            vf p = v_exp2_weight(v_sub(v_load(s + j), shift)), q = v_exp2_weight(v_sub(v_load(s + j + VW), shift));
            v_store(s + j, p);
            v_store(s + j + VW, q);
            sum0 = v_add(sum0, p);
            sum1 = v_add(sum1, q);
        }
        for (; j < count; j += VW) {
            vf p = v_exp2_weight(v_sub(v_load(s + j), shift));
            v_store(s + j, p);
            sum0 = v_add(sum0, p);
        }
        l[i] = l[i] * alpha[i] + v_sum(v_add(sum0, sum1));
    }
}

static void scale(float *x, int64_t count, float factor)
{
    vf by = v_set1(factor);
    int64_t j = 0;
    for (; j + VW <= count; j += VW) {
        v_store(x + j, v_mul(v_load(x + j), by));
    }
    if (j < count) {
        int rest = (int)(count - j);
        v_store_n(x + j, v_mul(v_load_n(x + j, rest), by), rest);
    }
}

static void softcap(float *s, int64_t count, float cap)
{
    /* tanh(x) = 1 - 2 / (e^2x + 1), 2x in base 2. */
    vf in = v_set1(2.0f * 1.44269504088896341f / cap), limit = v_set1(cap), inverse = v_set1(1 / cap);
    for (int64_t j = 0; j < count; j += VW) {
        int rest = count - j < VW ? (int)(count - j) : VW;
        vf x = v_load_n(s + j, rest);
        vf e = v_exp2(v_min(v_mul(x, in), v_set1(126.0f)));
        vf t = v_mul(v_sub(v_set1(1.0f), v_div(v_set1(2.0f), v_add(e, v_set1(1.0f)))), limit);
        /* Below a quarter of the cap that would lose digits: the series of tanh, to 1e-8. */
        vf y = v_mul(x, inverse), z = v_mul(y, y);
        vf series = v_set1(62.0f / 2835);
        series = v_fma(series, z, v_set1(-17.0f / 315));
        series = v_fma(series, z, v_set1(2.0f / 15));
        series = v_fma(series, z, v_set1(-1.0f / 3));
        series = v_fma(v_mul(series, z), x, x);
        v_store_n(s + j, v_select(v_lt(v_abs(y), v_set1(0.25f)), series, t), rest);
    }
}

static void axpy(float *to, const float *from, int64_t count, float factor)
{
    vf by = v_set1(factor);
    int64_t j = 0;
    for (; j + VW <= count; j += VW) {
        v_store(to + j, v_fma(v_load(from + j), by, v_load(to + j)));
    }
    if (j < count) {
        int rest = (int)(count - j);
        v_store_n(to + j, v_fma(v_load_n(from + j, rest), by, v_load_n(to + j, rest)), rest);
    }
}

static float dot(const float *a, const float *b, int64_t count)
{
    vf s0 = v_zero(), s1 = v_zero();
    int64_t j = 0;
    for (; j + 2 * VW <= count; j += 2 * VW) {
        s0 = v_fma(v_load(a + j), v_load(b + j), s0);
        s1 = v_fma(v_load(a + j + VW), v_load(b + j + VW), s1);
    }
    for (; j < count; j += VW) {
        int rest = count - j < VW ? (int)(count - j) : VW;
        s0 = v_fma(v_load_n(a + j, rest), v_load_n(b + j, rest), s0);
    }
    return v_sum(v_add(s0, s1));
}

static void limit(float *s, const float *bound, int64_t count)
{
    int64_t j = 0;
    for (; j + VW <= count; j += VW) {
        v_store(s + j, v_min(v_load(s + j), v_load(bound + j)));
    }
    if (j < count) {
        int rest = (int)(count - j);
        v_store_n(s + j, v_min(v_load_n(s + j, rest), v_load_n(bound + j, rest)), rest);
    }
}

static void grad_row(float *ds, const float *p, int64_t count, float delta)
{
    vf by = v_set1(delta);
    int64_t j = 0;
    for (; j + VW <= count; j += VW) {
        v_store(ds + j, v_mul(v_load(p + j), v_sub(v_load(ds + j), by)));
    }
    if (j < count) {
        int rest = (int)(count - j);
        v_store_n(ds + j, v_mul(v_load_n(p + j, rest), v_sub(v_load_n(ds + j, rest), by)), rest);
    }
}

/* ---- Other data types ---- */

VINLINE void load_row_as(float *to, const void *from, const attn_dtype dtype, int64_t count, float factor)
{
    vf by = v_set1(factor);
    int64_t j = 0;
    for (; j + VW <= count; j += VW) {
        v_store(to + j, v_mul(load_as(from, dtype, j), by));
    }
    if (j < count) {
        v_store_n(to + j, v_mul(load_as_n(from, dtype, j, (int)(count - j)), by), (int)(count - j));
    }
}

static void load_row(float *to, const void *from, attn_dtype dtype_, int64_t count, float factor)
{
    BY_DTYPE(load_row_as(to, from, dtype, count, factor))
}

#if defined(ATTN_ISA_AVX512)
/* 16 rows of 16 numbers transposed in registers. */
VINLINE void transpose_16(vf x[16])
{
    vf t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
        __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
        x[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        x[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        x[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
        x[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        x[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        x[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#endif

VINLINE void pack_transposed_as(float *to, int64_t ld, const void *from, const attn_dtype dtype, int64_t stride, int64_t rows,
                                int64_t count)
{
    int64_t done = 0;
#if defined(ATTN_ISA_AVX512)
    /* The last group of rows overlaps the one before it. */
    for (; done < rows && rows >= 16; done = done + 32 > rows && done + 16 < rows ? rows - 16 : done + 16) {
        int64_t c = 0;
        for (; c + 16 <= count; c += 16) {
            vf x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                x[i] = load_as(from, dtype, (done + i) * stride + c);
            }
            transpose_16(x);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                v_store(to + (c + i) * ld + done, x[i]);
            }
        }
        for (; c < count; c++) {
            for (int i = 0; i < 16; i++) {
                to[c * ld + done + i] = load_one(from, dtype, (done + i) * stride + c);
            }
        }
    }
#endif
    for (; done < rows; done++) {
        for (int64_t c = 0; c < count; c++) {
            to[c * ld + done] = load_one(from, dtype, done * stride + c);
        }
    }
}

static void pack_transposed(float *to, int64_t ld, const void *from, attn_dtype dtype_, int64_t stride, int64_t rows,
                            int64_t count)
{
    BY_DTYPE(pack_transposed_as(to, ld, from, dtype, stride, rows, count))
}

extern const attn_tile_kernels ATTN_K(attn_tile_kernels_table);
const attn_tile_kernels ATTN_K(attn_tile_kernels_table) = {
    .mr = MR,
    .nr = NR,
    .vw = VW,
    .product = product,
    .product_apart = product_apart,
    .product_runs = product_runs,
    .softmax = softmax,
    .exp2_row = exp2_row,
    .scale = scale,
    .softcap = softcap,
    .axpy = axpy,
    .limit = limit,
    .dot = dot,
    .grad_row = grad_row,
    .load_row = load_row,
    .pack_transposed = pack_transposed,
};
