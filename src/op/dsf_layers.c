/* Architectures of the dynamical systems framework (arXiv:2405.15731) as scans: S6 and SSD, the quantised LSTM, RG-LRU. */
#include "exec/softmax.h"
#include "kernel/tile.h"
#include "layer/activation.h"
#include "layer/conv.h"
#include "layer/linear.h"
#include "op/dsf.h"

#include <string.h>

#define DIFF ATTN_PORT_DIFF
#define MAYBE (ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL)

/* ---- S6: step sizes and rates to a scan ---- */

typedef struct s6 {
    int64_t rows, channels, states; /* rows: B*N */
    int dt_wide, bias_wide, rate_wide, rate_deep;
    const float *dt, *bias, *a_log;
    float *delta, *rate; /* [rows][channels], only backward, [channels][states]: softplus(dt + bias), -exp(A_log) */
} s6;

static float *s6_point(const s6 *x, float *a_log, int64_t c, int64_t s)
{
    return a_log + (x->rate_wide ? c : 0) * (x->rate_deep ? x->states : 1) + (x->rate_deep ? s : 0);
}

/* dt + bias of some rows and channels. */
static void s6_before(const s6 *x, int64_t first, int64_t rows, int64_t low, int64_t high, float *to)
{
    int64_t count = high - low;
    for (int64_t r = 0; r < rows; r++) {
        const float *dt = x->dt_wide ? x->dt + (first + r) * x->channels + low : NULL, *bias = x->bias_wide ? x->bias + low : NULL;
        float one = dt == NULL ? x->dt[first + r] : 0.0f, same = x->bias != NULL && bias == NULL ? x->bias[0] : 0.0f;
        for (int64_t c = 0; c < count; c++) {
            to[r * count + c] = (dt != NULL ? dt[c] : one) + (bias != NULL ? bias[c] : same);
        }
    }
}

/* Step sizes: softplus of that. */
static void s6_delta(const void *maker, int64_t first, int64_t rows, int64_t low, int64_t high, float *to)
{
    s6_before(maker, first, rows, low, high, to);
    attn_activation_forward(ATTN_ACTIVATION_SOFTPLUS, 1, rows * (high - low), to, to);
}

static attn_status s6_prepare(attn_call *call, s6 *x)
{
    ATTN_TRY(attn_take_f32(call, x->channels * x->states, &x->rate));
    for (int64_t i = 0; i < x->channels * x->states; i++) {
        x->rate[i] = -expf(*s6_point(x, (float *)(uintptr_t)x->a_log, i / x->states, i % x->states));
    }
    return ATTN_OK;
}

/* For the backward pass: all step sizes. */
static attn_status s6_all_deltas(attn_call *call, s6 *x)
{
    ATTN_TRY(attn_take_f32(call, x->rows * x->channels, &x->delta));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t row = 0; row < x->rows; row++) {
        s6_delta(x, row, 1, 0, x->channels, x->delta + row * x->channels);
    }
    return ATTN_OK;
}

/* From the gradients of delta and rate; all added to, each may be NULL. */
static attn_status s6_back(attn_call *call, const s6 *x, const float *grad_delta, const float *grad_rate, float *dt, float *bias, float *a_log)
{
    double *sums = attn_arena_array(call->arena, (size_t)x->channels, sizeof *sums);
    float *slope;
    if (sums == NULL) {
        return attn_fail_memory((size_t)x->channels * sizeof *sums);
    }
    ATTN_TRY(attn_take_f32(call, x->channels, &slope));
    memset(sums, 0, (size_t)x->channels * sizeof *sums);
    for (int64_t row = 0; row < x->rows; row++) {
        double together = 0;
        s6_before(x, row, 1, 0, x->channels, slope);
        attn_activation_backward(ATTN_ACTIVATION_SOFTPLUS, 1, x->channels, slope, grad_delta + row * x->channels, slope);
        for (int64_t c = 0; c < x->channels; c++) {
            sums[c] += (double)slope[c];
            together += (double)slope[c];
        }
        for (int64_t c = 0; c < (dt != NULL && x->dt_wide ? x->channels : 0); c++) {
            dt[row * x->channels + c] += slope[c];
        }
        if (dt != NULL && !x->dt_wide) {
            dt[row] += (float)together;
        }
    }
    for (int64_t c = 0; c < x->channels && bias != NULL; c++) {
        bias[x->bias_wide ? c : 0] += (float)sums[c];
    }
    for (int64_t i = 0; i < x->channels * x->states && a_log != NULL; i++) {
        *s6_point(x, a_log, i / x->states, i % x->states) += grad_rate[i] * x->rate[i];
    }
    return ATTN_OK;
}

enum { S_U, S_DT, S_DT_BIAS, S_A_LOG, S_B, S_C, S_SKIP, S_H0, S_O, S_H_LAST };

