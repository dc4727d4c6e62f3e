/* The recurrence of linear attention, a few vectors of columns at a time: their share of v and o stays in registers while the
 * rows of the state pass by once. */
#include "kernel/linear.h"
#include "kernel/vec.h"

#include <stddef.h>

#define WIDE 4

#define COLUMNS(count, last)                                                                             \
    for (int i = 0; i < (count); i++)                                                                    \
        for (int lanes = i + 1 < (count) ? VW : (last), once = 1; once; once = 0)

/* `count` vectors of columns, the last of `last` lanes. Whole vectors are read and written without a mask. */
VINLINE void columns(int count, int last, int update, int64_t d, float *state, int64_t ld, float decay, const float *decays,
                     const float *q, const float *k, const float *v, float *o)
{
    vf sum[WIDE], value[WIDE];
    COLUMNS(count, last)
    {
        sum[i] = v_zero();
        value[i] = !update ? v_zero() : lanes == VW ? v_load(v + i * VW) : v_load_n(v + i * VW, lanes);
    }
    for (int64_t row = 0; row < d; row++, state += ld) {
        vf query = v_set1(q[row]), key = v_set1(update ? k[row] : 0.0f);
        vf keep = v_set1(decays != NULL ? decays[row] : decay);
        COLUMNS(count, last)
        {
            vf s = lanes == VW ? v_load(state + i * VW) : v_load_n(state + i * VW, lanes);
            if (update) {
                s = v_fma(key, value[i], v_mul(keep, s));
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

VINLINE void all_columns(int update, int64_t d, int64_t dv, float *state, int64_t ld, float decay, const float *decays,
                         const float *q, const float *k, const float *v, float *o)
{
    int64_t at = 0;
    for (; at + WIDE * VW <= dv; at += WIDE * VW) {
        columns(WIDE, VW, update, d, state + at, ld, decay, decays, q, k, update ? v + at : NULL, o + at);
    }
    for (; at < dv; at += VW) {
        int last = dv - at < VW ? (int)(dv - at) : VW;
        columns(1, last, update, d, state + at, ld, decay, decays, q, k, update ? v + at : NULL, o + at);
    }
}

static void step(int64_t d, int64_t dv, float *state, int64_t ld, float decay, const float *decays, const float *q,
                 const float *k, const float *v, float *o)
{
    all_columns(1, d, dv, state, ld, decay, decays, q, k, v, o);
}

static void read_state(int64_t d, int64_t dv, const float *state, int64_t ld, const float *q, float *o)
{
    all_columns(0, d, dv, (float *)(uintptr_t)state, ld, 1.0f, NULL, q, NULL, NULL, o);
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

const attn_linear_kernels ATTN_K(attn_linear_kernels_table) = {.step = step, .read = read_state, .multiply = multiply};
