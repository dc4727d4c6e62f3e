/* Exact attention against a plain double-precision reference: random shapes, options, data types and strides; gradients;
 * independence of the thread count; edges and errors. */
#include <attn/dense.h>

#include "core/random.h"
#include "kernel/dispatch.h"
#include "tensor/half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

typedef struct problem {
    int64_t b, h, hkv, n, m, d, dv;
    attn_dense_settings settings;
    attn_dense_inputs in;
    attn_tensor bias, slopes, sinks, key_length, k_scale, v_scale, o, lse, grad_o;
    void *memory[32];
    int memory_count;
} problem;

static void *keep(problem *p, size_t bytes)
{
    void *memory = calloc(1, bytes + 64);
    assert_non_null(memory);
    p->memory[p->memory_count++] = memory;
    return memory;
}

static void problem_free(problem *p)
{
    for (int i = 0; i < p->memory_count; i++) {
        free(p->memory[i]);
    }
}

static double element(const attn_tensor *t, const int64_t *index)
{
    int64_t at = 0;
    for (int i = 0; i < t->ndim; i++) {
        at += index[i] * t->stride[i];
    }
    switch (t->dtype) {
    case ATTN_F16: return (double)attn_f16_to_f32(((uint16_t *)t->data)[at]);
    case ATTN_BF16: return (double)attn_bf16_to_f32(((uint16_t *)t->data)[at]);
    case ATTN_I8: return ((int8_t *)t->data)[at];
    case ATTN_I64: return (double)((int64_t *)t->data)[at];
    default: return (double)((float *)t->data)[at];
    }
}

#define AT4(t, i, j, k, l) element(t, (int64_t[]){i, j, k, l})
#define AT3(t, i, j, k) element(t, (int64_t[]){i, j, k})

/* A random tensor; layout 0 contiguous, 1 axes 1 and 2 swapped in memory, 2 last axis reversed, 3 last axis with a gap. */
static attn_tensor random_tensor(problem *p, attn_random *random, attn_dtype dtype, int ndim, const int64_t *shape, int layout,
                                 double size)
{
    attn_tensor t = attn_tensor_make(NULL, dtype, ndim, shape);
    int64_t count = attn_tensor_count(&t), gap = layout == 3 ? 3 : 1;
    char *data = keep(p, (size_t)(count * gap) * attn_dtype_size(dtype));
    for (int64_t i = 0; i < count * gap; i++) {
        float x = (float)(attn_random_normal(random) * size);
        switch (dtype) {
        case ATTN_F16: ((uint16_t *)(void *)data)[i] = attn_f32_to_f16(x); break;
        case ATTN_BF16: ((uint16_t *)(void *)data)[i] = attn_f32_to_bf16(x); break;
        case ATTN_I8: ((int8_t *)data)[i] = (int8_t)(attn_random_below(random, 255) - 127); break;
        default: ((float *)(void *)data)[i] = x; break;
        }
    }
    t.data = data;
    if (layout == 1 && ndim == 4) {
        t.stride[1] = shape[3];
        t.stride[2] = shape[1] * shape[3];
        t.stride[0] = shape[1] * shape[2] * shape[3];
    } else if (layout == 2) {
        t.data = data + (size_t)(shape[ndim - 1] > 0 ? shape[ndim - 1] - 1 : 0) * attn_dtype_size(dtype);
        t.stride[ndim - 1] = -1;
    } else if (layout == 3) {
        for (int i = 0; i < ndim; i++) {
            t.stride[i] *= gap;
        }
    }
    return t;
}

enum { WITH_BIAS = 1, WITH_SLOPES = 2, WITH_SINKS = 4, WITH_LENGTH = 8, WITH_CAP = 16, WITH_WINDOW = 32, CAUSAL = 64 };

