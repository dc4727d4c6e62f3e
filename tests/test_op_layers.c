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
    opcheck_case g = {.spec = "moh:shared_heads=1,top_k=3,causal=true,decode=true", .seed = 7, .step = 1e-3};
    moh_inputs(&g, 6, 2, 30, 11, 1, 3, 0); /* many queries see no key */
    opcheck_run(&g, 3e-2);
    opcheck_case none = {.spec = "moh:shared_heads=2,top_k=0", .seed = 8}; /* heads without channels, whose scores are 0 */
    opcheck_input(&none, "x", SHAPE(1, 3, 4));
    opcheck_input(&none, "q", SHAPE(1, 2, 3, 0));
    opcheck_input(&none, "k", SHAPE(1, 2, 6, 0));
    opcheck_input(&none, "v", SHAPE(1, 2, 6, 5));
    opcheck_input(&none, "wg_1", SHAPE(2, 4));
    opcheck_run(&none, 3e-2);
}

/* The scores of two routed heads are constant: their gradient is 0, whatever the norms are. */
static void test_moh_two_norms(void **state)
{
    (void)state;
    enum { N = 200, D = 16 };
    static float q[2 * N * D], scores[N * 2], grad[2 * N * D];
    for (int i = 0; i < 2 * N * D; i++) {
        q[i] = 1 + 0.01f * (float)(i % 97);
    }
    for (int i = 0; i < 2 * N; i++) {
        scores[i] = (float)(i % 7);
    }
    attn_op *op;
    assert_int_equal(attn_op_create(&op, "moh.norm_gates:shared_heads=0,top_k=1"), ATTN_OK);
    attn_named_tensor in = {"q_route", attn_tensor_make(q, ATTN_F32, SHAPE(1, 2, N, D))};
    attn_named_tensor given = {"scores", attn_tensor_make(scores, ATTN_F32, SHAPE(1, N, 2))};
    attn_named_tensor to = {"q_route", attn_tensor_make(grad, ATTN_F32, SHAPE(1, 2, N, D))};
    assert_int_equal(attn_op_backward(op, &in, 1, NULL, 0, &given, 1, &to, 1, NULL), ATTN_OK);
    for (int i = 0; i < 2 * N * D; i++) {
        if (!(fabsf(grad[i]) < 1e-6f)) {
            fail_msg("grad_q_route[%d] is %g, expected 0", i, (double)grad[i]);
        }
    }
    attn_op_destroy(op);
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
    opcheck_case none = {.spec = "bam.moa:heads=2,kv_heads=2", .seed = 5};
    moa_inputs(&none, 0, 1, 2, 2, 4);
    opcheck_fails(&none, ATTN_ERR_SHAPE, "E = 0 experts");
    static const char *const specs[] = {"bam:heads=2,kv_heads=2,attn_top_k=4", "bam:heads=2,kv_heads=2,ffn_top_k=4"};
    static const char *const words[] = {"attn_top_k = 4", "ffn_top_k = 4"};
    for (int i = 0; i < 2; i++) {
        opcheck_case h = {.spec = specs[i], .seed = 5};
        moa_inputs(&h, 3, 1, 2, 2, 4);
        h.in[1].name = "w_router_attn";
        opcheck_input(&h, "w_router_ffn", SHAPE(3, 6));
        opcheck_input(&h, "ln_w", SHAPE(6));
        opcheck_input(&h, "w_up", SHAPE(3, 4, 6));
        opcheck_input(&h, "w_down", SHAPE(3, 6, 2));
        opcheck_fails(&h, ATTN_ERR_ARGUMENT, words[i]);
    }
}

static void rcmha_inputs(opcheck_case *c, int64_t n, int64_t memory, int64_t heads, int per_head)
{
    opcheck_input(c, "x", SHAPE(2, n, 5));
    if (memory > 0) {
        opcheck_input(c, "mem", SHAPE(2, memory, 5));
    }
    opcheck_input(c, "w_q", SHAPE(heads * 4, 5));
    opcheck_input(c, "w_k", SHAPE(heads * 4, 5));
    opcheck_input(c, "w_v", SHAPE(heads * 4, 5));
    opcheck_input(c, "b_q", SHAPE(heads * 4));
    opcheck_input(c, "b_v", SHAPE(heads * 4));
    static const char *const taps[] = {"conv_q_w", "conv_k_w", "conv_v_w"};
    for (int i = 0; i < 3; i++) {
        if (per_head) {
            opcheck_uniform(c, taps[i], SHAPE(heads, 4, 4), -0.5, 0.5);
        } else {
            opcheck_uniform(c, taps[i], SHAPE(4, 4), -0.5, 0.5);
        }
    }
    opcheck_input(c, "conv_v_b", SHAPE(heads, 4));
    opcheck_uniform(c, "rel_emb", SHAPE(2 * (n + memory), heads, 4), -0.5, 0.5);
    opcheck_input(c, "rel_bias", SHAPE(2 * (n + memory), heads));
    opcheck_input(c, "q_bias", SHAPE(heads, 4));
    opcheck_input(c, "w_o", SHAPE(3, heads * 4));
}

