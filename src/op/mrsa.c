/* Multi-reference self-attention (MRSA; FreeCustom, arXiv:2405.13870): the queries of a generated picture read, besides their own
 * keys and values, those of reference pictures, with a mask per reference that hides everything but an object and a weight that
 * raises the attention it gets.
 *
 * Own keys and each reference are separate key lists: each is exact attention (after dropping masked keys), and the parts are
 * merged by their log-sum-exp, which also gives the attention mass of each part.
 */
#include "op/class.h"
#include <attn/dense.h>

#include <string.h>

enum { MODE_ADD, MODE_MUL };

typedef struct mrsa_params {
    attn_floats weights;
    attn_ints grid;
    int64_t mode;
    double scale, style_fidelity;
} mrsa_params;

#define WEIGHTS_PARAM                                                                                                  \
    ATTN_P_LIST(FLOATS, "weights", mrsa_params, weights, "null", -INFINITY, INFINITY, 0, 0,                            \
                "mask weight of each reference (default: all 1)")
#define GRID_PARAM ATTN_P_LIST(INTS, "grid", mrsa_params, grid, NULL, 1, ATTN_MOST_EXTENT, 2, 2, "token grid of the references")
#define MODE_PARAM                                                                                                     \
    ATTN_P_CHOICE("mode", mrsa_params, mode, "add", "add|mul",                                                         \
                  "add: the weighted mask is added to the logits and its zeros remove keys; mul: it multiplies them")

static const attn_param_info mrsa_param_table[] = {WEIGHTS_PARAM, GRID_PARAM, MODE_PARAM,
                                                   ATTN_P_SCALE_POSITIVE(mrsa_params, scale)};

enum { Q, K, V, K_REF, V_REF, REF_MASK, O, MASS };

static const attn_port_info mrsa_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries of the generated picture"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "its own keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "its own values"),
    ATTN_IN("k_ref", "B,R,Hkv,P,D", FLOAT, ATTN_PORT_DIFF, "keys of the references"),
    ATTN_IN("v_ref", "B,R,Hkv,P,Dv", FLOAT, ATTN_PORT_DIFF, "values of the references"),
    ATTN_IN("ref_mask", "R,mh,mw", FLOAT, 0, "object masks, 0 = background, any resolution"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("mass", "B,H,N,parts", FLOAT, 0, "attention on the own keys (0) and on each reference"),
};

/* ---- Masks ---- */

static attn_status check_mask_params(const attn_call *call)
{
    const mrsa_params *p = call->params;
    int64_t references = attn_dim(call, "R"), tokens = attn_dim(call, "P");
    if (references < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "at least one reference is needed");
    }
    if (p->weights.items != NULL && p->weights.count != references) {
        return attn_fail(ATTN_ERR_ARGUMENT, "weights has %d items, expected one for each of %lld references",
                         p->weights.count, (long long)references);
    }
    if (tokens >= 0 && p->grid.items[0] * p->grid.items[1] != tokens) {
        return attn_fail(ATTN_ERR_ARGUMENT, "grid = [%lld, %lld] does not hold the references' %lld tokens",
                         (long long)p->grid.items[0], (long long)p->grid.items[1], (long long)tokens);
    }
    if (attn_dim(call, "mh") < 1 || attn_dim(call, "mw") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "ref_mask has no area");
    }
    return ATTN_OK;
}

/* bias [R,P]: weight times the mask, resized to the token grid by taking the nearest source cell. */
static void make_bias(const attn_call *call, const float *mask, float *bias)
{
    const mrsa_params *p = call->params;
    int64_t references = attn_dim(call, "R"), mh = attn_dim(call, "mh"), mw = attn_dim(call, "mw");
    int64_t gh = p->grid.items[0], gw = p->grid.items[1];
    for (int64_t r = 0; r < references; r++) {
        double weight = p->weights.items != NULL ? p->weights.items[r] : 1;
        for (int64_t i = 0; i < gh; i++) {
            for (int64_t j = 0; j < gw; j++) {
                bias[(r * gh + i) * gw + j] = (float)(weight * (double)mask[(r * mh + i * mh / gh) * mw + j * mw / gw]);
            }
        }
    }
}

/* ---- Parts: own keys, then each reference ---- */

