/* Shared parts and the mechanisms built on them: matrix products against the machine's peak. */
#include "core/internal.h"
#include "core/random.h"
#include "kernel/dispatch.h"
#include "layer/gemm.h"
#include <attn/op.h>

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static float *numbers(int64_t count)
{
    float *data = malloc((size_t)count * sizeof(float));
    attn_random random;
    attn_random_seed(&random, 1);
    for (int64_t i = 0; data != NULL && i < count; i++) {
        data[i] = (float)attn_random_normal(&random);
    }
    return data;
}

static double gemm_rate(attn_arena *arena, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k)
{
    float *a = numbers(m * k), *b = numbers(k * n), *c = numbers(m * n);
    double best = 1e30, work = 2.0 * (double)m * (double)n * (double)k, spent = 0;
    int repeats = work < 1e7 ? 100 : 1;
    while (spent < 0.15) {
        double start = now();
        for (int r = 0; r < repeats; r++) {
            attn_gemm(arena, 1, trans_a, trans_b, m, n, k, 1.0f, a, trans_a ? m : k, b, trans_b ? k : n, 0.0f, c, n);
        }
        double time = now() - start;
        spent += time;
        best = time / repeats < best ? time / repeats : best;
    }
    free(a);
    free(b);
    free(c);
    return work / best * 1e-9;
}

/* Seconds of a mechanism's forward pass on one thread, the best of several; its operations in *flops. */
static double op_time(const char *spec, attn_named_tensor *in, int in_count, double *flops)
{
    attn_op *op;
    attn_named_tensor out[8];
    attn_cost cost = {0, 0, 0};
    int out_count = 8;
    double best = 1e30;
    if (attn_op_create(&op, spec) != ATTN_OK || attn_op_outputs(op, in, in_count, out, &out_count) != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        exit(1);
    }
    for (int i = 0; i < out_count; i++) {
        out[i].tensor.data = calloc((size_t)attn_tensor_count(&out[i].tensor) + 1, attn_dtype_size(out[i].tensor.dtype));
    }
    for (int r = 0; r < 4; r++) {
        attn_exec one = {.threads = 1};
        double start = now();
        if (attn_op_forward(op, in, in_count, out, out_count, &one) != ATTN_OK) {
            fprintf(stderr, "%s\n", attn_last_error());
            exit(1);
        }
        double time = now() - start;
        best = time < best ? time : best;
    }
    attn_op_cost(op, in, in_count, &cost);
    *flops = cost.flops;
    for (int i = 0; i < out_count; i++) {
        free(out[i].tensor.data);
    }
    attn_op_destroy(op);
    return best;
}

static attn_named_tensor input(const char *name, int ndim, const int64_t *shape)
{
    attn_named_tensor t = {name, attn_tensor_make(NULL, ATTN_F32, ndim, shape)};
    t.tensor.data = numbers(attn_tensor_count(&t.tensor));
    return t;
}

/* Mixture-of-head attention against all heads, and RAT against chunks of one token. */
static void mechanisms(void)
{
    enum { H = 16, N = 2048, D = 64, C = 256 };
    const int64_t heads[] = {1, H, N, D};
    attn_named_tensor in[] = {input("q", 4, heads), input("k", 4, heads), input("v", 4, heads), input("x", 3, (int64_t[]){1, N, C}),
                              input("wg", 2, (int64_t[]){H - 4, C}), input("wg_0", 2, (int64_t[]){2, C}),
                              input("wg_1", 2, (int64_t[]){4, C}), input("g", 4, heads)};
    double flops, all, dense = op_time("dense:causal=true", in, 3, &all);
    printf("\nmoh, 16 heads of 64, 2048 tokens, causal: time / dense\n");
    for (int k = 2; k <= 12; k += 2) {
        char spec[64];
        snprintf(spec, sizeof spec, "moh:shared_heads=4,top_k=%d,causal=true", k);
        double time = op_time(spec, in, 7, &flops);
        printf("  %2d heads of 16: time %.3f, operations %.3f\n", 4 + k, time / dense, flops / all);
    }
    in[3] = in[7];
    double one = op_time("rat:chunk=1", in, 4, &all);
    printf("rat, the same sizes: time / chunk of 1\n");
    for (int chunk = 4; chunk <= 64; chunk *= 4) {
        char spec[64];
        snprintf(spec, sizeof spec, "rat:chunk=%d", chunk);
        double time = op_time(spec, in, 4, &flops);
        printf("  chunk %2d: time %.3f, operations %.3f\n", chunk, time / one, flops / all);
    }
}

int main(void)
{
    attn_arena *arena;
    if (attn_arena_create(&arena, 0) != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        return 1;
    }
    static const int64_t sizes[][3] = {{12, 32, 256},  {64, 64, 64},    {128, 128, 64},   {128, 128, 128},  {256, 256, 256}, {512, 512, 512},
                                       {1024, 1024, 1024}, {1536, 1536, 1536}, {1, 1024, 1024}, {4, 1024, 1024}, {16, 1024, 1024},
                                       {2048, 64, 64},  {2048, 2048, 64}, {64, 64, 2048}, {1000, 30, 200}};
    printf("gemm, one thread, %s, GFLOP/s\n%-18s %8s %8s %8s %8s\n", attn_isa_name(attn_isa_current()), "m x n x k", "A B",
           "A' B", "A B'", "A' B'");
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        const int64_t *z = sizes[s];
        char name[64];
        snprintf(name, sizeof name, "%lldx%lldx%lld", (long long)z[0], (long long)z[1], (long long)z[2]);
        printf("%-18s %8.1f %8.1f %8.1f %8.1f\n", name, gemm_rate(arena, 0, 0, z[0], z[1], z[2]),
               gemm_rate(arena, 1, 0, z[0], z[1], z[2]), gemm_rate(arena, 0, 1, z[0], z[1], z[2]),
               gemm_rate(arena, 1, 1, z[0], z[1], z[2]));
    }
    attn_arena_destroy(arena);
    mechanisms();
    return 0;
}
