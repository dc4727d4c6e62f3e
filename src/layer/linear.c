/* Linear layers, by matrix products. */
#include "layer/linear.h"

#include "layer/gemm.h"

#include <string.h>

attn_status attn_linear_forward(attn_arena *arena, int threads, int64_t rows, int64_t in, int64_t out, const float *x,
                                const float *w, const float *bias, float *y)
{
    if (bias != NULL) {
        for (int64_t i = 0; i < rows; i++) {
            memcpy(y + i * out, bias, (size_t)out * sizeof(float));
        }
    }
    return attn_gemm(arena, threads, 0, 1, rows, out, in, 1.0f, x, in, w, in, bias != NULL ? 1.0f : 0.0f, y, out);
}

static attn_status backward(attn_arena *arena, int threads, int64_t rows, int64_t in, int64_t out, const float *x, const float *w,
                            const float *grad_y, float keep, float *grad_x, float *grad_w, float *grad_bias)
{
    if (grad_x != NULL) {
        ATTN_TRY(attn_gemm(arena, threads, 0, 0, rows, in, out, 1.0f, grad_y, out, w, in, keep, grad_x, in));
    }
    if (grad_w != NULL) {
        ATTN_TRY(attn_gemm(arena, threads, 1, 0, out, in, rows, 1.0f, grad_y, out, x, in, 1.0f, grad_w, in));
    }
    if (grad_bias != NULL) {
        for (int64_t j = 0; j < out; j++) {
            double sum = 0;
            for (int64_t i = 0; i < rows; i++) {
                sum += (double)grad_y[i * out + j];
            }
            grad_bias[j] += (float)sum;
        }
    }
    return ATTN_OK;
}

attn_status attn_linear_backward(attn_arena *arena, int threads, int64_t rows, int64_t in, int64_t out, const float *x,
                                 const float *w, const float *grad_y, float *grad_x, float *grad_w, float *grad_bias)
{
    return backward(arena, threads, rows, in, out, x, w, grad_y, 0.0f, grad_x, grad_w, grad_bias);
}

attn_status attn_linear_backward_add(attn_arena *arena, int threads, int64_t rows, int64_t in, int64_t out, const float *x,
                                     const float *w, const float *grad_y, float *grad_x, float *grad_w, float *grad_bias)
{
    return backward(arena, threads, rows, in, out, x, w, grad_y, 1.0f, grad_x, grad_w, grad_bias);
}
