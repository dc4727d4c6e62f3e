/* Retrieval heads: a circuit with planted copying heads (detection, ranking, recall, masking), and what detection costs while decoding. */
#include "lab/lab.h"
#include <attn/dense.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { HEADS = 32, WIDTH = 64, VOCABULARY = 1000, PROMPT = 400, NEEDLE = 150, NEEDLE_END = 170, STEPS = 20, PLANTED = 4 };

/* One layer: planted heads have the code of the token before each position as its key and of its own token as its value, and the code
 * of the current token as their query; the others are noise. */
typedef struct circuit {
    attn_tensor codes; /* [VOCABULARY, WIDTH], unit rows */
    int64_t tokens[PROMPT + STEPS];
    attn_tensor q, k, v; /* [1,HEADS,STEPS or keys,WIDTH] */
} circuit;

static int planted(int64_t head) { return head % (HEADS / PLANTED) == 3; }

static void make_circuit(lab *l, circuit *c)
{
    c->codes = attn_lab_normal(l, 1, LAB_SHAPE(VOCABULARY, WIDTH));
    c->q = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, STEPS, WIDTH));
    c->k = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, PROMPT + STEPS - 1, WIDTH));
    c->v = attn_lab_normal(l, 0.1, LAB_SHAPE(1, HEADS, PROMPT + STEPS - 1, WIDTH));
    int64_t order[VOCABULARY];
    for (int64_t i = 0; i < VOCABULARY && l->status == ATTN_OK; i++) {
        float *code = lab_f32(&c->codes) + i * WIDTH;
        double size = 0;
        for (int d = 0; d < WIDTH; d++) {
            size += (double)code[d] * (double)code[d];
        }
        for (int d = 0; d < WIDTH; d++) {
            code[d] = (float)((double)code[d] / sqrt(size));
        }
        order[i] = i;
    }
    for (int64_t i = 0; i < PROMPT; i++) {
        int64_t j = i + (int64_t)attn_random_below(&l->random, (uint64_t)(VOCABULARY - i)), token = order[j];
        order[j] = order[i];
        order[i] = token;
        c->tokens[i] = token;
    }
    c->tokens[PROMPT - 1] = c->tokens[NEEDLE - 1]; /* the cue */
}

static void place(circuit *c, int64_t head, int64_t position, int64_t step)
{
    const float *codes = lab_f32(&c->codes);
    int64_t keys = PROMPT + STEPS - 1;
    float *k = lab_f32(&c->k) + (head * keys + position) * WIDTH, *v = lab_f32(&c->v) + (head * keys + position) * WIDTH;
    memcpy(v, codes + c->tokens[position] * WIDTH, WIDTH * sizeof *v);
    if (position > 0) {
        memcpy(k, codes + c->tokens[position - 1] * WIDTH, WIDTH * sizeof *k);
    } else {
        memset(k, 0, WIDTH * sizeof *k);
    }
    for (int64_t d = 0; d < WIDTH && step >= 0; d++) {
        lab_f32(&c->q)[(head * STEPS + step) * WIDTH + d] = 12 * sqrtf(WIDTH) * codes[c->tokens[position] * WIDTH + d];
    }
}

/* Attention of the heads of one step: masked ones give the mean value, windowed ones see 4 first and 64 last keys. */
static attn_tensor attend(lab *l, const attn_tensor *q, const attn_tensor *k, const attn_tensor *v, const uint8_t *masked,
                          const uint8_t *windowed)
{
    attn_tensor mask = attn_lab_zeros(l, ATTN_BOOL, LAB_SHAPE(HEADS));
    for (int64_t h = 0; h < HEADS && l->status == ATTN_OK; h++) {
        lab_bool(&mask)[h] = masked != NULL && masked[h];
    }
    attn_tensor o =
        attn_lab_output(l, "retrieval_head.mask", LAB_LIST({"q", *q}, {"k", *k}, {"v", *v}, {"heads", mask}), "o");
    if (windowed != NULL) {
        attn_tensor near =
            attn_lab_output(l, "streaming:sinks=4,recent=64", LAB_LIST({"q", *q}, {"k", *k}, {"v", *v}), "o");
        for (int64_t h = 0; h < HEADS && l->status == ATTN_OK; h++) {
            if (windowed[h]) {
                memcpy(lab_f32(&o) + h * WIDTH, lab_f32(&near) + h * WIDTH, WIDTH * sizeof(float));
            }
        }
    }
    return o;
}

