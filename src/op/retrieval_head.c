/* Retrieval heads (arXiv:2404.15574): which attention heads copy tokens from anywhere in the context into the answer.
 *
 * Detection counts, over the greedy decoding of a needle test, how often a head's strongest attention points at the very token
 * that is produced, inside the needle. The rest are the pieces of that test: masking heads, ranking them over tests, inserting
 * and locating needles, and the recall of an answer.
 */
#include "exec/heads.h"
#include "layer/gemm.h"
#include "op/class.h"

#include <stdlib.h>
#include <string.h>

#define KEY_BLOCK 512

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

/* Keep the top_k largest of a row's scores so far; scanning upwards with a strict comparison leaves ties to the lower position. */
static void keep_largest(const float *scores, int64_t first, int64_t count, int64_t top_k, float *values, int64_t *positions,
                         int64_t *kept)
{
    for (int64_t j = 0; j < count; j++) {
        if (*kept == top_k && !(scores[j] > values[top_k - 1])) {
            continue;
        }
        int64_t at = *kept < top_k ? (*kept)++ : top_k - 1;
        while (at > 0 && scores[j] > values[at - 1]) {
            values[at] = values[at - 1];
            positions[at] = positions[at - 1];
            at--;
        }
        values[at] = scores[j];
        positions[at] = first + j;
    }
}

/* The top positions of all steps of the query heads that share one key head; rows = heads * S. Scores are not scaled: the order is that of
 * q.k, and no scale can make different scores equal. */
static attn_status detect_group(attn_call *call, const float *q, const float *k, int64_t rows, int64_t *top, float *scores,
                                float *values, int64_t *kept)
{
    const detect_params *p = call->params;
    int64_t steps = attn_dim(call, "S"), keys = attn_dim(call, "M"), d = attn_dim(call, "D"), prompt = attn_dim(call, "P");
    memset(kept, 0, (size_t)rows * sizeof *kept);
    for (int64_t first = 0; first < keys; first += KEY_BLOCK) {
        int64_t count = attn_min_i64(KEY_BLOCK, keys - first);
        ATTN_TRY(attn_gemm(call->arena, call->threads, 0, 1, rows, count, d, 1, q, d, k + first * d, d, 0, scores,
                           KEY_BLOCK));
#pragma omp parallel for num_threads(call->threads)
        for (int64_t row = 0; row < rows; row++) {
            int64_t visible = attn_min_i64(count, prompt + row % steps - first);
            keep_largest(scores + row * KEY_BLOCK, first, visible, p->top_k, values + row * p->top_k, top + row * p->top_k,
                         &kept[row]);
        }
    }
    return ATTN_OK;
}

