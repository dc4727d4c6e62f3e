/* Sparse gated feed-forward experts (arXiv:2408.08274), bam.ffn. */
#include "op/bam.h"

#include "layer/linear.h"

#include <string.h>

attn_status attn_bam_ffn_setup(const attn_call *call, int64_t chosen, const char *top_k, int first, bam_ffn *f)
{
    const attn_tensor *up = call->t[first + 1], *down = call->t[first + 2];
    *f = (bam_ffn){.tokens = attn_dim(call, "B") * attn_dim(call, "N"), .width = attn_dim(call, "C"), .experts = attn_dim(call, "E"),
                       .hidden = down->shape[2], .chosen = chosen, .w_router = attn_f32(call->t[first]), .w_up = attn_f32(up),
                       .w_down = attn_f32(down)};
    if (up->shape[1] != 2 * f->hidden) {
        return attn_fail(ATTN_ERR_SHAPE, "w_up has %lld rows per expert, expected 2F = %lld", (long long)up->shape[1],
                         (long long)(2 * f->hidden));
    }
    if (chosen > f->experts) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s = %lld, expected 1 ... E = %lld", top_k, (long long)chosen,
                         (long long)f->experts);
    }
    return ATTN_OK;
}

static attn_ffn expert_at(const bam_ffn *f, int64_t e)
{
    return (attn_ffn){.in = f->width, .hidden = f->hidden, .out = f->width, .activation = ATTN_ACTIVATION_SILU, .gated = 1,
                      .up = f->w_up + e * 2 * f->hidden * f->width, .down = f->w_down + e * f->width * f->hidden};
}

static attn_status route(attn_call *call, bam_ffn *f)
{
    f->route = (bam_choice){.tokens = f->tokens, .experts = f->experts, .chosen = f->chosen};
    return attn_bam_route(call, &f->route, f->width, f->x, f->w_router);
}

attn_status attn_bam_ffn_forward(attn_call *call, bam_ffn *f, float *y, float *lb_loss, float *z_loss)
{
    ATTN_TRY(route(call, f));
    const bam_choice *r = &f->route;
    float *x = attn_scratch_f32(call, 2 * f->tokens * f->width), *part = x + f->tokens * f->width;
    double balance = 0, z = 0, tokens = (double)f->tokens;
    if (x == NULL) {
        return attn_fail_memory((size_t)(2 * f->tokens * f->width) * sizeof(float));
    }
    for (int64_t e = 0; e < f->experts; e++) {
        int64_t count = bam_count(r, e);
        attn_ffn expert = expert_at(f, e);
        double probability = 0;
        for (int64_t t = 0; t < f->tokens; t++) {
            probability += (double)r->p[t * f->experts + e];
        }
        balance += probability * (double)count;
        if (count == 0) {
            continue;
        }
        const float *rows = attn_bam_rows(call, r, e, f->width, f->x, x);
        ATTN_TRY(attn_ffn_forward(&expert, call->arena, call->threads, count, rows, part));
        attn_bam_weigh(call, r, e, 0, count, f->width, part);
        attn_rows_scatter_add(call->threads, f->width, part, bam_list(r, e), count, y);
    }
    for (int64_t t = 0; t < f->tokens; t++) {
        z += r->lse[t] * r->lse[t];
    }
    *lb_loss = f->tokens > 0 ? (float)((double)f->experts * balance / (tokens * tokens)) : 0.0f;
    *z_loss = f->tokens > 0 ? (float)(z / tokens) : 0.0f;
    return ATTN_OK;
}

attn_status attn_bam_ffn_backward(attn_call *call, bam_ffn *f, const float *grad_y, const float *grad_gates, const attn_tensor *lb_loss,
                                  const attn_tensor *z_loss, float *grad_x, int first)
{
    double balance = lb_loss != NULL ? (double)attn_f32(lb_loss)[0] : 0, z = z_loss != NULL ? (double)attn_f32(z_loss)[0] : 0;
    float *grad_up = attn_f32(call->grad[first + 1]), *grad_down = attn_f32(call->grad[first + 2]);
    ATTN_TRY(route(call, f));
    const bam_choice *r = &f->route;
    int64_t size = f->tokens * f->width;
    float *x = attn_scratch_f32(call, 4 * size), *out = x + size, *gy = out + size, *gx = gy + size;
    float *logits = attn_scratch_f32(call, f->tokens * f->experts);
    double tokens = (double)f->tokens;
    if (x == NULL || logits == NULL) {
        return attn_fail_memory((size_t)(4 * size) * sizeof(float));
    }
    for (int64_t e = 0; e < f->experts; e++) {
        int64_t count = bam_count(r, e), up = 2 * f->hidden * f->width, down = f->width * f->hidden;
        attn_ffn expert = expert_at(f, e);
        for (int64_t t = 0; t < f->tokens; t++) {
            int64_t at = t * f->experts + e;
            logits[at] = (float)((grad_gates != NULL ? (double)grad_gates[at] : 0) +
                                 balance * (double)f->experts * (double)count / (tokens * tokens));
        }
        if (count == 0) {
            continue;
        }
        const int64_t *list = bam_list(r, e);
        const float *rows = attn_bam_rows(call, r, e, f->width, f->x, x);
        attn_rows_gather(call->threads, f->width, grad_y, list, count, gy);
        ATTN_TRY(attn_ffn_forward(&expert, call->arena, call->threads, count, rows, out));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
        for (int64_t i = 0; i < count; i++) {
            double sum = 0;
            for (int64_t c = 0; c < f->width; c++) {
                sum += (double)gy[i * f->width + c] * (double)out[i * f->width + c];
            }
            logits[list[i] * f->experts + e] += (float)sum;
        }
        attn_bam_weigh(call, r, e, 0, count, f->width, gy);
        ATTN_TRY(attn_ffn_backward(&expert, call->arena, call->threads, count, rows, gy, gx, grad_up != NULL ? grad_up + e * up : NULL, NULL,
                                   grad_down != NULL ? grad_down + e * down : NULL, NULL));
        attn_rows_scatter_add(call->threads, f->width, gx, list, count, grad_x);
    }
    for (int64_t t = 0; t < f->tokens; t++) {
        const float *p = r->p + t * f->experts;
        attn_softmax_row_back(f->experts, p, logits + t * f->experts);
        for (int64_t e = 0; e < f->experts; e++) {
            logits[t * f->experts + e] += (float)(2 * z * r->lse[t] * (double)p[e] / tokens);
        }
    }
    return attn_linear_backward_add(call->arena, call->threads, f->tokens, f->width, f->experts, f->x, f->w_router, logits, grad_x,
                                    attn_f32(call->grad[first]), NULL);
}

