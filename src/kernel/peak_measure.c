#include "core/internal.h"
#include "kernel/peak.h"

#include <omp.h>
#include <string.h>

ATTN_KERNEL_TABLES(attn_peak_kernels, attn_peak_kernels_table);

#define RUNS 7
#define ROUNDS 2000000L
#define BYTES ((size_t)256 << 20)

double attn_peak_flops(int threads)
{
    const attn_peak_kernels *kernels = ATTN_KERNEL_SELECT(attn_peak_kernels_table, attn_isa_current());
    double best = 0, keep = 0;
    for (int run = 0; run < RUNS; run++) {
        double total = 0, start = 0, seconds = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total, keep)
        {
            double flops;
            keep += kernels->multiply_add(ROUNDS / 20, &flops); /* wakes the units up */
#pragma omp barrier
#pragma omp master
            start = omp_get_wtime();
            keep += kernels->multiply_add(ROUNDS, &flops);
            total += flops;
#pragma omp barrier
#pragma omp master
            seconds = omp_get_wtime() - start;
        }
        best = seconds > 0 && total / seconds > best ? total / seconds : best;
    }
    return keep > -1e300 ? best : 0;
}

double attn_peak_bandwidth(int threads)
{
    const attn_peak_kernels *kernels = ATTN_KERNEL_SELECT(attn_peak_kernels_table, attn_isa_current());
    float *data = attn_alloc(BYTES);
    if (data == NULL) {
        return 0;
    }
    long count = (long)(BYTES / sizeof *data) / threads / 256 * 256;
    double best = 0, keep = 0;
#pragma omp parallel num_threads(threads)
    {
        memset(data + omp_get_thread_num() * count, 1, (size_t)count * sizeof *data);
    }
    for (int run = 0; run < RUNS; run++) {
        double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : keep)
        {
            keep += (double)kernels->read(data + omp_get_thread_num() * count, count);
        }
        double rate = (double)count * threads * sizeof *data / (omp_get_wtime() - start);
        best = rate > best ? rate : best;
    }
    attn_free(data);
    return keep > -1e300 ? best : 0;
}
