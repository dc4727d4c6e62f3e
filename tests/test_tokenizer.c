/* Tokenizers, chat templates and sampling on small vocabularies made here. The comparison with reference tokenizers on real models is
 * tests/reference/check_tokenizer.py. */
#include "core/random.h"
#include "gguf_build.h"

#include <attn/sample.h>
#include <attn/tokenizer.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define TEXT(s) {(s), sizeof(s) - 1}

/* ---- Byte-level BPE: 256 bytes, a few merges, two special tokens ---- */

static char spelled[256][2];
static attn_gguf_string texts[300];
static int32_t types[300];
static int64_t count;

static void make_bytes(void)
{
    int next = 256;
    count = 0;
    for (int byte = 0; byte < 256; byte++) {
        int printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
        int code = printable ? byte : next++;
        int two = code >= 0x80;
        spelled[byte][0] = (char)(two ? 0xc0 | code >> 6 : code);
        spelled[byte][1] = (char)(0x80 | (code & 0x3f));
        texts[count].text = spelled[byte];
        texts[count].bytes = (size_t)(1 + two);
        types[count++] = ATTN_TOKEN_NORMAL;
    }
}

static void add(const char *text, int type)
{
    texts[count] = (attn_gguf_string){text, strlen(text)};
    types[count++] = type;
}

/* U+0120 is how the alphabet spells a space. */
static const attn_gguf_string merges[] = {TEXT("h e"), TEXT("l l"), TEXT("he ll"), TEXT("hell o"), TEXT("\xc4\xa0 w"), TEXT("1 2")};

enum { HE = 256, LL, HELL, HELLO, SPACE_W, TWELVE, START, END, CUSTOM, OK };

static attn_tokenizer *byte_level_with(const char *pre, int add_bos, attn_gguf_string template)
{
    make_bytes();
    add("he", ATTN_TOKEN_NORMAL), add("ll", ATTN_TOKEN_NORMAL), add("hell", ATTN_TOKEN_NORMAL), add("hello", ATTN_TOKEN_NORMAL);
    add("\xc4\xa0w", ATTN_TOKEN_NORMAL), add("12", ATTN_TOKEN_NORMAL);
    add("<|im_start|>", ATTN_TOKEN_CONTROL), add("<|im_end|>", ATTN_TOKEN_CONTROL), add("<tag>", ATTN_TOKEN_USER_DEFINED);
    add("ok", ATTN_TOKEN_NORMAL); /* no merges lead to it */
    attn_tokenizer_data data = {.model = "gpt2", .pre = pre, .count = count, .texts = texts, .types = types, .merges = merges,
                                .merge_count = 6, .bos = add_bos ? START : -1, .eos = END, .eot = -1, .unknown = -1,
                                .add_bos = add_bos, .chat_template = template};
    attn_tokenizer *t;
    if (attn_tokenizer_create(&t, &data) != ATTN_OK) {
        fail_msg("%s", attn_last_error());
    }
    return t;
}

static attn_tokenizer *byte_level(const char *pre)
{
    return byte_level_with(pre, 0, (attn_gguf_string)TEXT("{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}"));
}

static void expect_tokens(const attn_tokenizer *t, const char *text, size_t bytes, int flags, int n, const int32_t *want)
{
    int32_t *tokens;
    int64_t got;
    assert_int_equal(attn_tokenize(t, text, bytes, flags, &tokens, &got), ATTN_OK);
    for (int i = 0; i < n || i < got; i++) {
        if (i >= n || i >= got || tokens[i] != want[i]) {
            fail_msg("'%s': token %d is %d of %lld, expected %d of %d", text, i, i < got ? tokens[i] : -1, (long long)got,
                     i < n ? want[i] : -1, n);
        }
    }
    attn_tokens_free(tokens);
}

#define EXPECT(t, text, flags, ...)                                                                                     \
    expect_tokens(t, text, sizeof(text) - 1, flags, (int)(sizeof((int32_t[]){__VA_ARGS__}) / 4), (int32_t[]){__VA_ARGS__})

