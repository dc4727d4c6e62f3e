/* Mechanisms on images: gradients against differences, threads, errors. */
#include "opcheck.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <cmocka.h>

#define SHAPE(...) (int)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

/* A SPEC that the inputs do not fit. */
typedef struct wrong {
    const char *spec;
    attn_status status;
    const char *words;
} wrong;

/* Each SPEC must fail with what `add` gives it as inputs. */
static void all_fail(const wrong *cases, size_t count, void (*add)(opcheck_case *c))
{
    for (size_t i = 0; i < count; i++) {
        opcheck_case c = {.spec = cases[i].spec};
        add(&c);
        opcheck_fails(&c, cases[i].status, cases[i].words);
    }
}
#define ALL_FAIL(cases, add) all_fail(cases, sizeof(cases) / sizeof((cases)[0]), add)

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
    opcheck_case wraps = {.spec = "halo:grid=[4503599627370497,4096],block=2,halo=1"}; /* an overflow that gives 4096 */
    opcheck_fails(&wraps, ATTN_ERR_ARGUMENT, "grid");
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

static void core_inputs(opcheck_case *c)
{
    opcheck_input(c, "q", SHAPE(1, 1, 6, 4000));
    opcheck_input(c, "k", SHAPE(1, 1, 6, 4000));
    opcheck_input(c, "v", SHAPE(1, 1, 6, 4));
}

static void layer_inputs(opcheck_case *c)
{
    agent_layer_inputs(c, 16, 4, 4, 4, 4);
}

