/* RAT (arXiv:2507.04416): a gated linear recurrence inside chunks, softmax attention across them.
 *
 * A token sees the last recurrent key and value of every earlier chunk, a staircase of N/L keys, and the running pair of its own
 * chunk as one more key of its own. The chunk ends are found first, and nothing else is kept: blocks of queries run the recurrence of
 * their tokens again, from the caches. The backward pass goes back through tiles of tokens and computes each again.
 */
#include "op/rat.h"

#include "exec/softmax.h"
#include "kernel/rows.h"
#include "kernel/scan.h"
#include "kernel/tile.h"
#include "layer/rope.h"

#include <string.h>

#define DIFF ATTN_PORT_DIFF
#define TILE 1048576 /* numbers of all arrays of a tile of backward */
#define SCAN_WIDTH 64 /* channels of a task of rat.scan */

/* ---- The core ---- */

static int64_t source_head(const rat_core *x, int64_t h, int64_t shared)
{
    return x->tiled ? h % shared : h / (x->heads / shared);
}

attn_status attn_rat_core_open(attn_call *call, rat_core *x)
{
    int64_t all = x->batch * x->heads, d = x->d, half = x->rotary_dim / 2, given = x->steps / x->chunk;
    size_t bytes = (size_t)(all * d) * sizeof(float);
    x->ends = (x->steps + x->n) / x->chunk;
    if (x->k_end == NULL) {
        ATTN_TRY(attn_take_f32(call, all * x->ends * d, &x->k_end));
        ATTN_TRY(attn_take_f32(call, all * x->ends * d, &x->v_end));
    }
    ATTN_TRY(attn_take_f32(call, all * d, &x->k_last));
    ATTN_TRY(attn_take_f32(call, all * d, &x->v_last));
    int64_t turns = (x->steps + x->n) / x->chunk - given + 1;
    float *pairs;
    ATTN_TRY(attn_take_f32(call, turns * 3 * half, &x->table));
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    ATTN_TRY(attn_rope_table(call->arena, given, turns, x->rotary_dim, x->base, &pairs));
    for (int64_t t = 0; t < turns; t++) {
        float *to = x->table + t * 3 * half;
        memcpy(to, pairs + t * 2 * half, (size_t)(2 * half) * sizeof *to);
        for (int64_t j = 0; j < half; j++) {
            to[2 * half + j] = -to[half + j];
        }
    }
    attn_arena_release(call->arena, mark);
    memset(x->k_last, 0, bytes);
    memset(x->v_last, 0, bytes);
    if (x->k_start != NULL && x->v_start != NULL) {
        memcpy(x->k_last, x->k_start, bytes);
        memcpy(x->v_last, x->v_start, bytes);
    }
    for (int64_t bh = 0; bh < (given > 0 && x->k_end != x->k_given ? all : 0); bh++) {
        memcpy(x->k_end + bh * x->ends * d, x->k_given + bh * given * d, (size_t)(given * d) * sizeof(float));
        memcpy(x->v_end + bh * x->ends * d, x->v_given + bh * given * d, (size_t)(given * d) * sizeof(float));
    }
    return ATTN_OK;
}

/* Turn rows that belong to one chunk, or back. */
static void turn(const rat_core *x, int64_t chunk, int back, float *rows, int64_t count)
{
    int64_t half = x->rotary_dim / 2;
    const float *table = x->table + (chunk - x->steps / x->chunk) * 3 * half;
    if (chunk > 0) {
        ATTN_KERNEL_SELECT(attn_row_kernels_table, attn_isa_current())->rotate(rows, count, x->d, half, table, table + (back ? 2 : 1) * half);
    }
}

/* Tokens that go through together: recurrent keys and values (keys turned), turned queries, [B*H][count][d] each. */
typedef struct tile {
    float *k, *v, *q;
    int64_t *end; /* [count]: chunks before a token's own */
} tile;

