/* The recurrence of linear attention, a few vectors of columns at a time: their share of v and o stays in registers while the
 * rows of the state pass by once. What a slow decay takes away is added up with what is new, so that it is not lost by rounding: errors
 * of the decay would add up over as many tokens as are remembered. */
#include "kernel/linear.h"
#include "kernel/vec.h"

#include <math.h>
#include <stddef.h>

#define AHEAD 8 /* rows */
#if V_REGISTERS == 32
#define WIDE 8
#else
#define WIDE 4
#endif

#define COLUMNS(count, last)                                                                             \
    for (int i = 0; i < (count); i++)                                                                    \
        for (int lanes = i + 1 < (count) ? VW : (last), once = 1; once; once = 0)

/* `count` vectors of columns, the last of `last` lanes. Whole vectors are read and written without a mask. */
VINLINE void columns(int count, int last, int update, int64_t d, float *state, int64_t ld, double decay, const float *decays,
                     const float *q, const float *k, const float *v, float *o)
{
    vf sum[WIDE], value[WIDE];
    float constant = (float)((decay >= 0.5) - decay);
    COLUMNS(count, last)
    {
        sum[i] = v_zero();
        value[i] = !update ? v_zero() : lanes == VW ? v_load(v + i * VW) : v_load_n(v + i * VW, lanes);
    }
    for (int64_t row = 0; row < d; row++, state += ld) {
        if (count == WIDE) {
            __builtin_prefetch(state + AHEAD * ld); /* the machine finds the rest of a long row by itself */
        }
        vf query = v_set1(q[row]), key = v_set1(update ? k[row] : 0.0f);
        int slow = decays != NULL ? decays[row] >= 0.5f : decay >= 0.5;
        vf loss = v_set1(decays != NULL ? (float)slow - decays[row] : constant);
        COLUMNS(count, last)
        {
            vf s = lanes == VW ? v_load(state + i * VW) : v_load_n(state + i * VW, lanes);
            if (update) {
                vf change = v_fnma(loss, s, v_mul(key, value[i]));
                s = slow ? v_add(s, change) : change;
                if (lanes == VW) {
                    v_store(state + i * VW, s);
                } else {
                    v_store_n(state + i * VW, s, lanes);
                }
            }
            sum[i] = v_fma(query, s, sum[i]);
        }
    }
    COLUMNS(count, last)
    {
        v_store_n(o + i * VW, sum[i], lanes);
    }
}

VINLINE void all_columns(int update, int64_t d, int64_t dv, float *state, int64_t ld, double decay, const float *decays,
                         const float *q, const float *k, const float *v, float *o)
{
    int64_t at = 0;
    for (; at + WIDE * VW <= dv; at += WIDE * VW) {
        columns(WIDE, VW, update, d, state + at, ld, decay, decays, q, k, update ? v + at : NULL, o + at);
    }
    for (; at + WIDE / 2 * VW <= dv; at += WIDE / 2 * VW) {
        columns(WIDE / 2, VW, update, d, state + at, ld, decay, decays, q, k, update ? v + at : NULL, o + at);
    }
    for (; at < dv; at += VW) {
        int last = dv - at < VW ? (int)(dv - at) : VW;
        columns(1, last, update, d, state + at, ld, decay, decays, q, k, update ? v + at : NULL, o + at);
    }
}

static void step(int64_t d, int64_t dv, float *state, int64_t ld, double decay, const float *decays, const float *q,
                 const float *k, const float *v, float *o)
{
    all_columns(1, d, dv, state, ld, decay, decays, q, k, v, o);
}

static void read_state(int64_t d, int64_t dv, const float *state, int64_t ld, const float *q, float *o)
{
    all_columns(0, d, dv, (float *)(uintptr_t)state, ld, 1, NULL, q, NULL, NULL, o);
}

static float sum_row(const float *x, int64_t count)
{
    vf s0 = v_zero(), s1 = v_zero();
    int64_t i = 0;
    for (; i + 2 * VW <= count; i += 2 * VW) {
        s0 = v_add(s0, v_load(x + i));
        s1 = v_add(s1, v_load(x + i + VW));
    }
    for (; i < count; i += VW) {
        s0 = v_add(s0, v_load_n(x + i, count - i < VW ? (int)(count - i) : VW));
    }
    return v_sum(v_add(s0, s1));
}

