/* Exact attention against this machine's multiply-add peak and read bandwidth, in one run.
 *     bench_dense [--threads N] [--quick] [--decode] [--repeats N]
 */
#include "core/internal.h"
#include "core/random.h"
#include "kernel/dispatch.h"
#include "kernel/peak.h"
#include <attn/dense.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static float *random_floats(size_t count, uint64_t seed)
{
    float *x = malloc(count * sizeof *x);
    attn_random random;
    attn_random_seed(&random, seed);
    for (size_t i = 0; x != NULL && i < count; i++) {
        x[i] = (float)(attn_random_uniform(&random) * 2 - 1);
    }
    return x;
}

typedef struct problem {
    attn_dense_settings settings;
    attn_dense_inputs in;
    attn_tensor o, lse, grad_o, grad_q, grad_k, grad_v;
    attn_exec exec;
} problem;

static void must(attn_status status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        exit(1);
    }
}

static double median_seconds(const problem *p, int backward, int repeats)
{
    double times[99];
    for (int r = -1; r < repeats; r++) { /* the first one warms up */
        double start = now();
        if (backward) {
            attn_dense_gradients to = {.q = &p->grad_q, .k = &p->grad_k, .v = &p->grad_v};
            must(attn_dense_backward(&p->settings, &p->in, &p->o, &p->lse, &p->grad_o, &to, &p->exec));
        } else {
            must(attn_dense_forward(&p->settings, &p->in, &p->o, &p->lse, &p->exec));
        }
        if (r >= 0) {
            times[r] = now() - start;
        }
    }
    qsort(times, (size_t)repeats, sizeof times[0], by_value);
    return times[repeats / 2];
}

static attn_tensor floats(int64_t b, int64_t h, int64_t n, int64_t d, uint64_t seed)
{
    return attn_tensor_make(random_floats((size_t)(b * h * n * d), seed), ATTN_F32, 4, (int64_t[]){b, h, n, d});
}

static void bench_square(int64_t n, int64_t d, int causal, int threads, double peak, int repeats)
{
    int64_t h = 8;
    problem p = {.in = {.q = floats(1, h, n, d, 1), .k = floats(1, h, n, d, 2), .v = floats(1, h, n, d, 3)},
                 .o = floats(1, h, n, d, 4), .lse = floats(1, h, n, 1, 5), .grad_o = floats(1, h, n, d, 6),
                 .grad_q = floats(1, h, n, d, 7), .grad_k = floats(1, h, n, d, 8), .grad_v = floats(1, h, n, d, 9),
                 .exec = {.threads = threads}};
    p.lse.ndim = 3;
    p.lse = attn_tensor_make(p.lse.data, ATTN_F32, 3, (int64_t[]){1, h, n});
    must(attn_arena_create(&p.exec.arena, 0));
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
        free(memory[i]);
    }
    attn_arena_destroy(p.exec.arena);
}

/* Some random numbers over and over, of a cache's type and usual size: products of far smaller ones would be slow. */
static void fill(void *to, attn_dtype dtype, size_t count, uint64_t seed)
{
    size_t size = attn_dtype_size(dtype), some = 65536;
    float *x = random_floats(some, seed);
    if (x == NULL) {
        must(ATTN_ERR_MEMORY);
    }
    for (size_t i = 0; dtype == ATTN_I8 && i < some; i++) {
        x[i] *= 127;
    }
    attn_tensor first = attn_tensor_make(to, dtype, 1, (int64_t[]){(int64_t)some});
    attn_tensor numbers = attn_tensor_make(x, ATTN_F32, 1, first.shape);
    must(attn_tensor_copy(&first, &numbers));
    for (size_t done = some; done < count; done += some) {
        memcpy((char *)to + done * size, to, (count - done < some ? count - done : some) * size);
    }
    free(x);
}

