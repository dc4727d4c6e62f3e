/* Language models: GGUF files of decoder-only transformers, evaluated on CPUs.
 *
 *     attn_model *model;
 *     attn_model_open(&model, "model.gguf", NULL);
 *     attn_context *context;
 *     attn_context_create(&context, model, NULL);
 *     attn_context_batch batch = {.sequence = 0, .tokens = tokens, .count = n};
 *     attn_context_eval(context, &batch, 1, NULL, NULL);
 *     const float *logits = attn_context_logits(context, 0);
 *
 * Architectures: llama, qwen2, qwen3, gemma3. Weights stay as the file quantises them; activations are quantised to 15
 * bits, with a scale per 32 numbers, for the products with them; everything else is float32.
 */
#ifndef ATTN_MODEL_H
#define ATTN_MODEL_H

#include <attn/gguf.h>
#include <attn/memory.h>
#include <attn/tensor.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Models: read-only once opened, shared by any number of contexts and threads ---- */

typedef struct attn_model attn_model;

/* Called now and then with the share that is done (0 ... 1); a result other than 0 cancels (ATTN_ERR_CANCELLED). */
typedef int (*attn_progress)(void *user, double done);

/* Zero-initialise for the defaults. */
typedef struct attn_model_settings {
    int threads; /* for rearranging the weights; 0: as many as OpenMP would use */
    attn_progress progress;
    void *user;
} attn_model_settings;

/* settings may be NULL. Errors name the key or the tensor: ATTN_ERR_FORMAT for what is missing or of the wrong shape,
 * ATTN_ERR_UNSUPPORTED for architectures, features and tensors that are not known. */
ATTN_API attn_status attn_model_open(attn_model **model, const char *path, const attn_model_settings *settings);
/* The same over memory that the caller keeps alive and unchanged until attn_model_close(). */
ATTN_API attn_status attn_model_open_memory(attn_model **model, const void *data, size_t bytes,
                                            const attn_model_settings *settings);
/* After all its contexts are destroyed. NULL is ignored. */
ATTN_API void attn_model_close(attn_model *model);

typedef struct attn_model_info {
    const char *architecture;
    int64_t layers;
    int64_t width;          /* of the residual stream */
    int64_t heads;          /* query heads */
    int64_t kv_heads;
    int64_t head_width;
    int64_t hidden;         /* width of the feed-forward part */
    int64_t vocabulary;
    int64_t context_length; /* that the model was made for */
    size_t weight_bytes;
} attn_model_info;

ATTN_API const attn_model_info *attn_model_get_info(const attn_model *model);
/* The sliding window of a layer: each query sees that many keys, itself included; 0: all. */
ATTN_API int64_t attn_model_window(const attn_model *model, int layer);
/* The file, with all its metadata (the tokenizer's, for example); valid until the model is closed. */
ATTN_API const attn_gguf *attn_model_file(const attn_model *model);

/* ---- Contexts: caches of keys and values, and evaluation. One context serves one call at a time. ---- */

typedef struct attn_context attn_context;

/* Zero-initialise for the defaults. */
typedef struct attn_context_settings {
    int64_t length;       /* tokens that each sequence can hold; 0: the model's context length, at most 32768 */
    int sequences;        /* sequences held at the same time; 0: 1 */
    int64_t chunk;        /* tokens evaluated together at most; 0: 512 */
    int threads;          /* 0: as many as OpenMP would use. Results do not depend on it. */
    attn_dtype cache;     /* ATTN_F32 (the default), F16, BF16, or I8 with one scale per token and head */
    attn_progress progress; /* called during evaluation */
    void *user;           /* for progress */
} attn_context_settings;

/* settings may be NULL. Memory of the caches is reserved here and first touched when it is filled. */
ATTN_API attn_status attn_context_create(attn_context **context, const attn_model *model,
                                         const attn_context_settings *settings);
ATTN_API void attn_context_destroy(attn_context *context); /* NULL is ignored */

/* Tokens to add to the end of a sequence. */
typedef struct attn_context_batch {
    int sequence;
    const int32_t *tokens;
    int64_t count; /* at least 1 */
} attn_context_batch;

/* Gets the logits [vocabulary] that follow token `token` of item `item` of the batch. A result other than 0 cancels. */
typedef int (*attn_context_each)(void *user, int item, int64_t token, const float *logits);

/* Add tokens to one or several different sequences. Only the logits after the last token of each item are computed, for
 * attn_context_logits(), unless `each` wants those of all tokens (in the batch's order). When a call fails or is
 * cancelled, each sequence keeps the chunks (or spans, see attn_llm_attention) that were complete; it is cleared when layers with a
 * sliding window have gone too far on to go back: attn_context_length() tells. */
ATTN_API attn_status attn_context_eval(attn_context *context, const attn_context_batch *batch, int count,
                                       attn_context_each each, void *user);
