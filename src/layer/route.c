/* Routers. */
#include "layer/route.h"

#include "kernel/tile.h"

#include <math.h>
#include <string.h>

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

attn_status attn_lists_create(attn_lists *lists, attn_arena *arena, int threads, int64_t batch, int64_t n, int64_t experts,
                              const uint8_t *mask)
{
    *lists = (attn_lists){.count = batch * experts, .first = attn_arena_array(arena, (size_t)(batch * experts) + 1, sizeof(int64_t))};
    if (lists->first == NULL) {
        return attn_fail_memory(((size_t)lists->count + 1) * sizeof(int64_t));
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < lists->count; i++) {
        int64_t served = 0;
        for (int64_t t = 0; t < n; t++) {
            served += mask[(i / experts * n + t) * experts + i % experts];
        }
        lists->first[i + 1] = served;
    }
    lists->first[0] = 0;
    for (int64_t i = 0; i < lists->count; i++) {
        lists->first[i + 1] += lists->first[i];
    }
    lists->token = attn_arena_array(arena, (size_t)lists->first[lists->count], sizeof(int64_t));
    if (lists->token == NULL) {
        return attn_fail_memory((size_t)lists->first[lists->count] * sizeof(int64_t));
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < lists->count; i++) {
        int64_t at = lists->first[i];
        for (int64_t t = 0; t < n; t++) {
            if (mask[(i / experts * n + t) * experts + i % experts]) {
                lists->token[at++] = t;
            }
        }
    }
    return ATTN_OK;
}

void attn_rows_gather(int threads, int64_t width, const float *x, const int64_t *list, int64_t count, float *to)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 20000)
    for (int64_t r = 0; r < count; r++) {
        memcpy(to + r * width, x + list[r] * width, (size_t)width * sizeof *to);
    }
}

void attn_rows_scatter_add(int threads, int64_t width, const float *rows, const int64_t *list, int64_t count, float *x)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 20000)
    for (int64_t r = 0; r < count; r++) {
        kernels->axpy(x + list[r] * width, rows + r * width, width, 1);
    }
}
