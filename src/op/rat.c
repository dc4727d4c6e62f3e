/* RAT (arXiv:2507.04416): a gated linear recurrence inside chunks, softmax attention across them.
 *
 * A token sees the last recurrent key and value of every earlier chunk, a staircase of N/L keys, and the running pair of its own
 * chunk as one more key of its own. The recurrence is recomputed in the backward pass.
 */
#include "op/rat.h"

#include "layer/rope.h"

#include <string.h>

#define DIFF ATTN_PORT_DIFF

/* ---- The core ---- */

static int64_t source_head(const rat_core *x, int64_t h, int64_t shared)
{
    return x->tiled ? h % shared : h / (x->heads / shared);
}

/* One head's recurrence over n tokens, the first of which is token `steps` of the sequence; start may be NULL (zero). */
static void recur(const rat_core *x, const float *in, const float *g, const float *start, float *out)
{
    int64_t d = x->d;
    for (int64_t t = 0; t < x->n; t++) {
        int fresh = (x->steps + t) % x->chunk == 0;
        const float *before = fresh ? NULL : t > 0 ? out + (t - 1) * d : start;
        for (int64_t c = 0; c < d; c++) {
            float gate = g[t * d + c], now = (1 - gate) * in[t * d + c];
            out[t * d + c] = before != NULL ? gate * before[c] + now : now;
        }
    }
}

/* Room for the recurrence, rotated queries and chunk ends; `ends` counts all chunk ends, those given included. */
static attn_status core_memory(attn_call *call, rat_core *x)
{
    int64_t all = x->batch * x->heads, ends = (x->steps + x->n) / x->chunk;
    x->kr = attn_scratch_f32(call, all * (3 * x->n + 2 * ends) * x->d);
    x->lse = attn_scratch_f32(call, all * x->n);
    x->end = attn_arena_array(call->arena, (size_t)x->n, sizeof *x->end);
    x->list = attn_arena_array(call->arena, (size_t)all, sizeof *x->list);
    if (x->kr == NULL || x->lse == NULL || x->end == NULL || x->list == NULL) {
        return attn_fail_memory((size_t)(all * (3 * x->n + 2 * ends) * x->d) * sizeof(float));
    }
    x->ends = ends;
    x->vr = x->kr + all * x->n * x->d;
    x->qr = x->vr + all * x->n * x->d;
    x->k_end = x->qr + all * x->n * x->d;
    x->v_end = x->k_end + all * ends * x->d;
    return attn_rope_table(call->arena, 0, (x->steps + x->n) / x->chunk + 1, x->rotary_dim, x->base, &x->table);
}

attn_status rat_core_forward(attn_call *call, rat_core *x)
{
    int64_t all = x->batch * x->heads, d = x->d, given = x->steps / x->chunk;
    ATTN_TRY(core_memory(call, x));
    for (int64_t t = 0; t < x->n; t++) {
        x->end[t] = (x->steps + t) / x->chunk;
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t b = bh / x->heads, h = bh % x->heads, at = bh * x->n * d;
        const float *k = x->k + (b * x->k_heads + source_head(x, h, x->k_heads)) * x->n * d, *g = x->g + at;
        const float *q = x->q + (b * x->q_heads + source_head(x, h, x->q_heads)) * x->n * d;
        float *k_end = x->k_end + bh * x->ends * d, *v_end = x->v_end + bh * x->ends * d;
        recur(x, k, g, x->k_start != NULL ? x->k_start + bh * d : NULL, x->kr + at);
        recur(x, x->v + at, g, x->v_start != NULL ? x->v_start + bh * d : NULL, x->vr + at);
        for (int64_t c = 0; c < given; c++) {
            memcpy(k_end + c * d, x->k_given + (bh * given + c) * d, (size_t)d * sizeof(float));
            memcpy(v_end + c * d, x->v_given + (bh * given + c) * d, (size_t)d * sizeof(float));
        }
        for (int64_t c = given; c < x->ends; c++) {
            int64_t t = (c + 1) * x->chunk - 1 - x->steps;
            memcpy(k_end + c * d, x->kr + at + t * d, (size_t)d * sizeof(float));
            memcpy(v_end + c * d, x->vr + at + t * d, (size_t)d * sizeof(float));
            attn_rope_apply(x->table + c * x->rotary_dim, x->rotary_dim, 0, 0, k_end + c * d);
        }
        /* Queries are turned for the chunk ends, so the running key is turned with them: their product stays as it was. */
        float *qr = x->qr + at;
        memcpy(qr, q, (size_t)(x->n * d) * sizeof(float));
        for (int64_t t = 0; t < x->n; t++) {
            attn_rope_apply(x->table + x->end[t] * x->rotary_dim, x->rotary_dim, 0, 0, qr + t * d);
        }
        x->list[bh] = (attn_stairs_head){.rows = x->n, .kv = bh, .q = qr, .end = x->end, .k = k_end, .v = v_end, .own_k = x->kr + at,
                                         .own_v = x->vr + at, .o = x->o + at, .lse = x->lse + bh * x->n};
        if (x->k_last != NULL && x->n > 0) {
            memcpy(x->k_last + bh * d, x->kr + at + (x->n - 1) * d, (size_t)d * sizeof(float));
            memcpy(x->v_last + bh * d, x->vr + at + (x->n - 1) * d, (size_t)d * sizeof(float));
        }
        for (int64_t t = 0; t < x->n; t++) {
            attn_rope_apply(x->table + x->end[t] * x->rotary_dim, x->rotary_dim, 0, 0, x->kr + at + t * d);
        }
    }
    x->stairs = (attn_stairs){x->ends, d, d, all, all, x->scale, x->list};
    return attn_stairs_forward(&x->stairs, call->arena, call->threads);
}

