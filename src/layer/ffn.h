/* Feed-forward layers of transformers. */
#ifndef ATTN_LAYER_FFN_H
#define ATTN_LAYER_FFN_H

#include "core/internal.h"
#include "layer/activation.h"

/* y = f(x up^T + up_bias) down^T + down_bias; gated: up has 2*hidden rows, [a, b] = x up^T + up_bias, y = (f(a) * b) down^T + ... */
typedef struct attn_ffn {
    int64_t in, hidden, out;
    attn_activation activation;
    int gated;
    const float *up, *up_bias;     /* [hidden or 2*hidden, in]; bias or NULL */
    const float *down, *down_bias; /* [out, hidden]; bias or NULL */
} attn_ffn;

/* x [rows, in], y [rows, out]. ATTN_ERR_MEMORY. */
attn_status attn_ffn_forward(const attn_ffn *ffn, attn_arena *arena, int threads, int64_t rows, const float *x, float *y);
/* Recomputes the hidden layer. grad_x is overwritten, the others are added to. Each may be NULL. ATTN_ERR_MEMORY. */
attn_status attn_ffn_backward(const attn_ffn *ffn, attn_arena *arena, int threads, int64_t rows, const float *x,
                              const float *grad_y, float *grad_x, float *grad_up, float *grad_up_bias, float *grad_down,
                              float *grad_down_bias);

#endif
