/* The grid executor against plain sums over every pair, on random grids: tables of any windows, queries elsewhere than keys, queries that
 * see nothing; and thread invariance. */
#include "core/random.h"
#include "exec/grid.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static attn_random chance;

static int64_t draw(int64_t low, int64_t high) { return low + (int64_t)attn_random_below(&chance, (uint64_t)(high - low + 1)); }

static float *floats(int64_t count)
{
    float *x = malloc((size_t)(count + 1) * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)attn_random_normal(&chance);
    }
    return x;
}

typedef struct example {
    attn_grid g;
    int64_t n, m, bias_count;
    int64_t start[3][40], end[3][40];
    float *q, *k, *v, *bias, *extra_k, *extra_v, *grad_o;
} example;

static int64_t members(int64_t n, int64_t dilation, int64_t group) { return n / dilation + (group < n % dilation); }

static void make(example *e)
{
    attn_grid *g = &e->g;
    *g = (attn_grid){.rank = (int)draw(1, 3), .batch = draw(1, 2), .kv_heads = draw(1, 2), .d = draw(1, 20), .dv = draw(1, 20),
                     .extra = draw(0, 1) * draw(1, 70), .scale = 0.4};
    g->heads = g->kv_heads * draw(1, 3);
    e->n = e->m = e->bias_count = 1;
    /* Small sliding windows along the last axis, without what keeps queries of neighbouring columns from taking their own columns. */
    int sliding = draw(0, 2) == 0;
    if (sliding) {
        g->rank = (int)draw(2, 3);
        g->d = draw(0, 1) ? g->d : 16 * draw(1, 5);
        g->dv = 16 * draw(1, 5);
        g->extra = 0;
    }
    for (int i = 0; i < g->rank; i++) {
        attn_grid_axis *a = &g->axis[i];
        int64_t most = g->rank == 1 ? 40 : g->rank == 2 ? 12 : 6;
        if (sliding && i == g->rank - 1) {
            int64_t size = draw(16, 40), window = draw(1, 14);
            *a = (attn_grid_axis){.n = size, .m = size, .dilation = 1, .start = e->start[i], .end = e->end[i], .reach = window};
            for (int64_t x = 0; x < size; x++) {
                int64_t at = x - window / 2;
                e->start[i][x] = at < 0 ? 0 : at > size - window ? size - window : at;
                e->end[i][x] = e->start[i][x] + window;
            }
            e->n *= size;
            e->m *= size;
            e->bias_count *= 2 * window - 1;
            continue;
        }
        *a = (attn_grid_axis){.n = draw(1, most), .m = draw(1, most), .dilation = draw(1, 3), .start = e->start[i], .end = e->end[i]};
        a->first = draw(-3, 3);
        a->reach = 1;
        for (int64_t x = 0; x < a->n; x++) {
            int64_t at = a->first + x, group = ((at % a->dilation) + a->dilation) % a->dilation, place = (at - group) / a->dilation;
            int64_t length = members(a->m, a->dilation, group);
            e->start[i][x] = length > 0 ? draw(0, length - 1) : 0;
            e->end[i][x] = draw(0, 7) == 0 ? e->start[i][x] : draw(e->start[i][x], length);
            for (int64_t y = e->start[i][x]; y < e->end[i][x]; y++) {
                a->reach = llabs(y - place) >= a->reach ? llabs(y - place) + 1 : a->reach;
            }
        }
        e->n *= a->n;
        e->m *= a->m;
        e->bias_count *= 2 * a->reach - 1;
    }
    g->q = e->q = floats(g->batch * g->heads * e->n * g->d);
    g->k = e->k = floats(g->batch * g->kv_heads * e->m * g->d);
    g->v = e->v = floats(g->batch * g->kv_heads * e->m * g->dv);
    e->bias = floats(g->heads * e->bias_count);
    g->bias = !sliding && draw(0, 1) ? e->bias : NULL;
    g->extra_k = e->extra_k = floats(g->batch * g->kv_heads * g->extra * g->d);
    g->extra_v = e->extra_v = floats(g->batch * g->kv_heads * g->extra * g->dv);
    e->grad_o = floats(g->batch * g->heads * e->n * g->dv);
}

static void release(example *e)
{
    float *all[] = {e->q, e->k, e->v, e->bias, e->extra_k, e->extra_v, e->grad_o};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
}

/* Number of the bias of a pair; -1 when it is hidden. */
static int64_t offset_of(const example *e, int64_t n, int64_t m)
{
    int64_t number = 0, step = 1;
    for (int i = e->g.rank - 1; i >= 0; i--) {
        const attn_grid_axis *a = &e->g.axis[i];
        int64_t x = n % a->n, y = m % a->m, at = a->first + x, group = ((at % a->dilation) + a->dilation) % a->dilation;
        n /= a->n;
        m /= a->m;
        if (y % a->dilation != group || y / a->dilation < a->start[x] || y / a->dilation >= a->end[x]) {
            return -1;
        }
        number += (y / a->dilation - (at - group) / a->dilation + a->reach - 1) * step;
        step *= 2 * a->reach - 1;
    }
    return number;
}