static attn_status tile_create(attn_call *call, const rat_core *x, int64_t count, tile *w)
{
    int64_t size = x->batch * x->heads * count * x->d;
    ATTN_TRY(attn_take_f32(call, size, &w->k));
    ATTN_TRY(attn_take_f32(call, size, &w->v));
    ATTN_TRY(attn_take_f32(call, size, &w->q));
    w->end = attn_arena_array(call->arena, (size_t)count, sizeof *w->end);
    return w->end != NULL ? ATTN_OK : attn_fail_memory((size_t)count * sizeof *w->end);
}

/* Pieces of [t, end) that lie in one chunk: its number, and whether the recurrence starts there. */
static int64_t piece(const rat_core *x, int64_t t, int64_t end, int64_t *chunk)
{
    *chunk = (x->steps + t) / x->chunk;
    return attn_min_i64(x->chunk - (x->steps + t) % x->chunk, end - t);
}

/* Rows of head h of batch item b among `shared` heads. */
static int64_t rows_at(const rat_core *x, int64_t bh, int64_t shared, int64_t stride)
{
    return (bh / x->heads * shared + source_head(x, bh % x->heads, shared)) * stride * x->d;
}

/* Keys or values of `count` tokens of one chunk; before: of the token before them. */
static void run_pair(const rat_core *x, int64_t count, const float *k, const float *v, const float *g, const float *k_before,
                     const float *v_before, int64_t ld_k, float *kr, int64_t ld_v, float *vr)
{
    const attn_scan_kernels *kernels = attn_scan_kernels_get();
    kernels->average(count, x->d, x->d, k, g, k_before, ld_k, kr);
    kernels->average(count, x->d, x->d, v, g, v_before, ld_v, vr);
}

/* The running pair is that before token t: where a chunk ends, its end too. */
static void keep_end(const rat_core *x, int64_t bh, int64_t t, int64_t chunk)
{
    int64_t at = (bh * x->ends + chunk) * x->d;
    if ((x->steps + t) % x->chunk == 0) {
        memcpy(x->k_end + at, x->k_last + bh * x->d, (size_t)x->d * sizeof(float));
        memcpy(x->v_end + at, x->v_last + bh * x->d, (size_t)x->d * sizeof(float));
        turn(x, chunk, 0, x->k_end + at, 1);
    }
}

/* One head: chunk ends, the running pair, and with `starts` the pair before each block of rows. */
static void find_ends(const rat_core *x, const rat_rows *r, float *starts, int64_t bh)
{
    int64_t d = x->d, own = bh * r->stride * d, end = r->first + r->count, blocks = attn_ceil_div(r->count, ATTN_STAIRS_BLOCK);
    const float *k = r->k + rows_at(x, bh, x->k_heads, r->stride), *v = r->v + own, *g = r->g + own;
    float *k_last = x->k_last + bh * d, *v_last = x->v_last + bh * d;
    size_t bytes = (size_t)d * sizeof(float);
    for (int64_t t = r->first, count, chunk; t < end; t += count) {
        int64_t row = t - r->first, at = row * d, block = row / ATTN_STAIRS_BLOCK;
        count = piece(x, t, attn_min_i64(end, r->first + (block + 1) * ATTN_STAIRS_BLOCK), &chunk);
        if (starts != NULL && row % ATTN_STAIRS_BLOCK == 0) {
            memcpy(starts + (bh * blocks + block) * 2 * d, k_last, bytes);
            memcpy(starts + ((bh * blocks + block) * 2 + 1) * d, v_last, bytes);
        }
        int fresh = (x->steps + t) % x->chunk == 0;
        run_pair(x, count, k + at, v + at, g + at, fresh ? NULL : k_last, fresh ? NULL : v_last, 0, k_last, 0, v_last);
        keep_end(x, bh, t + count, chunk);
    }
}

static void find_all_ends(attn_call *call, const rat_core *x, const rat_rows *r, float *starts)
{
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t bh = 0; bh < x->batch * x->heads; bh++) {
        find_ends(x, r, starts, bh);
    }
}