static const attn_port_info s6_ports[] = {
    ATTN_IN("u", "B,N,d", FLOAT, DIFF, "input"),
    ATTN_IN("dt", "B,N,1|d", FLOAT, DIFF, "step size before the softplus, per channel or one per token"),
    ATTN_IN("dt_bias", "1|d", FLOAT, MAYBE, "added to dt"),
    ATTN_IN("A_log", "1|d,1|S", FLOAT, DIFF, "log of the decay rates"),
    ATTN_IN("b", "B,N,S", FLOAT, DIFF, "input directions"),
    ATTN_IN("c", "B,N,S", FLOAT, DIFF, "output directions"),
    ATTN_IN("skip", "d", FLOAT, MAYBE, "direct path"),
    ATTN_IN("h0", "B,d,S", FLOAT, MAYBE, "state before the first token"),
    ATTN_OUT("o", "B,N,d", FLOAT, DIFF, "output"),
    ATTN_OUT("h_last", "B,d,S", FLOAT, DIFF, "state after the last token"),
};

static attn_status s6_setup(attn_call *call, s6 *x, dsf_scan *scan)
{
    const attn_tensor *dt = call->t[S_DT], *bias = call->t[S_DT_BIAS], *rate = call->t[S_A_LOG];
    *x = (s6){.rows = attn_dim(call, "B") * attn_dim(call, "N"), .channels = attn_dim(call, "d"), .states = attn_dim(call, "S"),
              .dt_wide = dt->shape[2] != 1, .bias_wide = bias != NULL && bias->shape[0] != 1, .rate_wide = rate->shape[0] != 1,
              .rate_deep = rate->shape[1] != 1, .dt = attn_f32(dt), .bias = attn_f32(bias), .a_log = attn_f32(rate)};
    ATTN_TRY(s6_prepare(call, x));
    *scan = (dsf_scan){.sequences = attn_dim(call, "B"), .n = attn_dim(call, "N"), .channels = x->channels, .states = x->states,
                       .skip_sets = 1, .gain_wide = 1, .v = attn_f32(call->t[S_U]), .b = attn_f32(call->t[S_B]),
                       .c = attn_f32(call->t[S_C]), .log_rate = x->rate, .make_gain = s6_delta, .maker = x,
                       .skip = attn_f32(call->t[S_SKIP]), .h0 = attn_f32(call->t[S_H0])};
    return ATTN_OK;
}

static attn_status s6_forward(attn_call *call)
{
    s6 x;
    dsf_scan scan;
    ATTN_TRY(s6_setup(call, &x, &scan));
    return attn_dsf_scan_forward(call, &scan, attn_f32(call->t[S_O]), attn_f32(call->t[S_H_LAST]));
}

static attn_status s6_backward(attn_call *call)
{
    s6 x;
    dsf_scan scan;
    attn_status status = ATTN_OK;
    ATTN_TRY(s6_setup(call, &x, &scan));
    ATTN_TRY(s6_all_deltas(call, &x));
    scan.gain = x.delta;
    float *delta = attn_dsf_gradient(call, NULL, x.rows * x.channels, &status),
          *rate = attn_dsf_gradient(call, NULL, x.channels * x.states, &status);
    ATTN_TRY(status);
    dsf_gradients g = {.o = attn_f32(call->grad[S_O]), .h_last = attn_f32(call->grad[S_H_LAST]), .v = attn_f32(call->grad[S_U]),
                       .b = attn_f32(call->grad[S_B]), .c = attn_f32(call->grad[S_C]), .log_rate = rate, .gain = delta,
                       .skip = attn_f32(call->grad[S_SKIP]), .h0 = attn_f32(call->grad[S_H0])};
    ATTN_TRY(attn_dsf_scan_backward(call, &scan, &g));
    return s6_back(call, &x, delta, rate, attn_f32(call->grad[S_DT]), attn_f32(call->grad[S_DT_BIAS]), attn_f32(call->grad[S_A_LOG]));
}

/* For each token, channel and state: the update and its reading, and an exponential, which takes 20 operations. */
static double s6_flops(double rows, double channels, double states) { return 26 * rows * channels * states; }

static attn_status s6_cost(attn_call *call, attn_cost *cost)
{
    cost->flops = s6_flops((double)attn_dim(call, "B") * (double)attn_dim(call, "N"), (double)attn_dim(call, "d"), (double)attn_dim(call, "S"));
    return ATTN_OK;
}

const attn_op_class attn_op_dsf_s6 = {
    .info = {.name = "dsf.s6",
             .title = "Selective state-space recurrence (S6, SSD)",
             .summary = "A diagonal linear recurrence with S states per channel whose step sizes, input and output directions depend on the "
                        "token. One rate and one step size for all channels give SSD. Costs about 6 N d S operations and N d S exponentials.",
             .paper = "arXiv:2405.15731",
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(s6_ports)},
    .forward = s6_forward,
    .backward = s6_backward,
    .cost = s6_cost,
};

enum { Y_X, Y_W_X, Y_W_DT, Y_DT_BIAS, Y_A_LOG, Y_SKIP, Y_W_OUT, Y_Y };