static attn_status detect_forward(attn_call *call)
{
    const detect_params *p = call->params;
    int64_t layers = attn_dim(call, "L"), heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv");
    int64_t steps = attn_dim(call, "S"), keys = attn_dim(call, "M"), d = attn_dim(call, "D");
    if (layers * heads * steps == 0) {
        return ATTN_OK;
    }
    const int64_t *prompt = attn_i64(call->t[DETECT_PROMPT]), *generated = attn_i64(call->t[DETECT_GENERATED]);
    int64_t *top = attn_i64(call->t[DETECT_TOP]);
    int64_t group = heads / kv_heads, rows = group * steps, needle = p->needle_end - p->needle_start;
    float *scores = attn_scratch_f32(call, rows * KEY_BLOCK), *values = attn_scratch_f32(call, rows * p->top_k);
    int64_t *kept = attn_arena_array(call->arena, (size_t)rows, sizeof *kept);
    uint8_t *seen = attn_arena_alloc(call->arena, (size_t)needle);
    if (scores == NULL || values == NULL || kept == NULL || seen == NULL) {
        return attn_fail_memory((size_t)(rows * (KEY_BLOCK + p->top_k)) * sizeof(float));
    }
    for (int64_t g = 0; g < layers * kv_heads; g++) {
        ATTN_TRY(detect_group(call, attn_f32(call->t[DETECT_Q]) + g * rows * d, attn_f32(call->t[DETECT_K]) + g * keys * d,
                              rows, top + g * rows * p->top_k, scores, values, kept));
    }
    for (int64_t head = 0; head < layers * heads; head++) {
        int64_t hits = 0;
        memset(seen, 0, (size_t)needle);
        for (int64_t s = 0; s < steps; s++) {
            const int64_t *best = top + (head * steps + s) * p->top_k;
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

/* ---- retrieval_head.insert: put a needle into a context ---- */

typedef struct insert_params {
    double depth;
    int64_t context_length, buffer;
    attn_ints stops;
} insert_params;

static const attn_param_info insert_param_table[] = {
    ATTN_P_FLOAT("depth", insert_params, depth, NULL, 0, 100, "where the needle goes, in percent of the context"),
    ATTN_P_INT("context_length", insert_params, context_length, NULL, 0, INFINITY, "tokens of context, needle and buffer"),
    ATTN_P_INT("buffer", insert_params, buffer, "200", 0, INFINITY, "tokens kept free for the question"),
    ATTN_P_LIST(INTS, "stops", insert_params, stops, "[]", -INFINITY, INFINITY, 0, 0, "ids that end a sentence"),
};

enum { INSERT_CONTEXT, INSERT_NEEDLE, INSERT_TOKENS, INSERT_POSITION };

static const attn_port_info insert_ports[] = {
    ATTN_IN("context", "n", INT, 0, "token ids of the context"),
    ATTN_IN("needle", "m", INT, 0, "token ids of the needle"),
    ATTN_OUT("tokens", "total", INT, 0, "the context, cut to fit, with the needle in it"),
    ATTN_OUT("position", "1", INT, 0, "where the needle begins"),
};

/* Context tokens that are kept. */
static int64_t insert_kept(const attn_call *call)
{
    const insert_params *p = call->params;
    int64_t room = p->context_length - p->buffer;
    return attn_min_i64(attn_dim(call, "n"), room - attn_dim(call, "m"));
}

static attn_status insert_bind(attn_call *call)
{
    const insert_params *p = call->params;
    int64_t kept = insert_kept(call);
    if (kept < 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "context_length = %lld less buffer = %lld has no room for a needle of %lld tokens",
                         (long long)p->context_length, (long long)p->buffer, (long long)attn_dim(call, "m"));
    }
    attn_set_dim(call, "total", kept + attn_dim(call, "m"));
    return ATTN_OK;
}

static int is_stop(const attn_ints *stops, int64_t token)
{
    for (int i = 0; i < stops->count; i++) {
        if (stops->items[i] == token) {
            return 1;
        }
    }
    return 0;
}

static attn_status insert_forward(attn_call *call)
{
    const insert_params *p = call->params;
    const int64_t *context = attn_i64(call->t[INSERT_CONTEXT]), *needle = attn_i64(call->t[INSERT_NEEDLE]);
    int64_t *tokens = attn_i64(call->t[INSERT_TOKENS]);
    int64_t kept = insert_kept(call), m = attn_dim(call, "m"), at = kept;
    if (p->depth < 100) {
        at = (int64_t)((double)kept * (p->depth / 100)); /* this order of operations is part of the definition */
        while (at > 0 && !is_stop(&p->stops, context[at - 1])) {
            at--;
        }
    }
    for (int64_t i = 0; i < kept + m; i++) {
        tokens[i] = i < at ? context[i] : i < at + m ? needle[i - at] : context[i - m];
    }
    attn_i64(call->t[INSERT_POSITION])[0] = at;
    return ATTN_OK;
}

const attn_op_class attn_op_retrieval_head_insert = {
    .info = {.name = "retrieval_head.insert",
             .title = "Retrieval heads: insert a needle into a context",
             .summary = "Cut the context to fit, go to the given depth, back to the end of a sentence, and put the needle there.",
             .paper = "arXiv:2404.15574",
             ATTN_TABLE(insert_param_table, insert_ports)},
    .params_size = sizeof(insert_params),
    .bind = insert_bind,
    .forward = insert_forward,
};

/* ---- retrieval_head.locate: find a needle again ---- */

typedef struct threshold_params {
    double threshold;
} threshold_params;

static const attn_param_info locate_param_table[] = {
    ATTN_P_FLOAT("threshold", threshold_params, threshold, "0.9", -INFINITY, INFINITY,
                 "share of the distinct needle tokens that a window must exceed"),
};

enum { LOCATE_PROMPT, LOCATE_NEEDLE, LOCATE_SPAN };

static const attn_port_info locate_ports[] = {
    ATTN_IN("prompt", "P", INT, 0, "token ids"),
    ATTN_IN("needle", "m", INT, 0, "token ids"),
    ATTN_OUT("span", "2", INT, 0, "first position and position after the needle; -1, -1 when it is not there"),
};

static int by_value(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Sort and drop repeats; the number of distinct values. */
static int64_t make_set(int64_t *values, int64_t count)
{
    qsort(values, (size_t)count, sizeof *values, by_value);
    int64_t distinct = 0;
    for (int64_t i = 0; i < count; i++) {
        if (distinct == 0 || values[distinct - 1] != values[i]) {
            values[distinct++] = values[i];
        }
    }
    return distinct;
}

/* Index of a token in a sorted set, -1 when absent. */
static int64_t find_in_set(const int64_t *set, int64_t count, int64_t token)
{
    const int64_t *found = bsearch(&token, set, (size_t)count, sizeof *set, by_value);
    return found != NULL ? found - set : -1;
}

static attn_status locate_forward(attn_call *call)
{
    const threshold_params *p = call->params;
    int64_t length = attn_dim(call, "P"), m = attn_dim(call, "m");
    const int64_t *prompt = attn_i64(call->t[LOCATE_PROMPT]);
    int64_t *span = attn_i64(call->t[LOCATE_SPAN]);
    int64_t *set = attn_arena_array(call->arena, (size_t)m, sizeof *set);
    int64_t *inside = attn_arena_array(call->arena, (size_t)m, sizeof *inside);
    if (set == NULL || inside == NULL) {
        return attn_fail_memory((size_t)m * 2 * sizeof *set);
    }
    span[0] = span[1] = -1;
    if (m == 0) {
        return ATTN_OK;
    }
    memcpy(set, attn_i64(call->t[LOCATE_NEEDLE]), (size_t)m * sizeof *set);
    memset(inside, 0, (size_t)m * sizeof *inside);
    int64_t distinct = make_set(set, m), common = 0;
    /* The window [i, i+m) slides; inside[] counts each needle token in it. */
    for (int64_t j = 0; j < length + m; j++) {
        if (j >= m) {
            int64_t start = j - m;
            if ((double)common / (double)distinct > p->threshold) {
                span[0] = start;
                span[1] = start + m;
                return ATTN_OK;
            }
            int64_t leaving = find_in_set(set, distinct, prompt[start]);
            common -= leaving >= 0 && --inside[leaving] == 0;
        }
        if (j < length) {
            int64_t entering = find_in_set(set, distinct, prompt[j]);
            common += entering >= 0 && inside[entering]++ == 0;
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_retrieval_head_locate = {
    .info = {.name = "retrieval_head.locate",
             .title = "Retrieval heads: locate a needle in a prompt",
             .summary = "The first window of the prompt that holds more than a share of the needle's distinct tokens; order inside the "
                        "window does not matter.",
             .paper = "arXiv:2404.15574",
             ATTN_TABLE(locate_param_table, locate_ports)},
    .params_size = sizeof(threshold_params),
    .forward = locate_forward,
};

/* ---- retrieval_head.recall: how much of the needle an answer repeats ---- */

static const attn_param_info recall_param_table[] = {
    ATTN_P_FLOAT("threshold", threshold_params, threshold, "0.5", -INFINITY, INFINITY, "a recall above this is a success"),
};

enum { RECALL_REFERENCE, RECALL_RESPONSE, RECALL_RECALL, RECALL_SUCCESS };

static const attn_port_info recall_ports[] = {
    ATTN_IN("reference", "n", INT, 0, "token ids of the needle"),
    ATTN_IN("response", "m", INT, 0, "token ids of the answer"),
    ATTN_OUT("recall", "1", FLOAT, 0, "share of the reference's tokens that the response repeats"),
    ATTN_OUT("success", "1", BOOL, 0, "recall above the threshold"),
};

static attn_status recall_forward(attn_call *call)
{
    const threshold_params *p = call->params;
    int64_t n = attn_dim(call, "n"), m = attn_dim(call, "m");
    int64_t *reference = attn_arena_array(call->arena, (size_t)n, sizeof *reference);
    int64_t *response = attn_arena_array(call->arena, (size_t)m, sizeof *response);
    if (reference == NULL || response == NULL) {
        return attn_fail_memory((size_t)(n + m) * sizeof *reference);
    }
    if (n > 0) {
        memcpy(reference, attn_i64(call->t[RECALL_REFERENCE]), (size_t)n * sizeof *reference);
        qsort(reference, (size_t)n, sizeof *reference, by_value);
    }
    if (m > 0) {
        memcpy(response, attn_i64(call->t[RECALL_RESPONSE]), (size_t)m * sizeof *response);
        qsort(response, (size_t)m, sizeof *response, by_value);
    }
    /* Both sorted: walking them together matches each occurrence at most once. */
    int64_t common = 0;
    for (int64_t i = 0, j = 0; i < n && j < m;) {
        if (reference[i] == response[j]) {
            common++, i++, j++;
        } else if (reference[i] < response[j]) {
            i++;
        } else {
            j++;
        }
    }
    double recall = n > 0 ? (double)common / (double)n : 0;
    attn_f32(call->t[RECALL_RECALL])[0] = (float)recall;
    attn_bool(call->t[RECALL_SUCCESS])[0] = recall > p->threshold;
    return ATTN_OK;
}

const attn_op_class attn_op_retrieval_head_recall = {
    .info = {.name = "retrieval_head.recall",
             .title = "Retrieval heads: unigram recall of an answer",
             .summary = "How much of a reference's tokens an answer repeats, counted with multiplicity, and whether that is a success.",
             .paper = "arXiv:2404.15574",
             ATTN_TABLE(recall_param_table, recall_ports)},
    .params_size = sizeof(threshold_params),
    .forward = recall_forward,
};
