#include "kernel/decode.h"
#include "kernel/load.h"
#include "kernel/vec.h"

/* Memory is the limit here: what will be read is asked for this far ahead, into L2, evenly while rows are computed in the order in which
 * they lie. (Into L1 a core waits for half as many lines; in another order what the machine fetches by itself is of no use.) Past the end
 * of the data it does nothing. */
#define BYTES_AHEAD 32768
#define BYTES_AHEAD_LISTED 16384 /* of rows that lie anywhere; those of a list's beginning come late */
#define SCALES_AHEAD 1024        /* numbers */
#define BLOCK_BYTES 8192         /* rows of values that pass through L1 for one tile of columns after another */

/* Compilers must not gather the fetches of a row at its start, where a core would wait for them, nor keep f32 in registers: read again from
 * L1 they are for free. */
#define KEEP_ORDER __asm__ volatile("" ::: "memory")

/* Rows of keys or values, one after another or those of a list. */
typedef struct row_source {
    const char *first;
    int64_t stride;      /* bytes */
    const int32_t *list; /* NULL: row j is the j-th */
    int64_t last;        /* of the list: what may be asked for */
    int64_t ahead;       /* rows */
} row_source;

VINLINE row_source source_of(const void *rows, const attn_dtype dtype, int64_t stride, int64_t width, const int listed,
                             const int32_t *list, int64_t entries)
{
    int64_t size = size_of(dtype), ahead = (listed ? BYTES_AHEAD_LISTED : BYTES_AHEAD) / (width > 0 ? width * size : 1) + 1;
    return (row_source){rows, stride * size, listed ? list : NULL, entries - 1, ahead};
}

VINLINE const char *row_at(const int listed, const row_source *x, int64_t j)
{
    return (const char *)((uintptr_t)x->first + (uintptr_t)((listed ? x->list[j] : j) * x->stride));
}

/* A row that follows, to be asked for; behind the end of a list its last one. */
VINLINE const char *row_later(const int listed, const row_source *x, int64_t j)
{
    return row_at(listed, x, listed && j > x->last ? x->last : j);
}

/* The row to ask for while row j is computed. */
VINLINE const char *row_ahead(const int listed, const row_source *x, int64_t j) { return row_later(listed, x, j + x->ahead); }

VINLINE void fetch(const char *row, int64_t at) { __builtin_prefetch((const void *)((uintptr_t)row + (uintptr_t)at), 0, 2); }

/* An even number of rows of values that fill a quarter of L1; of narrow ones, which arithmetic delays more than memory, half of it. */
VINLINE int64_t block_rows(const attn_dtype dtype, int64_t width)
{
    int64_t bytes = dtype == ATTN_F32 ? BLOCK_BYTES : 2 * BLOCK_BYTES, rows = bytes / (width > 0 ? width * size_of(dtype) : 1) / 2 * 2;
    return rows > 8 ? rows : 8;
}

/* ---- Products of vectors ----
 *
 * int8 by whole numbers, where there are instructions for it: 64 bytes of keys or values take 16 multiply-adds of f32 and 4 conversions for
 * four query rows (of AVX-512), more time than memory needs to bring them. In 16-bit pairs it is 8 and 2. Queries and weights are rounded to
 * 15 bits and sign of their row's largest number; sums are exact: 512 products of 128 and 32767 fit 32 bits. */

#if defined(ATTN_ISA_AVX512) || defined(ATTN_ISA_AVX2)
#define WHOLE_NUMBERS 1
#else
#define WHOLE_NUMBERS 0
#endif

#if WHOLE_NUMBERS
#define MOST_I8 512     /* width of rows: their sums fit */
#define WHOLE_WIDTH 32  /* rows are multiples of this, on every instruction set alike, and columns of values of twice as many */
#define SMALLEST 1e-30f /* rows whose largest number is smaller, or not finite, go the common way: 32767 / it must be finite */

