/* Retrieval heads (arXiv:2404.15574): which attention heads copy tokens from anywhere in the context into the answer.
 *
 * Detection counts, over the greedy decoding of a needle test, how often a head's strongest attention points at the very token
 * that is produced, inside the needle. With it: masking heads and ranking them over tests. The texts of the test are in
 * retrieval_head_needle.c.
 */
#include "exec/heads.h"
#include "exec/segments.h"
#include "op/class.h"

#include <stdlib.h>
#include <string.h>

/* ---- retrieval_head: the scores of one test ---- */

enum { MODE_COUNT, MODE_SET };

typedef struct detect_params {
    int64_t needle_start, needle_end, top_k, mode;
    double scale;
} detect_params;

static const attn_param_info detect_param_table[] = {
    ATTN_P_INT("needle_start", detect_params, needle_start, NULL, 0, INFINITY, "first needle position in the prompt"),
    ATTN_P_INT("needle_end", detect_params, needle_end, NULL, 1, INFINITY, "position after the needle"),
    ATTN_P_INT("top_k", detect_params, top_k, "1", 1, INFINITY, "how many strongest positions count"),
    ATTN_P_CHOICE("mode", detect_params, mode, "count", "count|set",
                  "count: every hit counts; set: distinct needle positions, so that the score is at most 1"),
    {.name = "scale", .type = ATTN_PARAM_FLOAT, .standard = "null", .standard_text = "1/sqrt(D)", .min = 0, .min_open = 1,
     .max = INFINITY, .help = "multiplies q.k; no scale changes the order", .offset = offsetof(detect_params, scale)},
};

enum { DETECT_Q, DETECT_K, DETECT_PROMPT, DETECT_GENERATED, DETECT_TOP, DETECT_HIT, DETECT_SCORE };

static const attn_port_info detect_ports[] = {
    ATTN_IN("q", "L,H,S,D", FLOAT, 0, "queries of S decode steps (position encoding applied), layer by layer"),
    ATTN_IN("k", "L,Hkv,M,D", FLOAT, 0, "keys of the prompt and of the answer tokens fed back: M = P + S - 1"),
    ATTN_IN("prompt", "P", INT, 0, "token ids of the prompt"),
    ATTN_IN("generated", "S", INT, 0, "ids produced; generated[s] is the output of step s"),
    ATTN_OUT("top", "L,H,S,top_k", INT, 0, "positions by descending attention, ties to the lower position"),
    ATTN_OUT("hit", "L,H,S", BOOL, 0, "whether the step copied from the needle"),
    ATTN_OUT("score", "L,H", FLOAT, 0, "hits per needle token"),
};

static attn_status detect_bind(attn_call *call)
{
    const detect_params *p = call->params;
    int64_t prompt = attn_dim(call, "P"), steps = attn_dim(call, "S"), keys = attn_dim(call, "M");
    if (keys != prompt + steps - 1) {
        return attn_fail(ATTN_ERR_SHAPE, "k has %lld keys, expected P + S - 1 = %lld", (long long)keys,
                         (long long)(prompt + steps - 1));
    }
    if (p->needle_start >= p->needle_end || p->needle_end > prompt) {
        return attn_fail(ATTN_ERR_ARGUMENT,
                         "needle_start = %lld, needle_end = %lld: expected 0 <= needle_start < needle_end <= P = %lld",
                         (long long)p->needle_start, (long long)p->needle_end, (long long)prompt);
    }
    if (p->top_k > prompt) {
        return attn_fail(ATTN_ERR_ARGUMENT, "top_k = %lld: the first step sees only P = %lld keys", (long long)p->top_k,
                         (long long)prompt);
    }
    attn_set_dim(call, "top_k", p->top_k);
    return ATTN_OK;
}

/* Each row's largest scores so far, in order. */
typedef struct largest {
    int64_t top_k, prompt, steps;
    float *values;
    int64_t *positions, *kept;
} largest;

