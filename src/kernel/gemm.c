/* Micro-kernels of matrix products (see gemm.h): a tile of the result stays in registers while rows of b stream through. */
#include "kernel/gemm.h"

#include "kernel/vec.h"

#if V_REGISTERS >= 32
#define ROWS 12
#define VECTORS 2
#elif VW >= 8
#define ROWS 4
#define VECTORS 3
#else
#define ROWS 4
#define VECTORS 2
#endif

/* One tile; m and vectors are constants at each call, so that the loops unroll and the sums stay in registers. Rows come in
 * threes per pointer, which x86 addressing reaches with one index register. */
VINLINE void tile_of(const int m, const int vectors, int n, int64_t k, const float *a, int64_t a_row, int64_t a_step,
                     const float *b, int64_t b_row, float alpha, float beta, float *c, int64_t ldc)
{
    vf sum[ROWS][VECTORS];
    const float *at[(ROWS + 2) / 3];
    for (int i = 0; i < m; i++) {
        for (int v = 0; v < vectors; v++) {
            sum[i][v] = v_zero();
        }
    }
    for (int g = 0; 3 * g < m; g++) {
        at[g] = a + 3 * g * a_row;
    }
    for (int64_t p = 0; p < k; p++) {
        vf line[VECTORS];
        for (int v = 0; v < vectors; v++) {
            line[v] = v_load(b + v * VW);
        }
        b += b_row;
        for (int i = 0; i < m; i++) {
            vf x = v_set1(at[i / 3][(i % 3) * a_row]);
            for (int v = 0; v < vectors; v++) {
                sum[i][v] = v_fma(x, line[v], sum[i][v]);
            }
        }
        for (int g = 0; 3 * g < m; g++) {
            at[g] += a_step;
        }
    }
    int last = n - (vectors - 1) * VW;
    for (int i = 0; i < m; i++) {
        for (int v = 0; v < vectors; v++) {
            float *to = c + i * ldc + v * VW;
            vf y = v_mul(sum[i][v], v_set1(alpha));
            if (v + 1 < vectors || last == VW) {
                v_store(to, beta == 0.0f ? y : v_fma(v_set1(beta), v_load(to), y));
            } else {
                v_store_n(to, beta == 0.0f ? y : v_fma(v_set1(beta), v_load_n(to, last), y), last);
            }
        }
    }
}

#define WIDTH(M, V)                                                                    \
    case V: tile_of(M, V, n, k, a, a_row, a_step, b, b_row, alpha, beta, c, ldc); break;
#if VECTORS == 3
#define WIDTHS(M) WIDTH(M, 1) WIDTH(M, 2) WIDTH(M, 3)
#else
#define WIDTHS(M) WIDTH(M, 1) WIDTH(M, 2)
#endif
#define HEIGHT(M)                      \
    case M:                            \
        switch ((n + VW - 1) / VW) {   \
            WIDTHS(M)                  \
        }                              \
        break;

static void tile(int m, int n, int64_t k, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row,
                 float alpha, float beta, float *c, int64_t ldc)
{
    switch (m) {
        HEIGHT(1)
        HEIGHT(2)
        HEIGHT(3)
        HEIGHT(4)
#if ROWS == 12
        HEIGHT(5)
        HEIGHT(6)
        HEIGHT(7)
        HEIGHT(8)
        HEIGHT(9)
        HEIGHT(10)
        HEIGHT(11)
        HEIGHT(12)
#endif
    }
}

/* m rows of a against `count` rows of b, both constants at each call. */
VINLINE void dots_of(const int m, const int count, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb,
                     float alpha, float beta, float *c, int64_t ldc)
{
    vf sum[4][4];
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < count; j++) {
            sum[i][j] = v_zero();
        }
    }
    int64_t p = 0;
    for (; p + VW <= k; p += VW) {
        for (int j = 0; j < count; j++) {
            vf y = v_load(b + j * ldb + p);
            for (int i = 0; i < m; i++) {
                sum[i][j] = v_fma(v_load(a + i * lda + p), y, sum[i][j]);
            }
        }
    }
    if (p < k) {
        int rest = (int)(k - p);
        for (int j = 0; j < count; j++) {
            vf y = v_load_n(b + j * ldb + p, rest);
            for (int i = 0; i < m; i++) {
                sum[i][j] = v_fma(v_load_n(a + i * lda + p, rest), y, sum[i][j]);
            }
        }
    }
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < count; j++) {
            float *to = c + i * ldc + j, y = alpha * v_sum(sum[i][j]);
            *to = beta == 0.0f ? y : y + beta * *to;
        }
    }
}

VINLINE void dots_rows(const int m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float alpha,
                       float beta, float *c, int64_t ldc)
{
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        dots_of(m, 4, k, a, lda, b + j * ldb, ldb, alpha, beta, c + j, ldc);
    }
    for (; j < n; j++) {
        dots_of(m, 1, k, a, lda, b + j * ldb, ldb, alpha, beta, c + j, ldc);
    }
}

static void dots(int m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, float alpha, float beta,
                 float *c, int64_t ldc)
{
    switch (m) {
    case 1: dots_rows(1, n, k, a, lda, b, ldb, alpha, beta, c, ldc); break;
    case 2: dots_rows(2, n, k, a, lda, b, ldb, alpha, beta, c, ldc); break;
    case 3: dots_rows(3, n, k, a, lda, b, ldb, alpha, beta, c, ldc); break;
    case 4: dots_rows(4, n, k, a, lda, b, ldb, alpha, beta, c, ldc); break;
    }
}

typedef float quad __attribute__((vector_size(16)));

/* Four rows of four, turned. */
VINLINE void turn(const float *from, int64_t row, float *to, int64_t width)
{
    quad x[4];
    for (int i = 0; i < 4; i++) {
        memcpy(&x[i], from + i * row, sizeof x[i]);
    }
    quad a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5), b = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
    quad c = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5), d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
    quad y[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                 __builtin_shufflevector(b, d, 0, 1, 4, 5), __builtin_shufflevector(b, d, 2, 3, 6, 7)};
    for (int i = 0; i < 4; i++) {
        memcpy(to + i * width, &y[i], sizeof y[i]);
    }
}

static void pack(const float *from, int64_t row, int64_t step, int64_t count, int64_t width, int64_t k, float *to)
{
    int64_t whole = count;
    if (step == 1 && row != 1) {
        whole = count & ~(int64_t)3;
        for (int64_t i = 0; i < whole; i += 4) {
            int64_t p = 0;
            for (; p + 4 <= k; p += 4) {
                turn(from + i * row + p, row, to + p * width + i, width);
            }
            for (; p < k; p++) {
                for (int64_t j = i; j < i + 4; j++) {
                    to[p * width + j] = from[j * row + p];
                }
            }
        }
    } else {
        for (int64_t p = 0; p < k; p++) {
            for (int64_t i = 0; i < count; i++) {
                to[p * width + i] = from[i * row + p * step];
            }
        }
    }
    for (int64_t i = whole; i < width; i++) {
        for (int64_t p = 0; p < k; p++) {
            to[p * width + i] = i < count ? from[i * row + p * step] : 0.0f;
        }
    }
}

const attn_gemm_kernels ATTN_K(attn_gemm_kernels_table) = {ROWS, VECTORS * VW, tile, dots, pack};
