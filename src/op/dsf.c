/* The dynamical systems framework (arXiv:2405.15731): attention, state-space models and recurrent networks as one linear recurrence.
 *
 * This file: the general system, the structured scan, the conversion of architectures to matrices, and the recall task. Linear
 * and normalised attention is in dsf_attention.c, the other architectures in dsf_layers.c.
 */
#include "layer/activation.h"
#include "layer/linear.h"
#include "op/dsf.h"

#include <string.h>

#define DIFF ATTN_PORT_DIFF
#define MAYBE (ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL)

/* ---- The general system: a reference loop ---- */

typedef struct general_params {
    int64_t mix;
} general_params;

static const attn_param_info general_param_table[] = {
    ATTN_P_BOOL("mix", general_params, mix, "false", "also return the mixing matrices"),
};

enum { U, LAM, BM, CM, DM, H0, Y, H_LAST, MIX };

static const attn_port_info general_ports[] = {
    ATTN_IN("u", "B,N,d", FLOAT, DIFF, "input"),
    ATTN_IN("lam", "B,N,T", FLOAT, DIFF, "diagonal of the transition"),
    ATTN_IN("bm", "B,N,T,d", FLOAT, DIFF, "input matrices"),
    ATTN_IN("cm", "B,N,e,T", FLOAT, DIFF, "output matrices"),
    ATTN_IN("dm", "B,N,e,d", FLOAT, MAYBE, "direct paths"),
    ATTN_IN("h0", "B,T", FLOAT, MAYBE, "state before the first token"),
    ATTN_OUT("y", "B,N,e", FLOAT, DIFF, "output"),
    ATTN_OUT("h_last", "B,T", FLOAT, DIFF, "state after the last token"),
    ATTN_OUT("mix", "B,N,N,e,d", FLOAT, ATTN_PORT_OPTIONAL, "y[i] = sum over j of mix[i,j] u[j], with mix = true"),
};

static attn_status general_bind(attn_call *call)
{
    const general_params *p = call->params;
    if (!p->mix) {
        attn_drop_output(call, MIX);
    }
    return ATTN_OK;
}

typedef struct general {
    int64_t batch, n, d, e, t;
    const float *u, *lam, *bm, *cm, *dm, *h0;
    double *h; /* [batch][n + 1][t] */
} general;

static attn_status general_run(attn_call *call, general *x)
{
    *x = (general){attn_dim(call, "B"), attn_dim(call, "N"), attn_dim(call, "d"), attn_dim(call, "e"), attn_dim(call, "T"),
                   attn_f32(call->t[U]), attn_f32(call->t[LAM]), attn_f32(call->t[BM]), attn_f32(call->t[CM]), attn_f32(call->t[DM]),
                   attn_f32(call->t[H0]), NULL};
    x->h = attn_arena_array(call->arena, (size_t)(x->batch * (x->n + 1) * x->t), sizeof *x->h);
    if (x->h == NULL) {
        return attn_fail_memory((size_t)(x->batch * (x->n + 1) * x->t) * sizeof *x->h);
    }
    for (int64_t b = 0; b < x->batch; b++) {
        double *h = x->h + b * (x->n + 1) * x->t;
        for (int64_t s = 0; s < x->t; s++) {
            h[s] = x->h0 != NULL ? (double)x->h0[b * x->t + s] : 0;
        }
        for (int64_t i = 0; i < x->n; i++, h += x->t) {
            int64_t row = b * x->n + i;
            for (int64_t s = 0; s < x->t; s++) {
                double sum = (double)x->lam[row * x->t + s] * h[s];
                for (int64_t c = 0; c < x->d; c++) {
                    sum += (double)x->bm[(row * x->t + s) * x->d + c] * (double)x->u[row * x->d + c];
                }
                h[x->t + s] = sum;
            }
        }
    }
    return ATTN_OK;
}

