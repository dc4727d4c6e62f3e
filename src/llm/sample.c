#include <attn/sample.h>

#include "core/internal.h"
#include "core/random.h"

#include <math.h>
#include <stdlib.h>

#define WINDOW_LIMIT 65536
#define LANES 32       /* logits compared together, so that compilers use vectors */
#define NEGLIGIBLE 50.0 /* tokens e^50 times less likely than the best are below the rounding of their sum */
#define SORTED_FIRST 256

typedef struct candidate {
    float logit;
    int32_t token;
} candidate;

struct attn_sampler {
    attn_sampler_settings settings;
    attn_random random;
    int64_t vocabulary;
    float *logits;         /* penalised, -inf instead of NaN */
    candidate *candidates; /* the first `sorted` are the best, best first */
    int64_t count, sorted;
    int32_t *recent; /* ring of repeat_window */
    int64_t accepted;
};

void attn_sampler_defaults(attn_sampler_settings *settings)
{
    *settings = (attn_sampler_settings){.top_p = 1, .repeat_penalty = 1, .repeat_window = 64};
}

static attn_status check(const attn_sampler_settings *s, int64_t vocabulary)
{
    if (!(s->temperature >= 0 && s->temperature <= 1e6)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "temperature = %g, expected 0 or more", s->temperature);
    }
    if (s->top_k < 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "top_k = %lld, expected 0 (off) or more", (long long)s->top_k);
    }
    if (!(s->top_p > 0 && s->top_p <= 1)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "top_p = %g, expected more than 0 and at most 1 (off)", s->top_p);
    }
    if (!(s->min_p >= 0 && s->min_p <= 1)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "min_p = %g, expected 0 (off) ... 1", s->min_p);
    }
    if (!(s->repeat_penalty > 0 && s->repeat_penalty <= 1e6)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "repeat_penalty = %g, expected more than 0 (1: off)", s->repeat_penalty);
    }
    if (s->repeat_window < 0 || s->repeat_window > WINDOW_LIMIT) {
        return attn_fail(ATTN_ERR_ARGUMENT, "repeat_window = %lld, expected 0 ... %d", (long long)s->repeat_window, WINDOW_LIMIT);
    }
    if (vocabulary < 1 || vocabulary > INT32_MAX) {
        return attn_fail(ATTN_ERR_ARGUMENT, "vocabulary = %lld, expected 1 or more", (long long)vocabulary);
    }
    return ATTN_OK;
}

attn_status attn_sampler_create(attn_sampler **sampler, const attn_sampler_settings *settings, int64_t vocabulary)
{
    attn_sampler_settings own;
    attn_sampler_defaults(&own);
    *sampler = NULL;
    if (settings != NULL) {
        own = *settings;
    }
    ATTN_TRY(check(&own, vocabulary));
    attn_sampler *made = attn_calloc_array(1, sizeof *made);
    if (made != NULL) {
        *made = (attn_sampler){.settings = own, .vocabulary = vocabulary};
        made->logits = attn_alloc_array((size_t)vocabulary, sizeof *made->logits);
        made->candidates = attn_alloc_array((size_t)vocabulary, sizeof *made->candidates);
        made->recent = attn_alloc_array((size_t)own.repeat_window + 1, sizeof *made->recent);
    }
    if (made == NULL || made->logits == NULL || made->candidates == NULL || made->recent == NULL) {
        attn_sampler_destroy(made);
        return attn_fail_memory((size_t)vocabulary * (sizeof *made->logits + sizeof *made->candidates));
    }
    attn_random_seed(&made->random, own.seed);
    *sampler = made;
    return ATTN_OK;
}

void attn_sampler_destroy(attn_sampler *sampler)
{
    if (sampler != NULL) {
        attn_free(sampler->logits);
        attn_free(sampler->candidates);
        attn_free(sampler->recent);
        attn_free(sampler);
    }
}

void attn_sampler_accept(attn_sampler *sampler, int32_t token)
{
    if (sampler->settings.repeat_window > 0) {
        sampler->recent[sampler->accepted++ % sampler->settings.repeat_window] = token;
    }
}

static int by_logit(const void *a, const void *b)
{
    const candidate *x = a, *y = b;
    if (x->logit != y->logit) {
        return x->logit > y->logit ? -1 : 1;
    }
    return (x->token > y->token) - (x->token < y->token);
}