static void test_merges_and_words(void **state)
{
    (void)state;
    attn_tokenizer *t = byte_level("default");
    EXPECT(t, "hello", 0, HELLO);
    EXPECT(t, "hell he w", 0, HELL, ' ', HE, SPACE_W);
    EXPECT(t, "  w", 0, ' ', SPACE_W);
    EXPECT(t, "12", 0, TWELVE);
    EXPECT(t, "a<tag>12", 0, 'a', CUSTOM, TWELVE);
    EXPECT(t, "<|im_end|>", ATTN_TOKENIZE_PARSE, END);
    EXPECT(t, "\xff\x80", 0, 0xff, 0x80);
    attn_tokenizer_destroy(t);
    t = byte_level("smollm"); /* digits stand alone */
    EXPECT(t, "12", 0, '1', '2');
    attn_tokenizer_destroy(t);
}

/* Llama 3 takes words that are tokens as they are; others have only what merges make. */
static void test_whole_words(void **state)
{
    (void)state;
    attn_tokenizer *t = byte_level("default");
    EXPECT(t, "ok", 0, 'o', 'k');
    attn_tokenizer_destroy(t);
    t = byte_level("llama-bpe");
    EXPECT(t, "ok", 0, OK);
    EXPECT(t, "hello ok", 0, HELLO, ' ', 'o', 'k');
    attn_tokenizer_destroy(t);
}

static void test_begin_token(void **state)
{
    (void)state;
    attn_tokenizer *t = byte_level_with("default", 1, (attn_gguf_string){NULL, 0});
    EXPECT(t, "he", ATTN_TOKENIZE_SPECIAL, START, HE);
    EXPECT(t, "", ATTN_TOKENIZE_SPECIAL | ATTN_TOKENIZE_PARSE, START);
    EXPECT(t, "<|im_start|>he", ATTN_TOKENIZE_SPECIAL | ATTN_TOKENIZE_PARSE, START, HE); /* once */
    EXPECT(t, "<|im_end|>he", ATTN_TOKENIZE_SPECIAL | ATTN_TOKENIZE_PARSE, START, END, HE);
    attn_tokenizer_destroy(t);
}

/* Where a file does not say whether texts begin with the begin token, its pre-tokenizer does. */
static void test_begin_token_of_files(void **state)
{
    (void)state;
    static const char *const pres[] = {"llama-bpe", "qwen2"};
    for (int i = 0; i < 2; i++) {
        gguf_build b = {0};
        put_header(&b, 3, 0, 5);
        put_text(&b, "tokenizer.ggml.model", "gpt2");
        put_text(&b, "tokenizer.ggml.pre", pres[i]);
        put_key(&b, "tokenizer.ggml.tokens", 9);
        put_uint(&b, 8, 4), put_uint(&b, 2, 8), put_string(&b, "a"), put_string(&b, "begin");
        put_key(&b, "tokenizer.ggml.merges", 9);
        put_uint(&b, 8, 4), put_uint(&b, 0, 8);
        put_u32(&b, "tokenizer.ggml.bos_token_id", 1);
        put_padding(&b, 32);
        attn_gguf *file;
        attn_tokenizer *t;
        if (attn_gguf_open_memory(&file, b.data, b.bytes) != ATTN_OK || attn_tokenizer_from_gguf(&t, file) != ATTN_OK) {
            fail_msg("%s: %s", pres[i], attn_last_error());
        }
        expect_tokens(t, "a", 1, ATTN_TOKENIZE_SPECIAL, 2 - i, (int32_t[]){1, 0} + i);
        attn_tokenizer_destroy(t);
        attn_gguf_close(file);
        free(b.data);
    }
}

