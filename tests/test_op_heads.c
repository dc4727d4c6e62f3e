/* Mechanisms that analyse and steer heads: gradients against differences, thread counts, claims of their papers, errors. */
#include <attn/op.h>

#include "opcheck.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SHAPE(...) (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void attention_inputs(opcheck_case *c, int64_t heads, int64_t kv_heads, int64_t n, int64_t m)
{
    opcheck_input(c, "q", SHAPE(2, heads, n, 6));
    opcheck_input(c, "k", SHAPE(2, kv_heads, m, 6));
    opcheck_input(c, "v", SHAPE(2, kv_heads, m, 5));
}

static void test_softpag_gradients(void **state)
{
    (void)state;
    const char *const specs[] = {"softpag:u=0.3",
                                 "softpag:u=1",
                                 "softpag:u=0.6,target=uniform",
                                 "softpag:u=0.7,target=query_mean,tokens=[3,9]",
                                 "softpag:u=1,target=query_mean",
                                 "softpag:u=0.4,target=temperature,tau=0.5",
                                 "softpag:u=0.5,target=max"};
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        opcheck_case c = {.spec = specs[i], .seed = i + 1, .samples = 12};
        attention_inputs(&c, 4, 2, 13, 13);
        opcheck_bool(&c, "heads", SHAPE(4), 0.7);
        opcheck_run(&c, strstr(specs[i], "max") == NULL ? 1e-2 : 0); /* an arg-maximum may jump */
    }
}

static void test_softpag_paths_meet(void **state)
{
    (void)state;
    const char *const paths[] = {"linear", "slerp", "hellinger", "log_linear"};
    for (int p = 0; p < 4; p++) {
        for (int end = 0; end < 2; end++) {
            char spec[80];
            snprintf(spec, sizeof spec, "softpag:u=%d,path=%s", end, paths[p]);
            opcheck_case c = {.spec = spec, .seed = 3};
            attention_inputs(&c, 2, 2, 7, 7);
            attn_op *op, *dense;
            assert_int_equal(attn_op_create(&op, spec), ATTN_OK);
            assert_int_equal(attn_op_create(&dense, "dense"), ATTN_OK);
            float got[2 * 2 * 7 * 5], want[2 * 2 * 7 * 5];
            attn_named_tensor to = {"o", attn_tensor_make(got, ATTN_F32, SHAPE(2, 2, 7, 5))};
            attn_named_tensor exact = {"o", attn_tensor_make(want, ATTN_F32, SHAPE(2, 2, 7, 5))};
            assert_int_equal(attn_op_forward(op, c.in, 3, &to, 1, NULL), ATTN_OK);
            assert_int_equal(attn_op_forward(dense, c.in, 3, &exact, 1, NULL), ATTN_OK);
            const float *end_value = end ? c.in[2].tensor.data : want;
            for (int i = 0; i < 2 * 2 * 7 * 5; i++) {
                if (fabsf(got[i] - end_value[i]) > 1e-4f) {
                    fail_msg("%s: o[%d] = %g, expected %g", spec, i, (double)got[i], (double)end_value[i]);
                }
            }
            attn_op_destroy(op);
            attn_op_destroy(dense);
            for (int i = 0; i < 3; i++) {
                free(c.in[i].tensor.data);
            }
        }
    }
}

static void test_softpag_errors(void **state)
{
    (void)state;
    opcheck_case square = {.spec = "softpag"};
    attention_inputs(&square, 2, 2, 7, 8);
    opcheck_fails(&square, ATTN_ERR_SHAPE, "as many keys as queries");
    opcheck_case path = {.spec = "softpag:path=slerp,target=uniform"};
    attention_inputs(&path, 2, 2, 7, 7);
    opcheck_fails(&path, ATTN_ERR_ARGUMENT, "need target = identity");
    opcheck_case range = {.spec = "softpag:target=query_mean,tokens=[4,9]"};
    attention_inputs(&range, 2, 2, 7, 7);
    opcheck_fails(&range, ATTN_ERR_ARGUMENT, "tokens = [4, 9]");
}

static void mrsa_inputs(opcheck_case *c, int64_t references)
{
    attention_inputs(c, 4, 2, 9, 11);
    opcheck_input(c, "k_ref", SHAPE(2, references, 2, 12, 6));
    opcheck_input(c, "v_ref", SHAPE(2, references, 2, 12, 5));
    float *mask = opcheck_uniform(c, "ref_mask", SHAPE(references, 7, 5), 0.1, 1);
    for (int64_t i = 0; i < references * 35; i += 3) {
        mask[i] = 0;
    }
}

