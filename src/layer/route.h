/* Routers: softmax over a few experts and the choice of the best. */
#ifndef ATTN_LAYER_ROUTE_H
#define ATTN_LAYER_ROUTE_H

#include "core/internal.h"

/* x [count] becomes its softmax (sums in double). Returns the log-sum-exp of the logits. */
double attn_softmax_row(int64_t count, float *x);
/* grad [count] with respect to the softmax p becomes that of the logits. */
void attn_softmax_row_back(int64_t count, const float *p, float *grad);
/* The `chosen` <= count largest of x, largest first; of equal ones the lower index. indices [chosen]. */
void attn_top_k(int64_t count, int64_t chosen, const float *x, int64_t *indices);

/* Who serves which tokens: list i = b * experts + e holds the tokens of batch item b that expert e serves, ascending, as token[first[i]] ...
 * token[first[i+1] - 1], each 0 ... n-1. */
typedef struct attn_lists {
    int64_t count; /* batch * experts */
    int64_t *first, *token;
} attn_lists;

/* mask [batch][n][experts]: 1 where an expert serves a token. ATTN_ERR_MEMORY. */
attn_status attn_lists_create(attn_lists *lists, attn_arena *arena, int threads, int64_t batch, int64_t n, int64_t experts,
                              const uint8_t *mask);

/* to[r] = x[list[r]], rows of `width` numbers */
void attn_rows_gather(int threads, int64_t width, const float *x, const int64_t *list, int64_t count, float *to);
/* x[list[r]] += rows[r]; the list names no row twice */
void attn_rows_scatter_add(int threads, int64_t width, const float *rows, const int64_t *list, int64_t count, float *x);

#endif
