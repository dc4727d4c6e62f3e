/* Multi-reference self-attention (MRSA; FreeCustom, arXiv:2405.13870): the queries of a generated picture read, besides their own
 * keys and values, those of reference pictures, with a mask per reference that hides everything but an object and a weight that
 * raises the attention it gets.
 *
 * Own keys and each reference are separate lists of keys under one softmax (exec/segments.h), which also gives the attention mass
 * of each list. Masked keys are left out of the lists.
 */
#include "exec/segments.h"
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

/* ---- Lists of keys: own, then each reference ---- */

/* Where an attention call reads from: mrsa's own inputs, or some items of mrsa.cfg's. */
typedef struct source {
    int64_t batch, heads, kv_heads, n, m;
    const float *q, *k, *v, *k_ref, *v_ref;
} source;

static source inputs_of(const attn_call *call)
{
    return (source){attn_dim(call, "B"),     attn_dim(call, "H"),      attn_dim(call, "Hkv"),
                    attn_dim(call, "N"),     attn_dim(call, "M"),      attn_f32(call->t[Q]),
                    attn_f32(call->t[K]),    attn_f32(call->t[V]),     attn_f32(call->t[K_REF]),
                    attn_f32(call->t[V_REF])};
}

/* The kept tokens of a reference in front: their numbers and biases. */
static int64_t keep_tokens(float *bias, int64_t tokens, int64_t *index)
{
    int64_t kept = 0;
    for (int64_t t = 0; t < tokens; t++) {
        if (bias[t] != 0) {
            index[kept] = t;
            bias[kept++] = bias[t];
        }
    }
    return kept;
}

/* R + 1 lists; masked keys are in none. */
static attn_status make_segments(attn_call *call, const source *in, const float *mask, attn_segments *out)
{
    const mrsa_params *p = call->params;
    int64_t references = attn_dim(call, "R"), tokens = attn_dim(call, "P"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv");
    float *bias = attn_scratch_f32(call, references * tokens);
    int64_t *index = attn_arena_array(call->arena, (size_t)(references * tokens), sizeof *index);
    attn_segment *list = attn_arena_array(call->arena, (size_t)references + 1, sizeof *list);
    if (bias == NULL || index == NULL || list == NULL) {
        return attn_fail_memory((size_t)(references * tokens) * (sizeof *bias + sizeof *index));
    }
    make_bias(call, mask, bias);
    list[0] = (attn_segment){.keys = in->m, .k = in->k, .v = in->v, .k_stride = {in->kv_heads * in->m * d, in->m * d},
                             .v_stride = {in->kv_heads * in->m * dv, in->m * dv}};
    for (int64_t r = 0; r < references; r++) {
        int64_t head = tokens * in->kv_heads;
        attn_segment *g = &list[r + 1];
        *g = (attn_segment){.keys = tokens, .k = in->k_ref + r * head * d, .v = in->v_ref + r * head * dv,
                            .k_stride = {references * head * d, tokens * d}, .v_stride = {references * head * dv, tokens * dv}};
        if (p->mode == MODE_MUL) {
            g->factor = bias + r * tokens;
        } else {
            g->bias = bias + r * tokens;
            g->keys = keep_tokens(bias + r * tokens, tokens, index + r * tokens);
            g->index = g->keys < tokens ? index + r * tokens : NULL;
        }
    }
    *out = (attn_segments){.batch = in->batch, .heads = in->heads, .kv_heads = in->kv_heads, .n = in->n, .d = d, .dv = dv,
                           .scale = attn_default_scale(p->scale, d), .q = in->q, .count = references + 1, .segments = list};
    return ATTN_OK;
}

/* ---- mrsa ---- */

static attn_status mrsa_bind(attn_call *call)
{
    ATTN_TRY(check_mask_params(call));
    if (attn_dim(call, "M") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "k needs at least one own key");
    }
    if (attn_dim(call, "D") < 1 || attn_dim(call, "Dv") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "D = %lld and Dv = %lld, expected at least 1", (long long)attn_dim(call, "D"),
                         (long long)attn_dim(call, "Dv"));
    }
    attn_set_dim(call, "parts", attn_dim(call, "R") + 1);
    return ATTN_OK;
}

static attn_status mrsa_forward(attn_call *call)
{
    source in = inputs_of(call);
    attn_segments segments;
    ATTN_TRY(make_segments(call, &in, attn_f32(call->t[REF_MASK]), &segments));
    return attn_segments_forward(&segments, attn_f32(call->t[O]), NULL, attn_f32(call->t[MASS]), call->arena, call->threads);
}