/* One key list as contiguous [B,Hkv,count,*] with an optional bias per key. */
typedef struct key_part {
    int64_t count;
    float *k, *v, *bias;
    int64_t *source;    /* reference token of each key; NULL for the own keys */
    const float *factor; /* mode mul: what each key was multiplied by */
    float *o, *lse;
} key_part;

static attn_status make_own_part(attn_call *call, key_part *own)
{
    *own = (key_part){.count = attn_dim(call, "M"), .k = attn_f32(call->t[K]), .v = attn_f32(call->t[V])};
    return ATTN_OK;
}

/* Gather the kept keys and values of reference r. */
static attn_status make_reference_part(attn_call *call, int64_t r, const float *bias, key_part *out)
{
    const mrsa_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), references = attn_dim(call, "R"), kv_heads = attn_dim(call, "Hkv");
    int64_t tokens = attn_dim(call, "P"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    *out = (key_part){.source = attn_arena_array(call->arena, (size_t)tokens, sizeof *out->source)};
    float *values = attn_scratch_f32(call, tokens);
    if (out->source == NULL || values == NULL) {
        return attn_fail_memory((size_t)tokens * sizeof *out->source);
    }
    for (int64_t t = 0; t < tokens; t++) {
        if (p->mode == MODE_MUL || bias[t] != 0) {
            out->source[out->count] = t;
            values[out->count++] = bias[t];
        }
    }
    out->k = attn_scratch_f32(call, batch * kv_heads * out->count * d);
    out->v = attn_scratch_f32(call, batch * kv_heads * out->count * dv);
    if (out->k == NULL || out->v == NULL) {
        return attn_fail_memory((size_t)(batch * kv_heads * out->count * (d + dv)) * sizeof(float));
    }
    *(p->mode == MODE_MUL ? (const float **)&out->factor : (const float **)&out->bias) = values;
    const float *k_ref = attn_f32(call->t[K_REF]), *v_ref = attn_f32(call->t[V_REF]);
    for (int64_t b = 0; b < batch; b++) {
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t from = ((b * references + r) * kv_heads + h) * tokens, to = (b * kv_heads + h) * out->count;
            for (int64_t i = 0; i < out->count; i++) {
                float factor = p->mode == MODE_MUL ? values[i] : 1;
                const float *k = k_ref + (from + out->source[i]) * d;
                for (int64_t c = 0; c < d; c++) {
                    out->k[(to + i) * d + c] = factor * k[c];
                }
                memcpy(out->v + (to + i) * dv, v_ref + (from + out->source[i]) * dv, (size_t)dv * sizeof(float));
            }
        }
    }
    return ATTN_OK;
}

static attn_status make_parts(attn_call *call, key_part **parts)
{
    int64_t references = attn_dim(call, "R"), tokens = attn_dim(call, "P");
    float *bias = attn_scratch_f32(call, references * tokens);
    *parts = attn_arena_array(call->arena, (size_t)references + 1, sizeof **parts);
    if (bias == NULL || *parts == NULL) {
        return attn_fail_memory((size_t)(references * tokens) * sizeof *bias);
    }
    make_bias(call, attn_f32(call->t[REF_MASK]), bias);
    ATTN_TRY(make_own_part(call, &(*parts)[0]));
    for (int64_t r = 0; r < references; r++) {
        ATTN_TRY(make_reference_part(call, r, bias + r * tokens, &(*parts)[r + 1]));
    }
    return ATTN_OK;
}

static attn_dense_inputs part_inputs(const attn_call *call, const key_part *part)
{
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv");
    int64_t n = attn_dim(call, "N"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    attn_dense_inputs in = {
        .q = attn_tensor_make(attn_f32(call->t[Q]), ATTN_F32, 4, (int64_t[]){batch, heads, n, d}),
        .k = attn_tensor_make(part->k, ATTN_F32, 4, (int64_t[]){batch, kv_heads, part->count, d}),
        .v = attn_tensor_make(part->v, ATTN_F32, 4, (int64_t[]){batch, kv_heads, part->count, dv}),
    };
    return in;
}

/* A bias per key, the same for all queries, heads and batch items. */
static attn_tensor key_bias(const attn_call *call, const key_part *part)
{
    return (attn_tensor){part->bias, ATTN_F32, 4, {1, 1, attn_dim(call, "N"), part->count}, {0, 0, 0, 1}};
}

static attn_dense_settings part_settings(const attn_call *call)
{
    const mrsa_params *p = call->params;
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = p->scale;
    return settings;
}

/* ---- mrsa ---- */

static attn_status mrsa_bind(attn_call *call)
{
    ATTN_TRY(check_mask_params(call));
    if (attn_dim(call, "M") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "k needs at least one own key");
    }
    attn_set_dim(call, "parts", attn_dim(call, "R") + 1);
    return ATTN_OK;
}