static void test_rcmha(void **state)
{
    (void)state;
    opcheck_case a = {.spec = "rcmha:heads=2,q_history=mem", .seed = 1, .step = 3e-3};
    rcmha_inputs(&a, 5, 7, 2, 1);
    opcheck_run(&a, 3e-2);
    opcheck_case b = {.spec = "rcmha:heads=3,q_history=mem,causal=false", .seed = 2, .step = 3e-3};
    rcmha_inputs(&b, 6, 1, 3, 0); /* memory shorter than the taps */
    opcheck_run(&b, 3e-2);
    opcheck_case c = {.spec = "rcmha:heads=2,decode=true,scale=0.2", .seed = 3, .step = 3e-3};
    rcmha_inputs(&c, 9, 0, 2, 0);
    opcheck_run(&c, 3e-2);
    opcheck_case d = {.spec = "rcmha.core", .seed = 4, .step = 3e-3, .samples = 5};
    opcheck_input(&d, "q", SHAPE(1, 4, 150, 6));
    opcheck_input(&d, "k", SHAPE(1, 2, 310, 6)); /* several tiles */
    opcheck_input(&d, "v", SHAPE(1, 2, 310, 7));
    opcheck_input(&d, "rel_emb", SHAPE(620, 4, 6));
    opcheck_input(&d, "rel_bias", SHAPE(620, 4));
    opcheck_run(&d, 3e-2);
    opcheck_case e = {.spec = "rcmha.core:causal=false", .seed = 5, .step = 3e-3};
    opcheck_input(&e, "q", SHAPE(2, 2, 20, 3));
    opcheck_input(&e, "k", SHAPE(2, 1, 9, 3));
    opcheck_input(&e, "v", SHAPE(2, 1, 9, 2));
    opcheck_input(&e, "rel_emb", SHAPE(40, 2, 3));
    opcheck_input(&e, "q_bias", SHAPE(2, 3));
    opcheck_run(&e, 3e-2);
    opcheck_case f = {.spec = "rcmha.dconv", .seed = 6};
    opcheck_input(&f, "x", SHAPE(2, 3, 5, 4));
    opcheck_input(&f, "w", SHAPE(3, 4, 3));
    opcheck_input(&f, "b", SHAPE(4));
    opcheck_input(&f, "state", SHAPE(2, 3, 2, 4));
    opcheck_run(&f, 1e-2);
    opcheck_case g = {.spec = "rcmha.core", .seed = 7};
    opcheck_input(&g, "q", SHAPE(1, 2, 9, 3));
    opcheck_input(&g, "k", SHAPE(1, 2, 9, 3));
    opcheck_input(&g, "v", SHAPE(1, 2, 9, 3));
    opcheck_input(&g, "rel_emb", SHAPE(16, 2, 3));
    opcheck_fails(&g, ATTN_ERR_SHAPE, "P = 8");
    opcheck_case alone = {.spec = "rcmha.core", .seed = 9, .step = 3e-3};
    opcheck_input(&alone, "q", SHAPE(1, 4, 20, 3));
    opcheck_input(&alone, "k", SHAPE(1, 2, 24, 3));
    opcheck_input(&alone, "v", SHAPE(1, 2, 24, 2));
    opcheck_input(&alone, "rel_bias", SHAPE(50, 4));
    opcheck_run(&alone, 3e-2);
    opcheck_case odd = {.spec = "rcmha.core", .seed = 10};
    opcheck_input(&odd, "q", SHAPE(1, 2, 3, 3));
    opcheck_input(&odd, "k", SHAPE(1, 2, 3, 3));
    opcheck_input(&odd, "v", SHAPE(1, 2, 3, 3));
    opcheck_input(&odd, "rel_bias", SHAPE(7, 2));
    opcheck_fails(&odd, ATTN_ERR_SHAPE, "rel_bias has 7 rows");
    opcheck_case layer = {.spec = "rcmha:heads=2", .seed = 11};
    opcheck_input(&layer, "x", SHAPE(1, 4, 5));
    opcheck_input(&layer, "w_q", SHAPE(8, 5));
    opcheck_input(&layer, "w_k", SHAPE(8, 5));
    opcheck_input(&layer, "w_v", SHAPE(8, 5));
    opcheck_input(&layer, "rel_bias", SHAPE(8, 2));
    opcheck_input(&layer, "w_o", SHAPE(3, 8));
    opcheck_fails(&layer, ATTN_ERR_ARGUMENT, "rel_bias needs rel_emb");
    opcheck_case h = {.spec = "rcmha:heads=2,decode=true,causal=false", .seed = 8};
    rcmha_inputs(&h, 4, 0, 2, 0);
    opcheck_fails(&h, ATTN_ERR_ARGUMENT, "causal");
}

