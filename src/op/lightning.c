/* Lightning Attention-2 (arXiv:2401.04658): causal linear attention with one exponential decay rate per head, in tiles.
 *
 *     S_i = exp(-slope) S_{i-1} + k_i^T v_i,    o_i = scale * q_i S_i
 *
 * No softmax and no normaliser: those belong to the layer around it.
 */
#include "op/lightning.h"

#include "exec/linear.h"

typedef struct lightning_params {
    double scale;
    int64_t block;
} lightning_params;

#define P_SCALE ATTN_P_FLOAT("scale", lightning_params, scale, "1.0", -INFINITY, INFINITY, "multiplies q.k (not 1/sqrt(D))")

static const attn_param_info lightning_param_table[] = {
    P_SCALE,
    ATTN_P_INT("block", lightning_params, block, "64", 1, INFINITY, "tokens of a tile, 256 at most are used: changes speed and rounding only"),
};
static const attn_param_info decode_param_table[] = {P_SCALE};

enum { Q, K, V, SLOPE, STATE, O, STATE_OUT };

static const attn_port_info lightning_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries, already activated"),
    ATTN_IN("k", "B,Hkv,N,D", FLOAT, ATTN_PORT_DIFF, "keys, already activated"),
    ATTN_IN("v", "B,Hkv,N,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_IN("slope", "H", FLOAT, ATTN_PORT_OPTIONAL, "decay rate of each query head: a token one step older weighs exp(-slope) as much (absent: no decay)"),
    ATTN_IN("kv_state", "B,H,D,Dv", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "state left by earlier tokens (absent: zeros)"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("kv_state", "B,H,D,Dv", FLOAT, 0, "state after the last token"),
};

attn_status attn_lightning_check_slopes(const float *slope, int64_t heads)
{
    for (int64_t h = 0; h < heads && slope != NULL; h++) {
        if (!(slope[h] >= 0) || isinf(slope[h])) {
            return attn_fail(ATTN_ERR_ARGUMENT, "slope[%lld] = %g: expected a finite number >= 0", (long long)h, (double)slope[h]);
        }
    }
    return ATTN_OK;
}

static attn_status lightning_bind(attn_call *call)
{
    const lightning_params *p = call->params;
    if (!isfinite(p->scale)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "scale = %g: expected a finite number", p->scale);
    }
    if (attn_dim(call, "N") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "q has N = 0 tokens: expected at least one");
    }
    return ATTN_OK;
}

static attn_linattn shape_of(const attn_call *call)
{
    const lightning_params *p = call->params;
    int64_t n = attn_dim(call, "N");
    return (attn_linattn){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"), .n = n,
                          .m = n, .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"), .causal = 1, .chunk = p->block,
                          .scale = p->scale, .slope = attn_f32(call->t[SLOPE])};
}

static attn_status lightning_forward(attn_call *call)
{
    attn_linattn x = shape_of(call);
    ATTN_TRY(attn_lightning_check_slopes(x.slope, x.heads));
    return attn_linattn_forward(&x, call->arena, call->threads, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]),
                                attn_f32(call->t[STATE]), attn_f32(call->t[O]), attn_f32(call->t[STATE_OUT]));
}

static attn_status lightning_backward(attn_call *call)
{
    attn_linattn x = shape_of(call);
    ATTN_TRY(attn_lightning_check_slopes(x.slope, x.heads));
    return attn_linattn_backward(&x, call->arena, call->threads, attn_f32(call->t[Q]), attn_f32(call->t[K]),
                                 attn_f32(call->t[V]), attn_f32(call->t[STATE]), attn_f32(call->grad[O]),
                                 attn_f32(call->grad[Q]), attn_f32(call->grad[K]), attn_f32(call->grad[V]),
                                 attn_f32(call->grad[STATE]));
}

static attn_status decode_forward(attn_call *call)
{
    attn_linattn x = shape_of(call);
    x.chunk = 0;
    ATTN_TRY(attn_lightning_check_slopes(x.slope, x.heads));
    return attn_linattn_decode(&x, call->arena, call->threads, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]),
                               attn_f32(call->t[STATE]), attn_f32(call->t[STATE_OUT]), attn_f32(call->t[O]));
}

static attn_status lightning_cost(attn_call *call, attn_cost *cost)
{
    attn_linattn x = shape_of(call);
    cost->flops = attn_linattn_flops(&x);
    return ATTN_OK;
}

static attn_status decode_cost(attn_call *call, attn_cost *cost)
{
    attn_linattn x = shape_of(call);
    double numbers = (double)(x.batch * x.heads * x.n) * (double)(x.d * x.dv);
    cost->flops = 5 * numbers;
    cost->bytes = 8 * numbers;
    return ATTN_OK;
}