static void merge_inputs(opcheck_case *c)
{
    opcheck_input(c, "x", SHAPE(1, 16, 3));
    opcheck_input(c, "y", SHAPE(1, 11, 3));
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
    opcheck_case contrary = {.spec = "agent:agent_grid=[1,3]"};
    opcheck_input(&contrary, "q", SHAPE(1, 1, 6, 4));
    opcheck_input(&contrary, "k", SHAPE(1, 1, 7, 4));
    opcheck_input(&contrary, "v", SHAPE(1, 1, 7, 4));
    opcheck_input(&contrary, "agents", SHAPE(1, 1, 2, 4));
    opcheck_fails(&contrary, ATTN_ERR_SHAPE, "agent_grid = [1, 3] does not hold the 2 agents");
    opcheck_case both = {.spec = "agent.layer:heads=2,grid=[4,4],agent_grid=[2,2],window=[2,2],cls=true"};
    agent_layer_inputs(&both, 17, 2, 2, 2, 2);
    opcheck_fails(&both, ATTN_ERR_ARGUMENT, "exclude one another");
    opcheck_case offsets = {.spec = "agent.merge:grid=[4,4],stride=[2,2]"};
    opcheck_input(&offsets, "x", SHAPE(1, 16, 3));
    opcheck_whole(&offsets, "offsets", SHAPE(2, 2), 4, 7);
    opcheck_fails(&offsets, ATTN_ERR_ARGUMENT, "expected 0 ... 3");
    static const wrong cores[] = {
        {"agent:grid=[2,3]", ATTN_ERR_ARGUMENT, "agent_grid is needed"},
        {"agent:grid=[2,4],agent_grid=[1,2]", ATTN_ERR_SHAPE, "does not hold the 6 queries"},
        {"agent:grid=[2,3],agent_grid=[0,2]", ATTN_ERR_ARGUMENT, "agent_grid"},
        {"agent:grid=[2,3],agent_grid=[4503599627370497,4096]", ATTN_ERR_ARGUMENT, "agent_grid"}, /* an overflow that gives 4096 */
        {"agent:grid=[2,3],agent_grid=[1048576,1048576]", ATTN_ERR_SHAPE, "elements"},
    };
    ALL_FAIL(cores, core_inputs);
    static const wrong layers[] = {
        {"agent.layer:heads=4,grid=[4,4],agent_grid=[2,2]", ATTN_ERR_ARGUMENT, "heads = 4 does not divide C = 6"},
        {"agent.layer:heads=2,grid=[4,5],agent_grid=[2,2]", ATTN_ERR_SHAPE, "does not hold the 16 tokens"},
        {"agent.layer:heads=2,grid=[4,4],agent_grid=[2,3]", ATTN_ERR_SHAPE, "expected 2 and 6"},
        {"agent.layer:heads=2,grid=[4,4],agent_grid=[2,2],window=[4,3]", ATTN_ERR_ARGUMENT, "does not divide grid"},
        {"agent.layer:heads=2,grid=[4,4],agent_grid=[2,2],reduction=2", ATTN_ERR_ARGUMENT, "go with reduction above 1"},
        {"agent.layer:heads=2,grid=[4,4],agent_grid=[2,2],reduction=5", ATTN_ERR_ARGUMENT, "exceeds the grid"},
    };
    ALL_FAIL(layers, layer_inputs);
    static const wrong merges[] = {
        {"agent.merge:grid=[4,5]", ATTN_ERR_SHAPE, "does not hold the 16 tokens"},
        {"agent.merge:grid=[4,4],stride=[5,1]", ATTN_ERR_ARGUMENT, "there is no region"},
        {"agent.merge:grid=[4,4],ratio=1", ATTN_ERR_ARGUMENT, "ratio"},
        {"agent.merge:grid=[4,4],ratio=0.25", ATTN_ERR_SHAPE, "expected the 12 that are left"},
    };
    ALL_FAIL(merges, merge_inputs);
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
    opcheck_case wide = {.spec = "davit.window:grid=[3,4],window=1048576", .seed = 13}; /* padding without bound in time or memory */
    opcheck_input(&wide, "q", SHAPE(1, 1, 12, 5));
    opcheck_input(&wide, "k", SHAPE(1, 1, 12, 5));
    opcheck_input(&wide, "v", SHAPE(1, 1, 12, 4));
    float *key = opcheck_input(&wide, "pad_k", SHAPE(1, 5));
    opcheck_input(&wide, "pad_v", SHAPE(1, 4));
    for (int i = 0; i < 5; i++) {
        key[i] *= 4; /* so that for some queries the image still counts */
    }
    opcheck_run(&wide, 1e-2);
    for (int heads = 0; heads < 3; heads += 2) { /* no heads, no batch */
        opcheck_case none = {.spec = "davit.window:grid=[2,2],window=2"};
        opcheck_input(&none, "q", SHAPE(heads == 0, heads, 4, 5));
        opcheck_input(&none, "k", SHAPE(heads == 0, heads, 4, 5));
        opcheck_input(&none, "v", SHAPE(heads == 0, heads, 4, 5));
        opcheck_run(&none, 1e-2);
    }
    opcheck_case channel = {.spec = "davit.channel", .seed = 10};
    opcheck_uniform(&channel, "q", SHAPE(2, 2, 60, 7), -0.4, 0.4);
    opcheck_uniform(&channel, "k", SHAPE(2, 2, 60, 5), -0.4, 0.4);
    opcheck_input(&channel, "v", SHAPE(2, 2, 60, 5));
    opcheck_run(&channel, 1e-2);
}

