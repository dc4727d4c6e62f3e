/* The shared numerical parts against plain loops in double, gradients against central differences of those. */
#include "core/random.h"
#include "kernel/dispatch.h"
#include "layer/activation.h"
#include "layer/conv.h"
#include "layer/ffn.h"
#include "layer/gemm.h"
#include "layer/linear.h"
#include "layer/norm.h"
#include "layer/rope.h"
#include "layer/route.h"

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

/* A part: y [out] = f(x [in]), and the gradient of sum(g y) with respect to x, as it was computed; compared with differences. */
typedef void (*part_function)(const float *x, float *y, void *user);

static void check_gradient(const char *what, part_function f, void *user, float *x, int64_t in, int64_t out, const float *g,
                           const float *got)
{
    float *y = malloc((size_t)out * sizeof(float));
    assert_non_null(y);
    for (int64_t i = 0; i < in; i++) {
        float saved = x[i];
        double sum[2] = {0, 0}, at[2];
        for (int side = 0; side < 2; side++) {
            x[i] = (float)(saved + (side == 0 ? 4e-3 : -4e-3));
            at[side] = (double)x[i];
            f(x, y, user);
            for (int64_t j = 0; j < out; j++) {
                sum[side] += (double)g[j] * (double)y[j];
            }
        }
        x[i] = saved;
        near(what, i, (double)got[i], (sum[0] - sum[1]) / (at[0] - at[1]), 5e-3);
    }
    free(y);
}

enum { ROWS = 4, WIDTH = 6 };

typedef struct norm_case {
    attn_norm norm;
    float *w, *bias;
} norm_case;

static void run_norm(const float *x, float *y, void *user)
{
    const norm_case *c = user;
    attn_norm_forward(c->norm, 1, ROWS, WIDTH, 1e-5, x, c->w, c->bias, y);
}

static void test_norm(void **state)
{
    (void)state;
    for (int form = 0; form < 4; form++) {
        float *x = numbers(ROWS * WIDTH), *g = numbers(ROWS * WIDTH), *w = numbers(WIDTH), *bias = numbers(WIDTH);
        float dx[ROWS * WIDTH], dw[WIDTH] = {0}, db[WIDTH] = {0}, y[ROWS * WIDTH];
        norm_case c = {form & 1 ? ATTN_NORM_LAYER : ATTN_NORM_RMS, form & 2 ? w : NULL, form & 2 ? bias : NULL};
        assert_int_equal(attn_norm_backward(c.norm, arena, 2, ROWS, WIDTH, 1e-5, x, c.w, g, dx, dw, db), ATTN_OK);
        check_gradient("norm grad_x", run_norm, &c, x, ROWS * WIDTH, ROWS * WIDTH, g, dx);
        c.w = NULL;
        c.bias = NULL;
        run_norm(x, y, &c);
        for (int i = 0; i < WIDTH; i++) {
            double sum = 0, sum_b = 0;
            for (int r = 0; r < ROWS; r++) {
                sum += (double)g[r * WIDTH + i] * (double)y[r * WIDTH + i];
                sum_b += (double)g[r * WIDTH + i];
            }
            near("norm grad_w", i, (double)dw[i], sum, 1e-5);
            near("norm grad_bias", i, (double)db[i], sum_b, 1e-5);
        }
        free(x);
        free(g);
        free(w);
        free(bias);
    }
}

static void test_activation(void **state)
{
    (void)state;
    for (int kind = ATTN_ACTIVATION_IDENTITY; kind <= ATTN_ACTIVATION_ELU1; kind++) {
        for (double x = -30; x <= 30; x += 0.37) {
            double slope;
            attn_activation_at((attn_activation)kind, x, &slope);
            double up = attn_activation_at((attn_activation)kind, x + 1e-6, NULL);
            double down = attn_activation_at((attn_activation)kind, x - 1e-6, NULL);
            near("activation slope", kind, slope, (up - down) / 2e-6, 1e-5);
        }
    }
    near("gelu", 0, attn_activation_at(ATTN_ACTIVATION_GELU, 1.0, NULL), 0.8413447460685429, 1e-12);
    near("gelu tanh", 0, attn_activation_at(ATTN_ACTIVATION_GELU_TANH, 1.0, NULL), 0.8411919906082768, 1e-12);
    near("silu", 0, attn_activation_at(ATTN_ACTIVATION_SILU, -2.0, NULL), -0.2384058440442351, 1e-12);
    near("softplus", 0, attn_activation_at(ATTN_ACTIVATION_SOFTPLUS, 0.0, NULL), 0.6931471805599453, 1e-12);
}

