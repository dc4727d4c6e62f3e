/* Every allocation made to fail in turn: a status, no crash, no leak; and the call works again afterwards. */
#include <attn/attn.h>

#include "gguf_build.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static long allowed, alive;

static void *counted_alloc(void *user, size_t bytes)
{
    (void)user;
    long left;
#pragma omp atomic capture
    left = allowed--;
    if (left <= 0) {
        return NULL;
    }
    void *memory = malloc(bytes);
    if (memory != NULL) {
#pragma omp atomic
        alive++;
    }
    return memory;
}

static void counted_free(void *user, void *memory)
{
    (void)user;
    if (memory != NULL) {
#pragma omp atomic
        alive--;
    }
    free(memory);
}

static void fail_each(const char *what, attn_status (*run)(void))
{
    const attn_allocator allocator = {counted_alloc, counted_free, NULL};
    attn_set_allocator(&allocator);
    for (long n = 0;; n++) {
        allowed = n;
        alive = 0;
        attn_status status = run();
        if (alive != 0) {
            fail_msg("%s: %ld blocks leaked when allocation %ld failed", what, alive, n);
        }
        if (status == ATTN_OK) {
            if (n == 0) {
                fail_msg("%s allocates nothing: it tests nothing", what);
            }
            break;
        }
        if (status != ATTN_ERR_MEMORY) {
            fail_msg("%s: allocation %ld failed, and the status was '%s' (%s)", what, n, attn_status_name(status), attn_last_error());
        }
        assert_true(n < 10000);
    }
    attn_set_allocator(NULL);
}

static float numbers[4096];

static attn_tensor view(int64_t h, int64_t n, int64_t d)
{
    return attn_tensor_make(numbers, ATTN_F32, 4, (int64_t[]){1, h, n, d});
}

static attn_status forward_and_backward(const char *spec, int64_t n)
{
    static float out[4096], grad[3][4096];
    attn_op *op;
    attn_status status = attn_op_create(&op, spec);
    if (status != ATTN_OK) {
        return status;
    }
    attn_named_tensor in[] = {{"q", view(2, n, 8)}, {"k", view(1, n, 8)}, {"v", view(1, n, 8)}};
    attn_named_tensor o = {"o", attn_tensor_make(out, ATTN_F32, 4, (int64_t[]){1, 2, n, 8})};
    attn_named_tensor grad_o = {"o", view(2, n, 8)};
    attn_named_tensor grads[] = {{"q", attn_tensor_make(grad[0], ATTN_F32, 4, in[0].tensor.shape)},
                                 {"k", attn_tensor_make(grad[1], ATTN_F32, 4, in[1].tensor.shape)},
                                 {"v", attn_tensor_make(grad[2], ATTN_F32, 4, in[2].tensor.shape)}};
    attn_exec exec = {.threads = 2};
    status = attn_op_forward(op, in, 3, &o, 1, &exec);
    if (status == ATTN_OK && attn_op_get_info(op)->differentiable) {
        status = attn_op_backward(op, in, 3, NULL, 0, &grad_o, 1, grads, 3, &exec);
    }
    attn_op_destroy(op);
    return status;
}

static attn_status dense(void) { return forward_and_backward("dense:causal=true,window=[9,-1]", 100); }
static attn_status decode(void) { return forward_and_backward("dense", 1); }
static attn_status streaming(void) { return forward_and_backward("streaming:sinks=2,recent=5", 100); }
static attn_status topk(void) { return forward_and_backward("topk:top_k=3", 60); }
static attn_status topk_blocks(void) { return forward_and_backward("topk.blocks:top_k=2,block_q=16,block_k=16", 100); }
static attn_status flexprefill(void) { return forward_and_backward("flexprefill:block=16,min_budget=16", 100); }
static attn_status softpag(void) { return forward_and_backward("softpag:u=0.5,target=query_mean", 30); }
static attn_status lightning(void) { return forward_and_backward("lightning:block=16", 60); }

