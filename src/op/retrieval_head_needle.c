/* The texts of a needle test for retrieval heads (arXiv:2404.15574): inserting a needle, locating it again, the recall of an answer. */
#include "op/class.h"

#include <stdlib.h>
#include <string.h>

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
