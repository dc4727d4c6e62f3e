/* Reading (memory-mapped) and writing of safetensors files: an 8-byte little-endian header length, a JSON header,
 * raw data. Data types: F32, F16, BF16, I8, I32, I64, BOOL. */
#ifndef ATTN_SAFETENSORS_H
#define ATTN_SAFETENSORS_H

#include <attn/tensor.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_safetensors attn_safetensors;

/* Map a file. Every header field is checked: lengths, offsets, overlaps, data types, sizes (ATTN_ERR_FORMAT). */
ATTN_API attn_status attn_safetensors_open(attn_safetensors **file, const char *path);
/* The same over memory that the caller keeps alive until close. */
ATTN_API attn_status attn_safetensors_open_memory(attn_safetensors **file, const void *data, size_t bytes);
ATTN_API void attn_safetensors_close(attn_safetensors *file); /* NULL is ignored */

ATTN_API int attn_safetensors_count(const attn_safetensors *file);
/* Name of tensor `index` (file order), valid until close; NULL when out of range. */
ATTN_API const char *attn_safetensors_name(const attn_safetensors *file, int index);
/* A read-only view of a tensor, valid until close. Tensors that the file stores at an unaligned offset are copied
 * when the file is opened, so data is always aligned for its type. */
ATTN_API attn_status attn_safetensors_get(const attn_safetensors *file, int index, attn_tensor *view);
/* Index of a name, -1 when absent. */
ATTN_API int attn_safetensors_find(const attn_safetensors *file, const char *name);
/* A string of __metadata__, NULL when absent; valid until close. */
ATTN_API const char *attn_safetensors_metadata(const attn_safetensors *file, const char *key);

/* Write tensors (any strides) with metadata key/value pairs (may be NULL when metadata_count is 0). */
ATTN_API attn_status attn_safetensors_write(const char *path, int count, const char *const *names,
                                            const attn_tensor *tensors, int metadata_count,
                                            const char *const *metadata_keys, const char *const *metadata_values);

#ifdef __cplusplus
}
#endif
#endif
