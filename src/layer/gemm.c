#include "layer/gemm.h"
#include "kernel/tile.h"

#include <omp.h>
#include <string.h>

#define BLOCK_K 256
#define BLOCK_M 96

/* Rows [first, first+rows) of op(B) and all its columns, in panels of nr columns, zero-padded. */
static void pack_b(const attn_tile_kernels *kernels, float *to, int trans, const float *b, int64_t ldb, int64_t first,
                   int64_t rows, int64_t column, int64_t columns)
{
    int64_t nr = kernels->nr;
    if (columns < nr) {
        memset(to, 0, (size_t)(rows * nr) * sizeof *to);
    }
    if (trans) {
        kernels->pack_transposed(to, nr, b + column * ldb + first, ATTN_F32, ldb, columns, rows);
        return;
    }
    for (int64_t l = 0; l < rows; l++) {
        memcpy(to + l * nr, b + (first + l) * ldb + column, (size_t)columns * sizeof *to);
    }
}

attn_status attn_gemm(attn_arena *arena, int threads, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k, float alpha,
                      const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    int64_t nr = kernels->nr, panels = attn_ceil_div(n, nr), depth = attn_min_i64(k, BLOCK_K);
    attn_arena_mark mark = attn_arena_get_mark(arena);
    float *packed = attn_arena_array(arena, (size_t)(panels * nr), (size_t)depth * sizeof(float));
    if (packed == NULL) {
        return attn_fail_memory((size_t)(panels * nr * depth) * sizeof(float));
    }
    int stored = beta == 0 && alpha != 0 && k > 0; /* the first products are stored, not added to what is there */
    for (int64_t i = 0; i < m && !stored; i++) {
        if (beta == 0) {
            memset(c + i * ldc, 0, (size_t)n * sizeof *c);
        } else if (beta != alpha) { /* C is scaled by alpha at the end */
            kernels->scale(c + i * ldc, n, beta / alpha);
        }
    }
    int64_t a_row = trans_a ? 1 : lda, a_col = trans_a ? lda : 1, blocks = attn_ceil_div(m, BLOCK_M);
    if (alpha == 0 || m == 0 || n == 0) {
        blocks = 0;
    }
#pragma omp parallel num_threads(threads) if (m * n * k > 20000)
    for (int64_t l = 0; l < (blocks > 0 ? k : 0); l += BLOCK_K) {
        int64_t some = attn_min_i64(BLOCK_K, k - l);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < panels; j++) {
            pack_b(kernels, packed + j * nr * some, trans_b, b, ldb, l, some, j * nr, attn_min_i64(nr, n - j * nr));
        }
        /* Tiles of rows by panels, so that few rows or few columns still make enough of them. */
#pragma omp for schedule(static)
        for (int64_t t = 0; t < blocks * panels; t++) {
            int64_t i = t / panels * BLOCK_M, j = t % panels;
            kernels->product(attn_min_i64(BLOCK_M, m - i), attn_min_i64(nr, n - j * nr), some, a + i * a_row + l * a_col, a_row,
                             a_col, packed + j * nr * some, nr, 0, c + i * ldc + j * nr, ldc, !stored || l > 0);
        }
    }
    for (int64_t i = 0; i < m && alpha != 1 && alpha != 0; i++) {
        kernels->scale(c + i * ldc, n, alpha);
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}