/* One head of a tile of whole chunks: recurrent keys and values, and queries. */
static void recur(const rat_core *x, const rat_rows *r, const tile *w, int64_t bh)
{
    int64_t d = x->d, own = bh * r->stride * d, end = r->first + r->count, to = bh * r->count * d;
    const float *k = r->k + rows_at(x, bh, x->k_heads, r->stride), *v = r->v + own, *g = r->g + own;
    memcpy(w->q + to, r->q + rows_at(x, bh, x->q_heads, r->stride), (size_t)(r->count * d) * sizeof(float));
    for (int64_t t = r->first, count, chunk; t < end; t += count) {
        count = piece(x, t, end, &chunk);
        int64_t at = (t - r->first) * d;
        run_pair(x, count, k + at, v + at, g + at, NULL, NULL, d, w->k + to + at, d, w->v + to + at);
        /* Queries are turned for the chunk ends, so the running key is turned with them: their product stays as it was. */
        turn(x, chunk, 0, w->k + to + at, count);
        turn(x, chunk, 0, w->q + to + at, count);
    }
}

/* The attention of some tokens to the chunk ends before them, still without own keys. */
static void list_heads(const rat_core *x, const rat_rows *r, int64_t *end, attn_stairs_head *list, attn_stairs *stairs)
{
    int64_t all = x->batch * x->heads;
    for (int64_t t = 0; t < r->count; t++) {
        end[t] = (x->steps + r->first + t) / x->chunk;
    }
    *stairs = (attn_stairs){.keys = end[r->count - 1], .d = x->d, .dv = x->d, .kv_count = all, .head_count = all, .scale = x->scale, .heads = list};
    for (int64_t bh = 0; bh < all; bh++) {
        int64_t at = bh * x->ends * x->d;
        list[bh] = (attn_stairs_head){.rows = r->count, .kv = bh, .q = r->q + rows_at(x, bh, x->q_heads, r->stride), .end = end, .k = x->k_end + at,
                                      .v = x->v_end + at, .o = r->o + bh * r->stride * x->d};
    }
}

/* Tokens [first, first + count) of `rows`. */
static rat_rows part_of(const rat_core *x, const rat_rows *rows, int64_t first, int64_t count)
{
    int64_t at = (first - rows->first) * x->d;
    return (rat_rows){first, count, rows->stride, rows->q + at, rows->k + at, rows->v + at, rows->g + at, rows->o != NULL ? rows->o + at : NULL};
}

/* What begin() needs. */
typedef struct forward_part {
    const rat_core *x;
    rat_rows rows;
    float *starts; /* [B*H][blocks][2][d]: the running pair before each block; NULL: blocks come in order and find the ends, too */
} forward_part;

/* See attn_stairs_begin. */
static void begin(const void *user, int64_t bh, int64_t first, int64_t rows, float *q, float *o, int64_t stride, float *m)
{
    const forward_part *p = user;
    const rat_core *x = p->x;
    const rat_rows *r = &p->rows;
    int64_t d = x->d, own = (bh * r->stride + first) * d, blocks = attn_ceil_div(r->count, ATTN_STAIRS_BLOCK);
    int64_t at_q = rows_at(x, bh, x->q_heads, r->stride) + first * d, at_k = rows_at(x, bh, x->k_heads, r->stride) + first * d;
    float *k_state = x->k_last + bh * d, *v_state = x->v_last + bh * d;
    if (p->starts != NULL) {
        k_state = p->starts + (bh * blocks + first / ATTN_STAIRS_BLOCK) * 2 * d;
        v_state = k_state + d;
    }
    for (int64_t i = 0, count, chunk; i < rows; i += count) {
        int64_t t = r->first + first + i;
        count = piece(x, t, r->first + first + rows, &chunk);
        if ((x->steps + t) % x->chunk == 0) {
            memset(k_state, 0, (size_t)d * sizeof(float));
            memset(v_state, 0, (size_t)d * sizeof(float));
        }
        attn_scan_kernels_get()->gated(&(attn_scan_gated){count, d, stride, r->q + at_q + i * d, r->k + at_k + i * d, r->v + own + i * d, r->g + own + i * d,
                                                          (float)(x->scale * ATTN_LOG2E), k_state, v_state, q + i * d, o + i * stride, m + i});
        turn(x, chunk, 0, q + i * d, count);
        if (p->starts == NULL) {
            keep_end(x, bh, t + count, chunk);
        }
    }
}

