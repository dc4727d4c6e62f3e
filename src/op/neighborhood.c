/* Neighborhood attention (FNA, arXiv:2403.04690; GNA, arXiv:2504.16922): every token of a 1-D, 2-D or 3-D grid attends to a window of nearby
 * tokens, with size, stride, dilation and causality per axis. exec/grid.h computes it from the range of each axis position; this file
 * makes those ranges. The pattern, its tile order and the analytical model are in neighborhood_tools.c.
 */
#include "op/neighborhood.h"

#include "exec/grid.h"

#include <string.h>

/* ---- Windows ---- */

int64_t attn_na_members(int64_t n, int64_t dilation, int64_t group) { return n / dilation + (group < n % dilation ? 1 : 0); }

/* The window of member p of a group of `length`. */
static void window_of(const attn_na_axis *a, int64_t p, int64_t length, int64_t *start, int64_t *end)
{
    int64_t first = p / a->stride * a->stride;
    if (a->causal) {
        int64_t leader = attn_min_i64(first + a->stride - 1, length - 1);
        *start = attn_max_i64(leader - a->kernel + 1, 0);
        *end = p + 1;
    } else {
        int64_t leader = attn_min_i64(first + a->stride / 2, length - 1);
        *start = attn_min_i64(attn_max_i64(leader - a->kernel / 2, 0), length - a->kernel);
        *end = *start + a->kernel;
    }
}

static int64_t item_of(const attn_ints *list, int axis) { return list->items[list->count > 1 ? axis : 0]; }

attn_status attn_na_setup(const attn_na_params *p, int64_t tokens, attn_na *na)
{
    static const char *const names[] = {"kernel", "stride", "dilation", "causal"};
    const attn_ints *lists[] = {&p->kernel, &p->stride, &p->dilation, &p->causal};
    *na = (attn_na){.rank = p->grid.count, .tokens = 1};
    for (int i = 0; i < 4; i++) {
        if (lists[i]->count > 1 && lists[i]->count != na->rank) {
            return attn_fail(ATTN_ERR_ARGUMENT, "%s has %d items, expected one, or %d as grid", names[i], lists[i]->count, na->rank);
        }
    }
    for (int axis = 0; axis < na->rank; axis++) {
        attn_na_axis *a = &na->axis[axis];
        *a = (attn_na_axis){.n = p->grid.items[axis], .kernel = item_of(&p->kernel, axis), .stride = item_of(&p->stride, axis),
                            .dilation = item_of(&p->dilation, axis), .causal = item_of(&p->causal, axis) != 0};
        if (a->kernel > a->n / a->dilation) {
            return attn_fail(ATTN_ERR_ARGUMENT, "kernel = %lld times dilation = %lld exceeds the grid's %lld positions on axis %d",
                             (long long)a->kernel, (long long)a->dilation, (long long)a->n, axis);
        }
        if (a->stride > a->kernel) {
            return attn_fail(ATTN_ERR_ARGUMENT, "stride = %lld, expected at most kernel = %lld on axis %d", (long long)a->stride,
                             (long long)a->kernel, axis);
        }
        if (a->n > INT64_MAX / 4096 / na->tokens) {
            return attn_fail(ATTN_ERR_ARGUMENT, "grid has too many tokens");
        }
        na->tokens *= a->n;
    }
    if (tokens >= 0 && na->tokens != tokens) {
        return attn_fail(ATTN_ERR_SHAPE, "grid holds %lld tokens, the tensors have %lld", (long long)na->tokens, (long long)tokens);
    }
    return ATTN_OK;
}

attn_status attn_na_windows(attn_na *na, attn_arena *arena)
{
    for (int axis = 0; axis < na->rank; axis++) {
        attn_na_axis *a = &na->axis[axis];
        a->start = attn_arena_array(arena, (size_t)a->n, 2 * sizeof *a->start);
        if (a->start == NULL) {
            return attn_fail_memory((size_t)a->n * 2 * sizeof *a->start);
        }
        a->end = a->start + a->n;
        for (int64_t x = 0; x < a->n; x++) {
            window_of(a, x / a->dilation, attn_na_members(a->n, a->dilation, x % a->dilation), &a->start[x], &a->end[x]);
        }
    }
    return ATTN_OK;
}

/* ---- neighborhood ---- */

