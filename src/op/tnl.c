/* TransNormerLLM (TNL; arXiv:2307.14995, arXiv:2405.17381): a language model of gated linear attention with decay and gated linear units,
 * with norms that have no weights and relative positions by cosine and sine channels (LRPE). The attention core is exec/linear.h, the
 * decay schedule that of lightning.
 *
 * This file: the operators of a layer. Positions are in tnl_lrpe.c, the attention in tnl_core.c, gated unit, norm and layer in
 * tnl_layer.c, the model in tnl_model.c.
 */
#include "op/lightning.h"
#include "op/tnl.h"

#include <string.h>

static const attn_param_info layer_param_table[] = {TNL_HEADS, TNL_ACT, TNL_EPS, TNL_OFFSET, TNL_BLOCK};

enum { X, W_QKVU, W_O, W_1, W_2, W_3, SLOPE, THETA, MASK, STATE, O, STATE_OUT };

#define PORT_X ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens")
#define PORT_QKVU ATTN_IN("w_qkvu", "4*E,C", FLOAT, ATTN_PORT_DIFF, "projection to queries, keys, values and output gate")
#define PORT_O ATTN_IN("w_o", "C,E", FLOAT, ATTN_PORT_DIFF, "output projection of the attention")
#define PORT_SLOPE ATTN_IN("slope", "Hl", FLOAT, ATTN_PORT_OPTIONAL, "decay rate of each head in this layer (lightning.slopes); absent: 0")
#define PORT_THETA                                                                                                     \
    ATTN_IN("theta", "Ht,dt", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "LRPE angles per token; absent: no positions but the decay")
#define PORT_MASK ATTN_IN("mask", "B,N", BOOL, ATTN_PORT_OPTIONAL, "true for tokens, false for padding")
#define PORT_STATE                                                                                                     \
    ATTN_IN("kv_state", "B,Hs,ks,ds", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "state after earlier tokens, [B,heads,d or 2d,d]")
#define PORT_STATE_OUT ATTN_OUT("kv_state", "B,heads,key,d", FLOAT, 0, "state after these tokens")

static const attn_port_info layer_ports[] = {
    PORT_X, PORT_QKVU, PORT_O,
    ATTN_IN("w_1", "F,C", FLOAT, ATTN_PORT_DIFF, "input projection of the gated unit"),
    ATTN_IN("w_2", "F,C", FLOAT, ATTN_PORT_DIFF, "its other factor"),
    ATTN_IN("w_3", "C,F", FLOAT, ATTN_PORT_DIFF, "its output projection"),
    PORT_SLOPE, PORT_THETA, PORT_MASK, PORT_STATE,
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens after the layer"),
    PORT_STATE_OUT,
};

/* Ports of tnl.attention: those of the layer without the gated unit. */
enum { A_X, A_QKVU, A_O_W, A_SLOPE, A_THETA, A_MASK, A_STATE, A_O, A_STATE_OUT };

static const attn_port_info attention_ports[] = {
    PORT_X, PORT_QKVU, PORT_O, PORT_SLOPE, PORT_THETA, PORT_MASK, PORT_STATE,
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "the attention's output, no residual"),
    PORT_STATE_OUT,
};

static attn_status core_setup(const attn_call *call, const attn_tensor *w_qkvu, const attn_tensor *w_o, const attn_tensor *slope,
                              const attn_tensor *theta, const attn_tensor *mask, const attn_tensor *state, tnl_core *g)
{
    const tnl_params *p = call->params;
    *g = (tnl_core){.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .c = attn_dim(call, "C"), .e = attn_dim(call, "E"),
                .heads = p->heads, .offset = p->offset, .block = p->block, .act = p->act, .eps = p->eps, .w_qkvu = attn_f32(w_qkvu),
                .w_o = attn_f32(w_o), .slope = attn_f32(slope), .theta = attn_f32(theta), .mask = attn_bool(mask),
                .state_in = attn_f32(state)};
    ATTN_TRY(attn_tnl_check_heads(g->e, g->heads));
    g->rows = g->batch * g->n;
    g->d = g->e / g->heads;
    g->key = theta != NULL ? 2 * g->d : g->d;
    if (g->n < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "x has no tokens");
    }
    if (slope != NULL && slope->shape[0] != g->heads) {
        return attn_fail(ATTN_ERR_SHAPE, "slope has %lld numbers, expected heads = %lld", (long long)slope->shape[0], (long long)g->heads);
    }
    if (theta != NULL && (theta->shape[0] != g->heads || theta->shape[1] != g->d)) {
        return attn_fail(ATTN_ERR_SHAPE, "theta is [%lld, %lld], expected [heads, E/heads] = [%lld, %lld]", (long long)theta->shape[0],
                         (long long)theta->shape[1], (long long)g->heads, (long long)g->d);
    }
    if (state != NULL && (state->shape[1] != g->heads || state->shape[2] != g->key || state->shape[3] != g->d)) {
        return attn_fail(ATTN_ERR_SHAPE, "kv_state is [B, %lld, %lld, %lld], expected [B, %lld, %lld, %lld]", (long long)state->shape[1],
                         (long long)state->shape[2], (long long)state->shape[3], (long long)g->heads, (long long)g->key, (long long)g->d);
    }
    return ATTN_OK;
}

