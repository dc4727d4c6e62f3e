/* The noising schedule of the references in multi-reference self-attention (mrsa.c; FreeCustom, arXiv:2405.13870). */
#include "op/class.h"

#include <string.h>


typedef struct noise_params {
    int64_t step, steps, train_steps;
    double beta_start, beta_end;
} noise_params;

static const attn_param_info noise_param_table[] = {
    ATTN_P_INT("step", noise_params, step, NULL, 0, INFINITY, "which step of the sampler, 0 ... steps-1"),
    ATTN_P_INT("steps", noise_params, steps, "50", 1, 1e6, "steps of the sampler"),
    ATTN_P_INT("train_steps", noise_params, train_steps, "1000", 1, 1e6, "steps of the training schedule"),
    ATTN_P_FLOAT("beta_start", noise_params, beta_start, "0.00085", 0, 1, "first noise variance"),
    ATTN_P_FLOAT("beta_end", noise_params, beta_end, "0.012", 0, 1, "last noise variance"),
};

enum { NOISE_Z, NOISE_EPS, NOISE_O, NOISE_TIMESTEPS, NOISE_ALPHA };

static const attn_port_info noise_ports[] = {
    ATTN_IN("z_ref", "...", FLOAT, 0, "clean reference latents"),
    ATTN_IN("eps", "...", FLOAT, 0, "noise of the same shape"),
    ATTN_OUT("o", "...", FLOAT, 0, "noised to the step's time"),
    ATTN_OUT("timesteps", "steps", INT, 0, "training time of each step"),
    ATTN_OUT("alpha", "steps", FLOAT, 0, "cumulative product of 1 - beta at these times"),
};

static attn_status noise_bind(attn_call *call)
{
    const noise_params *p = call->params;
    const attn_tensor *z = call->t[NOISE_Z], *eps = call->t[NOISE_EPS];
    if (z->ndim != eps->ndim || memcmp(z->shape, eps->shape, (size_t)z->ndim * sizeof z->shape[0]) != 0) {
        return attn_fail(ATTN_ERR_SHAPE, "z_ref and eps differ in shape");
    }
    if (p->step >= p->steps || p->steps > p->train_steps) {
        return attn_fail(ATTN_ERR_ARGUMENT, "step = %lld, steps = %lld, train_steps = %lld: expected step < steps <= train_steps",
                         (long long)p->step, (long long)p->steps, (long long)p->train_steps);
    }
    attn_set_dim(call, "steps", p->steps);
    return ATTN_OK;
}

static attn_status noise_forward(attn_call *call)
{
    const noise_params *p = call->params;
    double *alpha = attn_arena_array(call->arena, (size_t)p->train_steps, sizeof *alpha);
    if (alpha == NULL) {
        return attn_fail_memory((size_t)p->train_steps * sizeof *alpha);
    }
    double first = sqrt(p->beta_start), last = sqrt(p->beta_end), product = 1;
    for (int64_t t = 0; t < p->train_steps; t++) {
        double root = p->train_steps > 1 ? first + (last - first) * (double)t / (double)(p->train_steps - 1) : first;
        product *= 1 - root * root;
        alpha[t] = product;
    }
    int64_t ratio = p->train_steps / p->steps;
    for (int64_t i = 0; i < p->steps; i++) {
        int64_t time = ratio * (p->steps - 1 - i);
        attn_i64(call->t[NOISE_TIMESTEPS])[i] = time;
        attn_f32(call->t[NOISE_ALPHA])[i] = (float)alpha[time];
    }
    double now = alpha[ratio * (p->steps - 1 - p->step)];
    float keep = (float)sqrt(now), add = (float)sqrt(1 - now);
    const float *z = attn_f32(call->t[NOISE_Z]), *eps = attn_f32(call->t[NOISE_EPS]);
    for (int64_t i = 0; i < attn_tensor_count(call->t[NOISE_Z]); i++) {
        attn_f32(call->t[NOISE_O])[i] = keep * z[i] + add * eps[i];
    }
    return ATTN_OK;
}

const attn_op_class attn_op_mrsa_noise = {
    .info = {.name = "mrsa.noise",
             .title = "Multi-reference self-attention: reference noising schedule",
             .summary = "References are noised to the same time as the picture that is being generated, by the scaled-linear schedule.",
             .paper = "arXiv:2405.13870",
             ATTN_TABLE(noise_param_table, noise_ports)},
    .params_size = sizeof(noise_params),
    .bind = noise_bind,
    .forward = noise_forward,
};