static const attn_param_info fused_param_table[] = {
    ATTN_NA_PATTERN_PARAMS,
    ATTN_P_SCALE(attn_na_params, scale),
    ATTN_P_BOOL("decode", attn_na_params, decode, "false",
                "compute slice after slice along axis 0 with a ring of keys and values; needs causality and stride 1 there"),
};

enum { Q, K, V, RPB, EXTRA_K, EXTRA_V, O, LSE };

#define PORT_Q ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries, the grid row by row")
#define PORT_K ATTN_IN("k", "B,Hkv,N,D", FLOAT, ATTN_PORT_DIFF, "keys on the same grid")
#define PORT_V ATTN_IN("v", "B,Hkv,N,Dv", FLOAT, ATTN_PORT_DIFF, "values")
#define PORT_RPB                                                                                                       \
    ATTN_IN("rpb", "...,R", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "[H, 2*kernel-1 per axis]: bias by the offset of the key from the query")

static const attn_port_info fused_ports[] = {
    PORT_Q, PORT_K, PORT_V, PORT_RPB,
    ATTN_IN("extra_k", "B,Hkv,L,D", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "keys of more tokens, which every query sees"),
    ATTN_IN("extra_v", "B,Hkv,L,Dv", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "their values"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("lse", "B,H,N", FLOAT, ATTN_PORT_F32, "log-sum-exp of all visible scores"),
};

static attn_status check_rpb(const attn_tensor *rpb, const attn_na *na, int64_t heads)
{
    int right = rpb == NULL || (rpb->ndim == na->rank + 1 && rpb->shape[0] == heads);
    for (int axis = 0; axis < na->rank && right && rpb != NULL; axis++) {
        right = rpb->shape[axis + 1] == 2 * na->axis[axis].kernel - 1;
    }
    return right ? ATTN_OK
                 : attn_fail(ATTN_ERR_SHAPE, "rpb does not fit, expected %lld heads and 2 * kernel - 1 on each of %d axes", (long long)heads,
                             na->rank);
}

static attn_status check_widths(const attn_call *call)
{
    const char *empty = attn_dim(call, "D") == 0 ? "D" : attn_dim(call, "Dv") == 0 ? "Dv" : NULL;
    return empty == NULL ? ATTN_OK : attn_fail(ATTN_ERR_SHAPE, "%s = 0, expected at least 1", empty);
}

static attn_status fused_setup(attn_call *call, attn_na *na)
{
    const attn_na_params *p = call->params;
    ATTN_TRY(check_widths(call));
    ATTN_TRY(attn_na_setup(p, attn_dim(call, "N"), na));
    if ((call->t[EXTRA_K] == NULL) != (call->t[EXTRA_V] == NULL)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s is missing: extra_k and extra_v go together", call->t[EXTRA_K] == NULL ? "extra_k" : "extra_v");
    }
    if (p->decode && (!na->axis[0].causal || na->axis[0].stride > 1)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "decode needs causal = true and stride = 1 on axis 0, they are %s and %lld",
                         na->axis[0].causal ? "true" : "false", (long long)na->axis[0].stride);
    }
    return check_rpb(call->t[RPB], na, attn_dim(call, "H"));
}

static attn_status fused_bind(attn_call *call)
{
    attn_na na;
    return fused_setup(call, &na);
}

/* The executor's problem, after attn_na_windows(). */
static attn_grid grid_of(const attn_call *call, const attn_na *na)
{
    attn_grid g = {.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"), .d = attn_dim(call, "D"),
                   .dv = attn_dim(call, "Dv"), .rank = na->rank};
    for (int axis = 0; axis < na->rank; axis++) {
        const attn_na_axis *a = &na->axis[axis];
        g.axis[axis] = (attn_grid_axis){.n = a->n, .m = a->n, .dilation = a->dilation, .reach = a->kernel, .start = a->start, .end = a->end};
    }
    return g;
}

static attn_status fused_grid(attn_call *call, attn_na *na, attn_grid *g)
{
    const attn_na_params *p = call->params;
    ATTN_TRY(fused_setup(call, na));
    ATTN_TRY(attn_na_windows(na, call->arena));
    *g = grid_of(call, na);
    g->scale = attn_default_scale(p->scale, g->d);
    g->q = attn_f32(call->t[Q]);
    g->k = attn_f32(call->t[K]);
    g->v = attn_f32(call->t[V]);
    g->bias = attn_f32(call->t[RPB]);
    g->extra_k = attn_f32(call->t[EXTRA_K]);
    g->extra_v = attn_f32(call->t[EXTRA_V]);
    g->extra = call->t[EXTRA_K] != NULL ? attn_dim(call, "L") : 0;
    return ATTN_OK;
}