/* Scanning upwards with a strict comparison leaves ties to the lower position. */
static void keep_largest(void *user, float *scores, int64_t row, int64_t segment, int64_t first, int64_t keys)
{
    largest *x = user;
    float *values = x->values + row * x->top_k;
    int64_t *positions = x->positions + row * x->top_k, count = attn_min_i64(keys, x->prompt + row % x->steps - first);
    (void)segment;
    for (int64_t j = 0; j < count; j++) {
        if (x->kept[row] == x->top_k) {
            j += attn_segment_next_above(scores + j, count - j, values[x->top_k - 1]);
            if (j == count) {
                break;
            }
        }
        int64_t at = x->kept[row] < x->top_k ? x->kept[row]++ : x->top_k - 1;
        for (; at > 0 && scores[j] > values[at - 1]; at--) {
            values[at] = values[at - 1];
            positions[at] = positions[at - 1];
        }
        values[at] = scores[j];
        positions[at] = first + j;
    }
}

/* The top positions of all rows. Scores are not scaled: the order is that of q.k, and no scale can make different scores equal. */
static attn_status find_largest(attn_call *call)
{
    const detect_params *p = call->params;
    int64_t layers = attn_dim(call, "L"), heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), steps = attn_dim(call, "S");
    int64_t keys = attn_dim(call, "M"), d = attn_dim(call, "D"), rows = layers * heads * steps;
    largest x = {p->top_k, attn_dim(call, "P"), steps, attn_scratch_f32(call, rows * p->top_k), attn_i64(call->t[DETECT_TOP]),
                 attn_arena_array(call->arena, (size_t)rows, sizeof *x.kept)};
    if (x.values == NULL || x.kept == NULL) {
        return attn_fail_memory((size_t)(rows * (p->top_k + 2)) * sizeof *x.values);
    }
    memset(x.kept, 0, (size_t)rows * sizeof *x.kept);
    attn_segment list = {.keys = keys, .k = attn_f32(call->t[DETECT_K]), .k_stride = {kv_heads * keys * d, keys * d}};
    attn_segments all = {.batch = layers, .heads = heads, .kv_heads = kv_heads, .n = steps, .d = d, .dv = 0, .scale = ATTN_SEGMENTS_UNSCALED,
                         .q = attn_f32(call->t[DETECT_Q]), .count = 1, .segments = &list, .hook = keep_largest, .user = &x};
    return attn_segments_forward(&all, NULL, NULL, NULL, call->arena, call->threads);
}

static attn_status detect_forward(attn_call *call)
{
    const detect_params *p = call->params;
    int64_t all = attn_dim(call, "L") * attn_dim(call, "H"), steps = attn_dim(call, "S"), needle = p->needle_end - p->needle_start;
    const int64_t *prompt = attn_i64(call->t[DETECT_PROMPT]), *generated = attn_i64(call->t[DETECT_GENERATED]);
    uint8_t *seen = attn_arena_alloc(call->arena, (size_t)needle);
    if (seen == NULL) {
        return attn_fail_memory((size_t)needle);
    }
    ATTN_TRY(find_largest(call));
    for (int64_t head = 0; head < all; head++) {
        int64_t hits = 0;
        memset(seen, 0, (size_t)needle);
        for (int64_t s = 0; s < steps; s++) {
            const int64_t *best = attn_i64(call->t[DETECT_TOP]) + (head * steps + s) * p->top_k;
            uint8_t hit = 0;
            for (int64_t i = 0; i < p->top_k && !hit; i++) {
                int64_t j = best[i];
                if (j >= p->needle_start && j < p->needle_end && prompt[j] == generated[s]) {
                    hit = 1;
                    hits += p->mode == MODE_COUNT || !seen[j - p->needle_start];
                    seen[j - p->needle_start] = 1;
                }
            }
            attn_bool(call->t[DETECT_HIT])[head * steps + s] = hit;
        }
        attn_f32(call->t[DETECT_SCORE])[head] = (float)((double)hits / (double)needle);
    }
    return ATTN_OK;
}

static attn_status detect_cost(attn_call *call, attn_cost *cost)
{
    double pairs = (double)attn_dim(call, "L") * (double)attn_dim(call, "H") * (double)attn_dim(call, "S") *
                   (double)attn_dim(call, "M");
    *cost = (attn_cost){.flops = 2 * pairs * (double)attn_dim(call, "D"), .pairs = pairs};
    return ATTN_OK;
}

const attn_op_class attn_op_retrieval_head = {
    .info = {.name = "retrieval_head",
             .title = "Retrieval heads: score heads by one needle test",
             .summary = "For each head, how often during greedy decoding its strongest attention points at the token being produced "
                        "inside the needle. Averaged over tests (retrieval_head.rank) it finds the few heads that carry "
                        "long-context recall, which need a full cache while others can be windowed. Costs one pass of q.k.",
             .paper = "arXiv:2404.15574",
             ATTN_TABLE(detect_param_table, detect_ports)},
    .params_size = sizeof(detect_params),
    .bind = detect_bind,
    .forward = detect_forward,
    .cost = detect_cost,
};