static void test_mrsa_gradients(void **state)
{
    (void)state;
    const char *const specs[] = {"mrsa:grid=[3,4]", "mrsa:grid=[4,3],weights=[3,-1]", "mrsa:grid=[3,4],mode=mul,weights=[2,3]"};
    for (size_t i = 0; i < 3; i++) {
        opcheck_case c = {.spec = specs[i], .seed = i + 1, .samples = 12};
        mrsa_inputs(&c, 2);
        opcheck_run(&c, 1e-2);
    }
}

static void test_mrsa_errors(void **state)
{
    (void)state;
    opcheck_case grid = {.spec = "mrsa:grid=[3,3]"};
    mrsa_inputs(&grid, 1);
    opcheck_fails(&grid, ATTN_ERR_ARGUMENT, "does not hold the references' 12 tokens");
    opcheck_case weights = {.spec = "mrsa:grid=[3,4],weights=[1,2,3]"};
    mrsa_inputs(&weights, 2);
    opcheck_fails(&weights, ATTN_ERR_ARGUMENT, "weights has 3 items");
    opcheck_case width = {.spec = "mrsa:grid=[1,1]"};
    opcheck_input(&width, "q", SHAPE(1, 1, 2, 0));
    opcheck_input(&width, "k", SHAPE(1, 1, 2, 0));
    opcheck_input(&width, "v", SHAPE(1, 1, 2, 3));
    opcheck_input(&width, "k_ref", SHAPE(1, 1, 1, 1, 0));
    opcheck_input(&width, "v_ref", SHAPE(1, 1, 1, 1, 3));
    opcheck_input(&width, "ref_mask", SHAPE(1, 1, 1));
    opcheck_fails(&width, ATTN_ERR_SHAPE, "D = 0");
    opcheck_case steps = {.spec = "mrsa.noise:step=50"};
    opcheck_input(&steps, "z_ref", SHAPE(2, 3));
    opcheck_input(&steps, "eps", SHAPE(2, 3));
    opcheck_fails(&steps, ATTN_ERR_ARGUMENT, "step < steps");
}

static void test_disendiff_gradients(void **state)
{
    (void)state;
    opcheck_case loss = {.spec = "disendiff:grid=[5,6],power=3,sigma=0.8,kernel=5", .seed = 6, .step = 1e-3, .samples = 60,
                         .only_output = "loss"};
    opcheck_uniform(&loss, "attn", SHAPE(2, 2, 30, 9), 0, 1);
    int64_t *modifier = opcheck_whole(&loss, "modifier", SHAPE(2, 2), 0, 0);
    modifier[0] = 1, modifier[1] = 4, modifier[2] = modifier[3] = -1;
    opcheck_run(&loss, 0); /* bind holds the class maps constant, so differences do not give its gradient */
    opcheck_case attention = {.spec = "disendiff.attention:freeze=0", .seed = 2, .samples = 12};
    opcheck_input(&attention, "q", SHAPE(2, 4, 5, 6));
    opcheck_input(&attention, "k", SHAPE(2, 2, 7, 6));
    opcheck_input(&attention, "v", SHAPE(2, 2, 7, 5));
    opcheck_run(&attention, 1e-2);
    opcheck_case blocks = {.spec = "disendiff.attention:freeze=0,scale=0.5", .seed = 4, .samples = 8}; /* of rows, and panels of tokens */
    opcheck_input(&blocks, "q", SHAPE(1, 2, 101, 9));
    opcheck_input(&blocks, "k", SHAPE(1, 1, 77, 9));
    opcheck_input(&blocks, "v", SHAPE(1, 1, 77, 16));
    opcheck_run(&blocks, 1e-2);
    opcheck_case train = {.spec = "disendiff.train:grid=[3,4],freeze=0", .seed = 3, .samples = 12, .step = 1e-2};
    opcheck_input(&train, "q", SHAPE(2, 1, 2, 12, 6));
    opcheck_input(&train, "k", SHAPE(2, 1, 2, 7, 6));
    opcheck_input(&train, "v", SHAPE(2, 1, 2, 7, 5));
    modifier = opcheck_whole(&train, "modifier", SHAPE(1, 2), 0, 0);
    modifier[0] = 1, modifier[1] = 4;
    opcheck_run(&train, 0);
}

