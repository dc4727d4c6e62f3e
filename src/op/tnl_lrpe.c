/* LRPE, the positions of TransNormerLLM (arXiv:2307.14995): cosine and sine channels, whose products depend on distances. */
#include "op/tnl.h"

#include <string.h>

#define ANGLE_BLOCK 64 /* tokens after which angles start again from an exact product */

/* Turn to token t: exact at the start of each block, by one turn in between. */
static void lrpe_angles(tnl_lrpe *l, int64_t t)
{
    for (int64_t c = 0; c < l->d; c++) {
        double theta = (double)l->theta[c];
        if (t % ANGLE_BLOCK == 0) {
            double angle = (double)(l->offset + t) * theta;
            l->cosine[c] = cos(angle);
            l->sine[c] = sin(angle);
            l->turn_c[c] = t == 0 ? cos(theta) : l->turn_c[c];
            l->turn_s[c] = t == 0 ? sin(theta) : l->turn_s[c];
        } else {
            double re = l->cosine[c], im = l->sine[c];
            l->cosine[c] = re * l->turn_c[c] - im * l->turn_s[c];
            l->sine[c] = im * l->turn_c[c] + re * l->turn_s[c];
        }
    }
}

void attn_tnl_lrpe_forward(tnl_lrpe *l, const float *x, int64_t stride, float *wide)
{
    for (int64_t t = 0; t < l->n; t++, x += stride, wide += 2 * l->d) {
        lrpe_angles(l, t);
        for (int64_t c = 0; c < l->d; c++) {
            wide[c] = (float)((double)x[c] * l->cosine[c]);
            wide[l->d + c] = (float)((double)x[c] * l->sine[c]);
        }
    }
}

void attn_tnl_lrpe_backward(tnl_lrpe *l, const float *x, int64_t stride, const float *grad_wide, float *grad_x,
                            int64_t grad_stride, double *grad_theta)
{
    for (int64_t t = 0; t < l->n; t++, x += stride, grad_wide += 2 * l->d, grad_x += grad_stride) {
        lrpe_angles(l, t);
        for (int64_t c = 0; c < l->d; c++) {
            double g1 = (double)grad_wide[c], g2 = (double)grad_wide[l->d + c];
            grad_theta[c] += (double)(l->counted + t) * (double)x[c] * (g2 * l->cosine[c] - g1 * l->sine[c]);
            grad_x[c] = (float)(g1 * l->cosine[c] + g2 * l->sine[c]);
        }
    }
}

attn_status attn_tnl_lrpe_scratch(attn_call *call, int64_t heads, int64_t d, double **scratch)
{
    *scratch = attn_arena_array(call->arena, (size_t)heads * 5, (size_t)d * sizeof **scratch);
    return *scratch != NULL ? ATTN_OK : attn_fail_memory((size_t)(heads * 5 * d) * sizeof **scratch);
}

tnl_lrpe attn_tnl_lrpe_at(int64_t n, int64_t d, int64_t offset, const float *theta, double *scratch, int64_t h)
{
    double *own = scratch + h * 5 * d;
    return (tnl_lrpe){.n = n, .d = d, .offset = offset, .counted = offset, .theta = theta + h * d, .cosine = own, .sine = own + d, .turn_c = own + 2 * d,
                       .turn_s = own + 3 * d};
}

double *attn_tnl_lrpe_sum(double *scratch, int64_t h, int64_t d)
{
    return scratch + (h * 5 + 4) * d;
}

/* ---- The operator ---- */

static const attn_param_info lrpe_param_table[] = {TNL_OFFSET};

enum { L_X, L_THETA, L_O };

static const attn_port_info lrpe_ports[] = {
    ATTN_IN("x", "B,H,N,d", FLOAT, ATTN_PORT_DIFF, "queries or keys"),
    ATTN_IN("theta", "H,d", FLOAT, ATTN_PORT_DIFF, "angle per token of each channel"),
    ATTN_OUT("o", "B,H,N,2*d", FLOAT, ATTN_PORT_DIFF, "cosine channels, then sine channels"),
};

static attn_status lrpe_op_forward(attn_call *call)
{
    const tnl_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), n = attn_dim(call, "N"), d = attn_dim(call, "d");
    double *scratch;
    ATTN_TRY(attn_tnl_lrpe_scratch(call, heads, d, &scratch));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t b = 0; b < batch; b++) {
            tnl_lrpe l = attn_tnl_lrpe_at(n, d, p->offset, attn_f32(call->t[L_THETA]), scratch, h);
            int64_t at = (b * heads + h) * n * d;
            attn_tnl_lrpe_forward(&l, attn_f32(call->t[L_X]) + at, d, attn_f32(call->t[L_O]) + 2 * at);
        }
    }
    return ATTN_OK;
}

static attn_status lrpe_op_backward(attn_call *call)
{
    const tnl_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), n = attn_dim(call, "N"), d = attn_dim(call, "d");
    double *scratch;
    float *grad_x = attn_f32(call->grad[L_X]), *grad_theta = attn_f32(call->grad[L_THETA]);
    ATTN_TRY(attn_tnl_lrpe_scratch(call, heads, d, &scratch));
    if (grad_x == NULL) {
        ATTN_TRY(attn_take_f32(call, batch * heads * n * d, &grad_x));
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t h = 0; h < heads; h++) {
        double *sum = attn_tnl_lrpe_sum(scratch, h, d);
        memset(sum, 0, (size_t)d * sizeof *sum);
        for (int64_t b = 0; b < batch; b++) {
            tnl_lrpe l = attn_tnl_lrpe_at(n, d, p->offset, attn_f32(call->t[L_THETA]), scratch, h);
            int64_t at = (b * heads + h) * n * d;
            attn_tnl_lrpe_backward(&l, attn_f32(call->t[L_X]) + at, d, attn_f32(call->grad[L_O]) + 2 * at, grad_x + at,
                                   d, sum);
        }
        for (int64_t c = 0; c < d && grad_theta != NULL; c++) {
            grad_theta[h * d + c] = (float)sum[c];
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_tnl_lrpe = {
    .info = {.name = "tnl.lrpe",
             .title = "TransNormerLLM: linearised relative positions",
             .summary = "Each channel times the cosine and times the sine of its angle at the token's position: products of queries and keys "
                        "then depend on their distance. Doubles the width; angles are learned.",
             .paper = TNL_PAPER,
             .differentiable = 1,
             ATTN_TABLE(lrpe_param_table, lrpe_ports)},
    .params_size = sizeof(tnl_params),
    .forward = lrpe_op_forward,
    .backward = lrpe_op_backward,
};
