/* Micro-kernels of linear layers with quantised weights.
 *
 * Weights lie in panels of 16 rows (the rest of the last panel is 0), with the rows in the lanes of the vectors. A
 * panel is a permutation of the bytes of its rows in the file: first the scales of all its units, then, at a multiple
 * of 64 bytes, the codes of all its units. A unit is 32 columns; K formats have scales per super-block of 8 units.
 *
 *     format  scales                                                codes per unit
 *     Q4_0    per unit f16 d[16]                                    u8 nibbles[4][16][4]
 *     Q4_1    per unit f16 d[16], m[16]                             nibbles
 *     Q5_0    per unit f16 d[16]                                    u8 high[16][4], nibbles
 *     Q5_1    per unit f16 d[16], m[16]                             high, nibbles
 *     Q8_0    per unit f16 d[16]                                    u8 (code + 128)[8][16][4]
 *     Q4_K    per 8 units f16 d[16], dmin[16]; u8 packed[12][16]    nibbles
 *     Q5_K    the same                                              high, nibbles
 *     Q6_K    per 8 units f16 d[16]; i8 s[16][16]                   u8 high[2][16][4], nibbles
 *
 * Step s = 0 ... 7 of a unit holds columns 4s ... 4s + 3 of the 16 rows. nibbles[j] holds step j in the low and step
 * j + 4 in the high half-bytes; bit s of `high` (Q5) is the fifth bit of step s; bits 2t, 2t + 1 of high[h] (Q6) are
 * the upper bits of step 4h + t. F32, F16 and BF16 panels are plain [columns][16], and have no units.
 *
 * Activations are quantised per unit to 15 bits, as two bytes: x = scale * (128 * high + low), with high in -127 ...
 * 127 and low in -64 ... 63. (One byte alone costs a small model a Kullback-Leibler divergence of several
 * thousandths, which no longer is small beside what the quantised weights cost; two bytes cost nothing that could be
 * measured.) They come in groups of up to ATTN_QUANT_GROUP tokens; a group of T tokens is attn_quant_x[units][T].
 */
#ifndef ATTN_KERNEL_QUANT_H
#define ATTN_KERNEL_QUANT_H

#include "kernel/dispatch.h"

#include <stddef.h>
#include <stdint.h>

#define ATTN_QUANT_ROWS 16 /* rows of a panel */
#define ATTN_QUANT_UNIT 32 /* columns of a unit */
#define ATTN_QUANT_GROUP 6 /* tokens of a group */

typedef enum attn_quant_format {
    ATTN_QUANT_F32,
    ATTN_QUANT_F16,
    ATTN_QUANT_BF16,
    ATTN_QUANT_Q4_0,
    ATTN_QUANT_Q4_1,
    ATTN_QUANT_Q5_0,
    ATTN_QUANT_Q5_1,
    ATTN_QUANT_Q8_0,
    ATTN_QUANT_Q4_K,
    ATTN_QUANT_Q5_K,
    ATTN_QUANT_Q6_K,
    ATTN_QUANT_FORMATS
} attn_quant_format;

/* One unit of one token's activations. */
typedef struct attn_quant_x {
    int8_t high[ATTN_QUANT_UNIT], low[ATTN_QUANT_UNIT];
    float scale;
    float sum;        /* of x, for formats with a minimum */
    int32_t minus[2]; /* -(sum of x / scale) of each half, for formats with an offset */
} attn_quant_x;

/* A panel unpacked for a matrix product with many tokens. */
typedef struct attn_quant_panel {
    const uint8_t *codes; /* [units][8][16][4] */
    const float *scale;   /* [units][16]; Q6_K: [units][2][16] */
    const float *minimum; /* [units][16], for formats with a minimum */
} attn_quant_panel;

typedef struct attn_quant_kernels {
    /* x [units * 32] to x_out[0], x_out[stride], ... */
    void (*quantize)(const float *x, int64_t units, attn_quant_x *out, int64_t stride);
    /* out[16] = panel * one token of a group of `stride` tokens. NULL for the float formats. */
    void (*vector[ATTN_QUANT_FORMATS])(const void *panel, int64_t units, const attn_quant_x *x, int64_t stride,
                                       float *out);
    /* memory: room for attn_quant_unpacked_bytes(). NULL for the float formats. */
    void (*unpack[ATTN_QUANT_FORMATS])(const void *panel, int64_t units, void *memory, attn_quant_panel *to);
    /* out[token][0 ... 31] = two panels * a group of `tokens` tokens; rows of out lie `stride` apart. */
    void (*tile[ATTN_QUANT_FORMATS])(const attn_quant_panel panels[2], int64_t units, const attn_quant_x *x, int tokens,
                                     float *out, int64_t stride);
    /* The same with float weights and plain activations x[token][columns]; panels of [columns][16] numbers lie
     * one after the other. NULL for the quantised formats. */
    void (*float_tile[ATTN_QUANT_FORMATS])(const void *panels, int64_t columns, const float *x, int tokens, float *out,
                                           int64_t stride);
} attn_quant_kernels;

ATTN_KERNEL_DOT_TABLES(attn_quant_kernels, attn_quant_kernels_table);

/* Bytes of the scales of a panel, rounded up to 64, and of the codes of a unit. */
static inline size_t attn_quant_scale_bytes(attn_quant_format format, int64_t units)
{
    static const unsigned short bytes[ATTN_QUANT_FORMATS] = {
        [ATTN_QUANT_Q4_0] = 32,  [ATTN_QUANT_Q4_1] = 64,  [ATTN_QUANT_Q5_0] = 32,  [ATTN_QUANT_Q5_1] = 64,
        [ATTN_QUANT_Q8_0] = 32,  [ATTN_QUANT_Q4_K] = 256, [ATTN_QUANT_Q5_K] = 256, [ATTN_QUANT_Q6_K] = 288,
    };
    int64_t groups = format >= ATTN_QUANT_Q4_K ? units / 8 : units;
    return ((size_t)groups * bytes[format] + 63) & ~(size_t)63;
}

static inline size_t attn_quant_code_bytes(attn_quant_format format)
{
    static const unsigned short bytes[ATTN_QUANT_FORMATS] = {
        [ATTN_QUANT_Q4_0] = 256, [ATTN_QUANT_Q4_1] = 256, [ATTN_QUANT_Q5_0] = 320, [ATTN_QUANT_Q5_1] = 320,
        [ATTN_QUANT_Q8_0] = 512, [ATTN_QUANT_Q4_K] = 256, [ATTN_QUANT_Q5_K] = 320, [ATTN_QUANT_Q6_K] = 384,
    };
    return bytes[format];
}

/* Bytes of a panel of a quantised format. */
static inline size_t attn_quant_panel_bytes(attn_quant_format format, int64_t units)
{
    return attn_quant_scale_bytes(format, units) + (size_t)units * attn_quant_code_bytes(format);
}

/* Bytes that unpacking a panel takes at most: codes, and two floats per unit and row. */
static inline size_t attn_quant_unpacked_bytes(int64_t units)
{
    return (size_t)units * ATTN_QUANT_ROWS * (ATTN_QUANT_UNIT + 2 * sizeof(float));
}

#endif
