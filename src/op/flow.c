/* Flow attention (Flowformer, arXiv:2202.06258): linear attention as a flow network. Values are sources and outputs are sinks; keeping the
 * flow into each sink at 1 makes the sources compete, keeping the flow out of each source at 1 tells each sink what it is allotted. What
 * remains is linear attention (exec/linear.h) with three numbers per token: normaliser, competition, allocation.
 *
 * The forward pass is in flow_tiles.c. Here is the recurrence for generation, and backward, which keeps what the flows give: sums over
 * tokens are double, the flows of a token dots with them.
 */
#include "exec/linear.h"
#include "layer/activation.h"
#include "layer/heads.h"
#include "layer/linear.h"
#include "op/flow.h"

#include <string.h>

#define KEPT 4194304 /* numbers that backward keeps of heads that go together, about */
#define PAPER "arXiv:2202.06258"

typedef struct flow_params {
    int64_t causal, kernel, steps, heads;
    double eps, clamp;
} flow_params;

#define CAUSAL_PARAM ATTN_P_BOOL("causal", flow_params, causal, "false", "the causal form, with counts in place of totals; needs N = M")
#define KERNEL_PARAM ATTN_P_CHOICE("kernel", flow_params, kernel, "sigmoid", "sigmoid|relu", "feature map of queries and keys; relu is max(x, 0) + 1e-6")
#define EPS_PARAM ATTN_P_FLOAT("eps", flow_params, eps, "1e-6", 0, INFINITY, "added to every coordinate inside the flow products")
#define CLAMP_PARAM                                                                                                    \
    ATTN_P_FLOAT("clamp", flow_params, clamp, "1.0", 0, INFINITY,                                                      \
                 "the conserved source flow is limited to [-clamp, clamp] before the exponential; 0: no limit")

typedef attn_flow flow;

/* What the flows give, per query head: all that the recurrence and backward need. */
typedef struct flow_work {
    float *q, *k;  /* mapped, [B,H,N,D] and [B,H,M,D] */
    float *qn;     /* q / I */
    float *w;      /* competition * v, [B,H,M,Dv] */
    double *in, *out, *exps, *ends; /* I [B,H,N], O [B,H,M]; e and, causal, the sum of e up to each source [B,H,M] */
    float *competition, *allocation;
    uint8_t *clipped;
    double *sums;  /* scratch of each head: 8 * D */
    float *spare, *ones;
} flow_work;

