/* Neighborhood attention: what fusing and tiles gain over plain loops, the published bounds of the analytical model, and how much of
 * a bound the executor realises. */
#include "lab/lab.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>

enum { HEADS = 4, WIDTH = 64 };

/* ---- The analytical model ---- */

static double simulated(lab *l, const char *setting, const char *output)
{
    char spec[256];
    snprintf(spec, sizeof spec, "neighborhood.simulate:%s", setting);
    attn_tensor t = attn_lab_output(l, spec, NULL, 0, output);
    return l->status != ATTN_OK ? 0 : t.dtype == ATTN_BOOL ? (double)lab_bool(&t)[0] : (double)lab_f32(&t)[0];
}

static void bounds(lab *l)
{
    static const struct {
        const char *setting;
        double published;
    } known[] = {
        {"grid=[32768],kernel=2048,q_tile=256,kv_tile=128", 14.32},
        {"grid=[32768],kernel=2048,q_tile=256,kv_tile=128,stride=256", 16.0},
        {"grid=[256,256],kernel=80,q_tile=16,kv_tile=[16,8]", 7.06},
        {"grid=[256,256],kernel=80,q_tile=16,kv_tile=[16,8],stride=16", 10.24},
        {"grid=[30,48,80],kernel=[18,24,24],q_tile=[4,8,8],kv_tile=[2,8,8]", 4.92},
        {"grid=[30,48,80],kernel=[18,24,24],q_tile=[4,8,8],kv_tile=[2,8,8],stride=[16,8,8]", 10.42},
    };
    double worst = 0;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        double speedup = simulated(l, known[i].setting, "speedup");
        attn_lab_print(l, "%-84s %5.2f (published %5.2f)", known[i].setting, speedup, known[i].published);
        worst = fmax(worst, fabs(speedup - known[i].published));
    }
    attn_lab_claim(l, worst < 0.006, "the model gives the published bounds", "largest difference %.3f", worst);
    int sparse = 0, at = 0;
    for (int stride = 1; stride < 400; stride += attn_lab_small(l) ? 51 : 1) {
        char setting[96];
        snprintf(setting, sizeof setting, "grid=[32768],kernel=2048,q_tile=256,kv_tile=128,stride=%d", stride);
        if (simulated(l, setting, "block_sparse") > 0) {
            sparse++;
            at = stride;
        }
    }
    attn_lab_claim(l, sparse == 1 && at == 256, "of the strides below 400 only 256 is block-sparse there",
                   "%d, the last one %d", sparse, at);
    double flat = simulated(l, "grid=[64,64],kernel=24,q_tile=8,kv_tile=8,tiling=single", "speedup");
    double tiles = simulated(l, "grid=[64,64],kernel=24,q_tile=8,kv_tile=8", "speedup");
    double strided = simulated(l, "grid=[64,64],kernel=24,q_tile=8,kv_tile=8,stride=8", "speedup");
    attn_lab_claim(l, flat < tiles && tiles < strided,
                   "tiles of the grid realise more than tiles of consecutive tokens, and a stride all of it",
                   "%.2f, %.2f, %.2f times", flat, tiles, strided);
}

/* ---- Plain loops, halves, fused ---- */

typedef struct image {
    int64_t rows, columns, kernel[2];
    const int64_t *start; /* [rows * columns][2] */
} image;

