/* Causal depthwise convolution of heads, rcmha.dconv (arXiv:2308.03429). */
#include "op/rcmha.h"

#include <string.h>

enum { D_X, D_W, D_B, D_STATE, D_O };

static const attn_port_info dconv_ports[] = {
    ATTN_IN("x", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "the sequence"),
    ATTN_IN("w", "...,D,K", FLOAT, ATTN_PORT_DIFF, "taps [D, K] for all heads or [H, D, K]; the last multiplies the current token"),
    ATTN_IN("b", "...,D", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL, "bias [D] or [H, D]"),
    ATTN_IN("state", "B,H,*,D", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL, "[B, H, K-1, D]: the inputs just before x"),
    ATTN_OUT("o", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "the convolved sequence"),
};

attn_status attn_rcmha_check_sets(const attn_tensor *t, const char *name, int ndim, int64_t heads)
{
    if (t == NULL || t->ndim == ndim || (t->ndim == ndim + 1 && t->shape[0] == heads)) {
        return ATTN_OK;
    }
    return attn_fail(ATTN_ERR_SHAPE, "%s has %d dimensions and leading size %lld, expected %d dimensions, or %d with one set per head (%lld)",
                     name, t->ndim, (long long)t->shape[0], ndim, ndim + 1, (long long)heads);
}

static attn_status dconv_bind(attn_call *call)
{
    int64_t heads = attn_dim(call, "H"), taps = attn_dim(call, "K");
    if (taps < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "w has K = %lld taps, expected at least 1", (long long)taps);
    }
    ATTN_TRY(attn_rcmha_check_sets(call->t[D_W], "w", 2, heads));
    ATTN_TRY(attn_rcmha_check_sets(call->t[D_B], "b", 1, heads));
    if (call->t[D_STATE] != NULL && call->t[D_STATE]->shape[2] != taps - 1) {
        return attn_fail(ATTN_ERR_SHAPE, "state holds %lld tokens, expected K-1 = %lld", (long long)call->t[D_STATE]->shape[2],
                         (long long)(taps - 1));
    }
    return ATTN_OK;
}

attn_status attn_rcmha_conv(attn_call *call, const attn_tensor *w, const attn_tensor *b, int64_t heads, int64_t sequences,
                              int64_t length, attn_conv1d *conv)
{
    int64_t taps = w->shape[w->ndim - 1], d = w->shape[w->ndim - 2], sets = w->ndim == 3 || (b != NULL && b->ndim == 2) ? heads : 1;
    float *spread_w = attn_scratch_f32(call, sets * d * taps), *spread_b = attn_scratch_f32(call, sets * d);
    if (spread_w == NULL || spread_b == NULL) {
        return attn_fail_memory((size_t)(sets * d * taps) * sizeof(float));
    }
    for (int64_t i = 0; i < sets * d * taps; i++) {
        spread_w[i] = attn_f32(w)[w->ndim == 3 ? i : i % (d * taps)];
    }
    for (int64_t i = 0; i < sets * d && b != NULL; i++) {
        spread_b[i] = attn_f32(b)[b->ndim == 2 ? i : i % d];
    }
    *conv = (attn_conv1d){sequences, length, d, taps, sets, spread_w, b != NULL ? spread_b : NULL, NULL};
    return ATTN_OK;
}

attn_status attn_rcmha_conv_back(attn_call *call, const attn_conv1d *conv, const float *x, const float *grad_o, float *grad_x,
                             float *grad_state, const attn_tensor *grad_w, const attn_tensor *grad_b)
{
    int64_t set = conv->channels * conv->taps;
    float *w = attn_scratch_f32(call, conv->sets * set), *b = attn_scratch_f32(call, conv->sets * conv->channels);
    if (w == NULL || b == NULL) {
        return attn_fail_memory((size_t)(conv->sets * set) * sizeof(float));
    }
    memset(w, 0, (size_t)(conv->sets * set) * sizeof *w);
    memset(b, 0, (size_t)(conv->sets * conv->channels) * sizeof *b);
    ATTN_TRY(attn_conv1d_backward(conv, call->arena, call->threads, x, grad_o, grad_x, grad_state, w, b));
    for (int64_t i = 0; i < conv->sets * set && grad_w != NULL; i++) {
        attn_f32(grad_w)[grad_w->ndim == 3 ? i : i % set] += w[i];
    }
    for (int64_t i = 0; i < conv->sets * conv->channels && grad_b != NULL; i++) {
        attn_f32(grad_b)[grad_b->ndim == 2 ? i : i % conv->channels] += b[i];
    }
    return ATTN_OK;
}

static attn_status dconv_setup(attn_call *call, attn_conv1d *conv)
{
    int64_t heads = attn_dim(call, "H");
    ATTN_TRY(attn_rcmha_conv(call, call->t[D_W], call->t[D_B], heads, attn_dim(call, "B") * heads, attn_dim(call, "N"), conv));
    conv->state = attn_f32(call->t[D_STATE]);
    return ATTN_OK;
}

static attn_status dconv_forward(attn_call *call)
{
    attn_conv1d conv;
    ATTN_TRY(dconv_setup(call, &conv));
    attn_conv1d_forward(&conv, call->threads, attn_f32(call->t[D_X]), attn_f32(call->t[D_O]));
    return ATTN_OK;
}

static attn_status dconv_backward(attn_call *call)
{
    attn_conv1d conv;
    ATTN_TRY(dconv_setup(call, &conv));
    return attn_rcmha_conv_back(call, &conv, attn_f32(call->t[D_X]), attn_f32(call->grad[D_O]), attn_f32(call->grad[D_X]),
                     attn_f32(call->grad[D_STATE]), call->grad[D_W], call->grad[D_B]);
}

const attn_op_class attn_op_rcmha_dconv = {
    .info = {.name = "rcmha.dconv",
             .title = "Causal depthwise convolution of heads along the sequence",
             .summary = "Each channel is filtered by a few taps over the current and earlier tokens, with one set of taps for all heads or one "
                        "per head. Costs K multiplications per number.",
             .paper = "arXiv:2308.03429",
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(dconv_ports)},
    .bind = dconv_bind,
    .forward = dconv_forward,
    .backward = dconv_backward,
};
