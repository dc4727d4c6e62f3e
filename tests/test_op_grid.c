/* Mechanisms on images: gradients against differences, threads, errors. */
#include "opcheck.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
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

static void agent(void **unused)
{
    (void)unused;
    opcheck_case pooled = {.spec = "agent:grid=[4,5],agent_grid=[3,2],shortcut=0.2", .seed = 6};
    opcheck_input(&pooled, "q", SHAPE(2, 4, 20, 5));
    opcheck_input(&pooled, "k", SHAPE(2, 2, 20, 5));
    opcheck_input(&pooled, "v", SHAPE(2, 2, 20, 6));
    opcheck_input(&pooled, "bias_an", SHAPE(1, 4, 6, 20));
    opcheck_input(&pooled, "bias_na", SHAPE(2, 4, 20, 6));
    opcheck_run(&pooled, 1e-2);
}

static void agent_layer_inputs(opcheck_case *c, int64_t tokens, int64_t rows, int64_t columns, int64_t keys_h, int64_t keys_w)
{
    opcheck_input(c, "x", SHAPE(2, tokens, 6));
    opcheck_uniform(c, "w_qkv", SHAPE(18, 6), -0.7, 0.7);
    opcheck_uniform(c, "w_proj", SHAPE(6, 6), -0.7, 0.7);
    opcheck_input(c, "b_proj", SHAPE(6));
    opcheck_input(c, "dwc_w", SHAPE(6, 3, 3));
    opcheck_input(c, "dwc_b", SHAPE(6));
    opcheck_input(c, "an_bias", SHAPE(2, 4, 3, 7));
    opcheck_input(c, "na_bias", SHAPE(2, 4, 3, 7));
    opcheck_input(c, "ah_bias", SHAPE(2, 4, keys_h));
    opcheck_input(c, "aw_bias", SHAPE(2, 4, keys_w));
    opcheck_input(c, "ha_bias", SHAPE(2, rows, 4));
    opcheck_input(c, "wa_bias", SHAPE(2, columns, 4));
}

static void agent_layer(void **unused)
{
    (void)unused;
    opcheck_case windows = {.spec = "agent.layer:heads=2,grid=[6,4],agent_grid=[2,2],window=[3,4]", .seed = 7};
    agent_layer_inputs(&windows, 24, 3, 4, 3, 4);
    opcheck_run(&windows, 1e-2);
    opcheck_case reduced = {.spec = "agent.layer:heads=2,grid=[5,7],agent_grid=[2,2],reduction=2", .seed = 8};
    agent_layer_inputs(&reduced, 35, 5, 7, 2, 3);
    opcheck_uniform(&reduced, "sr_w", SHAPE(6, 6, 2, 2), -0.5, 0.5);
    opcheck_input(&reduced, "sr_b", SHAPE(6));
    opcheck_input(&reduced, "ln_w", SHAPE(6));
    opcheck_input(&reduced, "ln_b", SHAPE(6));
    opcheck_run(&reduced, 2e-2);
}

static void agent_errors(void **unused)
{
    (void)unused;
    opcheck_case grid = {.spec = "agent"};
    opcheck_input(&grid, "q", SHAPE(1, 1, 6, 4));
    opcheck_input(&grid, "k", SHAPE(1, 1, 6, 4));
    opcheck_input(&grid, "v", SHAPE(1, 1, 6, 4));
    opcheck_fails(&grid, ATTN_ERR_ARGUMENT, "grid is needed to pool agents");
    opcheck_case shortcut = {.spec = "agent:shortcut=1"};
    opcheck_input(&shortcut, "q", SHAPE(1, 1, 6, 4));
    opcheck_input(&shortcut, "k", SHAPE(1, 1, 7, 4));
    opcheck_input(&shortcut, "v", SHAPE(1, 1, 7, 4));
    opcheck_input(&shortcut, "agents", SHAPE(1, 1, 2, 4));
    opcheck_fails(&shortcut, ATTN_ERR_SHAPE, "shortcut needs as many queries as keys");
    opcheck_case both = {.spec = "agent.layer:heads=2,grid=[4,4],agent_grid=[2,2],window=[2,2],cls=true"};
    agent_layer_inputs(&both, 17, 2, 2, 2, 2);
    opcheck_fails(&both, ATTN_ERR_ARGUMENT, "exclude one another");
    opcheck_case offsets = {.spec = "agent.merge:grid=[4,4],stride=[2,2]"};
    opcheck_input(&offsets, "x", SHAPE(1, 16, 3));
    opcheck_whole(&offsets, "offsets", SHAPE(2, 2), 4, 7);
    opcheck_fails(&offsets, ATTN_ERR_ARGUMENT, "expected 0 ... 3");
}