/* mix[i,j] = C_i (product of the transitions between) B_j, from j = i backwards. */
static attn_status general_mix(attn_call *call, const general *x, float *mix)
{
    int64_t size = x->e * x->d;
    double *carry = attn_arena_array(call->arena, (size_t)(x->e * x->t), sizeof *carry);
    if (carry == NULL) {
        return attn_fail_memory((size_t)(x->e * x->t) * sizeof *carry);
    }
    memset(mix, 0, (size_t)(x->batch * x->n * x->n * size) * sizeof *mix);
    for (int64_t row = 0; row < x->batch * x->n; row++) {
        int64_t i = row % x->n, first = row - i;
        for (int64_t k = 0; k < x->e * x->t; k++) {
            carry[k] = (double)x->cm[row * x->e * x->t + k];
        }
        for (int64_t j = i; j >= 0; j--) {
            float *to = mix + (row * x->n + j) * size;
            const float *bm = x->bm + (first + j) * x->t * x->d;
            for (int64_t k = 0; k < size; k++) {
                double sum = i == j && x->dm != NULL ? (double)x->dm[row * size + k] : 0;
                for (int64_t s = 0; s < x->t; s++) {
                    sum += carry[k / x->d * x->t + s] * (double)bm[s * x->d + k % x->d];
                }
                to[k] = (float)sum;
            }
            for (int64_t k = 0; k < x->e * x->t; k++) {
                carry[k] *= (double)x->lam[(first + j) * x->t + k % x->t];
            }
        }
    }
    return ATTN_OK;
}

static attn_status general_forward(attn_call *call)
{
    general x;
    ATTN_TRY(general_run(call, &x));
    for (int64_t row = 0; row < x.batch * x.n; row++) {
        const double *h = x.h + (row / x.n * (x.n + 1) + row % x.n + 1) * x.t;
        for (int64_t k = 0; k < x.e; k++) {
            double sum = 0;
            for (int64_t s = 0; s < x.t; s++) {
                sum += (double)x.cm[(row * x.e + k) * x.t + s] * h[s];
            }
            for (int64_t c = 0; c < x.d && x.dm != NULL; c++) {
                sum += (double)x.dm[(row * x.e + k) * x.d + c] * (double)x.u[row * x.d + c];
            }
            attn_f32(call->t[Y])[row * x.e + k] = (float)sum;
        }
    }
    for (int64_t i = 0; i < x.batch * x.t; i++) {
        attn_f32(call->t[H_LAST])[i] = (float)x.h[(i / x.t * (x.n + 1) + x.n) * x.t + i % x.t];
    }
    return call->t[MIX] != NULL ? general_mix(call, &x, attn_f32(call->t[MIX])) : ATTN_OK;
}