attn_status attn_rat_core_forward(attn_call *call, rat_core *x, const rat_rows *rows)
{
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    int64_t heads = x->batch * x->heads;
    attn_stairs_head *list = attn_arena_array(call->arena, (size_t)heads, sizeof *list);
    int64_t *end = attn_arena_array(call->arena, (size_t)rows->count, sizeof *end);
    forward_part p = {.x = x, .rows = *rows};
    attn_stairs stairs;
    if (list == NULL || end == NULL) {
        return attn_fail_memory((size_t)heads * sizeof *list + (size_t)rows->count * sizeof *end);
    }
    if (heads == 0 || rows->count == 0) {
        return ATTN_OK;
    }
    list_heads(x, rows, end, list, &stairs);
    stairs.begin = begin;
    stairs.user = &p;
    /* A thread for each head reads everything once. */
    stairs.in_order = heads % call->threads == 0 || heads > 4 * call->threads;
    if (!stairs.in_order) {
        ATTN_TRY(attn_take_f32(call, heads * attn_ceil_div(rows->count, ATTN_STAIRS_BLOCK) * 2 * x->d, &p.starts));
        find_all_ends(call, x, rows, p.starts);
    }
    ATTN_TRY(attn_stairs_forward(&stairs, call->arena, call->threads));
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* What one tile's backward needs beside its forward. */
typedef struct back_tile {
    float *q, *k, *v, *g;     /* gradients, [B*H][count][d] */
    float *o, *lse;           /* of the forward pass */
    float *k_part, *v_part;   /* [B*H][keys][d]: of the chunk ends that the tile sees */
    float *k_end, *v_end;     /* [B*H][ends][d]: their sums over the tiles that follow */
    attn_stairs_head *list;
    attn_stairs_gradient *gradients;
} back_tile;

/* One head of a tile, after the attention's backward: through the ends and the recurrence. */
static void recur_back(const rat_core *x, const rat_rows *r, const tile *w, const back_tile *y, int64_t keys, const rat_gradients *grad, int64_t bh)
{
    const attn_scan_kernels *kernels = attn_scan_kernels_get();
    const attn_tile_kernels *tiles = attn_tile_kernels_get();
    int64_t d = x->d, size = r->count * d, end = r->first + r->count;
    float *dq = y->q + bh * size, *dk = y->k + bh * size, *dv = y->v + bh * size, *dg = y->g + bh * size, *kr = w->k + bh * size;
    const float *k = r->k + rows_at(x, bh, x->k_heads, r->stride), *v = r->v + bh * r->stride * d, *g = r->g + bh * r->stride * d;
    float *k_end = y->k_end + bh * x->ends * d, *v_end = y->v_end + bh * x->ends * d;
    tiles->axpy(k_end, y->k_part + bh * keys * d, keys * d, 1);
    tiles->axpy(v_end, y->v_part + bh * keys * d, keys * d, 1);
    for (int64_t t = r->first, count, chunk; t < end; t += count) {
        count = piece(x, t, end, &chunk);
        int64_t at = (t - r->first) * d, last = at + (count - 1) * d;
        if (chunk < x->ends) {
            tiles->axpy(dk + last, k_end + chunk * d, d, 1);
            tiles->axpy(dv + last, v_end + chunk * d, d, 1);
        }
        turn(x, chunk, 1, dq + at, count);
        turn(x, chunk, 1, dk + at, count);
        turn(x, chunk, 1, kr + at, count);
        kernels->average_back(count, d, k + at, g + at, NULL, kr + at, dk + at, dk + at, dg + at, 0);
        kernels->average_back(count, d, v + at, g + at, NULL, w->v + bh * size + at, dv + at, dv + at, dg + at, 1);
    }
    int64_t own = bh * r->stride * d + r->first * d;
    if (grad->v != NULL) {
        memcpy(grad->v + own, dv, (size_t)size * sizeof(float));
    }
    if (grad->g != NULL) {
        memcpy(grad->g + own, dg, (size_t)size * sizeof(float));
    }
}

/* Heads that share a query or key head add up, in order. */
static void share(attn_call *call, const rat_core *x, const rat_rows *r, const float *from, int64_t shared, float *to)
{
    int64_t size = r->count * x->d;
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < (to != NULL ? x->batch * shared : 0); i++) {
        for (int64_t h = 0; h < x->heads; h++) {
            if (source_head(x, h, shared) == i % shared) {
                attn_tile_kernels_get()->axpy(to + (i * r->stride + r->first) * x->d, from + (i / shared * x->heads + h) * size, size, 1);
            }
        }
    }
}

