/* Exact attention against this machine's multiply-add peak and read bandwidth, in one run.
 *     bench_dense [--threads N] [--quick] [--decode] [--repeats N]
 */
#include "bench.h"
#include "kernel/dispatch.h"
#include "kernel/peak.h"
#include <attn/dense.h>

typedef struct problem {
    attn_dense_settings settings;
    attn_dense_inputs in;
    attn_tensor o, lse, grad_o, grad_q, grad_k, grad_v;
    attn_exec exec;
} problem;

static double median_seconds(const problem *p, int backward, int repeats)
{
    double times[BENCH_MOST_REPEATS];
    for (int r = -1; r < repeats; r++) { /* the first one warms up */
        double start = bench_now(0);
        if (backward) {
            attn_dense_gradients to = {.q = &p->grad_q, .k = &p->grad_k, .v = &p->grad_v};
            bench_must(attn_dense_backward(&p->settings, &p->in, &p->o, &p->lse, &p->grad_o, &to, &p->exec));
        } else {
            bench_must(attn_dense_forward(&p->settings, &p->in, &p->o, &p->lse, &p->exec));
        }
        if (r >= 0) {
            times[r] = bench_now(0) - start;
        }
    }
    return bench_median(times, repeats);
}

static void bench_square(int64_t n, int64_t d, int causal, int threads, double peak, int repeats)
{
    int64_t h = 8;
    problem p = {.in = {.q = bench_tensor(h, n, d, 1), .k = bench_tensor(h, n, d, 2), .v = bench_tensor(h, n, d, 3)},
                 .o = bench_tensor(h, n, d, 4), .lse = bench_tensor(h, n, 1, 5), .grad_o = bench_tensor(h, n, d, 6),
                 .grad_q = bench_tensor(h, n, d, 7), .grad_k = bench_tensor(h, n, d, 8), .grad_v = bench_tensor(h, n, d, 9),
                 .exec = {.threads = threads}};
    p.lse.ndim = 3;
    p.lse = attn_tensor_make(p.lse.data, ATTN_F32, 3, (int64_t[]){1, h, n});
    bench_must(attn_arena_create(&p.exec.arena, 0));
    attn_dense_defaults(&p.settings);
    p.settings.causal = causal;
    double pairs = (double)h * (causal ? (double)n * (double)(n + 1) / 2 : (double)n * (double)n);
    double flops = pairs * 4 * (double)d, f = median_seconds(&p, 0, repeats), b = median_seconds(&p, 1, repeats);
    printf("| %6lld | %3lld | %-6s | %8.2f ms %6.1f GFLOP/s %5.1f%% | %8.2f ms %6.1f GFLOP/s %5.1f%% |\n", (long long)n, (long long)d,
           causal ? "causal" : "full", f * 1e3, flops / f * 1e-9, 100 * flops / f / peak, b * 1e3, 2.5 * flops / b * 1e-9,
           100 * 2.5 * flops / b / peak);
    fflush(stdout);
    void *memory[] = {p.in.q.data, p.in.k.data, p.in.v.data, p.o.data, p.lse.data, p.grad_o.data, p.grad_q.data, p.grad_k.data,
                      p.grad_v.data};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) {
        attn_free(memory[i]);
    }
    attn_arena_destroy(p.exec.arena);
}

static void bench_decode(attn_dtype dtype, int threads, double bandwidth, int repeats)
{
    int64_t m = 32768, d = 128, hkv = 8, h = 4 * hkv;
    problem p = {.in = {.q = bench_tensor(h, 1, d, 1), .k = bench_cache(dtype, hkv, m, d, 2), .v = bench_cache(dtype, hkv, m, d, 3)},
                 .o = bench_tensor(h, 1, d, 4),
                 .lse = attn_tensor_make(bench_memory(h, sizeof(float)), ATTN_F32, 3, (int64_t[]){1, h, 1}),
                 .exec = {.threads = threads}};
    attn_tensor scales = attn_tensor_make(bench_numbers(hkv * m, -1, 1, 5), ATTN_F32, 3, (int64_t[]){1, hkv, m});
    if (dtype == ATTN_I8) {
        p.in.k_scale = p.in.v_scale = &scales;
    }
    bench_must(attn_arena_create(&p.exec.arena, 0));
    attn_dense_defaults(&p.settings);
    double bytes = 2.0 * (double)(hkv * m * d) * (double)attn_dtype_size(dtype), t = median_seconds(&p, 0, repeats);
    printf("| decode %-4s | %8.3f ms | %6.1f GB/s | %5.1f%% |\n", attn_dtype_name(dtype), t * 1e3, bytes / t * 1e-9,
           100 * bytes / t / bandwidth);
    fflush(stdout);
    void *memory[] = {p.in.q.data, p.in.k.data, p.in.v.data, p.o.data, p.lse.data, scales.data};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) {
        attn_free(memory[i]);
    }
    attn_arena_destroy(p.exec.arena);
}

int main(int argc, char **argv)
{
    int64_t wanted = 0, repeats = 5;
    int quick = 0, only_decode = 0;
    const bench_option options[] = {BENCH_THREADS(wanted), BENCH_REPEATS(repeats), {.name = "--quick", .flag = &quick},
                                    {.name = "--decode", .flag = &only_decode}};
    bench_options(argc, argv, "bench_dense [--threads N] [--quick] [--decode] [--repeats 1...99]", 0, options, 4);
    attn_exec exec = {.threads = (int)wanted};
    int threads = attn_exec_threads(&exec);
    double peak = attn_peak_flops(threads), bandwidth = attn_peak_bandwidth(threads);
    printf("%s, %d threads: peak %.1f GFLOP/s, read bandwidth %.1f GB/s; H = 8, f32, medians of %lld\n\n", attn_isa_name(attn_isa_current()),
           threads, peak * 1e-9, bandwidth * 1e-9, (long long)repeats);
    printf("| N = M | D | mask | forward | backward |\n| --- | --- | --- | --- | --- |\n");
    const int64_t lengths[] = {128, 256, 512, 4096, 16384};
    for (int i = 0; i < (only_decode ? 0 : quick ? 4 : 5); i++) {
        for (int64_t d = 64; d <= 128; d += 64) {
            for (int causal = 0; causal < 2; causal++) {
                int64_t some = lengths[i] <= 512 ? repeats * 5 : lengths[i] > 4096 ? (repeats + 1) / 2 : repeats;
                bench_square(lengths[i], d, causal, threads, peak, (int)attn_min_i64(some, BENCH_MOST_REPEATS));
            }
        }
    }
    printf("\n32,768 keys, 8 key/value heads, 4 query heads each, D = 128\n\n| cache | time | read | share of bandwidth |\n| --- | --- | --- | --- |\n");
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
    for (int i = 0; i < 4; i++) {
        bench_decode(types[i], threads, bandwidth, (int)attn_min_i64(repeats * 3, BENCH_MOST_REPEATS));
    }
    return 0;
}
