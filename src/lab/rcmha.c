/* Relative convolutional attention: convolutions cost little memory beside relative attention alone, and neither needs N x M. */
#include "lab/lab.h"

#include <string.h>

static void run(lab *l)
{
    int64_t n = attn_lab_small(l) ? 512 : 2048;
    enum { HEADS = 8, D = 16, C = HEADS * D };
    attn_tensor x = attn_lab_normal(l, 1, LAB_SHAPE(1, n, C)), w = attn_lab_normal(l, 0.1, LAB_SHAPE(C, C)),
                taps = attn_lab_normal(l, 0.5, LAB_SHAPE(D, 3));
    attn_named_tensor in[] = {{"x", x},
                              {"w_q", w},
                              {"w_k", w},
                              {"w_v", w},
                              {"w_o", w},
                              {"rel_emb", attn_lab_normal(l, 0.3, LAB_SHAPE(2 * n, HEADS, D))},
                              {"rel_bias", attn_lab_normal(l, 0.3, LAB_SHAPE(2 * n, HEADS))},
                              {"q_bias", attn_lab_normal(l, 0.3, LAB_SHAPE(HEADS, D))},
                              {"conv_q_w", taps},
                              {"conv_k_w", taps},
                              {"conv_v_w", taps}};
    double relative = attn_lab_memory(l, "rcmha:heads=8", in, 8, "y"),
           both = attn_lab_memory(l, "rcmha:heads=8", in, 11, "y");
    double scores = (double)(HEADS * n * 2 * n) * sizeof(float);
    attn_lab_claim(l, both <= 1.2 * relative,
                   "with convolutions at most 1.2 times the memory of relative attention alone",
                   "%.2f MB against %.2f MB", both * 1e-6, relative * 1e-6);
    attn_lab_claim(l, both < 0.25 * scores, "far less than the scores of all pairs, which the official code forms",
                   "%.2f MB against %.0f MB", both * 1e-6, scores * 1e-6);
    attn_tensor stepped = attn_lab_output(l, "rcmha:heads=8,decode=true", in, 11, "y"),
                whole = attn_lab_output(l, "rcmha:heads=8", in, 11, "y");
    double difference = attn_lab_distance(l, &stepped, &whole);
    attn_lab_claim(l, difference < 1e-4, "token by token with rings and caches gives the same",
                   "relative difference %.1e", difference);
}

const attn_lab_class attn_lab_rcmha = {
    .info = {.name = "rcmha", .title = "memory of relative convolutional attention", .paper = "arXiv:2308.03429"},
    .run = run,
};
