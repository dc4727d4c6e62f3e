/* Attention over key blocks against plain loops. */
#include "sparse.h"
#include "kernel/dispatch.h"

/* Flags with a given share of kept blocks, some rows without any. */
static attn_plan *random_plan(const sparse_case *c, int64_t block_q, int64_t block_k, double share)
{
    const int64_t heads[] = {1, c->hkv, c->h};
    attn_plan_shape shape = {below(2) ? 1 : c->b, heads[below(3)], c->n, c->m, block_q, block_k};
    int64_t rows = (c->n + block_q - 1) / block_q, columns = (c->m + block_k - 1) / block_k;
    attn_tensor flags = attn_tensor_make(NULL, ATTN_BOOL, 4, (int64_t[]){shape.batch, shape.heads, rows, columns});
    int64_t count = attn_tensor_count(&flags);
    uint8_t *data = flags.data = calloc((size_t)count + 1, 1);
    int empty = 0;
    for (int64_t i = 0; i < count; i++) {
        empty = i % columns == 0 ? below(8) == 0 : empty;
        data[i] = !empty && attn_random_uniform(&generator) < share;
    }
    const attn_plan_rule rules[] = {{0, 0, -1, -1}, {1, 0, -1, -1}, {1, 3, 20, 0}, {0, 0, 30, 5}, {0, 17, 9, -1}};
    attn_plan *plan;
    ok(attn_plan_from_flags(&plan, &shape, &flags, &rules[below(5)]));
    free(data);
    return plan;
}

static void random_blocks(void **state)
{
    (void)state;
    const int64_t sizes[] = {2, 3, 7, 16, 20, 32, 50, 64, 100, 128, 300};
    for (int i = 0; i < 160; i++) {
        sparse_case c;
        attn_random_seed(&generator, (uint64_t)i);
        sparse_random(&c, i);
        attn_plan *plan = random_plan(&c, 1 + below(140), sizes[below(11)], 0.1 + 0.8 * attn_random_uniform(&generator));
        sparse_check(&c, plan);
        attn_plan_destroy(plan);
        sparse_free(&c);
    }
}

static int odd_pairs(void *user, int64_t b, int64_t h, int64_t n, int64_t m)
{
    (void)user;
    return (n * 7 + m * 3 + b + h) % 5 < 2 && n % 11 != 0;
}

static void bitmaps(void **state)
{
    (void)state;
    for (int i = 0; i < 20; i++) {
        sparse_case c;
        attn_plan *plan;
        attn_random_seed(&generator, 1000 + (uint64_t)i);
        sparse_random(&c, i);
        attn_plan_shape shape = {c.b, c.h, c.n, c.m, 1 + below(70), 1 + below(70)};
        ok(attn_plan_from_function(&plan, &shape, odd_pairs, NULL));
        sparse_check(&c, plan);
        attn_plan_destroy(plan);
        sparse_free(&c);
    }
}

/* A plan that lists everything gives what dense gives. */
static void everything_is_dense(void **state)
{
    (void)state;
    sparse_case c = {.b = 1, .h = 2, .hkv = 1, .n = 300, .m = 300, .d = 64, .dv = 64};
    attn_random_seed(&generator, 5);
    attn_dense_defaults(&c.settings);
    c.settings.causal = 1;
    sparse_make(&c);
    attn_plan *plan;
    attn_plan_shape shape = {1, 1, c.n, c.m, 64, 64};
    ok(attn_plan_from_rule(&plan, &shape, NULL));
    attn_tensor dense = numbers(ATTN_F32, 4, c.o.shape, 1);
    ok(attn_dense_forward(&c.settings, &c.in, &dense, NULL, NULL));
    ok(attn_plan_forward(plan, &c.settings, &c.in, &c.o, &c.lse, NULL));
    for (int64_t i = 0; i < attn_tensor_count(&dense); i++) {
        assert_float_equal((float)at(&c.o, i), (float)at(&dense, i), 2e-6f);
    }
    attn_plan_destroy(plan);
    free(dense.data);
    sparse_free(&c);
}

static void errors(void **state)
{
    (void)state;
    sparse_case c = {.b = 2, .h = 4, .hkv = 2, .n = 10, .m = 12, .d = 8, .dv = 8};
    attn_dense_defaults(&c.settings);
    sparse_make(&c);
    const attn_plan_shape wrong[] = {{1, 1, 11, 12, 4, 4}, {1, 1, 10, 13, 4, 4}, {3, 1, 10, 12, 4, 4}, {1, 3, 10, 12, 4, 4}, {1, 3, 10, 12, 4, 1}};
    for (int i = 0; i < 5; i++) {
        attn_plan *plan;
        ok(attn_plan_from_rule(&plan, &wrong[i], NULL));
        assert_int_equal(attn_plan_forward(plan, &c.settings, &c.in, &c.o, &c.lse, NULL), ATTN_ERR_SHAPE);
        assert_non_null(strstr(attn_last_error(), "the plan"));
        assert_int_equal(attn_plan_fits(plan, c.b, c.h, c.hkv, c.n, c.m), ATTN_ERR_SHAPE);
        attn_plan_destroy(plan);
    }
    attn_plan *plan;
    attn_plan_shape shape = {1, 2, 10, 12, 4, 4};
    ok(attn_plan_from_rule(&plan, &shape, NULL));
    attn_dense_gradients to = {.bias = &c.bias};
    c.in.bias = &c.bias;
    assert_int_equal(attn_plan_backward(plan, &c.settings, &c.in, &c.o, &c.lse, &c.grad_o, &to, NULL), ATTN_ERR_UNSUPPORTED);
    attn_plan_destroy(plan);
    sparse_free(&c);
}

/* Every instruction set of this machine. */
static void instruction_sets(void **state)
{
    attn_isa best = attn_isa_current();
    for (int isa = 0; isa < (int)best; isa++) {
        if (attn_isa_available((attn_isa)isa)) {
            attn_isa_force((attn_isa)isa);
            random_blocks(state);
        }
    }
    attn_isa_force(best);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(random_blocks), cmocka_unit_test(bitmaps), cmocka_unit_test(everything_is_dense),
                                       cmocka_unit_test(errors), cmocka_unit_test(instruction_sets)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
