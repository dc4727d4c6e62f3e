#include "kernel/decode.h"
#include "kernel/load.h"
#include "kernel/vec.h"

/* Memory is the limit here: what will be read is asked for this far ahead, into L2, evenly while rows are computed in the order in which
 * they lie. (Into L1 a core waits for half as many lines; in another order what the machine fetches by itself is of no use.) Past the end
 * of the data it does nothing. */
#define BYTES_AHEAD 32768
#define BLOCK_BYTES 8192 /* rows of values that pass through L1 for one tile of columns after another */

/* Compilers must not gather the fetches of a row at its start, where a core would wait for them, nor keep f32 in registers: read again from
 * L1 they are for free. */
#define KEEP_ORDER __asm__ volatile("" ::: "memory")

/* As many rows as these bytes hold, in bytes. */
VINLINE int64_t distance(const attn_dtype dtype, int64_t stride, int64_t width)
{
    int64_t size = size_of(dtype);
    return (BYTES_AHEAD / (width * size) + 1) * stride * size;
}

VINLINE void fetch(const void *from, const attn_dtype dtype, int64_t at, int64_t column, int64_t ahead)
{
    if (column * size_of(dtype) % 64 == 0) {
        __builtin_prefetch((const void *)((uintptr_t)from + (uintptr_t)(at * size_of(dtype) + ahead)), 0, 2);
    }
}

/* An even number of rows of values that fill a quarter of L1. */
VINLINE int64_t block_rows(const attn_dtype dtype, int64_t width)
{
    int64_t rows = BLOCK_BYTES / (width * size_of(dtype)) / 2 * 2;
    return rows > 8 ? rows : 8;
}

/* ---- Scores: four sums at a time, of as many keys as there are no query rows for ---- */

#if defined(ATTN_ISA_AVX512)
VINLINE void sums_of_4(const vf x[4], float *to)
{
    vf ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    vf cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    vf abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#else
VINLINE void sums_of_4(const vf x[4], float *to)
{
    for (int i = 0; i < 4; i++) {
        to[i] = v_sum(x[i]);
    }
}
#endif

/* Sum i * rows + r is of row r and key j + i. */
VINLINE void put_sums(const int rows, const int together, float *s, int64_t lds, int64_t j, const float sums[4])
{
#pragma GCC unroll 4
    for (int i = 0; i < together; i++) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            s[r * lds + j + i] = sums[i * rows + r];
        }
    }
}

VINLINE void scores_of(const int rows, const int together, float *s, int64_t lds, const float *q, int64_t ldq, const void *k,
                       const attn_dtype dtype, int64_t stride, int64_t d, int64_t ahead, int64_t j)
{
    int64_t whole = d / VW * VW;
    int rest = (int)(d - whole);
    vf acc[4];
    float sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        acc[i] = v_zero();
    }
#pragma GCC unroll 4
    for (int i = 0; i < together; i++) {
        int64_t at = (j + i) * stride;
        for (int64_t c = 0; c < whole; c += VW) {
            fetch(k, dtype, at + c, c, ahead);
            vf x = load_as(k, dtype, at + c);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                acc[i * rows + r] = v_fma(v_load(q + r * ldq + c), x, acc[i * rows + r]);
            }
        }
        if (rest > 0) {
            vf x = load_as_n(k, dtype, at + whole, rest);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                acc[i * rows + r] = v_fma(v_load_n(q + r * ldq + whole, rest), x, acc[i * rows + r]);
            }
        }
    }
    sums_of_4(acc, sums);
    put_sums(rows, together, s, lds, j, sums);
}

#if defined(ATTN_ISA_AVX512VNNI)
/* ---- int8 by whole numbers ----
 *
 * 64 bytes of keys take 16 multiply-adds of f32 and 8 conversions for four query rows, more time than memory needs to bring them. In
 * 16-bit pairs it is 8 and 2. Queries and weights are rounded to 15 bits and sign of their row's largest number; sums are exact: 512
 * products of 128 and 32767 fit 32 bits. */

#define MOST_I8 512     /* width of rows: their sums fit */
#define SMALLEST 1e-30f /* rows whose largest number is smaller, or not finite, go the common way: 32767 / it must be finite */