static void problem_make(problem *p, attn_random *random, int options, attn_dtype q_type, attn_dtype kv_type, int layout)
{
    attn_dense_defaults(&p->settings);
    p->settings.causal = (options & CAUSAL) != 0;
    p->settings.softcap = options & WITH_CAP ? 3 : 0;
    if (options & WITH_WINDOW) {
        p->settings.window[0] = (int64_t)attn_random_below(random, 40) - 1;
        p->settings.window[1] = (int64_t)attn_random_below(random, 40) - 1;
    }
    p->in.q = random_tensor(p, random, q_type, 4, (int64_t[]){p->b, p->h, p->n, p->d}, layout, 1);
    p->in.k = random_tensor(p, random, kv_type, 4, (int64_t[]){p->b, p->hkv, p->m, p->d}, layout, 1);
    p->in.v = random_tensor(p, random, kv_type, 4, (int64_t[]){p->b, p->hkv, p->m, p->dv}, layout, 1);
    if (kv_type == ATTN_I8) {
        p->k_scale = random_tensor(p, random, ATTN_F32, 3, (int64_t[]){p->b, p->hkv, p->m}, 0, 0.01);
        p->v_scale = random_tensor(p, random, ATTN_F32, 3, (int64_t[]){p->b, p->hkv, p->m}, 2, 0.01);
        p->in.k_scale = &p->k_scale, p->in.v_scale = &p->v_scale;
    }
    if (options & WITH_BIAS) {
        int64_t shape[] = {attn_random_below(random, 2) ? 1 : p->b, attn_random_below(random, 2) ? 1 : p->h, p->n, p->m};
        p->bias = random_tensor(p, random, ATTN_F32, 4, shape, layout == 3 ? 3 : 0, 1);
        for (int64_t i = 0; i < attn_tensor_count(&p->bias) && p->bias.stride[3] == 1; i += 11) {
            ((float *)p->bias.data)[i] = -INFINITY;
        }
        p->in.bias = &p->bias;
    }
    if (options & WITH_SLOPES) {
        p->slopes = random_tensor(p, random, ATTN_F32, 1, &p->h, 0, 0.2);
        p->in.slopes = &p->slopes;
    }
    if (options & WITH_SINKS) {
        p->sinks = random_tensor(p, random, ATTN_F32, 1, &p->h, 0, 1);
        p->in.sinks = &p->sinks;
    }
    if (options & WITH_LENGTH) {
        p->key_length = attn_tensor_make(keep(p, (size_t)p->b * 8), ATTN_I64, 1, &p->b);
        for (int64_t i = 0; i < p->b; i++) {
            ((int64_t *)p->key_length.data)[i] = (int64_t)attn_random_below(random, (uint64_t)p->m + 1);
        }
        p->in.key_length = &p->key_length;
    }
    p->o = random_tensor(p, random, ATTN_F32, 4, (int64_t[]){p->b, p->h, p->n, p->dv}, layout, 1);
    p->lse = random_tensor(p, random, ATTN_F32, 3, (int64_t[]){p->b, p->h, p->n}, 0, 1);
    p->grad_o = random_tensor(p, random, ATTN_F32, 4, (int64_t[]){p->b, p->h, p->n, p->dv}, layout, 1);
}

/* ---- The reference ---- */

typedef struct reference {
    double *o, *lse, *q, *k, *v, *bias, *slopes, *sinks;
} reference;

static int visible(const problem *p, int64_t b, int64_t n, int64_t j)
{
    int64_t i = n + p->m - p->n;
    const int64_t *w = p->settings.window;
    return !(p->settings.causal && j > i) && !(w[0] >= 0 && j < i - w[0]) && !(w[1] >= 0 && j > i + w[1]) &&
           !(p->in.key_length != NULL && j >= ((int64_t *)p->key_length.data)[b]);
}

/* Score before the mask; raw: before the soft cap's derivative is known. */
static double score(const problem *p, int64_t b, int64_t h, int64_t n, int64_t j, double *cap_slope)
{
    int64_t kv = h / (p->h / p->hkv), i = n + p->m - p->n;
    double sum = 0, scale = isnan(p->settings.scale) ? 1 / sqrt((double)p->d) : p->settings.scale, cap = p->settings.softcap;
    for (int64_t c = 0; c < p->d; c++) {
        sum += AT4(&p->in.q, b, h, n, c) * AT4(&p->in.k, b, kv, j, c);
    }
    sum *= scale * (p->in.k_scale != NULL ? AT3(&p->k_scale, b, kv, j) : 1);
    *cap_slope = 1;
    if (cap > 0) {
        double t = tanh(sum / cap);
        *cap_slope = 1 - t * t;
        sum = cap * t;
    }
    if (p->in.slopes != NULL) {
        sum -= (double)((float *)p->slopes.data)[h] * fabs((double)(i - j));
    }
    if (p->in.bias != NULL) {
        sum += AT4(&p->bias, p->bias.shape[0] == 1 ? 0 : b, p->bias.shape[1] == 1 ? 0 : h, n, j);
    }
    return sum;
}