static void test_rat(void **state)
{
    (void)state;
    opcheck_case a = {.spec = "rat:chunk=3,rotary_dim=4,head_map=tiled", .seed = 1, .step = 3e-3};
    opcheck_input(&a, "q", SHAPE(2, 2, 11, 5));
    opcheck_input(&a, "k", SHAPE(2, 1, 11, 5));
    opcheck_input(&a, "v", SHAPE(2, 4, 11, 5));
    opcheck_uniform(&a, "g", SHAPE(2, 4, 11, 5), 0, 1);
    opcheck_run(&a, 3e-2);
    opcheck_case b = {.spec = "rat:chunk=1,rotary_base=100,scale=0.3", .seed = 2, .step = 3e-3};
    opcheck_input(&b, "q", SHAPE(1, 3, 150, 4));
    opcheck_input(&b, "k", SHAPE(1, 3, 150, 4));
    opcheck_input(&b, "v", SHAPE(1, 3, 150, 4));
    opcheck_uniform(&b, "g", SHAPE(1, 3, 150, 4), 0, 1);
    opcheck_run(&b, 3e-2);
    /* Long and wide enough for several tiles, in which chunks go on; and a layer in several parts. */
    opcheck_case tiles = {.spec = "rat:chunk=100", .seed = 8, .step = 3e-2, .samples = 3};
    opcheck_input(&tiles, "q", SHAPE(8, 4, 260, 32));
    opcheck_input(&tiles, "k", SHAPE(8, 2, 260, 32));
    opcheck_input(&tiles, "v", SHAPE(8, 8, 260, 32));
    opcheck_uniform(&tiles, "g", SHAPE(8, 8, 260, 32), 0.5, 1);
    opcheck_run(&tiles, 5e-2);
    opcheck_case parts = {.spec = "rat.layer:heads=2,groups=1,chunk=60", .seed = 9, .step = 3e-3, .samples = 3};
    opcheck_input(&parts, "x", SHAPE(2, 1040, 8));
    opcheck_input(&parts, "norm_w", SHAPE(8));
    opcheck_uniform(&parts, "w_in", SHAPE(32, 8), -0.4, 0.4);
    opcheck_input(&parts, "gate_bias", SHAPE(8));
    opcheck_uniform(&parts, "w_o", SHAPE(8, 8), -0.4, 0.4);
    opcheck_run(&parts, 5e-2);
    opcheck_case c = {.spec = "rat.scan", .seed = 3, .step = 3e-3};
    opcheck_input(&c, "x", SHAPE(2, 7, 3));
    opcheck_uniform(&c, "g", SHAPE(2, 7, 3), 0, 1);
    opcheck_input(&c, "state", SHAPE(2, 3));
    opcheck_run(&c, 3e-2);
    opcheck_case d = {.spec = "rat.local:window=3,rotary_dim=4", .seed = 4, .step = 3e-3};
    opcheck_input(&d, "q", SHAPE(2, 4, 9, 6));
    opcheck_input(&d, "k", SHAPE(2, 2, 9, 6));
    opcheck_input(&d, "v", SHAPE(2, 2, 9, 6));
    opcheck_run(&d, 3e-2);
    opcheck_case e = {.spec = "rat.hybrid:heads=2,groups=1,chunk=3,window=2,interleave=3", .seed = 5, .step = 3e-3, .samples = 10};
    opcheck_input(&e, "x", SHAPE(1, 7, 8));
    opcheck_input(&e, "rat_norm", SHAPE(2, 8));
    opcheck_uniform(&e, "rat_in", SHAPE(2, 32, 8), -0.4, 0.4);
    opcheck_input(&e, "rat_gate_bias", SHAPE(2, 8));
    opcheck_uniform(&e, "rat_out", SHAPE(2, 8, 8), -0.4, 0.4);
    opcheck_input(&e, "local_norm", SHAPE(2, 8));
    opcheck_uniform(&e, "local_in", SHAPE(2, 24, 8), -0.4, 0.4);
    opcheck_uniform(&e, "local_out", SHAPE(2, 8, 8), -0.4, 0.4);
    opcheck_input(&e, "ffn_norm", SHAPE(4, 8));
    opcheck_uniform(&e, "ffn_1", SHAPE(4, 10, 8), -0.4, 0.4);
    opcheck_uniform(&e, "ffn_2", SHAPE(4, 8, 10), -0.4, 0.4);
    opcheck_input(&e, "final_norm", SHAPE(8));
    opcheck_run(&e, 3e-2);
    opcheck_case f = {.spec = "rat:chunk=2", .seed = 6};
    opcheck_input(&f, "q", SHAPE(1, 2, 4, 5));
    opcheck_input(&f, "k", SHAPE(1, 2, 4, 5));
    opcheck_input(&f, "v", SHAPE(1, 2, 4, 5));
    opcheck_input(&f, "g", SHAPE(1, 2, 4, 5));
    opcheck_fails(&f, ATTN_ERR_ARGUMENT, "rotary_dim = 5");
    opcheck_case g = {.spec = "rat.decode:chunk=2,steps=3", .seed = 7};
    opcheck_input(&g, "q", SHAPE(1, 2, 4, 4));
    opcheck_input(&g, "k", SHAPE(1, 2, 4, 4));
    opcheck_input(&g, "v", SHAPE(1, 2, 4, 4));
    opcheck_input(&g, "g", SHAPE(1, 2, 4, 4));
    opcheck_fails(&g, ATTN_ERR_SHAPE, "k_end holds 0");
}

