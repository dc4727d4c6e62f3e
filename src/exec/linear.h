/* Linear attention in chunks of tokens (arXiv:2401.04658): scores inside a chunk, a fixed-size state between chunks, so that time per
 * token does not depend on the length.
 *
 *     S_i = decay_i S_{i-1} + phi(k_i)^T v_i        o_i = scale * phi(q_i) S_i
 *
 * All tensors are contiguous f32: q [batch, heads, n, d], k [batch, kv_heads, m, d], v [batch, kv_heads, m, dv],
 * o [batch, heads, n, dv], states [batch, heads, width, dv] (width d without a feature map). A token's decay is one number, or one for
 * each feature (as in arXiv:2312.06635). Decays enter only as products over at most a chunk, never as quotients: of numbers in [0, 1]
 * nothing overflows, however steep they are and however long the sequence.
 */
#ifndef ATTN_EXEC_LINEAR_H
#define ATTN_EXEC_LINEAR_H

#include "core/internal.h"
#include "kernel/rows.h"

/* A feature map whose products phi(q).phi(k) are a function of s = scale * q.k. */
typedef struct attn_feature_map {
    int64_t (*width)(int64_t d);
    /* phi [width] of x [d]. */
    void (*expand)(int64_t d, double scale, const float *x, float *phi);
    /* grad_x [d] += the gradient through phi. */
    void (*expand_back)(int64_t d, double scale, const float *x, const float *grad_phi, float *grad_x);
    /* s [count] becomes the weight of s; slope [count], unless NULL, its derivative. */
    void (*pair)(int64_t count, float *s, float *slope);
} attn_feature_map;

/* What else the forward pass makes of weights: their sums. */
typedef struct attn_linattn_sums {
    float *sums; /* [batch, heads, n] (0 for a query that sees no key), or NULL */
    float *last; /* [batch, heads, width]: the sums of all phi(k), decayed like the state, or NULL */
    int divide;  /* o by the sums; a query that sees no key stays 0 */
    double eps;  /* added to a sum before it divides */
} attn_linattn_sums;

/* With causal, key j is visible to query i if j <= i + (m - n). Decay needs causal; queries and keys of a place share its decay. At most
 * one of slope, log_decay and decays is given. */
typedef struct attn_linattn {
    int64_t batch, heads, kv_heads, n, m, d, dv;
    int causal;
    int64_t chunk;               /* tokens of a chunk, at most 256 (with decays 16) and, above 48 and without a map, a multiple of it; 0: 48.
                                    Changes rounding only */
    double scale;
    const float *slope;          /* [heads]: decay exp(-slope) per token, or NULL */
    const float *log_decay;      /* [batch, heads, m]: decay exp(log_decay) of each token (<= 0), or NULL */
    const float *decays;         /* [batch, heads, m, width]: factor of each feature's row of the state at each token, or NULL */
    const attn_feature_map *map; /* NULL: phi(x) = x */
    const attn_linattn_sums *sums; /* forward, from an empty state, only; else NULL */
    const attn_row_function *rows; /* forward without a map only: f(q) and f(k) are meant where q and k stand here; NULL: they themselves */
} attn_linattn;

/* Whether no state is needed and pairs of tokens alone are less work than a map's features: short sequences, then computed by pairs. */
int attn_linattn_by_pairs(const attn_linattn *shape);
/* Floating-point operations of the forward pass without states. */
double attn_linattn_flops(const attn_linattn *shape);
/* state_in and state_out may be NULL. ATTN_ERR_MEMORY. The result does not depend on threads, in any of these. */
attn_status attn_linattn_forward(const attn_linattn *shape, attn_arena *arena, int threads, const float *q, const float *k,
                                 const float *v, const float *state_in, float *o, float *state_out);
/* Gradients of q, k, v and state_in from grad_o; each is overwritten and may be NULL. Decays are constants. Recomputes the states
 * instead of storing them. ATTN_ERR_MEMORY. */
attn_status attn_linattn_backward(const attn_linattn *shape, attn_arena *arena, int threads, const float *q, const float *k,
                                  const float *v, const float *state_in, const float *grad_o, float *grad_q, float *grad_k,
                                  float *grad_v, float *grad_state);
/* The causal form token by token (n = m): one pass over the state per token and head. state [batch, heads, width, dv] is written; state_in
 * (NULL: zeros) may be the same. */
attn_status attn_linattn_decode(const attn_linattn *shape, attn_arena *arena, int threads, const float *q, const float *k,
                                const float *v, const float *state_in, float *state, float *o);

#endif
