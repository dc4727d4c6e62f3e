/* safetensors: [u64 header length][JSON header][data]. Offsets in the header are relative to the data. */
#include <attn/safetensors.h>

#include "core/internal.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEADER_LIMIT (100u << 20) /* as the reference implementation */
#define TENSOR_LIMIT (1 << 20)

struct entry {
    const char *name;
    attn_tensor view;
    uint64_t begin, end;
    void *copy; /* of an unaligned tensor */
};

struct attn_safetensors {
    void *map;
    size_t map_bytes;
    cJSON *header;
    const cJSON *metadata;
    struct entry *entries;
    int count;
};

static const struct {
    const char *name;
    attn_dtype dtype;
} file_dtypes[] = {{"F32", ATTN_F32}, {"F16", ATTN_F16}, {"BF16", ATTN_BF16}, {"I8", ATTN_I8},
                   {"I32", ATTN_I32}, {"I64", ATTN_I64}, {"BOOL", ATTN_BOOL}};

static attn_status bad(const char *what, const char *name)
{
    return attn_fail(ATTN_ERR_FORMAT, "safetensors: tensor '%.80s': %s", name, what);
}

/* A JSON number that is an integer in 0 ... 2^53. */
static int to_extent(const cJSON *item, uint64_t *value)
{
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble <= 9007199254740992.0)) {
        return 0;
    }
    *value = (uint64_t)item->valuedouble;
    return (double)*value == item->valuedouble;
}

static attn_status read_entry(struct entry *entry, const cJSON *item, uint64_t data_bytes)
{
    entry->name = item->string;
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(item, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(item, "data_offsets");
    if (!cJSON_IsString(dtype) || !cJSON_IsArray(shape) || !cJSON_IsArray(offsets)) {
        return bad("dtype, shape or data_offsets is missing or of the wrong kind", entry->name);
    }
    size_t type = 0;
    while (type < sizeof file_dtypes / sizeof file_dtypes[0] &&
           strcmp(file_dtypes[type].name, dtype->valuestring) != 0) {
        type++;
    }
    if (type == sizeof file_dtypes / sizeof file_dtypes[0]) {
        return attn_fail(ATTN_ERR_FORMAT,
                         "safetensors: tensor '%.80s': data type '%.20s' (supported: F32, F16, BF16, I8, I32, I64, BOOL)",
                         entry->name, dtype->valuestring);
    }
    int64_t extents[ATTN_MAX_DIMS];
    int ndim = 0;
    uint64_t bytes = attn_dtype_size(file_dtypes[type].dtype);
    const cJSON *extent;
    cJSON_ArrayForEach(extent, shape)
    {
        uint64_t value;
        if (ndim == ATTN_MAX_DIMS) {
            return bad("more than 8 dimensions", entry->name);
        }
        if (!to_extent(extent, &value)) {
            return bad("an extent is not a whole number", entry->name);
        }
        extents[ndim++] = (int64_t)value;
    }
    int empty = 0;
    for (int i = 0; i < ndim; i++) {
        empty |= extents[i] == 0;
    }
    for (int i = 0; i < ndim && !empty; i++) {
        if (bytes > data_bytes / (uint64_t)extents[i]) {
            return bad("the shape holds more than the file", entry->name);
        }
        bytes *= (uint64_t)extents[i];
    }
    if (empty) {
        bytes = 0;
    }
    if (cJSON_GetArraySize(offsets) != 2 || !to_extent(cJSON_GetArrayItem(offsets, 0), &entry->begin) ||
        !to_extent(cJSON_GetArrayItem(offsets, 1), &entry->end)) {
        return bad("data_offsets must be two whole numbers", entry->name);
    }
    if (entry->begin > entry->end || entry->end > data_bytes) {
        return bad("data_offsets lie outside the file", entry->name);
    }
    if (entry->end - entry->begin != bytes) {
        return bad("data_offsets do not agree with shape and dtype", entry->name);
    }
    entry->view = attn_tensor_make(NULL, file_dtypes[type].dtype, ndim, extents);
    return ATTN_OK;
}

static int by_begin(const void *a, const void *b)
{
    const struct entry *x = *(const struct entry *const *)a, *y = *(const struct entry *const *)b;
    if (x->begin != y->begin) {
        return x->begin < y->begin ? -1 : 1;
    }
    return (x->end > y->end) - (x->end < y->end);
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const struct entry *const *)a)->name, (*(const struct entry *const *)b)->name);
}

/* No two tensors share a byte or a name. */
static attn_status check_overlap(const attn_safetensors *file)
{
    struct entry **order = attn_alloc_array((size_t)file->count + 1, sizeof *order);
    if (order == NULL) {
        return attn_fail_memory((size_t)file->count * sizeof *order);
    }
    for (int i = 0; i < file->count; i++) {
        order[i] = &file->entries[i];
    }
    qsort(order, (size_t)file->count, sizeof *order, by_begin);
    attn_status status = ATTN_OK;
    for (int i = 1; i < file->count && status == ATTN_OK; i++) {
        if (order[i]->begin < order[i - 1]->end) {
            status = attn_fail(ATTN_ERR_FORMAT, "safetensors: tensors '%.80s' and '%.80s' overlap", order[i - 1]->name,
                               order[i]->name);
        }
    }
    qsort(order, (size_t)file->count, sizeof *order, by_name);
    for (int i = 1; i < file->count && status == ATTN_OK; i++) {
        if (by_name(&order[i - 1], &order[i]) == 0) {
            status = bad("there are two of that name", order[i]->name);
        }
    }
    attn_free(order);
    return status;
}

