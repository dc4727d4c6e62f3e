/* Mechanisms on linear attention: gradients against differences, threads. */
#include "opcheck.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

static void lightning(void **unused)
{
    (void)unused;
    opcheck_case c = {.spec = "lightning:scale=0.5,block=16", .seed = 3};
    opcheck_input(&c, "q", 4, (int64_t[]){2, 4, 45, 7});
    opcheck_input(&c, "k", 4, (int64_t[]){2, 2, 45, 7});
    opcheck_input(&c, "v", 4, (int64_t[]){2, 2, 45, 5});
    opcheck_uniform(&c, "slope", 1, (int64_t[]){4}, 0.0, 0.5);
    opcheck_input(&c, "kv_state", 4, (int64_t[]){2, 4, 7, 5});
    opcheck_run(&c, 1e-2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(lightning)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
