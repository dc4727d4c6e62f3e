/* What the forward and backward sweeps of linear attention share: one thread's buffers and the parts of one chunk.
 * Rows are padded to multiples of 16 so that whole vectors can be read. */
#ifndef ATTN_EXEC_LINEAR_WORK_H
#define ATTN_EXEC_LINEAR_WORK_H

#include "exec/linear.h"
#include "kernel/linear.h"
#include "kernel/tile.h"

#define ATTN_LINEAR_STRIPE 6 /* rows of a chunk that share their last visible column; the next chunk is asked for between stripes */

/* What a sweep reads and writes of a head; each may be NULL. */
typedef struct attn_linear_rows {
    const float *q, *to_q, *k, *to_k;   /* rows of d */
    const float *g, *v, *to_v, *decays; /* rows of dv (g: by query), and of the features */
} attn_linear_rows;

typedef struct attn_linear_work {
    const attn_linattn *x;
    const attn_tile_kernels *tile;
    const attn_linear_kernels *kernel;
    int64_t chunk, width;       /* tokens of a chunk; features */
    int64_t mp, dp, vp, fp;     /* padded chunk, d, dv, width */
    double outer;               /* the factor of phi(q) S: scale, or 1 when the features hold it */
    int64_t count, low;         /* of this chunk: tokens, and the first token that has a query */
    int in_place;               /* q and k may be the caller's rows */
    const float *q, *k;         /* rows of the chunk, ldq and ldk apart */
    int64_t ldq, ldk;
    float *own_q, *own_k;       /* [chunk][dp]: copies of them, zero outside */
    const float *v, *g;         /* rows of the chunk, vp apart: the caller's where they are whole vectors, or */
    float *own_v, *own_g;       /* [chunk][vp]: copies of them, zero outside */
    float *kt, *vt;             /* [d][mp], [dv][mp] */
    float *s, *p, *decay;       /* [chunk][mp]: weights, their gradients, decays from column to row (0 above the diagonal) */
    float *in, *out;            /* [chunk]: decay from before the chunk to a token (times outer), from a token to the end */
    double *row;                /* [chunk] */
    float total;                /* decay of the whole chunk */
    const float *decays;        /* by feature: rows of the chunk, `width` apart */
    float *totals;              /* [fp]: by feature, of the whole chunk */
    float *sums;                /* [fp]: of the features of keys before the chunk */
    float *pq, *pk;             /* [chunk][fp]: features of q times `in`, of k times `out` */
    float *state, *turned;      /* [width][vp], [dv][fp] */
    float *o;                   /* [chunk][max(vp, fp)] */
    float *back;                /* [chunk][fp] */
    attn_ahead ahead;           /* the rows of the next chunk */
} attn_linear_work;

/* The form by pairs: keys of a block, and rows of queries that go through it together. */
#define ATTN_LINEAR_PAIR_KEYS 512
#define ATTN_LINEAR_PAIR_ROWS 48

static inline int64_t attn_linear_padded(int64_t count) { return (count + 15) / 16 * 16; }
/* Keys that query i sees. */
static inline int64_t attn_linear_visible(const attn_linattn *x, int64_t i)
{
    return x->causal ? attn_max_i64(0, attn_min_i64(x->m, i + 1 + x->m - x->n)) : x->m;
}
/* Rows `to` apart, `from` apart in the source. */
void attn_linear_copy(float *to, int64_t ld_to, const float *from, int64_t ld_from, int64_t rows, int64_t columns);
/* Weights of `rows` queries from `first` on for keys key ... key + count - 1 into s [rows][ATTN_LINEAR_PAIR_KEYS], 0 where a key is not
 * visible; slope, unless NULL, their derivatives by the raw product q.k. q: rows of ldq; kt: keys transposed, columns padded. */
void attn_linear_pair_weights(const attn_linattn *x, int64_t first, int64_t rows, int64_t key, int64_t count, const float *q,
                              int64_t ldq, const float *kt, float *s, float *slope);

/* Set `ahead` to the chunk from token `first` on; nothing when there is none. */
void attn_linear_ahead(attn_linear_work *w, int64_t first, int shares, const attn_linear_rows *rows);

size_t attn_linear_work_floats(const attn_linattn *x);
void attn_linear_work_init(attn_linear_work *w, const attn_linattn *x, float *memory);
/* Load tokens first ... first + count - 1 (positions of keys) of one head; q, g, and k with v may be NULL. Sets count and low. */
void attn_linear_load(attn_linear_work *w, int64_t first, int64_t count, const float *q, const float *k, const float *v,
                      const float *g);
/* Decays of the loaded chunk of head h of batch item b. */
void attn_linear_decays(attn_linear_work *w, int64_t b, int64_t h, int64_t first);
/* pq and pk of the loaded chunk. With decay by feature they are not decayed yet. */
void attn_linear_features(attn_linear_work *w, int with_q, int with_k);
/* The same with decay by feature: rows [chunk][fp] decayed from before the chunk (sets totals), and to its end. */
void attn_linear_fade_in(attn_linear_work *w, float *rows);
void attn_linear_fade_out(attn_linear_work *w, float *rows);
/* state [width][vp] *= the decay of the whole chunk. */
void attn_linear_decay_state(attn_linear_work *w);
/* s: final weights of the pairs of the chunk; p, when wanted: their derivative by the raw product q.k. A stripe of rows from r on, for
 * which kt holds the keys, or all of them, and kt too. */
void attn_linear_weights_rows(attn_linear_work *w, int64_t r, int with_slope);
void attn_linear_weights(attn_linear_work *w, int with_slope);

#endif
