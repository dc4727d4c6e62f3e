/* Based's windows (arXiv:2402.18668): exact attention to a token and a few tokens before it, with rotary positions.
 *
 * A task is a run of queries of one key head. Its keys are rotated and packed once; a few query rows at a time then see all their keys in
 * one step of the softmax. Windows that are wider than a run go through exact attention (attn/dense.h) on rotated copies.
 */
#include "kernel/tile.h"
#include "layer/rope.h"
#include "op/class.h"
#include <attn/dense.h>

#include <omp.h>
#include <string.h>

#define PAPER "arXiv:2402.18668"
#define RUN 1024     /* queries of a task */
#define WIDEST 512   /* window that is computed in runs */
#define STRIPE 12    /* queries that share their keys */
#define PACK 48      /* keys that are rotated and packed together */
#define SHARES 18    /* of what comes next, asked for while a stripe is computed */

typedef struct window_params {
    int64_t window, rotary_dim;
    double rotary_base, scale;
} window_params;

static const attn_param_info window_param_table[] = {
    ATTN_P_INT("window", window_params, window, NULL, 0, INFINITY, "keys before its own that each query sees"),
    ATTN_P_INT("rotary_dim", window_params, rotary_dim, "0", 0, INFINITY, "channels that are rotated; even, at most D; 0: none"),
    ATTN_P_FLOAT_OPEN("rotary_base", window_params, rotary_base, "10000", 0, 1, INFINITY, 0, "base of the rotary angles"),
    ATTN_P_SCALE_POSITIVE(window_params, scale),
};

static const attn_port_info window_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries, not rotated"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys, not rotated"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_NO_BACKWARD, "the attention output"),
};

enum { Q, K, V, O };

static attn_status window_bind(attn_call *call)
{
    const window_params *p = call->params;
    if (p->rotary_dim % 2 != 0 || p->rotary_dim > attn_dim(call, "D")) {
        return attn_fail(ATTN_ERR_ARGUMENT, "rotary_dim = %lld, expected an even number up to D = %lld", (long long)p->rotary_dim,
                         (long long)attn_dim(call, "D"));
    }
    return ATTN_OK;
}

/* Rows [rows of `count` tokens] rotated by position first + token, into `to` (which may be `from`), or back. */
static attn_status rotate(attn_call *call, int64_t heads, int64_t count, int64_t first, int inverse, const float *from, float *to)
{
    const window_params *p = call->params;
    int64_t d = attn_dim(call, "D");
    float *table = NULL;
    ATTN_TRY(attn_rope_table(call->arena, first, count, p->rotary_dim, p->rotary_base, &table));
    if (to != from) {
        memcpy(to, from, (size_t)(heads * count * d) * sizeof *to);
    }
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t r = 0; r < heads * count; r++) {
        attn_rope_apply(table + r % count * p->rotary_dim, p->rotary_dim, 0, inverse, to + r * d);
    }
    return ATTN_OK;
}

typedef struct window_work {
    float *q, *k;
    attn_dense_settings settings;
    attn_dense_inputs in;
} window_work;

static attn_status window_setup(attn_call *call, window_work *w)
{
    const window_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M"), batch = attn_dim(call, "B");
    *w = (window_work){.q = attn_f32(call->t[Q]), .k = attn_f32(call->t[K])};
    if (p->rotary_dim > 0) {
        ATTN_TRY(attn_take_f32(call, attn_tensor_count(call->t[Q]), &w->q));
        ATTN_TRY(attn_take_f32(call, attn_tensor_count(call->t[K]), &w->k));
        ATTN_TRY(rotate(call, batch * attn_dim(call, "H"), n, m - n, 0, attn_f32(call->t[Q]), w->q));
        ATTN_TRY(rotate(call, batch * attn_dim(call, "Hkv"), m, 0, 0, attn_f32(call->t[K]), w->k));
    }
    attn_dense_defaults(&w->settings);
    w->settings.causal = 1;
    w->settings.window[0] = p->window;
    w->settings.scale = p->scale;
    w->in = (attn_dense_inputs){.q = attn_tensor_make(w->q, ATTN_F32, 4, call->t[Q]->shape),
                                .k = attn_tensor_make(w->k, ATTN_F32, 4, call->t[K]->shape), .v = *call->t[V]};
    return ATTN_OK;
}

