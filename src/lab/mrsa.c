/* References in self-attention: masks keep their backgrounds out, weights raise what the object gets, and masked keys cost nothing. */
#include "lab/lab.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { SIDE = 16, TOKENS = SIDE * SIDE, WIDTH = 32, CONCEPTS = 2 };

/* Two references with an object of one concept each in front of noise, and a picture whose left half wants the first concept and whose
 * right half the second one. */
typedef struct scene {
    attn_tensor key_of, value_of; /* [CONCEPTS, WIDTH] */
    attn_tensor q, k, v, k_ref, v_ref, object, all; /* the last two: masks */
} scene;

static int is_object(int64_t token) { return token / SIDE >= 5 && token / SIDE < 11 && token % SIDE >= 5 && token % SIDE < 11; }

static scene make_scene(lab *l)
{
    scene x = {attn_lab_normal(l, 1, LAB_SHAPE(CONCEPTS, WIDTH)),
               attn_lab_normal(l, 1, LAB_SHAPE(CONCEPTS, WIDTH)),
               attn_lab_normal(l, 0.8, LAB_SHAPE(1, 1, TOKENS, WIDTH)),
               attn_lab_normal(l, 1, LAB_SHAPE(1, 1, TOKENS, WIDTH)),
               attn_lab_normal(l, 1, LAB_SHAPE(1, 1, TOKENS, WIDTH)),
               attn_lab_normal(l, 1, LAB_SHAPE(1, CONCEPTS, 1, TOKENS, WIDTH)),
               attn_lab_normal(l, 1, LAB_SHAPE(1, CONCEPTS, 1, TOKENS, WIDTH)),
               attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(CONCEPTS, SIDE, SIDE)),
               attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(CONCEPTS, SIDE, SIDE))};
    for (int64_t i = 0; i < CONCEPTS * TOKENS && l->status == ATTN_OK; i++) {
        int64_t concept = i / TOKENS, token = i % TOKENS, wanted = token % SIDE < SIDE / 2 ? 0 : 1;
        lab_f32(&x.object)[i] = is_object(token) ? 1 : 0;
        lab_f32(&x.all)[i] = 1;
        for (int64_t c = 0; c < WIDTH; c++) {
            float key = lab_f32(&x.key_of)[concept * WIDTH + c], *k = lab_f32(&x.k_ref) + i * WIDTH + c;
            float *v = lab_f32(&x.v_ref) + i * WIDTH + c;
            *k = is_object(token) ? key + 0.5f * *k : 0.5f * key + *k;
            *v = is_object(token) ? lab_f32(&x.value_of)[concept * WIDTH + c] + 0.3f * *v : *v;
            if (concept == 0) {
                float *q = lab_f32(&x.q) + token * WIDTH + c;
                *q += 0.6f * lab_f32(&x.key_of)[wanted * WIDTH + c];
                lab_f32(&x.k)[token * WIDTH + c] += 0.5f * *q;
            }
        }
    }
    return x;
}

/* Error of each token to its concept, attention on the right reference, and on the backgrounds of both. */
typedef struct outcome {
    double error, right, background;
} outcome;

static void measure(lab *l, const scene *x, const attn_tensor *mask, const char *weight, double share, outcome *to)
{
    char spec[80];
    snprintf(spec, sizeof spec, "mrsa:grid=[16,16],weights=[%s,%s]", weight, weight);
    attn_named_tensor in[] = {{"q", x->q}, {"k", x->k}, {"v", x->v}, {"k_ref", x->k_ref}, {"v_ref", x->v_ref}, {"ref_mask", *mask}};
    attn_tensor o = attn_lab_output(l, spec, in, 6, "o"), mass = attn_lab_output(l, spec, in, 6, "mass");
    /* Values that are 1 on the backgrounds alone give the attention on them. */
    attn_tensor none = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(1, 1, TOKENS, 1)),
                back = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(1, CONCEPTS, 1, TOKENS, 1));
    for (int64_t i = 0; i < CONCEPTS * TOKENS && l->status == ATTN_OK; i++) {
        lab_f32(&back)[i] = is_object(i % TOKENS) ? 0 : 1;
    }
    in[2].tensor = none, in[4].tensor = back;
    attn_tensor background = attn_lab_output(l, spec, in, 6, "o");
    for (int64_t i = 0; i < TOKENS && l->status == ATTN_OK; i++) {
        int64_t wanted = i % SIDE < SIDE / 2 ? 0 : 1;
        double off = 0, size = 0;
        for (int64_t c = 0; c < WIDTH; c++) {
            double u = (double)lab_f32(&x->value_of)[wanted * WIDTH + c], by = (double)lab_f32(&o)[i * WIDTH + c] - u;
            off += by * by;
            size += u * u;
        }
        to->error += share * sqrt(off / size) / TOKENS;
        to->right += share * (double)lab_f32(&mass)[i * (CONCEPTS + 1) + 1 + wanted] / TOKENS;
        to->background += share * (double)lab_f32(&background)[i] / TOKENS;
    }
}

