/* Recurrences that keep channels apart (see scan.h): a vector of channels goes through all tokens before the next one does, with its
 * state in registers or in the first-level cache. */
#include "kernel/scan.h"
#include "kernel/vec.h"

#include <stddef.h>

#define AHEAD 16 /* tokens: their rows lie too far apart for the machine to see where this goes */
#define PAIR 2 /* vectors of channels that go together, so that one's latency hides behind the other's */
#define QUAD 4 /* the same where much is done for each */

VINLINE vf part(const float *from, int lanes) { return lanes == VW ? v_load(from) : v_load_n(from, lanes); }
VINLINE void put(float *to, vf x, int lanes)
{
    if (lanes == VW) {
        v_store(to, x);
    } else {
        v_store_n(to, x, lanes);
    }
}

/* x by value: stores of vectors may alias anything that is in memory. */
VINLINE void scan_lanes(const attn_scan x, int64_t at, int lanes, int by_rate, int is_plain)
{
    vf skip = x.skip != NULL ? part(x.skip + at, lanes) : v_zero(), one = v_set1(1.0f);
    const float *v = x.v + at, *gain = x.gain != NULL ? x.gain + at : NULL, *lam = by_rate ? NULL : x.lam + at, *b = x.b, *c = x.c;
    float *h = x.h + at, *o = x.o + at;
    for (int64_t t = 0; t < x.n; t++) {
        __builtin_prefetch(v + (t + AHEAD) * x.ld); /* of the next call's tokens too */
        __builtin_prefetch(o + (t + AHEAD) * x.ld, 1);
        vf value = part(v + t * x.ld, lanes), by = gain != NULL ? part(gain + t * x.ld_gain, lanes) : one;
        vf in = v_mul(by, value), sum = v_mul(skip, value), other = v_zero(), keep = by_rate ? one : part(lam + t * x.ld, lanes);
        for (int64_t s = 0; s < x.states; s++) {
            float *own = h + s * x.channels;
            keep = by_rate ? v_exp2(v_mul(by, part(x.rate + s * x.channels + at, lanes))) : keep;
            vf now = v_fma(keep, part(own, lanes), is_plain ? in : v_mul(in, v_set1(b[t * x.states + s])));
            put(own, now, lanes);
            vf read = is_plain ? one : v_set1(c[t * x.states + s]);
            vf more = v_fma(now, read, s % 2 == 0 ? sum : other);
            sum = s % 2 == 0 ? more : sum;
            other = s % 2 == 0 ? other : more;
        }
        put(o + t * x.ld, v_add(sum, other), lanes);
    }
}

static void scan(const attn_scan *x)
{
    for (int64_t c = 0; c < x->channels; c += VW) {
        int lanes = x->channels - c < VW ? (int)(x->channels - c) : VW;
        if (x->lam == NULL && lanes == VW) {
            scan_lanes(*x, c, VW, 1, 0);
        } else if (x->lam == NULL) {
            scan_lanes(*x, c, lanes, 1, 0);
        } else if (x->b == NULL) {
            scan_lanes(*x, c, lanes, 0, 1);
        } else {
            scan_lanes(*x, c, lanes, 0, 0);
        }
    }
}

static void states(const attn_scan_back *x)
{
    int64_t size = x->states * x->channels;
    for (int64_t t = 0; t < x->n; t++) {
        for (int64_t c = 0; c < x->channels; c += VW) {
            int lanes = x->channels - c < VW ? (int)(x->channels - c) : VW;
            vf in = v_mul(part(x->gain + t * x->channels + c, lanes), part(x->v + t * x->ld + c, lanes));
            for (int64_t s = 0; s < x->states; s++) {
                int64_t at = t * size + s * x->channels + c;
                vf more = v_mul(in, v_set1(x->b[t * x->ld_b + s]));
                put(x->h + at + size, v_fma(part(x->keep + at, lanes), part(x->h + at, lanes), more), lanes);
            }
        }
    }
}

/* x by value, as above. Sums over channels: lane by lane first. */
VINLINE void back_lanes(const attn_scan_back x, int64_t t, int64_t c, int lanes, int by_rate)
{
    int64_t size = x.states * x.channels, row = t * x.channels + c;
    vf out = part(x.grad_o + t * x.ld_o + c, lanes), value = part(x.v + t * x.ld + c, lanes), by = part(x.gain + row, lanes);
    vf in = v_mul(by, value), inner = v_zero(), rates = v_zero();
    vf skip = x.skip != NULL ? part(x.skip + c, lanes) : v_zero();
    const float *b = x.b + t * x.ld_b, *read = x.c + t * x.ld_c;
    for (int64_t s = 0; s < x.states; s++) {
        int64_t own = s * x.channels + c, at = t * size + own;
        float *sum = x.sums + s * VW, *other = sum + x.states * VW;
        vf keep = part(x.keep + at, lanes), grad = v_fma(out, v_set1(read[s]), part(x.g + own, lanes)), slope = v_mul(grad, part(x.h + at, lanes));
        v_store(sum, v_fma(grad, in, v_load(sum)));
        v_store(other, v_fma(out, part(x.h + at + size, lanes), v_load(other)));
        inner = v_fma(grad, v_set1(b[s]), inner);
        if (by_rate) {
            slope = v_mul(slope, keep);
            rates = v_fma(slope, part(x.rate + own, lanes), rates);
            put(x.grad_rate + own, v_fma(slope, by, part(x.grad_rate + own, lanes)), lanes);
        } else {
            put(x.keep + at, slope, lanes);
        }
        put(x.g + own, v_mul(keep, grad), lanes);
    }
    put(x.grad_v + row, v_fma(by, inner, v_mul(skip, out)), lanes);
    put(x.grad_gain + row, v_fma(value, inner, v_mul(rates, v_set1(0.693147180559945f))), lanes);
    put(x.grad_skip + c, v_fma(out, value, part(x.grad_skip + c, lanes)), lanes);
}

