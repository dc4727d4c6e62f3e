/* Attention over lists of keys against plain loops. */
#include "sparse.h"
#include "kernel/dispatch.h"

static attn_plan *random_lists(const sparse_case *c, int64_t block_q, int64_t length)
{
    const int64_t heads[] = {1, c->hkv, c->h};
    attn_plan_shape shape = {below(2) ? 1 : c->b, heads[below(3)], c->n, c->m, block_q, 1};
    attn_tensor lists = attn_tensor_make(NULL, ATTN_I64, 4,
                                         (int64_t[]){shape.batch, shape.heads, (c->n + block_q - 1) / block_q, length});
    int64_t *data = lists.data = calloc((size_t)attn_tensor_count(&lists) + 1, sizeof *data);
    for (int64_t i = 0; i < attn_tensor_count(&lists); i++) {
        data[i] = below(4) == 0 ? -1 : below(c->m);
    }
    attn_plan *plan;
    attn_plan_rule causal = {1, 0, -1, -1};
    ok(attn_plan_from_lists(&plan, &shape, &lists, below(2) ? &causal : NULL));
    free(data);
    return plan;
}

static void random_gather(void **state)
{
    (void)state;
    for (int i = 0; i < 120; i++) {
        sparse_case c;
        attn_random_seed(&generator, (uint64_t)i);
        sparse_random(&c, i);
        attn_plan *plan = random_lists(&c, 1 + below(3) * below(100), below(180));
        sparse_check(&c, plan);
        attn_plan_destroy(plan);
        sparse_free(&c);
    }
}

/* One query, long lists: cut in parts and merged. */
static void decode(void **state)
{
    (void)state;
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
    for (int i = 0; i < 16; i++) {
        sparse_case c = {.b = 1 + i % 2, .h = 2 * (1 + i % 5), .hkv = 2, .n = 1, .m = 3000, .d = 32, .dv = 48, .dtype = types[i / 2 % 4]};
        attn_random_seed(&generator, 100 + (uint64_t)i);
        attn_dense_defaults(&c.settings);
        sparse_make(&c);
        c.in.sinks = i % 2 ? &c.sinks : NULL;
        attn_plan *plan = random_lists(&c, 1, 1700);
        sparse_check(&c, plan);
        attn_plan_destroy(plan);
        sparse_free(&c);
    }
}

static void instruction_sets(void **state)
{
    attn_isa best = attn_isa_current();
    for (int isa = 0; isa < (int)best; isa++) {
        if (attn_isa_available((attn_isa)isa)) {
            attn_isa_force((attn_isa)isa);
            random_gather(state);
        }
    }
    attn_isa_force(best);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(random_gather), cmocka_unit_test(decode), cmocka_unit_test(instruction_sets)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
