/* Haloed block attention (HaloNet, arXiv:2103.12731): an image is cut into blocks of queries, and all queries of a block share one window
 * of keys, the block and a halo around it, with 2-D relative position logits and strided queries. The attention itself is
 * exec/windows.h; the layer adds 1x1 projections and, instead of strides, pooling.
 */
#include "exec/windows.h"
#include "layer/linear.h"
#include "op/class.h"

#include <string.h>

enum { PAD_ZERO, PAD_MASK };

typedef struct halo_params {
    attn_ints grid, block, halo, query_stride, pos_step;
    double scale;
    int64_t scale_pos, padding, heads, down;
} halo_params;

#define GRID_PARAM ATTN_P_LIST(INTS, "grid", halo_params, grid, NULL, 1, ATTN_MOST_EXTENT, 2, 2, "rows and columns of the image; their product is N")
#define BLOCK_PARAM ATTN_P_LIST(INTS, "block", halo_params, block, NULL, 1, ATTN_MOST_STEP, 1, 2, "rows and columns of a block of queries, in pixels")
#define HALO_PARAM ATTN_P_LIST(INTS, "halo", halo_params, halo, NULL, 0, ATTN_MOST_STEP, 1, 2, "rows and columns of keys around a block on each side")
#define STRIDE_PARAM                                                                                                   \
    ATTN_P_LIST(INTS, "query_stride", halo_params, query_stride, "1", 1, ATTN_MOST_STEP, 1, 2,                         \
                "queries sit at pixels 0, s, 2s, ... of each axis; divides block")
#define STEP_PARAM                                                                                                     \
    ATTN_P_LIST(INTS, "pos_step", halo_params, pos_step, "null", 0, ATTN_MOST_STEP, 1, 2,                              \
                "pixels per query step in the relative offsets (default: query_stride, the true distance)")
#define SCALE_POS_PARAM ATTN_P_BOOL("scale_pos", halo_params, scale_pos, "false", "the relative logits are multiplied by scale too")
#define PADDING_PARAM                                                                                                  \
    ATTN_P_CHOICE("padding", halo_params, padding, "zero", "zero|mask",                                                \
                  "window slots outside the image: zero keys and values that take part, or left out")

static int64_t pair_of(const attn_ints *list, int axis) { return list->items[list->count > 1 ? axis : 0]; }

/* What all three operators check: the stride and the step. `stride` is that of the attention (1 when the layer pools). */
static attn_status fill_geometry(const halo_params *p, int pooled, attn_windows *w)
{
    static const char *const axes[2] = {"rows", "columns"};
    for (int axis = 0; axis < 2; axis++) {
        int64_t stride = pair_of(&p->query_stride, axis);
        w->block[axis] = pair_of(&p->block, axis);
        w->halo[axis] = pair_of(&p->halo, axis);
        if (w->block[axis] % stride != 0) {
            return attn_fail(ATTN_ERR_ARGUMENT, "block = %lld %s is not a multiple of query_stride = %lld", (long long)w->block[axis],
                             axes[axis], (long long)stride);
        }
        w->stride[axis] = pooled ? 1 : stride;
        w->step[axis] = p->pos_step.count > 0 ? pair_of(&p->pos_step, axis) : w->stride[axis];
        int64_t last = (w->block[axis] / w->stride[axis] - 1) * w->step[axis], most = attn_windows_extent(w, axis) - 1;
        if (last > most) {
            return attn_fail(ATTN_ERR_ARGUMENT, "pos_step = %lld puts the last query of a block at offset %lld of a window of %lld %s",
                             (long long)w->step[axis], (long long)last, (long long)(most + 1), axes[axis]);
        }
    }
    w->scale_relative = (int)p->scale_pos;
    w->masked = p->padding == PAD_MASK;
    return ATTN_OK;
}

