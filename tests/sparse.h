/* A plain reference of attention over a plan, in double, and random problems for it. */
#ifndef ATTN_TESTS_SPARSE_H
#define ATTN_TESTS_SPARSE_H

#include "core/random.h"
#include "tensor/half.h"
#include <attn/plan.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

typedef struct sparse_case {
    int64_t b, h, hkv, n, m, d, dv;
    attn_dtype dtype; /* of q, k, v and o; ATTN_I8: of k and v */
    attn_dense_settings settings;
    attn_dense_inputs in;
    attn_tensor o, lse, grad_o, grad_q, grad_k, grad_v, grad_sinks, k_scale, v_scale, sinks, key_length, bias, slopes;
    double *want_o, *want_lse, *want_q, *want_k, *want_v, *want_sinks;
} sparse_case;

static attn_random generator;

static int64_t below(int64_t bound) { return (int64_t)attn_random_below(&generator, (uint64_t)bound); }

static attn_tensor numbers(attn_dtype dtype, int ndim, const int64_t *shape, double size)
{
    attn_tensor t = attn_tensor_make(NULL, dtype, ndim, shape);
    int64_t count = attn_tensor_count(&t);
    t.data = calloc((size_t)count + 64, 8);
    assert_non_null(t.data);
    for (int64_t i = 0; i < count; i++) {
        double x = attn_random_normal(&generator) * size;
        switch (dtype) {
        case ATTN_F16: ((uint16_t *)t.data)[i] = attn_f32_to_f16((float)x); break;
        case ATTN_BF16: ((uint16_t *)t.data)[i] = attn_f32_to_bf16((float)x); break;
        case ATTN_I8: ((int8_t *)t.data)[i] = (int8_t)(below(255) - 127); break;
        default: ((float *)t.data)[i] = (float)x; break;
        }
    }
    return t;
}

static double at(const attn_tensor *t, int64_t i)
{
    switch (t->dtype) {
    case ATTN_F16: return (double)attn_f16_to_f32(((const uint16_t *)t->data)[i]);
    case ATTN_BF16: return (double)attn_bf16_to_f32(((const uint16_t *)t->data)[i]);
    case ATTN_I8: return ((const int8_t *)t->data)[i];
    default: return (double)((const float *)t->data)[i];
    }
}

static void sparse_make(sparse_case *c)
{
    const int64_t q[] = {c->b, c->h, c->n, c->d}, k[] = {c->b, c->hkv, c->m, c->d}, v[] = {c->b, c->hkv, c->m, c->dv};
    const int64_t o[] = {c->b, c->h, c->n, c->dv};
    attn_dtype plain = c->dtype == ATTN_I8 ? ATTN_F32 : c->dtype;
    c->in.q = numbers(plain, 4, q, 1);
    c->in.k = numbers(c->dtype, 4, k, 1);
    c->in.v = numbers(c->dtype, 4, v, 1);
    if (c->dtype == ATTN_I8) {
        c->k_scale = numbers(ATTN_F32, 3, k, 0.01);
        c->v_scale = numbers(ATTN_F32, 3, v, 0.01);
        c->in.k_scale = &c->k_scale;
        c->in.v_scale = &c->v_scale;
    }
    c->o = numbers(ATTN_F32, 4, o, 1);
    c->lse = numbers(ATTN_F32, 3, o, 1);
    c->grad_o = numbers(plain, 4, o, 1);
    c->grad_q = numbers(ATTN_F32, 4, q, 1);
    c->grad_k = numbers(ATTN_F32, 4, k, 1);
    c->grad_v = numbers(ATTN_F32, 4, v, 1);
    c->grad_sinks = numbers(ATTN_F32, 1, &c->h, 1);
    c->sinks = numbers(ATTN_F32, 1, &c->h, 1);
    c->slopes = numbers(ATTN_F32, 1, &c->h, 0.1);
    c->bias = numbers(ATTN_F32, 4, (int64_t[]){1, c->h, c->n, c->m}, 1);
    c->key_length = attn_tensor_make(calloc((size_t)c->b + 1, 8), ATTN_I64, 1, &c->b);
    for (int64_t b = 0; b < c->b; b++) {
        ((int64_t *)c->key_length.data)[b] = below(c->m + 1);
    }
}

static void sparse_free(sparse_case *c)
{
    void *memory[] = {c->in.q.data, c->in.k.data, c->in.v.data, c->o.data, c->lse.data, c->grad_o.data, c->grad_q.data, c->grad_k.data,
                      c->grad_v.data, c->grad_sinks.data, c->sinks.data, c->slopes.data, c->bias.data, c->key_length.data,
                      c->in.k_scale != NULL ? c->k_scale.data : NULL, c->in.v_scale != NULL ? c->v_scale.data : NULL, c->want_o,
                      c->want_lse, c->want_q, c->want_k, c->want_v, c->want_sinks};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) {
        free(memory[i]);
    }
}

