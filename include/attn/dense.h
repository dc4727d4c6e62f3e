/* Exact softmax attention without storing the score matrix (tiled, online softmax; arXiv:2205.14135, arXiv:2307.08691).
 *
 *     attn_dense_settings settings;
 *     attn_dense_defaults(&settings);
 *     settings.causal = 1;
 *     attn_dense_inputs in = {.q = q, .k = k, .v = v};
 *     attn_dense_forward(&settings, &in, &o, &lse, NULL);
 *
 * Shapes: q [B,H,N,D], k [B,Hkv,M,D], v [B,Hkv,M,Dv], o [B,H,N,Dv], lse [B,H,N]; H a multiple of Hkv, and query head h reads
 * key/value head h / (H/Hkv). Any strides. Results do not depend on the number of threads.
 */
#ifndef ATTN_DENSE_H
#define ATTN_DENSE_H

#include <attn/memory.h>
#include <attn/tensor.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_dense_settings {
    int causal;      /* 0. Key j is visible to query n only if j <= i, where i = n + (M - N): the last query sees the last key */
    int64_t window[2]; /* {-1, -1}. Keys i - window[0] ... i + window[1] are visible; -1: no bound on that side */
    double scale;    /* NaN, which means 1/sqrt(D). Multiplies q.k */
    double softcap;  /* 0 (off). Scores become softcap * tanh(scores / softcap), after scale, before slopes and bias */
} attn_dense_settings;

ATTN_API void attn_dense_defaults(attn_dense_settings *settings);

/* Optional inputs are NULL when absent. */
typedef struct attn_dense_inputs {
    attn_tensor q;                 /* [B,H,N,D] f32, f16 or bf16 */
    attn_tensor k, v;              /* [B,Hkv,M,D], [B,Hkv,M,Dv] f32, f16, bf16, or i8 with scales */
    /* [B,Hkv,M] f32: i8 keys and values are multiplied by them; needed with i8 only. Few queries (decoding) that see 2,048 such keys or more are
     * rounded to 16 bits of their largest number, and so are their weights, where AVX2 or AVX-512 make that faster: errors of about 1e-5 of
     * the values' size. */
    const attn_tensor *k_scale, *v_scale;
    const attn_tensor *bias;       /* [1 or B, 1 or H, N, M] f32, f16 or bf16, added to the scores; may hold -inf */
    const attn_tensor *slopes;     /* [H] f32, ALiBi: slopes[h] * |i - j| is subtracted */
    const attn_tensor *sinks;      /* [H] f32, one more logit per head, with a value of zero */
    const attn_tensor *key_length; /* [B] i32 or i64: keys at or past it are masked */
} attn_dense_inputs;

/* o: f32, f16 or bf16. lse (may be NULL): f32, the log-sum-exp of a query's final scores, the sink's included. A query that sees no
 * key gets o = 0 and lse = -inf, or the sink's logit. Errors: ATTN_ERR_SHAPE, ATTN_ERR_DTYPE, ATTN_ERR_ARGUMENT, ATTN_ERR_MEMORY. */
ATTN_API attn_status attn_dense_forward(const attn_dense_settings *settings, const attn_dense_inputs *inputs,
                                        const attn_tensor *o, const attn_tensor *lse, const attn_exec *exec);

/* The same for few queries, which also tells the key with the largest score of each query: top [B,H,N] i64, the first one on ties, -1 for a
 * query that sees no key (NULL: not wanted). ATTN_ERR_UNSUPPORTED when N * H/Hkv is more than 16. */
ATTN_API attn_status attn_dense_forward_top(const attn_dense_settings *settings, const attn_dense_inputs *inputs,
                                            const attn_tensor *o, const attn_tensor *lse, const attn_tensor *top,
                                            const attn_exec *exec);

/* Where the gradients go: f32, of the shape of their input, overwritten; NULL: not wanted. */
typedef struct attn_dense_gradients {
    const attn_tensor *q, *k, *v, *bias, *slopes, *sinks;
} attn_dense_gradients;

/* o and lse as forward gave them, grad_o [B,H,N,Dv] of any float type. Passing the o and lse of a larger softmax of which
 * these keys are a part gives that softmax's gradients for them. int8 keys and values have none (ATTN_ERR_DTYPE). */
ATTN_API attn_status attn_dense_backward(const attn_dense_settings *settings, const attn_dense_inputs *inputs,
                                         const attn_tensor *o, const attn_tensor *lse, const attn_tensor *grad_o,
                                         const attn_dense_gradients *gradients, const attn_exec *exec);

#ifdef __cplusplus
}
#endif
#endif
