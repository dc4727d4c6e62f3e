/* Mechanisms on linear attention: gradients against differences, threads. */
#include "opcheck.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <cmocka.h>

static void lightning(void **unused)
{
    (void)unused;
    opcheck_case c = {.spec = "lightning:scale=0.5,block=16", .seed = 3};
    opcheck_input(&c, "q", 4, (int64_t[]){2, 4, 45, 7});
    opcheck_input(&c, "k", 4, (int64_t[]){2, 2, 45, 7});
    opcheck_input(&c, "v", 4, (int64_t[]){2, 2, 45, 5});
    opcheck_uniform(&c, "slope", 1, (int64_t[]){4}, 0.0, 0.5);
    opcheck_input(&c, "kv_state", 4, (int64_t[]){2, 4, 7, 5});
    opcheck_run(&c, 1e-2);
}

#define SHAPE(...) (int)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void tnl_weights(opcheck_case *c)
{
    opcheck_uniform(c, "w_qkvu", SHAPE(32, 6), -0.6, 0.6);
    opcheck_uniform(c, "w_o", SHAPE(6, 8), -0.6, 0.6);
    opcheck_uniform(c, "w_1", SHAPE(7, 6), -0.6, 0.6);
    opcheck_uniform(c, "w_2", SHAPE(7, 6), -0.6, 0.6);
    opcheck_uniform(c, "w_3", SHAPE(6, 7), -0.6, 0.6);
}

static void tnl(void **unused)
{
    (void)unused;
    opcheck_case c = {.spec = "tnl:heads=2,eps=1e-3,offset=2", .seed = 3, .step = 2e-3};
    opcheck_input(&c, "x", SHAPE(2, 13, 6));
    tnl_weights(&c);
    opcheck_uniform(&c, "theta", SHAPE(2, 4), 0.0, 1.0);
    opcheck_bool(&c, "mask", SHAPE(2, 13), 0.8);
    opcheck_input(&c, "kv_state", SHAPE(2, 2, 8, 4));
    opcheck_run(&c, 2e-2);
    opcheck_case decode = {.spec = "tnl.decode:heads=2,act=elu1", .seed = 4};
    opcheck_input(&decode, "x", SHAPE(2, 9, 6));
    tnl_weights(&decode);
    opcheck_run(&decode, 0);
}

/* A sequence that is long enough to go through the layer in parts, against two calls that hand on the state. */
static void tnl_long(void **unused)
{
    (void)unused;
    enum { N = 2150, C = 6, FIRST = 1001 };
    static float x[N * C], w_qkvu[32 * C], w_o[C * 8], w_1[7 * C], w_2[7 * C], w_3[C * 7], slope[2] = {0.01f, 0.3f}, theta[8];
    static float whole[N * C], parts[N * C], state[2][2 * 8 * 4];
    float *const all[] = {x, w_qkvu, w_o, w_1, w_2, w_3, theta};
    const int counts[] = {N * C, 32 * C, C * 8, 7 * C, 7 * C, C * 7, 8};
    for (int i = 0, seed = 1; i < 7; i++) {
        for (int j = 0; j < counts[i]; j++, seed = seed * 75 % 65537) {
            all[i][j] = (float)(seed % 1000) / 1000 - 0.5f;
        }
    }
    for (int run = 0; run < 3; run++) {
        char spec[48];
        int64_t first = run == 2 ? FIRST : 0, n = run == 0 ? N : run == 1 ? FIRST : N - FIRST;
        snprintf(spec, sizeof spec, "tnl:heads=2,eps=1e-3,offset=%d", (int)first);
        attn_op *op;
        assert_int_equal(attn_op_create(&op, spec), ATTN_OK);
        attn_named_tensor in[] = {{"x", attn_tensor_make(x + first * C, ATTN_F32, 3, (int64_t[]){1, n, C})},
                                  {"w_qkvu", attn_tensor_make(w_qkvu, ATTN_F32, 2, (int64_t[]){32, C})},
                                  {"w_o", attn_tensor_make(w_o, ATTN_F32, 2, (int64_t[]){C, 8})},
                                  {"w_1", attn_tensor_make(w_1, ATTN_F32, 2, (int64_t[]){7, C})},
                                  {"w_2", attn_tensor_make(w_2, ATTN_F32, 2, (int64_t[]){7, C})},
                                  {"w_3", attn_tensor_make(w_3, ATTN_F32, 2, (int64_t[]){C, 7})},
                                  {"slope", attn_tensor_make(slope, ATTN_F32, 1, (int64_t[]){2})},
                                  {"theta", attn_tensor_make(theta, ATTN_F32, 2, (int64_t[]){2, 4})},
                                  {"kv_state", attn_tensor_make(state[0], ATTN_F32, 4, (int64_t[]){1, 2, 8, 4})}};
        attn_named_tensor out[] = {{"o", attn_tensor_make(run == 0 ? whole : parts + first * C, ATTN_F32, 3, (int64_t[]){1, n, C})},
                                   {"kv_state", attn_tensor_make(state[run == 1 ? 0 : 1], ATTN_F32, 4, (int64_t[]){1, 2, 8, 4})}};
        /* The state of the second call is what the first one left. */
        if (attn_op_forward(op, in, run == 2 ? 9 : 8, out, 2, NULL) != ATTN_OK) {
            fail_msg("%s", attn_last_error());
        }
        attn_op_destroy(op);
    }
    for (int i = 0; i < N * C; i++) {
        if (fabsf(whole[i] - parts[i]) > 2e-4f) {
            fail_msg("token %d: %g in one call, %g in two", i / C, (double)whole[i], (double)parts[i]);
        }
    }
}

