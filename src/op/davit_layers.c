/* Layers and blocks of DaViT: projections around the two attentions of davit.c, convolutional positions, norms and feed-forward parts, and
 * the patch embedding between stages.
 */
#include "layer/activation.h"
#include "layer/conv.h"
#include "layer/ffn.h"
#include "layer/heads.h"
#include "layer/linear.h"
#include "layer/norm.h"
#include "layer/patch.h"
#include "op/davit.h"

#include <string.h>

#define NORM_EPS 1e-5

enum { ORDER_VQK, ORDER_QKV };
enum { SPATIAL, CHANNEL };

/* ---- Attention with projections ---- */

typedef struct mixer {
    int kind;
    int64_t batch, n, rows, c, heads, order;
    int dynamic_scale;
    const attn_ints *grid, *window;
    const float *w_qkv, *b_qkv, *w_proj, *b_proj;
} mixer;

typedef struct mixer_gradients {
    float *w_qkv, *b_qkv, *w_proj, *b_proj; /* added to; each may be NULL */
} mixer_gradients;

/* What the attention leaves behind. */
typedef struct mixer_work {
    float *z, *o, *lse, *attn; /* [rows, 3C], [rows, C], [B,heads,N], [B,heads,d,d] */
} mixer_work;

static attn_windows windows_of(const mixer *m, const mixer_work *w)
{
    int64_t d = m->c / m->heads;
    attn_windows x = {.batch = m->batch, .heads = m->heads, .kv_heads = m->heads, .d = d, .dv = d, .scale = attn_default_scale(NAN, d),
                      .q = {w->z, m->n * 3 * m->c, d, 3 * m->c}, .k = {w->z + m->c, m->n * 3 * m->c, d, 3 * m->c},
                      .v = {w->z + 2 * m->c, m->n * 3 * m->c, d, 3 * m->c}, .o = {w->o, m->n * m->c, d, m->c}, .lse = w->lse};
    if (m->b_qkv != NULL) { /* a zero token after the projection */
        x.pad_k = m->b_qkv + m->c;
        x.pad_v = m->b_qkv + 2 * m->c;
    }
    attn_davit_window(&x, m->grid, m->window);
    return x;
}

/* A third of z or of its gradient, by group. */
static attn_davit_rows third(const mixer *m, float *z, int part)
{
    return (attn_davit_rows){z + part * m->c, m->n * 3 * m->c, m->c / m->heads, 3 * m->c};
}

/* Which third is q, k, v. */
static void roles(const mixer *m, int at[3])
{
    static const int places[2][3] = {{1, 2, 0}, {0, 1, 2}};
    memcpy(at, places[m->order], sizeof places[0]);
}

static attn_davit_channel channel_of(const mixer *m, const mixer_work *w)
{
    int at[3];
    roles(m, at);
    int64_t d = m->c / m->heads;
    return (attn_davit_channel){.batch = m->batch, .groups = m->heads, .n = m->n, .i = d, .j = d,
                                .scale = 1 / sqrt((double)(m->dynamic_scale ? m->n : d)), .q = third(m, w->z, at[0]),
                                .k = third(m, w->z, at[1]), .v = third(m, w->z, at[2]), .o = {w->o, m->n * m->c, d, m->c}};
}

static attn_status mix(attn_call *call, const mixer *m, const float *x, mixer_work *w)
{
    ATTN_TRY(attn_take_f32(call, m->rows * 3 * m->c, &w->z));
    ATTN_TRY(attn_take_f32(call, m->rows * m->c, &w->o));
    ATTN_TRY(attn_take_f32(call, m->rows * m->heads, &w->lse));
    ATTN_TRY(attn_take_f32(call, m->batch * m->c * (m->c / m->heads), &w->attn));
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, m->rows, m->c, 3 * m->c, x, m->w_qkv, m->b_qkv, w->z));
    if (m->kind == SPATIAL) {
        attn_windows windows = windows_of(m, w);
        return attn_windows_forward(&windows, call->arena, call->threads);
    }
    attn_davit_channel channel = channel_of(m, w);
    return attn_davit_channel_forward(&channel, call->arena, call->threads, w->attn);
}

/* About ATTN_LINEAR_SPAN tokens of an image at a time, in whole rows of windows, or whole small images: what is between the projections
 * stays small. (A band holds all of an image that is not alone.) Channel attention sees all pixels of an image. */

static attn_status mixer_forward(attn_call *call, const mixer *m, const float *x, float *o)
{
    int64_t across = m->n, high = 1, band = 1, together = m->batch;
    if (m->kind == SPATIAL) {
        high = m->grid->items[0], across = m->grid->items[1];
        together = attn_max_i64(1, ATTN_LINEAR_SPAN / m->n);
        band = m->window->items[0] * attn_max_i64(1, ATTN_LINEAR_SPAN / (m->window->items[0] * across));
    }
    for (int64_t b = 0; b < m->batch; b += together) {
        for (int64_t y = 0; y < high; y += band) {
            int64_t row = b * m->n + y * across, part[2] = {attn_min_i64(band, high - y), across};
            attn_ints grid = {2, part};
            mixer some = *m;
            mixer_work w;
            some.grid = &grid;
            some.batch = attn_min_i64(together, m->batch - b);
            some.n = part[0] * part[1];
            some.rows = some.batch * some.n;
            attn_arena_mark mark = attn_arena_get_mark(call->arena);
            ATTN_TRY(mix(call, &some, x + row * m->c, &w));
            ATTN_TRY(attn_linear_forward(call->arena, call->threads, some.rows, m->c, m->c, w.o, m->w_proj, m->b_proj, o + row * m->c));
            attn_arena_release(call->arena, mark);
        }
    }
    return ATTN_OK;
}

