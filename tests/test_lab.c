/* Every experiment in its small form: what does not depend on speed must hold, and what does must have been measured. */
#include <attn/lab.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

typedef struct report {
    char text[20000];
    size_t length;
} report;

static void collect(void *user, const char *line)
{
    report *r = user;
    int more = snprintf(r->text + r->length, sizeof r->text - r->length, "  %s\n", line);
    r->length += r->length + (size_t)more < sizeof r->text ? (size_t)more : 0;
}

static void test_experiments(void **state)
{
    (void)state;
    assert_true(attn_lab_count() > 0);
    assert_null(attn_lab_at(attn_lab_count()));
    for (int i = 0; i < attn_lab_count(); i++) {
        static report r;
        r.length = 0;
        attn_lab_settings settings = {.small = 1, .threads = 1, .print = collect, .user = &r};
        attn_lab_result result;
        if (attn_lab_run(attn_lab_at(i)->name, &settings, &result) != ATTN_OK) {
            fail_msg("%s: %s", attn_lab_at(i)->name, attn_last_error());
        }
        if (result.claims == 0 || result.held != result.claims || strstr(r.text, "nan") != NULL) {
            fail_msg("%s: %d of %d claims hold:\n%s", attn_lab_at(i)->name, result.held, result.claims, r.text);
        }
    }
}

static void test_unknown(void **state)
{
    (void)state;
    attn_lab_result result;
    assert_int_equal(attn_lab_run("nothing", NULL, &result), ATTN_ERR_ARGUMENT);
    assert_non_null(strstr(attn_last_error(), "there is no experiment 'nothing', expected one of agent, bam, based"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_experiments), cmocka_unit_test(test_unknown)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
