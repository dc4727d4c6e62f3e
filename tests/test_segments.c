/* Attention over several lists of keys: beside the plain softmax over all of them, and its results for 1, 2 and 7 threads. */
#include "core/random.h"
#include "exec/segments.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { BATCH = 2, HEADS = 4, KV_HEADS = 2, LISTS = 4 };

static float *normal(attn_random *random, int64_t count)
{
    float *x = malloc((size_t)(count + 1) * sizeof *x);
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)attn_random_normal(random);
    }
    return x;
}

/* One query against all lists, in double. */
static void plain_row(const attn_segments *s, int64_t b, int64_t h, const float *q, double *o, double *lse, double *shares)
{
    double top = -INFINITY, sum = 0;
    memset(o, 0, (size_t)s->dv * sizeof *o);
    memset(shares, 0, LISTS * sizeof *shares);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < s->count; i++) {
            const attn_segment *g = &s->segments[i];
            for (int64_t j = 0; j < g->keys; j++) {
                int64_t row = g->index != NULL ? g->index[j] : j;
                const float *k = g->k + b * g->k_stride[0] + h / (HEADS / KV_HEADS) * g->k_stride[1] + row * s->d;
                const float *v = g->v + b * g->v_stride[0] + h / (HEADS / KV_HEADS) * g->v_stride[1] + row * s->dv;
                double x = 0;
                for (int64_t c = 0; c < s->d; c++) {
                    x += s->scale * (double)q[c] * (double)k[c];
                }
                x = x * (g->factor != NULL ? (double)g->factor[j] : 1) + (g->bias != NULL ? (double)g->bias[j] : 0);
                if (pass == 0) {
                    top = fmax(top, x);
                    continue;
                }
                double weight = exp(x - top);
                sum += weight;
                shares[i] += weight;
                for (int64_t c = 0; c < s->dv; c++) {
                    o[c] += weight * (double)v[c];
                }
            }
        }
    }
    *lse = top + log(sum);
    for (int64_t c = 0; c < s->dv; c++) {
        o[c] = sum > 0 ? o[c] / sum : 0;
    }
    for (int64_t i = 0; i < s->count; i++) {
        shares[i] = sum > 0 ? shares[i] / sum : 0;
    }
}

static void compare(const char *what, int64_t row, int64_t c, double got, double want)
{
    if (got != want && !(fabs(got - want) <= 2e-5 + 1e-4 * fabs(want))) {
        fail_msg("%s of row %lld, %lld: %.8g, expected %.8g", what, (long long)row, (long long)c, got, want);
    }
}

/* Lists of `keys` rows of memories of twice as many: as they lie, some of them, with biases, with factors. */
static void check(uint64_t seed, int64_t n, const int64_t keys[LISTS], int64_t d, int64_t dv)
{
    attn_random random;
    attn_random_seed(&random, seed);
    attn_segment lists[LISTS];
    int64_t rows = BATCH * HEADS * n;
    for (int i = 0; i < LISTS; i++) {
        int64_t all = 2 * keys[i], *index = malloc((size_t)(keys[i] + 1) * sizeof *index);
        for (int64_t j = 0; j < keys[i]; j++) {
            index[j] = 2 * j + (int64_t)attn_random_below(&random, 2);
        }
        float *bias = normal(&random, keys[i]), *factor = normal(&random, keys[i]);
        lists[i] = (attn_segment){keys[i], normal(&random, BATCH * KV_HEADS * all * d), normal(&random, BATCH * KV_HEADS * all * dv),
                                  {KV_HEADS * all * d, all * d}, {KV_HEADS * all * dv, all * dv}, index, bias, factor};
        if (i % 2 == 0) {
            lists[i].index = NULL;
            free(index);
        }
        if (i == 0 || i == 3) {
            lists[i].bias = NULL;
            free(bias);
        }
        if (i < 2) {
            lists[i].factor = NULL;
            free(factor);
        }
    }
    attn_segments s = {BATCH, HEADS, KV_HEADS, n, d, dv, 0.4, normal(&random, rows * d), LISTS, lists, NULL, NULL};
    float *o[3], *lse[3], *shares[3];
    static const int threads[] = {1, 2, 7};
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    for (int t = 0; t < 3; t++) {
        o[t] = normal(&random, rows * dv), lse[t] = normal(&random, rows), shares[t] = normal(&random, rows * LISTS);
        assert_int_equal(attn_segments_forward(&s, o[t], lse[t], shares[t], arena, threads[t]), ATTN_OK);
        assert_memory_equal(o[0], o[t], (size_t)(rows * dv) * sizeof(float));
        assert_memory_equal(lse[0], lse[t], (size_t)rows * sizeof(float));
        assert_memory_equal(shares[0], shares[t], (size_t)(rows * LISTS) * sizeof(float));
    }
    float *alone = normal(&random, rows); /* without the values */
    assert_int_equal(attn_segments_forward(&s, NULL, alone, NULL, arena, 2), ATTN_OK);
    assert_memory_equal(lse[0], alone, (size_t)rows * sizeof(float));
    for (int64_t row = 0; row < rows; row++) {
        double want[64], want_lse, want_shares[LISTS];
        plain_row(&s, row / (HEADS * n), row / n % HEADS, s.q + row * d, want, &want_lse, want_shares);
        compare("lse", row, 0, (double)lse[0][row], want_lse);
        for (int64_t c = 0; c < dv; c++) {
            compare("o", row, c, (double)o[0][row * dv + c], want[c]);
        }
        for (int64_t c = 0; c < LISTS; c++) {
            compare("share", row, c, (double)shares[0][row * LISTS + c], want_shares[c]);
        }
    }
    for (int t = 0; t < 3; t++) {
        free(o[t]), free(lse[t]), free(shares[t]);
    }
    for (int i = 0; i < LISTS; i++) {
        free((void *)(uintptr_t)lists[i].k), free((void *)(uintptr_t)lists[i].v), free((void *)(uintptr_t)lists[i].index);
        free((void *)(uintptr_t)lists[i].bias), free((void *)(uintptr_t)lists[i].factor);
    }
    free(alone), free((void *)(uintptr_t)s.q);
    attn_arena_destroy(arena);
}

