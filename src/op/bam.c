/* Branch-Attend-Mix (arXiv:2408.08274): a block whose attention and feed-forward parts are mixtures of experts, and how its parameters are
 * made of those of dense models. */
#include "op/bam.h"

#include "layer/heads.h"
#include "layer/norm.h"

#include <string.h>

/* ---- The parallel block ---- */

typedef struct bam_params {
    bam_moa_params attn; /* its top_k is attn_top_k */
    int64_t ffn_top_k;
    double eps;
} bam_params;

static const attn_param_info bam_param_table[] = {
    BAM_MOA_ENTRIES(bam_params, attn.),
    ATTN_P_INT("attn_top_k", bam_params, attn.top_k, "0", 0, INFINITY, "attention experts per token; 0: all"),
    ATTN_P_INT("ffn_top_k", bam_params, ffn_top_k, "1", 1, INFINITY, "feed-forward experts per token"),
    ATTN_P_FLOAT("eps", bam_params, eps, "1e-5", 0, INFINITY, "added to the variance of the layer norm"),
};

enum { X, LN_W, W_ROUTER_ATTN, W_Q, W_K, W_V, W_O, W_ROUTER_FFN, W_UP, W_DOWN,
       Y, ATTN_GATES, ATTN_INDICES, FFN_GATES, FFN_INDICES, LB_LOSS, Z_LOSS };

static const attn_port_info bam_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "layer input"),
    ATTN_IN("ln_w", "C", FLOAT, ATTN_PORT_DIFF, "weight of the layer norm"),
    ATTN_IN("w_router_attn", "E,C", FLOAT, ATTN_PORT_DIFF, "router of the attention experts"),
    ATTN_IN("w_q", "E,*,C", FLOAT, ATTN_PORT_DIFF, "as in bam.moa"),
    ATTN_IN("w_k", "1|E,*,C", FLOAT, ATTN_PORT_DIFF, "as in bam.moa"),
    ATTN_IN("w_v", "1|E,*,C", FLOAT, ATTN_PORT_DIFF, "as in bam.moa"),
    ATTN_IN("w_o", "E,C,*", FLOAT, ATTN_PORT_DIFF, "as in bam.moa"),
    ATTN_IN("w_router_ffn", "E,C", FLOAT, ATTN_PORT_DIFF, "router of the feed-forward experts"),
    ATTN_IN("w_up", "E,*,C", FLOAT, ATTN_PORT_DIFF, "as in bam.ffn"),
    ATTN_IN("w_down", "E,C,F", FLOAT, ATTN_PORT_DIFF, "as in bam.ffn"),
    ATTN_OUT("y", "B,N,C", FLOAT, ATTN_PORT_DIFF, "x + attention experts + feed-forward experts"),
    ATTN_OUT("attn_gates", "B,N,E", FLOAT, ATTN_PORT_DIFF, "weights of the attention experts"),
    ATTN_OUT("attn_indices", "B,N,Ka", INT, ATTN_PORT_OPTIONAL, "chosen attention experts, with attn_top_k > 0"),
    ATTN_OUT("ffn_gates", "B,N,E", FLOAT, ATTN_PORT_DIFF, "full softmax of the feed-forward router"),
    ATTN_OUT("ffn_indices", "B,N,Kf", INT, 0, "chosen feed-forward experts"),
    ATTN_OUT("lb_loss", "1", FLOAT, ATTN_PORT_DIFF, "load balance of the feed-forward router"),
    ATTN_OUT("z_loss", "1", FLOAT, ATTN_PORT_DIFF, "z loss of the feed-forward router"),
};

static attn_status bam_setup(const attn_call *call, bam_moa *m, bam_ffn *f)
{
    const bam_params *p = call->params;
    ATTN_TRY(attn_bam_moa_setup(call, &p->attn, "attn_top_k", W_ROUTER_ATTN, m));
    return attn_bam_ffn_setup(call, p->ffn_top_k, "ffn_top_k", W_ROUTER_FFN, f);
}

