/* Lightning attention: constant time per token, any tile length, decoding at any context. */
#include "lab/speed.h"

#include <math.h>
#include <stdio.h>

enum { HEADS = 4, WIDTH = 64, MOST_SIZES = 8 };

static attn_tensor slopes(lab *l)
{
    return attn_lab_output(l, "lightning.slopes:heads=4", NULL, 0, "slope");
}

static void tiles(lab *l)
{
    static const int blocks[] = {1, 16, 64, 100, 128, 100000};
    int64_t n = attn_lab_small(l) ? 300 : 4096;
    attn_tensor slope = slopes(l), q = attn_lab_normal(l, 0.2, LAB_SHAPE(1, HEADS, n, WIDTH));
    attn_tensor k = attn_lab_normal(l, 0.2, LAB_SHAPE(1, HEADS, n, WIDTH)),
                v = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, n, WIDTH));
    attn_named_tensor in[] = {{"q", q}, {"k", k}, {"v", v}, {"slope", slope}};
    attn_tensor stepped = attn_lab_output(l, "lightning.decode", in, 4, "o");
    double worst = 0, best = 1e9, step_time = attn_lab_seconds(l, "lightning.decode", in, 4, "o", 0);
    for (int i = 0; i < 6; i++) {
        char spec[48];
        snprintf(spec, sizeof spec, "lightning:block=%d", blocks[i]);
        attn_tensor o = attn_lab_output(l, spec, in, 4, "o");
        worst = fmax(worst, attn_lab_distance(l, &o, &stepped));
        double time = attn_lab_seconds(l, spec, in, 4, "o", 0);
        best = fmin(best, time);
        attn_lab_print(l, "tiles of %6d: %.2f ms", blocks[i], 1e3 * time);
    }
    attn_lab_claim(l, worst < 1e-5, "the tile length changes nothing but speed",
                   "relative difference from token by token %.1e", worst);
    attn_lab_claim_speed(l, best < 0.5 * step_time, "tiles beat the recurrence", "%.2f ms against %.2f ms", 1e3 * best,
                         1e3 * step_time);
}

static void constant_speed(lab *l, int backward)
{
    int64_t most = attn_lab_small(l) ? 4096 : 65536, most_dense = attn_lab_small(l) ? 2048 : 16384, crossing = 0;
    double each[MOST_SIZES], last = 0;
    int count = 0;
    attn_tensor slope = slopes(l), q = attn_lab_normal(l, 0.2, LAB_SHAPE(1, HEADS, most, WIDTH));
    attn_tensor k = attn_lab_normal(l, 0.2, LAB_SHAPE(1, HEADS, most, WIDTH)),
                v = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, most, WIDTH));
    for (int64_t n = 256; n <= most; n *= 2) {
        attn_named_tensor in[] = {{"q", q}, {"k", k}, {"v", v}, {"slope", slope}};
        for (int i = 0; i < 3; i++) {
            in[i].tensor = attn_tensor_make(in[i].tensor.data, ATTN_F32, 4, (int64_t[]){1, HEADS, n, WIDTH});
        }
        double time = attn_lab_seconds(l, "lightning", in, 4, "o", backward), dense = 0;
        if (n <= most_dense) {
            dense = attn_lab_seconds(l, "dense:causal=true", in, 3, "o lse", backward);
            crossing = crossing == 0 && dense > time ? n : crossing;
            last = dense / time;
        }
        if (n >= 2048 && count < MOST_SIZES) {
            each[count++] = time / (double)n;
        }
        attn_lab_print(l, "%6lld tokens%s: %.3f us per token, dense %.3f", (long long)n,
                       backward ? ", with backward" : "", 1e6 * time / (double)n, 1e6 * dense / (double)n);
    }
    double spread = lab_spread(each, count);
    attn_lab_claim_speed(l, spread < 0.15 && crossing > 0 && crossing <= 1024,
                         "time per token is constant from 2,048 tokens; dense is slower from 1,024 or less on",
                         "within %.0f %%, dense slower from %lld tokens, %.0f times at the longest", 100 * spread,
                         (long long)crossing, last);
}

static void run(lab *l)
{
    tiles(l);
    constant_speed(l, 0);
    constant_speed(l, 1);
}

const attn_lab_class attn_lab_lightning = {
    .info = {.name = "lightning", .title = "constant time per token", .paper = "arXiv:2401.04658"},
    .run = run,
};
