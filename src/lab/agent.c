/* Agent attention: how close pooled agents come to softmax attention, and what they save. */
#include "lab/lab.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { SIDE = 32, WIDTH = 32, TOKENS = SIDE * SIDE };

/* 24 random plane waves of up to 3 cycles across the grid with random channel directions, of unit deviation, plus 0.1 of noise. */
static attn_tensor smooth_field(lab *l)
{
    attn_tensor t = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(1, 1, TOKENS, WIDTH));
    for (int wave = 0; wave < 24 && l->status == ATTN_OK; wave++) {
        double fy = 6 * attn_random_uniform(&l->random) - 3, fx = 6 * attn_random_uniform(&l->random) - 3;
        double phase = 2 * M_PI * attn_random_uniform(&l->random), direction[WIDTH];
        for (int c = 0; c < WIDTH; c++) {
            direction[c] = attn_random_normal(&l->random);
        }
        for (int i = 0; i < TOKENS; i++) {
            double height = cos(2 * M_PI * (fy * (i / SIDE) + fx * (i % SIDE)) / SIDE + phase);
            for (int c = 0; c < WIDTH; c++) {
                lab_f32(&t)[i * WIDTH + c] += (float)(height * direction[c]);
            }
        }
    }
    double sum = 0, squares = 0;
    for (int i = 0; i < TOKENS * WIDTH && l->status == ATTN_OK; i++) {
        sum += (double)lab_f32(&t)[i];
        squares += (double)lab_f32(&t)[i] * (double)lab_f32(&t)[i];
    }
    double mean = sum / (TOKENS * WIDTH), deviation = sqrt(squares / (TOKENS * WIDTH) - mean * mean);
    for (int i = 0; i < TOKENS * WIDTH && l->status == ATTN_OK; i++) {
        lab_f32(&t)[i] = (float)((double)lab_f32(&t)[i] / deviation + 0.1 * attn_random_normal(&l->random));
    }
    return t;
}

/* |o - dense| / |dense - its mean over the tokens| */
static double error(const lab *l, const attn_tensor *o, const attn_tensor *dense)
{
    double difference = 0, spread = 0, mean[WIDTH] = {0};
    for (int i = 0; i < TOKENS * WIDTH && l->status == ATTN_OK; i++) {
        mean[i % WIDTH] += (double)lab_f32(dense)[i] / TOKENS;
    }
    for (int i = 0; i < TOKENS * WIDTH && l->status == ATTN_OK; i++) {
        double want = (double)lab_f32(dense)[i], by = (double)lab_f32(o)[i] - want, off = want - mean[i % WIDTH];
        difference += by * by;
        spread += off * off;
    }
    return spread > 0 ? sqrt(difference / spread) : 0;
}

static void approximation(lab *l)
{
    static const int sides[] = {4, 7, 14};
    static const double reference[2][3] = {{0.72, 0.49, 0.31}, {0.62, 0.37, 0.24}};
    attn_tensor field = smooth_field(l);
    attn_named_tensor in[] = {{"q", field}, {"k", field}, {"v", field}, {"agents", {0}}};
    attn_tensor dense = attn_lab_output(l, "dense", in, 3, "o");
    double got[2][3], worst = 0;
    for (int i = 0; i < 3; i++) {
        for (int sharp = 0; sharp < 2; sharp++) {
            char spec[128];
            snprintf(spec, sizeof spec, "agent:grid=[%d,%d],agent_grid=[%d,%d],scale2=%.9g", SIDE, SIDE, sides[i], sides[i],
                     pow(WIDTH, sharp ? -0.15 : -0.5));
            attn_tensor o = attn_lab_output(l, spec, in, 3, "o");
            got[sharp][i] = error(l, &o, &dense);
            worst = fmax(worst, fabs(got[sharp][i] - reference[sharp][i]));
        }
        attn_lab_print(l, "%3d pooled agents: error %.2f (reference %.2f), with scale2 = D^-0.15 %.2f (%.2f)",
                       sides[i] * sides[i], got[0][i], reference[0][i], got[1][i], reference[1][i]);
    }
    in[3].tensor = attn_lab_normal(l, 1, LAB_SHAPE(1, 1, 196, WIDTH));
    attn_tensor o = attn_lab_output(l, "agent", in, 4, "o");
    double random = error(l, &o, &dense);
    attn_lab_claim(l, got[0][0] > got[0][1] && got[0][1] > got[0][2] && got[0][2] < random,
                   "more agents come closer to softmax attention, and pooled ones closer than random ones",
                   "%.2f, %.2f, %.2f with 16, 49, 196; %.2f with 196 random agents", got[0][0], got[0][1], got[0][2],
                   random);
    attn_lab_claim(l, got[1][0] < got[0][0] && got[1][1] < got[0][1] && got[1][2] < got[0][2],
                   "a larger scale2 helps at every number of agents", "%.2f, %.2f, %.2f", got[1][0], got[1][1],
                   got[1][2]);
    attn_lab_print(l, "largest difference from the reference %.2f (another random field)", worst);
}

static void speed(lab *l)
{
    static const struct {
        int heads, side, width, agents;
        double least; /* of the ratio of operations */
    } sizes[] = {{3, 56, 32, 3, 0.25}, {3, 56, 32, 7, 0.25}, {8, 64, 40, 16, 0.5}};
    for (int i = 0; i < 3; i++) {
        int side = attn_lab_small(l) ? sizes[i].side / 4 : sizes[i].side;
        int64_t n = (int64_t)side * side, a = (int64_t)sizes[i].agents * sizes[i].agents;
        attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(1, sizes[i].heads, n, sizes[i].width));
        attn_named_tensor in[] = {{"q", q}, {"k", q}, {"v", q}};
        char spec[96], claim[96];
        snprintf(spec, sizeof spec, "agent:grid=[%d,%d],agent_grid=[%d,%d]", side, side, sizes[i].agents, sizes[i].agents);
        double time = attn_lab_seconds(l, spec, in, 3, "o", 0), dense = attn_lab_seconds(l, "dense", in, 3, "o", 0);
        double ideal = (double)n / (2 * (double)a);
        snprintf(claim, sizeof claim, "%lld agents for %lld tokens gain at least %.2f of %.0f times", (long long)a, (long long)n,
                 sizes[i].least, ideal);
        attn_lab_claim_speed(l, dense / time >= sizes[i].least * ideal, claim, "%.1f times (%.2f ms, dense %.2f ms)",
                             dense / time, 1e3 * time, 1e3 * dense);
    }
}

static void run(lab *l)
{
    approximation(l);
    speed(l);
}

const attn_lab_class attn_lab_agent = {
    .info = {.name = "agent", .title = "how close agents come to softmax attention, and what they save", .paper = "arXiv:2312.08874"},
    .run = run,
};
