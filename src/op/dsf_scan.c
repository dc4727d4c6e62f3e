/* The shared recurrence: blocks of channels are independent tasks. The backward pass keeps the state at the start of each span of
 * tokens and recomputes the states within a span. Forward, decays that the channels share make it linear attention, by chunks of
 * tokens; decays that only the channels or their rates tell apart go through the kernels of kernel/scan.h.
 */
#include "op/dsf.h"

#include "exec/linear.h"
#include "exec/softmax.h"
#include "kernel/scan.h"
#include "kernel/tile.h"

#include <omp.h>
#include <string.h>

#define CHANNELS 64 /* of a task */
#define SPAN 32     /* tokens between kept states */

float *dsf_floats(attn_call *call, int64_t count, attn_status *status)
{
    float *made = attn_scratch_f32(call, count);
    if (made == NULL) {
        *status = attn_fail_memory((size_t)count * sizeof(float));
    }
    return made;
}

float *dsf_gradient(attn_call *call, const attn_tensor *grad, int64_t count, attn_status *status)
{
    if (grad != NULL) {
        return attn_f32(grad);
    }
    float *made = dsf_floats(call, count, status);
    if (made != NULL) {
        memset(made, 0, (size_t)count * sizeof(float));
    }
    return made;
}

static float gain_at(const dsf_scan *x, int64_t row, int64_t c)
{
    return x->gain == NULL ? 1.0f : x->gain_wide ? x->gain[row * x->channels + c] : x->gain[row];
}

static int64_t lam_index(const dsf_scan *x, int64_t row, int64_t c, int64_t s)
{
    int64_t wide = x->lam_wide ? x->channels : 1, deep = x->lam_deep ? x->states : 1;
    return (row * wide + (x->lam_wide ? c : 0)) * deep + (x->lam_deep ? s : 0);
}

static float lam_at(const dsf_scan *x, int64_t row, int64_t c, int64_t s)
{
    if (x->log_rate != NULL) {
        return expf(gain_at(x, row, c) * x->log_rate[c * x->states + s]);
    }
    return x->lam[lam_index(x, row, c, s)];
}

/* One step of channels [low, high): h [high - low][states] in place, or into `next`. */
static void step(const dsf_scan *x, int64_t row, int64_t low, int64_t high, const float *h, float *next)
{
    for (int64_t c = low; c < high; c++) {
        float in = gain_at(x, row, c) * x->v[row * x->channels + c];
        const float *from = h + (c - low) * x->states;
        float *to = next + (c - low) * x->states;
        for (int64_t s = 0; s < x->states; s++) {
            to[s] = lam_at(x, row, c, s) * from[s] + in * (x->b != NULL ? x->b[row * x->states + s] : 1.0f);
        }
    }
}

static void start_state(const dsf_scan *x, int64_t sequence, int64_t low, int64_t high, float *h)
{
    size_t bytes = (size_t)((high - low) * x->states) * sizeof(float);
    if (x->h0 != NULL) {
        memcpy(h, x->h0 + (sequence * x->channels + low) * x->states, bytes);
    } else {
        memset(h, 0, bytes);
    }
}

static void transpose(float *to, const float *from, int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < columns; c++) {
            to[c * rows + r] = from[r * columns + c];
        }
    }
}

