/* Attention over key blocks against dense attention at the same size, in one run: the share of the ideal speed-up (the inverse of the
 * density) that is reached.
 *     bench_blocks [--threads N] [--tokens N] [--repeats N]
 */
#include "bench.h"
#include <attn/plan.h>

#include <math.h>

typedef struct problem {
    attn_dense_settings settings;
    attn_dense_inputs in;
    attn_tensor o, lse, grad_o, grad_q, grad_k, grad_v;
    attn_exec exec;
} problem;

/* The fastest of some runs: other processes only ever slow one down. plan NULL: dense. */
static double best_seconds(const problem *p, const attn_plan *plan, int backward, int repeats)
{
    double best = INFINITY;
    attn_dense_gradients to = {.q = &p->grad_q, .k = &p->grad_k, .v = &p->grad_v};
    for (int r = -1; r < repeats; r++) { /* the first one warms up */
        double start = bench_now(p->exec.threads);
        if (plan == NULL) {
            bench_must(backward ? attn_dense_backward(&p->settings, &p->in, &p->o, &p->lse, &p->grad_o, &to, &p->exec)
                          : attn_dense_forward(&p->settings, &p->in, &p->o, &p->lse, &p->exec));
        } else {
            bench_must(backward ? attn_plan_backward(plan, &p->settings, &p->in, &p->o, &p->lse, &p->grad_o, &to, &p->exec)
                          : attn_plan_forward(plan, &p->settings, &p->in, &p->o, &p->lse, &p->exec));
        }
        double seconds = bench_now(p->exec.threads) - start;
        best = r >= 0 && seconds < best ? seconds : best;
    }
    return best;
}

/* A share of all blocks at random, or in a band around the diagonal. */
static attn_plan *make_plan(int64_t n, int64_t block, double density, int banded)
{
    attn_plan *plan;
    attn_plan_shape shape = {1, 1, n, n, block, block};
    int64_t rows = attn_ceil_div(n, block), keep = (int64_t)(density * (double)rows + 0.5);
    attn_tensor flags = attn_tensor_make(calloc((size_t)(rows * rows), 1), ATTN_BOOL, 4, (int64_t[]){1, 1, rows, rows});
    attn_random random;
    attn_random_seed(&random, 7);
    for (int64_t r = 0; r < rows; r++) {
        uint8_t *row = (uint8_t *)flags.data + r * rows;
        for (int64_t kept = 0; kept < keep;) {
            int64_t c = banded ? attn_min_i64(attn_max_i64(r - keep / 2, 0), rows - keep) + kept
                               : (int64_t)attn_random_below(&random, (uint64_t)rows);
            kept += !row[c];
            row[c] = 1;
        }
    }
    bench_must(attn_plan_from_flags(&plan, &shape, &flags, NULL));
    free(flags.data);
    return plan;
}

static void bench(int64_t n, int64_t d, int threads, int repeats)
{
    int64_t h = 2;
    problem p = {.in = {.q = bench_tensor(h, n, d, 1), .k = bench_tensor(h, n, d, 2), .v = bench_tensor(h, n, d, 3)}, .o = bench_tensor(h, n, d, 4),
                 .lse = bench_tensor(h, n, 1, 5), .grad_o = bench_tensor(h, n, d, 6), .grad_q = bench_tensor(h, n, d, 7), .grad_k = bench_tensor(h, n, d, 8),
                 .grad_v = bench_tensor(h, n, d, 9), .exec = {.threads = threads}};
    p.lse.ndim = 3;
    p.lse = attn_tensor_make(p.lse.data, ATTN_F32, 3, (int64_t[]){1, h, n});
    attn_dense_defaults(&p.settings);
    bench_must(attn_arena_create(&p.exec.arena, 0));
    double forward = best_seconds(&p, NULL, 0, repeats), backward = best_seconds(&p, NULL, 1, repeats);
    printf("| %3lld | dense | | 100%% | %8.1f ms | 100%% | %8.1f ms | 100%% |\n", (long long)d, forward * 1e3, backward * 1e3);
    const double densities[] = {0.5, 0.25, 0.1, 0.05};
    for (int64_t block = 64; block <= 128; block *= 2) {
        for (int i = 0; i < 8; i++) {
            attn_plan *plan = make_plan(n, block, densities[i / 2], i % 2);
            attn_plan_measures measures;
            attn_plan_measure(plan, d, d, &measures);
            double f = best_seconds(&p, plan, 0, repeats), b = best_seconds(&p, plan, 1, repeats);
            printf("| %3lld | %5lld | %-6s | %4.1f%% | %8.1f ms | %5.1f%% | %8.1f ms | %5.1f%% |\n", (long long)d, (long long)block,
                   i % 2 ? "band" : "random", 100 * measures.density, f * 1e3, 100 * forward / f / measures.speedup, b * 1e3,
                   100 * backward / b / measures.speedup);
            fflush(stdout);
            attn_plan_destroy(plan);
        }
    }
    void *memory[] = {p.in.q.data, p.in.k.data, p.in.v.data, p.o.data, p.lse.data, p.grad_o.data, p.grad_q.data, p.grad_k.data,
                      p.grad_v.data};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) {
        attn_free(memory[i]);
    }
    attn_arena_destroy(p.exec.arena);
}

int main(int argc, char **argv)
{
    int64_t threads = 0, repeats = 3, tokens = 16384;
    const bench_option options[] = {BENCH_THREADS(threads), BENCH_REPEATS(repeats),
                                    {.name = "--tokens", .number = &tokens, .least = 2560, .most = INT32_MAX}};
    bench_options(argc, argv, "bench_blocks [--threads N] [--tokens 2560...] [--repeats 1...99]", 0, options, 3);
    printf("%lld tokens, 2 heads, f32, best of %lld; shares are of the ideal speed-up over dense\n\n"
           "| D | block | pattern | density | forward | share | backward | share |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n",
           (long long)tokens, (long long)repeats);
    bench(tokens, 64, (int)threads, (int)repeats);
    bench(tokens, 128, (int)threads, (int)repeats);
    return 0;
}
