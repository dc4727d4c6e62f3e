/* Choosing the next token from a language model's logits. */
#ifndef ATTN_SAMPLE_H
#define ATTN_SAMPLE_H

#include <attn/status.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Filters apply in this order: repeat penalty, top-k, temperature, top-p, min-p, then a draw. */
typedef struct attn_sampler_settings {
    double temperature;    /* 0 (greedy: the most likely token). Logits are divided by it */
    int64_t top_k;         /* 0 (off). Only the top_k most likely tokens */
    double top_p;          /* 1 (off). Only the most likely tokens that together reach this probability */
    double min_p;          /* 0 (off). Only tokens at least this many times as likely as the most likely one */
    double repeat_penalty; /* 1 (off). Logits of recent tokens are divided (positive) or multiplied (negative) by it */
    int64_t repeat_window; /* 64. Recent tokens that count */
    uint64_t seed;         /* 0. The same seed gives the same tokens */
} attn_sampler_settings;

ATTN_API void attn_sampler_defaults(attn_sampler_settings *settings);

typedef struct attn_sampler attn_sampler;

/* settings NULL: the defaults. ATTN_ERR_ARGUMENT names a value out of range. vocabulary: number of logits. */
ATTN_API attn_status attn_sampler_create(attn_sampler **sampler, const attn_sampler_settings *settings, int64_t vocabulary);
ATTN_API void attn_sampler_destroy(attn_sampler *sampler); /* NULL is ignored */
/* A token was read or produced: it counts for the repeat penalty. */
ATTN_API void attn_sampler_accept(attn_sampler *sampler, int32_t token);
/* Choose from logits [vocabulary]. Tokens whose logit is NaN are never chosen; when all are, token 0 is. Ties: the lower id. */
ATTN_API int32_t attn_sampler_next(attn_sampler *sampler, const float *logits);

#ifdef __cplusplus
}
#endif
#endif