/* Logits [vocabulary] after the last token of item `item` of the last batch that was evaluated without `each`; valid
 * until the next evaluation. NULL when there is no such item. */
ATTN_API const float *attn_context_logits(const attn_context *context, int item);

/* Tokens that a sequence has seen; -1 when out of range. */
ATTN_API int64_t attn_context_length(const attn_context *context, int sequence);
/* Tokens that a sequence can still take; -1 when out of range. */
ATTN_API int64_t attn_context_room(const attn_context *context, int sequence);
/* Forget everything after the first `length` tokens; 0 clears. ATTN_ERR_ARGUMENT when layers with a sliding window or
 * evicted keys no longer hold what those tokens need; the sequence is then unchanged. */
ATTN_API attn_status attn_context_truncate(attn_context *context, int sequence, int64_t length);
/* Make sequence `to` a copy of `from`. */
ATTN_API attn_status attn_context_copy(attn_context *context, int to, int from);

/* ---- The attention mechanism of a layer ---- */

/* One layer's attention for consecutive tokens of one sequence. Keys are rotated already and in the order of their
 * positions; the queries' own are the last ones of each head. */
typedef struct attn_llm_call {
    const attn_model *model;
    int layer, sequence;
    int64_t position;         /* of the first query */
    attn_tensor q;            /* f32 [heads, N, D]; heads / kv_heads consecutive ones share a key head */
    attn_tensor k, v;         /* [kv_heads, T, D] in the cache's type; T is the largest of key_counts */
    attn_tensor k_scale, v_scale; /* f32 [kv_heads, T] when the cache is int8; q, k, v and o are then rows times one orthonormal matrix,
                                   * which scores and sums of values do not notice */
    const int64_t *key_counts;    /* [kv_heads]: keys that each head holds */
    const int64_t *const *key_positions; /* [kv_heads][key_counts]; NULL: consecutive, ending with the last query */
    attn_tensor o;            /* f32 [heads, N, D], to be filled */
    double scale;             /* of the scores */
    double softcap;           /* 0: none */
    int64_t window;           /* as attn_model_window() */
    attn_exec exec;
} attn_llm_call;

/* What computes a layer's attention. Functions that are NULL do as the model says: exact attention, all keys kept.
 * Zero-initialise for the defaults. */
typedef struct attn_llm_attention {
    attn_status (*prefill)(void *user, const attn_llm_call *call); /* several queries */
    attn_status (*decode)(void *user, const attn_llm_call *call);  /* one query */
    /* After each chunk of tokens; it may evict keys with attn_context_keep(). */
    attn_status (*update)(void *user, attn_context *context, int sequence, int layer);
    void *user;
    /* Queries that `prefill` should see together, more than a chunk, for mechanisms whose choice they share; 0: a chunk. It costs
     * 4 (width + 2 heads head_width) bytes each. Layers with a sliding window of their own always read by chunks. */
    int64_t span;
    /* `update` sees to it that the caches stay below the context's length however long the sequence grows. A sequence may be longer than
     * that length when this holds for all layers without a sliding window. */
    int endless;
} attn_llm_attention;

/* Use a mechanism in one layer (-1: in all) from now on; NULL: back to exact attention. The struct is copied. */
ATTN_API attn_status attn_context_set_attention(attn_context *context, int layer, const attn_llm_attention *attention);
/* Exact attention for the query heads of key heads kv_begin ... kv_end - 1 of a call: for mechanisms that replace
 * only some. */
ATTN_API attn_status attn_llm_exact(const attn_llm_call *call, int64_t kv_begin, int64_t kv_end);

/* Keep only some of a key head's keys: indices (ascending, of those that it holds now), count of them. The others are
 * gone. ATTN_ERR_UNSUPPORTED in layers with a sliding window, which hold few keys anyway. */
ATTN_API attn_status attn_context_keep(attn_context *context, int sequence, int layer, int64_t kv_head,
                                       const int64_t *indices, int64_t count);
/* Keys that a head holds; -1 when out of range. */
ATTN_API int64_t attn_context_keys(const attn_context *context, int sequence, int layer, int64_t kv_head);

/* ---- Statistics ---- */

typedef struct attn_context_stats {
    int64_t tokens;            /* evaluated */
    double seconds;            /* in attn_context_eval() */
    double attention_seconds;  /* of these, in attention */
    double linear_seconds;     /* of these, in products with weights, with norms and activations between them */
    double attention_flops;    /* 4 D per query head, query and key that it could see; multiply and add counted apart */
    size_t cache_bytes;        /* of keys and values that are held now */
    size_t cache_peak_bytes;   /* the most so far */
} attn_context_stats;

ATTN_API attn_context_stats attn_context_get_stats(const attn_context *context);
ATTN_API void attn_context_reset_stats(attn_context *context); /* but for the peak */

#ifdef __cplusplus
}
#endif
#endif