static attn_status back_memory(attn_call *call, const rat_core *x, int64_t step, back_tile *y)
{
    int64_t all = x->batch * x->heads, size = all * step * x->d, ends = all * x->ends * x->d;
    float **parts[] = {&y->q, &y->k, &y->v, &y->g, &y->o, &y->k_part, &y->v_part, &y->k_end, &y->v_end};
    for (int i = 0; i < 9; i++) {
        ATTN_TRY(attn_take_f32(call, i < 5 ? size : ends, parts[i]));
    }
    memset(y->k_end, 0, (size_t)ends * sizeof(float));
    memset(y->v_end, 0, (size_t)ends * sizeof(float));
    ATTN_TRY(attn_take_f32(call, all * step, &y->lse));
    y->list = attn_arena_array(call->arena, (size_t)all, sizeof *y->list);
    y->gradients = attn_arena_array(call->arena, (size_t)all, sizeof *y->gradients);
    return y->list != NULL && y->gradients != NULL ? ATTN_OK : attn_fail_memory((size_t)all * sizeof *y->list);
}

attn_status attn_rat_core_backward(attn_call *call, rat_core *x, const rat_rows *rows, const rat_gradients *grad)
{
    /* Tiles of whole chunks: nothing flows back from one to the one before but through the ends. */
    int64_t all = x->batch * x->heads, most = attn_max_i64(64, TILE / attn_max_i64(1, all * x->d * 8));
    int64_t step = attn_max_i64(1, attn_min_i64(x->n, attn_ceil_div(most, x->chunk) * x->chunk));
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    tile w;
    back_tile y;
    attn_stairs stairs;
    ATTN_TRY(attn_rat_core_open(call, x));
    ATTN_TRY(tile_create(call, x, step, &w));
    ATTN_TRY(back_memory(call, x, step, &y));
    find_all_ends(call, x, rows, NULL);
    for (int64_t t = x->n > 0 && all > 0 ? (x->n - 1) / step * step : -1; t >= 0; t -= step) {
        rat_rows part = part_of(x, rows, t, attn_min_i64(step, x->n - t)), inner = part;
        int64_t size = part.count * x->d;
        inner.o = y.o;
        inner.stride = part.count;
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
        for (int64_t bh = 0; bh < all; bh++) {
            recur(x, &part, &w, bh);
        }
        list_heads(x, &inner, w.end, y.list, &stairs);
        for (int64_t bh = 0; bh < all; bh++) {
            y.list[bh].q = w.q + bh * size;
            y.list[bh].own_k = w.k + bh * size;
            y.list[bh].own_v = w.v + bh * size;
            y.list[bh].lse = y.lse + bh * part.count;
            y.gradients[bh] = (attn_stairs_gradient){.grad_o = grad->o + (bh * rows->stride + t) * x->d, .q = y.q + bh * size,
                                                     .own_k = y.k + bh * size, .own_v = y.v + bh * size};
        }
        ATTN_TRY(attn_stairs_forward(&stairs, call->arena, call->threads));
        ATTN_TRY(attn_stairs_backward(&stairs, y.gradients, y.k_part, y.v_part, call->arena, call->threads));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
        for (int64_t bh = 0; bh < all; bh++) {
            recur_back(x, &part, &w, &y, stairs.keys, grad, bh);
        }
        share(call, x, &part, y.q, x->q_heads, grad->q);
        share(call, x, &part, y.k, x->k_heads, grad->k);
    }
    attn_arena_release(call->arena, mark);
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
                    .rotary_dim = p->rotary_dim, .steps = p->steps, .tiled = p->head_map == 1, .base = p->rotary_base};
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

