/* Relative convolutional multi-head attention (arXiv:2308.03429), the whole layer: queries, keys and values pass a short causal depthwise
 * convolution, and scores have learned relative positions. */
#include "op/rcmha.h"

#include "layer/heads.h"
#include "layer/linear.h"

#include <string.h>

#define DIFF ATTN_PORT_DIFF
#define MAYBE (ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL)

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
    int64_t table_heads = attn_dim(call, "H") < 0 ? p->heads : attn_dim(call, "H"), table_d = attn_dim(call, "D") < 0 ? d : attn_dim(call, "D");
    if (table_heads != p->heads || table_d != d) {
        return attn_fail(ATTN_ERR_SHAPE, "convolutions, rel_emb and q_bias are for H = %lld heads of D = %lld, expected %lld of %lld",
                         (long long)table_heads, (long long)table_d, (long long)p->heads, (long long)d);
    }
    for (int s = 0; s < 3; s++) {
        convs += call->t[CONV_W + s] != NULL;
        ATTN_TRY(attn_rcmha_check_sets(call->t[CONV_W + s], rcmha_ports[CONV_W + s].name, 2, p->heads));
        ATTN_TRY(attn_rcmha_check_sets(call->t[CONV_B + s], rcmha_ports[CONV_B + s].name, 1, p->heads));
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
    if (call->t[REL_BIAS] != NULL && call->t[REL_EMB] == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "rel_bias needs rel_emb");
    }
    return attn_rcmha_check_table(call->t[REL_EMB], rcmha_ports[REL_EMB].name, n, n + memory);
}

/* Queries, keys or values: the tokens from `first` of (mem, x), projected and convolved. */
typedef struct stream {
    int64_t first, length;
    const float *mem; /* [B][memory - first][C] */
    float *raw, *out; /* [B*H][length][D]; raw: before the convolution, for backward passes, else NULL */
    attn_conv1d conv;
} stream;

typedef struct layer {
    int64_t batch, n, memory, m, width, heads, d, taps;
    int convolved;
    stream s[3];
    rcmha_core core;
} layer;

/* Rows [B][count][H*D] from the tokens from `at` on of [B*H][length][D]. */
static void join(const attn_call *call, const layer *x, int64_t length, int64_t at, int64_t count, const float *heads, float *rows)
{
    attn_head_rows shape = {1, length, x->heads, x->d, x->heads * x->d, 0};
    for (int64_t b = 0; b < x->batch; b++) {
        attn_heads_join_some(&shape, call->threads, at, count, heads + b * x->heads * length * x->d, rows + b * count * shape.width);
    }
}

/* The same of all of x's tokens. */
static attn_head_rows head_rows(const layer *x) { return (attn_head_rows){x->batch, x->n, x->heads, x->d, x->heads * x->d, 0}; }

static attn_status layer_setup(attn_call *call, layer *x)
{
    const rcmha_params *p = call->params;
    *x = (layer){.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .memory = attn_max_i64(0, attn_dim(call, "Tm")),
                 .width = attn_dim(call, "C"), .heads = p->heads, .d = attn_dim(call, "HD") / p->heads, .taps = 1};
    x->m = x->memory + x->n;
    x->convolved = call->t[CONV_W] != NULL;
    x->taps = x->convolved ? attn_dim(call, "K") : 1;
    for (int s = 0; s < 3; s++) {
        stream *y = &x->s[s];
        /* Convolved together with the last tokens of mem, queries see their projections through the taps. */
        int64_t history = p->q_history == 1 ? attn_min_i64(x->taps - 1, x->memory) : 0;
        y->first = s == 0 ? x->memory - history : 0;
        y->length = x->m - y->first;
    }
    x->core = (rcmha_core){.batch = x->batch, .heads = x->heads, .kv_heads = x->heads, .n = x->n, .m = x->m, .d = x->d, .dv = x->d,
                           .table = attn_dim(call, "R"), .q_stride = x->s[0].length, .k_stride = x->m, .causal = (int)p->causal,
                           .scale = attn_default_scale(p->scale, x->d), .rel_emb = attn_f32(call->t[REL_EMB]),
                           .rel_bias = attn_f32(call->t[REL_BIAS]), .q_bias = attn_f32(call->t[Q_BIAS])};
    return ATTN_OK;
}

