/* Exact attention over several lists of keys under one softmax, and the share of it that falls on each list: a picture's own keys
 * and those of references, memories, retrieved passages. Keys and values are read where they lie: a task packs a block of them for
 * its own rows, so that memory does not depend on the number of keys. Results do not depend on the number of threads.
 */
#ifndef ATTN_EXEC_SEGMENTS_H
#define ATTN_EXEC_SEGMENTS_H

#include "core/internal.h"

/* One list. Rows of a batch item and a key/value head are contiguous; the strides are between items and heads, in elements. */
typedef struct attn_segment {
    int64_t keys;
    const float *k, *v;
    int64_t k_stride[2], v_stride[2];
    const int64_t *index; /* [keys]: rows of k and v that belong to the list; NULL: the first `keys` */
    const float *bias;    /* [keys], added to the scores; NULL: 0 */
    const float *factor;  /* [keys], multiplies the scores before that; NULL: 1 */
} attn_segment;

/* May change the scores of one query row (of all batch * heads * n) against keys first ... first + keys - 1 of a list, in base 2: times log2(e).
 * Called once for each row and block of keys, in the order of the keys, by any thread. */
typedef void attn_segment_hook(void *user, float *scores, int64_t row, int64_t segment, int64_t first, int64_t keys);

typedef struct attn_segments {
    int64_t batch, heads, kv_heads, n, d, dv;
    double scale;
    const float *q; /* [batch,heads,n,d] */
    int64_t count;
    const attn_segment *segments;
    attn_segment_hook *hook; /* NULL: none */
    void *user;
} attn_segments;

/* A scale that leaves q.k as it is: natural for orders, which rounding must not change. */
#define ATTN_SEGMENTS_UNSCALED 0.69314718055994530942

/* For hooks: the first of some scores above a value; `count` when there is none. */
static inline int64_t attn_segment_next_above(const float *scores, int64_t count, float value)
{
    enum { LANES = 16 };
    int64_t j = 0;
    for (int above = 0; j + LANES <= count; j += LANES) {
        for (int i = 0; i < LANES; i++) {
            above |= scores[j + i] > value;
        }
        if (above) {
            break;
        }
    }
    while (j < count && !(scores[j] > value)) {
        j++;
    }
    return j;
}

/* o [batch,heads,n,dv], lse [batch,heads,n], shares [batch,heads,n,count]: each may be NULL; without all three
 * the scores are shown to the hook and no more. A query without any key gets 0, -inf and 0. ATTN_ERR_MEMORY. */
attn_status attn_segments_forward(const attn_segments *s, float *o, float *lse, float *shares, attn_arena *arena, int threads);

#endif
