/* Exact top-k attention: each query, or block of queries, attends only to the keys, or key blocks, that get most of its attention. As a
 * selector it is an oracle (all scores are computed first, a strip of rows at a time): the quality that approximations are measured by. */
#include "op/class.h"
#include "kernel/tile.h"
#include "layer/gemm.h"
#include "plan/plan.h"

#include <omp.h>
#include <string.h>

#define STRIP 32 /* query rows whose scores are held at a time */

typedef struct topk_params {
    int64_t top_k, causal, share_group, block_q, block_k;
    double scale;
} topk_params;

#define CAUSAL_PARAM ATTN_P_BOOL("causal", topk_params, causal, "true", "key j is visible to query n only if j <= n + M - N")

static const attn_param_info params[] = {
    ATTN_P_INT("top_k", topk_params, top_k, NULL, 1, INFINITY, "keys kept per query; all visible ones when there are fewer"),
    CAUSAL_PARAM,
    ATTN_P_SCALE(topk_params, scale),
    ATTN_P_BOOL("share_group", topk_params, share_group, "false",
                "one selection per key/value head, by the probabilities of its query heads summed"),
};

static const attn_param_info blocks_params[] = {
    ATTN_P_INT("block_q", topk_params, block_q, "64", 1, INFINITY, "queries of a block; the last one may be short"),
    ATTN_P_INT("block_k", topk_params, block_k, "64", 1, INFINITY, "keys of a block; the last one may be short"),
    ATTN_P_INT("top_k", topk_params, top_k, NULL, 1, INFINITY, "key blocks kept per query block"),
    CAUSAL_PARAM,
    ATTN_P_SCALE(topk_params, scale),
};

enum { Q, K, V, O, LSE, SELECTION };

#define QKV_PORTS                                                                                                      \
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries"),                                                         \
        ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys; query head h reads head h / (H/Hkv)"),                 \
        ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values"),                                                   \
        ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),                                      \
        ATTN_OUT("lse", "B,H,N", FLOAT, 0, "log-sum-exp over the kept keys")

static const attn_port_info ports[] = {
    QKV_PORTS,
    ATTN_OUT("indices", "B,lists,N,kept", INT, 0,
             "kept key positions, ascending, -1 in unused slots; one list per query head, or per key/value head with share_group"),
};

static const attn_port_info blocks_ports[] = {
    QKV_PORTS,
    ATTN_OUT("blocks", "B,H,nq,kept", INT, 0, "kept key blocks per query block, ascending, -1 in unused slots"),
};

/* ---- Selection ---- */

/* The k-th largest of count numbers (1 <= k <= count, no NaN), which are reordered. */
static double kth_largest(double *x, int64_t count, int64_t k)
{
    int64_t low = 0, high = count - 1, want = k - 1;
    while (low < high) {
        double pivot = x[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) {
                i++;
            }
            while (x[j] < pivot) {
                j--;
            }
            if (i <= j) {
                double swap = x[i];
                x[i++] = x[j];
                x[j--] = swap;
            }
        }
        if (want <= j) {
            high = j;
        } else if (want >= i) {
            low = i;
        } else {
            break;
        }
    }
    return x[want];
}

/* The k largest of x as ascending indices, ties to the lower one; -1 in unused slots. copy: scratch of count. */
static void keep_largest(const double *x, int64_t count, int64_t k, double *copy, int64_t *kept, int64_t slots)
{
    int64_t used = 0;
    if (count > k) {
        memcpy(copy, x, (size_t)count * sizeof *copy);
        double limit = kth_largest(copy, count, k);
        int64_t ties = k;
        for (int64_t j = 0; j < count; j++) {
            ties -= x[j] > limit;
        }
        for (int64_t j = 0; j < count && used < slots; j++) {
            if (x[j] > limit || (x[j] == limit && ties-- > 0)) {
                kept[used++] = j;
            }
        }
    } else {
        for (; used < count; used++) {
            kept[used] = used;
        }
    }
    while (used < slots) {
        kept[used++] = -1;
    }
}

static int64_t visible(const attn_call *call, int64_t n)
{
    const topk_params *p = call->params;
    int64_t m = attn_dim(call, "M");
    return p->causal ? attn_max_i64(0, attn_min_i64(m, n + m - attn_dim(call, "N") + 1)) : m;
}

