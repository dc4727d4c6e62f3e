/* A model in memory: what model.c reads from a file and context.c computes with. */
#ifndef ATTN_LLM_MODEL_H
#define ATTN_LLM_MODEL_H

#include <attn/model.h>

#include "llm/quant.h"

/* Rotary positions: pair (i, i + dims / 2) of a head turns by position * frequency[i]. */
typedef struct attn_rope {
    int64_t dims;
    float *frequency; /* [dims / 2] */
    float magnitude;  /* factor of cosine and sine */
} attn_rope;

typedef struct attn_model_layer {
    float *attention_norm, *ffn_norm;            /* [width] */
    float *q_norm, *k_norm;                      /* [head_width], may be NULL */
    float *post_attention_norm, *post_ffn_norm;  /* [width], may be NULL */
    float *q_bias, *k_bias, *v_bias, *out_bias;  /* may be NULL */
    attn_quant_matrix q, k, v, out, gate, up, down;
    int64_t window; /* 0: none */
    int rope;       /* index into attn_model.ropes */
} attn_model_layer;

struct attn_model {
    attn_gguf *file;
    attn_arena *weights; /* of all matrices, in the order of their use */
    char *architecture;
    attn_model_info info;
    attn_model_layer *layers;
    attn_quant_matrix embedding; /* empty when rows are read from the file */
    const attn_gguf_tensor *embedding_tensor;
    attn_quant_matrix output;    /* empty when tied to the embedding */
    float *output_norm;
    attn_rope ropes[2];          /* of global and of sliding-window layers */
    float epsilon, embedding_scale, attention_scale, attention_softcap, output_softcap;
    int gelu; /* the gate's activation: tanh GELU, otherwise SiLU */
};

/* Tied or not. */
static inline const attn_quant_matrix *attn_model_output(const attn_model *model)
{
    return model->output.data != NULL ? &model->output : &model->embedding;
}

/* rope.c: frequencies from the metadata under `prefix` and, when they exist, the tensors rope_freqs,
 * rope_factors_long and rope_factors_short. `scaled`: whether the scaling that the metadata names applies. */
attn_status attn_rope_make(attn_rope *rope, const attn_gguf *file, const char *prefix, int64_t head_width,
                           int64_t context_length, double base, int scaled);
void attn_rope_free(attn_rope *rope);
/* Cosines and sines, times `magnitude`, of `count` positions from `position` on, each `step` further: [count][cosine, sine][dims / 2]. */
void attn_rope_angles(const attn_rope *rope, int64_t position, int64_t step, int64_t count, float magnitude, int threads, float *to);

/* Metadata with a default, for "PREFIX.NAME"; an existing value of another kind or out of range is an error. */
attn_status attn_model_int(const attn_gguf *file, const char *prefix, const char *name, int64_t standard, int64_t least,
                           int64_t most, int64_t *value);
attn_status attn_model_float(const attn_gguf *file, const char *prefix, const char *name, double standard,
                             double *value);
/* A one-dimensional tensor of `count` numbers as new float32 memory. A tensor that is missing leaves NULL when it is
 * optional. */
attn_status attn_model_vector(const attn_gguf *file, const char *name, int64_t count, int optional, float **out);

#endif
