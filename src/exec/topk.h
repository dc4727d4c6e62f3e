/* Softmax attention of each query to the keys of its largest scores, and the blocks of keys that get most of a block of queries' attention.
 * All scores are computed, a few rows at a time; what is kept is attended to from the same scores. */
#ifndef ATTN_EXEC_TOPK_H
#define ATTN_EXEC_TOPK_H

#include <attn/dense.h>

typedef struct attn_topk_settings {
    int64_t top_k;
    int causal;
    int share_group; /* one choice per key/value head and query, by the probabilities of its query heads summed */
    double scale;
} attn_topk_settings;

/* indices [B][H, or Hkv with share_group][N][top_k] or NULL: kept key positions, ascending, -1 in unused slots; ties go to the lower position, and
 * scores that float32 cannot tell apart are computed again in double. o NULL: the choice only. */
attn_status attn_topk_forward(const attn_topk_settings *settings, const attn_dense_inputs *inputs, int64_t *indices, const attn_tensor *o,
                              const attn_tensor *lse, const attn_exec *exec);

/* kept [B][H][ceil(N / block_q)][top_k]: kept blocks of keys, ascending, -1 in unused slots, by the probabilities summed over the block's
 * queries and keys; ties go to the lower one. With causality the diagonal block comes first. share_group is not looked at. */
attn_status attn_topk_blocks(const attn_topk_settings *settings, const attn_dense_inputs *inputs, int64_t block_q, int64_t block_k,
                             int64_t *kept, const attn_exec *exec);

#endif