/* Two images, which pass in bands, against calls on parts of each that end with a row of windows. */
static void davit_layer_in_bands(void **unused)
{
    (void)unused;
    enum { HIGH = 45, WIDE = 60, PART = 21, C = 4, IMAGE = HIGH * WIDE * C };
    static float whole[2 * IMAGE], parts[2 * IMAGE];
    opcheck_case c = {.spec = "davit.window_layer:heads=2,grid=[45,60]", .seed = 31};
    float *x = opcheck_input(&c, "x", SHAPE(2, HIGH * WIDE, C));
    opcheck_input(&c, "w_qkv", SHAPE(3 * C, C));
    opcheck_input(&c, "w_proj", SHAPE(C, C));
    opcheck_input(&c, "b_proj", SHAPE(C));
    opcheck_input(&c, "b_qkv", SHAPE(3 * C));
    for (int call = 0; call < 7; call++) {
        int first = (call - 1) % 3 * PART, high = call == 0 || HIGH - first < PART ? HIGH - (call == 0 ? 0 : first) : PART;
        int at = call == 0 ? 0 : (call - 1) / 3 * IMAGE + first * WIDE * C;
        char spec[64];
        attn_op *op;
        snprintf(spec, sizeof spec, "davit.window_layer:heads=2,grid=[%d,60]", high);
        attn_named_tensor in[] = {{"x", attn_tensor_make(x + at, ATTN_F32, SHAPE(call == 0 ? 2 : 1, high * WIDE, C))}, c.in[1], c.in[2], c.in[3], c.in[4]};
        attn_named_tensor out = {"o", attn_tensor_make((call == 0 ? whole : parts) + at, ATTN_F32, in[0].tensor.ndim, in[0].tensor.shape)};
        assert_int_equal(attn_op_create(&op, spec), ATTN_OK);
        assert_int_equal(attn_op_forward(op, in, 5, &out, 1, NULL), ATTN_OK);
        attn_op_destroy(op);
    }
    for (int i = 0; i < 2 * IMAGE; i++) {
        if (!(fabsf(whole[i] - parts[i]) <= 1e-5f * (1 + fabsf(parts[i])))) {
            fail_msg("pixel %d: %g at once, %g in parts", i / C, (double)whole[i], (double)parts[i]);
        }
    }
    opcheck_run(&c, 0);
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

static void window_inputs(opcheck_case *c)
{
    opcheck_input(c, "q", SHAPE(1, 1, 4, 3));
    opcheck_input(c, "k", SHAPE(1, 1, 4, 3));
    opcheck_input(c, "v", SHAPE(1, 1, 4, 3));
}

static void embed_inputs(opcheck_case *c)
{
    opcheck_input(c, "x", SHAPE(1, 4, 3));
    opcheck_input(c, "w", SHAPE(5, 3, 3, 3));
    opcheck_input(c, "b", SHAPE(5));
    opcheck_input(c, "ln_w", SHAPE(3));
    opcheck_input(c, "ln_b", SHAPE(3));
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
    static const wrong windows[] = {
        {"davit.window", ATTN_ERR_ARGUMENT, "grid is required"},
        {"davit.window:grid=[2,3]", ATTN_ERR_SHAPE, "does not hold the 4 tokens"},
        {"davit.window:grid=[2,2],window=0", ATTN_ERR_ARGUMENT, "window"},
        {"davit.window:grid=[2,2],window=[1,2,3]", ATTN_ERR_ARGUMENT, "window"},
        {"davit.window:grid=[2,2],padding=wrap", ATTN_ERR_ARGUMENT, "expected zero|mask"},
    };
    ALL_FAIL(windows, window_inputs);
    static const wrong embeds[] = {
        {"davit.embed:grid=[2,3]", ATTN_ERR_SHAPE, "does not hold the 4 tokens"},
        {"davit.embed:grid=[2,2],stride=1", ATTN_ERR_SHAPE, "w has a kernel of 3, expected 1 ... 2"},
        {"davit.embed:grid=[2,2],pad=1,norm=last", ATTN_ERR_SHAPE, "ln_w has 3 numbers, expected 5"},
        {"davit.embed:grid=[2,2],pad=-1", ATTN_ERR_ARGUMENT, "pad"},
    };
    ALL_FAIL(embeds, embed_inputs);
    opcheck_case half = {.spec = "davit.channel_block:heads=2,grid=[2,2]"};
    opcheck_input(&half, "x", SHAPE(1, 4, 6));
    davit_weights(&half, "");
    half.in_count--; /* without b_fc2 */
    free(half.in[half.in_count].tensor.data);
    opcheck_fails(&half, ATTN_ERR_ARGUMENT, "5 of the feed-forward part's six inputs");
    opcheck_case dual = {.spec = "davit.block:heads=2,grid=[2,2]"};
    opcheck_input(&dual, "x", SHAPE(1, 4, 6));
    davit_weights(&dual, "s_");
    davit_weights(&dual, "c_");
    free(dual.in[--dual.in_count].tensor.data);
    opcheck_fails(&dual, ATTN_ERR_ARGUMENT, "all or none: c_ln2_w");
    opcheck_case empty = {.spec = "davit.channel_layer:heads=2"};
    opcheck_input(&empty, "x", SHAPE(1, 0, 6));
    opcheck_input(&empty, "w_qkv", SHAPE(18, 6));
    opcheck_input(&empty, "w_proj", SHAPE(6, 6));
    opcheck_input(&empty, "b_proj", SHAPE(6));
    opcheck_fails(&empty, ATTN_ERR_SHAPE, "N = 0 tokens");
}

static void neighborhood(void **unused)
{
    (void)unused;
    opcheck_case line = {.spec = "neighborhood:grid=[45],kernel=7,dilation=2,stride=3", .seed = 13};
    opcheck_input(&line, "q", SHAPE(1, 4, 45, 5));
    opcheck_input(&line, "k", SHAPE(1, 2, 45, 5));
    opcheck_input(&line, "v", SHAPE(1, 2, 45, 6));
    opcheck_input(&line, "rpb", SHAPE(4, 13));
    opcheck_run(&line, 1e-2);
    opcheck_case space = {.spec = "neighborhood:grid=[4,5,6],kernel=[3,2,4],causal=[true,false,false]", .seed = 14};
    opcheck_input(&space, "q", SHAPE(2, 2, 120, 5));
    opcheck_input(&space, "k", SHAPE(2, 1, 120, 5));
    opcheck_input(&space, "v", SHAPE(2, 1, 120, 3));
    opcheck_input(&space, "extra_k", SHAPE(2, 1, 3, 5));
    opcheck_input(&space, "extra_v", SHAPE(2, 1, 3, 3));
    opcheck_run(&space, 1e-2);
    opcheck_case scores = {.spec = "neighborhood.qk:grid=[7,6],kernel=[4,3],stride=2", .seed = 15};
    opcheck_input(&scores, "q", SHAPE(1, 2, 42, 5));
    opcheck_input(&scores, "k", SHAPE(1, 1, 42, 5));
    opcheck_input(&scores, "rpb", SHAPE(2, 7, 5));
    opcheck_run(&scores, 1e-2);
    opcheck_case values = {.spec = "neighborhood.av:grid=[7,6],kernel=[4,3]", .seed = 16};
    opcheck_input(&values, "w", SHAPE(1, 2, 42, 12));
    opcheck_input(&values, "v", SHAPE(1, 1, 42, 5));
    opcheck_run(&values, 1e-2);
    opcheck_case decode = {.spec = "neighborhood:grid=[9,6],kernel=3,causal=[true,false],dilation=[2,1],decode=true", .seed = 17};
    opcheck_input(&decode, "q", SHAPE(1, 2, 54, 5));
    opcheck_input(&decode, "k", SHAPE(1, 2, 54, 5));
    opcheck_input(&decode, "v", SHAPE(1, 2, 54, 5));
    opcheck_run(&decode, 0);
}

/* The published bounds of the second paper. */
static void neighborhood_simulation(void **unused)
{
    (void)unused;
    static const struct {
        const char *spec;
        double speedup;
        int block_sparse;
    } cases[] = {
        {"neighborhood.simulate:grid=[32768],kernel=2048,q_tile=[256],kv_tile=[128]", 14.32, 0},
        {"neighborhood.simulate:grid=[32768],kernel=2048,q_tile=[256],kv_tile=[128],stride=256", 16.0, 1},
        {"neighborhood.simulate:grid=[256,256],kernel=80,q_tile=[16,16],kv_tile=[16,8]", 7.06, 0},
        {"neighborhood.simulate:grid=[256,256],kernel=80,q_tile=[16,16],kv_tile=[16,8],stride=16", 10.24, 1},
        {"neighborhood.simulate:grid=[30,48,80],kernel=[18,24,24],q_tile=[4,8,8],kv_tile=[2,8,8]", 4.92, 0},
        {"neighborhood.simulate:grid=[30,48,80],kernel=[18,24,24],q_tile=[4,8,8],kv_tile=[2,8,8],stride=[16,8,8]", 10.42, 1},
        {"neighborhood.simulate:grid=[64,64],kernel=24,q_tile=[8,8],kv_tile=[8,8]", 3.54, 0},
        {"neighborhood.simulate:grid=[64,64],kernel=24,q_tile=[8,8],kv_tile=[8,8],stride=8", 7.11, 1},
        {"neighborhood.simulate:grid=[64,64],kernel=24,q_tile=[8,8],kv_tile=[8,8],tiling=single", 2.67, 0},
        {"neighborhood.simulate:grid=[16,32,32],kernel=12,q_tile=[4,4,4],kv_tile=[4,4,4]", 4.05, 0},
        {"neighborhood.simulate:grid=[16,32,32],kernel=12,q_tile=[4,4,4],kv_tile=[4,4,4],stride=4", 9.48, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        attn_op *op;
        float speedup;
        uint8_t sparse;
        assert_int_equal(attn_op_create(&op, cases[i].spec), ATTN_OK);
        attn_named_tensor out[] = {{"speedup", attn_tensor_make(&speedup, ATTN_F32, 1, (int64_t[]){1})},
                                   {"block_sparse", attn_tensor_make(&sparse, ATTN_BOOL, 1, (int64_t[]){1})}};
        assert_int_equal(attn_op_forward(op, NULL, 0, out, 2, NULL), ATTN_OK);
        attn_op_destroy(op);
        if ((double)speedup < cases[i].speedup - 0.006 || (double)speedup > cases[i].speedup + 0.006 || sparse != cases[i].block_sparse) {
            fail_msg("%s: speed-up %.3f, block-sparse %d, expected %.2f, %d", cases[i].spec, (double)speedup, sparse, cases[i].speedup,
                     cases[i].block_sparse);
        }
    }
}

static void neighborhood_errors(void **unused)
{
    (void)unused;
    static const char *const specs[][2] = {
        {"neighborhood.mask:grid=[8,8],kernel=[3,5],dilation=[1,2]", "exceeds the grid's 8 positions on axis 1"},
        {"neighborhood.mask:grid=[8],kernel=3,stride=4", "stride = 4, expected at most kernel = 3"},
        {"neighborhood.mask:grid=[8],kernel=0", "kernel"},
        {"neighborhood.mask:grid=[8,8],kernel=[3,3,3]", "kernel has 3 items, expected one, or 2"},
        {"neighborhood.mask:grid=[2,2,2,2],kernel=1", "grid"},
        {"neighborhood.simulate:grid=[8],kernel=3,q_tile=[0],kv_tile=[2]", "q_tile"},
    };
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        opcheck_case c = {.spec = specs[i][0]};
        opcheck_fails(&c, ATTN_ERR_ARGUMENT, specs[i][1]);
    }
    opcheck_case decode = {.spec = "neighborhood:grid=[8],kernel=3,decode=true"};
    opcheck_input(&decode, "q", SHAPE(1, 1, 8, 4));
    opcheck_input(&decode, "k", SHAPE(1, 1, 8, 4));
    opcheck_input(&decode, "v", SHAPE(1, 1, 8, 4));
    opcheck_fails(&decode, ATTN_ERR_ARGUMENT, "decode needs causal = true");
    opcheck_case tokens = {.spec = "neighborhood:grid=[9],kernel=3"};
    opcheck_input(&tokens, "q", SHAPE(1, 1, 8, 4));
    opcheck_input(&tokens, "k", SHAPE(1, 1, 8, 4));
    opcheck_input(&tokens, "v", SHAPE(1, 1, 8, 4));
    opcheck_fails(&tokens, ATTN_ERR_SHAPE, "grid holds 9 tokens, the tensors have 8");
    opcheck_case causal = {.spec = "neighborhood.qk:grid=[8],kernel=3,causal=true"};
    opcheck_input(&causal, "q", SHAPE(1, 1, 8, 4));
    opcheck_input(&causal, "k", SHAPE(1, 1, 8, 4));
    opcheck_fails(&causal, ATTN_ERR_ARGUMENT, "windows of varying size have no slots");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(halo), cmocka_unit_test(halo_big_window), cmocka_unit_test(halo_layer),
                                       cmocka_unit_test(halo_errors),     cmocka_unit_test(agent),
                                       cmocka_unit_test(agent_layer),     cmocka_unit_test(agent_errors),
                                       cmocka_unit_test(davit),           cmocka_unit_test(davit_layer_in_bands),
                                       cmocka_unit_test(davit_block),     cmocka_unit_test(davit_errors),
                                       cmocka_unit_test(neighborhood),    cmocka_unit_test(neighborhood_simulation),
                                       cmocka_unit_test(neighborhood_errors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
