/* Perturbed heads: what a search by rounds gains, what a perturbed pass costs, and that all paths lead from the map to the identity. */
#include "lab/lab.h"

#include <math.h>
#include <stdio.h>

/* The objective of the last round on one random quadratic objective; `same`: whether both select the same heads. */
static double hunt(lab *l, const char *spec, const attn_tensor *gain, const attn_tensor *pair, attn_tensor *selected)
{
    attn_tensor value = attn_lab_output(l, spec, LAB_LIST({"gain", *gain}, {"pair", *pair}), "value");
    *selected = attn_lab_output(l, spec, LAB_LIST({"gain", *gain}, {"pair", *pair}), "selected");
    return l->status == ATTN_OK ? (double)lab_f32(&value)[value.shape[0] - 1] : 0;
}

static void selection(lab *l)
{
    enum { ALL = 36, PAIRS = 5 };
    int seeds = attn_lab_small(l) ? 6 : 30, better = 0, same = 0;
    double rounds = 0, once = 0;
    attn_tensor none = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(ALL, ALL));
    for (int seed = 0; seed < seeds; seed++) {
        attn_tensor gain = attn_lab_normal(l, 1, LAB_SHAPE(PAIRS, ALL)),
                    pair = attn_lab_normal(l, 0.7, LAB_SHAPE(ALL, ALL)), a, b;
        for (int i = 0; i < ALL * ALL && l->status == ATTN_OK; i++) {
            float *x = lab_f32(&pair) + i, *y = lab_f32(&pair) + i % ALL * ALL + i / ALL;
            if (i / ALL < i % ALL) {
                *x = *y = (*x + *y) / 2;
            }
        }
        double x = hunt(l, "softpag.hunt:heads=6,top_k=2,rounds=4", &gain, &pair, &a);
        double y = hunt(l, "softpag.hunt:heads=6,top_k=8,rounds=1", &gain, &pair, &b);
        rounds += x / seeds;
        once += y / seeds;
        better += x > y;
        hunt(l, "softpag.hunt:heads=6,top_k=1,rounds=5", &gain, &none, &a);
        hunt(l, "softpag.hunt:heads=6,top_k=5,rounds=1", &gain, &none, &b);
        int equal = 0;
        for (int i = 0; i < ALL && l->status == ATTN_OK; i++) {
            equal += lab_bool(&a)[i] == lab_bool(&b)[i];
        }
        same += equal == ALL;
    }
    attn_lab_claim(l, better == seeds && rounds > 1.5 * once,
                   "with pair terms rounds of a few heads beat one round of all",
                   "%.1f in four rounds of 2, %.1f in one of 8, better in %d of %d", rounds, once, better, seeds);
    attn_lab_claim(l, same == seeds, "without them one round of k heads selects what k rounds of one do", "in %d of %d",
                   same, seeds);
}

static void paths(lab *l)
{
    static const char *const names[] = {"linear", "slerp", "hellinger", "log_linear"};
    enum { N = 24, WIDTH = 16, STEPS = 10 };
    attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(1, 1, N, WIDTH)),
                k = attn_lab_normal(l, 0.7, LAB_SHAPE(1, 1, N, WIDTH));
    attn_tensor v = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(1, 1, N, N)); /* the identity: o is the map */
    for (int i = 0; i < N * WIDTH && l->status == ATTN_OK; i++) {
        lab_f32(&k)[i] += 0.7f * lab_f32(&q)[i]; /* tokens attend to themselves, as they do in pictures */
        lab_f32(&v)[i % N * N + i % N] = 1;
    }
    attn_named_tensor in[] = {{"q", q}, {"k", k}, {"v", v}};
    attn_tensor exact = attn_lab_output(l, "dense", in, 3, "o");
    double start = 0, end = 0;
    int falls = 0;
    for (int path = 0; path < 4; path++) {
        double before = INFINITY;
        int monotonic = 1;
        for (int step = 0; step <= STEPS && l->status == ATTN_OK; step++) {
            char spec[60];
            snprintf(spec, sizeof spec, "softpag:u=%.1f,path=%s", (double)step / STEPS, names[path]);
            attn_tensor map = attn_lab_output(l, spec, in, 3, "o");
            double entropy = 0;
            for (int i = 0; i < N * N && l->status == ATTN_OK; i++) {
                double p = (double)lab_f32(&map)[i];
                entropy -= p > 0 ? p * log(p) / N : 0;
            }
            monotonic &= entropy < before;
            before = entropy;
            start = step == 0 ? fmax(start, attn_lab_distance(l, &map, &exact)) : start;
            end = step == STEPS ? fmax(end, attn_lab_distance(l, &map, &v)) : end;
        }
        falls += monotonic;
    }
    attn_lab_claim(l, falls == 4, "entropy falls along every path to the identity", "on %d of 4", falls);
    attn_lab_claim(l, start < 1e-5 && end < 1e-5, "all paths agree at their ends",
                   "distance %.1e to the map, %.1e to the identity", start, end);
}

static void cost(lab *l)
{
    int64_t n = attn_lab_small(l) ? 128 : 1024;
    attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(1, 8, n, 64)), k = attn_lab_normal(l, 1, LAB_SHAPE(1, 8, n, 64));
    attn_tensor v = attn_lab_normal(l, 1, LAB_SHAPE(1, 8, n, 64));
    attn_named_tensor in[] = {{"q", q}, {"k", k}, {"v", v}};
    double dense = attn_lab_seconds(l, "dense", in, 3, "o", 0),
           half = attn_lab_seconds(l, "softpag:u=0.5", in, 3, "o", 0);
    double full = attn_lab_seconds(l, "softpag:u=1", in, 3, "o", 0);
    attn_lab_claim_speed(l, half <= 1.05 * dense,
                         "half-way to the identity takes at most 1.05 times ordinary attention", "%.3f", half / dense);
    attn_lab_claim_speed(l, 20 * full <= dense, "the identity is at least 20 times as fast as ordinary attention",
                         "%.0f times", dense / full);
}

static void run(lab *l)
{
    selection(l);
    paths(l);
    cost(l);
}

const attn_lab_class attn_lab_softpag = {
    .info = {.name = "softpag", .title = "searching heads by rounds, and cheap paths to the identity", .paper = "arXiv:2506.10978"},
    .run = run,
};
