#include "layer/pool.h"

#include <string.h>

/* Row or column range of a cell. */
static int64_t cell_begin(int64_t cell, int64_t cells, int64_t extent) { return cell * extent / cells; }
static int64_t cell_end(int64_t cell, int64_t cells, int64_t extent) { return ((cell + 1) * extent + cells - 1) / cells; }

/* One image, forward or (back) its transpose. */
static void pool_image(const attn_pool_grid *p, float *x, float *cells, int back)
{
    for (int64_t a = 0; a < p->cell_rows; a++) {
        int64_t top = cell_begin(a, p->cell_rows, p->height), bottom = cell_end(a, p->cell_rows, p->height);
        for (int64_t b = 0; b < p->cell_columns; b++) {
            int64_t left = cell_begin(b, p->cell_columns, p->width), right = cell_end(b, p->cell_columns, p->width);
            float *cell = cells + (a * p->cell_columns + b) * p->channels;
            float share = 1 / (float)((bottom - top) * (right - left));
            if (!back) {
                memset(cell, 0, (size_t)p->channels * sizeof *cell);
            }
            for (int64_t i = top; i < bottom; i++) {
                for (int64_t j = left; j < right; j++) {
                    float *token = x + (i * p->width + j) * p->channels;
                    for (int64_t c = 0; c < p->channels; c++) {
                        *(back ? &token[c] : &cell[c]) += back ? share * cell[c] : token[c];
                    }
                }
            }
            for (int64_t c = 0; c < p->channels && !back; c++) {
                cell[c] *= share;
            }
        }
    }
}

static void pool_images(const attn_pool_grid *p, int threads, float *x, float *cells, int back)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < p->images; i++) {
        pool_image(p, x + i * p->stride, cells + i * p->cell_rows * p->cell_columns * p->channels, back);
    }
}

void attn_pool_forward_mean(const attn_pool_grid *pool, int threads, const float *x, float *cells)
{
    pool_images(pool, threads, (float *)(uintptr_t)x, cells, 0);
}

void attn_pool_backward_mean(const attn_pool_grid *pool, int threads, const float *grad_cells, float *grad_x)
{
    pool_images(pool, threads, grad_x, (float *)(uintptr_t)grad_cells, 1);
}
