/* Row-wise operations of transformers in float32: norms, rotary positions, gated activations. */
#ifndef ATTN_KERNEL_ROWS_H
#define ATTN_KERNEL_ROWS_H

#include "kernel/dispatch.h"

#include <stdint.h>

typedef enum attn_row_function { ATTN_ROW_SIGMOID, ATTN_ROW_SILU, ATTN_ROW_SOFTPLUS, ATTN_ROW_ELU1 } attn_row_function;

typedef struct attn_row_kernels {
    /* out = x / sqrt(mean(x^2) + epsilon) * weight; out may be x. */
    void (*rms_norm)(const float *x, const float *weight, int64_t n, float epsilon, float *out);
    /* Of each of `rows` rows ld apart (x[i], x[i + half]) rotated by the angle of cosine[i], sine[i]. */
    void (*rotate)(float *x, int64_t rows, int64_t ld, int64_t half, const float *cosine, const float *sine);
    void (*add)(float *x, const float *y, int64_t n); /* x += y */
    void (*scale)(float *x, float factor, int64_t n);
    /* gate = silu(gate) * up, and gelu (the tanh form) */
    void (*silu_gate)(float *gate, const float *up, int64_t n);
    void (*gelu_gate)(float *gate, const float *up, int64_t n);
    /* out = f(x), or with grad: grad * f'(x); out may be x or grad. ELU1: x + 1 for x > 0, else e^x. */
    void (*function)(attn_row_function f, const float *x, const float *grad, int64_t n, float *out);
    void (*to_f16)(const float *x, int64_t n, uint16_t *out);
    void (*to_bf16)(const float *x, int64_t n, uint16_t *out);
    /* out * (the result) = x, out in -127 ... 127 */
    float (*to_i8)(const float *x, int64_t n, int8_t *out);
    /* x times an orthonormal Hadamard matrix, which is its own inverse, in blocks of the largest power of two that divides n. */
    void (*hadamard)(float *x, int64_t n);
} attn_row_kernels;

ATTN_KERNEL_TABLES(attn_row_kernels, attn_row_kernels_table);

#endif