static void bench_decode(attn_dtype dtype, int threads, double bandwidth, int repeats)
{
    int64_t m = 32768, d = 128, hkv = 8, h = 4 * hkv;
    size_t size = attn_dtype_size(dtype), count = (size_t)(hkv * m * d);
    problem p = {.in = {.q = floats(1, h, 1, d, 1)}, .o = floats(1, h, 1, d, 4), .exec = {.threads = threads}};
    /* As the caches of language models lie. */
    void *k = attn_alloc_array(count, size), *v = attn_alloc_array(count, size);
    if (k == NULL || v == NULL) {
        must(ATTN_ERR_MEMORY);
    }
    fill(k, dtype, count, 2);
    fill(v, dtype, count, 3);
    attn_tensor scales = attn_tensor_make(random_floats((size_t)(hkv * m), 5), ATTN_F32, 3, (int64_t[]){1, hkv, m});
    p.in.k = attn_tensor_make(k, dtype, 4, (int64_t[]){1, hkv, m, d});
    p.in.v = attn_tensor_make(v, dtype, 4, (int64_t[]){1, hkv, m, d});
    if (dtype == ATTN_I8) {
        p.in.k_scale = p.in.v_scale = &scales;
    }
    p.lse = attn_tensor_make(random_floats((size_t)h, 6), ATTN_F32, 3, (int64_t[]){1, h, 1});
    must(attn_arena_create(&p.exec.arena, 0));
    attn_dense_defaults(&p.settings);
    double bytes = 2.0 * (double)count * (double)size, t = median_seconds(&p, 0, repeats);
    printf("| decode %-4s | %8.3f ms | %6.1f GB/s | %5.1f%% |\n", attn_dtype_name(dtype), t * 1e3, bytes / t * 1e-9,
           100 * bytes / t / bandwidth);
    fflush(stdout);
    attn_free(k);
    attn_free(v);
    free(scales.data);
    free(p.in.q.data);
    free(p.o.data);
    free(p.lse.data);
    attn_arena_destroy(p.exec.arena);
}

int main(int argc, char **argv)
{
    int threads = 0, quick = 0, only_decode = 0, repeats = 5;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
            threads = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--repeats") == 0 && i + 1 < argc) {
            repeats = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--quick") == 0) {
            quick = 1;
        } else if (strcmp(argv[i], "--decode") == 0) {
            only_decode = 1;
        } else {
            fprintf(stderr, "usage: bench_dense [--threads N] [--quick] [--decode] [--repeats 1...99]\n");
            return 2;
        }
    }
    repeats = repeats < 1 ? 1 : repeats > 99 ? 99 : repeats;
    attn_exec exec = {.threads = threads};
    threads = attn_exec_threads(&exec);
    double peak = attn_peak_flops(threads), bandwidth = attn_peak_bandwidth(threads);
    printf("%s, %d threads: peak %.1f GFLOP/s, read bandwidth %.1f GB/s; H = 8, f32, medians of %d\n\n", attn_isa_name(attn_isa_current()),
           threads, peak * 1e-9, bandwidth * 1e-9, repeats);
    printf("| N = M | D | mask | forward | backward |\n| --- | --- | --- | --- | --- |\n");
    const int64_t lengths[] = {128, 256, 512, 4096, 16384};
    for (int i = 0; i < (only_decode ? 0 : quick ? 4 : 5); i++) {
        for (int64_t d = 64; d <= 128; d += 64) {
            for (int causal = 0; causal < 2; causal++) {
                int some = lengths[i] <= 512 ? repeats * 5 : lengths[i] > 4096 ? (repeats + 1) / 2 : repeats;
                bench_square(lengths[i], d, causal, threads, peak, some > 99 ? 99 : some);
            }
        }
    }
    printf("\n32,768 keys, 8 key/value heads, 4 query heads each, D = 128\n\n| cache | time | read | share of bandwidth |\n| --- | --- | --- | --- |\n");
    const attn_dtype types[] = {ATTN_F32, ATTN_F16, ATTN_BF16, ATTN_I8};
    for (int i = 0; i < 4; i++) {
        bench_decode(types[i], threads, bandwidth, repeats * 3 > 99 ? 99 : repeats * 3);
    }
    return 0;
}