/* ---- In runs ---- */

typedef struct band {
    const attn_tile_kernels *kernels;
    int64_t batch, heads, kv_heads, n, m, d, dv, window, rotary_dim;
    float factor;           /* of scores in base 2 */
    const float *table;     /* of positions 0 ... m - 1 */
    const float *q, *k, *v;
    float *o;
    int64_t dp, vp, ld, lds; /* padded d and dv; a run's keys and a stripe's, padded */
} band;

/* A thread's memory. */
typedef struct worker {
    float *kt;     /* [d][ld]: the run's keys, transposed */
    float *values; /* [ld][vp]: its values, unless they are whole vectors as they lie */
    float *rows;   /* [PACK][dp]: keys or queries, rotated */
    float *s;      /* [STRIPE][lds] */
    int64_t loaded; /* the position of the first key that is not packed yet */
    float sum[STRIPE];
} worker;

static int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

static size_t worker_floats(const band *b)
{
    return (size_t)(b->d * b->ld + (b->vp == b->dv ? 0 : b->ld * b->vp) + PACK * b->dp + STRIPE * b->lds);
}

static void worker_init(worker *w, const band *b, float *memory)
{
    memset(memory, 0, worker_floats(b) * sizeof *memory); /* what pads rows is read */
    w->kt = memory;
    w->rows = w->kt + b->d * b->ld;
    w->s = w->rows + PACK * b->dp;
    w->values = w->s + STRIPE * b->lds;
}

/* Rows of positions first ..., rotated and scaled, into w->rows. */
static void load_rows(const band *b, worker *w, const float *from, int64_t first, int64_t count, float factor)
{
    for (int64_t r = 0; r < count; r++) {
        float *row = w->rows + r * b->dp;
        b->kernels->load_row(row, from + r * b->d, ATTN_F32, b->d, factor);
        if (b->rotary_dim > 0) {
            attn_rope_apply(b->table + (first + r) * b->rotary_dim, b->rotary_dim, 0, 0, row);
        }
    }
}

/* Pack keys of a key head until those before position `end` are there (`high`: where they end). low: the position of the first one. */
static void load_keys(const band *b, worker *w, int64_t kv, int64_t low, int64_t end, int64_t high)
{
    while (w->loaded < end) {
        int64_t j = w->loaded, count = attn_min_i64(PACK, high - j), row = kv * b->m + j;
        load_rows(b, w, b->k + row * b->d, j, count, 1);
        b->kernels->pack_transposed(w->kt + j - low, b->ld, w->rows, ATTN_F32, b->dp, count, b->d);
        for (int64_t r = 0; r < count && b->vp != b->dv; r++) {
            memcpy(w->values + (j - low + r) * b->vp, b->v + (row + r) * b->dv, (size_t)b->dv * sizeof *b->v);
        }
        w->loaded += count;
    }
}

