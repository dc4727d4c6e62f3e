/* GGUF: [magic "GGUF"][u32 version][u64 tensors][u64 metadata entries][entries][tensor infos][padding][data].
 * Strings are a u64 length and bytes. Tensor offsets are relative to the data, which starts at a multiple of
 * general.alignment (32 when the file does not say). */
#include <attn/gguf.h>

#include "core/internal.h"
#include "tensor/half.h"

#include <stdlib.h>
#include <string.h>

#define DEFAULT_ALIGNMENT 32
#define NAME_LIMIT 65536 /* bytes of a key or of a tensor's name */

struct metadata {
    attn_gguf_metadata info;
    const unsigned char *value; /* the first item */
};

struct attn_gguf {
    void *map;
    size_t map_bytes;
    int version;
    struct metadata *metadata;
    struct metadata **metadata_by_key;
    int64_t metadata_count;
    attn_gguf_tensor *tensors;
    attn_gguf_tensor **tensors_by_name;
    int64_t tensor_count;
    attn_arena *names;
};

/* ---- Types ---- */

static const struct {
    int type;
    const char *name;
    int elements, bytes;
} tensor_types[] = {
    {0, "F32", 1, 4},          {1, "F16", 1, 2},       {2, "Q4_0", 32, 18},     {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},       {7, "Q5_1", 32, 24},    {8, "Q8_0", 32, 34},     {9, "Q8_1", 32, 40},
    {10, "Q2_K", 256, 84},     {11, "Q3_K", 256, 110}, {12, "Q4_K", 256, 144},  {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},    {15, "Q8_K", 256, 292}, {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98},  {19, "IQ1_S", 256, 50}, {20, "IQ4_NL", 32, 18},  {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},    {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},      {25, "I16", 1, 2},
    {26, "I32", 1, 4},         {27, "I64", 1, 8},      {28, "F64", 1, 8},       {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2},        {34, "TQ1_0", 256, 54}, {35, "TQ2_0", 256, 66},  {39, "MXFP4", 32, 17},
    {40, "NVFP4", 64, 36},
};

static int find_type(attn_gguf_tensor_type type)
{
    for (size_t i = 0; i < sizeof tensor_types / sizeof tensor_types[0]; i++) {
        if (tensor_types[i].type == (int)type) {
            return (int)i;
        }
    }
    return -1;
}

const char *attn_gguf_tensor_type_name(attn_gguf_tensor_type type)
{
    int index = find_type(type);
    return index < 0 ? "?" : tensor_types[index].name;
}

int attn_gguf_block_elements(attn_gguf_tensor_type type)
{
    int index = find_type(type);
    return index < 0 ? 0 : tensor_types[index].elements;
}

int attn_gguf_block_bytes(attn_gguf_tensor_type type)
{
    int index = find_type(type);
    return index < 0 ? 0 : tensor_types[index].bytes;
}

static const char *const value_type_names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                               "bool", "string", "array", "u64", "i64", "f64"};

#define VALUE_TYPES (sizeof value_type_names / sizeof value_type_names[0])

/* Bytes of a scalar; 0 for strings and arrays. */
static size_t value_bytes(attn_gguf_type type)
{
    static const unsigned char bytes[VALUE_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return bytes[type];
}

/* ---- A bounded reader; once it has run out of data everything reads as 0 and `failed` stays set ---- */

struct reader {
    const unsigned char *data;
    size_t bytes, at;
    int failed;
};

static const unsigned char *take(struct reader *in, uint64_t bytes)
{
    if (in->failed || bytes > in->bytes - in->at) {
        in->failed = 1;
        return NULL;
    }
    const unsigned char *start = in->data + in->at;
    in->at += (size_t)bytes;
    return start;
}

static uint64_t load_uint(const unsigned char *data, size_t bytes)
{
    uint64_t value = 0;
    for (size_t i = bytes; i-- > 0;) {
        value = value << 8 | data[i];
    }
    return value;
}

static uint64_t take_uint(struct reader *in, size_t bytes)
{
    const unsigned char *data = take(in, bytes);
    return data == NULL ? 0 : load_uint(data, bytes);
}

static uint64_t remaining(const struct reader *in) { return in->bytes - in->at; }

static attn_status cut_off(const struct reader *in, const char *where)
{
    return attn_fail(ATTN_ERR_FORMAT, "gguf: %s runs past the end of the file (%zu bytes)", where, in->bytes);
}

/* A key or name: copied and terminated. */
static attn_status take_name(attn_gguf *file, struct reader *in, const char *what, const char **name)
{
    uint64_t bytes = take_uint(in, 8);
    if (!in->failed && bytes >= NAME_LIMIT) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: %s of %llu bytes (at most %d)", what, (unsigned long long)bytes,
                         NAME_LIMIT - 1);
    }
    const unsigned char *text = take(in, bytes);
    if (text == NULL) {
        return cut_off(in, what);
    }
    if (memchr(text, 0, (size_t)bytes) != NULL) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: %s contains a zero byte", what);
    }
    char *copy = attn_arena_alloc(file->names, (size_t)bytes + 1);
    if (copy == NULL) {
        return attn_fail_memory((size_t)bytes + 1);
    }
    memcpy(copy, text, (size_t)bytes);
    copy[bytes] = '\0';
    *name = copy;
    return ATTN_OK;
}