/* From a = dLoss/d(recurrent value) without what later tokens pass back: the gradient of the input, and what the gate gets. */
static void recur_back(const rat_core *x, const float *in, const float *g, const float *out, float *a, float *grad_in, float *grad_g)
{
    int64_t d = x->d;
    for (int64_t t = x->n - 1; t >= 0; t--) {
        int first = t % x->chunk == 0;
        for (int64_t c = 0; c < d; c++) {
            float slope = a[t * d + c], before = first ? 0.0f : out[(t - 1) * d + c];
            grad_in[t * d + c] = (1 - g[t * d + c]) * slope;
            grad_g[t * d + c] += slope * (before - in[t * d + c]);
            if (!first) {
                a[(t - 1) * d + c] += g[t * d + c] * slope;
            }
        }
    }
}

attn_status rat_core_backward(attn_call *call, rat_core *x, const rat_gradients *grad)
{
    ATTN_TRY(rat_core_forward(call, x));
    int64_t all = x->batch * x->heads, d = x->d, size = x->n * d;
    float *dq = attn_scratch_f32(call, all * (5 * size + 2 * x->ends * d)), *dk = dq + all * size, *dv = dk + all * size;
    float *in = dv + all * size, *gate = in + all * size, *dk_end = gate + all * size, *dv_end = dk_end + all * x->ends * d;
    attn_stairs_gradient *gradients = attn_arena_array(call->arena, (size_t)all, sizeof *gradients);
    if (dq == NULL || gradients == NULL) {
        return attn_fail_memory((size_t)(all * 5 * size) * sizeof(float));
    }
    for (int64_t bh = 0; bh < all; bh++) {
        gradients[bh] = (attn_stairs_gradient){.grad_o = grad->o + bh * size, .q = dq + bh * size, .own_k = dk + bh * size,
                                               .own_v = dv + bh * size};
    }
    ATTN_TRY(attn_stairs_backward(&x->stairs, gradients, dk_end, dv_end, call->arena, call->threads));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t at = bh * size;
        for (int64_t c = 0; c < x->ends; c++) {
            int64_t t = (c + 1) * x->chunk - 1;
            for (int64_t i = 0; i < d; i++) {
                dk[at + t * d + i] += dk_end[(bh * x->ends + c) * d + i];
                dv[at + t * d + i] += dv_end[(bh * x->ends + c) * d + i];
            }
        }
        for (int64_t t = 0; t < x->n; t++) {
            const float *turn = x->table + x->end[t] * x->rotary_dim;
            attn_rope_apply(turn, x->rotary_dim, 0, 1, dk + at + t * d);
            attn_rope_apply(turn, x->rotary_dim, 0, 1, dq + at + t * d);
            attn_rope_apply(turn, x->rotary_dim, 0, 1, x->kr + at + t * d); /* back to the recurrent key */
        }
        const float *k = x->k + (bh / x->heads * x->k_heads + source_head(x, bh % x->heads, x->k_heads)) * size;
        memset(gate + at, 0, (size_t)size * sizeof(float));
        recur_back(x, k, x->g + at, x->kr + at, dk + at, in + at, gate + at);
        memcpy(dk + at, in + at, (size_t)size * sizeof(float));
        recur_back(x, x->v + at, x->g + at, x->vr + at, dv + at, in + at, gate + at);
        if (grad->v != NULL) {
            memcpy(grad->v + at, in + at, (size_t)size * sizeof(float));
        }
        if (grad->g != NULL) {
            memcpy(grad->g + at, gate + at, (size_t)size * sizeof(float));
        }
    }
    /* Heads that share a query or key head add up, in order. */
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t b = bh / x->heads, h = bh % x->heads;
        float *to_q = grad->q != NULL ? grad->q + (b * x->q_heads + source_head(x, h, x->q_heads)) * size : NULL;
        float *to_k = grad->k != NULL ? grad->k + (b * x->k_heads + source_head(x, h, x->k_heads)) * size : NULL;
        for (int64_t i = 0; i < size; i++) {
            if (to_q != NULL) {
                to_q[i] += dq[bh * size + i];
            }
            if (to_k != NULL) {
                to_k[i] += dk[bh * size + i];
            }
        }
    }
    return ATTN_OK;
}

