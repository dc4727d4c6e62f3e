/* Attention policies on a tiny model: the same result where a mechanism sees everything, caches that forget, JSON files, errors. */
#include <attn/policy.h>

#include "gguf_build.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#include <cmocka.h>

#define PROMPT 300

static attn_model *model;
static int32_t tokens[PROMPT + 40];

static int set_up(void **state)
{
    static gguf_build file;
    (void)state;
    put_tiny_llama(&file);
    for (int i = 0; i < PROMPT + 40; i++) {
        tokens[i] = i * 7 % 16;
    }
    return attn_model_open_memory(&model, file.data, file.bytes, NULL) != ATTN_OK;
}

static int tear_down(void **state)
{
    (void)state;
    attn_model_close(model);
    return 0;
}

static void must(attn_status status)
{
    if (status != ATTN_OK) {
        fail_msg("%s", attn_last_error());
    }
}

/* Logits after the prompt and 40 single tokens; keys that the only head holds then. */
static int64_t run(attn_policy *policy, float logits[16])
{
    attn_context *context;
    attn_context_settings settings = {.length = PROMPT + 40, .chunk = 64, .threads = 2};
    must(attn_context_create(&context, model, &settings));
    must(attn_policy_use(policy, context));
    attn_context_batch batch = {.tokens = tokens, .count = PROMPT};
    must(attn_context_eval(context, &batch, 1, NULL, NULL));
    for (int i = 0; i < 40; i++) {
        attn_context_batch one = {.tokens = tokens + PROMPT + i, .count = 1};
        must(attn_context_eval(context, &one, 1, NULL, NULL));
    }
    memcpy(logits, attn_context_logits(context, 0), 16 * sizeof(float));
    int64_t keys = attn_context_keys(context, 0, 0, 0);
    must(attn_policy_use(NULL, context));
    attn_context_destroy(context);
    return keys;
}

static void expect_close(const char *what, const float *got, const float *want)
{
    for (int i = 0; i < 16; i++) {
        if (fabsf(got[i] - want[i]) > 1e-4f) {
            fail_msg("%s: logit %d is %g, exact attention gives %g", what, i, (double)got[i], (double)want[i]);
        }
    }
}

static void test_mechanisms_that_see_everything_agree(void **state)
{
    (void)state;
    float exact[16], got[16];
    run(NULL, exact);
    const char *const specs[][2] = {{"dense", "dense"}, {"streaming:sinks=4,recent=4096", "streaming:sinks=4,recent=4096"},
                                    {"topk:top_k=1000", "topk:top_k=1000"}, {"flexprefill:block=64,min_budget=4096", NULL}};
    for (int i = 0; i < 4; i++) {
        attn_policy *policy;
        must(attn_policy_create(&policy, model, specs[i][0], specs[i][1]));
        attn_policy_count(policy, 1);
        assert_int_equal(run(policy, got), PROMPT + 40);
        expect_close(specs[i][0], got, exact);
        attn_policy_stats stats = attn_policy_get_stats(policy);
        assert_true(stats.prompt_pairs == stats.prompt_exact_pairs && stats.prompt_pairs > 0);
        attn_policy_destroy(policy);
    }
}

static void test_streaming_forgets(void **state)
{
    (void)state;
    float got[16], again[16];
    attn_policy *policy;
    must(attn_policy_create(&policy, model, "streaming:sinks=2,recent=32", "streaming:sinks=2,recent=32"));
    int64_t keys = run(policy, got);
    if (keys > 2 + 32 + 64) {
        fail_msg("the cache still holds %lld of %d keys", (long long)keys, PROMPT + 40);
    }
    attn_policy_destroy(policy);
    /* Forgetting changes nothing: the mechanism does not look at what is gone. With sinks that never fit, nothing is forgotten. */
    must(attn_policy_create(&policy, model, "streaming:sinks=2,recent=32", NULL));
    run(policy, again);
    attn_policy_destroy(policy);
    must(attn_policy_create(&policy, model, NULL, "streaming:sinks=2,recent=32"));
    keys = run(policy, again);
    assert_true(keys <= 2 + 32 + 64); /* the prompt was read exactly, then the cache shrank */
    attn_policy_destroy(policy);
}