/* Everything at once, the whole score row in memory. */
static void sparse_reference(sparse_case *c, const attn_plan *plan)
{
    int64_t group = c->h / c->hkv, heads = attn_plan_get_layout(plan)->shape.heads;
    double *s = calloc((size_t)c->m + 1, sizeof *s), *raw = calloc((size_t)c->m + 1, sizeof *raw);
    c->want_o = calloc((size_t)(c->b * c->h * c->n * c->dv) + 1, sizeof(double));
    c->want_lse = calloc((size_t)(c->b * c->h * c->n) + 1, sizeof(double));
    c->want_q = calloc((size_t)(c->b * c->h * c->n * c->d) + 1, sizeof(double));
    c->want_k = calloc((size_t)(c->b * c->hkv * c->m * c->d) + 1, sizeof(double));
    c->want_v = calloc((size_t)(c->b * c->hkv * c->m * c->dv) + 1, sizeof(double));
    c->want_sinks = calloc((size_t)c->h + 1, sizeof(double));
    double scale = isnan(c->settings.scale) ? 1 / sqrt((double)c->d) : c->settings.scale, cap = c->settings.softcap;
    for (int64_t row = 0; row < c->b * c->h * c->n; row++) {
        int64_t b = row / (c->h * c->n), h = row / c->n % c->h, n = row % c->n, i = n + c->m - c->n, kv = b * c->hkv + h / group;
        int64_t head = heads == c->h ? h : heads == 1 ? 0 : h / group;
        double top = c->in.sinks != NULL ? at(&c->sinks, h) : -INFINITY, sum = 0;
        for (int64_t j = 0; j < c->m; j++) {
            int seen = attn_plan_sees(plan, b, head, n, j) && (!c->settings.causal || j <= i) &&
                       (c->settings.window[0] < 0 || j >= i - c->settings.window[0]) &&
                       (c->settings.window[1] < 0 || j <= i + c->settings.window[1]) &&
                       (c->in.key_length == NULL || j < ((int64_t *)c->key_length.data)[b]);
            double x = 0;
            for (int64_t e = 0; e < c->d; e++) {
                x += at(&c->in.q, row * c->d + e) * at(&c->in.k, (kv * c->m + j) * c->d + e);
            }
            x *= scale * (c->in.k_scale != NULL ? at(&c->k_scale, kv * c->m + j) : 1);
            raw[j] = cap > 0 ? cap * tanh(x / cap) : x;
            x = raw[j] - (c->in.slopes != NULL ? at(&c->slopes, h) * fabs((double)(i - j)) : 0) +
                (c->in.bias != NULL ? at(&c->bias, (h * c->n + n) * c->m + j) : 0);
            s[j] = seen ? x : -INFINITY;
            top = s[j] > top ? s[j] : top;
        }
        double shift = top == -INFINITY ? 0 : top;
        sum = c->in.sinks != NULL ? exp(at(&c->sinks, h) - shift) : 0;
        for (int64_t j = 0; j < c->m; j++) {
            s[j] = exp(s[j] - shift);
            sum += s[j];
        }
        c->want_lse[row] = sum > 0 ? shift + log(sum) : -INFINITY;
        double delta = 0;
        for (int64_t j = 0; j < c->m; j++) {
            s[j] = sum > 0 ? s[j] / sum : 0;
            for (int64_t e = 0; e < c->dv; e++) {
                double v = at(&c->in.v, (kv * c->m + j) * c->dv + e) * (c->in.v_scale != NULL ? at(&c->v_scale, kv * c->m + j) : 1);
                c->want_o[row * c->dv + e] += s[j] * v;
            }
        }
        for (int64_t e = 0; e < c->dv; e++) {
            delta += c->want_o[row * c->dv + e] * at(&c->grad_o, row * c->dv + e);
        }
        if (c->in.sinks != NULL) {
            c->want_sinks[h] -= exp(at(&c->sinks, h) - c->want_lse[row]) * delta;
        }
        for (int64_t j = 0; j < c->m; j++) {
            double dp = 0;
            for (int64_t e = 0; e < c->dv; e++) {
                dp += at(&c->grad_o, row * c->dv + e) * at(&c->in.v, (kv * c->m + j) * c->dv + e);
                c->want_v[(kv * c->m + j) * c->dv + e] += s[j] * at(&c->grad_o, row * c->dv + e);
            }
            double ds = s[j] * (dp - delta) * (cap > 0 ? 1 - raw[j] * raw[j] / (cap * cap) : 1);
            for (int64_t e = 0; e < c->d; e++) {
                c->want_q[row * c->d + e] += scale * ds * at(&c->in.k, (kv * c->m + j) * c->d + e);
                c->want_k[(kv * c->m + j) * c->d + e] += scale * ds * at(&c->in.q, row * c->d + e);
            }
        }
    }
    free(s);
    free(raw);
}

