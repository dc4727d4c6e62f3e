/* streaming, topk, topk.blocks and flexprefill: gradients against differences, threads, errors, plans. */
#include "opcheck.h"

#include "core/random.h"
#include "op/class.h"
#include "plan/plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static void qkv(opcheck_case *c, int64_t b, int64_t h, int64_t hkv, int64_t n, int64_t m, int64_t d, int64_t dv)
{
    opcheck_input(c, "q", 4, (int64_t[]){b, h, n, d});
    opcheck_input(c, "k", 4, (int64_t[]){b, hkv, m, d});
    opcheck_input(c, "v", 4, (int64_t[]){b, hkv, m, dv});
}

static void gradients(void **state)
{
    (void)state;
    const struct {
        const char *spec;
        int64_t b, h, hkv, n, m, d, dv;
    } cases[] = {
        {"streaming:sinks=2,recent=5", 2, 4, 2, 23, 23, 7, 5},
        {"streaming:sinks=0,recent=1", 1, 2, 2, 9, 20, 8, 8},
        {"streaming:sinks=30,recent=70,scale=0.2", 1, 2, 1, 150, 170, 16, 16},
        {"streaming:sinks=3,recent=4", 1, 2, 1, 12, 7, 8, 8},
        {"streaming:sinks=3,recent=40", 2, 4, 1, 1, 90, 8, 9},
        {"flexprefill:block=16,min_budget=16,gamma=0.6", 1, 2, 1, 83, 83, 8, 8},
        {"flexprefill:block=16,min_budget=16,gamma=0.5,tau=0.9,max_budget=32", 2, 2, 2, 80, 128, 8, 5},
        {"flexprefill:block=1,min_budget=3,gamma=0.5", 1, 2, 1, 20, 26, 8, 8},
        {"flexprefill", 1, 2, 1, 30, 30, 8, 8},
        {"flexprefill:block=1000000000000,min_budget=1000000000000", 1, 1, 1, 30, 30, 8, 8},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        opcheck_case c = {.spec = cases[i].spec, .seed = i + 1};
        qkv(&c, cases[i].b, cases[i].h, cases[i].hkv, cases[i].n, cases[i].m, cases[i].d, cases[i].dv);
        /* Differences of flexprefill would cross changes of the selection; its attention is that of `blocks`. */
        opcheck_run(&c, cases[i].spec[0] == 's' || i >= 8 ? 1e-2 : 0);
    }
}

static void lengths(void **state)
{
    (void)state;
    opcheck_case c = {.spec = "streaming:sinks=2,recent=6", .seed = 3};
    qkv(&c, 3, 2, 1, 20, 25, 8, 8);
    opcheck_whole(&c, "key_length", 1, (int64_t[]){3}, 0, 25);
    opcheck_run(&c, 1e-2);
}

/* The step of the differences must not change the selection: every key is selected, or scores lie far apart. */
static void topk_gradients(void **state)
{
    (void)state;
    const char *specs[] = {"topk:top_k=50", "topk:top_k=50,causal=false,share_group=true", "topk.blocks:top_k=9,block_q=5,block_k=7",
                           "topk.blocks:top_k=9,block_q=1000000000000,block_k=1000000000000,causal=false", "topk:top_k=3",
                           "topk:top_k=4,share_group=true", "topk.blocks:top_k=2,block_q=8,block_k=6,causal=false", "topk.blocks:top_k=1"};
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        opcheck_case c = {.spec = specs[i], .seed = 20 + i};
        qkv(&c, 2, 4, 2, 19, i % 2 ? 33 : 30, 6, 5);
        opcheck_run(&c, i < 4 ? 1e-2 : 0);
    }
}

static void empty_shapes(void **state)
{
    (void)state;
    const char *specs[] = {"streaming", "topk:top_k=3", "topk.blocks:top_k=2", "flexprefill"};
    for (int i = 0; i < 4; i++) {
        opcheck_case none = {.spec = specs[i], .seed = 1};
        qkv(&none, 1, 2, 1, 0, 0, 4, 4);
        opcheck_run(&none, 0);
        opcheck_case batch = {.spec = specs[i], .seed = 1};
        qkv(&batch, 0, 2, 1, 3, 3, 4, 4);
        opcheck_run(&batch, 0);
        if (i < 3) {
            opcheck_case keys = {.spec = specs[i], .seed = 1};
            qkv(&keys, 1, 2, 1, 3, 0, 4, 4);
            opcheck_run(&keys, 0);
        }
    }
}