/* ---- rat and rat.decode ---- */

typedef struct rat_params {
    int64_t chunk, rotary_dim, head_map, steps;
    double scale, rotary_base;
} rat_params;

#define RAT_ENTRIES                                                                                                                    \
    ATTN_P_INT("chunk", rat_params, chunk, "16", 1, INFINITY, "tokens of a chunk: 1 is attention, N or more is a recurrence"),         \
    ATTN_P_SCALE_POSITIVE(rat_params, scale),                                                                                          \
    {.name = "rotary_dim", .type = ATTN_PARAM_INT, .standard = "null", .standard_text = "D", .min = 0, .max = INFINITY,                \
     .help = "channels turned by the number of the chunk, even; 0: no positions", .offset = offsetof(rat_params, rotary_dim)},         \
    ATTN_P_FLOAT_OPEN("rotary_base", rat_params, rotary_base, "10000", 0, 1, INFINITY, 0, "base of the rotary angles"),                \
    ATTN_P_CHOICE("head_map", rat_params, head_map, "contiguous", "contiguous|tiled",                                                  \
                  "head h reads query and key head h / (H/Hq) or h mod Hq")

static const attn_param_info rat_param_table[] = {RAT_ENTRIES};
static const attn_param_info decode_param_table[] = {
    RAT_ENTRIES,
    ATTN_P_INT("steps", rat_params, steps, "0", 0, INFINITY, "tokens that the state already holds"),
};

enum { Q, K, V, G, O, K_END, V_END, K_LAST, V_LAST };
enum { D_K_END = 4, D_V_END, D_K_LAST, D_V_LAST, D_O, D_OUT };

#define RAT_INPUTS(flags)                                                          \
    ATTN_IN("q", "B,Hq,N,D", FLOAT, flags, "queries, not rotated; Hq divides H"),  \
    ATTN_IN("k", "B,Hk,N,D", FLOAT, flags, "raw keys; Hk divides H"),              \
    ATTN_IN("v", "B,H,N,D", FLOAT, flags, "raw values"),                           \
    ATTN_IN("g", "B,H,N,D", FLOAT, flags, "forget gate in [0, 1]")
#define RAT_STATE                                                                                                                  \
    ATTN_OUT("k_end", "B,H,Nc,D", FLOAT, ATTN_PORT_OPTIONAL, "last recurrent key of each complete chunk, rotated"),                \
    ATTN_OUT("v_end", "B,H,Nc,D", FLOAT, ATTN_PORT_OPTIONAL, "last recurrent value of each complete chunk"),                       \
    ATTN_OUT("k_last", "B,H,D", FLOAT, 0, "recurrent key after the last token, not rotated"),                                      \
    ATTN_OUT("v_last", "B,H,D", FLOAT, 0, "recurrent value after the last token")

static const attn_port_info rat_ports[] = {
    RAT_INPUTS(DIFF),
    ATTN_OUT("o", "B,H,N,D", FLOAT, DIFF, "the output"),
    RAT_STATE,
};