static void penalise(attn_sampler *s)
{
    int64_t held = attn_min_i64(s->accepted, s->settings.repeat_window);
    for (int64_t i = 0; i < held && s->settings.repeat_penalty != 1; i++) {
        int32_t token = s->recent[i];
        int seen = token < 0 || token >= s->vocabulary;
        for (int64_t j = 0; j < i && !seen; j++) { /* each token once */
            seen = s->recent[j] == token;
        }
        if (!seen) {
            float *logit = &s->logits[token];
            *logit = *logit > 0 ? *logit / (float)s->settings.repeat_penalty : *logit * (float)s->settings.repeat_penalty;
        }
    }
}

/* The `keep` best candidates to the front, best first. */
static void select_best(candidate *c, int64_t count, int64_t keep)
{
    if (keep < count) { /* quickselect down to a little more than needed, then sort that */
        int64_t low = 0, high = count;
        while (high - low > 32 && high > keep) {
            candidate pivot = c[low + (high - low) / 2];
            int64_t i = low, j = high - 1;
            while (i <= j) {
                while (by_logit(&c[i], &pivot) < 0) {
                    i++;
                }
                while (by_logit(&c[j], &pivot) > 0) {
                    j--;
                }
                if (i <= j) {
                    candidate swap = c[i];
                    c[i++] = c[j];
                    c[j--] = swap;
                }
            }
            if (keep <= j + 1) {
                high = j + 1;
            } else if (keep > i) {
                low = i;
            } else {
                break;
            }
        }
        count = high > keep ? high : keep;
    }
    qsort(c, (size_t)count, sizeof *c, by_logit);
}

static float largest(const float *x, int64_t count)
{
    float lane[LANES], top = -INFINITY;
    int64_t whole = count / LANES * LANES;
    for (int l = 0; l < LANES; l++) {
        lane[l] = -INFINITY;
    }
    for (int64_t i = 0; i < whole; i += LANES) {
        for (int l = 0; l < LANES; l++) {
            lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
        }
    }
    for (int l = 0; l < LANES; l++) {
        top = lane[l] > top ? lane[l] : top;
    }
    for (int64_t i = whole; i < count; i++) {
        top = x[i] > top ? x[i] : top;
    }
    return top;
}

/* The next best candidate; sorting goes only as far as it is asked for. */
static const candidate *ranked(attn_sampler *s, int64_t rank)
{
    while (rank >= s->sorted) {
        int64_t more = attn_min_i64(attn_max_i64(SORTED_FIRST, 3 * s->sorted), s->count - s->sorted);
        select_best(s->candidates + s->sorted, s->count - s->sorted, more);
        s->sorted += more;
    }
    return &s->candidates[rank];
}

/* Beside the most likely token's. */
static double likelihood(const attn_sampler *s, const candidate *c, float top)
{
    return exp(((double)c->logit - (double)top) / s->settings.temperature);
}

int32_t attn_sampler_next(attn_sampler *s, const float *logits)
{
    const attn_sampler_settings *set = &s->settings;
    for (int64_t i = 0; i < s->vocabulary; i++) {
        s->logits[i] = logits[i] == logits[i] ? logits[i] : -INFINITY;
    }
    penalise(s);
    float top = largest(s->logits, s->vocabulary);
    if (top == -INFINITY) {
        return 0;
    }
    if (set->temperature == 0 || top == INFINITY) {
        int32_t best = 0;
        while (s->logits[best] != top) {
            best++;
        }
        return best;
    }
    s->count = s->sorted = 0;
    for (int64_t i = 0; i < s->vocabulary; i++) {
        if (((double)s->logits[i] - (double)top) / set->temperature > -NEGLIGIBLE) {
            s->candidates[s->count++] = (candidate){s->logits[i], (int32_t)i};
        }
    }
    int64_t left = set->top_k > 0 ? attn_min_i64(set->top_k, s->count) : s->count;
    double sum = 0, reached = 0;
    for (int64_t i = 0; i < left; i++) {
        sum += likelihood(s, left < s->count ? ranked(s, i) : &s->candidates[i], top);
    }
    if (set->top_p < 1 || set->min_p > 0) {
        int64_t most = left;
        for (left = 0; left < most; left++) {
            double next = likelihood(s, ranked(s, left), top);
            if (left > 0 && (reached >= set->top_p * sum || next < set->min_p)) {
                break;
            }
            reached += next;
        }
    } else {
        reached = sum;
    }
    double draw = attn_random_uniform(&s->random) * reached;
    for (int64_t i = 0; i < left - 1; i++) {
        const candidate *c = ranked(s, i);
        draw -= likelihood(s, c, top);
        if (draw < 0) {
            return c->token;
        }
    }
    return ranked(s, left - 1)->token;
}
