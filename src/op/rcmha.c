/* Relative convolutional multi-head attention (arXiv:2308.03429): queries, keys and values pass a short causal depthwise
 * convolution, and scores have learned relative positions. The positional terms are computed tile by tile: of the tables only the rows
 * that a tile's distances reach, read askew.
 */
#include "exec/stairs.h"
#include "layer/conv.h"
#include "layer/linear.h"
#include "op/class.h"

#include <string.h>

#define DIFF ATTN_PORT_DIFF
#define MAYBE (ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL)

/* ---- Relative attention ---- */

typedef struct core {
    int64_t batch, heads, kv_heads, n, m, d, dv, table; /* table: 2P rows, 0 without relative positions */
    int64_t q_stride, k_stride;                         /* rows from head to head */
    int causal;
    double scale;
    const float *q, *k, *v, *rel_emb, *rel_bias, *q_bias;
    float *o, *lse;
    attn_stairs stairs;
} core;

static attn_status core_forward(attn_call *call, core *x)
{
    int64_t all = x->batch * x->heads, group = x->heads / x->kv_heads;
    attn_stairs_head *list = attn_arena_array(call->arena, (size_t)all, sizeof *list);
    int64_t *end = attn_arena_array(call->arena, (size_t)x->n, sizeof *end);
    if (list == NULL || end == NULL) {
        return attn_fail_memory((size_t)all * sizeof *list);
    }
    for (int64_t i = 0; i < x->n; i++) {
        end[i] = x->causal ? attn_max_i64(0, i + x->m - x->n + 1) : x->m;
    }
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t h = bh % x->heads, kv = bh / x->heads * x->kv_heads + h / group;
        list[bh] = (attn_stairs_head){.rows = x->n, .kv = kv, .q = x->q + bh * x->q_stride * x->d, .end = end, .k = x->k + kv * x->k_stride * x->d,
                                      .v = x->v + kv * x->k_stride * x->dv, .o = x->o + bh * x->n * x->dv, .lse = x->lse + bh * x->n,
                                      .q_bias = x->q_bias != NULL ? x->q_bias + h * x->d : NULL};
        if (x->rel_emb != NULL) {
            list[bh].rel_emb = x->rel_emb + h * x->d;
            list[bh].rel_stride = x->heads * x->d;
            list[bh].rel_bias = x->rel_bias != NULL ? x->rel_bias + h : NULL;
            list[bh].rel_bias_stride = x->heads;
            list[bh].rel_count = x->table;
            list[bh].zero = x->table / 2;
            list[bh].first = x->m - x->n;
        }
    }
    x->stairs = (attn_stairs){x->m, x->d, x->dv, x->batch * x->kv_heads, all, x->scale, list};
    return attn_stairs_forward(&x->stairs, call->arena, call->threads);
}

typedef struct core_gradients {
    const float *o;
    float *q;       /* like x->q, same stride */
    float *k, *v;   /* [B*Hkv][m][d or dv] */
    float *rel_emb, *rel_bias, *q_bias; /* added to */
} core_gradients;

static attn_status core_backward(attn_call *call, const core *x, const core_gradients *g)
{
    int64_t all = x->batch * x->heads, size = x->n * x->d, table = x->rel_emb != NULL ? x->table : 0;
    attn_stairs_gradient *gradients = attn_arena_array(call->arena, (size_t)all, sizeof *gradients);
    float *content = attn_scratch_f32(call, 2 * all * size), *rel_q = content + all * size;
    float *emb = attn_scratch_f32(call, all * table * (x->d + 1)), *bias = emb + all * table * x->d;
    if (gradients == NULL || content == NULL || emb == NULL) {
        return attn_fail_memory((size_t)(all * (2 * size + table * (x->d + 1))) * sizeof(float));
    }
    for (int64_t bh = 0; bh < all; bh++) {
        gradients[bh] = (attn_stairs_gradient){.grad_o = g->o + bh * x->n * x->dv, .q = content + bh * size};
        if (table > 0) {
            gradients[bh].rel_q = rel_q + bh * size;
            gradients[bh].rel_emb = emb + bh * table * x->d;
            gradients[bh].rel_bias = x->rel_bias != NULL ? bias + bh * table : NULL;
        }
    }
    ATTN_TRY(attn_stairs_backward(&x->stairs, gradients, g->k, g->v, call->arena, call->threads));
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t h = bh % x->heads;
        for (int64_t i = 0; i < size; i++) {
            float own = content[bh * size + i];
            if (g->q_bias != NULL) {
                g->q_bias[h * x->d + i % x->d] += own;
            }
            if (g->q != NULL) {
                g->q[bh * x->q_stride * x->d + i] = table > 0 ? own + rel_q[bh * size + i] : own;
            }
        }
        for (int64_t r = 0; r < table; r++) {
            for (int64_t c = 0; c < x->d && g->rel_emb != NULL; c++) {
                g->rel_emb[(r * x->heads + h) * x->d + c] += emb[(bh * table + r) * x->d + c];
            }
            if (g->rel_bias != NULL) {
                g->rel_bias[r * x->heads + h] += bias[bh * table + r];
            }
        }
    }
    return ATTN_OK;
}