static attn_status bam_bind(attn_call *call)
{
    const bam_params *p = call->params;
    bam_moa m;
    bam_ffn f;
    attn_set_dim(call, "Ka", p->attn.top_k);
    attn_set_dim(call, "Kf", p->ffn_top_k);
    if (p->attn.top_k == 0) {
        attn_drop_output(call, ATTN_INDICES);
    }
    return bam_setup(call, &m, &f);
}

/* The normalised input both parts read. */
static attn_status normalise(attn_call *call, bam_moa *m, bam_ffn *f)
{
    const bam_params *p = call->params;
    float *z = attn_scratch_f32(call, f->tokens * f->width);
    if (z == NULL) {
        return attn_fail_memory((size_t)(f->tokens * f->width) * sizeof(float));
    }
    attn_norm_forward(ATTN_NORM_LAYER, call->threads, f->tokens, f->width, p->eps, attn_f32(call->t[X]), attn_f32(call->t[LN_W]), NULL, z);
    m->x = f->x = z;
    return ATTN_OK;
}

static attn_status bam_forward(attn_call *call)
{
    bam_moa m;
    bam_ffn f;
    ATTN_TRY(bam_setup(call, &m, &f));
    ATTN_TRY(normalise(call, &m, &f));
    float *y = attn_f32(call->t[Y]);
    memcpy(y, call->t[X]->data, (size_t)(f.tokens * f.width) * sizeof *y);
    ATTN_TRY(attn_bam_moa_forward(call, &m, y));
    ATTN_TRY(attn_bam_ffn_forward(call, &f, y, attn_f32(call->t[LB_LOSS]), attn_f32(call->t[Z_LOSS])));
    attn_bam_write_choice(&m.route, 1, call->t[ATTN_GATES], call->t[ATTN_INDICES]);
    attn_bam_write_choice(&f.route, 0, call->t[FFN_GATES], call->t[FFN_INDICES]);
    return ATTN_OK;
}