static double dot(const float *a, const double *b, int64_t d, double eps)
{
    double sum[4] = {0, 0, 0, 0};
    int64_t c = 0;
    for (; c + 4 <= d; c += 4) {
        for (int i = 0; i < 4; i++) {
            sum[i] += ((double)a[c + i] + eps) * (b[c + i] + eps);
        }
    }
    for (; c < d; c++) {
        sum[0] += ((double)a[c] + eps) * (b[c] + eps);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static void add_scaled(double *to, const float *from, int64_t d, double factor)
{
    for (int64_t c = 0; c < d; c++) {
        to[c] += factor * (double)from[c];
    }
}

static double total_of(const double *x, int64_t d)
{
    double sum = 0;
    for (int64_t c = 0; c < d; c++) {
        sum += x[c];
    }
    return sum;
}

/* grad *= the derivative of the map, from its value y. */
static void map_back(int64_t kernel, const float *x, const float *y, float *grad, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        grad[i] = kernel == ATTN_FLOW_RELU ? (x[i] > 0 ? grad[i] : 0) : grad[i] * y[i] * (1 - y[i]);
    }
}

static attn_status take_double(attn_call *call, int64_t count, double **out)
{
    *out = attn_arena_array(call->arena, (size_t)count, sizeof **out);
    return *out != NULL ? ATTN_OK : attn_fail_memory((size_t)count * sizeof **out);
}

static attn_status make_work(attn_call *call, const flow *f, flow_work *w)
{
    int64_t heads = f->batch * f->heads;
    ATTN_TRY(attn_take_f32(call, heads * f->n * f->d, &w->q));
    ATTN_TRY(attn_take_f32(call, heads * f->m * f->d, &w->k));
    ATTN_TRY(attn_take_f32(call, heads * f->n * f->d, &w->qn));
    ATTN_TRY(attn_take_f32(call, heads * f->m * f->dv, &w->w));
    ATTN_TRY(take_double(call, heads * f->n, &w->in));
    ATTN_TRY(take_double(call, heads * f->m, &w->out));
    ATTN_TRY(take_double(call, heads * f->m, &w->exps));
    ATTN_TRY(take_double(call, heads * f->m, &w->ends));
    ATTN_TRY(take_double(call, heads * 8 * f->d, &w->sums));
    ATTN_TRY(attn_take_f32(call, heads * 8 * f->d, &w->spare));
    ATTN_TRY(attn_take_f32(call, f->d, &w->ones));
    for (int64_t c = 0; c < f->d; c++) {
        w->ones[c] = 1;
    }
    ATTN_TRY(attn_take_f32(call, heads * f->m, &w->competition));
    ATTN_TRY(attn_take_f32(call, heads * f->n, &w->allocation));
    w->clipped = attn_arena_array(call->arena, (size_t)(heads * f->m), 1);
    return w->clipped != NULL ? ATTN_OK : attn_fail_memory((size_t)(heads * f->m));
}

/* The part of one head. */
typedef struct head {
    const float *q, *k;
    float *qn;
    double *in, *out, *exps, *ends;
    float *competition, *allocation;
    uint8_t *clipped;
    double *k_sum, *q_sum, *k_out, *q_in; /* the four sums */
    float *spare;                         /* [8 * D] */
    const float *ones;                    /* [D] */
} head;

static head head_of(const flow *f, const flow_work *w, int64_t i)
{
    double *sums = w->sums + i * 8 * f->d;
    return (head){w->q + i * f->n * f->d, w->k + i * f->m * f->d, w->qn + i * f->n * f->d, w->in + i * f->n, w->out + i * f->m,
                  w->exps + i * f->m, w->ends + i * f->m, w->competition + i * f->m, w->allocation + i * f->n, w->clipped + i * f->m,
                  sums, sums + f->d, sums + 2 * f->d, sums + 3 * f->d, w->spare + i * 8 * f->d, w->ones};
}

/* A sum of many rows: finished blocks in double, the current one in f32, so that rows are added and multiplied by whole vectors and long
 * sums keep their precision. */
#define SUM_BLOCK 64

typedef struct running_sum {
    double *total;        /* [d]: all finished blocks, and at the end everything */
    float *base, *recent; /* [d]: total as f32, and the block that is being added */
    int64_t count;
} running_sum;

static void sum_begin(running_sum *s, double *total, float *memory, int64_t d)
{
    *s = (running_sum){.total = total, .base = memory, .recent = memory + d};
    for (int64_t c = 0; c < d; c++) {
        s->base[c] = (float)total[c];
        s->recent[c] = 0;
    }
}

static void sum_fold(running_sum *s, int64_t d)
{
    for (int64_t c = 0; c < d; c++) {
        s->total[c] += (double)s->recent[c];
        s->base[c] = (float)s->total[c];
        s->recent[c] = 0;
    }
}

static void sum_add(running_sum *s, const attn_tile_kernels *kernels, const float *row, int64_t d, double factor)
{
    kernels->axpy(s->recent, row, d, (float)factor);
    if (++s->count % SUM_BLOCK == 0) {
        sum_fold(s, d);
    }
}

static void flows_normal(const flow *f, const head *h)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    int64_t d = f->d;
    running_sum k_sum, q_sum, k_out, q_in;
    memset(h->k_sum, 0, (size_t)(4 * d) * sizeof(double));
    sum_begin(&k_sum, h->k_sum, h->spare, d);
    sum_begin(&q_sum, h->q_sum, h->spare + 2 * d, d);
    sum_begin(&k_out, h->k_out, h->spare + 4 * d, d);
    sum_begin(&q_in, h->q_in, h->spare + 6 * d, d);
    for (int64_t j = 0; j < f->m; j++) {
        sum_add(&k_sum, kernels, h->k + j * d, d, 1);
    }
    for (int64_t i = 0; i < f->n; i++) {
        sum_add(&q_sum, kernels, h->q + i * d, d, 1);
    }
    sum_fold(&k_sum, d);
    sum_fold(&q_sum, d);
    double eps = f->eps, k_numbers = eps * total_of(h->k_sum, d), q_numbers = eps * total_of(h->q_sum, d), square = (double)d * eps * eps;
    for (int64_t i = 0; i < f->n; i++) {
        const float *q = h->q + i * d;
        h->in[i] = (double)kernels->dot(q, k_sum.base, d) + eps * (double)kernels->dot(q, h->ones, d) + k_numbers + square;
        sum_add(&q_in, kernels, q, d, 1 / h->in[i]);
    }
    for (int64_t j = 0; j < f->m; j++) {
        const float *k = h->k + j * d;
        h->out[j] = (double)kernels->dot(k, q_sum.base, d) + eps * (double)kernels->dot(k, h->ones, d) + q_numbers + square;
        sum_add(&k_out, kernels, k, d, 1 / h->out[j]);
    }
    sum_fold(&q_in, d);
    sum_fold(&k_out, d);
    double top = -INFINITY, sum = 0, in_numbers = eps * total_of(h->q_in, d), out_numbers = eps * total_of(h->k_out, d);
    for (int64_t j = 0; j < f->m; j++) {
        const float *k = h->k + j * d;
        double conserved = (double)kernels->dot(k, q_in.base, d) + eps * (double)kernels->dot(k, h->ones, d) + in_numbers + square;
        h->exps[j] = attn_flow_limit(conserved, f->clamp, &h->clipped[j]);
        top = h->exps[j] > top ? h->exps[j] : top;
    }
    for (int64_t j = 0; j < f->m; j++) {
        h->exps[j] = exp(h->exps[j] - top);
        sum += h->exps[j];
    }
    for (int64_t j = 0; j < f->m; j++) {
        h->competition[j] = (float)((double)f->m * h->exps[j] / sum);
    }
    for (int64_t i = 0; i < f->n; i++) {
        const float *q = h->q + i * d;
        double conserved = (double)kernels->dot(q, k_out.base, d) + eps * (double)kernels->dot(q, h->ones, d) + out_numbers + square;
        h->allocation[i] = (float)attn_sigmoid(conserved * (double)f->n / (double)f->m);
    }
}

