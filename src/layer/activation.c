/* Element-wise functions and their derivatives: by the kernels of kernel/rows.h, or evaluated in double. */
#include "layer/activation.h"
#include "core/internal.h"
#include "kernel/rows.h"

#include <stddef.h>

#define BLOCK 2048 /* elements of a task, and from where on threads are worth while */

/* The kernels' name for it; -1 when they do not have it. */
static int row_function(attn_activation activation)
{
    switch (activation) {
    case ATTN_ACTIVATION_SIGMOID: return ATTN_ROW_SIGMOID;
    case ATTN_ACTIVATION_SILU: return ATTN_ROW_SILU;
    case ATTN_ACTIVATION_SOFTPLUS: return ATTN_ROW_SOFTPLUS;
    case ATTN_ACTIVATION_ELU1: return ATTN_ROW_ELU1;
    default: return -1;
    }
}

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

/* y = f(x), or with grad: grad * f'(x). */
static void apply(attn_activation activation, int threads, int64_t count, const float *x, const float *grad, float *y)
{
    const attn_row_kernels *kernels = ATTN_KERNEL_SELECT(attn_row_kernels_table, attn_isa_current());
    int row = row_function(activation);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > BLOCK)
    for (int64_t first = 0; first < count; first += BLOCK) {
        int64_t end = attn_min_i64(count, first + BLOCK);
        if (row >= 0) {
            kernels->function((attn_row_function)row, x + first, grad != NULL ? grad + first : NULL, end - first, y + first);
            continue;
        }
        for (int64_t i = first; i < end; i++) {
            double slope = 0, value = attn_activation_at(activation, (double)x[i], grad != NULL ? &slope : NULL);
            y[i] = (float)(grad != NULL ? (double)grad[i] * slope : value);
        }
    }
}

void attn_activation_forward(attn_activation activation, int threads, int64_t count, const float *x, float *y)
{
    apply(activation, threads, count, x, NULL, y);
}

void attn_activation_backward(attn_activation activation, int threads, int64_t count, const float *x, const float *grad_y,
                              float *grad_x)
{
    apply(activation, threads, count, x, grad_y, grad_x);
}
