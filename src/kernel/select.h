/* Micro-kernels that find the largest of many numbers, and gather rows by number. */
#ifndef ATTN_KERNEL_SELECT_H
#define ATTN_KERNEL_SELECT_H

#include "kernel/dispatch.h"
#include <attn/tensor.h>
#include <stdint.h>

/* Room that `compress` may write beyond the last number kept. */
#define ATTN_SELECT_SLACK 16

typedef struct attn_select_kernels {
    /* How many are >= limit; a NaN is not. */
    int64_t (*count)(const float *x, int64_t count, float limit);
    /* The k-th largest, 1 <= k <= count; no NaN. Zeros of both signs are the same. */
    float (*kth)(const float *x, int64_t count, int64_t k);
    /* The numbers >= limit and their names (NULL: their places), in order; returns how many. `to` and `at` have room for that and
     * ATTN_SELECT_SLACK more; `to` may be x, and `at` names. A NaN is left out. */
    int64_t (*compress)(const float *x, int64_t count, float limit, const int32_t *names, float *to, int32_t *at);
    /* o[c] = sum over j of p[j] v[at[j]][c], c < width; rows of contiguous numbers, `stride` numbers apart. */
    void (*gather_values)(float *o, const float *p, const int32_t *at, int64_t count, const void *v, attn_dtype dtype, int64_t stride,
                          int64_t width);
} attn_select_kernels;

const attn_select_kernels *attn_select_kernels_get(void);
const attn_select_kernels *attn_select_kernels_at(attn_isa isa);

#endif