/* Memory for the streams, their tokens of mem, and the convolutions; keep: what is before the convolution too. */
static attn_status layer_prepare(attn_call *call, layer *x, int keep)
{
    const rcmha_params *p = call->params;
    int64_t rows = x->batch * x->heads * x->n;
    for (int s = 0; s < 3; s++) {
        stream *y = &x->s[s];
        int64_t size = x->batch * y->length * x->heads * x->d, tokens = x->memory - y->first;
        ATTN_TRY(attn_take_f32(call, size, &y->out));
        y->raw = NULL;
        if (x->convolved && keep) {
            ATTN_TRY(attn_take_f32(call, size, &y->raw));
        }
        if (x->convolved) {
            ATTN_TRY(attn_rcmha_conv(call, call->t[CONV_W + s], call->t[CONV_B + s], x->heads, x->batch * x->heads, y->length, &y->conv));
        }
        y->mem = attn_f32(call->t[MEM]);
        if (y->first > 0 && tokens > 0) {
            float *copy;
            ATTN_TRY(attn_take_f32(call, x->batch * tokens * x->width, &copy));
            for (int64_t b = 0; b < x->batch; b++) {
                memcpy(copy + b * tokens * x->width, y->mem + (b * x->memory + y->first) * x->width,
                       (size_t)(tokens * x->width) * sizeof *copy);
            }
            y->mem = copy;
        }
    }
    x->core.q = x->s[0].out + (x->s[0].length - x->n) * x->d;
    x->core.k = x->s[1].out;
    x->core.v = x->s[2].out;
    x->core.o = x->s[0].out;
    if (keep || x->s[0].length != x->n || p->decode) { /* outputs may take the place of queries */
        ATTN_TRY(attn_take_f32(call, rows * x->d, &x->core.o));
    }
    return attn_take_f32(call, rows, &x->core.lse);
}

/* The last taps - 1 tokens of `state`, then of raw [sequences][count][D], become the next span's state. */
static void keep_last(const layer *x, const float *raw, int64_t sequences, int64_t count, float *state)
{
    int64_t before = x->taps - 1;
    for (int64_t i = 0; i < sequences * before; i++) {
        int64_t from = i % before + count - before;
        memcpy(state + i * x->d, from < 0 ? state + (i + count) * x->d : raw + (i / before * count + from) * x->d, (size_t)x->d * sizeof *state);
    }
}

/* `all` tokens of each of `items` batch items from b on, projected and convolved, into their stream's tokens from `at` on; of one item, a
 * span after the other. state [items * H][taps-1][D]: what the convolution sees before them, and then before those that follow. */
