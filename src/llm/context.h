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
    int64_t *counts;     /* [heads] */
    int64_t **positions; /* [heads][capacity] once keys have been evicted; NULL while they are consecutive */
} attn_kv;

attn_status attn_kv_make(attn_kv *kv, int64_t heads, int64_t width, int64_t capacity, int64_t window, attn_dtype dtype);
void attn_kv_free(attn_kv *kv);
/* Make room for n more tokens; ATTN_ERR_ARGUMENT when the cache is full. */
attn_status attn_kv_reserve(attn_kv *kv, int64_t n);
/* Write the key and value of the token that comes `ahead` after those that the cache holds. */
void attn_kv_store(attn_kv *kv, int64_t head, int64_t ahead, const float *k, const float *v);
/* The n tokens that were stored, from `position` on, now belong to the cache. */
void attn_kv_advance(attn_kv *kv, int64_t n, int64_t position);
/* Keep the keys of positions below `length`, when the cache has held `seen` tokens; `only_check`: change nothing. */
attn_status attn_kv_truncate(attn_kv *kv, int64_t length, int64_t seen, int only_check);
attn_status attn_kv_keep(attn_kv *kv, int64_t head, const int64_t *indices, int64_t count, int64_t seen);
attn_status attn_kv_copy(attn_kv *to, const attn_kv *from);
/* attn_llm_exact(), which also tells the index of each query's strongest key of those held, top [heads][N], for few queries. */
attn_status attn_llm_exact_top(const attn_llm_call *call, int64_t kv_begin, int64_t kv_end, int64_t *top);
size_t attn_kv_bytes(const attn_kv *kv); /* of the keys and values that it holds */

#endif
