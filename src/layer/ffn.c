/* Feed-forward layers of transformers. */
#include "layer/ffn.h"

#include "layer/linear.h"

/* act [rows, hidden] from before [rows, hidden or 2*hidden]. */
static void activate(const attn_ffn *f, int threads, int64_t rows, const float *before, float *act)
{
    if (!f->gated) {
        attn_activation_forward(f->activation, threads, rows * f->hidden, before, act);
        return;
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * f->hidden > 20000)
    for (int64_t r = 0; r < rows; r++) {
        const float *a = before + 2 * r * f->hidden;
        for (int64_t i = 0; i < f->hidden; i++) {
            act[r * f->hidden + i] = (float)(attn_activation_at(f->activation, (double)a[i], NULL) * (double)a[f->hidden + i]);
        }
    }
}

static attn_status hidden_layer(const attn_ffn *f, attn_arena *arena, int threads, int64_t rows, const float *x, float **before,
                                float **act)
{
    int64_t width = f->gated ? 2 * f->hidden : f->hidden;
    *before = attn_arena_array(arena, (size_t)(rows * (width + f->hidden)), sizeof(float));
    if (*before == NULL) {
        return attn_fail_memory((size_t)(rows * (width + f->hidden)) * sizeof(float));
    }
    *act = *before + rows * width;
    ATTN_TRY(attn_linear_forward(arena, threads, rows, f->in, width, x, f->up, f->up_bias, *before));
    activate(f, threads, rows, *before, *act);
    return ATTN_OK;
}

attn_status attn_ffn_forward(const attn_ffn *f, attn_arena *arena, int threads, int64_t rows, const float *x, float *y)
{
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *before = NULL, *act = NULL;
    ATTN_TRY(hidden_layer(f, arena, threads, rows, x, &before, &act));
    ATTN_TRY(attn_linear_forward(arena, threads, rows, f->hidden, f->out, act, f->down, f->down_bias, y));
    attn_arena_release(arena, mark);
    return ATTN_OK;
}

attn_status attn_ffn_backward(const attn_ffn *f, attn_arena *arena, int threads, int64_t rows, const float *x,
                              const float *grad_y, float *grad_x, float *grad_up, float *grad_up_bias, float *grad_down,
                              float *grad_down_bias)
{
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *before = NULL, *act = NULL, *grad_act = attn_arena_array(arena, (size_t)(rows * f->hidden), sizeof(float));
    if (grad_act == NULL) {
        return attn_fail_memory((size_t)(rows * f->hidden) * sizeof(float));
    }
    ATTN_TRY(hidden_layer(f, arena, threads, rows, x, &before, &act));
    ATTN_TRY(attn_linear_backward(arena, threads, rows, f->hidden, f->out, act, f->down, grad_y, grad_act, grad_down,
                                  grad_down_bias));
    if (f->gated) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * f->hidden > 20000)
        for (int64_t r = 0; r < rows; r++) {
            float *a = before + 2 * r * f->hidden;
            for (int64_t i = 0; i < f->hidden; i++) {
                double slope, g = (double)grad_act[r * f->hidden + i], b = (double)a[f->hidden + i];
                double value = attn_activation_at(f->activation, (double)a[i], &slope);
                a[i] = (float)(g * slope * b);
                a[f->hidden + i] = (float)(g * value);
            }
        }
    } else {
        attn_activation_backward(f->activation, threads, rows * f->hidden, before, grad_act, before);
    }
    ATTN_TRY(attn_linear_backward(arena, threads, rows, f->in, f->gated ? 2 * f->hidden : f->hidden, x, f->up, before, grad_x,
                                  grad_up, grad_up_bias));
    attn_arena_release(arena, mark);
    return ATTN_OK;
}