/* The sums (and the sum of exponentials) go on from what they hold; `steps` tokens came before. All in double: the first tokens' conserved
 * flows lie at the clamp, and which side they fall on decides about gradients. */
static void flows_causal(const flow *f, const head *h, int64_t steps, double *exp_sum)
{
    int64_t d = f->d;
    for (int64_t i = 0; i < f->n; i++) {
        double t = (double)(steps + i + 1);
        const float *q = h->q + i * d, *k = h->k + i * d;
        add_scaled(h->k_sum, k, d, 1);
        add_scaled(h->q_sum, q, d, 1);
        h->in[i] = dot(q, h->k_sum, d, f->eps);
        h->out[i] = dot(k, h->q_sum, d, f->eps);
        add_scaled(h->k_out, k, d, t / h->out[i]);
        add_scaled(h->q_in, q, d, t / h->in[i]);
        h->allocation[i] = (float)attn_sigmoid(dot(q, h->k_out, d, f->eps) / t);
        h->exps[i] = exp(attn_flow_limit(dot(k, h->q_in, d, f->eps) / t, f->clamp, &h->clipped[i]));
        *exp_sum += h->exps[i];
        h->ends[i] = *exp_sum;
        h->competition[i] = (float)(t * h->exps[i] / *exp_sum);
    }
}

static attn_linattn product_shape(const flow *f)
{
    return (attn_linattn){.batch = f->batch, .heads = f->heads, .kv_heads = f->heads, .n = f->n, .m = f->m, .d = f->d, .dv = f->dv,
                          .causal = f->causal, .scale = 1};
}

/* Maps, flows, qn and w. */
static void run_flows(attn_call *call, const flow *f, const float *q, const float *k, const float *v, const flow_work *w)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < f->batch * f->heads; i++) {
        head h = head_of(f, w, i);
        double exp_sum = 0;
        attn_flow_map(f->kernel, q + i * f->n * f->d, w->q + i * f->n * f->d, f->n * f->d);
        attn_flow_map(f->kernel, attn_flow_kv(f, k, i, f->d), w->k + i * f->m * f->d, f->m * f->d);
        if (f->causal) {
            memset(h.k_sum, 0, (size_t)(4 * f->d) * sizeof(double));
            flows_causal(f, &h, 0, &exp_sum);
        } else {
            flows_normal(f, &h);
        }
        const float *values = attn_flow_kv(f, v, i, f->dv);
        for (int64_t t = 0; t < f->n; t++) {
            kernels->load_row(h.qn + t * f->d, h.q + t * f->d, ATTN_F32, f->d, (float)(1 / h.in[t]));
        }
        for (int64_t j = 0; j < f->m; j++) {
            kernels->load_row(w->w + (i * f->m + j) * f->dv, values + j * f->dv, ATTN_F32, f->dv, h.competition[j]);
        }
    }
}

static void allot(const flow *f, int threads, const float *allocation, const float *from, float *o)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < f->batch * f->heads * f->n; r++) {
        kernels->load_row(o + r * f->dv, from + r * f->dv, ATTN_F32, f->dv, allocation[r]);
    }
}

/* ---- Backward of the flows: from gradients of I (through the product), allocation and competition to those of mapped q and k ---- */

