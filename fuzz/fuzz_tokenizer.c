/* A vocabulary made of the input's first part, the rest as text: encoding and decoding never crash, and byte-level BPE whose vocabulary
 * has all bytes gives the text back. */
#include <attn/tokenizer.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define TOKENS 300

/* The byte alphabet of byte-level vocabularies, as UTF-8. */
static int spell(int byte, char *to)
{
    int printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    int code = byte;
    if (!printable) {
        code = 256;
        for (int i = 0; i < byte; i++) {
            code += !((i >= '!' && i <= '~') || (i >= 0xa1 && i <= 0xac) || i >= 0xae);
        }
    }
    if (code < 0x80) {
        to[0] = (char)code;
        return 1;
    }
    to[0] = (char)(0xc0 | code >> 6);
    to[1] = (char)(0x80 | (code & 0x3f));
    return 2;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const models[] = {"gpt2", "llama", "t5", "other"};
    static const char *const pres[] = {"default", "smollm", "llama-bpe", "qwen2", "none"};
    if (size < 8) {
        return 0;
    }
    static char spelled[256][2];
    attn_gguf_string texts[TOKENS], merges[64];
    float scores[TOKENS];
    int32_t types[TOKENS];
    int bytes_first = data[2] & 1;
    int64_t count = 0, merge_count = 0;
    for (int i = 0; i < 256 && bytes_first; i++) {
        texts[count].text = spelled[i];
        texts[count].bytes = (size_t)spell(i, spelled[i]);
        types[count] = ATTN_TOKEN_NORMAL;
        scores[count++] = -10;
    }
    size_t at = 8;
    for (int tokens = data[3] % 40; tokens > 0 && at + 3 < size && count < TOKENS; tokens--) {
        size_t length = data[at] % 16;
        length = length < size - at - 3 ? length : size - at - 3;
        types[count] = data[at + 1] % 8;
        scores[count] = (float)(int8_t)data[at + 2];
        texts[count++] = (attn_gguf_string){(const char *)data + at + 3, length};
        at += 3 + length;
    }
    for (int n = data[4] % 40; n > 0 && at + 1 < size && merge_count < 64; n--) {
        size_t length = data[at] % 12;
        length = length < size - at - 1 ? length : size - at - 1;
        merges[merge_count++] = (attn_gguf_string){(const char *)data + at + 1, length};
        at += 1 + length;
    }
    attn_tokenizer_data vocabulary = {.model = models[data[0] % 4], .pre = pres[data[1] % 5], .count = count, .texts = texts,
                                      .scores = scores, .types = types, .merges = merges, .merge_count = merge_count,
                                      .bos = (int8_t)data[5], .eos = (int8_t)data[6], .eot = -1, .unknown = (int8_t)data[7],
                                      .add_bos = data[2] >> 1 & 1, .add_eos = data[2] >> 2 & 1, .add_space_prefix = data[2] >> 3 & 1};
    attn_tokenizer *tokenizer;
    if (attn_tokenizer_create(&tokenizer, &vocabulary) != ATTN_OK) {
        return 0;
    }
    int32_t *tokens;
    int64_t token_count;
    if (attn_tokenize(tokenizer, (const char *)data + at, size - at, data[2] >> 4 & 3, &tokens, &token_count) == ATTN_OK) {
        size_t total = 0;
        for (int64_t i = 0; i < token_count; i++) {
            size_t length;
            volatile char last = 0;
            const char *text = attn_token_text(tokenizer, tokens[i], 1, &length);
            last = length > 0 ? text[length - 1] : last;
            total += length;
        }
        if (bytes_first && data[0] % 4 == 0 && (data[2] >> 4 & 3) == 0 && merge_count == 0 && total != size - at && data[3] % 40 == 0) {
            __builtin_trap();
        }
        attn_tokens_free(tokens);
    }
    attn_tokenizer_destroy(tokenizer);
    return 0;
}
