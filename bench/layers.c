/* Shared parts and the mechanisms built on them: matrix products against the machine's peak. */
#include "bench.h"
#include "kernel/dispatch.h"
#include "layer/gemm.h"
#include <attn/op.h>

static double gemm_rate(attn_arena *arena, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k)
{
    float *a = bench_numbers(m * k, -1, 1, 1), *b = bench_numbers(k * n, -1, 1, 1), *c = bench_numbers(m * n, -1, 1, 1);
    double best = 1e30, work = 2.0 * (double)m * (double)n * (double)k, spent = 0;
    int repeats = work < 1e7 ? 100 : 1;
    while (spent < 0.15) {
        double start = bench_now(1);
        for (int r = 0; r < repeats; r++) {
            attn_gemm(arena, 1, trans_a, trans_b, m, n, k, 1.0f, a, trans_a ? m : k, b, trans_b ? k : n, 0.0f, c, n);
        }
        double time = bench_now(1) - start;
        spent += time;
        best = time / repeats < best ? time / repeats : best;
    }
    attn_free(a);
    attn_free(b);
    attn_free(c);
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
    bench_must(attn_op_create(&op, spec));
    bench_must(attn_op_outputs(op, in, in_count, out, &out_count));
    for (int i = 0; i < out_count; i++) {
        out[i].tensor.data = calloc((size_t)attn_tensor_count(&out[i].tensor) + 1, attn_dtype_size(out[i].tensor.dtype));
    }
    for (int r = 0; r < 4; r++) {
        attn_exec one = {.threads = 1};
        double start = bench_now(1);
        bench_must(attn_op_forward(op, in, in_count, out, out_count, &one));
        double time = bench_now(1) - start;
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
    t.tensor.data = bench_numbers(attn_tensor_count(&t.tensor), -1, 1, 1);
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
    bench_must(attn_arena_create(&arena, 0));
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