/* Vectors of whole numbers as vf: 16-bit ones in pairs, or 32-bit sums. */
#if defined(ATTN_ISA_AVX512)
#define WHOLE(instruction, ...) _mm512_castsi512_ps(_mm512_##instruction(__VA_ARGS__))
#define BITS(x) _mm512_castps_si512(x)
VINLINE vf load_i16(const void *i8) { return WHOLE(cvtepi8_epi16, _mm256_loadu_si256(i8)); }
VINLINE vf to_float(vf x) { return _mm512_cvtepi32_ps(BITS(x)); }
VINLINE void store_i16(int16_t *to, vf x) { _mm256_storeu_si256((void *)to, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x))); }
#else
#define WHOLE(instruction, ...) _mm256_castsi256_ps(_mm256_##instruction(__VA_ARGS__))
#define BITS(x) _mm256_castps_si256(x)
VINLINE vf load_i16(const void *i8) { return WHOLE(cvtepi8_epi16, _mm_loadu_si128(i8)); }
VINLINE vf to_float(vf x) { return _mm256_cvtepi32_ps(BITS(x)); }
VINLINE void store_i16(int16_t *to, vf x)
{
    __m256i whole = _mm256_cvtps_epi32(x);
    _mm_storeu_si128((void *)to, _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}
#endif

/* to[i] = from[i] / unit with unit = largest / 32767, zeros up to whole vectors of pairs; 0 when that cannot be done. */
VINLINE float round_16(int16_t *to, const float *from, int64_t count)
{
    vf top = v_zero();
    int finite = 1;
    for (int64_t c = 0; c < count; c += VW) {
        vf x = v_abs(v_load_n(from + c, count - c < VW ? (int)(count - c) : VW));
        finite &= v_count(v_le(x, v_set1(1e30f))) == VW;
        top = v_max(top, x);
    }
    float most = v_top(top);
    if (!finite || (most < SMALLEST && most > 0)) {
        return 0;
    }
    vf factor = v_set1(most > 0 ? 32767 / most : 0);
    for (int64_t c = 0; c < (count + 2 * VW - 1) / (2 * VW) * (2 * VW); c += VW) {
        vf x = c >= count ? v_zero() : v_load_n(from + c, count - c < VW ? (int)(count - c) : VW);
        store_i16(to + c, v_mul(x, factor));
    }
    return most > 0 ? most / 32767 : 1;
}

/* One vector of a key or value row; whole: of 16-bit numbers from int8. */
VINLINE vf load_operand(const int whole, const void *from, const attn_dtype dtype)
{
    return whole ? load_i16(from) : load_as(from, dtype, 0);
}

/* acc += a b; whole: of 16-bit pairs, as 32-bit numbers. */
VINLINE void multiply_add(const int whole, vf *acc, vf a, vf b)
{
    if (whole) {
        /* Of the intrinsics GCC copies the sums around each product, and adds in an order of its own that takes more registers. */
#if defined(ATTN_ISA_AVX512VNNI)
        __asm__("vpdpwssd %2, %1, %0" : "+v"(*acc) : "v"(a), "v"(b));
#else
        __asm__("vpaddd %1, %0, %0" : "+v"(*acc) : "v"(WHOLE(madd_epi16, BITS(a), BITS(b))));
#endif
    } else {
        *acc = v_fma(a, b, *acc);
    }
}
#else
VINLINE vf load_operand(const int whole, const void *from, const attn_dtype dtype)
{
    (void)whole;
    return load_as(from, dtype, 0);
}

VINLINE void multiply_add(const int whole, vf *acc, vf a, vf b)
{
    (void)whole;
    *acc = v_fma(a, b, *acc);
}
#endif

/* ---- Scores ----
 *
 * Of several keys at a time where registers allow it, so that queries are loaded once for all of them and sums do not wait for themselves.
 * f32 goes key by key, in the order of memory, with four sums: it is memory that takes the time. */

VINLINE int keys_together(const int rows, const attn_dtype dtype)
{
    return dtype == ATTN_F32 ? 4 / rows : V_REGISTERS == 32 || rows <= 2 ? 4 : 2;
}

#if WHOLE_NUMBERS
VINLINE __m256 add_halves(const int whole, __m256 a, __m256 b)
{
    return whole ? _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b))) : _mm256_add_ps(a, b);
}

