/* Calibrated cross-attention: two concepts learned from one picture, what training moves, and what the fused loss costs. */
#include "lab/lab.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* AdamW; moments: zeros at first, [2][count]. */
static void adam(float *p, const float *grad, double *moments, int count, int step, double rate, double decay)
{
    double *mean = moments, *square = moments + count;
    for (int i = 0; i < count; i++) {
        double g = (double)grad[i];
        mean[i] = 0.9 * mean[i] + 0.1 * g;
        square[i] = 0.999 * square[i] + 0.001 * g * g;
        double by = rate * mean[i] / (1 - pow(0.9, step)) / (sqrt(square[i] / (1 - pow(0.999, step))) + 1e-8);
        p[i] = (float)((double)p[i] * (1 - rate * decay) - by);
    }
}

/* ---- A picture of two concepts, and words that learn them ---- */

enum { SIDE = 16, PLACES = SIDE * SIDE, FEATURES = 32, LAYERS = 2, HEADS = 4, MAPS = LAYERS * HEADS, WIDTH = 16, WORDS = 8 };
enum { WEIGHTS = MAPS * FEATURES * WIDTH, LEARNED = 2 * WEIGHTS + 2 * FEATURES };
static const int64_t modifier_words[2] = {1, 4}; /* start, <1> cat and <2> dog, two ends */

typedef struct picture {
    int region[PLACES]; /* 0 background, 1 cat, 2 dog */
    attn_tensor look;   /* [3, FEATURES] of the regions */
    attn_tensor target; /* [3, WIDTH] */
    attn_tensor words;  /* [WORDS, FEATURES] */
    attn_tensor w_q, learned; /* [MAPS, FEATURES, WIDTH]; W_k, W_v and the modifiers' rows */
    attn_tensor q, k, v, modifier;
} picture;

static int in_ellipse(int place, double y, double x, double high, double wide)
{
    double a = (place / SIDE - y) / high, b = (place % SIDE - x) / wide;
    return a * a + b * b <= 1;
}

static picture make_picture(lab *l)
{
    /* Rows of `base`: background, animal, cat, dog. */
    attn_tensor base = attn_lab_normal(l, 1, LAB_SHAPE(4, FEATURES));
    picture p = {.look = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(3, FEATURES)),
                 .target = attn_lab_normal(l, 1, LAB_SHAPE(3, WIDTH)),
                 .words = attn_lab_normal(l, 0.3, LAB_SHAPE(WORDS, FEATURES)),
                 .w_q = attn_lab_normal(l, 1 / sqrt(FEATURES), LAB_SHAPE(WEIGHTS)),
                 .learned = attn_lab_normal(l, 1 / sqrt(FEATURES), LAB_SHAPE(LEARNED)),
                 .q = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(LAYERS, 1, HEADS, PLACES, WIDTH)),
                 .k = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(LAYERS, 1, HEADS, WORDS, WIDTH)),
                 .v = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(LAYERS, 1, HEADS, WORDS, WIDTH)),
                 .modifier = attn_lab_zeros(l, ATTN_I64, LAB_SHAPE(1, 2))};
    if (l->status != ATTN_OK) {
        return p;
    }
    for (int i = 0; i < PLACES; i++) {
        p.region[i] = in_ellipse(i, 9, 4, 4.5, 3) ? 1 : in_ellipse(i, 8, 11, 4.5, 3.5) ? 2 : 0;
    }
    float *words = lab_f32(&p.words), *learned = lab_f32(&p.learned);
    for (int f = 0; f < FEATURES; f++) {
        const float *x = lab_f32(&base) + f;
        words[f] += 0.6f * x[0];
        for (int own = 1; own <= 2; own++) {
            lab_f32(&p.look)[own * FEATURES + f] = x[FEATURES] + 0.5f * x[(own + 1) * FEATURES];
            words[(modifier_words[own - 1] + 1) * FEATURES + f] += 0.5f * x[FEATURES] + 0.2f * x[(own + 1) * FEATURES];
            learned[2 * WEIGHTS + (own - 1) * FEATURES + f] = words[modifier_words[own - 1] * FEATURES + f];
        }
        lab_f32(&p.look)[f] = x[0];
    }
    for (int i = 0; i < WEIGHTS; i++) {
        learned[i] = lab_f32(&p.w_q)[i] + 0.1f * learned[i];
    }
    memcpy(p.modifier.data, modifier_words, sizeof modifier_words);
    return p;
}