static attn_status run_stream(attn_call *call, const layer *x, int s, int64_t b, int64_t items, const float *source, int64_t at, int64_t all,
                              float *state)
{
    const stream *y = &x->s[s];
    int64_t width = x->heads * x->d, most = items > 1 ? all : attn_min_i64(ATTN_LINEAR_SPAN, all), room = x->convolved ? items * most * width : 0;
    attn_head_rows whole = {1, y->length, x->heads, x->d, width, 0}, span = {items, most, x->heads, x->d, width, 0};
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    float *rows, *raw, *out = y->out + b * y->length * width;
    ATTN_TRY(attn_take_f32(call, items * most * width, &rows));
    ATTN_TRY(attn_take_f32(call, room, &raw));
    if (most < y->length) {
        ATTN_TRY(attn_take_f32(call, room, &out));
    }
    for (int64_t first = 0; first < all; first += span.n) {
        span.n = attn_min_i64(most, all - first);
        ATTN_TRY(attn_linear_forward(call->arena, call->threads, items * span.n, x->width, width, source + first * x->width,
                                     attn_f32(call->t[W + s]), attn_f32(call->t[B + s]), rows));
        float *plain = x->convolved ? y->raw : y->out;
        for (int64_t i = 0; i < (plain != NULL ? items : 0); i++) {
            attn_heads_split_some(&whole, call->threads, at + first, span.n, rows + i * span.n * width, plain + (b + i) * y->length * width);
        }
        if (!x->convolved) {
            continue;
        }
        attn_conv1d conv = y->conv;
        conv.sequences = items * x->heads;
        conv.length = span.n;
        conv.state = state;
        attn_heads_split(&span, call->threads, rows, raw);
        attn_conv1d_forward(&conv, call->threads, raw, out);
        keep_last(x, raw, conv.sequences, span.n, state);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
        for (int64_t i = 0; i < (most < y->length ? conv.sequences : 0); i++) {
            memcpy(y->out + ((b * x->heads + i) * y->length + at + first) * x->d, out + i * span.n * x->d, (size_t)(span.n * x->d) * sizeof *out);
        }
    }
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* Everything up to the heads' outputs, all tokens at once; short batch items go through the projections together. */
static attn_status layer_attend(attn_call *call, layer *x)
{
    int64_t together = attn_max_i64(1, ATTN_LINEAR_SPAN / attn_max_i64(1, x->m)), kept = x->heads * (x->taps - 1) * x->d;
    float *state;
    ATTN_TRY(attn_take_f32(call, together * kept, &state));
    for (int64_t b = 0; b < x->batch; b += together) {
        int64_t items = attn_min_i64(together, x->batch - b);
        for (int s = 0; s < 3; s++) {
            int64_t before = x->memory - x->s[s].first;
            memset(state, 0, (size_t)(items * kept) * sizeof *state);
            if (before > 0) {
                ATTN_TRY(run_stream(call, x, s, b, items, x->s[s].mem + b * before * x->width, 0, before, state));
            }
            ATTN_TRY(run_stream(call, x, s, b, items, attn_f32(call->t[X]) + b * x->n * x->width, before, x->n, state));
        }
    }
    return attn_rcmha_core_forward(call, &x->core);
}

/* The same token by token: rings of the last taps - 1 projections, caches of convolved keys and values. */
static attn_status layer_decode(attn_call *call, layer *x)
{
    int64_t size = x->heads * x->d, sequences = x->batch * x->heads, before = x->taps - 1;
    float *rows, *token, *now, *rings[3];
    ATTN_TRY(attn_take_f32(call, x->batch * x->width, &rows));
    ATTN_TRY(attn_take_f32(call, x->batch * size, &token));
    ATTN_TRY(attn_take_f32(call, x->batch * size, &now));
    for (int s = 0; s < 3; s++) {
        ATTN_TRY(attn_take_f32(call, sequences * before * x->d, &rings[s]));
        memset(rings[s], 0, (size_t)(sequences * before * x->d) * sizeof(float));
    }
    rcmha_core step = x->core;
    ATTN_TRY(attn_take_f32(call, x->batch * size, &step.o));
    for (int64_t t = 0; t < x->n; t++) {
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        for (int64_t b = 0; b < x->batch; b++) {
            memcpy(rows + b * x->width, attn_f32(call->t[X]) + (b * x->n + t) * x->width, (size_t)x->width * sizeof(float));
        }
        for (int s = 0; s < 3; s++) {
            attn_conv1d conv = x->s[s].conv;
            ATTN_TRY(attn_linear_forward(call->arena, call->threads, x->batch, x->width, size, rows, attn_f32(call->t[W + s]),
                                         attn_f32(call->t[B + s]), token));
            if (x->convolved) {
                conv.length = 1;
                conv.state = rings[s];
                attn_conv1d_forward(&conv, call->threads, token, now);
            }
            for (int64_t i = 0; i < sequences; i++) {
                float *ring = rings[s] + i * before * x->d;
                memcpy(x->s[s].out + (i * x->n + t) * x->d, (x->convolved ? now : token) + i * x->d, (size_t)x->d * sizeof(float));
                if (before > 0) {
                    memmove(ring, ring + x->d, (size_t)((before - 1) * x->d) * sizeof(float));
                    memcpy(ring + (before - 1) * x->d, token + i * x->d, (size_t)x->d * sizeof(float));
                }
            }
        }
        step.n = 1;
        step.m = t + 1;
        step.q = x->core.q + t * x->d;
        ATTN_TRY(attn_rcmha_core_forward(call, &step));
        for (int64_t i = 0; i < sequences; i++) {
            memcpy(x->core.o + (i * x->n + t) * x->d, step.o + i * x->d, (size_t)x->d * sizeof(float));
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
    ATTN_TRY(layer_prepare(call, &x, 0));
    ATTN_TRY(p->decode ? layer_decode(call, &x) : layer_attend(call, &x));
    attn_head_rows shape = head_rows(&x);
    return attn_heads_output(&shape, call->arena, call->threads, attn_dim(call, "Cout"), x.core.o, attn_f32(call->t[W_O]),
                             attn_f32(call->t[B_O]), attn_f32(call->t[Y]));
}

/* grad [B*H][length][D] of a convolved stream back to its tokens and parameters. */
static attn_status stream_back(attn_call *call, const layer *x, int s, float *grad)
{
    const stream *y = &x->s[s];
    int64_t size = x->heads * x->d, tokens = x->memory - y->first;
    float *raw, *rows, *part = NULL, *grad_mem = attn_f32(call->grad[MEM]);
    if (x->convolved) {
        ATTN_TRY(attn_take_f32(call, x->batch * y->length * size, &raw));
        ATTN_TRY(attn_rcmha_conv_back(call, &y->conv, y->raw, grad, raw, NULL, call->grad[CONV_W + s], call->grad[CONV_B + s]));
        grad = raw;
    }
    ATTN_TRY(attn_take_f32(call, x->batch * attn_max_i64(x->n, tokens) * size, &rows));
    if (tokens > 0 && grad_mem != NULL) {
        ATTN_TRY(attn_take_f32(call, x->batch * tokens * x->width, &part));
    }
    join(call, x, y->length, 0, tokens, grad, rows);
    const float *w = attn_f32(call->t[W + s]);
    float *grad_w = attn_f32(call->grad[W + s]), *grad_b = attn_f32(call->grad[B + s]);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, x->batch * tokens, x->width, size, y->mem, w, rows, part, grad_w, grad_b));
    for (int64_t b = 0; b < x->batch && part != NULL; b++) {
        attn_add_f32(call->threads, tokens * x->width, grad_mem + (b * x->memory + y->first) * x->width, part + b * tokens * x->width);
    }
    join(call, x, y->length, tokens, x->n, grad, rows);
    return attn_linear_backward_add(call->arena, call->threads, x->batch * x->n, x->width, size, attn_f32(call->t[X]), w, rows,
                                    attn_f32(call->grad[X]), grad_w, grad_b);
}

static attn_status rcmha_backward(attn_call *call)
{
    layer x;
    ATTN_TRY(layer_setup(call, &x));
    ATTN_TRY(layer_prepare(call, &x, 1));
    ATTN_TRY(layer_attend(call, &x));
    attn_head_rows shape = head_rows(&x);
    int64_t size = x.heads * x.d, rows = x.batch * x.n, queries = x.batch * x.s[0].length * size;
    float *joined, *back, *grad_o, *grad[3];
    ATTN_TRY(attn_take_f32(call, rows * size, &joined));
    ATTN_TRY(attn_take_f32(call, rows * size, &back));
    ATTN_TRY(attn_take_f32(call, rows * size, &grad_o));
    ATTN_TRY(attn_take_f32(call, queries, &grad[0]));
    ATTN_TRY(attn_take_f32(call, x.batch * x.m * size, &grad[1]));
    ATTN_TRY(attn_take_f32(call, x.batch * x.m * size, &grad[2]));
    memset(grad[0], 0, (size_t)queries * sizeof(float));
    attn_heads_join(&shape, call->threads, x.core.o, joined);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, size, attn_dim(call, "Cout"), joined, attn_f32(call->t[W_O]),
                                  attn_f32(call->grad[Y]), back, attn_f32(call->grad[W_O]), attn_f32(call->grad[B_O])));
    attn_heads_split(&shape, call->threads, back, grad_o);
    rcmha_core_gradients g = {grad_o, grad[0] + (x.s[0].length - x.n) * x.d, grad[1], grad[2], attn_f32(call->grad[REL_EMB]),
                              attn_f32(call->grad[REL_BIAS]), attn_f32(call->grad[Q_BIAS])};
    ATTN_TRY(attn_rcmha_core_backward(call, &x.core, &g));
    for (int s = 0; s < 3; s++) {
        ATTN_TRY(stream_back(call, &x, s, grad[s]));
    }
    return ATTN_OK;
}

static attn_status rcmha_cost(attn_call *call, attn_cost *cost)
{
    layer x;
    ATTN_TRY(layer_setup(call, &x));
    double size = (double)(x.heads * x.d), tokens = 0;
    for (int s = 0; s < 3; s++) {
        tokens += (double)(x.batch * x.s[s].length);
    }
    attn_rcmha_core_cost(&x.core, cost);
    cost->flops += 2 * size * tokens * (double)(x.width + (x.convolved ? x.taps : 0)) +
                   2 * (double)(x.batch * x.n) * size * (double)attn_dim(call, "Cout");
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