static attn_status neighborhood(void) { return forward_and_backward("neighborhood:grid=[10,10],kernel=3", 100); }
static attn_status halo(void) { return forward_and_backward("halo:grid=[10,10],block=4,halo=1", 100); }
static attn_status window(void) { return forward_and_backward("davit.window:grid=[10,10],window=4", 100); }
static attn_status agent(void) { return forward_and_backward("agent:grid=[10,10],agent_grid=[2,3]", 100); }
static attn_status flow(void) { return forward_and_backward("flow:causal=true", 60); }
static attn_status based(void) { return forward_and_backward("based", 60); }

static gguf_build model_file;

static attn_status tokenizer(void)
{
    attn_gguf *file;
    attn_tokenizer *made = NULL;
    int32_t *tokens = NULL;
    int64_t count;
    attn_status status = attn_gguf_open_memory(&file, model_file.data, model_file.bytes);
    if (status != ATTN_OK) {
        return status;
    }
    status = attn_tokenizer_from_gguf(&made, file);
    if (status == ATTN_OK) {
        status = attn_tokenize(made, "abcab", 5, 0, &tokens, &count);
    }
    attn_tokens_free(tokens);
    attn_tokenizer_destroy(made);
    attn_gguf_close(file);
    return status;
}

#define TEXT(s) {(s), sizeof(s) - 1}

/* Made, used on a text with a long word, and for a chat. */
static attn_status use_tokenizer(const attn_tokenizer_data *data, const char *text, int chat)
{
    attn_tokenizer *made;
    int32_t *tokens = NULL;
    char *rendered = NULL;
    int64_t count;
    attn_status status = attn_tokenizer_create(&made, data);
    if (status == ATTN_OK) {
        status = attn_tokenize(made, text, strlen(text), ATTN_TOKENIZE_SPECIAL | ATTN_TOKENIZE_PARSE, &tokens, &count);
    }
    if (status == ATTN_OK && count < 8) {
        fail_msg("'%s' became %lld tokens: too few for a list to grow", text, (long long)count);
    }
    if (status == ATTN_OK && chat) {
        const attn_chat_message messages[] = {{"system", "S"}, {"user", "hi"}, {"assistant", "yes"}, {"user", "ok"}};
        status = attn_chat_render(made, messages, 4, 1, &rendered);
    }
    attn_tokens_free(tokens);
    attn_text_free(rendered);
    attn_tokenizer_destroy(made);
    return status;
}

static attn_status byte_pairs(void)
{
    static const attn_gguf_string texts[] = {TEXT("a"), TEXT("b"), TEXT("1"), TEXT("ab"), TEXT("<|im_start|>"), TEXT("<|im_end|>")};
    static const attn_gguf_string merges[] = {TEXT("a b")};
    static const int32_t types[] = {ATTN_TOKEN_NORMAL, ATTN_TOKEN_NORMAL, ATTN_TOKEN_NORMAL, ATTN_TOKEN_NORMAL, ATTN_TOKEN_CONTROL, ATTN_TOKEN_CONTROL};
    const attn_tokenizer_data data = {.model = "gpt2", .pre = "smollm", .count = 6, .texts = texts, .types = types, .merges = merges,
                                      .merge_count = 1, .bos = 4, .eos = 5, .eot = -1, .unknown = -1, .add_bos = 1,
                                      .chat_template = TEXT("{{ '<|im_start|>system' }}")};
    return use_tokenizer(&data, "a1b11ab<|im_end|>abababababababababababababababababababababbaaabbbaaabbb", 1);
}

static const attn_gguf_string pieces[] = {TEXT("<unk>"), TEXT("\xe2\x96\x81"), TEXT("a"), TEXT("b"), TEXT("ab"), TEXT("<0xC3>"), TEXT("<0xA9>")};
static const float scores[] = {0, -1, -1, -1, -2, 0, 0};
static const int32_t piece_types[] = {ATTN_TOKEN_UNKNOWN, 1, 1, 1, 1, ATTN_TOKEN_BYTE, ATTN_TOKEN_BYTE};

