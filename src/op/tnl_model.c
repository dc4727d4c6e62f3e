/* A TransNormerLLM model: embeddings, layers with the decay of their depth, a last norm, logits. */
#include "layer/linear.h"
#include "layer/norm.h"
#include "op/lightning.h"
#include "op/tnl.h"

#include <string.h>

static const attn_param_info model_param_table[] = {
    TNL_HEADS,
    ATTN_P_LIST(INTS, "lrpe_layers", tnl_params, lrpe_layers, "[0]", 0, INFINITY, 0, 0, "layers that have LRPE, in the order of theta"),
    ATTN_P_BOOL("scale_embedding", tnl_params, scale_embedding, "true", "embeddings are multiplied by sqrt(C)"),
    ATTN_P_CHOICE("schedule", tnl_params, schedule, "geometric", "geometric|linear", "decay schedule, as in lightning.slopes"),
    TNL_ACT,
    TNL_EPS,
};

enum { M_TOKENS, M_EMBED, M_QKVU, M_O_W, M_1, M_2, M_3, M_THETA, M_HEAD, M_O };

static const attn_port_info model_ports[] = {
    ATTN_IN("tokens", "B,N", INT, 0, "token ids"),
    ATTN_IN("embed", "V,C", FLOAT, ATTN_PORT_DIFF, "token embeddings"),
    ATTN_IN("w_qkvu", "L,4*E,C", FLOAT, ATTN_PORT_DIFF, "weights of the layers, as in tnl"),
    ATTN_IN("w_o", "L,C,E", FLOAT, ATTN_PORT_DIFF, "output projections of the layers"),
    ATTN_IN("w_1", "L,F,C", FLOAT, ATTN_PORT_DIFF, "input projections of their gated units"),
    ATTN_IN("w_2", "L,F,C", FLOAT, ATTN_PORT_DIFF, "the other factors"),
    ATTN_IN("w_3", "L,C,F", FLOAT, ATTN_PORT_DIFF, "output projections of the gated units"),
    ATTN_IN("theta", "Lr,Ht,dt", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "LRPE angles of the layers in lrpe_layers"),
    ATTN_IN("lm_head", "V,C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "output projection; absent: embed"),
    ATTN_OUT("o", "B,N,V", FLOAT, ATTN_PORT_DIFF, "logits"),
};

/* Index of a layer's angles; -1 when it has none. */
static int64_t lrpe_index(const tnl_params *p, int64_t layer_index)
{
    for (int i = 0; i < p->lrpe_layers.count; i++) {
        if (p->lrpe_layers.items[i] == layer_index) {
            return i;
        }
    }
    return -1;
}

static attn_status model_bind(attn_call *call)
{
    const tnl_params *p = call->params;
    const attn_tensor *theta = call->t[M_THETA];
    int64_t layers = attn_dim(call, "L"), e = attn_dim(call, "E");
    ATTN_TRY(attn_tnl_check_heads(e, p->heads));
    if ((theta != NULL ? theta->shape[0] : 0) != p->lrpe_layers.count) {
        return attn_fail(ATTN_ERR_SHAPE, "theta holds the angles of %lld layers, lrpe_layers lists %d",
                         (long long)(theta != NULL ? theta->shape[0] : 0), p->lrpe_layers.count);
    }
    if (theta != NULL && (theta->shape[1] != p->heads || theta->shape[2] != e / p->heads)) {
        return attn_fail(ATTN_ERR_SHAPE, "theta is [%lld, %lld, %lld], expected [layers, heads, E/heads] = [%d, %lld, %lld]",
                         (long long)theta->shape[0], (long long)theta->shape[1], (long long)theta->shape[2], p->lrpe_layers.count,
                         (long long)p->heads, (long long)(e / p->heads));
    }
    for (int i = 0; i < p->lrpe_layers.count; i++) {
        if (p->lrpe_layers.items[i] >= layers || lrpe_index(p, p->lrpe_layers.items[i]) != i) {
            return attn_fail(ATTN_ERR_ARGUMENT, "lrpe_layers[%d] = %lld: expected different layers below L = %lld", i,
                             (long long)p->lrpe_layers.items[i], (long long)layers);
        }
    }
    return ATTN_OK;
}

typedef struct model {
    int64_t layers, rows, c, e, f, vocabulary, angles; /* angles: of one layer */
    float factor;
    float *slopes; /* [layers][heads] */
    const int64_t *tokens;
    const float *head;
} model;

static attn_status model_setup(attn_call *call, model *m)
{
    const tnl_params *p = call->params;
    *m = (model){.layers = attn_dim(call, "L"), .rows = attn_dim(call, "B") * attn_dim(call, "N"), .c = attn_dim(call, "C"),
                 .e = attn_dim(call, "E"), .f = attn_dim(call, "F"), .vocabulary = attn_dim(call, "V"), .angles = attn_dim(call, "E"),
                 .tokens = attn_i64(call->t[M_TOKENS])};
    m->factor = p->scale_embedding ? (float)sqrt((double)m->c) : 1.0f;
    m->head = attn_f32(call->t[call->t[M_HEAD] != NULL ? M_HEAD : M_EMBED]);
    ATTN_TRY(attn_take_f32(call, m->layers * p->heads, &m->slopes));
    for (int64_t l = 0; l < m->layers; l++) {
        attn_lightning_slopes(p->schedule, p->heads, l, m->layers, 1e-5, m->slopes + l * p->heads);
    }
    for (int64_t r = 0; r < m->rows; r++) {
        if (m->tokens[r] < 0 || m->tokens[r] >= m->vocabulary) {
            return attn_fail(ATTN_ERR_ARGUMENT, "tokens holds %lld, expected 0 ... %lld", (long long)m->tokens[r],
                             (long long)(m->vocabulary - 1));
        }
    }
    return ATTN_OK;
}

static tnl_layer model_layer(const attn_call *call, const model *m, int64_t l)
{
    const tnl_params *p = call->params;
    int64_t lrpe = lrpe_index(p, l), weights = m->f * m->c, d = m->e / p->heads;
    return (tnl_layer){.core = {.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .rows = m->rows, .c = m->c, .e = m->e, .heads = p->heads,
                            .d = d, .key = lrpe >= 0 ? 2 * d : d, .block = 64, .act = p->act, .eps = p->eps,
                            .w_qkvu = attn_f32(call->t[M_QKVU]) + l * 4 * m->e * m->c, .w_o = attn_f32(call->t[M_O_W]) + l * m->c * m->e,
                            .slope = m->slopes + l * p->heads, .theta = lrpe >= 0 ? attn_f32(call->t[M_THETA]) + lrpe * m->angles : NULL},
                   .sglu = {m->rows, m->c, m->f, attn_f32(call->t[M_1]) + l * weights, attn_f32(call->t[M_2]) + l * weights,
                            attn_f32(call->t[M_3]) + l * weights}};
}

static void embed(const attn_call *call, const model *m, float *x)
{
    const float *table = attn_f32(call->t[M_EMBED]);
    for (int64_t r = 0; r < m->rows; r++) {
        for (int64_t c = 0; c < m->c; c++) {
            x[r * m->c + c] = m->factor * table[m->tokens[r] * m->c + c];
        }
    }
}

/* The residual stream before each layer and after the last: xs [layers + 1] pointers, which may all be the same. */
static attn_status run_layers(attn_call *call, const model *m, float **xs)
{
    embed(call, m, xs[0]);
    for (int64_t l = 0; l < m->layers; l++) {
        tnl_layer y = model_layer(call, m, l);
        ATTN_TRY(attn_tnl_layer_forward(call, &y, xs[l], xs[l + 1], NULL));
    }
    return ATTN_OK;
}

static attn_status model_forward(attn_call *call)
{
    const tnl_params *p = call->params;
    model m;
    ATTN_TRY(model_setup(call, &m));
    float *x, **xs = attn_arena_array(call->arena, (size_t)m.layers + 1, sizeof *xs);
    ATTN_TRY(attn_take_f32(call, m.rows * m.c, &x));
    if (xs == NULL) {
        return attn_fail_memory((size_t)(m.layers + 1) * sizeof *xs);
    }
    for (int64_t l = 0; l <= m.layers; l++) {
        xs[l] = x;
    }
    ATTN_TRY(run_layers(call, &m, xs));
    attn_norm_forward(ATTN_NORM_RMS, call->threads, m.rows, m.c, p->eps, x, NULL, NULL, x);
    return attn_linear_forward(call->arena, call->threads, m.rows, m.c, m.vocabulary, x, m.head, NULL, attn_f32(call->t[M_O]));
}

static float *slice(const attn_tensor *grad, int64_t at) { return grad != NULL ? attn_f32(grad) + at : NULL; }

static attn_status model_backward(attn_call *call)
{
    const tnl_params *p = call->params;
    model m;
    ATTN_TRY(model_setup(call, &m));
    int64_t count = m.rows * m.c, weights = m.f * m.c;
    float *memory, *grad, *normed, **xs = attn_arena_array(call->arena, (size_t)m.layers + 1, sizeof *xs);
    ATTN_TRY(attn_take_f32(call, (m.layers + 1) * count, &memory));
    ATTN_TRY(attn_take_f32(call, count, &grad));
    ATTN_TRY(attn_take_f32(call, count, &normed));
    if (xs == NULL) {
        return attn_fail_memory((size_t)(m.layers + 1) * sizeof *xs);
    }
    for (int64_t l = 0; l <= m.layers; l++) {
        xs[l] = memory + l * count;
    }
    ATTN_TRY(run_layers(call, &m, xs));
    attn_norm_forward(ATTN_NORM_RMS, call->threads, m.rows, m.c, p->eps, xs[m.layers], NULL, NULL, normed);
    float *grad_embed = attn_f32(call->grad[M_EMBED]);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, m.rows, m.c, m.vocabulary, normed, m.head, attn_f32(call->grad[M_O]), grad,
                                  call->t[M_HEAD] != NULL ? attn_f32(call->grad[M_HEAD]) : grad_embed, NULL));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, m.rows, m.c, p->eps, xs[m.layers], NULL, grad, normed, NULL,
                                NULL));
    memcpy(grad, normed, (size_t)count * sizeof *grad);
    for (int64_t l = m.layers - 1; l >= 0; l--) {
        tnl_layer y = model_layer(call, &m, l);
        int64_t lrpe = lrpe_index(p, l);
        tnl_layer_gradients to = {{NULL, slice(call->grad[M_QKVU], l * 4 * m.e * m.c), slice(call->grad[M_O_W], l * m.c * m.e),
                               lrpe >= 0 ? slice(call->grad[M_THETA], lrpe * m.angles) : NULL, NULL},
                              slice(call->grad[M_1], l * weights), slice(call->grad[M_2], l * weights), slice(call->grad[M_3], l * weights)};
        ATTN_TRY(attn_tnl_layer_backward(call, &y, xs[l], grad, grad, &to));
    }
    for (int64_t r = 0; r < m.rows && grad_embed != NULL; r++) {
        for (int64_t c = 0; c < m.c; c++) {
            grad_embed[m.tokens[r] * m.c + c] += m.factor * grad[r * m.c + c];
        }
    }
    return ATTN_OK;
}