static attn_status layer_setup(const attn_call *call, tnl_layer *y)
{
    ATTN_TRY(core_setup(call, call->t[W_QKVU], call->t[W_O], call->t[SLOPE], call->t[THETA], call->t[MASK], call->t[STATE], &y->core));
    y->sglu = (tnl_sglu){y->core.rows, y->core.c, attn_dim(call, "F"), attn_f32(call->t[W_1]), attn_f32(call->t[W_2]),
                     attn_f32(call->t[W_3])};
    return ATTN_OK;
}

static void set_state_dims(attn_call *call, const tnl_core *g)
{
    attn_set_dim(call, "heads", g->heads);
    attn_set_dim(call, "key", g->key);
    attn_set_dim(call, "d", g->d);
}

static attn_status tnl_bind(attn_call *call)
{
    tnl_layer y;
    ATTN_TRY(layer_setup(call, &y));
    set_state_dims(call, &y.core);
    return ATTN_OK;
}

#define PART 1024 /* tokens of a long sequence that go through the layer together: what lies between stays in the caches */

/* One sequence in parts that hand on their state. */
static attn_status run_parts(attn_call *call, const tnl_layer *y, int64_t b)
{
    const tnl_core *g = &y->core;
    int64_t state = g->heads * g->key * g->d, at = b * g->n * g->c;
    float *spare, *out = attn_f32(call->t[STATE_OUT]) + b * state;
    ATTN_TRY(attn_take_f32(call, state, &spare));
    for (int64_t first = 0; first < g->n; first += PART) {
        tnl_layer part = *y;
        part.core.batch = 1;
        part.core.n = part.core.rows = part.sglu.rows = attn_min_i64(PART, g->n - first);
        part.core.offset = g->offset + first;
        part.core.mask = g->mask != NULL ? g->mask + b * g->n + first : NULL;
        part.core.state_in = g->state_in != NULL ? g->state_in + b * state : NULL;
        if (first > 0) {
            memcpy(spare, out, (size_t)state * sizeof *spare);
            part.core.state_in = spare;
        }
        ATTN_TRY(attn_tnl_layer_forward(call, &part, attn_f32(call->t[X]) + at + first * g->c,
                                        attn_f32(call->t[O]) + at + first * g->c, out));
    }
    return ATTN_OK;
}

static attn_status run_layer(attn_call *call, int by_token)
{
    tnl_layer y;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(attn_lightning_check_slopes(y.core.slope, y.core.heads));
    y.core.by_token = by_token;
    for (int64_t b = 0; b < y.core.batch && y.core.n > 2 * PART; b++) {
        ATTN_TRY(run_parts(call, &y, b));
    }
    return y.core.n > 2 * PART ? ATTN_OK
                               : attn_tnl_layer_forward(call, &y, attn_f32(call->t[X]), attn_f32(call->t[O]),
                                                        attn_f32(call->t[STATE_OUT]));
}

static attn_status tnl_forward(attn_call *call) { return run_layer(call, 0); }
static attn_status decode_forward(attn_call *call) { return run_layer(call, 1); }

