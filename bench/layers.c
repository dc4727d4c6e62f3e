/* Shared parts and the mechanisms built on them: matrix products against the machine's peak. */
#include "core/internal.h"
#include "core/random.h"
#include "kernel/dispatch.h"
#include "layer/gemm.h"

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
    return 0;
}
