/* Routers. */
#include "layer/route.h"

#include <math.h>

double attn_softmax_row(int64_t count, float *x)
{
    double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < count; i++) {
        top = x[i] > top ? (double)x[i] : top;
    }
    for (int64_t i = 0; i < count; i++) {
        sum += exp((double)x[i] - top);
    }
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)(exp((double)x[i] - top) / sum);
    }
    return top + log(sum);
}

void attn_softmax_row_back(int64_t count, const float *p, float *grad)
{
    double inner = 0;
    for (int64_t i = 0; i < count; i++) {
        inner += (double)p[i] * (double)grad[i];
    }
    for (int64_t i = 0; i < count; i++) {
        grad[i] = (float)((double)p[i] * ((double)grad[i] - inner));
    }
}

void attn_top_k(int64_t count, int64_t chosen, const float *x, int64_t *indices)
{
    /* Insertion into the sorted list of the best so far. */
    int64_t have = 0;
    for (int64_t j = 0; j < count; j++) {
        int64_t at = have;
        while (at > 0 && x[j] > x[indices[at - 1]]) {
            at--;
        }
        if (at >= chosen) {
            continue;
        }
        have += have < chosen;
        for (int64_t i = have - 1; i > at; i--) {
            indices[i] = indices[i - 1];
        }
        indices[at] = j;
    }
}
