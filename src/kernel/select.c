/* The largest of many numbers, and rows by number (see select.h). */
#include "kernel/select.h"

#include "kernel/load.h"
#include "kernel/vec.h"

/* The rest of a row that is not a whole vector, filled up with numbers that no limit lets through. */
VINLINE vf load_rest(const float *x, int rest)
{
#if defined(ATTN_ISA_AVX512)
    return _mm512_mask_loadu_ps(v_set1(NAN), v_first(rest), x);
#else
    float row[VW];
    for (int i = 0; i < VW; i++) {
        row[i] = i < rest ? x[i] : NAN;
    }
    return v_load(row);
#endif
}

static int64_t count_from(const float *x, int64_t count, float limit)
{
    vf by = v_set1(limit);
    int64_t found = 0, i = 0;
    for (; i + 4 * VW <= count; i += 4 * VW) {
        found += v_count(v_le(by, v_load(x + i))) + v_count(v_le(by, v_load(x + i + VW))) +
                 v_count(v_le(by, v_load(x + i + 2 * VW))) + v_count(v_le(by, v_load(x + i + 3 * VW)));
    }
    for (; i < count; i += VW) {
        found += v_count(v_le(by, count - i < VW ? load_rest(x + i, (int)(count - i)) : v_load(x + i)));
    }
    return found;
}

/* Numbers as integers of the same order, and back. */
VINLINE int32_t to_order(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits >= 0 ? bits : (int32_t)(0x80000000u - (uint32_t)bits);
}

VINLINE float from_order(int32_t order)
{
    int32_t bits = order >= 0 ? order : (int32_t)(0x80000000u - (uint32_t)order);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

VINLINE float least_of(vf x) { return -v_top(v_sub(v_zero(), x)); }

static float least_from(const float *x, int64_t count, float limit)
{
    vf by = v_set1(limit), none = v_set1(INFINITY), low = none;
    for (int64_t i = 0; i < count; i += VW) {
        vf y = count - i < VW ? load_rest(x + i, (int)(count - i)) : v_load(x + i);
        low = v_min(v_select(v_le(by, y), y, none), low);
    }
    return least_of(low);
}

/* Narrows the range between the least and the largest number, by interpolating between the counts at its ends and, every third time, by
 * halving the range of bit patterns, until what lies above is k numbers or the range is empty. */
static float kth(const float *x, int64_t count, int64_t k)
{
    vf top = v_set1(-INFINITY);
    int64_t i = 0;
    for (; i + VW <= count; i += VW) {
        top = v_max(v_load(x + i), top);
    }
    float most = v_top(top);
    for (; i < count; i++) {
        most = x[i] > most ? x[i] : most;
    }
    /* `above` numbers are >= low, at least k; `below` are >= high, fewer than k. Past infinity there is nothing. */
    int64_t low = to_order(least_from(x, count, -INFINITY)), high = (int64_t)to_order(most) + 1, above = count, below = 0;
    for (int step = 0; high - low > 1; step++) {
        int64_t middle = low + (high - low) / 2;
        float from = from_order((int32_t)low), to = from_order((int32_t)(high - 1));
        float between = from + (to - from) * (((float)(above - k) + 0.5f) / (float)(above - below));
        if (step % 3 != 2 && between > from && between <= to && to < INFINITY) {
            middle = to_order(between);
        }
        int64_t found = count_from(x, count, from_order((int32_t)middle));
        if (found == k) {
            return least_from(x, count, from_order((int32_t)middle));
        }
        if (found > k) {
            low = middle;
            above = found;
        } else {
            high = middle;
            below = found;
        }
    }
    return from_order((int32_t)low);
}

VINLINE int64_t compress_as(int named, const float *x, int64_t count, float limit, const int32_t *names, float *to, int32_t *at)
{
    vf by = v_set1(limit);
    int64_t kept = 0;
#if defined(ATTN_ISA_AVX512)
    __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), step = _mm512_set1_epi32(VW);
#endif
    for (int64_t i = 0; i < count; i += VW) {
        vf y = count - i < VW ? load_rest(x + i, (int)(count - i)) : v_load(x + i);
        vmask mask = v_le(by, y);
#if defined(ATTN_ISA_AVX512)
        __m512i own = named ? _mm512_maskz_loadu_epi32(mask, names + i) : places;
        v_store(to + kept, _mm512_maskz_compress_ps(mask, y));
        _mm512_storeu_si512(at + kept, _mm512_maskz_compress_epi32(mask, own));
        kept += v_count(mask);
        places = _mm512_add_epi32(places, step);
#else
        float row[VW];
        unsigned bits = v_bits(mask);
        if (bits != 0) {
            v_store(row, y);
        }
        for (; bits != 0; bits &= bits - 1, kept++) {
            int j = __builtin_ctz(bits);
            to[kept] = row[j];
            at[kept] = named ? names[i + j] : (int32_t)i + j;
        }
#endif
    }
    return kept;
}