static attn_status check_table(const attn_tensor *emb, const attn_tensor *bias, int64_t n, int64_t m)
{
    if (emb == NULL) {
        return bias == NULL ? ATTN_OK : attn_fail(ATTN_ERR_ARGUMENT, "rel_bias needs rel_emb");
    }
    if (emb->shape[0] % 2 != 0) {
        return attn_fail(ATTN_ERR_SHAPE, "rel_emb has %lld rows, expected an even number 2P", (long long)emb->shape[0]);
    }
    if (m > emb->shape[0] / 2 || n > emb->shape[0] / 2) {
        return attn_fail(ATTN_ERR_SHAPE, "N = %lld and M = %lld, expected at most P = %lld, half the rows of rel_emb", (long long)n,
                         (long long)m, (long long)(emb->shape[0] / 2));
    }
    return ATTN_OK;
}

typedef struct core_params {
    int64_t causal;
    double scale;
} core_params;

static const attn_param_info core_param_table[] = {
    ATTN_P_BOOL("causal", core_params, causal, "true", "the last query sees the last key"),
    ATTN_P_FLOAT_AUTO("scale", core_params, scale, "1/sqrt(D)", -INFINITY, INFINITY, "multiplies the sum of all score terms"),
};

enum { C_Q, C_K, C_V, C_REL_EMB, C_REL_BIAS, C_Q_BIAS, C_O };

static const attn_port_info core_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, DIFF, "queries"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, DIFF, "values"),
    ATTN_IN("rel_emb", "R,H,D", FLOAT, MAYBE, "[2P, H, D]: row P + (key position - query position)"),
    ATTN_IN("rel_bias", "R,H", FLOAT, MAYBE, "scalar bias, same row"),
    ATTN_IN("q_bias", "H,D", FLOAT, MAYBE, "added to the query in the content term"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, DIFF, "the attention output"),
};

static attn_status core_bind(attn_call *call)
{
    return check_table(call->t[C_REL_EMB], call->t[C_REL_BIAS], attn_dim(call, "N"), attn_dim(call, "M"));
}

static attn_status core_setup(attn_call *call, core *x)
{
    const core_params *p = call->params;
    *x = (core){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"), .n = attn_dim(call, "N"),
                .m = attn_dim(call, "M"), .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"), .table = attn_dim(call, "R"),
                .causal = (int)p->causal, .q = attn_f32(call->t[C_Q]), .k = attn_f32(call->t[C_K]), .v = attn_f32(call->t[C_V]),
                .rel_emb = attn_f32(call->t[C_REL_EMB]), .rel_bias = attn_f32(call->t[C_REL_BIAS]),
                .q_bias = attn_f32(call->t[C_Q_BIAS]), .o = attn_f32(call->t[C_O])};
    x->q_stride = x->n;
    x->k_stride = x->m;
    x->scale = attn_default_scale(p->scale, x->d);
    x->lse = attn_scratch_f32(call, x->batch * x->heads * x->n);
    return x->lse != NULL ? ATTN_OK : attn_fail_memory((size_t)(x->batch * x->heads * x->n) * sizeof(float));
}

static attn_status rcmha_core_forward(attn_call *call)
{
    core x;
    ATTN_TRY(core_setup(call, &x));
    return core_forward(call, &x);
}