/* gi [n], gal [n], gc [m] in; gq, gk are added to. The gradients of the four sums lie behind them. */
static void back_normal(const flow *f, const head *h, double *gi, const double *gal, const double *gc, float *gq, float *gk)
{
    int64_t d = f->d, n = f->n, m = f->m;
    double *g_in = h->q_in + d, *g_out = g_in + d, *g_k = g_in + 2 * d, *g_q = g_in + 3 * d; /* of the four sums */
    double mean = 0;
    memset(g_in, 0, (size_t)(4 * d) * sizeof *g_in);
    for (int64_t j = 0; j < m; j++) {
        mean += (double)h->competition[j] / (double)m * gc[j];
    }
    for (int64_t j = 0; j < m; j++) {
        double g = h->clipped[j] ? 0 : (double)h->competition[j] * (gc[j] - mean); /* of the conserved source flow */
        for (int64_t c = 0; c < d; c++) {
            gk[j * d + c] += (float)(g * (h->q_in[c] + f->eps));
            g_in[c] += g * ((double)h->k[j * d + c] + f->eps);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        double a = (double)h->allocation[i], g = gal[i] * a * (1 - a) * (double)n / (double)m; /* of the conserved sink flow */
        const float *q = h->q + i * d;
        for (int64_t c = 0; c < d; c++) {
            gq[i * d + c] += (float)(g * (h->k_out[c] + f->eps) + g_in[c] / h->in[i]);
            g_out[c] += g * ((double)q[c] + f->eps);
        }
        gi[i] -= dot(q, g_in, d, 0) / (h->in[i] * h->in[i]);
        for (int64_t c = 0; c < d; c++) {
            gq[i * d + c] += (float)(gi[i] * (h->k_sum[c] + f->eps));
            g_k[c] += gi[i] * ((double)q[c] + f->eps);
        }
    }
    for (int64_t j = 0; j < m; j++) {
        const float *k = h->k + j * d;
        double go = -dot(k, g_out, d, 0) / (h->out[j] * h->out[j]);
        for (int64_t c = 0; c < d; c++) {
            gk[j * d + c] += (float)(g_out[c] / h->out[j] + go * (h->q_sum[c] + f->eps) + g_k[c]);
            g_q[c] += go * ((double)k[c] + f->eps);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        for (int64_t c = 0; c < d; c++) {
            gq[i * d + c] += (float)g_q[c];
        }
    }
}

/* Sums hold their totals at the end of the sequence; going back takes each token out again. */
static void back_causal(const flow *f, const head *h, const double *gi, const double *gal, const double *gc, float *gq, float *gk)
{
    int64_t d = f->d;
    double *g_in = h->q_in + d, *g_out = g_in + d, *g_k = g_in + 2 * d, *g_q = g_in + 3 * d, later = 0;
    memset(g_in, 0, (size_t)(4 * d) * sizeof *g_in);
    for (int64_t i = f->n - 1; i >= 0; i--) {
        double t = (double)(i + 1), in = h->in[i], out = h->out[i], a = (double)h->allocation[i];
        const float *q = h->q + i * d, *k = h->k + i * d;
        later += gc[i] * (double)h->competition[i] / h->ends[i];
        double ge = gc[i] * t / h->ends[i] - later;
        double g_source = h->clipped[i] ? 0 : ge * h->exps[i] / t, g_sink = gal[i] * a * (1 - a) / t;
        for (int64_t c = 0; c < d; c++) {
            g_in[c] += g_source * ((double)k[c] + f->eps);
            g_out[c] += g_sink * ((double)q[c] + f->eps);
        }
        double to_in = gi[i] - dot(q, g_in, d, 0) * t / (in * in), to_out = -dot(k, g_out, d, 0) * t / (out * out);
        for (int64_t c = 0; c < d; c++) {
            g_k[c] += to_in * ((double)q[c] + f->eps);
            g_q[c] += to_out * ((double)k[c] + f->eps);
            gq[i * d + c] += (float)(g_sink * (h->k_out[c] + f->eps) + g_in[c] * t / in + to_in * (h->k_sum[c] + f->eps) + g_q[c]);
            gk[i * d + c] += (float)(g_source * (h->q_in[c] + f->eps) + g_out[c] * t / out + to_out * (h->q_sum[c] + f->eps) + g_k[c]);
        }
        add_scaled(h->k_sum, k, d, -1);
        add_scaled(h->q_sum, q, d, -1);
        add_scaled(h->k_out, k, d, -t / out);
        add_scaled(h->q_in, q, d, -t / in);
    }
}

/* Of all heads of f together. */
static attn_status back_heads(attn_call *call, const flow *f, const float *q, const float *k, const float *v, const float *grad_o,
                                 float *grad_q, float *grad_k, float *grad_v)
{
    flow_work w;
    float *r, *gr, *gq, *gk, *gw;
    double *gi, *gal, *gc;
    int64_t heads = f->batch * f->heads, kv = heads / f->group;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    ATTN_TRY(make_work(call, f, &w));
    ATTN_TRY(attn_take_f32(call, heads * f->n * f->dv, &r));
    ATTN_TRY(attn_take_f32(call, heads * f->n * f->dv, &gr));
    ATTN_TRY(attn_take_f32(call, heads * f->n * f->d, &gq));
    ATTN_TRY(attn_take_f32(call, heads * f->m * f->d, &gk));
    ATTN_TRY(attn_take_f32(call, heads * f->m * f->dv, &gw));
    ATTN_TRY(take_double(call, heads * f->n, &gi));
    ATTN_TRY(take_double(call, heads * f->n, &gal));
    ATTN_TRY(take_double(call, heads * f->m, &gc));
    run_flows(call, f, q, k, v, &w);
    attn_linattn shape = product_shape(f);
    ATTN_TRY(attn_linattn_forward(&shape, call->arena, call->threads, w.qn, w.k, w.w, NULL, r, NULL));
    allot(f, call->threads, w.allocation, grad_o, gr);
    ATTN_TRY(attn_linattn_backward(&shape, call->arena, call->threads, w.qn, w.k, w.w, NULL, gr, gq, gk, gw, NULL));
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < heads; i++) {
        head h = head_of(f, &w, i);
        const float *values = attn_flow_kv(f, v, i, f->dv);
        for (int64_t t = 0; t < f->n; t++) {
            float *g = gq + (i * f->n + t) * f->d;
            gal[i * f->n + t] = (double)kernels->dot(grad_o + (i * f->n + t) * f->dv, r + (i * f->n + t) * f->dv, f->dv);
            /* qn = q / I */
            gi[i * f->n + t] = -(double)kernels->dot(g, h.qn + t * f->d, f->d) / h.in[t];
            kernels->scale(g, f->d, (float)(1 / h.in[t]));
        }
        for (int64_t j = 0; j < f->m; j++) {
            float *g = gw + (i * f->m + j) * f->dv;
            gc[i * f->m + j] = (double)kernels->dot(g, values + j * f->dv, f->dv);
            kernels->scale(g, f->dv, h.competition[j]);
        }
        if (f->causal) {
            back_causal(f, &h, gi + i * f->n, gal + i * f->n, gc + i * f->m, gq + i * f->n * f->d, gk + i * f->m * f->d);
        } else {
            back_normal(f, &h, gi + i * f->n, gal + i * f->n, gc + i * f->m, gq + i * f->n * f->d, gk + i * f->m * f->d);
        }
        map_back(f->kernel, q + i * f->n * f->d, h.q, gq + i * f->n * f->d, f->n * f->d);
        map_back(f->kernel, attn_flow_kv(f, k, i, f->d), h.k, gk + i * f->m * f->d, f->m * f->d);
    }
    if (grad_q != NULL) {
        memcpy(grad_q, gq, (size_t)(heads * f->n * f->d) * sizeof *gq);
    }
    /* Heads of a group in order. */
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < kv; i++) {
        for (int64_t g = 0; g < f->group; g++) {
            int64_t from = i * f->group + g; /* query heads of a kv head are consecutive, across batches too */
            float first = g == 0 ? 0.0f : 1.0f;
            for (int64_t e = 0; e < f->m * f->d && grad_k != NULL; e++) {
                grad_k[i * f->m * f->d + e] = (first != 0 ? grad_k[i * f->m * f->d + e] : 0) + gk[from * f->m * f->d + e];
            }
            for (int64_t e = 0; e < f->m * f->dv && grad_v != NULL; e++) {
                grad_v[i * f->m * f->dv + e] = (first != 0 ? grad_v[i * f->m * f->dv + e] : 0) + gw[from * f->m * f->dv + e];
            }
        }
    }
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

static float *moved(float *to, int64_t count) { return to != NULL ? to + count : NULL; }

/* grad_q, grad_k, grad_v are overwritten; each may be NULL. Heads take turns where what is kept of them is large. */
static attn_status core_backward(attn_call *call, const flow *f, const float *q, const float *k, const float *v, const float *grad_o,
                                 float *grad_q, float *grad_k, float *grad_v)
{
    int64_t kv = f->batch * f->heads / f->group, each = f->group * (f->n + f->m) * (3 * f->d + 2 * f->dv);
    int64_t together = attn_max_i64(call->threads, KEPT / each);
    for (int64_t first = 0; first < kv; first += together) {
        flow part = *f;
        part.batch = 1;
        part.heads = attn_min_i64(together, kv - first) * f->group;
        int64_t queries = first * f->group * f->n, keys = first * f->m;
        ATTN_TRY(back_heads(call, &part, q + queries * f->d, k + keys * f->d, v + keys * f->dv, grad_o + queries * f->dv,
                            moved(grad_q, queries * f->d), moved(grad_k, keys * f->d), moved(grad_v, keys * f->dv)));
    }
    return ATTN_OK;
}

static double core_flops(const flow *f)
{
    double heads = (double)(f->batch * f->heads), d = (double)f->d, dv = (double)f->dv;
    double inside = f->causal ? 64 * (double)f->n * (d + dv) : 0;
    return heads * ((double)(f->n + f->m) * (2 * d * dv + 8 * d) + inside);
}

/* ---- flow ---- */

static const attn_param_info flow_param_table[] = {CAUSAL_PARAM, KERNEL_PARAM, EPS_PARAM, CLAMP_PARAM};

enum { Q, K, V, O, COMPETITION, ALLOCATION };

static const attn_port_info flow_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries (sinks), before the feature map"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys (sources), before the feature map"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("competition", "B,H,M", FLOAT, 0, "weight of each source, 1 on average"),
    ATTN_OUT("allocation", "B,H,N", FLOAT, 0, "share that each sink is allotted"),
};