static void reference_run(const problem *p, reference *r)
{
    int64_t rows = p->b * p->h * p->n, kv_rows = p->b * p->hkv * p->m;
    double scale = isnan(p->settings.scale) ? 1 / sqrt((double)p->d) : p->settings.scale;
    *r = (reference){calloc((size_t)(rows * p->dv) + 1, 8), calloc((size_t)rows + 1, 8), calloc((size_t)(rows * p->d) + 1, 8),
                     calloc((size_t)(kv_rows * p->d) + 1, 8), calloc((size_t)(kv_rows * p->dv) + 1, 8),
                     calloc((size_t)(p->in.bias != NULL ? attn_tensor_count(&p->bias) : 0) + 1, 8), calloc((size_t)p->h + 1, 8),
                     calloc((size_t)p->h + 1, 8)};
    double *s = calloc((size_t)p->m + 1, 8), *slope = calloc((size_t)p->m + 1, 8);
    for (int64_t row = 0; row < rows; row++) {
        int64_t b = row / (p->h * p->n), h = row / p->n % p->h, n = row % p->n, kv = h / (p->h / p->hkv);
        double top = p->in.sinks != NULL ? (double)((float *)p->sinks.data)[h] : -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < p->m; j++) {
            s[j] = visible(p, b, n, j) ? score(p, b, h, n, j, &slope[j]) : -INFINITY;
            top = fmax(top, s[j]);
        }
        if (top > -INFINITY) {
            sum = p->in.sinks != NULL ? exp((double)((float *)p->sinks.data)[h] - top) : 0;
            for (int64_t j = 0; j < p->m; j++) {
                sum += exp(s[j] - top);
            }
        }
        r->lse[row] = sum > 0 ? top + log(sum) : -INFINITY;
        for (int64_t j = 0; j < p->m && sum > 0; j++) {
            double w = exp(s[j] - r->lse[row]), vs = p->in.v_scale != NULL ? AT3(&p->v_scale, b, kv, j) : 1;
            for (int64_t c = 0; c < p->dv && w > 0; c++) {
                r->o[row * p->dv + c] += w * vs * AT4(&p->in.v, b, kv, j, c);
            }
        }
        if (p->in.k_scale != NULL) {
            continue; /* int8 has no gradients */
        }
        for (int64_t c = 0; c < p->dv; c++) {
            delta += r->o[row * p->dv + c] * AT4(&p->grad_o, b, h, n, c);
        }
        if (p->in.sinks != NULL && sum > 0) {
            r->sinks[h] -= exp((double)((float *)p->sinks.data)[h] - r->lse[row]) * delta;
        }
        for (int64_t j = 0; j < p->m && sum > 0; j++) {
            double w = exp(s[j] - r->lse[row]), dp = 0;
            int64_t kv_row = (b * p->hkv + kv) * p->m + j;
            for (int64_t c = 0; c < p->dv; c++) {
                dp += AT4(&p->grad_o, b, h, n, c) * AT4(&p->in.v, b, kv, j, c);
                r->v[kv_row * p->dv + c] += w * AT4(&p->grad_o, b, h, n, c);
            }
            double ds = w > 0 ? w * (dp - delta) : 0;
            r->slopes[h] -= ds * fabs((double)(n + p->m - p->n - j));
            if (p->in.bias != NULL) {
                int64_t bb = p->bias.shape[0] == 1 ? 0 : b, bh = p->bias.shape[1] == 1 ? 0 : h;
                r->bias[((bb * p->bias.shape[1] + bh) * p->n + n) * p->m + j] += ds;
            }
            ds *= slope[j] * scale;
            for (int64_t c = 0; c < p->d && ds != 0; c++) {
                r->q[row * p->d + c] += ds * AT4(&p->in.k, b, kv, j, c);
                r->k[kv_row * p->d + c] += ds * AT4(&p->in.q, b, h, n, c);
            }
        }
    }
    free(s);
    free(slope);
}

static void reference_free(reference *r)
{
    double *all[] = {r->o, r->lse, r->q, r->k, r->v, r->bias, r->slopes, r->sinks};
    for (int i = 0; i < 8; i++) {
        free(all[i]);
    }
}