/* to[i] = from[i] / unit with unit = largest / 32767, zeros up to a multiple of 32; 0 when that cannot be done. */
VINLINE float round_16(int16_t *to, const float *from, int64_t count)
{
    vf top = v_zero();
    int finite = 1;
    for (int64_t c = 0; c < count; c += VW) {
        vf x = v_abs(v_load_n(from + c, count - c < VW ? (int)(count - c) : VW));
        finite &= _mm512_cmp_ps_mask(x, v_set1(1e30f), _CMP_NLE_UQ) == 0;
        top = v_max(top, x);
    }
    float most = v_top(top);
    if (!finite || (most < SMALLEST && most > 0)) {
        return 0;
    }
    vf factor = v_set1(most > 0 ? 32767 / most : 0);
    for (int64_t c = 0; c < (count + 31) / 32 * 32; c += VW) {
        vf x = c < count ? v_load_n(from + c, count - c < VW ? (int)(count - c) : VW) : v_zero();
        _mm256_storeu_si256((void *)(to + c), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v_mul(x, factor))));
    }
    return most > 0 ? most / 32767 : 1;
}

VINLINE __m512i add_pairs_32(__m512i a, __m512i b)
{
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

VINLINE __m512i add_pairs_64(__m512i a, __m512i b)
{
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

VINLINE void scores_of_i8(const int rows, const int together, float *s, int64_t lds, int16_t whole[][MOST_I8], const float *unit,
                          const int8_t *k, int64_t stride, int64_t d, int64_t ahead, int64_t j)
{
    __m512i acc[4];
    float sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        acc[i] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int i = 0; i < together; i++) {
        int64_t at = (j + i) * stride;
        for (int64_t c = 0; c < d; c += 32) {
            fetch(k, ATTN_I8, at + c, c, ahead);
            __m512i x = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)(k + at + c)));
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                acc[i * rows + r] = _mm512_dpwssd_epi32(acc[i * rows + r], x, _mm512_loadu_si512(whole[r] + c));
            }
        }
    }
    __m512i all = add_pairs_64(add_pairs_32(acc[0], acc[1]), add_pairs_32(acc[2], acc[3]));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    __m128i total = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_ps(sums, _mm_mul_ps(_mm_cvtepi32_ps(total), _mm_loadu_ps(unit)));
    put_sums(rows, together, s, lds, j, sums);
}

/* Scores of all keys, unless these queries or widths go the common way: then 0. */
VINLINE int scores_i8(const int rows, float *s, int64_t lds, const float *q, int64_t ldq, const int8_t *k, int64_t stride, int64_t keys,
                      int64_t d)
{
    int16_t whole[4][MOST_I8];
    float unit[4] = {0};
    const int together = 4 / rows;
    if (d % 32 != 0 || d > MOST_I8) {
        return 0;
    }
    for (int r = 0; r < rows; r++) {
        unit[r] = round_16(whole[r], q + r * ldq, d);
        if (unit[r] == 0) {
            return 0;
        }
    }
    for (int i = rows; i < 4; i++) {
        unit[i] = unit[i % rows];
    }
    int64_t j = 0, ahead = distance(ATTN_I8, stride, d);
    for (; j + together <= keys; j += together) {
        scores_of_i8(rows, together, s, lds, whole, unit, k, stride, d, ahead, j);
    }
    for (; j < keys; j++) {
        scores_of_i8(rows, 1, s, lds, whole, unit, k, stride, d, ahead, j);
    }
    return 1;
}

#define KEYS_I8 256 /* weights rounded together; few enough that 32 bits hold their sums */

