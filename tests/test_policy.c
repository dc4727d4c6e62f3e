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
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mechanisms_that_see_everything_agree), cmocka_unit_test(test_streaming_forgets),
        cmocka_unit_test(test_files), cmocka_unit_test(test_mechanisms_that_do_not_fit),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
