#include <attn/sample.h>

#include "core/internal.h"
#include "core/random.h"

#include <math.h>
#include <stdlib.h>

#define WINDOW_LIMIT 65536

typedef struct candidate {
    float logit;
    int32_t token;
    double probability;
} candidate;

struct attn_sampler {
    attn_sampler_settings settings;
    attn_random random;
    int64_t vocabulary;
    candidate *candidates;
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
        made->candidates = attn_alloc_array((size_t)vocabulary, sizeof *made->candidates);
        made->recent = attn_alloc_array((size_t)own.repeat_window + 1, sizeof *made->recent);
    }
    if (made == NULL || made->candidates == NULL || made->recent == NULL) {
        attn_sampler_destroy(made);
        return attn_fail_memory((size_t)vocabulary * sizeof *made->candidates);
    }
    attn_random_seed(&made->random, own.seed);
    *sampler = made;
    return ATTN_OK;
}

void attn_sampler_destroy(attn_sampler *sampler)
{
    if (sampler != NULL) {
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
            float *logit = &s->candidates[token].logit;
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

int32_t attn_sampler_next(attn_sampler *s, const float *logits)
{
    int64_t best = -1, count = 0;
    for (int64_t i = 0; i < s->vocabulary; i++) {
        s->candidates[i] = (candidate){isnan(logits[i]) ? -INFINITY : logits[i], (int32_t)i, 0};
    }
    penalise(s);
    for (int64_t i = 0; i < s->vocabulary; i++) {
        if (s->candidates[i].logit > -INFINITY) {
            s->candidates[count++] = s->candidates[i];
            best = best < 0 || s->candidates[count - 1].logit > s->candidates[best].logit ? count - 1 : best;
        }
    }
    if (count == 0) {
        return 0;
    }
    if (s->settings.temperature == 0 || s->candidates[best].logit == INFINITY) {
        return s->candidates[best].token;
    }
    int64_t keep = s->settings.top_k > 0 ? attn_min_i64(s->settings.top_k, count) : count;
    select_best(s->candidates, count, keep);
    double sum = 0, top = (double)s->candidates[0].logit;
    for (int64_t i = 0; i < keep; i++) {
        s->candidates[i].probability = exp(((double)s->candidates[i].logit - top) / s->settings.temperature);
        sum += s->candidates[i].probability;
    }
    double reached = 0, least = s->settings.min_p * s->candidates[0].probability;
    int64_t left = 0;
    for (; left < keep; left++) {
        if (left > 0 && (reached >= s->settings.top_p * sum || s->candidates[left].probability < least)) {
            break;
        }
        reached += s->candidates[left].probability;
    }
    double draw = attn_random_uniform(&s->random) * reached;
    for (int64_t i = 0; i < left; i++) {
        draw -= s->candidates[i].probability;
        if (draw < 0) {
            return s->candidates[i].token;
        }
    }
    return s->candidates[left - 1].token;
}
