/* Neighborhood attention: gradients against differences, threads, the pattern against its definition, agreement of the operators with
 * each other, published numbers of the model, errors. */
#include "opcheck.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define SHAPE(...) (int)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void gradients(void **unused)
{
    (void)unused;
    const struct {
        const char *spec;
        int64_t n;
        int rank;
        int64_t rpb[3], extra;
    } cases[] = {
        {"neighborhood:grid=[41],kernel=8,stride=3", 41, 1, {15}, 0},
        {"neighborhood:grid=[41],kernel=6,dilation=4,causal=true", 41, 1, {11}, 3},
        {"neighborhood:grid=[9,11],kernel=[4,5],stride=[2,1],dilation=[1,2],causal=[true,false]", 99, 2, {7, 9}, 0},
        {"neighborhood:grid=[9,11],kernel=9,scale=0.2", 99, 2, {17, 17}, 70},
        {"neighborhood:grid=[3,5,7],kernel=[2,3,4],stride=[1,3,2]", 105, 3, {3, 5, 7}, 2},
        {"neighborhood:grid=[5,4,4],kernel=[2,4,3],dilation=[2,1,1],causal=[true,false,true],decode=true", 80, 3, {3, 7, 5}, 4},
        {"neighborhood:grid=[1,1],kernel=1", 1, 2, {1, 1}, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (int full = 0; full < 2; full++) {
            opcheck_case c = {.spec = cases[i].spec, .seed = i + 1};
            int64_t h = full ? 4 : 2, shape[] = {h, cases[i].rpb[0], cases[i].rpb[1], cases[i].rpb[2]};
            opcheck_input(&c, "q", SHAPE(2, h, cases[i].n, 6));
            opcheck_input(&c, "k", SHAPE(2, 2, cases[i].n, 6));
            opcheck_input(&c, "v", SHAPE(2, 2, cases[i].n, 5));
            if (full) {
                opcheck_input(&c, "rpb", cases[i].rank + 1, shape);
                if (cases[i].extra > 0) {
                    opcheck_input(&c, "extra_k", SHAPE(2, 2, cases[i].extra, 6));
                    opcheck_input(&c, "extra_v", SHAPE(2, 2, cases[i].extra, 5));
                }
            }
            opcheck_run(&c, 2e-2);
        }
    }
}

static void halves(void **unused)
{
    (void)unused;
    opcheck_case qk = {.spec = "neighborhood.qk:grid=[7,9],kernel=[3,4],dilation=[2,1],stride=[1,2],scale=0.3", .seed = 3};
    opcheck_input(&qk, "q", SHAPE(1, 4, 63, 5));
    opcheck_input(&qk, "k", SHAPE(1, 2, 63, 5));
    opcheck_input(&qk, "rpb", SHAPE(4, 5, 7));
    opcheck_run(&qk, 1e-2);
    opcheck_case av = {.spec = "neighborhood.av:grid=[7,9],kernel=[3,4],dilation=[2,1],stride=[1,2]", .seed = 4};
    opcheck_input(&av, "w", SHAPE(1, 4, 63, 12));
    opcheck_input(&av, "v", SHAPE(1, 2, 63, 5));
    opcheck_run(&av, 1e-2);
}

static float *numbers(int64_t count, uint32_t seed)
{
    float *x = malloc((size_t)count * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < count; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) / 8388608.0f - 1;
    }
    return x;
}

static void forward(const char *spec, const attn_named_tensor *in, int in_count, const attn_named_tensor *out, int out_count)
{
    attn_op *op;
    if (attn_op_create(&op, spec) != ATTN_OK || attn_op_forward(op, in, in_count, out, out_count, NULL) != ATTN_OK) {
        fail_msg("%s: %s", spec, attn_last_error());
    }
    attn_op_destroy(op);
}

static void close_to(const char *what, const float *got, const float *want, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (!(fabsf(got[i] - want[i]) <= 2e-5f * (1 + fabsf(want[i])))) {
            fail_msg("%s[%lld] = %g, expected %g", what, (long long)i, (double)got[i], (double)want[i]);
        }
    }
}

