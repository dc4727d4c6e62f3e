/* What the online softmax leaves of a row: its maximum m, in base 2, and its sum l of 2^(s - m); 0 when the row saw nothing. */
#ifndef ATTN_EXEC_SOFTMAX_H
#define ATTN_EXEC_SOFTMAX_H

#include <math.h>

#define ATTN_LOG2E 1.44269504088896340736
#define ATTN_LN2 0.69314718055994530942

/* The factor of what was summed up: 0 for a row that saw nothing, NaN when the sum is. */
static inline float attn_softmax_inverse(float l) { return l > 0 ? 1 / l : l == 0 ? 0 : NAN; }

/* The log-sum-exp, in base e. */
static inline float attn_softmax_lse(float m, float l)
{
    return l == 0 ? -INFINITY : (float)(((double)m + log2((double)l)) * ATTN_LN2);
}

#endif