static const attn_port_info decode_ports[] = {
    RAT_INPUTS(0),
    ATTN_IN("k_end", "B,H,*,D", FLOAT, ATTN_PORT_OPTIONAL, "state: chunk ends so far, floor(steps / chunk) of them"),
    ATTN_IN("v_end", "B,H,*,D", FLOAT, ATTN_PORT_OPTIONAL, "state: their values"),
    ATTN_IN("k_last", "B,H,D", FLOAT, ATTN_PORT_OPTIONAL, "state: running key"),
    ATTN_IN("v_last", "B,H,D", FLOAT, ATTN_PORT_OPTIONAL, "state: running value"),
    ATTN_OUT("o", "B,H,N,D", FLOAT, 0, "the output"),
    RAT_STATE,
};

static attn_status check_rotary(int64_t *rotary_dim, int64_t d)
{
    int64_t dim = *rotary_dim == ATTN_UNSET ? d : *rotary_dim;
    if (dim % 2 != 0 || dim > d) {
        return attn_fail(ATTN_ERR_ARGUMENT, "rotary_dim = %lld, expected an even number in 0 ... D = %lld", (long long)dim, (long long)d);
    }
    *rotary_dim = dim;
    return ATTN_OK;
}

static attn_status rat_setup(const attn_call *call, rat_core *x)
{
    const rat_params *p = call->params;
    *x = (rat_core){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .q_heads = attn_dim(call, "Hq"),
                    .k_heads = attn_dim(call, "Hk"), .n = attn_dim(call, "N"), .d = attn_dim(call, "D"), .chunk = p->chunk,
                    .rotary_dim = p->rotary_dim, .steps = p->steps, .tiled = p->head_map == 1, .base = p->rotary_base,
                    .q = attn_f32(call->t[Q]), .k = attn_f32(call->t[K]), .v = attn_f32(call->t[V]), .g = attn_f32(call->t[G])};
    x->scale = attn_default_scale(p->scale, x->d);
    if (x->q_heads < 1 || x->k_heads < 1 || x->heads % x->q_heads != 0 || x->heads % x->k_heads != 0) {
        return attn_fail(ATTN_ERR_SHAPE, "q has %lld heads and k has %lld, expected divisors of H = %lld", (long long)x->q_heads,
                         (long long)x->k_heads, (long long)x->heads);
    }
    return check_rotary(&x->rotary_dim, x->d);
}

static void bind_state(attn_call *call, const rat_core *x, int k_end, int v_end)
{
    int64_t ends = (x->steps + x->n) / x->chunk;
    attn_set_dim(call, "Nc", ends);
    if (ends == 0) {
        attn_drop_output(call, k_end);
        attn_drop_output(call, v_end);
    }
}

static attn_status rat_bind(attn_call *call)
{
    rat_core x;
    ATTN_TRY(rat_setup(call, &x));
    bind_state(call, &x, K_END, V_END);
    return ATTN_OK;
}

static void return_ends(attn_call *call, const rat_core *x, int k_end, int v_end)
{
    size_t bytes = (size_t)(x->batch * x->heads * x->ends * x->d) * sizeof(float);
    if (x->ends > 0) {
        memcpy(call->t[k_end]->data, x->k_end, bytes);
        memcpy(call->t[v_end]->data, x->v_end, bytes);
    }
}

/* A state of no token at all. */
static void clear_last(const rat_core *x)
{
    if (x->n == 0) {
        memset(x->k_last, 0, (size_t)(x->batch * x->heads * x->d) * sizeof(float));
        memset(x->v_last, 0, (size_t)(x->batch * x->heads * x->d) * sizeof(float));
    }
}

static attn_status rat_forward(attn_call *call)
{
    rat_core x;
    ATTN_TRY(rat_setup(call, &x));
    x.o = attn_f32(call->t[O]);
    x.k_last = attn_f32(call->t[K_LAST]);
    x.v_last = attn_f32(call->t[V_LAST]);
    clear_last(&x);
    ATTN_TRY(rat_core_forward(call, &x));
    return_ends(call, &x, K_END, V_END);
    return ATTN_OK;
}