static void errors(void **state)
{
    (void)state;
    const struct {
        const char *spec, *words;
        attn_status status;
        int64_t n, m;
    } cases[] = {
        {"streaming:recent=0", "recent", ATTN_ERR_ARGUMENT, 4, 4},
        {"streaming:sinks=-1", "sinks", ATTN_ERR_ARGUMENT, 4, 4},
        {"topk", "top_k", ATTN_ERR_ARGUMENT, 4, 4},
        {"topk:top_k=0", "top_k", ATTN_ERR_ARGUMENT, 4, 4},
        {"topk.blocks:top_k=1,block_q=0", "block_q", ATTN_ERR_ARGUMENT, 4, 4},
        {"flexprefill:gamma=0", "gamma", ATTN_ERR_ARGUMENT, 4, 4},
        {"flexprefill:gamma=1.1", "gamma", ATTN_ERR_ARGUMENT, 4, 4},
        {"flexprefill:tau=-1", "tau", ATTN_ERR_ARGUMENT, 4, 4},
        {"flexprefill:max_budget=8", "max_budget", ATTN_ERR_ARGUMENT, 4, 4},
        {"flexprefill", "at least N", ATTN_ERR_SHAPE, 8, 4},
        {"flexprefill", "multiple of block", ATTN_ERR_SHAPE, 4, 7},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        opcheck_case c = {.spec = cases[i].spec, .seed = 1};
        qkv(&c, 1, 2, 1, cases[i].n, cases[i].m, 4, 4);
        opcheck_fails(&c, cases[i].status, cases[i].words);
    }
    opcheck_case heads = {.spec = "streaming", .seed = 1};
    qkv(&heads, 1, 3, 2, 4, 4, 4, 4);
    opcheck_fails(&heads, ATTN_ERR_SHAPE, "");
}

/* `topk` attends from the scores that it chose by, not through a plan: the plan sees the same keys, and its attention is the same but for
 * the order of sums. */
static void same_choice(const attn_plan *plan, const int64_t *indices, int64_t lists, int64_t kept, const float *one, const float *two)
{
    for (int64_t i = 0; i < lists * 100; i++) {
        for (int64_t m = 0, at = 0; m < 100; m++) {
            int listed = at < kept && indices[i * kept + at] == m;
            at += listed;
            if (attn_plan_sees(plan, 0, i / 100, i % 100, m) != listed) {
                fail_msg("list %lld, query %lld: the plan and the indices differ on key %lld, listed %d", (long long)(i / 100),
                         (long long)(i % 100), (long long)m, listed);
            }
        }
    }
    for (int64_t i = 0; i < 4 * 100 * 8; i++) {
        if (!(fabsf(one[i] - two[i]) <= 1e-6f)) {
            fail_msg("o[%lld] = %.9g, by the plan %.9g", (long long)i, (double)one[i], (double)two[i]);
        }
    }
}