static attn_status check_tables(const attn_call *call, int port_h, int port_w, const attn_windows *w)
{
    const char *names[2] = {"rel_h", "rel_w"};
    const attn_tensor *tables[2] = {call->t[port_h], call->t[port_w]};
    if ((tables[0] == NULL) != (tables[1] == NULL)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s is missing: rel_h and rel_w go together", tables[0] == NULL ? "rel_h" : "rel_w");
    }
    for (int axis = 0; axis < 2 && tables[axis] != NULL; axis++) {
        int64_t rows = 2 * attn_windows_extent(w, axis) - 1;
        if (tables[axis]->shape[0] != rows || tables[axis]->shape[1] != w->d) {
            return attn_fail(ATTN_ERR_SHAPE, "%s is [%lld, %lld], expected [%lld, %lld]: 2 * window - 1 rows of a head's width", names[axis],
                             (long long)tables[axis]->shape[0], (long long)tables[axis]->shape[1], (long long)rows, (long long)w->d);
        }
    }
    return ATTN_OK;
}

/* [B, heads, tokens, width], contiguous. */
static attn_windows_view by_head(float *data, int64_t heads, int64_t tokens, int64_t width)
{
    return (attn_windows_view){data, heads * tokens * width, tokens * width, width};
}

/* [B, tokens, heads * width], contiguous. */
static attn_windows_view by_token(float *data, int64_t heads, int64_t tokens, int64_t width)
{
    return (attn_windows_view){data, tokens * heads * width, width, heads * width};
}

/* ---- halo ---- */

static const attn_param_info halo_param_table[] = {GRID_PARAM, BLOCK_PARAM, HALO_PARAM, STRIDE_PARAM, STEP_PARAM,
                                                   ATTN_P_SCALE(halo_params, scale), SCALE_POS_PARAM, PADDING_PARAM};

enum { Q, K, V, REL_H, REL_W, O, LSE };

static const attn_port_info halo_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries on the output grid, row by row"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys on the image, row by row"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values on the image"),
    ATTN_IN("rel_h", "Th,D", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "relative row embeddings, 2*(block+2*halo)-1 rows, for all heads"),
    ATTN_IN("rel_w", "Tw,D", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "relative column embeddings"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output on the output grid"),
    ATTN_OUT("lse", "B,H,N", FLOAT, ATTN_PORT_F32, "log-sum-exp over all slots that take part"),
};

static attn_status halo_setup(const attn_call *call, attn_windows *w)
{
    const halo_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M");
    *w = (attn_windows){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"),
                        .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"), .grid = {p->grid.items[0], p->grid.items[1]},
                        .scale = attn_default_scale(p->scale, attn_dim(call, "D"))};
    if (w->grid[0] * w->grid[1] != m) {
        return attn_fail(ATTN_ERR_SHAPE, "grid = [%lld, %lld] does not hold the %lld keys", (long long)w->grid[0], (long long)w->grid[1],
                         (long long)m);
    }
    ATTN_TRY(fill_geometry(p, 0, w));
    int64_t out = attn_windows_out(w, 0) * attn_windows_out(w, 1);
    if (out != n) {
        return attn_fail(ATTN_ERR_SHAPE, "q has %lld queries, expected %lld: the output grid is [%lld, %lld]", (long long)n, (long long)out,
                         (long long)attn_windows_out(w, 0), (long long)attn_windows_out(w, 1));
    }
    ATTN_TRY(check_tables(call, REL_H, REL_W, w));
    w->q = by_head(attn_f32(call->t[Q]), w->heads, n, w->d);
    w->k = by_head(attn_f32(call->t[K]), w->kv_heads, m, w->d);
    w->v = by_head(attn_f32(call->t[V]), w->kv_heads, m, w->dv);
    w->rel_h = attn_f32(call->t[REL_H]);
    w->rel_w = attn_f32(call->t[REL_W]);
    return ATTN_OK;
}

static attn_status halo_bind(attn_call *call)
{
    attn_windows w;
    return halo_setup(call, &w);
}