static void tnl_errors(void **unused)
{
    (void)unused;
    opcheck_case heads = {.spec = "tnl:heads=3"};
    opcheck_input(&heads, "x", SHAPE(1, 4, 6));
    tnl_weights(&heads);
    opcheck_fails(&heads, ATTN_ERR_ARGUMENT, "heads = 3 does not divide E = 8");
    opcheck_case theta = {.spec = "tnl:heads=2"};
    opcheck_input(&theta, "x", SHAPE(1, 4, 6));
    tnl_weights(&theta);
    opcheck_uniform(&theta, "theta", SHAPE(2, 3), 0.0, 1.0);
    opcheck_fails(&theta, ATTN_ERR_SHAPE, "theta is [2, 3], expected [heads, E/heads] = [2, 4]");
    opcheck_case act = {.spec = "tnl:heads=2,act=relu"};
    opcheck_fails(&act, ATTN_ERR_ARGUMENT, "elu1");
    opcheck_case model = {.spec = "tnl.model:heads=2,lrpe_layers=[]"};
    opcheck_whole(&model, "tokens", SHAPE(1, 4), 0, 12);
    opcheck_input(&model, "embed", SHAPE(5, 6));
    opcheck_input(&model, "w_qkvu", SHAPE(1, 32, 6));
    opcheck_input(&model, "w_o", SHAPE(1, 6, 8));
    opcheck_input(&model, "w_1", SHAPE(1, 7, 6));
    opcheck_input(&model, "w_2", SHAPE(1, 7, 6));
    opcheck_input(&model, "w_3", SHAPE(1, 6, 7));
    opcheck_fails(&model, ATTN_ERR_ARGUMENT, "expected 0 ... 4");
}

static void flow(void **unused)
{
    (void)unused;
    opcheck_case normal = {.spec = "flow:clamp=0,eps=1e-3", .seed = 5};
    opcheck_input(&normal, "q", SHAPE(2, 4, 20, 5));
    opcheck_input(&normal, "k", SHAPE(2, 2, 33, 5));
    opcheck_input(&normal, "v", SHAPE(2, 2, 33, 6));
    opcheck_run(&normal, 1e-2);
    opcheck_case causal = {.spec = "flow:clamp=5,causal=true", .seed = 6};
    opcheck_input(&causal, "q", SHAPE(1, 2, 90, 5));
    opcheck_input(&causal, "k", SHAPE(1, 2, 90, 5));
    opcheck_input(&causal, "v", SHAPE(1, 2, 90, 6));
    opcheck_run(&causal, 1e-2);
    opcheck_case layer = {.spec = "flow.layer:heads=2,clamp=0", .seed = 7};
    opcheck_input(&layer, "x", SHAPE(2, 8, 5));
    opcheck_input(&layer, "memory", SHAPE(2, 11, 5));
    opcheck_input(&layer, "w_q", SHAPE(6, 5));
    opcheck_input(&layer, "w_k", SHAPE(6, 5));
    opcheck_input(&layer, "w_v", SHAPE(6, 5));
    opcheck_input(&layer, "w_o", SHAPE(4, 6));
    opcheck_input(&layer, "b_k", SHAPE(6));
    opcheck_run(&layer, 1e-2);
}