static void back(const attn_scan_back *x)
{
    for (int64_t t = x->n - 1; t >= 0; t--) {
        for (int64_t s = 0; s < 2 * x->states; s++) {
            v_store(x->sums + s * VW, v_zero());
        }
        for (int64_t c = 0; c < x->channels; c += VW) {
            int lanes = x->channels - c < VW ? (int)(x->channels - c) : VW;
            if (x->rate == NULL) {
                back_lanes(*x, t, c, lanes, 0);
            } else if (lanes == VW) {
                back_lanes(*x, t, c, VW, 1);
            } else {
                back_lanes(*x, t, c, lanes, 1);
            }
        }
        for (int64_t s = 0; s < x->states; s++) {
            x->grad_b[t * x->states + s] = v_sum(v_load(x->sums + s * VW));
            x->grad_c[t * x->states + s] = v_sum(v_load(x->sums + (x->states + s) * VW));
        }
    }
}

VINLINE void average_lanes(int count, int lanes, int64_t n, int64_t ld, const float *x, const float *g, const float *before,
                          int64_t ld_out, float *out)
{
    vf last[PAIR], one = v_set1(1.0f);
    for (int i = 0; i < count; i++) {
        last[i] = before != NULL ? part(before + i * VW, lanes) : v_zero();
    }
    for (int64_t t = 0; t < n; t++, x += ld, g += ld, out += ld_out) {
        for (int i = 0; i < count; i++) {
            vf gate = part(g + i * VW, lanes);
            last[i] = v_fma(gate, last[i], v_mul(v_sub(one, gate), part(x + i * VW, lanes)));
            put(out + i * VW, last[i], lanes);
        }
    }
}

static void average(int64_t n, int64_t channels, int64_t ld, const float *x, const float *g, const float *before, int64_t ld_out, float *out)
{
    int64_t c = 0;
    for (; c + PAIR * VW <= channels; c += PAIR * VW) {
        average_lanes(PAIR, VW, n, ld, x + c, g + c, before != NULL ? before + c : NULL, ld_out, out + c);
    }
    for (; c < channels; c += VW) {
        int lanes = channels - c < VW ? (int)(channels - c) : VW;
        average_lanes(1, lanes, n, ld, x + c, g + c, before != NULL ? before + c : NULL, ld_out, out + c);
    }
}

VINLINE void gated_lanes(int count, int lanes, const attn_scan_gated x, int64_t c)
{
    vf k[QUAD], v[QUAD], one = v_set1(1.0f), factor = v_set1(x.factor);
    for (int i = 0; i < count; i++) {
        k[i] = part(x.k_state + c + i * VW, lanes);
        v[i] = part(x.v_state + c + i * VW, lanes);
    }
    for (int64_t t = 0; t < x.n; t++) {
        vf sum = v_zero();
        for (int i = 0; i < count; i++) {
            int64_t at = t * x.channels + c + i * VW;
            vf gate = part(x.g + at, lanes), rest = v_sub(one, gate), q = v_mul(factor, part(x.q + at, lanes));
            k[i] = v_fma(gate, k[i], v_mul(rest, part(x.k + at, lanes)));
            v[i] = v_fma(gate, v[i], v_mul(rest, part(x.v + at, lanes)));
            put(x.turned + at, q, lanes);
            put(x.out + t * x.ld_out + c + i * VW, v[i], lanes);
            sum = v_fma(q, k[i], sum);
        }
        x.product[t] = v_sum(sum) + (c > 0 ? x.product[t] : 0.0f);
    }
    for (int i = 0; i < count; i++) {
        put(x.k_state + c + i * VW, k[i], lanes);
        put(x.v_state + c + i * VW, v[i], lanes);
    }
}

static void gated(const attn_scan_gated *x)
{
    int64_t c = 0;
    for (; c + QUAD * VW <= x->channels; c += QUAD * VW) {
        gated_lanes(QUAD, VW, *x, c);
    }
    for (; c < x->channels; c += VW) {
        gated_lanes(1, x->channels - c < VW ? (int)(x->channels - c) : VW, *x, c);
    }
}

VINLINE void average_back_lanes(int lanes, int64_t n, int64_t ld, const float *x, const float *g, const float *before, const float *out,
                                float *a, float *grad_x, float *grad_g, int add)
{
    vf later = v_zero(), one = v_set1(1.0f);
    for (int64_t at = (n - 1) * ld; at >= 0; at -= ld) {
        vf gate = part(g + at, lanes), slope = v_add(part(a + at, lanes), later);
        vf from = at > 0 ? part(out + at - ld, lanes) : before != NULL ? part(before, lanes) : v_zero();
        vf grad = v_sub(from, part(x + at, lanes));
        put(grad_g + at, add ? v_fma(slope, grad, part(grad_g + at, lanes)) : v_mul(slope, grad), lanes);
        put(grad_x + at, v_mul(v_sub(one, gate), slope), lanes);
        later = v_mul(gate, slope);
    }
}

static void average_back(int64_t n, int64_t channels, const float *x, const float *g, const float *before, const float *out, float *a,
                         float *grad_x, float *grad_g, int add)
{
    for (int64_t c = 0; c < channels; c += VW) {
        int lanes = channels - c < VW ? (int)(channels - c) : VW;
        average_back_lanes(lanes, n, channels, x + c, g + c, before != NULL ? before + c : NULL, out + c, a + c, grad_x + c, grad_g + c, add);
    }
}

const attn_scan_kernels ATTN_K(attn_scan_kernels_table) = {.scan = scan, .states = states, .back = back, .average = average, .gated = gated, .average_back = average_back};