/* attn_op_select gives the plan whose attention is the mechanism's output. */
static void plans(void **state)
{
    (void)state;
    const char *specs[] = {"streaming:sinks=2,recent=20", "topk:top_k=5", "topk:top_k=5,share_group=true", "topk.blocks:top_k=2,block_q=16,block_k=16",
                           "flexprefill:block=16,min_budget=16,gamma=0.7"};
    static float q[4 * 100 * 8], k[2 * 100 * 8], v[2 * 100 * 8], one[4 * 100 * 8], two[4 * 100 * 8];
    for (size_t i = 0; i < sizeof q / sizeof q[0]; i++) {
        q[i] = (float)((i * 7919) % 2003) / 1000 - 1;
        k[i % 1600] = (float)((i * 104729) % 1009) / 500 - 1;
        v[i % 1600] = (float)((i * 1299709) % 997) / 500 - 1;
    }
    const int64_t shape[] = {1, 4, 100, 8}, kv[] = {1, 2, 100, 8};
    attn_named_tensor in[] = {{"q", attn_tensor_make(q, ATTN_F32, 4, shape)}, {"k", attn_tensor_make(k, ATTN_F32, 4, kv)},
                              {"v", attn_tensor_make(v, ATTN_F32, 4, kv)}};
    static int64_t indices[4 * 100 * 5];
    attn_named_tensor out[] = {{"o", attn_tensor_make(one, ATTN_F32, 4, shape)}, {"indices", {0}}};
    attn_tensor o = attn_tensor_make(two, ATTN_F32, 4, shape);
    attn_dense_inputs inputs = {.q = in[0].tensor, .k = in[1].tensor, .v = in[2].tensor};
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        attn_op *op;
        attn_plan *plan;
        assert_int_equal(attn_op_create(&op, specs[i]), ATTN_OK);
        assert_int_equal(attn_op_select(op, in, 3, &plan, NULL), ATTN_OK);
        assert_int_equal(attn_plan_fits(plan, 1, 4, 2, 100, 100), ATTN_OK);
        int64_t lists = strncmp(specs[i], "topk:", 5) != 0 ? 0 : strstr(specs[i], "share_group") != NULL ? 2 : 4;
        out[1].tensor = attn_tensor_make(indices, ATTN_I64, 4, (int64_t[]){1, lists, 100, 5});
        assert_int_equal(attn_op_forward(op, in, 3, out, lists > 0 ? 2 : 1, NULL), ATTN_OK);
        assert_int_equal(attn_plan_forward(plan, &settings, &inputs, &o, NULL, NULL), ATTN_OK);
        if (lists > 0) {
            same_choice(plan, indices, lists, 5, one, two);
        } else {
            assert_memory_equal(one, two, sizeof one);
        }
        attn_plan_destroy(plan);
        attn_op_destroy(op);
    }
    attn_op *dense;
    attn_plan *none;
    assert_int_equal(attn_op_create(&dense, "dense"), ATTN_OK);
    assert_int_equal(attn_op_select(dense, in, 3, &none, NULL), ATTN_ERR_UNSUPPORTED);
    assert_null(none);
    attn_op_destroy(dense);
}

#define LINE_TOKENS 577 /* of several tiles, the last block short */
#define LINE_BLOCKS 37

/* flexprefill's choice for one head of LINE_TOKENS tokens of width 4. */
static void choose(const char *spec, float *q, float *k, uint8_t *kept, int64_t *pattern)
{
    static float v[LINE_TOKENS * 4];
    const int64_t shape[] = {1, 1, LINE_TOKENS, 4};
    attn_named_tensor in[] = {{"q", attn_tensor_make(q, ATTN_F32, 4, shape)}, {"k", attn_tensor_make(k, ATTN_F32, 4, shape)},
                              {"v", attn_tensor_make(v, ATTN_F32, 4, shape)}};
    attn_named_tensor out[] = {{"blocks", attn_tensor_make(kept, ATTN_BOOL, 4, (int64_t[]){1, 1, LINE_BLOCKS, LINE_BLOCKS})},
                               {"pattern", attn_tensor_make(pattern, ATTN_I64, 2, (int64_t[]){1, 1})}};
    attn_op *op;
    assert_int_equal(attn_op_create(&op, spec), ATTN_OK);
    assert_int_equal(attn_op_forward(op, in, 3, out, 2, NULL), ATTN_OK);
    attn_op_destroy(op);
}

/* Where all keys are alike, equal lines tie, and the lower ones are kept: the last query block sees the first blocks and its own. */
static void equal_lines(void **state)
{
    (void)state;
    static float q[LINE_TOKENS * 4], k[LINE_TOKENS * 4];
    static uint8_t kept[LINE_BLOCKS * LINE_BLOCKS];
    int64_t pattern;
    choose("flexprefill:block=16,min_budget=1,gamma=0.8,tau=0", q, k, kept, &pattern);
    assert_int_equal(pattern, 1);
    const uint8_t *row = kept + (LINE_BLOCKS - 1) * LINE_BLOCKS;
    int64_t first = 0;
    while (first < LINE_BLOCKS && row[first]) {
        first++;
    }
    assert_in_range(first, 25, 34);
    for (int64_t j = first; j < LINE_BLOCKS; j++) {
        if (row[j] != (j == LINE_BLOCKS - 1)) {
            fail_msg("the last query block keeps the first %lld key blocks; of block %lld: %d", (long long)first, (long long)j, row[j]);
        }
    }
}