static const attn_port_info s6_layer_ports[] = {
    ATTN_IN("x", "B,N,d", FLOAT, DIFF, "input"),
    ATTN_IN("w_x", "P,d", FLOAT, DIFF, "[R + 2S, d]: rows of the low-rank step size, b, c"),
    ATTN_IN("w_dt", "d,R", FLOAT, DIFF, "step size from its low-rank form"),
    ATTN_IN("dt_bias", "d", FLOAT, DIFF, "added to the step size"),
    ATTN_IN("A_log", "d,S", FLOAT, DIFF, "log of the decay rates"),
    ATTN_IN("skip", "d", FLOAT, DIFF, "direct path"),
    ATTN_IN("w_out", "dout,d", FLOAT, DIFF, "output projection"),
    ATTN_OUT("y", "B,N,dout", FLOAT, DIFF, "output"),
};

static attn_status s6_layer_bind(attn_call *call)
{
    int64_t want = attn_dim(call, "R") + 2 * attn_dim(call, "S");
    return attn_dim(call, "P") == want ? ATTN_OK
                                       : attn_fail(ATTN_ERR_SHAPE, "w_x has %lld rows, expected R + 2S = %lld",
                                                   (long long)attn_dim(call, "P"), (long long)want);
}

typedef struct s6_layer {
    s6 x;
    dsf_scan scan;
    int64_t low_rank, wide, out; /* R, R + 2S, dout */
    float *proj, *low, *dt, *b, *c, *o, *h_last;
} s6_layer;

static attn_status s6_layer_run(attn_call *call, s6_layer *f)
{
    int64_t rows = attn_dim(call, "B") * attn_dim(call, "N"), d = attn_dim(call, "d"), states = attn_dim(call, "S");
    attn_status status = ATTN_OK;
    *f = (s6_layer){.low_rank = attn_dim(call, "R"), .wide = attn_dim(call, "P"), .out = attn_dim(call, "dout")};
    f->proj = attn_dsf_floats(call, rows * f->wide, &status);
    f->low = attn_dsf_floats(call, rows * f->low_rank, &status);
    f->dt = attn_dsf_floats(call, rows * d, &status);
    f->b = attn_dsf_floats(call, rows * states, &status);
    f->c = attn_dsf_floats(call, rows * states, &status);
    f->o = attn_dsf_floats(call, rows * d, &status);
    f->h_last = attn_dsf_floats(call, attn_dim(call, "B") * d * states, &status);
    ATTN_TRY(status);
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, d, f->wide, attn_f32(call->t[Y_X]), attn_f32(call->t[Y_W_X]), NULL, f->proj));
    for (int64_t r = 0; r < rows; r++) {
        const float *from = f->proj + r * f->wide;
        memcpy(f->low + r * f->low_rank, from, (size_t)f->low_rank * sizeof(float));
        memcpy(f->b + r * states, from + f->low_rank, (size_t)states * sizeof(float));
        memcpy(f->c + r * states, from + f->low_rank + states, (size_t)states * sizeof(float));
    }
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, f->low_rank, d, f->low, attn_f32(call->t[Y_W_DT]), NULL, f->dt));
    f->x = (s6){.rows = rows, .channels = d, .states = states, .dt_wide = 1, .bias_wide = 1, .rate_wide = 1, .rate_deep = 1, .dt = f->dt,
                .bias = attn_f32(call->t[Y_DT_BIAS]), .a_log = attn_f32(call->t[Y_A_LOG])};
    ATTN_TRY(s6_prepare(call, &f->x));
    f->scan = (dsf_scan){.sequences = attn_dim(call, "B"), .n = attn_dim(call, "N"), .channels = d, .states = states, .skip_sets = 1,
                         .gain_wide = 1, .v = attn_f32(call->t[Y_X]), .b = f->b, .c = f->c, .log_rate = f->x.rate, .make_gain = s6_delta,
                         .maker = &f->x, .skip = attn_f32(call->t[Y_SKIP])};
    return attn_dsf_scan_forward(call, &f->scan, f->o, f->h_last);
}

static attn_status s6_layer_forward(attn_call *call)
{
    s6_layer f;
    ATTN_TRY(s6_layer_run(call, &f));
    return attn_linear_forward(call->arena, call->threads, f.x.rows, f.x.channels, f.out, f.o, attn_f32(call->t[Y_W_OUT]), NULL,
                               attn_f32(call->t[Y_Y]));
}