/* 64 columns, for keys begin ... end - 1 in pairs. p: [rows][KEYS_I8], zeros beyond the keys. */
VINLINE void values_i8_tile(const int rows, float *o, int64_t ldo, int16_t p[][KEYS_I8], const float *unit, const int8_t *v,
                            int64_t stride, int64_t begin, int64_t end, int64_t ahead)
{
    __m512i acc[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            acc[r][i] = _mm512_setzero_si512();
        }
    }
    for (int64_t j = begin; j < end; j += 2) {
        const int8_t *one = v + j * stride, *two = j + 1 < end ? one + stride : one;
        __m512i x[4];
        fetch(one, ATTN_I8, 0, 0, ahead);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512i a = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)(one + 32 * i)));
            __m512i b = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)(two + 32 * i)));
            x[2 * i] = _mm512_unpacklo_epi16(a, b);
            x[2 * i + 1] = _mm512_unpackhi_epi16(a, b);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, p[r] + j, sizeof pair);
            __m512i w = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                acc[r][i] = _mm512_dpwssd_epi32(acc[r][i], x[i], w);
            }
            if (r == rows / 2) {
                fetch(two, ATTN_I8, 0, 0, ahead);
            }
            KEEP_ORDER;
        }
    }
    /* Unpacking took fours of columns from each 128-bit part in turn. */
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        vf by = v_set1(unit[r]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            float *to = o + r * ldo + 32 * i;
            __m512i a = _mm512_permutex2var_epi32(acc[r][2 * i], first, acc[r][2 * i + 1]);
            __m512i b = _mm512_permutex2var_epi32(acc[r][2 * i], second, acc[r][2 * i + 1]);
            v_store(to, v_fma(_mm512_cvtepi32_ps(a), by, v_load(to)));
            v_store(to + VW, v_fma(_mm512_cvtepi32_ps(b), by, v_load(to + VW)));
        }
    }
}

/* How many columns were done, for all keys. */
VINLINE int64_t values_i8(const int rows, float *o, int64_t ldo, const float *p, int64_t ldp, const int8_t *v, int64_t stride,
                          int64_t keys, int64_t dv)
{
    int16_t whole[4][KEYS_I8];
    float unit[4] = {0};
    int64_t columns = dv / 64 * 64;
    if (keys > KEYS_I8) {
        return 0;
    }
    for (int r = 0; r < rows; r++) {
        unit[r] = round_16(whole[r], p + r * ldp, keys);
        if (unit[r] == 0) {
            return 0;
        }
    }
    int64_t block = block_rows(ATTN_I8, dv), ahead = distance(ATTN_I8, stride, dv);
    for (int64_t j = 0; j < keys; j += block) {
        int64_t end = j + block < keys ? j + block : keys;
        for (int64_t c = 0; c < columns; c += 64) {
            values_i8_tile(rows, o + c, ldo, whole, unit, v + c, stride, j, end, ahead);
        }
    }
    return columns;
}
#endif

VINLINE void scores_rows(const int rows, float *s, int64_t lds, const float *q, int64_t ldq, const void *k,
                         const attn_dtype dtype, int64_t stride, int64_t keys, int64_t d)
{
#if defined(ATTN_ISA_AVX512VNNI)
    if (dtype == ATTN_I8 && scores_i8(rows, s, lds, q, ldq, k, stride, keys, d)) {
        return;
    }
#endif
    const int together = 4 / rows;
    int64_t j = 0, ahead = distance(dtype, stride, d);
    for (; j + together <= keys; j += together) {
        scores_of(rows, together, s, lds, q, ldq, k, dtype, stride, d, ahead, j);
    }
    for (; j < keys; j++) {
        scores_of(rows, 1, s, lds, q, ldq, k, dtype, stride, d, ahead, j);
    }
}

VINLINE void scores_any(float *s, int64_t lds, const float *q, int64_t ldq, int64_t rows, const void *k,
                        const attn_dtype dtype, int64_t stride, int64_t keys, int64_t d)
{
    for (; rows >= 4; rows -= 4, s += 4 * lds, q += 4 * ldq) {
        scores_rows(4, s, lds, q, ldq, k, dtype, stride, keys, d);
    }
    switch (rows) {
    case 3: scores_rows(3, s, lds, q, ldq, k, dtype, stride, keys, d); break;
    case 2: scores_rows(2, s, lds, q, ldq, k, dtype, stride, keys, d); break;
    case 1: scores_rows(1, s, lds, q, ldq, k, dtype, stride, keys, d); break;
    default: break;
    }
}

static void scores(float *s, int64_t lds, const float *q, int64_t ldq, int64_t rows, const void *k,
                   attn_dtype dtype_, int64_t stride, int64_t keys, int64_t d)
{
    BY_DTYPE(scores_any(s, lds, q, ldq, rows, k, dtype, stride, keys, d))
}