/* grad_x is overwritten; it may be NULL. */
static attn_status mixer_backward(attn_call *call, const mixer *m, const float *x, const float *grad_y, float *grad_x,
                                  const mixer_gradients *to)
{
    mixer_work w;
    float *go, *gz;
    int64_t d = m->c / m->heads;
    ATTN_TRY(mix(call, m, x, &w));
    ATTN_TRY(attn_take_f32(call, m->rows * m->c, &go));
    ATTN_TRY(attn_take_f32(call, m->rows * 3 * m->c, &gz));
    memset(gz, 0, (size_t)(m->rows * 3 * m->c) * sizeof *gz);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, m->rows, m->c, m->c, w.o, m->w_proj, grad_y, go, to->w_proj, to->b_proj));
    if (m->kind == SPATIAL) {
        attn_windows windows = windows_of(m, &w);
        attn_windows_gradients grad = {.o = {go, m->n * m->c, d, m->c}, .q = {gz, m->n * 3 * m->c, d, 3 * m->c},
                                       .k = {gz + m->c, m->n * 3 * m->c, d, 3 * m->c}, .v = {gz + 2 * m->c, m->n * 3 * m->c, d, 3 * m->c}};
        if (to->b_qkv != NULL) {
            grad.pad_k = to->b_qkv + m->c;
            grad.pad_v = to->b_qkv + 2 * m->c;
        }
        ATTN_TRY(attn_windows_backward(&windows, &grad, call->arena, call->threads));
    } else {
        int at[3];
        roles(m, at);
        attn_davit_channel channel = channel_of(m, &w);
        attn_davit_rows grad_o = {go, m->n * m->c, d, m->c}, gq = third(m, gz, at[0]), gk = third(m, gz, at[1]), gv = third(m, gz, at[2]);
        ATTN_TRY(attn_davit_channel_backward(&channel, call->arena, call->threads, w.attn, &grad_o, &gq, &gk, &gv));
    }
    return attn_linear_backward(call->arena, call->threads, m->rows, m->c, 3 * m->c, x, m->w_qkv, gz, grad_x, to->w_qkv, to->b_qkv);
}

static void mixer_cost(const mixer *m, attn_cost *cost)
{
    double rows = (double)m->rows, c = (double)m->c;
    cost->flops += 8 * rows * c * c;
    if (m->kind == SPATIAL) {
        attn_windows windows = {.batch = m->batch, .heads = m->heads, .d = m->c / m->heads, .dv = m->c / m->heads};
        attn_davit_window(&windows, m->grid, m->window);
        attn_davit_window_cost(&windows, cost);
    } else {
        cost->flops += 4 * rows * c * c / (double)m->heads;
    }
}

typedef struct davit_params {
    attn_ints grid, window;
    int64_t heads, order, dynamic_scale, cpe_act, stride, pad, norm;
} davit_params;

#define HEADS_PARAM ATTN_P_INT("heads", davit_params, heads, NULL, 1, INFINITY, "heads or groups; divides C")
#define GRID_PARAM ATTN_P_LIST(INTS, "grid", davit_params, grid, NULL, 1, ATTN_MOST_EXTENT, 2, 2, "rows and columns of the image; their product is N")
#define WINDOW_PARAM ATTN_P_LIST(INTS, "window", davit_params, window, "7", 1, ATTN_MOST_STEP, 1, 2, "rows and columns of a window")
#define ORDER_PARAM                                                                                                    \
    ATTN_P_CHOICE("order", davit_params, order, "vqk", "vqk|qkv",                                                      \
                  "roles of the three thirds of the projection: vqk as in the released models, qkv in version 2")
#define DYNAMIC_PARAM ATTN_P_BOOL("dynamic_scale", davit_params, dynamic_scale, "false", "channel scores are divided by sqrt(N) instead of sqrt(C/heads)")
#define ACT_PARAM ATTN_P_BOOL("cpe_act", davit_params, cpe_act, "false", "GELU on the convolutional positions before they are added")