static attn_status setup(const attn_call *call, flow *f)
{
    const flow_params *p = call->params;
    int64_t heads = attn_dim(call, "H");
    *f = (flow){.batch = attn_dim(call, "B"), .heads = heads, .n = attn_dim(call, "N"), .m = attn_dim(call, "M"), .d = attn_dim(call, "D"),
                .dv = attn_dim(call, "Dv"), .causal = (int)p->causal, .kernel = p->kernel, .eps = p->eps, .clamp = p->clamp};
    f->group = heads > 0 ? heads / attn_dim(call, "Hkv") : 1;
    if (f->n < 1 || f->m < 1 || f->d < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "N = %lld, M = %lld and D = %lld, expected at least 1 each", (long long)f->n, (long long)f->m,
                         (long long)f->d);
    }
    if (f->causal && f->n != f->m) {
        return attn_fail(ATTN_ERR_SHAPE, "N = %lld and M = %lld, causal needs as many keys as queries", (long long)f->n, (long long)f->m);
    }
    return ATTN_OK;
}

static attn_status flow_bind(attn_call *call)
{
    flow f;
    return setup(call, &f);
}

static attn_status flow_forward(attn_call *call)
{
    flow f;
    ATTN_TRY(setup(call, &f));
    return attn_flow_forward(call, &f, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]), attn_f32(call->t[O]),
                        attn_f32(call->t[COMPETITION]), attn_f32(call->t[ALLOCATION]));
}

