/* Few queries over many keys against exact attention in one piece; independence of the thread count; errors. */
#include "exec/pool.h"

#include "core/random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { BATCH = 1, HEADS = 2, KV = 1, QUERIES = 19, KEYS = 5003, WIDTH = 12, VALUES = 9 };

static attn_tensor make(attn_random *random, int ndim, const int64_t *shape)
{
    attn_tensor t = attn_tensor_make(NULL, ATTN_F32, ndim, shape);
    int64_t count = attn_tensor_count(&t);
    float *data = malloc((size_t)count * sizeof *data);
    assert_non_null(data);
    for (int64_t i = 0; i < count; i++) {
        data[i] = random != NULL ? (float)attn_random_normal(random) : 0;
    }
    t.data = data;
    return t;
}

#define SHAPE(...) (int)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void same(const char *what, const attn_tensor *got, const attn_tensor *want, double tolerance)
{
    for (int64_t i = 0; i < attn_tensor_count(want); i++) {
        double a = (double)((float *)got->data)[i], b = (double)((float *)want->data)[i];
        if (!(fabs(a - b) <= tolerance * (1 + fabs(b)))) {
            fail_msg("%s[%lld] is %g, expected %g", what, (long long)i, a, b);
        }
    }
}

/* o, lse and the gradients of q, k, v and bias. */
static void run(int pooled, int threads, const attn_dense_inputs *in, const attn_tensor *grad_o, attn_tensor out[6])
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    attn_exec exec = {.threads = threads};
    out[0] = make(NULL, SHAPE(BATCH, HEADS, QUERIES, VALUES));
    out[1] = make(NULL, SHAPE(BATCH, HEADS, QUERIES));
    out[2] = make(NULL, SHAPE(BATCH, HEADS, QUERIES, WIDTH));
    out[3] = make(NULL, SHAPE(BATCH, KV, KEYS, WIDTH));
    out[4] = make(NULL, SHAPE(BATCH, KV, KEYS, VALUES));
    out[5] = make(NULL, SHAPE(1, HEADS, QUERIES, KEYS));
    attn_dense_gradients to = {.q = &out[2], .k = &out[3], .v = &out[4], .bias = &out[5]};
    attn_status status = (pooled ? attn_pool_forward : attn_dense_forward)(&settings, in, &out[0], &out[1], &exec);
    if (status == ATTN_OK) {
        status = (pooled ? attn_pool_backward : attn_dense_backward)(&settings, in, &out[0], &out[1], grad_o, &to, &exec);
    }
    if (status != ATTN_OK) {
        fail_msg("%s", attn_last_error());
    }
}

static void test_against_dense(void **state)
{
    (void)state;
    static const char *const names[] = {"o", "lse", "grad_q", "grad_k", "grad_v", "grad_bias"};
    attn_random random;
    attn_random_seed(&random, 4);
    attn_tensor bias = make(&random, SHAPE(1, HEADS, QUERIES, KEYS)), grad_o = make(&random, SHAPE(BATCH, HEADS, QUERIES, VALUES));
    attn_dense_inputs in = {.q = make(&random, SHAPE(BATCH, HEADS, QUERIES, WIDTH)), .k = make(&random, SHAPE(BATCH, KV, KEYS, WIDTH)),
                            .v = make(&random, SHAPE(BATCH, KV, KEYS, VALUES)), .bias = &bias};
    for (int64_t j = 0; j < 2500; j++) { /* the whole first part is invisible to one query */
        ((float *)bias.data)[3 * KEYS + j] = -INFINITY;
    }
    attn_tensor want[6], got[6], again[6];
    run(0, 2, &in, &grad_o, want);
    run(1, 1, &in, &grad_o, got);
    run(1, 3, &in, &grad_o, again);
    for (int i = 0; i < 6; i++) {
        same(names[i], &got[i], &want[i], 2e-5);
        if (memcmp(got[i].data, again[i].data, (size_t)attn_tensor_count(&got[i]) * sizeof(float)) != 0) {
            fail_msg("%s differs between 1 and 3 threads", names[i]);
        }
        free(want[i].data);
        free(got[i].data);
        free(again[i].data);
    }
    attn_tensor o = make(NULL, SHAPE(BATCH, HEADS, QUERIES, VALUES));
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.softcap = -1;
    assert_int_equal(attn_pool_forward(&settings, &in, &o, NULL, NULL), ATTN_ERR_ARGUMENT);
    assert_non_null(strstr(attn_last_error(), "softcap = -1"));
    free(o.data);
    free(bias.data);
    free(grad_o.data);
    free(in.q.data);
    free(in.k.data);
    free(in.v.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_against_dense)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
