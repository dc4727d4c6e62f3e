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

#define SHAPE(...) (int)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void tnl_weights(opcheck_case *c)
{
    opcheck_uniform(c, "w_qkvu", SHAPE(32, 6), -0.6, 0.6);
    opcheck_uniform(c, "w_o", SHAPE(6, 8), -0.6, 0.6);
    opcheck_uniform(c, "w_1", SHAPE(7, 6), -0.6, 0.6);
    opcheck_uniform(c, "w_2", SHAPE(7, 6), -0.6, 0.6);
    opcheck_uniform(c, "w_3", SHAPE(6, 7), -0.6, 0.6);
}

static void tnl(void **unused)
{
    (void)unused;
    opcheck_case c = {.spec = "tnl:heads=2,eps=1e-3,offset=2", .seed = 3, .step = 2e-3};
    opcheck_input(&c, "x", SHAPE(2, 13, 6));
    tnl_weights(&c);
    opcheck_uniform(&c, "theta", SHAPE(2, 4), 0.0, 1.0);
    opcheck_bool(&c, "mask", SHAPE(2, 13), 0.8);
    opcheck_input(&c, "kv_state", SHAPE(2, 2, 8, 4));
    opcheck_run(&c, 2e-2);
    opcheck_case decode = {.spec = "tnl.decode:heads=2,act=elu1", .seed = 4};
    opcheck_input(&decode, "x", SHAPE(2, 9, 6));
    tnl_weights(&decode);
    opcheck_run(&decode, 0);
}

static void tnl_errors(void **unused)
{
    (void)unused;
    opcheck_case heads = {.spec = "tnl:heads=3"};
    opcheck_input(&heads, "x", SHAPE(1, 4, 6));
    tnl_weights(&heads);
    opcheck_fails(&heads, ATTN_ERR_ARGUMENT, "heads = 3 does not divide E = 8");
    opcheck_case theta = {.spec = "tnl:heads=2"};
    opcheck_input(&theta, "x", SHAPE(1, 4, 6));
    tnl_weights(&theta);
    opcheck_uniform(&theta, "theta", SHAPE(2, 3), 0.0, 1.0);
    opcheck_fails(&theta, ATTN_ERR_SHAPE, "theta is [2, 3], expected [heads, E/heads] = [2, 4]");
    opcheck_case act = {.spec = "tnl:heads=2,act=relu"};
    opcheck_fails(&act, ATTN_ERR_ARGUMENT, "elu1");
    opcheck_case model = {.spec = "tnl.model:heads=2,lrpe_layers=[]"};
    opcheck_whole(&model, "tokens", SHAPE(1, 4), 0, 12);
    opcheck_input(&model, "embed", SHAPE(5, 6));
    opcheck_input(&model, "w_qkvu", SHAPE(1, 32, 6));
    opcheck_input(&model, "w_o", SHAPE(1, 6, 8));
    opcheck_input(&model, "w_1", SHAPE(1, 7, 6));
    opcheck_input(&model, "w_2", SHAPE(1, 7, 6));
    opcheck_input(&model, "w_3", SHAPE(1, 6, 7));
    opcheck_fails(&model, ATTN_ERR_ARGUMENT, "expected 0 ... 4");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(lightning), cmocka_unit_test(tnl), cmocka_unit_test(tnl_errors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
