/* One-token decoding over lists of keys against dense decoding of the same cache, in one run.
 *     bench_gather [--threads N] [--repeats N]
 */
#include "bench.h"
#include <attn/plan.h>

#define KEYS 32768
#define KV_HEADS 8
#define GROUP 4
#define PLANS 16 /* taken in turn, so that the keys of one call are not in cache for the next */

/* plans NULL: dense. */
static double median_seconds(attn_plan *const *plans, const attn_dense_settings *settings, const attn_dense_inputs *in, const attn_tensor *o,
                             const attn_exec *exec, int repeats)
{
    double times[BENCH_MOST_REPEATS];
    for (int r = -2; r < repeats; r++) {
        double start = bench_now(exec->threads);
        bench_must(plans != NULL ? attn_plan_forward(plans[(r + 2) % PLANS], settings, in, o, NULL, exec) : attn_dense_forward(settings, in, o, NULL, exec));
        if (r >= 0) {
            times[r] = bench_now(exec->threads) - start;
        }
    }
    return bench_median(times, repeats);
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
    bench_must(attn_plan_from_flags(&plan, &shape, &flags, NULL));
    free(flags.data);
    return plan;
}

int main(int argc, char **argv)
{
    int64_t threads = 0, repeats = 31;
    const bench_option options[] = {BENCH_THREADS(threads), BENCH_REPEATS(repeats)};
    bench_options(argc, argv, "bench_gather [--threads N] [--repeats 1...99]", 0, options, 2);
    attn_exec exec = {.threads = (int)threads};
    bench_must(attn_arena_create(&exec.arena, 0));
    printf("decoding, %d keys, %d key/value heads, %d query heads each, D = 128, medians of %lld\n\n"
           "| cache | keys | time | speed-up |\n| --- | --- | --- | --- |\n", KEYS, KV_HEADS, GROUP, (long long)repeats);
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16};
    for (int i = 0; i < 3; i++) {
        attn_random random;
        attn_random_seed(&random, 1);
        attn_dense_settings settings;
        attn_dense_defaults(&settings);
        attn_dense_inputs in = {.q = bench_tensor(KV_HEADS * GROUP, 1, 128, 1), .k = bench_cache(types[i], KV_HEADS, KEYS, 128, 2),
                                .v = bench_cache(types[i], KV_HEADS, KEYS, 128, 3)};
        attn_tensor o = bench_tensor(KV_HEADS * GROUP, 1, 128, 4);
        double dense = median_seconds(NULL, &settings, &in, &o, &exec, (int)repeats);
        printf("| %-4s | all | %8.3f ms | 1 |\n", attn_dtype_name(types[i]), dense * 1e3);
        for (int64_t count = 256; count <= 4096; count *= 2) {
            attn_plan *plans[PLANS];
            for (int j = 0; j < PLANS; j++) {
                plans[j] = random_lists(count, &random);
            }
            double t = median_seconds(plans, &settings, &in, &o, &exec, (int)repeats);
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