static void masks_and_weights(lab *l)
{
    enum { CASES = 6 };
    static const struct {
        const char *name, *weight;
        int masked;
        double reference[3];
    } cases[CASES] = {{"no masks, w = 0", "1e-9", 0, {0.71, 0.72, 0.50}}, {"masks, w = 0", "1e-9", 1, {0.43, 0.58, 0}},
                      {"masks, w = 1", "1", 1, {0.26, 0.76, 0}},          {"masks, w = 2", "2", 1, {0.16, 0.86, 0}},
                      {"masks, w = 3", "3", 1, {0.13, 0.91, 0}},          {"no masks, w = 3", "3", 0, {0.65, 0.87, 0.62}}};
    int seeds = attn_lab_small(l) ? 2 : 10;
    outcome got[CASES] = {{0}};
    for (int seed = 0; seed < seeds; seed++) {
        scene x = make_scene(l);
        for (int i = 0; i < CASES; i++) {
            measure(l, &x, cases[i].masked ? &x.object : &x.all, cases[i].weight, 1.0 / seeds, &got[i]);
        }
    }
    double away = 0, leaked = 0;
    for (int i = 0; i < CASES; i++) {
        attn_lab_print(l, "%-16s error %.2f, attention on the right reference %.2f, on backgrounds %.2f", cases[i].name,
                       got[i].error, got[i].right, got[i].background);
        away = fmax(away, fabs(got[i].error - cases[i].reference[0]));
        away = fmax(away, fmax(fabs(got[i].right - cases[i].reference[1]), fabs(got[i].background - cases[i].reference[2])));
        leaked = cases[i].masked ? fmax(leaked, got[i].background) : leaked;
    }
    attn_lab_claim(l, got[1].error < got[0].error && got[4].error < got[5].error,
                   "masks bring the picture closer to its concepts",
                   "error %.2f with and %.2f without at w = 0, %.2f and %.2f at w = 3", got[1].error, got[0].error,
                   got[4].error, got[5].error);
    attn_lab_claim(l, leaked == 0, "with masks no attention falls on backgrounds", "%g", leaked);
    attn_lab_claim(l, got[1].error > got[2].error && got[2].error > got[3].error && got[3].error > got[4].error,
                   "the error falls as the weight grows", "%.2f, %.2f, %.2f, %.2f for w = 0 ... 3", got[1].error,
                   got[2].error, got[3].error, got[4].error);
    attn_lab_claim(l, away < (attn_lab_small(l) ? 0.15 : 0.05), "all of this as the reference computation has it",
                   "largest difference %.3f", away);
}

/* A weight w multiplies the odds of a reference against the own keys by e^w. */
static void odds(lab *l)
{
    scene x = make_scene(l);
    attn_named_tensor in[] = {{"q", x.q}, {"k", x.k}, {"v", x.v}, {"k_ref", x.k_ref}, {"v_ref", x.v_ref}, {"ref_mask", x.object}};
    attn_tensor before = attn_lab_output(l, "mrsa:grid=[16,16],weights=[1e-9,1e-9]", in, 6, "mass");
    attn_tensor after = attn_lab_output(l, "mrsa:grid=[16,16],weights=[1.5,3]", in, 6, "mass");
    double worst = 0;
    for (int64_t i = 0; i < TOKENS && l->status == ATTN_OK; i++) {
        for (int r = 1; r <= CONCEPTS; r++) {
            const float *a = lab_f32(&before) + i * (CONCEPTS + 1), *b = lab_f32(&after) + i * (CONCEPTS + 1);
            double ratio = (double)b[r] / (double)b[0] / ((double)a[r] / (double)a[0]);
            worst = fmax(worst, fabs(ratio / exp(1.5 * r) - 1));
        }
    }
    attn_lab_claim(l, worst < 1e-4, "a weight multiplies the odds of a reference by e^w",
                   "largest relative difference %.1e", worst);
}

static double time_of(lab *l, int64_t side, double covered, double *pairs)
{
    enum { REFERENCES = 3 };
    int64_t n = side * side, rows = (int64_t)(covered * (double)side + 0.5);
    char spec[60];
    snprintf(spec, sizeof spec, "mrsa:grid=[%d,%d]", (int)side, (int)side);
    attn_tensor x = attn_lab_normal(l, 1, LAB_SHAPE(1, 4, n, 64)),
                refs = attn_lab_normal(l, 1, LAB_SHAPE(1, REFERENCES, 4, n, 64));
    attn_tensor mask = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(REFERENCES, side, side));
    for (int64_t i = 0; i < REFERENCES * n && l->status == ATTN_OK; i++) {
        lab_f32(&mask)[i] = i % n / side < rows ? 1 : 0;
    }
    attn_named_tensor in[] = {{"q", x}, {"k", x}, {"v", x}, {"k_ref", refs}, {"v_ref", refs}, {"ref_mask", mask}};
    *pairs = attn_lab_cost(l, spec, in, 6).pairs / (4 * (double)n * (double)n);
    return attn_lab_seconds(l, spec, in, 6, "o", 0);
}

static void cost(lab *l)
{
    int64_t side = attn_lab_small(l) ? 20 : 64;
    double pairs[3], some = time_of(l, side, 0.1, &pairs[0]), all = time_of(l, side, 1, &pairs[1]);
    attn_lab_claim(l, fabs(pairs[0] - 1.3) < 0.02 && pairs[1] == 4, "masked keys are not computed",
                   "%.2f and %.2f times the pairs of plain attention with 10 %% and all of three references", pairs[0],
                   pairs[1]);
    attn_lab_claim_speed(l, all >= 2.5 * some, "with 10 % covered at least 2.5 times as fast as with everything",
                         "%.2f times", all / some);
    double coarse = time_of(l, side / 2, 1, &pairs[2]);
    attn_lab_claim_speed(l, all / coarse > 12 && all / coarse < 20,
                         "the finest level dominates: time grows with the square of the tokens",
                         "4 times the tokens take %.1f times as long", all / coarse);
}

static void run(lab *l)
{
    masks_and_weights(l);
    odds(l);
    cost(l);
}

const attn_lab_class attn_lab_mrsa = {
    .info = {.name = "mrsa", .title = "masked, weighted references bring their objects and nothing else", .paper = "arXiv:2405.13870"},
    .run = run,
};
