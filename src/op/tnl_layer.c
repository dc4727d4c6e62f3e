/* The gated linear unit of TransNormerLLM, the operators of it and of the norm, and a layer: norm, attention, norm, gated unit. */
#include "layer/heads.h"
#include "layer/linear.h"
#include "layer/norm.h"
#include "op/tnl.h"

/* ---- SGLU: (x w_1 * x w_2) w_3 ---- */

static attn_status sglu_hidden(attn_call *call, const tnl_sglu *s, const float *x, float **a, float **b, float **product)
{
    ATTN_TRY(attn_take_f32(call, s->rows * s->f, a));
    ATTN_TRY(attn_take_f32(call, s->rows * s->f, b));
    ATTN_TRY(attn_take_f32(call, s->rows * s->f, product));
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, s->rows, s->c, s->f, x, s->w_1, NULL, *a));
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, s->rows, s->c, s->f, x, s->w_2, NULL, *b));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < s->rows * s->f; i++) {
        (*product)[i] = (*a)[i] * (*b)[i];
    }
    return ATTN_OK;
}

attn_status attn_tnl_sglu_forward(attn_call *call, const tnl_sglu *s, const float *x, float *o)
{
    float *a, *b, *product;
    ATTN_TRY(sglu_hidden(call, s, x, &a, &b, &product));
    return attn_linear_forward(call->arena, call->threads, s->rows, s->f, s->c, product, s->w_3, NULL, o);
}

attn_status attn_tnl_sglu_backward(attn_call *call, const tnl_sglu *s, const float *x, const float *grad_o,
                                   float *grad_x, float *grad_1, float *grad_2, float *grad_3)
{
    float *a, *b, *product, *h, *more;
    ATTN_TRY(sglu_hidden(call, s, x, &a, &b, &product));
    ATTN_TRY(attn_take_f32(call, s->rows * s->f, &h));
    ATTN_TRY(attn_take_f32(call, s->rows * s->c, &more));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, s->rows, s->f, s->c, product, s->w_3, grad_o, h, grad_3, NULL));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < s->rows * s->f; i++) {
        float left = a[i];
        a[i] = h[i] * b[i];
        b[i] = h[i] * left;
    }
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, s->rows, s->c, s->f, x, s->w_1, a, grad_x, grad_1, NULL));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, s->rows, s->c, s->f, x, s->w_2, b, grad_x != NULL ? more : NULL, grad_2,
                                  NULL));
    if (grad_x != NULL) {
        attn_add_f32(call->threads, s->rows * s->c, grad_x, more);
    }
    return ATTN_OK;
}

/* ---- A layer ---- */

attn_status attn_tnl_layer_forward(attn_call *call, const tnl_layer *y, const float *x, float *o, float *state_out)
{
    const tnl_core *g = &y->core;
    int64_t count = g->rows * g->c;
    float *normed, *update;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    ATTN_TRY(attn_take_f32(call, count, &normed));
    ATTN_TRY(attn_take_f32(call, count, &update));
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->c, g->eps, x, NULL, NULL, normed);
    ATTN_TRY(attn_tnl_core_forward(call, g, normed, update, state_out));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < count; i++) {
        o[i] = x[i] + update[i];
    }
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->c, g->eps, o, NULL, NULL, normed);
    ATTN_TRY(attn_tnl_sglu_forward(call, &y->sglu, normed, update));
    attn_add_f32(call->threads, count, o, update);
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

attn_status attn_tnl_layer_backward(attn_call *call, const tnl_layer *y, const float *x, const float *grad_o,
                                    float *grad_x, const tnl_layer_gradients *to)
{
    const tnl_core *g = &y->core;
    int64_t count = g->rows * g->c;
    float *normed, *middle, *middle_normed, *grad, *through, *grad_middle;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    ATTN_TRY(attn_take_f32(call, count, &normed));
    ATTN_TRY(attn_take_f32(call, count, &middle));
    ATTN_TRY(attn_take_f32(call, count, &middle_normed));
    ATTN_TRY(attn_take_f32(call, count, &grad));
    ATTN_TRY(attn_take_f32(call, count, &through));
    ATTN_TRY(attn_take_f32(call, count, &grad_middle));
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->c, g->eps, x, NULL, NULL, normed);
    ATTN_TRY(attn_tnl_core_forward(call, g, normed, middle, NULL));
    attn_add_f32(call->threads, count, middle, x);
    attn_norm_forward(ATTN_NORM_RMS, call->threads, g->rows, g->c, g->eps, middle, NULL, NULL, middle_normed);
    ATTN_TRY(attn_tnl_sglu_backward(call, &y->sglu, middle_normed, grad_o, grad, to->w_1, to->w_2, to->w_3));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, g->rows, g->c, g->eps, middle, NULL, grad, grad_middle, NULL,
                                NULL));
    attn_add_f32(call->threads, count, grad_middle, grad_o);
    tnl_core_gradients inner = to->core;
    inner.x = grad;
    ATTN_TRY(attn_tnl_core_backward(call, g, normed, grad_middle, &inner));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, g->rows, g->c, g->eps, x, NULL, grad, through, NULL, NULL));
    if (grad_x != NULL) {
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
        for (int64_t i = 0; i < count; i++) {
            grad_x[i] = through[i] + grad_middle[i];
        }
    }
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* ---- tnl.sglu ---- */

