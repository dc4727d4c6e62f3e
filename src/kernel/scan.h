/* Micro-kernels of recurrences that keep channels apart: lanes of a vector are channels, tokens go by one after another. */
#ifndef ATTN_KERNEL_SCAN_H
#define ATTN_KERNEL_SCAN_H

#include "kernel/dispatch.h"
#include <stdint.h>

/* h[s] = lam h[s] + gain v b[s], o = sum over s of h[s] c[s] + skip v, for each of `channels` channels with `states` states each. */
typedef struct attn_scan {
    int64_t n, channels, states, ld, ld_gain; /* between tokens' rows of v, lam and o; of gain */
    const float *v, *gain; /* rows of channels; gain may be NULL (1) */
    const float *lam;      /* rows of channels; or NULL, and then lam = 2^(gain rate[s]) */
    const float *rate;     /* [states][channels] */
    const float *b, *c;    /* [n][states]; both NULL with lam: ones */
    const float *skip;     /* [channels] or NULL */
    float *h;              /* [states][channels]: the state before, and after */
    float *o;
} attn_scan;

/* Gradients of h[s] = keep[s] h[s] + gain v b[s], o = sum over s of h[s] c[s] + skip v. */
typedef struct attn_scan_back {
    int64_t n, channels, states;
    const float *v, *grad_o; /* rows of channels, ld and ld_o apart */
    int64_t ld, ld_o;
    const float *gain;       /* [n][channels] */
    float *keep;             /* [n][states][channels]; overwritten by its gradients unless it is 2^(gain rate) */
    const float *rate;       /* [states][channels] or NULL */
    const float *b, *c;      /* rows of states, ld_b and ld_c apart */
    int64_t ld_b, ld_c;
    const float *skip;       /* [channels] or NULL */
    float *h;                /* [n + 1][states][channels]: the state before, and after each token */
    float *g;                /* [states][channels]: the gradient of the last state, then of the first */
    float *sums;             /* scratch, [2][states][ATTN_SCAN_LANES] */
    float *grad_v, *grad_gain; /* [n][channels], overwritten */
    float *grad_b, *grad_c;    /* [n][states], overwritten */
    float *grad_rate, *grad_skip; /* [states][channels], by log(keep) / gain, and [channels]; added to */
} attn_scan_back;
#define ATTN_SCAN_LANES 16

/* Tokens of RAT, rows of `channels` numbers: k[t] = g[t] k[t-1] + (1 - g[t]) k[t] and likewise v. The values go to out, the queries times
 * `factor` to turned (rows of channels, too), and their products with the keys to product [n]. */
typedef struct attn_scan_gated {
    int64_t n, channels, ld_out;
    const float *q, *k, *v, *g;
    float factor;
    float *k_state, *v_state; /* [channels]: the row before the first one, and the last one after */
    float *turned, *out, *product;
} attn_scan_gated;

typedef struct attn_scan_kernels {
    void (*scan)(const attn_scan *x);
    void (*states)(const attn_scan_back *x); /* h after each token */
    void (*back)(const attn_scan_back *x);   /* after that, the gradients */
    /* out[t] = g[t] out[t-1] + (1 - g[t]) x[t], rows of `channels` numbers, ld and ld_out apart (0: only the last one stays); before: the row
     * before the first one, NULL: 0. */
    void (*average)(int64_t n, int64_t channels, int64_t ld, const float *x, const float *g, const float *before, int64_t ld_out, float *out);
    void (*gated)(const attn_scan_gated *x);
    /* The backward of `average`: a[t] += g[t+1] a[t+1] from the last token on, then grad_x[t] = (1 - g[t]) a[t] and grad_g[t] (add: +=)
     * a[t] (out[t-1] - x[t]). a is used up; grad_x may be a; before as above. */
    void (*average_back)(int64_t n, int64_t channels, const float *x, const float *g, const float *before, const float *out, float *a,
                         float *grad_x, float *grad_g, int add);
} attn_scan_kernels;

ATTN_KERNEL_TABLES(attn_scan_kernels, attn_scan_kernels_table);

/* For this machine, or what ATTN_ISA asks for. */
static inline const attn_scan_kernels *attn_scan_kernels_get(void)
{
    return ATTN_KERNEL_SELECT(attn_scan_kernels_table, attn_isa_current());
}

#endif