static attn_status rcmha_core_backward(attn_call *call)
{
    core x;
    ATTN_TRY(core_setup(call, &x));
    ATTN_TRY(core_forward(call, &x));
    core_gradients g = {attn_f32(call->grad[C_O]), attn_f32(call->grad[C_Q]), attn_f32(call->grad[C_K]), attn_f32(call->grad[C_V]),
                        attn_f32(call->grad[C_REL_EMB]), attn_f32(call->grad[C_REL_BIAS]), attn_f32(call->grad[C_Q_BIAS])};
    return core_backward(call, &x, &g);
}

const attn_op_class attn_op_rcmha_core = {
    .info = {.name = "rcmha.core",
             .title = "Attention with learned relative positions",
             .summary = "Softmax attention whose scores add, per head, the product of the query with a learned embedding of the distance, a "
                        "learned scalar for the distance, and a query bias in the content term. Costs half as much again as ordinary "
                        "attention; memory stays linear.",
             .paper = "arXiv:2308.03429",
             .differentiable = 1,
             ATTN_TABLE(core_param_table, core_ports)},
    .params_size = sizeof(core_params),
    .bind = core_bind,
    .forward = rcmha_core_forward,
    .backward = rcmha_core_backward,
};

/* ---- Depthwise convolution ---- */

enum { D_X, D_W, D_B, D_STATE, D_O };

static const attn_port_info dconv_ports[] = {
    ATTN_IN("x", "B,H,N,D", FLOAT, DIFF, "the sequence"),
    ATTN_IN("w", "...,D,K", FLOAT, DIFF, "taps [D, K] for all heads or [H, D, K]; the last multiplies the current token"),
    ATTN_IN("b", "...,D", FLOAT, MAYBE, "bias [D] or [H, D]"),
    ATTN_IN("state", "B,H,*,D", FLOAT, MAYBE, "[B, H, K-1, D]: the inputs just before x"),
    ATTN_OUT("o", "B,H,N,D", FLOAT, DIFF, "the convolved sequence"),
};

/* Taps and bias have one set, or one per head. */
static attn_status check_sets(const attn_tensor *t, const char *name, int ndim, int64_t heads)
{
    if (t == NULL || t->ndim == ndim || (t->ndim == ndim + 1 && t->shape[0] == heads)) {
        return ATTN_OK;
    }
    return attn_fail(ATTN_ERR_SHAPE, "%s has %d dimensions and leading size %lld, expected %d dimensions, or %d with one set per head (%lld)",
                     name, t->ndim, (long long)t->shape[0], ndim, ndim + 1, (long long)heads);
}

static attn_status dconv_bind(attn_call *call)
{
    int64_t heads = attn_dim(call, "H"), taps = attn_dim(call, "K");
    if (taps < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "w has K = %lld taps, expected at least 1", (long long)taps);
    }
    ATTN_TRY(check_sets(call->t[D_W], "w", 2, heads));
    ATTN_TRY(check_sets(call->t[D_B], "b", 1, heads));
    if (call->t[D_STATE] != NULL && call->t[D_STATE]->shape[2] != taps - 1) {
        return attn_fail(ATTN_ERR_SHAPE, "state holds %lld tokens, expected K-1 = %lld", (long long)call->t[D_STATE]->shape[2],
                         (long long)(taps - 1));
    }
    return ATTN_OK;
}

/* The convolution of [sequences = B*H][length][d]; taps and bias are spread to one set per head where only one of them is. */
static attn_status conv_setup(attn_call *call, const attn_tensor *w, const attn_tensor *b, int64_t heads, int64_t sequences,
                              int64_t length, attn_conv1d *conv)
{
    int64_t taps = w->shape[w->ndim - 1], d = w->shape[w->ndim - 2], sets = w->ndim == 3 || (b != NULL && b->ndim == 2) ? heads : 1;
    float *spread_w = attn_scratch_f32(call, sets * d * taps), *spread_b = attn_scratch_f32(call, sets * d);
    if (spread_w == NULL || spread_b == NULL) {
        return attn_fail_memory((size_t)(sets * d * taps) * sizeof(float));
    }
    for (int64_t i = 0; i < sets * d * taps; i++) {
        spread_w[i] = attn_f32(w)[w->ndim == 3 ? i : i % (d * taps)];
    }
    for (int64_t i = 0; i < sets * d && b != NULL; i++) {
        spread_b[i] = attn_f32(b)[b->ndim == 2 ? i : i % d];
    }
    *conv = (attn_conv1d){sequences, length, d, taps, sets, spread_w, b != NULL ? spread_b : NULL, NULL};
    return ATTN_OK;
}