/* ---- Step by step along axis 0 ---- */

typedef struct ring {
    int64_t slices, inner; /* that it holds, tokens of one */
    float *k, *v;          /* [heads][slices][inner][width] */
    float *k_seen, *v_seen; /* [heads][seen][inner][width]: what a step reads, in order */
    float *q, *o, *lse;    /* of one slice */
} ring;

static attn_status ring_create(attn_call *call, const attn_grid *g, const attn_na *na, ring *r)
{
    const attn_na_axis *a = &na->axis[0];
    int64_t kv = g->batch * g->kv_heads, heads = g->batch * g->heads;
    *r = (ring){.slices = (a->kernel - 1) * a->dilation + 1, .inner = na->tokens / a->n};
    r->k = attn_scratch_f32(call, kv * r->slices * r->inner * g->d);
    r->v = attn_scratch_f32(call, kv * r->slices * r->inner * g->dv);
    r->k_seen = attn_scratch_f32(call, kv * a->kernel * r->inner * g->d);
    r->v_seen = attn_scratch_f32(call, kv * a->kernel * r->inner * g->dv);
    r->q = attn_scratch_f32(call, heads * r->inner * g->d);
    r->o = attn_scratch_f32(call, heads * r->inner * g->dv);
    r->lse = attn_scratch_f32(call, heads * r->inner);
    return r->k != NULL && r->v != NULL && r->k_seen != NULL && r->v_seen != NULL && r->q != NULL && r->o != NULL && r->lse != NULL
               ? ATTN_OK
               : attn_fail_memory((size_t)(kv * r->slices * r->inner * (g->d + g->dv)) * sizeof(float));
}

/* Slices of all heads between [heads][count_a] and [heads][count_b] of `size` floats each. */
static void copy_slices(int64_t heads, int64_t size, float *to, int64_t to_count, int64_t to_at, const float *from, int64_t from_count,
                        int64_t from_at)
{
    for (int64_t h = 0; h < heads; h++) {
        memcpy(to + (h * to_count + to_at) * size, from + (h * from_count + from_at) * size, (size_t)size * sizeof *to);
    }
}

static attn_status decode_slice(attn_call *call, const attn_grid *g, const attn_na *na, ring *r, int64_t t)
{
    const attn_na_axis *a = &na->axis[0];
    int64_t kv = g->batch * g->kv_heads, heads = g->batch * g->heads, seen = attn_min_i64(a->kernel, t / a->dilation + 1);
    int64_t start = 0, end = seen;
    attn_grid step = *g;
    step.axis[0] = (attn_grid_axis){.n = 1, .m = seen, .first = seen - 1, .dilation = 1, .reach = a->kernel, .start = &start, .end = &end};
    copy_slices(kv, r->inner * g->d, r->k, r->slices, t % r->slices, g->k, a->n, t);
    copy_slices(kv, r->inner * g->dv, r->v, r->slices, t % r->slices, g->v, a->n, t);
    for (int64_t i = 0; i < seen; i++) {
        int64_t from = (t - (seen - 1 - i) * a->dilation) % r->slices;
        copy_slices(kv, r->inner * g->d, r->k_seen, seen, i, r->k, r->slices, from);
        copy_slices(kv, r->inner * g->dv, r->v_seen, seen, i, r->v, r->slices, from);
    }
    copy_slices(heads, r->inner * g->d, r->q, 1, 0, g->q, a->n, t);
    step.q = r->q;
    step.k = r->k_seen;
    step.v = r->v_seen;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    attn_status status = attn_grid_forward(&step, call->arena, call->threads, r->o, r->lse);
    attn_arena_release(call->arena, mark);
    copy_slices(heads, r->inner * g->dv, attn_f32(call->t[O]), a->n, t, r->o, 1, 0);
    copy_slices(heads, r->inner, attn_f32(call->t[LSE]), a->n, t, r->lse, 1, 0);
    return status;
}

static attn_status fused_forward(attn_call *call)
{
    const attn_na_params *p = call->params;
    attn_na na;
    attn_grid g;
    ring r;
    ATTN_TRY(fused_grid(call, &na, &g));
    if (!p->decode) {
        return attn_grid_forward(&g, call->arena, call->threads, attn_f32(call->t[O]), attn_wanted_f32(call, LSE));
    }
    ATTN_TRY(ring_create(call, &g, &na, &r));
    for (int64_t t = 0; t < na.axis[0].n; t++) {
        ATTN_TRY(decode_slice(call, &g, &na, &r, t));
    }
    return ATTN_OK;
}

