/* Attention of lists of rows against a plain reference in double, all at once and token by token: few and many rows, any ends, keys of
 * their own, relative positions, widths that fill no vector. Gradients are tested with the mechanisms that use it. */
#include "core/random.h"
#include "exec/stairs.h"

#include <attn/memory.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST_HEADS = 16 };

typedef struct layout {
    int64_t kv, heads_each, rows, keys, d, dv; /* rows: of the longest head; the others have fewer */
    int own, relative, causal, scattered; /* scattered: queries in the opposite order */
} layout;

typedef struct problem {
    attn_stairs stairs;
    attn_stairs_head heads[MOST_HEADS];
    float *memory[MOST_HEADS * 8];
    int64_t *ends[MOST_HEADS], *places[MOST_HEADS];
    int count;
} problem;

static float *numbers(problem *p, attn_random *random, int64_t count, double deviation)
{
    float *data = malloc(((size_t)count + 1) * sizeof *data);
    assert_non_null(data);
    for (int64_t i = 0; i < count; i++) {
        data[i] = (float)(deviation * attn_random_normal(random));
    }
    assert_true(p->count < (int)(sizeof p->memory / sizeof *p->memory));
    p->memory[p->count++] = data;
    return data;
}

static void make(problem *p, const layout *l, uint64_t seed)
{
    attn_random random;
    attn_random_seed(&random, seed);
    *p = (problem){.count = 0};
    int64_t heads = l->kv * l->heads_each, table = 2 * (l->keys + l->rows);
    for (int64_t h = 0; h < heads; h++) {
        int64_t kv = h / l->heads_each, rows = h % 3 == 2 ? l->rows / 3 : l->rows;
        int fresh = h % l->heads_each == 0;
        int64_t *end = malloc(((size_t)rows + 1) * sizeof *end);
        assert_non_null(end);
        p->ends[h] = end;
        for (int64_t r = 0; r < rows; r++) {
            int64_t last = l->keys - rows + r + 1;
            end[r] = l->causal ? (last > 0 ? last : 0) : (int64_t)attn_random_below(&random, (uint64_t)l->keys + 1);
        }
        p->heads[h] = (attn_stairs_head){.rows = rows, .kv = kv, .q = numbers(p, &random, rows * l->d, 1), .end = end,
                                         .k = fresh ? numbers(p, &random, l->keys * l->d, 1) : p->heads[h - 1].k,
                                         .v = fresh ? numbers(p, &random, l->keys * l->dv, 1) : p->heads[h - 1].v,
                                         .o = numbers(p, &random, rows * l->dv, 9), .lse = numbers(p, &random, rows, 9)};
        int64_t *place = malloc(((size_t)rows + 1) * sizeof *place);
        assert_non_null(place);
        p->places[h] = place;
        for (int64_t r = 0; r < rows; r++) {
            place[r] = rows - 1 - r;
        }
        p->heads[h].q_row = l->scattered ? place : NULL;
        if (l->own) {
            p->heads[h].own_k = numbers(p, &random, rows * l->d, 1);
            p->heads[h].own_v = numbers(p, &random, rows * l->dv, 1);
        }
        if (l->relative) {
            p->heads[h].q_bias = numbers(p, &random, l->d, 1);
            p->heads[h].rel_emb = h % 2 == 0 ? numbers(p, &random, table * l->d, 0.5) : p->heads[h - 1].rel_emb;
            p->heads[h].rel_stride = l->d;
            p->heads[h].rel_bias = h % 2 == 0 ? numbers(p, &random, table, 1) : p->heads[h - 1].rel_bias;
            p->heads[h].rel_bias_stride = 1;
            p->heads[h].rel_count = table;
            p->heads[h].zero = table / 2;
            p->heads[h].first = l->keys - rows;
        }
    }
    p->stairs = (attn_stairs){.keys = l->keys, .d = l->d, .dv = l->dv, .kv_count = l->kv, .head_count = heads, .scale = 0.4, .heads = p->heads};
}

static void destroy(problem *p)
{
    for (int i = 0; i < p->count; i++) {
        free(p->memory[i]);
    }
    for (int64_t h = 0; h < p->stairs.head_count; h++) {
        free(p->ends[h]);
        free(p->places[h]);
    }
}

static double dot(const float *a, const float *b, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += (double)a[i] * (double)b[i];
    }
    return sum;
}