static attn_status read_header(attn_safetensors *file, const unsigned char *data, size_t bytes)
{
    if (bytes < 8) {
        return attn_fail(ATTN_ERR_FORMAT, "safetensors: %zu bytes are too few for a header", bytes);
    }
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; i--) {
        header_bytes = header_bytes << 8 | data[i];
    }
    if (header_bytes > bytes - 8 || header_bytes > HEADER_LIMIT) {
        return attn_fail(ATTN_ERR_FORMAT, "safetensors: header length %llu does not fit the file (%zu bytes)",
                         (unsigned long long)header_bytes, bytes);
    }
    file->header = cJSON_ParseWithLength((const char *)data + 8, (size_t)header_bytes);
    if (!cJSON_IsObject(file->header)) {
        return attn_fail(ATTN_ERR_FORMAT, "safetensors: the header is not a JSON object");
    }
    file->metadata = cJSON_GetObjectItemCaseSensitive(file->header, "__metadata__");
    if (file->metadata != NULL && !cJSON_IsObject(file->metadata)) {
        return attn_fail(ATTN_ERR_FORMAT, "safetensors: __metadata__ is not an object");
    }
    int items = cJSON_GetArraySize(file->header);
    if (items > TENSOR_LIMIT) {
        return attn_fail(ATTN_ERR_FORMAT, "safetensors: %d tensors (at most %d)", items, TENSOR_LIMIT);
    }
    file->entries = attn_calloc_array((size_t)items + 1, sizeof *file->entries);
    if (file->entries == NULL) {
        return attn_fail_memory((size_t)items * sizeof *file->entries);
    }
    const unsigned char *body = data + 8 + header_bytes;
    uint64_t body_bytes = bytes - 8 - header_bytes;
    const cJSON *item;
    cJSON_ArrayForEach(item, file->header)
    {
        if (item == file->metadata) {
            continue;
        }
        struct entry *entry = &file->entries[file->count];
        ATTN_TRY(read_entry(entry, item, body_bytes));
        file->count++;
        const void *start = body + entry->begin;
        if ((uintptr_t)start % attn_dtype_size(entry->view.dtype) != 0 && entry->end > entry->begin) {
            entry->copy = attn_alloc((size_t)(entry->end - entry->begin));
            if (entry->copy == NULL) {
                return attn_fail_memory((size_t)(entry->end - entry->begin));
            }
            memcpy(entry->copy, start, (size_t)(entry->end - entry->begin));
            start = entry->copy;
        }
        entry->view.data = (void *)(uintptr_t)start; /* read-only by contract */
    }
    return check_overlap(file);
}

attn_status attn_safetensors_open_memory(attn_safetensors **file, const void *data, size_t bytes)
{
    *file = NULL;
    attn_safetensors *made = attn_calloc_array(1, sizeof *made);
    if (made == NULL) {
        return attn_fail_memory(sizeof *made);
    }
    attn_status status = read_header(made, data, bytes);
    if (status != ATTN_OK) {
        attn_safetensors_close(made);
        return status;
    }
    *file = made;
    return ATTN_OK;
}

attn_status attn_safetensors_open(attn_safetensors **file, const char *path)
{
    void *map;
    size_t bytes;
    *file = NULL;
    ATTN_TRY(attn_map_file(path, "safetensors", 8, &map, &bytes));
    attn_status status = attn_safetensors_open_memory(file, map, bytes);
    if (status != ATTN_OK) {
        attn_unmap_file(map, bytes);
        return attn_fail(status, "'%s': %s", path, attn_last_error());
    }
    (*file)->map = map;
    (*file)->map_bytes = bytes;
    return ATTN_OK;
}

void attn_safetensors_close(attn_safetensors *file)
{
    if (file == NULL) {
        return;
    }
    for (int i = 0; i < file->count; i++) {
        attn_free(file->entries[i].copy);
    }
    attn_free(file->entries);
    cJSON_Delete(file->header);
    attn_unmap_file(file->map, file->map_bytes);
    attn_free(file);
}

int attn_safetensors_count(const attn_safetensors *file) { return file->count; }

const char *attn_safetensors_name(const attn_safetensors *file, int index)
{
    return index >= 0 && index < file->count ? file->entries[index].name : NULL;
}

attn_status attn_safetensors_get(const attn_safetensors *file, int index, attn_tensor *view)
{
    if (index < 0 || index >= file->count) {
        return attn_fail(ATTN_ERR_ARGUMENT, "safetensors: tensor %d of %d", index, file->count);
    }
    *view = file->entries[index].view;
    return ATTN_OK;
}