static attn_status conv_back(attn_call *call, const attn_conv1d *conv, const float *x, const float *grad_o, float *grad_x,
                             float *grad_state, const attn_tensor *grad_w, const attn_tensor *grad_b)
{
    int64_t set = conv->channels * conv->taps;
    float *w = attn_scratch_f32(call, conv->sets * set), *b = attn_scratch_f32(call, conv->sets * conv->channels);
    if (w == NULL || b == NULL) {
        return attn_fail_memory((size_t)(conv->sets * set) * sizeof(float));
    }
    memset(w, 0, (size_t)(conv->sets * set) * sizeof *w);
    memset(b, 0, (size_t)(conv->sets * conv->channels) * sizeof *b);
    ATTN_TRY(attn_conv1d_backward(conv, call->arena, call->threads, x, grad_o, grad_x, grad_state, w, b));
    for (int64_t i = 0; i < conv->sets * set && grad_w != NULL; i++) {
        attn_f32(grad_w)[grad_w->ndim == 3 ? i : i % set] += w[i];
    }
    for (int64_t i = 0; i < conv->sets * conv->channels && grad_b != NULL; i++) {
        attn_f32(grad_b)[grad_b->ndim == 2 ? i : i % conv->channels] += b[i];
    }
    return ATTN_OK;
}

static attn_status dconv_setup(attn_call *call, attn_conv1d *conv)
{
    int64_t heads = attn_dim(call, "H");
    ATTN_TRY(conv_setup(call, call->t[D_W], call->t[D_B], heads, attn_dim(call, "B") * heads, attn_dim(call, "N"), conv));
    conv->state = attn_f32(call->t[D_STATE]);
    return ATTN_OK;
}

static attn_status dconv_forward(attn_call *call)
{
    attn_conv1d conv;
    ATTN_TRY(dconv_setup(call, &conv));
    attn_conv1d_forward(&conv, call->threads, attn_f32(call->t[D_X]), attn_f32(call->t[D_O]));
    return ATTN_OK;
}

static attn_status dconv_backward(attn_call *call)
{
    attn_conv1d conv;
    ATTN_TRY(dconv_setup(call, &conv));
    return conv_back(call, &conv, attn_f32(call->t[D_X]), attn_f32(call->grad[D_O]), attn_f32(call->grad[D_X]),
                     attn_f32(call->grad[D_STATE]), call->grad[D_W], call->grad[D_B]);
}

const attn_op_class attn_op_rcmha_dconv = {
    .info = {.name = "rcmha.dconv",
             .title = "Causal depthwise convolution of heads along the sequence",
             .summary = "Each channel is filtered by a few taps over the current and earlier tokens, with one set of taps for all heads or one "
                        "per head. Costs K multiplications per number.",
             .paper = "arXiv:2308.03429",
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(dconv_ports)},
    .bind = dconv_bind,
    .forward = dconv_forward,
    .backward = dconv_backward,
};

/* ---- The layer ---- */

typedef struct rcmha_params {
    int64_t heads, causal, q_history, decode;
    double scale;
} rcmha_params;

static const attn_param_info rcmha_param_table[] = {
    ATTN_P_INT("heads", rcmha_params, heads, NULL, 1, INFINITY, "heads; divides the rows of w_q"),
    ATTN_P_BOOL("causal", rcmha_params, causal, "true", "tokens see memory, earlier tokens and themselves"),
    ATTN_P_FLOAT_AUTO("scale", rcmha_params, scale, "1/sqrt(D)", -INFINITY, INFINITY, "multiplies the sum of all score terms"),
    ATTN_P_CHOICE("q_history", rcmha_params, q_history, "zero", "zero|mem", "what the query convolution sees before x"),
    ATTN_P_BOOL("decode", rcmha_params, decode, "false", "run token by token (without mem); the result is the same"),
};

/* w, b, conv_w and conv_b of queries, keys and values lie next to each other in this order. */
enum { X, MEM, W, W_Q = W, W_K, W_V, B, B_Q = B, B_K, B_V, CONV_W, CONV_Q_W = CONV_W, CONV_K_W, CONV_V_W, CONV_B, CONV_Q_B = CONV_B,
       CONV_K_B, CONV_V_B, REL_EMB, REL_BIAS, Q_BIAS, W_O, B_O, Y };