static attn_status fused_backward(attn_call *call)
{
    attn_na na;
    attn_grid g;
    ATTN_TRY(fused_grid(call, &na, &g));
    attn_grid_gradients to = {attn_f32(call->grad[Q]), attn_f32(call->grad[K]), attn_f32(call->grad[V]), attn_f32(call->grad[RPB]),
                              attn_f32(call->grad[EXTRA_K]), attn_f32(call->grad[EXTRA_V])};
    return attn_grid_backward(&g, call->arena, call->threads, attn_f32(call->t[O]), attn_f32(call->t[LSE]), attn_f32(call->grad[O]), &to);
}

static attn_status fused_cost(attn_call *call, attn_cost *cost)
{
    attn_na na;
    ATTN_TRY(fused_setup(call, &na));
    ATTN_TRY(attn_na_windows(&na, call->arena));
    int64_t extra = call->t[EXTRA_K] != NULL ? attn_dim(call, "L") : 0;
    cost->pairs = (double)(attn_dim(call, "B") * attn_dim(call, "H")) * (attn_na_pairs(&na) + (double)na.tokens * (double)extra);
    cost->flops = 2 * cost->pairs * (double)(attn_dim(call, "D") + attn_dim(call, "Dv"));
    return ATTN_OK;
}

double attn_na_pairs(const attn_na *na)
{
    double pairs = 1;
    for (int axis = 0; axis < na->rank; axis++) {
        double sum = 0;
        for (int64_t x = 0; x < na->axis[axis].n; x++) {
            sum += (double)(na->axis[axis].end[x] - na->axis[axis].start[x]);
        }
        pairs *= sum;
    }
    return pairs;
}

const attn_op_class attn_op_neighborhood = {
    .info = {.name = "neighborhood",
             .title = "Neighborhood attention on 1-D, 2-D and 3-D grids",
             .summary = "Every token attends to a window of nearby tokens of its grid, with size, stride, dilation and causality per axis: from "
                        "sliding windows (stride 1) over shared windows to blocks (stride = kernel). Windows are shifted at borders, or "
                        "cut where causal. More tokens that all see (text, registers) and a relative bias are options. Costs 2 * "
                        "window * (D + Dv) operations per token and head.",
             .paper = ATTN_NA_PAPER,
             .differentiable = 1,
             ATTN_TABLE(fused_param_table, fused_ports)},
    .params_size = sizeof(attn_na_params),
    .bind = fused_bind,
    .forward = fused_forward,
    .backward = fused_backward,
    .cost = fused_cost,
};

/* ---- neighborhood.qk and neighborhood.av ---- */

static const attn_param_info qk_param_table[] = {ATTN_NA_PATTERN_PARAMS, ATTN_P_SCALE(attn_na_params, scale)};
static const attn_param_info av_param_table[] = {ATTN_NA_PATTERN_PARAMS};

enum { QK_Q, QK_K, QK_RPB, QK_SCORES };
enum { AV_W, AV_V, AV_O };

static const attn_port_info qk_ports[] = {PORT_Q, PORT_K, PORT_RPB,
                                          ATTN_OUT("scores", "B,H,N,slots", FLOAT, ATTN_PORT_DIFF, "scores of each query's window, row by row")};
static const attn_port_info av_ports[] = {ATTN_IN("w", "B,H,N,K", FLOAT, ATTN_PORT_DIFF, "weights of each query's window, row by row"), PORT_V,
                                          ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "sums of the windows' values")};

static attn_status unfused_setup(attn_call *call, attn_na *na, int64_t *slots)
{
    ATTN_TRY(check_widths(call));
    ATTN_TRY(attn_na_setup(call->params, attn_dim(call, "N"), na));
    *slots = 1;
    for (int axis = 0; axis < na->rank; axis++) {
        if (na->axis[axis].causal) {
            return attn_fail(ATTN_ERR_ARGUMENT, "causal = true on axis %d: windows of varying size have no slots, use neighborhood", axis);
        }
        *slots *= na->axis[axis].kernel;
    }
    return ATTN_OK;
}

