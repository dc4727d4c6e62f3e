/* Products with quantised weights, rows in the lanes (see quant.h). Each body is written once, for a format that is a
 * constant where it is used, and inlined into one function per format. */
#include "kernel/quant.h"

#include "kernel/vec.h"

typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef uint32_t vu __attribute__((vector_size(4 * VW)));

#define AHEAD 32768 /* bytes to prefetch ahead, into L2: a core waits for many more lines there than in L1 */
#define VECTORS (ATTN_QUANT_ROWS / VW) /* per panel */
#define ROWS ATTN_QUANT_ROWS
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

VINLINE vu vu_load(const void *p)
{
    vu x;
    memcpy(&x, p, sizeof x);
    return x;
}
VINLINE vi vi_set1(int32_t x) { return (vi){0} + x; }
VINLINE vf vi_float(vi x) { return __builtin_convertvector(x, vf); }
/* Four activations, the same in each lane. */
VINLINE vi vi_spread(const int8_t *q)
{
    int32_t four;
    memcpy(&four, q, sizeof four);
    return vi_set1(four);
}

/* acc + the sum over four bytes of w (unsigned) times x (signed), per lane. `wide`: w may exceed 127. */
#if defined(ATTN_ISA_AVX512VNNI)
VINLINE vi dot4(vi acc, vu w, vi x, int wide)
{
    (void)wide;
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
}
#elif defined(ATTN_ISA_AVX512) || defined(ATTN_ISA_AVX2)
#if defined(ATTN_ISA_AVX512)
typedef __m512i raw;
#define MADDUBS _mm512_maddubs_epi16
#define MADD _mm512_madd_epi16
#define ONES _mm512_set1_epi16(1)
#else
typedef __m256i raw;
#define MADDUBS _mm256_maddubs_epi16
#define MADD _mm256_madd_epi16
#define ONES _mm256_set1_epi16(1)
#endif
typedef int16_t vs __attribute__((vector_size(4 * VW)));
VINLINE vi dot4(vi acc, vu w, vi x, int wide)
{
    if (!wide) {
        return acc + (vi)MADD(MADDUBS((raw)w, (raw)x), ONES);
    }
    /* Two codes above 127 would overflow 16 bits: even and odd bytes apart. */
    vi even = (vi)MADD((raw)(w & 0x00ff00ffu), (raw)((vs)((vs)x << 8) >> 8));
    vi odd = (vi)MADD((raw)(w >> 8 & 0x00ff00ffu), (raw)((vs)x >> 8));
    return acc + even + odd;
}
#else
VINLINE vi dot4(vi acc, vu w, vi x, int wide)
{
    (void)wide;
    for (int i = 0; i < 4; i++) {
        acc += (vi)(w >> 8 * i & 0xffu) * ((vi)((vu)x << (24 - 8 * i)) >> 24);
    }
    return acc;
}
#endif

/* ---- What the formats differ in ---- */

VINLINE int has_minimum(attn_quant_format f)
{
    return f == ATTN_QUANT_Q4_1 || f == ATTN_QUANT_Q5_1 || f == ATTN_QUANT_Q4_K || f == ATTN_QUANT_Q5_K;
}
VINLINE int is_super(attn_quant_format f) { return f >= ATTN_QUANT_Q4_K; }
/* log2 of what is subtracted from the codes of formats without a minimum. */
VINLINE int offset_log2(attn_quant_format f)
{
    return f == ATTN_QUANT_Q4_0 ? 3 : f == ATTN_QUANT_Q5_0 ? 4 : f == ATTN_QUANT_Q6_K ? 5 : 7;
}

/* Codes of one step of a unit, vector v of the panel. */
VINLINE vu step_codes(attn_quant_format f, const uint8_t *unit, int step, int v)
{
    const uint8_t *at = unit + 4 * VW * v;
    if (f == ATTN_QUANT_Q8_0) {
        return vu_load(at + 64 * step);
    }
    int high = (int)attn_quant_code_bytes(f) - 256; /* bytes of upper bits */
    vu codes = vu_load(at + high + 64 * (step & 3));
    codes = (step < 4 ? codes : codes >> 4) & 0x0f0f0f0fu;
    if (high == 64) {
        vu bits = vu_load(at);
        codes |= (step < 4 ? bits << (4 - step) : bits >> (step - 4)) & 0x10101010u;
    } else if (high == 128) {
        vu bits = vu_load(at + 64 * (step / 4));
        int up = 4 - 2 * (step & 3);
        codes |= (up >= 0 ? bits << (up & 7) : bits >> 2) & 0x30303030u;
    }
    return codes;
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));

