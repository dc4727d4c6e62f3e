/* DisenDiff's cross-attention (arXiv:2403.18551): alone, with its map, and of several layers fused with the calibration loss. There the map is
 * never stored: only the 2C watched columns add up while attention runs, and their gradient is put back in while backward computes the
 * probabilities again.
 */
#include "exec/maps.h"
#include "op/disendiff.h"

#include <string.h>

/* ---- disendiff.attention ---- */

static const attn_param_info attention_param_table[] = {ATTENTION_PARAMS};

enum { ATT_Q, ATT_K, ATT_V, ATT_O, ATT_ATTN };

static const attn_port_info attention_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries (picture positions)"),
    ATTN_IN("k", "B,Hkv,T,D", FLOAT, ATTN_PORT_DIFF, "keys (text tokens)"),
    ATTN_IN("v", "B,Hkv,T,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_NO_BACKWARD, "the attention output"),
    ATTN_OUT("attn", "B,H,N,T", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_NO_BACKWARD, "the attention map"),
};

static attn_status attention_bind(attn_call *call)
{
    if (attn_dim(call, "T") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "k needs at least one token");
    }
    return ATTN_OK;
}

static attn_maps attention_maps(const attn_call *call)
{
    const disendiff_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), d = attn_dim(call, "D");
    return (attn_maps){.count = attn_dim(call, "B") * heads, .group = heads > 0 ? heads / kv_heads : 1, .n = attn_dim(call, "N"),
                       .keys = attn_dim(call, "T"), .d = d, .dv = attn_dim(call, "Dv"), .scale = attn_default_scale(p->scale, d),
                       .q = attn_f32(call->t[ATT_Q]), .k = attn_f32(call->t[ATT_K]), .v = attn_f32(call->t[ATT_V])};
}

static attn_status attention_forward(attn_call *call)
{
    attn_maps m = attention_maps(call);
    int64_t blocks = attn_ceil_div(m.n, ATTN_MAPS_ROWS);
    float *map = attn_f32(call->t[ATT_ATTN]);
    ATTN_TRY(attn_maps_begin(&m, 0, call->arena, call->threads));
#pragma omp parallel for num_threads(call->threads)
    for (int64_t task = 0; task < m.count * blocks; task++) {
        int64_t i = task / blocks, first = task % blocks * ATTN_MAPS_ROWS, rows = attn_min_i64(ATTN_MAPS_ROWS, m.n - first);
        const float *p = attn_maps_forward(&m, i, first, rows, attn_f32(call->t[ATT_O]));
        for (int64_t r = 0; r < rows; r++) {
            memcpy(map + (i * m.n + first + r) * m.keys, p + r * m.ld, (size_t)m.keys * sizeof *map);
        }
    }
    return ATTN_OK;
}

/* A task has a share of the rows that read one text; with few texts these are several, whose gradients are added in order. */
#define ENOUGH_TASKS 8

static attn_status attention_backward(attn_call *call)
{
    const disendiff_params *p = call->params;
    attn_maps m = attention_maps(call);
    int64_t texts = m.count / m.group, per = attn_ceil_div(m.n, ATTN_MAPS_ROWS), blocks = per * m.group; /* of a text */
    int64_t shares = texts > 0 ? attn_max_i64(1, attn_min_i64(blocks, attn_ceil_div(ENOUGH_TASKS, texts))) : 1;
    int64_t each = m.keys * (m.d + m.dv), freeze = attn_min_i64(p->freeze, m.keys);
    const float *grad_o = attn_f32(call->grad[ATT_O]), *grad_map = attn_f32(call->grad[ATT_ATTN]);
    float *grad_q = attn_f32(call->grad[ATT_Q]), *parts;
    ATTN_TRY(attn_maps_begin(&m, 1, call->arena, call->threads));
    ATTN_TRY(attn_take_f32(call, texts * shares * each, &parts));
#pragma omp parallel for num_threads(call->threads)
    for (int64_t task = 0; task < texts * shares; task++) {
        float *grad_k = parts + task * each, *grad_v = grad_k + m.keys * m.d;
        int64_t share = task % shares, last = blocks * (share + 1) / shares;
        memset(grad_k, 0, (size_t)each * sizeof *grad_k);
        for (int64_t block = blocks * share / shares; block < last; block++) {
            int64_t i = task / shares * m.group + block / per, first = block % per * ATTN_MAPS_ROWS;
            int64_t rows = attn_min_i64(ATTN_MAPS_ROWS, m.n - first);
            attn_maps_forward(&m, i, first, rows, NULL);
            float *dp = attn_maps_gradient(&m, i, first, rows, grad_o);
            for (int64_t r = 0; r < rows && grad_map != NULL; r++) {
                m.kernels->axpy(dp + r * m.ld, grad_map + (i * m.n + first + r) * m.keys, m.keys, 1);
            }
            attn_maps_backward(&m, i, first, rows, grad_o, freeze, grad_q, grad_k, grad_v);
        }
    }
    for (int64_t task = 0; task < texts * shares; task++) {
        const float *part = parts + task * each;
        int64_t text = task / shares;
        if (call->grad[ATT_K] != NULL) {
            m.kernels->axpy(attn_f32(call->grad[ATT_K]) + text * m.keys * m.d, part, m.keys * m.d, 1);
        }
        if (call->grad[ATT_V] != NULL) {
            m.kernels->axpy(attn_f32(call->grad[ATT_V]) + text * m.keys * m.dv, part + m.keys * m.d, m.keys * m.dv, 1);
        }
    }
    return ATTN_OK;
}

