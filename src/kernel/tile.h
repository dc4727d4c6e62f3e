/* Micro-kernels on small tiles of f32: matrix products, softmax rows, and reading other data types.
 *
 * The product kernel keeps a tile of `mr` rows by `nr` columns of C in registers; A is read a number at a time (broadcast), so it may
 * have any strides (a transposed A costs nothing), and B in whole vectors: `nr` columns of a row of B lie together.
 */
#ifndef ATTN_KERNEL_TILE_H
#define ATTN_KERNEL_TILE_H

#include "kernel/dispatch.h"
#include <attn/tensor.h>
#include <stdint.h>

typedef struct attn_tile_kernels {
    int mr; /* rows of a register tile */
    int nr; /* columns of a register tile: the width of a packed panel of B */
    int vw; /* lanes of a vector; columns are read in multiples of it */

    /* C[m][n] = A B (add: += A B). A(i,l) = a[i*a_row + l*a_col]. B in panels of nr columns: element (l,j) is
     * b[(j / nr) * b_panel + l*ldb + j % nr]; vectors are read whole, so each panel's rows must be readable up to the next multiple of
     * vw columns. C is written for j < n only. */
    void (*product)(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b,
                    int64_t ldb, int64_t b_panel, float *c, int64_t ldc, int add);

    /* The same with vectors of B's rows b_step apart and those of C's rows c_step: `vectors` of them; A's columns lie together. */
    void (*product_apart)(int64_t m, int64_t vectors, int64_t k, const float *a, int64_t a_row, const float *b, int64_t ldb,
                          int64_t b_step, float *c, int64_t ldc, int64_t c_step);
    /* The same with B's rows in `runs` runs of `run` rows ldb apart, which begin b_run apart; n is in whole vectors. */
    void (*product_runs)(int64_t m, int64_t n, int64_t runs, int64_t run, const float *a, int64_t a_row, const float *b, int64_t ldb,
                         int64_t b_run, float *c, int64_t ldc, int add);

    /* One step of the online softmax in base 2 for `rows` rows of s [rows][lds], `count` logits each (a multiple of vw; unused ones
     * are -inf): new maximum m, s becomes 2^(s - m), l the scaled and extended sum, alpha the factor for what was accumulated
     * before (1 when the maximum did not move). */
    void (*softmax)(int64_t rows, float *s, int64_t lds, int64_t count, float *m, float *l, float *alpha);
    /* s[i] = 2^(s[i] - shift), count any; shift may be +inf (all zero). */
    void (*exp2_row)(float *s, int64_t count, float shift);
    /* x[i] *= factor */
    void (*scale)(float *x, int64_t count, float factor);
    /* s[i] = cap * tanh(s[i] / cap) */
    void (*softcap)(float *s, int64_t count, float cap);
    /* to[i] += factor * from[i] */
    void (*axpy)(float *to, const float *from, int64_t count, float factor);
    float (*dot)(const float *a, const float *b, int64_t count);
    /* s[i] = min(s[i], bound[i]): bounds of +inf and -inf are a mask. A NaN becomes the bound. */
    void (*limit)(float *s, const float *bound, int64_t count);

    /* ds[i] = p[i] * (ds[i] - delta) */
    void (*grad_row)(float *ds, const float *p, int64_t count, float delta);

    /* to[i] = factor * from[i] for contiguous f32, f16, bf16 or i8. */
    void (*load_row)(float *to, const void *from, attn_dtype dtype, int64_t count, float factor);
    /* Pack `rows` rows (stride in elements) of `count` contiguous numbers transposed: to[c*ld + r], r < rows. */
    void (*pack_transposed)(float *to, int64_t ld, const void *from, attn_dtype dtype, int64_t stride, int64_t rows,
                            int64_t count);
} attn_tile_kernels;

/* For this machine, or what ATTN_ISA asks for. */
const attn_tile_kernels *attn_tile_kernels_get(void);
const attn_tile_kernels *attn_tile_kernels_at(attn_isa isa);

#endif
