/* What this machine can do at most, measured: everything that benchmarks report is a share of it. */
#ifndef ATTN_KERNEL_PEAK_H
#define ATTN_KERNEL_PEAK_H

#include "kernel/dispatch.h"

/* f32 multiply-add peak on `threads` threads with the current instruction set, in FLOP/s (two per multiply-add): the best of several
 * short runs of a register-only loop. */
double attn_peak_flops(int threads);
/* Read bandwidth on `threads` threads in bytes/s: the best of several sweeps over memory larger than the caches. 0 when there is
 * not enough memory to measure. */
double attn_peak_bandwidth(int threads);

typedef struct attn_peak_kernels {
    double (*multiply_add)(long rounds, double *flops); /* runs the loop; the result only keeps it alive */
    float (*read)(const float *data, long count);       /* count a multiple of 256 */
} attn_peak_kernels;

#endif