/* Scores of `rows` queries from n0 on, in base 2, into strip [rows][M]. */
static attn_status score_strip(attn_call *call, int64_t b, int64_t h, int64_t n0, int64_t rows, float *strip)
{
    const topk_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), n = attn_dim(call, "N"), m = attn_dim(call, "M");
    int64_t d = attn_dim(call, "D"), kv = h / (heads / kv_heads);
    float scale = (float)(attn_default_scale(p->scale, d) * 1.44269504088896340736);
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    attn_status status = attn_gemm(call->arena, call->threads, 0, 1, rows, m, d, scale, attn_f32(call->t[Q]) + ((b * heads + h) * n + n0) * d,
                                   d, attn_f32(call->t[K]) + (b * kv_heads + kv) * m * d, d, 0, strip, m);
    attn_arena_release(call->arena, mark);
    return status;
}

/* Scores of one row to probabilities; NaN counts as no attention. */
static void probabilities(float *s, int64_t count)
{
    float top = -INFINITY;
    double sum = 0;
    for (int64_t j = 0; j < count; j++) {
        top = s[j] > top ? s[j] : top;
    }
    attn_tile_kernels_get()->exp2_row(s, count, top == -INFINITY ? 0 : top);
    for (int64_t j = 0; j < count; j++) {
        sum += (double)s[j];
    }
    attn_tile_kernels_get()->scale(s, count, sum > 0 ? (float)(1 / sum) : 0);
}

typedef struct strips {
    float *scores;       /* [STRIP][M] */
    double *sums, *copy; /* [STRIP][width] */
} strips;

static attn_status strips_create(attn_call *call, int64_t width, strips *to)
{
    int64_t m = attn_dim(call, "M");
    to->scores = attn_scratch_f32(call, STRIP * m + 1);
    to->sums = attn_arena_array(call->arena, (size_t)(STRIP * width) + 1, 2 * sizeof(double));
    to->copy = to->sums + STRIP * width;
    return to->scores != NULL && to->sums != NULL ? ATTN_OK : attn_fail_memory((size_t)(STRIP * width) * 2 * sizeof(double));
}

static double number(float x) { return isnan(x) ? -INFINITY : (double)x; }

/* Keys per query, for one list: query heads h0 ... h0 + stack - 1. */
static attn_status select_rows(attn_call *call, strips *x, int64_t b, int64_t h0, int64_t stack, int64_t *kept)
{
    const topk_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M");
    for (int64_t n0 = 0; n0 < n; n0 += STRIP) {
        int64_t rows = attn_min_i64(STRIP, n - n0);
        for (int64_t h = h0; h < h0 + stack; h++) {
            ATTN_TRY(score_strip(call, b, h, n0, rows, x->scores));
#pragma omp parallel for num_threads(call->threads) schedule(static)
            for (int64_t r = 0; r < rows; r++) {
                int64_t count = visible(call, n0 + r);
                float *s = x->scores + r * m;
                double *sum = x->sums + r * m;
                if (stack > 1) {
                    probabilities(s, count);
                }
                for (int64_t j = 0; j < count; j++) {
                    sum[j] = (h == h0 ? 0 : sum[j]) + number(s[j]);
                }
            }
        }
#pragma omp parallel for num_threads(call->threads) schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            keep_largest(x->sums + r * m, visible(call, n0 + r), p->top_k, x->copy + r * m, kept + (n0 + r) * p->top_k, p->top_k);
        }
    }
    return ATTN_OK;
}

static attn_status select_keys(attn_call *call, int64_t *kept)
{
    const topk_params *p = call->params;
    strips x;
    int64_t lists = attn_dim(call, "lists"), heads = attn_dim(call, "H");
    ATTN_TRY(strips_create(call, attn_dim(call, "M"), &x));
    for (int64_t i = 0; i < attn_dim(call, "B") * lists; i++) {
        int64_t stack = heads / lists;
        ATTN_TRY(select_rows(call, &x, i / lists, i % lists * stack, stack, kept + i * attn_dim(call, "N") * p->top_k));
    }
    return ATTN_OK;
}

/* Block sizes that are not larger than the axis, so that they cannot overflow; the blocks stay the same. */
static int64_t block_q(const attn_call *call)
{
    return attn_max_i64(1, attn_min_i64(((const topk_params *)call->params)->block_q, attn_dim(call, "N")));
}

static int64_t block_k(const attn_call *call)
{
    return attn_max_i64(1, attn_min_i64(((const topk_params *)call->params)->block_k, attn_dim(call, "M")));
}

