/* Exact attention of lists of query rows, each of which sees the first `end` keys of its head: what remains when a mechanism has
 * decided which queries a head serves, or how far each one sees. Options: one more key of its own per row, and learned relative
 * positions. Tiled, with the online softmax; results do not depend on the number of threads.
 */
#ifndef ATTN_EXEC_STAIRS_H
#define ATTN_EXEC_STAIRS_H

#include "core/internal.h"

/* One query head. Heads with the same `kv` share k and v (set them in each), and lie next to each other in the list. */
typedef struct attn_stairs_head {
    int64_t rows, kv;
    const float *q;     /* [rows][d] */
    const int64_t *q_row; /* row r of the queries is row q_row[r] of q; NULL: row r. Not with keys of their own or relative positions. */
    const int64_t *end; /* [rows], 0 ... keys; best sorted */
    const float *k, *v; /* [keys][d], [keys][dv] */
    const float *own_k, *own_v; /* [rows][d], [rows][dv]: one more key per row; or both NULL */
    const float *q_bias; /* [d], added to q where it meets keys; or NULL */
    /* Relative positions: rows are consecutive, row r stands at position first + r. The score is scale * ((q + q_bias).k + q.R[zero + j -
     * position] + S[zero + j - position]). R is NULL for all heads when there are none; S may be NULL. */
    const float *rel_emb, *rel_bias; /* R [rel_count][rel_stride]; S with a stride of rel_bias_stride */
    int64_t first, zero, rel_count, rel_stride, rel_bias_stride;
    float *o, *lse; /* [rows][dv], [rows]; a row without keys gets 0 and -inf. In forward o may be q where it has as many numbers, without q_row */
} attn_stairs_head;

/* The queries and own keys and values of rows [first, first + rows) of head h, where nothing keeps them: q [rows][d] gets the queries times
 * scale * log2(e), m [rows] their products with the own keys, and o [rows][stride] the own values. Called once for each block of rows, by
 * any thread; `in_order`, a head's blocks come one after another, and the call also makes those keys and values that its rows are the
 * first to see. */
typedef void attn_stairs_begin(const void *user, int64_t h, int64_t first, int64_t rows, float *q, float *o, int64_t stride, float *m);
#define ATTN_STAIRS_BLOCK 192 /* rows of a block */

typedef struct attn_stairs {
    int64_t keys, d, dv, kv_count, head_count;
    double scale;
    const attn_stairs_head *heads;
    attn_stairs_begin *begin; /* in forward, instead of q, own_k and own_v; or NULL */
    const void *user;         /* its first argument */
    int in_order;             /* with begin, for heads that share no keys and have sorted ends; a head is then one thread's */
} attn_stairs;

attn_status attn_stairs_forward(const attn_stairs *stairs, attn_arena *arena, int threads);

/* The same token by token: each step takes the next row of the heads for which it is due. */
typedef struct attn_stairs_steps {
    attn_stairs now; /* heads: the step's */
    const attn_stairs_head *all;
    attn_stairs_head *room;
} attn_stairs_steps;

/* room [head_count] */
attn_stairs_steps attn_stairs_steps_begin(const attn_stairs *stairs, attn_stairs_head *room);
/* The next row of those heads where it sees at most `end` keys. */
attn_status attn_stairs_steps_next(attn_stairs_steps *steps, int64_t end, attn_arena *arena, int threads);

/* Gradients of one head, all overwritten; each may be NULL. */
typedef struct attn_stairs_gradient {
    const float *grad_o;  /* [rows][dv] */
    float *q;             /* [rows][d] */
    float *own_k, *own_v; /* as own_k, own_v */
    float *rel_q;         /* [rows][d]: what q gets from the relative term, apart from `q` */
    float *rel_emb;       /* [rel_count][d], this head's */
    float *rel_bias;      /* [rel_count], this head's */
} attn_stairs_gradient;

/* o and lse as forward left them. grad_k [kv_count][keys][d] and grad_v [kv_count][keys][dv] are overwritten; NULL: not wanted. */
attn_status attn_stairs_backward(const attn_stairs *stairs, const attn_stairs_gradient *gradients, float *grad_k, float *grad_v,
                                 attn_arena *arena, int threads);

#endif