static attn_status s6_layer_backward(attn_call *call)
{
    s6_layer f;
    attn_status status = ATTN_OK;
    ATTN_TRY(s6_layer_run(call, &f));
    ATTN_TRY(s6_all_deltas(call, &f.x));
    f.scan.gain = f.x.delta;
    int64_t rows = f.x.rows, d = f.x.channels, states = f.x.states;
    float *go = attn_dsf_floats(call, rows * d, &status),
          *gx = attn_dsf_gradient(call, call->grad[Y_X], rows * d, &status);
    float *gb = attn_dsf_gradient(call, NULL, rows * states, &status),
          *gc = attn_dsf_gradient(call, NULL, rows * states, &status);
    float *delta = attn_dsf_gradient(call, NULL, rows * d, &status),
          *rate = attn_dsf_gradient(call, NULL, d * states, &status);
    float *dt = attn_dsf_gradient(call, NULL, rows * d, &status),
          *low = attn_dsf_floats(call, rows * f.low_rank, &status);
    ATTN_TRY(status);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, d, f.out, f.o, attn_f32(call->t[Y_W_OUT]), attn_f32(call->grad[Y_Y]), go,
                                  attn_f32(call->grad[Y_W_OUT]), NULL));
    dsf_gradients g = {.o = go, .v = gx, .b = gb, .c = gc, .log_rate = rate, .gain = delta, .skip = attn_f32(call->grad[Y_SKIP])};
    ATTN_TRY(attn_dsf_scan_backward(call, &f.scan, &g));
    ATTN_TRY(s6_back(call, &f.x, delta, rate, dt, attn_f32(call->grad[Y_DT_BIAS]), attn_f32(call->grad[Y_A_LOG])));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, f.low_rank, d, f.low, attn_f32(call->t[Y_W_DT]), dt, low,
                                  attn_f32(call->grad[Y_W_DT]), NULL));
    for (int64_t r = 0; r < rows; r++) {
        float *to = f.proj + r * f.wide;
        memcpy(to, low + r * f.low_rank, (size_t)f.low_rank * sizeof(float));
        memcpy(to + f.low_rank, gb + r * states, (size_t)states * sizeof(float));
        memcpy(to + f.low_rank + states, gc + r * states, (size_t)states * sizeof(float));
    }
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, d, f.wide, attn_f32(call->t[Y_X]), attn_f32(call->t[Y_W_X]), f.proj, go,
                                  attn_f32(call->grad[Y_W_X]), NULL));
    for (int64_t i = 0; i < rows * d; i++) {
        gx[i] += go[i];
    }
    return ATTN_OK;
}

static attn_status s6_layer_cost(attn_call *call, attn_cost *cost)
{
    double rows = (double)attn_dim(call, "B") * (double)attn_dim(call, "N"), d = (double)attn_dim(call, "d"), low = (double)attn_dim(call, "R");
    cost->flops = 2 * rows * d * ((double)attn_dim(call, "P") + low + (double)attn_dim(call, "dout")) +
                  s6_flops(rows, d, (double)attn_dim(call, "S"));
    return ATTN_OK;
}

const attn_op_class attn_op_dsf_s6_layer = {
    .info = {.name = "dsf.s6_layer",
             .title = "An S6 layer: projections around the selective recurrence",
             .summary = "Step sizes, input and output directions are projected from the input, then dsf.s6, then an output projection.",
             .paper = "arXiv:2405.15731",
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(s6_layer_ports)},
    .bind = s6_layer_bind,
    .forward = s6_layer_forward,
    .backward = s6_layer_backward,
    .cost = s6_layer_cost,
};

/* ---- qLSTM ---- */

typedef struct qlstm_params {
    int64_t reversed;
} qlstm_params;

static const attn_param_info qlstm_param_table[] = {
    ATTN_P_BOOL("reversed", qlstm_params, reversed, "true", "decay sigmoid(-f)^alpha, as in S6; false: sigmoid(f)"),
};

typedef struct qlstm {
    int64_t sequences, n, d;
    int reversed;
    double alpha; /* max(alpha, 0) */
    const float *x, *w, *bias, *h0;
    float *pre, *lam, *gain, *gate, *h; /* [rows][3d]; [rows][d] each */
    float *h_last;
} qlstm;

static attn_status qlstm_run(attn_call *call, qlstm *f, float *o, float *h_last)
{
    int64_t rows = f->sequences * f->n, d = f->d;
    attn_status status = ATTN_OK;
    f->pre = attn_dsf_floats(call, rows * 3 * d, &status);
    f->lam = attn_dsf_floats(call, rows * d, &status);
    f->gain = attn_dsf_floats(call, rows * d, &status);
    f->gate = attn_dsf_floats(call, rows * d, &status);
    f->h = attn_dsf_floats(call, rows * d, &status);
    ATTN_TRY(status);
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, d, 3 * d, f->x, f->w, f->bias, f->pre));
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *pre = f->pre + r * 3 * d;
        float *lam = f->lam + r * d;
        attn_activation_forward(f->reversed ? ATTN_ACTIVATION_SOFTPLUS : ATTN_ACTIVATION_SIGMOID, 1, d, pre, lam);
        if (f->reversed) { /* e^(-alpha softplus(f)) */
            kernels->scale(lam, d, (float)(-f->alpha * ATTN_LOG2E));
            kernels->exp2_row(lam, d, 0);
        }
        attn_activation_forward(ATTN_ACTIVATION_SIGMOID, 1, d, pre + d, f->gain + r * d);
        attn_activation_forward(ATTN_ACTIVATION_SIGMOID, 1, d, pre + 2 * d, f->gate + r * d);
    }
    dsf_scan scan = {.sequences = f->sequences, .n = f->n, .channels = d, .states = 1, .skip_sets = 1, .lam_wide = 1, .gain_wide = 1,
                     .v = f->x, .lam = f->lam, .gain = f->gain, .h0 = f->h0};
    ATTN_TRY(attn_dsf_scan_forward(call, &scan, f->h, h_last));
    for (int64_t i = 0; i < rows * d; i++) {
        o[i] = f->gate[i] * f->h[i];
    }
    return ATTN_OK;
}