static attn_status mixer_setup(const attn_call *call, int kind, int qkv, int b_qkv, int proj, int b_proj, mixer *m)
{
    const davit_params *p = call->params;
    *m = (mixer){.kind = kind, .batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .c = attn_dim(call, "C"), .heads = p->heads,
                 .order = p->order, .dynamic_scale = (int)p->dynamic_scale, .grid = &p->grid, .window = &p->window,
                 .w_qkv = attn_f32(call->t[qkv]), .b_qkv = attn_f32(call->t[b_qkv]), .w_proj = attn_f32(call->t[proj]),
                 .b_proj = attn_f32(call->t[b_proj])};
    m->rows = m->batch * m->n;
    if (m->c < 1 || m->n < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "x holds N = %lld tokens of C = %lld channels, expected at least 1 each", (long long)m->n,
                         (long long)m->c);
    }
    if (m->c % p->heads != 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "heads = %lld does not divide C = %lld", (long long)p->heads, (long long)m->c);
    }
    return p->grid.count > 0 ? attn_davit_check_grid(&p->grid, m->n) : ATTN_OK;
}

static mixer_gradients mixer_grads(const attn_call *call, int qkv, int b_qkv, int proj, int b_proj)
{
    return (mixer_gradients){attn_f32(call->grad[qkv]), attn_f32(call->grad[b_qkv]), attn_f32(call->grad[proj]), attn_f32(call->grad[b_proj])};
}

/* ---- davit.window_layer, davit.channel_layer ---- */

static const attn_param_info window_layer_params[] = {HEADS_PARAM, GRID_PARAM, WINDOW_PARAM};
static const attn_param_info channel_layer_params[] = {HEADS_PARAM, ORDER_PARAM, DYNAMIC_PARAM};

enum { L_X, L_QKV, L_PROJ, L_B_PROJ, L_B_QKV, L_O };

#define PORT_X ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens, row by row")

static const attn_port_info layer_ports[] = {
    PORT_X,
    ATTN_IN("w_qkv", "3*C,C", FLOAT, ATTN_PORT_DIFF, "projection, in three thirds"),
    ATTN_IN("w_proj", "C,C", FLOAT, ATTN_PORT_DIFF, "output projection"),
    ATTN_IN("b_proj", "C", FLOAT, ATTN_PORT_DIFF, "its bias"),
    ATTN_IN("b_qkv", "3*C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "bias of the projection"),
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "the layer's output"),
};

static attn_status layer_setup(const attn_call *call, int kind, mixer *m)
{
    return mixer_setup(call, kind, L_QKV, L_B_QKV, L_PROJ, L_B_PROJ, m);
}

static attn_status run_layer(attn_call *call, int kind)
{
    mixer m;
    ATTN_TRY(layer_setup(call, kind, &m));
    return mixer_forward(call, &m, attn_f32(call->t[L_X]), attn_f32(call->t[L_O]));
}

static attn_status run_layer_back(attn_call *call, int kind)
{
    mixer m;
    ATTN_TRY(layer_setup(call, kind, &m));
    mixer_gradients to = mixer_grads(call, L_QKV, L_B_QKV, L_PROJ, L_B_PROJ);
    return mixer_backward(call, &m, attn_f32(call->t[L_X]), attn_f32(call->grad[L_O]), attn_f32(call->grad[L_X]), &to);
}

static attn_status layer_cost(attn_call *call, int kind, attn_cost *cost)
{
    mixer m;
    ATTN_TRY(layer_setup(call, kind, &m));
    mixer_cost(&m, cost);
    return ATTN_OK;
}

static attn_status window_layer_bind(attn_call *call) { return layer_setup(call, SPATIAL, &(mixer){.kind = SPATIAL}); }
static attn_status window_layer_forward(attn_call *call) { return run_layer(call, SPATIAL); }
static attn_status window_layer_backward(attn_call *call) { return run_layer_back(call, SPATIAL); }
static attn_status window_layer_cost(attn_call *call, attn_cost *cost) { return layer_cost(call, SPATIAL, cost); }
static attn_status channel_layer_bind(attn_call *call) { return layer_setup(call, CHANNEL, &(mixer){.kind = CHANNEL}); }
static attn_status channel_layer_forward(attn_call *call) { return run_layer(call, CHANNEL); }
static attn_status channel_layer_backward(attn_call *call) { return run_layer_back(call, CHANNEL); }
static attn_status channel_layer_cost(attn_call *call, attn_cost *cost) { return layer_cost(call, CHANNEL, cost); }

const attn_op_class attn_op_davit_window_layer = {
    .info = {.name = "davit.window_layer",
             .title = "A window attention layer",
             .summary = "davit.window between projections. Padding tokens are zero before the projection, so their keys and values are its bias.",
             .paper = ATTN_DAVIT_PAPER,
             .differentiable = 1,
             ATTN_TABLE(window_layer_params, layer_ports)},
    .params_size = sizeof(davit_params),
    .bind = window_layer_bind,
    .forward = window_layer_forward,
    .backward = window_layer_backward,
    .cost = window_layer_cost,
};

const attn_op_class attn_op_davit_channel_layer = {
    .info = {.name = "davit.channel_layer",
             .title = "A channel attention layer",
             .summary = "davit.channel between projections. order and dynamic_scale choose between the first and the second version of the models.",
             .paper = ATTN_DAVIT_PAPER,
             .differentiable = 1,
             ATTN_TABLE(channel_layer_params, layer_ports)},
    .params_size = sizeof(davit_params),
    .bind = channel_layer_bind,
    .forward = channel_layer_forward,
    .backward = channel_layer_backward,
    .cost = channel_layer_cost,
};

