#include <attn/tensor.h>

#include "core/internal.h"
#include "tensor/half.h"

#include <string.h>
#include <strings.h>

static const struct {
    const char *name;
    size_t size;
} dtypes[ATTN_DTYPE_COUNT] = {
    [ATTN_F32] = {"f32", 4}, [ATTN_F16] = {"f16", 2}, [ATTN_BF16] = {"bf16", 2}, [ATTN_I8] = {"i8", 1},
    [ATTN_I32] = {"i32", 4}, [ATTN_I64] = {"i64", 8}, [ATTN_BOOL] = {"bool", 1},
};

static int known(attn_dtype dtype) { return (unsigned)dtype < ATTN_DTYPE_COUNT; }

const char *attn_dtype_name(attn_dtype dtype) { return known(dtype) ? dtypes[dtype].name : "?"; }

size_t attn_dtype_size(attn_dtype dtype) { return known(dtype) ? dtypes[dtype].size : 0; }

attn_status attn_dtype_parse(const char *name, attn_dtype *dtype)
{
    for (int i = 0; i < ATTN_DTYPE_COUNT; i++) {
        if (strcasecmp(name, dtypes[i].name) == 0) {
            *dtype = (attn_dtype)i;
            return ATTN_OK;
        }
    }
    return attn_fail(ATTN_ERR_DTYPE, "unknown data type '%s' (f32, f16, bf16, i8, i32, i64, bool)", name);
}

attn_tensor attn_tensor_make(void *data, attn_dtype dtype, int ndim, const int64_t *shape)
{
    attn_tensor tensor = {.data = data, .dtype = dtype, .ndim = ndim};
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        tensor.shape[i] = shape[i];
        tensor.stride[i] = stride;
        stride *= shape[i];
    }
    return tensor;
}

int64_t attn_tensor_count(const attn_tensor *tensor)
{
    int64_t count = 1;
    for (int i = 0; i < tensor->ndim; i++) {
        count *= tensor->shape[i];
    }
    return count;
}

int attn_tensor_is_contiguous(const attn_tensor *tensor)
{
    int64_t stride = 1;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] == 0) {
            return 1;
        }
        if (tensor->shape[i] != 1) {
            if (tensor->stride[i] != stride) {
                return 0;
            }
            stride *= tensor->shape[i];
        }
    }
    return 1;
}

/* One element as double (floats, bool) or int64 (integers), whichever is exact. */
typedef struct element {
    double real;
    int64_t whole;
    int is_whole;
} element;

static element load(const void *p, attn_dtype dtype)
{
    uint16_t half;
    element e = {0, 0, 1};
    switch (dtype) {
    case ATTN_F32: {
        float x;
        memcpy(&x, p, sizeof x);
        return (element){x, 0, 0};
    }
    case ATTN_F16: memcpy(&half, p, sizeof half); return (element){attn_f16_to_f32(half), 0, 0};
    case ATTN_BF16: memcpy(&half, p, sizeof half); return (element){attn_bf16_to_f32(half), 0, 0};
    case ATTN_I8: e.whole = *(const int8_t *)p; return e;
    case ATTN_I32: {
        int32_t x;
        memcpy(&x, p, sizeof x);
        e.whole = x;
        return e;
    }
    case ATTN_I64: memcpy(&e.whole, p, sizeof e.whole); return e;
    case ATTN_BOOL: e.whole = *(const uint8_t *)p != 0; return e;
    }
    return e;
}

static int64_t to_whole(element e)
{
    if (e.is_whole) {
        return e.whole;
    }
    if (!(e.real > -9.2e18 && e.real < 9.2e18)) { /* NaN and what does not fit */
        return e.real > 0 ? INT64_MAX : INT64_MIN;
    }
    return (int64_t)e.real;
}