static attn_status take_value_type(struct reader *in, const char *key, attn_gguf_type *type)
{
    uint64_t number = take_uint(in, 4);
    if (in->failed) {
        return cut_off(in, key);
    }
    if (number >= VALUE_TYPES) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: key '%.80s' has the unknown type %llu", key,
                         (unsigned long long)number);
    }
    *type = (attn_gguf_type)number;
    return ATTN_OK;
}

static attn_status take_metadata(attn_gguf *file, struct reader *in, struct metadata *entry)
{
    attn_gguf_metadata *info = &entry->info;
    ATTN_TRY(take_name(file, in, "a metadata key", &info->key));
    ATTN_TRY(take_value_type(in, info->key, &info->type));
    info->item_type = info->type;
    info->count = 1;
    if (info->type == ATTN_GGUF_ARRAY) {
        ATTN_TRY(take_value_type(in, info->key, &info->item_type));
        if (info->item_type == ATTN_GGUF_ARRAY) {
            return attn_fail(ATTN_ERR_UNSUPPORTED, "gguf: key '%.80s' is an array of arrays", info->key);
        }
        uint64_t count = take_uint(in, 8);
        size_t least = info->item_type == ATTN_GGUF_STRING ? 8 : value_bytes(info->item_type);
        if (in->failed || count > remaining(in) / least) {
            return attn_fail(ATTN_ERR_FORMAT, "gguf: key '%.80s': an array of %llu items does not fit the file",
                             info->key, (unsigned long long)count);
        }
        info->count = (int64_t)count;
    }
    entry->value = in->data + in->at;
    if (info->item_type == ATTN_GGUF_STRING) {
        for (int64_t i = 0; i < info->count && !in->failed; i++) {
            take(in, take_uint(in, 8));
        }
    } else {
        take(in, (uint64_t)info->count * value_bytes(info->item_type));
    }
    return in->failed ? cut_off(in, info->key) : ATTN_OK;
}

static attn_status take_tensor(attn_gguf *file, struct reader *in, attn_gguf_tensor *tensor, uint64_t *offset)
{
    ATTN_TRY(take_name(file, in, "a tensor's name", &tensor->name));
    uint64_t ndim = take_uint(in, 4);
    if (!in->failed && (ndim < 1 || ndim > 4)) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: tensor '%.80s' has %llu dimensions (1 to 4)", tensor->name,
                         (unsigned long long)ndim);
    }
    tensor->ndim = (int)ndim;
    uint64_t count = 1;
    for (int i = 0; i < 4; i++) {
        uint64_t extent = i < tensor->ndim ? take_uint(in, 8) : 1;
        if (!in->failed && (extent == 0 || extent > (uint64_t)INT64_MAX / 16 / count)) {
            return attn_fail(ATTN_ERR_FORMAT, "gguf: tensor '%.80s': extent %llu of dimension %d is 0 or too large",
                             tensor->name, (unsigned long long)extent, i);
        }
        tensor->shape[i] = (int64_t)extent;
        count *= extent;
    }
    uint64_t number = take_uint(in, 4);
    *offset = take_uint(in, 8);
    if (in->failed) {
        return cut_off(in, tensor->name);
    }
    int type = number > INT32_MAX ? -1 : find_type((attn_gguf_tensor_type)number);
    if (type < 0) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "gguf: tensor '%.80s' has the unknown type %llu", tensor->name,
                         (unsigned long long)number);
    }
    tensor->type = (attn_gguf_tensor_type)number;
    uint64_t elements = (uint64_t)tensor_types[type].elements;
    if ((uint64_t)tensor->shape[0] % elements != 0) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: tensor '%.80s': rows of %lld elements are not whole blocks of %s (%d)",
                         tensor->name, (long long)tensor->shape[0], tensor_types[type].name,
                         tensor_types[type].elements);
    }
    uint64_t blocks = count / elements;
    if (blocks > in->bytes / (uint64_t)tensor_types[type].bytes) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: tensor '%.80s' is larger than the file", tensor->name);
    }
    tensor->bytes = (size_t)blocks * (size_t)tensor_types[type].bytes;
    return ATTN_OK;
}

