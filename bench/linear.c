/* Linear attention in chunks and token by token: time per token of ever longer sequences, the share of this machine's peak, and that of
 * a plain pass over the state, all in one run.
 *     bench_linear [--threads N] [--repeats N] [--longest TOKENS]
 */
#include "bench.h"
#include "exec/linear.h"
#include "kernel/peak.h"
#include "kernel/tile.h"

#include <math.h>

typedef struct problem {
    attn_linattn shape;
    attn_arena *arena;
    int threads;
    float *q, *k, *v, *o, *state, *slope, *decays;
} problem;

static problem make(int64_t heads, int64_t n, int64_t d, int threads)
{
    problem p = {.threads = threads, .q = bench_numbers(heads * n * d, -1, 1, 1), .k = bench_numbers(heads * n * d, -1, 1, 2),
                 .v = bench_numbers(heads * n * d, -1, 1, 3), .o = bench_numbers(heads * n * d, 0, 0, 4),
                 .state = bench_numbers(heads * d * d, 0, 0, 5), .slope = bench_numbers(heads, 0.01, 0.1, 6),
                 .decays = bench_numbers(heads * n * d, 0.9, 1, 7)};
    p.shape = (attn_linattn){.batch = 1, .heads = heads, .kv_heads = heads, .n = n, .m = n, .d = d, .dv = d, .causal = 1, .scale = 1};
    bench_must(attn_arena_create(&p.arena, 0));
    return p;
}

static void drop(problem *p)
{
    float *memory[] = {p->q, p->k, p->v, p->o, p->state, p->slope, p->decays};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) {
        attn_free(memory[i]);
    }
    attn_arena_destroy(p->arena);
}

/* The fastest of some runs: other processes only ever slow one down. */
static double best_seconds(problem *p, int decode, int repeats)
{
    double best = INFINITY;
    for (int r = -1; r < repeats; r++) { /* the first one warms up */
        double start = bench_now(p->threads);
        bench_must(decode ? attn_linattn_decode(&p->shape, p->arena, p->threads, p->q, p->k, p->v, p->state, p->state, p->o)
                    : attn_linattn_forward(&p->shape, p->arena, p->threads, p->q, p->k, p->v, NULL, p->o, NULL));
        double seconds = bench_now(p->threads) - start;
        best = r >= 0 && seconds < best ? seconds : best;
    }
    return best;
}

static void lengths(int64_t d, int threads, int repeats, int64_t longest)
{
    const int64_t heads = 2;
    double peak = attn_peak_flops(threads), first = 0;
    for (int64_t n = 1024; n <= longest; n *= 4) {
        problem p = make(heads, n, d, threads);
        p.shape.slope = p.slope;
        int runs = (int)attn_min_i64(200, repeats * attn_max_i64(1, 65536 / n));
        double seconds = best_seconds(&p, 0, runs), token = seconds / (double)(heads * n);
        double rate = attn_linattn_flops(&p.shape) / seconds;
        first = first == 0 ? token : first;
        p.shape.slope = NULL;
        p.shape.decays = p.decays;
        double by_feature = best_seconds(&p, 0, runs) / (double)(heads * n);
        printf("| %3lld | %7lld | %7.1f | %5.2f | %6.1f | %5.1f%% | %7.1f |\n", (long long)d, (long long)n, token * 1e9, token / first,
               rate * 1e-9, 100 * rate / peak, by_feature * 1e9);
        fflush(stdout);
        drop(&p);
    }
}

/* One token for all heads, beside reading and writing the same memory once. */
static void decoding(int64_t d, int64_t heads, int threads, int repeats)
{
    problem p = make(heads, 1, d, threads);
    const attn_tile_kernels *tile = attn_tile_kernels_get();
    double pass = INFINITY, bytes = 2.0 * (double)(heads * d * d) * sizeof(float);
    p.shape.slope = p.slope;
    int runs = repeats * (int)attn_max_i64(1, (int64_t)(1e9 / bytes));
    double seconds = best_seconds(&p, 1, runs);
    for (int r = 0; r < runs; r++) {
        double start = bench_now(threads);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t h = 0; h < heads; h++) {
            tile->scale(p.state + h * d * d, d * d, 1.0f);
        }
        double passed = bench_now(threads) - start;
        pass = passed < pass ? passed : pass;
    }
    printf("| %3lld | %5lld | %8.2f MB | %9.2f us | %6.1f GB/s | %6.1f GB/s | %5.1f%% |\n", (long long)d, (long long)heads,
           bytes * 0.5e-6, seconds * 1e6, bytes / seconds * 1e-9, bytes / pass * 1e-9, 100 * pass / seconds);
    fflush(stdout);
    drop(&p);
}

int main(int argc, char **argv)
{
    int64_t threads = 1, repeats = 3, longest = 262144;
    const bench_option options[] = {BENCH_THREADS(threads), BENCH_REPEATS(repeats),
                                    {.name = "--longest", .number = &longest, .least = 1024, .most = INT32_MAX}};
    bench_options(argc, argv, "bench_linear [--threads N] [--repeats 1...99] [--longest 1024...]", 0, options, 3);
    const attn_exec exec = {.threads = (int)threads};
    threads = attn_exec_threads(&exec);
    printf("causal, one decay per head, 2 heads, %lld threads\n\n| D | tokens | ns per token and head | over the first | GFLOP/s | of the peak | decay by feature, ns |\n"
           "| --- | --- | --- | --- | --- | --- | --- |\n", (long long)threads);
    for (int64_t d = 64; d <= 128; d *= 2) {
        lengths(d, (int)threads, (int)repeats, longest);
    }
    printf("\none token\n\n| D | heads | state | time | decoding | reading and writing | share |\n| --- | --- | --- | --- | --- | --- | --- |\n");
    for (int64_t d = 64; d <= 128; d *= 2) {
        decoding(d, 8, (int)threads, (int)repeats);
        decoding(d, 64, (int)threads, (int)repeats);
        decoding(d, (int64_t)128 << 20 >> (d == 64 ? 14 : 16), (int)threads, (int)repeats);
    }
    return 0;
}