/* Greedy decoding with some heads masked or windowed (NULL: none); fills tokens, queries, keys and values of the steps. Recall of the needle. */
static double generate(lab *l, circuit *c, const uint8_t *masked, const uint8_t *windowed)
{
    int64_t keys = PROMPT + STEPS - 1;
    for (int64_t h = 0; h < HEADS; h++) {
        for (int64_t j = 0; j < PROMPT - 1 && planted(h) && l->status == ATTN_OK; j++) {
            place(c, h, j, -1);
        }
    }
    int found = 0;
    for (int64_t s = 0; s < STEPS && l->status == ATTN_OK; s++) {
        int64_t at = PROMPT - 1 + s, best = 0;
        for (int64_t h = 0; h < HEADS; h++) {
            if (planted(h)) {
                place(c, h, at, s);
            }
        }
        attn_tensor q = c->q, k = c->k, v = c->v;
        q.data = lab_f32(&c->q) + s * WIDTH;
        q.shape[2] = 1;
        k.shape[2] = v.shape[2] = at + 1;
        k.stride[1] = v.stride[1] = keys * WIDTH;
        attn_tensor o = attend(l, &q, &k, &v, masked, windowed);
        double best_score = -INFINITY;
        for (int64_t token = 0; token < VOCABULARY && l->status == ATTN_OK; token++) {
            double score = 0;
            for (int64_t i = 0; i < HEADS * WIDTH; i++) {
                score += (double)lab_f32(&o)[i] * (double)lab_f32(&c->codes)[token * WIDTH + i % WIDTH];
            }
            best = score > best_score ? token : best;
            best_score = score > best_score ? score : best_score;
        }
        c->tokens[PROMPT + s] = best;
        found += best == c->tokens[NEEDLE + s];
    }
    return (double)found / STEPS;
}

