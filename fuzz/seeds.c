/* Writes a seed for the GGUF and model fuzzers: a llama of one layer with a few tokens.  seeds FILE */
#include "../tests/gguf_build.h"

#define WIDTH 32
#define TOKENS 16

typedef struct tensor_seed {
    const char *name;
    int ndim;
    uint64_t shape[2];
} tensor_seed;

int main(int argc, char **argv)
{
    static const tensor_seed tensors[] = {
        {"token_embd.weight", 2, {WIDTH, TOKENS}},      {"output_norm.weight", 1, {WIDTH, 1}},
        {"blk.0.attn_norm.weight", 1, {WIDTH, 1}},      {"blk.0.attn_q.weight", 2, {WIDTH, WIDTH}},
        {"blk.0.attn_k.weight", 2, {WIDTH, WIDTH / 2}}, {"blk.0.attn_v.weight", 2, {WIDTH, WIDTH / 2}},
        {"blk.0.attn_output.weight", 2, {WIDTH, WIDTH}}, {"blk.0.ffn_norm.weight", 1, {WIDTH, 1}},
        {"blk.0.ffn_gate.weight", 2, {WIDTH, WIDTH}},   {"blk.0.ffn_up.weight", 2, {WIDTH, WIDTH}},
        {"blk.0.ffn_down.weight", 2, {WIDTH, WIDTH}},
    };
    const int count = (int)(sizeof tensors / sizeof tensors[0]);
    gguf_build b = {0};
    if (argc != 2) {
        return 2;
    }
    put_header(&b, 3, (uint64_t)count, 12);
    put_text(&b, "general.architecture", "llama");
    put_u32(&b, "llama.block_count", 1);
    put_u32(&b, "llama.context_length", 64);
    put_u32(&b, "llama.embedding_length", WIDTH);
    put_u32(&b, "llama.feed_forward_length", WIDTH);
    put_u32(&b, "llama.attention.head_count", 2);
    put_u32(&b, "llama.attention.head_count_kv", 1);
    put_f32(&b, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    put_f32(&b, "llama.rope.freq_base", 10000);
    put_text(&b, "tokenizer.ggml.model", "gpt2");
    put_key(&b, "tokenizer.ggml.tokens", 9);
    put_uint(&b, 8, 4);
    put_uint(&b, TOKENS, 8);
    for (int i = 0; i < TOKENS; i++) {
        put_string(&b, (char[]){(char)('a' + i), 0});
    }
    put_key(&b, "tokenizer.ggml.merges", 9);
    put_uint(&b, 8, 4);
    put_uint(&b, 1, 8);
    put_string(&b, "a b");
    uint64_t offset = 0;
    for (int i = 0; i < count; i++) {
        put_tensor(&b, tensors[i].name, 0, tensors[i].ndim, tensors[i].shape, offset);
        offset += tensors[i].shape[0] * tensors[i].shape[1] * 4;
    }
    put_padding(&b, 32);
    for (uint64_t i = 0; i < offset / 4; i++) {
        float value = (float)((i * 37) % 19) / 19.0f - 0.5f;
        put(&b, &value, 4);
    }
    FILE *file = fopen(argv[1], "wb");
    int ok = file != NULL && fwrite(b.data, 1, b.bytes, file) == b.bytes;
    if (file != NULL) {
        ok = fclose(file) == 0 && ok;
    }
    free(b.data);
    return !ok;
}
