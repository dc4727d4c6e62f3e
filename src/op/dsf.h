/* The recurrence that the operators of the dynamical systems framework share:
 *     h[t] = lam[t] * h[t-1] + gain[t] v[t] b[t]^T,   o[t] = h[t] c[t] + skip * v[t],   h of [channels][states].
 */
#ifndef ATTN_OP_DSF_H
#define ATTN_OP_DSF_H

#include "op/class.h"

typedef struct dsf_scan {
    int64_t sequences, n, channels, states;
    int64_t skip_sets;          /* sequence s has skip set s % skip_sets */
    int lam_wide, lam_deep;     /* lam differs between channels, between states */
    int gain_wide;              /* gain differs between channels */
    const float *v;             /* [sequences][n][channels] */
    const float *b, *c;         /* [sequences][n][states]; NULL: ones */
    const float *lam;           /* [sequences][n][channels or 1][states or 1] */
    const float *log_rate;      /* or, instead of lam, [channels][states]: lam = e^(gain * log_rate) */
    const float *gain;          /* [sequences][n][channels or 1]; NULL: ones */
    /* Or, forward with log_rate, gains made where they are used: to [rows][high - low] of rows first ... and channels low ... high - 1. */
    void (*make_gain)(const void *maker, int64_t first, int64_t rows, int64_t low, int64_t high, float *to);
    const void *maker;
    const float *skip;          /* [skip_sets][channels] or NULL */
    const float *h0;            /* [sequences][channels][states] or NULL */
} dsf_scan;

/* o [sequences][n][channels] and h_last [sequences][channels][states]. */
attn_status attn_dsf_scan_forward(attn_call *call, const dsf_scan *scan, float *o, float *h_last);

/* o and h_last are incoming (NULL: 0). The others are added to and may be NULL; with log_rate, `gain` also gets the part through lam. */
typedef struct dsf_gradients {
    const float *o, *h_last;
    float *v, *b, *c, *lam, *log_rate, *gain, *skip, *h0;
} dsf_gradients;

attn_status attn_dsf_scan_backward(attn_call *call, const dsf_scan *scan, const dsf_gradients *gradients);

/* Zeroed scratch, or the gradient's own memory when somebody wants it; sets *status when memory is short. */
float *attn_dsf_gradient(attn_call *call, const attn_tensor *grad, int64_t count, attn_status *status);
float *attn_dsf_floats(attn_call *call, int64_t count, attn_status *status);

#endif
