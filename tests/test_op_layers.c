/* Mechanisms made of shared layers: gradients against differences on shapes that the golden cases do not have, and errors. */
#include "opcheck.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#define SHAPE(...) (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void moh_inputs(opcheck_case *c, int64_t heads, int64_t kv_heads, int64_t n, int64_t m, int64_t shared, int64_t chosen, int out)
{
    opcheck_input(c, "x", SHAPE(2, n, 10));
    opcheck_input(c, "q", SHAPE(2, heads, n, 6));
    opcheck_input(c, "k", SHAPE(2, kv_heads, m, 6));
    opcheck_input(c, "v", SHAPE(2, kv_heads, m, 5));
    if (chosen > 0) {
        opcheck_input(c, "wg", SHAPE(heads - shared, 10));
    }
    if (chosen > 0 && shared > 0) {
        opcheck_input(c, "wg_0", SHAPE(2, 10));
    }
    if (shared > 1) {
        opcheck_input(c, "wg_1", SHAPE(shared, 10));
    }
    if (out) {
        opcheck_input(c, "w_out", SHAPE(7, heads * 5));
        opcheck_input(c, "b_out", SHAPE(7));
    }
}

static void test_moh(void **state)
{
    (void)state;
    opcheck_case a = {.spec = "moh:shared_heads=2,top_k=3,causal=true", .seed = 1, .step = 1e-3};
    moh_inputs(&a, 8, 4, 9, 13, 2, 3, 1);
    opcheck_run(&a, 3e-2);
    opcheck_case b = {.spec = "moh:shared_heads=0,top_k=2,gate_norm=paper,scale=0.7", .seed = 2, .step = 1e-3};
    moh_inputs(&b, 5, 5, 11, 7, 0, 2, 0);
    opcheck_run(&b, 3e-2);
    opcheck_case c = {.spec = "moh:shared_heads=1,top_k=2,gate_norm=paper", .seed = 3, .step = 1e-3};
    moh_inputs(&c, 4, 1, 5, 300, 1, 2, 1);
    opcheck_run(&c, 3e-2);
    opcheck_case d = {.spec = "moh:shared_heads=3,top_k=0,causal=true", .seed = 4};
    moh_inputs(&d, 3, 3, 8, 4, 3, 0, 1); /* the first queries see no key */
    opcheck_run(&d, 3e-2);
    opcheck_case e = {.spec = "moh:shared_heads=1,top_k=1,causal=true,decode=true", .seed = 5, .step = 1e-3};
    moh_inputs(&e, 4, 2, 6, 9, 1, 1, 1);
    opcheck_run(&e, 3e-2);
    opcheck_case f = {.spec = "moh.norm_gates:shared_heads=1,top_k=2", .seed = 6, .step = 3e-3};
    opcheck_input(&f, "q_route", SHAPE(2, 5, 6, 4));
    opcheck_run(&f, 3e-2);
}

static void test_moh_errors(void **state)
{
    (void)state;
    opcheck_case a = {.spec = "moh:shared_heads=2,top_k=3", .seed = 1};
    moh_inputs(&a, 4, 4, 3, 3, 2, 3, 0);
    opcheck_fails(&a, ATTN_ERR_ARGUMENT, "top_k = 3");
    opcheck_case b = {.spec = "moh:shared_heads=2,top_k=0", .seed = 1};
    moh_inputs(&b, 4, 4, 3, 3, 2, 0, 0);
    opcheck_fails(&b, ATTN_ERR_ARGUMENT, "top_k = 0");
    opcheck_case c = {.spec = "moh:shared_heads=2,top_k=1", .seed = 1};
    moh_inputs(&c, 4, 4, 3, 3, 2, 0, 0);
    opcheck_fails(&c, ATTN_ERR_ARGUMENT, "wg is missing");
    opcheck_case d = {.spec = "moh:shared_heads=0,top_k=1", .seed = 1};
    moh_inputs(&d, 4, 4, 3, 3, 2, 1, 0);
    opcheck_fails(&d, ATTN_ERR_SHAPE, "wg has 2 rows");
    opcheck_case e = {.spec = "moh:shared_heads=1,top_k=1,decode=true", .seed = 1};
    moh_inputs(&e, 4, 4, 3, 3, 1, 1, 0);
    opcheck_fails(&e, ATTN_ERR_ARGUMENT, "causal");
}

static void moa_inputs(opcheck_case *c, int64_t experts, int64_t sets, int64_t heads, int64_t kv_heads, int64_t n)
{
    opcheck_input(c, "x", SHAPE(2, n, 6));
    opcheck_input(c, "w_router", SHAPE(experts, 6));
    opcheck_uniform(c, "w_q", SHAPE(experts, heads * 4, 6), -0.6, 0.6);
    opcheck_uniform(c, "w_k", SHAPE(sets, kv_heads * 4, 6), -0.6, 0.6);
    opcheck_uniform(c, "w_v", SHAPE(sets, kv_heads * 3, 6), -0.6, 0.6);
    opcheck_uniform(c, "w_o", SHAPE(experts, 6, heads * 3), -0.6, 0.6);
}

static void test_bam(void **state)
{
    (void)state;
    opcheck_case a = {.spec = "bam.moa:heads=4,kv_heads=2,rope_theta=100,rope_style=interleaved", .seed = 1, .step = 3e-3};
    moa_inputs(&a, 3, 1, 4, 2, 7);
    opcheck_run(&a, 3e-2);
    opcheck_case b = {.spec = "bam.moa:heads=2,kv_heads=1,causal=false,top_k=2,rope_theta=50,scale=0.3", .seed = 2, .step = 1e-3};
    moa_inputs(&b, 4, 4, 2, 1, 6);
    opcheck_run(&b, 3e-2);
    opcheck_case c = {.spec = "bam.moa:heads=2,kv_heads=2,top_k=1,decode=true", .seed = 3, .step = 1e-3};
    moa_inputs(&c, 3, 1, 2, 2, 5);
    opcheck_run(&c, 3e-2);
    opcheck_case d = {.spec = "bam.ffn:top_k=2", .seed = 4, .step = 1e-3};
    opcheck_input(&d, "x", SHAPE(2, 5, 6));
    opcheck_input(&d, "w_router", SHAPE(4, 6));
    opcheck_input(&d, "w_up", SHAPE(4, 10, 6));
    opcheck_input(&d, "w_down", SHAPE(4, 6, 5));
    opcheck_run(&d, 3e-2);
    opcheck_case e = {.spec = "bam.moa:heads=3,kv_heads=2", .seed = 5};
    moa_inputs(&e, 3, 1, 3, 2, 4);
    opcheck_fails(&e, ATTN_ERR_ARGUMENT, "not a multiple");
    opcheck_case f = {.spec = "bam.moa:heads=2,kv_heads=2,top_k=4", .seed = 5};
    moa_inputs(&f, 3, 1, 2, 2, 4);
    opcheck_fails(&f, ATTN_ERR_ARGUMENT, "top_k = 4");
    opcheck_case g = {.spec = "bam.moa:heads=2,kv_heads=2", .seed = 5};
    moa_inputs(&g, 3, 2, 2, 2, 4);
    opcheck_fails(&g, ATTN_ERR_SHAPE, "w_k");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_moh),
        cmocka_unit_test(test_moh_errors),
        cmocka_unit_test(test_bam),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