VINLINE bytes16 bytes_load(const uint8_t *p)
{
    bytes16 x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* to[16] = factor[16] * bytes (below 128) */
VINLINE void scaled_bytes(bytes16 bytes, const uint16_t *factor, float *to)
{
    int8_t plain[16];
    memcpy(plain, &bytes, sizeof plain);
    for (int v = 0; v < VECTORS; v++) {
        v_store(to + VW * v, v_mul(v_load_f16(factor + VW * v), v_load_i8(plain + VW * v)));
    }
}

/* The scales of the 8 units of a super-block: scale [8][16] (Q6_K: [8][2][16]) and minimum [8][16] (negated, so
 * that w = d q + m). */
VINLINE void super_scales(attn_quant_format f, const uint8_t *group, float *scale, float *minimum)
{
    const uint16_t *d = (const uint16_t *)(const void *)group;
    if (f == ATTN_QUANT_Q6_K) {
        for (int i = 0; i < 16; i++) {
            scaled_bytes(bytes_load(group + 32 + 16 * i), d, scale + ROWS * i);
        }
        return;
    }
    const uint8_t *packed = group + 64;
    uint16_t minus[16];
    for (int i = 0; i < 16; i++) {
        minus[i] = d[16 + i] ^ 0x8000u;
    }
    for (int j = 0; j < 4; j++) {
        bytes16 a = bytes_load(packed + 16 * j), b = bytes_load(packed + 16 * (j + 4)),
                c = bytes_load(packed + 16 * (j + 8));
        scaled_bytes(a & 63, d, scale + ROWS * j);
        scaled_bytes(b & 63, minus, minimum + ROWS * j);
        scaled_bytes((c & 15) | (a >> 6) << 4, d, scale + ROWS * (j + 4));
        scaled_bytes(c >> 4 | (b >> 6) << 4, minus, minimum + ROWS * (j + 4));
    }
}

/* ---- One token ---- */

VINLINE void vector_unit(attn_quant_format f, const uint8_t *unit, const attn_quant_x *x, const vf *d, const vf *m,
                         vf *acc)
{
    /* Panels follow each other in memory, and generation reads each weight once: the hardware fetches too late. */
    UNROLL for (size_t line = 0; line < attn_quant_code_bytes(f); line += 64) {
        __builtin_prefetch(unit + AHEAD + line, 0, 2);
    }
    vi sum[2][VECTORS], upper[2][VECTORS]; /* of the halves of the unit */
    const int offset = !has_minimum(f), wide = f == ATTN_QUANT_Q8_0;
    UNROLL for (int h = 0; h < 2; h++) {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            sum[h][v] = vi_set1(offset ? x->minus[h] * (1 << offset_log2(f)) : 0);
            upper[h][v] = vi_set1(0);
        }
    }
    UNROLL for (int s = 0; s < 4; s++) {
        UNROLL for (int h = 0; h < 2; h++) {
            int step = 4 * h + s;
            vi high = vi_spread(x->high + 4 * step), low = vi_spread(x->low + 4 * step);
            UNROLL for (int v = 0; v < VECTORS; v++) {
                vu codes = step_codes(f, unit, step, v);
                upper[h][v] = dot4(upper[h][v], codes, high, wide);
                sum[h][v] = dot4(sum[h][v], codes, low, wide);
            }
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        sum[0][v] += upper[0][v] << 7;
        sum[1][v] += upper[1][v] << 7;
    }
    vf scale = v_set1(x->scale);
    UNROLL for (int v = 0; v < VECTORS; v++) {
        if (f == ATTN_QUANT_Q6_K) {
            acc[v] = v_fma(vi_float(sum[0][v]), v_mul(d[v], scale), acc[v]);
            acc[v] = v_fma(vi_float(sum[1][v]), v_mul(d[VECTORS + v], scale), acc[v]);
        } else {
            acc[v] = v_fma(vi_float(sum[0][v] + sum[1][v]), v_mul(d[v], scale), acc[v]);
        }
        if (has_minimum(f)) {
            acc[v] = v_fma(m[v], v_set1(x->sum), acc[v]);
        }
    }
}

VINLINE void vector_body(attn_quant_format f, const void *panel, int64_t units, const attn_quant_x *x, int64_t stride,
                         float *out)
{
    const uint8_t *scales = panel, *codes = scales + attn_quant_scale_bytes(f, units);
    const size_t code_bytes = attn_quant_code_bytes(f);
    vf acc[VECTORS], d[2 * VECTORS], m[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) {
        acc[v] = v_zero();
        m[v] = v_zero();
    }
    if (is_super(f)) {
        const int per_unit = f == ATTN_QUANT_Q6_K ? 2 : 1;
        float scale[16 * ROWS], minimum[8 * ROWS];
        for (int64_t u = 0; u < units; u++) {
            int j = (int)(u & 7);
            if (j == 0) {
                super_scales(f, scales, scale, minimum);
                scales += f == ATTN_QUANT_Q6_K ? 288 : 256;
            }
            UNROLL for (int v = 0; v < VECTORS * per_unit; v++) {
                d[v] = v_load(scale + ROWS * per_unit * j + VW * v);
            }
            if (has_minimum(f)) {
                UNROLL for (int v = 0; v < VECTORS; v++) {
                    m[v] = v_load(minimum + ROWS * j + VW * v);
                }
            }
            vector_unit(f, codes + code_bytes * (size_t)u, x + stride * u, d, m, acc);
        }
    } else {
        const uint16_t *halves = (const uint16_t *)(const void *)scales;
        const int per_unit = has_minimum(f) ? 2 * ROWS : ROWS;
        for (int64_t u = 0; u < units; u++, halves += per_unit) {
            UNROLL for (int v = 0; v < VECTORS; v++) {
                d[v] = v_load_f16(halves + VW * v);
                if (has_minimum(f)) {
                    m[v] = v_load_f16(halves + ROWS + VW * v);
                }
            }
            vector_unit(f, codes + code_bytes * (size_t)u, x + stride * u, d, m, acc);
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        v_store(out + VW * v, acc[v]);
    }
}

/* ---- Many tokens ---- */

VINLINE void unpack_body(attn_quant_format f, const void *panel, int64_t units, void *memory, attn_quant_panel *to)
{
    const uint8_t *scales = panel, *codes = scales + attn_quant_scale_bytes(f, units);
    const size_t code_bytes = attn_quant_code_bytes(f);
    float *scale = memory, *minimum = scale + ROWS * units;
    uint8_t *plain = (uint8_t *)(scale + 2 * ROWS * units);
    *to = (attn_quant_panel){f == ATTN_QUANT_Q8_0 ? codes : plain, scale, minimum};
    for (int64_t u = 0; u < units; u++) {
        if (!is_super(f)) {
            const uint16_t *halves = (const uint16_t *)(const void *)scales + (has_minimum(f) ? 2 * ROWS : ROWS) * u;
            for (int v = 0; v < VECTORS; v++) {
                v_store(scale + ROWS * u + VW * v, v_load_f16(halves + VW * v));
                if (has_minimum(f)) {
                    v_store(minimum + ROWS * u + VW * v, v_load_f16(halves + ROWS + VW * v));
                }
            }
        } else if ((u & 7) == 0) {
            super_scales(f, scales + (f == ATTN_QUANT_Q6_K ? 288 : 256) * (u >> 3),
                         scale + (f == ATTN_QUANT_Q6_K ? 2 * ROWS : ROWS) * u, minimum + ROWS * u);
        }
        if (f != ATTN_QUANT_Q8_0) {
            UNROLL for (int s = 0; s < 8; s++) {
                UNROLL for (int v = 0; v < VECTORS; v++) {
                    vu step = step_codes(f, codes + code_bytes * (size_t)u, s, v);
                    memcpy(plain + 512 * u + 64 * s + 4 * VW * v, &step, sizeof step);
                }
            }
        }
    }
}

/* Two vectors of rows times T tokens. Scales and minima of a unit lie ROWS floats apart, codes of a step 64 bytes. */
VINLINE void tile_body(attn_quant_format f, const int T, const uint8_t *const codes[2], const float *const scale[2],
                       const float *const minimum[2], int64_t units, const attn_quant_x *x, float *const out[2],
                       int64_t stride)
{
    const int halves = f == ATTN_QUANT_Q6_K ? 2 : 1, wide = f == ATTN_QUANT_Q8_0;
    vf acc[ATTN_QUANT_GROUP][2];
    UNROLL for (int t = 0; t < T; t++) {
        acc[t][0] = acc[t][1] = v_zero();
    }
    for (int64_t u = 0; u < units; u++, x += T) {
        UNROLL for (int h = 0; h < halves; h++) {
            /* The upper bytes first, then seven bits up, then the lower ones: one accumulator does for both. */
            vi sum[ATTN_QUANT_GROUP][2];
            UNROLL for (int t = 0; t < T; t++) {
                sum[t][0] = sum[t][1] = vi_set1(0);
            }
            UNROLL for (int i = 0; i < 8 / halves; i++) {
                int s = 4 * h + i;
                vu w0 = vu_load(codes[0] + 512 * u + 64 * s), w1 = vu_load(codes[1] + 512 * u + 64 * s);
                UNROLL for (int t = 0; t < T; t++) {
                    vi four = vi_spread(x[t].high + 4 * s);
                    sum[t][0] = dot4(sum[t][0], w0, four, wide);
                    sum[t][1] = dot4(sum[t][1], w1, four, wide);
                }
            }
            UNROLL for (int t = 0; t < T; t++) {
                vi start = vi_set1(0);
                if (halves == 2) {
                    start = vi_set1(x[t].minus[h]) << offset_log2(f);
                } else if (!has_minimum(f)) {
                    start = vi_set1(x[t].minus[0] + x[t].minus[1]) << offset_log2(f);
                }
                sum[t][0] = (sum[t][0] << 7) + start;
                sum[t][1] = (sum[t][1] << 7) + start;
            }
            UNROLL for (int i = 0; i < 8 / halves; i++) {
                int s = 4 * h + i;
                vu w0 = vu_load(codes[0] + 512 * u + 64 * s), w1 = vu_load(codes[1] + 512 * u + 64 * s);
                UNROLL for (int t = 0; t < T; t++) {
                    vi four = vi_spread(x[t].low + 4 * s);
                    sum[t][0] = dot4(sum[t][0], w0, four, wide);
                    sum[t][1] = dot4(sum[t][1], w1, four, wide);
                }
            }
            vf d0 = v_load(scale[0] + ROWS * (halves * u + h)), d1 = v_load(scale[1] + ROWS * (halves * u + h));
            UNROLL for (int t = 0; t < T; t++) {
                vf s = v_set1(x[t].scale);
                acc[t][0] = v_fma(vi_float(sum[t][0]), v_mul(d0, s), acc[t][0]);
                acc[t][1] = v_fma(vi_float(sum[t][1]), v_mul(d1, s), acc[t][1]);
            }
        }
        if (has_minimum(f)) {
            vf m0 = v_load(minimum[0] + ROWS * u), m1 = v_load(minimum[1] + ROWS * u);
            UNROLL for (int t = 0; t < T; t++) {
                vf s = v_set1(x[t].sum);
                acc[t][0] = v_fma(m0, s, acc[t][0]);
                acc[t][1] = v_fma(m1, s, acc[t][1]);
            }
        }
    }
    UNROLL for (int t = 0; t < T; t++) {
        v_store(out[0] + stride * t, acc[t][0]);
        v_store(out[1] + stride * t, acc[t][1]);
    }
}

VINLINE void tile_pair(attn_quant_format f, const int T, const attn_quant_panel panels[2], int64_t units,
                       const attn_quant_x *x, float *out, int64_t stride)
{
    /* Vectors 2i and 2i + 1 of the 32 rows. */
    for (int i = 0; i < VECTORS; i++) {
        const uint8_t *codes[2];
        const float *scale[2], *minimum[2];
        float *to[2];
        for (int j = 0; j < 2; j++) {
            const attn_quant_panel *panel = &panels[(2 * i + j) / VECTORS];
            int row = (2 * i + j) % VECTORS * VW;
            codes[j] = panel->codes + 4 * row;
            scale[j] = panel->scale + row;
            minimum[j] = panel->minimum + row;
            to[j] = out + (2 * i + j) * VW;
        }
        tile_body(f, T, codes, scale, minimum, units, x, to, stride);
    }
}

VINLINE void tile_any(attn_quant_format f, const attn_quant_panel panels[2], int64_t units, const attn_quant_x *x,
                      int tokens, float *out, int64_t stride)
{
    switch (tokens) {
    case 1: tile_pair(f, 1, panels, units, x, out, stride); break;
    case 2: tile_pair(f, 2, panels, units, x, out, stride); break;
    case 3: tile_pair(f, 3, panels, units, x, out, stride); break;
    case 4: tile_pair(f, 4, panels, units, x, out, stride); break;
    case 5: tile_pair(f, 5, panels, units, x, out, stride); break;
    default: tile_pair(f, 6, panels, units, x, out, stride); break;
    }
}

/* Formats that differ in how they are packed only share a tile: 4-bit offset, minimum, and so on. */
static void tile_minimum(const attn_quant_panel panels[2], int64_t units, const attn_quant_x *x, int tokens, float *out,
                         int64_t stride)
{
    tile_any(ATTN_QUANT_Q4_1, panels, units, x, tokens, out, stride);
}

#define FORMAT_TILE(name, format)                                                                                   \
    static void tile_##name(const attn_quant_panel panels[2], int64_t units, const attn_quant_x *x, int tokens,    \
                            float *out, int64_t stride)                                                             \
    {                                                                                                               \
        tile_any(format, panels, units, x, tokens, out, stride);                                                    \
    }

#define FORMAT_KERNELS(name, format)                                                                                \
    static void vector_##name(const void *panel, int64_t units, const attn_quant_x *x, int64_t stride, float *out) \
    {                                                                                                               \
        vector_body(format, panel, units, x, stride, out);                                                          \
    }                                                                                                               \
    static void unpack_##name(const void *panel, int64_t units, void *memory, attn_quant_panel *to)                \
    {                                                                                                               \
        unpack_body(format, panel, units, memory, to);                                                              \
    }

FORMAT_KERNELS(q4_0, ATTN_QUANT_Q4_0)
FORMAT_KERNELS(q4_1, ATTN_QUANT_Q4_1)
FORMAT_KERNELS(q5_0, ATTN_QUANT_Q5_0)
FORMAT_KERNELS(q5_1, ATTN_QUANT_Q5_1)
FORMAT_KERNELS(q8_0, ATTN_QUANT_Q8_0)
FORMAT_KERNELS(q4_k, ATTN_QUANT_Q4_K)
FORMAT_KERNELS(q5_k, ATTN_QUANT_Q5_K)
FORMAT_KERNELS(q6_k, ATTN_QUANT_Q6_K)
FORMAT_TILE(q4_0, ATTN_QUANT_Q4_0)
FORMAT_TILE(q5_0, ATTN_QUANT_Q5_0)
FORMAT_TILE(q8_0, ATTN_QUANT_Q8_0)
FORMAT_TILE(q6_k, ATTN_QUANT_Q6_K)

/* ---- Float weights ---- */

VINLINE vf float_load(attn_quant_format f, const void *panel, int64_t index)
{
    return f == ATTN_QUANT_F32   ? v_load((const float *)panel + index)
           : f == ATTN_QUANT_F16 ? v_load_f16((const uint16_t *)panel + index)
                                 : v_load_bf16((const uint16_t *)panel + index);
}

VINLINE void float_body(attn_quant_format f, const int T, const void *panels, int64_t columns, const float *x,
                        float *out, int64_t stride)
{
    const int64_t step = f == ATTN_QUANT_F32 ? (int64_t)sizeof(float) : (int64_t)sizeof(uint16_t);
    for (int i = 0; i < VECTORS; i++) {
        vf acc[ATTN_QUANT_GROUP][2];
        const char *from[2];
        for (int j = 0; j < 2; j++) {
            int vector = 2 * i + j;
            from[j] = (const char *)panels + (vector / VECTORS * ROWS * columns + vector % VECTORS * VW) * step;
        }
        UNROLL for (int t = 0; t < T; t++) {
            acc[t][0] = acc[t][1] = v_zero();
        }
        for (int64_t k = 0; k < columns; k++) {
            vf w0 = float_load(f, from[0], ROWS * k), w1 = float_load(f, from[1], ROWS * k);
            UNROLL for (int t = 0; t < T; t++) {
                vf number = v_set1(x[columns * t + k]);
                acc[t][0] = v_fma(w0, number, acc[t][0]);
                acc[t][1] = v_fma(w1, number, acc[t][1]);
            }
        }
        UNROLL for (int t = 0; t < T; t++) {
            v_store(out + stride * t + 2 * i * VW, acc[t][0]);
            v_store(out + stride * t + (2 * i + 1) * VW, acc[t][1]);
        }
    }
}

#define FLOAT_TILE(name, format)                                                                                    \
    static void float_##name(const void *panels, int64_t columns, const float *x, int tokens, float *out,          \
                             int64_t stride)                                                                        \
    {                                                                                                               \
        switch (tokens) {                                                                                           \
        case 1: float_body(format, 1, panels, columns, x, out, stride); break;                                      \
        case 2: float_body(format, 2, panels, columns, x, out, stride); break;                                      \
        case 3: float_body(format, 3, panels, columns, x, out, stride); break;                                      \
        case 4: float_body(format, 4, panels, columns, x, out, stride); break;                                      \
        case 5: float_body(format, 5, panels, columns, x, out, stride); break;                                      \
        default: float_body(format, 6, panels, columns, x, out, stride); break;                                     \
        }                                                                                                           \
    }