/* Exact identities of the flows with eps = 0: competition is 1 on average, and so is what allocation is the sigmoid of. */
static void flow_conservation(void **unused)
{
    (void)unused;
    enum { N = 50, M = 80, D = 8 };
    static float q[N * D], k[M * D], v[M * D], o[N * D], competition[M], allocation[N];
    for (int i = 0; i < M * D; i++) {
        k[i] = (float)((i * 37 + 11) % 101) / 25 - 2;
        v[i] = (float)((i * 53 + 7) % 97) / 25 - 2;
        q[i % (N * D)] = (float)((i * 71 + 3) % 89) / 25 - 2;
    }
    attn_op *op;
    assert_int_equal(attn_op_create(&op, "flow:eps=0,clamp=0"), ATTN_OK);
    attn_named_tensor in[] = {{"q", attn_tensor_make(q, ATTN_F32, 4, (int64_t[]){1, 1, N, D})},
                              {"k", attn_tensor_make(k, ATTN_F32, 4, (int64_t[]){1, 1, M, D})},
                              {"v", attn_tensor_make(v, ATTN_F32, 4, (int64_t[]){1, 1, M, D})}};
    attn_named_tensor out[] = {{"o", attn_tensor_make(o, ATTN_F32, 4, (int64_t[]){1, 1, N, D})},
                               {"competition", attn_tensor_make(competition, ATTN_F32, 3, (int64_t[]){1, 1, M})},
                               {"allocation", attn_tensor_make(allocation, ATTN_F32, 3, (int64_t[]){1, 1, N})}};
    assert_int_equal(attn_op_forward(op, in, 3, out, 3, NULL), ATTN_OK);
    attn_op_destroy(op);
    double mean_competition = 0, mean_inflow = 0;
    for (int j = 0; j < M; j++) {
        mean_competition += (double)competition[j] / M;
    }
    for (int i = 0; i < N; i++) {
        mean_inflow += log((double)allocation[i] / (1 - (double)allocation[i])) / N;
    }
    if (fabs(mean_competition - 1) > 1e-5 || fabs(mean_inflow - 1) > 1e-5) {
        fail_msg("mean competition %.8f and mean inflow %.8f, expected 1", mean_competition, mean_inflow);
    }
}

static void flow_errors(void **unused)
{
    (void)unused;
    opcheck_case lengths = {.spec = "flow:causal=true"};
    opcheck_input(&lengths, "q", SHAPE(1, 1, 3, 4));
    opcheck_input(&lengths, "k", SHAPE(1, 1, 5, 4));
    opcheck_input(&lengths, "v", SHAPE(1, 1, 5, 4));
    opcheck_fails(&lengths, ATTN_ERR_SHAPE, "causal needs as many keys as queries");
    opcheck_case clamp = {.spec = "flow:clamp=-1"};
    opcheck_fails(&clamp, ATTN_ERR_ARGUMENT, "clamp");
    opcheck_case state = {.spec = "flow.decode:steps=3"};
    opcheck_input(&state, "q", SHAPE(1, 1, 3, 4));
    opcheck_input(&state, "k", SHAPE(1, 1, 3, 4));
    opcheck_input(&state, "v", SHAPE(1, 1, 3, 4));
    opcheck_input(&state, "k_sum", SHAPE(1, 1, 4));
    opcheck_fails(&state, ATTN_ERR_ARGUMENT, "1 of the six state inputs");
}

