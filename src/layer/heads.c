#include "layer/heads.h"

#include "kernel/tile.h"

#include <string.h>

static int64_t in_row(const attn_head_rows *s, int64_t row, int64_t h) { return row * s->width + s->column + h * s->d; }

static int64_t in_head(const attn_head_rows *s, int64_t row, int64_t h)
{
    return ((row / s->n * s->heads + h) * s->n + row % s->n) * s->d;
}

void attn_heads_split(const attn_head_rows *s, int threads, const float *rows, float *to)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < s->batch * s->n; r++) {
        for (int64_t h = 0; h < s->heads; h++) {
            memcpy(to + in_head(s, r, h), rows + in_row(s, r, h), (size_t)s->d * sizeof *to);
        }
    }
}

void attn_heads_join(const attn_head_rows *s, int threads, const float *from, float *rows)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < s->batch * s->n; r++) {
        for (int64_t h = 0; h < s->heads; h++) {
            memcpy(rows + in_row(s, r, h), from + in_head(s, r, h), (size_t)s->d * sizeof *rows);
        }
    }
}

#define PIECE 16384

void attn_add_f32(int threads, int64_t count, float *to, const float *from)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > PIECE)
    for (int64_t i = 0; i < count; i += PIECE) {
        kernels->axpy(to + i, from + i, count - i < PIECE ? count - i : PIECE, 1);
    }
}
