#include "core/internal.h"
#include "core/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static void test_arena_grows_and_merges(void **state)
{
    (void)state;
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 100), ATTN_OK);
    char *first = attn_arena_alloc(arena, 60);
    memset(first, 7, 60);
    attn_arena_mark mark = attn_arena_get_mark(arena);
    char *second = attn_arena_alloc(arena, 100000);
    assert_non_null(second);
    assert_int_equal((uintptr_t)second % 64, 0);
    memset(second, 8, 100000);
    assert_int_equal(first[59], 7);
    attn_arena_release(arena, mark);
    assert_non_null(attn_arena_alloc(arena, 100000));
    attn_arena_reset(arena);
    size_t capacity = attn_arena_capacity(arena);
    assert_non_null(attn_arena_alloc(arena, 60));
    assert_non_null(attn_arena_alloc(arena, 100000));
    assert_int_equal(attn_arena_capacity(arena), capacity);
    assert_null(attn_arena_array(arena, SIZE_MAX / 2, 3));
    attn_arena_destroy(arena);
}

/* A call inside a call, both with nothing allocated before them, on an arena that has to grow. */
static void test_nested_calls_share_an_arena(void **state)
{
    (void)state;
    attn_arena *arena;
    attn_scratch outer, inner;
    assert_int_equal(attn_arena_create(&arena, 100), ATTN_OK);
    attn_exec exec = {.arena = arena};
    for (size_t bytes = 1000; bytes < 100000; bytes *= 10) {
        assert_int_equal(attn_scratch_begin(&outer, &exec), ATTN_OK);
        assert_int_equal(attn_scratch_begin(&inner, &exec), ATTN_OK);
        assert_non_null(attn_arena_alloc(arena, bytes));
        assert_non_null(attn_arena_alloc(arena, 2 * bytes));
        attn_scratch_end(&inner);
        char *after = attn_arena_alloc(arena, bytes);
        memset(after, 1, bytes);
        attn_scratch_end(&outer);
    }
    size_t capacity = attn_arena_capacity(arena);
    assert_non_null(attn_arena_alloc(arena, 10000));
    assert_int_equal(attn_arena_capacity(arena), capacity);
    attn_arena_destroy(arena);
}

static void test_message_may_quote_itself(void **state)
{
    (void)state;
    attn_fail(ATTN_ERR_SHAPE, "inner");
    assert_int_equal(attn_fail(ATTN_ERR_IO, "outer: %s", attn_last_error()), ATTN_ERR_IO);
    assert_string_equal(attn_last_error(), "outer: inner");
    assert_string_equal(attn_status_name(ATTN_ERR_IO), "io");
}

static void test_random_is_reproducible(void **state)
{
    (void)state;
    attn_random a, b;
    attn_random_seed(&a, 42);
    attn_random_seed(&b, 42);
    double sum = 0, squares = 0;
    for (int i = 0; i < 20000; i++) {
        double x = attn_random_normal(&a);
        assert_true(x == attn_random_normal(&b));
        sum += x;
        squares += x * x;
        assert_true(attn_random_below(&a, 3) < 3);
        attn_random_below(&b, 3);
    }
    assert_true(sum / 20000 > -0.05 && sum / 20000 < 0.05);
    assert_true(squares / 20000 > 0.95 && squares / 20000 < 1.05);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_arena_grows_and_merges),
        cmocka_unit_test(test_nested_calls_share_an_arena),
        cmocka_unit_test(test_message_may_quote_itself),
        cmocka_unit_test(test_random_is_reproducible),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
