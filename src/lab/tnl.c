/* TransNormer: a whole layer at constant speed, generation that does not depend on the prompt, left padding. */
#include "lab/speed.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { WIDTH = 256, HEADS = 4, HIDDEN = 704, INPUTS = 6, MOST_SIZES = 8 };

static void make_layer(lab *l, attn_named_tensor in[INPUTS])
{
    in[0] = (attn_named_tensor){.name = "x"};
    in[1] = (attn_named_tensor){"w_qkvu", attn_lab_normal(l, 0.04, LAB_SHAPE(4 * WIDTH, WIDTH))};
    in[2] = (attn_named_tensor){"w_o", attn_lab_normal(l, 0.04, LAB_SHAPE(WIDTH, WIDTH))};
    in[3] = (attn_named_tensor){"w_1", attn_lab_normal(l, 0.04, LAB_SHAPE(HIDDEN, WIDTH))};
    in[4] = (attn_named_tensor){"w_2", attn_lab_normal(l, 0.04, LAB_SHAPE(HIDDEN, WIDTH))};
    in[5] = (attn_named_tensor){"w_3", attn_lab_normal(l, 0.04, LAB_SHAPE(WIDTH, HIDDEN))};
}

static void constant_speed(lab *l, int backward)
{
    int64_t most = attn_lab_small(l) ? 2048 : 32768;
    double each[MOST_SIZES];
    int count = 0;
    attn_named_tensor in[INPUTS + 1];
    make_layer(l, in);
    in[INPUTS] = (attn_named_tensor){"slope", attn_lab_output(l, "lightning.slopes:heads=4", NULL, 0, "slope")};
    attn_tensor x = attn_lab_normal(l, 1, LAB_SHAPE(1, most, WIDTH));
    for (int64_t n = 512; n <= most; n *= 2) {
        in[0].tensor = attn_tensor_make(x.data, ATTN_F32, 3, (int64_t[]){1, n, WIDTH});
        double time = attn_lab_seconds(l, "tnl:heads=4", in, INPUTS + 1, "o", backward) / (double)n;
        if (n >= 1024) {
            each[count++] = time;
        }
        attn_lab_print(l, "%6lld tokens%s: %.2f us per token", (long long)n, backward ? ", with backward" : "",
                       1e6 * time);
    }
    attn_lab_claim_speed(l, lab_spread(each, count) < 0.15, "a layer's time per token is constant from 1,024 tokens",
                         "within %.0f %%", 100 * lab_spread(each, count));
}

static void generation(lab *l)
{
    double each[3];
    int64_t most = attn_lab_small(l) ? 512 : 8192, prompts[] = {16, 512, most};
    attn_named_tensor in[INPUTS + 1];
    make_layer(l, in);
    for (int i = 0; i < 3; i++) {
        in[0].tensor = attn_lab_normal(l, 1, LAB_SHAPE(1, prompts[i], WIDTH));
        attn_tensor state = attn_lab_output(l, "tnl:heads=4", in, INPUTS, "kv_state");
        in[0].tensor = attn_lab_normal(l, 1, LAB_SHAPE(1, 64, WIDTH));
        in[INPUTS] = (attn_named_tensor){"kv_state", state};
        char spec[64];
        snprintf(spec, sizeof spec, "tnl.decode:heads=4,offset=%lld", (long long)prompts[i]);
        each[i] = attn_lab_seconds(l, spec, in, INPUTS + 1, "o kv_state", 0) / 64;
        attn_lab_print(l, "after a prompt of %5lld tokens: %.1f us per token", (long long)prompts[i], 1e6 * each[i]);
    }
    attn_lab_claim_speed(l, lab_spread(each, 3) < 0.15, "a generated token costs the same after any prompt",
                         "within %.0f %%", 100 * lab_spread(each, 3));
}

static void padding(lab *l)
{
    enum { REAL = 40 };
    static const int pads[] = {0, 5, 50};
    attn_named_tensor in[INPUTS + 3];
    make_layer(l, in);
    in[INPUTS] = (attn_named_tensor){"slope", attn_lab_output(l, "lightning.slopes:heads=4", NULL, 0, "slope")};
    in[INPUTS + 1] = (attn_named_tensor){"theta", attn_lab_uniform(l, 0, 1, LAB_SHAPE(HEADS, WIDTH / HEADS))};
    attn_tensor real = attn_lab_normal(l, 1, LAB_SHAPE(1, REAL, WIDTH)), first = {0};
    double worst = 0;
    for (int i = 0; i < 3; i++) {
        int64_t n = REAL + pads[i];
        attn_tensor x = attn_lab_normal(l, 1, LAB_SHAPE(1, n, WIDTH)),
                    mask = attn_lab_zeros(l, ATTN_BOOL, LAB_SHAPE(1, n));
        for (int64_t t = pads[i]; t < n && l->status == ATTN_OK; t++) {
            lab_bool(&mask)[t] = 1;
        }
        if (l->status == ATTN_OK) {
            memcpy(lab_f32(&x) + pads[i] * WIDTH, real.data, sizeof(float) * REAL * WIDTH);
        }
        in[0].tensor = x;
        in[INPUTS + 2] = (attn_named_tensor){"mask", mask};
        attn_tensor o = attn_lab_output(l, "tnl:heads=4", in, INPUTS + 3, "o");
        attn_tensor tail = attn_tensor_make(l->status == ATTN_OK ? lab_f32(&o) + pads[i] * WIDTH : NULL, ATTN_F32, 3,
                                            (int64_t[]){1, REAL, WIDTH});
        if (i == 0) {
            first = tail;
        }
        worst = fmax(worst, attn_lab_distance(l, &tail, &first));
    }
    attn_lab_claim(l, worst < 1e-5, "left padding of 0, 5 and 50 tokens gives the same outputs",
                   "relative difference %.1e", worst);
}

static void run(lab *l)
{
    padding(l);
    constant_speed(l, 0);
    constant_speed(l, 1);
    generation(l);
}

const attn_lab_class attn_lab_tnl = {
    .info = {.name = "tnl", .title = "a layer at constant speed, generation independent of the prompt", .paper = "arXiv:2307.14995"},
    .run = run,
};