static int64_t compress(const float *x, int64_t count, float limit, const int32_t *names, float *to, int32_t *at)
{
    return names != NULL ? compress_as(1, x, count, limit, names, to, at) : compress_as(0, x, count, limit, NULL, to, at);
}

/* `vectors` vectors of columns from column c on; two sums of each, so that one hides behind the other. Rows lie anywhere: a few ahead are
 * asked for. */
#define ROWS_AHEAD 12
VINLINE void gathered_tile(const int vectors, float *o, const float *p, const int32_t *at, int64_t count, const void *v, const attn_dtype dtype,
                         int64_t stride, int64_t c)
{
    vf acc[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
        acc[i][0] = acc[i][1] = v_zero();
    }
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
        int64_t ahead = j + ROWS_AHEAD + 2 <= count ? j + ROWS_AHEAD : j;
        vf w0 = v_set1(p[j]), w1 = v_set1(p[j + 1]);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            int64_t column = c + i * VW, size = dtype == ATTN_F32 ? 4 : dtype == ATTN_I8 ? 1 : 2;
            if (column * size % 64 == 0) {
                __builtin_prefetch((const char *)v + (at[ahead] * stride + column) * size);
                __builtin_prefetch((const char *)v + (at[ahead + 1] * stride + column) * size);
            }
            acc[i][0] = v_fma(w0, load_as(v, dtype, at[j] * stride + column), acc[i][0]);
            acc[i][1] = v_fma(w1, load_as(v, dtype, at[j + 1] * stride + column), acc[i][1]);
        }
    }
    for (int i = 0; i < vectors && j < count; i++) {
        acc[i][0] = v_fma(v_set1(p[j]), load_as(v, dtype, at[j] * stride + c + i * VW), acc[i][0]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
        v_store(o + c + i * VW, v_add(acc[i][0], acc[i][1]));
    }
}

VINLINE void gathered_any(float *o, const float *p, const int32_t *at, int64_t count, const void *v, const attn_dtype dtype, int64_t stride,
                        int64_t width)
{
    int64_t c = 0;
    for (; c + 4 * VW <= width; c += 4 * VW) {
        gathered_tile(4, o, p, at, count, v, dtype, stride, c);
    }
    for (; c + VW <= width; c += VW) {
        gathered_tile(1, o, p, at, count, v, dtype, stride, c);
    }
    for (; c < width; c++) {
        float sum = 0;
        for (int64_t j = 0; j < count; j++) {
            sum += p[j] * load_one(v, dtype, at[j] * stride + c);
        }
        o[c] = sum;
    }
}

static void gather_values(float *o, const float *p, const int32_t *at, int64_t count, const void *v, attn_dtype dtype_, int64_t stride,
                          int64_t width)
{
    BY_DTYPE(gathered_any(o, p, at, count, v, dtype, stride, width))
}

extern const attn_select_kernels ATTN_K(attn_select_kernels_table);
const attn_select_kernels ATTN_K(attn_select_kernels_table) = {.count = count_from, .kth = kth, .compress = compress,
                                                                   .gather_values = gather_values};
