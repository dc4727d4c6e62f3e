/* Recurrences that keep channels apart (see scan.h): a vector of channels goes through all tokens before the next one does, with its
 * state in registers or in the first-level cache. */
#include "kernel/scan.h"
#include "kernel/vec.h"

#include <stddef.h>

#define AHEAD 16 /* tokens: their rows lie too far apart for the machine to see where this goes */
#define PAIR 2 /* vectors of channels that go together, so that one's latency hides behind the other's */

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

VINLINE void average_lanes(int count, int lanes, int64_t n, int64_t ld, const float *x, const float *g, const float *before, float *out)
{
    vf last[PAIR], one = v_set1(1.0f);
    for (int i = 0; i < count; i++) {
        last[i] = before != NULL ? part(before + i * VW, lanes) : v_zero();
    }
    for (int64_t t = 0; t < n; t++, x += ld, g += ld, out += ld) {
        for (int i = 0; i < count; i++) {
            vf gate = part(g + i * VW, lanes);
            last[i] = v_fma(gate, last[i], v_mul(v_sub(one, gate), part(x + i * VW, lanes)));
            put(out + i * VW, last[i], lanes);
        }
    }
}

static void average(int64_t n, int64_t channels, int64_t ld, const float *x, const float *g, const float *before, float *out)
{
    int64_t c = 0;
    for (; c + PAIR * VW <= channels; c += PAIR * VW) {
        average_lanes(PAIR, VW, n, ld, x + c, g + c, before != NULL ? before + c : NULL, out + c);
    }
    for (; c < channels; c += VW) {
        int lanes = channels - c < VW ? (int)(channels - c) : VW;
        average_lanes(1, lanes, n, ld, x + c, g + c, before != NULL ? before + c : NULL, out + c);
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

const attn_scan_kernels ATTN_K(attn_scan_kernels_table) = {.scan = scan, .average = average, .average_back = average_back};