/* ---- Blocks ---- */

/* Ports of one block, relative to its first. */
enum { CPE1_W, CPE1_B, LN1_W, LN1_B, QKV, B_QKV, PROJ, B_PROJ, CPE2_W, CPE2_B, LN2_W, LN2_B, FC1, B_FC1, FC2, B_FC2, BLOCK_PORTS };

#define BLOCK_INPUTS(prefix, hidden)                                                                                   \
    ATTN_IN(prefix "cpe1_w", "C,3,3", FLOAT, ATTN_PORT_DIFF, "convolutional positions before the attention"),          \
        ATTN_IN(prefix "cpe1_b", "C", FLOAT, ATTN_PORT_DIFF, "its bias"),                                              \
        ATTN_IN(prefix "ln1_w", "C", FLOAT, ATTN_PORT_DIFF, "norm before the attention"),                              \
        ATTN_IN(prefix "ln1_b", "C", FLOAT, ATTN_PORT_DIFF, "its bias"),                                               \
        ATTN_IN(prefix "w_qkv", "3*C,C", FLOAT, ATTN_PORT_DIFF, "projection, in three thirds"),                        \
        ATTN_IN(prefix "b_qkv", "3*C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "its bias"),                        \
        ATTN_IN(prefix "w_proj", "C,C", FLOAT, ATTN_PORT_DIFF, "output projection"),                                   \
        ATTN_IN(prefix "b_proj", "C", FLOAT, ATTN_PORT_DIFF, "its bias"),                                              \
        ATTN_IN(prefix "cpe2_w", "C,3,3", FLOAT, ATTN_PORT_DIFF, "convolutional positions after it"),                  \
        ATTN_IN(prefix "cpe2_b", "C", FLOAT, ATTN_PORT_DIFF, "its bias"),                                              \
        ATTN_IN(prefix "ln2_w", "C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "norm before the feed-forward part"), \
        ATTN_IN(prefix "ln2_b", "C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "its bias"),                          \
        ATTN_IN(prefix "w_fc1", hidden ",C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "feed-forward part"),         \
        ATTN_IN(prefix "b_fc1", hidden, FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "its bias"),                       \
        ATTN_IN(prefix "w_fc2", "C," hidden, FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "projection back"),           \
        ATTN_IN(prefix "b_fc2", "C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "its bias")

typedef struct block {
    mixer mixer;
    attn_tensor *const *t, *const *grad; /* from the block's first port on */
    int64_t height, width, hidden;
    int cpe_act, feed_forward; /* feed_forward: whether there is that part */
} block;

static attn_status block_setup(const attn_call *call, int kind, int first, const char *hidden, block *b)
{
    const davit_params *p = call->params;
    *b = (block){.t = call->t + first, .grad = call->grad + first, .height = p->grid.items[0], .width = p->grid.items[1],
                 .cpe_act = (int)p->cpe_act};
    int given = 0;
    for (int i = LN2_W; i <= B_FC2; i++) {
        given += b->t[i] != NULL;
    }
    if (given != 0 && given != 6) {
        const attn_port_info *port = call->cls->info.ports + first + LN2_W;
        return attn_fail(ATTN_ERR_ARGUMENT, "%d of the feed-forward part's six inputs are given, expected all or none: %s, %s, %s, %s, %s, %s",
                         given, port[0].name, port[1].name, port[2].name, port[3].name, port[4].name, port[5].name);
    }
    b->feed_forward = given > 0;
    b->hidden = b->feed_forward ? attn_dim(call, hidden) : 0;
    return mixer_setup(call, kind, first + QKV, first + B_QKV, first + PROJ, first + B_PROJ, &b->mixer);
}

/* y = x + positions(x); conv [rows, C] keeps the convolution before its activation. */
static void positions(const block *b, int threads, const float *x, int w, float *conv, float *y)
{
    int64_t count = b->mixer.rows * b->mixer.c;
    attn_conv2d_forward(threads, b->mixer.batch, b->height, b->width, b->mixer.c, 3, x, attn_f32(b->t[w]), attn_f32(b->t[w + 1]), conv);
    if (b->cpe_act) {
        attn_activation_forward(ATTN_ACTIVATION_GELU, threads, count, conv, y);
    } else {
        memcpy(y, conv, (size_t)count * sizeof *y);
    }
    attn_add_f32(threads, count, y, x);
}

/* grad [rows, C] is the gradient of y, then of x. spare, more: [rows, C] each. */
static void positions_back(const block *b, int threads, const float *x, int w, const float *conv, float *grad, float *spare, float *more)
{
    int64_t count = b->mixer.rows * b->mixer.c;
    if (b->cpe_act) {
        attn_activation_backward(ATTN_ACTIVATION_GELU, threads, count, conv, grad, spare);
    } else {
        memcpy(spare, grad, (size_t)count * sizeof *spare);
    }
    attn_conv2d_backward(threads, b->mixer.batch, b->height, b->width, b->mixer.c, 3, x, attn_f32(b->t[w]), spare, more,
                         attn_f32(b->grad[w]), attn_f32(b->grad[w + 1]));
    attn_add_f32(threads, count, grad, more);
}

static attn_ffn ffn_of(const block *b)
{
    return (attn_ffn){.in = b->mixer.c, .hidden = b->hidden, .out = b->mixer.c, .activation = ATTN_ACTIVATION_GELU,
                      .up = attn_f32(b->t[FC1]), .up_bias = attn_f32(b->t[B_FC1]), .down = attn_f32(b->t[FC2]),
                      .down_bias = attn_f32(b->t[B_FC2])};
}

static void norm(const block *b, int threads, int w, const float *x, float *y)
{
    attn_norm_forward(ATTN_NORM_LAYER, threads, b->mixer.rows, b->mixer.c, NORM_EPS, x, attn_f32(b->t[w]), attn_f32(b->t[w + 1]), y);
}

/* The residual stream at each step, [rows, C] each: after the first positions, attention, second positions. */
typedef struct block_work {
    float *conv1, *x1, *n1, *x2, *conv2, *x3, *n3;
} block_work;

static attn_status block_inner(attn_call *call, const block *b, const float *x, block_work *w)
{
    int64_t count = b->mixer.rows * b->mixer.c;
    float **all[] = {&w->conv1, &w->x1, &w->n1, &w->x2, &w->conv2, &w->x3, &w->n3};
    for (int i = 0; i < 7; i++) {
        ATTN_TRY(attn_take_f32(call, count, all[i]));
    }
    positions(b, call->threads, x, CPE1_W, w->conv1, w->x1);
    norm(b, call->threads, LN1_W, w->x1, w->n1);
    ATTN_TRY(mixer_forward(call, &b->mixer, w->n1, w->x2));
    attn_add_f32(call->threads, count, w->x2, w->x1);
    positions(b, call->threads, w->x2, CPE2_W, w->conv2, w->x3);
    if (b->feed_forward) {
        norm(b, call->threads, LN2_W, w->x3, w->n3);
    }
    return ATTN_OK;
}

static attn_status block_forward(attn_call *call, const block *b, const float *x, float *o)
{
    block_work w;
    int64_t count = b->mixer.rows * b->mixer.c;
    ATTN_TRY(block_inner(call, b, x, &w));
    if (b->feed_forward) {
        attn_ffn ffn = ffn_of(b);
        ATTN_TRY(attn_ffn_forward(&ffn, call->arena, call->threads, b->mixer.rows, w.n3, o));
        attn_add_f32(call->threads, count, o, w.x3);
    } else {
        memcpy(o, w.x3, (size_t)count * sizeof *o);
    }
    return ATTN_OK;
}

/* grad: the gradient of o, then of x. */
static attn_status block_backward(attn_call *call, const block *b, const float *x, float *grad)
{
    block_work w;
    float *spare, *more;
    int64_t count = b->mixer.rows * b->mixer.c, rows = b->mixer.rows, c = b->mixer.c;
    ATTN_TRY(block_inner(call, b, x, &w));
    ATTN_TRY(attn_take_f32(call, count, &spare));
    ATTN_TRY(attn_take_f32(call, count, &more));
    if (b->feed_forward) {
        attn_ffn ffn = ffn_of(b);
        ATTN_TRY(attn_ffn_backward(&ffn, call->arena, call->threads, rows, w.n3, grad, spare, attn_f32(b->grad[FC1]), attn_f32(b->grad[B_FC1]),
                                   attn_f32(b->grad[FC2]), attn_f32(b->grad[B_FC2])));
        ATTN_TRY(attn_norm_backward(ATTN_NORM_LAYER, call->arena, call->threads, rows, c, NORM_EPS, w.x3, attn_f32(b->t[LN2_W]), spare, more,
                                    attn_f32(b->grad[LN2_W]), attn_f32(b->grad[LN2_B])));
        attn_add_f32(call->threads, count, grad, more);
    }
    positions_back(b, call->threads, w.x2, CPE2_W, w.conv2, grad, spare, more);
    mixer_gradients to = {attn_f32(b->grad[QKV]), attn_f32(b->grad[B_QKV]), attn_f32(b->grad[PROJ]), attn_f32(b->grad[B_PROJ])};
    ATTN_TRY(mixer_backward(call, &b->mixer, w.n1, grad, spare, &to));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_LAYER, call->arena, call->threads, rows, c, NORM_EPS, w.x1, attn_f32(b->t[LN1_W]), spare, more,
                                attn_f32(b->grad[LN1_W]), attn_f32(b->grad[LN1_B])));
    attn_add_f32(call->threads, count, grad, more);
    positions_back(b, call->threads, x, CPE1_W, w.conv1, grad, spare, more);
    return ATTN_OK;
}