/* ---- retrieval_head.mask: attention with masked heads ---- */

enum { MASK_UNIFORM, MASK_ZERO };

typedef struct mask_params {
    int64_t causal, mode;
    double scale;
} mask_params;

static const attn_param_info mask_param_table[] = {
    ATTN_P_BOOL("causal", mask_params, causal, "true", "key j is visible to query n only if j <= n + M - N"),
    ATTN_P_CHOICE("mode", mask_params, mode, "uniform", "uniform|zero",
                  "what a masked head gives: the mean of the visible values, or zero"),
    ATTN_P_SCALE(mask_params, scale),
};

enum { MASK_Q, MASK_K, MASK_V, MASK_HEADS, MASK_O };

static const attn_port_info mask_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, 0, "queries"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, 0, "keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, 0, "values"),
    ATTN_IN("heads", "H", BOOL, 0, "true: this query head is masked"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, 0, "the attention output"),
};

/* o[n] = mean of the values visible to query n, as a running sum when causal. */
static void mean_of_visible(const float *v, float *o, int64_t n, int64_t m, int64_t dv, int causal, double *sum)
{
    memset(sum, 0, (size_t)dv * sizeof *sum);
    int64_t added = 0;
    for (int64_t row = 0; row < n; row++) {
        int64_t visible = causal ? attn_max_i64(0, row + (m - n) + 1) : m;
        for (; added < visible; added++) {
            for (int64_t c = 0; c < dv; c++) {
                sum[c] += (double)v[added * dv + c];
            }
        }
        for (int64_t c = 0; c < dv; c++) {
            o[row * dv + c] = added > 0 ? (float)(sum[c] / (double)added) : 0;
        }
    }
}

static attn_status mask_forward(attn_call *call)
{
    const mask_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), all = attn_dim(call, "B") * heads;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M"), dv = attn_dim(call, "Dv");
    const uint8_t *masked = attn_bool(call->t[MASK_HEADS]);
    double *sums = attn_arena_array(call->arena, (size_t)(all * dv), sizeof *sums);
    if (sums == NULL) {
        return attn_fail_memory((size_t)(all * dv) * sizeof *sums);
    }
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.causal = (int)p->causal;
    settings.scale = p->scale;
    attn_dense_inputs in = {.q = *call->t[MASK_Q], .k = *call->t[MASK_K], .v = *call->t[MASK_V]};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    ATTN_TRY(attn_heads_forward(&settings, &in, masked, 0, call->t[MASK_O], NULL, &exec));
#pragma omp parallel for num_threads(call->threads)
    for (int64_t i = 0; i < all; i++) {
        int64_t h = i % heads, kv = i / heads * kv_heads + h / (heads / kv_heads);
        float *o = attn_f32(call->t[MASK_O]) + i * n * dv;
        if (masked[h] && p->mode == MASK_ZERO) {
            memset(o, 0, (size_t)(n * dv) * sizeof *o);
        } else if (masked[h]) {
            mean_of_visible(attn_f32(call->t[MASK_V]) + kv * m * dv, o, n, m, dv, (int)p->causal, sums + i * dv);
        }
    }
    return ATTN_OK;
}

/* Masked heads compute no logits. */
static attn_status mask_cost(attn_call *call, attn_cost *cost)
{
    const mask_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M"), heads = attn_dim(call, "H"), exact = heads;
    double pairs = (double)n * (double)m;
    if (p->causal) {
        double rows = (double)attn_min_i64(n, m); /* that see a key: m - rows + 1 ... m of them */
        pairs = rows * (double)m - rows * (rows - 1) / 2;
    }
    for (int64_t h = 0; h < heads && call->t[MASK_HEADS]->data != NULL; h++) {
        exact -= attn_bool(call->t[MASK_HEADS])[h] != 0;
    }
    cost->pairs = pairs * (double)attn_dim(call, "B") * (double)exact;
    cost->flops = 2 * cost->pairs * ((double)attn_dim(call, "D") + (double)attn_dim(call, "Dv"));
    return ATTN_OK;
}

