/* Rotary positions. */
#include "layer/rope.h"

#include <math.h>

attn_status attn_rope_table(attn_arena *arena, int64_t first, int64_t count, int64_t dim, double base, float **table)
{
    *table = attn_arena_array(arena, (size_t)(count * dim), sizeof(float));
    double *frequency = attn_arena_array(arena, (size_t)(dim / 2), sizeof(double));
    if (*table == NULL || frequency == NULL) {
        return attn_fail_memory((size_t)(count * dim) * sizeof(float));
    }
    for (int64_t j = 0; j < dim / 2; j++) {
        frequency[j] = pow(base, -2.0 * (double)j / (double)dim);
    }
    for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < dim / 2; j++) {
            double angle = (double)(first + i) * frequency[j];
            (*table)[i * dim + 2 * j] = (float)cos(angle);
            (*table)[i * dim + 2 * j + 1] = (float)sin(angle);
        }
    }
    return ATTN_OK;
}

void attn_rope_apply(const float *table_row, int64_t dim, int interleaved, int inverse, float *x)
{
    for (int64_t j = 0; j < dim / 2; j++) {
        float *a = interleaved ? x + 2 * j : x + j, *b = interleaved ? x + 2 * j + 1 : x + j + dim / 2;
        float cosine = table_row[2 * j], sine = inverse ? -table_row[2 * j + 1] : table_row[2 * j + 1];
        float turned = *a * cosine - *b * sine;
        *b = *b * cosine + *a * sine;
        *a = turned;
    }
}