static void same(const char *what, const sparse_case *c, const attn_tensor *got, const double *want)
{
    for (int64_t i = 0; i < attn_tensor_count(got); i++) {
        double x = at(got, i);
        if (isinf(want[i]) ? x != want[i] : !(fabs(x - want[i]) <= 3e-5 + 3e-5 * fabs(want[i]))) {
            fail_msg("%s[%lld]: got %.9g, want %.9g (B %lld H %lld Hkv %lld N %lld M %lld D %lld Dv %lld %s)", what, (long long)i, x,
                     want[i], (long long)c->b, (long long)c->h, (long long)c->hkv, (long long)c->n, (long long)c->m, (long long)c->d,
                     (long long)c->dv, attn_dtype_name(c->dtype));
        }
    }
}

static void ok(attn_status status)
{
    if (status != ATTN_OK) {
        fail_msg("%s: %s", attn_status_name(status), attn_last_error());
    }
}

/* Forward and backward over the plan against the reference, and the same bits for other numbers of threads. */
static void sparse_check(sparse_case *c, const attn_plan *plan)
{
    attn_tensor *results[] = {&c->o, &c->lse, &c->grad_q, &c->grad_k, &c->grad_v, &c->grad_sinks};
    void *before[6] = {NULL};
    int backward = c->dtype != ATTN_I8;
    sparse_reference(c, plan);
    const int threads[] = {1, 2, 7};
    for (int t = 0; t < 3; t++) {
        attn_exec exec = {.threads = threads[t]};
        ok(attn_plan_forward(plan, &c->settings, &c->in, &c->o, &c->lse, &exec));
        if (backward) {
            attn_dense_gradients to = {.q = &c->grad_q, .k = &c->grad_k, .v = &c->grad_v, .sinks = c->in.sinks != NULL ? &c->grad_sinks : NULL};
            ok(attn_plan_backward(plan, &c->settings, &c->in, &c->o, &c->lse, &c->grad_o, &to, &exec));
        }
        for (int i = 0; i < 6; i++) {
            size_t bytes = (size_t)attn_tensor_count(results[i]) * sizeof(float);
            if (t == 0) {
                before[i] = malloc(bytes + 1);
                memcpy(before[i], results[i]->data, bytes);
            } else if (memcmp(before[i], results[i]->data, bytes) != 0) {
                fail_msg("result %d differs between 1 and %d threads", i, threads[t]);
            }
        }
    }
    same("o", c, &c->o, c->want_o);
    same("lse", c, &c->lse, c->want_lse);
    if (backward) {
        same("grad_q", c, &c->grad_q, c->want_q);
        same("grad_k", c, &c->grad_k, c->want_k);
        same("grad_v", c, &c->grad_v, c->want_v);
        if (c->in.sinks != NULL) {
            same("grad_sinks", c, &c->grad_sinks, c->want_sinks);
        }
    }
    for (int i = 0; i < 6; i++) {
        free(before[i]);
    }
}

/* A random problem; bits of `options` choose what takes part. */
static void sparse_random(sparse_case *c, int64_t options)
{
    const attn_dtype types[] = {ATTN_F32, ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
    *c = (sparse_case){.b = 1 + below(2), .hkv = 1 + below(2), .n = 1 + below(150), .d = 1 + below(40), .dv = 1 + below(40)};
    c->h = c->hkv * (1 + below(3));
    c->m = options & 1 ? c->n : 1 + below(200);
    if (options & 2) {
        c->d = 16 * (1 + below(2));
        c->dv = 16 * (1 + below(2));
    }
    c->dtype = types[below(5)];
    attn_dense_defaults(&c->settings);
    sparse_make(c);
    c->in.sinks = below(3) == 0 ? &c->sinks : NULL;
    c->in.slopes = below(4) == 0 ? &c->slopes : NULL;
    c->in.bias = below(4) == 0 ? &c->bias : NULL;
    c->in.key_length = below(4) == 0 ? &c->key_length : NULL;
    c->settings.causal = below(3) == 0;
    c->settings.softcap = below(4) == 0 ? 3 : 0;
    c->settings.window[0] = below(4) == 0 ? below(40) : -1;
    c->settings.window[1] = below(4) == 0 ? below(40) : -1;
    c->settings.scale = below(3) == 0 ? 0.3 : NAN;
}

#endif