static void test_rope(void **state)
{
    (void)state;
    for (int interleaved = 0; interleaved < 2; interleaved++) {
        float *table, *x = numbers(10), y[10];
        memcpy(y, x, sizeof y);
        assert_int_equal(attn_rope_table(arena, 5, 3, 8, 100.0, &table), ATTN_OK);
        attn_rope_apply(table + 2 * 8, 8, interleaved, 0, y);
        for (int j = 0; j < 4; j++) {
            int a = interleaved ? 2 * j : j, b = interleaved ? 2 * j + 1 : j + 4;
            double angle = 7 * pow(100, -2.0 * j / 8);
            near("rope", j, (double)y[a], (double)x[a] * cos(angle) - (double)x[b] * sin(angle), 1e-6);
            near("rope", j, (double)y[b], (double)x[b] * cos(angle) + (double)x[a] * sin(angle), 1e-6);
        }
        attn_rope_apply(table + 2 * 8, 8, interleaved, 1, y);
        for (int j = 0; j < 10; j++) {
            near("rope and back", j, (double)y[j], (double)x[j], 1e-6);
        }
        free(x);
    }
}

typedef struct image {
    int64_t images, height, width, channels, kernel;
    const float *w, *bias, *x;
    int of_weight;
} image;

static void run_image(const float *x, float *y, void *user)
{
    const image *c = user;
    attn_conv2d_forward(1, c->images, c->height, c->width, c->channels, c->kernel, c->of_weight ? c->x : x, c->of_weight ? x : c->w, c->bias,
                        y);
}

static void test_conv2d(void **state)
{
    (void)state;
    image c = {2, 3, 4, 2, 3, NULL, NULL, NULL, 0};
    enum { COUNT = 2 * 3 * 4 * 2, TAPS = 2 * 9 };
    float *x = numbers(COUNT), *w = numbers(TAPS), *bias = numbers(2), *g = numbers(COUNT), dx[COUNT], dw[TAPS] = {0}, db[2] = {0};
    c.w = w;
    c.bias = bias;
    c.x = x;
    attn_conv2d_backward(2, 2, 3, 4, 2, 3, x, w, g, dx, dw, db);
    check_gradient("conv2d grad_in", run_image, &c, x, COUNT, COUNT, g, dx);
    c.of_weight = 1;
    check_gradient("conv2d grad_w", run_image, &c, w, TAPS, COUNT, g, dw);
    double sum = 0;
    for (int i = 0; i < COUNT; i += 2) {
        sum += (double)g[i];
    }
    near("conv2d grad_bias", 0, (double)db[0], sum, 1e-5);
    free(x);
    free(w);
    free(bias);
    free(g);
}

static void run_ffn(const float *x, float *y, void *user)
{
    assert_int_equal(attn_ffn_forward(user, arena, 1, ROWS, x, y), ATTN_OK);
}

static void test_ffn(void **state)
{
    (void)state;
    for (int gated = 0; gated < 2; gated++) {
        enum { HIDDEN = 5, OUT = 3 };
        float *x = numbers(ROWS * WIDTH), *up = numbers(2 * HIDDEN * WIDTH), *down = numbers(OUT * HIDDEN), *bias = numbers(2 * HIDDEN);
        float *g = numbers(ROWS * OUT), dx[ROWS * WIDTH];
        attn_ffn ffn = {WIDTH, HIDDEN, OUT, gated ? ATTN_ACTIVATION_SILU : ATTN_ACTIVATION_GELU, gated, up, bias, down, bias};
        assert_int_equal(attn_ffn_backward(&ffn, arena, 1, ROWS, x, g, dx, NULL, NULL, NULL, NULL), ATTN_OK);
        check_gradient("ffn grad_x", run_ffn, &ffn, x, ROWS * WIDTH, ROWS * OUT, g, dx);
        free(x);
        free(up);
        free(down);
        free(bias);
        free(g);
    }
}

static void test_route(void **state)
{
    (void)state;
    const float x[] = {1, 3, 3, -2, 5};
    int64_t best[4];
    attn_top_k(5, 4, x, best);
    assert_memory_equal(best, ((const int64_t[]){4, 1, 2, 0}), sizeof best);
    float p[] = {1000, 1000, -1000};
    near("log-sum-exp", 0, attn_softmax_row(3, p), 1000 + log(2), 1e-9);
    near("softmax", 0, (double)p[0], 0.5, 1e-7);
    near("softmax", 2, (double)p[2], 0, 1e-7);
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
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_activation),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_conv2d),
        cmocka_unit_test(test_ffn),
        cmocka_unit_test(test_route),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