/* ---- Order, duplicates, overlaps ---- */

static int by_key(const void *a, const void *b)
{
    return strcmp((*(struct metadata *const *)a)->info.key, (*(struct metadata *const *)b)->info.key);
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(attn_gguf_tensor *const *)a)->name, (*(attn_gguf_tensor *const *)b)->name);
}

static int by_data(const void *a, const void *b)
{
    const char *x = (*(attn_gguf_tensor *const *)a)->data, *y = (*(attn_gguf_tensor *const *)b)->data;
    return (x > y) - (x < y);
}

static attn_status sort_metadata(attn_gguf *file)
{
    file->metadata_by_key = attn_alloc_array((size_t)file->metadata_count + 1, sizeof *file->metadata_by_key);
    if (file->metadata_by_key == NULL) {
        return attn_fail_memory((size_t)file->metadata_count * sizeof *file->metadata_by_key);
    }
    for (int64_t i = 0; i < file->metadata_count; i++) {
        file->metadata_by_key[i] = &file->metadata[i];
    }
    qsort(file->metadata_by_key, (size_t)file->metadata_count, sizeof *file->metadata_by_key, by_key);
    for (int64_t i = 1; i < file->metadata_count; i++) {
        if (by_key(&file->metadata_by_key[i - 1], &file->metadata_by_key[i]) == 0) {
            return attn_fail(ATTN_ERR_FORMAT, "gguf: key '%.80s' appears twice", file->metadata_by_key[i]->info.key);
        }
    }
    return ATTN_OK;
}

static attn_status sort_tensors(attn_gguf *file)
{
    file->tensors_by_name = attn_alloc_array((size_t)file->tensor_count + 1, sizeof *file->tensors_by_name);
    if (file->tensors_by_name == NULL) {
        return attn_fail_memory((size_t)file->tensor_count * sizeof *file->tensors_by_name);
    }
    attn_gguf_tensor **order = file->tensors_by_name;
    for (int64_t i = 0; i < file->tensor_count; i++) {
        order[i] = &file->tensors[i];
    }
    qsort(order, (size_t)file->tensor_count, sizeof *order, by_data);
    for (int64_t i = 1; i < file->tensor_count; i++) {
        if ((const char *)order[i]->data < (const char *)order[i - 1]->data + order[i - 1]->bytes) {
            return attn_fail(ATTN_ERR_FORMAT, "gguf: tensors '%.80s' and '%.80s' overlap", order[i - 1]->name,
                             order[i]->name);
        }
    }
    qsort(order, (size_t)file->tensor_count, sizeof *order, by_name);
    for (int64_t i = 1; i < file->tensor_count; i++) {
        if (by_name(&order[i - 1], &order[i]) == 0) {
            return attn_fail(ATTN_ERR_FORMAT, "gguf: tensor '%.80s' appears twice", order[i]->name);
        }
    }
    return ATTN_OK;
}

