/* Row-wise operations of transformers (see rows.h). */
#include "kernel/rows.h"

#include "kernel/vec.h"
#include "tensor/half.h"

/* For each whole vector, then once for the rest of a row. */
#define EACH(i, n) for (int64_t i = 0; i < (n); i += VW)
VINLINE vf load_at(const float *x, int64_t i, int64_t n)
{
    return n - i >= VW ? v_load(x + i) : v_load_n(x + i, (int)(n - i));
}
VINLINE void store_at(float *x, vf y, int64_t i, int64_t n)
{
    if (n - i >= VW) {
        v_store(x + i, y);
    } else {
        v_store_n(x + i, y, (int)(n - i));
    }
}

static void rms_norm(const float *x, const float *weight, int64_t n, float epsilon, float *out)
{
    vf sum = v_zero(), other = v_zero();
    int64_t i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        vf a = v_load(x + i), b = v_load(x + i + VW);
        sum = v_fma(a, a, sum);
        other = v_fma(b, b, other);
    }
    for (; i < n; i += VW) {
        vf a = load_at(x, i, n);
        sum = v_fma(a, a, sum);
    }
    vf factor = v_set1(1.0f / sqrtf(v_sum(v_add(sum, other)) / (float)n + epsilon));
    EACH(j, n) {
        store_at(out, v_mul(v_mul(load_at(x, j, n), factor), load_at(weight, j, n)), j, n);
    }
}

static void rotate(float *x, int64_t rows, int64_t ld, int64_t half, const float *cosine, const float *sine)
{
    EACH(i, half) {
        vf c = load_at(cosine, i, half), s = load_at(sine, i, half);
        for (int64_t r = 0; r < rows; r++) {
            float *row = x + r * ld;
            vf a = load_at(row, i, half), b = load_at(row + half, i, half);
            store_at(row, v_fnma(b, s, v_mul(a, c)), i, half);
            store_at(row + half, v_fma(a, s, v_mul(b, c)), i, half);
        }
    }
}

static void add(float *x, const float *y, int64_t n)
{
    EACH(i, n) {
        store_at(x, v_add(load_at(x, i, n), load_at(y, i, n)), i, n);
    }
}

static void scale(float *x, float factor, int64_t n)
{
    EACH(i, n) {
        store_at(x, v_mul(load_at(x, i, n), v_set1(factor)), i, n);
    }
}

/* x / (1 + exp(-y)) */
VINLINE vf times_sigmoid(vf x, vf y) { return v_div(x, v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), y)))); }

static void silu_gate(float *gate, const float *up, int64_t n)
{
    EACH(i, n) {
        vf x = load_at(gate, i, n);
        store_at(gate, v_mul(times_sigmoid(x, x), load_at(up, i, n)), i, n);
    }
}

/* 0.5 x (1 + tanh(y)) = x sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3) */
static void gelu_gate(float *gate, const float *up, int64_t n)
{
    EACH(i, n) {
        vf x = load_at(gate, i, n);
        vf inner = v_mul(x, v_fma(v_mul(x, x), v_set1(2.0f * 0.79788456080286536f * 0.044715f),
                                  v_set1(2.0f * 0.79788456080286536f)));
        store_at(gate, v_mul(times_sigmoid(x, inner), load_at(up, i, n)), i, n);
    }
}

/* log(1 + e) for e in [0, 1], as 2 artanh(e / (2 + e)): relatively exact for small e too. */
VINLINE vf v_log1p(vf e)
{
    vf z = v_div(e, v_add(v_set1(2.0f), e)), y = v_mul(z, z), sum = v_set1(1.0f / 15);
    for (int i = 13; i >= 1; i -= 2) {
        sum = v_fma(sum, y, v_set1(1.0f / (float)i));
    }
    return v_mul(v_add(z, z), sum);
}

VINLINE vf function_at(attn_row_function f, vf x, int slope)
{
    vf one = v_set1(1.0f), zero = v_zero();
    if (f == ATTN_ROW_ELU1) {
        vf below = v_exp(v_min(zero, x));
        return v_select(v_lt(zero, x), slope ? one : v_add(x, one), below);
    }
    if (f == ATTN_ROW_SOFTPLUS && !slope) {
        return v_add(v_max(zero, x), v_log1p(v_exp(v_sub(zero, v_abs(x)))));
    }
    if (f == ATTN_ROW_SILU && !slope) {
        return times_sigmoid(x, x);
    }
    vf s = times_sigmoid(one, x);
    if (f == ATTN_ROW_SILU) {
        return v_mul(s, v_fma(x, v_sub(one, s), one));
    }
    return f == ATTN_ROW_SIGMOID && slope ? v_mul(s, v_sub(one, s)) : s;
}

VINLINE void function_of(attn_row_function f, const float *x, const float *grad, int64_t n, float *out)
{
    EACH(i, n) {
        vf at = load_at(x, i, n);
        store_at(out, grad != NULL ? v_mul(load_at(grad, i, n), function_at(f, at, 1)) : function_at(f, at, 0), i, n);
    }
}

static void function(attn_row_function f, const float *x, const float *grad, int64_t n, float *out)
{
    switch (f) {
    case ATTN_ROW_SIGMOID: function_of(ATTN_ROW_SIGMOID, x, grad, n, out); break;
    case ATTN_ROW_SILU: function_of(ATTN_ROW_SILU, x, grad, n, out); break;
    case ATTN_ROW_SOFTPLUS: function_of(ATTN_ROW_SOFTPLUS, x, grad, n, out); break;
    case ATTN_ROW_ELU1: function_of(ATTN_ROW_ELU1, x, grad, n, out); break;
    }
}

static void to_f16(const float *x, int64_t n, uint16_t *out)
{
    int64_t i = 0;
    for (; i + VW <= n; i += VW) {
        v_store_f16(out + i, v_load(x + i));
    }
    for (; i < n; i++) {
        out[i] = attn_f32_to_f16(x[i]);
    }
}

static void to_bf16(const float *x, int64_t n, uint16_t *out)
{
    for (int64_t i = 0; i < n; i++) {
        out[i] = attn_f32_to_bf16(x[i]);
    }
}

static float to_i8(const float *x, int64_t n, int8_t *out)
{
    vf top = v_zero();
    EACH(i, n) {
        top = v_max(top, v_abs(load_at(x, i, n)));
    }
    float most = v_top(top), inverse = most > 0 ? 127.0f / most : 0.0f;
    EACH(i, n) {
        float whole[VW];
        v_store(whole, v_round(v_mul(load_at(x, i, n), v_set1(inverse))));
        for (int j = 0; j < VW && i + j < n; j++) {
            out[i + j] = (int8_t)(int32_t)whole[j];
        }
    }
    return most / 127.0f;
}

static void hadamard(float *x, int64_t n)
{
    int64_t block = n & -n;
    float factor = 1 / sqrtf((float)block);
    for (int64_t i = 0; i < n; i++) {
        x[i] *= factor;
    }
    for (int64_t half = 1; half < block; half *= 2) {
        for (int64_t first = 0; first < n; first += 2 * half) {
            float *a = x + first, *b = a + half;
            for (int64_t i = 0; i < half; i++) {
                float sum = a[i] + b[i], difference = a[i] - b[i];
                a[i] = sum;
                b[i] = difference;
            }
        }
    }
}

const attn_row_kernels ATTN_K(attn_row_kernels_table) = {rms_norm, rotate, add, scale, silu_gate, gelu_gate,
                                                        function, to_f16, to_bf16, to_i8, hadamard};