static const attn_port_info rcmha_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "normalised layer input"),
    ATTN_IN("mem", "B,Tm,C", FLOAT, MAYBE, "earlier tokens, for keys and values"),
    ATTN_IN("w_q", "HD,C", FLOAT, DIFF, "query projection [heads*D, C]"),
    ATTN_IN("w_k", "HD,C", FLOAT, DIFF, "key projection"),
    ATTN_IN("w_v", "HD,C", FLOAT, DIFF, "value projection"),
    ATTN_IN("b_q", "HD", FLOAT, MAYBE, "bias of the queries"),
    ATTN_IN("b_k", "HD", FLOAT, MAYBE, "bias of the keys"),
    ATTN_IN("b_v", "HD", FLOAT, MAYBE, "bias of the values"),
    ATTN_IN("conv_q_w", "...,D,K", FLOAT, MAYBE, "taps [D, K] or [H, D, K]; the last multiplies the current token"),
    ATTN_IN("conv_k_w", "...,D,K", FLOAT, MAYBE, "taps of the keys"),
    ATTN_IN("conv_v_w", "...,D,K", FLOAT, MAYBE, "taps of the values"),
    ATTN_IN("conv_q_b", "...,D", FLOAT, MAYBE, "convolution bias [D] or [H, D]"),
    ATTN_IN("conv_k_b", "...,D", FLOAT, MAYBE, "convolution bias of the keys"),
    ATTN_IN("conv_v_b", "...,D", FLOAT, MAYBE, "convolution bias of the values"),
    ATTN_IN("rel_emb", "R,H,D", FLOAT, MAYBE, "[2P, H, D]: row P + (key position - query position)"),
    ATTN_IN("rel_bias", "R,H", FLOAT, MAYBE, "scalar bias, same row"),
    ATTN_IN("q_bias", "H,D", FLOAT, MAYBE, "added to the query in the content term"),
    ATTN_IN("w_o", "Cout,HD", FLOAT, DIFF, "output projection"),
    ATTN_IN("b_o", "Cout", FLOAT, MAYBE, "its bias"),
    ATTN_OUT("y", "B,N,Cout", FLOAT, DIFF, "the layer's output"),
};

static attn_status rcmha_bind(attn_call *call)
{
    const rcmha_params *p = call->params;
    int64_t rows = attn_dim(call, "HD"), d = rows / p->heads, n = attn_dim(call, "N"), memory = attn_max_i64(0, attn_dim(call, "Tm"));
    int convs = 0;
    if (rows % p->heads != 0 || d < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "heads = %lld does not divide the %lld rows of w_q", (long long)p->heads, (long long)rows);
    }
    if ((attn_dim(call, "H") >= 0 && attn_dim(call, "H") != p->heads) || (attn_dim(call, "D") >= 0 && attn_dim(call, "D") != d)) {
        return attn_fail(ATTN_ERR_SHAPE, "convolutions, rel_emb and q_bias must be for H = %lld heads of D = %lld", (long long)p->heads,
                         (long long)d);
    }
    for (int s = 0; s < 3; s++) {
        convs += call->t[CONV_W + s] != NULL;
        ATTN_TRY(check_sets(call->t[CONV_W + s], rcmha_ports[CONV_W + s].name, 2, p->heads));
        ATTN_TRY(check_sets(call->t[CONV_B + s], rcmha_ports[CONV_B + s].name, 1, p->heads));
        if (call->t[CONV_B + s] != NULL && call->t[CONV_W + s] == NULL) {
            return attn_fail(ATTN_ERR_ARGUMENT, "%s needs %s", rcmha_ports[CONV_B + s].name, rcmha_ports[CONV_W + s].name);
        }
    }
    if (convs != 0 && convs != 3) {
        return attn_fail(ATTN_ERR_ARGUMENT, "conv_q_w, conv_k_w and conv_v_w: expected all three or none");
    }
    if (convs == 3 && attn_dim(call, "K") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "the convolutions have K = %lld taps, expected at least 1", (long long)attn_dim(call, "K"));
    }
    if (p->decode && (!p->causal || call->t[MEM] != NULL)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "decode = true needs causal = true and no mem");
    }
    return check_table(call->t[REL_EMB], call->t[REL_BIAS], n, n + memory);
}