typedef struct results {
    double *o, *lse, *q, *k, *v, *bias, *extra_k, *extra_v;
} results;

static double *zeros(int64_t count)
{
    double *x = calloc((size_t)count + 1, sizeof *x);
    assert_non_null(x);
    return x;
}

static double dot(const float *a, const float *b, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += (double)a[i] * (double)b[i];
    }
    return sum;
}

static void plain_row(const example *e, results *r, int64_t head, int64_t n)
{
    const attn_grid *g = &e->g;
    int64_t h = head % g->heads, pair = head / g->heads * g->kv_heads + h / (g->heads / g->kv_heads), keys = e->m + g->extra;
    int64_t row = head * e->n + n;
    double *p = zeros(keys), sum = 0, delta = 0;
    const float *q = e->q + row * g->d, *grad = e->grad_o + row * g->dv;
    for (int pass = 0; pass < 3; pass++) {
        for (int64_t j = 0; j < keys; j++) {
            int64_t at = j < e->m ? pair * e->m + j : pair * g->extra + j - e->m, offset = j < e->m ? offset_of(e, n, j) : 0;
            const float *k = (j < e->m ? e->k : e->extra_k) + at * g->d, *v = (j < e->m ? e->v : e->extra_v) + at * g->dv;
            if (offset < 0) {
                continue;
            }
            if (pass == 0) {
                double bias = j < e->m && g->bias != NULL ? (double)e->bias[h * e->bias_count + offset] : 0;
                p[j] = exp(g->scale * dot(q, k, g->d) + bias);
                sum += p[j];
            } else if (pass == 1) {
                p[j] /= sum;
                delta += p[j] * dot(grad, v, g->dv);
                for (int64_t c = 0; c < g->dv; c++) {
                    r->o[row * g->dv + c] += p[j] * (double)v[c];
                }
            } else {
                double ds = p[j] * (dot(grad, v, g->dv) - delta);
                for (int64_t c = 0; c < g->dv; c++) {
                    (j < e->m ? r->v : r->extra_v)[at * g->dv + c] += p[j] * (double)grad[c];
                }
                for (int64_t c = 0; c < g->d; c++) {
                    r->q[row * g->d + c] += g->scale * ds * (double)k[c];
                    (j < e->m ? r->k : r->extra_k)[at * g->d + c] += g->scale * ds * (double)q[c];
                }
                if (j < e->m) {
                    r->bias[h * e->bias_count + offset] += ds;
                }
            }
        }
    }
    r->lse[row] = log(sum);
    free(p);
}

static void compare(const char *what, int round, const float *got, const double *want, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (!(fabs((double)got[i] - want[i]) <= 1e-4 * (1 + fabs(want[i])) || (double)got[i] == want[i])) {
            fail_msg("example %d: %s[%lld] = %g, expected %g", round, what, (long long)i, (double)got[i], want[i]);
        }
    }
}

static void against_plain(void **unused)
{
    (void)unused;
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    attn_random_seed(&chance, 11);
    for (int round = 0; round < 200; round++) {
        example e;
        make(&e);
        const attn_grid *g = &e.g;
        int64_t rows = g->batch * g->heads * e.n, pairs = g->batch * g->kv_heads;
        const int64_t counts[] = {rows * g->dv, rows, rows * g->d, pairs * e.m * g->d, pairs * e.m * g->dv, g->heads * e.bias_count,
                                  pairs * g->extra * g->d, pairs * g->extra * g->dv};
        const char *const names[] = {"o", "lse", "grad_q", "grad_k", "grad_v", "grad_bias", "grad_extra_k", "grad_extra_v"};
        results r;
        double **want[] = {&r.o, &r.lse, &r.q, &r.k, &r.v, &r.bias, &r.extra_k, &r.extra_v};
        float *got[2][8];
        for (int i = 0; i < 8; i++) {
            *want[i] = zeros(counts[i]);
        }
        for (int64_t head = 0; head < g->batch * g->heads; head++) {
            for (int64_t n = 0; n < e.n; n++) {
                plain_row(&e, &r, head, n);
            }
        }
        for (int threads = 1; threads <= 2; threads++) {
            float **x = got[threads - 1];
            for (int i = 0; i < 8; i++) {
                x[i] = floats(counts[i]);
            }
            attn_grid_gradients to = {x[2], x[3], x[4], g->bias != NULL ? x[5] : NULL, x[6], x[7]};
            assert_int_equal(attn_grid_forward(g, arena, threads == 1 ? 1 : 5, x[0], x[1]), ATTN_OK);
            assert_int_equal(attn_grid_backward(g, arena, threads == 1 ? 1 : 5, x[0], x[1], e.grad_o, &to), ATTN_OK);
        }
        for (int i = 0; i < 8; i++) {
            if (i != 5 || g->bias != NULL) {
                compare(names[i], round, got[0][i], *want[i], counts[i]);
                assert_memory_equal(got[0][i], got[1][i], (size_t)counts[i] * sizeof(float));
            }
            free(*want[i]);
            free(got[0][i]);
            free(got[1][i]);
        }
        release(&e);
    }
    attn_arena_destroy(arena);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(against_plain)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
