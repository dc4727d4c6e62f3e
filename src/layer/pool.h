/* Pooling over grids of tokens. */
#ifndef ATTN_LAYER_POOL_H
#define ATTN_LAYER_POOL_H

#include <stdint.h>

/* Adaptive average pooling: cell (a, b) is the mean of rows floor(a*h/p) ... ceil((a+1)*h/p) - 1 and of the like columns; cells
 * overlap where p does not divide h, and there may be more cells than rows. x is [images] grids of [height*width] tokens at `stride` floats
 * from image to image, a token has `channels` floats; cells [images][cell_rows*cell_columns][channels]. */
typedef struct attn_pool_grid {
    int64_t images, height, width, channels, stride, cell_rows, cell_columns;
} attn_pool_grid;

void attn_pool_forward_mean(const attn_pool_grid *pool, int threads, const float *x, float *cells);
/* grad_x += the transpose of the above. */
void attn_pool_backward_mean(const attn_pool_grid *pool, int threads, const float *grad_cells, float *grad_x);

#endif