enum { S_X, S_1, S_2, S_3, S_O };

static const attn_port_info sglu_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens"),
    ATTN_IN("w_1", "F,C", FLOAT, ATTN_PORT_DIFF, "input projection"),
    ATTN_IN("w_2", "F,C", FLOAT, ATTN_PORT_DIFF, "the other factor"),
    ATTN_IN("w_3", "C,F", FLOAT, ATTN_PORT_DIFF, "output projection"),
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "(x w_1 * x w_2) w_3"),
};

static tnl_sglu sglu_setup(const attn_call *call)
{
    return (tnl_sglu){attn_dim(call, "B") * attn_dim(call, "N"), attn_dim(call, "C"), attn_dim(call, "F"), attn_f32(call->t[S_1]),
                  attn_f32(call->t[S_2]), attn_f32(call->t[S_3])};
}

static attn_status sglu_op_forward(attn_call *call)
{
    tnl_sglu s = sglu_setup(call);
    return attn_tnl_sglu_forward(call, &s, attn_f32(call->t[S_X]), attn_f32(call->t[S_O]));
}

static attn_status sglu_op_backward(attn_call *call)
{
    tnl_sglu s = sglu_setup(call);
    return attn_tnl_sglu_backward(call, &s, attn_f32(call->t[S_X]), attn_f32(call->grad[S_O]),
                                  attn_f32(call->grad[S_X]), attn_f32(call->grad[S_1]), attn_f32(call->grad[S_2]),
                                  attn_f32(call->grad[S_3]));
}

const attn_op_class attn_op_tnl_sglu = {
    .info = {.name = "tnl.sglu",
             .title = "TransNormerLLM: simple gated linear unit",
             .summary = "A feed-forward layer without any activation: the product of two projections, projected back.",
             .paper = TNL_PAPER,
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(sglu_ports)},
    .forward = sglu_op_forward,
    .backward = sglu_op_backward,
};

/* ---- tnl.srmsnorm ---- */

static const attn_param_info norm_param_table[] = {TNL_EPS};

enum { N_X, N_O };

static const attn_port_info norm_ports[] = {
    ATTN_IN("x", "...,C", FLOAT, ATTN_PORT_DIFF, "rows, of any rank"),
    ATTN_OUT("o", "...,C", FLOAT, ATTN_PORT_DIFF, "x / sqrt(mean(x^2) + eps)"),
};

static int64_t norm_rows(const attn_call *call)
{
    int64_t width = attn_dim(call, "C");
    return width > 0 ? attn_tensor_count(call->t[N_X]) / width : 0;
}

static attn_status norm_forward(attn_call *call)
{
    const tnl_params *p = call->params;
    attn_norm_forward(ATTN_NORM_RMS, call->threads, norm_rows(call), attn_dim(call, "C"), p->eps, attn_f32(call->t[N_X]), NULL, NULL,
                      attn_f32(call->t[N_O]));
    return ATTN_OK;
}

static attn_status norm_backward(attn_call *call)
{
    const tnl_params *p = call->params;
    return attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, norm_rows(call), attn_dim(call, "C"), p->eps,
                              attn_f32(call->t[N_X]), NULL, attn_f32(call->grad[N_O]), attn_f32(call->grad[N_X]), NULL, NULL);
}

const attn_op_class attn_op_tnl_srmsnorm = {
    .info = {.name = "tnl.srmsnorm",
             .title = "TransNormerLLM: simple RMS norm",
             .summary = "Rows divided by their root mean square, without weights.",
             .paper = TNL_PAPER,
             .differentiable = 1,
             ATTN_TABLE(norm_param_table, norm_ports)},
    .params_size = sizeof(tnl_params),
    .forward = norm_forward,
    .backward = norm_backward,
};
