/* Matrices of quantised (or 16- or 32-bit) weights, and linear layers computed with them. */
#ifndef ATTN_LLM_QUANT_H
#define ATTN_LLM_QUANT_H

#include <attn/gguf.h>

#include "core/internal.h"
#include "kernel/quant.h"

#include <string.h>

/* Parts of blocks that packing needs too (dequantize.c). */
void attn_quant_k_scale(const unsigned char *packed, int j, int *scale, int *minimum);
int attn_quant_q6_k_code(const unsigned char *block, int index); /* 0 ... 63 */

/* A matrix of rows x columns in panels (see kernel/quant.h). Zero-initialised: empty. */
typedef struct attn_quant_matrix {
    attn_quant_format format;
    int64_t rows, columns;
    size_t panel_bytes;
    unsigned char *data;
} attn_quant_matrix;

/* Bytes that a matrix of that type takes when packed; 0 for types that are not supported. */
size_t attn_quant_packed_bytes(attn_gguf_tensor_type type, int64_t rows, int64_t columns);
/* Pack the rows x columns weights of a file's tensor of a supported type into memory of the arena. source_row (may be
 * NULL: the same) tells which row of the tensor becomes row `row`. `mapped`: the tensor lies in a mapped file, whose
 * pages are given back as they have been packed (they are read again if they are needed again). ATTN_ERR_UNSUPPORTED,
 * ATTN_ERR_MEMORY. */
attn_status attn_quant_matrix_pack(attn_quant_matrix *matrix, attn_arena *arena, const attn_gguf_tensor *tensor,
                                   int64_t rows, int64_t columns,
                                   int64_t (*source_row)(const void *user, int64_t row), const void *user, int mapped,
                                   int threads);
/* One row in float32, exactly as the format defines it. */
void attn_quant_matrix_row(const attn_quant_matrix *matrix, int64_t row, float *out);

/* Rows of activations [tokens][columns], quantised for the formats that want it. */
typedef struct attn_quant_input {
    int64_t tokens, columns, units; /* units: columns / 32 */
    const float *x;
    attn_quant_x *q; /* groups of 6 tokens, and a rest, as in kernel/quant.h */
} attn_quant_input;

/* Room for `tokens` rows of `columns` numbers; ATTN_ERR_MEMORY. */
attn_status attn_quant_input_make(attn_quant_input *input, attn_arena *arena, int64_t tokens, int64_t columns);
/* Quantise one row of x. */
void attn_quant_input_row(const attn_quant_input *input, int64_t row);

/* out [tokens][rows] (rows of out lie `stride` apart) = input * matrix^T */
typedef struct attn_quant_product {
    const attn_quant_matrix *matrix;
    float *out;
    int64_t stride;
} attn_quant_product;

/* Bytes of scratch memory that a thread needs to multiply matrices of at most that many columns. */
size_t attn_quant_scratch_bytes(int64_t columns);
/* The share of thread `thread` of `threads` of several products with the same input. scratch: that thread's own memory,
 * 64-byte aligned. Call it from each thread of a parallel region; results do not depend on their number. */
void attn_quant_multiply(const attn_quant_input *input, const attn_quant_product *products, int count, void *scratch,
                         int thread, int threads);

#endif