static void test_disendiff_errors(void **state)
{
    (void)state;
    opcheck_case partial = {.spec = "disendiff:grid=[2,3]"};
    opcheck_uniform(&partial, "attn", SHAPE(1, 1, 6, 5), 0, 1);
    int64_t *modifier = opcheck_whole(&partial, "modifier", SHAPE(1, 2), 0, 0);
    modifier[0] = 1, modifier[1] = -1;
    opcheck_fails(&partial, ATTN_ERR_ARGUMENT, "modifier[0, 1] = -1");
    opcheck_case last = {.spec = "disendiff:grid=[2,3]"};
    opcheck_uniform(&last, "attn", SHAPE(1, 1, 6, 5), 0, 1);
    opcheck_whole(&last, "modifier", SHAPE(1, 1), 4, 4);
    opcheck_fails(&last, ATTN_ERR_ARGUMENT, "modifier[0, 0] = 4");
    opcheck_case even = {.spec = "disendiff:grid=[4,4],kernel=2"};
    opcheck_uniform(&even, "attn", SHAPE(1, 1, 16, 5), 0, 1);
    opcheck_whole(&even, "modifier", SHAPE(1, 1), 1, 1);
    opcheck_fails(&even, ATTN_ERR_ARGUMENT, "odd");
}

static void test_retrieval_errors(void **state)
{
    (void)state;
    opcheck_case keys = {.spec = "retrieval_head:needle_start=1,needle_end=3"};
    opcheck_input(&keys, "q", SHAPE(1, 2, 3, 4));
    opcheck_input(&keys, "k", SHAPE(1, 1, 9, 4));
    opcheck_whole(&keys, "prompt", SHAPE(8), 0, 5);
    opcheck_whole(&keys, "generated", SHAPE(3), 0, 5);
    opcheck_fails(&keys, ATTN_ERR_SHAPE, "expected P + S - 1 = 10");
    opcheck_case needle = {.spec = "retrieval_head:needle_start=3,needle_end=3"};
    opcheck_input(&needle, "q", SHAPE(1, 2, 3, 4));
    opcheck_input(&needle, "k", SHAPE(1, 1, 10, 4));
    opcheck_whole(&needle, "prompt", SHAPE(8), 0, 5);
    opcheck_whole(&needle, "generated", SHAPE(3), 0, 5);
    opcheck_fails(&needle, ATTN_ERR_ARGUMENT, "needle_start < needle_end");
    opcheck_case room = {.spec = "retrieval_head.insert:depth=50,context_length=10,buffer=8"};
    opcheck_whole(&room, "context", SHAPE(20), 0, 5);
    opcheck_whole(&room, "needle", SHAPE(5), 0, 5);
    opcheck_fails(&room, ATTN_ERR_ARGUMENT, "has no room for a needle of 5 tokens");
}

static void test_retrieval_many_steps(void **state)
{
    (void)state;
    opcheck_case c = {.spec = "retrieval_head:needle_start=100,needle_end=140,top_k=5,mode=set", .seed = 4};
    opcheck_input(&c, "q", SHAPE(2, 6, 20, 8));
    opcheck_input(&c, "k", SHAPE(2, 2, 1219, 8));
    opcheck_whole(&c, "prompt", SHAPE(1200), 0, 9);
    opcheck_whole(&c, "generated", SHAPE(20), 0, 9);
    opcheck_run(&c, 0);
    opcheck_case mask = {.spec = "retrieval_head.mask", .seed = 5};
    attention_inputs(&mask, 4, 2, 9, 5); /* early queries see nothing */
    opcheck_bool(&mask, "heads", SHAPE(4), 0.5);
    opcheck_run(&mask, 0);
}

/* One output of a mechanism by its SPEC; `to` holds it. */
static void output_of(const char *spec, const opcheck_case *c, const char *name, attn_tensor to)
{
    attn_op *op;
    attn_named_tensor out = {name, to};
    assert_int_equal(attn_op_create(&op, spec), ATTN_OK);
    if (attn_op_forward(op, c->in, c->in_count, &out, 1, NULL) != ATTN_OK) {
        fail_msg("%s: %s", spec, attn_last_error());
    }
    attn_op_destroy(op);
}

static void free_inputs(opcheck_case *c)
{
    for (int i = 0; i < c->in_count; i++) {
        free(c->in[i].tensor.data);
    }
}

