/* Matrix products in f32, row-major. */
#ifndef ATTN_LAYER_GEMM_H
#define ATTN_LAYER_GEMM_H

#include "core/internal.h"

/* C[m,n] = alpha * op(A) op(B) + beta * C, where op(A) is m x k and op(B) is k x n; lda, ldb, ldc are the row strides of A, B, C
 * as stored. beta 0 ignores what C held. The result does not depend on the number of threads. ATTN_ERR_MEMORY. */
attn_status attn_gemm(attn_arena *arena, int threads, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k,
                      float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c,
                      int64_t ldc);

#endif
