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

/* A llama of one layer with 16 tokens and a context of 64: the smallest file that opens as a model. */
static inline void put_tiny_llama(gguf_build *b)
{
    enum { WIDTH = 32, TOKENS = 16 };
    static const struct {
        const char *name;
        int ndim;
        uint64_t shape[2];
    } tensors[] = {
        {"token_embd.weight", 2, {WIDTH, TOKENS}},      {"output_norm.weight", 1, {WIDTH, 1}},
        {"blk.0.attn_norm.weight", 1, {WIDTH, 1}},      {"blk.0.attn_q.weight", 2, {WIDTH, WIDTH}},
        {"blk.0.attn_k.weight", 2, {WIDTH, WIDTH / 2}}, {"blk.0.attn_v.weight", 2, {WIDTH, WIDTH / 2}},
        {"blk.0.attn_output.weight", 2, {WIDTH, WIDTH}}, {"blk.0.ffn_norm.weight", 1, {WIDTH, 1}},
        {"blk.0.ffn_gate.weight", 2, {WIDTH, WIDTH}},   {"blk.0.ffn_up.weight", 2, {WIDTH, WIDTH}},
        {"blk.0.ffn_down.weight", 2, {WIDTH, WIDTH}},
    };
    const int count = (int)(sizeof tensors / sizeof tensors[0]);
    put_header(b, 3, (uint64_t)count, 13);
    put_text(b, "general.architecture", "llama");
    put_u32(b, "llama.block_count", 1);
    put_u32(b, "llama.context_length", 512);
    put_u32(b, "llama.embedding_length", WIDTH);
    put_u32(b, "llama.feed_forward_length", WIDTH);
    put_u32(b, "llama.attention.head_count", 2);
    put_u32(b, "llama.attention.head_count_kv", 1);
    put_f32(b, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    put_f32(b, "llama.rope.freq_base", 10000);
    put_text(b, "tokenizer.ggml.model", "gpt2");
    put_key(b, "tokenizer.ggml.tokens", 9);
    put_uint(b, 8, 4);
    put_uint(b, TOKENS, 8);
    for (int i = 0; i < TOKENS; i++) {
        put_string(b, (char[]){(char)('a' + i), 0});
    }
    put_key(b, "tokenizer.ggml.merges", 9);
    put_uint(b, 8, 4);
    put_uint(b, 1, 8);
    put_string(b, "a b");
    put_text(b, "tokenizer.chat_template", "<|im_start|>");
    uint64_t offset = 0;
    for (int i = 0; i < count; i++) {
        put_tensor(b, tensors[i].name, 0, tensors[i].ndim, tensors[i].shape, offset);
        offset += tensors[i].shape[0] * tensors[i].shape[1] * 4;
    }
    put_padding(b, 32);
    for (uint64_t i = 0; i < offset / 4; i++) {
        float value = (float)((i * 37) % 19) / 19.0f - 0.5f;
        put(b, &value, 4);
    }
}

#endif
