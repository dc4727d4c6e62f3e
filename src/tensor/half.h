/* Scalar conversions between float and the 16-bit formats, round to nearest even. */
#ifndef ATTN_TENSOR_HALF_H
#define ATTN_TENSOR_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t attn_float_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float attn_bits_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float attn_bf16_to_f32(uint16_t h) { return attn_bits_float((uint32_t)h << 16); }

static inline uint16_t attn_f32_to_bf16(float x)
{
    uint32_t bits = attn_float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)((bits >> 16) | 0x40u); /* keep NaN a NaN */
    }
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float attn_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t rest = h & 0x7fffu;
    if (rest >= 0x7c00u) { /* infinity, NaN */
        return attn_bits_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    }
    if (rest < 0x400u) { /* zero, subnormal: rest * 2^-24 */
        float magnitude = (float)rest * 0x1p-24f;
        return attn_bits_float(sign | attn_float_bits(magnitude));
    }
    return attn_bits_float(sign | ((rest << 13) + (112u << 23)));
}

static inline uint16_t attn_f32_to_f16(float x)
{
    uint32_t bits = attn_float_bits(x);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u);
    }
    if (rest >= 0x477ff000u) { /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (rest < 0x38800000u) { /* below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits */
        return (uint16_t)(sign | (attn_float_bits(attn_bits_float(rest) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

#endif