/* ---- Values ---- */

/* `vectors` vectors of columns from column c on, for `rows` rows, over keys begin ... end - 1. */
VINLINE void values_tile(const int rows, const int vectors, float *o, int64_t ldo, const float *p, int64_t ldp,
                         const void *v, const attn_dtype dtype, int64_t stride, int64_t begin, int64_t end, int64_t ahead, int64_t c)
{
    vf acc[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            acc[r][i] = v_load(o + r * ldo + c + i * VW);
        }
    }
    for (int64_t j = begin; j < end; j++) {
        const int64_t at = j * stride + c;
        vf x[4];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            x[i] = load_as(v, dtype, at + i * VW);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf w = v_set1(p[r * ldp + j]);
#pragma GCC unroll 4
            for (int i = r; i < vectors; i += rows) {
                fetch(v, dtype, at + i * VW, i * VW, ahead);
            }
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) {
                acc[r][i] = v_fma(w, dtype == ATTN_F32 ? load_as(v, dtype, at + i * VW) : x[i], acc[r][i]);
            }
            KEEP_ORDER;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            v_store(o + r * ldo + c + i * VW, acc[r][i]);
        }
    }
}

VINLINE void values_rows(const int rows, float *o, int64_t ldo, const float *p, int64_t ldp, const void *v,
                         const attn_dtype dtype, int64_t stride, int64_t keys, int64_t dv)
{
    int64_t done = 0, block = block_rows(dtype, dv), ahead = distance(dtype, stride, dv), c = 0;
#if defined(ATTN_ISA_AVX512VNNI)
    if (dtype == ATTN_I8) {
        done = values_i8(rows, o, ldo, p, ldp, v, stride, keys, dv);
    }
#endif
    for (int64_t j = 0; j < keys; j += block) {
        int64_t end = j + block < keys ? j + block : keys;
        c = done;
#if V_REGISTERS == 32
        for (; c + 4 * VW <= dv; c += 4 * VW) {
            values_tile(rows, 4, o, ldo, p, ldp, v, dtype, stride, j, end, ahead, c);
        }
#endif
        for (; c + 2 * VW <= dv; c += 2 * VW) {
            values_tile(rows, 2, o, ldo, p, ldp, v, dtype, stride, j, end, ahead, c);
        }
        for (; c + VW <= dv; c += VW) {
            values_tile(rows, 1, o, ldo, p, ldp, v, dtype, stride, j, end, ahead, c);
        }
    }
    for (; c < dv; c++) {
        for (int r = 0; r < rows; r++) {
            float sum = o[r * ldo + c];
            for (int64_t j = 0; j < keys; j++) {
                sum += p[r * ldp + j] * load_one(v, dtype, j * stride + c);
            }
            o[r * ldo + c] = sum;
        }
    }
}

VINLINE void values_any(float *o, int64_t ldo, const float *p, int64_t ldp, int64_t rows, const void *v,
                        const attn_dtype dtype, int64_t stride, int64_t keys, int64_t dv)
{
    for (; rows >= 4; rows -= 4, o += 4 * ldo, p += 4 * ldp) {
        values_rows(4, o, ldo, p, ldp, v, dtype, stride, keys, dv);
    }
    switch (rows) {
    case 3: values_rows(3, o, ldo, p, ldp, v, dtype, stride, keys, dv); break;
    case 2: values_rows(2, o, ldo, p, ldp, v, dtype, stride, keys, dv); break;
    case 1: values_rows(1, o, ldo, p, ldp, v, dtype, stride, keys, dv); break;
    default: break;
    }
}

static void values(float *o, int64_t ldo, const float *p, int64_t ldp, int64_t rows, const void *v,
                   attn_dtype dtype_, int64_t stride, int64_t keys, int64_t dv)
{
    BY_DTYPE(values_any(o, ldo, p, ldp, rows, v, dtype, stride, keys, dv))
}

extern const attn_decode_kernels ATTN_K(attn_decode_kernels_table);
const attn_decode_kernels ATTN_K(attn_decode_kernels_table) = {.scores = scores, .values = values};
