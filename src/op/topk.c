/* Exact top-k attention: each query, or block of queries, attends only to the keys, or key blocks, that get most of its attention. As a
 * selector it is an oracle (all scores are computed first, a strip of rows at a time): the quality that approximations are measured by. */
#include "op/class.h"
#include "exec/topk.h"
#include "plan/plan.h"

typedef struct topk_params {
    int64_t top_k, causal, share_group, block_q, block_k;
    double scale;
} topk_params;

#define CAUSAL_PARAM ATTN_P_BOOL("causal", topk_params, causal, "true", "key j is visible to query n only if j <= n + M - N")

static const attn_param_info params[] = {
    ATTN_P_INT("top_k", topk_params, top_k, NULL, 1, INFINITY, "keys kept per query; all visible ones when there are fewer"),
    CAUSAL_PARAM,
    ATTN_P_SCALE(topk_params, scale),
    ATTN_P_BOOL("share_group", topk_params, share_group, "false",
                "one selection per key/value head, by the probabilities of its query heads summed"),
};

static const attn_param_info blocks_params[] = {
    ATTN_P_INT("block_q", topk_params, block_q, "64", 1, INFINITY, "queries of a block; the last one may be short"),
    ATTN_P_INT("block_k", topk_params, block_k, "64", 1, INFINITY, "keys of a block; the last one may be short"),
    ATTN_P_INT("top_k", topk_params, top_k, NULL, 1, INFINITY, "key blocks kept per query block"),
    CAUSAL_PARAM,
    ATTN_P_SCALE(topk_params, scale),
};

enum { Q, K, V, O, LSE, SELECTION };

#define ANY_DIFF (ATTN_PORT_ANY_LAYOUT | ATTN_PORT_DIFF)

#define QKV_PORTS                                                                                                      \
    ATTN_IN("q", "B,H,N,D", FLOAT, ANY_DIFF, "queries"),                                                               \
        ATTN_IN("k", "B,Hkv,M,D", FLOAT, ANY_DIFF, "keys; query head h reads head h / (H/Hkv)"),                       \
        ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ANY_DIFF, "values"),                                                         \
        ATTN_OUT("o", "B,H,N,Dv", FLOAT, ANY_DIFF, "the attention output"),                                            \
        ATTN_OUT("lse", "B,H,N", FLOAT, ATTN_PORT_F32, "log-sum-exp over the kept keys")

static const attn_port_info ports[] = {
    QKV_PORTS,
    ATTN_OUT("indices", "B,lists,N,kept", INT, ATTN_PORT_FOR_BACKWARD,
             "kept key positions, ascending, -1 in unused slots; one list per query head, or per key/value head with share_group"),
};

static const attn_port_info blocks_ports[] = {
    QKV_PORTS,
    ATTN_OUT("blocks", "B,H,nq,kept", INT, 0, "kept key blocks per query block, ascending, -1 in unused slots"),
};

static int64_t visible(const attn_call *call, int64_t n)
{
    const topk_params *p = call->params;
    int64_t m = attn_dim(call, "M");
    return p->causal ? attn_max_i64(0, attn_min_i64(m, n + m - attn_dim(call, "N") + 1)) : m;
}

static attn_topk_settings choice_of(const attn_call *call)
{
    const topk_params *p = call->params;
    return (attn_topk_settings){.top_k = p->top_k, .causal = (int)p->causal, .share_group = (int)p->share_group, .scale = p->scale};
}

static attn_dense_settings settings_of(const attn_call *call)
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = ((const topk_params *)call->params)->scale;
    return settings;
}

static attn_dense_inputs inputs_of(const attn_call *call)
{
    return (attn_dense_inputs){.q = *call->t[Q], .k = *call->t[K], .v = *call->t[V]};
}

static attn_exec exec_of(const attn_call *call) { return (attn_exec){.threads = call->threads, .arena = call->arena}; }