/* softmax(qk) then av, decode, and dense attention under the mask all give what the fused operator gives. */
static void agreement(void **unused)
{
    (void)unused;
    enum { N = 12 * 13, H = 2, D = 7, K = 20 };
    const int64_t shape[] = {1, H, N, D};
    float *q = numbers(H * N * D, 1), *k = numbers(H * N * D, 2), *v = numbers(H * N * D, 3), *o = numbers(H * N * D, 4);
    float *other = numbers(H * N * D, 5), *lse = numbers(H * N, 6), *scores = numbers(H * N * K, 7), *bias = numbers(N * N, 8);
    uint8_t *mask = malloc(N * N);
    assert_non_null(mask);
    attn_named_tensor in[] = {{"q", attn_tensor_make(q, ATTN_F32, 4, shape)}, {"k", attn_tensor_make(k, ATTN_F32, 4, shape)},
                              {"v", attn_tensor_make(v, ATTN_F32, 4, shape)}, {"bias", attn_tensor_make(bias, ATTN_F32, SHAPE(1, 1, N, N))}};
    attn_named_tensor out[] = {{"o", attn_tensor_make(o, ATTN_F32, 4, shape)}, {"lse", attn_tensor_make(lse, ATTN_F32, SHAPE(1, H, N))}};
    attn_named_tensor again = {"o", attn_tensor_make(other, ATTN_F32, 4, shape)};
    attn_named_tensor slots = {"scores", attn_tensor_make(scores, ATTN_F32, SHAPE(1, H, N, K))};
    attn_named_tensor bits = {"mask", attn_tensor_make(mask, ATTN_BOOL, SHAPE(N, N))};

    forward("neighborhood:grid=[12,13],kernel=[5,4],stride=[2,1],dilation=[2,3]", in, 3, out, 2);
    forward("neighborhood.qk:grid=[12,13],kernel=[5,4],stride=[2,1],dilation=[2,3]", in, 2, &slots, 1);
    for (int64_t i = 0; i < H * N; i++) {
        for (int64_t j = 0; j < K; j++) {
            scores[i * K + j] = expf(scores[i * K + j] - lse[i]);
        }
    }
    attn_named_tensor weighted[] = {{"w", slots.tensor}, in[2]};
    forward("neighborhood.av:grid=[12,13],kernel=[5,4],stride=[2,1],dilation=[2,3]", weighted, 2, &again, 1);
    close_to("unfused o", other, o, H * N * D);

    forward("neighborhood.mask:grid=[12,13],kernel=[5,4],stride=[2,1],dilation=[2,3]", NULL, 0, &bits, 1);
    for (int64_t i = 0; i < N * N; i++) {
        bias[i] = mask[i] ? 0 : -INFINITY;
    }
    forward("dense", in, 4, &again, 1);
    close_to("masked dense o", other, o, H * N * D);

    forward("neighborhood:grid=[12,13],kernel=[5,4],dilation=[2,3],causal=[true,false]", in, 3, out, 2);
    forward("neighborhood:grid=[12,13],kernel=[5,4],dilation=[2,3],causal=[true,false],decode=true", in, 3, &again, 1);
    close_to("decoded o", other, o, H * N * D);
    float *all[] = {q, k, v, o, other, lse, scores, bias};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
    free(mask);
}

