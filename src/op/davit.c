/* Dual attention for images (DaViT, arXiv:2204.03645): attention among the pixels of a window (exec/windows.h) alternates with attention
 * among the channels of a group, whose scores are sums over all pixels. Both are linear in the number of pixels. Here are the two
 * attentions; layers and blocks are in davit_layers.c.
 */
#include "op/davit.h"

#include "kernel/tile.h"
#include "layer/gemm.h"

#include <math.h>
#include <omp.h>
#include <string.h>

/* ---- davit.window ---- */

typedef struct window_params {
    attn_ints grid, window;
    double scale;
    int64_t padding;
} window_params;

static const attn_param_info window_param_table[] = {
    ATTN_P_LIST(INTS, "grid", window_params, grid, NULL, 1, ATTN_MOST_EXTENT, 2, 2, "rows and columns of the image; their product is N"),
    ATTN_P_LIST(INTS, "window", window_params, window, "7", 1, ATTN_MOST_STEP, 1, 2, "rows and columns of a window"),
    ATTN_P_SCALE(window_params, scale),
    ATTN_P_CHOICE("padding", window_params, padding, "zero", "zero|mask",
                  "windows that stick out: padding tokens take part, or are left out"),
};

enum { Q, K, V, PAD_K, PAD_V, O, LSE };