/* Sequences longer than the spans in which layers project them: the same token by token, and cut into memory and x. */
static void test_long_layers(void **state)
{
    (void)state;
    enum { N = 2100, CUT = 1070, C = 6 };
    static const char *const specs[] = {"rcmha:heads=2", "bam.moa:heads=2,kv_heads=2,top_k=1"};
    float *whole = calloc(N * C, sizeof *whole), *other = calloc(N * C, sizeof *other);
    assert_true(whole != NULL && other != NULL);
    for (int i = 0; i < 3; i++) {
        const char *spec = specs[i % 2];
        char again[80];
        int64_t n = i == 2 ? N : N / 2 + 20;
        opcheck_case c = {.spec = spec, .seed = 5};
        float *x = opcheck_input(&c, "x", SHAPE(1, n, C));
        if (i % 2 == 0) {
            opcheck_input(&c, "w_q", SHAPE(8, C)), opcheck_input(&c, "w_k", SHAPE(8, C)), opcheck_input(&c, "w_v", SHAPE(8, C));
            opcheck_input(&c, "conv_q_w", SHAPE(2, 4, 3)), opcheck_input(&c, "conv_k_w", SHAPE(4, 3)), opcheck_input(&c, "conv_v_w", SHAPE(4, 3));
            opcheck_input(&c, "w_o", SHAPE(C, 8));
        } else {
            opcheck_input(&c, "w_router", SHAPE(2, C)), opcheck_input(&c, "w_q", SHAPE(2, 8, C)), opcheck_input(&c, "w_k", SHAPE(1, 8, C));
            opcheck_input(&c, "w_v", SHAPE(1, 8, C)), opcheck_input(&c, "w_o", SHAPE(2, C, 8));
        }
        output_of(spec, &c, "y", attn_tensor_make(whole, ATTN_F32, SHAPE(1, n, C)));
        int64_t first = i == 2 ? CUT : 0;
        snprintf(again, sizeof again, "%s%s", spec, i == 2 ? ",q_history=mem" : ",decode=true");
        opcheck_case cut = c;
        if (i == 2) {
            cut.in[0].tensor = attn_tensor_make(x + CUT * C, ATTN_F32, SHAPE(1, n - CUT, C));
            cut.in[cut.in_count++] = (attn_named_tensor){"mem", attn_tensor_make(x, ATTN_F32, SHAPE(1, CUT, C))};
        }
        output_of(again, &cut, "y", attn_tensor_make(other + first * C, ATTN_F32, SHAPE(1, n - first, C)));
        for (int64_t at = first * C; at < n * C; at++) {
            if (!(fabsf(whole[at] - other[at]) <= 2e-4f)) {
                fail_msg("%s, number %d: %.8g, all at once %.8g", again, (int)at, (double)other[at], (double)whole[at]);
            }
        }
        free_inputs(&c);
    }
    free(whole);
    free(other);
}

static void test_retrieval_any_scale(void **state)
{
    (void)state;
    opcheck_case c = {.seed = 8};
    opcheck_input(&c, "q", SHAPE(1, 2, 5, 4));
    opcheck_input(&c, "k", SHAPE(1, 1, 54, 4));
    opcheck_whole(&c, "prompt", SHAPE(50), 0, 9);
    opcheck_whole(&c, "generated", SHAPE(5), 0, 9);
    const char *const scales[] = {"1", "1e-44", "1e44"}; /* scaled scores would be equal in float32 */
    int64_t top[3][2 * 5 * 3];
    for (int i = 0; i < 3; i++) {
        char spec[80];
        snprintf(spec, sizeof spec, "retrieval_head:needle_start=1,needle_end=9,top_k=3,scale=%s", scales[i]);
        output_of(spec, &c, "top", attn_tensor_make(top[i], ATTN_I64, SHAPE(1, 2, 5, 3)));
        for (int j = 0; j < 2 * 5 * 3; j++) {
            if (top[i][j] != top[0][j]) {
                fail_msg("scale %s: top[%d] = %lld, expected %lld", scales[i], j, (long long)top[i][j], (long long)top[0][j]);
            }
        }
    }
    free_inputs(&c);
}