/* All of the attention is covered by all blocks, whatever the rounding of sums. */
static void whole_share(void **state)
{
    (void)state;
    static float q[LINE_TOKENS * 4], k[LINE_TOKENS * 4];
    static uint8_t kept[LINE_BLOCKS * LINE_BLOCKS];
    attn_random random;
    for (uint64_t seed = 1; seed <= 10; seed++) {
        attn_random_seed(&random, seed);
        for (int i = 0; i < LINE_TOKENS * 4; i++) {
            q[i] = (float)attn_random_normal(&random);
            k[i] = (float)attn_random_normal(&random);
        }
        for (int aware = 0; aware < 2; aware++) {
            int64_t pattern;
            choose(aware ? "flexprefill:block=16,min_budget=1,gamma=1,tau=9" : "flexprefill:block=16,min_budget=1,gamma=1,tau=0", q, k, kept,
                   &pattern);
            assert_int_equal(pattern, 1 + aware);
            for (int64_t i = 0; i < LINE_BLOCKS * LINE_BLOCKS; i++) {
                if (kept[i] != (i % LINE_BLOCKS <= i / LINE_BLOCKS)) {
                    fail_msg("seed %d, pattern %d: block %lld of query block %lld: %d", (int)seed, 1 + aware, (long long)(i % LINE_BLOCKS),
                             (long long)(i / LINE_BLOCKS), kept[i]);
                }
            }
        }
    }
}

/* A query that is no number has no output that is one, however few queries there are. */
static void no_numbers(void **state)
{
    (void)state;
    static float q[70 * 8], k[200 * 8], v[200 * 8], o[70 * 8], lse[70];
    const char *specs[] = {"streaming:recent=50", "topk:top_k=5", "topk.blocks:top_k=2"};
    const int64_t queries[] = {1, 3, 70};
    q[1] = NAN;
    for (int i = 0; i < 9; i++) {
        int64_t n = queries[i / 3];
        attn_named_tensor in[] = {{"q", attn_tensor_make(q, ATTN_F32, 4, (int64_t[]){1, 1, n, 8})},
                                  {"k", attn_tensor_make(k, ATTN_F32, 4, (int64_t[]){1, 1, 200, 8})},
                                  {"v", attn_tensor_make(v, ATTN_F32, 4, (int64_t[]){1, 1, 200, 8})}};
        attn_named_tensor out[] = {{"o", attn_tensor_make(o, ATTN_F32, 4, (int64_t[]){1, 1, n, 8})},
                                   {"lse", attn_tensor_make(lse, ATTN_F32, 3, (int64_t[]){1, 1, n})}};
        attn_op *op;
        assert_int_equal(attn_op_create(&op, specs[i % 3]), ATTN_OK);
        assert_int_equal(attn_op_forward(op, in, 3, out, 2, NULL), ATTN_OK);
        attn_op_destroy(op);
        if (!isnan(o[0]) || !isnan(lse[0]) || (n > 1 && o[8] != 0)) {
            fail_msg("%s, %lld queries: o = %g, lse = %g, expected NaN; o of the next query %g", specs[i % 3], (long long)n, (double)o[0],
                     (double)lse[0], (double)o[8]);
        }
    }
}

/* Heads have a pattern although there are no queries. */
static void pattern_of_nothing(void **state)
{
    (void)state;
    int64_t pattern[3] = {7, 7, 7};
    attn_named_tensor in[] = {{"q", attn_tensor_make(NULL, ATTN_F32, 4, (int64_t[]){1, 3, 0, 4})},
                              {"k", attn_tensor_make(NULL, ATTN_F32, 4, (int64_t[]){1, 1, 0, 4})},
                              {"v", attn_tensor_make(NULL, ATTN_F32, 4, (int64_t[]){1, 1, 0, 4})}};
    attn_named_tensor out = {"pattern", attn_tensor_make(pattern, ATTN_I64, 2, (int64_t[]){1, 3})};
    attn_op *op;
    assert_int_equal(attn_op_create(&op, "flexprefill"), ATTN_OK);
    assert_int_equal(attn_op_forward(op, in, 3, &out, 1, NULL), ATTN_OK);
    attn_op_destroy(op);
    for (int h = 0; h < 3; h++) {
        assert_int_equal(pattern[h], 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(gradients), cmocka_unit_test(lengths), cmocka_unit_test(topk_gradients),
                                       cmocka_unit_test(empty_shapes), cmocka_unit_test(errors),
                                       cmocka_unit_test(plans), cmocka_unit_test(equal_lines), cmocka_unit_test(whole_share),
                                       cmocka_unit_test(pattern_of_nothing), cmocka_unit_test(no_numbers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