static attn_cost cost_of(double maps, const attn_call *call)
{
    double pairs = maps * (double)attn_dim(call, "N") * (double)attn_dim(call, "T");
    return (attn_cost){.flops = 2 * pairs * ((double)attn_dim(call, "D") + (double)attn_dim(call, "Dv")), .pairs = pairs};
}

static attn_status attention_cost(attn_call *call, attn_cost *cost)
{
    *cost = cost_of((double)attn_dim(call, "B") * (double)attn_dim(call, "H"), call);
    return ATTN_OK;
}

const attn_op_class attn_op_disendiff_attention = {
    .info = {.name = "disendiff.attention",
             .title = "Cross-attention with a frozen start token",
             .summary = "Softmax cross-attention over a short text that returns its map; the first tokens' keys and values get no gradient.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE(attention_param_table, attention_ports)},
    .params_size = sizeof(disendiff_params),
    .bind = attention_bind,
    .forward = attention_forward,
    .backward = attention_backward,
    .cost = attention_cost,
};

/* ---- disendiff.train: attention of all layers and the loss on it, fused ---- */

static const attn_param_info train_param_table[] = {CALIBRATION_PARAMS, ATTENTION_PARAMS};

enum { TRAIN_Q, TRAIN_K, TRAIN_V, TRAIN_MODIFIER, TRAIN_O, TRAIN_LOSS, TRAIN_BIND, TRAIN_SEPARATE, TRAIN_MAPS };

static const attn_port_info train_ports[] = {
    ATTN_IN("q", "L,B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries of L layers of one resolution"),
    ATTN_IN("k", "L,B,H,T,D", FLOAT, ATTN_PORT_DIFF, "keys (text tokens)"),
    ATTN_IN("v", "L,B,H,T,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_IN("modifier", "B,C", INT, 0, "text position of each concept's modifier, its class word follows; a row of -1: none"),
    ATTN_OUT("o", "L,B,H,N,Dv", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_NO_BACKWARD, "the attention output"),
    LOSS_PORTS,
};

static attn_status train_bind(attn_call *call)
{
    ATTN_TRY(attention_bind(call));
    return attn_disendiff_bind(call);
}

static attn_maps train_maps(const attn_call *call)
{
    const disendiff_params *p = call->params;
    int64_t d = attn_dim(call, "D");
    return (attn_maps){.count = attn_dim(call, "L") * attn_dim(call, "B") * attn_dim(call, "H"), .group = 1, .n = attn_dim(call, "N"),
                       .keys = attn_dim(call, "T"), .d = d, .dv = attn_dim(call, "Dv"), .scale = attn_default_scale(p->scale, d),
                       .q = attn_f32(call->t[TRAIN_Q]), .k = attn_f32(call->t[TRAIN_K]), .v = attn_f32(call->t[TRAIN_V])};
}

/* Attention of all layers: o (may be NULL) and the watched columns. A task owns rows of a sample and goes through all its layers and
 * heads in order, so that columns add up without a reduction. Samples without concepts leave little to do: tasks are taken one by one. */
static void train_attend(attn_call *call, const attn_maps *m, const calibration *c, float *o)
{
    int64_t heads = attn_dim(call, "H"), maps = attn_dim(call, "L") * heads, blocks = attn_ceil_div(m->n, ATTN_MAPS_ROWS);
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->threads)
    for (int64_t task = 0; task < c->batch * blocks; task++) {
        int64_t b = task / blocks, first = task % blocks * ATTN_MAPS_ROWS, rows = attn_min_i64(ATTN_MAPS_ROWS, m->n - first);
        int64_t watched = attn_disendiff_is_active(c, b) ? 2 * c->concepts : 0;
        for (int64_t s = 0; s < maps && (o != NULL || watched > 0); s++) {
            const float *p = attn_maps_forward(m, (s / heads * c->batch + b) * heads + s % heads, first, rows, o);
            for (int64_t w = 0; w < watched; w++) {
                double *to = c->columns + (b * watched + w) * m->n + first;
                int64_t column = attn_disendiff_column(c, b, w);
                for (int64_t r = 0; r < rows; r++) {
                    to[r] += (double)p[r * m->ld + column] / (double)maps;
                }
            }
        }
    }
}

static attn_status train_forward(attn_call *call)
{
    calibration c;
    attn_maps m = train_maps(call);
    ATTN_TRY(attn_disendiff_begin(call, call->t[TRAIN_MODIFIER], &c));
    ATTN_TRY(attn_maps_begin(&m, 0, call->arena, call->threads));
    train_attend(call, &m, &c, attn_f32(call->t[TRAIN_O]));
    return attn_disendiff_loss(call, &c, TRAIN_LOSS);
}

static float *offset(const attn_tensor *tensor, int64_t by) { return tensor != NULL ? attn_f32(tensor) + by : NULL; }

static attn_status train_backward(attn_call *call)
{
    const disendiff_params *p = call->params;
    const float *grad_o = attn_f32(call->grad[TRAIN_O]), *grad_loss = attn_f32(call->grad[TRAIN_LOSS]);
    int64_t heads = attn_dim(call, "H"), maps = attn_dim(call, "L") * heads;
    calibration c;
    attn_maps m = train_maps(call);
    ATTN_TRY(attn_disendiff_begin(call, call->t[TRAIN_MODIFIER], &c));
    ATTN_TRY(attn_maps_begin(&m, 1, call->arena, call->threads));
    if (grad_loss != NULL) {
        train_attend(call, &m, &c, NULL);
        ATTN_TRY(attn_disendiff_loss_backward(call, &c, (double)grad_loss[0]));
    }
#pragma omp parallel for num_threads(call->threads)
    for (int64_t i = 0; i < m.count; i++) {
        int64_t b = i / heads % c.batch,
                watched = grad_loss != NULL && attn_disendiff_is_active(&c, b) ? 2 * c.concepts : 0;
        for (int64_t first = 0; first < m.n; first += ATTN_MAPS_ROWS) {
            int64_t rows = attn_min_i64(ATTN_MAPS_ROWS, m.n - first);
            attn_maps_forward(&m, i, first, rows, NULL);
            float *dp = attn_maps_gradient(&m, i, first, rows, grad_o);
            for (int64_t w = 0; w < watched; w++) {
                const double *from = c.grad_columns + (b * watched + w) * m.n + first;
                int64_t column = attn_disendiff_column(&c, b, w);
                for (int64_t r = 0; r < rows; r++) {
                    dp[r * m.ld + column] += (float)(from[r] / (double)maps);
                }
            }
            attn_maps_backward(&m, i, first, rows, grad_o, attn_min_i64(p->freeze, m.keys), attn_f32(call->grad[TRAIN_Q]),
                               offset(call->grad[TRAIN_K], i * m.keys * m.d), offset(call->grad[TRAIN_V], i * m.keys * m.dv));
        }
    }
    return ATTN_OK;
}

static attn_status train_cost(attn_call *call, attn_cost *cost)
{
    *cost = cost_of((double)attn_dim(call, "L") * (double)attn_dim(call, "B") * (double)attn_dim(call, "H"), call);
    return ATTN_OK;
}

const attn_op_class attn_op_disendiff_train = {
    .info = {.name = "disendiff.train",
             .title = "Cross-attention with the calibration loss, fused",
             .summary = "Attention of several layers and the calibration loss on their maps. Only the watched columns of the maps are kept, "
                        "so the cost is that of the attention and memory is linear.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE(train_param_table, train_ports)},
    .params_size = sizeof(disendiff_params),
    .bind = train_bind,
    .forward = train_forward,
    .backward = train_backward,
    .cost = train_cost,
};