/* Whole numbers, so that many scores are equal: the lower position comes first. */
static void test_retrieval_ties(void **state)
{
    (void)state;
    enum { S = 4, P = 1100, M = P + S - 1, D = 3, K = 5 };
    opcheck_case c = {.seed = 10};
    float *q = opcheck_input(&c, "q", SHAPE(1, 2, S, D)), *k = opcheck_input(&c, "k", SHAPE(1, 1, M, D));
    opcheck_whole(&c, "prompt", SHAPE(P), 0, 9);
    opcheck_whole(&c, "generated", SHAPE(S), 0, 9);
    for (int i = 0; i < 2 * S * D; i++) {
        q[i] = rintf(q[i]);
    }
    for (int i = 0; i < M * D; i++) {
        k[i] = rintf(k[i]);
    }
    int64_t top[2 * S * K];
    output_of("retrieval_head:needle_start=0,needle_end=9,top_k=5", &c, "top", attn_tensor_make(top, ATTN_I64, SHAPE(1, 2, S, K)));
    for (int row = 0; row < 2 * S; row++) {
        char taken[M] = {0};
        for (int i = 0; i < K; i++) {
            int best = -1;
            float most = -INFINITY;
            for (int j = 0; j < P + row % S; j++) {
                const float *x = q + row * D, *y = k + j * D;
                float score = x[0] * y[0] + x[1] * y[1] + x[2] * y[2];
                if (!taken[j] && score > most) {
                    best = j;
                    most = score;
                }
            }
            taken[best] = 1;
            if (top[row * K + i] != best) {
                fail_msg("row %d: position %lld at place %d, expected %d", row, (long long)top[row * K + i], i, best);
            }
        }
    }
    free_inputs(&c);
}

/* Heads in and out of step with the groups that share keys. */
static void test_masked_heads(void **state)
{
    (void)state;
    enum { B = 2, H = 6, N = 5, D = 6, DV = 5 };
    for (int pattern = 0; pattern < 1 << H; pattern++) {
        opcheck_case c = {.seed = 9};
        attention_inputs(&c, H, 2, N, 7);
        float o[B * H * N * DV], exact[B * H * N * DV];
        output_of("dense:causal=true", &c, "o", attn_tensor_make(exact, ATTN_F32, SHAPE(B, H, N, DV)));
        uint8_t *heads = opcheck_bool(&c, "heads", SHAPE(H), 0);
        for (int h = 0; h < H; h++) {
            heads[h] = pattern >> h & 1;
        }
        output_of("retrieval_head.mask:mode=zero", &c, "o", attn_tensor_make(o, ATTN_F32, SHAPE(B, H, N, DV)));
        for (int i = 0; i < B * H * N * DV; i++) {
            float want = heads[i / (N * DV) % H] ? 0 : exact[i];
            if (!(fabsf(o[i] - want) <= 1e-5f)) {
                fail_msg("heads %x masked: o[%d] = %g, expected %g", pattern, i, (double)o[i], (double)want);
            }
        }
        free_inputs(&c);
    }
}

/* "max" and "log_linear" over several blocks of keys, beside the map itself; whole numbers, so that maxima are often not alone. */
static void test_softpag_sweeps(void **state)
{
    (void)state;
    enum { N = 600, D = 3, DV = 2 };
    static const char *const specs[] = {"softpag:u=0.7,target=max,scale=0.6", "softpag:u=0.7,path=log_linear,scale=3"};
    for (int path = 0; path < 2; path++) {
        opcheck_case c = {.seed = 12};
        float *q = opcheck_input(&c, "q", SHAPE(1, 1, N, D)), *k = opcheck_input(&c, "k", SHAPE(1, 1, N, D));
        float *v = opcheck_input(&c, "v", SHAPE(1, 1, N, DV)), o[N * DV];
        for (int i = 0; i < N * D; i++) {
            q[i] = rintf(q[i]), k[i] = rintf(k[i]);
        }
        output_of(specs[path], &c, "o", attn_tensor_make(o, ATTN_F32, SHAPE(1, 1, N, DV)));
        for (int i = 0; i < N; i++) {
            double s[N], top = -INFINITY, sum = 0, total = 0, want[DV] = {0};
            int best = 0;
            for (int j = 0; j < N; j++) {
                s[j] = 0;
                for (int d = 0; d < D; d++) {
                    s[j] += (path == 0 ? 0.6 : 3.0) * (double)q[i * D + d] * (double)k[j * D + d];
                }
                best = s[j] > s[best] + 1e-9 ? j : best;
                top = fmax(top, s[j]);
            }
            for (int j = 0; j < N; j++) {
                sum += exp(s[j] - top);
            }
            for (int j = 0; j < N; j++) {
                double a = exp(s[j] - top) / sum, b = j == i ? 1 - 1e-6 * (N - 1) + 1e-6 : 1e-6;
                double weight = path == 0 ? 0.3 * a + (j == best ? 0.7 : 0) : pow(b, 0.7) * pow(fmax(a, 1e-12), 0.3);
                total += weight;
                for (int d = 0; d < DV; d++) {
                    want[d] += weight * (double)v[j * DV + d];
                }
            }
            for (int d = 0; d < DV; d++) {
                if (!(fabs((double)o[i * DV + d] - want[d] / total) <= 1e-4)) {
                    fail_msg("%s: o[%d, %d] = %g, expected %g", specs[path], i, d, (double)o[i * DV + d], want[d] / total);
                }
            }
        }
        free_inputs(&c);
    }
}