/* After qlstm_run. grad_x is added to and never NULL; the others are added to and may be NULL. */
static attn_status qlstm_back(attn_call *call, const qlstm *f, const float *grad_o, const float *grad_h_last, float *grad_x, float *grad_w,
                              float *grad_bias, float *grad_alpha, float *grad_h0)
{
    int64_t rows = f->sequences * f->n, d = f->d;
    attn_status status = ATTN_OK;
    float *gh = attn_dsf_floats(call, rows * d, &status), *lam = attn_dsf_gradient(call, NULL, rows * d, &status);
    float *gain = attn_dsf_gradient(call, NULL, rows * d, &status), *pre = attn_dsf_floats(call, rows * 3 * d, &status);
    float *part = attn_dsf_floats(call, rows * d, &status);
    ATTN_TRY(status);
    for (int64_t i = 0; i < rows * d; i++) {
        gh[i] = grad_o != NULL ? grad_o[i] * f->gate[i] : 0.0f;
    }
    dsf_scan scan = {.sequences = f->sequences, .n = f->n, .channels = d, .states = 1, .skip_sets = 1, .lam_wide = 1, .gain_wide = 1,
                     .v = f->x, .lam = f->lam, .gain = f->gain, .h0 = f->h0};
    dsf_gradients g = {.o = gh, .h_last = grad_h_last, .v = grad_x, .lam = lam, .gain = gain, .h0 = grad_h0};
    ATTN_TRY(attn_dsf_scan_backward(call, &scan, &g));
    double alpha = 0;
    for (int64_t i = 0; i < rows * d; i++) {
        int64_t at = i / d * 3 * d + i % d;
        double forget = (double)f->pre[at], decay = (double)f->lam[i], slope = (double)lam[i];
        if (f->reversed) {
            alpha -= slope * decay * attn_softplus(forget);
            pre[at] = (float)(-slope * f->alpha * decay * attn_sigmoid(forget));
        } else {
            pre[at] = (float)(slope * decay * (1 - decay));
        }
        pre[at + d] = gain[i] * f->gain[i] * (1 - f->gain[i]);
        pre[at + 2 * d] = grad_o != NULL ? grad_o[i] * f->h[i] * f->gate[i] * (1 - f->gate[i]) : 0.0f;
    }
    if (grad_alpha != NULL && f->alpha > 0) {
        grad_alpha[0] += (float)alpha;
    }
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, d, 3 * d, f->x, f->w, pre, part, grad_w, grad_bias));
    for (int64_t i = 0; i < rows * d; i++) {
        grad_x[i] += part[i];
    }
    return ATTN_OK;
}

static attn_status check_alpha(const attn_call *call, int port)
{
    const qlstm_params *p = call->params;
    return p->reversed && call->t[port] == NULL ? attn_fail(ATTN_ERR_ARGUMENT, "alpha is missing with reversed = true") : ATTN_OK;
}

enum { Q_X, Q_W_GATES, Q_B_GATES, Q_ALPHA, Q_H0, Q_O, Q_H_LAST };

static const attn_port_info qlstm_ports[] = {
    ATTN_IN("x", "B,N,d", FLOAT, DIFF, "input"),
    ATTN_IN("w_gates", "3*d,d", FLOAT, DIFF, "rows of the forget, input and output gates"),
    ATTN_IN("b_gates", "3*d", FLOAT, DIFF, "their biases"),
    ATTN_IN("alpha", "1", FLOAT, MAYBE, "exponent of the reversed decay, used as max(alpha, 0); needed for it"),
    ATTN_IN("h0", "B,d", FLOAT, MAYBE, "state before the first token"),
    ATTN_OUT("o", "B,N,d", FLOAT, DIFF, "output"),
    ATTN_OUT("h_last", "B,d", FLOAT, DIFF, "state after the last token"),
};

static attn_status qlstm_bind(attn_call *call) { return check_alpha(call, Q_ALPHA); }

static qlstm qlstm_setup(const attn_call *call)
{
    const qlstm_params *p = call->params;
    return (qlstm){.sequences = attn_dim(call, "B"), .n = attn_dim(call, "N"), .d = attn_dim(call, "d"), .reversed = (int)p->reversed,
                   .alpha = p->reversed ? fmax((double)attn_f32(call->t[Q_ALPHA])[0], 0) : 0, .x = attn_f32(call->t[Q_X]),
                   .w = attn_f32(call->t[Q_W_GATES]), .bias = attn_f32(call->t[Q_B_GATES]), .h0 = attn_f32(call->t[Q_H0])};
}

static attn_status qlstm_forward(attn_call *call)
{
    qlstm f = qlstm_setup(call);
    return qlstm_run(call, &f, attn_f32(call->t[Q_O]), attn_f32(call->t[Q_H_LAST]));
}