/* Importance of key blocks for one block of queries of one head. */
static attn_status add_importance(attn_call *call, strips *x, int64_t b, int64_t h, int64_t first, int64_t last, double *importance)
{
    int64_t m = attn_dim(call, "M"), size = block_k(call), columns = attn_ceil_div(m, size);
    memset(importance, 0, (size_t)columns * sizeof *importance);
    for (int64_t n0 = first; n0 < last; n0 += STRIP) {
        int64_t rows = attn_min_i64(STRIP, last - n0);
        ATTN_TRY(score_strip(call, b, h, n0, rows, x->scores));
#pragma omp parallel for num_threads(call->threads) schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            int64_t count = visible(call, n0 + r);
            float *s = x->scores + r * m;
            probabilities(s, count);
            for (int64_t c = 0; c < columns; c++) {
                double sum = 0;
                for (int64_t j = c * size; j < attn_min_i64(count, (c + 1) * size); j++) {
                    sum += (double)s[j];
                }
                x->sums[r * columns + c] = isnan(sum) ? 0 : sum;
            }
        }
        for (int64_t i = 0; i < rows * columns; i++) {
            importance[i % columns] += x->sums[i];
        }
    }
    return ATTN_OK;
}

static attn_status select_blocks(attn_call *call, int64_t *kept)
{
    const topk_params *p = call->params;
    strips x;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M"), heads = attn_dim(call, "H"), nq = attn_dim(call, "nq");
    int64_t size = block_q(call), columns = attn_ceil_div(m, block_k(call));
    ATTN_TRY(strips_create(call, columns, &x));
    double *importance = attn_arena_array(call->arena, (size_t)columns + 1, sizeof(double));
    if (importance == NULL) {
        return attn_fail_memory((size_t)columns * sizeof(double));
    }
    for (int64_t i = 0; i < attn_dim(call, "B") * heads * nq; i++) {
        int64_t first = i % nq * size, last = attn_min_i64(n, first + size), seen = visible(call, last - 1);
        ATTN_TRY(add_importance(call, &x, i / nq / heads, i / nq % heads, first, last, importance));
        /* Blocks that no query of the block sees are not kept. */
        int64_t count = attn_ceil_div(seen, block_k(call));
        if (p->causal && count > 0) {
            importance[count - 1] = INFINITY; /* the diagonal block */
        }
        keep_largest(importance, count, p->top_k, x.copy, kept + i * p->top_k, p->top_k);
    }
    return ATTN_OK;
}

static attn_status bind(attn_call *call)
{
    const topk_params *p = call->params;
    attn_set_dim(call, "lists", p->share_group ? attn_dim(call, "Hkv") : attn_dim(call, "H"));
    attn_set_dim(call, "kept", p->top_k);
    return ATTN_OK;
}

static attn_status blocks_bind(attn_call *call)
{
    const topk_params *p = call->params;
    attn_set_dim(call, "nq", attn_ceil_div(attn_dim(call, "N"), block_q(call)));
    attn_set_dim(call, "kept", p->top_k);
    return ATTN_OK;
}

/* A plan from the selection. */
static attn_status plan_keys(const attn_call *call, const attn_tensor *selection, attn_plan **plan)
{
    attn_plan_shape shape = {attn_dim(call, "B"), attn_dim(call, "lists"), attn_dim(call, "N"), attn_dim(call, "M"), 1, 1};
    attn_plan_rule rule = {((const topk_params *)call->params)->causal, 0, -1, -1};
    return attn_plan_from_lists(plan, &shape, selection, &rule);
}

static attn_status plan_blocks(const attn_call *call, const attn_tensor *selection, attn_plan **plan)
{
    attn_plan_shape shape = {attn_dim(call, "B"), attn_dim(call, "H"), attn_dim(call, "N"), attn_dim(call, "M"), block_q(call), block_k(call)};
    attn_plan_rule rule = {((const topk_params *)call->params)->causal, 0, -1, -1};
    return attn_plan_from_lists(plan, &shape, selection, &rule);
}

static int is_blocks(const attn_call *call) { return call->cls == attn_op_class_find("topk.blocks"); }

static attn_status make_plan(const attn_call *call, const attn_tensor *selection, attn_plan **plan)
{
    return is_blocks(call) ? plan_blocks(call, selection, plan) : plan_keys(call, selection, plan);
}

/* Nothing to list: no batch item or no head. */
static int is_empty(const attn_call *call)
{
    return attn_dim(call, "B") == 0 || attn_dim(call, "H") == 0 || attn_dim(call, "N") == 0;
}