/* Four sums from two fours of halves; whole: times unit. */
VINLINE void finish_sums(const int whole, __m256 x, float unit, float *to)
{
    __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
    if (whole) {
        __m128i sum = _mm_add_epi32(_mm_castps_si128(low), _mm_castps_si128(high));
        _mm_storeu_ps(to, _mm_mul_ps(_mm_cvtepi32_ps(sum), _mm_set1_ps(unit)));
    } else {
        _mm_storeu_ps(to, _mm_add_ps(low, high));
    }
}

VINLINE void sums_of_4_halves(const int whole, const __m256 x[4], float unit, float *to)
{
    __m256 ab = add_halves(whole, _mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
    __m256 cd = add_halves(whole, _mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
    finish_sums(whole, add_halves(whole, _mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE)), unit, to);
}
#endif

#if defined(ATTN_ISA_AVX512)
VINLINE vf add_as(const int whole, vf a, vf b)
{
    return whole ? WHOLE(add_epi32, BITS(a), BITS(b)) : v_add(a, b);
}

VINLINE void sums_of_4(const int whole, const vf x[4], float unit, float *to)
{
    vf ab = add_as(whole, _mm512_mask_blend_ps(0xCCCC, x[0], x[1]), _mm512_shuffle_ps(x[0], x[1], 0x4E));
    vf cd = add_as(whole, _mm512_mask_blend_ps(0xCCCC, x[2], x[3]), _mm512_shuffle_ps(x[2], x[3], 0x4E));
    vf abcd = add_as(whole, _mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xDD));
    finish_sums(whole, add_halves(whole, _mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1)), unit, to);
}
#elif defined(ATTN_ISA_AVX2)
VINLINE void sums_of_4(const int whole, const vf x[4], float unit, float *to) { sums_of_4_halves(whole, x, unit, to); }
#else
VINLINE void sums_of_4(const int whole, const vf x[4], float unit, float *to)
{
    (void)whole, (void)unit;
    for (int i = 0; i < 4; i++) {
        to[i] = v_sum(x[i]);
    }
}
#endif

/* One vector of columns of `keys` keys, `at` bytes from their beginnings: acc[r * step + i] += of row r and key i. */
VINLINE void score_vector(const int rows, const int keys, const int step, const int whole, vf acc[], const char *q, int64_t ldq,
                          const char *const k[], const attn_dtype dtype, int64_t at)
{
    vf x[4];
#pragma GCC unroll 4
    for (int i = 0; i < keys; i++) {
        x[i] = load_operand(whole, k[i] + at, dtype);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        vf y = v_load((const void *)(q + r * ldq));
#pragma GCC unroll 4
        for (int i = 0; i < keys; i++) {
            multiply_add(whole, &acc[r * step + i], x[i], y);
        }
    }
}

/* All columns of `keys` keys. `ahead`: rows to ask for; `next`: those that follow. */
VINLINE void score_keys(const int rows, const int keys, const int step, const int whole, vf acc[], const char *q, int64_t ldq,
                        const char *const k[], const char *const next[], const char *const ahead[], const attn_dtype dtype, int64_t d)
{
    const int columns = whole ? 2 * VW : VW, bytes = columns * (int)size_of(dtype), line = bytes < 64 ? 64 / bytes : 1;
    int64_t c = 0, at = 0;
    for (; c + line * columns <= d; c += line * columns) {
#pragma GCC unroll 4
        for (int i = 0; i < keys; i++) {
            fetch(ahead[i], at);
            if (keys > 1) { /* rows side by side: the machine does not see which lines come next */
                __builtin_prefetch(next[i] + at, 0, 3);
            }
        }
#pragma GCC unroll 4
        for (int l = 0; l < line; l++, q += VW * 4, at += bytes) {
            score_vector(rows, keys, step, whole, acc, q, ldq, k, dtype, at);
        }
    }
    for (; c + columns <= d; c += columns, q += VW * 4, at += bytes) {
        score_vector(rows, keys, step, whole, acc, q, ldq, k, dtype, at);
    }
    int rest = (int)(d - c);
    if (rest > 0) {
#pragma GCC unroll 4
        for (int i = 0; i < keys; i++) {
            vf x = load_as_n(k[i] + at, dtype, 0, rest);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                acc[r * step + i] = v_fma(v_load_n((const void *)(q + r * ldq), rest), x, acc[r * step + i]);
            }
        }
    }
}