static attn_status flow_backward(attn_call *call)
{
    flow f;
    ATTN_TRY(setup(call, &f));
    return core_backward(call, &f, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]), attn_f32(call->grad[O]),
                         attn_f32(call->grad[Q]), attn_f32(call->grad[K]), attn_f32(call->grad[V]));
}

static attn_status flow_cost(attn_call *call, attn_cost *cost)
{
    flow f;
    ATTN_TRY(setup(call, &f));
    cost->flops = core_flops(&f);
    return ATTN_OK;
}

const attn_op_class attn_op_flow = {
    .info = {.name = "flow",
             .title = "Flow attention: linear attention with competition and allocation",
             .summary = "Attention as a flow network: sources compete for a fixed inflow of each sink and each sink is allotted a share, which "
                        "keeps linear attention sharp. No positions inside, so it serves text, images, time series alike. Costs about "
                        "2*(N + M)*D*Dv operations per head, linear in the length.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(flow_param_table, flow_ports)},
    .params_size = sizeof(flow_params),
    .bind = flow_bind,
    .forward = flow_forward,
    .backward = flow_backward,
    .cost = flow_cost,
};

/* ---- flow.decode ---- */

static const attn_param_info decode_param_table[] = {
    KERNEL_PARAM, EPS_PARAM, CLAMP_PARAM, ATTN_P_INT("steps", flow_params, steps, "0", 0, INFINITY, "tokens already in the state")};

enum { D_Q, D_K, D_V, D_K_SUM, D_Q_SUM, D_K_OUT, D_Q_IN, D_EXP, D_KV, D_O, D_STATE };

#define STATE_IN(name, shape, help) ATTN_IN(name, shape, FLOAT, ATTN_PORT_OPTIONAL, help)

static const attn_port_info decode_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, 0, "queries of the new tokens"),
    ATTN_IN("k", "B,H,N,D", FLOAT, 0, "their keys, for every query head"),
    ATTN_IN("v", "B,H,N,Dv", FLOAT, 0, "their values"),
    STATE_IN("k_sum", "B,H,D", "sum of mapped keys"),
    STATE_IN("q_sum", "B,H,D", "sum of mapped queries"),
    STATE_IN("k_out_sum", "B,H,D", "sum of keys over their outgoing flow"),
    STATE_IN("q_in_sum", "B,H,D", "sum of queries over their incoming flow"),
    STATE_IN("exp_sum", "B,H", "sum of the sources' exponentials"),
    STATE_IN("kv_state", "B,H,D,Dv", "state of the product"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, 0, "the attention output"),
    ATTN_OUT("k_sum", "B,H,D", FLOAT, 0, "the state after these tokens"),
    ATTN_OUT("q_sum", "B,H,D", FLOAT, 0, "sum of mapped queries"),
    ATTN_OUT("k_out_sum", "B,H,D", FLOAT, 0, "sum of keys over their outgoing flow"),
    ATTN_OUT("q_in_sum", "B,H,D", FLOAT, 0, "sum of queries over their incoming flow"),
    ATTN_OUT("exp_sum", "B,H", FLOAT, 0, "sum of the sources' exponentials"),
    ATTN_OUT("kv_state", "B,H,D,Dv", FLOAT, 0, "state of the product"),
};

static attn_status decode_bind(attn_call *call)
{
    const flow_params *p = call->params;
    int given = 0;
    for (int i = D_K_SUM; i <= D_KV; i++) {
        given += call->t[i] != NULL;
    }
    if (given != 0 && given != 6) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%d of the six state inputs are given, expected all or none: k_sum, q_sum, k_out_sum, q_in_sum, "
                                            "exp_sum, kv_state", given);
    }
    if (given == 0 && p->steps > 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "steps = %lld needs the state of those tokens", (long long)p->steps);
    }
    if (attn_dim(call, "N") < 1 || attn_dim(call, "D") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "N = %lld and D = %lld, expected at least 1 each", (long long)attn_dim(call, "N"),
                         (long long)attn_dim(call, "D"));
    }
    return ATTN_OK;
}

static attn_status decode_forward(attn_call *call)
{
    const flow_params *p = call->params;
    int64_t n = attn_dim(call, "N"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    flow f = {.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .group = 1, .n = n, .m = n, .d = d, .dv = dv, .causal = 1,
              .kernel = p->kernel, .eps = p->eps, .clamp = p->clamp};
    flow_work w;
    ATTN_TRY(make_work(call, &f, &w));
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    int64_t heads = f.batch * f.heads;
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1 && heads > 1)
    for (int64_t i = 0; i < heads; i++) {
        head h = head_of(&f, &w, i);
        double *sums[4] = {h.k_sum, h.q_sum, h.k_out, h.q_in}, exp_sum = 0;
        for (int s = 0; s < 4; s++) {
            for (int64_t c = 0; c < d; c++) {
                sums[s][c] = call->t[D_K_SUM + s] != NULL ? (double)attn_f32(call->t[D_K_SUM + s])[i * d + c] : 0;
            }
        }
        exp_sum = call->t[D_EXP] != NULL ? (double)attn_f32(call->t[D_EXP])[i] : 0;
        attn_flow_map(f.kernel, attn_f32(call->t[D_Q]) + i * n * d, w.q + i * n * d, n * d);
        attn_flow_map(f.kernel, attn_f32(call->t[D_K]) + i * n * d, w.k + i * n * d, n * d);
        flows_causal(&f, &h, p->steps, &exp_sum);
        for (int64_t t = 0; t < n; t++) {
            kernels->load_row(h.qn + t * d, h.q + t * d, ATTN_F32, d, (float)(1 / h.in[t]));
            kernels->load_row(w.w + (i * n + t) * dv, attn_f32(call->t[D_V]) + (i * n + t) * dv, ATTN_F32, dv, h.competition[t]);
        }
        for (int s = 0; s < 4; s++) {
            for (int64_t c = 0; c < d; c++) {
                attn_f32(call->t[D_STATE + s])[i * d + c] = (float)sums[s][c];
            }
        }
        attn_f32(call->t[D_STATE + 4])[i] = (float)exp_sum;
    }
    attn_linattn shape = product_shape(&f);
    float *o = attn_f32(call->t[D_O]);
    ATTN_TRY(attn_linattn_decode(&shape, call->arena, call->threads, w.qn, w.k, w.w, attn_f32(call->t[D_KV]), attn_f32(call->t[D_STATE + 5]), o));
    allot(&f, call->threads, w.allocation, o, o);
    return ATTN_OK;
}