static attn_status halo_forward(attn_call *call)
{
    attn_windows w;
    ATTN_TRY(halo_setup(call, &w));
    w.o = by_head(attn_f32(call->t[O]), w.heads, attn_dim(call, "N"), w.dv);
    w.lse = attn_wanted_f32(call, LSE);
    return attn_windows_forward(&w, call->arena, call->threads);
}

static attn_status halo_backward(attn_call *call)
{
    attn_windows w;
    ATTN_TRY(halo_setup(call, &w));
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M");
    w.o = by_head(attn_f32(call->t[O]), w.heads, n, w.dv);
    w.lse = attn_f32(call->t[LSE]);
    attn_windows_gradients grad = {.o = by_head(attn_f32(call->grad[O]), w.heads, n, w.dv),
                                   .q = by_head(attn_f32(call->grad[Q]), w.heads, n, w.d),
                                   .k = by_head(attn_f32(call->grad[K]), w.kv_heads, m, w.d),
                                   .v = by_head(attn_f32(call->grad[V]), w.kv_heads, m, w.dv),
                                   .rel_h = attn_f32(call->grad[REL_H]), .rel_w = attn_f32(call->grad[REL_W])};
    return attn_windows_backward(&w, &grad, call->arena, call->threads);
}

/* Slots that take part, summed over the queries of one head of one batch item. */
static double count_slots(const attn_windows *w)
{
    double along[2] = {0, 0};
    for (int axis = 0; axis < 2; axis++) {
        for (int64_t x = 0; x < w->grid[axis]; x += w->stride[axis]) {
            int64_t first = x / w->block[axis] * w->block[axis] - w->halo[axis], end = first + attn_windows_extent(w, axis);
            along[axis] += (double)(w->masked ? attn_min_i64(end, w->grid[axis]) - attn_max_i64(first, 0) : end - first);
        }
    }
    return along[0] * along[1];
}

static void windows_cost(const attn_windows *w, attn_cost *cost)
{
    double queries = (double)(w->batch * w->heads * attn_windows_out(w, 0) * attn_windows_out(w, 1));
    cost->pairs += (double)(w->batch * w->heads) * count_slots(w);
    cost->flops += 2 * (double)(w->batch * w->heads) * count_slots(w) * (double)(w->d + w->dv);
    if (w->rel_h != NULL) {
        cost->flops += 4 * queries * (double)((attn_windows_extent(w, 0) + attn_windows_extent(w, 1)) * w->d);
    }
}

static attn_status halo_cost(attn_call *call, attn_cost *cost)
{
    attn_windows w;
    ATTN_TRY(halo_setup(call, &w));
    windows_cost(&w, cost);
    return ATTN_OK;
}

const attn_op_class attn_op_halo = {
    .info = {.name = "halo",
             .title = "Haloed block attention over images",
             .summary = "All queries of a block of an image share one window of keys: the block and a halo around it. Cheaper than a window "
                        "centred on each pixel, because neighbours share their keys; with a stride of the queries it also reduces the "
                        "image. Costs 2 * queries * window * (D + Dv) operations per head.",
             .paper = "arXiv:2103.12731",
             .differentiable = 1,
             ATTN_TABLE(halo_param_table, halo_ports)},
    .params_size = sizeof(halo_params),
    .bind = halo_bind,
    .forward = halo_forward,
    .backward = halo_backward,
    .cost = halo_cost,
};

/* ---- halo.rel_logits ---- */

static const attn_param_info rel_param_table[] = {BLOCK_PARAM, HALO_PARAM, STRIDE_PARAM, STEP_PARAM};

enum { R_Q, R_H, R_W, R_LOGITS };

static const attn_port_info rel_ports[] = {
    ATTN_IN("q", "B,H,G,n,D", FLOAT, ATTN_PORT_DIFF, "queries of G blocks, row by row inside a block"),
    ATTN_IN("rel_h", "Th,D", FLOAT, ATTN_PORT_DIFF, "relative row embeddings"),
    ATTN_IN("rel_w", "Tw,D", FLOAT, ATTN_PORT_DIFF, "relative column embeddings"),
    ATTN_OUT("logits", "B,H,G,n,slots", FLOAT, ATTN_PORT_DIFF, "unscaled logits of the window's slots, row by row"),
};