/* `rows` queries at positions from i on. low: the position of the first packed key. */
static void attend(const band *b, worker *w, const float *q, int64_t i, int64_t rows, int64_t low, const float *values, int64_t ldv, float *o,
                   attn_ahead *ahead)
{
    int64_t first = attn_max_i64(low, i - b->window), skipped = first - low, keys = i + rows - first, count = padded(keys);
    int64_t nr = b->kernels->nr, mr = b->kernels->mr;
    load_rows(b, w, q, i, rows, b->factor);
    for (int64_t j = 0; j < count; j += nr) {
        b->kernels->product(rows, attn_min_i64(nr, count - j), b->d, w->rows, b->dp, 1, w->kt + skipped + j, b->ld, 0, w->s + j, b->lds, 0);
        attn_ahead_share(ahead);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *s = w->s + r * b->lds;
        for (int64_t c = 0; c < i + r - b->window - first; c++) {
            s[c] = -INFINITY;
        }
        for (int64_t c = i + r - first + 1; c < count; c++) {
            s[c] = -INFINITY;
        }
        float top = -INFINITY, alpha;
        w->sum[r] = 0;
        b->kernels->softmax(1, s, b->lds, count, &top, &w->sum[r], &alpha);
        attn_ahead_share(ahead);
    }
    for (int64_t r = 0; r < rows; r += mr) {
        b->kernels->product(attn_min_i64(mr, rows - r), b->dv, keys, w->s + r * b->lds, b->lds, 1, values + skipped * ldv, ldv, nr, o + r * b->dv,
                            b->dv, 0);
        attn_ahead_share(ahead);
    }
    for (int64_t r = 0; r < rows; r++) {
        b->kernels->scale(o + r * b->dv, b->dv, 1 / w->sum[r]);
    }
}

static void attend_run(const band *b, worker *w, int64_t kv, int64_t run)
{
    int64_t shift = b->m - b->n, group = b->heads / b->kv_heads;
    int64_t top = run * RUN, end = attn_min_i64(b->n, top + RUN);           /* queries, of which */
    int64_t blind = attn_min_i64(end, attn_max_i64(top, -shift));           /* those from here on see a key */
    int64_t low = attn_max_i64(0, blind + shift - b->window);
    int in_place = b->vp == b->dv;
    const float *k = b->k + kv * b->m * b->d, *v = b->v + kv * b->m * b->dv, *values = in_place ? v + low * b->dv : w->values;
    w->loaded = low;
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) { /* query heads of a key head are consecutive, across the batch too */
        const float *q = b->q + h * b->n * b->d;
        float *o = b->o + h * b->n * b->dv;
        memset(o + top * b->dv, 0, (size_t)((blind - top) * b->dv) * sizeof *o);
        for (int64_t r = blind; r < end; r += STRIPE) {
            int64_t rows = attn_min_i64(STRIPE, end - r), seen = r + shift + rows;
            load_keys(b, w, kv, low, seen, end + shift);
            int64_t next = attn_min_i64(STRIPE, end - r - rows), keys = h > kv * group ? 0 : attn_min_i64(STRIPE, end + shift - seen - PACK);
            attn_ahead ahead = {.shares = SHARES};
            attn_ahead_add(&ahead, q + (r + rows) * b->d, next * b->d);
            attn_ahead_add(&ahead, o + (r + rows) * b->dv, next * b->dv);
            attn_ahead_add(&ahead, k + (seen + PACK) * b->d, keys * b->d);
            attn_ahead_add(&ahead, v + (seen + PACK) * b->dv, keys * b->dv);
            attend(b, w, q + r * b->d, r + shift, rows, low, values, in_place ? b->dv : b->vp, o + r * b->dv, &ahead);
        }
    }
}

static attn_status attend_runs(attn_call *call)
{
    const window_params *p = call->params;
    band b = {.kernels = attn_tile_kernels_get(), .batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"),
              .n = attn_dim(call, "N"), .m = attn_dim(call, "M"), .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"), .window = p->window,
              .rotary_dim = p->rotary_dim, .q = attn_f32(call->t[Q]), .k = attn_f32(call->t[K]), .v = attn_f32(call->t[V]),
              .o = attn_f32(call->t[O])};
    b.factor = (float)(attn_default_scale(p->scale, b.d) * 1.44269504088896341);
    b.dp = padded(b.d);
    b.vp = padded(b.dv);
    /* A whole number of lines that is odd, so that a column's numbers do not compete for the same places of the cache. */
    b.ld = (padded(attn_min_i64(b.m, p->window + attn_min_i64(b.n, RUN)) + 16) / 16 | 1) * 16;
    b.lds = padded(p->window + STRIPE + 32);
    float *memory, *table = NULL;
    size_t each = worker_floats(&b);
    if (p->rotary_dim > 0) {
        ATTN_TRY(attn_rope_table(call->arena, 0, b.m, p->rotary_dim, p->rotary_base, &table));
    }
    b.table = table;
    ATTN_TRY(attn_take_f32(call, call->threads * (int64_t)each, &memory));
    int64_t runs = attn_ceil_div(b.n, RUN);
#pragma omp parallel num_threads(call->threads) if (call->threads > 1)
    {
        worker w;
        worker_init(&w, &b, memory + (size_t)omp_get_thread_num() * each);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < b.batch * b.kv_heads * runs; task++) {
            attend_run(&b, &w, task / runs, task % runs);
        }
    }
    return ATTN_OK;
}

