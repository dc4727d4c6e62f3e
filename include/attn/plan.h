/* Sparse plans: which keys each block of queries sees. Built from patterns, selections or masks, combined, measured, drawn, saved,
 * and computed with.
 *
 *     attn_plan *plan;
 *     attn_plan_shape shape = {.batch = 1, .heads = 1, .n = n, .m = n, .block_q = 64, .block_k = 64};
 *     attn_plan_streaming(&plan, &shape, 4, 1024);
 *     attn_plan_forward(plan, &settings, &inputs, &o, &lse, NULL);
 *     attn_plan_destroy(plan);
 *
 * A plan lists, for each batch item, head and block of queries, blocks of keys in ascending order. A block is full, or masked inside by
 * the plan's rule for that head, or by a bitmap of its own. With block_k = 1 the lists are lists of single keys. Query n stands at
 * position i = n + (M - N), so that the last query sees the last key under causality.
 */
#ifndef ATTN_PLAN_H
#define ATTN_PLAN_H

#include <attn/dense.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_plan attn_plan;

/* batch: 1 (the same lists for every batch item) or B. heads: 1 (all alike), Hkv (one list per group of query heads) or H. */
typedef struct attn_plan_shape {
    int64_t batch, heads;
    int64_t n, m;             /* queries and keys */
    int64_t block_q, block_k; /* at least 1; the last block of each axis may be short */
} attn_plan_shape;

/* Token-level visibility: key j is visible from position i when (j <= i or not causal) and (j < sinks or i - left <= j <= i + right).
 * left and right: -1 for no bound. */
typedef struct attn_plan_rule {
    int64_t causal, sinks, left, right;
} attn_plan_rule;

#define ATTN_PLAN_FULL (-1) /* every pair of the block is visible */
#define ATTN_PLAN_RULE (-2) /* those that the head's rule allows */

/* The lists as they lie in memory. Row r = (b * heads + h) * rows + query block. */
typedef struct attn_plan_layout {
    attn_plan_shape shape;
    int64_t rows, columns;       /* blocks of queries and of keys */
    const int64_t *start;        /* [batch*heads*rows + 1]: where each row's entries begin */
    const int32_t *column;       /* [entries]: the key block, ascending within a row */
    const int32_t *mask;         /* [entries]: ATTN_PLAN_FULL, ATTN_PLAN_RULE, or the number of a bitmap */
    const uint8_t *bits;         /* bitmaps of block_q*block_k bits, each of bitmap_bytes: bit query*block_k + key, low bits first */
    int64_t bitmaps, bitmap_bytes;
    const attn_plan_rule *rules; /* [batch*heads] */
} attn_plan_layout;

/* Valid as long as the plan is and is not changed. */
ATTN_API const attn_plan_layout *attn_plan_get_layout(const attn_plan *plan);
ATTN_API void attn_plan_destroy(attn_plan *plan); /* NULL is ignored */

/* ---- Building. *plan is NULL on failure. ATTN_ERR_ARGUMENT names the parameter; ATTN_ERR_SHAPE: extents that do not agree. ---- */

/* Every pair that a rule allows (NULL: every pair), the same for all heads: causal, windows, sinks. */
ATTN_API attn_status attn_plan_from_rule(attn_plan **plan, const attn_plan_shape *shape, const attn_plan_rule *rule);
/* The first `sinks` keys and the last `recent` up to the query's own position (arXiv:2309.17453). */
ATTN_API attn_status attn_plan_streaming(attn_plan **plan, const attn_plan_shape *shape, int64_t sinks, int64_t recent);
/* Every query sees the first `tokens` keys, and the first `tokens` queries see every key (arXiv:2004.05150). */
ATTN_API attn_status attn_plan_global(attn_plan **plan, const attn_plan_shape *shape, int64_t tokens);
/* Keys whose distance to the query is a multiple of `stride`, up to `count` of them on each side (0: all) (arXiv:1904.10509). */
ATTN_API attn_status attn_plan_strided(attn_plan **plan, const attn_plan_shape *shape, int64_t stride, int64_t count);
/* Whatever a function says; it is asked about every pair of every head. */
typedef int (*attn_plan_visible)(void *user, int64_t b, int64_t h, int64_t n, int64_t m);
ATTN_API attn_status attn_plan_from_function(attn_plan **plan, const attn_plan_shape *shape, attn_plan_visible visible, void *user);
/* From a boolean mask [batch,heads,N,M]. */
ATTN_API attn_status attn_plan_from_mask(attn_plan **plan, const attn_tensor *mask, int64_t block_q, int64_t block_k);
/* From block numbers [batch,heads,query blocks,K] (i32 or i64, any order, -1 for an unused slot, repeats count once), or for
 * block_k = 1 from key numbers. rule: NULL, or a rule that applies in every block that it cuts. */
