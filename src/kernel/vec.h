/* A thin header over the vector instructions: float vectors `vf` of VW lanes, the same names on every instruction set.
 * Micro-kernels are written once over it and compiled once per instruction set (see meson.build).
 *
 * ATTN_K(name) gives the symbol its instruction set's suffix. Nothing here is visible outside src/kernel.
 */
#ifndef ATTN_KERNEL_VEC_H
#define ATTN_KERNEL_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef ATTN_ISA
#error "vec.h is for files that are compiled per instruction set"
#endif
#define ATTN_K2(name, isa) name##_##isa
#define ATTN_K1(name, isa) ATTN_K2(name, isa)
#define ATTN_K(name) ATTN_K1(name, ATTN_ISA)

#define VINLINE static inline __attribute__((always_inline, unused))

#if defined(ATTN_ISA_AVX512)
#include <immintrin.h>
#define VW 16
#define V_REGISTERS 32
typedef __m512 vf;
typedef __mmask16 vmask;
VINLINE vf v_zero(void) { return _mm512_setzero_ps(); }
VINLINE vf v_set1(float x) { return _mm512_set1_ps(x); }
VINLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
VINLINE void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
/* The first n lanes, 0 <= n <= VW; the others read as 0 and are not touched in memory. */
VINLINE vmask v_first(int n) { return (vmask)((1u << n) - 1u); }
VINLINE vf v_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(v_first(n), p); }
VINLINE void v_store_n(float *p, vf x, int n) { _mm512_mask_storeu_ps(p, v_first(n), x); }
VINLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
VINLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
VINLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
VINLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
VINLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
VINLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
VINLINE vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
VINLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }   /* a*b + c */
VINLINE vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a*b */
VINLINE vmask v_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
VINLINE vmask v_le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
/* Lane i as bit i. */
VINLINE unsigned v_bits(vmask m) { return m; }
VINLINE int v_count(vmask m) { return __builtin_popcount(m); }
VINLINE vf v_select(vmask m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
VINLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VINLINE vf v_abs(vf a) { return _mm512_abs_ps(a); }
/* a * 2^n for integral n; n may reach below the normal range (the result then goes to 0 gradually). */
VINLINE vf v_scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
VINLINE float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
VINLINE float v_top(vf a) { return _mm512_reduce_max_ps(a); }
VINLINE vf v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
VINLINE vf v_load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
VINLINE vf v_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}
VINLINE void v_store_f16(uint16_t *p, vf x)
{
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(ATTN_ISA_AVX2)
#include <immintrin.h>
#define VW 8
#define V_REGISTERS 16
typedef __m256 vf;
typedef __m256 vmask;
VINLINE vf v_zero(void) { return _mm256_setzero_ps(); }
VINLINE vf v_set1(float x) { return _mm256_set1_ps(x); }
VINLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
VINLINE void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
VINLINE __m256i v_first_i(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
VINLINE vmask v_first(int n) { return _mm256_castsi256_ps(v_first_i(n)); }
VINLINE vf v_load_n(const float *p, int n) { return _mm256_maskload_ps(p, v_first_i(n)); }
VINLINE void v_store_n(float *p, vf x, int n) { _mm256_maskstore_ps(p, v_first_i(n), x); }
VINLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
VINLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
VINLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
VINLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
VINLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
VINLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
VINLINE vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
VINLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
VINLINE vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
VINLINE vmask v_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
VINLINE vmask v_le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
VINLINE unsigned v_bits(vmask m) { return (unsigned)_mm256_movemask_ps(m); }
VINLINE int v_count(vmask m) { return __builtin_popcount(v_bits(m)); }
VINLINE vf v_select(vmask m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
VINLINE vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VINLINE vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
VINLINE vf v_pow2i(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
VINLINE vf v_scale2(vf a, vf n)
{
    /* In two halves, so that results below the normal range come out right. */
    __m256i whole = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(n, _mm256_set1_ps(252.0f)), _mm256_set1_ps(-252.0f)));
    __m256i half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, v_pow2i(half)), v_pow2i(_mm256_sub_epi32(whole, half)));
}
VINLINE float v_sum(vf a)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
VINLINE float v_top(vf a)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
VINLINE vf v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
VINLINE vf v_load_bf16(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
VINLINE vf v_load_i8(const int8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
}
VINLINE void v_store_f16(uint16_t *p, vf x)
{
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else
/* NEON, or plain C for everything else: four lanes in GCC's portable vectors. */
#include "tensor/half.h"
#define VW 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vmask __attribute__((vector_size(16)));
VINLINE vf v_zero(void) { return (vf){0, 0, 0, 0}; }
VINLINE vf v_set1(float x) { return (vf){x, x, x, x}; }
VINLINE vf v_load(const float *p)
{
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
VINLINE void v_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
VINLINE vmask v_first(int n) { return (vmask){-(n > 0), -(n > 1), -(n > 2), -(n > 3)}; }
VINLINE vf v_load_n(const float *p, int n)
{
    vf x = v_zero();
    for (int i = 0; i < n; i++) {
        x[i] = p[i];
    }
    return x;
}
VINLINE void v_store_n(float *p, vf x, int n)
{
    for (int i = 0; i < n; i++) {
        p[i] = x[i];
    }
}
VINLINE vf v_add(vf a, vf b) { return a + b; }
VINLINE vf v_sub(vf a, vf b) { return a - b; }
VINLINE vf v_mul(vf a, vf b) { return a * b; }
VINLINE vf v_div(vf a, vf b) { return a / b; }
VINLINE vmask v_lt(vf a, vf b) { return a < b; }
VINLINE vmask v_le(vf a, vf b) { return a <= b; }
VINLINE unsigned v_bits(vmask m) { return (unsigned)((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8)); }
VINLINE int v_count(vmask m) { return -(m[0] + m[1] + m[2] + m[3]); }
VINLINE vf v_select(vmask m, vf yes, vf no) { return (vf)(((vmask)yes & m) | ((vmask)no & ~m)); }
#if defined(ATTN_ISA_NEON)
#include <arm_neon.h>
#define V_REGISTERS 32
VINLINE vf v_max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
VINLINE vf v_min(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
VINLINE vf v_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
VINLINE vf v_fnma(vf a, vf b, vf c) { return (vf)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
VINLINE vf v_round(vf a) { return (vf)vrndnq_f32((float32x4_t)a); }
VINLINE vf v_sqrt(vf a) { return (vf)vsqrtq_f32((float32x4_t)a); }
VINLINE vf v_load_f16(const uint16_t *p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
VINLINE void v_store_f16(uint16_t *p, vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x))); }
#else
#define V_REGISTERS 16
VINLINE vf v_max(vf a, vf b) { return v_select(a > b, a, b); }
VINLINE vf v_min(vf a, vf b) { return v_select(a < b, a, b); }
VINLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
VINLINE vf v_fnma(vf a, vf b, vf c) { return c - a * b; }
VINLINE vf v_round(vf a)
{
    /* To nearest, ties to even; beyond 2^22 everything that matters here is integral already. */
    vf magic = v_set1(12582912.0f);
    vf near = (a + magic) - magic;
    vf size = v_select(a < 0, -a, a);
    return v_select(size < 4194304.0f, near, a);
}
VINLINE vf v_sqrt(vf a) { return (vf){sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
VINLINE vf v_load_f16(const uint16_t *p)
{
    return (vf){attn_f16_to_f32(p[0]), attn_f16_to_f32(p[1]), attn_f16_to_f32(p[2]), attn_f16_to_f32(p[3])};
}
VINLINE void v_store_f16(uint16_t *p, vf x)
{
    for (int i = 0; i < 4; i++) {
        p[i] = attn_f32_to_f16(x[i]);
    }
}
#endif
VINLINE vf v_abs(vf a) { return v_max(a, -a); }
VINLINE vf v_pow2i(vmask n) { return (vf)((n + 127) << 23); }
VINLINE vf v_scale2(vf a, vf n)
{
    vmask whole = __builtin_convertvector(v_max(v_min(n, v_set1(252.0f)), v_set1(-252.0f)), vmask);
    vmask half = whole >> 1;
    return a * v_pow2i(half) * v_pow2i(whole - half);
}
VINLINE float v_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
VINLINE float v_top(vf a)
{
    float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
    return x > y ? x : y;
}
VINLINE vf v_load_bf16(const uint16_t *p)
{
    vmask x = {(int32_t)((uint32_t)p[0] << 16), (int32_t)((uint32_t)p[1] << 16), (int32_t)((uint32_t)p[2] << 16),
               (int32_t)((uint32_t)p[3] << 16)};
    return (vf)x;
}
VINLINE vf v_load_i8(const int8_t *p) { return (vf){p[0], p[1], p[2], p[3]}; }
#endif

/* exp(x) to about 1 ulp where the result is a normal number; 0 below -104, infinity above 88.8, exp(-inf) = 0, NaN for
 * NaN: minimum and maximum give their second argument then. */
VINLINE vf v_exp(vf x)
{
    x = v_max(v_set1(-104.0f), v_min(v_set1(89.0f), x));
    vf n = v_round(v_mul(x, v_set1(1.44269504088896341f)));
    /* Two-part ln 2: the first product is exact for |n| < 2^9. */
    vf r = v_fnma(n, v_set1(0.693359375f), x);
    r = v_fnma(n, v_set1(-2.12194440e-4f), r);
    vf p = v_set1(1.9875691500e-4f);
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_fma(v_mul(r, r), p, v_add(r, v_set1(1.0f)));
    return v_scale2(p, n);
}

/* 2^x to about 1 ulp: degree-6 polynomial (relative error 2e-9) on the fraction. Below -149 the result is 0; NaN stays (the order of
 * the maximum's arguments matters for that). */
/* 2^r for |r| <= 1/2 */
VINLINE vf v_exp2_rest(vf r)
{
    vf p = v_set1(0x1.41d333p-13f);
    p = v_fma(p, r, v_set1(0x1.5f456ap-10f));
    p = v_fma(p, r, v_set1(0x1.3b2dbcp-7f));
    p = v_fma(p, r, v_set1(0x1.c6aed4p-5f));
    p = v_fma(p, r, v_set1(0x1.ebfbdap-3f));
    p = v_fma(p, r, v_set1(0x1.62e430p-1f));
    return v_fma(p, r, v_set1(1.0f));
}

VINLINE vf v_exp2(vf x)
{
    x = v_max(v_set1(-200.0f), x);
    vf n = v_round(x);
    return v_scale2(v_exp2_rest(v_sub(x, n)), n);
}

/* The same for weights of a softmax, x <= 127: what lies below the normal range may be 0. */
VINLINE vf v_exp2_weight(vf x)
{
#if defined(ATTN_ISA_AVX2)
    /* v_scale2 would take half of the time. A NaN stays one. */
    vf n = v_round(x), p = v_exp2_rest(v_sub(x, n));
    __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
    return _mm256_and_ps(_mm256_castsi256_ps(bits), _mm256_cmp_ps(x, v_set1(-125.0f), _CMP_NLE_UQ));
#else
    return v_exp2(x);
#endif
}

#endif