static attn_status decode_cost(attn_call *call, attn_cost *cost)
{
    double tokens = (double)(attn_dim(call, "B") * attn_dim(call, "H") * attn_dim(call, "N"));
    cost->flops = tokens * (4 * (double)(attn_dim(call, "D") * attn_dim(call, "Dv")) + 16 * (double)attn_dim(call, "D"));
    cost->bytes = 8 * tokens * (double)(attn_dim(call, "D") * attn_dim(call, "Dv"));
    return ATTN_OK;
}

const attn_op_class attn_op_flow_decode = {
    .info = {.name = "flow.decode",
             .title = "Flow attention token by token",
             .summary = "The causal form of flow evaluated as a recurrence, for generation: six sums are the state, whatever the context. "
                        "Repeat keys and values of a group first: the state is per query head.",
             .paper = PAPER,
             ATTN_TABLE(decode_param_table, decode_ports)},
    .params_size = sizeof(flow_params),
    .bind = decode_bind,
    .forward = decode_forward,
    .cost = decode_cost,
};

/* ---- flow.layer ---- */

static const attn_param_info layer_param_table[] = {ATTN_P_INT("heads", flow_params, heads, NULL, 1, INFINITY, "attention heads"),
                                                    CAUSAL_PARAM, KERNEL_PARAM, EPS_PARAM, CLAMP_PARAM};

enum { X, MEMORY, W_Q, W_K, W_V, W_O, B_Q, B_K, B_V, B_O, Y };

static const attn_port_info layer_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens"),
    ATTN_IN("memory", "B,M,C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "where keys and values come from; absent: x"),
    ATTN_IN("w_q", "E,C", FLOAT, ATTN_PORT_DIFF, "query projection, heads contiguous"),
    ATTN_IN("w_k", "E,C", FLOAT, ATTN_PORT_DIFF, "key projection"),
    ATTN_IN("w_v", "E,C", FLOAT, ATTN_PORT_DIFF, "value projection"),
    ATTN_IN("w_o", "Cout,E", FLOAT, ATTN_PORT_DIFF, "output projection"),
    ATTN_IN("b_q", "E", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "query bias"),
    ATTN_IN("b_k", "E", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "key bias"),
    ATTN_IN("b_v", "E", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "value bias"),
    ATTN_IN("b_o", "Cout", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "output bias"),
    ATTN_OUT("o", "B,N,Cout", FLOAT, ATTN_PORT_DIFF, "the layer's output"),
};

typedef struct layer {
    flow flow;
    int64_t c, e, out;
    const float *memory;
} layer;

static attn_status layer_setup(const attn_call *call, layer *y)
{
    const flow_params *p = call->params;
    *y = (layer){.c = attn_dim(call, "C"), .e = attn_dim(call, "E"), .out = attn_dim(call, "Cout"),
                 .memory = attn_f32(call->t[call->t[MEMORY] != NULL ? MEMORY : X])};
    if (y->e % p->heads != 0 || y->e < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "w_q has %lld rows, expected a multiple of heads = %lld", (long long)y->e, (long long)p->heads);
    }
    if (p->causal && call->t[MEMORY] != NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "causal excludes memory");
    }
    int64_t n = attn_dim(call, "N"), m = call->t[MEMORY] != NULL ? attn_dim(call, "M") : n;
    if (n < 1 || m < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "N = %lld and M = %lld, expected at least 1 each", (long long)n, (long long)m);
    }
    y->flow = (flow){.batch = attn_dim(call, "B"), .heads = p->heads, .group = 1, .n = n, .m = m, .d = y->e / p->heads,
                     .dv = y->e / p->heads, .causal = (int)p->causal, .kernel = p->kernel, .eps = p->eps, .clamp = p->clamp};
    return ATTN_OK;
}

static attn_status layer_bind(attn_call *call)
{
    layer y;
    return layer_setup(call, &y);
}

/* Heads in rows of `count` tokens. */
static attn_head_rows heads_of(const flow *f, int64_t count) { return (attn_head_rows){f->batch, count, f->heads, f->d, f->heads * f->d, 0}; }