static attn_status select_plan(attn_call *call, attn_plan *plan)
{
    attn_plan *made;
    int blocks = is_blocks(call);
    int64_t shape[] = {attn_dim(call, "B"), attn_dim(call, blocks ? "H" : "lists"), attn_dim(call, blocks ? "nq" : "N"),
                       attn_dim(call, "kept")};
    attn_tensor selection = attn_tensor_make(NULL, ATTN_I64, 4, shape);
    selection.data = attn_arena_array(call->arena, (size_t)attn_tensor_count(&selection) + 1, sizeof(int64_t));
    if (selection.data == NULL) {
        return attn_fail_memory((size_t)attn_tensor_count(&selection) * sizeof(int64_t));
    }
    ATTN_TRY(blocks ? select_blocks(call, selection.data) : select_keys(call, selection.data));
    ATTN_TRY(make_plan(call, &selection, &made));
    attn_plan_take(plan, made);
    return ATTN_OK;
}

static attn_status forward(attn_call *call)
{
    attn_plan *plan;
    attn_dense_settings settings;
    if (is_empty(call)) {
        return ATTN_OK;
    }
    attn_dense_defaults(&settings);
    settings.scale = ((const topk_params *)call->params)->scale;
    attn_dense_inputs in = {.q = *call->t[Q], .k = *call->t[K], .v = *call->t[V]};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    int64_t *kept = attn_i64(call->t[SELECTION]);
    ATTN_TRY(is_blocks(call) ? select_blocks(call, kept) : select_keys(call, kept));
    ATTN_TRY(make_plan(call, call->t[SELECTION], &plan));
    attn_status status = attn_plan_forward(plan, &settings, &in, call->t[O], call->t[LSE], &exec);
    attn_plan_destroy(plan);
    return status;
}

static attn_status backward(attn_call *call)
{
    attn_plan *plan;
    attn_dense_settings settings;
    if (is_empty(call)) {
        return ATTN_OK;
    }
    attn_dense_defaults(&settings);
    settings.scale = ((const topk_params *)call->params)->scale;
    attn_dense_inputs in = {.q = *call->t[Q], .k = *call->t[K], .v = *call->t[V]};
    attn_dense_gradients to = {.q = call->grad[Q], .k = call->grad[K], .v = call->grad[V]};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    ATTN_TRY(make_plan(call, call->t[SELECTION], &plan));
    attn_status status = attn_plan_backward(plan, &settings, &in, call->t[O], call->t[LSE], call->grad[O], &to, &exec);
    attn_plan_destroy(plan);
    return status;
}

/* The attention of the kept pairs (a kept block counts whole); the selection's own scores are in the operations only. */
static attn_status cost(attn_call *call, attn_cost *cost)
{
    const topk_params *p = call->params;
    double selection = 0;
    int blocks = is_blocks(call);
    for (int64_t n = 0; n < attn_dim(call, "N"); n++) {
        int64_t seen = visible(call, n);
        double most = (double)p->top_k * (blocks ? (double)block_k(call) : 1);
        cost->pairs += most < (double)seen ? most : (double)seen;
        selection += (double)seen;
    }
    double lists = (double)attn_dim(call, "B") * (double)attn_dim(call, "H");
    cost->pairs *= lists;
    cost->flops = 2 * cost->pairs * (double)(attn_dim(call, "D") + attn_dim(call, "Dv")) + 2 * selection * lists * (double)attn_dim(call, "D");
    return ATTN_OK;
}

const attn_op_class attn_op_topk = {
    .info = {.name = "topk",
             .title = "Exact top-k attention, per query",
             .summary = "Each query attends to the top_k visible keys with its largest scores. An oracle: all scores are computed first, so it "
                        "shows what a selector could reach at best. Costs 2 N M D operations for the selection, then N top_k pairs.",
             .paper = "",
             .differentiable = 1,
             ATTN_TABLE(params, ports)},
    .params_size = sizeof(topk_params),
    .bind = bind,
    .select = select_plan,
    .forward = forward,
    .backward = backward,
    .cost = cost,
};

const attn_op_class attn_op_topk_blocks = {
    .info = {.name = "topk.blocks",
             .title = "Exact top-k attention, per block of queries",
             .summary = "Each block of queries attends to the top_k key blocks that get most of its softmax probability; with causality its "
                        "diagonal block is always one of them. An oracle for block-sparse selection: all scores are computed first. Costs "
                        "2 N M D operations for the selection, then N top_k block_k pairs.",
             .paper = "",
             .differentiable = 1,
             ATTN_TABLE(blocks_params, blocks_ports)},
    .params_size = sizeof(topk_params),
    .bind = blocks_bind,
    .select = select_plan,
    .forward = forward,
    .backward = backward,
    .cost = cost,
};
