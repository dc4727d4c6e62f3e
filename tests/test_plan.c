/* Plans: every builder and combination against token-level masks, measures, pictures, files, bad files. */
#include "core/random.h"
#include <attn/plan.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static attn_random generator;

static int64_t below(int64_t bound) { return (int64_t)attn_random_below(&generator, (uint64_t)bound); }

static void ok(attn_status status)
{
    if (status != ATTN_OK) {
        fail_msg("%s: %s", attn_status_name(status), attn_last_error());
    }
}

typedef struct wanted {
    int kind;
    int64_t a, b, n, m;
    const attn_plan *one, *two;
} wanted;

/* What each kind of plan must show. */
static int want(const wanted *w, int64_t h, int64_t n, int64_t m)
{
    int64_t i = n + w->m - w->n, distance = i - m < 0 ? m - i : i - m;
    switch (w->kind) {
    case 0: return 1;
    case 1: return m <= i && (m < w->a || m > i - w->b);
    case 2: return n < w->a || m < w->a;
    case 3: return distance % w->a == 0 && (w->b == 0 || distance / w->a <= w->b);
    case 4: return attn_plan_sees(w->one, 0, h, n, m) || attn_plan_sees(w->two, 0, h, n, m);
    case 5: return attn_plan_sees(w->one, 0, h, n, m) && attn_plan_sees(w->two, 0, h, n, m);
    case 6: return m <= i && attn_plan_sees(w->one, 0, h, n, m);
    case 7: return (n * 5 + m * 11 + h) % 7 < 3;
    default: return attn_plan_sees(h % 2 ? w->two : w->one, 0, h, n, m);
    }
}

static int function(void *user, int64_t b, int64_t h, int64_t n, int64_t m)
{
    (void)b;
    return want(user, h, n, m);
}

static void check(const attn_plan *plan, const wanted *w)
{
    const attn_plan_layout *y = attn_plan_get_layout(plan);
    double pairs = 0;
    for (int64_t h = 0; h < y->shape.heads; h++) {
        for (int64_t n = 0; n < w->n; n++) {
            for (int64_t m = 0; m < w->m; m++) {
                int expected = want(w, h, n, m), got = attn_plan_sees(plan, 0, h, n, m);
                pairs += expected;
                if (got != expected) {
                    fail_msg("kind %d (%lld, %lld), N %lld, M %lld, blocks %lld x %lld: head %lld, query %lld, key %lld: got %d", w->kind,
                             (long long)w->a, (long long)w->b, (long long)w->n, (long long)w->m, (long long)y->shape.block_q,
                             (long long)y->shape.block_k, (long long)h, (long long)n, (long long)m, got);
                }
            }
        }
    }
    attn_plan_measures measures;
    attn_plan_measure(plan, 4, 4, &measures);
    assert_true(measures.pairs == pairs);
    assert_true(measures.touched_pairs >= pairs);
    assert_true(measures.full + measures.partial == measures.entries);
}

static void patterns(void **state)
{
    (void)state;
    for (int i = 0; i < 60; i++) {
        attn_random_seed(&generator, (uint64_t)i);
        int64_t n = 1 + below(50), m = 1 + below(60);
        attn_plan_shape shape = {1, 1 + below(3), n, m, 1 + below(20), 1 + below(20)};
        attn_plan *plans[9] = {NULL};
        wanted w[9] = {{0, 0, 0, n, m, NULL, NULL},          {1, below(20), 1 + below(30), n, m, NULL, NULL},
                       {2, below(9), 0, n, m, NULL, NULL},   {3, 1 + below(6), below(4), n, m, NULL, NULL},
                       {4, 0, 0, n, m, NULL, NULL},          {5, 0, 0, n, m, NULL, NULL},
                       {6, 0, 0, n, m, NULL, NULL},          {7, 0, 0, n, m, NULL, NULL},
                       {8, 0, 0, n, m, NULL, NULL}};
        ok(attn_plan_from_rule(&plans[0], &shape, NULL));
        ok(attn_plan_streaming(&plans[1], &shape, w[1].a, w[1].b));
        ok(attn_plan_global(&plans[2], &shape, w[2].a));
        ok(attn_plan_strided(&plans[3], &shape, w[3].a, w[3].b));
        ok(attn_plan_from_function(&plans[7], &shape, function, &w[7]));
        for (int k = 4; k < 9; k++) {
            w[k].one = plans[(int[]){0, 1, 2, 3, 7}[below(5)]];
            w[k].two = plans[(int[]){0, 1, 2, 3, 7}[below(5)]];
        }
        ok(attn_plan_union(&plans[4], w[4].one, w[4].two));
        ok(attn_plan_intersection(&plans[5], w[5].one, w[5].two));
        ok(attn_plan_causal(&plans[6], w[6].one));
        int64_t which[] = {0, 1, 0};
        ok(attn_plan_mix(&plans[8], shape.heads, (const attn_plan *const[]){w[8].one, w[8].two}, which));
        for (int k = 0; k < 9; k++) {
            check(plans[k], &w[k]);
        }
        for (int k = 0; k < 9; k++) {
            attn_plan_destroy(plans[k]);
        }
    }
}