/* Of keys j ... j + keys - 1. `unit`: what scores of whole numbers are multiplied by, of each row. */
VINLINE void scores_of(const int rows, const int keys, const int whole, float *s, int64_t lds, const char *q, int64_t ldq, const float *unit,
                       const int listed, const row_source *from, const attn_dtype dtype, int64_t d, int64_t j)
{
    const int at_once = dtype == ATTN_F32 ? 1 : keys;
    const char *k[4], *next[4], *ahead[4];
    vf acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        acc[i] = v_zero();
    }
#pragma GCC unroll 4
    for (int i = 0; i < keys; i++) {
        k[i] = row_at(listed, from, j + i);
        next[i] = row_later(listed, from, j + keys + i);
        ahead[i] = row_ahead(listed, from, j + i);
    }
#pragma GCC unroll 4
    for (int i = 0; i < keys; i += at_once) {
        score_keys(rows, at_once, keys, whole, acc + i, q, ldq, k + i, next + i, ahead + i, dtype, d);
    }
    if (keys == 4) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            sums_of_4(whole, acc + 4 * r, whole ? unit[r] : 0, s + r * lds);
        }
    } else {
        float sums[16];
#pragma GCC unroll 4
        for (int i = 0; i < rows * keys; i += 4) {
            sums_of_4(whole, acc + i, 1, sums + i);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
            for (int i = 0; i < keys; i++) {
                s[r * lds + i] = whole ? sums[r * keys + i] * unit[r] : sums[r * keys + i];
            }
        }
    }
}

#if V_REGISTERS == 32
#define MOST_PACKED 2048 /* bytes of a query */

/* a b, as multiply_add() adds it: sums begin with it. */
VINLINE vf multiply(const int whole, vf a, vf b)
{
#if WHOLE_NUMBERS
    if (whole) {
        return WHOLE(madd_epi16, BITS(a), BITS(b));
    }
#endif
    (void)whole;
    return v_mul(a, b);
}

/* Of each of four vectors in memory; whole: times unit. */
VINLINE void sums_of_4_at(const int whole, const float *from, float unit, float *to)
{
#if defined(ATTN_ISA_AVX512)
    __m256 x[4]; /* halves are loaded: shuffles share a pipe with products */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = add_halves(whole, _mm256_load_ps(from + i * VW), _mm256_load_ps(from + i * VW + VW / 2));
    }
    sums_of_4_halves(whole, x, unit, to);
#else
    (void)whole, (void)unit;
    for (int i = 0; i < 4; i++) {
        to[i] = v_sum(v_load(from + i * VW));
    }
#endif
}

/* 64 bytes of four keys with their part of the packed queries. first: sums so far are put away, and new ones begin. Of what was put away,
 * `count` rows from `row` on are added up. */
VINLINE void score_line(const int whole, const int first, vf acc[], float *away, const int count, int64_t row, const float *unit, float *to,
                        int64_t ldt, const char *packed, const char *k0, int64_t stride, int64_t ahead, const attn_dtype dtype)
{
    const int bytes = (whole ? 2 * VW : VW) * (int)size_of(dtype), vectors = 64 / bytes;
    const char *k[4];
    __asm__("" : "+r"(k0)); /* or compilers keep a pointer to each of twelve rows, most of them in memory */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        k[i] = k0 + i * stride;
        fetch(k[i], ahead);
        __builtin_prefetch((const void *)((uintptr_t)k[i] + 4 * (uintptr_t)stride), 0, 3);
    }
#pragma GCC unroll 8
    for (int l = 0; l < vectors; l++) {
        vf x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            x[i] = load_operand(whole, k[i] + l * bytes, dtype);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            vf y = v_load((const void *)(packed + (l * 4 + r) * VW * 4));
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const int n = 4 * r + i;
                if (first && l == 0) {
                    v_store(away + n * VW, acc[n]);
                    acc[n] = multiply(whole, x[i], y);
                    KEEP_ORDER;
                } else {
                    multiply_add(whole, &acc[n], x[i], y);
                }
            }
        }
        if (l >= vectors - count) {
            int64_t r = row + l - (vectors - count);
            sums_of_4_at(whole, away + r * 4 * VW, whole ? unit[r] : 0, to + r * ldt);
        }
    }
}

