/* One-token decoding over lists of keys against dense decoding of the same cache, in one run.
 *     bench_gather [--threads N] [--repeats N]
 */
#include "core/internal.h"
#include "core/random.h"
#include <attn/plan.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define KEYS 32768
#define KV_HEADS 8
#define GROUP 4
#define PLANS 16 /* taken in turn, so that the keys of one call are not in cache for the next */

/* With one thread its own time counts, so that other processes disturb less. */
static double now(int threads)
{
    struct timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void must(attn_status status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        exit(1);
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static attn_tensor numbers(attn_dtype dtype, int64_t h, int64_t n, int64_t d, attn_random *random)
{
    attn_tensor t = attn_tensor_make(NULL, ATTN_F32, 4, (int64_t[]){1, h, n, d}), converted = t;
    /* As the caches of language models lie. */
    float *x = t.data = attn_alloc_array((size_t)(h * n * d), sizeof *x);
    for (int64_t i = 0; i < h * n * d; i++) {
        x[i] = (float)(attn_random_uniform(random) * 2 - 1);
    }
    if (dtype != ATTN_F32) {
        converted.dtype = dtype;
        converted.data = attn_alloc_array((size_t)(h * n * d), attn_dtype_size(dtype));
        must(attn_tensor_copy(&converted, &t));
        attn_free(x);
        return converted;
    }
    return t;
}

/* plans NULL: dense. */
static double median_seconds(attn_plan *const *plans, const attn_dense_settings *settings, const attn_dense_inputs *in, const attn_tensor *o,
                             const attn_exec *exec, int repeats)
{
    double times[999];
    for (int r = -2; r < repeats; r++) {
        double start = now(exec->threads);
        must(plans != NULL ? attn_plan_forward(plans[(r + 2) % PLANS], settings, in, o, NULL, exec) : attn_dense_forward(settings, in, o, NULL, exec));
        if (r >= 0) {
            times[r] = now(exec->threads) - start;
        }
    }
    qsort(times, (size_t)repeats, sizeof times[0], by_value);
    return times[repeats / 2];
}

static attn_plan *random_lists(int64_t count, attn_random *random)
{
    attn_plan *plan;
    attn_plan_shape shape = {1, KV_HEADS, 1, KEYS, 1, 1};
    attn_tensor flags = attn_tensor_make(calloc(KV_HEADS * KEYS, 1), ATTN_BOOL, 4, (int64_t[]){1, KV_HEADS, 1, KEYS});
    for (int64_t h = 0; h < KV_HEADS; h++) {
        for (int64_t kept = 0; kept < count;) {
            uint8_t *flag = (uint8_t *)flags.data + h * KEYS + (int64_t)attn_random_below(random, KEYS);
            kept += !*flag;
            *flag = 1;
        }
    }
    must(attn_plan_from_flags(&plan, &shape, &flags, NULL));
    free(flags.data);
    return plan;
}

int main(int argc, char **argv)
{
    attn_exec exec = {0};
    int repeats = 31;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
            exec.threads = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--repeats") == 0 && i + 1 < argc) {
            repeats = atoi(argv[++i]);
        } else {
            fprintf(stderr, "usage: bench_gather [--threads N] [--repeats 1...999]\n");
            return 2;
        }
    }
    repeats = repeats < 1 ? 1 : repeats > 999 ? 999 : repeats;
    must(attn_arena_create(&exec.arena, 0));
    printf("decoding, %d keys, %d key/value heads, %d query heads each, D = 128, medians of %d\n\n"
           "| cache | keys | time | speed-up |\n| --- | --- | --- | --- |\n", KEYS, KV_HEADS, GROUP, repeats);
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    for (int i = 0; i < 3; i++) {
        attn_random random;
        attn_random_seed(&random, 1);
        attn_dense_settings settings;
        attn_dense_defaults(&settings);
        attn_dense_inputs in = {.q = numbers(ATTN_F32, KV_HEADS * GROUP, 1, 128, &random), .k = numbers(types[i], KV_HEADS, KEYS, 128, &random),
                                .v = numbers(types[i], KV_HEADS, KEYS, 128, &random)};
        attn_tensor o = numbers(ATTN_F32, KV_HEADS * GROUP, 1, 128, &random);
        double dense = median_seconds(NULL, &settings, &in, &o, &exec, repeats);
        printf("| %-4s | all | %8.3f ms | 1 |\n", attn_dtype_name(types[i]), dense * 1e3);
        for (int64_t count = 256; count <= 4096; count *= 2) {
            attn_plan *plans[PLANS];
            for (int j = 0; j < PLANS; j++) {
                plans[j] = random_lists(count, &random);
            }
            double t = median_seconds(plans, &settings, &in, &o, &exec, repeats);
            printf("| %-4s | %lld | %8.3f ms | %.1f |\n", attn_dtype_name(types[i]), (long long)count, t * 1e3, dense / t);
            for (int j = 0; j < PLANS; j++) {
                attn_plan_destroy(plans[j]);
            }
        }
        attn_free(in.q.data);
        attn_free(in.k.data);
        attn_free(in.v.data);
        attn_free(o.data);
    }
    attn_arena_destroy(exec.arena);
    return 0;
}