static void selections(void **state)
{
    (void)state;
    attn_random_seed(&generator, 3);
    int64_t n = 37, m = 41;
    attn_plan_shape shape = {1, 2, n, m, 8, 10};
    int32_t lists[2 * 5 * 4];
    uint8_t flags[2 * 5 * 5] = {0}, mask[2 * 37 * 41] = {0};
    for (int i = 0; i < 40; i++) {
        lists[i] = (int32_t)below(6) - 1;
        if (lists[i] >= 0) {
            flags[i / 4 * 5 + lists[i]] = 1;
        }
    }
    attn_plan_rule rule = {1, 3, 20, 0};
    attn_tensor l = attn_tensor_make(lists, ATTN_I32, 4, (int64_t[]){1, 2, 5, 4});
    attn_tensor f = attn_tensor_make(flags, ATTN_BOOL, 4, (int64_t[]){1, 2, 5, 5});
    attn_plan *one, *two, *three;
    ok(attn_plan_from_lists(&one, &shape, &l, &rule));
    ok(attn_plan_from_flags(&two, &shape, &f, &rule));
    for (int64_t h = 0; h < 2; h++) {
        for (int64_t i = 0; i < n; i++) {
            for (int64_t j = 0; j < m; j++) {
                int64_t p = i + m - n;
                int seen = flags[(h * 5 + i / 8) * 5 + j / 10] && j <= p && (j < 3 || j >= p - 20);
                assert_int_equal(attn_plan_sees(one, 0, h, i, j), seen);
                assert_int_equal(attn_plan_sees(two, 0, h, i, j), seen);
                mask[(h * n + i) * m + j] = (uint8_t)seen;
            }
        }
    }
    attn_tensor b = attn_tensor_make(mask, ATTN_BOOL, 4, (int64_t[]){1, 2, n, m});
    ok(attn_plan_from_mask(&three, &b, 7, 9));
    for (int64_t i = 0; i < 2 * n * m; i++) {
        assert_int_equal(attn_plan_sees(three, 0, i / (n * m), i / m % n, i % m), mask[i]);
    }
    attn_plan_destroy(one);
    attn_plan_destroy(two);
    attn_plan_destroy(three);
}

static void fails(attn_status status, attn_status expected, const char *words, attn_plan *const *plan)
{
    assert_int_equal(status, expected);
    assert_null(*plan);
    if (strstr(attn_last_error(), words) == NULL) {
        fail_msg("'%s' does not say '%s'", attn_last_error(), words);
    }
}

static void errors(void **state)
{
    (void)state;
    attn_plan *plan, *a, *b;
    attn_plan_shape good = {1, 1, 8, 8, 4, 4}, bad = good;
    bad.block_q = 0;
    fails(attn_plan_from_rule(&plan, &bad, NULL), ATTN_ERR_ARGUMENT, "block_q = 0", &plan);
    bad = good;
    bad.n = -1;
    fails(attn_plan_from_rule(&plan, &bad, NULL), ATTN_ERR_ARGUMENT, "n = -1", &plan);
    fails(attn_plan_streaming(&plan, &good, 1, 0), ATTN_ERR_ARGUMENT, "recent = 0", &plan);
    fails(attn_plan_streaming(&plan, &good, -1, 1), ATTN_ERR_ARGUMENT, "sinks = -1", &plan);
    fails(attn_plan_strided(&plan, &good, 0, 1), ATTN_ERR_ARGUMENT, "stride = 0", &plan);
    int64_t numbers[] = {0, 2, 1, 0};
    attn_tensor lists = attn_tensor_make(numbers, ATTN_I64, 4, (int64_t[]){1, 1, 2, 2});
    fails(attn_plan_from_lists(&plan, &good, &lists, NULL), ATTN_ERR_ARGUMENT, "lists[0,0,0,1] = 2", &plan);
    bad = good;
    bad.n = 20;
    fails(attn_plan_from_lists(&plan, &bad, &lists, NULL), ATTN_ERR_SHAPE, "axis 2", &plan);
    ok(attn_plan_from_rule(&a, &good, NULL));
    ok(attn_plan_from_rule(&b, &bad, NULL));
    fails(attn_plan_union(&plan, a, b), ATTN_ERR_SHAPE, "n = 8 and 20", &plan);
    assert_int_equal(attn_plan_fits(a, 2, 4, 2, 8, 8), ATTN_OK);
    assert_int_equal(attn_plan_fits(a, 2, 4, 2, 8, 9), ATTN_ERR_SHAPE);
    attn_plan_destroy(a);
    attn_plan_destroy(b);
}