/* ---- lightning.slopes ---- */

typedef struct slopes_params {
    int64_t heads, layer, layers, schedule;
    double eps;
} slopes_params;

static const attn_param_info slopes_param_table[] = {
    ATTN_P_INT("heads", slopes_params, heads, NULL, 1, INFINITY, "number of heads"),
    ATTN_P_INT("layer", slopes_params, layer, "0", 0, INFINITY, "which layer, counted from 0"),
    ATTN_P_INT("layers", slopes_params, layers, "1", 1, INFINITY, "layers of the model"),
    ATTN_P_CHOICE("schedule", slopes_params, schedule, "geometric", "geometric|linear",
                  "geometric as in the released models, or linear as printed in the TransNormerLLM paper"),
    ATTN_P_FLOAT("eps", slopes_params, eps, "1e-5", 0, INFINITY, "keeps the last layer's slopes above zero (geometric only)"),
};

static const attn_port_info slopes_ports[] = {
    ATTN_OUT("slope", "heads", FLOAT, 0, "decay rate of each head"),
};

static attn_status slopes_bind(attn_call *call)
{
    const slopes_params *p = call->params;
    if (p->layer >= p->layers) {
        return attn_fail(ATTN_ERR_ARGUMENT, "layer = %lld: expected less than layers = %lld", (long long)p->layer,
                         (long long)p->layers);
    }
    attn_set_dim(call, "heads", p->heads);
    return ATTN_OK;
}

void attn_lightning_slopes(int64_t schedule, int64_t heads, int64_t layer, int64_t layers, double eps, float *slope)
{
    int64_t power = 1;
    while (power * 2 <= heads) {
        power *= 2;
    }
    for (int64_t h = 0; h < heads; h++) {
        if (schedule == ATTN_SLOPES_LINEAR) {
            slope[h] = (float)(8.0 * (double)h / (double)heads * (1 - (double)layer / (double)layers));
            continue;
        }
        /* Past a power of two: every other element of the list for twice as many heads. */
        double rank = h < power ? (double)(h + 1) / (double)power : (double)(2 * (h - power) + 1) / (double)(2 * power);
        double depth = layers > 1 ? (double)layer / (double)(layers - 1) : 0;
        slope[h] = (float)(exp2(-8 * rank) * (1 - depth + eps));
    }
}

static attn_status slopes_forward(attn_call *call)
{
    const slopes_params *p = call->params;
    attn_lightning_slopes(p->schedule, p->heads, p->layer, p->layers, p->eps, attn_f32(call->t[0]));
    return ATTN_OK;
}

const attn_op_class attn_op_lightning = {
    .info = {
        .name = "lightning",
        .title = "Causal linear attention with decay, in tiles",
        .summary = "Linear attention with one exponential decay rate per head (Lightning Attention-2): ordinary products inside a tile "
                   "of tokens, a D x Dv state between tiles. For models trained with it (TransNormerLLM and later hybrids). Time per "
                   "token does not depend on the length: block*(D + Dv) + 4*D*Dv operations per head, and memory is one state.",
        .paper = "arXiv:2401.04658",
        ATTN_TABLE(lightning_param_table, lightning_ports),
        .differentiable = 1,
    },
    .params_size = sizeof(lightning_params),
    .bind = lightning_bind,
    .forward = lightning_forward,
    .backward = lightning_backward,
    .cost = lightning_cost,
};

const attn_op_class attn_op_lightning_decode = {
    .info = {
        .name = "lightning.decode",
        .title = "Lightning attention token by token",
        .summary = "The same function as lightning, evaluated as a recurrence for generation: each token reads and writes the state "
                   "once, whatever came before it. Start from the kv_state that lightning returned for the prompt.",
        .paper = "arXiv:2401.04658",
        ATTN_TABLE(decode_param_table, lightning_ports),
    },
    .params_size = sizeof(lightning_params),
    .bind = lightning_bind,
    .forward = decode_forward,
    .cost = decode_cost,
};

const attn_op_class attn_op_lightning_slopes = {
    .info = {
        .name = "lightning.slopes",
        .title = "Decay rates of lightning attention",
        .summary = "The decay rate of each head of a layer, as input `slope` of lightning. Early layers forget fastest.",
        .paper = "arXiv:2401.04658",
        ATTN_TABLE(slopes_param_table, slopes_ports),
    },
    .params_size = sizeof(slopes_params),
    .bind = slopes_bind,
    .forward = slopes_forward,
};
