#include "layer/patch.h"

#include "layer/linear.h"

#include <string.h>

/* The patch of one cell [in][kernel rows][kernel columns], taken from an image or (back) added to it. */
static void unfold(const attn_patch *p, float *image, int64_t cell, float *row, int back)
{
    int64_t top = cell / p->cells[1] * p->stride - p->pad, left = cell % p->cells[1] * p->stride - p->pad, area = p->kernel[0] * p->kernel[1];
    for (int64_t dy = 0; dy < p->kernel[0]; dy++) {
        for (int64_t dx = 0; dx < p->kernel[1]; dx++) {
            int64_t y = top + dy, x = left + dx;
            int inside = y >= 0 && y < p->grid[0] && x >= 0 && x < p->grid[1];
            float *pixel = image + (inside ? (y * p->grid[1] + x) * p->in : 0);
            float *to = row + dy * p->kernel[1] + dx;
            for (int64_t c = 0; c < p->in; c++) {
                if (!back) {
                    to[c * area] = inside ? pixel[c] : 0;
                } else if (inside) {
                    pixel[c] += to[c * area];
                }
            }
        }
    }
}

static attn_status unfold_all(const attn_patch *p, attn_arena *arena, int threads, const float *x, float **rows)
{
    int64_t cells = p->cells[0] * p->cells[1], width = p->in * p->kernel[0] * p->kernel[1];
    *rows = attn_arena_array(arena, (size_t)(p->images * cells), (size_t)width * sizeof **rows);
    if (*rows == NULL) {
        return attn_fail_memory((size_t)(p->images * cells * width) * sizeof **rows);
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < p->images * cells; i++) {
        unfold(p, (float *)(uintptr_t)x + i / cells * p->grid[0] * p->grid[1] * p->in, i % cells, *rows + i * width, 0);
    }
    return ATTN_OK;
}

attn_status attn_patch_forward(const attn_patch *p, attn_arena *arena, int threads, const float *x, const float *w, const float *bias,
                               float *y)
{
    float *rows;
    ATTN_TRY(unfold_all(p, arena, threads, x, &rows));
    return attn_linear_forward(arena, threads, p->images * p->cells[0] * p->cells[1], p->in * p->kernel[0] * p->kernel[1], p->out, rows, w,
                               bias, y);
}

attn_status attn_patch_backward(const attn_patch *p, attn_arena *arena, int threads, const float *x, const float *w, const float *grad_y,
                                float *grad_x, float *grad_w, float *grad_bias)
{
    int64_t cells = p->cells[0] * p->cells[1], width = p->in * p->kernel[0] * p->kernel[1], pixels = p->grid[0] * p->grid[1] * p->in;
    float *rows, *grad_rows = attn_arena_array(arena, (size_t)(p->images * cells), (size_t)width * sizeof *grad_rows);
    ATTN_TRY(unfold_all(p, arena, threads, x, &rows));
    if (grad_rows == NULL) {
        return attn_fail_memory((size_t)(p->images * cells * width) * sizeof *grad_rows);
    }
    ATTN_TRY(attn_linear_backward(arena, threads, p->images * cells, width, p->out, rows, w, grad_y, grad_x != NULL ? grad_rows : NULL,
                                  grad_w, grad_bias));
    if (grad_x == NULL) {
        return ATTN_OK;
    }
    /* Patches of an image may overlap: each image is one thread's. */
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < p->images; i++) {
        memset(grad_x + i * pixels, 0, (size_t)pixels * sizeof *grad_x);
        for (int64_t cell = 0; cell < cells; cell++) {
            unfold(p, grad_x + i * pixels, cell, grad_rows + (i * cells + cell) * width, 1);
        }
    }
    return ATTN_OK;
}
