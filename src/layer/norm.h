/* Normalisation of rows. */
#ifndef ATTN_LAYER_NORM_H
#define ATTN_LAYER_NORM_H

#include "core/internal.h"

typedef enum attn_norm {
    ATTN_NORM_RMS,  /* x / sqrt(mean(x^2) + eps) */
    ATTN_NORM_LAYER /* (x - mean) / sqrt(variance + eps), biased variance */
} attn_norm;

/* y [rows, width] = normalised x * w + bias; w and bias [width] may be NULL. y may be x. */
void attn_norm_forward(attn_norm norm, int threads, int64_t rows, int64_t width, double eps, const float *x, const float *w,
                       const float *bias, float *y);
/* grad_x is overwritten; grad_w and grad_bias are added to. Each may be NULL. ATTN_ERR_MEMORY. */
attn_status attn_norm_backward(attn_norm norm, attn_arena *arena, int threads, int64_t rows, int64_t width, double eps,
                               const float *x, const float *w, const float *grad_y, float *grad_x, float *grad_w,
                               float *grad_bias);

#endif
