/* Linear attention in chunks against the recurrence in double. */
#include "core/random.h"
#include "exec/linear.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static float *numbers(attn_random *random, int64_t count)
{
    float *x = malloc((size_t)(count + 1) * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)attn_random_normal(random);
    }
    return x;
}

static void reference(const attn_linattn *x, const float *q, const float *k, const float *v, const float *start, double *o,
                      double *state)
{
    for (int64_t i = 0; i < x->batch * x->heads; i++) {
        int64_t h = i % x->heads, kv = i / x->heads * x->kv_heads + h / (x->heads / x->kv_heads);
        double *s = state + i * x->d * x->dv;
        for (int64_t c = 0; c < x->d * x->dv; c++) {
            s[c] = (double)start[i * x->d * x->dv + c];
        }
        for (int64_t t = 0; t < x->n; t++) {
            double keep = x->log_decay != NULL ? exp((double)x->log_decay[i * x->n + t]) : exp(-(double)x->slope[h]);
            double *to = o + (i * x->n + t) * x->dv;
            memset(to, 0, (size_t)x->dv * sizeof *to);
            for (int64_t c = 0; c < x->d; c++) {
                for (int64_t e = 0; e < x->dv; e++) {
                    double *at = s + c * x->dv + e;
                    *at = keep * *at + (double)k[(kv * x->n + t) * x->d + c] * (double)v[(kv * x->n + t) * x->dv + e];
                    to[e] += x->scale * (double)q[(i * x->n + t) * x->d + c] * *at;
                }
            }
        }
    }
}

static void compare(const char *what, const float *got, const double *want, int64_t count)
{
    double top = 0, worst = 0;
    for (int64_t i = 0; i < count; i++) {
        top = fmax(top, fabs(want[i]));
        worst = fmax(worst, fabs((double)got[i] - want[i]));
    }
    if (!(worst <= 1e-5 * top)) {
        print_error("%s: off by %g of %g\n", what, worst, top);
    }
    assert_true(worst <= 1e-5 * top);
}

static void one(int64_t batch, int64_t heads, int64_t kv_heads, int64_t n, int64_t d, int64_t dv, int64_t chunk, int per_token)
{
    attn_random random;
    attn_random_seed(&random, (uint64_t)(n * 31 + d));
    int64_t all = batch * heads, groups = batch * kv_heads;
    float *q = numbers(&random, all * n * d), *k = numbers(&random, groups * n * d), *v = numbers(&random, groups * n * dv);
    float *start = numbers(&random, all * d * dv), *logs = numbers(&random, all * n), *slope = numbers(&random, heads);
    float *g = numbers(&random, all * n * dv), *o = numbers(&random, all * n * dv), *state = numbers(&random, all * d * dv);
    int64_t sizes[4] = {all * n * d, groups * n * d, groups * n * dv, all * d * dv};
    float *grad[2][4];
    for (int i = 0; i < 8; i++) {
        grad[i / 4][i % 4] = numbers(&random, sizes[i % 4]);
    }
    for (int64_t i = 0; i < all * n; i++) {
        logs[i] = -fabsf(logs[i]) * (i % 7 == 0 ? 200.0f : 0.1f);
    }
    for (int64_t h = 0; h < heads; h++) {
        slope[h] = h == 0 ? 0.0f : h == 1 ? 150.0f : fabsf(slope[h]) * 0.1f;
    }
    attn_linattn x = {batch, heads, kv_heads, n, n, d, dv, 1, chunk, 0.7, slope, per_token ? logs : NULL, NULL};
    double *want = calloc((size_t)(all * n * dv), sizeof *want), *want_state = calloc((size_t)(all * d * dv), sizeof *want);
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    reference(&x, q, k, v, start, want, want_state);
    assert_int_equal(attn_linattn_forward(&x, arena, 1, q, k, v, start, o, state), ATTN_OK);
    compare("o", o, want, all * n * dv);
    compare("state", state, want_state, all * d * dv);
    float *again = numbers(&random, all * n * dv), *state_again = numbers(&random, all * d * dv);
    assert_int_equal(attn_linattn_forward(&x, arena, 7, q, k, v, start, again, state_again), ATTN_OK);
    assert_memory_equal(o, again, (size_t)(all * n * dv) * sizeof *o);
    assert_memory_equal(state, state_again, (size_t)(all * d * dv) * sizeof *o);
    memcpy(state, start, (size_t)(all * d * dv) * sizeof *o);
    assert_int_equal(attn_linattn_decode(&x, arena, 3, q, k, v, state, again), ATTN_OK);
    compare("decoded o", again, want, all * n * dv);
    compare("decoded state", state, want_state, all * d * dv);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(attn_linattn_backward(&x, arena, i == 0 ? 1 : 7, q, k, v, start, g, grad[i][0], grad[i][1], grad[i][2],
                                               grad[i][3]), ATTN_OK);
    }
    /* o is linear in q, and in (v, state): <grad, input> must be <g, o>. */
    double product = 0, by_q = 0, by_v = 0, size = 0;
    for (int64_t i = 0; i < all * n * dv; i++) {
        product += (double)g[i] * want[i];
        size += fabs((double)g[i] * want[i]);
    }
    for (int64_t i = 0; i < sizes[0]; i++) {
        by_q += (double)grad[0][0][i] * (double)q[i];
    }
    for (int64_t i = 0; i < sizes[2]; i++) {
        by_v += (double)grad[0][2][i] * (double)v[i];
    }
    for (int64_t i = 0; i < sizes[3]; i++) {
        by_v += (double)grad[0][3][i] * (double)start[i];
    }
    assert_true(fabs(by_q - product) <= 1e-5 * size);
    assert_true(fabs(by_v - product) <= 1e-5 * size);
    for (int i = 0; i < 4; i++) {
        assert_memory_equal(grad[0][i], grad[1][i], (size_t)sizes[i] * sizeof *o);
        free(grad[0][i]);
        free(grad[1][i]);
    }
    attn_arena_destroy(arena);
    float *made[] = {q, k, v, start, logs, slope, g, o, state, again, state_again};
    for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
        free(made[i]);
    }
    free(want);
    free(want_state);
}

static void shapes(void **unused)
{
    (void)unused;
    for (int per_token = 0; per_token < 2; per_token++) {
        one(1, 1, 1, 1, 1, 1, 0, per_token);
        one(2, 4, 2, 131, 17, 5, 0, per_token);
        one(1, 3, 1, 300, 33, 70, 100, per_token);
        one(1, 3, 3, 77, 8, 16, 1, per_token);
        one(1, 2, 2, 517, 64, 64, 256, per_token);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(shapes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