/* Projections by head, and the attention's output as rows. */
typedef struct inner {
    float *q, *k, *v, *o;
} inner;

static attn_status layer_inner(attn_call *call, const layer *y, inner *t)
{
    const flow *f = &y->flow;
    int64_t rows = f->batch * f->n, keys = f->batch * f->m, most = rows > keys ? rows : keys;
    float *spare;
    ATTN_TRY(attn_take_f32(call, most * y->e, &spare));
    ATTN_TRY(attn_take_f32(call, rows * y->e, &t->q));
    ATTN_TRY(attn_take_f32(call, keys * y->e, &t->k));
    ATTN_TRY(attn_take_f32(call, keys * y->e, &t->v));
    ATTN_TRY(attn_take_f32(call, rows * y->e, &t->o));
    float *to[3] = {t->q, t->k, t->v};
    for (int i = 0; i < 3; i++) {
        const float *x = i == 0 ? attn_f32(call->t[X]) : y->memory;
        ATTN_TRY(attn_linear_forward(call->arena, call->threads, i == 0 ? rows : keys, y->c, y->e, x, attn_f32(call->t[W_Q + i]),
                                     attn_f32(call->t[B_Q + i]), spare));
        attn_head_rows part = heads_of(f, i == 0 ? f->n : f->m);
        attn_heads_split(&part, call->threads, spare, to[i]);
    }
    ATTN_TRY(attn_flow_forward(call, f, t->q, t->k, t->v, spare, NULL, NULL));
    attn_head_rows heads = heads_of(f, f->n);
    attn_heads_join(&heads, call->threads, spare, t->o);
    return ATTN_OK;
}

static attn_status layer_forward(attn_call *call)
{
    layer y;
    inner t;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(layer_inner(call, &y, &t));
    return attn_linear_forward(call->arena, call->threads, y.flow.batch * y.flow.n, y.e, y.out, t.o, attn_f32(call->t[W_O]),
                               attn_f32(call->t[B_O]), attn_f32(call->t[Y]));
}

static attn_status layer_backward(attn_call *call)
{
    layer y;
    inner t;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(layer_inner(call, &y, &t));
    const flow *f = &y.flow;
    int64_t rows = f->batch * f->n, keys = f->batch * f->m, most = rows > keys ? rows : keys;
    float *go, *by_head, *grads[3], *spare, *more;
    ATTN_TRY(attn_take_f32(call, rows * y.e, &go));
    ATTN_TRY(attn_take_f32(call, rows * y.e, &by_head));
    ATTN_TRY(attn_take_f32(call, rows * y.e, &grads[0]));
    ATTN_TRY(attn_take_f32(call, keys * y.e, &grads[1]));
    ATTN_TRY(attn_take_f32(call, keys * y.e, &grads[2]));
    ATTN_TRY(attn_take_f32(call, most * y.e, &spare));
    ATTN_TRY(attn_take_f32(call, most * y.c, &more));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, y.e, y.out, t.o, attn_f32(call->t[W_O]), attn_f32(call->grad[Y]), go,
                                  attn_f32(call->grad[W_O]), attn_f32(call->grad[B_O])));
    attn_head_rows out = heads_of(f, f->n);
    attn_heads_split(&out, call->threads, go, by_head);
    ATTN_TRY(core_backward(call, f, t.q, t.k, t.v, by_head, grads[0], grads[1], grads[2]));
    for (int i = 0; i < 3; i++) {
        int64_t count = i == 0 ? f->n : f->m;
        int from = i > 0 && call->t[MEMORY] != NULL ? MEMORY : X;
        float *grad_x = attn_f32(call->grad[from]);
        attn_head_rows heads = heads_of(f, count);
        attn_heads_join(&heads, call->threads, grads[i], spare);
        ATTN_TRY(attn_linear_backward(call->arena, call->threads, f->batch * count, y.c, y.e, attn_f32(call->t[from]),
                                      attn_f32(call->t[W_Q + i]), spare, grad_x != NULL ? more : NULL, attn_f32(call->grad[W_Q + i]),
                                      attn_f32(call->grad[B_Q + i])));
        if (grad_x != NULL) {
            attn_add_f32(call->threads, f->batch * count * y.c, grad_x, more);
        }
    }
    return ATTN_OK;
}

static attn_status layer_cost(attn_call *call, attn_cost *cost)
{
    layer y;
    ATTN_TRY(layer_setup(call, &y));
    double rows = (double)(y.flow.batch * y.flow.n), keys = (double)(y.flow.batch * y.flow.m), c = (double)y.c, e = (double)y.e;
    cost->flops = core_flops(&y.flow) + 2 * c * e * (rows + 2 * keys) + 2 * rows * e * (double)y.out;
    return ATTN_OK;
}

const attn_op_class attn_op_flow_layer = {
    .info = {.name = "flow.layer",
             .title = "A flow attention layer",
             .summary = "flow between projections, for self attention or, with memory, for cross attention.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(layer_param_table, layer_ports)},
    .params_size = sizeof(flow_params),
    .bind = layer_bind,
    .forward = layer_forward,
    .backward = layer_backward,
    .cost = layer_cost,
};