int attn_safetensors_find(const attn_safetensors *file, const char *name)
{
    for (int i = 0; i < file->count; i++) {
        if (strcmp(file->entries[i].name, name) == 0) {
            return i;
        }
    }
    return -1;
}

const char *attn_safetensors_metadata(const attn_safetensors *file, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(file->metadata, key);
    return cJSON_IsString(item) ? item->valuestring : NULL;
}

static const char *file_dtype_name(attn_dtype dtype)
{
    for (size_t i = 0; i < sizeof file_dtypes / sizeof file_dtypes[0]; i++) {
        if (file_dtypes[i].dtype == dtype) {
            return file_dtypes[i].name;
        }
    }
    return NULL;
}

static int add_tensor(cJSON *header, const char *name, const attn_tensor *tensor, uint64_t begin, uint64_t end)
{
    cJSON *item = cJSON_AddObjectToObject(header, name);
    if (item == NULL || cJSON_AddStringToObject(item, "dtype", file_dtype_name(tensor->dtype)) == NULL) {
        return 0;
    }
    cJSON *shape = cJSON_AddArrayToObject(item, "shape");
    for (int i = 0; i < tensor->ndim && shape != NULL; i++) {
        if (!cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)tensor->shape[i]))) {
            return 0;
        }
    }
    cJSON *offsets = cJSON_AddArrayToObject(item, "data_offsets");
    return shape != NULL && offsets != NULL && cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)begin)) &&
           cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)end));
}

static char *make_header(int count, const char *const *names, const attn_tensor *tensors, int metadata_count,
                         const char *const *keys, const char *const *values)
{
    cJSON *header = cJSON_CreateObject();
    int ok = header != NULL;
    if (ok && metadata_count > 0) {
        cJSON *metadata = cJSON_AddObjectToObject(header, "__metadata__");
        ok = metadata != NULL;
        for (int i = 0; ok && i < metadata_count; i++) {
            ok = cJSON_AddStringToObject(metadata, keys[i], values[i]) != NULL;
        }
    }
    uint64_t offset = 0;
    for (int i = 0; ok && i < count; i++) {
        uint64_t bytes = (uint64_t)attn_tensor_count(&tensors[i]) * attn_dtype_size(tensors[i].dtype);
        ok = add_tensor(header, names[i], &tensors[i], offset, offset + bytes);
        offset += bytes;
    }
    char *text = ok ? cJSON_PrintUnformatted(header) : NULL;
    cJSON_Delete(header);
    return text;
}

static int write_tensor(FILE *out, const attn_tensor *tensor, attn_status *status)
{
    size_t bytes = (size_t)attn_tensor_count(tensor) * attn_dtype_size(tensor->dtype);
    if (attn_tensor_is_contiguous(tensor)) {
        return bytes == 0 || fwrite(tensor->data, 1, bytes, out) == bytes;
    }
    void *copy = attn_alloc(bytes);
    if (copy == NULL) {
        *status = attn_fail_memory(bytes);
        return 1;
    }
    attn_tensor to = attn_tensor_make(copy, tensor->dtype, tensor->ndim, tensor->shape);
    *status = attn_tensor_copy(&to, tensor);
    int ok = fwrite(copy, 1, bytes, out) == bytes;
    attn_free(copy);
    return ok;
}

attn_status attn_safetensors_write(const char *path, int count, const char *const *names, const attn_tensor *tensors,
                                   int metadata_count, const char *const *metadata_keys,
                                   const char *const *metadata_values)
{
    for (int i = 0; i < count; i++) {
        if (file_dtype_name(tensors[i].dtype) == NULL) {
            return attn_fail(ATTN_ERR_DTYPE, "safetensors: tensor '%s' has an unknown data type", names[i]);
        }
    }
    char *header = make_header(count, names, tensors, metadata_count, metadata_keys, metadata_values);
    if (header == NULL) {
        return attn_fail(ATTN_ERR_MEMORY, "out of memory (safetensors header)");
    }
    FILE *out = fopen(path, "wb");
    if (out == NULL) {
        attn_status status = attn_fail(ATTN_ERR_IO, "cannot write '%s': %s", path, strerror(errno));
        cJSON_free(header);
        return status;
    }
    /* Padded with spaces, so that the data starts at a multiple of 8. */
    uint64_t length = strlen(header), padded = (length + 7) / 8 * 8;
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++) {
        prefix[i] = (unsigned char)(padded >> (8 * i));
    }
    attn_status status = ATTN_OK;
    int ok = fwrite(prefix, 1, 8, out) == 8 && fwrite(header, 1, length, out) == length &&
             fwrite("       ", 1, padded - length, out) == padded - length;
    for (int i = 0; ok && status == ATTN_OK && i < count; i++) {
        ok = write_tensor(out, &tensors[i], &status);
    }
    ok = fclose(out) == 0 && ok;
    cJSON_free(header);
    if (status == ATTN_OK && !ok) {
        status = attn_fail(ATTN_ERR_IO, "cannot write '%s': %s", path, strerror(errno));
    }
    return status;
}
