#include "layer/resize.h"

#include <string.h>

/* Where a row or column of the result comes from. */
typedef struct source {
    int64_t low, high;
    float weight; /* of high */
} source;

static source source_of(int64_t at, int64_t from, int64_t to)
{
    double s = ((double)at + 0.5) * (double)from / (double)to - 0.5;
    s = s > 0 ? s : 0;
    source out = {.low = (int64_t)s};
    out.low = out.low < from - 1 ? out.low : from - 1;
    out.high = out.low + 1 < from - 1 ? out.low + 1 : from - 1;
    out.weight = (float)(s - (double)out.low);
    return out;
}

static void resize_image(const attn_resize *r, float *x, float *y, int back)
{
    for (int64_t i = 0; i < r->to[0]; i++) {
        source row = source_of(i, r->from[0], r->to[0]);
        for (int64_t j = 0; j < r->to[1]; j++, y += r->channels) {
            source column = source_of(j, r->from[1], r->to[1]);
            float *corner[4] = {x + (row.low * r->from[1] + column.low) * r->channels, x + (row.low * r->from[1] + column.high) * r->channels,
                                x + (row.high * r->from[1] + column.low) * r->channels, x + (row.high * r->from[1] + column.high) * r->channels};
            float weight[4] = {(1 - row.weight) * (1 - column.weight), (1 - row.weight) * column.weight, row.weight * (1 - column.weight),
                               row.weight * column.weight};
            for (int64_t c = 0; c < r->channels; c++) {
                if (back) {
                    for (int k = 0; k < 4; k++) {
                        corner[k][c] += weight[k] * y[c];
                    }
                } else {
                    y[c] = weight[0] * corner[0][c] + weight[1] * corner[1][c] + weight[2] * corner[2][c] + weight[3] * corner[3][c];
                }
            }
        }
    }
}

static void resize_images(const attn_resize *r, int threads, float *x, float *y, int back)
{
    int64_t from = r->from[0] * r->from[1] * r->channels, to = r->to[0] * r->to[1] * r->channels;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < r->images; i++) {
        if (back) {
            memset(x + i * from, 0, (size_t)from * sizeof *x);
        }
        resize_image(r, x + i * from, y + i * to, back);
    }
}

void attn_resize_forward(const attn_resize *resize, int threads, const float *x, float *y)
{
    resize_images(resize, threads, (float *)(uintptr_t)x, y, 0);
}

void attn_resize_backward(const attn_resize *resize, int threads, const float *grad_y, float *grad_x)
{
    resize_images(resize, threads, grad_x, (float *)(uintptr_t)grad_y, 1);
}
