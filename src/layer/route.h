/* Routers: softmax over a few experts and the choice of the best. */
#ifndef ATTN_LAYER_ROUTE_H
#define ATTN_LAYER_ROUTE_H

#include <stdint.h>

/* x [count] becomes its softmax (sums in double). Returns the log-sum-exp of the logits. */
double attn_softmax_row(int64_t count, float *x);
/* grad [count] with respect to the softmax p becomes that of the logits. */
void attn_softmax_row_back(int64_t count, const float *p, float *grad);
/* The `chosen` <= count largest of x, largest first; of equal ones the lower index. indices [chosen]. */
void attn_top_k(int64_t count, int64_t chosen, const float *x, int64_t *indices);

#endif