static attn_status rel_setup(const attn_call *call, attn_windows *w)
{
    const halo_params *p = call->params;
    *w = (attn_windows){.d = attn_dim(call, "D")};
    ATTN_TRY(fill_geometry(p, 0, w));
    int64_t per_block = w->block[0] / w->stride[0] * (w->block[1] / w->stride[1]);
    if (attn_dim(call, "n") != per_block) {
        return attn_fail(ATTN_ERR_SHAPE, "q has %lld queries per block, expected %lld", (long long)attn_dim(call, "n"), (long long)per_block);
    }
    return check_tables(call, R_H, R_W, w);
}

static attn_status rel_bind(attn_call *call)
{
    attn_windows w;
    ATTN_TRY(rel_setup(call, &w));
    attn_set_dim(call, "slots", attn_windows_extent(&w, 0) * attn_windows_extent(&w, 1));
    return ATTN_OK;
}

/* Where slot (0, 0) lies in the table rows of query r of a block. */
static void table_bases(const attn_windows *w, int64_t r, int64_t base[2])
{
    int64_t columns = w->block[1] / w->stride[1];
    base[0] = attn_windows_extent(w, 0) - 1 - r / columns * w->step[0];
    base[1] = attn_windows_extent(w, 1) - 1 - r % columns * w->step[1];
}

static attn_status rel_forward(attn_call *call)
{
    attn_windows w;
    ATTN_TRY(rel_setup(call, &w));
    int64_t n = attn_dim(call, "n"), rows = attn_dim(call, "B") * attn_dim(call, "H") * attn_dim(call, "G") * n;
    int64_t wh = attn_windows_extent(&w, 0), ww = attn_windows_extent(&w, 1), th = 2 * wh - 1, tw = 2 * ww - 1;
    float *by_row = attn_scratch_f32(call, rows * th), *by_column = attn_scratch_f32(call, rows * tw);
    if (by_row == NULL || by_column == NULL) {
        return attn_fail_memory((size_t)(rows * (th + tw)) * sizeof(float));
    }
    const float *q = attn_f32(call->t[R_Q]);
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, w.d, th, q, attn_f32(call->t[R_H]), NULL, by_row));
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, w.d, tw, q, attn_f32(call->t[R_W]), NULL, by_column));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        int64_t base[2];
        table_bases(&w, r % n, base);
        float *to = attn_f32(call->t[R_LOGITS]) + r * wh * ww;
        for (int64_t a = 0; a < wh; a++, to += ww) {
            for (int64_t b = 0; b < ww; b++) {
                to[b] = by_row[r * th + base[0] + a] + by_column[r * tw + base[1] + b];
            }
        }
    }
    return ATTN_OK;
}

static attn_status rel_backward(attn_call *call)
{
    attn_windows w;
    ATTN_TRY(rel_setup(call, &w));
    int64_t n = attn_dim(call, "n"), rows = attn_dim(call, "B") * attn_dim(call, "H") * attn_dim(call, "G") * n;
    int64_t wh = attn_windows_extent(&w, 0), ww = attn_windows_extent(&w, 1), th = 2 * wh - 1, tw = 2 * ww - 1;
    float *by_row = attn_scratch_f32(call, rows * th), *by_column = attn_scratch_f32(call, rows * tw);
    float *grad_q = attn_f32(call->grad[R_Q]), *more = attn_scratch_f32(call, rows * w.d);
    if (by_row == NULL || by_column == NULL || more == NULL) {
        return attn_fail_memory((size_t)(rows * (th + tw)) * sizeof(float));
    }
    memset(by_row, 0, (size_t)(rows * th) * sizeof *by_row);
    memset(by_column, 0, (size_t)(rows * tw) * sizeof *by_column);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        int64_t base[2];
        table_bases(&w, r % n, base);
        const float *from = attn_f32(call->grad[R_LOGITS]) + r * wh * ww;
        for (int64_t a = 0; a < wh; a++, from += ww) {
            float sum = 0;
            for (int64_t b = 0; b < ww; b++) {
                sum += from[b];
                by_column[r * tw + base[1] + b] += from[b];
            }
            by_row[r * th + base[0] + a] = sum;
        }
    }
    const float *q = attn_f32(call->t[R_Q]);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, w.d, th, q, attn_f32(call->t[R_H]), by_row, grad_q,
                                  attn_f32(call->grad[R_H]), NULL));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, rows, w.d, tw, q, attn_f32(call->t[R_W]), by_column,
                                  grad_q != NULL ? more : NULL, attn_f32(call->grad[R_W]), NULL));
    for (int64_t i = 0; i < rows * w.d && grad_q != NULL; i++) {
        grad_q[i] += more[i];
    }
    return ATTN_OK;
}