static attn_status read_tensors(attn_gguf *file, struct reader *in)
{
    uint64_t alignment = DEFAULT_ALIGNMENT;
    if (attn_gguf_metadata_find(file, "general.alignment") != NULL) {
        int64_t value;
        ATTN_TRY(attn_gguf_get_int(file, "general.alignment", &value));
        if (value < 1 || value > 1 << 20 || (value & (value - 1)) != 0) {
            return attn_fail(ATTN_ERR_FORMAT, "gguf: general.alignment is %lld (a power of two up to 2^20)",
                             (long long)value);
        }
        alignment = (uint64_t)value;
    }
    uint64_t *offsets = attn_alloc_array((size_t)file->tensor_count + 1, sizeof *offsets);
    if (offsets == NULL) {
        return attn_fail_memory((size_t)file->tensor_count * sizeof *offsets);
    }
    attn_status status = ATTN_OK;
    for (int64_t i = 0; i < file->tensor_count && status == ATTN_OK; i++) {
        status = take_tensor(file, in, &file->tensors[i], &offsets[i]);
    }
    uint64_t start = (in->at + alignment - 1) & ~(alignment - 1);
    for (int64_t i = 0; i < file->tensor_count && status == ATTN_OK; i++) {
        attn_gguf_tensor *tensor = &file->tensors[i];
        if (offsets[i] % alignment != 0) {
            status =
                attn_fail(ATTN_ERR_FORMAT, "gguf: tensor '%.80s': offset %llu is not a multiple of the alignment %llu",
                          tensor->name, (unsigned long long)offsets[i], (unsigned long long)alignment);
        } else if (start > in->bytes || offsets[i] > in->bytes - start ||
                   tensor->bytes > in->bytes - start - offsets[i]) {
            status = attn_fail(ATTN_ERR_FORMAT, "gguf: tensor '%.80s': %zu bytes at offset %llu lie outside the file",
                               tensor->name, tensor->bytes, (unsigned long long)offsets[i]);
        } else {
            tensor->data = in->data + start + offsets[i];
        }
    }
    attn_free(offsets);
    return status == ATTN_OK ? sort_tensors(file) : status;
}

static attn_status read_file(attn_gguf *file, const void *data, size_t bytes)
{
    struct reader in = {data, bytes, 0, 0};
    const unsigned char *magic = take(&in, 4);
    if (magic == NULL || memcmp(magic, "GGUF", 4) != 0) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: the file does not start with 'GGUF'");
    }
    uint64_t version = take_uint(&in, 4);
    if (version != 2 && version != 3) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "gguf: version %llu%s (supported: 2 and 3, little-endian)",
                         (unsigned long long)version,
                         version == 2u << 24 || version == 3u << 24 ? ", written big-endian" : "");
    }
    file->version = (int)version;
    uint64_t tensors = take_uint(&in, 8), entries = take_uint(&in, 8);
    /* An entry takes at least 13 bytes, a tensor's description 32. */
    if (in.failed || entries > remaining(&in) / 13 || tensors > remaining(&in) / 32) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: %llu metadata entries and %llu tensors do not fit a file of %zu bytes",
                         (unsigned long long)entries, (unsigned long long)tensors, bytes);
    }
    ATTN_TRY(attn_arena_create(&file->names, 0));
    file->metadata = attn_calloc_array((size_t)entries + 1, sizeof *file->metadata);
    file->tensors = attn_calloc_array((size_t)tensors + 1, sizeof *file->tensors);
    if (file->metadata == NULL || file->tensors == NULL) {
        return attn_fail_memory((size_t)entries * sizeof *file->metadata + (size_t)tensors * sizeof *file->tensors);
    }
    for (; file->metadata_count < (int64_t)entries; file->metadata_count++) {
        ATTN_TRY(take_metadata(file, &in, &file->metadata[file->metadata_count]));
    }
    ATTN_TRY(sort_metadata(file));
    file->tensor_count = (int64_t)tensors;
    return read_tensors(file, &in);
}

attn_status attn_gguf_open_memory(attn_gguf **file, const void *data, size_t bytes)
{
    *file = NULL;
    if (data == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "gguf: data is NULL");
    }
    attn_gguf *made = attn_calloc_array(1, sizeof *made);
    if (made == NULL) {
        return attn_fail_memory(sizeof *made);
    }
    attn_status status = read_file(made, data, bytes);
    if (status != ATTN_OK) {
        attn_gguf_close(made);
        return status;
    }
    *file = made;
    return ATTN_OK;
}