FLOAT_TILE(f32, ATTN_QUANT_F32)
FLOAT_TILE(f16, ATTN_QUANT_F16)
FLOAT_TILE(bf16, ATTN_QUANT_BF16)

/* ---- Activations ---- */

typedef int8_t vb __attribute__((vector_size(VW)));

static void quantize(const float *x, int64_t units, attn_quant_x *out, int64_t stride)
{
    for (int64_t u = 0; u < units; u++, x += ATTN_QUANT_UNIT, out += stride) {
        vf top = v_zero();
        UNROLL for (int i = 0; i < ATTN_QUANT_UNIT; i += VW) {
            top = v_max(top, v_abs(v_load(x + i)));
        }
        float most = v_top(top), scale = most / 16256.0f;
        vf inverse = v_set1(most > 0 ? 16256.0f / most : 0.0f);
        float sums[2];
        UNROLL for (int h = 0; h < 2; h++) {
            vf sum = v_zero();
            UNROLL for (int i = 16 * h; i < 16 * h + 16; i += VW) {
                vf whole = v_round(v_mul(v_load(x + i), inverse));
                sum = v_add(sum, whole);
                vi number = __builtin_convertvector(whole, vi), upper = (number + 64) >> 7;
                vb high = __builtin_convertvector(upper, vb), low = __builtin_convertvector(number - (upper << 7), vb);
                memcpy(out->high + i, &high, sizeof high);
                memcpy(out->low + i, &low, sizeof low);
            }
            sums[h] = v_sum(sum);
        }
        float sum = sums[0] + sums[1], invalid = sum - sum; /* NaN when an activation is not finite, else 0 */
        int finite = invalid == 0.0f;
        out->scale = scale + invalid;
        out->sum = scale * sum;
        out->minus[0] = finite ? -(int32_t)sums[0] : 0;
        out->minus[1] = finite ? -(int32_t)sums[1] : 0;
    }
}