static void compare(const problem *p, const char *what, const attn_tensor *got, const double *want, double tolerance)
{
    int64_t count = attn_tensor_count(got), index[ATTN_MAX_DIMS] = {0};
    double size = 0;
    for (int64_t i = 0; i < count; i++) {
        size = isfinite(want[i]) ? fmax(size, fabs(want[i])) : size;
    }
    for (int64_t i = 0; i < count; i++) {
        double g = element(got, index);
        if (!(g == want[i] || fabs(g - want[i]) <= tolerance * (fabs(want[i]) + 0.3 * size + 1e-2))) {
            fail_msg("%s[%lld] = %.9g, expected %.9g; isa %s B %lld H %lld Hkv %lld N %lld M %lld D %lld Dv %lld causal %d window [%lld, "
                     "%lld] softcap %g bias %d slopes %d sinks %d key_length %d types %s %s",
                     what, (long long)i, g, want[i], attn_isa_name(attn_isa_current()), (long long)p->b, (long long)p->h,
                     (long long)p->hkv, (long long)p->n, (long long)p->m, (long long)p->d, (long long)p->dv, p->settings.causal,
                     (long long)p->settings.window[0], (long long)p->settings.window[1], p->settings.softcap, p->in.bias != NULL,
                     p->in.slopes != NULL, p->in.sinks != NULL, p->in.key_length != NULL, attn_dtype_name(p->in.q.dtype),
                     attn_dtype_name(p->in.k.dtype));
        }
        for (int a = got->ndim - 1; a >= 0 && ++index[a] == got->shape[a]; a--) {
            index[a] = 0;
        }
    }
}

static void must(attn_status status)
{
    if (status != ATTN_OK) {
        fail_msg("%s", attn_last_error());
    }
}

static void check_backward(problem *p, const reference *r)
{
    attn_tensor q = attn_tensor_make(keep(p, (size_t)attn_tensor_count(&p->in.q) * 4), ATTN_F32, 4, p->in.q.shape);
    attn_tensor k = attn_tensor_make(keep(p, (size_t)attn_tensor_count(&p->in.k) * 4), ATTN_F32, 4, p->in.k.shape);
    attn_tensor v = attn_tensor_make(keep(p, (size_t)attn_tensor_count(&p->in.v) * 4), ATTN_F32, 4, p->in.v.shape);
    attn_tensor slopes = attn_tensor_make(keep(p, (size_t)p->h * 4), ATTN_F32, 1, &p->h);
    attn_tensor sinks = attn_tensor_make(keep(p, (size_t)p->h * 4), ATTN_F32, 1, &p->h), bias = p->bias;
    attn_dense_gradients to = {.q = &q, .k = &k, .v = &v};
    if (p->in.bias != NULL) {
        bias = attn_tensor_make(keep(p, (size_t)attn_tensor_count(&p->bias) * 4), ATTN_F32, 4, p->bias.shape);
        to.bias = &bias;
    }
    to.slopes = p->in.slopes != NULL ? &slopes : NULL;
    to.sinks = p->in.sinks != NULL ? &sinks : NULL;
    attn_exec exec = {.threads = 2};
    must(attn_dense_backward(&p->settings, &p->in, &p->o, &p->lse, &p->grad_o, &to, &exec));
    compare(p, "grad_q", &q, r->q, 3e-4);
    compare(p, "grad_k", &k, r->k, 3e-4);
    compare(p, "grad_v", &v, r->v, 3e-4);
    if (to.bias != NULL) {
        compare(p, "grad_bias", &bias, r->bias, 3e-4);
    }
    if (to.slopes != NULL) {
        compare(p, "grad_slopes", &slopes, r->slopes, 1e-2);
    }
    if (to.sinks != NULL) {
        compare(p, "grad_sinks", &sinks, r->sinks, 3e-4);
    }
}

static void check(problem *p, attn_random *random, int options, attn_dtype q_type, attn_dtype kv_type, int layout)
{
    reference r;
    problem_make(p, random, options, q_type, kv_type, layout);
    reference_run(p, &r);
    attn_exec exec = {.threads = 2};
    must(attn_dense_forward(&p->settings, &p->in, &p->o, &p->lse, &exec));
    /* Beside many int8 rows, queries and weights are rounded to 16 bits. */
    double tolerance = kv_type == ATTN_I8 && p->m >= 2048 ? 1e-4 : 2e-5;
    compare(p, "o", &p->o, r.o, tolerance);
    compare(p, "lse", &p->lse, r.lse, tolerance);
    if (kv_type != ATTN_I8) {
        check_backward(p, &r);
    }
    reference_free(&r);
    problem_free(p);
}

static void for_each_isa(void (*run)(attn_random *random))
{
    attn_isa before = attn_isa_current();
    for (int isa = 0; isa <= ATTN_ISA_LEVEL_AVX512VNNI; isa++) {
        if (attn_isa_available((attn_isa)isa)) {
            attn_random random;
            attn_random_seed(&random, 2024);
            attn_isa_force((attn_isa)isa);
            run(&random);
        }
    }
    attn_isa_force(before);
}

static int64_t draw(attn_random *random, int64_t low, int64_t high)
{
    return low + (int64_t)attn_random_below(random, (uint64_t)(high - low + 1));
}