const attn_op_class attn_op_halo_rel_logits = {
    .info = {.name = "halo.rel_logits",
             .title = "Haloed block attention: 2-D relative position logits",
             .summary = "The relative logits that halo adds to its scores, for the queries of blocks: a query's product with a row embedding "
                        "and with a column embedding, by the offset of each window slot.",
             .paper = "arXiv:2103.12731",
             .differentiable = 1,
             ATTN_TABLE(rel_param_table, rel_ports)},
    .params_size = sizeof(halo_params),
    .bind = rel_bind,
    .forward = rel_forward,
    .backward = rel_backward,
};

/* ---- halo.layer ---- */

enum { DOWN_STRIDE, DOWN_POOL };

static const attn_param_info layer_param_table[] = {
    ATTN_P_INT("heads", halo_params, heads, NULL, 1, INFINITY, "attention heads"),
    GRID_PARAM, BLOCK_PARAM, HALO_PARAM, STRIDE_PARAM, STEP_PARAM,
    ATTN_P_FLOAT_AUTO("scale", halo_params, scale, "1/sqrt(D)", -INFINITY, INFINITY, "multiplies q.k"),
    SCALE_POS_PARAM, PADDING_PARAM,
    ATTN_P_CHOICE("down", halo_params, down, "stride", "stride|pool",
                  "how query_stride reduces the image: strided queries, or attention everywhere and the mean of each cell"),
};

enum { X, W_Q, W_K, W_V, B_Q, B_K, B_V, L_REL_H, L_REL_W, W_O, B_O, Y };

static const attn_port_info layer_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "feature map, row by row"),
    ATTN_IN("w_q", "HD,C", FLOAT, ATTN_PORT_DIFF, "query projection, heads contiguous"),
    ATTN_IN("w_k", "HD,C", FLOAT, ATTN_PORT_DIFF, "key projection"),
    ATTN_IN("w_v", "HV,C", FLOAT, ATTN_PORT_DIFF, "value projection"),
    ATTN_IN("b_q", "HD", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "query bias"),
    ATTN_IN("b_k", "HD", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "key bias"),
    ATTN_IN("b_v", "HV", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "value bias"),
    ATTN_IN("rel_h", "Th,Dh", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "relative row embeddings"),
    ATTN_IN("rel_w", "Tw,Dh", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "relative column embeddings"),
    ATTN_IN("w_o", "Cout,HV", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "output projection"),
    ATTN_IN("b_o", "Cout", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "output bias"),
    ATTN_OUT("o", "B,Nout,Eout", FLOAT, ATTN_PORT_DIFF, "the layer's output on the reduced grid"),
};

typedef struct layer {
    attn_windows w;
    int pooled, strided;      /* pooled: the mean of cells; strided: queries come from a part of the pixels */
    int64_t n, queries, out;  /* pixels, queries of the attention, outputs */
    int64_t c, hd, hv;
    int64_t cell[2], cells[2];
} layer;

