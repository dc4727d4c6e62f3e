/* Depthwise convolutions. */
#ifndef ATTN_LAYER_CONV_H
#define ATTN_LAYER_CONV_H

#include "core/internal.h"

/* Causal along a sequence: o[s][t][c] = bias[c] + sum over tau < taps of w[c][tau] * x[s][t - (taps-1) + tau][c].
 * Sequence s uses filter set s % sets. Before the start x is `state`, or zero. */
typedef struct attn_conv1d {
    int64_t sequences, length, channels, taps, sets;
    const float *w;     /* [sets][channels][taps] */
    const float *bias;  /* [sets][channels], or NULL */
    const float *state; /* [sequences][taps-1][channels]: the inputs just before x, or NULL */
} attn_conv1d;

/* x and o are [sequences][length][channels]; o must not be x. */
void attn_conv1d_forward(const attn_conv1d *conv, int threads, const float *x, float *o);
/* grad_x and grad_state are overwritten, grad_w and grad_bias are added to. Each may be NULL. ATTN_ERR_MEMORY. */
attn_status attn_conv1d_backward(const attn_conv1d *conv, attn_arena *arena, int threads, const float *x, const float *grad_o,
                                 float *grad_x, float *grad_state, float *grad_w, float *grad_bias);

/* On an image, zero padding to the same size, odd kernel: o[y][x][c] = bias[c] + sum w[c][dy][dx] * in[y+dy-k/2][x+dx-k/2][c].
 * in and o are [images][height][width][channels], w [channels][kernel][kernel], bias [channels] or NULL; o must not be in. */
void attn_conv2d_forward(int threads, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t kernel,
                         const float *in, const float *w, const float *bias, float *o);
/* grad_in is overwritten, grad_w and grad_bias are added to. Each may be NULL. */
void attn_conv2d_backward(int threads, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t kernel,
                          const float *in, const float *w, const float *grad_o, float *grad_in, float *grad_w,
                          float *grad_bias);

#endif
