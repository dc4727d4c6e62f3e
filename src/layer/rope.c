/* Rotary positions. */
#include "layer/rope.h"
#include "kernel/rows.h"

#include <math.h>

#define NEAR 64

/* One turn after another: `count` pairs of a cosine and a sine. */
static void compose(int64_t count, const double *a, const double *b, double *to)
{
    for (int64_t j = 0; j < 2 * count; j += 2) {
        to[j] = a[j] * b[j] - a[j + 1] * b[j + 1];
        to[j + 1] = a[j] * b[j + 1] + a[j + 1] * b[j];
    }
}

static void turns_of(double position, int64_t count, const double *frequency, double *to)
{
    for (int64_t j = 0; j < count; j++) {
        to[2 * j] = cos(position * frequency[j]);
        to[2 * j + 1] = sin(position * frequency[j]);
    }
}

/* The turn of position `rest`, from those of its halves. */
static const double *near_turn(int64_t rest, int64_t count, const double *frequency, double *near, uint8_t *made)
{
    double *own = near + rest * 2 * count;
    if (!made[rest] && rest < 2) {
        turns_of((double)rest, count, frequency, own);
    } else if (!made[rest]) {
        const double *half = near_turn(rest / 2, count, frequency, near, made);
        compose(count, half, near_turn(rest - rest / 2, count, frequency, near, made), own);
    }
    made[rest] = 1;
    return own;
}

/* Each position is a multiple of NEAR and a rest: two turns in double, one after the other, instead of a sine and a cosine for each. What
 * a position gets does not depend on where the table starts. */
attn_status attn_rope_table(attn_arena *arena, int64_t first, int64_t count, int64_t dim, double base, float **table)
{
    *table = attn_arena_array(arena, (size_t)(count * dim), sizeof(float));
    double *frequency = attn_arena_array(arena, (size_t)(dim / 2 + (NEAR + 2) * dim), sizeof(double));
    if (*table == NULL || frequency == NULL) {
        return attn_fail_memory((size_t)(count * dim) * sizeof(float));
    }
    for (int64_t j = 0; j < dim / 2; j++) {
        frequency[j] = pow(base, -2.0 * (double)j / (double)dim);
    }
    double *far = frequency + dim / 2, *both = far + dim, *near = both + dim;
    uint8_t made[NEAR] = {0};
    for (int64_t i = 0; i < count; i++) {
        int64_t rest = ((first + i) % NEAR + NEAR) % NEAR;
        if (i == 0 || rest == 0) {
            turns_of((double)(first + i - rest), dim / 2, frequency, far);
        }
        compose(dim / 2, far, near_turn(rest, dim / 2, frequency, near, made), both);
        float *cosine = *table + i * dim, *sine = cosine + dim / 2;
        for (int64_t j = 0; j < dim / 2; j++) {
            cosine[j] = (float)both[2 * j];
            sine[j] = (float)both[2 * j + 1];
        }
    }
    return ATTN_OK;
}

void attn_rope_apply(const float *table_row, int64_t dim, int interleaved, int inverse, float *x)
{
    const float *cosine = table_row, *sine = table_row + dim / 2;
    if (!interleaved && !inverse) {
        ATTN_KERNEL_SELECT(attn_row_kernels_table, attn_isa_current())->rotate(x, 1, dim, dim / 2, cosine, sine);
        return;
    }
    for (int64_t j = 0; j < dim / 2; j++) {
        float *a = interleaved ? x + 2 * j : x + j, *b = interleaved ? x + 2 * j + 1 : x + j + dim / 2;
        float along = cosine[j], across = inverse ? -sine[j] : sine[j];
        float turned = *a * along - *b * across;
        *b = *b * along + *a * across;
        *a = turned;
    }
}