/* Block sizes that are not larger than the axis, so that they cannot overflow; the blocks stay the same. */
static int64_t block_q(const attn_call *call)
{
    return attn_max_i64(1, attn_min_i64(((const topk_params *)call->params)->block_q, attn_dim(call, "N")));
}

static int64_t block_k(const attn_call *call)
{
    return attn_max_i64(1, attn_min_i64(((const topk_params *)call->params)->block_k, attn_dim(call, "M")));
}

static attn_status bind(attn_call *call)
{
    const topk_params *p = call->params;
    attn_set_dim(call, "lists", p->share_group ? attn_dim(call, "Hkv") : attn_dim(call, "H"));
    attn_set_dim(call, "kept", p->top_k);
    return ATTN_OK;
}

static attn_status blocks_bind(attn_call *call)
{
    const topk_params *p = call->params;
    attn_set_dim(call, "nq", attn_ceil_div(attn_dim(call, "N"), block_q(call)));
    attn_set_dim(call, "kept", p->top_k);
    return ATTN_OK;
}

/* A plan from the selection. */
static attn_status plan_keys(const attn_call *call, const attn_tensor *selection, attn_plan **plan)
{
    attn_plan_shape shape = {attn_dim(call, "B"), attn_dim(call, "lists"), attn_dim(call, "N"), attn_dim(call, "M"), 1, 1};
    attn_plan_rule rule = {((const topk_params *)call->params)->causal, 0, -1, -1};
    return attn_plan_from_lists(plan, &shape, selection, &rule);
}

static attn_status plan_blocks(const attn_call *call, const attn_tensor *selection, attn_plan **plan)
{
    attn_plan_shape shape = {attn_dim(call, "B"), attn_dim(call, "H"), attn_dim(call, "N"), attn_dim(call, "M"), block_q(call), block_k(call)};
    attn_plan_rule rule = {((const topk_params *)call->params)->causal, 0, -1, -1};
    return attn_plan_from_lists(plan, &shape, selection, &rule);
}

static int is_blocks(const attn_call *call) { return call->cls == attn_op_class_find("topk.blocks"); }

static attn_status make_plan(const attn_call *call, const attn_tensor *selection, attn_plan **plan)
{
    return is_blocks(call) ? plan_blocks(call, selection, plan) : plan_keys(call, selection, plan);
}

/* Nothing to list: no batch item or no head. */
static int is_empty(const attn_call *call)
{
    return attn_dim(call, "B") == 0 || attn_dim(call, "H") == 0 || attn_dim(call, "N") == 0;
}

/* The choice alone. */
static attn_status choose(const attn_call *call, int64_t *kept)
{
    attn_topk_settings choice = choice_of(call);
    attn_dense_inputs in = inputs_of(call);
    attn_exec exec = exec_of(call);
    return is_blocks(call) ? attn_topk_blocks(&choice, &in, block_q(call), block_k(call), kept, &exec)
                           : attn_topk_forward(&choice, &in, kept, NULL, NULL, &exec);
}

static attn_status select_plan(attn_call *call, attn_plan *plan)
{
    attn_plan *made;
    int blocks = is_blocks(call);
    int64_t shape[] = {attn_dim(call, "B"), attn_dim(call, blocks ? "H" : "lists"), attn_dim(call, blocks ? "nq" : "N"),
                       attn_dim(call, "kept")};
    attn_tensor selection = attn_tensor_make(NULL, ATTN_I64, 4, shape);
    selection.data = attn_arena_array(call->arena, (size_t)attn_tensor_count(&selection) + 1, sizeof(int64_t));
    if (selection.data == NULL) {
        return attn_fail_memory((size_t)attn_tensor_count(&selection) * sizeof(int64_t));
    }
    ATTN_TRY(choose(call, selection.data));
    ATTN_TRY(make_plan(call, &selection, &made));
    attn_plan_take(plan, made);
    return ATTN_OK;
}

