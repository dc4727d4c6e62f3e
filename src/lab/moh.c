/* Mixture of heads: work and time fall with the share of heads that each token uses. */
#include "lab/lab.h"

#include <stdio.h>

static void run(lab *l)
{
    enum { HEADS = 16, SHARED = 4, WIDTH = 256 };
    static const int active[] = {4, 8, 12};
    static const double bars[] = {0.60, 0.85, 1e9};
    int64_t n = attn_lab_small(l) ? 256 : 2048;
    attn_tensor x = attn_lab_normal(l, 1, LAB_SHAPE(1, n, WIDTH)),
                q = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, n, 64));
    attn_tensor k = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, n, 64)),
                v = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, n, 64));
    attn_tensor wg = attn_lab_normal(l, 0.1, LAB_SHAPE(HEADS - SHARED, WIDTH)),
                wg_0 = attn_lab_normal(l, 0.1, LAB_SHAPE(2, WIDTH));
    attn_tensor wg_1 = attn_lab_normal(l, 0.1, LAB_SHAPE(SHARED, WIDTH));
    attn_named_tensor in[] = {{"x", x}, {"q", q}, {"k", k}, {"v", v}, {"wg", wg}, {"wg_0", wg_0}, {"wg_1", wg_1}};
    double dense = attn_lab_seconds(l, "dense:causal=true", LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o", 0);
    double all_pairs = (double)HEADS * (double)n * (double)(n + 1) / 2;
    for (int i = 0; i < 3; i++) {
        char spec[64];
        snprintf(spec, sizeof spec, "moh:shared_heads=%d,top_k=%d,causal=true", SHARED, active[i]);
        double share = (double)(SHARED + active[i]) / HEADS, time = attn_lab_seconds(l, spec, in, 7, "o gates mask", 0);
        double pairs = attn_lab_cost(l, spec, in, 7).pairs / all_pairs;
        attn_lab_print(l, "%2d of %d heads: %.2f ms, dense %.2f ms", SHARED + active[i], HEADS, 1e3 * time,
                       1e3 * dense);
        attn_lab_claim(l, pairs > share - 0.03 && pairs < share + 0.03, "only the pairs of active heads are computed",
                       "%.3f of all pairs with %.2f of the heads", pairs, share);
        if (i < 2) {
            char claim[64];
            snprintf(claim, sizeof claim, "at most %.2f of the time of dense with %.0f %% of the heads", bars[i], 100 * share);
            attn_lab_claim_speed(l, time <= bars[i] * dense, claim, "%.2f", time / dense);
        }
    }
}

const attn_lab_class attn_lab_moh = {
    .info = {.name = "moh", .title = "time falls with the share of active heads", .paper = "arXiv:2410.11842"},
    .run = run,
};