static void check_row(const problem *p, int64_t h, int64_t r, const char *what)
{
    const attn_stairs *s = &p->stairs;
    const attn_stairs_head *head = &p->heads[h];
    const float *q = head->q + (head->q_row != NULL ? head->q_row[r] : r) * s->d;
    int64_t count = head->end[r] + (head->own_k != NULL);
    double *score = calloc((size_t)count + 1, sizeof *score), top = -INFINITY, sum = 0;
    assert_non_null(score);
    for (int64_t j = 0; j < count; j++) {
        int own = j == head->end[r];
        score[j] = dot(q, own ? head->own_k + r * s->d : head->k + j * s->d, s->d);
        if (head->rel_emb != NULL && !own) {
            int64_t at = head->zero + j - (head->first + r);
            score[j] += dot(head->q_bias, head->k + j * s->d, s->d) + dot(q, head->rel_emb + at * head->rel_stride, s->d) +
                        (double)head->rel_bias[at];
        }
        score[j] *= s->scale;
        top = fmax(top, score[j]);
    }
    for (int64_t j = 0; j < count; j++) {
        score[j] = exp(score[j] - top);
        sum += score[j];
    }
    double lse = count > 0 ? top + log(sum) : -INFINITY, got = (double)head->lse[r];
    if (!(got == lse || fabs(got - lse) < 1e-4)) {
        fail_msg("%s: lse of row %lld of head %lld is %g, expected %g", what, (long long)r, (long long)h, got, lse);
    }
    for (int64_t c = 0; c < s->dv; c++) {
        double want = 0;
        for (int64_t j = 0; j < count; j++) {
            want += score[j] / sum * (double)(j == head->end[r] ? head->own_v + r * s->dv : head->v + j * s->dv)[c];
        }
        got = (double)head->o[r * s->dv + c];
        if (!(fabs(got - want) < 1e-4)) {
            fail_msg("%s: o[%lld] of row %lld of head %lld is %g, expected %g", what, (long long)c, (long long)r, (long long)h, got, want);
        }
    }
    free(score);
}

static void check(const problem *p, const char *what)
{
    for (int64_t h = 0; h < p->stairs.head_count; h++) {
        for (int64_t r = 0; r < p->heads[h].rows; r++) {
            check_row(p, h, r, what);
        }
    }
}

static const layout layouts[] = {
    {2, 3, 60, 150, 16, 16, 0, 0, 1, 0},  {2, 1, 250, 700, 7, 5, 0, 0, 0, 0}, {1, 4, 4, 300, 12, 9, 0, 0, 0, 0},  {3, 2, 2, 600, 64, 64, 0, 0, 1, 0},
    {2, 2, 40, 30, 5, 3, 0, 0, 1, 0},     {2, 1, 30, 90, 8, 8, 1, 0, 0, 0},   {1, 2, 8, 40, 8, 4, 1, 0, 1, 0},    {2, 2, 70, 620, 16, 8, 0, 1, 1, 0},
    {2, 4, 4, 300, 10, 10, 0, 1, 1, 0},   {1, 1, 33, 40, 3, 2, 0, 1, 0, 0},   {1, 3, 1, 1, 1, 1, 0, 0, 1, 0},     {1, 2, 3, 0, 4, 4, 0, 0, 1, 0},
    {2, 2, 50, 90, 9, 4, 0, 0, 1, 1},  {1, 3, 5, 70, 6, 6, 0, 0, 1, 1},
    {5, 2, 20, 9000, 60, 30, 0, 1, 1, 0}, /* keys of so many heads and rows that they are packed in turns */
};

static void test_reference(void **state)
{
    (void)state;
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        for (int threads = 1; threads <= 3; threads += 2) {
            problem p;
            make(&p, &layouts[i], i);
            assert_int_equal(attn_stairs_forward(&p.stairs, arena, threads), ATTN_OK);
            char what[64];
            snprintf(what, sizeof what, "layout %d, %d threads", (int)i, threads);
            check(&p, what);
            destroy(&p);
        }
    }
    attn_arena_destroy(arena);
}

static void test_steps(void **state)
{
    (void)state;
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        if (!layouts[i].causal) {
            continue;
        }
        problem p;
        attn_stairs_head room[MOST_HEADS];
        make(&p, &layouts[i], i);
        attn_stairs_steps steps = attn_stairs_steps_begin(&p.stairs, room);
        for (int64_t t = 0; t < layouts[i].rows; t++) {
            int64_t end = layouts[i].keys - layouts[i].rows + t + 1;
            assert_int_equal(attn_stairs_steps_next(&steps, end > 0 ? end : 0, arena, 2), ATTN_OK);
        }
        char what[64];
        snprintf(what, sizeof what, "layout %d, step by step", (int)i);
        check(&p, what);
        destroy(&p);
    }
    attn_arena_destroy(arena);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_reference), cmocka_unit_test(test_steps)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
