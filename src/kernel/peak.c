#include "kernel/peak.h"
#include "kernel/vec.h"

/* Enough independent chains to hide the latency of a multiply-add on two or more units. */
#define CHAINS (V_REGISTERS == 32 ? 24 : 12)

static double multiply_add(long rounds, double *flops)
{
    vf x[CHAINS], a = v_set1(0.999f), b = v_set1(1e-3f);
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) {
        x[i] = v_set1((float)i);
    }
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 24
        for (int i = 0; i < CHAINS; i++) {
            x[i] = v_fma(x[i], a, b);
        }
    }
    vf sum = v_zero();
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) {
        sum = v_add(sum, x[i]);
    }
    *flops = 2.0 * CHAINS * VW * (double)rounds;
    return (double)v_sum(sum);
}

static float read(const float *data, long count)
{
    vf sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        sum[i] = v_zero();
    }
    for (long j = 0; j < count; j += 16 * VW) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            sum[i] = v_add(sum[i], v_load(data + j + i * VW));
        }
    }
#pragma GCC unroll 16
    for (int i = 1; i < 16; i++) {
        sum[0] = v_add(sum[0], sum[i]);
    }
    return v_sum(sum[0]);
}

extern const attn_peak_kernels ATTN_K(attn_peak_kernels_table);
const attn_peak_kernels ATTN_K(attn_peak_kernels_table) = {multiply_add, read};
