/* The pool executor beside dense: few queries over many tokens, one head.
 *     bench_pool [--threads N]
 */
#include "bench.h"
#include "exec/pool.h"

enum { REPEATS = 21, WIDTH = 64 };

int main(int argc, char **argv)
{
    static const int64_t queries[] = {1, 8, 32, 64}, keys[] = {4096, 16384, 65536};
    int64_t wanted = 0;
    const bench_option options[] = {BENCH_THREADS(wanted)};
    bench_options(argc, argv, "bench_pool [--threads N]", 0, options, 1);
    attn_exec exec = {.threads = (int)wanted};
    int threads = exec.threads = attn_exec_threads(&exec);
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    printf("%d threads, one head of %d: ms\n%8s %8s %8s %8s %8s\n", threads, WIDTH, "queries", "keys", "dense", "pool", "ratio");
    for (int m = 0; m < 3; m++) {
        for (int n = 0; n < 4; n++) {
            attn_tensor o = bench_tensor(1, queries[n], WIDTH, 1);
            attn_dense_inputs in = {.q = bench_tensor(1, queries[n], WIDTH, 2), .k = bench_tensor(1, keys[m], WIDTH, 3),
                                    .v = bench_tensor(1, keys[m], WIDTH, 4)};
            bench_must(attn_arena_create(&exec.arena, 0));
            double times[2][REPEATS];
            for (int r = -2; r < REPEATS; r++) {
                for (int pool = 0; pool < 2; pool++) {
                    double start = bench_now(threads);
                    bench_must((pool ? attn_pool_forward : attn_dense_forward)(&settings, &in, &o, NULL, &exec));
                    times[pool][r < 0 ? 0 : r] = bench_now(threads) - start;
                }
            }
            double dense = bench_median(times[0], REPEATS), pooled = bench_median(times[1], REPEATS);
            printf("%8lld %8lld %8.3f %8.3f %8.2f\n", (long long)queries[n], (long long)keys[m], 1e3 * dense, 1e3 * pooled, dense / pooled);
            attn_arena_destroy(exec.arena);
            void *memory[] = {in.q.data, in.k.data, in.v.data, o.data};
            for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) {
                attn_free(memory[i]);
            }
        }
    }
    return 0;
}