/* Keys or values of a list, or their gradients, as [B,Hkv,keys,width] where they lie. */
static attn_tensor list_view(const attn_segments *s, const attn_segment *g, const float *data, const int64_t stride[2], int64_t width)
{
    return (attn_tensor){(void *)(uintptr_t)data, ATTN_F32, 4, {s->batch, s->kv_heads, g->keys, width}, {stride[0], stride[1], width, 1}};
}

/* Copy the listed rows together (times the factor, if any), or back to where they belong. `here` is contiguous. */
static void move_rows(const attn_segments *s, const attn_segment *g, const float *factor, float *there, const int64_t stride[2],
                      int64_t width, float *here, int back)
{
    for (int64_t i = 0; i < s->batch * s->kv_heads * g->keys; i++) {
        int64_t pair = i / g->keys, j = i % g->keys, row = g->index != NULL ? g->index[j] : j;
        float *a = there + pair / s->kv_heads * stride[0] + pair % s->kv_heads * stride[1] + row * width, *b = here + i * width;
        float by = factor != NULL ? factor[j] : 1;
        for (int64_t c = 0; c < width; c++) {
            *(back ? &a[c] : &b[c]) = by * (back ? b[c] : a[c]);
        }
    }
}

/* Keys or values of one list for attn_dense_backward, and where their gradients go. */
typedef struct operand {
    attn_tensor value, gradient;
    int copied;
} operand;

static attn_status take_operand(attn_call *call, const attn_segments *s, const attn_segment *g, const float *factor, const float *data,
                                const int64_t stride[2], int64_t width, float *gradient, operand *out)
{
    out->copied = g->index != NULL || factor != NULL;
    out->value = list_view(s, g, data, stride, width);
    out->gradient = list_view(s, g, gradient, stride, width);
    if (out->copied) {
        int64_t count = attn_tensor_count(&out->value);
        float *copy;
        ATTN_TRY(attn_take_f32(call, 2 * count, &copy));
        move_rows(s, g, factor, (float *)(uintptr_t)data, stride, width, copy, 0);
        out->value = attn_tensor_make(copy, ATTN_F32, 4, out->value.shape);
        out->gradient = attn_tensor_make(gradient != NULL ? copy + count : NULL, ATTN_F32, 4, out->value.shape);
    }
    return ATTN_OK;
}

/* Gradients of one list under the normaliser of all: grad_q overwritten; grad_k and grad_v (may be NULL) are laid out as the list's k and v. */
static attn_status segment_backward(attn_call *call, const attn_segments *s, const attn_segment *g, const attn_tensor *lse,
                                    float *grad_q, float *grad_k, float *grad_v)
{
    operand k, v;
    ATTN_TRY(take_operand(call, s, g, g->factor, g->k, g->k_stride, s->d, grad_k, &k));
    ATTN_TRY(take_operand(call, s, g, NULL, g->v, g->v_stride, s->dv, grad_v, &v));
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = s->scale;
    attn_tensor bias = {(void *)(uintptr_t)g->bias, ATTN_F32, 4, {1, 1, s->n, g->keys}, {0, 0, 0, 1}};
    attn_dense_inputs in = {.q = *call->t[Q], .k = k.value, .v = v.value, .bias = g->bias != NULL ? &bias : NULL};
    attn_tensor to_q = attn_tensor_make(grad_q, ATTN_F32, 4, call->t[Q]->shape);
    attn_dense_gradients to = {.q = grad_q != NULL ? &to_q : NULL, .k = grad_k != NULL ? &k.gradient : NULL,
                               .v = grad_v != NULL ? &v.gradient : NULL};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    ATTN_TRY(attn_dense_backward(&settings, &in, call->t[O], lse, call->grad[O], &to, &exec));
    if (k.copied && grad_k != NULL) {
        move_rows(s, g, g->factor, grad_k, g->k_stride, s->d, attn_f32(&k.gradient), 1);
    }
    if (v.copied && grad_v != NULL) {
        move_rows(s, g, NULL, grad_v, g->v_stride, s->dv, attn_f32(&v.gradient), 1);
    }
    return ATTN_OK;
}