static unsigned char *read_all(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    unsigned char *data = malloc(1 << 20);
    *bytes = fread(data, 1, 1 << 20, file);
    fclose(file);
    return data;
}

static void files(void **state)
{
    (void)state;
    char path[] = "/tmp/attn-plan-XXXXXX";
    int descriptor = mkstemp(path);
    assert_true(descriptor >= 0);
    close(descriptor);
    attn_plan *band, *strided, *plan, *back;
    attn_plan_shape shape = {1, 2, 50, 60, 8, 16};
    ok(attn_plan_streaming(&band, &shape, 3, 12));
    ok(attn_plan_strided(&strided, &shape, 5, 3));
    ok(attn_plan_union(&plan, band, strided));
    ok(attn_plan_save(plan, path));
    ok(attn_plan_load(&back, path));
    for (int64_t i = 0; i < 2 * 50 * 60; i++) {
        assert_int_equal(attn_plan_sees(plan, 0, i / 3000, i / 60 % 50, i % 60), attn_plan_sees(back, 0, i / 3000, i / 60 % 50, i % 60));
    }
    attn_plan_destroy(back);
    /* Any change of any byte, and any length, must be noticed. */
    size_t bytes;
    unsigned char *data = read_all(path, &bytes);
    attn_random_seed(&generator, 9);
    for (size_t i = 0; i < bytes; i++) {
        unsigned char before = data[i];
        data[i] = (unsigned char)(before ^ (1u << below(8)));
        assert_int_equal(attn_plan_load_memory(&back, data, bytes), ATTN_ERR_FORMAT);
        assert_null(back);
        data[i] = before;
        if (i % 7 == 0) {
            assert_int_equal(attn_plan_load_memory(&back, data, i), ATTN_ERR_FORMAT);
        }
    }
    for (int i = 0; i < 20000; i++) {
        unsigned char saved[104];
        size_t head = bytes < sizeof saved ? bytes : sizeof saved;
        memcpy(saved, data, head);
        for (int j = 0; j < 1 + below(6); j++) {
            data[8 + below((int64_t)head - 8)] = (unsigned char)(below(3) ? below(4) : below(256));
        }
        attn_plan_load_memory(&back, data, bytes);
        attn_plan_destroy(back);
        memcpy(data, saved, head);
    }
    assert_int_equal(attn_plan_load(&back, "/nonexistent/plan"), ATTN_ERR_IO);
    assert_int_equal(attn_plan_save(plan, "/nonexistent/plan"), ATTN_ERR_IO);
    unlink(path);
    free(data);
    attn_plan_destroy(band);
    attn_plan_destroy(strided);
    attn_plan_destroy(plan);
}

static void pictures(void **state)
{
    (void)state;
    char path[] = "/tmp/attn-plan-XXXXXX", *text;
    int descriptor = mkstemp(path);
    assert_true(descriptor >= 0);
    close(descriptor);
    attn_plan *plan;
    attn_plan_shape shape = {1, 1, 16, 16, 4, 4};
    ok(attn_plan_streaming(&plan, &shape, 4, 4));
    ok(attn_plan_draw_text(plan, 0, 0, 80, &text));
    assert_string_equal(text, "+...\n"
                              "#+..\n"
                              "#++.\n"
                              "#.++\n");
    attn_plan_free_text(text);
    ok(attn_plan_draw_text(plan, 0, 0, 2, &text));
    assert_string_equal(text, "+.\n++\n");
    attn_plan_free_text(text);
    ok(attn_plan_draw_png(plan, 0, 0, 10, path));
    size_t bytes;
    unsigned char *data = read_all(path, &bytes);
    assert_true(bytes > 8 && memcmp(data, "\x89PNG", 4) == 0);
    free(data);
    assert_int_equal(attn_plan_draw_text(plan, 0, 1, 80, &text), ATTN_ERR_ARGUMENT);
    assert_int_equal(attn_plan_draw_png(plan, 0, 0, 0, path), ATTN_ERR_ARGUMENT);
    assert_int_equal(attn_plan_draw_png(plan, 0, 0, 10, "/nonexistent/a.png"), ATTN_ERR_IO);
    unlink(path);
    attn_plan_destroy(plan);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(patterns), cmocka_unit_test(selections), cmocka_unit_test(errors),
                                       cmocka_unit_test(files), cmocka_unit_test(pictures)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