/* c asks as a query, b is the key, and each state decays as a feature of theirs. */
static attn_status by_chunks(attn_call *call, const dsf_scan *x, float *o, float *h_last)
{
    int64_t rows = x->sequences * x->n, size = x->channels * x->states;
    attn_status status = ATTN_OK;
    float *v = x->gain != NULL ? dsf_floats(call, rows * x->channels, &status) : NULL;
    float *lam = x->lam_deep ? NULL : dsf_floats(call, rows * x->states, &status);
    float *state = dsf_floats(call, x->sequences * size, &status);
    ATTN_TRY(status);
    for (int64_t i = 0; i < rows * x->channels && v != NULL; i++) {
        v[i] = gain_at(x, i / x->channels, i % x->channels) * x->v[i];
    }
    for (int64_t i = 0; i < rows * x->states && lam != NULL; i++) {
        lam[i] = x->lam[i / x->states];
    }
    for (int64_t i = 0; i < x->sequences && x->h0 != NULL; i++) {
        transpose(state + i * size, x->h0 + i * size, x->channels, x->states);
    }
    attn_linattn shape = {.batch = x->sequences, .heads = 1, .kv_heads = 1, .n = x->n, .m = x->n, .d = x->states, .dv = x->channels,
                          .causal = 1, .scale = 1, .decays = lam != NULL ? lam : x->lam};
    ATTN_TRY(attn_linattn_forward(&shape, call->arena, call->threads, x->c, x->b, v != NULL ? v : x->v, x->h0 != NULL ? state : NULL, o, state));
    for (int64_t i = 0; i < x->sequences; i++) {
        transpose(h_last + i * size, state + i * size, x->states, x->channels);
    }
    for (int64_t i = 0; i < rows * x->channels && x->skip != NULL; i++) {
        o[i] += x->skip[i / x->channels / x->n % x->skip_sets * x->channels + i % x->channels] * x->v[i];
    }
    return ATTN_OK;
}

/* What a thread needs in by_channels: the state and the rates, transposed, and gains of a span of tokens. */
static int64_t channels_room(const dsf_scan *x) { return (2 * x->states + SPAN) * CHANNELS; }

/* Channels [low, high) of a sequence with the kernels, a span of tokens at a time so that they are read as they lie in memory. */
static void by_channels(const dsf_scan *x, int64_t sequence, int64_t low, int64_t high, float *room, float *h, float *o)
{
    int64_t count = high - low, first = sequence * x->n;
    float *turned = room, *rate = turned + count * x->states, *gain = rate + count * x->states;
    transpose(turned, h, count, x->states);
    if (x->log_rate != NULL) {
        transpose(rate, x->log_rate + low * x->states, count, x->states);
        attn_tile_kernels_get()->scale(rate, count * x->states, (float)ATTN_LOG2E);
    }
    for (int64_t t = 0; t < x->n; t += SPAN) {
        int64_t row = first + t, at = row * x->channels + low, tokens = attn_min_i64(SPAN, x->n - t);
        attn_scan scan = {.n = tokens, .channels = count, .states = x->states, .ld = x->channels, .ld_gain = x->channels, .v = x->v + at,
                          .gain = x->gain != NULL ? x->gain + at : NULL, .lam = x->log_rate != NULL ? NULL : x->lam + at, .rate = rate,
                          .b = x->b != NULL ? x->b + row * x->states : NULL, .c = x->c != NULL ? x->c + row * x->states : NULL,
                          .skip = x->skip != NULL ? x->skip + sequence % x->skip_sets * x->channels + low : NULL, .h = turned, .o = o + at};
        if (x->make_gain != NULL) {
            x->make_gain(x->maker, row, tokens, low, high, gain);
            scan.gain = gain;
            scan.ld_gain = count;
        }
        attn_scan_kernels_get()->scan(&scan);
    }
    transpose(h, turned, x->states, count);
}

/* The plain way. */
static void by_steps(const dsf_scan *x, int64_t sequence, int64_t low, int64_t high, float *h, float *o)
{
    for (int64_t t = 0; t < x->n; t++) {
        int64_t row = sequence * x->n + t;
        step(x, row, low, high, h, h);
        for (int64_t c = low; c < high; c++) {
            double sum = x->skip != NULL ? (double)x->skip[sequence % x->skip_sets * x->channels + c] * (double)x->v[row * x->channels + c] : 0;
            for (int64_t s = 0; s < x->states; s++) {
                sum += (double)h[(c - low) * x->states + s] * (x->c != NULL ? (double)x->c[row * x->states + s] : 1);
            }
            o[row * x->channels + c] = (float)sum;
        }
    }
}