static const attn_port_info window_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries on the grid, row by row"),
    ATTN_IN("k", "B,Hkv,N,D", FLOAT, ATTN_PORT_DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,N,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_IN("pad_k", "Hkv,D", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "key of a padding token (absent: zero)"),
    ATTN_IN("pad_v", "Hkv,Dv", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "value of a padding token (absent: zero)"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("lse", "B,H,N", FLOAT, ATTN_PORT_F32, "log-sum-exp, with the padding tokens that take part"),
};

void attn_davit_window(attn_windows *w, const attn_ints *grid, const attn_ints *window)
{
    for (int axis = 0; axis < 2; axis++) {
        w->grid[axis] = grid->items[axis];
        w->block[axis] = window->items[window->count > 1 ? axis : 0];
        w->stride[axis] = w->step[axis] = 1;
        w->halo[axis] = 0;
    }
}

static attn_windows_view by_head(const attn_tensor *t, int64_t heads, int64_t tokens, int64_t width)
{
    return (attn_windows_view){attn_f32(t), heads * tokens * width, tokens * width, width};
}

static attn_status window_setup(const attn_call *call, attn_windows *w)
{
    const window_params *p = call->params;
    int64_t n = attn_dim(call, "N");
    *w = (attn_windows){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"),
                        .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"), .scale = attn_default_scale(p->scale, attn_dim(call, "D")),
                        .masked = p->padding == 1, .pad_k = attn_f32(call->t[PAD_K]), .pad_v = attn_f32(call->t[PAD_V])};
    attn_davit_window(w, &p->grid, &p->window);
    ATTN_TRY(attn_davit_check_grid(&p->grid, n));
    w->q = by_head(call->t[Q], w->heads, n, w->d);
    w->k = by_head(call->t[K], w->kv_heads, n, w->d);
    w->v = by_head(call->t[V], w->kv_heads, n, w->dv);
    return ATTN_OK;
}

attn_status attn_davit_check_grid(const attn_ints *grid, int64_t tokens)
{
    return grid->items[0] * grid->items[1] == tokens
               ? ATTN_OK
               : attn_fail(ATTN_ERR_SHAPE, "grid = [%lld, %lld] does not hold the %lld tokens", (long long)grid->items[0],
                           (long long)grid->items[1], (long long)tokens);
}

static attn_status window_bind(attn_call *call)
{
    attn_windows w;
    return window_setup(call, &w);
}

static attn_status window_forward(attn_call *call)
{
    attn_windows w;
    ATTN_TRY(window_setup(call, &w));
    w.o = by_head(call->t[O], w.heads, attn_dim(call, "N"), w.dv);
    w.lse = attn_wanted_f32(call, LSE);
    return attn_windows_forward(&w, call->arena, call->threads);
}

static attn_status window_backward(attn_call *call)
{
    attn_windows w;
    ATTN_TRY(window_setup(call, &w));
    int64_t n = attn_dim(call, "N");
    w.o = by_head(call->t[O], w.heads, n, w.dv);
    w.lse = attn_f32(call->t[LSE]);
    attn_windows_gradients grad = {.o = by_head(call->grad[O], w.heads, n, w.dv), .q = by_head(call->grad[Q], w.heads, n, w.d),
                                   .k = by_head(call->grad[K], w.kv_heads, n, w.d), .v = by_head(call->grad[V], w.kv_heads, n, w.dv),
                                   .pad_k = attn_f32(call->grad[PAD_K]), .pad_v = attn_f32(call->grad[PAD_V])};
    return attn_windows_backward(&w, &grad, call->arena, call->threads);
}

void attn_davit_window_cost(const attn_windows *w, attn_cost *cost)
{
    double pairs = (double)(w->batch * w->heads);
    for (int axis = 0; axis < 2; axis++) {
        double along = 0;
        for (int64_t x = 0; x < w->grid[axis]; x++) {
            int64_t first = x / w->block[axis] * w->block[axis];
            along += (double)(w->masked ? attn_min_i64(w->block[axis], w->grid[axis] - first) : w->block[axis]);
        }
        pairs *= along;
    }
    cost->pairs += pairs;
    cost->flops += 2 * pairs * (double)(w->d + w->dv);
}

static attn_status window_cost(attn_call *call, attn_cost *cost)
{
    attn_windows w;
    ATTN_TRY(window_setup(call, &w));
    attn_davit_window_cost(&w, cost);
    return ATTN_OK;
}

const attn_op_class attn_op_davit_window = {
    .info = {.name = "davit.window",
             .title = "Attention inside the windows of an image",
             .summary = "Every pixel attends to the pixels of its own, fixed window. Windows that stick out at the bottom and right hold padding "
                        "tokens that take part or are left out. Costs 2 * window * (D + Dv) operations per pixel and head.",
             .paper = ATTN_DAVIT_PAPER,
             .differentiable = 1,
             ATTN_TABLE(window_param_table, window_ports)},
    .params_size = sizeof(window_params),
    .bind = window_bind,
    .forward = window_forward,
    .backward = window_backward,
    .cost = window_cost,
};

/* ---- Channel attention ---- */

#define CHUNK 1024 /* pixels whose products are summed in f32 before they are added in double */

/* sums [pairs][i][j] in double = a^T b over the pixels. */
static attn_status sum_products(const attn_davit_channel *c, attn_arena *arena, int threads, const attn_davit_rows *a, int64_t i,
                                const attn_davit_rows *b, int64_t j, double *sums)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    int64_t pairs = c->batch * c->groups, chunks = attn_ceil_div(c->n, CHUNK), j_pad = attn_ceil_div(j, kernels->vw) * kernels->vw;
    float *partial = attn_arena_array(arena, (size_t)(pairs * chunks), (size_t)(i * j_pad) * sizeof *partial);
    float *padded = attn_arena_array(arena, (size_t)threads * CHUNK, (size_t)j_pad * sizeof *padded); /* when j is not whole vectors */
    if (partial == NULL || padded == NULL) {
        return attn_fail_memory((size_t)(pairs * chunks * i * j_pad) * sizeof *partial);
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < pairs * chunks; t++) {
        int64_t pair = t / chunks, first = t % chunks * CHUNK, count = attn_min_i64(CHUNK, c->n - first);
        int64_t batch = pair / c->groups, group = pair % c->groups;
        const float *rows = attn_davit_row(b, batch, group, first);
        int64_t stride = b->row;
        if (j < j_pad) {
            float *to = padded + omp_get_thread_num() * CHUNK * j_pad;
            for (int64_t n = 0; n < count; n++) {
                memcpy(to + n * j_pad, rows + n * b->row, (size_t)j * sizeof *to);
                memset(to + n * j_pad + j, 0, (size_t)(j_pad - j) * sizeof *to);
            }
            rows = to;
            stride = j_pad;
        }
        kernels->product(i, j_pad, count, attn_davit_row(a, batch, group, first), 1, a->row, rows, stride, kernels->nr,
                         partial + t * i * j_pad, j_pad, 0);
    }
    for (int64_t e = 0; e < pairs * i * j; e++) {
        int64_t pair = e / (i * j), at = e / j % i * j_pad + e % j;
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            sum += (double)partial[(pair * chunks + chunk) * i * j_pad + at];
        }
        sums[e] = sum;
    }
    return ATTN_OK;
}