static void run_random(attn_random *random)
{
    const attn_dtype types[] = {ATTN_F32, ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
    for (int i = 0; i < 120; i++) {
        problem p = {.b = draw(random, 1, 2), .hkv = draw(random, 1, 2), .d = draw(random, 1, 70), .dv = draw(random, 1, 70)};
        p.h = p.hkv * draw(random, 1, 3);
        p.n = i % 3 == 0 ? draw(random, 1, 3) : draw(random, 1, 130); /* decode and tiles */
        p.m = draw(random, 1, i % 2 == 0 ? 600 : 150);
        attn_dtype kv = types[draw(random, 0, 4)], q = types[draw(random, 0, 3)];
        check(&p, random, (int)draw(random, 0, 127), q, kv, (int)draw(random, 0, 3));
    }
}

static void test_random_problems(void **state)
{
    (void)state;
    for_each_isa(run_random);
}

static void run_widths(attn_random *random)
{
    const int64_t widths[] = {1, 15, 16, 17, 64, 65, 128, 256, 511, 512};
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++) {
        for (int64_t n = 1; n <= 20; n += 19) {
            problem p = {.b = 1, .h = 2, .hkv = 1, .n = n, .m = 70, .d = widths[i], .dv = widths[9 - i]};
            check(&p, random, CAUSAL, ATTN_F32, ATTN_F32, 0);
        }
    }
}

static void test_widths(void **state)
{
    (void)state;
    for_each_isa(run_widths);
}

/* Keys that are one step of the softmax, and one more than that; all options. */
static void run_few_keys(attn_random *random)
{
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
    const int64_t keys[] = {5, 9, 16, 17, 49, 77, 128, 129};
    for (int i = 0; i < 32; i++) {
        problem p = {.b = 2, .h = 4, .hkv = 1 + i % 2, .n = draw(random, 17, 200), .m = keys[i % 8], .d = draw(random, 1, 70),
                     .dv = draw(random, 1, 70)};
        int options = i < 8 ? 0 : (int)draw(random, 0, 127);
        check(&p, random, options, ATTN_F32, i < 8 ? ATTN_F32 : types[draw(random, 0, 3)], i < 8 ? 0 : (int)draw(random, 0, 3));
    }
}

static void test_few_keys(void **state)
{
    (void)state;
    for_each_isa(run_few_keys);
}

static void run_long_decode(attn_random *random)
{
    for (int i = 0; i < 8; i++) {
        const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
        problem p = {.b = 2, .h = 4, .hkv = 1, .n = 1 + i / 4, .m = 3000, .d = 32, .dv = 48};
        check(&p, random, i % 2 ? CAUSAL | WITH_LENGTH | WITH_SINKS : 0, ATTN_F32, types[i % 4], 0);
    }
}

static void test_long_decode(void **state)
{
    (void)state;
    for_each_isa(run_long_decode);
}

/* The strongest key of each query; a key that is repeated later, whose first place counts. */
static void run_top(attn_random *random)
{
    for (int i = 0; i < 4; i++) {
        problem p = {.b = 2, .h = 6, .hkv = 2, .n = 1 + i % 3, .m = 2500, .d = 24, .dv = 16};
        problem_make(&p, random, i == 1 ? CAUSAL | WITH_WINDOW : CAUSAL, ATTN_F32, i == 2 ? ATTN_F16 : ATTN_F32, i == 3);
        size_t size = attn_dtype_size(p.in.k.dtype), row = size * (size_t)p.in.k.stride[2];
        memcpy((char *)p.in.k.data + 2000 * row, (char *)p.in.k.data + 1100 * row, 100 * row);
        int64_t *top = keep(&p, (size_t)(p.b * p.h * p.n) * sizeof *top);
        attn_tensor view = attn_tensor_make(top, ATTN_I64, 3, (int64_t[]){p.b, p.h, p.n});
        attn_tensor o = attn_tensor_make(keep(&p, (size_t)(p.b * p.h * p.n * p.dv) * 4), ATTN_F32, 4,
                                         (int64_t[]){p.b, p.h, p.n, p.dv});
        if (attn_dense_forward_top(&p.settings, &p.in, &o, NULL, &view, &(attn_exec){.threads = 1 + i}) != ATTN_OK) {
            fail_msg("%s", attn_last_error());
        }
        for (int64_t at = 0; at < p.b * p.h * p.n; at++) {
            int64_t b = at / (p.h * p.n), h = at / p.n % p.h, n = at % p.n, pos = n + p.m - p.n;
            double best = -INFINITY, got = -INFINITY;
            for (int64_t j = 0; j <= pos; j++) {
                int64_t left = p.settings.window[0];
                double score = 0;
                for (int64_t c = 0; c < p.d && (left < 0 || j >= pos - left); c++) {
                    score += AT4(&p.in.q, b, h, n, c) * AT4(&p.in.k, b, h / 3, j, c);
                }
                if (left >= 0 && j < pos - left) {
                    continue;
                }
                best = score > best ? score : best;
                got = j == top[at] ? score : got;
            }
            if (best - got > 1e-5 || (top[at] >= 2000 && top[at] < 2100 && i != 1 && b == 0 && h < 3)) {
                fail_msg("problem %d, query %lld: key %lld has score %g, the largest is %g", i, (long long)at, (long long)top[at], got, best);
            }
        }
        problem_free(&p);
    }
}