static attn_status layer_setup(const attn_call *call, layer *y)
{
    const halo_params *p = call->params;
    *y = (layer){.n = attn_dim(call, "N"), .c = attn_dim(call, "C"), .hd = attn_dim(call, "HD"), .hv = attn_dim(call, "HV"), .out = 1,
                 .queries = 1};
    if (y->hd % p->heads != 0 || y->hv % p->heads != 0 || y->hd < 1 || y->hv < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "w_q and w_v have %lld and %lld rows, expected multiples of heads = %lld", (long long)y->hd,
                         (long long)y->hv, (long long)p->heads);
    }
    y->w = (attn_windows){.batch = attn_dim(call, "B"), .heads = p->heads, .kv_heads = p->heads, .d = y->hd / p->heads,
                          .dv = y->hv / p->heads, .grid = {p->grid.items[0], p->grid.items[1]},
                          .scale = attn_default_scale(p->scale, y->hd / p->heads)};
    if (y->w.grid[0] * y->w.grid[1] != y->n) {
        return attn_fail(ATTN_ERR_SHAPE, "grid = [%lld, %lld] does not hold the %lld pixels of x", (long long)y->w.grid[0],
                         (long long)y->w.grid[1], (long long)y->n);
    }
    if (call->t[B_O] != NULL && call->t[W_O] == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "b_o needs w_o");
    }
    y->pooled = p->down == DOWN_POOL;
    ATTN_TRY(fill_geometry(p, y->pooled, &y->w));
    ATTN_TRY(check_tables(call, L_REL_H, L_REL_W, &y->w));
    for (int axis = 0; axis < 2; axis++) {
        y->cell[axis] = y->pooled ? pair_of(&p->query_stride, axis) : 1;
        y->cells[axis] = attn_windows_out(&y->w, axis) / y->cell[axis];
        y->queries *= attn_windows_out(&y->w, axis);
        y->out *= y->cells[axis];
        y->strided |= y->w.stride[axis] > 1;
    }
    y->w.rel_h = attn_f32(call->t[L_REL_H]);
    y->w.rel_w = attn_f32(call->t[L_REL_W]);
    return ATTN_OK;
}

static attn_status layer_bind(attn_call *call)
{
    layer y;
    ATTN_TRY(layer_setup(call, &y));
    attn_set_dim(call, "Nout", y.out);
    attn_set_dim(call, "Eout", call->t[W_O] != NULL ? attn_dim(call, "Cout") : y.hv);
    return ATTN_OK;
}

/* Rows of x where the queries sit [B, queries, C], or back: gradients are added. */
static void strided_rows(const layer *y, float *x, float *rows, int back)
{
    int64_t across = attn_windows_out(&y->w, 1);
    for (int64_t i = 0; i < y->w.batch * y->queries; i++) {
        int64_t q = i % y->queries, pixel = q / across * y->w.stride[0] * y->w.grid[1] + q % across * y->w.stride[1];
        float *at = x + (i / y->queries * y->n + pixel) * y->c;
        for (int64_t c = 0; c < y->c; c++) {
            if (back) {
                at[c] += rows[i * y->c + c];
            } else {
                rows[i * y->c + c] = at[c];
            }
        }
    }
}

/* Means of cells: o [B, queries, hv] to [B, out, hv], or the gradient back (o is overwritten). */
static void pool_cells(const layer *y, float *o, float *cells, int back)
{
    float share = 1 / (float)(y->cell[0] * y->cell[1]);
    int64_t rows = attn_windows_out(&y->w, 0), columns = attn_windows_out(&y->w, 1);
    memset(back ? o : cells, 0, (size_t)(y->w.batch * (back ? y->queries : y->out) * y->hv) * sizeof(float));
    for (int64_t b = 0; b < y->w.batch; b++) {
        for (int64_t i = 0; i < y->cells[0] * y->cell[0]; i++) {
            for (int64_t j = 0; j < y->cells[1] * y->cell[1]; j++) {
                float *pixel = o + ((b * rows + i) * columns + j) * y->hv;
                float *cell = cells + (b * y->out + i / y->cell[0] * y->cells[1] + j / y->cell[1]) * y->hv;
                for (int64_t c = 0; c < y->hv; c++) {
                    *(back ? &pixel[c] : &cell[c]) += share * (back ? cell[c] : pixel[c]);
                }
            }
        }
    }
}