const attn_quant_kernels ATTN_K(attn_quant_kernels_table) = {
    .quantize = quantize,
    .vector = {[ATTN_QUANT_Q4_0] = vector_q4_0, [ATTN_QUANT_Q4_1] = vector_q4_1, [ATTN_QUANT_Q5_0] = vector_q5_0,
               [ATTN_QUANT_Q5_1] = vector_q5_1, [ATTN_QUANT_Q8_0] = vector_q8_0, [ATTN_QUANT_Q4_K] = vector_q4_k,
               [ATTN_QUANT_Q5_K] = vector_q5_k, [ATTN_QUANT_Q6_K] = vector_q6_k},
    .unpack = {[ATTN_QUANT_Q4_0] = unpack_q4_0, [ATTN_QUANT_Q4_1] = unpack_q4_1, [ATTN_QUANT_Q5_0] = unpack_q5_0,
               [ATTN_QUANT_Q5_1] = unpack_q5_1, [ATTN_QUANT_Q8_0] = unpack_q8_0, [ATTN_QUANT_Q4_K] = unpack_q4_k,
               [ATTN_QUANT_Q5_K] = unpack_q5_k, [ATTN_QUANT_Q6_K] = unpack_q6_k},
    .tile = {[ATTN_QUANT_Q4_0] = tile_q4_0, [ATTN_QUANT_Q4_1] = tile_minimum, [ATTN_QUANT_Q5_0] = tile_q5_0,
             [ATTN_QUANT_Q5_1] = tile_minimum, [ATTN_QUANT_Q8_0] = tile_q8_0, [ATTN_QUANT_Q4_K] = tile_minimum,
             [ATTN_QUANT_Q5_K] = tile_minimum, [ATTN_QUANT_Q6_K] = tile_q6_k},
    .float_tile = {[ATTN_QUANT_F32] = float_f32, [ATTN_QUANT_F16] = float_f16, [ATTN_QUANT_BF16] = float_bf16},
};
