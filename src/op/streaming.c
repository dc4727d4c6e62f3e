/* StreamingLLM (arXiv:2309.17453): each query sees the first few tokens, which soak up attention that has nowhere to go, and the most
 * recent ones. The cache stays constant however long the text gets. */
#include "op/class.h"
#include "plan/plan.h"

#define BLOCK 64
#define FEW_ROWS 16 /* query rows of a group for which lists of keys are faster than blocks */

typedef struct streaming_params {
    int64_t sinks, recent;
    double scale;
} streaming_params;

static const attn_param_info params[] = {
    ATTN_P_INT("sinks", streaming_params, sinks, "4", 0, INFINITY, "the first keys, visible to all later queries"),
    ATTN_P_INT("recent", streaming_params, recent, "1024", 1, INFINITY, "the last keys up to and including the query's own position"),
    ATTN_P_SCALE(streaming_params, scale),
};

enum { Q, K, V, KEY_LENGTH, O, LSE };

static const attn_port_info ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_ANY_LAYOUT | ATTN_PORT_DIFF, "queries; query n stands at position n + M - N"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_ANY_LAYOUT | ATTN_PORT_DIFF, "keys; query head h reads head h / (H/Hkv)"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_ANY_LAYOUT | ATTN_PORT_DIFF, "values"),
    ATTN_IN("key_length", "B", INT, ATTN_PORT_OPTIONAL, "keys at or past it are masked"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_ANY_LAYOUT | ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("lse", "B,H,N", FLOAT, ATTN_PORT_F32, "log-sum-exp of the visible scores; -inf for a query that sees nothing"),
};

/* The band and the sinks, the same for all heads. */
static attn_status make_plan(const attn_call *call, attn_plan **plan)
{
    const streaming_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M"), heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv");
    int few = kv_heads > 0 && heads / kv_heads * n <= FEW_ROWS;
    attn_plan_shape shape = {1, 1, n, m, few ? attn_max_i64(n, 1) : BLOCK, few ? 1 : BLOCK};
    return attn_plan_streaming(plan, &shape, p->sinks, p->recent);
}

static attn_status select_plan(attn_call *call, attn_plan *plan)
{
    attn_plan *made;
    ATTN_TRY(make_plan(call, &made));
    attn_plan_take(plan, made);
    return ATTN_OK;
}

static attn_dense_settings settings_of(const attn_call *call)
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = ((const streaming_params *)call->params)->scale;
    return settings;
}

static attn_dense_inputs inputs_of(const attn_call *call)
{
    return (attn_dense_inputs){.q = *call->t[Q], .k = *call->t[K], .v = *call->t[V], .key_length = call->t[KEY_LENGTH]};
}

static attn_status forward(attn_call *call)
{
    attn_plan *plan;
    attn_dense_settings settings = settings_of(call);
    attn_dense_inputs in = inputs_of(call);
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    ATTN_TRY(make_plan(call, &plan));
    attn_status status = attn_plan_forward(plan, &settings, &in, call->t[O], call->t[LSE], &exec);
    attn_plan_destroy(plan);
    return status;
}

static attn_status backward(attn_call *call)
{
    attn_plan *plan;
    attn_dense_settings settings = settings_of(call);
    attn_dense_inputs in = inputs_of(call);
    attn_dense_gradients to = {.q = call->grad[Q], .k = call->grad[K], .v = call->grad[V]};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    ATTN_TRY(make_plan(call, &plan));
    attn_status status = attn_plan_backward(plan, &settings, &in, call->t[O], call->t[LSE], call->grad[O], &to, &exec);
    attn_plan_destroy(plan);
    return status;
}

static attn_status cost(attn_call *call, attn_cost *cost)
{
    const streaming_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M");
    double pairs = 0;
    for (int64_t row = 0; row < n; row++) {
        int64_t seen = attn_max_i64(0, row + m - n + 1), recent = attn_min_i64(seen, p->recent);
        pairs += (double)(recent + attn_min_i64(seen - recent, p->sinks));
    }
    cost->pairs = pairs * (double)attn_dim(call, "B") * (double)attn_dim(call, "H");
    cost->flops = 2 * cost->pairs * (double)(attn_dim(call, "D") + attn_dim(call, "Dv"));
    return ATTN_OK;
}

const attn_op_class attn_op_streaming = {
    .info = {.name = "streaming",
             .title = "Attention sinks and recent keys (StreamingLLM)",
             .summary = "Causal attention of each query to the first `sinks` keys and to the `recent` last ones. Pretrained language models keep "
                        "working because much of their attention rests on the first tokens. Use it for heads that look nearby and for "
                        "generation without end. Costs N (sinks + recent) pairs per head instead of N^2 / 2.",
             .paper = "arXiv:2309.17453",
             .differentiable = 1,
             ATTN_TABLE(params, ports)},
    .params_size = sizeof(streaming_params),
    .select = select_plan,
    .forward = forward,
    .backward = backward,
    .cost = cost,
};