/* to [n, width] of each pair = factor * from [n, inner] times m (inner x width, or its transpose as stored). */
static attn_status multiply_rows(const attn_davit_channel *c, attn_arena *arena, int threads, const attn_davit_rows *from, int64_t inner,
                                 const float *m, int transposed, int64_t width, float factor, const attn_davit_rows *to)
{
    for (int64_t pair = 0; pair < c->batch * c->groups; pair++) {
        int64_t batch = pair / c->groups, group = pair % c->groups;
        ATTN_TRY(attn_gemm(arena, threads, 0, transposed, c->n, width, inner, factor, attn_davit_row(from, batch, group, 0), from->row,
                           m + pair * inner * width, transposed ? inner : width, 0, attn_davit_row(to, batch, group, 0), to->row));
    }
    return ATTN_OK;
}

attn_status attn_davit_channel_forward(const attn_davit_channel *c, attn_arena *arena, int threads, float *attn)
{
    int64_t pairs = c->batch * c->groups;
    double *s = attn_arena_array(arena, (size_t)(pairs * c->i), (size_t)c->j * sizeof *s);
    if (s == NULL) {
        return attn_fail_memory((size_t)(pairs * c->i * c->j) * sizeof *s);
    }
    ATTN_TRY(sum_products(c, arena, threads, &c->q, c->i, &c->k, c->j, s));
    for (int64_t r = 0; r < pairs * c->i; r++) {
        double top = -INFINITY, sum = 0;
        for (int64_t j = 0; j < c->j; j++) {
            s[r * c->j + j] *= c->scale;
            top = s[r * c->j + j] > top ? s[r * c->j + j] : top;
        }
        for (int64_t j = 0; j < c->j; j++) {
            s[r * c->j + j] = exp(s[r * c->j + j] - top);
            sum += s[r * c->j + j];
        }
        for (int64_t j = 0; j < c->j; j++) {
            attn[r * c->j + j] = (float)(s[r * c->j + j] / sum);
        }
    }
    return multiply_rows(c, arena, threads, &c->v, c->j, attn, 1, c->i, 1, &c->o);
}

attn_status attn_davit_channel_backward(const attn_davit_channel *c, attn_arena *arena, int threads, const float *attn,
                                        const attn_davit_rows *grad_o, const attn_davit_rows *grad_q, const attn_davit_rows *grad_k,
                                        const attn_davit_rows *grad_v)
{
    int64_t pairs = c->batch * c->groups, size = c->i * c->j;
    double *da = attn_arena_array(arena, (size_t)pairs, (size_t)size * sizeof *da);
    float *ds = attn_arena_array(arena, (size_t)pairs, (size_t)size * sizeof *ds);
    if (da == NULL || ds == NULL) {
        return attn_fail_memory((size_t)(pairs * size) * sizeof *da);
    }
    ATTN_TRY(sum_products(c, arena, threads, grad_o, c->i, &c->v, c->j, da));
    for (int64_t r = 0; r < pairs * c->i; r++) {
        double mean = 0;
        for (int64_t j = 0; j < c->j; j++) {
            mean += da[r * c->j + j] * (double)attn[r * c->j + j];
        }
        for (int64_t j = 0; j < c->j; j++) {
            ds[r * c->j + j] = (float)((double)attn[r * c->j + j] * (da[r * c->j + j] - mean));
        }
    }
    if (grad_v->data != NULL) {
        ATTN_TRY(multiply_rows(c, arena, threads, grad_o, c->i, attn, 0, c->j, 1, grad_v));
    }
    if (grad_q->data != NULL) {
        ATTN_TRY(multiply_rows(c, arena, threads, &c->k, c->j, ds, 1, c->i, (float)c->scale, grad_q));
    }
    if (grad_k->data != NULL) {
        ATTN_TRY(multiply_rows(c, arena, threads, &c->q, c->i, ds, 0, c->j, (float)c->scale, grad_k));
    }
    return ATTN_OK;
}

/* ---- davit.channel ---- */

typedef struct channel_params {
    double scale;
    int64_t dynamic_scale;
} channel_params;

