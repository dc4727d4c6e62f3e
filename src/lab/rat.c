/* RAT: training time against attention, and the two ends between which the chunk length interpolates. */
#include "lab/lab.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { WIDTH = 256, HEADS = 4, GROUPS = 2, HEAD = WIDTH / HEADS };

static void interpolation(lab *l)
{
    int64_t n = attn_lab_small(l) ? 50 : 200, d = 32;
    attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(1, 2, n, d)), k = attn_lab_normal(l, 1, LAB_SHAPE(1, 2, n, d));
    attn_tensor v = attn_lab_normal(l, 1, LAB_SHAPE(1, 2, n, d)), g = attn_lab_uniform(l, 0, 1, LAB_SHAPE(1, 2, n, d));
    attn_tensor whole = attn_lab_output(l, "rat:chunk=100000", LAB_LIST({"q", q}, {"k", k}, {"v", v}, {"g", g}), "o");
    double worst = 0;
    for (int64_t h = 0; h < 2; h++) {
        attn_tensor x = attn_tensor_make(lab_f32(&v) + h * n * d, ATTN_F32, 3, (int64_t[]){1, n, d}), gate = x, part = x;
        gate.data = lab_f32(&g) + h * n * d;
        attn_tensor scanned = attn_lab_output(l, "rat.scan", LAB_LIST({"x", x}, {"g", gate}), "o");
        part.data = l->status == ATTN_OK ? lab_f32(&whole) + h * n * d : NULL;
        worst = fmax(worst, attn_lab_distance(l, &part, &scanned));
    }
    attn_lab_claim(l, worst < 1e-6, "one chunk is the plain recurrence", "relative difference %.1e", worst);
    attn_tensor scaled_k = attn_lab_zeros(l, ATTN_F32, 4, k.shape), scaled_v = attn_lab_zeros(l, ATTN_F32, 4, v.shape);
    for (int64_t i = 0; i < attn_tensor_count(&k) && l->status == ATTN_OK; i++) {
        float keep = 1 - lab_f32(&g)[i];
        lab_f32(&scaled_k)[i] = keep * lab_f32(&k)[i];
        lab_f32(&scaled_v)[i] = keep * lab_f32(&v)[i];
    }
    attn_tensor single =
        attn_lab_output(l, "rat:chunk=1,rotary_dim=0", LAB_LIST({"q", q}, {"k", k}, {"v", v}, {"g", g}), "o");
    attn_tensor dense =
        attn_lab_output(l, "dense:causal=true", LAB_LIST({"q", q}, {"k", scaled_k}, {"v", scaled_v}), "o");
    double difference = attn_lab_distance(l, &single, &dense);
    attn_lab_claim(l, difference < 1e-5, "chunks of one token are causal attention on gated keys and values",
                   "relative difference %.1e", difference);
}

/* Seconds of a layer's forward and backward. */
static double layer_time(lab *l, const attn_named_tensor *in, int count, int64_t chunk)
{
    char spec[96];
    snprintf(spec, sizeof spec, "rat.layer:heads=%d,groups=%d,chunk=%lld", HEADS, GROUPS, (long long)chunk);
    return attn_lab_seconds(l, spec, in, count, "o", 1);
}

static double model(double n, double chunk)
{
    double own = 2 * WIDTH * (3 * WIDTH + 2 * GROUPS * HEAD) + 2 * WIDTH * WIDTH + 6 * WIDTH + 2 * WIDTH * n / chunk;
    return (8.0 * WIDTH * WIDTH + 2 * WIDTH * n) / own;
}

static void training(lab *l)
{
    int64_t most = attn_lab_small(l) ? 1024 : 16384;
    double before = 0, last = 0;
    int grows = 1;
    for (int64_t n = most / 8; n <= most; n *= 2) {
        attn_tensor x = attn_lab_normal(l, 1, LAB_SHAPE(1, n, WIDTH)),
                    norm = attn_lab_uniform(l, 1, 1, LAB_SHAPE(WIDTH));
        attn_tensor w_in = attn_lab_normal(l, 0.05, LAB_SHAPE(3 * WIDTH + 2 * GROUPS * HEAD, WIDTH));
        attn_tensor bias = attn_lab_uniform(l, 0, 2.7, LAB_SHAPE(WIDTH)),
                    w_o = attn_lab_normal(l, 0.05, LAB_SHAPE(WIDTH, WIDTH));
        attn_named_tensor in[] = {{"x", x}, {"norm_w", norm}, {"w_in", w_in}, {"gate_bias", bias}, {"w_o", w_o}};
        attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, n, HEAD));
        /* The layer with attention: the same projections (measured with a single chunk) and dense attention. */
        double rest = layer_time(l, in, 5, n), time = layer_time(l, in, 5, 16);
        double dense = attn_lab_seconds(l, "dense:causal=true", LAB_LIST({"q", q}, {"k", q}, {"v", q}), "o lse", 1);
        last = (rest + dense) / time;
        attn_lab_print(l,
                       "%6lld tokens, chunk 16: %.1f ms, with dense attention %.1f ms, ratio %.2f (by operations %.2f)",
                       (long long)n, 1e3 * time, 1e3 * (rest + dense), last, model((double)n, 16));
        grows = grows && last > before;
        before = last;
        if (n == most) {
            double few = layer_time(l, in, 5, 4), many = layer_time(l, in, 5, 64);
            attn_lab_claim_speed(l, few > time && time > many, "longer chunks are faster",
                                 "%.1f, %.1f, %.1f ms with chunks of 4, 16, 64", 1e3 * few, 1e3 * time, 1e3 * many);
        }
    }
    attn_lab_claim_speed(l, grows && last > 4, "training gains more the longer the text, over 4 times at 16,384",
                         "%.1f times", last);
}

/* A token behind a long context, batch 8, width 2048 in heads of 128: what is read is chunk times less. */
static void generation(lab *l)
{
    int64_t batch = attn_lab_small(l) ? 1 : 8, heads = attn_lab_small(l) ? 2 : 16, n = 4096, d = 128, chunk = 16;
    attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(batch, heads, 1, d)),
                gate = attn_lab_uniform(l, 0, 1, LAB_SHAPE(batch, heads, 1, d));
    attn_tensor k = attn_lab_normal(l, 1, LAB_SHAPE(batch, heads, n, d)),
                v = attn_lab_normal(l, 1, LAB_SHAPE(batch, heads, n, d));
    attn_tensor ends = attn_tensor_make(k.data, ATTN_F32, 4, (int64_t[]){batch, heads, n / chunk, d}), end_values = ends;
    end_values.data = v.data;
    double dense = attn_lab_seconds(l, "dense", LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o", 0);
    double time =
        attn_lab_seconds(l, "rat.decode:steps=4096",
                         LAB_LIST({"q", q}, {"k", q}, {"v", q}, {"g", gate}, {"k_end", ends}, {"v_end", end_values}),
                         "o k_last v_last", 0);
    attn_lab_claim_speed(l, dense > 8 * time, "a token behind 4,096 costs an eighth of attention or less",
                         "%.2f ms against %.2f ms, %.1f times", 1e3 * time, 1e3 * dense, dense / time);
}

static void run(lab *l)
{
    generation(l);
    interpolation(l);
    training(l);
}

const attn_lab_class attn_lab_rat = {
    .info = {.name = "rat", .title = "training time against attention; the two ends of the chunk length", .paper = "arXiv:2507.04416"},
    .run = run,
};