/* All tokens; the chunk ends are made where they are wanted. */
static attn_status run(attn_call *call, rat_core *x, int o, int k_end)
{
    rat_rows rows = {0, x->n, x->n, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]), attn_f32(call->t[G]), attn_f32(call->t[o])};
    size_t bytes = (size_t)(x->batch * x->heads * x->d) * sizeof(float);
    x->k_end = attn_f32(call->t[k_end]);
    x->v_end = attn_f32(call->t[k_end + 1]);
    if (call->spare[k_end] && call->spare[k_end + 1] && (x->steps + x->n) / x->chunk == x->steps / x->chunk) {
        x->k_end = (float *)(uintptr_t)x->k_given; /* nothing is added, and nobody wants a copy */
        x->v_end = (float *)(uintptr_t)x->v_given;
    }
    ATTN_TRY(attn_rat_core_open(call, x));
    ATTN_TRY(attn_rat_core_forward(call, x, &rows));
    memcpy(call->t[k_end + 2]->data, x->k_last, bytes);
    memcpy(call->t[k_end + 3]->data, x->v_last, bytes);
    return ATTN_OK;
}

static attn_status rat_forward(attn_call *call)
{
    rat_core x;
    ATTN_TRY(rat_setup(call, &x));
    return run(call, &x, O, K_END);
}

static attn_status rat_backward(attn_call *call)
{
    rat_core x;
    ATTN_TRY(rat_setup(call, &x));
    rat_rows rows = {0, x.n, x.n, attn_f32(call->t[Q]), attn_f32(call->t[K]), attn_f32(call->t[V]), attn_f32(call->t[G]), NULL};
    rat_gradients g = {attn_f32(call->grad[O]), attn_f32(call->grad[Q]), attn_f32(call->grad[K]), attn_f32(call->grad[V]),
                       attn_f32(call->grad[G])};
    return attn_rat_core_backward(call, &x, &rows, &g);
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
    x.k_given = attn_f32(call->t[D_K_END]);
    x.v_given = attn_f32(call->t[D_V_END]);
    x.k_start = attn_f32(call->t[D_K_LAST]);
    x.v_start = attn_f32(call->t[D_V_LAST]);
    return run(call, &x, D_O, D_OUT);
}

const attn_op_class attn_op_rat_decode = {
    .info = {.name = "rat.decode",
             .title = "RAT for new tokens, with state",
             .summary = "Continues rat from its state: the ends of complete chunks and the running key and value. A token reads 1/chunk of the "
                        "cache that attention would; ask for k_end and v_end only where a chunk ends, they are copies.",
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
    int64_t pieces = attn_ceil_div(width, SCAN_WIDTH), chunk = p->chunk > 0 ? p->chunk : attn_max_i64(1, n);
#pragma omp parallel for num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < attn_dim(call, "B") * pieces; i++) {
        int64_t b = i / pieces, c = i % pieces * SCAN_WIDTH, some = attn_min_i64(SCAN_WIDTH, width - c);
        for (int64_t t = 0; t < n; t += chunk) {
            int64_t at = (b * n + t) * width + c;
            attn_scan_kernels_get()->average(attn_min_i64(chunk, n - t), some, width, attn_f32(call->t[S_X]) + at, attn_f32(call->t[S_G]) + at,
                                             state != NULL ? state + b * width + c : NULL, width, attn_f32(call->t[S_O]) + at);
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