static attn_status general_backward(attn_call *call)
{
    general x;
    attn_status status = ATTN_OK;
    ATTN_TRY(general_run(call, &x));
    float *grad[6];
    for (int i = 0; i < 6; i++) {
        grad[i] =
            attn_dsf_gradient(call, call->grad[i], call->t[i] != NULL ? attn_tensor_count(call->t[i]) : 0, &status);
    }
    double *g = attn_arena_array(call->arena, (size_t)x.t, sizeof *g);
    ATTN_TRY(status);
    if (g == NULL) {
        return attn_fail_memory((size_t)x.t * sizeof *g);
    }
    const float *gy = attn_f32(call->grad[Y]), *last = attn_f32(call->grad[H_LAST]);
    for (int64_t b = 0; b < x.batch; b++) {
        for (int64_t s = 0; s < x.t; s++) {
            g[s] = last != NULL ? (double)last[b * x.t + s] : 0;
        }
        for (int64_t i = x.n - 1; i >= 0; i--) {
            int64_t row = b * x.n + i;
            const double *before = x.h + (b * (x.n + 1) + i) * x.t, *now = before + x.t;
            for (int64_t k = 0; k < x.e && gy != NULL; k++) {
                double out = (double)gy[row * x.e + k];
                for (int64_t s = 0; s < x.t; s++) {
                    int64_t at = (row * x.e + k) * x.t + s;
                    g[s] += out * (double)x.cm[at];
                    grad[CM][at] = (float)(out * now[s]);
                }
                for (int64_t c = 0; c < x.d && x.dm != NULL; c++) {
                    int64_t at = (row * x.e + k) * x.d + c;
                    grad[DM][at] = (float)(out * (double)x.u[row * x.d + c]);
                    grad[U][row * x.d + c] += (float)(out * (double)x.dm[at]);
                }
            }
            for (int64_t s = 0; s < x.t; s++) {
                grad[LAM][row * x.t + s] = (float)(g[s] * before[s]);
                for (int64_t c = 0; c < x.d; c++) {
                    int64_t at = (row * x.t + s) * x.d + c;
                    grad[BM][at] = (float)(g[s] * (double)x.u[row * x.d + c]);
                    grad[U][row * x.d + c] += (float)(g[s] * (double)x.bm[at]);
                }
                g[s] *= (double)x.lam[row * x.t + s];
            }
        }
        for (int64_t s = 0; s < x.t && x.h0 != NULL; s++) {
            grad[H0][b * x.t + s] = (float)g[s];
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_dsf = {
    .info = {.name = "dsf",
             .title = "General linear time-varying system with a diagonal transition",
             .summary = "h[i] = lam[i] h[i-1] + B[i] u[i], y[i] = C[i] h[i] + D[i] u[i]: the form in which the framework compares attention, "
                        "state-space models and recurrent networks. A reference for small sizes; use dsf.scan or an architecture's own "
                        "operator for speed.",
             .paper = "arXiv:2405.15731",
             .differentiable = 1,
             ATTN_TABLE(general_param_table, general_ports)},
    .params_size = sizeof(general_params),
    .bind = general_bind,
    .forward = general_forward,
    .backward = general_backward,
};

/* ---- The structured scan ---- */

enum { S_V, S_B, S_C, S_LAM, S_GAIN, S_SKIP, S_H0, S_O, S_H_LAST };

static const attn_port_info scan_ports[] = {
    ATTN_IN("v", "B,H,N,Dv", FLOAT, DIFF, "input"),
    ATTN_IN("b", "B,H,N,S", FLOAT, DIFF, "input directions"),
    ATTN_IN("c", "B,H,N,S", FLOAT, DIFF, "output directions"),
    ATTN_IN("lam", "B,H,N,1|Dv,1|S", FLOAT, DIFF, "decay, for all or for each channel and state"),
    ATTN_IN("gain", "B,H,N,1|Dv", FLOAT, MAYBE, "factor of the input"),
    ATTN_IN("skip", "H,Dv", FLOAT, MAYBE, "direct path"),
    ATTN_IN("h0", "B,H,Dv,S", FLOAT, MAYBE, "state before the first token"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, DIFF, "output"),
    ATTN_OUT("h_last", "B,H,Dv,S", FLOAT, DIFF, "state after the last token"),
};

static dsf_scan scan_setup(const attn_call *call)
{
    const attn_tensor *lam = call->t[S_LAM], *gain = call->t[S_GAIN];
    int64_t heads = attn_dim(call, "H");
    return (dsf_scan){.sequences = attn_dim(call, "B") * heads, .n = attn_dim(call, "N"), .channels = attn_dim(call, "Dv"),
                      .states = attn_dim(call, "S"), .skip_sets = attn_max_i64(1, heads), .lam_wide = lam->shape[3] != 1,
                      .lam_deep = lam->shape[4] != 1, .gain_wide = gain != NULL && gain->shape[3] != 1, .v = attn_f32(call->t[S_V]),
                      .b = attn_f32(call->t[S_B]), .c = attn_f32(call->t[S_C]), .lam = attn_f32(lam), .gain = attn_f32(gain),
                      .skip = attn_f32(call->t[S_SKIP]), .h0 = attn_f32(call->t[S_H0])};
}

static attn_status scan_forward(attn_call *call)
{
    dsf_scan scan = scan_setup(call);
    return attn_dsf_scan_forward(call, &scan, attn_f32(call->t[S_O]), attn_f32(call->t[S_H_LAST]));
}

static attn_status scan_backward(attn_call *call)
{
    dsf_scan scan = scan_setup(call);
    dsf_gradients g = {.o = attn_f32(call->grad[S_O]), .h_last = attn_f32(call->grad[S_H_LAST]), .v = attn_f32(call->grad[S_V]),
                       .b = attn_f32(call->grad[S_B]), .c = attn_f32(call->grad[S_C]), .lam = attn_f32(call->grad[S_LAM]),
                       .gain = attn_f32(call->grad[S_GAIN]), .skip = attn_f32(call->grad[S_SKIP]), .h0 = attn_f32(call->grad[S_H0])};
    return attn_dsf_scan_backward(call, &scan, &g);
}

static attn_status scan_cost(attn_call *call, attn_cost *cost)
{
    cost->flops = 6 * (double)attn_dim(call, "B") * (double)attn_dim(call, "H") * (double)attn_dim(call, "N") * (double)attn_dim(call, "Dv") *
                  (double)attn_dim(call, "S");
    return ATTN_OK;
}

const attn_op_class attn_op_dsf_scan = {
    .info = {.name = "dsf.scan",
             .title = "Structured scan: outer-product state with any diagonal decay",
             .summary = "h = lam h + gain v b^T, o = h c + skip v, with a state of Dv x S per head: linear attention, state-space models and gated "
                        "recurrences are special cases. Costs about 6 N Dv S per head.",
             .paper = "arXiv:2405.15731",
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(scan_ports)},
    .forward = scan_forward,
    .backward = scan_backward,
    .cost = scan_cost,
};

/* ---- The recall task ---- */

typedef struct mqar_params {
    int64_t length;
} mqar_params;

static const attn_param_info mqar_param_table[] = {
    ATTN_P_INT("length", mqar_params, length, NULL, 0, INFINITY, "sequence length, even, at least 4P"),
};

enum { M_KEYS, M_VALUES, M_GAPS, M_TOKENS, M_LABELS };

static const attn_port_info mqar_ports[] = {
    ATTN_IN("keys", "E,P", INT, 0, "keys of each example"),
    ATTN_IN("values", "E,P", INT, 0, "their values"),
    ATTN_IN("gaps", "E,P", INT, 0, "where each key is asked for: position 2P + 2 gap"),
    ATTN_OUT("tokens", "E,L", INT, 0, "key, value, key, value ..., then the keys again among zeros"),
    ATTN_OUT("labels", "E,L", INT, 0, "the value where a key is asked for, -100 elsewhere"),
};

static attn_status mqar_bind(attn_call *call)
{
    const mqar_params *p = call->params;
    if (p->length % 2 != 0 || 4 * attn_dim(call, "P") > p->length) {
        return attn_fail(ATTN_ERR_ARGUMENT, "length = %lld, expected an even number of at least 4P = %lld", (long long)p->length,
                         (long long)(4 * attn_dim(call, "P")));
    }
    attn_set_dim(call, "L", p->length);
    return ATTN_OK;
}

static attn_status mqar_forward(attn_call *call)
{
    const mqar_params *p = call->params;
    int64_t pairs = attn_dim(call, "P"), limit = (p->length - 2 * pairs) / 2;
    for (int64_t e = 0; e < attn_dim(call, "E"); e++) {
        const int64_t *keys = attn_i64(call->t[M_KEYS]) + e * pairs, *values = attn_i64(call->t[M_VALUES]) + e * pairs;
        const int64_t *gaps = attn_i64(call->t[M_GAPS]) + e * pairs;
        int64_t *tokens = attn_i64(call->t[M_TOKENS]) + e * p->length, *labels = attn_i64(call->t[M_LABELS]) + e * p->length;
        for (int64_t i = 0; i < p->length; i++) {
            tokens[i] = 0;
            labels[i] = -100;
        }
        for (int64_t i = 0; i < pairs; i++) {
            if (gaps[i] < 0 || gaps[i] >= limit) {
                return attn_fail(ATTN_ERR_ARGUMENT, "gaps[%lld,%lld] = %lld, expected 0 ... %lld", (long long)e, (long long)i,
                                 (long long)gaps[i], (long long)(limit - 1));
            }
            for (int64_t j = 0; j < i; j++) {
                if (gaps[j] == gaps[i]) {
                    return attn_fail(ATTN_ERR_ARGUMENT, "gaps[%lld] holds %lld twice", (long long)e, (long long)gaps[i]);
                }
            }
            tokens[2 * i] = keys[i];
            tokens[2 * i + 1] = values[i];
            tokens[2 * pairs + 2 * gaps[i]] = keys[i];
            labels[2 * pairs + 2 * gaps[i]] = values[i];
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_dsf_mqar = {
    .info = {.name = "dsf.mqar",
             .title = "Multi-query associative recall: sequences and labels",
             .summary = "Lays out the task on which the framework compares architectures: key-value pairs, then the keys again at given places.",
             .paper = "arXiv:2405.15731",
             ATTN_TABLE(mqar_param_table, mqar_ports)},
    .params_size = sizeof(mqar_params),
    .bind = mqar_bind,
    .forward = mqar_forward,
};
