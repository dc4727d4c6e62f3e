/* Every micro-kernel of every instruction set that this machine has, against the scalar version on random shapes and alignments.
 *     checkkernel            compare
 *     checkkernel --bench    and time each (nanoseconds per call, and how many times faster than scalar)
 * A family is one function in the table at the end.
 */
#include "core/random.h"
#include "kernel/decode.h"
#include "kernel/dispatch.h"
#include "kernel/linear.h"
#include "kernel/quant.h"
#include "kernel/rows.h"
#include "kernel/scan.h"
#include "kernel/select.h"
#include "kernel/tile.h"
#include "tensor/half.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static attn_random chance;
static int bench, passed, failed;
static attn_isa level;

static int64_t draw(int64_t low, int64_t high) { return low + (int64_t)attn_random_below(&chance, (uint64_t)(high - low + 1)); }

/* `count` numbers at an odd alignment, with room to read a few vectors past the end. Freed by release(). */
static void *blocks[256];
static int block_count;

static void *memory(size_t bytes)
{
    char *block = calloc(1, bytes + 512);
    if (block == NULL || block_count == 256) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    blocks[block_count++] = block;
    return block + 64 + 4 * draw(0, 15);
}

static float *floats(int64_t count, double size)
{
    float *x = memory((size_t)count * sizeof *x);
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)(attn_random_normal(&chance) * size);
    }
    return x;
}

static float *copy(const float *from, int64_t count)
{
    float *x = memory((size_t)count * sizeof *x);
    memcpy(x, from, (size_t)count * sizeof *x);
    return x;
}

static void release(void)
{
    for (int i = 0; i < block_count; i++) {
        free(blocks[i]);
    }
    block_count = 0;
}