/* Long words take another path; every byte comes back. */
static void test_round_trip(void **state)
{
    (void)state;
    attn_tokenizer *t = byte_level("llama-bpe");
    size_t length = 20000;
    char *text = malloc(length);
    uint32_t seed = 1;
    for (size_t i = 0; i < length; i++) {
        seed = seed * 1664525 + 1013904223;
        text[i] = i < 8000 ? "hello w12"[seed % 9 + (seed >> 9) % 1] : (char)(seed >> 24);
    }
    int32_t *tokens;
    int64_t n;
    assert_int_equal(attn_tokenize(t, text, length, 0, &tokens, &n), ATTN_OK);
    size_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        size_t bytes;
        const char *piece = attn_token_text(t, tokens[i], 0, &bytes);
        assert_true(at + bytes <= length && memcmp(piece, text + at, bytes) == 0);
        at += bytes;
    }
    assert_int_equal(at, length);
    attn_tokens_free(tokens);
    free(text);
    attn_tokenizer_destroy(t);
}

static void test_errors(void **state)
{
    (void)state;
    attn_tokenizer *t;
    make_bytes();
    attn_tokenizer_data data = {.model = "wordpiece", .count = count, .texts = texts, .bos = -1, .eos = -1, .eot = -1, .unknown = -1};
    assert_int_equal(attn_tokenizer_create(&t, &data), ATTN_ERR_UNSUPPORTED);
    data.model = "gpt2", data.pre = "strange";
    assert_int_equal(attn_tokenizer_create(&t, &data), ATTN_ERR_UNSUPPORTED);
    assert_non_null(strstr(attn_last_error(), "strange"));
    data.pre = NULL, data.merges = (attn_gguf_string[]){TEXT("onepart")}, data.merge_count = 1;
    assert_int_equal(attn_tokenizer_create(&t, &data), ATTN_ERR_FORMAT);
    data.model = "llama", data.merge_count = 0;
    assert_int_equal(attn_tokenizer_create(&t, &data), ATTN_ERR_FORMAT);
    data.count = 0;
    assert_int_equal(attn_tokenizer_create(&t, &data), ATTN_ERR_FORMAT);
}

/* ---- SentencePiece-style ---- */

static void test_scores_and_byte_fallback(void **state)
{
    (void)state;
    const attn_gguf_string words[] = {TEXT("<unk>"), TEXT("\xe2\x96\x81"), TEXT("a"),    TEXT("b"),     TEXT("ab"),
                                      TEXT("\xe2\x96\x81" "ab"),           TEXT("<0xC3>"), TEXT("<0xA9>"), TEXT("ba")};
    const float scores[] = {0, -1, -1, -1, -2, -4, 0, 0, -3};
    const int32_t kinds[] = {2, 1, 1, 1, 1, 1, 6, 6, 1};
    attn_tokenizer_data data = {.model = "llama", .count = 9, .texts = words, .scores = scores, .types = kinds, .bos = -1, .eos = -1,
                                .eot = -1, .unknown = 0, .add_space_prefix = 1};
    attn_tokenizer *t;
    assert_int_equal(attn_tokenizer_create(&t, &data), ATTN_OK);
    EXPECT(t, "ab", 0, 5);
    EXPECT(t, "bab", 0, 1, 3, 4);
    EXPECT(t, "a\xc3\xa9", 0, 1, 2, 6, 7);
    EXPECT(t, "z", 0, 1, 0);
    attn_tokenizer_destroy(t);
    data.model = "t5", data.add_space_prefix = 0;
    assert_int_equal(attn_tokenizer_create(&t, &data), ATTN_OK);
    EXPECT(t, "bab", 0, 3, 4);
    EXPECT(t, "aba", 0, 4, 2);
    attn_tokenizer_destroy(t);
}

/* ---- Chat ---- */