/* to[map][row][d] = x[row] . w[map][][d] */
static void project(const float *x, const float *w, int rows, float *to)
{
    memset(to, 0, (size_t)(MAPS * rows * WIDTH) * sizeof *to);
    for (int map = 0; map < MAPS; map++) {
        for (int row = 0; row < rows; row++, to += WIDTH) {
            for (int f = 0; f < FEATURES; f++) {
                for (int d = 0; d < WIDTH; d++) {
                    to[d] += x[row * FEATURES + f] * w[(map * FEATURES + f) * WIDTH + d];
                }
            }
        }
    }
}

/* From the gradient of project(words): that of w is set, those of the modifiers' rows are added to. */
static void project_backward(const float *words, const float *w, const float *grad, float *grad_w, float *grad_modifiers)
{
    memset(grad_w, 0, WEIGHTS * sizeof *grad_w);
    for (int i = 0; i < MAPS * WORDS * FEATURES; i++) {
        int map = i / (WORDS * FEATURES), word = i / FEATURES % WORDS, f = i % FEATURES;
        for (int d = 0; d < WIDTH; d++) {
            float g = grad[(map * WORDS + word) * WIDTH + d];
            grad_w[(map * FEATURES + f) * WIDTH + d] += words[word * FEATURES + f] * g;
            for (int m = 0; m < 2; m++) {
                grad_modifiers[m * FEATURES + f] += word == modifier_words[m] ? w[(map * FEATURES + f) * WIDTH + d] * g : 0;
            }
        }
    }
}

typedef struct outcome {
    double bind, overlap, error;
} outcome;

/* The mean of o over the maps against the regions' targets: the mean square, and its gradient for each map. */
static double reconstruction(const picture *p, const float *o, float *grad_o)
{
    double error = 0;
    for (int i = 0; i < PLACES * WIDTH; i++) {
        double mean = 0;
        for (int map = 0; map < MAPS; map++) {
            mean += (double)o[map * PLACES * WIDTH + i] / MAPS;
        }
        double off = mean - (double)lab_f32(&p->target)[p->region[i / WIDTH] * WIDTH + i % WIDTH];
        error += off * off / (PLACES * WIDTH);
        for (int map = 0; map < MAPS; map++) {
            grad_o[map * PLACES * WIDTH + i] = (float)(2 * off / (PLACES * WIDTH) / MAPS);
        }
    }
    return error;
}

static void learn(lab *l, const char *spec, uint64_t seed, double weight, double share, outcome *to)
{
    enum { STEPS = 250 };
    attn_random_seed(&l->random, seed);
    picture p = make_picture(l);
    attn_tensor x = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(PLACES, FEATURES)),
                o = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(LAYERS, 1, HEADS, PLACES, WIDTH));
    attn_tensor grad_o = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(LAYERS, 1, HEADS, PLACES, WIDTH)),
                grads = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(LEARNED));
    attn_tensor grad_k = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(LAYERS, 1, HEADS, WORDS, WIDTH)),
                grad_v = attn_lab_zeros(l, ATTN_F32, 5, grad_k.shape);
    double *moments = attn_arena_alloc(l->arena, 2 * LEARNED * sizeof *moments);
    float scalars[3], grad_loss = (float)weight, *w = lab_f32(&p.learned), *words = lab_f32(&p.words);
    attn_tensor loss[3];
    attn_op *op = NULL;
    attn_arena *scratch = NULL;
    for (int i = 0; i < 3; i++) {
        loss[i] = attn_tensor_make(&scalars[i], ATTN_F32, 1, (int64_t[]){1});
    }
    attn_lab_check(l, moments != NULL ? ATTN_OK : attn_fail_memory(2 * LEARNED * sizeof *moments));
    attn_lab_check(l, attn_op_create(&op, spec));
    attn_lab_check(l, attn_arena_create(&scratch, 0));
    for (int step = 1; step <= STEPS && l->status == ATTN_OK; step++) {
        attn_exec exec = {.threads = l->settings->threads, .arena = scratch};
        attn_named_tensor in[] = {{"q", p.q}, {"k", p.k}, {"v", p.v}, {"modifier", p.modifier}};
        attn_named_tensor out[] = {{"o", o}, {"loss", loss[0]}, {"bind", loss[1]}, {"separate", loss[2]}};
        attn_named_tensor from[] = {{"o", grad_o}, {"loss", attn_tensor_make(&grad_loss, ATTN_F32, 1, (int64_t[]){1})}};
        attn_named_tensor grad[] = {{"k", grad_k}, {"v", grad_v}};
        for (int i = 0; i < PLACES * FEATURES; i++) {
            double look = (double)lab_f32(&p.look)[p.region[i / FEATURES] * FEATURES + i % FEATURES];
            lab_f32(&x)[i] = (float)(look + 0.3 * attn_random_normal(&l->random));
        }
        for (int m = 0; m < 2; m++) {
            memcpy(words + modifier_words[m] * FEATURES, w + 2 * WEIGHTS + m * FEATURES, FEATURES * sizeof *w);
        }
        project(lab_f32(&x), lab_f32(&p.w_q), PLACES, lab_f32(&p.q));
        project(words, w, WORDS, lab_f32(&p.k));
        project(words, w + WEIGHTS, WORDS, lab_f32(&p.v));
        attn_lab_check(l, attn_op_forward(op, in, 4, out, 4, &exec));
        double error = reconstruction(&p, lab_f32(&o), lab_f32(&grad_o));
        attn_lab_check(l, attn_op_backward(op, in, 4, out, 4, from, 2, grad, 2, &exec));
        attn_arena_reset(scratch);
        memset(lab_f32(&grads) + 2 * WEIGHTS, 0, 2 * FEATURES * sizeof(float));
        project_backward(words, w, lab_f32(&grad_k), lab_f32(&grads), lab_f32(&grads) + 2 * WEIGHTS);
        project_backward(words, w + WEIGHTS, lab_f32(&grad_v), lab_f32(&grads) + WEIGHTS, lab_f32(&grads) + 2 * WEIGHTS);
        memset(moments, 0, step == 1 ? 2 * LEARNED * sizeof *moments : 0);
        adam(w, lab_f32(&grads), moments, LEARNED, step, 8e-3, 0.01);
        if (step == STEPS) {
            to->bind += share * (1 - (double)scalars[1] / 2);
            to->overlap += share * (double)scalars[2];
            to->error += share * error;
        }
    }
    attn_arena_destroy(scratch);
    attn_op_destroy(op);
}