static attn_status mrsa_backward(attn_call *call)
{
    source in = inputs_of(call);
    int64_t rows = in.batch * in.heads * in.n, count = attn_tensor_count(call->t[Q]), head = attn_dim(call, "P") * in.kv_heads;
    attn_segments s;
    float *lse, *part = NULL, *grad_q = attn_f32(call->grad[Q]);
    ATTN_TRY(make_segments(call, &in, attn_f32(call->t[REF_MASK]), &s));
    ATTN_TRY(attn_take_f32(call, rows, &lse));
    if (grad_q != NULL) {
        ATTN_TRY(attn_take_f32(call, count, &part));
    }
    ATTN_TRY(attn_segments_forward(&s, NULL, lse, NULL, call->arena, call->threads));
    attn_tensor lse_view = attn_tensor_make(lse, ATTN_F32, 3, call->t[Q]->shape);
    for (int64_t i = 0; i < s.count; i++) {
        float *grad_k = attn_f32(call->grad[i > 0 ? K_REF : K]), *grad_v = attn_f32(call->grad[i > 0 ? V_REF : V]);
        grad_k = grad_k != NULL && i > 0 ? grad_k + (i - 1) * head * s.d : grad_k;
        grad_v = grad_v != NULL && i > 0 ? grad_v + (i - 1) * head * s.dv : grad_v;
        if (s.segments[i].keys > 0) {
            attn_arena_mark mark = attn_arena_get_mark(call->arena);
            ATTN_TRY(segment_backward(call, &s, &s.segments[i], &lse_view, part, grad_k, grad_v));
            attn_arena_release(call->arena, mark);
            for (int64_t j = 0; j < count && grad_q != NULL; j++) {
                grad_q[j] += part[j];
            }
        }
    }
    return ATTN_OK;
}

/* The (query, key) pairs of a call: masked keys are not computed. */
static double pairs_with(attn_call *call, double queries, double own, const float *mask)
{
    const mrsa_params *p = call->params;
    int64_t cells = attn_dim(call, "R") * attn_dim(call, "P"), kept = cells;
    float *bias = mask != NULL && p->mode == MODE_ADD ? attn_scratch_f32(call, cells) : NULL;
    if (bias != NULL) {
        make_bias(call, mask, bias);
        for (int64_t i = 0; i < cells; i++) {
            kept -= bias[i] == 0;
        }
    }
    return queries * (own + (double)kept);
}

static attn_cost cost_of(const attn_call *call, double pairs)
{
    return (attn_cost){.flops = 2 * pairs * ((double)attn_dim(call, "D") + (double)attn_dim(call, "Dv")), .pairs = pairs};
}

static attn_status mrsa_cost(attn_call *call, attn_cost *cost)
{
    double queries = (double)attn_dim(call, "B") * (double)attn_dim(call, "H") * (double)attn_dim(call, "N");
    *cost = cost_of(call, pairs_with(call, queries, (double)attn_dim(call, "M"), attn_f32(call->t[REF_MASK])));
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
    .cost = mrsa_cost,
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
    const mrsa_params *p = call->params;
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = p->scale;
    attn_dense_inputs in = {.q = cfg_items(call, CFG_Q, item, count),
                            .k = cfg_items(call, CFG_K, item, count),
                            .v = cfg_items(call, CFG_V, item, count)};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    return attn_dense_forward(&settings, &in, o, NULL, &exec);
}

/* mrsa of the target at `item` with the references behind it. */
static attn_status cfg_target(attn_call *call, int64_t item, attn_tensor *o)
{
    int64_t heads = attn_dim(call, "H"), tokens = attn_dim(call, "P"), references = attn_dim(call, "R");
    attn_tensor q = cfg_items(call, CFG_Q, item, 1), k = cfg_items(call, CFG_K, item, 1), v = cfg_items(call, CFG_V, item, 1);
    attn_tensor k_ref = cfg_items(call, CFG_K, item + 1, references), v_ref = cfg_items(call, CFG_V, item + 1, references);
    source in = {1, heads, heads, tokens, tokens, attn_f32(&q), attn_f32(&k), attn_f32(&v), attn_f32(&k_ref), attn_f32(&v_ref)};
    attn_segments segments;
    ATTN_TRY(make_segments(call, &in, attn_f32(call->t[CFG_MASK]), &segments));
    return attn_segments_forward(&segments, attn_f32(o), NULL, NULL, call->arena, call->threads);
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

static attn_status cfg_cost(attn_call *call, attn_cost *cost)
{
    const mrsa_params *p = call->params;
    double tokens = (double)attn_dim(call, "P"), queries = (double)attn_dim(call, "H") * tokens;
    double with = pairs_with(call, queries, tokens, attn_f32(call->t[CFG_MASK])), plain = queries * tokens;
    double references = (double)attn_dim(call, "R");
    *cost = cost_of(call, (2 * references + 1) * plain + (p->style_fidelity == 1 ? 1 : 2) * with);
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
    .cost = cfg_cost,
};