static const attn_param_info channel_param_table[] = {
    ATTN_P_FLOAT_AUTO("scale", channel_params, scale, "1/sqrt(J)", -INFINITY, INFINITY, "multiplies the sums over the pixels"),
    ATTN_P_BOOL("dynamic_scale", channel_params, dynamic_scale, "false", "the default scale is 1/sqrt(N) instead"),
};

enum { C_Q, C_K, C_V, C_O, C_ATTN };

static const attn_port_info channel_ports[] = {
    ATTN_IN("q", "B,G,N,I", FLOAT, ATTN_PORT_DIFF, "query channels of each group, at every pixel"),
    ATTN_IN("k", "B,G,N,J", FLOAT, ATTN_PORT_DIFF, "key channels"),
    ATTN_IN("v", "B,G,N,J", FLOAT, ATTN_PORT_DIFF, "value channels"),
    ATTN_OUT("o", "B,G,N,I", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("attn", "B,G,I,J", FLOAT, 0, "the weights among channels; rows sum to 1"),
};

static attn_davit_rows rows_of(const attn_tensor *t, int64_t groups, int64_t n, int64_t width)
{
    return (attn_davit_rows){attn_f32(t), groups * n * width, n * width, width};
}

static attn_status channel_setup(const attn_call *call, attn_davit_channel *c)
{
    const channel_params *p = call->params;
    *c = (attn_davit_channel){.batch = attn_dim(call, "B"), .groups = attn_dim(call, "G"), .n = attn_dim(call, "N"), .i = attn_dim(call, "I"),
                              .j = attn_dim(call, "J")};
    if (c->n < 1 || c->i < 1 || c->j < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "N = %lld, I = %lld and J = %lld, expected at least 1 each", (long long)c->n, (long long)c->i,
                         (long long)c->j);
    }
    c->scale = !isnan(p->scale) ? p->scale : 1 / sqrt((double)(p->dynamic_scale ? c->n : c->j));
    c->q = rows_of(call->t[C_Q], c->groups, c->n, c->i);
    c->k = rows_of(call->t[C_K], c->groups, c->n, c->j);
    c->v = rows_of(call->t[C_V], c->groups, c->n, c->j);
    return ATTN_OK;
}

static attn_status channel_bind(attn_call *call)
{
    attn_davit_channel c;
    return channel_setup(call, &c);
}

static attn_status channel_forward(attn_call *call)
{
    attn_davit_channel c;
    ATTN_TRY(channel_setup(call, &c));
    c.o = rows_of(call->t[C_O], c.groups, c.n, c.i);
    return attn_davit_channel_forward(&c, call->arena, call->threads, attn_f32(call->t[C_ATTN]));
}

static attn_status channel_backward(attn_call *call)
{
    attn_davit_channel c;
    ATTN_TRY(channel_setup(call, &c));
    attn_davit_rows go = rows_of(call->grad[C_O], c.groups, c.n, c.i), gq = rows_of(call->grad[C_Q], c.groups, c.n, c.i);
    attn_davit_rows gk = rows_of(call->grad[C_K], c.groups, c.n, c.j), gv = rows_of(call->grad[C_V], c.groups, c.n, c.j);
    return attn_davit_channel_backward(&c, call->arena, call->threads, attn_f32(call->t[C_ATTN]), &go, &gq, &gk, &gv);
}

static attn_status channel_cost(attn_call *call, attn_cost *cost)
{
    attn_davit_channel c;
    ATTN_TRY(channel_setup(call, &c));
    cost->flops = 4 * (double)(c.batch * c.groups * c.n) * (double)(c.i * c.j);
    return ATTN_OK;
}

const attn_op_class attn_op_davit_channel = {
    .info = {.name = "davit.channel",
             .title = "Attention among the channels of groups",
             .summary = "Channels are the tokens and all pixels are their features: every score sums over the whole image, so that the context is "
                        "global at 4*N*I*J operations per group, linear in the number of pixels.",
             .paper = ATTN_DAVIT_PAPER,
             .differentiable = 1,
             ATTN_TABLE(channel_param_table, channel_ports)},
    .params_size = sizeof(channel_params),
    .bind = channel_bind,
    .forward = channel_forward,
    .backward = channel_backward,
    .cost = channel_cost,
};
