/* Rotary positions and the ways of stretching them to longer contexts: linear, Llama 3 (factors in a tensor), YaRN
 * (arXiv:2309.00071) and LongRoPE (arXiv:2402.13753). */
#include "llm/model.h"

#include <math.h>
#include <stdio.h>

#define PI 3.14159265358979323846

typedef enum rope_scaling { SCALING_NONE, SCALING_LINEAR, SCALING_YARN, SCALING_LONGROPE } rope_scaling;

static attn_status read_scaling(const attn_gguf *file, const char *prefix, rope_scaling *scaling)
{
    static const char *const names[] = {"none", "linear", "yarn", "longrope"};
    char key[128];
    attn_gguf_string text = {"", 0};
    snprintf(key, sizeof key, "%s.rope.scaling.type", prefix);
    *scaling = SCALING_NONE;
    if (attn_gguf_metadata_find(file, key) == NULL) {
        /* Older files give a linear factor alone. */
        snprintf(key, sizeof key, "%s.rope.scale_linear", prefix);
        if (attn_gguf_metadata_find(file, key) != NULL) {
            *scaling = SCALING_LINEAR;
        }
        return ATTN_OK;
    }
    ATTN_TRY(attn_gguf_get_string(file, key, &text));
    for (int i = 0; i < 4; i++) {
        if (text.bytes == strlen(names[i]) && memcmp(text.text, names[i], text.bytes) == 0) {
            *scaling = (rope_scaling)i;
            return ATTN_OK;
        }
    }
    return attn_fail(ATTN_ERR_UNSUPPORTED, "gguf: key '%.80s' is '%.*s' (none, linear, yarn or longrope)", key,
                     (int)attn_min_i64((int64_t)text.bytes, 40), text.text);
}

/* The dimension whose wave turns `turns` times within the original context. */
static double yarn_dimension(double turns, double dims, double base, double original)
{
    return dims * log(original / (turns * 2 * PI)) / (2 * log(base));
}

static void yarn(float *frequency, int64_t dims, double base, double factor, double original, double fast, double slow)
{
    double low = fmax(0, floor(yarn_dimension(fast, (double)dims, base, original)));
    double high = fmin((double)dims - 1, ceil(yarn_dimension(slow, (double)dims, base, original)));
    for (int64_t i = 0; i < dims / 2; i++) {
        /* 0: keep the frequency (fast waves), 1: divide it by the factor. */
        double ramp = fmin(1, fmax(0, ((double)i - low) / fmax(0.001, high - low)));
        frequency[i] = (float)(frequency[i] * (1 - ramp + ramp / factor));
    }
}

/* Divide by the factors in a tensor. */
static attn_status apply_factors(attn_rope *rope, const attn_gguf *file, const char *name)
{
    float *factors;
    ATTN_TRY(attn_model_vector(file, name, rope->dims / 2, 1, &factors));
    attn_status status = ATTN_OK;
    for (int64_t i = 0; factors != NULL && i < rope->dims / 2 && status == ATTN_OK; i++) {
        if (!(factors[i] > 0 && factors[i] < 1e30f)) {
            status = attn_fail(ATTN_ERR_FORMAT, "gguf: tensor '%s' holds %g (expected positive factors)", name,
                               factors[i]);
        }
        rope->frequency[i] /= factors[i];
    }
    attn_free(factors);
    return status;
}