ATTN_API attn_status attn_plan_from_lists(attn_plan **plan, const attn_plan_shape *shape, const attn_tensor *lists,
                                          const attn_plan_rule *rule);
/* From flags [batch,heads,query blocks,key blocks] (bool): the kept blocks. rule as above. */
ATTN_API attn_status attn_plan_from_flags(attn_plan **plan, const attn_plan_shape *shape, const attn_tensor *flags,
                                          const attn_plan_rule *rule);

/* ---- Combining: plans of the same n, m and blocks; an extent of 1 on the batch or head axis stands for all ---- */

ATTN_API attn_status attn_plan_union(attn_plan **plan, const attn_plan *a, const attn_plan *b);
ATTN_API attn_status attn_plan_intersection(attn_plan **plan, const attn_plan *a, const attn_plan *b);
/* The intersection with causality. */
ATTN_API attn_status attn_plan_causal(attn_plan **plan, const attn_plan *from);
/* Head h of the result is that of plans[which[h]], h < heads. */
ATTN_API attn_status attn_plan_mix(attn_plan **plan, int64_t heads, const attn_plan *const *plans, const int64_t *which);

/* ---- Looking ---- */

/* Whether the plan serves B, H query heads, Hkv key/value heads, N and M; ATTN_ERR_SHAPE says what does not agree. */
ATTN_API attn_status attn_plan_fits(const attn_plan *plan, int64_t b, int64_t h, int64_t hkv, int64_t n, int64_t m);
/* 1 when query n may see key m. */
ATTN_API int attn_plan_sees(const attn_plan *plan, int64_t b, int64_t h, int64_t n, int64_t m);

typedef struct attn_plan_measures {
    double pairs;         /* visible (query, key) pairs, summed over the plan's batch items and heads */
    double touched_pairs; /* pairs of all listed blocks: what is computed */
    double density;       /* pairs / (batch * heads * N * M) */
    double speedup;       /* of an ideal executor over dense attention: N*M / touched pairs (infinite for an empty plan) */
    double causal_speedup; /* over causal dense attention */
    double entries, full, partial; /* blocks */
    double flops;         /* 2 * touched_pairs * (d + dv) */
} attn_plan_measures;
ATTN_API void attn_plan_measure(const attn_plan *plan, int64_t d, int64_t dv, attn_plan_measures *measures);

/* Text, one character per block ('#' full, '+' partly masked, '.' none; several blocks share one where there are more than `width`):
 * *text is freed by attn_plan_free_text(). */
ATTN_API attn_status attn_plan_draw_text(const attn_plan *plan, int64_t b, int64_t h, int64_t width, char **text);
ATTN_API void attn_plan_free_text(char *text);
/* A grey PNG of at most size x size pixels: the darker, the more of the pixel's pairs are visible. */
ATTN_API attn_status attn_plan_draw_png(const attn_plan *plan, int64_t b, int64_t h, int64_t size, const char *path);

/* ---- Files: see docs/plan-format.md. Everything that is read is checked (ATTN_ERR_FORMAT). ---- */

ATTN_API attn_status attn_plan_save(const attn_plan *plan, const char *path);
ATTN_API attn_status attn_plan_load(attn_plan **plan, const char *path);
ATTN_API attn_status attn_plan_load_memory(attn_plan **plan, const void *data, size_t bytes);

/* ---- Computing. As attn_dense_forward and attn_dense_backward, over the plan's pairs only; causal, window and key_length of the settings
 * and inputs mask further. Gradients of bias and slopes are ATTN_ERR_UNSUPPORTED. ---- */

ATTN_API attn_status attn_plan_forward(const attn_plan *plan, const attn_dense_settings *settings, const attn_dense_inputs *inputs,
                                       const attn_tensor *o, const attn_tensor *lse, const attn_exec *exec);
ATTN_API attn_status attn_plan_backward(const attn_plan *plan, const attn_dense_settings *settings, const attn_dense_inputs *inputs,
                                        const attn_tensor *o, const attn_tensor *lse, const attn_tensor *grad_o,
                                        const attn_dense_gradients *gradients, const attn_exec *exec);

#ifdef __cplusplus
}
#endif
#endif
