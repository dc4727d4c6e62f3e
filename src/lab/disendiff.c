/* Calibrated cross-attention: what training moves, and what the fused loss costs. */
#include "lab/lab.h"

#include <math.h>
#include <string.h>

/* AdamW without decay on the squared distance of looked-up rows from a target, with gradients of disendiff.embed. */
static void only_modifiers_move(lab *l)
{
    enum { WORDS = 50, WIDTH = 8, TEXT = 12, STEPS = 30, SIZE = WORDS * WIDTH };
    attn_tensor table = lab_normal(l, 1, LAB_SHAPE(WORDS, WIDTH)), target = lab_normal(l, 1, LAB_SHAPE(2, TEXT, WIDTH));
    attn_tensor ids = lab_zeros(l, ATTN_I64, LAB_SHAPE(2, TEXT)), modifiers = lab_zeros(l, ATTN_I64, LAB_SHAPE(2));
    attn_tensor first = lab_zeros(l, ATTN_F32, LAB_SHAPE(WORDS, WIDTH)), grad = lab_zeros(l, ATTN_F32, LAB_SHAPE(WORDS, WIDTH));
    double mean[SIZE] = {0}, square[SIZE] = {0}, distance[2] = {0, 0};
    attn_op *op = NULL;
    lab_check(l, attn_op_create(&op, "disendiff.embed"));
    if (l->status != ATTN_OK) {
        return;
    }
    for (int i = 0; i < 2 * TEXT; i++) {
        lab_i64(&ids)[i] = i % 5 == 0 ? 7 : i % 5 == 1 ? 31 : (int64_t)attn_random_below(&l->random, WORDS);
    }
    lab_i64(&modifiers)[0] = 7, lab_i64(&modifiers)[1] = 31;
    memcpy(first.data, table.data, SIZE * sizeof(float));
    for (int step = 1; step <= STEPS && l->status == ATTN_OK; step++) {
        attn_named_tensor in[] = {{"table", table}, {"ids", ids}, {"modifiers", modifiers}}, to = {"table", grad};
        attn_tensor o = lab_output(l, "disendiff.embed", in, 3, "o");
        attn_named_tensor grad_o = {"o", o};
        for (int i = 0; i < 2 * TEXT * WIDTH && l->status == ATTN_OK; i++) {
            lab_f32(&o)[i] -= lab_f32(&target)[i];
        }
        lab_check(l, attn_op_backward(op, in, 3, NULL, 0, &grad_o, 1, &to, 1, NULL));
        for (int i = 0; i < SIZE && l->status == ATTN_OK; i++) {
            double g = (double)lab_f32(&grad)[i];
            mean[i] = 0.9 * mean[i] + 0.1 * g;
            square[i] = 0.999 * square[i] + 0.001 * g * g;
            double by = 0.02 * mean[i] / (1 - pow(0.9, step)) / (sqrt(square[i] / (1 - pow(0.999, step))) + 1e-8);
            lab_f32(&table)[i] = (float)((double)lab_f32(&table)[i] - by);
        }
    }
    for (int i = 0; i < SIZE && l->status == ATTN_OK; i++) {
        int row = i / WIDTH;
        distance[row == 7 || row == 31] += fabs((double)lab_f32(&table)[i] - (double)lab_f32(&first)[i]);
    }
    attn_op_destroy(op);
    lab_claim(l, distance[0] == 0 && distance[1] > 0.1, "training moves the modifiers' rows and leaves all others bit by bit",
              "others by %g, modifiers by %.2f", distance[0], distance[1]);
}

static void cost(lab *l)
{
    enum { LAYERS = 5, BATCH = 2, HEADS = 8, TEXT = 77, WIDTH = 40 };
    int64_t side = lab_small(l) ? 4 : 16, n = side * side;
    attn_tensor q = lab_normal(l, 1, LAB_SHAPE(LAYERS, BATCH, HEADS, n, WIDTH)), k = lab_normal(l, 1, LAB_SHAPE(LAYERS, BATCH, HEADS, TEXT, WIDTH));
    attn_tensor v = lab_normal(l, 1, LAB_SHAPE(LAYERS, BATCH, HEADS, TEXT, WIDTH)), modifier = lab_zeros(l, ATTN_I64, LAB_SHAPE(BATCH, 2));
    if (l->status != ATTN_OK) {
        return;
    }
    lab_i64(&modifier)[0] = 4, lab_i64(&modifier)[1] = 7;
    lab_i64(&modifier)[2] = lab_i64(&modifier)[3] = -1; /* the regularisation picture */
    /* The same heads as one batch. */
    attn_tensor flat[] = {attn_tensor_make(q.data, ATTN_F32, LAB_SHAPE(LAYERS * BATCH, HEADS, n, WIDTH)),
                          attn_tensor_make(k.data, ATTN_F32, LAB_SHAPE(LAYERS * BATCH, HEADS, TEXT, WIDTH)),
                          attn_tensor_make(v.data, ATTN_F32, LAB_SHAPE(LAYERS * BATCH, HEADS, TEXT, WIDTH))};
    attn_named_tensor in[] = {{"q", flat[0]}, {"k", flat[1]}, {"v", flat[2]}};
    double alone = lab_seconds(l, "disendiff.attention", in, 3, "o attn", 1), dense = lab_seconds(l, "dense", in, 3, "o lse", 1);
    double fused = lab_seconds(l, side == 16 ? "disendiff.train:grid=[16,16]" : "disendiff.train:grid=[4,4]",
                               LAB_LIST({"q", q}, {"k", k}, {"v", v}, {"modifier", modifier}), "o loss", 1);
    lab_claim_speed(l, fused <= 1.3 * alone, "training with the loss takes at most 1.3 times attention's forward and backward alone",
                    "%.2f (%.2f times dense)", fused / alone, fused / dense);
}

static void run(lab *l)
{
    only_modifiers_move(l);
    cost(l);
}

const attn_lab_class attn_lab_disendiff = {
    .info = {.name = "disendiff", .title = "only modifiers move, and the loss costs little", .paper = "arXiv:2403.18551"},
    .run = run,
};