/* Scores of four queries and rows of a narrow type, in fours of keys; returns how many keys were done.
 *
 * Products take the time here, and what waits for the last of them holds up those that follow: machines share out their queues by what
 * waits in them. So sums are put away among the first products of the next four keys, and added up across lanes between later ones. */
VINLINE int64_t scores_by_4(const int whole, float *s, int64_t lds, const char *q, int64_t ldq, const float *unit, const row_source *from,
                            const attn_dtype dtype, int64_t keys, int64_t d)
{
    const int vectors = 64 / ((whole ? 2 * VW : VW) * (int)size_of(dtype)), line_bytes = vectors * 4 * VW * 4;
    const int count = whole ? 2 : 1; /* rows added up with each of the first lines */
    const int64_t lines = d * size_of(dtype) / 64, ahead = from->ahead * from->stride;
    _Alignas(64) float away[16 * VW];
    _Alignas(64) char packed[4 * MOST_PACKED]; /* as they are read: [vectors][4] */
    float nowhere[16], *to = nowhere;
    int64_t ldt = 4, j = 0;
    vf acc[16];
    if (lines == 0 || d * size_of(dtype) % 64 != 0 || lines * line_bytes > 4 * MOST_PACKED || keys < 4) {
        return 0;
    }
    for (int64_t l = 0; l < lines * vectors; l++) {
        for (int r = 0; r < 4; r++) {
            memcpy(packed + (l * 4 + r) * VW * 4, q + r * ldq + l * VW * 4, VW * 4);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        acc[i] = v_zero();
    }
    for (; j + 4 <= keys; j += 4) {
        const char *k = row_at(0, from, j);
        int64_t line = 1, row = count;
        score_line(whole, 1, acc, away, count, 0, unit, to, ldt, packed, k, from->stride, ahead, dtype);
        for (; row < 4 && line < lines; line++, row += count) {
            score_line(whole, 0, acc, away, count, row, unit, to, ldt, packed + line * line_bytes, k + line * 64, from->stride, ahead, dtype);
        }
        for (; row < 4; row++) {
            sums_of_4_at(whole, away + row * 4 * VW, whole ? unit[row] : 0, to + row * ldt);
        }
        for (; line < lines; line++) {
            score_line(whole, 0, acc, away, 0, 0, unit, to, ldt, packed + line * line_bytes, k + line * 64, from->stride, ahead, dtype);
        }
        to = s + j;
        ldt = lds;
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            v_store(away + (4 * r + i) * VW, acc[4 * r + i]);
        }
        sums_of_4_at(whole, away + r * 4 * VW, whole ? unit[r] : 0, to + r * ldt);
    }
    return j;
}

/* Functions of their own, for whose loops alone registers are shared out. */
#define SCORES_BY_4(name, whole, dtype)                                                                                                \
    static __attribute__((noinline)) int64_t name(float *s, int64_t lds, const char *q, int64_t ldq, const float *unit,               \
                                                  const row_source *from, int64_t keys, int64_t d)                                    \
    {                                                                                                                                  \
        return scores_by_4(whole, s, lds, q, ldq, unit, from, dtype, keys, d);                                                         \
    }
SCORES_BY_4(scores_by_4_f16, 0, ATTN_F16)
SCORES_BY_4(scores_by_4_bf16, 0, ATTN_BF16)
SCORES_BY_4(scores_by_4_i8, WHOLE_NUMBERS, ATTN_I8)
#endif

VINLINE void scores_rows(const int rows, const int whole, float *s, int64_t lds, const void *q, int64_t ldq, const float *unit,
                         const int listed, const row_source *k, const attn_dtype dtype, int64_t keys, int64_t d)
{
    const int together = keys_together(rows, dtype);
    int64_t j = 0;
#if V_REGISTERS == 32
    if (rows == 4 && !listed && (dtype == ATTN_F16 || dtype == ATTN_BF16 || (dtype == ATTN_I8 && whole == WHOLE_NUMBERS))) {
        j = (dtype == ATTN_F16    ? scores_by_4_f16
             : dtype == ATTN_BF16 ? scores_by_4_bf16
                                  : scores_by_4_i8)(s, lds, q, ldq, unit, k, keys, d);
    }
#endif
    for (; j + together <= keys; j += together) {
        scores_of(rows, together, whole, s + j, lds, q, ldq, unit, listed, k, dtype, d, j);
    }
    for (; j < keys; j++) {
        scores_of(rows, 1, whole, s + j, lds, q, ldq, unit, listed, k, dtype, d, j);
    }
}