static void two_concepts(lab *l)
{
    static const struct {
        double weight;
        int power;
    } cases[] = {{0, 2}, {0.01, 2}, {0.1, 2}, {0.1, 1}};
    int seeds = attn_lab_small(l) ? 1 : 4;
    outcome got[4] = {{0, 0, 0}};
    for (int i = 0; i < (attn_lab_small(l) ? 3 : 4); i++) {
        char spec[60];
        snprintf(spec, sizeof spec, "disendiff.train:grid=[16,16],power=%d", cases[i].power);
        for (int seed = 0; seed < seeds; seed++) {
            learn(l, spec, 100 + (uint64_t)seed, cases[i].weight, 1.0 / seeds, &got[i]);
        }
        attn_lab_print(
            l,
            "loss weight %-4g, power %d: modifiers with their classes %.2f, classes with each other %.3f, error %.1e",
            cases[i].weight, cases[i].power, got[i].bind, got[i].overlap, got[i].error);
    }
    attn_lab_claim(l, got[1].bind > got[0].bind && got[2].bind > 3 * got[0].bind,
                   "modifiers come to look where their classes look",
                   "overlap %.2f, %.2f, %.2f with loss weights 0, 0.01, 0.1", got[0].bind, got[1].bind, got[2].bind);
    attn_lab_claim(l, got[1].overlap < got[0].overlap && got[2].overlap < got[0].overlap,
                   "classes come to look at different places", "overlap %.3f, %.3f, %.3f", got[0].overlap,
                   got[1].overlap, got[2].overlap);
    attn_lab_claim(l, got[1].error < 2 * got[0].error && got[2].error < 2 * got[0].error,
                   "the picture is learned as well as without the loss", "error %.1e, %.1e, %.1e", got[0].error,
                   got[1].error, got[2].error);
}

/* ---- An embedding whose gradient reaches modifiers only ---- */

