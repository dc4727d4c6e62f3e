/* Normalisation of rows; the statistics are sums in double. */
#include "layer/norm.h"

#include <math.h>
#include <string.h>

typedef struct statistics {
    double mean, inverse;
} statistics;

static statistics of_row(attn_norm norm, int64_t width, double eps, const float *x)
{
    double mean = 0, square = 0;
    for (int64_t i = 0; i < width && norm == ATTN_NORM_LAYER; i++) {
        mean += (double)x[i];
    }
    mean /= (double)width;
    for (int64_t i = 0; i < width; i++) {
        double centred = (double)x[i] - mean;
        square += centred * centred;
    }
    return (statistics){mean, 1 / sqrt(square / (double)width + eps)};
}

void attn_norm_forward(attn_norm norm, int threads, int64_t rows, int64_t width, double eps, const float *x, const float *w,
                       const float *bias, float *y)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width > 10000)
    for (int64_t r = 0; r < rows; r++) {
        statistics s = of_row(norm, width, eps, x + r * width);
        for (int64_t i = 0; i < width; i++) {
            float z = (float)(((double)x[r * width + i] - s.mean) * s.inverse);
            z = w != NULL ? z * w[i] : z;
            y[r * width + i] = bias != NULL ? z + bias[i] : z;
        }
    }
}

attn_status attn_norm_backward(attn_norm norm, attn_arena *arena, int threads, int64_t rows, int64_t width, double eps,
                               const float *x, const float *w, const float *grad_y, float *grad_x, float *grad_w,
                               float *grad_bias)
{
    attn_arena_mark mark = attn_arena_get_mark(arena);
    statistics *all = attn_arena_array(arena, (size_t)rows, sizeof *all);
    double *sums = attn_arena_array(arena, (size_t)width, 2 * sizeof *sums);
    if (all == NULL || sums == NULL) {
        return attn_fail_memory((size_t)(rows + width) * sizeof *all);
    }
    memset(sums, 0, (size_t)width * 2 * sizeof *sums);
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width > 10000)
    for (int64_t r = 0; r < rows; r++) {
        const float *xr = x + r * width, *gr = grad_y + r * width;
        statistics s = all[r] = of_row(norm, width, eps, xr);
        double along = 0, mean = 0;
        for (int64_t i = 0; i < width && grad_x != NULL; i++) {
            double g = (double)gr[i] * (w != NULL ? (double)w[i] : 1);
            along += g * ((double)xr[i] - s.mean) * s.inverse;
            mean += g;
        }
        along /= (double)width;
        mean = norm == ATTN_NORM_LAYER ? mean / (double)width : 0;
        for (int64_t i = 0; i < width && grad_x != NULL; i++) {
            double g = (double)gr[i] * (w != NULL ? (double)w[i] : 1);
            grad_x[r * width + i] = (float)(s.inverse * (g - mean - ((double)xr[i] - s.mean) * s.inverse * along));
        }
    }
    if (grad_w != NULL || grad_bias != NULL) {
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t i = 0; i < width; i++) {
                double g = (double)grad_y[r * width + i];
                sums[i] += g * ((double)x[r * width + i] - all[r].mean) * all[r].inverse;
                sums[width + i] += g;
            }
        }
    }
    for (int64_t i = 0; i < width; i++) {
        if (grad_w != NULL) {
            grad_w[i] += (float)sums[i];
        }
        if (grad_bias != NULL) {
            grad_bias[i] += (float)sums[width + i];
        }
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}