#if WHOLE_NUMBERS
/* Scores of all keys, unless these queries or widths go the common way: then 0. */
VINLINE int scores_i8(const int rows, float *s, int64_t lds, const float *q, int64_t ldq, const int listed, const row_source *k,
                      int64_t keys, int64_t d)
{
    int16_t whole[4][MOST_I8];
    float unit[4];
    if (d % WHOLE_WIDTH != 0 || d > MOST_I8) {
        return 0;
    }
    for (int r = 0; r < rows; r++) {
        unit[r] = round_16(whole[r], q + r * ldq, d);
        if (unit[r] == 0) {
            return 0;
        }
    }
    scores_rows(rows, 1, s, lds, whole, sizeof whole[0], unit, listed, k, ATTN_I8, keys, d);
    return 1;
}

#define KEYS_I8 256 /* weights rounded together; few enough that 32 bits hold their sums */

#define VECTORS_I8 (V_REGISTERS / 8) /* of sums, of each of four rows */

/* Unpacking took fours of columns from each 128-bit part in turn: in their order again. */
VINLINE void pack_again(vf low, vf high, vf *a, vf *b)
{
#if defined(ATTN_ISA_AVX512)
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    *a = _mm512_permutex2var_ps(low, first, high);
    *b = _mm512_permutex2var_ps(low, second, high);
#else
    *a = _mm256_permute2f128_ps(low, high, 0x20);
    *b = _mm256_permute2f128_ps(low, high, 0x31);
#endif
}

/* The columns of a tile from column c on, for keys begin ... end - 1 in pairs. p: [rows][KEYS_I8], zeros beyond the keys. */
VINLINE void values_i8_tile(const int rows, float *o, int64_t ldo, int16_t p[][KEYS_I8], const float *unit, const int listed,
                            const row_source *v, int64_t begin, int64_t end, int64_t c)
{
    vf acc[4][VECTORS_I8];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS_I8; i++) {
            acc[r][i] = v_zero();
        }
    }
    const int new_line = c % 64 == 0;
    for (int64_t j = begin; j < end; j += 2) {
        const int64_t second = j + 1 < end ? j + 1 : j;
        const char *one = row_at(listed, v, j) + c, *two = row_at(listed, v, second) + c;
        vf x[VECTORS_I8];
        if (new_line) {
            fetch(row_ahead(listed, v, j), c);
        }
#pragma GCC unroll 2
        for (int i = 0; i < VECTORS_I8; i += 2) {
            vf a = load_i16(one + i * VW), b = load_i16(two + i * VW);
            x[i] = WHOLE(unpacklo_epi16, BITS(a), BITS(b));
            x[i + 1] = WHOLE(unpackhi_epi16, BITS(a), BITS(b));
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, p[r] + j, sizeof pair);
            vf w = WHOLE(set1_epi32, pair);
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS_I8; i++) {
                multiply_add(1, &acc[r][i], x[i], w);
            }
            if (r == rows / 2 && new_line) {
                fetch(row_ahead(listed, v, second), c);
            }
            KEEP_ORDER;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        vf by = v_set1(unit[r]);
#pragma GCC unroll 2
        for (int i = 0; i < VECTORS_I8; i += 2) {
            float *to = o + r * ldo + c + i * VW;
            vf a, b;
            pack_again(acc[r][i], acc[r][i + 1], &a, &b);
            v_store(to, v_fma(to_float(a), by, v_load(to)));
            v_store(to + VW, v_fma(to_float(b), by, v_load(to + VW)));
        }
    }
}