/* With one layer a key depends on its token alone, so that keys numbered inside the cache are those of a short text: the sinks and the
 * recent tokens, one after the other. */
static void test_positions_of_the_cache(void **state)
{
    (void)state;
    enum { SINKS = 3, RECENT = 24, LENGTH = 160, ALL = 2000 };
    static const char spec[] = "streaming:sinks=3,positions=cache,recent=24";
    attn_policy *policy;
    attn_context *context, *plain;
    attn_context_settings settings = {.length = LENGTH, .chunk = 64, .threads = 2};
    must(attn_policy_create(&policy, model, spec, spec));
    must(attn_context_create(&context, model, &settings));
    must(attn_context_create(&plain, model, &settings));
    must(attn_policy_use(policy, context));
    static int32_t text[ALL];
    for (int i = 0; i < ALL; i++) {
        text[i] = (i * 7 + i * i / 5) % 16;
    }
    for (int done = 0, count; done < ALL; done += count) {
        count = done == 0 ? 10 : done < 500 ? 163 : done % 3 == 0 ? 50 : 1; /* prompts of many lengths, and generation */
        count = count < ALL - done ? count : ALL - done;
        attn_context_batch batch = {.tokens = text + done, .count = count};
        must(attn_context_eval(context, &batch, 1, NULL, NULL));
        int32_t held[SINKS + RECENT];
        int end = done + count, all = end < SINKS + RECENT ? end : SINKS + RECENT;
        for (int i = 0; i < all; i++) {
            held[i] = text[i < SINKS ? i : end - all + i];
        }
        must(attn_context_truncate(plain, 0, 0));
        must(attn_context_eval(plain, &(attn_context_batch){.tokens = held, .count = all}, 1, NULL, NULL));
        expect_close("renumbered keys", attn_context_logits(context, 0), attn_context_logits(plain, 0));
        assert_true(attn_context_keys(context, 0, 0, 0) <= SINKS + RECENT + 64);
    }
    assert_int_equal(attn_context_length(context, 0), ALL);
    /* A prompt that does not forget ends with the cache. */
    attn_policy *other;
    must(attn_policy_create(&other, model, NULL, spec));
    must(attn_policy_use(other, context));
    must(attn_context_truncate(context, 0, 0));
    assert_int_equal(attn_context_eval(context, &(attn_context_batch){.tokens = text, .count = 300}, 1, NULL, NULL), ATTN_ERR_ARGUMENT);
    assert_int_equal(attn_context_length(context, 0), 128);
    must(attn_policy_use(NULL, context));
    assert_int_equal(attn_context_eval(context, &(attn_context_batch){.tokens = text, .count = 33}, 1, NULL, NULL), ATTN_ERR_ARGUMENT);
    attn_context_destroy(plain);
    attn_context_destroy(context);
    attn_policy_destroy(other);
    attn_policy_destroy(policy);
    assert_int_equal(attn_policy_create(&policy, model, "streaming:positions=ring", NULL), ATTN_ERR_ARGUMENT);
    assert_non_null(strstr(attn_last_error(), "positions is 'ring'"));
    /* The other one says what the default is. */
    float got[16], want[16];
    const char *const same[] = {"streaming:sinks=2,recent=20", "streaming:sinks=2,positions=original,recent=20"};
    for (int i = 0; i < 2; i++) {
        must(attn_policy_create(&policy, model, same[i], same[i]));
        run(policy, i == 0 ? want : got);
        attn_policy_destroy(policy);
    }
    expect_close("positions=original", got, want);
}