/* What forward computes before the output projection. */
typedef struct inner {
    float *xq, *q, *k, *v, *o, *pooled, *lse; /* xq = x, pooled = o when there is nothing to do */
} inner;

static attn_status layer_inner(attn_call *call, layer *y, inner *t)
{
    int64_t batch = y->w.batch, queries = batch * y->queries, pixels = batch * y->n;
    float *x = attn_f32(call->t[X]);
    *t = (inner){.xq = y->strided ? attn_scratch_f32(call, queries * y->c) : x, .q = attn_scratch_f32(call, queries * y->hd),
                 .k = attn_scratch_f32(call, pixels * y->hd), .v = attn_scratch_f32(call, pixels * y->hv),
                 .o = attn_scratch_f32(call, queries * y->hv), .lse = attn_scratch_f32(call, queries * y->w.heads)};
    t->pooled = y->pooled ? attn_scratch_f32(call, batch * y->out * y->hv) : t->o;
    if (t->xq == NULL || t->q == NULL || t->k == NULL || t->v == NULL || t->o == NULL || t->lse == NULL || t->pooled == NULL) {
        return attn_fail_memory((size_t)(pixels * (y->hd + y->hv)) * sizeof(float));
    }
    if (y->strided) {
        strided_rows(y, x, t->xq, 0);
    }
    attn_arena *arena = call->arena;
    int threads = call->threads;
    ATTN_TRY(attn_linear_forward(arena, threads, queries, y->c, y->hd, t->xq, attn_f32(call->t[W_Q]), attn_f32(call->t[B_Q]), t->q));
    ATTN_TRY(attn_linear_forward(arena, threads, pixels, y->c, y->hd, x, attn_f32(call->t[W_K]), attn_f32(call->t[B_K]), t->k));
    ATTN_TRY(attn_linear_forward(arena, threads, pixels, y->c, y->hv, x, attn_f32(call->t[W_V]), attn_f32(call->t[B_V]), t->v));
    y->w.q = by_token(t->q, y->w.heads, y->queries, y->w.d);
    y->w.k = by_token(t->k, y->w.heads, y->n, y->w.d);
    y->w.v = by_token(t->v, y->w.heads, y->n, y->w.dv);
    y->w.o = by_token(t->o, y->w.heads, y->queries, y->w.dv);
    y->w.lse = t->lse;
    ATTN_TRY(attn_windows_forward(&y->w, arena, threads));
    if (y->pooled) {
        pool_cells(y, t->o, t->pooled, 0);
    }
    return ATTN_OK;
}

static attn_status layer_forward(attn_call *call)
{
    layer y;
    inner t;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(layer_inner(call, &y, &t));
    int64_t rows = y.w.batch * y.out;
    if (call->t[W_O] == NULL) {
        memcpy(attn_f32(call->t[Y]), t.pooled, (size_t)(rows * y.hv) * sizeof(float));
        return ATTN_OK;
    }
    return attn_linear_forward(call->arena, call->threads, rows, y.hv, attn_dim(call, "Cout"), t.pooled, attn_f32(call->t[W_O]),
                               attn_f32(call->t[B_O]), attn_f32(call->t[Y]));
}