static void block_cost(const block *b, attn_cost *cost)
{
    double rows = (double)b->mixer.rows, c = (double)b->mixer.c;
    mixer_cost(&b->mixer, cost);
    cost->flops += 36 * rows * c + 4 * rows * c * (double)b->hidden;
}

static const attn_param_info spatial_params[] = {HEADS_PARAM, GRID_PARAM, WINDOW_PARAM, ACT_PARAM};
static const attn_param_info channel_params[] = {HEADS_PARAM, GRID_PARAM, ORDER_PARAM, DYNAMIC_PARAM, ACT_PARAM};
static const attn_param_info dual_params[] = {HEADS_PARAM, GRID_PARAM, WINDOW_PARAM, ORDER_PARAM, DYNAMIC_PARAM, ACT_PARAM};

enum { BLOCK_X, BLOCK_FIRST, BLOCK_O = BLOCK_FIRST + BLOCK_PORTS };

static const attn_port_info block_ports[] = {
    PORT_X,
    BLOCK_INPUTS("", "F"),
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens after the block"),
};

static attn_status single_forward(attn_call *call, int kind)
{
    block b;
    ATTN_TRY(block_setup(call, kind, BLOCK_FIRST, "F", &b));
    return block_forward(call, &b, attn_f32(call->t[BLOCK_X]), attn_f32(call->t[BLOCK_O]));
}