/* Prompts that go on where a block has begun already. */
static void test_prompts_that_go_on(void **state)
{
    (void)state;
    float got[16], exact[16];
    for (int which = 0; which < 2; which++) {
        attn_policy *policy;
        attn_context *context;
        must(attn_policy_create(&policy, model, which == 0 ? "dense" : "flexprefill:block=64,min_budget=4096", NULL));
        must(attn_context_create(&context, model, &(attn_context_settings){.chunk = 100}));
        must(attn_policy_use(policy, context));
        for (int done = 0; done < PROMPT; done += 60) {
            must(attn_context_eval(context, &(attn_context_batch){.tokens = tokens + done, .count = 60}, 1, NULL, NULL));
        }
        memcpy(which == 0 ? exact : got, attn_context_logits(context, 0), sizeof got);
        must(attn_policy_use(NULL, context));
        attn_context_destroy(context);
        attn_policy_destroy(policy);
    }
    expect_close("flexprefill in parts", got, exact);
}

static attn_status load(attn_policy **policy, const char *json)
{
    char path[] = "/tmp/attn-policy-XXXXXX";
    int file = mkstemp(path);
    assert_true(file >= 0 && write(file, json, strlen(json)) == (ssize_t)strlen(json));
    close(file);
    attn_status status = attn_policy_load(policy, model, path);
    unlink(path);
    return status;
}

static void test_files(void **state)
{
    (void)state;
    float exact[16], got[16];
    attn_policy *policy;
    run(NULL, exact);
    must(load(&policy, "{\"prompt\": \"streaming:recent=8\", \"layers\": [{\"layers\": [0], \"heads\": [0], \"prompt\": \"dense\"},"
                       " {\"heads\": [1], \"prompt\": \"streaming:recent=4096\"}]}"));
    run(policy, got);
    expect_close("heads that differ", got, exact);
    attn_policy_destroy(policy);
    const char *const wrong[][2] = {{"[]", "not a JSON object"},
                                    {"{\"promt\": \"dense\"}", "unknown key 'promt'"},
                                    {"{\"prompt\": 3}", "must be a SPEC"},
                                    {"{\"prompt\": \"nothing\"}", "no mechanism 'nothing'"},
                                    {"{\"layers\": [{\"layers\": [1], \"prompt\": \"dense\"}]}", "0 ... 0"},
                                    {"{\"layers\": [{\"heads\": [2], \"prompt\": \"dense\"}]}", "0 ... 1"},
                                    {"{\"layers\": {}}", "must be a list"}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        if (load(&policy, wrong[i][0]) == ATTN_OK || strstr(attn_last_error(), wrong[i][1]) == NULL) {
            fail_msg("%s: got '%s', expected '%s'", wrong[i][0], attn_last_error(), wrong[i][1]);
        }
    }
}

static void test_mechanisms_that_do_not_fit(void **state)
{
    (void)state;
    attn_policy *policy;
    assert_int_equal(attn_policy_create(&policy, model, "mrsa.mask:grid=[2,2]", NULL), ATTN_ERR_ARGUMENT);
    assert_non_null(strstr(attn_last_error(), "does not compute o from q, k and v"));
    assert_int_equal(attn_policy_create(&policy, model, "streaming:recent=0", NULL), ATTN_ERR_ARGUMENT);
    const char *const looking_ahead[] = {"dense:causal=false", "disendiff.attention"};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(attn_policy_create(&policy, model, looking_ahead[i], NULL), ATTN_ERR_ARGUMENT);
        assert_non_null(strstr(attn_last_error(), "is not causal"));
        must(attn_policy_create(&policy, model, NULL, looking_ahead[i])); /* a generated token is the last one */
        attn_policy_destroy(policy);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mechanisms_that_see_everything_agree), cmocka_unit_test(test_streaming_forgets),
        cmocka_unit_test(test_positions_of_the_cache), cmocka_unit_test(test_prompts_that_go_on),
        cmocka_unit_test(test_files), cmocka_unit_test(test_mechanisms_that_do_not_fit),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