static void based(void **unused)
{
    (void)unused;
    opcheck_case causal = {.spec = "based", .seed = 8};
    opcheck_input(&causal, "q", SHAPE(1, 4, 300, 5));
    opcheck_input(&causal, "k", SHAPE(1, 2, 300, 5));
    opcheck_input(&causal, "v", SHAPE(1, 2, 300, 6));
    opcheck_run(&causal, 2e-2);
    opcheck_case cross = {.spec = "based:causal=false,normalize=false,scale=0.3", .seed = 9};
    opcheck_input(&cross, "q", SHAPE(2, 2, 20, 5));
    opcheck_input(&cross, "k", SHAPE(2, 2, 31, 5));
    opcheck_input(&cross, "v", SHAPE(2, 2, 31, 6));
    opcheck_run(&cross, 1e-2);
    opcheck_case window = {.spec = "based.window:window=5,rotary_dim=4", .seed = 10};
    opcheck_input(&window, "q", SHAPE(1, 4, 40, 6));
    opcheck_input(&window, "k", SHAPE(1, 2, 40, 6));
    opcheck_input(&window, "v", SHAPE(1, 2, 40, 3));
    opcheck_run(&window, 1e-2);
    opcheck_case decode = {.spec = "based.decode:layout=full", .seed = 11};
    opcheck_input(&decode, "q", SHAPE(2, 4, 7, 5));
    opcheck_input(&decode, "k", SHAPE(2, 2, 7, 5));
    opcheck_input(&decode, "v", SHAPE(2, 2, 7, 6));
    opcheck_run(&decode, 0);
}

static void based_layers(void **unused)
{
    (void)unused;
    opcheck_case conv = {.spec = "based.conv:expand=2,kernel=4", .seed = 12};
    opcheck_input(&conv, "x", SHAPE(2, 9, 5));
    opcheck_input(&conv, "in_w", SHAPE(10, 5));
    opcheck_input(&conv, "in_b", SHAPE(10));
    opcheck_input(&conv, "conv_w", SHAPE(5, 4));
    opcheck_input(&conv, "conv_b", SHAPE(5));
    opcheck_input(&conv, "out_w", SHAPE(5, 5));
    opcheck_input(&conv, "state", SHAPE(2, 5, 3));
    opcheck_run(&conv, 1e-2);
    opcheck_case layer = {.spec = "based.layer:heads=2,feature_dim=3", .seed = 13};
    opcheck_input(&layer, "x", SHAPE(2, 12, 5));
    opcheck_uniform(&layer, "w_q", SHAPE(6, 5), -0.6, 0.6);
    opcheck_uniform(&layer, "w_k", SHAPE(6, 5), -0.6, 0.6);
    opcheck_input(&layer, "w_v", SHAPE(8, 5));
    opcheck_input(&layer, "w_o", SHAPE(5, 8));
    opcheck_run(&layer, 1e-2);
}