static attn_status single_backward(attn_call *call, int kind)
{
    block b;
    float *grad;
    ATTN_TRY(block_setup(call, kind, BLOCK_FIRST, "F", &b));
    int64_t count = b.mixer.rows * b.mixer.c;
    ATTN_TRY(attn_take_f32(call, count, &grad));
    memcpy(grad, attn_f32(call->grad[BLOCK_O]), (size_t)count * sizeof *grad);
    ATTN_TRY(block_backward(call, &b, attn_f32(call->t[BLOCK_X]), grad));
    if (call->grad[BLOCK_X] != NULL) {
        memcpy(attn_f32(call->grad[BLOCK_X]), grad, (size_t)count * sizeof *grad);
    }
    return ATTN_OK;
}

static attn_status single_cost(attn_call *call, int kind, attn_cost *cost)
{
    block b;
    ATTN_TRY(block_setup(call, kind, BLOCK_FIRST, "F", &b));
    block_cost(&b, cost);
    return ATTN_OK;
}

static attn_status spatial_bind(attn_call *call) { return block_setup(call, SPATIAL, BLOCK_FIRST, "F", &(block){.cpe_act = 0}); }
static attn_status spatial_forward(attn_call *call) { return single_forward(call, SPATIAL); }
static attn_status spatial_backward(attn_call *call) { return single_backward(call, SPATIAL); }
static attn_status spatial_cost(attn_call *call, attn_cost *cost) { return single_cost(call, SPATIAL, cost); }
static attn_status channel_bind(attn_call *call) { return block_setup(call, CHANNEL, BLOCK_FIRST, "F", &(block){.cpe_act = 0}); }
static attn_status channel_forward(attn_call *call) { return single_forward(call, CHANNEL); }
static attn_status channel_backward(attn_call *call) { return single_backward(call, CHANNEL); }
static attn_status channel_cost(attn_call *call, attn_cost *cost) { return single_cost(call, CHANNEL, cost); }

const attn_op_class attn_op_davit_spatial_block = {
    .info = {.name = "davit.spatial_block",
             .title = "A DaViT block with window attention",
             .summary = "Convolutional positions, window attention, convolutional positions and a feed-forward part, each with a residual.",
             .paper = ATTN_DAVIT_PAPER,
             .differentiable = 1,
             ATTN_TABLE(spatial_params, block_ports)},
    .params_size = sizeof(davit_params),
    .bind = spatial_bind,
    .forward = spatial_forward,
    .backward = spatial_backward,
    .cost = spatial_cost,
};

const attn_op_class attn_op_davit_channel_block = {
    .info = {.name = "davit.channel_block",
             .title = "A DaViT block with channel attention",
             .summary = "Convolutional positions, channel attention, convolutional positions and a feed-forward part, each with a residual.",
             .paper = ATTN_DAVIT_PAPER,
             .differentiable = 1,
             ATTN_TABLE(channel_params, block_ports)},
    .params_size = sizeof(davit_params),
    .bind = channel_bind,
    .forward = channel_forward,
    .backward = channel_backward,
    .cost = channel_cost,
};

/* ---- davit.block ---- */

enum { DUAL_X, DUAL_SPATIAL, DUAL_CHANNEL = DUAL_SPATIAL + BLOCK_PORTS, DUAL_O = DUAL_CHANNEL + BLOCK_PORTS };

static const attn_port_info dual_ports[] = {
    PORT_X,
    BLOCK_INPUTS("s_", "Fs"),
    BLOCK_INPUTS("c_", "Fc"),
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens after both blocks"),
};

static attn_status dual_setup(const attn_call *call, block blocks[2])
{
    ATTN_TRY(block_setup(call, SPATIAL, DUAL_SPATIAL, "Fs", &blocks[0]));
    return block_setup(call, CHANNEL, DUAL_CHANNEL, "Fc", &blocks[1]);
}