/* Exact attention over one part's keys into part->o, part->lse. */
static attn_status attend(attn_call *call, key_part *part)
{
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), n = attn_dim(call, "N"), dv = attn_dim(call, "Dv");
    part->o = attn_scratch_f32(call, batch * heads * n * dv);
    part->lse = attn_scratch_f32(call, batch * heads * n);
    if (part->o == NULL || part->lse == NULL) {
        return attn_fail_memory((size_t)(batch * heads * n * (dv + 1)) * sizeof(float));
    }
    attn_dense_settings settings = part_settings(call);
    attn_dense_inputs in = part_inputs(call, part);
    attn_tensor bias = key_bias(call, part);
    in.bias = part->bias != NULL ? &bias : NULL;
    attn_tensor o = attn_tensor_make(part->o, ATTN_F32, 4, (int64_t[]){batch, heads, n, dv});
    attn_tensor lse = attn_tensor_make(part->lse, ATTN_F32, 3, (int64_t[]){batch, heads, n});
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    return attn_dense_forward(&settings, &in, &o, &lse, &exec);
}

static attn_status mrsa_forward(attn_call *call)
{
    int64_t rows = attn_dim(call, "B") * attn_dim(call, "H") * attn_dim(call, "N"), dv = attn_dim(call, "Dv");
    int64_t count = attn_dim(call, "R") + 1;
    key_part *parts;
    ATTN_TRY(make_parts(call, &parts));
    for (int64_t i = 0; i < count; i++) {
        ATTN_TRY(attend(call, &parts[i]));
    }
    float *o = attn_f32(call->t[O]), *mass = attn_f32(call->t[MASS]);
#pragma omp parallel for num_threads(call->threads)
    for (int64_t row = 0; row < rows; row++) {
        double top = -INFINITY, sum = 0;
        for (int64_t i = 0; i < count; i++) {
            top = fmax(top, (double)parts[i].lse[row]);
        }
        for (int64_t i = 0; i < count; i++) {
            sum += exp((double)parts[i].lse[row] - top);
        }
        memset(o + row * dv, 0, (size_t)dv * sizeof *o);
        for (int64_t i = 0; i < count; i++) {
            float share = (float)(exp((double)parts[i].lse[row] - top) / sum);
            mass[row * count + i] = share;
            for (int64_t c = 0; c < dv && share > 0; c++) {
                o[row * dv + c] += share * parts[i].o[row * dv + c];
            }
        }
    }
    return ATTN_OK;
}

/* Log-sum-exp over all parts, from the mass of the own keys: lse = lse_own - log(mass_own) would lose accuracy, so the parts are
 * computed again. */
static attn_status merged_lse(attn_call *call, key_part *parts, int64_t count, float *lse)
{
    int64_t rows = attn_dim(call, "B") * attn_dim(call, "H") * attn_dim(call, "N");
    for (int64_t i = 0; i < count; i++) {
        ATTN_TRY(attend(call, &parts[i]));
    }
    for (int64_t row = 0; row < rows; row++) {
        double top = -INFINITY, sum = 0;
        for (int64_t i = 0; i < count; i++) {
            top = fmax(top, (double)parts[i].lse[row]);
        }
        for (int64_t i = 0; i < count; i++) {
            sum += exp((double)parts[i].lse[row] - top);
        }
        lse[row] = (float)(top + log(sum));
    }
    return ATTN_OK;
}