/* A long sequence in one call, whose tokens pass in spans, against two calls with the state between them. */
static void based_conv_in_spans(void **unused)
{
    (void)unused;
    enum { N = 2300, FIRST = 700, C = 3, I = 6, KEPT = 2 };
    opcheck_case c = {.spec = "based.conv", .seed = 21};
    const float *x = opcheck_input(&c, "x", SHAPE(1, N, C));
    opcheck_input(&c, "in_w", SHAPE(2 * I, C));
    opcheck_input(&c, "conv_w", SHAPE(I, KEPT + 1));
    opcheck_input(&c, "out_w", SHAPE(C, I));
    static float whole[N * C], parts[N * C], states[3][I * KEPT];
    attn_op *op;
    assert_int_equal(attn_op_create(&op, c.spec), ATTN_OK);
    for (int call = 0; call < 3; call++) {
        int first = call == 2 ? FIRST : 0, count = call == 0 ? N : call == 1 ? FIRST : N - FIRST;
        attn_named_tensor in[5] = {{"x", attn_tensor_make((float *)(uintptr_t)x + first * C, ATTN_F32, SHAPE(1, count, C))}, c.in[1], c.in[2], c.in[3],
                                   {"state", attn_tensor_make(states[1], ATTN_F32, SHAPE(1, I, KEPT))}};
        attn_named_tensor out[] = {{"o", attn_tensor_make((call == 0 ? whole : parts) + first * C, ATTN_F32, SHAPE(1, count, C))},
                                   {"state", attn_tensor_make(states[call], ATTN_F32, SHAPE(1, I, KEPT))}};
        assert_int_equal(attn_op_forward(op, in, call == 2 ? 5 : 4, out, 2, NULL), ATTN_OK);
    }
    attn_op_destroy(op);
    for (int i = 0; i < N * C + I * KEPT; i++) {
        float got = i < N * C ? whole[i] : states[0][i - N * C], want = i < N * C ? parts[i] : states[2][i - N * C];
        if (!(fabsf(got - want) <= 1e-5f * (1 + fabsf(want)))) {
            fail_msg("number %d of o and the state: %g in one call, %g in two", i, (double)got, (double)want);
        }
    }
    opcheck_run(&c, 0);
}

static void based_errors(void **unused)
{
    (void)unused;
    opcheck_case scale = {.spec = "based:scale=0"};
    opcheck_fails(&scale, ATTN_ERR_ARGUMENT, "scale");
    opcheck_case state = {.spec = "based.decode"};
    opcheck_input(&state, "q", SHAPE(1, 1, 3, 4));
    opcheck_input(&state, "k", SHAPE(1, 1, 3, 4));
    opcheck_input(&state, "v", SHAPE(1, 1, 3, 2));
    opcheck_input(&state, "kv_state", SHAPE(1, 1, 15, 2));
    opcheck_fails(&state, ATTN_ERR_ARGUMENT, "k_state is missing");
    opcheck_case odd = {.spec = "based.conv:expand=1"};
    opcheck_input(&odd, "x", SHAPE(1, 4, 5));
    opcheck_input(&odd, "in_w", SHAPE(5, 5));
    opcheck_input(&odd, "conv_w", SHAPE(2, 3));
    opcheck_input(&odd, "out_w", SHAPE(5, 2));
    opcheck_fails(&odd, ATTN_ERR_ARGUMENT, "is odd");
    opcheck_case rotary = {.spec = "based.window:window=4,rotary_dim=3"};
    opcheck_input(&rotary, "q", SHAPE(1, 1, 3, 4));
    opcheck_input(&rotary, "k", SHAPE(1, 1, 3, 4));
    opcheck_input(&rotary, "v", SHAPE(1, 1, 3, 2));
    opcheck_fails(&rotary, ATTN_ERR_ARGUMENT, "rotary_dim = 3");
}

/* Windows in runs of queries against dense, over the ends of runs, with queries that see no key. */
static void based_window_runs(void **unused)
{
    (void)unused;
    enum { H = 4, HKV = 2, N = 1100, M = 1090, D = 5, DV = 3 };
    static float q[H * N * D], k[HKV * M * D], v[HKV * M * DV], o[2][H * N * DV];
    float *const all[] = {q, k, v};
    const int counts[] = {H * N * D, HKV * M * D, HKV * M * DV};
    for (int i = 0, seed = 1; i < 3; i++) {
        for (int j = 0; j < counts[i]; j++, seed = seed * 75 % 65537) {
            all[i][j] = (float)seed / 32768 - 1;
        }
    }
    attn_named_tensor in[] = {{"q", attn_tensor_make(q, ATTN_F32, 4, (int64_t[]){1, H, N, D})},
                              {"k", attn_tensor_make(k, ATTN_F32, 4, (int64_t[]){1, HKV, M, D})},
                              {"v", attn_tensor_make(v, ATTN_F32, 4, (int64_t[]){1, HKV, M, DV})}};
    const char *specs[] = {"based.window:window=20", "dense:causal=true,window=[20,0]"};
    for (int i = 0; i < 2; i++) {
        attn_named_tensor out[] = {{"o", attn_tensor_make(o[i], ATTN_F32, 4, (int64_t[]){1, H, N, DV})}};
        attn_op *op;
        assert_int_equal(attn_op_create(&op, specs[i]), ATTN_OK);
        assert_int_equal(attn_op_forward(op, in, 3, out, 1, NULL), ATTN_OK);
        attn_op_destroy(op);
    }
    for (int i = 0; i < H * N * DV; i++) {
        if (!(fabsf(o[0][i] - o[1][i]) < 1e-5f)) {
            fail_msg("o[%d] = %g, dense %g", i, (double)o[0][i], (double)o[1][i]);
        }
    }
}