static void test_dsf(void **state)
{
    (void)state;
    opcheck_case a = {.spec = "dsf:mix=true", .seed = 1, .step = 3e-3};
    opcheck_input(&a, "u", SHAPE(2, 5, 3));
    opcheck_uniform(&a, "lam", SHAPE(2, 5, 4), 0, 1);
    opcheck_input(&a, "bm", SHAPE(2, 5, 4, 3));
    opcheck_input(&a, "cm", SHAPE(2, 5, 2, 4));
    opcheck_input(&a, "dm", SHAPE(2, 5, 2, 3));
    opcheck_input(&a, "h0", SHAPE(2, 4));
    opcheck_run(&a, 3e-2);
    for (int form = 0; form < 4; form++) { /* which axes of the decay are broadcast */
        opcheck_case b = {.spec = "dsf.scan", .seed = 10 + (uint64_t)form, .step = 3e-3, .samples = 4};
        opcheck_input(&b, "v", SHAPE(2, 2, 34, 35));
        opcheck_input(&b, "b", SHAPE(2, 2, 34, 4));
        opcheck_input(&b, "c", SHAPE(2, 2, 34, 4));
        opcheck_uniform(&b, "lam", SHAPE(2, 2, 34, form & 1 ? 35 : 1, form & 2 ? 4 : 1), 0.5, 1);
        if (form > 0) {
            opcheck_input(&b, "gain", SHAPE(2, 2, 34, form & 1 ? 35 : 1));
            opcheck_input(&b, "skip", SHAPE(2, 35));
            opcheck_input(&b, "h0", SHAPE(2, 2, 35, 4));
        }
        opcheck_run(&b, 3e-2);
    }
    static const char *const specs[] = {"dsf.attention:eta=softplus", "dsf.attention:eta=sigmoid,phi=elu1", "dsf.attention:eta=sum,phi=elu1",
                                        "dsf.attention:phi=taylor,order=3,eta=none", "dsf.attention:phi=taylor,order=2,eta=sum,decode=true",
                                        "dsf.attention:eta=exp,phi=taylor,order=0"};
    for (int i = 0; i < 6; i++) {
        opcheck_case c = {.spec = specs[i], .seed = 20 + (uint64_t)i, .step = 3e-3, .samples = 5};
        opcheck_input(&c, "q", SHAPE(1, 4, 66, 3));
        opcheck_input(&c, "k", SHAPE(1, 2, 66, 3));
        opcheck_input(&c, "v", SHAPE(1, 2, 66, 5));
        opcheck_input(&c, "n", SHAPE(1, 4, 66));
        opcheck_run(&c, 3e-2);
    }
    opcheck_case d = {.spec = "dsf.s6", .seed = 30, .step = 3e-3};
    opcheck_input(&d, "u", SHAPE(2, 9, 4));
    opcheck_input(&d, "dt", SHAPE(2, 9, 1));
    opcheck_input(&d, "dt_bias", SHAPE(4));
    opcheck_input(&d, "A_log", SHAPE(1, 1));
    opcheck_input(&d, "b", SHAPE(2, 9, 3));
    opcheck_input(&d, "c", SHAPE(2, 9, 3));
    opcheck_input(&d, "h0", SHAPE(2, 4, 3));
    opcheck_run(&d, 3e-2);
    opcheck_case wide = {.spec = "dsf.s6", .seed = 33, .step = 3e-3, .samples = 5}; /* spans of tokens, blocks of channels */
    opcheck_input(&wide, "u", SHAPE(2, 67, 70));
    opcheck_input(&wide, "dt", SHAPE(2, 67, 70));
    opcheck_input(&wide, "A_log", SHAPE(70, 3));
    opcheck_input(&wide, "b", SHAPE(2, 67, 3));
    opcheck_input(&wide, "c", SHAPE(2, 67, 3));
    opcheck_input(&wide, "skip", SHAPE(70));
    opcheck_run(&wide, 3e-2);
    opcheck_case e = {.spec = "dsf.s6_layer", .seed = 31, .step = 3e-3};
    opcheck_input(&e, "x", SHAPE(2, 6, 5));
    opcheck_uniform(&e, "w_x", SHAPE(8, 5), -0.6, 0.6);
    opcheck_uniform(&e, "w_dt", SHAPE(5, 2), -0.6, 0.6);
    opcheck_input(&e, "dt_bias", SHAPE(5));
    opcheck_input(&e, "A_log", SHAPE(5, 3));
    opcheck_input(&e, "skip", SHAPE(5));
    opcheck_input(&e, "w_out", SHAPE(4, 5));
    opcheck_run(&e, 3e-2);
    for (int reversed = 0; reversed < 2; reversed++) {
        opcheck_case f = {.spec = reversed ? "dsf.qlstm" : "dsf.qlstm:reversed=false", .seed = 32, .step = 3e-3};
        opcheck_input(&f, "x", SHAPE(2, 6, 4));
        opcheck_input(&f, "w_gates", SHAPE(12, 4));
        opcheck_input(&f, "b_gates", SHAPE(12));
        opcheck_uniform(&f, "alpha", SHAPE(1), 0.5, 1.5); /* without effect on the plain form */
        opcheck_input(&f, "h0", SHAPE(2, 4));
        opcheck_run(&f, 3e-2);
    }
    opcheck_case g = {.spec = "dsf.rglru:c=2", .seed = 33, .step = 3e-3};
    opcheck_input(&g, "x", SHAPE(2, 6, 4));
    opcheck_input(&g, "r", SHAPE(2, 6, 4));
    opcheck_input(&g, "g", SHAPE(2, 6, 4));
    opcheck_input(&g, "a_param", SHAPE(4));
    opcheck_input(&g, "h0", SHAPE(2, 4));
    opcheck_run(&g, 3e-2);
    opcheck_case h = {.spec = "dsf.attention:eta=exp", .seed = 34};
    opcheck_input(&h, "q", SHAPE(1, 1, 3, 2));
    opcheck_input(&h, "k", SHAPE(1, 1, 3, 2));
    opcheck_input(&h, "v", SHAPE(1, 1, 3, 2));
    opcheck_fails(&h, ATTN_ERR_ARGUMENT, "need the input n");
    opcheck_case i = {.spec = "dsf.mqar:length=8", .seed = 35};
    opcheck_whole(&i, "keys", SHAPE(1, 2), 1, 9);
    opcheck_whole(&i, "values", SHAPE(1, 2), 1, 9);
    opcheck_whole(&i, "gaps", SHAPE(1, 2), 7, 7);
    opcheck_fails(&i, ATTN_ERR_ARGUMENT, "gaps[0,0] = 7");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_moh),
        cmocka_unit_test(test_moh_errors),
        cmocka_unit_test(test_moh_two_norms),
        cmocka_unit_test(test_bam),
        cmocka_unit_test(test_rcmha),
        cmocka_unit_test(test_rat),
        cmocka_unit_test(test_dsf),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
