/* Strided convolutions that embed patches of an image: a matrix product over unfolded patches. */
#ifndef ATTN_LAYER_PATCH_H
#define ATTN_LAYER_PATCH_H

#include "core/internal.h"

/* x [images][grid[0]*grid[1]][in] tokens, w [out][in][kernel[0]][kernel[1]], bias [out] or NULL, y [images][cells[0]*cells[1]][out].
 * The patch of cell (i, j) begins at pixel (i*stride - pad, j*stride - pad); pixels outside the image are zero. */
typedef struct attn_patch {
    int64_t images, in, out, grid[2], cells[2], kernel[2], stride, pad;
} attn_patch;

/* ATTN_ERR_MEMORY */
attn_status attn_patch_forward(const attn_patch *patch, attn_arena *arena, int threads, const float *x, const float *w, const float *bias,
                               float *y);
/* grad_x is overwritten, grad_w and grad_bias are added to; each may be NULL. ATTN_ERR_MEMORY. */
attn_status attn_patch_backward(const attn_patch *patch, attn_arena *arena, int threads, const float *x, const float *w,
                                const float *grad_y, float *grad_x, float *grad_w, float *grad_bias);

#endif
