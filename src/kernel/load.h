/* Reading vectors of other data types as f32, for files that are written over vec.h. */
#ifndef ATTN_KERNEL_LOAD_H
#define ATTN_KERNEL_LOAD_H

#include "kernel/vec.h"
#include "tensor/half.h"
#include <attn/tensor.h>

VINLINE int64_t size_of(const attn_dtype dtype) { return dtype == ATTN_F32 ? 4 : dtype == ATTN_I8 ? 1 : 2; }

VINLINE vf load_as(const void *from, const attn_dtype dtype, int64_t at)
{
    switch (dtype) {
    case ATTN_F16: return v_load_f16((const uint16_t *)from + at);
    case ATTN_BF16: return v_load_bf16((const uint16_t *)from + at);
    case ATTN_I8: return v_load_i8((const int8_t *)from + at);
    default: return v_load((const float *)from + at);
    }
}

VINLINE float load_one(const void *from, const attn_dtype dtype, int64_t at)
{
    switch (dtype) {
    case ATTN_F16: return attn_f16_to_f32(((const uint16_t *)from)[at]);
    case ATTN_BF16: return attn_bf16_to_f32(((const uint16_t *)from)[at]);
    case ATTN_I8: return ((const int8_t *)from)[at];
    default: return ((const float *)from)[at];
    }
}

VINLINE vf load_as_n(const void *from, const attn_dtype dtype, int64_t at, int lanes)
{
    if (dtype == ATTN_F32) {
        return v_load_n((const float *)from + at, lanes);
    }
    float row[VW] = {0};
    for (int i = 0; i < lanes; i++) {
        row[i] = load_one(from, dtype, at + i);
    }
    return v_load(row);
}

/* One copy of `body` per data type, with `dtype` a constant in it. */
#define BY_DTYPE(body)                     \
    switch (dtype_) {                      \
    case ATTN_F16: {                       \
        const attn_dtype dtype = ATTN_F16; \
        body;                              \
        break;                             \
    }                                      \
    case ATTN_BF16: {                      \
        const attn_dtype dtype = ATTN_BF16; \
        body;                              \
        break;                             \
    }                                      \
    case ATTN_I8: {                        \
        const attn_dtype dtype = ATTN_I8;  \
        body;                              \
        break;                             \
    }                                      \
    default: {                             \
        const attn_dtype dtype = ATTN_F32; \
        body;                              \
        break;                             \
    }                                      \
    }

#endif