/* o of all heads, query by query: dot products, softmax, weighted sum. */
static void plain_loops(const image *g, int threads, const float *q, const float *k, const float *v, float *scores, float *o)
{
    int64_t n = g->rows * g->columns, slots = g->kernel[0] * g->kernel[1];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < HEADS * n; i++) {
        int64_t head = i / n * n, first = g->start[2 * (i % n)] * g->columns + g->start[2 * (i % n) + 1];
        float *s = scores + i * slots, top = -INFINITY, sum = 0;
        for (int64_t j = 0; j < slots; j++) {
            const float *key = k + (head + first + j / g->kernel[1] * g->columns + j % g->kernel[1]) * WIDTH;
            float dot = 0;
            for (int c = 0; c < WIDTH; c++) {
                dot += q[i * WIDTH + c] * key[c];
            }
            s[j] = dot / 8; /* sqrt(WIDTH) */
            top = fmaxf(top, s[j]);
        }
        memset(o + i * WIDTH, 0, WIDTH * sizeof *o);
        for (int64_t j = 0; j < slots; j++) {
            const float *value = v + (head + first + j / g->kernel[1] * g->columns + j % g->kernel[1]) * WIDTH;
            float p = expf(s[j] - top);
            sum += p;
            for (int c = 0; c < WIDTH; c++) {
                o[i * WIDTH + c] += p * value[c];
            }
        }
        for (int c = 0; c < WIDTH; c++) {
            o[i * WIDTH + c] /= sum;
        }
    }
}

static void softmax_rows(int threads, int64_t rows, int64_t slots, const float *scores, float *w)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *s = scores + r * slots;
        float top = -INFINITY, sum = 0;
        for (int64_t j = 0; j < slots; j++) {
            top = fmaxf(top, s[j]);
        }
        for (int64_t j = 0; j < slots; j++) {
            w[r * slots + j] = expf(s[j] - top);
            sum += w[r * slots + j];
        }
        for (int64_t j = 0; j < slots; j++) {
            w[r * slots + j] /= sum;
        }
    }
}

