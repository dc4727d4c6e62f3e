/* What the benchmarks share: time, random numbers, medians and options. Errors end the program with the library's message. */
#ifndef ATTN_BENCH_H
#define ATTN_BENCH_H

#include "core/internal.h"
#include "core/random.h"
#include <attn/tensor.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* With one thread its own time counts, so that other processes disturb less. */
static inline double bench_now(int threads)
{
    struct timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static inline void bench_must(attn_status status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        exit(1);
    }
}

/* Memory as the caches and activations of language models lie; freed by attn_free(). */
static inline void *bench_memory(int64_t count, size_t size)
{
    void *memory = attn_alloc_array((size_t)count, size);
    bench_must(memory != NULL ? ATTN_OK : attn_fail_memory((size_t)count * size));
    return memory;
}

static inline float *bench_numbers(int64_t count, double low, double high, uint64_t seed)
{
    float *x = bench_memory(count, sizeof *x);
    attn_random random;
    attn_random_seed(&random, seed);
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)(low + (high - low) * attn_random_uniform(&random));
    }
    return x;
}

/* [1, h, n, d], numbers from -1 to 1 */
static inline attn_tensor bench_tensor(int64_t h, int64_t n, int64_t d, uint64_t seed)
{
    return attn_tensor_make(bench_numbers(h * n * d, -1, 1, seed), ATTN_F32, 4, (int64_t[]){1, h, n, d});
}

/* The same of a cache's type, of usual size: products of far smaller numbers would be slow. */
static inline attn_tensor bench_cache(attn_dtype dtype, int64_t h, int64_t n, int64_t d, uint64_t seed)
{
    double most = dtype == ATTN_I8 ? 127 : 1;
    attn_tensor x = attn_tensor_make(bench_numbers(h * n * d, -most, most, seed), ATTN_F32, 4, (int64_t[]){1, h, n, d});
    if (dtype == ATTN_F32) {
        return x;
    }
    attn_tensor cache = attn_tensor_make(bench_memory(h * n * d, attn_dtype_size(dtype)), dtype, 4, x.shape);
    bench_must(attn_tensor_copy(&cache, &x));
    attn_free(x.data);
    return cache;
}

static inline int bench_by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts them. */
static inline double bench_median(double *times, int count)
{
    qsort(times, (size_t)count, sizeof *times, bench_by_value);
    return times[count / 2];
}

/* --name: with a whole number from least to most behind it, or any word, or nothing. One of the three pointers is set. */
typedef struct bench_option {
    const char *name;
    int64_t *number, least, most;
    const char **word;
    int *flag;
} bench_option;

/* Reads the options and moves what is none of them to the front of argv; returns how many those are, at most `others`. Ends the program
 * with the usage, the rest of a line, when it finds anything else. */
static inline int bench_options(int argc, char **argv, const char *usage, int others, const bench_option *options, int count)
{
    int found = 0;
    for (int i = 1; i < argc; i++) {
        const bench_option *o = options;
        while (o < options + count && strcmp(argv[i], o->name) != 0) {
            o++;
        }
        char *end = "";
        int good = 1;
        if (o == options + count) {
            good = argv[i][0] != '-' && found < others;
            argv[found++] = argv[i];
        } else if (o->flag != NULL) {
            *o->flag = 1;
        } else if (i + 1 == argc) {
            good = 0;
        } else if (o->word != NULL) {
            *o->word = argv[++i];
        } else {
            *o->number = strtoll(argv[++i], &end, 10);
            good = *end == '\0' && *o->number >= o->least && *o->number <= o->most;
        }
        if (!good) {
            fprintf(stderr, "unexpected '%s'\nusage: %s\n", argv[i], usage);
            exit(2);
        }
    }
    return found;
}

/* What --threads and --repeats of the benchmarks mean: 0 threads are all that there are. */
#define BENCH_THREADS(variable) {.name = "--threads", .number = &(variable), .most = 1024}
#define BENCH_REPEATS(variable) {.name = "--repeats", .number = &(variable), .least = 1, .most = BENCH_MOST_REPEATS}
#define BENCH_MOST_REPEATS 99

#endif