/* Without heads at all, forward and backward have nothing to do. */
static void no_heads(void **unused)
{
    (void)unused;
    const char *specs[] = {"based.decode", "lightning", "based", "based.window:window=2", "flow", "flow:causal=true",
                           "agent:grid=[2,3],agent_grid=[1,2],shortcut=0.5", "dsf.attention", "disendiff.attention", "streaming"};
    for (size_t i = 0; i < 2 * sizeof specs / sizeof *specs; i++) { /* without key heads, and with some that nobody reads */
        opcheck_case c = {.spec = specs[i / 2], .seed = 1};
        for (int j = 0; j < 3; j++) {
            opcheck_input(&c, (const char *[]){"q", "k", "v"}[j], SHAPE(2, j > 0 && i % 2 ? 2 : 0, 6, 4));
        }
        opcheck_run(&c, i < 2 ? 0 : 1e-2);
    }
}

/* Products over no channels are 0, whichever way they are computed, and values may have none. */
static void no_channels(void **unused)
{
    (void)unused;
    const char *specs[] = {"lightning", "based", "dsf.attention:phi=taylor,eta=sum", "dsf.attention:phi=elu1", "rcmha.core"};
    for (size_t i = 0; i < 2 * sizeof specs / sizeof *specs; i++) {
        opcheck_case c = {.spec = specs[i / 2], .seed = 1};
        for (int j = 0; j < 3; j++) {
            opcheck_input(&c, (const char *[]){"q", "k", "v"}[j], SHAPE(2, 2, 6, (j == 2) == (i % 2 == 0) ? 4 : 0));
        }
        opcheck_run(&c, 1e-2);
    }
}

/* Queries and keys without channels: all scores are 0, so that o is the mean of the visible values. */
static void based_without_channels(void **unused)
{
    (void)unused;
    float v[3] = {1, 3, 8}, o[3] = {0}, want[3] = {1, 2, 4};
    attn_tensor none = attn_tensor_make(NULL, ATTN_F32, 4, (int64_t[]){1, 1, 3, 0});
    attn_named_tensor in[] = {{"q", none}, {"k", none}, {"v", attn_tensor_make(v, ATTN_F32, 4, (int64_t[]){1, 1, 3, 1})}};
    attn_named_tensor out[] = {{"o", attn_tensor_make(o, ATTN_F32, 4, (int64_t[]){1, 1, 3, 1})}};
    attn_op *op;
    assert_int_equal(attn_op_create(&op, "based"), ATTN_OK);
    assert_int_equal(attn_op_forward(op, in, 3, out, 1, NULL), ATTN_OK);
    attn_op_destroy(op);
    for (int i = 0; i < 3; i++) {
        if (!(fabsf(o[i] - want[i]) < 1e-6f)) {
            fail_msg("o[%d] = %g, expected %g", i, (double)o[i], (double)want[i]);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(lightning), cmocka_unit_test(tnl), cmocka_unit_test(tnl_long), cmocka_unit_test(tnl_errors),
                                       cmocka_unit_test(flow), cmocka_unit_test(flow_conservation), cmocka_unit_test(flow_errors),
                                       cmocka_unit_test(based), cmocka_unit_test(based_layers), cmocka_unit_test(based_conv_in_spans), cmocka_unit_test(based_errors),
                                       cmocka_unit_test(based_without_channels), cmocka_unit_test(based_window_runs), cmocka_unit_test(no_heads),
                                       cmocka_unit_test(no_channels)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
