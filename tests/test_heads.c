/* Heads watched and masked on a tiny model, against mechanisms that do the same by plain loops. */
#include <attn/heads.h>

#include "gguf_build.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

enum { PROMPT = 90, STEPS = 20, HEADS = 2, VOCABULARY = 16 };

static attn_model *model;

static int set_up(void **state)
{
    static gguf_build file;
    (void)state;
    put_tiny_llama(&file);
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

/* What plain loops find: the strongest key, and the output with masked heads. */
typedef struct plain {
    int64_t top[HEADS];
    int masked[HEADS], zero;
} plain;

static double product(const attn_llm_call *call, int64_t h, int64_t j)
{
    const float *q = (const float *)call->q.data + h * call->q.stride[0];
    const float *k = (const float *)call->k.data + j * call->k.stride[1];
    double sum = 0;
    for (int64_t c = 0; c < call->q.shape[2]; c++) {
        sum += (double)q[c] * (double)k[c];
    }
    return sum;
}

static attn_status plain_decode(void *user, const attn_llm_call *call)
{
    plain *p = user;
    int64_t keys = call->key_counts[0], width = call->o.shape[2];
    for (int64_t h = 0; h < HEADS; h++) {
        double best = -INFINITY, sum = 0, out[64] = {0};
        for (int64_t j = 0; j < keys; j++) {
            double s = p->masked[h] ? 0 : product(call, h, j), w = exp(s * call->scale);
            if (s > best) {
                best = s;
                p->top[h] = j;
            }
            sum += w;
            for (int64_t c = 0; c < width; c++) {
                out[c] += w * (double)((const float *)call->v.data)[j * call->v.stride[1] + c];
            }
        }
        for (int64_t c = 0; c < width; c++) {
            ((float *)call->o.data)[h * call->o.stride[0] + c] = p->masked[h] && p->zero ? 0 : (float)(out[c] / sum);
        }
    }
    return ATTN_OK;
}

static void run(attn_heads *heads, plain *p, int64_t tops[STEPS][HEADS], float logits[VOCABULARY])
{
    attn_context *context;
    attn_context_settings settings = {.length = PROMPT + STEPS, .chunk = 64, .threads = 2};
    int32_t tokens[PROMPT + STEPS];
    for (int i = 0; i < PROMPT + STEPS; i++) {
        tokens[i] = i * 7 % 16;
    }
    must(attn_context_create(&context, model, &settings));
    if (heads != NULL) {
        must(attn_heads_use(heads, context));
    } else {
        must(attn_context_set_attention(context, -1, &(attn_llm_attention){.decode = plain_decode, .user = p}));
    }
    must(attn_context_eval(context, &(attn_context_batch){.tokens = tokens, .count = PROMPT}, 1, NULL, NULL));
    for (int i = 0; i < STEPS; i++) {
        must(attn_context_eval(context, &(attn_context_batch){.tokens = tokens + PROMPT + i, .count = 1}, 1, NULL, NULL));
        memcpy(tops[i], heads != NULL ? attn_heads_top(heads) : p->top, sizeof tops[i]);
    }
    memcpy(logits, attn_context_logits(context, 0), VOCABULARY * sizeof(float));
    if (heads != NULL) {
        must(attn_heads_use(NULL, context));
    }
    attn_context_destroy(context);
}

static void compare(attn_heads *heads, plain *p)
{
    int64_t got[STEPS][HEADS], want[STEPS][HEADS];
    float got_logits[VOCABULARY], want_logits[VOCABULARY];
    run(heads, NULL, got, got_logits);
    run(NULL, p, want, want_logits);
    for (int i = 0; i < STEPS; i++) {
        for (int h = 0; h < HEADS; h++) {
            if (got[i][h] != want[i][h]) {
                fail_msg("step %d, head %d: strongest key %lld, expected %lld", i, h, (long long)got[i][h], (long long)want[i][h]);
            }
        }
    }
    for (int i = 0; i < VOCABULARY; i++) {
        if (fabsf(got_logits[i] - want_logits[i]) > 1e-4f) {
            fail_msg("logit %d is %g, expected %g", i, (double)got_logits[i], (double)want_logits[i]);
        }
    }
}

static void test_watched(void **state)
{
    (void)state;
    attn_heads *heads;
    must(attn_heads_create(&heads, model));
    assert_int_equal(attn_heads_top(heads)[0], -1);
    compare(heads, &(plain){.zero = 0});
    attn_heads_destroy(heads);
}

static void test_masked(void **state)
{
    (void)state;
    attn_heads *heads;
    must(attn_heads_create(&heads, model));
    for (int mask = 1; mask < 4; mask++) {
        for (int zero = 0; zero < 2; zero++) {
            uint8_t masked[HEADS] = {(uint8_t)(mask & 1), (uint8_t)(mask >> 1)};
            must(attn_heads_mask(heads, masked, zero ? ATTN_HEADS_ZERO : ATTN_HEADS_UNIFORM));
            compare(heads, &(plain){.masked = {mask & 1, mask >> 1}, .zero = zero});
        }
    }
    must(attn_heads_mask(heads, NULL, ATTN_HEADS_UNIFORM));
    compare(heads, &(plain){.zero = 0});
    assert_int_equal(attn_heads_mask(heads, NULL, (attn_heads_mask_mode)7), ATTN_ERR_ARGUMENT);
    attn_heads_destroy(heads);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_watched), cmocka_unit_test(test_masked)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
