/* Small GGUF files in memory, for tests. */
#ifndef TESTS_GGUF_BUILD_H
#define TESTS_GGUF_BUILD_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct gguf_build {
    unsigned char *data;
    size_t bytes, room;
} gguf_build;

static inline void put(gguf_build *b, const void *data, size_t bytes)
{
    if (b->bytes + bytes > b->room) {
        b->room = 2 * (b->bytes + bytes);
        b->data = realloc(b->data, b->room);
    }
    if (bytes > 0) {
        memcpy(b->data + b->bytes, data, bytes);
    }
    b->bytes += bytes;
}

static inline void put_uint(gguf_build *b, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++) {
        unsigned char byte = (unsigned char)(value >> 8 * i);
        put(b, &byte, 1);
    }
}

static inline void put_string(gguf_build *b, const char *text)
{
    put_uint(b, strlen(text), 8);
    put(b, text, strlen(text));
}

static inline void put_header(gguf_build *b, uint32_t version, uint64_t tensors, uint64_t entries)
{
    put(b, "GGUF", 4);
    put_uint(b, version, 4);
    put_uint(b, tensors, 8);
    put_uint(b, entries, 8);
}

static inline void put_key(gguf_build *b, const char *key, int type)
{
    put_string(b, key);
    put_uint(b, (uint64_t)type, 4);
}

static inline void put_u32(gguf_build *b, const char *key, uint32_t value)
{
    put_key(b, key, 4);
    put_uint(b, value, 4);
}

static inline void put_f32(gguf_build *b, const char *key, float value)
{
    put_key(b, key, 6);
    put(b, &value, 4);
}

static inline void put_text(gguf_build *b, const char *key, const char *value)
{
    put_key(b, key, 8);
    put_string(b, value);
}

static inline void put_tensor(gguf_build *b, const char *name, int type, int ndim, const uint64_t *shape,
                              uint64_t offset)
{
    put_string(b, name);
    put_uint(b, (uint64_t)ndim, 4);
    for (int i = 0; i < ndim; i++) {
        put_uint(b, shape[i], 8);
    }
    put_uint(b, (uint64_t)type, 4);
    put_uint(b, offset, 8);
}

static inline void put_padding(gguf_build *b, size_t alignment)
{
    while (b->bytes % alignment != 0) {
        put_uint(b, 0, 1);
    }
}

#endif