static void test_chat(void **state)
{
    (void)state;
    attn_tokenizer *t = byte_level("default");
    const attn_chat_message messages[] = {{"user", "hi"}, {"assistant", "yes"}, {"user", "ok"}};
    char *text;
    assert_int_equal(attn_chat_render(t, messages, 3, 1, &text), ATTN_OK);
    assert_string_equal(text, "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
                              "<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n");
    attn_text_free(text);
    const attn_chat_message own[] = {{"system", "S"}, {"user", "hi"}};
    assert_int_equal(attn_chat_render(t, own, 2, 0, &text), ATTN_OK);
    assert_string_equal(text, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n");
    attn_text_free(text);
    const attn_chat_message wrong[] = {{"robot", "S"}};
    assert_int_equal(attn_chat_render(t, wrong, 1, 0, &text), ATTN_ERR_ARGUMENT);
    attn_tokenizer_destroy(t);
}

/* What model files carry as templates, shortened to what tells their families apart, and what these make of a chat. */
static void test_chat_templates(void **state)
{
    (void)state;
    static const struct {
        attn_gguf_string template;
        int system;
        const char *want;
    } cases[] = {
        /* Qwen 2.5: the default system message is not the first place that begins one. */
        {TEXT("{%- if tools %}{{- '<|im_start|>system\\n' }}{{- messages[0]['content'] }}{%- else %}"
              "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- else %}"
              "{{- '<|im_start|>system\\nYou\\'re Qwen.\\nYou help.<|im_end|>\\n' }}{%- endif %}"),
         0, "<|im_start|>system\nYou're Qwen.\nYou help.<|im_end|>\n<|im_start|>user\n hi<|im_end|>\n<|im_start|>assistant\n"},
        {TEXT("{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"), 0,
         "<|im_start|>user\n hi<|im_end|>\n<|im_start|>assistant\n"},
        {TEXT("{{- \"<|im_start|>system\\n\" + messages[0].content + \"<|im_end|>\\n\" }}"), 0,
         "<|im_start|>user\n hi<|im_end|>\n<|im_start|>assistant\n"},
        {TEXT("{{ bos_token }}{{ '<start_of_turn>' + role }}"), 1,
         "<start_of_turn>user\nS \n\nhi<end_of_turn>\n<start_of_turn>model\n"},
        {TEXT("'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>'"), 1,
         "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"},
        {TEXT("{%- set date_string = \"26 Jul 2024\" %}{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}"
              "{{- \"Cutting Knowledge Date: December 2023\\n\" }}"), 0,
         "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
         "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"},
        {TEXT("{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}{{- \"Cutting Knowledge Date: December 2023\\n\" }}"), 1,
         "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
         "Today Date: 26 Jul 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        attn_tokenizer *t = byte_level_with("default", 0, cases[i].template);
        const attn_chat_message messages[] = {{"system", "S "}, {"user", " hi"}};
        int skip = !cases[i].system;
        char *text;
        assert_int_equal(attn_chat_render(t, messages + skip, 2 - skip, 1, &text), ATTN_OK);
        assert_string_equal(text, cases[i].want);
        attn_text_free(text);
        attn_tokenizer_destroy(t);
    }
}

/* ---- Sampling ---- */

enum { MANY = 3000 };
static const float *order_logits;

static int by_logit(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return order_logits[x] != order_logits[y] ? (order_logits[x] > order_logits[y] ? -1 : 1) : (x > y) - (x < y);
}

/* Against the definition over all tokens, sorted: the same draws. */
static void test_sampling_many(void **state)
{
    (void)state;
    static float logits[MANY];
    static int32_t order[MANY];
    static const attn_sampler_settings cases[] = {
        {.temperature = 1, .top_p = 1, .repeat_penalty = 1},
        {.temperature = 3, .top_p = 1, .repeat_penalty = 1},
        {.temperature = 2, .top_p = 1, .repeat_penalty = 1, .top_k = 700},
        {.temperature = 2, .top_p = 0.9, .repeat_penalty = 1},
        {.temperature = 2, .top_p = 0.999, .repeat_penalty = 1, .top_k = 1500},
        {.temperature = 1.5, .top_p = 1, .repeat_penalty = 1, .min_p = 0.002},
    };
    attn_random random, draws;
    attn_random_seed(&random, 5);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        attn_sampler_settings set = cases[c];
        set.seed = c + 1;
        attn_sampler *s;
        assert_int_equal(attn_sampler_create(&s, &set, MANY), ATTN_OK);
        attn_random_seed(&draws, set.seed);
        for (int turn = 0; turn < 50; turn++) {
            for (int i = 0; i < MANY; i++) {
                logits[i] = (float)(attn_random_uniform(&random) * 12), order[i] = i;
            }
            order_logits = logits;
            qsort(order, MANY, sizeof *order, by_logit);
            int64_t most = set.top_k > 0 ? set.top_k : MANY, left = 0;
            double sum = 0, reached = 0;
            for (int64_t i = 0; i < most; i++) {
                sum += exp((double)(logits[order[i]] - logits[order[0]]) / set.temperature);
            }
            for (; left < most; left++) {
                double likelihood = exp((double)(logits[order[left]] - logits[order[0]]) / set.temperature);
                if (left > 0 && (reached >= set.top_p * sum || likelihood < set.min_p)) {
                    break;
                }
                reached += likelihood;
            }
            double draw = attn_random_uniform(&draws) * reached;
            int64_t at = -1;
            while (++at < left - 1 && (draw -= exp((double)(logits[order[at]] - logits[order[0]]) / set.temperature)) >= 0) {
            }
            int32_t got = attn_sampler_next(s, logits);
            if (got != order[at]) {
                fail_msg("case %zu, turn %d: token %d, expected %d (rank %lld of %lld)", c, turn, got, order[at], (long long)at,
                         (long long)left);
            }
        }
        attn_sampler_destroy(s);
    }
}

static void test_sampling(void **state)
{
    (void)state;
    float logits[6] = {0, 3, NAN, 3, -INFINITY, 1};
    attn_sampler *s;
    attn_sampler_settings settings;
    assert_int_equal(attn_sampler_create(&s, NULL, 6), ATTN_OK);
    assert_int_equal(attn_sampler_next(s, logits), 1); /* greedy, the lower of two equals */
    attn_sampler_destroy(s);
    attn_sampler_defaults(&settings);
    settings.repeat_penalty = 10;
    assert_int_equal(attn_sampler_create(&s, &settings, 6), ATTN_OK);
    attn_sampler_accept(s, 1);
    attn_sampler_accept(s, 3);
    assert_int_equal(attn_sampler_next(s, logits), 5);
    attn_sampler_destroy(s);
    attn_sampler_defaults(&settings);
    settings.temperature = 1, settings.seed = 7;
    double seen[6] = {0};
    assert_int_equal(attn_sampler_create(&s, &settings, 6), ATTN_OK);
    for (int i = 0; i < 20000; i++) {
        seen[attn_sampler_next(s, logits)] += 1.0 / 20000;
    }
    attn_sampler_destroy(s);
    double sum = exp(0) + 2 * exp(3) + exp(1);
    const double want[6] = {exp(0) / sum, exp(3) / sum, 0, exp(3) / sum, 0, exp(1) / sum};
    for (int i = 0; i < 6; i++) {
        if (fabs(seen[i] - want[i]) > 0.015) {
            fail_msg("token %d drawn %.4f of the time, expected %.4f", i, seen[i], want[i]);
        }
    }
    settings.top_k = 2, settings.top_p = 1;
    assert_int_equal(attn_sampler_create(&s, &settings, 6), ATTN_OK);
    for (int i = 0; i < 200; i++) {
        int32_t token = attn_sampler_next(s, logits);
        assert_true(token == 1 || token == 3);
    }
    attn_sampler_destroy(s);
    settings.top_k = 0, settings.min_p = 0.1;
    assert_int_equal(attn_sampler_create(&s, &settings, 6), ATTN_OK);
    for (int i = 0; i < 500; i++) {
        int32_t token = attn_sampler_next(s, logits);
        assert_true(token == 1 || token == 3 || token == 5);
    }
    attn_sampler_destroy(s);
    settings.top_p = 0;
    assert_int_equal(attn_sampler_create(&s, &settings, 6), ATTN_ERR_ARGUMENT);
    assert_non_null(strstr(attn_last_error(), "top_p = 0"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_merges_and_words), cmocka_unit_test(test_round_trip), cmocka_unit_test(test_errors),
        cmocka_unit_test(test_scores_and_byte_fallback), cmocka_unit_test(test_chat), cmocka_unit_test(test_chat_templates),
        cmocka_unit_test(test_whole_words), cmocka_unit_test(test_begin_token), cmocka_unit_test(test_begin_token_of_files),
        cmocka_unit_test(test_sampling), cmocka_unit_test(test_sampling_many),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