static attn_status qlstm_backward(attn_call *call)
{
    qlstm f = qlstm_setup(call);
    attn_status status = ATTN_OK;
    int64_t count = f.sequences * f.n * f.d;
    float *o = attn_dsf_floats(call, count, &status), *h = attn_dsf_floats(call, f.sequences * f.d, &status);
    float *gx = attn_dsf_gradient(call, call->grad[Q_X], count, &status);
    ATTN_TRY(status);
    ATTN_TRY(qlstm_run(call, &f, o, h));
    return qlstm_back(call, &f, attn_f32(call->grad[Q_O]), attn_f32(call->grad[Q_H_LAST]), gx, attn_f32(call->grad[Q_W_GATES]),
                      attn_f32(call->grad[Q_B_GATES]), attn_f32(call->grad[Q_ALPHA]), attn_f32(call->grad[Q_H0]));
}

/* The gates' product; the recurrence itself is nothing beside it. */
static double qlstm_flops(const attn_call *call)
{
    double d = (double)attn_dim(call, "d");
    return 6 * (double)attn_dim(call, "B") * (double)attn_dim(call, "N") * d * (d + 1);
}

static attn_status qlstm_cost(attn_call *call, attn_cost *cost)
{
    cost->flops = qlstm_flops(call);
    return ATTN_OK;
}

const attn_op_class attn_op_dsf_qlstm = {
    .info = {.name = "dsf.qlstm",
             .title = "Gated recurrence of the qLSTM, also with the decay of S6",
             .summary = "An LSTM whose gates see only the current input, hence a linear recurrence; with reversed = true the forget gate decays as "
                        "in selective state-space models. Linear in the length.",
             .paper = "arXiv:2405.15731",
             .differentiable = 1,
             ATTN_TABLE(qlstm_param_table, qlstm_ports)},
    .params_size = sizeof(qlstm_params),
    .bind = qlstm_bind,
    .forward = qlstm_forward,
    .backward = qlstm_backward,
    .cost = qlstm_cost,
};

enum { L_X, L_W_IN, L_CONV_W, L_CONV_B, L_W_GATES, L_B_GATES, L_ALPHA, L_W_OUT, L_Y };

static const attn_port_info qlstm_layer_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "input"),
    ATTN_IN("w_in", "D2,C", FLOAT, DIFF, "[2d, C]: rows of the outer gate, then of the signal"),
    ATTN_IN("conv_w", "d,K", FLOAT, DIFF, "taps of the causal convolution; the last multiplies the current token"),
    ATTN_IN("conv_b", "d", FLOAT, DIFF, "its bias"),
    ATTN_IN("w_gates", "3*d,d", FLOAT, DIFF, "as in dsf.qlstm"),
    ATTN_IN("b_gates", "3*d", FLOAT, DIFF, "as in dsf.qlstm"),
    ATTN_IN("alpha", "1", FLOAT, MAYBE, "as in dsf.qlstm"),
    ATTN_IN("w_out", "C,d", FLOAT, DIFF, "output projection"),
    ATTN_OUT("y", "B,N,C", FLOAT, DIFF, "output"),
};

static attn_status qlstm_layer_bind(attn_call *call)
{
    if (attn_dim(call, "D2") != 2 * attn_dim(call, "d")) {
        return attn_fail(ATTN_ERR_SHAPE, "w_in has %lld rows, expected 2d = %lld", (long long)attn_dim(call, "D2"),
                         (long long)(2 * attn_dim(call, "d")));
    }
    if (attn_dim(call, "K") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "conv_w has no taps");
    }
    return check_alpha(call, L_ALPHA);
}

typedef struct qlstm_layer {
    qlstm f;
    attn_conv1d conv;
    float *both, *signal, *s, *r, *m, *h_last; /* [rows][2d]; signal before and after the convolution; qLSTM output; gated */
} qlstm_layer;

static attn_status qlstm_layer_run(attn_call *call, qlstm_layer *x)
{
    const qlstm_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), n = attn_dim(call, "N"), d = attn_dim(call, "d"), c = attn_dim(call, "C"), rows = batch * n;
    attn_status status = ATTN_OK;
    x->both = attn_dsf_floats(call, rows * 2 * d, &status);
    x->signal = attn_dsf_floats(call, rows * d, &status);
    x->s = attn_dsf_floats(call, rows * d, &status);
    x->r = attn_dsf_floats(call, rows * d, &status);
    x->m = attn_dsf_floats(call, rows * d, &status);
    x->h_last = attn_dsf_floats(call, batch * d, &status);
    ATTN_TRY(status);
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, c, 2 * d, attn_f32(call->t[L_X]), attn_f32(call->t[L_W_IN]), NULL, x->both));
    for (int64_t i = 0; i < rows * d; i++) {
        x->signal[i] = x->both[i / d * 2 * d + d + i % d];
    }
    x->conv = (attn_conv1d){batch, n, d, attn_dim(call, "K"), 1, attn_f32(call->t[L_CONV_W]), attn_f32(call->t[L_CONV_B]), NULL};
    attn_conv1d_forward(&x->conv, call->threads, x->signal, x->s);
    x->f = (qlstm){.sequences = batch, .n = n, .d = d, .reversed = (int)p->reversed,
                   .alpha = p->reversed ? fmax((double)attn_f32(call->t[L_ALPHA])[0], 0) : 0, .x = x->s,
                   .w = attn_f32(call->t[L_W_GATES]), .bias = attn_f32(call->t[L_B_GATES])};
    ATTN_TRY(qlstm_run(call, &x->f, x->r, x->h_last));
    for (int64_t i = 0; i < rows * d; i++) {
        x->m[i] = (float)(attn_activation_at(ATTN_ACTIVATION_GELU, (double)x->both[i / d * 2 * d + i % d], NULL) * (double)x->r[i]);
    }
    return ATTN_OK;
}