static attn_status dual_bind(attn_call *call)
{
    block blocks[2];
    return dual_setup(call, blocks);
}

static attn_status dual_forward(attn_call *call)
{
    block blocks[2];
    float *middle;
    ATTN_TRY(dual_setup(call, blocks));
    ATTN_TRY(attn_take_f32(call, blocks[0].mixer.rows * blocks[0].mixer.c, &middle));
    ATTN_TRY(block_forward(call, &blocks[0], attn_f32(call->t[DUAL_X]), middle));
    return block_forward(call, &blocks[1], middle, attn_f32(call->t[DUAL_O]));
}

static attn_status dual_backward(attn_call *call)
{
    block blocks[2];
    float *middle, *grad;
    ATTN_TRY(dual_setup(call, blocks));
    int64_t count = blocks[0].mixer.rows * blocks[0].mixer.c;
    ATTN_TRY(attn_take_f32(call, count, &middle));
    ATTN_TRY(attn_take_f32(call, count, &grad));
    ATTN_TRY(block_forward(call, &blocks[0], attn_f32(call->t[DUAL_X]), middle));
    memcpy(grad, attn_f32(call->grad[DUAL_O]), (size_t)count * sizeof *grad);
    ATTN_TRY(block_backward(call, &blocks[1], middle, grad));
    ATTN_TRY(block_backward(call, &blocks[0], attn_f32(call->t[DUAL_X]), grad));
    if (call->grad[DUAL_X] != NULL) {
        memcpy(attn_f32(call->grad[DUAL_X]), grad, (size_t)count * sizeof *grad);
    }
    return ATTN_OK;
}

static attn_status dual_cost(attn_call *call, attn_cost *cost)
{
    block blocks[2];
    ATTN_TRY(dual_setup(call, blocks));
    block_cost(&blocks[0], cost);
    block_cost(&blocks[1], cost);
    return ATTN_OK;
}

const attn_op_class attn_op_davit_block = {
    .info = {.name = "davit.block",
             .title = "A dual DaViT block: window attention, then channel attention",
             .summary = "davit.spatial_block followed by davit.channel_block: local detail and global context, both linear in the number of pixels.",
             .paper = ATTN_DAVIT_PAPER,
             .differentiable = 1,
             ATTN_TABLE(dual_params, dual_ports)},
    .params_size = sizeof(davit_params),
    .bind = dual_bind,
    .forward = dual_forward,
    .backward = dual_backward,
    .cost = dual_cost,
};

/* ---- davit.embed ---- */

enum { NORM_FIRST, NORM_LAST };

static const attn_param_info embed_params[] = {
    GRID_PARAM,
    ATTN_P_INT("stride", davit_params, stride, "2", 1, ATTN_MOST_STEP, "pixels from patch to patch"),
    ATTN_P_INT("pad", davit_params, pad, "0", 0, ATTN_MOST_STEP, "zeros around the image"),
    ATTN_P_CHOICE("norm", davit_params, norm, "first", "first|last", "layer norm of the input or of the result"),
};

enum { E_X, E_W, E_B, E_LN_W, E_LN_B, E_O };

static const attn_port_info embed_ports[] = {
    ATTN_IN("x", "B,N,Cin", FLOAT, ATTN_PORT_DIFF, "tokens or pixels, row by row"),
    ATTN_IN("w", "Cout,Cin,kh,kw", FLOAT, ATTN_PORT_DIFF, "convolution"),
    ATTN_IN("b", "Cout", FLOAT, ATTN_PORT_DIFF, "its bias"),
    ATTN_IN("ln_w", "Cn", FLOAT, ATTN_PORT_DIFF, "layer norm, of Cin or Cout channels"),
    ATTN_IN("ln_b", "Cn", FLOAT, ATTN_PORT_DIFF, "bias of the layer norm"),
    ATTN_OUT("o", "B,Nout,Cout", FLOAT, ATTN_PORT_DIFF, "tokens of the smaller grid"),
};

static attn_status embed_setup(const attn_call *call, attn_patch *e)
{
    const davit_params *p = call->params;
    *e = (attn_patch){.images = attn_dim(call, "B"), .in = attn_dim(call, "Cin"), .out = attn_dim(call, "Cout"),
                      .grid = {p->grid.items[0], p->grid.items[1]}, .kernel = {attn_dim(call, "kh"), attn_dim(call, "kw")},
                      .stride = p->stride, .pad = p->pad};
    ATTN_TRY(attn_davit_check_grid(&p->grid, attn_dim(call, "N")));
    for (int axis = 0; axis < 2; axis++) {
        int64_t extent = attn_ceil_div(e->grid[axis], e->stride) * e->stride + 2 * e->pad;
        if (e->kernel[axis] < 1 || e->kernel[axis] > extent) {
            return attn_fail(ATTN_ERR_SHAPE, "w has a kernel of %lld, expected 1 ... %lld: the padded image", (long long)e->kernel[axis],
                             (long long)extent);
        }
        e->cells[axis] = (extent - e->kernel[axis]) / e->stride + 1;
    }
    int64_t normed = p->norm == NORM_FIRST ? e->in : e->out;
    if (attn_dim(call, "Cn") != normed) {
        return attn_fail(ATTN_ERR_SHAPE, "ln_w has %lld numbers, expected %lld", (long long)attn_dim(call, "Cn"), (long long)normed);
    }
    return ATTN_OK;
}