static void multiply(float *to, const float *a, const float *b, int64_t count)
{
    int64_t i = 0;
    for (; i + VW <= count; i += VW) {
        v_store(to + i, v_mul(v_load(a + i), v_load(b + i)));
    }
    int rest = (int)(count - i);
    v_store_n(to + i, v_mul(v_load_n(a + i, rest), v_load_n(b + i, rest)), rest);
}

/* ---- Decay by channel ---- */

#define BLOCK 4 /* vectors of channels at a time */

VINLINE vf part(const float *from, int lanes) { return lanes == VW ? v_load(from) : v_load_n(from, lanes); }

VINLINE void scores_of(int vectors, int last, int64_t count, const float *q, const float *k, int64_t ld, const float *decays,
                       int64_t ldd, float *s, int64_t lds)
{
    for (int64_t j = 0; j < count; j++) {
        vf key[BLOCK];
        COLUMNS(vectors, last)
        {
            key[i] = part(k + j * ld + i * VW, lanes);
        }
        for (int64_t t = j; t < count; t++) {
            vf sum = v_zero();
            COLUMNS(vectors, last)
            {
                key[i] = t == j ? key[i] : v_mul(key[i], part(decays + t * ldd + i * VW, lanes));
                sum = v_fma(key[i], part(q + t * ld + i * VW, lanes), sum);
            }
            s[t * lds + j] += v_sum(sum);
        }
    }
}

static void faded_scores(int64_t count, int64_t width, const float *q, const float *k, int64_t ld, const float *decays, int64_t ldd,
                         float *s, int64_t lds)
{
    for (int64_t i = 0; i < count * count; i++) {
        s[i / count * lds + i % count] = 0;
    }
    int64_t c = 0;
    for (; c + BLOCK * VW <= width; c += BLOCK * VW) {
        scores_of(BLOCK, VW, count, q + c, k + c, ld, decays + c, ldd, s, lds);
    }
    for (; c < width; c += VW) {
        scores_of(1, width - c < VW ? (int)(width - c) : VW, count, q + c, k + c, ld, decays + c, ldd, s, lds);
    }
}

VINLINE void sums_of(int vectors, int last, int64_t count, const float *p, int64_t p_row, int64_t p_col, const float *from, int64_t ld,
                     const float *decays, int64_t ldd, float *to, int64_t ldt)
{
    for (int64_t j = 0; j < count; j++) {
        vf row[BLOCK];
        COLUMNS(vectors, last)
        {
            row[i] = part(from + j * ld + i * VW, lanes);
        }
        for (int64_t t = j; t < count; t++) {
            vf weight = v_set1(p[t * p_row + j * p_col]);
            COLUMNS(vectors, last)
            {
                float *at = to + t * ldt + i * VW;
                row[i] = t == j ? row[i] : v_mul(row[i], part(decays + t * ldd + i * VW, lanes));
                v_store_n(at, v_fma(weight, row[i], part(at, lanes)), lanes);
            }
        }
    }
}

static void faded_sums(int64_t count, int64_t width, const float *p, int64_t p_row, int64_t p_col, const float *from, int64_t ld,
                       const float *decays, int64_t ldd, float *to, int64_t ldt)
{
    int64_t c = 0;
    for (; c + BLOCK * VW <= width; c += BLOCK * VW) {
        sums_of(BLOCK, VW, count, p, p_row, p_col, from + c, ld, decays + c, ldd, to + c, ldt);
    }
    for (; c < width; c += VW) {
        sums_of(1, width - c < VW ? (int)(width - c) : VW, count, p, p_row, p_col, from + c, ld, decays + c, ldd, to + c, ldt);
    }
}

static void fade(int64_t count, int64_t width, float *rows, int64_t ld, const float *decays, int64_t ldd, int64_t first, float *total)
{
    for (int64_t c = 0; c < width; c += VW) {
        int lanes = width - c < VW ? (int)(width - c) : VW;
        vf factor = v_set1(1.0f);
        for (int64_t t = 0; t < count; t++) {
            float *at = rows + t * ld + c;
            factor = t < first ? factor : v_mul(factor, part(decays + t * ldd + c, lanes));
            v_store_n(at, v_mul(part(at, lanes), factor), lanes);
        }
        if (total != NULL) {
            v_store_n(total + c, factor, lanes);
        }
    }
}

