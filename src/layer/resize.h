/* Resizing of grids. */
#ifndef ATTN_LAYER_RESIZE_H
#define ATTN_LAYER_RESIZE_H

#include <stdint.h>

/* Bilinear, half-pixel centres, no corner alignment, no smoothing: [images][from[0]*from[1]][channels] to [images][to[0]*to[1]][channels]. */
typedef struct attn_resize {
    int64_t images, channels, from[2], to[2];
} attn_resize;

void attn_resize_forward(const attn_resize *resize, int threads, const float *x, float *y);
/* grad_x is overwritten. */
void attn_resize_backward(const attn_resize *resize, int threads, const float *grad_y, float *grad_x);

#endif