static attn_status tnl_backward(attn_call *call)
{
    tnl_layer y;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(attn_lightning_check_slopes(y.core.slope, y.core.heads));
    tnl_layer_gradients to = {{NULL, attn_f32(call->grad[W_QKVU]), attn_f32(call->grad[W_O]), attn_f32(call->grad[THETA]),
                           attn_f32(call->grad[STATE])},
                          attn_f32(call->grad[W_1]), attn_f32(call->grad[W_2]), attn_f32(call->grad[W_3])};
    return attn_tnl_layer_backward(call, &y, attn_f32(call->t[X]), attn_f32(call->grad[O]), attn_f32(call->grad[X]),
                                   &to);
}

static attn_status tnl_cost(attn_call *call, attn_cost *cost)
{
    tnl_layer y;
    ATTN_TRY(layer_setup(call, &y));
    cost->flops = attn_tnl_core_flops(&y.core) + 6 * (double)y.core.rows * (double)(y.sglu.c * y.sglu.f);
    return ATTN_OK;
}

static attn_status attention_setup(const attn_call *call, tnl_core *g)
{
    return core_setup(call, call->t[A_QKVU], call->t[A_O_W], call->t[A_SLOPE], call->t[A_THETA], call->t[A_MASK], call->t[A_STATE], g);
}

static attn_status attention_bind(attn_call *call)
{
    tnl_core g;
    ATTN_TRY(attention_setup(call, &g));
    set_state_dims(call, &g);
    return ATTN_OK;
}

static attn_status attention_forward(attn_call *call)
{
    tnl_core g;
    ATTN_TRY(attention_setup(call, &g));
    ATTN_TRY(attn_lightning_check_slopes(g.slope, g.heads));
    return attn_tnl_core_forward(call, &g, attn_f32(call->t[A_X]), attn_f32(call->t[A_O]),
                                 attn_f32(call->t[A_STATE_OUT]));
}

static attn_status attention_backward(attn_call *call)
{
    tnl_core g;
    ATTN_TRY(attention_setup(call, &g));
    ATTN_TRY(attn_lightning_check_slopes(g.slope, g.heads));
    tnl_core_gradients to = {attn_f32(call->grad[A_X]), attn_f32(call->grad[A_QKVU]), attn_f32(call->grad[A_O_W]),
                         attn_f32(call->grad[A_THETA]), attn_f32(call->grad[A_STATE])};
    return attn_tnl_core_backward(call, &g, attn_f32(call->t[A_X]), attn_f32(call->grad[A_O]), &to);
}

static attn_status attention_cost(attn_call *call, attn_cost *cost)
{
    tnl_core g;
    ATTN_TRY(attention_setup(call, &g));
    cost->flops = attn_tnl_core_flops(&g);
    return ATTN_OK;
}

const attn_op_class attn_op_tnl = {
    .info = {.name = "tnl",
             .title = "A TransNormerLLM layer: gated linear attention and a gated linear unit",
             .summary = "One full layer: norm, gated linear attention with decay (lightning), residual, norm, gated linear unit, residual. "
                        "The first layer of the released models also has LRPE positions (theta). Time per token does not depend on the "
                        "length, and the state of generation is one matrix per head.",
             .paper = TNL_PAPER,
             .differentiable = 1,
             ATTN_TABLE(layer_param_table, layer_ports)},
    .params_size = sizeof(tnl_params),
    .bind = tnl_bind,
    .forward = tnl_forward,
    .backward = tnl_backward,
    .cost = tnl_cost,
};

const attn_op_class attn_op_tnl_decode = {
    .info = {.name = "tnl.decode",
             .title = "A TransNormerLLM layer, token by token",
             .summary = "The same layer evaluated as a recurrence, for generation: kv_state and offset continue an earlier call.",
             .paper = TNL_PAPER,
             ATTN_TABLE(layer_param_table, layer_ports)},
    .params_size = sizeof(tnl_params),
    .bind = tnl_bind,
    .forward = decode_forward,
    .cost = tnl_cost,
};

const attn_op_class attn_op_tnl_attention = {
    .info = {.name = "tnl.attention",
             .title = "TransNormerLLM: the gated linear attention alone",
             .summary = "Projection to queries, keys, values and a gate; activation, LRPE, linear attention with decay, norm over all heads "
                        "together, gate, output projection. No norm before it and no residual.",
             .paper = TNL_PAPER,
             .differentiable = 1,
             ATTN_TABLE(layer_param_table, attention_ports)},
    .params_size = sizeof(tnl_params),
    .bind = attention_bind,
    .forward = attention_forward,
    .backward = attention_backward,
    .cost = attention_cost,
};