VINLINE vf v_sigmoid(vf x)
{
    /* e^-x as a power of two, to 1e-7 for -8 < x: where the exponential is small beside 1, its digits do not matter. */
    vf one = v_set1(1.0f), to2 = v_set1(1.44269504088896341f);
    x = v_max(v_set1(-89.0f), v_min(v_set1(104.0f), x));
    vf n = v_round(v_mul(x, to2));
    return v_div(one, v_add(one, v_scale2(v_exp2_rest(v_fnma(x, to2, n)), v_sub(v_zero(), n))));
}

static void sigmoid(float *to, const float *from, int64_t count)
{
    int64_t i = 0;
    for (; i + VW <= count; i += VW) {
        v_store(to + i, v_sigmoid(v_load(from + i)));
    }
    v_store_n(to + i, v_sigmoid(v_load_n(from + i, (int)(count - i))), (int)(count - i));
}

static void taylor(float *s, float *slope, int64_t count)
{
    vf one = v_set1(1.0f), half = v_set1(0.5f);
    for (int64_t i = 0; i < count; i += VW) {
        int lanes = count - i < VW ? (int)(count - i) : VW;
        vf x = lanes == VW ? v_load(s + i) : v_load_n(s + i, lanes);
        vf a = v_fma(v_mul(half, x), x, v_add(one, x));
        if (lanes == VW) {
            v_store(s + i, a);
        } else {
            v_store_n(s + i, a, lanes);
        }
        if (slope != NULL) {
            v_store_n(slope + i, v_add(one, x), lanes);
        }
    }
}

static void taylor_features(int64_t d, double scale, const float *x, float *phi)
{
    float pair = (float)scale, square = (float)(scale * sqrt(0.5));
    vf linear = v_set1((float)sqrt(scale));
    *phi++ = 1;
    for (int64_t j = 0; j < d; j += VW) {
        int lanes = d - j < VW ? (int)(d - j) : VW;
        v_store_n(phi + j, v_mul(linear, v_load_n(x + j, lanes)), lanes);
    }
    phi += d;
    for (int64_t i = 0; i < d; i++) {
        vf first = v_set1(pair * x[i]);
        for (int64_t j = i; j < d; j += VW) {
            int lanes = d - j < VW ? (int)(d - j) : VW;
            v_store_n(phi + j - i, v_mul(first, v_load_n(x + j, lanes)), lanes);
        }
        phi[0] = square * x[i] * x[i];
        phi += d - i;
    }
}

/* Rows of pairs are read from whole vectors of x on (their first lanes, of pairs seen before, count as 0), so that sums in memory are
 * always written and read at the same places. */
static void taylor_features_back(int64_t d, double scale, const float *x, const float *grad_phi, float *grad_x)
{
    static const float places[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float pair = (float)scale, diagonal = (float)(scale * (sqrt(2.0) - 2));
    vf linear = v_set1((float)sqrt(scale)), place = v_load(places);
    grad_phi++;
    for (int64_t j = 0; j < d; j += VW) {
        int lanes = d - j < VW ? (int)(d - j) : VW;
        v_store_n(grad_x + j, v_fma(linear, v_load_n(grad_phi + j, lanes), v_load_n(grad_x + j, lanes)), lanes);
    }
    grad_phi += d;
    for (int64_t i = 0; i < d; i++) {
        vf sum = v_zero(), by = v_set1(pair * x[i]);
        for (int64_t j = i / VW * VW; j < d; j += VW) {
            int lanes = d - j < VW ? (int)(d - j) : VW;
            vf g = v_load_n(grad_phi + j - i, lanes);
            if (j < i) {
                g = v_select(v_lt(place, v_set1((float)(i - j))), v_zero(), g);
            }
            sum = v_fma(g, v_load_n(x + j, lanes), sum);
            v_store_n(grad_x + j, v_fma(by, g, v_load_n(grad_x + j, lanes)), lanes);
        }
        /* The square came twice, as if it were a pair. */
        grad_x[i] += pair * v_sum(sum) + diagonal * grad_phi[0] * x[i];
        grad_phi += d - i;
    }
}

const attn_linear_kernels ATTN_K(attn_linear_kernels_table) = {.step = step, .read = read_state, .sum = sum_row, .multiply = multiply,
                                                               .faded_scores = faded_scores, .faded_sums = faded_sums, .fade = fade, .sigmoid = sigmoid,
                                                               .taylor = taylor, .taylor_features = taylor_features,
                                                               .taylor_features_back = taylor_features_back};