static attn_status rat_backward(attn_call *call)
{
    rat_core x;
    ATTN_TRY(rat_setup(call, &x));
    x.o = attn_scratch_f32(call, x.batch * x.heads * x.n * x.d);
    if (x.o == NULL) {
        return attn_fail_memory((size_t)(x.batch * x.heads * x.n * x.d) * sizeof(float));
    }
    rat_gradients g = {attn_f32(call->grad[O]), attn_f32(call->grad[Q]), attn_f32(call->grad[K]), attn_f32(call->grad[V]),
                       attn_f32(call->grad[G])};
    return rat_core_backward(call, &x, &g);
}

static attn_status rat_cost(attn_call *call, attn_cost *cost)
{
    rat_core x;
    ATTN_TRY(rat_setup(call, &x));
    double pairs = 0;
    for (int64_t t = 0; t < x.n; t++) {
        pairs += (double)((x.steps + t) / x.chunk + 1);
    }
    cost->pairs = pairs * (double)(x.batch * x.heads);
    cost->flops = cost->pairs * 4 * (double)x.d + 6 * (double)(x.batch * x.heads * x.n * x.d);
    return ATTN_OK;
}

const attn_op_class attn_op_rat = {
    .info = {.name = "rat",
             .title = "Recurrence inside chunks, softmax attention across them",
             .summary = "Keys and values run through a gated recurrence that restarts every chunk; queries attend to the last pair of each "
                        "earlier chunk and to the running pair of their own. chunk = 1 is gated attention, chunk >= N a recurrent network, 16 "
                        "keeps the accuracy of attention at a sixteenth of its scores and cache. Always causal.",
             .paper = "arXiv:2507.04416",
             .differentiable = 1,
             ATTN_TABLE(rat_param_table, rat_ports)},
    .params_size = sizeof(rat_params),
    .bind = rat_bind,
    .forward = rat_forward,
    .backward = rat_backward,
    .cost = rat_cost,
};

static attn_status decode_bind(attn_call *call)
{
    rat_core x;
    ATTN_TRY(rat_setup(call, &x));
    int64_t given = x.steps / x.chunk;
    for (int port = D_K_END; port <= D_V_END; port++) {
        int64_t have = call->t[port] != NULL ? call->t[port]->shape[2] : 0;
        if (have != given) {
            return attn_fail(ATTN_ERR_SHAPE, "%s holds %lld chunk ends, expected floor(steps / chunk) = %lld", decode_ports[port].name,
                             (long long)have, (long long)given);
        }
    }
    if (x.steps % x.chunk != 0 && (call->t[D_K_LAST] == NULL || call->t[D_V_LAST] == NULL)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "k_last and v_last are needed: steps = %lld lies within a chunk", (long long)x.steps);
    }
    bind_state(call, &x, D_OUT, D_OUT + 1);
    return ATTN_OK;
}

static attn_status decode_forward(attn_call *call)
{
    rat_core x;
    ATTN_TRY(rat_setup(call, &x));
    x.o = attn_f32(call->t[D_O]);
    x.k_given = attn_f32(call->t[D_K_END]);
    x.v_given = attn_f32(call->t[D_V_END]);
    x.k_start = attn_f32(call->t[D_K_LAST]);
    x.v_start = attn_f32(call->t[D_V_LAST]);
    x.k_last = attn_f32(call->t[D_OUT + 2]);
    x.v_last = attn_f32(call->t[D_OUT + 3]);
    clear_last(&x);
    if (x.n == 0 && x.k_start != NULL && x.v_start != NULL) {
        memcpy(x.k_last, x.k_start, (size_t)(x.batch * x.heads * x.d) * sizeof(float));
        memcpy(x.v_last, x.v_start, (size_t)(x.batch * x.heads * x.d) * sizeof(float));
    }
    ATTN_TRY(rat_core_forward(call, &x));
    return_ends(call, &x, D_OUT, D_OUT + 1);
    return ATTN_OK;
}

const attn_op_class attn_op_rat_decode = {
    .info = {.name = "rat.decode",
             .title = "RAT for new tokens, with state",
             .summary = "Continues rat from its state: the ends of complete chunks and the running key and value. A token reads 1/chunk of the "
                        "cache that attention would.",
             .paper = "arXiv:2507.04416",
             ATTN_TABLE(decode_param_table, decode_ports)},
    .params_size = sizeof(rat_params),
    .bind = decode_bind,
    .forward = decode_forward,
    .cost = rat_cost,
};