/* Queries, keys or values: the tokens from `first` of (mem, x), projected and convolved. */
typedef struct stream {
    int64_t first, length;
    float *source;     /* [B][length][C] */
    float *raw, *out;  /* [B*H][length][D] */
    attn_conv1d conv;
} stream;

typedef struct layer {
    int64_t batch, n, memory, m, width, heads, d, taps;
    stream s[3];
    core core;
    float *joined; /* [B][n][H*D] */
} layer;

/* [B][length][H*D] to [B*H][length][D], or back. */
static void split_heads(const layer *x, int64_t length, const float *from, float *to, int back)
{
    for (int64_t i = 0; i < x->batch * length * x->heads; i++) {
        int64_t b = i / (length * x->heads), t = i / x->heads % length, h = i % x->heads;
        int64_t split = ((b * x->heads + h) * length + t) * x->d;
        memcpy(to + (back ? i * x->d : split), from + (back ? split : i * x->d), (size_t)x->d * sizeof(float));
    }
}

static attn_status layer_setup(attn_call *call, layer *x)
{
    const rcmha_params *p = call->params;
    *x = (layer){.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .memory = attn_max_i64(0, attn_dim(call, "Tm")),
                 .width = attn_dim(call, "C"), .heads = p->heads, .d = attn_dim(call, "HD") / p->heads, .taps = 1};
    x->m = x->memory + x->n;
    if (call->t[CONV_W] != NULL) {
        x->taps = attn_dim(call, "K");
    }
    for (int s = 0; s < 3; s++) {
        stream *y = &x->s[s];
        /* Convolved together with the last tokens of mem, queries see their projections through the taps. */
        int64_t history = p->q_history == 1 ? attn_min_i64(x->taps - 1, x->memory) : 0;
        y->first = s == 0 ? x->memory - history : 0;
        y->length = x->m - y->first;
        int64_t tokens = x->batch * y->length, size = tokens * x->heads * x->d;
        y->source = attn_scratch_f32(call, tokens * x->width + 2 * size);
        if (y->source == NULL) {
            return attn_fail_memory((size_t)(tokens * x->width + 2 * size) * sizeof(float));
        }
        y->raw = y->source + tokens * x->width;
        y->out = call->t[CONV_W] != NULL ? y->raw + size : y->raw;
        if (call->t[CONV_W] != NULL) {
            ATTN_TRY(conv_setup(call, call->t[CONV_W + s], call->t[CONV_B + s], x->heads, x->batch * x->heads, y->length, &y->conv));
        }
        for (int64_t i = 0; i < tokens; i++) {
            int64_t b = i / y->length, t = y->first + i % y->length;
            const float *from = t < x->memory ? attn_f32(call->t[MEM]) + (b * x->memory + t) * x->width
                                              : attn_f32(call->t[X]) + (b * x->n + t - x->memory) * x->width;
            memcpy(y->source + i * x->width, from, (size_t)x->width * sizeof(float));
        }
    }
    int64_t rows = x->batch * x->heads * x->n;
    float *o = attn_scratch_f32(call, rows * (2 * x->d + 1));
    if (o == NULL) {
        return attn_fail_memory((size_t)(rows * (2 * x->d + 1)) * sizeof(float));
    }
    x->joined = o + rows * x->d;
    x->core = (core){.batch = x->batch, .heads = x->heads, .kv_heads = x->heads, .n = x->n, .m = x->m, .d = x->d, .dv = x->d,
                     .table = attn_dim(call, "R"), .q_stride = x->s[0].length, .k_stride = x->m, .causal = (int)p->causal,
                     .scale = attn_default_scale(p->scale, x->d), .q = x->s[0].out + (x->s[0].length - x->n) * x->d, .k = x->s[1].out,
                     .v = x->s[2].out, .rel_emb = attn_f32(call->t[REL_EMB]), .rel_bias = attn_f32(call->t[REL_BIAS]),
                     .q_bias = attn_f32(call->t[Q_BIAS]), .o = o, .lse = o + 2 * rows * x->d};
    return ATTN_OK;
}