/* How many columns were done, for all keys. */
VINLINE int64_t values_i8(const int rows, float *o, int64_t ldo, const float *p, int64_t ldp, const int listed, const row_source *v,
                          int64_t keys, int64_t dv)
{
    int16_t whole[4][KEYS_I8];
    float unit[4] = {0};
    const int64_t columns = dv / (2 * WHOLE_WIDTH) * (2 * WHOLE_WIDTH);
    if (keys > KEYS_I8) {
        return 0;
    }
    for (int r = 0; r < rows; r++) {
        unit[r] = round_16(whole[r], p + r * ldp, keys);
        if (unit[r] == 0) {
            return 0;
        }
    }
    int64_t block = block_rows(ATTN_I8, dv);
    for (int64_t j = 0; j < keys; j += block) {
        int64_t end = j + block < keys ? j + block : keys;
        for (int64_t c = 0; c < columns; c += VECTORS_I8 * VW) {
            values_i8_tile(rows, o, ldo, whole, unit, listed, v, j, end, c);
        }
    }
    return columns;
}
#endif

VINLINE void scores_either(const int rows, float *s, int64_t lds, const float *q, int64_t ldq, const int listed, const row_source *k,
                           const attn_dtype dtype, int rounded, int64_t keys, int64_t d)
{
    (void)rounded;
#if WHOLE_NUMBERS
    if (dtype == ATTN_I8 && rounded && scores_i8(rows, s, lds, q, ldq, listed, k, keys, d)) {
        return;
    }
#endif
    scores_rows(rows, 0, s, lds, q, ldq * 4, NULL, listed, k, dtype, keys, d);
}

/* `body` for query rows done ... done + few - 1, with `few` a constant in it. */
#define FEW_ROWS(label, number, body) \
    label: {                          \
        const int few = number;       \
        body;                         \
        break;                        \
    }
#define BY_ROWS(rows, body)                          \
    for (int64_t done = 0; done < rows; done += 4) { \
        switch (rows - done) {                       \
            FEW_ROWS(case 1, 1, body)                \
            FEW_ROWS(case 2, 2, body)                \
            FEW_ROWS(case 3, 3, body)                \
            FEW_ROWS(default, 4, body)               \
        }                                            \
    }

VINLINE void scores_any(float *s, int64_t lds, const float *q, int64_t ldq, int64_t rows, const int listed, const row_source k,
                        const attn_dtype dtype, int rounded, int64_t keys, int64_t d)
{
    BY_ROWS(rows, scores_either(few, s + done * lds, lds, q + done * ldq, ldq, listed, &k, dtype, rounded, keys, d))
}

static void scores(float *s, int64_t lds, const float *q, int64_t ldq, int64_t rows, const void *k, attn_dtype dtype_, int rounded,
                   int64_t stride, int64_t keys, int64_t d)
{
    BY_DTYPE(scores_any(s, lds, q, ldq, rows, 0, source_of(k, dtype, stride, d, 0, NULL, 0), dtype, rounded, keys, d))
}

static void scores_listed(float *s, int64_t lds, const float *q, int64_t ldq, int64_t rows, const void *k, attn_dtype dtype_, int rounded,
                          int64_t stride, const int32_t *list, int64_t keys, int64_t entries, int64_t d)
{
    BY_DTYPE(scores_any(s, lds, q, ldq, rows, 1, source_of(k, dtype, stride, d, 1, list, entries), dtype, rounded, keys, d))
}

/* ---- Values ---- */

