/* Depthwise convolutions, channels along the vector lanes. */
#include "layer/conv.h"

#include <string.h>

/* The input at time t (may be before the start) of a sequence; NULL where it is zero. */
static const float *input_at(const attn_conv1d *f, const float *x, int64_t sequence, int64_t t)
{
    if (t >= 0) {
        return x + (sequence * f->length + t) * f->channels;
    }
    return f->state != NULL ? f->state + (sequence * (f->taps - 1) + t + f->taps - 1) * f->channels : NULL;
}

void attn_conv1d_forward(const attn_conv1d *f, int threads, const float *x, float *o)
{
    int64_t channels = f->channels, taps = f->taps;
#pragma omp parallel for num_threads(threads) if (threads > 1 && f->sequences * f->length * channels > 20000)
    for (int64_t row = 0; row < f->sequences * f->length; row++) {
        int64_t sequence = row / f->length, t = row % f->length, set = sequence % f->sets;
        const float *w = f->w + set * channels * taps;
        float *to = o + row * channels;
        for (int64_t c = 0; c < channels; c++) {
            to[c] = f->bias != NULL ? f->bias[set * channels + c] : 0.0f;
        }
        for (int64_t tau = 0; tau < taps; tau++) {
            const float *from = input_at(f, x, sequence, t - (taps - 1) + tau);
            for (int64_t c = 0; c < channels && from != NULL; c++) {
                to[c] += w[c * taps + tau] * from[c];
            }
        }
    }
}

attn_status attn_conv1d_backward(const attn_conv1d *f, attn_arena *arena, int threads, const float *x, const float *grad_o,
                                 float *grad_x, float *grad_state, float *grad_w, float *grad_bias)
{
    int64_t channels = f->channels, taps = f->taps, before = grad_state != NULL ? taps - 1 : 0;
#pragma omp parallel for num_threads(threads) if (threads > 1 && f->sequences * f->length * channels > 20000)
    for (int64_t row = 0; row < f->sequences * (before + f->length); row++) {
        int64_t sequence = row / (before + f->length), t = row % (before + f->length) - before;
        const float *w = f->w + sequence % f->sets * channels * taps;
        float *to = t < 0 ? grad_state + (sequence * (taps - 1) + t + taps - 1) * channels
                          : grad_x != NULL ? grad_x + (sequence * f->length + t) * channels : NULL;
        if (to == NULL) {
            continue;
        }
        memset(to, 0, (size_t)channels * sizeof *to);
        for (int64_t tau = 0; tau < taps; tau++) {
            int64_t at = t + taps - 1 - tau;
            for (int64_t c = 0; c < channels && at >= 0 && at < f->length; c++) {
                to[c] += w[c * taps + tau] * grad_o[(sequence * f->length + at) * channels + c];
            }
        }
    }
    if (grad_w == NULL && grad_bias == NULL) {
        return ATTN_OK;
    }
    attn_arena_mark mark = attn_arena_get_mark(arena);
    size_t count = (size_t)(f->sets * channels * (taps + 1));
    double *sums = attn_arena_array(arena, count, sizeof *sums), *bias = sums + f->sets * channels * taps;
    if (sums == NULL) {
        return attn_fail_memory(count * sizeof *sums);
    }
    memset(sums, 0, count * sizeof *sums);
    for (int64_t row = 0; row < f->sequences * f->length; row++) {
        int64_t sequence = row / f->length, t = row % f->length, set = sequence % f->sets;
        const float *g = grad_o + row * channels;
        for (int64_t tau = 0; tau < taps; tau++) {
            const float *from = input_at(f, x, sequence, t - (taps - 1) + tau);
            for (int64_t c = 0; c < channels && from != NULL; c++) {
                sums[(set * channels + c) * taps + tau] += (double)g[c] * (double)from[c];
            }
        }
        for (int64_t c = 0; c < channels; c++) {
            bias[set * channels + c] += (double)g[c];
        }
    }
    for (int64_t i = 0; i < f->sets * channels * taps && grad_w != NULL; i++) {
        grad_w[i] += (float)sums[i];
    }
    for (int64_t i = 0; i < f->sets * channels && grad_bias != NULL; i++) {
        grad_bias[i] += (float)bias[i];
    }
    attn_arena_release(arena, mark);
    return ATTN_OK;
}

void attn_conv2d_forward(int threads, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t kernel,
                         const float *in, const float *w, const float *bias, float *o)
{
    int64_t half = kernel / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t line = 0; line < images * height; line++) {
        int64_t image = line / height, y = line % height;
        for (int64_t x = 0; x < width; x++) {
            float *to = o + (line * width + x) * channels;
            for (int64_t c = 0; c < channels; c++) {
                to[c] = bias != NULL ? bias[c] : 0.0f;
            }
            for (int64_t tap = 0; tap < kernel * kernel; tap++) {
                int64_t sy = y + tap / kernel - half, sx = x + tap % kernel - half;
                if (sy < 0 || sy >= height || sx < 0 || sx >= width) {
                    continue;
                }
                const float *from = in + ((image * height + sy) * width + sx) * channels;
                for (int64_t c = 0; c < channels; c++) {
                    to[c] += w[c * kernel * kernel + tap] * from[c];
                }
            }
        }
    }
}

void attn_conv2d_backward(int threads, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t kernel,
                          const float *in, const float *w, const float *grad_o, float *grad_in, float *grad_w,
                          float *grad_bias)
{
    int64_t half = kernel / 2, pixels = images * height * width;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t line = 0; line < (grad_in != NULL ? images * height : 0); line++) {
        int64_t image = line / height, y = line % height;
        for (int64_t x = 0; x < width; x++) {
            float *to = grad_in + (line * width + x) * channels;
            memset(to, 0, (size_t)channels * sizeof *to);
            for (int64_t tap = 0; tap < kernel * kernel; tap++) {
                int64_t sy = y - tap / kernel + half, sx = x - tap % kernel + half;
                if (sy < 0 || sy >= height || sx < 0 || sx >= width) {
                    continue;
                }
                const float *from = grad_o + ((image * height + sy) * width + sx) * channels;
                for (int64_t c = 0; c < channels; c++) {
                    to[c] += w[c * kernel * kernel + tap] * from[c];
                }
            }
        }
    }
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < channels; c++) {
        for (int64_t tap = 0; tap < (grad_w != NULL ? kernel * kernel : 0); tap++) {
            double sum = 0;
            for (int64_t at = 0; at < pixels; at++) {
                int64_t sy = at / width % height + tap / kernel - half, sx = at % width + tap % kernel - half;
                if (sy >= 0 && sy < height && sx >= 0 && sx < width) {
                    int64_t from = (at / (height * width) * height + sy) * width + sx;
                    sum += (double)grad_o[at * channels + c] * (double)in[from * channels + c];
                }
            }
            grad_w[c * kernel * kernel + tap] += (float)sum;
        }
        if (grad_bias != NULL) {
            double sum = 0;
            for (int64_t at = 0; at < pixels; at++) {
                sum += (double)grad_o[at * channels + c];
            }
            grad_bias[c] += (float)sum;
        }
    }
}