/* No queries or no keys: gradients are zeros. */
static void test_softpag_of_nothing(void **state)
{
    (void)state;
    static const char *const targets[] = {"uniform", "query_mean", "max", "temperature"};
    for (int t = 0; t < 4; t++) {
        for (int keys = 0; keys < 2; keys++) {
            int64_t n = keys ? 0 : 3, m = keys ? 3 : 0;
            char spec[60];
            snprintf(spec, sizeof spec, "softpag:target=%s", targets[t]);
            float x[3 * 2] = {1, 2, 3, 4, 5, 6}, grads[3][3 * 2];
            attn_tensor q = attn_tensor_make(x, ATTN_F32, SHAPE(1, 1, n, 2)), k = attn_tensor_make(x, ATTN_F32, SHAPE(1, 1, m, 2));
            attn_named_tensor in[] = {{"q", q}, {"k", k}, {"v", k}}, grad_o = {"o", q};
            attn_named_tensor to[] = {{"q", q}, {"k", k}, {"v", k}};
            for (int i = 0; i < 3; i++) {
                to[i].tensor.data = grads[i];
            }
            attn_op *op;
            assert_int_equal(attn_op_create(&op, spec), ATTN_OK);
            assert_int_equal(attn_op_backward(op, in, 3, NULL, 0, &grad_o, 1, to, 3, NULL), ATTN_OK);
            for (int i = 0; i < 3; i++) {
                for (int64_t j = 0; j < attn_tensor_count(&to[i].tensor); j++) {
                    if (grads[i][j] != 0) {
                        fail_msg("%s, N = %d: gradient of %s[%d] = %g", spec, (int)n, to[i].name, (int)j, (double)grads[i][j]);
                    }
                }
            }
            attn_op_destroy(op);
        }
    }
}

static void test_embed_checks_ids(void **state)
{
    (void)state;
    float table[6] = {0}, o[2] = {0}, grad[6];
    int64_t id = 7;
    attn_named_tensor in[] = {{"table", attn_tensor_make(table, ATTN_F32, SHAPE(3, 2))},
                              {"ids", attn_tensor_make(&id, ATTN_I64, SHAPE(1, 1))},
                              {"modifiers", attn_tensor_make(&id, ATTN_I64, SHAPE(1))}};
    attn_named_tensor out = {"o", attn_tensor_make(o, ATTN_F32, SHAPE(1, 1, 2))};
    attn_named_tensor to = {"table", attn_tensor_make(grad, ATTN_F32, SHAPE(3, 2))};
    attn_op *op;
    assert_int_equal(attn_op_create(&op, "disendiff.embed"), ATTN_OK);
    assert_int_equal(attn_op_backward(op, in, 3, &out, 1, &out, 1, &to, 1, NULL), ATTN_ERR_ARGUMENT); /* o is given: nothing runs forward */
    assert_non_null(strstr(attn_last_error(), "ids[0] = 7"));
    attn_op_destroy(op);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_softpag_gradients), cmocka_unit_test(test_softpag_paths_meet), cmocka_unit_test(test_softpag_errors),
        cmocka_unit_test(test_mrsa_gradients),    cmocka_unit_test(test_mrsa_errors),        cmocka_unit_test(test_disendiff_gradients),
        cmocka_unit_test(test_disendiff_errors),  cmocka_unit_test(test_retrieval_errors),   cmocka_unit_test(test_retrieval_many_steps),
        cmocka_unit_test(test_retrieval_any_scale), cmocka_unit_test(test_retrieval_ties), cmocka_unit_test(test_masked_heads), cmocka_unit_test(test_softpag_sweeps),
        cmocka_unit_test(test_softpag_of_nothing), cmocka_unit_test(test_embed_checks_ids), cmocka_unit_test(test_long_layers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