static void test_top(void **state)
{
    (void)state;
    for_each_isa(run_top);
}

/* Some queries with a window at the end of a long cache: most keys are not looked at. */
static void run_window_of_cache(attn_random *random)
{
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_I8};
    for (int i = 0; i < 3; i++) {
        problem p = {.b = 2, .h = 2, .hkv = 1, .n = 40, .m = 1500, .d = 20, .dv = 32};
        check(&p, random, CAUSAL | WITH_WINDOW | (i == 1 ? WITH_LENGTH : 0), ATTN_F32, types[i], 0);
    }
}

static void test_window_of_cache(void **state)
{
    (void)state;
    for_each_isa(run_window_of_cache);
}

static void test_thread_count_does_not_matter(void **state)
{
    (void)state;
    attn_random random;
    attn_random_seed(&random, 7);
    for (int shape = 0; shape < 4; shape++) {
        problem p = {.b = 1, .h = 4, .hkv = 1 + shape % 2, .n = shape < 2 ? 300 : 1, .m = 1500, .d = 24, .dv = 40};
        problem_make(&p, &random, shape < 2 ? CAUSAL | WITH_SLOPES | WITH_BIAS | WITH_SINKS : 0, ATTN_F32, ATTN_F32, 0);
        size_t o_bytes = (size_t)attn_tensor_count(&p.o) * 4, q_bytes = (size_t)attn_tensor_count(&p.in.q) * 4;
        size_t k_bytes = (size_t)attn_tensor_count(&p.in.k) * 4, v_bytes = (size_t)attn_tensor_count(&p.in.v) * 4;
        char *first[5] = {keep(&p, o_bytes), keep(&p, q_bytes), keep(&p, k_bytes), keep(&p, v_bytes), keep(&p, 64)};
        attn_tensor q = attn_tensor_make(keep(&p, q_bytes), ATTN_F32, 4, p.in.q.shape);
        attn_tensor k = attn_tensor_make(keep(&p, k_bytes), ATTN_F32, 4, p.in.k.shape);
        attn_tensor v = attn_tensor_make(keep(&p, v_bytes), ATTN_F32, 4, p.in.v.shape);
        attn_tensor s = attn_tensor_make(keep(&p, 64), ATTN_F32, 1, &p.h);
        attn_dense_gradients to = {.q = &q, .k = &k, .v = &v, .slopes = p.in.slopes != NULL ? &s : NULL};
        const int counts[] = {1, 2, 7};
        for (int i = 0; i < 3; i++) {
            attn_exec exec = {.threads = counts[i]};
            must(attn_dense_forward(&p.settings, &p.in, &p.o, &p.lse, &exec));
            must(attn_dense_backward(&p.settings, &p.in, &p.o, &p.lse, &p.grad_o, &to, &exec));
            const void *now[5] = {p.o.data, q.data, k.data, v.data, s.data};
            const size_t bytes[5] = {o_bytes, q_bytes, k_bytes, v_bytes, (size_t)p.h * 4};
            const char *names[5] = {"o", "grad_q", "grad_k", "grad_v", "grad_slopes"};
            for (int t = 0; t < 5; t++) {
                if (i == 0) {
                    memcpy(first[t], now[t], bytes[t]);
                } else if (memcmp(first[t], now[t], bytes[t]) != 0) {
                    fail_msg("%s differs between 1 and %d threads (shape %d)", names[t], counts[i], shape);
                }
            }
        }
        problem_free(&p);
    }
}

