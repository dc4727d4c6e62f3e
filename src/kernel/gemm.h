/* Micro-kernels of matrix products. */
#ifndef ATTN_KERNEL_GEMM_H
#define ATTN_KERNEL_GEMM_H

#include "kernel/dispatch.h"

#include <stdint.h>

typedef struct attn_gemm_kernels {
    int rows, columns; /* of the largest tile; rows is a multiple of 4 */
    /* c[m][n] = alpha * a b + beta * c for one tile, 1 <= m <= rows, 1 <= n <= columns, beta 0 ignores c.
     * a(i,p) = a[i*a_row + p*a_step]. b(p,j) = b[p*b_row + j], readable (any value) up to a multiple of the vector width. */
    void (*tile)(int m, int n, int64_t k, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row,
                 float alpha, float beta, float *c, int64_t ldc);
    /* c[i][j] = alpha * dot(a row i, b row j) + beta * c for 1 <= m <= 4 and any n; rows of a and b lie lda and ldb apart. */
    void (*dots)(int m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float alpha,
                 float beta, float *c, int64_t ldc);
    /* A panel: to[p*width + i] = from[i*row + p*step] for i < count, 0 for count <= i < width; row or step is 1. */
    void (*pack)(const float *from, int64_t row, int64_t step, int64_t count, int64_t width, int64_t k, float *to);
} attn_gemm_kernels;

ATTN_KERNEL_TABLES(attn_gemm_kernels, attn_gemm_kernels_table);

#endif