static attn_status embed_bind(attn_call *call)
{
    attn_patch e;
    ATTN_TRY(embed_setup(call, &e));
    attn_set_dim(call, "Nout", e.cells[0] * e.cells[1]);
    return ATTN_OK;
}

static attn_status embed_forward(attn_call *call)
{
    const davit_params *p = call->params;
    attn_patch e;
    ATTN_TRY(embed_setup(call, &e));
    int64_t tokens = e.images * e.grid[0] * e.grid[1], cells = e.images * e.cells[0] * e.cells[1];
    float *x = attn_f32(call->t[E_X]), *o = attn_f32(call->t[E_O]), *ln_w = attn_f32(call->t[E_LN_W]), *ln_b = attn_f32(call->t[E_LN_B]);
    if (p->norm == NORM_FIRST) {
        float *normed;
        ATTN_TRY(attn_take_f32(call, tokens * e.in, &normed));
        attn_norm_forward(ATTN_NORM_LAYER, call->threads, tokens, e.in, NORM_EPS, x, ln_w, ln_b, normed);
        x = normed;
    }
    ATTN_TRY(attn_patch_forward(&e, call->arena, call->threads, x, attn_f32(call->t[E_W]), attn_f32(call->t[E_B]), o));
    if (p->norm == NORM_LAST) {
        attn_norm_forward(ATTN_NORM_LAYER, call->threads, cells, e.out, NORM_EPS, o, ln_w, ln_b, o);
    }
    return ATTN_OK;
}

static attn_status embed_backward(attn_call *call)
{
    const davit_params *p = call->params;
    attn_patch e;
    ATTN_TRY(embed_setup(call, &e));
    int64_t tokens = e.images * e.grid[0] * e.grid[1], cells = e.images * e.cells[0] * e.cells[1];
    const float *x = attn_f32(call->t[E_X]), *grad = attn_f32(call->grad[E_O]), *ln_w = attn_f32(call->t[E_LN_W]);
    float *normed, *through, *grad_w = attn_f32(call->grad[E_LN_W]), *grad_b = attn_f32(call->grad[E_LN_B]);
    if (p->norm == NORM_FIRST) {
        ATTN_TRY(attn_take_f32(call, tokens * e.in, &normed));
        ATTN_TRY(attn_take_f32(call, tokens * e.in, &through));
        attn_norm_forward(ATTN_NORM_LAYER, call->threads, tokens, e.in, NORM_EPS, x, ln_w, attn_f32(call->t[E_LN_B]), normed);
        ATTN_TRY(attn_patch_backward(&e, call->arena, call->threads, normed, attn_f32(call->t[E_W]), grad, through, attn_f32(call->grad[E_W]),
                                     attn_f32(call->grad[E_B])));
        return attn_norm_backward(ATTN_NORM_LAYER, call->arena, call->threads, tokens, e.in, NORM_EPS, x, ln_w, through,
                                  attn_f32(call->grad[E_X]), grad_w, grad_b);
    }
    ATTN_TRY(attn_take_f32(call, cells * e.out, &normed)); /* the convolution before its norm */
    ATTN_TRY(attn_take_f32(call, cells * e.out, &through));
    ATTN_TRY(attn_patch_forward(&e, call->arena, call->threads, x, attn_f32(call->t[E_W]), attn_f32(call->t[E_B]), normed));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_LAYER, call->arena, call->threads, cells, e.out, NORM_EPS, normed, ln_w, grad, through, grad_w,
                                grad_b));
    return attn_patch_backward(&e, call->arena, call->threads, x, attn_f32(call->t[E_W]), through, attn_f32(call->grad[E_X]),
                               attn_f32(call->grad[E_W]), attn_f32(call->grad[E_B]));
}

static attn_status embed_cost(attn_call *call, attn_cost *cost)
{
    attn_patch e;
    ATTN_TRY(embed_setup(call, &e));
    cost->flops = 2 * (double)(e.images * e.cells[0] * e.cells[1] * e.out) * (double)(e.in * e.kernel[0] * e.kernel[1]);
    return ATTN_OK;
}

const attn_op_class attn_op_davit_embed = {
    .info = {.name = "davit.embed",
             .title = "DaViT patch embedding and down-sampling",
             .summary = "A strided convolution that makes tokens of patches, with a layer norm before or after it: the stem and the steps between "
                        "stages.",
             .paper = ATTN_DAVIT_PAPER,
             .differentiable = 1,
             ATTN_TABLE(embed_params, embed_ports)},
    .params_size = sizeof(davit_params),
    .bind = embed_bind,
    .forward = embed_forward,
    .backward = embed_backward,
    .cost = embed_cost,
};