static void test_large_scores(void **state)
{
    (void)state;
    float q[2] = {1e4f, -1e4f}, k[3] = {1, -1, 0.5f}, v[3] = {1, 2, 3}, o[2], lse[2];
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    attn_dense_inputs in = {.q = attn_tensor_make(q, ATTN_F32, 4, (int64_t[]){1, 1, 2, 1}),
                            .k = attn_tensor_make(k, ATTN_F32, 4, (int64_t[]){1, 1, 3, 1}),
                            .v = attn_tensor_make(v, ATTN_F32, 4, (int64_t[]){1, 1, 3, 1})};
    attn_tensor to = attn_tensor_make(o, ATTN_F32, 4, (int64_t[]){1, 1, 2, 1});
    attn_tensor lse_view = attn_tensor_make(lse, ATTN_F32, 3, (int64_t[]){1, 1, 2});
    must(attn_dense_forward(&settings, &in, &to, &lse_view, NULL));
    assert_true(o[0] == 1 && o[1] == 2);
    assert_true(fabsf(lse[0] - 1e4f) < 0.01f && fabsf(lse[1] - 1e4f) < 0.01f);
}

/* A query that is no number has no output and no log-sum-exp that is one, in every path; it does not look masked. */
static void test_no_numbers(void **state)
{
    (void)state;
    static float q[40 * 4], k[200 * 4], v[200 * 4], o[40 * 4], lse[40];
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    q[2] = NAN;
    const int64_t queries[] = {1, 3, 40}, keys[] = {200, 30};
    for (int i = 0; i < 6; i++) {
        int64_t n = queries[i % 3], m = keys[i / 3];
        attn_dense_inputs in = {.q = attn_tensor_make(q, ATTN_F32, 4, (int64_t[]){1, 1, n, 4}),
                                .k = attn_tensor_make(k, ATTN_F32, 4, (int64_t[]){1, 1, m, 4}),
                                .v = attn_tensor_make(v, ATTN_F32, 4, (int64_t[]){1, 1, m, 4})};
        attn_tensor to = attn_tensor_make(o, ATTN_F32, 4, (int64_t[]){1, 1, n, 4});
        attn_tensor lse_view = attn_tensor_make(lse, ATTN_F32, 3, (int64_t[]){1, 1, n});
        must(attn_dense_forward(&settings, &in, &to, &lse_view, NULL));
        if (!isnan(o[0]) || !isnan(lse[0])) {
            fail_msg("%lld queries, %lld keys: o = %g, lse = %g, expected NaN", (long long)n, (long long)m, (double)o[0], (double)lse[0]);
        }
        assert_true(n == 1 || (o[4] == 0 && fabsf(lse[1] - logf((float)m)) < 1e-5f));
    }
}

/* Scores under a soft cap near 0 are all alike, and nothing flows back through it. */
static void test_least_cap(void **state)
{
    (void)state;
    float q[2] = {1, -2}, k[3] = {1, 0, -3}, v[3] = {1, 2, 3}, o[2], lse[2], grad_o[2] = {1, 1}, grad_q[2] = {9, 9}, grad_k[3] = {9, 9, 9};
    attn_tensor o_view = attn_tensor_make(o, ATTN_F32, 4, (int64_t[]){1, 1, 2, 1});
    attn_tensor lse_view = attn_tensor_make(lse, ATTN_F32, 3, (int64_t[]){1, 1, 2});
    attn_tensor incoming = attn_tensor_make(grad_o, ATTN_F32, 4, (int64_t[]){1, 1, 2, 1});
    attn_tensor q_view = attn_tensor_make(grad_q, ATTN_F32, 4, (int64_t[]){1, 1, 2, 1});
    attn_tensor k_view = attn_tensor_make(grad_k, ATTN_F32, 4, (int64_t[]){1, 1, 3, 1});
    attn_dense_inputs in = {.q = attn_tensor_make(q, ATTN_F32, 4, (int64_t[]){1, 1, 2, 1}),
                            .k = attn_tensor_make(k, ATTN_F32, 4, (int64_t[]){1, 1, 3, 1}),
                            .v = attn_tensor_make(v, ATTN_F32, 4, (int64_t[]){1, 1, 3, 1})};
    attn_dense_gradients to = {.q = &q_view, .k = &k_view};
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.softcap = 1e-300;
    must(attn_dense_forward(&settings, &in, &o_view, &lse_view, NULL));
    must(attn_dense_backward(&settings, &in, &o_view, &lse_view, &incoming, &to, NULL));
    assert_true(fabsf(o[0] - 2) < 1e-6f && fabsf(o[1] - 2) < 1e-6f && fabsf(lse[0] - logf(3)) < 1e-6f);
    if (grad_q[0] != 0 || grad_q[1] != 0 || grad_k[0] != 0 || grad_k[2] != 0) {
        fail_msg("grad_q = %g %g, grad_k = %g %g %g, expected 0", (double)grad_q[0], (double)grad_q[1], (double)grad_k[0],
                 (double)grad_k[1], (double)grad_k[2]);
    }
}

