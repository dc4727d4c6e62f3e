/* Reading of GGUF model files, versions 2 and 3, little-endian: metadata (typed keys and values) and tensors.
 *
 * The file is memory-mapped; strings and tensor data point into the mapping and are valid until close. Every count,
 * length, offset, alignment, type and overlap is checked when the file is opened, so that what the getters return can
 * be read without further checks of bounds. An opened file is read-only: any number of threads may use it.
 */
#ifndef ATTN_GGUF_H
#define ATTN_GGUF_H

#include <attn/status.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Types of metadata values; the numbers are those of the file format. */
typedef enum attn_gguf_type {
    ATTN_GGUF_U8 = 0,
    ATTN_GGUF_I8 = 1,
    ATTN_GGUF_U16 = 2,
    ATTN_GGUF_I16 = 3,
    ATTN_GGUF_U32 = 4,
    ATTN_GGUF_I32 = 5,
    ATTN_GGUF_F32 = 6,
    ATTN_GGUF_BOOL = 7,
    ATTN_GGUF_STRING = 8,
    ATTN_GGUF_ARRAY = 9,
    ATTN_GGUF_U64 = 10,
    ATTN_GGUF_I64 = 11,
    ATTN_GGUF_F64 = 12
} attn_gguf_type;

/* Types of tensor elements; the numbers are those of the file format. Files may hold others
 * (attn_gguf_tensor_type_name() gives their names); those can be listed but not computed with. */
typedef enum attn_gguf_tensor_type {
    ATTN_GGUF_TENSOR_F32 = 0,
    ATTN_GGUF_TENSOR_F16 = 1,
    ATTN_GGUF_TENSOR_Q4_0 = 2,
    ATTN_GGUF_TENSOR_Q4_1 = 3,
    ATTN_GGUF_TENSOR_Q5_0 = 6,
    ATTN_GGUF_TENSOR_Q5_1 = 7,
    ATTN_GGUF_TENSOR_Q8_0 = 8,
    ATTN_GGUF_TENSOR_Q4_K = 12,
    ATTN_GGUF_TENSOR_Q5_K = 13,
    ATTN_GGUF_TENSOR_Q6_K = 14,
    ATTN_GGUF_TENSOR_BF16 = 30
} attn_gguf_tensor_type;

typedef struct attn_gguf attn_gguf;

/* Map a file. ATTN_ERR_IO, or ATTN_ERR_FORMAT with what is wrong and where. */
ATTN_API attn_status attn_gguf_open(attn_gguf **file, const char *path);
/* The same over memory that the caller keeps alive and unchanged until close. */
ATTN_API attn_status attn_gguf_open_memory(attn_gguf **file, const void *data, size_t bytes);
ATTN_API void attn_gguf_close(attn_gguf *file); /* NULL is ignored */
ATTN_API int attn_gguf_version(const attn_gguf *file);

/* ---- Metadata ---- */

/* Text in the file: `bytes` bytes, not terminated by 0 (and possibly with 0 inside). */
typedef struct attn_gguf_string {
    const char *text;
    size_t bytes;
} attn_gguf_string;

typedef struct attn_gguf_metadata {
    const char *key;          /* terminated by 0 */
    attn_gguf_type type;
    attn_gguf_type item_type; /* of arrays; otherwise equal to type */
    int64_t count;            /* items of arrays; otherwise 1 */
} attn_gguf_metadata;

ATTN_API int64_t attn_gguf_metadata_count(const attn_gguf *file);
/* Entry `index` in file order; NULL when out of range. */
ATTN_API const attn_gguf_metadata *attn_gguf_metadata_at(const attn_gguf *file, int64_t index);
/* NULL when the file has no such key. */
ATTN_API const attn_gguf_metadata *attn_gguf_metadata_find(const attn_gguf *file, const char *key);

/* The value of a key, converted. ATTN_ERR_FORMAT, with the key's name, when it is missing or of another kind:
 * integers of any width (and bool) convert to int64 when they fit, integers and floats to double. */
ATTN_API attn_status attn_gguf_get_int(const attn_gguf *file, const char *key, int64_t *value);
ATTN_API attn_status attn_gguf_get_float(const attn_gguf *file, const char *key, double *value);
ATTN_API attn_status attn_gguf_get_bool(const attn_gguf *file, const char *key, int *value);
ATTN_API attn_status attn_gguf_get_string(const attn_gguf *file, const char *key, attn_gguf_string *value);

/* All items of an array into the caller's `values`, which has room for the array's `count` items (see
 * attn_gguf_metadata); `count` here must be equal to it (ATTN_ERR_FORMAT otherwise). Conversions as above. */
ATTN_API attn_status attn_gguf_get_ints(const attn_gguf *file, const char *key, int64_t *values, int64_t count);
ATTN_API attn_status attn_gguf_get_floats(const attn_gguf *file, const char *key, float *values, int64_t count);
ATTN_API attn_status attn_gguf_get_strings(const attn_gguf *file, const char *key, attn_gguf_string *values,
                                           int64_t count);

/* ---- Tensors ---- */

typedef struct attn_gguf_tensor {
    const char *name;          /* terminated by 0 */
    attn_gguf_tensor_type type;
    int ndim;                  /* 1 ... 4 */
    int64_t shape[4];          /* shape[0] varies fastest: a matrix of R rows of C columns has {C, R, 1, 1} */
    const void *data;          /* aligned as the file says */
    size_t bytes;
} attn_gguf_tensor;

ATTN_API int64_t attn_gguf_tensor_count(const attn_gguf *file);
/* Tensor `index` in file order; NULL when out of range. */
ATTN_API const attn_gguf_tensor *attn_gguf_tensor_at(const attn_gguf *file, int64_t index);
/* NULL when the file has no such tensor. */
ATTN_API const attn_gguf_tensor *attn_gguf_tensor_find(const attn_gguf *file, const char *name);
/* "F32", "Q4_K", ...; "?" for a number that the format does not define. */
ATTN_API const char *attn_gguf_tensor_type_name(attn_gguf_tensor_type type);
/* Elements per block (1 for plain types) and bytes per block; 0 for a number that the format does not define. */
ATTN_API int attn_gguf_block_elements(attn_gguf_tensor_type type);
ATTN_API int attn_gguf_block_bytes(attn_gguf_tensor_type type);

/* Convert `count` elements (a multiple of the type's block) to float32, exactly as the format defines them.
 * ATTN_ERR_UNSUPPORTED for types that are not in attn_gguf_tensor_type. */
ATTN_API attn_status attn_gguf_dequantize(attn_gguf_tensor_type type, const void *data, int64_t count, float *out);

#ifdef __cplusplus
}
#endif
#endif