/* Results of the model as the paper on strides prints them (arXiv:2504.16922). */
static void published(void **unused)
{
    (void)unused;
    const struct {
        const char *spec;
        double speedup, bound;
        int block_sparse;
    } cases[] = {
        {"grid=[32768],kernel=2048,q_tile=256,kv_tile=128", 14.32, 16, 0},
        {"grid=[32768],kernel=2048,q_tile=256,kv_tile=128,stride=256", 16.0, 16, 1},
        {"grid=[256,256],kernel=80,q_tile=[16,16],kv_tile=[16,8]", 7.06, 10.24, 0},
        {"grid=[256,256],kernel=80,q_tile=[16,16],kv_tile=[16,8],stride=16", 10.24, 10.24, 1},
        {"grid=[30,48,80],kernel=[18,24,24],q_tile=[4,8,8],kv_tile=[2,8,8]", 4.92, 11.11, 0},
        {"grid=[30,48,80],kernel=[18,24,24],q_tile=[4,8,8],kv_tile=[2,8,8],stride=[16,8,8]", 10.42, 11.11, 1},
        {"grid=[64,64],kernel=24,q_tile=[8,8],kv_tile=[8,8]", 3.54, 7.11, 0},
        {"grid=[64,64],kernel=24,q_tile=[8,8],kv_tile=[8,8],stride=8", 7.11, 7.11, 1},
        {"grid=[64,64],kernel=24,q_tile=[8,8],kv_tile=[8,8],tiling=single", 2.67, 7.11, 0},
        {"grid=[16,32,32],kernel=12,q_tile=[4,4,4],kv_tile=[4,4,4]", 4.05, 9.48, 0},
        {"grid=[16,32,32],kernel=12,q_tile=[4,4,4],kv_tile=[4,4,4],stride=4", 9.48, 9.48, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        float speedup = 0, bound = 0;
        uint8_t sparse = 2;
        char spec[160];
        snprintf(spec, sizeof spec, "neighborhood.simulate:%s", cases[i].spec);
        attn_named_tensor out[] = {{"speedup", attn_tensor_make(&speedup, ATTN_F32, SHAPE(1))},
                                   {"flop_speedup", attn_tensor_make(&bound, ATTN_F32, SHAPE(1))},
                                   {"block_sparse", attn_tensor_make(&sparse, ATTN_BOOL, SHAPE(1))}};
        forward(spec, NULL, 0, out, 3);
        if (fabs((double)speedup - cases[i].speedup) > 0.006 || fabs((double)bound - cases[i].bound) > 0.006 ||
            sparse != cases[i].block_sparse) {
            fail_msg("%s: speed-up %.3f of %.3f, block-sparse %d; expected %.2f, %.2f, %d", spec, (double)speedup, (double)bound, sparse,
                     cases[i].speedup, cases[i].bound, cases[i].block_sparse);
        }
    }
    /* The only stride that makes the 1-D pattern block-sparse. */
    for (int stride = 1; stride < 400; stride++) {
        uint8_t sparse = 2;
        char spec[160];
        snprintf(spec, sizeof spec, "neighborhood.simulate:grid=[32768],kernel=2048,q_tile=256,kv_tile=128,stride=%d", stride);
        attn_named_tensor out = {"block_sparse", attn_tensor_make(&sparse, ATTN_BOOL, SHAPE(1))};
        forward(spec, NULL, 0, &out, 1);
        assert_int_equal(sparse, stride == 256);
    }
}

static void attention_fails(const char *spec, attn_status status, const char *words, int extra, int64_t rpb)
{
    opcheck_case c = {.spec = spec, .seed = 1};
    opcheck_input(&c, "q", SHAPE(1, 2, 12, 3));
    opcheck_input(&c, "k", SHAPE(1, 1, 12, 3));
    if (strncmp(spec, "neighborhood.qk", 15) != 0) {
        opcheck_input(&c, "v", SHAPE(1, 1, 12, 3));
    }
    if (extra) {
        opcheck_input(&c, extra == 1 ? "extra_k" : "extra_v", SHAPE(1, 1, 2, 3));
    }
    if (rpb > 0) {
        opcheck_input(&c, "rpb", SHAPE(2, rpb));
    }
    opcheck_fails(&c, status, words);
}

static void errors(void **unused)
{
    (void)unused;
    attention_fails("neighborhood:grid=[13],kernel=3", ATTN_ERR_SHAPE, "grid", 0, 0);
    attention_fails("neighborhood:grid=[12]", ATTN_ERR_ARGUMENT, "kernel", 0, 0);
    attention_fails("neighborhood:kernel=3", ATTN_ERR_ARGUMENT, "grid", 0, 0);
    attention_fails("neighborhood:grid=[12],kernel=13", ATTN_ERR_ARGUMENT, "kernel", 0, 0);
    attention_fails("neighborhood:grid=[12],kernel=0", ATTN_ERR_ARGUMENT, "kernel", 0, 0);
    attention_fails("neighborhood:grid=[3,4],kernel=[3,4,1]", ATTN_ERR_ARGUMENT, "kernel", 0, 0);
    attention_fails("neighborhood:grid=[12],kernel=5,dilation=3", ATTN_ERR_ARGUMENT, "dilation", 0, 0);
    attention_fails("neighborhood:grid=[12],kernel=9223372036854775807,dilation=2", ATTN_ERR_ARGUMENT, "kernel", 0, 0);
    attention_fails("neighborhood:grid=[12],kernel=3,dilation=0", ATTN_ERR_ARGUMENT, "dilation", 0, 0);
    attention_fails("neighborhood:grid=[12],kernel=3,stride=4", ATTN_ERR_ARGUMENT, "stride", 0, 0);
    attention_fails("neighborhood:grid=[2,2,3,1],kernel=1", ATTN_ERR_ARGUMENT, "grid", 0, 0);
    attention_fails("neighborhood:grid=[12],kernel=3,decode=true", ATTN_ERR_ARGUMENT, "decode", 0, 0);
    attention_fails("neighborhood:grid=[12],kernel=3,stride=2,causal=true,decode=true", ATTN_ERR_ARGUMENT, "decode", 0, 0);
    attention_fails("neighborhood:grid=[12],kernel=3", ATTN_ERR_ARGUMENT, "extra_v", 1, 0);
    attention_fails("neighborhood:grid=[12],kernel=3", ATTN_ERR_ARGUMENT, "extra_k", 2, 0);
    attention_fails("neighborhood:grid=[12],kernel=3", ATTN_ERR_SHAPE, "rpb", 0, 3);
    attention_fails("neighborhood.qk:grid=[12],kernel=3", ATTN_ERR_SHAPE, "rpb", 0, 3);
    attention_fails("neighborhood.qk:grid=[3,4],kernel=3,causal=[false,true]", ATTN_ERR_ARGUMENT, "causal", 0, 0);
    opcheck_case av = {.spec = "neighborhood.av:grid=[12],kernel=3"};
    opcheck_input(&av, "w", SHAPE(1, 2, 12, 4));
    opcheck_input(&av, "v", SHAPE(1, 1, 12, 3));
    opcheck_fails(&av, ATTN_ERR_SHAPE, "4 slots");
    opcheck_case empty = {.spec = "neighborhood:grid=[2],kernel=1"};
    opcheck_input(&empty, "q", SHAPE(1, 1, 2, 0));
    opcheck_input(&empty, "k", SHAPE(1, 1, 2, 0));
    opcheck_input(&empty, "v", SHAPE(1, 1, 2, 1));
    opcheck_fails(&empty, ATTN_ERR_SHAPE, "D = 0");
    opcheck_case permute = {.spec = "neighborhood.permute:grid=[5],tile=0"};
    opcheck_input(&permute, "x", SHAPE(1, 5, 2));
    opcheck_fails(&permute, ATTN_ERR_ARGUMENT, "tile");
    opcheck_case slots = {.spec = "neighborhood.permute:grid=[1,1,1],tile=1,dilation=1048576"};
    opcheck_input(&slots, "x", SHAPE(1, 1, 0));
    opcheck_fails(&slots, ATTN_ERR_ARGUMENT, "too many slots");
    opcheck_case pairs = {.spec = "neighborhood.simulate:grid=[65536,65536],kernel=1,q_tile=1,kv_tile=1"};
    opcheck_fails(&pairs, ATTN_ERR_ARGUMENT, "too many pairs");
    opcheck_case mask = {.spec = "neighborhood.mask:grid=[5],kernel=3,stride=4"};
    opcheck_fails(&mask, ATTN_ERR_ARGUMENT, "stride");
    opcheck_case tiles = {.spec = "neighborhood.simulate:grid=[5,5],kernel=3,q_tile=[2,2,2],kv_tile=2"};
    opcheck_fails(&tiles, ATTN_ERR_ARGUMENT, "q_tile");
    opcheck_case missing = {.spec = "neighborhood.simulate:grid=[5,5],kernel=3,kv_tile=2"};
    opcheck_fails(&missing, ATTN_ERR_ARGUMENT, "q_tile");
}

/* Parts that saw nothing do not count, even if they hold anything; a log-sum-exp that is no number is not one of them. */
static void merge_no_numbers(void **unused)
{
    (void)unused;
    float os[2] = {NAN, 3}, o;
    const struct {
        float lses[2], o, lse;
    } cases[] = {{{-INFINITY, 1}, 3, 1}, {{-INFINITY, -INFINITY}, 0, -INFINITY}, {{1, NAN}, NAN, NAN}, {{NAN, 1}, NAN, NAN}};
    attn_op *op;
    assert_int_equal(attn_op_create(&op, "neighborhood.merge"), ATTN_OK);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        float lses[2] = {cases[i].lses[0], cases[i].lses[1]}, lse;
        attn_named_tensor in[] = {{"os", attn_tensor_make(os, ATTN_F32, SHAPE(2, 1, 1, 1, 1))},
                                  {"lses", attn_tensor_make(lses, ATTN_F32, SHAPE(2, 1, 1, 1))}};
        attn_named_tensor out[] = {{"o", attn_tensor_make(&o, ATTN_F32, SHAPE(1, 1, 1, 1))},
                                   {"lse", attn_tensor_make(&lse, ATTN_F32, SHAPE(1, 1, 1))}};
        assert_int_equal(attn_op_forward(op, in, 2, out, 2, NULL), ATTN_OK);
        int o_right = isnan(cases[i].o) ? isnan(o) : o == cases[i].o, lse_right = isnan(cases[i].lse) ? isnan(lse) : lse == cases[i].lse;
        if (!o_right || !lse_right) {
            fail_msg("of %g and %g: o = %g, lse = %g, expected %g and %g", (double)lses[0], (double)lses[1], (double)o, (double)lse,
                     (double)cases[i].o, (double)cases[i].lse);
        }
    }
    attn_op_destroy(op);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(gradients), cmocka_unit_test(halves), cmocka_unit_test(agreement),
                                       cmocka_unit_test(published), cmocka_unit_test(errors),
                                       cmocka_unit_test(merge_no_numbers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