static void test_empty(void **state)
{
    (void)state;
    float q[8] = {0}, o[8] = {1, 1, 1, 1, 1, 1, 1, 1}, lse[4];
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    attn_dense_inputs in = {.q = attn_tensor_make(q, ATTN_F32, 4, (int64_t[]){1, 2, 2, 2}),
                            .k = attn_tensor_make(NULL, ATTN_F32, 4, (int64_t[]){1, 1, 0, 2}),
                            .v = attn_tensor_make(NULL, ATTN_F32, 4, (int64_t[]){1, 1, 0, 2})};
    attn_tensor to = attn_tensor_make(o, ATTN_F32, 4, (int64_t[]){1, 2, 2, 2});
    attn_tensor lse_view = attn_tensor_make(lse, ATTN_F32, 3, (int64_t[]){1, 2, 2});
    must(attn_dense_forward(&settings, &in, &to, &lse_view, NULL));
    for (int i = 0; i < 8; i++) {
        assert_true(o[i] == 0);
    }
    assert_true(lse[0] == -INFINITY);
    in.q.shape[2] = to.shape[2] = lse_view.shape[2] = 0;
    must(attn_dense_forward(&settings, &in, &to, &lse_view, NULL));
}

static void expect(attn_status got, attn_status want, const char *words)
{
    if (got != want || strstr(attn_last_error(), words) == NULL) {
        fail_msg("got '%s' (%s), expected '%s' with '%s'", attn_status_name(got), attn_last_error(), attn_status_name(want), words);
    }
}

static void test_errors(void **state)
{
    (void)state;
    float data[64] = {0};
    int64_t length = 9;
    attn_dense_settings settings, defaults;
    attn_dense_defaults(&defaults);
    settings = defaults;
    attn_tensor four = attn_tensor_make(data, ATTN_F32, 4, (int64_t[]){1, 2, 2, 4});
    attn_tensor o = four;
    attn_dense_inputs in = {.q = four, .k = four, .v = four};
    in.k.shape[3] = 3;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_SHAPE, "k has extent 3 on axis 3, expected 4");
    in.k = four;
    in.v.shape[2] = 1;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_SHAPE, "v has extent 1");
    in.v = four;
    in.q.shape[1] = 3;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_SHAPE, "3 query heads are not a multiple of 2");
    in.q = four;
    in.q.shape[3] = 0;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_SHAPE, "D = 0");
    in.q = four;
    in.q.dtype = ATTN_I32;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_DTYPE, "q has data type i32");
    in.q = four;
    in.k.dtype = ATTN_I8;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_ARGUMENT, "k_scale is needed");
    in.k = four;
    attn_tensor scale = attn_tensor_make(data, ATTN_F32, 3, (int64_t[]){1, 2, 2});
    in.v_scale = &scale;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_ARGUMENT, "v_scale goes with i8 only, v is f32");
    in.v_scale = NULL;
    settings.softcap = -1;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_ARGUMENT, "softcap = -1");
    settings = defaults;
    settings.window[1] = -2;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_ARGUMENT, "window[1] = -2");
    settings = defaults;
    attn_tensor lengths = attn_tensor_make(&length, ATTN_I64, 1, (int64_t[]){1});
    in.key_length = &lengths;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_ARGUMENT, "key_length[0] = 9, expected 0 ... M = 2");
    in.key_length = NULL;
    attn_tensor top = attn_tensor_make(data, ATTN_F32, 3, (int64_t[]){1, 2, 2});
    expect(attn_dense_forward_top(&settings, &in, &o, NULL, &top, NULL), ATTN_ERR_DTYPE, "top has data type f32, expected i64");
    o.dtype = ATTN_I64;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_DTYPE, "o has data type i64");
    o = four;
    o.data = NULL;
    expect(attn_dense_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_ARGUMENT, "o has no data");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_problems),  cmocka_unit_test(test_widths), cmocka_unit_test(test_few_keys),
        cmocka_unit_test(test_long_decode),
        cmocka_unit_test(test_thread_count_does_not_matter), cmocka_unit_test(test_large_scores),
        cmocka_unit_test(test_no_numbers),       cmocka_unit_test(test_least_cap),
        cmocka_unit_test(test_empty),            cmocka_unit_test(test_errors), cmocka_unit_test(test_window_of_cache),
        cmocka_unit_test(test_top),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