static attn_status qlstm_layer_forward(attn_call *call)
{
    qlstm_layer x;
    ATTN_TRY(qlstm_layer_run(call, &x));
    return attn_linear_forward(call->arena, call->threads, x.f.sequences * x.f.n, x.f.d, attn_dim(call, "C"), x.m, attn_f32(call->t[L_W_OUT]),
                               NULL, attn_f32(call->t[L_Y]));
}

static attn_status qlstm_layer_backward(attn_call *call)
{
    qlstm_layer x;
    attn_status status = ATTN_OK;
    ATTN_TRY(qlstm_layer_run(call, &x));
    int64_t rows = x.f.sequences * x.f.n, d = x.f.d, c = attn_dim(call, "C");
    float *gm = attn_dsf_floats(call, rows * d, &status), *gr = attn_dsf_floats(call, rows * d, &status),
          *both = attn_dsf_floats(call, rows * 2 * d, &status);
    float *gs = attn_dsf_gradient(call, NULL, rows * d, &status), *signal = attn_dsf_floats(call, rows * d, &status);
    ATTN_TRY(status);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, d, c, x.m, attn_f32(call->t[L_W_OUT]), attn_f32(call->grad[L_Y]), gm,
                                  attn_f32(call->grad[L_W_OUT]), NULL));
    for (int64_t i = 0; i < rows * d; i++) {
        double slope, value = attn_activation_at(ATTN_ACTIVATION_GELU, (double)x.both[i / d * 2 * d + i % d], &slope);
        both[i / d * 2 * d + i % d] = (float)((double)gm[i] * (double)x.r[i] * slope);
        gr[i] = (float)((double)gm[i] * value);
    }
    ATTN_TRY(qlstm_back(call, &x.f, gr, NULL, gs, attn_f32(call->grad[L_W_GATES]), attn_f32(call->grad[L_B_GATES]),
                        attn_f32(call->grad[L_ALPHA]), NULL));
    ATTN_TRY(attn_conv1d_backward(&x.conv, call->arena, call->threads, x.signal, gs, signal, NULL, attn_f32(call->grad[L_CONV_W]),
                                  attn_f32(call->grad[L_CONV_B])));
    for (int64_t i = 0; i < rows * d; i++) {
        both[i / d * 2 * d + d + i % d] = signal[i];
    }
    return attn_linear_backward(call->arena, call->threads, rows, c, 2 * d, attn_f32(call->t[L_X]), attn_f32(call->t[L_W_IN]), both,
                                attn_f32(call->grad[L_X]), attn_f32(call->grad[L_W_IN]), NULL);
}

static attn_status qlstm_layer_cost(attn_call *call, attn_cost *cost)
{
    double rows = (double)attn_dim(call, "B") * (double)attn_dim(call, "N"), d = (double)attn_dim(call, "d");
    cost->flops = qlstm_flops(call) + 2 * rows * d * (3 * (double)attn_dim(call, "C") + (double)attn_dim(call, "K"));
    return ATTN_OK;
}

const attn_op_class attn_op_dsf_qlstm_layer = {
    .info = {.name = "dsf.qlstm_layer",
             .title = "A qLSTM layer: gate, causal convolution, recurrence, output projection",
             .summary = "Input projection to an outer gate (GELU) and a signal, a short depthwise convolution of the signal, dsf.qlstm, and an "
                        "output projection.",
             .paper = "arXiv:2405.15731",
             .differentiable = 1,
             ATTN_TABLE(qlstm_param_table, qlstm_layer_ports)},
    .params_size = sizeof(qlstm_params),
    .bind = qlstm_layer_bind,
    .forward = qlstm_layer_forward,
    .backward = qlstm_layer_backward,
    .cost = qlstm_layer_cost,
};

/* ---- RG-LRU ---- */

typedef struct rglru_params {
    double c;
} rglru_params;

static const attn_param_info rglru_param_table[] = {
    ATTN_P_FLOAT("c", rglru_params, c, "8.0", 0, INFINITY, "factor in the exponent of the decay"),
};

enum { R_X, R_R, R_G, R_A, R_H0, R_O, R_H_LAST };

static const attn_port_info rglru_ports[] = {
    ATTN_IN("x", "B,N,d", FLOAT, DIFF, "signal"),
    ATTN_IN("r", "B,N,d", FLOAT, DIFF, "recurrence gate before the sigmoid"),
    ATTN_IN("g", "B,N,d", FLOAT, DIFF, "input gate before the sigmoid"),
    ATTN_IN("a_param", "d", FLOAT, DIFF, "decay before the softplus"),
    ATTN_IN("h0", "B,d", FLOAT, MAYBE, "state before the first token"),
    ATTN_OUT("o", "B,N,d", FLOAT, DIFF, "output"),
    ATTN_OUT("h_last", "B,d", FLOAT, DIFF, "state after the last token"),
};