/* ---- rat.scan ---- */

typedef struct scan_params {
    int64_t chunk;
} scan_params;

static const attn_param_info scan_param_table[] = {
    ATTN_P_INT("chunk", scan_params, chunk, "0", 0, INFINITY, "the state restarts every chunk tokens; 0: never"),
};

enum { S_X, S_G, S_STATE, S_O };

static const attn_port_info scan_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "the sequence"),
    ATTN_IN("g", "B,N,C", FLOAT, DIFF, "forget gate"),
    ATTN_IN("state", "B,C", FLOAT, DIFF | ATTN_PORT_OPTIONAL, "value before the first token (0 when absent; unused with restarts)"),
    ATTN_OUT("o", "B,N,C", FLOAT, DIFF, "g o[t-1] + (1 - g) x"),
};

static attn_status scan_forward(attn_call *call)
{
    const scan_params *p = call->params;
    int64_t n = attn_dim(call, "N"), width = attn_dim(call, "C");
    const float *state = p->chunk == 0 ? attn_f32(call->t[S_STATE]) : NULL;
#pragma omp parallel for num_threads(call->threads) if (call->threads > 1)
    for (int64_t b = 0; b < attn_dim(call, "B"); b++) {
        for (int64_t t = 0; t < n; t++) {
            int64_t at = (b * n + t) * width;
            const float *x = attn_f32(call->t[S_X]) + at, *g = attn_f32(call->t[S_G]) + at;
            float *o = attn_f32(call->t[S_O]) + at;
            int fresh = p->chunk > 0 ? t % p->chunk == 0 : t == 0;
            const float *before = !fresh ? o - width : state != NULL ? state + b * width : NULL;
            for (int64_t c = 0; c < width; c++) {
                o[c] = (before != NULL ? g[c] * before[c] : 0.0f) + (1 - g[c]) * x[c];
            }
        }
    }
    return ATTN_OK;
}

static attn_status scan_backward(attn_call *call)
{
    const scan_params *p = call->params;
    int64_t n = attn_dim(call, "N"), width = attn_dim(call, "C"), batch = attn_dim(call, "B");
    const float *state = p->chunk == 0 ? attn_f32(call->t[S_STATE]) : NULL;
    float *grad_x = attn_f32(call->grad[S_X]), *grad_g = attn_f32(call->grad[S_G]), *grad_state = attn_f32(call->grad[S_STATE]);
    float *sums = attn_scratch_f32(call, batch * width);
    if (sums == NULL) {
        return attn_fail_memory((size_t)(batch * width) * sizeof(float));
    }
    memset(sums, 0, (size_t)(batch * width) * sizeof(float));
#pragma omp parallel for num_threads(call->threads) if (call->threads > 1)
    for (int64_t b = 0; b < batch; b++) {
        float *a = sums + b * width;
        for (int64_t t = n - 1; t >= 0; t--) {
            int64_t at = (b * n + t) * width;
            int fresh = p->chunk > 0 ? t % p->chunk == 0 : t == 0;
            for (int64_t c = 0; c < width; c++) {
                float g = attn_f32(call->t[S_G])[at + c], x = attn_f32(call->t[S_X])[at + c];
                float before = !fresh ? attn_f32(call->t[S_O])[at - width + c] : state != NULL ? state[b * width + c] : 0.0f;
                a[c] += attn_f32(call->grad[S_O])[at + c];
                if (grad_x != NULL) {
                    grad_x[at + c] = (1 - g) * a[c];
                }
                if (grad_g != NULL) {
                    grad_g[at + c] = a[c] * (before - x);
                }
                if (t == 0 && state != NULL && grad_state != NULL) {
                    grad_state[b * width + c] = g * a[c];
                }
                a[c] = fresh ? 0.0f : g * a[c];
            }
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_rat_scan = {
    .info = {.name = "rat.scan",
             .title = "Gated linear recurrence along a sequence",
             .summary = "An exponential moving average with a gate per token and channel, which may restart at every chunk: the recurrence of "
                        "rat, and the recurrent network it is compared with. Linear in the length.",
             .paper = "arXiv:2507.04416",
             .differentiable = 1,
             ATTN_TABLE(scan_param_table, scan_ports)},
    .params_size = sizeof(scan_params),
    .forward = scan_forward,
    .backward = scan_backward,
};