/* Everything up to the output projection, all tokens at once. */
static attn_status layer_attend(attn_call *call, layer *x)
{
    for (int s = 0; s < 3; s++) {
        stream *y = &x->s[s];
        int64_t tokens = x->batch * y->length, size = x->heads * x->d;
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        float *rows = attn_scratch_f32(call, tokens * size);
        if (rows == NULL) {
            return attn_fail_memory((size_t)(tokens * size) * sizeof(float));
        }
        ATTN_TRY(attn_linear_forward(call->arena, call->threads, tokens, x->width, size, y->source, attn_f32(call->t[W + s]),
                                     attn_f32(call->t[B + s]), rows));
        split_heads(x, y->length, rows, y->raw, 0);
        attn_arena_release(call->arena, mark);
        if (y->out != y->raw) {
            attn_conv1d_forward(&y->conv, call->threads, y->raw, y->out);
        }
    }
    ATTN_TRY(core_forward(call, &x->core));
    split_heads(x, x->n, x->core.o, x->joined, 1);
    return ATTN_OK;
}

/* The same token by token: rings of unconvolved projections, caches of convolved keys and values. */
static attn_status layer_decode(attn_call *call, layer *x)
{
    int64_t size = x->heads * x->d, sequences = x->batch * x->heads, before = x->taps - 1;
    float *rows = attn_scratch_f32(call, x->batch * (x->width + 2 * size)), *token = rows + x->batch * x->width;
    float *now = token + x->batch * size, *ring = attn_scratch_f32(call, sequences * before * x->d);
    if (rows == NULL || ring == NULL) {
        return attn_fail_memory((size_t)(sequences * x->taps * x->d) * sizeof(float));
    }
    for (int64_t t = 0; t < x->n; t++) {
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        for (int s = 0; s < 3; s++) {
            stream *y = &x->s[s];
            for (int64_t b = 0; b < x->batch; b++) {
                memcpy(rows + b * x->width, y->source + (b * x->n + t) * x->width, (size_t)x->width * sizeof(float));
            }
            ATTN_TRY(attn_linear_forward(call->arena, call->threads, x->batch, x->width, size, rows, attn_f32(call->t[W + s]),
                                         attn_f32(call->t[B + s]), token));
            for (int64_t i = 0; i < sequences; i++) {
                memcpy(y->raw + (i * x->n + t) * x->d, token + i * x->d, (size_t)x->d * sizeof(float));
                for (int64_t j = 0; j < before; j++) {
                    int64_t at = t - before + j;
                    for (int64_t c = 0; c < x->d; c++) {
                        ring[(i * before + j) * x->d + c] = at >= 0 ? y->raw[(i * x->n + at) * x->d + c] : 0.0f;
                    }
                }
            }
            if (y->out != y->raw) {
                attn_conv1d step = y->conv;
                step.length = 1;
                step.state = ring;
                attn_conv1d_forward(&step, call->threads, token, now);
                for (int64_t i = 0; i < sequences; i++) {
                    memcpy(y->out + (i * x->n + t) * x->d, now + i * x->d, (size_t)x->d * sizeof(float));
                }
            }
        }
        core step = x->core;
        step.n = 1;
        step.m = t + 1;
        step.q = x->core.q + t * x->d;
        ATTN_TRY(core_forward(call, &step));
        for (int64_t b = 0; b < x->batch; b++) {
            memcpy(x->joined + (b * x->n + t) * size, step.o + b * size, (size_t)size * sizeof(float));
        }
        attn_arena_release(call->arena, mark);
    }
    return ATTN_OK;
}

static attn_status rcmha_forward(attn_call *call)
{
    const rcmha_params *p = call->params;
    layer x;
    ATTN_TRY(layer_setup(call, &x));
    ATTN_TRY(p->decode ? layer_decode(call, &x) : layer_attend(call, &x));
    return attn_linear_forward(call->arena, call->threads, x.batch * x.n, x.heads * x.d, attn_dim(call, "Cout"), x.joined,
                               attn_f32(call->t[W_O]), attn_f32(call->t[B_O]), attn_f32(call->t[Y]));
}