/* `vectors` vectors of columns from column c on, for `rows` rows, over keys begin ... end - 1. */
VINLINE void values_tile(const int rows, const int vectors, float *o, int64_t ldo, const float *p, int64_t ldp, const int listed,
                         const row_source *v, const attn_dtype dtype, int64_t begin, int64_t end, int64_t c)
{
    const int64_t size = size_of(dtype);
    vf acc[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            acc[r][i] = v_load(o + r * ldo + c + i * VW);
        }
    }
    for (int64_t j = begin; j < end; j++) {
        const char *row = row_at(listed, v, j) + c * size, *ahead = row_ahead(listed, v, j);
        vf x[4];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            x[i] = load_as(row, dtype, i * VW);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf w = v_set1(p[r * ldp + j]);
#pragma GCC unroll 4
            for (int i = r; i < vectors; i += rows) {
                if ((c + i * VW) * size % 64 == 0) {
                    fetch(ahead, (c + i * VW) * size);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) {
                acc[r][i] = v_fma(w, dtype == ATTN_F32 ? load_as(row, dtype, i * VW) : x[i], acc[r][i]);
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

VINLINE void values_rows(const int rows, float *o, int64_t ldo, const float *p, int64_t ldp, const int listed, const row_source *v,
                         const attn_dtype dtype, int rounded, int64_t keys, int64_t dv)
{
    (void)rounded;
    int64_t done = 0, block = block_rows(dtype, dv), c = 0;
#if WHOLE_NUMBERS
    if (dtype == ATTN_I8 && rounded) {
        done = values_i8(rows, o, ldo, p, ldp, listed, v, keys, dv);
    }
#endif
    for (int64_t j = 0; j < keys; j += block) {
        int64_t end = j + block < keys ? j + block : keys;
        c = done;
#if V_REGISTERS == 32
        for (; c + 4 * VW <= dv; c += 4 * VW) {
            values_tile(rows, 4, o, ldo, p, ldp, listed, v, dtype, j, end, c);
        }
#endif
        for (; c + 2 * VW <= dv; c += 2 * VW) {
            values_tile(rows, 2, o, ldo, p, ldp, listed, v, dtype, j, end, c);
        }
        for (; c + VW <= dv; c += VW) {
            values_tile(rows, 1, o, ldo, p, ldp, listed, v, dtype, j, end, c);
        }
    }
    for (; c < dv; c++) {
        for (int r = 0; r < rows; r++) {
            float sum = o[r * ldo + c];
            for (int64_t j = 0; j < keys; j++) {
                sum += p[r * ldp + j] * load_one(row_at(listed, v, j), dtype, c);
            }
            o[r * ldo + c] = sum;
        }
    }
}

VINLINE void values_any(float *o, int64_t ldo, const float *p, int64_t ldp, int64_t rows, const int listed, const row_source v,
                        const attn_dtype dtype, int rounded, int64_t keys, int64_t dv)
{
    BY_ROWS(rows, values_rows(few, o + done * ldo, ldo, p + done * ldp, ldp, listed, &v, dtype, rounded, keys, dv))
}

static void values(float *o, int64_t ldo, const float *p, int64_t ldp, int64_t rows, const void *v, attn_dtype dtype_, int rounded,
                   int64_t stride, int64_t keys, int64_t dv)
{
    BY_DTYPE(values_any(o, ldo, p, ldp, rows, 0, source_of(v, dtype, stride, dv, 0, NULL, 0), dtype, rounded, keys, dv))
}

static void values_listed(float *o, int64_t ldo, const float *p, int64_t ldp, int64_t rows, const void *v, attn_dtype dtype_, int rounded,
                          int64_t stride, const int32_t *list, int64_t keys, int64_t entries, int64_t dv)
{
    BY_DTYPE(values_any(o, ldo, p, ldp, rows, 1, source_of(v, dtype, stride, dv, 1, list, entries), dtype, rounded, keys, dv))
}

static void scale_keys(float *s, int64_t lds, int64_t rows, const float *by, int64_t stride, const int32_t *list, int64_t keys)
{
    for (int64_t j = 0; j < keys; j += VW) {
        int lanes = keys - j < VW ? (int)(keys - j) : VW;
        float apart[VW];
        if (list == NULL) { /* a line or two of each call: too few for the machine to see */
            fetch((const char *)by, (j * stride + SCALES_AHEAD) * (int64_t)sizeof *by);
        }
        for (int i = 0; (stride != 1 || list != NULL) && i < lanes; i++) {
            apart[i] = by[(list != NULL ? list[j + i] : j + i) * stride];
        }
        vf factors = v_load_n(stride == 1 && list == NULL ? by + j : apart, lanes);
        for (int64_t r = 0; r < rows; r++) {
            float *at = s + r * lds + j;
            v_store_n(at, v_mul(v_load_n(at, lanes), factors), lanes);
        }
    }
}

extern const attn_decode_kernels ATTN_K(attn_decode_kernels_table);
const attn_decode_kernels ATTN_K(attn_decode_kernels_table) = {
    .scores = scores, .values = values, .scores_listed = scores_listed, .values_listed = values_listed, .scale_keys = scale_keys};
