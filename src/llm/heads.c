/* Watching and masking single heads: a decode mechanism that asks exact attention for the strongest key of each query head. */
#include <attn/heads.h>

#include "llm/context.h"

#include <string.h>

struct attn_heads {
    const attn_model *model;
    int64_t layers, heads, width;
    int64_t *top;    /* [layers][heads] */
    uint8_t *masked; /* [layers][heads] */
    attn_heads_mask_mode mode;
    float *q; /* [heads][width], with those of masked heads zero */
};

attn_status attn_heads_create(attn_heads **heads, const attn_model *model)
{
    *heads = NULL;
    const attn_model_info *info = attn_model_get_info(model);
    attn_heads *made = attn_calloc_array(1, sizeof *made);
    if (made == NULL) {
        return attn_fail_memory(sizeof *made);
    }
    made->model = model, made->layers = info->layers, made->heads = info->heads, made->width = info->head_width;
    size_t count = (size_t)(info->layers * info->heads);
    made->top = attn_calloc_array(count, sizeof *made->top);
    made->masked = attn_calloc_array(count, sizeof *made->masked);
    made->q = attn_calloc_array((size_t)(info->heads * info->head_width), sizeof *made->q);
    if (made->top == NULL || made->masked == NULL || made->q == NULL) {
        attn_heads_destroy(made);
        return attn_fail_memory(count * sizeof *made->top);
    }
    for (size_t i = 0; i < count; i++) {
        made->top[i] = -1;
    }
    *heads = made;
    return ATTN_OK;
}

void attn_heads_destroy(attn_heads *heads)
{
    if (heads != NULL) {
        attn_free(heads->top);
        attn_free(heads->masked);
        attn_free(heads->q);
        attn_free(heads);
    }
}

static int any_masked(const uint8_t *masked, int64_t heads)
{
    for (int64_t h = 0; h < heads; h++) {
        if (masked[h]) {
            return 1;
        }
    }
    return 0;
}

/* Scores of a masked head are all zero when its query is. */
static void mask_queries(attn_heads *self, attn_llm_call *call, const uint8_t *masked)
{
    const float *from = call->q.data;
    for (int64_t h = 0; h < self->heads; h++) {
        float *to = self->q + h * self->width;
        if (masked[h]) {
            memset(to, 0, (size_t)self->width * sizeof *to);
        } else {
            memcpy(to, from + h * call->q.stride[0], (size_t)self->width * sizeof *to);
        }
    }
    call->q = attn_tensor_make(self->q, ATTN_F32, 3, (int64_t[]){self->heads, 1, self->width});
}

/* From indices of the keys that are held to positions. */
static void to_positions(const attn_llm_call *call, int64_t heads, int64_t *top)
{
    int64_t group = heads / call->k.shape[0];
    for (int64_t h = 0; h < heads; h++) {
        int64_t kv = h / group;
        if (top[h] >= 0) {
            top[h] = call->key_positions != NULL ? call->key_positions[kv][top[h]]
                                                 : call->position + 1 - call->key_counts[kv] + top[h];
        }
    }
}

static attn_status decode(void *user, const attn_llm_call *call)
{
    attn_heads *self = user;
    attn_llm_call changed = *call;
    const uint8_t *masked = self->masked + call->layer * self->heads;
    int64_t *top = self->top + call->layer * self->heads;
    if (any_masked(masked, self->heads)) {
        mask_queries(self, &changed, masked);
    }
    ATTN_TRY(attn_llm_exact_top(&changed, 0, call->k.shape[0], top));
    to_positions(call, self->heads, top);
    for (int64_t h = 0; h < self->heads && self->mode == ATTN_HEADS_ZERO; h++) {
        if (masked[h]) {
            memset((float *)call->o.data + h * call->o.stride[0], 0, (size_t)self->width * sizeof(float));
        }
    }
    return ATTN_OK;
}

attn_status attn_heads_use(attn_heads *heads, attn_context *context)
{
    attn_llm_attention attention = {.decode = decode, .user = heads};
    return attn_context_set_attention(context, -1, heads != NULL ? &attention : NULL);
}

attn_status attn_heads_mask(attn_heads *heads, const uint8_t *masked, attn_heads_mask_mode mode)
{
    if (mode != ATTN_HEADS_UNIFORM && mode != ATTN_HEADS_ZERO) {
        return attn_fail(ATTN_ERR_ARGUMENT, "mode is %d, expected ATTN_HEADS_UNIFORM or ATTN_HEADS_ZERO", (int)mode);
    }
    for (int64_t i = 0; i < heads->layers * heads->heads; i++) {
        heads->masked[i] = masked != NULL && masked[i];
    }
    heads->mode = mode;
    return ATTN_OK;
}

const int64_t *attn_heads_top(const attn_heads *heads) { return heads->top; }
