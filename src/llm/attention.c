/* Exact attention over a context's cache. */
#include <attn/dense.h>
#include <attn/model.h>

#include "llm/context.h"

/* Heads begin ... begin + heads - 1 of a view [heads, length, ...], as a batch of one with `length` keys. */
static attn_tensor head_range(const attn_tensor *view, int64_t begin, int64_t heads, int64_t length)
{
    attn_tensor out = *view;
    out.ndim = view->ndim + 1;
    out.shape[0] = 1;
    out.stride[0] = 0;
    for (int i = 0; i < view->ndim; i++) {
        out.shape[i + 1] = view->shape[i];
        out.stride[i + 1] = view->stride[i];
    }
    out.shape[1] = heads;
    out.shape[2] = length;
    out.data = (char *)view->data + (size_t)(begin * view->stride[0]) * attn_dtype_size(view->dtype);
    return out;
}

attn_status attn_llm_exact(const attn_llm_call *call, int64_t kv_begin, int64_t kv_end)
{
    return attn_llm_exact_top(call, kv_begin, kv_end, NULL);
}

attn_status attn_llm_exact_top(const attn_llm_call *call, int64_t kv_begin, int64_t kv_end, int64_t *top)
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.causal = 1;
    settings.scale = call->scale;
    settings.softcap = call->softcap;
    if (call->window > 0) {
        settings.window[0] = call->window - 1;
    }
    int64_t group = call->q.shape[0] / call->k.shape[0], n = call->q.shape[1];
    /* Key heads that hold as many keys are computed together. */
    for (int64_t begin = kv_begin, end; begin < kv_end; begin = end) {
        int64_t count = call->key_counts[begin];
        for (end = begin + 1; end < kv_end && call->key_counts[end] == count; end++) {
        }
        attn_tensor o = head_range(&call->o, begin * group, (end - begin) * group, n), k_scale, v_scale;
        attn_dense_inputs in = {.q = head_range(&call->q, begin * group, (end - begin) * group, n),
                                .k = head_range(&call->k, begin, end - begin, count),
                                .v = head_range(&call->v, begin, end - begin, count)};
        if (call->k.dtype == ATTN_I8) {
            k_scale = head_range(&call->k_scale, begin, end - begin, count);
            v_scale = head_range(&call->v_scale, begin, end - begin, count);
            in.k_scale = &k_scale;
            in.v_scale = &v_scale;
        }
        attn_tensor top_view = attn_tensor_make(top != NULL ? top + begin * group : NULL, ATTN_I64, 3,
                                                (int64_t[]){1, (end - begin) * group, n});
        ATTN_TRY(attn_dense_forward_top(&settings, &in, &o, NULL, top != NULL ? &top_view : NULL, &call->exec));
    }
    return ATTN_OK;
}