static attn_status window_forward(attn_call *call)
{
    const window_params *p = call->params;
    window_work w;
    if (p->window <= WIDEST && attn_dim(call, "D") > 0 && attn_dim(call, "Dv") > 0) {
        return attend_runs(call);
    }
    ATTN_TRY(window_setup(call, &w));
    return attn_dense_forward(&w.settings, &w.in, call->t[O], NULL, &(attn_exec){.threads = call->threads, .arena = call->arena});
}

static attn_status window_backward(attn_call *call)
{
    window_work w;
    float *o_data, *lse_data;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M"), batch = attn_dim(call, "B"), heads = attn_dim(call, "H");
    const window_params *p = call->params;
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    ATTN_TRY(window_setup(call, &w));
    ATTN_TRY(attn_take_f32(call, attn_tensor_count(call->t[O]), &o_data));
    ATTN_TRY(attn_take_f32(call, batch * heads * n, &lse_data));
    attn_tensor o = attn_tensor_make(o_data, ATTN_F32, 4, call->t[O]->shape); /* not the caller's, which runs round otherwise */
    attn_tensor lse = attn_tensor_make(lse_data, ATTN_F32, 3, (int64_t[]){batch, heads, n});
    ATTN_TRY(attn_dense_forward(&w.settings, &w.in, &o, &lse, &exec));
    attn_dense_gradients to = {.q = call->grad[Q], .k = call->grad[K], .v = call->grad[V]};
    ATTN_TRY(attn_dense_backward(&w.settings, &w.in, &o, &lse, call->grad[O], &to, &exec));
    if (p->rotary_dim > 0 && call->grad[Q] != NULL) {
        ATTN_TRY(rotate(call, batch * heads, n, m - n, 1, attn_f32(call->grad[Q]), attn_f32(call->grad[Q])));
    }
    if (p->rotary_dim > 0 && call->grad[K] != NULL) {
        ATTN_TRY(rotate(call, batch * attn_dim(call, "Hkv"), m, 0, 1, attn_f32(call->grad[K]), attn_f32(call->grad[K])));
    }
    return ATTN_OK;
}

static attn_status window_cost(attn_call *call, attn_cost *cost)
{
    const window_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M");
    double pairs = 0;
    for (int64_t i = m - n; i < m; i++) {
        pairs += i >= 0 ? (double)attn_min_i64(i, p->window) + 1 : 0;
    }
    cost->pairs = pairs * (double)(attn_dim(call, "B") * attn_dim(call, "H"));
    cost->flops = 2 * cost->pairs * (double)(attn_dim(call, "D") + attn_dim(call, "Dv"));
    return ATTN_OK;
}

const attn_op_class attn_op_based_window = {
    .info = {.name = "based.window",
             .title = "Based: exact attention in a small window, with rotary positions",
             .summary = "Softmax attention to the token itself and `window` tokens before it, with rotary positions: the local half of Based.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(window_param_table, window_ports)},
    .params_size = sizeof(window_params),
    .bind = window_bind,
    .forward = window_forward,
    .backward = window_backward,
    .cost = window_cost,
};

