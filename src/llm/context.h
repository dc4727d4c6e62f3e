/* Contexts: caches of keys and values (cache.c) and the buffers of evaluation (context.c). */
#ifndef ATTN_LLM_CONTEXT_H
#define ATTN_LLM_CONTEXT_H

#include "llm/model.h"

/* One sequence's keys and values of one layer: [kv_heads][capacity][width], with scales [kv_heads][capacity] for int8.
 * Layers with a sliding window keep the last keys only; the keys always start at index 0. */
typedef struct attn_kv {
    int64_t heads, width, capacity, window;
    attn_dtype dtype;
    char *k, *v;
    float *k_scale, *v_scale;
    int64_t seen;        /* tokens since the sequence began, forgotten ones included */
    int64_t *counts;     /* [heads] */
    int64_t **positions; /* [heads][capacity] once keys have been evicted; NULL while they are consecutive */
} attn_kv;

attn_status attn_kv_make(attn_kv *kv, int64_t heads, int64_t width, int64_t capacity, int64_t window, attn_dtype dtype);
void attn_kv_free(attn_kv *kv);
/* Make room for n more tokens; ATTN_ERR_ARGUMENT when the cache is full. */
attn_status attn_kv_reserve(attn_kv *kv, int64_t n);
/* Write the key and value of the token at `position`, one of those that attn_kv_reserve() made room for. */
void attn_kv_store(attn_kv *kv, int64_t head, int64_t position, const float *k, const float *v);
/* The positions of the n tokens to come, where the cache lists them. */
void attn_kv_announce(attn_kv *kv, int64_t n);
/* The tokens that were stored up to `length` now belong to the cache. */
void attn_kv_advance(attn_kv *kv, int64_t length);
/* Keep the keys of positions below `length`; `only_check`: change nothing. */
attn_status attn_kv_truncate(attn_kv *kv, int64_t length, int only_check);
attn_status attn_kv_keep(attn_kv *kv, int64_t head, const int64_t *indices, int64_t count);
attn_status attn_kv_copy(attn_kv *to, const attn_kv *from);
/* attn_llm_exact(), which also tells the index of each query's strongest key of those held, top [heads][N], for few queries. */
attn_status attn_llm_exact_top(const attn_llm_call *call, int64_t kv_begin, int64_t kv_end, int64_t *top);
size_t attn_kv_bytes(const attn_kv *kv); /* of the keys and values that it holds */

#endif