typedef struct ffn_params {
    int64_t top_k;
} ffn_params;

static const attn_param_info ffn_param_table[] = {
    ATTN_P_INT("top_k", ffn_params, top_k, "1", 1, INFINITY, "experts per token"),
};

enum { F_X, F_W_ROUTER, F_W_UP, F_W_DOWN, F_Y, F_GATES, F_INDICES, F_LB_LOSS, F_Z_LOSS };

static const attn_port_info ffn_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "normalised layer input"),
    ATTN_IN("w_router", "E,C", FLOAT, ATTN_PORT_DIFF, "router"),
    ATTN_IN("w_up", "E,*,C", FLOAT, ATTN_PORT_DIFF, "[E, 2F, C]: F rows of the gate, then F of the linear part"),
    ATTN_IN("w_down", "E,C,F", FLOAT, ATTN_PORT_DIFF, "output projections"),
    ATTN_OUT("y", "B,N,C", FLOAT, ATTN_PORT_DIFF, "the mixture"),
    ATTN_OUT("gates", "B,N,E", FLOAT, ATTN_PORT_DIFF, "the full softmax of the router"),
    ATTN_OUT("indices", "B,N,K", INT, 0, "chosen experts, best first"),
    ATTN_OUT("lb_loss", "1", FLOAT, ATTN_PORT_DIFF, "load balance"),
    ATTN_OUT("z_loss", "1", FLOAT, ATTN_PORT_DIFF, "mean square of the router's log-sum-exp"),
};

static attn_status ffn_bind(attn_call *call)
{
    const ffn_params *p = call->params;
    bam_ffn f;
    attn_set_dim(call, "K", p->top_k);
    return attn_bam_ffn_setup(call, p->top_k, "top_k", F_W_ROUTER, &f);
}

static attn_status ffn_forward(attn_call *call)
{
    const ffn_params *p = call->params;
    bam_ffn f;
    ATTN_TRY(attn_bam_ffn_setup(call, p->top_k, "top_k", F_W_ROUTER, &f));
    f.x = attn_f32(call->t[F_X]);
    float *y = attn_f32(call->t[F_Y]);
    memset(y, 0, (size_t)(f.tokens * f.width) * sizeof *y);
    ATTN_TRY(attn_bam_ffn_forward(call, &f, y, attn_f32(call->t[F_LB_LOSS]), attn_f32(call->t[F_Z_LOSS])));
    attn_bam_write_choice(&f.route, 0, call->t[F_GATES], call->t[F_INDICES]);
    return ATTN_OK;
}

static attn_status ffn_backward(attn_call *call)
{
    const ffn_params *p = call->params;
    bam_ffn f;
    ATTN_TRY(attn_bam_ffn_setup(call, p->top_k, "top_k", F_W_ROUTER, &f));
    f.x = attn_f32(call->t[F_X]);
    int64_t count = f.tokens * f.width;
    float *grad_x = attn_bam_gradient(call, call->grad[F_X], count), *grad_y = attn_bam_gradient(call, call->grad[F_Y], count);
    if (grad_x == NULL || grad_y == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    return attn_bam_ffn_backward(call, &f, grad_y, attn_f32(call->grad[F_GATES]), call->grad[F_LB_LOSS], call->grad[F_Z_LOSS], grad_x,
                                 F_W_ROUTER);
}

double attn_bam_ffn_flops(const bam_ffn *f)
{
    return 2 * (double)f->tokens * (double)f->width * ((double)f->experts + 3 * (double)f->chosen * (double)f->hidden);
}

static attn_status ffn_cost(attn_call *call, attn_cost *cost)
{
    const ffn_params *p = call->params;
    bam_ffn f;
    ATTN_TRY(attn_bam_ffn_setup(call, p->top_k, "top_k", F_W_ROUTER, &f));
    cost->flops = attn_bam_ffn_flops(&f);
    return ATTN_OK;
}

const attn_op_class attn_op_bam_ffn = {
    .info = {.name = "bam.ffn",
             .title = "Sparse mixture of gated feed-forward experts",
             .summary = "Each token goes through its top_k experts (gated SiLU layers), weighed by the router's softmax without "
                        "renormalisation. Only chosen experts compute; the losses keep the router balanced and its logits small.",
             .paper = "arXiv:2408.08274",
             .differentiable = 1,
             ATTN_TABLE(ffn_param_table, ffn_ports)},
    .params_size = sizeof(ffn_params),
    .bind = ffn_bind,
    .forward = ffn_forward,
    .backward = ffn_backward,
    .cost = ffn_cost,
};
