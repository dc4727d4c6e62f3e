/* The pool executor beside dense: few queries over many tokens, one head.  bench_pool [THREADS] */
#include "exec/pool.h"

#include "core/random.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { REPEATS = 21, WIDTH = 64 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static attn_tensor make(attn_random *random, int64_t rows)
{
    int64_t shape[] = {1, 1, rows, WIDTH};
    float *data = malloc((size_t)(rows * WIDTH) * sizeof *data);
    if (data == NULL) {
        exit(1);
    }
    for (int64_t i = 0; i < rows * WIDTH; i++) {
        data[i] = (float)attn_random_normal(random);
    }
    return attn_tensor_make(data, ATTN_F32, 4, shape);
}

int main(int argc, char **argv)
{
    static const int64_t queries[] = {1, 8, 32, 64}, keys[] = {4096, 16384, 65536};
    int threads = argc > 1 ? atoi(argv[1]) : 2;
    attn_random random;
    attn_random_seed(&random, 1);
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    printf("%d threads, one head of %d: ms\n%8s %8s %8s %8s %8s\n", threads, WIDTH, "queries", "keys", "dense", "pool", "ratio");
    for (int m = 0; m < 3; m++) {
        for (int n = 0; n < 4; n++) {
            attn_tensor o = make(&random, queries[n]);
            attn_dense_inputs in = {.q = make(&random, queries[n]), .k = make(&random, keys[m]), .v = make(&random, keys[m])};
            attn_exec exec = {.threads = threads};
            attn_arena_create(&exec.arena, 0);
            double times[2][REPEATS];
            for (int r = -2; r < REPEATS; r++) {
                for (int pool = 0; pool < 2; pool++) {
                    double start = now();
                    attn_status status = (pool ? attn_pool_forward : attn_dense_forward)(&settings, &in, &o, NULL, &exec);
                    times[pool][r < 0 ? 0 : r] = now() - start;
                    if (status != ATTN_OK) {
                        fprintf(stderr, "%s\n", attn_last_error());
                        return 1;
                    }
                }
            }
            qsort(times[0], REPEATS, sizeof(double), ascending);
            qsort(times[1], REPEATS, sizeof(double), ascending);
            double dense = times[0][REPEATS / 2], pooled = times[1][REPEATS / 2];
            printf("%8lld %8lld %8.3f %8.3f %8.2f\n", (long long)queries[n], (long long)keys[m], 1e3 * dense, 1e3 * pooled, dense / pooled);
            attn_arena_destroy(exec.arena);
            free(o.data);
            free(in.q.data);
            free(in.k.data);
            free(in.v.data);
        }
    }
    return 0;
}