static attn_status forward(attn_call *call)
{
    attn_topk_settings choice = choice_of(call);
    attn_dense_inputs in = inputs_of(call);
    attn_exec exec = exec_of(call);
    return attn_topk_forward(&choice, &in, attn_i64(call->t[SELECTION]), call->t[O], call->t[LSE], &exec);
}

static attn_status blocks_forward(attn_call *call)
{
    attn_plan *plan;
    attn_dense_settings settings = settings_of(call);
    attn_dense_inputs in = inputs_of(call);
    attn_exec exec = exec_of(call);
    if (is_empty(call)) {
        return ATTN_OK;
    }
    ATTN_TRY(choose(call, attn_i64(call->t[SELECTION])));
    ATTN_TRY(make_plan(call, call->t[SELECTION], &plan));
    attn_status status = attn_plan_forward(plan, &settings, &in, call->t[O], call->t[LSE], &exec);
    attn_plan_destroy(plan);
    return status;
}

static attn_status backward(attn_call *call)
{
    attn_plan *plan;
    attn_dense_settings settings = settings_of(call);
    attn_dense_inputs in = inputs_of(call);
    attn_exec exec = exec_of(call);
    if (is_empty(call)) {
        return ATTN_OK;
    }
    attn_dense_gradients to = {.q = call->grad[Q], .k = call->grad[K], .v = call->grad[V]};
    ATTN_TRY(make_plan(call, call->t[SELECTION], &plan));
    attn_status status = attn_plan_backward(plan, &settings, &in, call->t[O], call->t[LSE], call->grad[O], &to, &exec);
    attn_plan_destroy(plan);
    return status;
}

/* The attention of the kept pairs (a kept block counts whole); the selection's own scores are in the operations only. */
static attn_status cost(attn_call *call, attn_cost *cost)
{
    const topk_params *p = call->params;
    double selection = 0;
    int blocks = is_blocks(call);
    for (int64_t n = 0; n < attn_dim(call, "N"); n++) {
        int64_t seen = visible(call, n);
        double most = (double)p->top_k * (blocks ? (double)block_k(call) : 1);
        cost->pairs += most < (double)seen ? most : (double)seen;
        selection += (double)seen;
    }
    double lists = (double)attn_dim(call, "B") * (double)attn_dim(call, "H");
    cost->pairs *= lists;
    cost->flops = 2 * cost->pairs * (double)(attn_dim(call, "D") + attn_dim(call, "Dv")) + 2 * selection * lists * (double)attn_dim(call, "D");
    return ATTN_OK;
}

const attn_op_class attn_op_topk = {
    .info = {.name = "topk",
             .title = "Exact top-k attention, per query",
             .summary = "Each query attends to the top_k visible keys with its largest scores. An oracle: all scores are computed first, so it "
                        "shows what a selector could reach at best. Costs 2 N M D operations for the selection, then N top_k pairs.",
             .paper = "",
             .differentiable = 1,
             ATTN_TABLE(params, ports)},
    .params_size = sizeof(topk_params),
    .bind = bind,
    .select = select_plan,
    .forward = forward,
    .backward = backward,
    .cost = cost,
};

const attn_op_class attn_op_topk_blocks = {
    .info = {.name = "topk.blocks",
             .title = "Exact top-k attention, per block of queries",
             .summary = "Each block of queries attends to the top_k key blocks that get most of its softmax probability; with causality its "
                        "diagonal block is always one of them. An oracle for block-sparse selection: all scores are computed first. Costs "
                        "2 N M D operations for the selection, then N top_k block_k pairs.",
             .paper = "",
             .differentiable = 1,
             ATTN_TABLE(blocks_params, blocks_ports)},
    .params_size = sizeof(topk_params),
    .bind = blocks_bind,
    .select = select_plan,
    .forward = blocks_forward,
    .backward = backward,
    .cost = cost,
};