static attn_status use_pieces(const char *model)
{
    const attn_tokenizer_data data = {.model = model, .count = 7, .texts = pieces, .scores = scores, .types = piece_types, .bos = -1,
                                      .eos = -1, .eot = -1, .unknown = 0, .add_space_prefix = 1};
    return use_tokenizer(&data, "ab a\xc3\xa9 bzb abababababababababababababababab", 0);
}
static attn_status sentence_pieces(void) { return use_pieces("llama"); }
static attn_status unigrams(void) { return use_pieces("t5"); }

/* Two prompts and generation by a policy; the second prompt begins within a block. */
static attn_status run_policy(attn_status (*make)(attn_policy **policy, const attn_model *model), int64_t length)
{
    static const int32_t tokens[90] = {1, 2, 3, 4, 5, 6, 7};
    attn_model *model = NULL;
    attn_context *context = NULL;
    attn_policy *made = NULL;
    attn_context_settings settings = {.length = length, .chunk = 16, .threads = 1};
    attn_status status = attn_model_open_memory(&model, model_file.data, model_file.bytes, NULL);
    if (status == ATTN_OK) {
        status = attn_context_create(&context, model, &settings);
    }
    if (status == ATTN_OK) {
        status = make(&made, model);
    }
    if (status == ATTN_OK) {
        attn_policy_count(made, 1);
        status = attn_policy_use(made, context);
    }
    static const int64_t counts[] = {90, 70, 1};
    for (int i = 0; i < 3 && status == ATTN_OK; i++) {
        int64_t before = attn_context_length(context, 0);
        status = attn_context_eval(context, &(attn_context_batch){.tokens = tokens, .count = counts[i]}, 1, NULL, NULL);
        if (status != ATTN_OK) {
            /* What was read before is still there, in all layers alike, and reading goes on. */
            assert_true(attn_context_length(context, 0) >= before);
            assert_true(attn_context_keys(context, 0, 0, 0) <= attn_context_length(context, 0));
        }
    }
    attn_context_destroy(context);
    attn_policy_destroy(made);
    attn_model_close(model);
    return status;
}

static attn_status make_sparse(attn_policy **made, const attn_model *model)
{
    return attn_policy_create(made, model, "flexprefill:block=16,min_budget=16", "topk:top_k=4");
}
static attn_status make_endless(attn_policy **made, const attn_model *model)
{
    static const char spec[] = "streaming:sinks=2,recent=16,positions=cache";
    return attn_policy_create(made, model, spec, spec);
}
static char policy_path[] = "/tmp/attn-allocation-XXXXXX";
static attn_status make_from_file(attn_policy **made, const attn_model *model) { return attn_policy_load(made, model, policy_path); }

static attn_status sparse_policy(void) { return run_policy(make_sparse, 200); }
static attn_status endless_policy(void) { return run_policy(make_endless, 110); }
static attn_status policy_file(void) { return run_policy(make_from_file, 200); }

static void write_policy(void)
{
    static const char json[] = "{\"prompt\": \"dense\", \"layers\": [{\"layers\": [0], \"heads\": [1], \"prompt\": \"topk:top_k=4\","
                               " \"generation\": \"streaming:recent=9\"}]}";
    int file = mkstemp(policy_path);
    assert_true(file >= 0 && write(file, json, sizeof json - 1) == (ssize_t)(sizeof json - 1));
    close(file);
}

