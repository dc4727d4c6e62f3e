/* Exact attention (FlashAttention, arXiv:2205.14135, arXiv:2307.08691): what every sparse mechanism is measured against. */
#include "op/class.h"
#include <attn/dense.h>

typedef struct dense_params {
    int64_t causal;
    attn_ints window;
    double scale, softcap;
} dense_params;

static const attn_param_info params[] = {
    ATTN_P_BOOL("causal", dense_params, causal, "false", "key j is visible to query n only if j <= n + M - N"),
    ATTN_P_LIST(INTS, "window", dense_params, window, "[-1,-1]", -1, INFINITY, 2, 2,
                "[left, right]: keys i-left ... i+right are visible, i = n + M - N; -1: no bound"),
    ATTN_P_SCALE(dense_params, scale),
    ATTN_P_FLOAT("softcap", dense_params, softcap, "0", 0, INFINITY, "scores become softcap * tanh(scores / softcap); 0: off"),
};

enum { Q, K, V, BIAS, SLOPES, SINKS, KEY_LENGTH, K_SCALE, V_SCALE, O, LSE };

#define ANY ATTN_PORT_ANY_LAYOUT
#define OPTIONAL ATTN_PORT_OPTIONAL
#define DIFF ATTN_PORT_DIFF

static const attn_port_info ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ANY | DIFF, "queries"),
    ATTN_IN("k", "B,Hkv,M,D", CACHE, ANY | DIFF, "keys; query head h reads head h / (H/Hkv)"),
    ATTN_IN("v", "B,Hkv,M,Dv", CACHE, ANY | DIFF, "values"),
    ATTN_IN("bias", "1|B,1|H,N,M", FLOAT, ANY | OPTIONAL | DIFF, "added to the scores"),
    ATTN_IN("slopes", "H", FLOAT, OPTIONAL | DIFF, "ALiBi: slopes[h] * |i - j| is subtracted"),
    ATTN_IN("sinks", "H", FLOAT, OPTIONAL | DIFF, "one more logit per head, with a value of zero"),
    ATTN_IN("key_length", "B", INT, OPTIONAL, "keys at or past it are masked"),
    ATTN_IN("k_scale", "B,Hkv,M", FLOAT, OPTIONAL, "scale of each int8 key"),
    ATTN_IN("v_scale", "B,Hkv,M", FLOAT, OPTIONAL, "scale of each int8 value"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ANY | DIFF, "the attention output"),
    ATTN_OUT("lse", "B,H,N", FLOAT, ATTN_PORT_F32, "log-sum-exp of the final scores"),
};

static attn_dense_settings settings_of(const attn_call *call)
{
    const dense_params *p = call->params;
    return (attn_dense_settings){.causal = (int)p->causal, .window = {p->window.items[0], p->window.items[1]}, .scale = p->scale,
                                 .softcap = p->softcap};
}

static attn_dense_inputs inputs_of(const attn_call *call)
{
    return (attn_dense_inputs){.q = *call->t[Q], .k = *call->t[K], .v = *call->t[V], .bias = call->t[BIAS],
                               .slopes = call->t[SLOPES], .sinks = call->t[SINKS], .key_length = call->t[KEY_LENGTH],
                               .k_scale = call->t[K_SCALE], .v_scale = call->t[V_SCALE]};
}

static attn_status forward(attn_call *call)
{
    attn_dense_settings settings = settings_of(call);
    attn_dense_inputs in = inputs_of(call);
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    return attn_dense_forward(&settings, &in, call->t[O], call->t[LSE], &exec);
}

static attn_status backward(attn_call *call)
{
    attn_dense_settings settings = settings_of(call);
    attn_dense_inputs in = inputs_of(call);
    attn_dense_gradients gradients = {.q = call->grad[Q], .k = call->grad[K], .v = call->grad[V], .bias = call->grad[BIAS],
                                      .slopes = call->grad[SLOPES], .sinks = call->grad[SINKS]};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    return attn_dense_backward(&settings, &in, call->t[O], call->t[LSE], call->grad[O], &gradients, &exec);
}

static attn_status cost(attn_call *call, attn_cost *cost)
{
    const dense_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M");
    double pairs = 0;
    for (int64_t row = 0; row < n; row++) {
        int64_t i = row + m - n, low = 0, high = m;
        if (p->causal) {
            high = attn_min_i64(high, i + 1);
        }
        if (p->window.items[0] >= 0) {
            low = attn_max_i64(low, i - p->window.items[0]);
        }
        if (p->window.items[1] >= 0) {
            high = attn_min_i64(high, i + p->window.items[1] + 1);
        }
        pairs += (double)attn_max_i64(0, high - low);
    }
    cost->pairs = pairs * (double)attn_dim(call, "B") * (double)attn_dim(call, "H");
    cost->flops = 2 * cost->pairs * (double)(attn_dim(call, "D") + attn_dim(call, "Dv"));
    return ATTN_OK;
}

const attn_op_class attn_op_dense = {
    .info = {.name = "dense",
             .title = "Exact softmax attention",
             .summary = "Scaled dot-product attention over all visible keys, tiled with the online softmax, so that the score matrix is never "
                        "stored. Forward, backward, and one-token decoding over caches in f32, f16, bf16 or int8. "
                        "Costs 2 N M (D + Dv) operations per head; memory is linear.",
             .paper = "arXiv:2307.08691",
             .differentiable = 1,
             ATTN_TABLE(params, ports)},
    .params_size = sizeof(dense_params),
    .forward = forward,
    .backward = backward,
    .cost = cost,
};