static void planted_circuit(lab *l)
{
    int seeds = attn_lab_small(l) ? 1 : 5;
    double plain = 0, four = 0, two = 0, others = 0, kept = 0, lost = 0, low = 1, high = 0;
    attn_tensor scores = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(seeds, 1, HEADS));
    for (int seed = 0; seed < seeds; seed++) {
        circuit c;
        make_circuit(l, &c);
        plain += generate(l, &c, NULL, NULL) / seeds;
        attn_tensor ids = attn_tensor_make(c.tokens, ATTN_I64, 1, (int64_t[]){PROMPT});
        attn_tensor generated = attn_tensor_make(c.tokens + PROMPT, ATTN_I64, 1, (int64_t[]){STEPS});
        attn_tensor score =
            attn_lab_output(l, "retrieval_head:needle_start=150,needle_end=170",
                            LAB_LIST({"q", c.q}, {"k", c.k}, {"prompt", ids}, {"generated", generated}), "score");
        uint8_t best[HEADS] = {0}, half[HEADS] = {0}, noise[HEADS] = {0};
        for (int64_t h = 0, seen = 0; h < HEADS && l->status == ATTN_OK; h++) {
            double x = (double)lab_f32(&score)[h];
            lab_f32(&scores)[seed * HEADS + h] = (float)x;
            if (planted(h)) {
                low = x < low ? x : low;
                best[h] = 1;
                half[h] = seen++ < PLANTED / 2;
                noise[h + 1] = 1;
            } else {
                high = x > high ? x : high;
            }
        }
        four += generate(l, &c, best, NULL) / seeds;
        two += generate(l, &c, half, NULL) / seeds;
        others += generate(l, &c, noise, NULL) / seeds;
        lost += generate(l, &c, NULL, best) / seeds;
        for (int64_t h = 0; h < HEADS; h++) {
            best[h] = !best[h];
        }
        kept += generate(l, &c, NULL, best) / seeds;
    }
    attn_tensor retrieval = attn_lab_output(l, "retrieval_head.rank", LAB_LIST({"scores", scores}), "retrieval");
    int found = 0, right = 0;
    for (int64_t h = 0; h < HEADS && l->status == ATTN_OK; h++) {
        found += lab_bool(&retrieval)[h];
        right += lab_bool(&retrieval)[h] && planted(h);
    }
    attn_lab_print(l, "%d planted copying heads among %d, needle of %d tokens in %d, %d seed(s)", PLANTED, HEADS, STEPS,
                   PROMPT, seeds);
    attn_lab_claim(l, plain > 0.99 && low > 0.99 && high <= 0.1, "planted heads score 1, others nearly 0",
                   "recall %.2f, lowest planted score %.2f, highest other %.2f", plain, low, high);
    attn_lab_claim(l, found == PLANTED && right == PLANTED, "ranking finds exactly the planted heads",
                   "%d found, %d of them planted", found, right);
    attn_lab_claim(
        l, four <= 0.05 + 1e-9 && two > 0.99 && others > 0.99, "only the loss of all retrieval heads destroys recall",
        "recall %.2f without the four, %.2f without two of them, %.2f without four others", four, two, others);
    double cache = (PLANTED * (double)PROMPT + (HEADS - PLANTED) * 68.0) / (HEADS * (double)PROMPT);
    attn_lab_claim(l, kept > 0.99 && lost <= 0.05 + 1e-9,
                   "only retrieval heads need the whole cache; a window and first tokens do for the others",
                   "recall %.2f with %.0f %% of the cache, %.2f when the retrieval heads have the window", kept,
                   100 * cache, lost);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void detection_cost(lab *l)
{
    enum { REPEATS = 41 };
    int64_t keys = attn_lab_small(l) ? 1024 : 16384;
    attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(1, 16, 1, 128)),
                o = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(1, 16, 1, 128));
    attn_tensor k = attn_lab_normal(l, 1, LAB_SHAPE(1, 4, keys, 128)),
                v = attn_lab_normal(l, 1, LAB_SHAPE(1, 4, keys, 128));
    attn_tensor top = attn_lab_zeros(l, ATTN_I64, LAB_SHAPE(1, 16, 1));
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    attn_dense_inputs in = {.q = q, .k = k, .v = v};
    double times[2][REPEATS];
    for (int r = 0; r < REPEATS && l->status == ATTN_OK; r++) {
        for (int traced = 0; traced < 2; traced++) { /* in turn, so that both see the same machine */
            attn_exec exec = {.threads = l->settings->threads, .arena = l->arena};
            double start = now();
            attn_lab_check(l, attn_dense_forward_top(&settings, &in, &o, NULL, traced ? &top : NULL, &exec));
            times[traced][r] = now() - start;
        }
    }
    if (l->status != ATTN_OK) {
        return;
    }
    qsort(times[0], REPEATS, sizeof times[0][0], ascending);
    qsort(times[1], REPEATS, sizeof times[1][0], ascending);
    double plain = times[0][REPEATS / 2], traced = times[1][REPEATS / 2];
    attn_lab_claim_speed(l, traced <= 1.03 * plain, "knowing the strongest key costs decoding at most 3 %",
                         "%.0f and %.0f us over %lld keys (%+.1f %%)", 1e6 * plain, 1e6 * traced, (long long)keys,
                         100 * (traced / plain - 1));
}

static void run(lab *l)
{
    planted_circuit(l);
    detection_cost(l);
}

const attn_lab_class attn_lab_retrieval_head = {
    .info = {.name = "retrieval_head", .title = "copying heads are found, and recall depends on them alone", .paper = "arXiv:2404.15574"},
    .run = run,
};