static attn_status rglru_setup(attn_call *call, dsf_scan *scan)
{
    const rglru_params *p = call->params;
    int64_t d = attn_dim(call, "d"), count = attn_dim(call, "B") * attn_dim(call, "N") * d;
    attn_status status = ATTN_OK;
    float *lam = attn_dsf_floats(call, count, &status), *gain = attn_dsf_floats(call, count, &status);
    ATTN_TRY(status);
    for (int64_t i = 0; i < count; i++) {
        double log_a = -p->c * attn_softplus((double)attn_f32(call->t[R_A])[i % d]) * attn_sigmoid((double)attn_f32(call->t[R_R])[i]);
        lam[i] = (float)exp(log_a);
        gain[i] = (float)(sqrt(-expm1(2 * log_a)) * attn_sigmoid((double)attn_f32(call->t[R_G])[i]));
    }
    *scan = (dsf_scan){.sequences = attn_dim(call, "B"), .n = attn_dim(call, "N"), .channels = d, .states = 1, .skip_sets = 1, .lam_wide = 1,
                       .gain_wide = 1, .v = attn_f32(call->t[R_X]), .lam = lam, .gain = gain, .h0 = attn_f32(call->t[R_H0])};
    return ATTN_OK;
}

static attn_status rglru_forward(attn_call *call)
{
    dsf_scan scan;
    ATTN_TRY(rglru_setup(call, &scan));
    return attn_dsf_scan_forward(call, &scan, attn_f32(call->t[R_O]), attn_f32(call->t[R_H_LAST]));
}

static attn_status rglru_backward(attn_call *call)
{
    const rglru_params *p = call->params;
    dsf_scan scan;
    attn_status status = ATTN_OK;
    ATTN_TRY(rglru_setup(call, &scan));
    int64_t d = scan.channels, count = scan.sequences * scan.n * d;
    float *lam = attn_dsf_gradient(call, NULL, count, &status), *gain = attn_dsf_gradient(call, NULL, count, &status);
    double *sums = attn_arena_array(call->arena, (size_t)d, sizeof *sums);
    ATTN_TRY(status);
    if (sums == NULL) {
        return attn_fail_memory((size_t)d * sizeof *sums);
    }
    memset(sums, 0, (size_t)d * sizeof *sums);
    dsf_gradients g = {.o = attn_f32(call->grad[R_O]), .h_last = attn_f32(call->grad[R_H_LAST]), .v = attn_f32(call->grad[R_X]), .lam = lam,
                       .gain = gain, .h0 = attn_f32(call->grad[R_H0])};
    ATTN_TRY(attn_dsf_scan_backward(call, &scan, &g));
    for (int64_t i = 0; i < count; i++) {
        double rate = attn_softplus((double)attn_f32(call->t[R_A])[i % d]), open = attn_sigmoid((double)attn_f32(call->t[R_R])[i]);
        double in = attn_sigmoid((double)attn_f32(call->t[R_G])[i]), log_a = -p->c * rate * open, a = exp(log_a), root = sqrt(-expm1(2 * log_a));
        /* d(root)/d(log a) = -a^2 / root */
        double slope = (double)lam[i] * a - (root > 0 ? (double)gain[i] * in * a * a / root : 0);
        if (call->grad[R_R] != NULL) {
            attn_f32(call->grad[R_R])[i] = (float)(slope * -p->c * rate * open * (1 - open));
        }
        if (call->grad[R_G] != NULL) {
            attn_f32(call->grad[R_G])[i] = (float)((double)gain[i] * root * in * (1 - in));
        }
        sums[i % d] += slope * -p->c * open * attn_sigmoid((double)attn_f32(call->t[R_A])[i % d]);
    }
    for (int64_t c = 0; c < d && call->grad[R_A] != NULL; c++) {
        attn_f32(call->grad[R_A])[c] = (float)sums[c];
    }
    return ATTN_OK;
}

/* What it reads and writes: three inputs and the output. */
static attn_status rglru_cost(attn_call *call, attn_cost *cost)
{
    double count = (double)attn_dim(call, "B") * (double)attn_dim(call, "N") * (double)attn_dim(call, "d");
    cost->bytes = 4 * count * sizeof(float);
    cost->flops = 80 * count; /* mostly exponentials and a root */
    return ATTN_OK;
}

const attn_op_class attn_op_dsf_rglru = {
    .info = {.name = "dsf.rglru",
             .title = "Real-gated linear recurrent unit",
             .summary = "An element-wise linear recurrence whose decay is gated by the input and whose input is scaled to keep the state's size. "
                        "Linear in the length.",
             .paper = "arXiv:2402.19427",
             .differentiable = 1,
             ATTN_TABLE(rglru_param_table, rglru_ports)},
    .params_size = sizeof(rglru_params),
    .forward = rglru_forward,
    .backward = rglru_backward,
    .cost = rglru_cost,
};