/* Gradients of one part under the merged normaliser. grad_q adds up over the parts; k and v gradients go to `k`, `v`. */
static attn_status part_backward(attn_call *call, const key_part *part, const attn_tensor *lse, float *grad_q, float *grad_k,
                                 float *grad_v)
{
    int64_t batch = attn_dim(call, "B"), kv_heads = attn_dim(call, "Hkv"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    attn_dense_settings settings = part_settings(call);
    attn_dense_inputs in = part_inputs(call, part);
    attn_tensor bias = key_bias(call, part);
    in.bias = part->bias != NULL ? &bias : NULL;
    attn_tensor to_q = attn_tensor_make(grad_q, ATTN_F32, 4, call->t[Q]->shape);
    attn_tensor to_k = attn_tensor_make(grad_k, ATTN_F32, 4, (int64_t[]){batch, kv_heads, part->count, d});
    attn_tensor to_v = attn_tensor_make(grad_v, ATTN_F32, 4, (int64_t[]){batch, kv_heads, part->count, dv});
    attn_dense_gradients gradients = {.q = &to_q, .k = &to_k, .v = &to_v};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    return attn_dense_backward(&settings, &in, call->t[O], lse, call->grad[O], &gradients, &exec);
}

/* Spread gradients of the gathered keys and values back to the reference's tokens. */
static void scatter(attn_call *call, const key_part *part, int64_t r, const float *grad_k, const float *grad_v)
{
    int64_t batch = attn_dim(call, "B"), references = attn_dim(call, "R"), kv_heads = attn_dim(call, "Hkv");
    int64_t tokens = attn_dim(call, "P"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    float *to_k = attn_f32(call->grad[K_REF]), *to_v = attn_f32(call->grad[V_REF]);
    for (int64_t b = 0; b < batch; b++) {
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t to = ((b * references + r) * kv_heads + h) * tokens, from = (b * kv_heads + h) * part->count;
            for (int64_t i = 0; i < part->count; i++) {
                float factor = part->factor != NULL ? part->factor[i] : 1;
                for (int64_t c = 0; c < d && to_k != NULL; c++) {
                    to_k[(to + part->source[i]) * d + c] = factor * grad_k[(from + i) * d + c];
                }
                for (int64_t c = 0; c < dv && to_v != NULL; c++) {
                    to_v[(to + part->source[i]) * dv + c] = grad_v[(from + i) * dv + c];
                }
            }
        }
    }
}

static attn_status mrsa_backward(attn_call *call)
{
    int64_t count = attn_dim(call, "R") + 1, rows = attn_dim(call, "B") * attn_dim(call, "H") * attn_dim(call, "N");
    int64_t kv_rows = attn_dim(call, "B") * attn_dim(call, "Hkv") * attn_max_i64(attn_dim(call, "P"), attn_dim(call, "M"));
    int64_t d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    key_part *parts;
    ATTN_TRY(make_parts(call, &parts));
    float *lse = attn_scratch_f32(call, rows), *grad_q = attn_scratch_f32(call, rows * d);
    float *grad_k = attn_scratch_f32(call, kv_rows * d), *grad_v = attn_scratch_f32(call, kv_rows * dv);
    if (lse == NULL || grad_q == NULL || grad_k == NULL || grad_v == NULL) {
        return attn_fail_memory((size_t)((rows + kv_rows) * (d + dv)) * sizeof(float));
    }
    ATTN_TRY(merged_lse(call, parts, count, lse));
    attn_tensor lse_view = attn_tensor_make(lse, ATTN_F32, 3, call->t[Q]->shape);
    for (int64_t i = 0; i < count; i++) {
        if (parts[i].count == 0) {
            continue;
        }
        ATTN_TRY(part_backward(call, &parts[i], &lse_view, grad_q, grad_k, grad_v));
        for (int64_t j = 0; j < rows * d && call->grad[Q] != NULL; j++) {
            attn_f32(call->grad[Q])[j] += grad_q[j];
        }
        if (i > 0) {
            scatter(call, &parts[i], i - 1, grad_k, grad_v);
        } else {
            int64_t own = attn_dim(call, "B") * attn_dim(call, "Hkv") * attn_dim(call, "M");
            if (call->grad[K] != NULL) {
                memcpy(call->grad[K]->data, grad_k, (size_t)(own * d) * sizeof(float));
            }
            if (call->grad[V] != NULL) {
                memcpy(call->grad[V]->data, grad_v, (size_t)(own * dv) * sizeof(float));
            }
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_mrsa = {
    .info = {.name = "mrsa",
             .title = "Multi-reference self-attention",
             .summary = "Self-attention that also reads the keys and values of reference pictures, each with an object mask and a weight, "
                        "so that a frozen picture generator composes given objects without training. Masked keys are dropped before any "
                        "work is done: the cost is dense attention over the own keys and the kept reference keys.",
             .paper = "arXiv:2405.13870",
             .differentiable = 1,
             ATTN_TABLE(mrsa_param_table, mrsa_ports)},
    .params_size = sizeof(mrsa_params),
    .bind = mrsa_bind,
    .forward = mrsa_forward,
    .backward = mrsa_backward,
};

/* ---- mrsa.mask ---- */

static const attn_param_info mask_param_table[] = {WEIGHTS_PARAM, GRID_PARAM};

enum { MASK_IN, MASK_BIAS, MASK_KEEP };

static const attn_port_info mask_ports[] = {
    ATTN_IN("ref_mask", "R,mh,mw", FLOAT, 0, "object masks, 0 = background, any resolution"),
    ATTN_OUT("bias", "R,tokens", FLOAT, 0, "weight times the mask on the token grid"),
    ATTN_OUT("keep", "R,tokens", BOOL, 0, "bias is not 0: the key takes part"),
};

static attn_status mask_bind(attn_call *call)
{
    const mrsa_params *p = call->params;
    attn_set_dim(call, "tokens", p->grid.items[0] * p->grid.items[1]);
    return check_mask_params(call);
}

static attn_status mask_forward(attn_call *call)
{
    float *bias = attn_f32(call->t[MASK_BIAS]);
    make_bias(call, attn_f32(call->t[MASK_IN]), bias);
    for (int64_t i = 0; i < attn_dim(call, "R") * attn_dim(call, "tokens"); i++) {
        attn_bool(call->t[MASK_KEEP])[i] = bias[i] != 0;
    }
    return ATTN_OK;
}

const attn_op_class attn_op_mrsa_mask = {
    .info = {.name = "mrsa.mask",
             .title = "Multi-reference self-attention: mask preparation",
             .summary = "Object masks resized to the token grid (nearest cell), weighted, and which keys they keep.",
             .paper = "arXiv:2405.13870",
             ATTN_TABLE(mask_param_table, mask_ports)},
    .params_size = sizeof(mrsa_params),
    .bind = mask_bind,
    .forward = mask_forward,
};

/* ---- mrsa.cfg: one attention layer of the sampler, both guidance branches ---- */

static const attn_param_info cfg_param_table[] = {
    WEIGHTS_PARAM,
    GRID_PARAM,
    MODE_PARAM,
    ATTN_P_SCALE_POSITIVE(mrsa_params, scale),
    ATTN_P_FLOAT("style_fidelity", mrsa_params, style_fidelity, "1.0", -INFINITY, INFINITY,
                 "share of plain self-attention in the branch without text; 1: that branch ignores the references"),
};

enum { CFG_Q, CFG_K, CFG_V, CFG_MASK, CFG_O };

static const attn_port_info cfg_ports[] = {
    ATTN_IN("q", "items,H,P,D", FLOAT, 0, "target, then the references without text; the same with text"),
    ATTN_IN("k", "items,H,P,D", FLOAT, 0, "keys in the same order"),
    ATTN_IN("v", "items,H,P,Dv", FLOAT, 0, "values in the same order"),
    ATTN_IN("ref_mask", "R,mh,mw", FLOAT, 0, "object masks, 0 = background, any resolution"),
    ATTN_OUT("o", "items,H,P,Dv", FLOAT, 0, "outputs in the same order"),
};

static attn_status cfg_bind(attn_call *call)
{
    ATTN_TRY(check_mask_params(call));
    int64_t items = attn_dim(call, "items"), references = attn_dim(call, "R");
    if (items != 2 * (1 + references)) {
        return attn_fail(ATTN_ERR_SHAPE, "q holds %lld items, expected 2 * (1 + R) = %lld", (long long)items,
                         (long long)(2 * (1 + references)));
    }
    return ATTN_OK;
}

/* Item `item` (and `count - 1` that follow) of a port, as [count,H,P,*]. */
static attn_tensor cfg_items(const attn_call *call, int port, int64_t item, int64_t count)
{
    attn_tensor view = *call->t[port];
    view.data = attn_f32(&view) + item * view.stride[0];
    view.shape[0] = count;
    return view;
}

/* Ordinary self-attention of some items. */
static attn_status cfg_self(attn_call *call, int64_t item, int64_t count, attn_tensor *o)
{
    attn_dense_settings settings = part_settings(call);
    attn_dense_inputs in = {.q = cfg_items(call, CFG_Q, item, count),
                            .k = cfg_items(call, CFG_K, item, count),
                            .v = cfg_items(call, CFG_V, item, count)};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    return attn_dense_forward(&settings, &in, o, NULL, &exec);
}

/* mrsa of the target at `item` with the references behind it. */
static attn_status cfg_target(attn_call *call, int64_t item, attn_tensor *o)
{
    int64_t references = attn_dim(call, "R"), heads = attn_dim(call, "H"), tokens = attn_dim(call, "P");
    int64_t d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    attn_call sub = {.cls = &attn_op_mrsa, .params = call->params, .arena = call->arena, .threads = call->threads};
    const struct {
        const char *name;
        int64_t value;
    } dims[] = {{"B", 1}, {"H", heads}, {"Hkv", heads}, {"N", tokens}, {"M", tokens}, {"P", tokens}, {"D", d}, {"Dv", dv},
                {"R", references}, {"mh", attn_dim(call, "mh")}, {"mw", attn_dim(call, "mw")}};
    for (int i = 0; i < ATTN_COUNT(dims); i++) {
        attn_set_dim(&sub, dims[i].name, dims[i].value);
    }
    attn_tensor q = cfg_items(call, CFG_Q, item, 1), k = cfg_items(call, CFG_K, item, 1), v = cfg_items(call, CFG_V, item, 1);
    attn_tensor k_ref = cfg_items(call, CFG_K, item + 1, references), v_ref = cfg_items(call, CFG_V, item + 1, references);
    attn_tensor mass = attn_tensor_make(attn_scratch_f32(call, heads * tokens * (references + 1)), ATTN_F32, 3,
                                        (int64_t[]){heads, tokens, references + 1});
    if (mass.data == NULL) {
        return attn_fail_memory((size_t)attn_tensor_count(&mass) * sizeof(float));
    }
    sub.t[Q] = &q, sub.t[K] = &k, sub.t[V] = &v, sub.t[K_REF] = &k_ref, sub.t[V_REF] = &v_ref;
    sub.t[REF_MASK] = call->t[CFG_MASK], sub.t[O] = o, sub.t[MASS] = &mass;
    return mrsa_forward(&sub);
}

static attn_status cfg_forward(attn_call *call)
{
    const mrsa_params *p = call->params;
    int64_t references = attn_dim(call, "R"), text = references + 1;
    float f = (float)p->style_fidelity;
    attn_tensor plain = cfg_items(call, CFG_O, 0, 1), plain_refs = cfg_items(call, CFG_O, 1, references);
    attn_tensor target = cfg_items(call, CFG_O, text, 1), target_refs = cfg_items(call, CFG_O, text + 1, references);
    ATTN_TRY(cfg_self(call, 0, 1, &plain));
    ATTN_TRY(cfg_self(call, 1, references, &plain_refs));
    ATTN_TRY(cfg_self(call, text + 1, references, &target_refs));
    ATTN_TRY(cfg_target(call, text, &target));
    if (f == 1) {
        return ATTN_OK;
    }
    attn_tensor mixed = plain;
    int64_t count = attn_tensor_count(&plain);
    mixed.data = attn_scratch_f32(call, count);
    if (mixed.data == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    ATTN_TRY(cfg_target(call, 0, &mixed));
    for (int64_t i = 0; i < count; i++) {
        attn_f32(&plain)[i] = (1 - f) * attn_f32(&mixed)[i] + f * attn_f32(&plain)[i];
    }
    return ATTN_OK;
}

const attn_op_class attn_op_mrsa_cfg = {
    .info = {.name = "mrsa.cfg",
             .title = "Multi-reference self-attention: one layer with both guidance branches",
             .summary = "References attend to themselves, the target of the text branch reads the references, and the target of the branch "
                        "without text mixes that with plain self-attention by style_fidelity.",
             .paper = "arXiv:2405.13870",
             ATTN_TABLE(cfg_param_table, cfg_ports)},
    .params_size = sizeof(mrsa_params),
    .bind = cfg_bind,
    .forward = cfg_forward,
};

/* ---- mrsa.noise ---- */

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