static attn_status bam_backward(attn_call *call)
{
    const bam_params *p = call->params;
    bam_moa m;
    bam_ffn f;
    ATTN_TRY(bam_setup(call, &m, &f));
    ATTN_TRY(normalise(call, &m, &f));
    int64_t count = f.tokens * f.width;
    float *grad_z = attn_bam_gradient(call, NULL, count), *grad_y = attn_bam_gradient(call, call->grad[Y], count);
    if (grad_z == NULL || grad_y == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    ATTN_TRY(attn_bam_moa_backward(call, &m, grad_y, attn_f32(call->grad[ATTN_GATES]), grad_z, W_ROUTER_ATTN));
    ATTN_TRY(attn_bam_ffn_backward(call, &f, grad_y, attn_f32(call->grad[FFN_GATES]), call->grad[LB_LOSS], call->grad[Z_LOSS], grad_z,
                                   W_ROUTER_FFN));
    float *grad_x = attn_f32(call->grad[X]);
    ATTN_TRY(attn_norm_backward(ATTN_NORM_LAYER, call->arena, call->threads, f.tokens, f.width, p->eps, attn_f32(call->t[X]),
                                attn_f32(call->t[LN_W]), grad_z, grad_x, attn_f32(call->grad[LN_W]), NULL));
    if (grad_x != NULL) {
        attn_add_f32(call->threads, count, grad_x, grad_y);
    }
    return ATTN_OK;
}

static attn_status bam_cost(attn_call *call, attn_cost *cost)
{
    bam_moa m;
    bam_ffn f;
    ATTN_TRY(bam_setup(call, &m, &f));
    attn_bam_moa_cost(&m, cost);
    cost->flops += attn_bam_ffn_flops(&f);
    return ATTN_OK;
}

const attn_op_class attn_op_bam = {
    .info = {.name = "bam",
             .title = "Branch-Attend-Mix: a parallel block of attention and feed-forward experts",
             .summary = "One model out of several specialised ones: y = x + mixture of attention experts + sparse feed-forward experts, both of "
                        "the layer-normalised input. Attention is soft (every expert runs, E times the cost of one), the feed-forward part runs "
                        "ffn_top_k experts per token.",
             .paper = "arXiv:2408.08274",
             .differentiable = 1,
             ATTN_TABLE(bam_param_table, bam_ports)},
    .params_size = sizeof(bam_params),
    .bind = bam_bind,
    .forward = bam_forward,
    .backward = bam_backward,
    .cost = bam_cost,
};

/* ---- Parameters of the mixture ---- */

typedef struct upcycle_params {
    int64_t kv;
} upcycle_params;

static const attn_param_info upcycle_param_table[] = {
    ATTN_P_CHOICE("kv", upcycle_params, kv, "expert", "expert|shared", "expert: each keeps its key and value projections; shared: averaged"),
};

enum { U_INPUTS = 8, U_W_K = 3, U_W_V = 4 };

static const attn_port_info upcycle_ports[] = {
    ATTN_IN("ln_w", "E,C", FLOAT, 0, "layer norm weights of the dense models"),
    ATTN_IN("emb", "E,V,C", FLOAT, 0, "embeddings"),
    ATTN_IN("w_q", "E,Rq,C", FLOAT, 0, "query projections"),
    ATTN_IN("w_k", "E,Rk,C", FLOAT, 0, "key projections"),
    ATTN_IN("w_v", "E,Rv,C", FLOAT, 0, "value projections"),
    ATTN_IN("w_o", "E,C,Ro", FLOAT, 0, "output projections"),
    ATTN_IN("w_up", "E,Ru,C", FLOAT, 0, "feed-forward up projections"),
    ATTN_IN("w_down", "E,C,F", FLOAT, 0, "feed-forward down projections"),
    ATTN_OUT("ln_w", "C", FLOAT, 0, "the average"),
    ATTN_OUT("emb", "V,C", FLOAT, 0, "the average"),
    ATTN_OUT("w_q", "E,Rq,C", FLOAT, 0, "the experts'"),
    ATTN_OUT("w_k", "Ekv,Rk,C", FLOAT, 0, "the experts' or their average"),
    ATTN_OUT("w_v", "Ekv,Rv,C", FLOAT, 0, "the experts' or their average"),
    ATTN_OUT("w_o", "E,C,Ro", FLOAT, 0, "the experts'"),
    ATTN_OUT("w_up", "E,Ru,C", FLOAT, 0, "the experts'"),
    ATTN_OUT("w_down", "E,C,F", FLOAT, 0, "the experts'"),
};

static attn_status upcycle_bind(attn_call *call)
{
    const upcycle_params *p = call->params;
    if (attn_dim(call, "E") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "there are no models to combine: E = 0");
    }
    attn_set_dim(call, "Ekv", p->kv == 1 ? 1 : attn_dim(call, "E"));
    return ATTN_OK;
}

static attn_status upcycle_forward(attn_call *call)
{
    const upcycle_params *p = call->params;
    int64_t experts = attn_dim(call, "E");
    for (int port = 0; port < U_INPUTS; port++) {
        const float *from = attn_f32(call->t[port]);
        float *to = attn_f32(call->t[U_INPUTS + port]);
        int64_t count = attn_tensor_count(call->t[port]);
        if (port > 1 && !(p->kv == 1 && (port == U_W_K || port == U_W_V))) {
            memcpy(to, from, (size_t)count * sizeof *to);
            continue;
        }
        for (int64_t i = 0; i < attn_tensor_count(call->t[U_INPUTS + port]); i++) {
            double sum = 0;
            for (int64_t e = 0; e < experts; e++) {
                sum += (double)from[e * (count / experts) + i];
            }
            to[i] = (float)(sum / (double)experts);
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_bam_upcycle = {
    .info = {.name = "bam.upcycle",
             .title = "Parameters of a Branch-Attend-Mix block from dense models",
             .summary = "Copies the experts' projections, averages norms and embeddings and, with kv = shared, keys and values. Routers are "
                        "left to random initialisation.",
             .paper = "arXiv:2408.08274",
             ATTN_TABLE(upcycle_param_table, upcycle_ports)},
    .params_size = sizeof(upcycle_params),
    .bind = upcycle_bind,
    .forward = upcycle_forward,
};