attn_status attn_gguf_open(attn_gguf **file, const char *path)
{
    void *map;
    size_t bytes;
    *file = NULL;
    ATTN_TRY(attn_map_file(path, "GGUF", 24, &map, &bytes));
    attn_status status = attn_gguf_open_memory(file, map, bytes);
    if (status != ATTN_OK) {
        attn_unmap_file(map, bytes);
        return attn_fail(status, "'%s': %s", path, attn_last_error());
    }
    (*file)->map = map;
    (*file)->map_bytes = bytes;
    return ATTN_OK;
}

void attn_gguf_close(attn_gguf *file)
{
    if (file == NULL) {
        return;
    }
    attn_free(file->metadata_by_key);
    attn_free(file->metadata);
    attn_free(file->tensors_by_name);
    attn_free(file->tensors);
    attn_arena_destroy(file->names);
    attn_unmap_file(file->map, file->map_bytes);
    attn_free(file);
}

int attn_gguf_version(const attn_gguf *file) { return file->version; }

/* ---- Metadata ---- */

int64_t attn_gguf_metadata_count(const attn_gguf *file) { return file->metadata_count; }

const attn_gguf_metadata *attn_gguf_metadata_at(const attn_gguf *file, int64_t index)
{
    return index >= 0 && index < file->metadata_count ? &file->metadata[index].info : NULL;
}

static const struct metadata *find_entry(const attn_gguf *file, const char *key)
{
    int64_t low = 0, high = file->metadata_count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        int order = strcmp(file->metadata_by_key[middle]->info.key, key);
        if (order == 0) {
            return file->metadata_by_key[middle];
        }
        if (order < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return NULL;
}

const attn_gguf_metadata *attn_gguf_metadata_find(const attn_gguf *file, const char *key)
{
    const struct metadata *entry = find_entry(file, key);
    return entry == NULL ? NULL : &entry->info;
}

static attn_status wrong_type(const struct metadata *entry, const char *expected)
{
    return attn_fail(ATTN_ERR_FORMAT, "gguf: key '%.80s' is %s%s, expected %s", entry->info.key,
                     entry->info.type == ATTN_GGUF_ARRAY ? "an array of " : "",
                     value_type_names[entry->info.item_type], expected);
}

static attn_status find_value(const attn_gguf *file, const char *key, const char *expected,
                              const struct metadata **found)
{
    const struct metadata *entry = find_entry(file, key);
    if (entry == NULL) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: the key '%.80s' (%s) is missing", key, expected);
    }
    if (entry->info.type == ATTN_GGUF_ARRAY) {
        return wrong_type(entry, expected);
    }
    *found = entry;
    return ATTN_OK;
}

/* 0 when the type is no integer or the value does not fit. */
static int decode_int(attn_gguf_type type, const unsigned char *data, int64_t *value)
{
    if (type == ATTN_GGUF_F32 || type == ATTN_GGUF_F64 || value_bytes(type) == 0) {
        return 0;
    }
    size_t bytes = value_bytes(type);
    uint64_t bits = load_uint(data, bytes);
    switch (type) {
    case ATTN_GGUF_I8: *value = (int8_t)bits; break;
    case ATTN_GGUF_I16: *value = (int16_t)bits; break;
    case ATTN_GGUF_I32: *value = (int32_t)bits; break;
    case ATTN_GGUF_I64: *value = (int64_t)bits; break;
    case ATTN_GGUF_BOOL: *value = bits != 0; break;
    default:
        if (bits > INT64_MAX) {
            return 0;
        }
        *value = (int64_t)bits;
    }
    return 1;
}

static int decode_float(attn_gguf_type type, const unsigned char *data, double *value)
{
    if (type == ATTN_GGUF_F32) {
        *value = attn_bits_float((uint32_t)load_uint(data, 4));
        return 1;
    }
    if (type == ATTN_GGUF_F64) {
        uint64_t bits = load_uint(data, 8);
        memcpy(value, &bits, sizeof bits);
        return 1;
    }
    int64_t whole;
    int ok = decode_int(type, data, &whole);
    if (ok) {
        *value = (double)whole;
    }
    return ok;
}

attn_status attn_gguf_get_int(const attn_gguf *file, const char *key, int64_t *value)
{
    const struct metadata *entry = NULL;
    ATTN_TRY(find_value(file, key, "an integer", &entry));
    return decode_int(entry->info.type, entry->value, value) ? ATTN_OK : wrong_type(entry, "an integer below 2^63");
}

