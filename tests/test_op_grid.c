/* Mechanisms on images: gradients against differences, threads, errors. */
#include "opcheck.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#define SHAPE(...) (int)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void halo(void **unused)
{
    (void)unused;
    opcheck_case c = {.spec = "halo:grid=[11,7],block=[4,2],halo=[1,3],query_stride=[2,1],scale_pos=true", .seed = 3};
    opcheck_input(&c, "q", SHAPE(2, 4, 42, 6));
    opcheck_input(&c, "k", SHAPE(2, 2, 77, 6));
    opcheck_input(&c, "v", SHAPE(2, 2, 77, 5));
    opcheck_input(&c, "rel_h", SHAPE(11, 6));
    opcheck_input(&c, "rel_w", SHAPE(15, 6));
    opcheck_run(&c, 1e-2);
}

/* A window of several steps of the online softmax. */
static void halo_big_window(void **unused)
{
    (void)unused;
    opcheck_case c = {.spec = "halo:grid=[30,34],block=[15,17],halo=[9,6],padding=mask", .seed = 5};
    opcheck_input(&c, "q", SHAPE(1, 2, 1020, 5));
    opcheck_input(&c, "k", SHAPE(1, 2, 1020, 5));
    opcheck_input(&c, "v", SHAPE(1, 2, 1020, 3));
    opcheck_run(&c, 2e-2);
}

static void halo_layer(void **unused)
{
    (void)unused;
    opcheck_case c = {.spec = "halo.layer:heads=2,grid=[7,6],block=[2,4],halo=1,query_stride=2,down=pool", .seed = 4};
    opcheck_input(&c, "x", SHAPE(2, 42, 5));
    opcheck_input(&c, "w_q", SHAPE(6, 5));
    opcheck_input(&c, "w_k", SHAPE(6, 5));
    opcheck_input(&c, "w_v", SHAPE(8, 5));
    opcheck_input(&c, "b_k", SHAPE(6));
    opcheck_input(&c, "rel_h", SHAPE(7, 3));
    opcheck_input(&c, "rel_w", SHAPE(11, 3));
    opcheck_input(&c, "w_o", SHAPE(4, 8));
    opcheck_input(&c, "b_o", SHAPE(4));
    opcheck_run(&c, 1e-2);
}

static void halo_errors(void **unused)
{
    (void)unused;
    opcheck_case stride = {.spec = "halo:grid=[4,4],block=3,halo=1,query_stride=2"};
    opcheck_input(&stride, "q", SHAPE(1, 1, 4, 3));
    opcheck_input(&stride, "k", SHAPE(1, 1, 16, 3));
    opcheck_input(&stride, "v", SHAPE(1, 1, 16, 3));
    opcheck_fails(&stride, ATTN_ERR_ARGUMENT, "block = 3 rows is not a multiple of query_stride = 2");
    opcheck_case zero = {.spec = "halo:grid=[4,4],block=0,halo=1"};
    opcheck_fails(&zero, ATTN_ERR_ARGUMENT, "block");
    opcheck_case padding = {.spec = "halo:grid=[4,4],block=2,halo=1,padding=reflect"};
    opcheck_fails(&padding, ATTN_ERR_ARGUMENT, "zero");
    opcheck_case one = {.spec = "halo:grid=[4,4],block=2,halo=1"};
    opcheck_input(&one, "q", SHAPE(1, 1, 16, 3));
    opcheck_input(&one, "k", SHAPE(1, 1, 16, 3));
    opcheck_input(&one, "v", SHAPE(1, 1, 16, 3));
    opcheck_input(&one, "rel_h", SHAPE(7, 3));
    opcheck_fails(&one, ATTN_ERR_ARGUMENT, "rel_w is missing");
    opcheck_case rows = {.spec = "halo:grid=[4,4],block=2,halo=1"};
    opcheck_input(&rows, "q", SHAPE(1, 1, 16, 3));
    opcheck_input(&rows, "k", SHAPE(1, 1, 16, 3));
    opcheck_input(&rows, "v", SHAPE(1, 1, 16, 3));
    opcheck_input(&rows, "rel_h", SHAPE(7, 3));
    opcheck_input(&rows, "rel_w", SHAPE(6, 3));
    opcheck_fails(&rows, ATTN_ERR_SHAPE, "rel_w is [6, 3], expected [7, 3]");
    opcheck_case grid = {.spec = "halo:grid=[4,5],block=2,halo=1"};
    opcheck_input(&grid, "q", SHAPE(1, 1, 20, 3));
    opcheck_input(&grid, "k", SHAPE(1, 1, 16, 3));
    opcheck_input(&grid, "v", SHAPE(1, 1, 16, 3));
    opcheck_fails(&grid, ATTN_ERR_SHAPE, "does not hold the 16 keys");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(halo), cmocka_unit_test(halo_big_window), cmocka_unit_test(halo_layer),
                                       cmocka_unit_test(halo_errors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