/* AdamW without decay on the squared distance of looked-up rows from a target. */
static void only_modifiers_move(lab *l)
{
    enum { ROWS = 50, NUMBERS = 8, TEXT = 12, STEPS = 30, SIZE = ROWS * NUMBERS };
    attn_tensor table = attn_lab_normal(l, 1, LAB_SHAPE(ROWS, NUMBERS)),
                target = attn_lab_normal(l, 1, LAB_SHAPE(2, TEXT, NUMBERS));
    attn_tensor ids = attn_lab_zeros(l, ATTN_I64, LAB_SHAPE(2, TEXT)),
                modifiers = attn_lab_zeros(l, ATTN_I64, LAB_SHAPE(2));
    attn_tensor first = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(ROWS, NUMBERS)),
                grad = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(ROWS, NUMBERS));
    double moments[2 * SIZE] = {0}, distance[2] = {0, 0};
    attn_op *op = NULL;
    attn_lab_check(l, attn_op_create(&op, "disendiff.embed"));
    if (l->status != ATTN_OK) {
        return;
    }
    for (int i = 0; i < 2 * TEXT; i++) {
        lab_i64(&ids)[i] = i % 5 == 0 ? 7 : i % 5 == 1 ? 31 : (int64_t)attn_random_below(&l->random, ROWS);
    }
    lab_i64(&modifiers)[0] = 7, lab_i64(&modifiers)[1] = 31;
    memcpy(first.data, table.data, SIZE * sizeof(float));
    for (int step = 1; step <= STEPS && l->status == ATTN_OK; step++) {
        attn_named_tensor in[] = {{"table", table}, {"ids", ids}, {"modifiers", modifiers}}, to = {"table", grad};
        attn_tensor o = attn_lab_output(l, "disendiff.embed", in, 3, "o");
        attn_named_tensor grad_o = {"o", o};
        for (int i = 0; i < 2 * TEXT * NUMBERS && l->status == ATTN_OK; i++) {
            lab_f32(&o)[i] -= lab_f32(&target)[i];
        }
        attn_lab_check(l, attn_op_backward(op, in, 3, NULL, 0, &grad_o, 1, &to, 1, NULL));
        if (l->status == ATTN_OK) {
            adam(lab_f32(&table), lab_f32(&grad), moments, SIZE, step, 0.02, 0);
        }
    }
    for (int i = 0; i < SIZE && l->status == ATTN_OK; i++) {
        int row = i / NUMBERS;
        distance[row == 7 || row == 31] += fabs((double)lab_f32(&table)[i] - (double)lab_f32(&first)[i]);
    }
    attn_op_destroy(op);
    attn_lab_claim(l, distance[0] == 0 && distance[1] > 0.1,
                   "training moves the modifiers' rows and leaves all others bit by bit",
                   "others by %g, modifiers by %.2f", distance[0], distance[1]);
}

static void cost(lab *l)
{
    enum { DEPTH = 5, BATCH = 2, ALL_HEADS = 8, TEXT = 77, SIZE = 40 };
    int64_t side = attn_lab_small(l) ? 4 : 16, n = side * side;
    attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(DEPTH, BATCH, ALL_HEADS, n, SIZE)),
                k = attn_lab_normal(l, 1, LAB_SHAPE(DEPTH, BATCH, ALL_HEADS, TEXT, SIZE));
    attn_tensor v = attn_lab_normal(l, 1, LAB_SHAPE(DEPTH, BATCH, ALL_HEADS, TEXT, SIZE)),
                modifier = attn_lab_zeros(l, ATTN_I64, LAB_SHAPE(BATCH, 2));
    if (l->status != ATTN_OK) {
        return;
    }
    lab_i64(&modifier)[0] = 4, lab_i64(&modifier)[1] = 7;
    lab_i64(&modifier)[2] = lab_i64(&modifier)[3] = -1; /* the regularisation picture */
    /* The same heads as one batch. */
    attn_tensor flat[] = {attn_tensor_make(q.data, ATTN_F32, LAB_SHAPE(DEPTH * BATCH, ALL_HEADS, n, SIZE)),
                          attn_tensor_make(k.data, ATTN_F32, LAB_SHAPE(DEPTH * BATCH, ALL_HEADS, TEXT, SIZE)),
                          attn_tensor_make(v.data, ATTN_F32, LAB_SHAPE(DEPTH * BATCH, ALL_HEADS, TEXT, SIZE))};
    attn_named_tensor in[] = {{"q", flat[0]}, {"k", flat[1]}, {"v", flat[2]}};
    double alone = attn_lab_seconds(l, "disendiff.attention", in, 3, "o attn", 1),
           dense = attn_lab_seconds(l, "dense", in, 3, "o lse", 1);
    double fused = attn_lab_seconds(l, side == 16 ? "disendiff.train:grid=[16,16]" : "disendiff.train:grid=[4,4]",
                                    LAB_LIST({"q", q}, {"k", k}, {"v", v}, {"modifier", modifier}), "o loss", 1);
    attn_lab_claim_speed(l, fused <= 1.3 * alone,
                         "training with the loss takes at most 1.3 times attention's forward and backward alone",
                         "%.2f (%.2f times dense)", fused / alone, fused / dense);
}

static void run(lab *l)
{
    two_concepts(l);
    only_modifiers_move(l);
    cost(l);
}

const attn_lab_class attn_lab_disendiff = {
    .info = {.name = "disendiff", .title = "modifiers look where their classes do, only they move, and the loss costs little", .paper = "arXiv:2403.18551"},
    .run = run,
};