attn_status dsf_scan_forward(attn_call *call, const dsf_scan *x, float *o, float *h_last)
{
    if (!x->lam_wide && x->log_rate == NULL && x->b != NULL && x->c != NULL) {
        return by_chunks(call, x, o, h_last);
    }
    int64_t blocks = attn_ceil_div(x->channels, CHANNELS), room = channels_room(x);
    int kernels = (x->b == NULL) == (x->c == NULL) && (x->gain == NULL || x->gain_wide || x->channels == 1) && (x->log_rate != NULL || x->states == 1 || !x->lam_deep);
    float *turned;
    ATTN_TRY(attn_take_f32(call, call->threads * room, &turned));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t task = 0; task < x->sequences * blocks; task++) {
        int64_t sequence = task / blocks, low = task % blocks * CHANNELS, high = attn_min_i64(x->channels, low + CHANNELS);
        float *h = h_last + (sequence * x->channels + low) * x->states;
        start_state(x, sequence, low, high, h);
        if (kernels) {
            by_channels(x, sequence, low, high, turned + omp_get_thread_num() * room, h, o);
        } else {
            by_steps(x, sequence, low, high, h, o);
        }
    }
    return ATTN_OK;
}

/* Sums over channels are kept per task and added in order afterwards. */
typedef struct part {
    float *b, *c;     /* [n][states] */
    float *lam;       /* [n][states or 1], when lam is shared by the channels */
    float *gain;      /* [n], when gain is */
    float *kept, *h;  /* [spans][channels][states], [SPAN + 1][channels][states] */
    float *g;         /* [channels][states] */
} part;

static void back_task(const dsf_scan *x, const dsf_gradients *d, int64_t sequence, int64_t low, int64_t high, const part *p)
{
    int64_t width = (high - low) * x->states, spans = attn_ceil_div(x->n, SPAN), deep = x->lam_deep ? x->states : 1;
    start_state(x, sequence, low, high, p->kept);
    for (int64_t span = 0; span + 1 < spans; span++) {
        float *next = p->kept + (span + 1) * width;
        memcpy(next, p->kept + span * width, (size_t)width * sizeof(float));
        for (int64_t t = span * SPAN; t < (span + 1) * SPAN; t++) {
            step(x, sequence * x->n + t, low, high, next, next);
        }
    }
    for (int64_t i = 0; i < width; i++) {
        p->g[i] = d->h_last != NULL ? d->h_last[(sequence * x->channels + low) * x->states + i] : 0.0f;
    }
    for (int64_t span = spans - 1; span >= 0; span--) {
        int64_t begin = span * SPAN, end = attn_min_i64(x->n, begin + SPAN);
        memcpy(p->h, p->kept + span * width, (size_t)width * sizeof(float));
        for (int64_t t = begin; t < end; t++) {
            step(x, sequence * x->n + t, low, high, p->h + (t - begin) * width, p->h + (t - begin + 1) * width);
        }
        for (int64_t t = end - 1; t >= begin; t--) {
            int64_t row = sequence * x->n + t;
            const float *before = p->h + (t - begin) * width, *now = before + width;
            for (int64_t c = low; c < high; c++) {
                int64_t at = row * x->channels + c, set = sequence % x->skip_sets * x->channels + c;
                double out = d->o != NULL ? (double)d->o[at] : 0, v = (double)x->v[at], gain = (double)gain_at(x, row, c), inner = 0, rate = 0;
                for (int64_t s = 0; s < x->states; s++) {
                    int64_t i = (c - low) * x->states + s;
                    double b = x->b != NULL ? (double)x->b[row * x->states + s] : 1, lam = (double)lam_at(x, row, c, s);
                    double g = (double)p->g[i] + out * (x->c != NULL ? (double)x->c[row * x->states + s] : 1);
                    double slope = g * (double)before[i];
                    p->c[t * x->states + s] += (float)(out * (double)now[i]);
                    p->b[t * x->states + s] += (float)(g * gain * v);
                    inner += g * b;
                    if (x->log_rate != NULL) {
                        double log_rate = (double)x->log_rate[c * x->states + s];
                        rate += slope * lam * log_rate;
                        if (d->log_rate != NULL) { /* one array per sequence, see the caller */
                            d->log_rate[(sequence * x->channels + c) * x->states + s] += (float)(slope * lam * gain);
                        }
                    } else if (!x->lam_wide) {
                        p->lam[t * deep + (x->lam_deep ? s : 0)] += (float)slope;
                    } else if (d->lam != NULL) {
                        d->lam[lam_index(x, row, c, s)] += (float)slope;
                    }
                    p->g[i] = (float)(lam * g);
                }
                if (d->v != NULL) {
                    d->v[at] += (float)(gain * inner + (x->skip != NULL ? (double)x->skip[set] * out : 0));
                }
                if (!x->gain_wide) {
                    p->gain[t] += (float)(v * inner + rate);
                } else if (d->gain != NULL) {
                    d->gain[at] += (float)(v * inner + rate);
                }
                if (d->skip != NULL) {
                    d->skip[sequence * x->channels + c] += (float)(out * v);
                }
            }
        }
    }
    for (int64_t i = 0; i < width && d->h0 != NULL; i++) {
        d->h0[(sequence * x->channels + low) * x->states + i] += p->g[i];
    }
}

