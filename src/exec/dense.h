/* What the executors share with the dense one: the checked problem, packed keys and values, rows of queries, and scores. */
#ifndef ATTN_EXEC_DENSE_H
#define ATTN_EXEC_DENSE_H

#include "core/internal.h"
#include "exec/softmax.h"
#include "kernel/decode.h"
#include "kernel/tile.h"
#include <attn/dense.h>

/* Keys of a step of the online softmax. A multiple of every kernel's panel width. */
#define DENSE_BLOCK_K 512
/* Query rows that one task takes at least, and those that go through a block of keys together: multiples of the kernels' tile heights. */
#define DENSE_BLOCK_Q 192
#define DENSE_ROWS 48

typedef struct dense_problem {
    int64_t batch, heads, kv_heads, group, n, m, d, dv;
    int64_t dv_pad; /* dv up to whole vectors */
    double scale;
    attn_dense_settings settings;
    const attn_dense_inputs *in;
    const attn_tile_kernels *kernels;
    const attn_decode_kernels *decode;
    const attn_tensor *top; /* where decoding puts the key of the largest score; NULL: nowhere */
    int base2; /* q is scaled so that scores come out in base 2 at once (no soft cap in between) */
} dense_problem;

/* Check everything but the outputs. */
attn_status attn_dense_check(dense_problem *problem, const attn_dense_settings *settings, const attn_dense_inputs *inputs);
attn_status attn_dense_check_tensor(const char *name, const attn_tensor *tensor, const char *what, int ndim,
                                    const int64_t *shape, int float_only);

attn_status attn_dense_check_f32(const char *name, const attn_tensor *tensor, const char *what, int ndim, const int64_t *shape);

/* Visible keys [begin, end) of query n of batch item b; begin >= end when there is none. */
void attn_dense_visible(const dense_problem *problem, int64_t b, int64_t n, int64_t *begin, int64_t *end);

/* Address of an element of a 4-D view: batch, head and row; the last axis from 0. */
static inline const char *attn_dense_row(const attn_tensor *t, int64_t b, int64_t h, int64_t row)
{
    return (const char *)t->data +
           (b * t->stride[0] + h * t->stride[1] + row * t->stride[2]) * (int64_t)attn_dtype_size(t->dtype);
}

/* Read `count` numbers of a row of any stride into f32. */
void attn_dense_load_row(const dense_problem *problem, float *to, const attn_tensor *t, int64_t b, int64_t h, int64_t row,
                         int64_t count, float factor);
/* Write f32 to a row of any float type and stride. */
void attn_dense_store_row(const attn_tensor *t, int64_t b, int64_t h, int64_t row, const float *from, int64_t count);

/* The scale of an int8 key or value; 1 for other types. */
float attn_dense_row_scale(const attn_tensor *scales, int64_t b, int64_t h, int64_t row);

/* Rows [first, first+count) of a [B,Hkv,M,C] view, transposed in panels of `panel` keys: element (key j, channel c) at
 * (j / panel) * C * panel + c * panel + j % panel; columns of keys beyond `count` are zero up to a whole panel. rows: scratch of
 * DENSE_PACK_ROWS * C floats. */
void attn_dense_pack_transposed(const dense_problem *problem, float *to, int64_t panel, const attn_tensor *t, const attn_tensor *scales,
                                int64_t b, int64_t h, int64_t first, int64_t count, float *rows);
/* Rows that attn_dense_pack_transposed() converts at a time when it cannot pack them as they lie. */
#define DENSE_PACK_ROWS 16
/* The same rows as f32 [count][width_pad], zero-padded. */
void attn_dense_pack_rows(const dense_problem *problem, float *to, const attn_tensor *t, const attn_tensor *scales, int64_t b,
                          int64_t h, int64_t first, int64_t count, int64_t pad);

/* Whether values are whole rows of f32 of whole vectors, so that products can read them without a copy. */
int attn_dense_values_as_they_lie(const dense_problem *problem);

/* What lies between the product q.k and the softmax for one row: soft cap, slope, bias; from then on in base 2. s[i] belongs to key
 * first + i. The second function is the part after the soft cap. */
void attn_dense_adjust(const dense_problem *problem, float *s, int64_t b, int64_t h, int64_t n, int64_t first, int64_t count);
void attn_dense_shift(const dense_problem *problem, float *s, int64_t b, int64_t h, int64_t n, int64_t first, int64_t count);
int attn_dense_needs_adjust(const dense_problem *problem);
/* -inf outside [begin, end) */
static inline void attn_dense_mask_row(float *s, int64_t first, int64_t count, int64_t begin, int64_t end)
{
    int64_t low = attn_min_i64(count, attn_max_i64(0, begin - first)), high = attn_max_i64(low, attn_min_i64(count, end - first));
    for (int64_t i = 0; i < low; i++) {
        s[i] = -INFINITY;
    }
    for (int64_t i = high; i < count; i++) {
        s[i] = -INFINITY;
    }
}

/* The state of a row before any key: the sink's logit, when there is one. */
void attn_dense_begin_row(const dense_problem *problem, int64_t h, float *m, float *l);

/* Normalise a finished row [Dv] with its maximum and sum, write it, and its log-sum-exp unless lse is NULL. */
void attn_dense_finish_row(const dense_problem *problem, const attn_tensor *o, const attn_tensor *lse, int64_t b, int64_t h, int64_t n,
                           float *row, float m, float l);
void attn_dense_store_lse(const attn_tensor *lse, int64_t b, int64_t h, int64_t n, float m, float l);

/* Keys and values of a head that are read where they lie: `count` from `first` on, or with a list those of its entries, of which there are
 * `entries` >= count. */
typedef struct dense_keys {
    int64_t b, kv, first, count;
    const int32_t *list;
    int64_t entries;
    int rounded; /* of int8, see attn_decode_kernels */
} dense_keys;
/* From so many keys on that a query sees, int8 is read with rounded queries and weights: what that does to a weight (up to 2^-16 of the
 * largest one) evens out among so many, to 1e-5 of the values' size. */
#define DENSE_ROUNDED_KEYS 2048
/* The channels of each key, and of each value, are neighbours, as the following two need. */
int attn_dense_rows_lie_together(const dense_problem *problem);
/* Scores s [rows][lds] of queries q [rows][D]; o [rows][dv_pad] += weights s (which int8 scales change) times values. */
void attn_dense_scores_in_place(const dense_problem *problem, float *s, int64_t lds, const float *q, int64_t rows, const dense_keys *keys);
void attn_dense_values_in_place(const dense_problem *problem, float *o, float *s, int64_t lds, int64_t rows, const dense_keys *keys);

/* Merge what one row of head h gathered of `count` parts of its keys, in order and the sink first: sums o [dv], maxima m and sums l of
 * weights in base 2, each `step` numbers after that of the part before. merged [dv_pad] is not normalised; returns its sum of weights
 * relative to 2^shift, 0 when nothing was seen. */
double attn_dense_merge_parts(const dense_problem *problem, int64_t h, const float *o, const float *m, const float *l, int64_t step,
                              int64_t count, float *merged, float *shift);

/* dense_decode.c: few query rows, many keys. */
int attn_dense_is_decode(const dense_problem *problem);
attn_status attn_dense_decode(const dense_problem *problem, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena,
                              int threads);

/* dense_short.c: any number of query rows, few keys. */
int attn_dense_is_short(const dense_problem *problem);
attn_status attn_dense_short(const dense_problem *problem, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads);

#endif
