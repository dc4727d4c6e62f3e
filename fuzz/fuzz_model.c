/* Any bytes as a model file: opening must fail cleanly or give a model that evaluates a few tokens. */
#include <attn/model.h>
#include <attn/tokenizer.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    attn_model *model;
    attn_model_settings settings = {.threads = 1};
    if (attn_model_open_memory(&model, data, size, &settings) != ATTN_OK) {
        return 0;
    }
    attn_tokenizer *tokenizer;
    if (attn_tokenizer_from_gguf(&tokenizer, attn_model_file(model)) == ATTN_OK) {
        attn_tokenizer_destroy(tokenizer);
    }
    attn_context *context;
    attn_context_settings small = {.length = 8, .threads = 1};
    if (attn_context_create(&context, model, &small) == ATTN_OK) {
        const int32_t tokens[] = {0, 1, 2};
        attn_context_batch batch = {.tokens = tokens, .count = 3};
        attn_context_eval(context, &batch, 1, NULL, NULL);
        attn_context_destroy(context);
    }
    attn_model_close(model);
    return 0;
}
