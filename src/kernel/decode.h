/* Micro-kernels for one-token decoding: a few query rows against many keys or values, read once as they lie. */
#ifndef ATTN_KERNEL_DECODE_H
#define ATTN_KERNEL_DECODE_H

#include "kernel/dispatch.h"
#include <attn/tensor.h>
#include <stdint.h>

/* `rows` query rows at a time (any number, best in fours) over `keys` rows of d or dv contiguous numbers, `stride` numbers apart.
 * f32 arithmetic. rounded: with int8, where the machine multiplies small whole numbers faster (AVX2 and AVX-512), queries and weights may be
 * rounded to 16 bits of the largest of their row; sums are exact then. */
typedef struct attn_decode_kernels {
    /* s[r*lds + j] = q[r] . k[j], q f32 [rows][ldq] */
    void (*scores)(float *s, int64_t lds, const float *q, int64_t ldq, int64_t rows, const void *k, attn_dtype dtype, int rounded,
                   int64_t stride, int64_t keys, int64_t d);
    /* o[r*ldo + c] += sum_j p[r*ldp + j] v[j][c] */
    void (*values)(float *o, int64_t ldo, const float *p, int64_t ldp, int64_t rows, const void *v, attn_dtype dtype, int rounded,
                   int64_t stride, int64_t keys, int64_t dv);
    /* The same with key j at row list[j]; the list has `entries` >= keys entries, so that rows are asked for beyond the keys. */
    void (*scores_listed)(float *s, int64_t lds, const float *q, int64_t ldq, int64_t rows, const void *k, attn_dtype dtype, int rounded,
                          int64_t stride, const int32_t *list, int64_t keys, int64_t entries, int64_t d);
    void (*values_listed)(float *o, int64_t ldo, const float *p, int64_t ldp, int64_t rows, const void *v, attn_dtype dtype, int rounded,
                          int64_t stride, const int32_t *list, int64_t keys, int64_t entries, int64_t dv);
    /* s[r*lds + j] *= by[j * stride]: scores and weights of int8 rows by the scales of these; of row list[j] unless NULL */
    void (*scale_keys)(float *s, int64_t lds, int64_t rows, const float *by, int64_t stride, const int32_t *list, int64_t keys);
} attn_decode_kernels;

/* For this machine, or what ATTN_ISA asks for. */
const attn_decode_kernels *attn_decode_kernels_get(void);
const attn_decode_kernels *attn_decode_kernels_at(attn_isa isa);

#endif