/* A policy of several mechanisms in a context that reads a prompt and generates, then watched heads. */
static attn_status policy(void)
{
    static const int32_t tokens[80] = {1, 2, 3, 4, 5, 6, 7};
    attn_model *model = NULL;
    attn_context *context = NULL;
    attn_policy *made = NULL;
    attn_heads *heads = NULL;
    attn_context_settings settings = {.length = 100, .chunk = 32, .threads = 1};
    attn_status status = attn_model_open_memory(&model, model_file.data, model_file.bytes, NULL);
    if (status == ATTN_OK) {
        status = attn_context_create(&context, model, &settings);
    }
    if (status == ATTN_OK) {
        status = attn_policy_create(&made, model, "topk:top_k=5", "streaming:sinks=1,recent=8");
    }
    if (status == ATTN_OK) {
        status = attn_policy_use(made, context);
    }
    if (status == ATTN_OK) {
        status = attn_context_eval(context, &(attn_context_batch){.tokens = tokens, .count = 80}, 1, NULL, NULL);
    }
    if (status == ATTN_OK) {
        status = attn_context_eval(context, &(attn_context_batch){.tokens = tokens, .count = 1}, 1, NULL, NULL);
    }
    if (status == ATTN_OK) {
        status = attn_heads_create(&heads, model);
    }
    if (status == ATTN_OK) {
        status = attn_policy_use(NULL, context);
    }
    if (status == ATTN_OK) {
        status = attn_heads_use(heads, context);
    }
    if (status == ATTN_OK) {
        status = attn_context_eval(context, &(attn_context_batch){.tokens = tokens, .count = 1}, 1, NULL, NULL);
    }
    attn_context_destroy(context);
    attn_policy_destroy(made);
    attn_heads_destroy(heads);
    attn_model_close(model);
    return status;
}

static attn_status plan(void)
{
    attn_plan *made;
    attn_plan_shape shape = {.batch = 1, .heads = 2, .n = 100, .m = 100, .block_q = 16, .block_k = 16};
    attn_status status = attn_plan_streaming(&made, &shape, 4, 20);
    if (status == ATTN_OK) {
        attn_plan_destroy(made);
    }
    return status;
}

static attn_status sampler(void)
{
    attn_sampler *made;
    attn_status status = attn_sampler_create(&made, NULL, 100);
    if (status == ATTN_OK) {
        attn_sampler_destroy(made);
    }
    return status;
}

static attn_status safetensors(void)
{
    static const char text[] = "{\"a\":{\"dtype\":\"BOOL\",\"shape\":[1],\"data_offsets\":[0,1]},"
                               "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[1,5]}}";
    unsigned char file[8 + sizeof text - 1 + 5] = {0};
    file[0] = sizeof text - 1;
    memcpy(file + 8, text, sizeof text - 1);
    attn_safetensors *made;
    attn_status status = attn_safetensors_open_memory(&made, file, sizeof file);
    if (status == ATTN_OK) {
        attn_safetensors_close(made);
    }
    return status;
}

static void test_each_allocation_may_fail(void **state)
{
    (void)state;
    for (int i = 0; i < 4096; i++) {
        numbers[i] = (float)(i * 37 % 101) / 50.0f - 1.0f;
    }
    fail_each("dense", dense);
    fail_each("decode", decode);
    fail_each("streaming", streaming);
    fail_each("topk", topk);
    fail_each("topk.blocks", topk_blocks);
    fail_each("flexprefill", flexprefill);
    fail_each("softpag", softpag);
    fail_each("lightning", lightning);
    fail_each("neighborhood", neighborhood);
    fail_each("halo", halo);
    fail_each("davit.window", window);
    fail_each("agent", agent);
    fail_each("flow", flow);
    fail_each("based", based);
    put_tiny_llama(&model_file);
    fail_each("tokenizer", tokenizer);
    fail_each("byte pairs", byte_pairs);
    fail_each("sentence pieces", sentence_pieces);
    fail_each("unigrams", unigrams);
    fail_each("policy", policy);
    fail_each("sparse policy", sparse_policy);
    fail_each("endless policy", endless_policy);
    write_policy();
    fail_each("policy from a file", policy_file);
    unlink(policy_path);
    free(model_file.data);
    fail_each("plan", plan);
    fail_each("sampler", sampler);
    fail_each("safetensors", safetensors);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_each_allocation_may_fail)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