static void davit(void **unused)
{
    (void)unused;
    opcheck_case window = {.spec = "davit.window:grid=[8,5],window=3", .seed = 9};
    opcheck_input(&window, "q", SHAPE(1, 4, 40, 5));
    opcheck_input(&window, "k", SHAPE(1, 2, 40, 5));
    opcheck_input(&window, "v", SHAPE(1, 2, 40, 4));
    opcheck_input(&window, "pad_k", SHAPE(2, 5));
    opcheck_input(&window, "pad_v", SHAPE(2, 4));
    opcheck_run(&window, 1e-2);
    opcheck_case channel = {.spec = "davit.channel", .seed = 10};
    opcheck_uniform(&channel, "q", SHAPE(2, 2, 60, 7), -0.4, 0.4);
    opcheck_uniform(&channel, "k", SHAPE(2, 2, 60, 5), -0.4, 0.4);
    opcheck_input(&channel, "v", SHAPE(2, 2, 60, 5));
    opcheck_run(&channel, 1e-2);
}

static void davit_weights(opcheck_case *c, const char *prefix)
{
    static char names[2][16][16];
    static const char *const all[] = {"cpe1_w", "cpe1_b", "ln1_w", "ln1_b", "w_qkv", "b_qkv", "w_proj", "b_proj",
                                      "cpe2_w", "cpe2_b", "ln2_w", "ln2_b", "w_fc1", "b_fc1", "w_fc2", "b_fc2"};
    static const int64_t shapes[16][3] = {{6, 3, 3}, {6}, {6}, {6}, {18, 6}, {18}, {6, 6}, {6}, {6, 3, 3}, {6}, {6}, {6}, {9, 6}, {9}, {6, 9}, {6}};
    for (int i = 0; i < 16; i++) {
        char *name = names[prefix[0] == 'c'][i];
        snprintf(name, sizeof names[0][0], "%s%s", prefix, all[i]);
        opcheck_uniform(c, name, shapes[i][1] == 0 ? 1 : shapes[i][2] == 0 ? 2 : 3, shapes[i], -0.5, 0.5);
    }
}

static void davit_block(void **unused)
{
    (void)unused;
    opcheck_case c = {.spec = "davit.block:heads=2,grid=[4,5],window=3,cpe_act=true", .seed = 11, .step = 5e-3};
    opcheck_input(&c, "x", SHAPE(1, 20, 6));
    davit_weights(&c, "s_");
    davit_weights(&c, "c_");
    opcheck_run(&c, 3e-2);
    opcheck_case embed = {.spec = "davit.embed:grid=[5,7],stride=2,pad=1", .seed = 12};
    opcheck_input(&embed, "x", SHAPE(2, 35, 3));
    opcheck_input(&embed, "w", SHAPE(4, 3, 3, 2));
    opcheck_input(&embed, "b", SHAPE(4));
    opcheck_input(&embed, "ln_w", SHAPE(3));
    opcheck_input(&embed, "ln_b", SHAPE(3));
    opcheck_run(&embed, 1e-2);
}

static void davit_errors(void **unused)
{
    (void)unused;
    opcheck_case heads = {.spec = "davit.channel_layer:heads=4"};
    opcheck_input(&heads, "x", SHAPE(1, 4, 6));
    opcheck_input(&heads, "w_qkv", SHAPE(18, 6));
    opcheck_input(&heads, "w_proj", SHAPE(6, 6));
    opcheck_input(&heads, "b_proj", SHAPE(6));
    opcheck_fails(&heads, ATTN_ERR_ARGUMENT, "heads = 4 does not divide C = 6");
    opcheck_case window = {.spec = "davit.window:grid=[2,2],window=0"};
    opcheck_fails(&window, ATTN_ERR_ARGUMENT, "window");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(halo), cmocka_unit_test(halo_big_window), cmocka_unit_test(halo_layer),
                                       cmocka_unit_test(halo_errors),     cmocka_unit_test(agent),
                                       cmocka_unit_test(agent_layer),     cmocka_unit_test(agent_errors),
                                       cmocka_unit_test(davit),           cmocka_unit_test(davit_block),     cmocka_unit_test(davit_errors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