static attn_status model_cost(attn_call *call, attn_cost *cost)
{
    const tnl_params *p = call->params;
    double rows = (double)(attn_dim(call, "B") * attn_dim(call, "N")), c = (double)attn_dim(call, "C"), e = (double)attn_dim(call, "E");
    double d = e / (double)p->heads;
    for (int64_t l = 0; l < attn_dim(call, "L"); l++) {
        double key = lrpe_index(p, l) >= 0 ? 2 * d : d;
        cost->flops += rows * (10 * c * e + (double)p->heads * (4 * key * d + 64 * (key + d)) + 6 * c * (double)attn_dim(call, "F"));
    }
    cost->flops += 2 * rows * c * (double)attn_dim(call, "V");
    return ATTN_OK;
}

const attn_op_class attn_op_tnl_model = {
    .info = {.name = "tnl.model",
             .title = "A TransNormerLLM model, from tokens to logits",
             .summary = "Scaled embeddings, tnl layers with the decay of their depth, a last norm, and logits by the embedding or lm_head.",
             .paper = TNL_PAPER,
             .differentiable = 1,
             ATTN_TABLE(model_param_table, model_ports)},
    .params_size = sizeof(tnl_params),
    .bind = model_bind,
    .forward = model_forward,
    .backward = model_backward,
    .cost = model_cost,
};