static void test_beside_plain(void **state)
{
    (void)state;
    check(1, 5, (int64_t[]){7, 3, 1, 20}, 4, 3);
    check(2, 250, (int64_t[]){65, 0, 40, 17}, 9, 16); /* more rows than a task takes */
    check(3, 3, (int64_t[]){600, 513, 512, 100}, 16, 33);
    check(4, 2, (int64_t[]){0, 0, 0, 0}, 3, 2);
    check(5, 1, (int64_t[]){0, 0, 5, 0}, 64, 64);
}

/* Every score of every row once, in order; what the hook makes of them counts. */
typedef struct seen {
    int64_t next[3]; /* of each row: keys seen so far, over both lists */
    double sum[3];
} seen;

static void see(void *user, float *scores, int64_t row, int64_t segment, int64_t first, int64_t keys)
{
    seen *x = user;
    if (x->next[row] != segment * 700 + first) {
        x->sum[row] = NAN; /* out of order */
    }
    x->next[row] += keys;
    for (int64_t j = 0; j < keys; j++) {
        x->sum[row] += (double)scores[j];
        scores[j] = segment == 1 && first + j == row ? 0 : -INFINITY;
    }
}

static void test_hook(void **state)
{
    (void)state;
    attn_random random;
    attn_random_seed(&random, 9);
    float *k = normal(&random, 700 * 2), *v = normal(&random, 700 * 2), q[3 * 2] = {1, 0, 0, 1, 1, 1}, o[3 * 2];
    attn_segment lists[] = {{.keys = 700, .k = k, .v = v}, {.keys = 5, .k = k, .v = v}};
    attn_segments s = {1, 1, 1, 3, 2, 2, ATTN_SEGMENTS_UNSCALED, q, 2, lists, see, NULL};
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    for (int with = 0; with < 2; with++) {
        seen x = {{0}, {0}};
        s.user = &x;
        assert_int_equal(attn_segments_forward(&s, with ? o : NULL, NULL, NULL, arena, 1), ATTN_OK);
        for (int64_t row = 0; row < 3; row++) {
            double want = 0;
            for (int64_t j = 0; j < 705; j++) {
                const float *key = k + j % 700 * 2;
                want += (double)q[2 * row] * (double)key[0] + (double)q[2 * row + 1] * (double)key[1];
            }
            assert_int_equal(x.next[row], 705);
            compare("sum of scores", row, 0, x.sum[row], want);
            for (int64_t c = 0; c < 2 && with; c++) {
                compare("o", row, c, (double)o[2 * row + c], (double)v[2 * row + c]);
            }
        }
    }
    free(k), free(v);
    attn_arena_destroy(arena);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_beside_plain), cmocka_unit_test(test_hook)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