/* rows 1: one axis. least: how many times as fast as plain loops the fused operator has to be. */
static void forms(lab *l, int64_t rows, int64_t columns, int64_t kernel_rows, int64_t kernel_columns, double least)
{
    int64_t n = rows * columns, slots = kernel_rows * kernel_columns;
    int threads = l->settings->threads > 0 ? l->settings->threads : omp_get_max_threads();
    char setting[96], spec[128];
    attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, n, WIDTH)),
                k = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, n, WIDTH));
    attn_tensor v = attn_lab_normal(l, 1, LAB_SHAPE(1, HEADS, n, WIDTH)),
                plain = attn_lab_zeros(l, ATTN_F32, 4, v.shape);
    attn_tensor w = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(1, HEADS, n, slots));
    snprintf(setting, sizeof setting, "grid=[%lld,%lld],kernel=[%lld,%lld]", (long long)rows, (long long)columns, (long long)kernel_rows,
             (long long)kernel_columns);
    snprintf(spec, sizeof spec, "neighborhood.mask:%s", setting);
    attn_tensor start = attn_lab_output(l, spec, NULL, 0, "start");
    snprintf(spec, sizeof spec, "neighborhood.qk:%s", setting);
    double half = attn_lab_seconds(l, spec, LAB_LIST({"q", q}, {"k", k}), "scores", 0);
    attn_tensor scores = attn_lab_output(l, spec, LAB_LIST({"q", q}, {"k", k}), "scores");
    if (l->status != ATTN_OK) {
        return;
    }
    double begin = attn_lab_now();
    softmax_rows(threads, HEADS * n, slots, lab_f32(&scores), lab_f32(&w));
    double soft = attn_lab_now() - begin;
    snprintf(spec, sizeof spec, "neighborhood.av:%s", setting);
    double unfused = half + soft + attn_lab_seconds(l, spec, LAB_LIST({"w", w}, {"v", v}), "o", 0);
    attn_tensor joined = attn_lab_output(l, spec, LAB_LIST({"w", w}, {"v", v}), "o");
    begin = attn_lab_now();
    plain_loops(&(image){rows, columns, {kernel_rows, kernel_columns}, lab_i64(&start)}, threads, lab_f32(&q), lab_f32(&k), lab_f32(&v),
                lab_f32(&w), lab_f32(&plain));
    double naive = attn_lab_now() - begin;
    snprintf(spec, sizeof spec, "neighborhood:%s", setting);
    double fused = attn_lab_seconds(l, spec, LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o", 0);
    attn_tensor o = attn_lab_output(l, spec, LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o");
    double off = fmax(attn_lab_distance(l, &plain, &o), attn_lab_distance(l, &joined, &o));
    double wide = attn_lab_memory(l, spec, LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o");
    snprintf(spec, sizeof spec, "neighborhood:grid=[%lld,%lld],kernel=[%lld,%lld]", (long long)rows, (long long)columns,
             (long long)(kernel_rows + 2) / 3, (long long)(kernel_columns + 2) / 3);
    double narrow = attn_lab_memory(l, spec, LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o");
    attn_lab_print(l, "%s: plain loops %.1f ms, halves %.1f ms, fused %.2f ms", setting, 1e3 * naive, 1e3 * unfused,
                   1e3 * fused);
    attn_lab_claim(l, off < 1e-5, "plain loops, halves and the fused operator agree", "relative difference %.1e", off);
    attn_lab_claim_speed(l, fused < unfused && unfused < naive && naive > least * fused,
                         "fused is faster than the halves, and these than loops",
                         "%.1f and %.1f times as fast as loops, expected %.0f of the fused one", naive / fused,
                         naive / unfused, least);
    /* What remains is the window of the tiles that threads work on. */
    double all = 4e-6 * (double)(HEADS * n * slots);
    attn_lab_claim_speed(l, 1e-6 * (wide - narrow) < 0.1 * all, "memory hardly depends on the window",
                         "%.2f MB, %.2f with a third of it per axis; the halves keep scores of %.1f", 1e-6 * wide,
                         1e-6 * narrow, all);
}

/* ---- Against dense ---- */

static void realised(lab *l, const char *grid, int64_t n, const char *tile, int kernel, int stride)
{
    char setting[96], spec[192];
    double share[2];
    attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(1, 1, n, WIDTH)),
                k = attn_lab_normal(l, 1, LAB_SHAPE(1, 1, n, WIDTH));
    attn_tensor v = attn_lab_normal(l, 1, LAB_SHAPE(1, 1, n, WIDTH));
    double dense = attn_lab_seconds(l, "dense", LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o", 0), gap[2], bound[2];
    for (int strided = 0; strided < 2; strided++) {
        snprintf(setting, sizeof setting, "grid=%s,kernel=%d,stride=%d", grid, kernel, strided ? stride : 1);
        snprintf(spec, sizeof spec, "%s,q_tile=%s,kv_tile=%s", setting, tile, tile);
        bound[strided] = simulated(l, spec, "speedup");
        snprintf(spec, sizeof spec, "neighborhood:%s", setting);
        gap[strided] = dense / attn_lab_seconds(l, spec, LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o", 0);
        share[strided] = bound[strided] > 0 ? gap[strided] / bound[strided] : 0;
    }
    attn_lab_claim_speed(
        l, share[0] >= 0.75 && share[1] >= 0.85 && gap[1] > gap[0], "what the model promises is realised",
        "%s, kernel %d: %.2f of %.2f times as fast as dense (%.0f %%), stride %d: %.2f of %.2f (%.0f %%)", grid, kernel,
        gap[0], bound[0], 100 * share[0], stride, gap[1], bound[1], 100 * share[1]);
}

static void run(lab *l)
{
    bounds(l);
    if (attn_lab_small(l)) {
        forms(l, 1, 256, 1, 33, 5);
        forms(l, 16, 16, 5, 5, 3);
        realised(l, "[16,16]", 256, "8", 8, 8);
    } else {
        forms(l, 1, 8192, 1, 255, 5);
        forms(l, 64, 64, 15, 15, 3);
        realised(l, "[64,64]", 4096, "8", 24, 8);
        realised(l, "[16,32,32]", 16384, "4", 12, 4);
    }
}

const attn_lab_class attn_lab_neighborhood = {
    .info = {.name = "neighborhood", .title = "fused windows against halves and loops; the bounds of the analytical model",
             .paper = "arXiv:2403.04690, arXiv:2504.16922"},
    .run = run,
};
