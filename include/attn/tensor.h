/* Strided views over the caller's memory.
 *
 * Data types and the strided layout follow DLPack, so that a view converts to and from a DLTensor
 * field by field: strides count elements, may be 0 (broadcast) or negative, and data points at element [0,0,...].
 */
#ifndef ATTN_TENSOR_H
#define ATTN_TENSOR_H

#include <attn/status.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ATTN_MAX_DIMS 8

typedef enum attn_dtype {
    ATTN_F32 = 0,
    ATTN_F16 = 1,
    ATTN_BF16 = 2,
    ATTN_I8 = 3,
    ATTN_I32 = 4,
    ATTN_I64 = 5,
    ATTN_BOOL = 6 /* one byte, 0 or 1 */
} attn_dtype;

#define ATTN_DTYPE_COUNT 7

typedef struct attn_tensor {
    void *data;       /* may be NULL when the view holds no element */
    attn_dtype dtype;
    int ndim;         /* 0 ... ATTN_MAX_DIMS */
    int64_t shape[ATTN_MAX_DIMS];
    int64_t stride[ATTN_MAX_DIMS]; /* in elements */
} attn_tensor;

/* "f32", "f16", "bf16", "i8", "i32", "i64", "bool"; "?" for anything else. */
ATTN_API const char *attn_dtype_name(attn_dtype dtype);
/* The data type of a name as above, also in safetensors spelling ("F32", "BOOL"); ATTN_ERR_DTYPE otherwise. */
ATTN_API attn_status attn_dtype_parse(const char *name, attn_dtype *dtype);
ATTN_API size_t attn_dtype_size(attn_dtype dtype); /* bytes of one element, 0 for an unknown type */

/* A contiguous row-major view. shape has ndim entries, each >= 0. No check of data. */
ATTN_API attn_tensor attn_tensor_make(void *data, attn_dtype dtype, int ndim, const int64_t *shape);
/* Number of elements; 1 for ndim 0. */
ATTN_API int64_t attn_tensor_count(const attn_tensor *tensor);
/* 1 when the elements lie contiguous in row-major order. */
ATTN_API int attn_tensor_is_contiguous(const attn_tensor *tensor);
/* Copy with conversion of data type and layout; shapes must be equal (ATTN_ERR_SHAPE). Float to integer truncates,
 * anything to bool is "not zero". The two must not overlap. */
ATTN_API attn_status attn_tensor_copy(const attn_tensor *to, const attn_tensor *from);

#ifdef __cplusplus
}
#endif
#endif