static attn_status fill(attn_rope *rope, const attn_gguf *file, const char *prefix, int64_t context_length, double base,
                        int scaled)
{
    for (int64_t i = 0; i < rope->dims / 2; i++) {
        rope->frequency[i] = (float)pow(base, -2.0 * (double)i / (double)rope->dims);
    }
    if (!scaled) {
        return ATTN_OK;
    }
    rope_scaling scaling;
    double factor, magnitude, fast, slow;
    int64_t original;
    ATTN_TRY(read_scaling(file, prefix, &scaling));
    ATTN_TRY(attn_model_float(file, prefix, "rope.scale_linear", 1, &factor));
    ATTN_TRY(attn_model_float(file, prefix, "rope.scaling.factor", factor, &factor));
    ATTN_TRY(attn_model_float(file, prefix, "rope.scaling.attn_factor", 0, &magnitude));
    ATTN_TRY(attn_model_float(file, prefix, "rope.scaling.yarn_beta_fast", 32, &fast));
    ATTN_TRY(attn_model_float(file, prefix, "rope.scaling.yarn_beta_slow", 1, &slow));
    ATTN_TRY(
        attn_model_int(file, prefix, "rope.scaling.original_context_length", context_length, 1, INT32_MAX, &original));
    if (factor == 0) {
        factor = 1; /* some files say 0 for "none" */
    }
    if (!(factor >= 1e-3 && factor <= 1e6) || !(fast > 0) || !(slow > 0) || !(magnitude >= 0 && magnitude < 1e6)) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: '%s.rope.scaling': factor %g, yarn_beta_fast %g, yarn_beta_slow %g or "
                         "attn_factor %g is out of range", prefix, factor, fast, slow, magnitude);
    }
    switch (scaling) {
    case SCALING_LINEAR:
        for (int64_t i = 0; i < rope->dims / 2; i++) {
            rope->frequency[i] = (float)(rope->frequency[i] / factor);
        }
        break;
    case SCALING_YARN:
        yarn(rope->frequency, rope->dims, base, factor, (double)original, fast, slow);
        rope->magnitude = (float)((magnitude > 0 ? magnitude : 1) * (1 + 0.1 * log(fmax(factor, 1))));
        break;
    case SCALING_LONGROPE: {
        /* The long factors, once the context that the model offers is longer than the original one. */
        double stretch = (double)context_length / (double)original;
        ATTN_TRY(apply_factors(rope, file, stretch > 1 ? "rope_factors_long.weight" : "rope_factors_short.weight"));
        rope->magnitude = (float)(magnitude > 0 ? magnitude
                                  : stretch > 1 ? sqrt(1 + log(stretch) / log(fmax((double)original, 2))) : 1);
        break;
    }
    case SCALING_NONE: break;
    }
    return apply_factors(rope, file, "rope_freqs.weight");
}

attn_status attn_rope_make(attn_rope *rope, const attn_gguf *file, const char *prefix, int64_t head_width,
                           int64_t context_length, double base, int scaled)
{
    int64_t dims;
    ATTN_TRY(attn_model_int(file, prefix, "rope.dimension_count", head_width, 2, head_width, &dims));
    if (dims % 2 != 0 || !(base > 1 && base < 1e30)) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: '%s.rope': dimension_count %lld (even) or frequency base %g (above 1)",
                         prefix, (long long)dims, base);
    }
    *rope = (attn_rope){dims, attn_alloc_array((size_t)dims / 2, sizeof(float)), 1};
    if (rope->frequency == NULL) {
        return attn_fail_memory((size_t)dims / 2 * sizeof(float));
    }
    return fill(rope, file, prefix, context_length, base, scaled);
}

void attn_rope_angles(const attn_rope *rope, int64_t position, int64_t step, int64_t count, float magnitude, int threads, float *to)
{
    int64_t half = rope->dims / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 8)
    for (int64_t i = 0; i < half; i++) {
        double angle = (double)rope->frequency[i] * (double)position, re = cos(angle), im = sin(angle);
        double turn = (double)rope->frequency[i] * (double)step, turn_re = cos(turn), turn_im = sin(turn);
        for (int64_t r = 0; r < count; r++) {
            to[r * 2 * half + i] = (float)re * magnitude;
            to[r * 2 * half + half + i] = (float)im * magnitude;
            double next = re * turn_re - im * turn_im;
            im = re * turn_im + im * turn_re;
            re = next;
        }
    }
}

void attn_rope_free(attn_rope *rope)
{
    attn_free(rope->frequency);
    rope->frequency = NULL;
}
