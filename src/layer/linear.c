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

void attn_linear_add_columns(int threads, int64_t rows, int64_t columns, const float *from, int64_t ld, float *to)
{
    enum { LINE = 16 };
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && to != NULL)
    for (int64_t first = 0; first < (to != NULL ? columns : 0); first += LINE) {
        int64_t count = attn_min_i64(LINE, columns - first);
        double sums[LINE] = {0};
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t i = 0; i < count; i++) {
                sums[i] += (double)from[r * ld + first + i];
            }
        }
        for (int64_t i = 0; i < count; i++) {
            to[first + i] += (float)sums[i];
        }
    }
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
    attn_linear_add_columns(threads, rows, out, grad_y, out, grad_bias);
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