static void store(void *p, attn_dtype dtype, element e)
{
    float real = e.is_whole ? (float)e.whole : (float)e.real;
    uint16_t half;
    switch (dtype) {
    case ATTN_F32: memcpy(p, &real, sizeof real); return;
    case ATTN_F16: half = attn_f32_to_f16(real); memcpy(p, &half, sizeof half); return;
    case ATTN_BF16: half = attn_f32_to_bf16(real); memcpy(p, &half, sizeof half); return;
    case ATTN_I8: *(int8_t *)p = (int8_t)to_whole(e); return;
    case ATTN_I32: {
        int32_t x = (int32_t)to_whole(e);
        memcpy(p, &x, sizeof x);
        return;
    }
    case ATTN_I64: {
        int64_t x = to_whole(e);
        memcpy(p, &x, sizeof x);
        return;
    }
    case ATTN_BOOL: *(uint8_t *)p = e.is_whole ? e.whole != 0 : e.real != 0; return;
    }
}

static void copy_row(char *to, attn_dtype to_type, int64_t to_stride, const char *from, attn_dtype from_type,
                     int64_t from_stride, int64_t count)
{
    int64_t to_size = (int64_t)attn_dtype_size(to_type), from_size = (int64_t)attn_dtype_size(from_type);
    if (to_type == from_type && to_stride == 1 && from_stride == 1) {
        memcpy(to, from, (size_t)(count * to_size));
    } else if (to_type == ATTN_F32 && from_type == ATTN_F32) {
        for (int64_t i = 0; i < count; i++) {
            ((float *)to)[i * to_stride] = ((const float *)from)[i * from_stride];
        }
    } else if (to_type == ATTN_F32 && from_type == ATTN_F16) {
        for (int64_t i = 0; i < count; i++) {
            ((float *)to)[i * to_stride] = attn_f16_to_f32(((const uint16_t *)from)[i * from_stride]);
        }
    } else if (to_type == ATTN_F32 && from_type == ATTN_BF16) {
        for (int64_t i = 0; i < count; i++) {
            ((float *)to)[i * to_stride] = attn_bf16_to_f32(((const uint16_t *)from)[i * from_stride]);
        }
    } else {
        for (int64_t i = 0; i < count; i++) {
            store(to + i * to_stride * to_size, to_type, load(from + i * from_stride * from_size, from_type));
        }
    }
}

attn_status attn_tensor_copy(const attn_tensor *to, const attn_tensor *from)
{
    int same = to->ndim == from->ndim;
    for (int i = 0; same && i < to->ndim; i++) {
        same = to->shape[i] == from->shape[i];
    }
    if (!same) {
        return attn_fail(ATTN_ERR_SHAPE, "tensor copy: shapes differ");
    }
    if (!known(to->dtype) || !known(from->dtype)) {
        return attn_fail(ATTN_ERR_DTYPE, "tensor copy: unknown data type");
    }
    int64_t count = attn_tensor_count(to);
    if (count == 0) {
        return ATTN_OK;
    }
    if (attn_tensor_is_contiguous(to) && attn_tensor_is_contiguous(from)) {
        copy_row(to->data, to->dtype, 1, from->data, from->dtype, 1, count);
        return ATTN_OK;
    }
    int last = to->ndim - 1; /* ndim 0 is contiguous */
    int64_t index[ATTN_MAX_DIMS] = {0};
    int64_t to_size = (int64_t)attn_dtype_size(to->dtype), from_size = (int64_t)attn_dtype_size(from->dtype);
    for (int64_t row = 0; row < count / to->shape[last]; row++) {
        int64_t to_offset = 0, from_offset = 0;
        for (int i = 0; i < last; i++) {
            to_offset += index[i] * to->stride[i];
            from_offset += index[i] * from->stride[i];
        }
        copy_row((char *)to->data + to_offset * to_size, to->dtype, to->stride[last],
                 (const char *)from->data + from_offset * from_size, from->dtype, from->stride[last], to->shape[last]);
        for (int i = last - 1; i >= 0 && ++index[i] == to->shape[i]; i--) {
            index[i] = 0;
        }
    }
    return ATTN_OK;
}