static void add(float *to, const float *from, int64_t count)
{
    for (int64_t i = 0; i < count && to != NULL; i++) {
        to[i] += from[i];
    }
}

attn_status dsf_scan_backward(attn_call *call, const dsf_scan *x, const dsf_gradients *gradients)
{
    int64_t blocks = attn_ceil_div(x->channels, CHANNELS), tasks = x->sequences * blocks, deep = x->lam_deep ? x->states : 1;
    int64_t width = attn_min_i64(CHANNELS, x->channels) * x->states, spans = attn_ceil_div(x->n, SPAN);
    int64_t sums = x->n * (2 * x->states + deep + 1), each = sums + (spans + 1 + SPAN + 2) * width;
    attn_status status = ATTN_OK;
    dsf_gradients d = *gradients;
    float *memory = dsf_floats(call, tasks * each, &status);
    /* Sums over sequences: per sequence first. */
    if (d.skip != NULL) {
        d.skip = dsf_gradient(call, NULL, x->sequences * x->channels, &status);
    }
    if (d.log_rate != NULL) {
        d.log_rate = dsf_gradient(call, NULL, x->sequences * x->channels * x->states, &status);
    }
    ATTN_TRY(status);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        float *m = memory + task * each;
        part p = {.b = m, .c = m + x->n * x->states, .lam = m + 2 * x->n * x->states, .gain = m + x->n * (2 * x->states + deep)};
        memset(m, 0, (size_t)sums * sizeof(float));
        p.kept = m + sums;
        p.h = p.kept + (spans + 1) * width;
        p.g = p.h + (SPAN + 1) * width;
        int64_t low = task % blocks * CHANNELS;
        back_task(x, &d, task / blocks, low, attn_min_i64(x->channels, low + CHANNELS), &p);
    }
    for (int64_t task = 0; task < tasks; task++) {
        const float *m = memory + task * each;
        int64_t first = task / blocks * x->n;
        add(d.b != NULL ? d.b + first * x->states : NULL, m, x->n * x->states);
        add(d.c != NULL ? d.c + first * x->states : NULL, m + x->n * x->states, x->n * x->states);
        if (!x->lam_wide && x->log_rate == NULL) {
            add(d.lam != NULL ? d.lam + first * deep : NULL, m + 2 * x->n * x->states, x->n * deep);
        }
        if (!x->gain_wide) {
            add(d.gain != NULL ? d.gain + first : NULL, m + x->n * (2 * x->states + deep), x->n);
        }
    }
    for (int64_t sequence = 0; sequence < x->sequences; sequence++) {
        if (d.skip != NULL) {
            add(gradients->skip + sequence % x->skip_sets * x->channels, d.skip + sequence * x->channels, x->channels);
        }
        if (d.log_rate != NULL) {
            add(gradients->log_rate, d.log_rate + sequence * x->channels * x->states, x->channels * x->states);
        }
    }
    return ATTN_OK;
}