static attn_status qk_bind(attn_call *call)
{
    attn_na na;
    int64_t slots;
    ATTN_TRY(unfused_setup(call, &na, &slots));
    attn_set_dim(call, "slots", slots);
    return check_rpb(call->t[QK_RPB], &na, attn_dim(call, "H"));
}

static attn_status qk_grid(attn_call *call, attn_na *na, attn_grid *g, int64_t *slots)
{
    const attn_na_params *p = call->params;
    ATTN_TRY(unfused_setup(call, na, slots));
    ATTN_TRY(attn_na_windows(na, call->arena));
    *g = grid_of(call, na);
    g->dv = 1;
    g->scale = attn_default_scale(p->scale, g->d);
    g->q = attn_f32(call->t[QK_Q]);
    g->k = attn_f32(call->t[QK_K]);
    g->bias = attn_f32(call->t[QK_RPB]);
    return ATTN_OK;
}

static attn_status qk_forward(attn_call *call)
{
    attn_na na;
    attn_grid g;
    int64_t slots;
    ATTN_TRY(qk_grid(call, &na, &g, &slots));
    return attn_grid_scores(&g, slots, call->arena, call->threads, attn_f32(call->t[QK_SCORES]));
}

static attn_status qk_backward(attn_call *call)
{
    attn_na na;
    attn_grid g;
    int64_t slots;
    ATTN_TRY(qk_grid(call, &na, &g, &slots));
    attn_grid_gradients to = {.q = attn_f32(call->grad[QK_Q]), .k = attn_f32(call->grad[QK_K]), .bias = attn_f32(call->grad[QK_RPB])};
    return attn_grid_scores_backward(&g, slots, call->arena, call->threads, attn_f32(call->grad[QK_SCORES]), &to);
}

static attn_status av_bind(attn_call *call)
{
    attn_na na;
    int64_t slots;
    ATTN_TRY(unfused_setup(call, &na, &slots));
    return attn_dim(call, "K") == slots ? ATTN_OK
                                        : attn_fail(ATTN_ERR_SHAPE, "w has %lld slots, expected %lld: the product of kernel",
                                                    (long long)attn_dim(call, "K"), (long long)slots);
}

static attn_status av_grid(attn_call *call, attn_na *na, attn_grid *g, int64_t *slots)
{
    ATTN_TRY(unfused_setup(call, na, slots));
    ATTN_TRY(attn_na_windows(na, call->arena));
    *g = grid_of(call, na);
    g->d = 1;
    g->v = attn_f32(call->t[AV_V]);
    return ATTN_OK;
}

static attn_status av_forward(attn_call *call)
{
    attn_na na;
    attn_grid g;
    int64_t slots;
    ATTN_TRY(av_grid(call, &na, &g, &slots));
    return attn_grid_values(&g, slots, call->arena, call->threads, attn_f32(call->t[AV_W]), attn_f32(call->t[AV_O]));
}

static attn_status av_backward(attn_call *call)
{
    attn_na na;
    attn_grid g;
    int64_t slots;
    ATTN_TRY(av_grid(call, &na, &g, &slots));
    attn_grid_gradients to = {.v = attn_f32(call->grad[AV_V])};
    return attn_grid_values_backward(&g, slots, call->arena, call->threads, attn_f32(call->t[AV_W]), attn_f32(call->grad[AV_O]),
                                     attn_f32(call->grad[AV_W]), &to);
}

const attn_op_class attn_op_neighborhood_qk = {
    .info = {.name = "neighborhood.qk",
             .title = "Neighborhood attention: scores of the windows",
             .summary = "The scores of each query with the keys of its window, without softmax. Axes may not be causal. Stores N times the window.",
             .paper = ATTN_NA_PAPER,
             .differentiable = 1,
             ATTN_TABLE(qk_param_table, qk_ports)},
    .params_size = sizeof(attn_na_params),
    .bind = qk_bind,
    .forward = qk_forward,
    .backward = qk_backward,
};

const attn_op_class attn_op_neighborhood_av = {
    .info = {.name = "neighborhood.av",
             .title = "Neighborhood attention: weighted sums of the windows",
             .summary = "The values of each query's window, weighted: softmax of neighborhood.qk followed by this is neighborhood attention.",
             .paper = ATTN_NA_PAPER,
             .differentiable = 1,
             ATTN_TABLE(av_param_table, av_ports)},
    .params_size = sizeof(attn_na_params),
    .bind = av_bind,
    .forward = av_forward,
    .backward = av_backward,
};
