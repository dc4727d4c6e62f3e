#include "layer/heads.h"

#include "kernel/tile.h"
#include "layer/linear.h"

#include <string.h>

static int64_t in_row(const attn_head_rows *s, int64_t row, int64_t h) { return row * s->width + s->column + h * s->d; }

static int64_t in_head(const attn_head_rows *s, int64_t row, int64_t h)
{
    return ((row / s->n * s->heads + h) * s->n + row % s->n) * s->d;
}

void attn_heads_split_some(const attn_head_rows *s, int threads, int64_t first, int64_t count, const float *rows, float *to)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < count; r++) {
        for (int64_t h = 0; h < s->heads; h++) {
            memcpy(to + in_head(s, first + r, h), rows + in_row(s, r, h), (size_t)s->d * sizeof *to);
        }
    }
}

void attn_heads_join_some(const attn_head_rows *s, int threads, int64_t first, int64_t count, const float *from, float *rows)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < count; r++) {
        for (int64_t h = 0; h < s->heads; h++) {
            memcpy(rows + in_row(s, r, h), from + in_head(s, first + r, h), (size_t)s->d * sizeof *rows);
        }
    }
}

void attn_heads_split(const attn_head_rows *s, int threads, const float *rows, float *to)
{
    attn_heads_split_some(s, threads, 0, s->batch * s->n, rows, to);
}

void attn_heads_join(const attn_head_rows *s, int threads, const float *from, float *rows)
{
    attn_heads_join_some(s, threads, 0, s->batch * s->n, from, rows);
}

/* Room for the rows of a span. */
static attn_status take_span(const attn_head_rows *s, attn_arena *arena, float **rows)
{
    size_t count = (size_t)(attn_min_i64(ATTN_LINEAR_SPAN, s->batch * s->n) * s->width);
    *rows = attn_arena_array(arena, count, sizeof **rows);
    return *rows != NULL ? ATTN_OK : attn_fail_memory(count * sizeof **rows);
}

attn_status attn_heads_project(const attn_head_rows *s, attn_arena *arena, int threads, int64_t in, const float *x, const float *w,
                               const float *bias, float *to)
{
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *rows;
    ATTN_TRY(take_span(s, arena, &rows));
    for (int64_t first = 0, count; first < s->batch * s->n; first += count) {
        count = attn_min_i64(ATTN_LINEAR_SPAN, s->batch * s->n - first);
        ATTN_TRY(attn_linear_forward(arena, threads, count, in, s->width, x + first * in, w, bias, rows));
        attn_heads_split_some(s, threads, first, count, rows, to);
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}

attn_status attn_heads_output(const attn_head_rows *s, attn_arena *arena, int threads, int64_t out, const float *from, const float *w,
                              const float *bias, float *y)
{
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *rows;
    ATTN_TRY(take_span(s, arena, &rows));
    for (int64_t first = 0, count; first < s->batch * s->n; first += count) {
        count = attn_min_i64(ATTN_LINEAR_SPAN, s->batch * s->n - first);
        attn_heads_join_some(s, threads, first, count, from, rows);
        ATTN_TRY(attn_linear_forward(arena, threads, count, s->width, out, rows, w, bias, y + first * out));
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
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
