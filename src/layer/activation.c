/* Element-wise functions and their derivatives, evaluated in double. */
#include "layer/activation.h"

#include <stddef.h>

#define PARALLEL_FROM 20000 /* elements */

double attn_activation_at(attn_activation activation, double x, double *slope)
{
    const double root = 0.70710678118654752440, density = 0.39894228040143267794, tanh_scale = 0.79788456080286535588;
    double y = x, d = 1;
    switch (activation) {
    case ATTN_ACTIVATION_IDENTITY: break;
    case ATTN_ACTIVATION_RELU:
        y = x > 0 ? x : 0;
        d = x > 0;
        break;
    case ATTN_ACTIVATION_SILU: {
        double s = attn_sigmoid(x);
        y = x * s;
        d = s * (1 + x * (1 - s));
        break;
    }
    case ATTN_ACTIVATION_GELU: {
        double below = 0.5 * erfc(-x * root);
        y = x * below;
        d = below + x * density * exp(-0.5 * x * x);
        break;
    }
    case ATTN_ACTIVATION_GELU_TANH: {
        double t = tanh(tanh_scale * (x + 0.044715 * x * x * x));
        y = 0.5 * x * (1 + t);
        d = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * tanh_scale * (1 + 3 * 0.044715 * x * x);
        break;
    }
    case ATTN_ACTIVATION_SIGMOID:
        y = attn_sigmoid(x);
        d = y * (1 - y);
        break;
    case ATTN_ACTIVATION_SOFTPLUS:
        y = attn_softplus(x);
        d = attn_sigmoid(x);
        break;
    case ATTN_ACTIVATION_ELU1:
        d = x > 0 ? 1 : exp(x);
        y = x > 0 ? x + 1 : d;
        break;
    }
    if (slope != NULL) {
        *slope = d;
    }
    return y;
}

void attn_activation_forward(attn_activation activation, int threads, int64_t count, const float *x, float *y)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > PARALLEL_FROM)
    for (int64_t i = 0; i < count; i++) {
        y[i] = (float)attn_activation_at(activation, (double)x[i], NULL);
    }
}

void attn_activation_backward(attn_activation activation, int threads, int64_t count, const float *x, const float *grad_y,
                              float *grad_x)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > PARALLEL_FROM)
    for (int64_t i = 0; i < count; i++) {
        double slope;
        attn_activation_at(activation, (double)x[i], &slope);
        grad_x[i] = (float)((double)grad_y[i] * slope);
    }
}