/* grad [B*H][length][D] of a convolved stream back to its tokens and parameters. */
static attn_status stream_back(attn_call *call, const layer *x, int s, float *grad)
{
    const stream *y = &x->s[s];
    int64_t tokens = x->batch * y->length, size = x->heads * x->d;
    float *raw = attn_scratch_f32(call, tokens * size), *rows = attn_scratch_f32(call, tokens * size);
    float *source = attn_scratch_f32(call, tokens * x->width);
    if (raw == NULL || rows == NULL || source == NULL) {
        return attn_fail_memory((size_t)(tokens * size) * sizeof(float));
    }
    if (y->out != y->raw) {
        ATTN_TRY(conv_back(call, &y->conv, y->raw, grad, raw, NULL, call->grad[CONV_W + s], call->grad[CONV_B + s]));
        grad = raw;
    }
    split_heads(x, y->length, grad, rows, 1);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, tokens, x->width, size, y->source, attn_f32(call->t[W + s]), rows, source,
                                  attn_f32(call->grad[W + s]), attn_f32(call->grad[B + s])));
    for (int64_t i = 0; i < tokens; i++) {
        int64_t b = i / y->length, t = y->first + i % y->length;
        float *to = t < x->memory ? attn_f32(call->grad[MEM]) : attn_f32(call->grad[X]);
        int64_t row = t < x->memory ? b * x->memory + t : b * x->n + t - x->memory;
        for (int64_t c = 0; c < x->width && to != NULL; c++) {
            to[row * x->width + c] += source[i * x->width + c];
        }
    }
    return ATTN_OK;
}

static attn_status rcmha_backward(attn_call *call)
{
    layer x;
    ATTN_TRY(layer_setup(call, &x));
    ATTN_TRY(layer_attend(call, &x));
    int64_t size = x.heads * x.d, rows = x.batch * x.n, kv = x.batch * x.m * size, queries = x.batch * x.s[0].length * size;
    float *joined = attn_scratch_f32(call, 2 * rows * size), *grad_o = joined + rows * size;
    float *grad[3] = {attn_scratch_f32(call, queries), attn_scratch_f32(call, kv), attn_scratch_f32(call, kv)};
    if (joined == NULL || grad[0] == NULL || grad[1] == NULL || grad[2] == NULL) {
        return attn_fail_memory((size_t)(2 * kv) * sizeof(float));
    }
    memset(grad[0], 0, (size_t)queries * sizeof(float));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, size, attn_dim(call, "Cout"), x.joined, attn_f32(call->t[W_O]),
                                  attn_f32(call->grad[Y]), joined, attn_f32(call->grad[W_O]), attn_f32(call->grad[B_O])));
    split_heads(&x, x.n, joined, grad_o, 0);
    core_gradients g = {grad_o, grad[0] + (x.s[0].length - x.n) * x.d, grad[1], grad[2], attn_f32(call->grad[REL_EMB]),
                        attn_f32(call->grad[REL_BIAS]), attn_f32(call->grad[Q_BIAS])};
    ATTN_TRY(core_backward(call, &x.core, &g));
    for (int s = 0; s < 3; s++) {
        ATTN_TRY(stream_back(call, &x, s, grad[s]));
    }
    return ATTN_OK;
}

static attn_status rcmha_cost(attn_call *call, attn_cost *cost)
{
    const rcmha_params *p = call->params;
    double n = (double)attn_dim(call, "N"), m = n + (double)attn_max_i64(0, attn_dim(call, "Tm")), size = (double)attn_dim(call, "HD");
    double tokens = (double)attn_dim(call, "B") * (n + 2 * m), taps = (double)attn_max_i64(0, attn_dim(call, "K"));
    cost->pairs = (double)(attn_dim(call, "B") * p->heads) * (p->causal ? n * (m - n) + n * (n + 1) / 2 : n * m);
    cost->flops = 2 * cost->pairs * size / (double)p->heads * (call->t[REL_EMB] != NULL ? 3 : 2) +
                  2 * size * tokens * ((double)attn_dim(call, "C") + taps) +
                  2 * (double)attn_dim(call, "B") * n * size * (double)attn_dim(call, "Cout");
    return ATTN_OK;
}

const attn_op_class attn_op_rcmha = {
    .info = {.name = "rcmha",
             .title = "Relative convolutional multi-head attention layer",
             .summary = "A whole layer: projections, short causal depthwise convolutions of queries, keys and values, attention with learned "
                        "relative positions, output projection, with an optional memory of earlier tokens. Without convolutions or tables "
                        "it is the layer it was compared with (relative, convolutional or plain attention). Memory is linear in the "
                        "length.",
             .paper = "arXiv:2308.03429",
             .differentiable = 1,
             ATTN_TABLE(rcmha_param_table, rcmha_ports)},
    .params_size = sizeof(rcmha_params),
    .bind = rcmha_bind,
    .forward = rcmha_forward,
    .backward = rcmha_backward,
    .cost = rcmha_cost,
};
