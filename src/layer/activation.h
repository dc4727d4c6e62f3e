/* Element-wise functions and their derivatives. */
#ifndef ATTN_LAYER_ACTIVATION_H
#define ATTN_LAYER_ACTIVATION_H

#include <math.h>
#include <stdint.h>

typedef enum attn_activation {
    ATTN_ACTIVATION_IDENTITY,
    ATTN_ACTIVATION_RELU,
    ATTN_ACTIVATION_SILU,
    ATTN_ACTIVATION_GELU,      /* exact, with erf */
    ATTN_ACTIVATION_GELU_TANH, /* the usual approximation */
    ATTN_ACTIVATION_SIGMOID,
    ATTN_ACTIVATION_SOFTPLUS,
    ATTN_ACTIVATION_ELU1 /* x + 1 for x > 0, else e^x */
} attn_activation;

static inline double attn_sigmoid(double x)
{
    double e = exp(-fabs(x));
    return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}
static inline double attn_softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }

/* f(x), and f'(x) in *slope unless that is NULL. */
double attn_activation_at(attn_activation activation, double x, double *slope);

/* y[i] = f(x[i]); y may be x. */
void attn_activation_forward(attn_activation activation, int threads, int64_t count, const float *x, float *y);
/* grad_x[i] = grad_y[i] * f'(x[i]); grad_x may be grad_y. */
void attn_activation_backward(attn_activation activation, int threads, int64_t count, const float *x, const float *grad_y,
                              float *grad_x);

#endif
