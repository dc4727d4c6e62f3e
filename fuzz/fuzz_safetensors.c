/* Any bytes as a safetensors file; what opens must be readable to the last element. */
#include <attn/safetensors.h>

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    attn_safetensors *file;
    if (attn_safetensors_open_memory(&file, data, size) != ATTN_OK) {
        return 0;
    }
    volatile unsigned sum = 0;
    for (int i = 0; i < attn_safetensors_count(file); i++) {
        attn_tensor t;
        if (attn_safetensors_get(file, i, &t) != ATTN_OK || attn_safetensors_find(file, attn_safetensors_name(file, i)) != i) {
            __builtin_trap();
        }
        size_t bytes = (size_t)attn_tensor_count(&t) * attn_dtype_size(t.dtype);
        for (size_t j = 0; j < bytes; j++) {
            sum += ((const unsigned char *)t.data)[j];
        }
    }
    attn_safetensors_metadata(file, "params");
    attn_safetensors_close(file);
    return 0;
}
