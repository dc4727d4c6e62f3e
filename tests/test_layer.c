/* The shared numerical parts against plain loops in double, gradients against central differences of those. */
#include "core/random.h"
#include "kernel/dispatch.h"
#include "layer/gemm.h"
#include "layer/linear.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static attn_random generator;
static attn_arena *arena;

static float *numbers(int64_t count)
{
    float *data = malloc((size_t)(count + 1) * sizeof(float));
    assert_non_null(data);
    for (int64_t i = 0; i < count; i++) {
        data[i] = (float)attn_random_normal(&generator);
    }
    return data;
}

static void gemm_case(int trans_a, int trans_b, int64_t m, int64_t n, int64_t k, float alpha, float beta)
{
    int64_t lda = (trans_a ? m : k) + 3, ldb = (trans_b ? k : n) + 1, ldc = n == 1 ? 1 : n + 2;
    float *a = numbers((trans_a ? k : m) * lda), *b = numbers((trans_b ? n : k) * ldb), *c = numbers(m * ldc);
    float *one = malloc((size_t)(m * ldc + 1) * sizeof(float)), *two = malloc((size_t)(m * ldc + 1) * sizeof(float));
    memcpy(one, c, (size_t)(m * ldc) * sizeof(float));
    memcpy(two, c, (size_t)(m * ldc) * sizeof(float));
    assert_int_equal(attn_gemm(arena, 1, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, one, ldc), ATTN_OK);
    assert_int_equal(attn_gemm(arena, 3, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, two, ldc), ATTN_OK);
    assert_memory_equal(one, two, (size_t)(m * ldc) * sizeof(float));
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < ldc; j++) {
            double sum = 0, size = 0;
            for (int64_t p = 0; p < k && j < n; p++) {
                double term = (double)a[trans_a ? p * lda + i : i * lda + p] * (double)b[trans_b ? j * ldb + p : p * ldb + j];
                sum += term;
                size += fabs(term);
            }
            double want = j < n ? (double)alpha * sum + (double)beta * (double)c[i * ldc + j] : (double)c[i * ldc + j];
            double got = (double)one[i * ldc + j];
            if (!(fabs(got - want) <= 1e-6 * (size + 1))) {
                fail_msg("gemm %d%d %lldx%lldx%lld (%s): [%lld,%lld] got %.8g, want %.8g", trans_a, trans_b, (long long)m,
                         (long long)n, (long long)k, attn_isa_name(attn_isa_current()), (long long)i, (long long)j, got, want);
            }
        }
    }
    free(a);
    free(b);
    free(c);
    free(one);
    free(two);
}

static void test_gemm(void **state)
{
    (void)state;
    static const int64_t sizes[][3] = {{1, 1, 1},   {1, 50, 33},   {3, 7, 70},     {4, 64, 100},  {5, 31, 8},  {12, 32, 16},
                                       {13, 33, 5}, {24, 48, 300}, {25, 129, 7},   {97, 65, 257}, {64, 64, 64}, {130, 1, 90},
                                       {7, 200, 1}, {40, 3, 600},  {100, 1600, 9}, {1000, 40, 20}, {150, 170, 520}, {2, 3, 0}};
    attn_isa best = attn_isa_current();
    for (int isa = 0; isa <= ATTN_ISA_LEVEL_AVX512; isa++) {
        if (!attn_isa_available((attn_isa)isa)) {
            continue;
        }
        attn_isa_force((attn_isa)isa);
        for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
            for (int trans = 0; trans < 4; trans++) {
                gemm_case(trans & 1, trans >> 1, sizes[s][0], sizes[s][1], sizes[s][2], 1.0f, 0.0f);
            }
            gemm_case(s & 1, (s >> 1) & 1, sizes[s][0], sizes[s][1], sizes[s][2], -0.5f, 2.0f);
        }
    }
    attn_isa_force(best);
}

/* ---- Gradients ---- */

static void near(const char *what, int64_t at, double got, double want, double tolerance)
{
    if (!(fabs(got - want) <= tolerance * (1 + fabs(want)))) {
        fail_msg("%s[%lld]: got %.8g, want %.8g", what, (long long)at, got, want);
    }
}

static void test_linear(void **state)
{
    (void)state;
    enum { ROWS = 5, IN = 7, OUT = 6 };
    float *x = numbers(ROWS * IN), *w = numbers(OUT * IN), *bias = numbers(OUT), *g = numbers(ROWS * OUT);
    float y[ROWS * OUT], dx[ROWS * IN], dw[OUT * IN] = {0}, db[OUT] = {0};
    assert_int_equal(attn_linear_forward(arena, 1, ROWS, IN, OUT, x, w, bias, y), ATTN_OK);
    assert_int_equal(attn_linear_backward(arena, 1, ROWS, IN, OUT, x, w, g, dx, dw, db), ATTN_OK);
    for (int i = 0; i < ROWS * OUT; i++) {
        double sum = (double)bias[i % OUT];
        for (int p = 0; p < IN; p++) {
            sum += (double)x[i / OUT * IN + p] * (double)w[i % OUT * IN + p];
        }
        near("y", i, (double)y[i], sum, 1e-5);
    }
    for (int i = 0; i < ROWS * IN; i++) {
        double sum = 0;
        for (int o = 0; o < OUT; o++) {
            sum += (double)g[i / IN * OUT + o] * (double)w[o * IN + i % IN];
        }
        near("grad_x", i, (double)dx[i], sum, 1e-5);
    }
    for (int i = 0; i < OUT * IN; i++) {
        double sum = 0;
        for (int r = 0; r < ROWS; r++) {
            sum += (double)g[r * OUT + i / IN] * (double)x[r * IN + i % IN];
        }
        near("grad_w", i, (double)dw[i], sum, 1e-5);
    }
    for (int o = 0; o < OUT; o++) {
        double sum = 0;
        for (int r = 0; r < ROWS; r++) {
            sum += (double)g[r * OUT + o];
        }
        near("grad_bias", o, (double)db[o], sum, 1e-5);
    }
    free(x);
    free(w);
    free(bias);
    free(g);
}

static int set_up(void **state)
{
    (void)state;
    attn_random_seed(&generator, 3);
    return attn_arena_create(&arena, 0) == ATTN_OK ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    attn_arena_destroy(arena);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_linear),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