static attn_status layer_backward(attn_call *call)
{
    layer y;
    inner t;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(layer_inner(call, &y, &t));
    attn_arena *arena = call->arena;
    int threads = call->threads;
    int64_t batch = y.w.batch, rows = batch * y.out, queries = batch * y.queries, pixels = batch * y.n;
    float *grad_pooled = attn_f32(call->grad[Y]), *grad_x = attn_f32(call->grad[X]);
    float *go = attn_scratch_f32(call, queries * y.hv), *gq = attn_scratch_f32(call, queries * y.hd);
    float *gk = attn_scratch_f32(call, pixels * y.hd), *gv = attn_scratch_f32(call, pixels * y.hv);
    float *more = attn_scratch_f32(call, pixels * y.c), *gp = attn_scratch_f32(call, rows * y.hv);
    if (go == NULL || gq == NULL || gk == NULL || gv == NULL || more == NULL || gp == NULL) {
        return attn_fail_memory((size_t)(pixels * (y.hd + y.hv + y.c)) * sizeof(float));
    }
    if (call->t[W_O] != NULL) {
        ATTN_TRY(attn_linear_backward(arena, threads, rows, y.hv, attn_dim(call, "Cout"), t.pooled, attn_f32(call->t[W_O]),
                                      attn_f32(call->grad[Y]), gp, attn_f32(call->grad[W_O]), attn_f32(call->grad[B_O])));
        grad_pooled = gp;
    }
    if (y.pooled) {
        pool_cells(&y, go, grad_pooled, 1);
    } else {
        go = grad_pooled;
    }
    memset(gk, 0, (size_t)(pixels * y.hd) * sizeof *gk);
    memset(gv, 0, (size_t)(pixels * y.hv) * sizeof *gv);
    attn_windows_gradients grad = {.o = by_token(go, y.w.heads, y.queries, y.w.dv), .q = by_token(gq, y.w.heads, y.queries, y.w.d),
                                   .k = by_token(gk, y.w.heads, y.n, y.w.d), .v = by_token(gv, y.w.heads, y.n, y.w.dv),
                                   .rel_h = attn_f32(call->grad[L_REL_H]), .rel_w = attn_f32(call->grad[L_REL_W])};
    ATTN_TRY(attn_windows_backward(&y.w, &grad, arena, threads));
    float *x = attn_f32(call->t[X]);
    ATTN_TRY(attn_linear_backward(arena, threads, pixels, y.c, y.hd, x, attn_f32(call->t[W_K]), gk, grad_x, attn_f32(call->grad[W_K]),
                                  attn_f32(call->grad[B_K])));
    ATTN_TRY(attn_linear_backward(arena, threads, pixels, y.c, y.hv, x, attn_f32(call->t[W_V]), gv, grad_x != NULL ? more : NULL,
                                  attn_f32(call->grad[W_V]), attn_f32(call->grad[B_V])));
    for (int64_t i = 0; i < pixels * y.c && grad_x != NULL; i++) {
        grad_x[i] += more[i];
    }
    ATTN_TRY(attn_linear_backward(arena, threads, queries, y.c, y.hd, t.xq, attn_f32(call->t[W_Q]), gq, grad_x != NULL ? more : NULL,
                                  attn_f32(call->grad[W_Q]), attn_f32(call->grad[B_Q])));
    if (grad_x != NULL) {
        strided_rows(&y, grad_x, more, 1);
    }
    return ATTN_OK;
}

static attn_status layer_cost(attn_call *call, attn_cost *cost)
{
    layer y;
    ATTN_TRY(layer_setup(call, &y));
    windows_cost(&y.w, cost);
    double batch = (double)y.w.batch, c = (double)y.c;
    cost->flops += 2 * batch * c * ((double)(y.queries * y.hd) + (double)(y.n * (y.hd + y.hv)));
    if (call->t[W_O] != NULL) {
        cost->flops += 2 * batch * (double)(y.out * y.hv * attn_dim(call, "Cout"));
    }
    return ATTN_OK;
}

const attn_op_class attn_op_halo_layer = {
    .info = {.name = "halo.layer",
             .title = "A haloed block attention layer",
             .summary = "halo between 1x1 projections: what replaces a 3x3 convolution in a residual network, with a receptive field that costs "
                        "no parameters. query_stride reduces the image, by strided queries or by the mean of cells.",
             .paper = "arXiv:2103.12731",
             .differentiable = 1,
             ATTN_TABLE(layer_param_table, layer_ports)},
    .params_size = sizeof(halo_params),
    .bind = layer_bind,
    .forward = layer_forward,
    .backward = layer_backward,
    .cost = layer_cost,
};