const attn_op_class attn_op_retrieval_head_mask = {
    .info = {.name = "retrieval_head.mask",
             .title = "Retrieval heads: attention with some heads masked",
             .summary = "Exact attention in which chosen heads give only the mean of the visible values (their logits set to 0), or zero. "
                        "Used to test whether recall depends on those heads. Masked heads compute no logits.",
             .paper = "arXiv:2404.15574",
             ATTN_TABLE(mask_param_table, mask_ports)},
    .params_size = sizeof(mask_params),
    .forward = mask_forward,
    .cost = mask_cost,
};

/* ---- retrieval_head.rank: heads over many tests ---- */

typedef struct rank_params {
    double threshold;
} rank_params;

static const attn_param_info rank_param_table[] = {
    ATTN_P_FLOAT("threshold", rank_params, threshold, "0.1", -INFINITY, INFINITY, "a mean score above this makes a retrieval head"),
};

enum { RANK_SCORES, RANK_SUCCESS, RANK_MEAN, RANK_FREQ, RANK_ORDER, RANK_RETRIEVAL };

static const attn_port_info rank_ports[] = {
    ATTN_IN("scores", "T,L,H", FLOAT, 0, "one row of scores per test"),
    ATTN_IN("success", "T", BOOL, ATTN_PORT_OPTIONAL, "tests that count (absent: all)"),
    ATTN_OUT("mean", "L,H", FLOAT, 0, "mean score over the tests that count"),
    ATTN_OUT("freq", "L,H", FLOAT, 0, "share of those tests with a score above 0"),
    ATTN_OUT("order", "heads", INT, 0, "flat head numbers l*H + h by descending mean"),
    ATTN_OUT("retrieval", "L,H", BOOL, 0, "mean above the threshold"),
};

static attn_status rank_bind(attn_call *call)
{
    attn_set_dim(call, "heads", attn_dim(call, "L") * attn_dim(call, "H"));
    return ATTN_OK;
}

typedef struct ranked_head {
    double mean;
    int64_t head;
} ranked_head;

/* Without a number a head comes last. */
static int by_mean(const void *a, const void *b)
{
    const ranked_head *x = a, *y = b;
    if (isnan(x->mean) != isnan(y->mean)) {
        return isnan(x->mean) ? 1 : -1;
    }
    if (x->mean < y->mean || x->mean > y->mean) {
        return x->mean > y->mean ? -1 : 1;
    }
    return (x->head > y->head) - (x->head < y->head);
}

static attn_status rank_forward(attn_call *call)
{
    const rank_params *p = call->params;
    int64_t tests = attn_dim(call, "T"), count = attn_dim(call, "heads");
    const float *scores = attn_f32(call->t[RANK_SCORES]);
    const uint8_t *success = attn_bool(call->t[RANK_SUCCESS]);
    ranked_head *ranked = attn_arena_array(call->arena, (size_t)count, sizeof *ranked);
    if (ranked == NULL) {
        return attn_fail_memory((size_t)count * sizeof *ranked);
    }
    for (int64_t i = 0; i < count; i++) {
        double sum = 0, active = 0, used = 0;
        for (int64_t t = 0; t < tests; t++) {
            if (success == NULL || success[t]) {
                used++;
                sum += (double)scores[t * count + i];
                active += scores[t * count + i] > 0;
            }
        }
        ranked[i] = (ranked_head){used > 0 ? sum / used : 0, i};
        attn_f32(call->t[RANK_MEAN])[i] = (float)ranked[i].mean;
        attn_f32(call->t[RANK_FREQ])[i] = used > 0 ? (float)(active / used) : 0;
        attn_bool(call->t[RANK_RETRIEVAL])[i] = ranked[i].mean > p->threshold;
    }
    qsort(ranked, (size_t)count, sizeof *ranked, by_mean);
    for (int64_t i = 0; i < count; i++) {
        attn_i64(call->t[RANK_ORDER])[i] = ranked[i].head;
    }
    return ATTN_OK;
}

const attn_op_class attn_op_retrieval_head_rank = {
    .info = {.name = "retrieval_head.rank",
             .title = "Retrieval heads: rank heads over tests",
             .summary = "Mean score and activity of each head over the needle tests that succeeded, the order by mean, and which heads "
                        "exceed the threshold.",
             .paper = "arXiv:2404.15574",
             ATTN_TABLE(rank_param_table, rank_ports)},
    .params_size = sizeof(rank_params),
    .bind = rank_bind,
    .forward = rank_forward,
};