static void same(const char *what, const float *got, const float *want, int64_t count, double tolerance)
{
    double size = 0;
    for (int64_t i = 0; i < count; i++) {
        size = isfinite(want[i]) ? fmax(size, fabs((double)want[i])) : size;
    }
    for (int64_t i = 0; i < count; i++) {
        if (!(got[i] == want[i] || fabs((double)got[i] - (double)want[i]) <= tolerance * (size + 1e-30))) {
            printf("FAIL %s %s: [%lld of %lld] got %.9g, scalar %.9g\n", attn_isa_name(level), what, (long long)i, (long long)count,
                   (double)got[i], (double)want[i]);
            failed++;
            return;
        }
    }
    passed++;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* Nanoseconds of a statement, the best of several batches. */
#define TIME(result, statement)                          \
    do {                                                 \
        double best_ = 1e30;                             \
        for (int batch_ = 0; batch_ < 9; batch_++) {     \
            double start_ = now();                       \
            for (int i_ = 0; i_ < 50; i_++) {            \
                statement;                               \
            }                                            \
            best_ = fmin(best_, (now() - start_) / 50);  \
        }                                                \
        (result) = best_;                                \
    } while (0)

#define BENCH(what, fast, slow)                                                                                         \
    do {                                                                                                                \
        if (bench) {                                                                                                    \
            double a_, b_;                                                                                              \
            TIME(a_, fast);                                                                                             \
            TIME(b_, slow);                                                                                             \
            printf("%-10s %-28s %10.0f ns  %6.2fx scalar\n", attn_isa_name(level), what, a_, b_ / a_);                  \
        }                                                                                                               \
    } while (0)

/* ---- tile ---- */

static void check_product(const attn_tile_kernels *k, const attn_tile_kernels *s, int big)
{
    int64_t m = big ? 96 : draw(1, 20), n = big ? 128 : draw(1, 150), depth = big ? 128 : draw(1, 70), add = draw(0, 1);
    int64_t wide = (n + 255) / 256 * 256, turned = draw(0, 1), ldc = n + draw(0, 9);
    float *a = floats(m * depth, 1), *b = floats(depth * wide, 1), *c = floats(m * ldc, 1), *d = copy(c, m * ldc);
    int64_t a_row = turned ? 1 : depth, a_col = turned ? m : 1;
    /* B as rows: the same for every panel width. */
    k->product(m, n, depth, a, a_row, a_col, b, wide, k->nr, c, ldc, (int)add);
    s->product(m, n, depth, a, a_row, a_col, b, wide, s->nr, d, ldc, (int)add);
    same("product", c, d, m * ldc, 1e-5);
    if (big) {
        BENCH("product 96x128x128", k->product(m, n, depth, a, a_row, a_col, b, wide, k->nr, c, ldc, 0),
              s->product(m, n, depth, a, a_row, a_col, b, wide, s->nr, d, ldc, 0));
    }
}

/* B in rows of blocks, and in runs of rows, against plain sums. */
static void check_spread_products(const attn_tile_kernels *k)
{
    int64_t m = draw(1, 20), vectors = draw(1, 9), depth = draw(1, 40), vw = k->vw, runs = draw(1, 5), add = draw(0, 1), n = vectors * vw;
    int64_t step = depth * vw + draw(0, 30), apart = vw + draw(0, 20), ldc = vectors * apart, run = draw(1, 9), ldb = n + draw(0, 9);
    int64_t b_run = run * ldb + draw(0, 30), deep = runs * run;
    float *a = floats(m * (depth + deep), 1), *b = floats(vectors * step + runs * b_run, 1), *c = floats(m * ldc, 1), *d = copy(c, m * ldc);
    k->product_apart(m, vectors, depth, a, depth, b, vw, step, c, ldc, apart);
    for (int64_t j = 0; j < vectors; j++) {
        for (int64_t e = 0; e < vw; e++) { /* a column at a time, as vectors are of other widths */
            for (int64_t i = 0; i < m; i++) {
                double sum = 0;
                for (int64_t l = 0; l < depth; l++) {
                    sum += (double)a[i * depth + l] * (double)b[j * step + l * vw + e];
                }
                d[i * ldc + j * apart + e] = (float)sum;
            }
        }
    }
    same("product_apart", c, d, m * ldc, 1e-5);
    float *o = floats(m * n, 1), *p = copy(o, m * n);
    k->product_runs(m, n, runs, run, a, deep, b, ldb, b_run, o, n, (int)add);
    for (int64_t i = 0; i < m * n; i++) {
        double sum = add ? (double)p[i] : 0;
        for (int64_t l = 0; l < deep; l++) {
            sum += (double)a[i / n * deep + l] * (double)b[l / run * b_run + l % run * ldb + i % n];
        }
        p[i] = (float)sum;
    }
    same("product_runs", o, p, m * n, 1e-5);
}

static void check_softmax(const attn_tile_kernels *k, const attn_tile_kernels *s, int big)
{
    int64_t rows = big ? 6 : draw(1, 6), count = big ? 256 : 16 * draw(1, 9), lds = count + 16;
    float *x = floats(rows * lds, draw(0, 1) ? 5 : 60), *m = floats(rows, 3), *l = floats(rows, 1), *alpha = floats(rows, 1);
    for (int64_t i = 0; i < rows; i++) {
        l[i] = fabsf(l[i]);
        if (!big && draw(0, 2) == 0) {
            m[i] = -INFINITY, l[i] = 0;
        }
        for (int64_t j = 0; j < count && !big; j++) {
            x[i * lds + j] = draw(0, 3) == 0 ? -INFINITY : x[i * lds + j];
        }
    }
    float *y = copy(x, rows * lds), *m2 = copy(m, rows), *l2 = copy(l, rows), *alpha2 = copy(alpha, rows);
    k->softmax(rows, x, lds, count, m, l, alpha);
    s->softmax(rows, y, lds, count, m2, l2, alpha2);
    same("softmax probabilities", x, y, rows * lds, 1e-6);
    same("softmax maximum", m, m2, rows, 0);
    same("softmax sum", l, l2, rows, 3e-6);
    same("softmax alpha", alpha, alpha2, rows, 1e-6);
    if (big) {
        BENCH("softmax 6x256", k->softmax(rows, x, lds, count, m, l, alpha), s->softmax(rows, y, lds, count, m2, l2, alpha2));
    }
}

static void check_rows_of_tiles(const attn_tile_kernels *k, const attn_tile_kernels *s)
{
    int64_t n = draw(1, 200);
    float *x = floats(n, 20), *y = copy(x, n), *p = floats(n, 1), factor = (float)attn_random_normal(&chance);
    k->exp2_row(x, n, factor), s->exp2_row(y, n, factor);
    same("exp2_row", x, y, n, 1e-6);
    x = floats(n, 20), y = copy(x, n);
    k->softcap(x, n, 15), s->softcap(y, n, 15);
    same("softcap", x, y, n, 1e-6);
    k->scale(x, n, factor), s->scale(y, n, factor);
    same("scale", x, y, n, 1e-6);
    k->axpy(x, p, n, factor), s->axpy(y, p, n, factor);
    same("axpy", x, y, n, 1e-6);
    y = copy(x, n);
    for (int64_t i = 0; i < n; i++) {
        p[i] = draw(0, 1) ? INFINITY : draw(0, 1) ? -INFINITY : p[i];
    }
    k->limit(x, p, n), s->limit(y, p, n);
    same("limit", x, y, n, 0);
    x = floats(n, 1), y = copy(x, n), p = floats(n, 1);
    k->grad_row(x, p, n, factor), s->grad_row(y, p, n, factor);
    same("grad_row", x, y, n, 1e-6);
    float a = k->dot(x, p, n), b = s->dot(x, p, n), size = 0;
    for (int64_t i = 0; i < n; i++) {
        size += fabsf(x[i] * p[i]);
    }
    b = fabsf(a - b) <= 1e-6f * size ? a : b;
    same("dot", &a, &b, 1, 1e-6);
}

/* exp2 against the C library, over the range that softmax uses. */
static void check_exp2_accuracy(const attn_tile_kernels *k)
{
    double worst = 0;
    for (int i = 0; i < 4000; i++) {
        float x[16];
        for (int j = 0; j < 16; j++) {
            x[j] = (float)(-120 * attn_random_uniform(&chance));
        }
        float y[16];
        memcpy(y, x, sizeof x);
        k->exp2_row(y, 16, 0);
        for (int j = 0; j < 16; j++) {
            double want = exp2((double)x[j]);
            worst = fmax(worst, fabs((double)y[j] - want) / (want * 0x1p-23));
        }
    }
    if (worst > 2) {
        printf("FAIL %s exp2: error of %.2f ulp (at most 2)\n", attn_isa_name(level), worst);
        failed++;
    } else {
        passed++;
    }
}

static void *random_typed(attn_dtype dtype, int64_t count)
{
    float *x = floats(count, 1);
    uint16_t *half = memory((size_t)count * 2);
    int8_t *bytes = memory((size_t)count);
    for (int64_t i = 0; i < count; i++) {
        half[i] = dtype == ATTN_F16 ? attn_f32_to_f16(x[i]) : attn_f32_to_bf16(x[i]);
        bytes[i] = (int8_t)draw(-127, 127);
    }
    return dtype == ATTN_F32 ? (void *)x : dtype == ATTN_I8 ? (void *)bytes : (void *)half;
}

static void check_types(const attn_tile_kernels *k, const attn_tile_kernels *s, int big)
{
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
    for (int t = 0; t < 4; t++) {
        int64_t keys = big ? 128 : draw(1, 40), d = big ? 128 : draw(1, 100), stride = d + draw(0, 9);
        void *data = random_typed(types[t], keys * stride + 64);
        char name[64];
        float *x = floats(keys * d, 1), *y = copy(x, keys * d);
        k->load_row(x, data, types[t], d, 0.3f), s->load_row(y, data, types[t], d, 0.3f);
        snprintf(name, sizeof name, "load_row %s", attn_dtype_name(types[t]));
        same(name, x, y, d, 1e-7);
        x = floats(keys * d, 1), y = copy(x, keys * d);
        k->pack_transposed(x, keys, data, types[t], stride, keys, d), s->pack_transposed(y, keys, data, types[t], stride, keys, d);
        snprintf(name, sizeof name, "pack_transposed %s", attn_dtype_name(types[t]));
        same(name, x, y, keys * d, 0);
        release();
    }
}

static void check_tile(void)
{
    const attn_tile_kernels *k = attn_tile_kernels_at(level), *s = attn_tile_kernels_at(ATTN_ISA_LEVEL_SCALAR);
    for (int i = 0; i < 150; i++) {
        check_product(k, s, 0);
        check_spread_products(k);
        check_softmax(k, s, 0);
        check_rows_of_tiles(k, s);
        release();
        check_types(k, s, 0);
    }
    check_exp2_accuracy(k);
    check_product(k, s, 1);
    check_softmax(k, s, 1);
    release();
    check_types(k, s, 1);
}

/* ---- decode ---- */

static void check_decode_types(const attn_decode_kernels *k, const attn_decode_kernels *s, int big)
{
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
    for (int t = 0; t < 4; t++) {
        /* Whole tiles in every second case: they have a path of their own. */
        int64_t rows = draw(1, big ? 4 : 9), keys = big ? 128 : draw(1, 300), d = big ? 128 : draw(0, 1) ? 32 * draw(1, 16) : draw(0, 100);
        int64_t stride = d + draw(0, 9), lds = keys + 20;
        /* Rounded queries and weights, where there are instructions for them. */
        const int rounded = big || draw(0, 1);
        double tolerance = types[t] == ATTN_I8 && rounded && level >= ATTN_ISA_LEVEL_AVX2 ? 2e-4 : 3e-6;
        void *data = random_typed(types[t], keys * stride + 64);
        char name[64];
        float *q = floats(rows * d, 1), *u = floats(rows * lds, 1), *v = copy(u, rows * lds);
        k->scores(u, lds, q, d, rows, data, types[t], rounded, stride, keys, d);
        s->scores(v, lds, q, d, rows, data, types[t], rounded, stride, keys, d);
        snprintf(name, sizeof name, "decode_scores %s", attn_dtype_name(types[t]));
        same(name, u, v, rows * lds, tolerance);
        if (big) {
            BENCH(name, k->scores(u, lds, q, d, rows, data, types[t], rounded, stride, keys, d),
                  s->scores(v, lds, q, d, rows, data, types[t], rounded, stride, keys, d));
        }
        int64_t apart = draw(1, 3), entries = keys + draw(0, 90);
        int32_t *list = malloc((size_t)entries * sizeof *list);
        for (int64_t j = 0; j < entries; j++) {
            list[j] = (int32_t)draw(0, keys - 1);
        }
        float *by = floats(keys * apart, 1), *w = copy(u, rows * lds), *w2 = copy(w, rows * lds);
        k->scale_keys(u, lds, rows, by, apart, NULL, keys);
        s->scale_keys(v, lds, rows, by, apart, NULL, keys);
        same("decode_scale_keys", u, v, rows * lds, tolerance);
        k->scores_listed(w, lds, q, d, rows, data, types[t], rounded, stride, list, keys, entries, d);
        s->scores_listed(w2, lds, q, d, rows, data, types[t], rounded, stride, list, keys, entries, d);
        k->scale_keys(w, lds, rows, by, apart, list, keys);
        s->scale_keys(w2, lds, rows, by, apart, list, keys);
        snprintf(name, sizeof name, "decode_scores_listed %s", attn_dtype_name(types[t]));
        same(name, w, w2, rows * lds, tolerance);
        float *o = floats(rows * stride, 1), *o2 = copy(o, rows * stride);
        k->values(o, stride, u, lds, rows, data, types[t], rounded, stride, keys, d);
        s->values(o2, stride, u, lds, rows, data, types[t], rounded, stride, keys, d);
        snprintf(name, sizeof name, "decode_values %s", attn_dtype_name(types[t]));
        same(name, o, o2, rows * stride, tolerance);
        if (big) {
            BENCH(name, k->values(o, stride, u, lds, rows, data, types[t], rounded, stride, keys, d),
                  s->values(o2, stride, u, lds, rows, data, types[t], rounded, stride, keys, d));
        }
        memcpy(o2, o, (size_t)(rows * stride) * sizeof *o);
        k->values_listed(o, stride, u, lds, rows, data, types[t], rounded, stride, list, keys, entries, d);
        s->values_listed(o2, stride, u, lds, rows, data, types[t], rounded, stride, list, keys, entries, d);
        snprintf(name, sizeof name, "decode_values_listed %s", attn_dtype_name(types[t]));
        same(name, o, o2, rows * stride, tolerance);
        free(list);
        release();
    }
}

static void check_decode(void)
{
    const attn_decode_kernels *k = attn_decode_kernels_at(level), *s = attn_decode_kernels_at(ATTN_ISA_LEVEL_SCALAR);
    for (int i = 0; i < 150; i++) {
        check_decode_types(k, s, 0);
    }
    check_decode_types(k, s, 1);
    /* Rows of zeros, of tiny and of infinite numbers. */
    int8_t *data = random_typed(ATTN_I8, 64 * 64);
    const float odd[] = {0, 1e-38f, INFINITY, NAN};
    for (int i = 0; i < 4; i++) {
        float *q = floats(4 * 64, 1), *u = floats(4 * 64, 1), *v = copy(u, 4 * 64);
        for (int j = 0; j < 64; j++) {
            q[64 + j] = i < 2 ? odd[i] : j == 5 ? odd[i] : q[64 + j];
        }
        k->scores(u, 64, q, 64, 4, data, ATTN_I8, 1, 64, 64, 64), s->scores(v, 64, q, 64, 4, data, ATTN_I8, 1, 64, 64, 64);
        for (int j = 0; j < 4 * 64; j++) { /* NaN is equal to NaN here */
            u[j] = isnan(u[j]) ? 1e9f : u[j];
            v[j] = isnan(v[j]) ? 1e9f : v[j];
        }
        same("scores of odd rows", u, v, 4 * 64, i == 0 ? 2e-4 : 3e-6);
    }
    release();
}

/* ---- rows ---- */

static void check_rows(void)
{
    const attn_row_kernels *k = ATTN_KERNEL_SELECT(attn_row_kernels_table, level);
    const attn_row_kernels *s = ATTN_KERNEL_SELECT(attn_row_kernels_table, ATTN_ISA_LEVEL_SCALAR);
    for (int i = 0; i < 100; i++) {
        int64_t n = draw(1, 300), half = draw(1, 70);
        float *x = floats(n, 2), *w = floats(n, 1), *a = floats(n, 1), *b = floats(n, 1);
        k->rms_norm(x, w, n, 1e-5f, a), s->rms_norm(x, w, n, 1e-5f, b);
        same("rms_norm", a, b, n, 1e-6);
        k->add(a, x, n), s->add(b, x, n);
        same("add", a, b, n, 1e-6);
        k->scale(a, 0.7f, n), s->scale(b, 0.7f, n);
        same("rows scale", a, b, n, 1e-6);
        k->silu_gate(a, w, n), s->silu_gate(b, w, n);
        same("silu_gate", a, b, n, 2e-6);
        a = floats(n, 2), b = copy(a, n);
        k->gelu_gate(a, w, n), s->gelu_gate(b, w, n);
        same("gelu_gate", a, b, n, 2e-6);
        int64_t ld = 2 * half + n;
        float *r = floats(3 * ld, 1), *r2 = copy(r, 3 * ld), *c = floats(half, 1), *sn = floats(half, 1);
        k->rotate(r, 3, ld, half, c, sn), s->rotate(r2, 3, ld, half, c, sn);
        same("rotate", r, r2, 3 * ld, 1e-6);
        for (int f = ATTN_ROW_SIGMOID; f <= ATTN_ROW_ELU1; f++) {
            float *wide = floats(n, 20), *o = floats(n, 1), *o2 = floats(n, 1);
            k->function((attn_row_function)f, wide, NULL, n, o), s->function((attn_row_function)f, wide, NULL, n, o2);
            same("function", o, o2, n, 1e-6);
            k->function((attn_row_function)f, wide, w, n, o), s->function((attn_row_function)f, wide, w, n, o2);
            same("function's slope", o, o2, n, 1e-5);
        }
        int8_t *q = memory((size_t)n), *q2 = memory((size_t)n);
        a = copy(x, n), b = copy(x, n);
        k->hadamard(a, n), s->hadamard(b, n);
        same("hadamard", a, b, n, 2e-6);
        k->hadamard(a, n);
        same("hadamard twice", a, x, n, 2e-6);
        float f = k->to_i8(x, n, q), f2 = s->to_i8(x, n, q2);
        for (int64_t j = 0; j < n; j++) {
            a[j] = (float)q[j] * f, b[j] = (float)q2[j] * f2;
        }
        same("to_i8", a, b, n, 1.0 / 127); /* a tie may round either way */
        release();
    }
}

/* ---- scan ---- */

static void check_scan(void)
{
    const attn_scan_kernels *k = ATTN_KERNEL_SELECT(attn_scan_kernels_table, level);
    const attn_scan_kernels *s = ATTN_KERNEL_SELECT(attn_scan_kernels_table, ATTN_ISA_LEVEL_SCALAR);
    for (int i = 0; i < 100; i++) {
        int64_t n = draw(1, 40), channels = draw(1, 70), states = draw(1, 20), ld = channels + draw(0, 9), size = n * ld;
        int rates = draw(0, 1) != 0, plain = !rates && draw(0, 1) != 0;
        float *o = floats(size, 1), *o2 = copy(o, size), *h = floats(states * channels, 1), *h2 = copy(h, states * channels);
        attn_scan x = {.n = n, .channels = channels, .states = states, .ld = ld, .ld_gain = ld, .v = floats(size, 1),
                       .gain = rates || draw(0, 1) ? floats(size, 0.9) : NULL, .lam = rates ? NULL : floats(size, 0.9),
                       .rate = floats(states * channels, 1), .b = plain ? NULL : floats(n * states, 1),
                       .c = plain ? NULL : floats(n * states, 1), .skip = draw(0, 1) ? floats(channels, 1) : NULL, .h = h, .o = o};
        k->scan(&x);
        x.h = h2, x.o = o2;
        s->scan(&x);
        same("scan", o, o2, size, 1e-5);
        same("scan's state", h, h2, states * channels, 1e-5);
        int64_t width = states * channels, rows = n * channels;
        attn_scan_back b = {.n = n, .channels = channels, .states = states, .v = x.v, .grad_o = floats(size, 1), .ld = ld, .ld_o = ld,
                            .gain = floats(rows, 1), .keep = floats(n * width, 0.9), .rate = draw(0, 1) ? floats(width, 1) : NULL,
                            .b = floats(n * states, 1), .c = floats(n * states, 1), .ld_b = states, .ld_c = draw(0, 1) * states,
                            .skip = x.skip, .h = floats((n + 1) * width, 1), .g = floats(width, 1),
                            .sums = floats(2 * ATTN_SCAN_LANES * states, 1), .grad_v = floats(rows, 1), .grad_gain = floats(rows, 1),
                            .grad_b = floats(n * states, 1), .grad_c = floats(n * states, 1), .grad_rate = floats(width, 1),
                            .grad_skip = floats(channels, 1)};
        attn_scan_back b2 = b;
        b2.keep = copy(b.keep, n * width), b2.h = copy(b.h, (n + 1) * width), b2.g = copy(b.g, width);
        b2.grad_v = floats(rows, 1), b2.grad_gain = floats(rows, 1), b2.grad_b = floats(n * states, 1), b2.grad_c = floats(n * states, 1);
        b2.grad_rate = copy(b.grad_rate, width), b2.grad_skip = copy(b.grad_skip, channels);
        k->states(&b), s->states(&b2);
        same("scan's states", b.h, b2.h, (n + 1) * width, 1e-5);
        k->back(&b), s->back(&b2);
        const char *names[] = {"keep", "g", "v", "gain", "b", "c", "rate", "skip"};
        float *got[] = {b.keep, b.g, b.grad_v, b.grad_gain, b.grad_b, b.grad_c, b.grad_rate, b.grad_skip};
        float *want[] = {b2.keep, b2.g, b2.grad_v, b2.grad_gain, b2.grad_b, b2.grad_c, b2.grad_rate, b2.grad_skip};
        int64_t counts[] = {n * width, width, rows, rows, n * states, n * states, width, channels};
        for (int j = 0; j < 8; j++) {
            char what[32];
            snprintf(what, sizeof what, "scan back, %s", names[j]);
            same(what, got[j], want[j], counts[j], 1e-5);
        }
        float *before = draw(0, 1) ? floats(channels, 1) : NULL, *g = floats(size, 1);
        k->average(n, channels, ld, x.v, g, before, ld, o), s->average(n, channels, ld, x.v, g, before, ld, o2);
        same("average", o, o2, size, 1e-5);
        k->average(n, channels, ld, x.v, g, before, 0, o);
        same("average's last row", o, o2 + (n - 1) * ld, channels, 1e-5);
        k->average(n, channels, ld, x.v, g, before, ld, o);
        attn_scan_gated y = {n, channels, ld, floats(n * channels, 1), floats(n * channels, 1), floats(n * channels, 1), g, 0.3f,
                             floats(channels, 1), floats(channels, 1), floats(n * channels, 1), floats(size, 1), floats(n, 1)}, y2 = y;
        y2.k_state = copy(y.k_state, channels), y2.v_state = copy(y.v_state, channels);
        y2.turned = floats(n * channels, 1), y2.out = copy(y.out, size), y2.product = floats(n, 1);
        k->gated(&y), s->gated(&y2);
        same("gated keys", y.k_state, y2.k_state, channels, 1e-5);
        same("gated values", y.v_state, y2.v_state, channels, 1e-5);
        same("gated queries", y.turned, y2.turned, n * channels, 1e-5);
        same("gated output", y.out, y2.out, size, 1e-5);
        same("gated products", y.product, y2.product, n, 1e-4);
        float *a = floats(size, 1), *a2 = copy(a, size), *gx = floats(size, 1), *gx2 = copy(gx, size), *gg = floats(size, 1), *gg2 = copy(gg, size);
        int add = draw(0, 1) != 0;
        k->average_back(n, channels, x.v, g, before, o, a, gx, gg, add), s->average_back(n, channels, x.v, g, before, o, a2, gx2, gg2, add);
        same("average back", gx, gx2, n * channels, 1e-5);
        same("average back, gates", gg, gg2, n * channels, 1e-5);
        release();
    }
}

/* ---- linear ---- */

static void check_linear(void)
{
    const attn_linear_kernels *k = attn_linear_kernels_at(level), *s = attn_linear_kernels_at(ATTN_ISA_LEVEL_SCALAR);
    for (int i = 0; i < 100; i++) {
        int64_t d = draw(1, 40), dv = draw(1, 90), ld = dv + draw(0, 5);
        float *state = floats(d * ld, 1), *state2 = copy(state, d * ld), *q = floats(d, 1), *kk = floats(d, 1), *v = floats(dv, 1);
        float *decays = draw(0, 1) ? floats(d, 1) : NULL, *o = floats(dv, 1), *o2 = floats(dv, 1);
        k->step(d, dv, state, ld, 0.9, decays, q, kk, v, o), s->step(d, dv, state2, ld, 0.9, decays, q, kk, v, o2);
        same("linear step state", state, state2, d * ld, 1e-6);
        same("linear step", o, o2, dv, 3e-6);
        k->read(d, dv, state, ld, q, o), s->read(d, dv, state, ld, q, o2);
        same("linear read", o, o2, dv, 3e-6);
        float sum = k->sum(v, dv), sum2 = s->sum(v, dv);
        same("sum", &sum, &sum2, 1, 1e-5 * (1 + sqrt((double)dv) / fabs((double)sum2)));
        k->multiply(o, v, v, dv), s->multiply(o2, v, v, dv);
        same("multiply", o, o2, dv, 1e-7);
        int64_t tokens = draw(1, 16), row = dv + draw(0, 5), size = tokens * row, reverse = draw(0, 1), step = reverse ? -row : row;
        float *a = floats(size, 1), *b = floats(size, 1), *by = floats(size, 0.8), *pairs = floats(tokens * 17, 1), *pairs2 = floats(tokens * 17, 1);
        int64_t at = reverse ? size - row : 0;
        k->faded_scores(tokens, dv, a + at, b + at, step, by + at, step, pairs, 17);
        s->faded_scores(tokens, dv, a + at, b + at, step, by + at, step, pairs2, 17);
        for (int64_t j = 0; j < tokens; j++) {
            same("faded scores", pairs + j * 17, pairs2 + j * 17, tokens, 1e-5);
        }
        float *to = floats(size, 1), *to2 = copy(to, size), *total = floats(dv, 1), *total2 = copy(total, dv);
        k->faded_sums(tokens, dv, pairs, 17, 1, a + at, step, by + at, step, to + at, step);
        s->faded_sums(tokens, dv, pairs, 17, 1, a + at, step, by + at, step, to2 + at, step);
        same("faded sums", to, to2, size, 1e-5);
        k->fade(tokens, dv, to + at, step, by + at, step, reverse, total), s->fade(tokens, dv, to2 + at, step, by + at, step, reverse, total2);
        same("fade", to, to2, size, 1e-5);
        same("fade's total", total, total2, dv, 1e-5);
        float *slope = floats(dv, 1), *slope2 = floats(dv, 1);
        memcpy(o, v, (size_t)dv * sizeof *o), memcpy(o2, v, (size_t)dv * sizeof *o);
        k->sigmoid(slope, v, dv), s->sigmoid(slope2, v, dv);
        same("sigmoid", slope, slope2, dv, 1e-6);
        k->taylor(o, slope, dv), s->taylor(o2, slope2, dv);
        same("taylor", o, o2, dv, 1e-6);
        same("taylor slope", slope, slope2, dv, 1e-6);
        int64_t width = 1 + d + d * (d + 1) / 2;
        float *phi = floats(width, 1), *phi2 = floats(width, 1), *grad = floats(d, 1), *grad2 = copy(grad, d);
        k->taylor_features(d, 0.3, q, phi), s->taylor_features(d, 0.3, q, phi2);
        same("taylor features", phi, phi2, width, 1e-6);
        double product = 0, want = 0;
        for (int64_t j = 0; j < d; j++) {
            want += 0.3 * (double)q[j] * (double)q[j];
        }
        for (int64_t j = 0; j < width; j++) {
            product += (double)phi[j] * (double)phi[j];
        }
        float got = (float)product, expected = (float)(1 + want + want * want / 2);
        same("taylor features' product", &got, &expected, 1, 1e-5);
        k->taylor_features_back(d, 0.3, q, phi, grad), s->taylor_features_back(d, 0.3, q, phi2, grad2);
        same("taylor features back", grad, grad2, d, 3e-6);
        release();
    }
}

/* ---- quantised products ---- */

static void check_quant(void)
{
    const attn_quant_kernels *k = ATTN_KERNEL_DOT_SELECT(attn_quant_kernels_table, level);
    const attn_quant_kernels *s = ATTN_KERNEL_SELECT(attn_quant_kernels_table, ATTN_ISA_LEVEL_SCALAR);
    static const char *const names[] = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"};
    for (int format = ATTN_QUANT_Q4_0; format < ATTN_QUANT_FORMATS; format++) {
        for (int i = 0; i < 20; i++) {
            int64_t units = 8 * draw(1, 4);
            size_t bytes = attn_quant_panel_bytes((attn_quant_format)format, units);
            size_t scales = attn_quant_scale_bytes((attn_quant_format)format, units);
            unsigned char *panel = aligned_alloc(64, (bytes + 127) / 64 * 64);
            attn_quant_x *x = memory((size_t)units * sizeof *x), *x2 = memory((size_t)units * sizeof *x2);
            float *values = floats(units * ATTN_QUANT_UNIT, 1), out[16], out2[16];
            char name[64];
            for (size_t j = 0; j < bytes; j++) {
                panel[j] = (unsigned char)draw(0, 255);
            }
            for (size_t j = 0; j + 1 < scales; j += 2) { /* finite halves of moderate size */
                uint16_t half = attn_f32_to_f16((float)(attn_random_uniform(&chance) * 0.1));
                memcpy(panel + j, &half, 2);
            }
            k->quantize(values, units, x, 1), s->quantize(values, units, x2, 1);
            int equal = 1;
            for (int64_t u = 0; u < units; u++) {
                equal &= memcmp(x[u].high, x2[u].high, sizeof x[u].high) == 0 && memcmp(x[u].low, x2[u].low, sizeof x[u].low) == 0;
            }
            if (!equal) {
                printf("FAIL %s quantize differs from scalar\n", attn_isa_name(level));
                failed++;
            } else {
                passed++;
            }
            k->vector[format](panel, units, x2, 1, out), s->vector[format](panel, units, x2, 1, out2);
            snprintf(name, sizeof name, "quantised product %s", names[format]);
            same(name, out, out2, 16, 2e-5);
            if (i == 0) {
                BENCH(name, k->vector[format](panel, units, x2, 1, out), s->vector[format](panel, units, x2, 1, out2));
            }
            free(panel);
            release();
        }
    }
}

/* ---- select ---- */

static int falling(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

static void check_select(void)
{
    const attn_select_kernels *k = attn_select_kernels_at(level), *s = attn_select_kernels_at(ATTN_ISA_LEVEL_SCALAR);
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
    for (int i = 0; i < 300; i++) {
        int64_t n = i == 0 ? 4096 : draw(1, 300), rank = draw(1, n);
        float *x = floats(n, 2), *sorted, *y = floats(n + ATTN_SELECT_SLACK, 1), *y2 = floats(n + ATTN_SELECT_SLACK, 1);
        int32_t *at = memory((size_t)(n + ATTN_SELECT_SLACK) * sizeof *at), *at2 = memory((size_t)(n + ATTN_SELECT_SLACK) * sizeof *at2);
        for (int64_t j = 0; j < n && i % 3 > 0; j++) { /* ties, infinities, zeros of both signs */
            x[j] = draw(0, 9) == 0 ? -INFINITY : draw(0, 20) == 0 ? INFINITY : i % 3 == 1 ? truncf(x[j]) : x[j] * 1e-39f;
        }
        sorted = copy(x, n);
        qsort(sorted, (size_t)n, sizeof *sorted, falling);
        float limit = sorted[rank - 1], got = k->kth(x, n, rank), count = (float)k->count(x, n, limit), want_count = 0;
        same("kth", &got, &limit, 1, 0);
        for (int64_t j = 0; j < n; j++) {
            want_count += x[j] >= limit;
        }
        same("count", &count, &want_count, 1, 0);
        x[draw(0, n - 1)] = NAN;
        int32_t *names = draw(0, 1) ? at : NULL, *names2 = names != NULL ? at2 : NULL, shift = names != NULL ? 7 : 0;
        for (int64_t j = 0; j < n; j++) {
            at[j] = at2[j] = (int32_t)j + 7;
        }
        float kept = (float)k->compress(x, n, limit, names, y, at), kept2 = (float)s->compress(x, n, limit, names2, y2, at2);
        same("compress: count", &kept, &kept2, 1, 0);
        same("compress", y, y2, (int64_t)kept2, 0);
        for (int64_t j = 0; j < (int64_t)kept2; j++) {
            y[j] = (float)at[j];
            y2[j] = x[at2[j] - shift] >= limit ? (float)at2[j] : -1;
        }
        same("compress: places", y, y2, (int64_t)kept2, 0);
        int64_t width = draw(1, 150), stride = width + draw(0, 9);
        attn_dtype type = types[i % 4];
        const void *rows = random_typed(type, 50 * stride + 64);
        float *p = floats(n, 1), *o = floats(width, 1), *o2 = floats(width, 1);
        for (int64_t j = 0; j < n; j++) {
            at[j] = (int32_t)draw(0, 49);
        }
        k->gather_values(o, p, at, n, rows, type, stride, width), s->gather_values(o2, p, at, n, rows, type, stride, width);
        same("gather_values", o, o2, width, 2e-5);
        if (i == 0) {
            BENCH("kth of 4096", k->kth(x + 1, n / 2, rank / 2 + 1), s->kth(x + 1, n / 2, rank / 2 + 1));
            BENCH("compress of 4096", k->compress(x, n, 4, NULL, y, at), s->compress(x, n, 4, NULL, y2, at2));
        }
        release();
    }
}

static const struct {
    const char *name;
    void (*check)(void);
} families[] = {{"tile", check_tile}, {"decode", check_decode}, {"rows", check_rows}, {"scan", check_scan}, {"linear", check_linear},
              {"quant", check_quant}, {"select", check_select}};

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--bench") == 0) {
            bench = 1;
        } else {
            fprintf(stderr, "usage: checkkernel [--bench]\n");
            return 2;
        }
    }
    for (int isa = ATTN_ISA_LEVEL_SCALAR + 1; isa <= ATTN_ISA_LEVEL_AVX512VNNI; isa++) {
        level = (attn_isa)isa;
        for (size_t f = 0; attn_isa_available(level) && f < sizeof families / sizeof families[0]; f++) {
            int before = passed, bad = failed;
            attn_random_seed(&chance, 99);
            families[f].check();
            printf("%-10s %-8s %6d comparisons, %d failed\n", attn_isa_name(level), families[f].name, passed - before + failed - bad,
                   failed - bad);
        }
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
