/* The shared recurrence: blocks of channels are independent tasks. The backward pass keeps the state at the start of each span of
 * tokens and recomputes the states within a span. Forward, decays that the channels share make it linear attention, by chunks of
 * tokens; decays that only the channels or their rates tell apart go through the kernels of kernel/scan.h.
 */
#include "op/dsf.h"

#include "exec/linear.h"
#include "exec/softmax.h"
#include "kernel/linear.h"
#include "kernel/scan.h"
#include "kernel/tile.h"

#include <omp.h>
#include <string.h>

#define CHANNELS 64 /* of a task */
#define SPAN 32     /* tokens between kept states */

float *attn_dsf_floats(attn_call *call, int64_t count, attn_status *status)
{
    float *made = attn_scratch_f32(call, count);
    if (made == NULL) {
        *status = attn_fail_memory((size_t)count * sizeof(float));
    }
    return made;
}

float *attn_dsf_gradient(attn_call *call, const attn_tensor *grad, int64_t count, attn_status *status)
{
    if (grad != NULL) {
        return attn_f32(grad);
    }
    float *made = attn_dsf_floats(call, count, status);
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
    float *v = x->gain != NULL ? attn_dsf_floats(call, rows * x->channels, &status) : NULL;
    float *lam = x->lam_deep ? NULL : attn_dsf_floats(call, rows * x->states, &status);
    float *state = attn_dsf_floats(call, x->sequences * size, &status);
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

/* What a thread needs in by_channels: the states and the rates, transposed block by block, and gains of a span of tokens. */
static int64_t channels_room(const dsf_scan *x) { return 2 * x->states * x->channels + SPAN * CHANNELS; }

/* A block of channels for a span of tokens from t on; the block's state and rates, and room for gains. */
static void scan_span(const dsf_scan *x, int64_t sequence, int64_t low, int64_t count, int64_t t, float *turned, const float *rate, float *gain, float *o)
{
    int64_t row = sequence * x->n + t, at = row * x->channels + low, tokens = attn_min_i64(SPAN, x->n - t);
    attn_scan scan = {.n = tokens, .channels = count, .states = x->states, .ld = x->channels, .ld_gain = x->channels, .v = x->v + at,
                      .gain = x->gain != NULL ? x->gain + at : NULL, .lam = x->log_rate != NULL ? NULL : x->lam + at, .rate = rate,
                      .b = x->b != NULL ? x->b + row * x->states : NULL, .c = x->c != NULL ? x->c + row * x->states : NULL,
                      .skip = x->skip != NULL ? x->skip + sequence % x->skip_sets * x->channels + low : NULL, .h = turned, .o = o + at};
    if (x->make_gain != NULL) {
        x->make_gain(x->maker, row, tokens, low, low + count, gain);
        scan.gain = gain;
        scan.ld_gain = count;
    }
    attn_scan_kernels_get()->scan(&scan);
}

/* Channels [low, high) of a sequence with the kernels, whole spans of tokens one after another: so rows are read as they lie in memory. */
static void by_channels(const dsf_scan *x, int64_t sequence, int64_t low, int64_t high, float *room, float *h, float *o)
{
    float *turned = room, *rate = turned + (high - low) * x->states, *gain = rate + (high - low) * x->states;
    for (int64_t c = low; c < high; c += CHANNELS) {
        int64_t count = attn_min_i64(CHANNELS, high - c), at = (c - low) * x->states;
        transpose(turned + at, h + at, count, x->states);
        if (x->log_rate != NULL) {
            transpose(rate + at, x->log_rate + c * x->states, count, x->states);
            attn_tile_kernels_get()->scale(rate + at, count * x->states, (float)ATTN_LOG2E);
        }
    }
    for (int64_t t = 0; t < x->n; t += SPAN) {
        for (int64_t c = low; c < high; c += CHANNELS) {
            int64_t at = (c - low) * x->states;
            scan_span(x, sequence, c, attn_min_i64(CHANNELS, high - c), t, turned + at, rate + at, gain, o);
        }
    }
    for (int64_t c = low; c < high; c += CHANNELS) {
        transpose(h + (c - low) * x->states, turned + (c - low) * x->states, x->states, attn_min_i64(CHANNELS, high - c));
    }
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

attn_status attn_dsf_scan_forward(attn_call *call, const dsf_scan *x, float *o, float *h_last)
{
    if (!x->lam_wide && x->log_rate == NULL && x->b != NULL && x->c != NULL) {
        return by_chunks(call, x, o, h_last);
    }
    int64_t blocks = attn_ceil_div(x->channels, CHANNELS), room = channels_room(x);
    int kernels = (x->b == NULL) == (x->c == NULL) && (x->gain == NULL || x->gain_wide || x->channels == 1) && (x->log_rate != NULL || x->states == 1 || !x->lam_deep);
    float *turned;
    ATTN_TRY(attn_take_f32(call, call->threads * room, &turned));
    /* Each thread takes a run of neighbouring blocks of channels, in parts that lie in one sequence. */
#pragma omp parallel for schedule(static, 1) num_threads(call->threads) if (call->threads > 1)
    for (int i = 0; i < call->threads; i++) {
        int64_t all = x->sequences * blocks, last = all * (i + 1) / call->threads;
        for (int64_t first = all * i / call->threads, count; first < last; first += count) {
            int64_t sequence = first / blocks, low = first % blocks * CHANNELS;
            count = attn_min_i64(last, (sequence + 1) * blocks) - first;
            int64_t high = attn_min_i64(x->channels, low + count * CHANNELS);
            float *h = h_last + (sequence * x->channels + low) * x->states;
            start_state(x, sequence, low, high, h);
            if (kernels) {
                by_channels(x, sequence, low, high, turned + i * room, h, o);
            } else {
                by_steps(x, sequence, low, high, h, o);
            }
        }
    }
    return ATTN_OK;
}

/* Sums over channels, of a task: they are added in order afterwards. */
typedef struct part {
    float *b, *c;     /* [n][states] */
    float *lam;       /* [n][states or 1], when lam is shared by the channels */
    float *gain;      /* [n], when gain is */
} part;

/* A thread's memory of one span, channels last. */
typedef struct span {
    float *kept;                         /* [spans][states][channels]: the state before each */
    float *h, *keep, *g, *rate, *grad_rate; /* see kernel/scan.h */
    float *gain, *grad_v, *grad_gain, *grad_skip, *sums;
    float *ones, *zeros;                 /* [states], [channels] */
} span;

static int64_t span_floats(const dsf_scan *x)
{
    int64_t channels = attn_min_i64(CHANNELS, x->channels), width = channels * x->states;
    return (attn_ceil_div(x->n, SPAN) + 2 * SPAN + 4) * width + (3 * SPAN + 2) * channels + (2 * ATTN_SCAN_LANES + 1) * x->states;
}

static span span_of(const dsf_scan *x, float *memory)
{
    int64_t channels = attn_min_i64(CHANNELS, x->channels), width = channels * x->states;
    span y = {.kept = memory};
    y.h = y.kept + attn_ceil_div(x->n, SPAN) * width;
    y.keep = y.h + (SPAN + 1) * width;
    y.g = y.keep + SPAN * width;
    y.rate = y.g + width;
    y.grad_rate = y.rate + width;
    y.gain = y.grad_rate + width;
    y.grad_v = y.gain + SPAN * channels;
    y.grad_gain = y.grad_v + SPAN * channels;
    y.grad_skip = y.grad_gain + SPAN * channels;
    y.zeros = y.grad_skip + channels;
    y.sums = y.zeros + channels;
    y.ones = y.sums + 2 * ATTN_SCAN_LANES * x->states;
    memset(y.zeros, 0, (size_t)channels * sizeof *y.zeros);
    for (int64_t s = 0; s < x->states; s++) {
        y.ones[s] = 1;
    }
    return y;
}

/* Decays and states of tokens begin ... end - 1; y->h starts with the state before them. */
static attn_scan_back make_states(const dsf_scan *x, const dsf_gradients *d, int64_t sequence, int64_t low, int64_t high, const span *y,
                                  int64_t begin, int64_t end)
{
    int64_t count = high - low, first = sequence * x->n + begin, rows = end - begin, at = first * x->channels + low;
    for (int64_t t = 0; t < rows; t++) {
        float *gain = y->gain + t * count, same = x->gain_wide ? 0.0f : gain_at(x, first + t, 0);
        if (x->gain_wide) {
            memcpy(gain, x->gain + (first + t) * x->channels + low, (size_t)count * sizeof *gain);
        }
        for (int64_t c = 0; c < (x->gain_wide ? 0 : count); c++) {
            gain[c] = same;
        }
    }
    for (int64_t i = 0; i < rows * x->states; i++) {
        float *keep = y->keep + i * count;
        int64_t row = i / x->states, s = i % x->states;
        if (x->log_rate != NULL) {
            attn_linear_kernels_get()->multiply(keep, y->gain + row * count, y->rate + s * count, count);
            continue;
        }
        for (int64_t c = 0; c < count; c++) {
            keep[c] = x->lam[lam_index(x, first + row, low + c, s)];
        }
    }
    if (x->log_rate != NULL) {
        attn_tile_kernels_get()->exp2_row(y->keep, rows * x->states * count, 0);
    }
    attn_scan_back scan = {.n = rows, .channels = count, .states = x->states, .v = x->v + at, .ld = x->channels, .gain = y->gain,
                           .keep = y->keep, .rate = x->log_rate != NULL ? y->rate : NULL,
                           .grad_o = d->o != NULL ? d->o + at : y->zeros, .ld_o = d->o != NULL ? x->channels : 0,
                           .b = x->b != NULL ? x->b + first * x->states : y->ones, .ld_b = x->b != NULL ? x->states : 0,
                           .c = x->c != NULL ? x->c + first * x->states : y->ones, .ld_c = x->c != NULL ? x->states : 0,
                           .skip = x->skip != NULL ? x->skip + sequence % x->skip_sets * x->channels + low : NULL, .h = y->h, .g = y->g,
                           .sums = y->sums, .grad_v = y->grad_v, .grad_gain = y->grad_gain, .grad_rate = y->grad_rate, .grad_skip = y->grad_skip};
    attn_scan_kernels_get()->states(&scan);
    return scan;
}

static void add(float *to, const float *from, int64_t count)
{
    if (to != NULL) {
        attn_tile_kernels_get()->axpy(to, from, count, 1);
    }
}

/* Gradients of a span's tokens, from `row` on, to where they belong. */
static void pass_on(const dsf_scan *x, const dsf_gradients *d, const part *p, const attn_scan_back *from, int64_t row, int64_t low)
{
    float (*sum)(const float *, int64_t) = attn_linear_kernels_get()->sum;
    int64_t count = from->channels, first = row % x->n, deep = x->lam_deep ? x->states : 1;
    for (int64_t t = 0; t < from->n; t++) {
        int64_t at = (row + t) * x->channels + low;
        add(d->v != NULL ? d->v + at : NULL, from->grad_v + t * count, count);
        if (x->gain_wide) {
            add(d->gain != NULL ? d->gain + at : NULL, from->grad_gain + t * count, count);
        } else {
            p->gain[first + t] += sum(from->grad_gain + t * count, count);
        }
        for (int64_t s = 0; s < (x->log_rate == NULL ? x->states : 0); s++) {
            const float *slope = from->keep + (t * x->states + s) * count;
            if (!x->lam_wide) {
                p->lam[(first + t) * deep + (x->lam_deep ? s : 0)] += sum(slope, count);
            }
            for (int64_t c = 0; c < (x->lam_wide && d->lam != NULL ? count : 0); c++) {
                d->lam[lam_index(x, row + t, low + c, s)] += slope[c];
            }
        }
    }
}

/* to [rows][columns] += from [columns][rows] */
static void add_transposed(float *to, const float *from, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows * columns && to != NULL; i++) {
        to[i] += from[i % columns * rows + i / columns];
    }
}

static void back_task(const dsf_scan *x, const dsf_gradients *d, int64_t sequence, int64_t low, int64_t high, const part *p, const span *y)
{
    int64_t count = high - low, width = count * x->states, spans = attn_ceil_div(x->n, SPAN), own = (sequence * x->channels + low) * x->states;
    size_t bytes = (size_t)width * sizeof(float);
    memset(y->kept, 0, spans > 0 ? bytes : 0);
    memset(y->g, 0, bytes);
    memset(y->grad_rate, 0, bytes);
    memset(y->grad_skip, 0, (size_t)count * sizeof(float));
    if (x->h0 != NULL && spans > 0) {
        transpose(y->kept, x->h0 + own, count, x->states);
    }
    if (d->h_last != NULL) {
        transpose(y->g, d->h_last + own, count, x->states);
    }
    if (x->log_rate != NULL) {
        transpose(y->rate, x->log_rate + low * x->states, count, x->states);
        attn_tile_kernels_get()->scale(y->rate, width, (float)ATTN_LOG2E);
    }
    for (int64_t i = 0; i + 1 < spans; i++) {
        memcpy(y->h, y->kept + i * width, bytes);
        make_states(x, d, sequence, low, high, y, i * SPAN, (i + 1) * SPAN);
        memcpy(y->kept + (i + 1) * width, y->h + SPAN * width, bytes);
    }
    for (int64_t i = spans - 1; i >= 0; i--) {
        int64_t begin = i * SPAN;
        memcpy(y->h, y->kept + i * width, bytes);
        attn_scan_back scan = make_states(x, d, sequence, low, high, y, begin, attn_min_i64(x->n, begin + SPAN));
        scan.grad_b = p->b + begin * x->states;
        scan.grad_c = p->c + begin * x->states;
        attn_scan_kernels_get()->back(&scan);
        pass_on(x, d, p, &scan, sequence * x->n + begin, low);
    }
    add(d->skip != NULL ? d->skip + sequence * x->channels + low : NULL, y->grad_skip, count);
    add_transposed(d->log_rate != NULL ? d->log_rate + own : NULL, y->grad_rate, count, x->states);
    add_transposed(d->h0 != NULL ? d->h0 + own : NULL, y->g, count, x->states);
}

attn_status attn_dsf_scan_backward(attn_call *call, const dsf_scan *x, const dsf_gradients *gradients)
{
    int64_t blocks = attn_ceil_div(x->channels, CHANNELS), tasks = x->sequences * blocks, deep = x->lam_deep ? x->states : 1;
    int64_t each = x->n * (2 * x->states + deep + 1), room = span_floats(x);
    attn_status status = ATTN_OK;
    dsf_gradients d = *gradients;
    float *memory = attn_dsf_floats(call, tasks * each, &status),
          *spans = attn_dsf_floats(call, call->threads * room, &status);
    /* Sums over sequences: per sequence first. */
    if (d.skip != NULL) {
        d.skip = attn_dsf_gradient(call, NULL, x->sequences * x->channels, &status);
    }
    if (d.log_rate != NULL) {
        d.log_rate = attn_dsf_gradient(call, NULL, x->sequences * x->channels * x->states, &status);
    }
    ATTN_TRY(status);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        float *m = memory + task * each;
        part p = {.b = m, .c = m + x->n * x->states, .lam = m + 2 * x->n * x->states, .gain = m + x->n * (2 * x->states + deep)};
        span y = span_of(x, spans + omp_get_thread_num() * room);
        int64_t low = task % blocks * CHANNELS;
        memset(m, 0, (size_t)each * sizeof(float));
        back_task(x, &d, task / blocks, low, attn_min_i64(x->channels, low + CHANNELS), &p, &y);
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
