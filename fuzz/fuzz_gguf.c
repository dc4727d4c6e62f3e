/* Any bytes as a GGUF file: all metadata read in every way, all tensors read to the last byte and dequantised. */
#include <attn/gguf.h>

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_metadata(const attn_gguf *file)
{
    for (int64_t i = 0; i < attn_gguf_metadata_count(file); i++) {
        const attn_gguf_metadata *entry = attn_gguf_metadata_at(file, i);
        int64_t whole;
        double real;
        int truth;
        attn_gguf_string text;
        attn_gguf_get_int(file, entry->key, &whole);
        attn_gguf_get_float(file, entry->key, &real);
        attn_gguf_get_bool(file, entry->key, &truth);
        volatile char last = 0;
        if (attn_gguf_get_string(file, entry->key, &text) == ATTN_OK && text.bytes > 0) {
            last = text.text[text.bytes - 1];
        }
        if (entry->type == ATTN_GGUF_ARRAY && entry->count > 0 && entry->count < 10000) {
            int64_t *wholes = malloc((size_t)entry->count * sizeof *wholes);
            attn_gguf_string *texts = malloc((size_t)entry->count * sizeof *texts);
            attn_gguf_get_ints(file, entry->key, wholes, entry->count);
            if (attn_gguf_get_strings(file, entry->key, texts, entry->count) == ATTN_OK && texts[entry->count - 1].bytes > 0) {
                last = texts[entry->count - 1].text[0];
            }
            free(wholes);
            free(texts);
        }
        (void)last;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    attn_gguf *file;
    if (attn_gguf_open_memory(&file, data, size) != ATTN_OK) {
        return 0;
    }
    read_metadata(file);
    volatile unsigned sum = 0;
    for (int64_t i = 0; i < attn_gguf_tensor_count(file); i++) {
        const attn_gguf_tensor *t = attn_gguf_tensor_at(file, i);
        if (attn_gguf_tensor_find(file, t->name) == NULL) {
            __builtin_trap();
        }
        for (size_t j = 0; j < t->bytes; j++) {
            sum += ((const unsigned char *)t->data)[j];
        }
        int64_t count = t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3];
        if (count > 0 && count < 100000) {
            float *out = malloc((size_t)count * sizeof *out);
            attn_gguf_dequantize(t->type, t->data, count, out);
            free(out);
        }
    }
    attn_gguf_close(file);
    return 0;
}