attn_status attn_gguf_get_float(const attn_gguf *file, const char *key, double *value)
{
    const struct metadata *entry = NULL;
    ATTN_TRY(find_value(file, key, "a number", &entry));
    return decode_float(entry->info.type, entry->value, value) ? ATTN_OK : wrong_type(entry, "a number");
}

attn_status attn_gguf_get_bool(const attn_gguf *file, const char *key, int *value)
{
    const struct metadata *entry = NULL;
    ATTN_TRY(find_value(file, key, "a bool", &entry));
    if (entry->info.type != ATTN_GGUF_BOOL) {
        return wrong_type(entry, "a bool");
    }
    *value = entry->value[0] != 0;
    return ATTN_OK;
}

static attn_gguf_string load_string(const unsigned char **at)
{
    size_t bytes = (size_t)load_uint(*at, 8);
    attn_gguf_string string = {(const char *)*at + 8, bytes};
    *at += 8 + bytes;
    return string;
}

attn_status attn_gguf_get_string(const attn_gguf *file, const char *key, attn_gguf_string *value)
{
    const struct metadata *entry = NULL;
    ATTN_TRY(find_value(file, key, "a string", &entry));
    if (entry->info.type != ATTN_GGUF_STRING) {
        return wrong_type(entry, "a string");
    }
    const unsigned char *at = entry->value;
    *value = load_string(&at);
    return ATTN_OK;
}

static attn_status find_array(const attn_gguf *file, const char *key, int64_t count, const char *expected,
                              const struct metadata **found)
{
    const struct metadata *entry = find_entry(file, key);
    if (entry == NULL) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: the key '%.80s' (%s) is missing", key, expected);
    }
    if (entry->info.type != ATTN_GGUF_ARRAY) {
        return wrong_type(entry, expected);
    }
    if (entry->info.count != count) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: key '%.80s' has %lld items, expected %lld", key,
                         (long long)entry->info.count, (long long)count);
    }
    *found = entry;
    return ATTN_OK;
}

attn_status attn_gguf_get_ints(const attn_gguf *file, const char *key, int64_t *values, int64_t count)
{
    const struct metadata *entry = NULL;
    ATTN_TRY(find_array(file, key, count, "an array of integers", &entry));
    size_t step = value_bytes(entry->info.item_type);
    for (int64_t i = 0; i < count; i++) {
        if (!decode_int(entry->info.item_type, entry->value + (size_t)i * step, &values[i])) {
            return wrong_type(entry, "an array of integers below 2^63");
        }
    }
    return ATTN_OK;
}

attn_status attn_gguf_get_floats(const attn_gguf *file, const char *key, float *values, int64_t count)
{
    const struct metadata *entry = NULL;
    ATTN_TRY(find_array(file, key, count, "an array of numbers", &entry));
    size_t step = value_bytes(entry->info.item_type);
    for (int64_t i = 0; i < count; i++) {
        double value;
        if (!decode_float(entry->info.item_type, entry->value + (size_t)i * step, &value)) {
            return wrong_type(entry, "an array of numbers");
        }
        values[i] = (float)value;
    }
    return ATTN_OK;
}

attn_status attn_gguf_get_strings(const attn_gguf *file, const char *key, attn_gguf_string *values, int64_t count)
{
    const struct metadata *entry = NULL;
    ATTN_TRY(find_array(file, key, count, "an array of strings", &entry));
    if (entry->info.item_type != ATTN_GGUF_STRING) {
        return wrong_type(entry, "an array of strings");
    }
    const unsigned char *at = entry->value;
    for (int64_t i = 0; i < count; i++) {
        values[i] = load_string(&at);
    }
    return ATTN_OK;
}

/* ---- Tensors ---- */

int64_t attn_gguf_tensor_count(const attn_gguf *file) { return file->tensor_count; }

const attn_gguf_tensor *attn_gguf_tensor_at(const attn_gguf *file, int64_t index)
{
    return index >= 0 && index < file->tensor_count ? &file->tensors[index] : NULL;
}

const attn_gguf_tensor *attn_gguf_tensor_find(const attn_gguf *file, const char *name)
{
    int64_t low = 0, high = file->tensor_count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        int order = strcmp(file->tensors_by_name[middle]->name, name);
        if (order == 0) {
            return file->tensors_by_name[middle];
        }
        if (order < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return NULL;
}
