#include "exec/heads.h"

static attn_tensor heads_of(const attn_tensor *t, int64_t first, int64_t count)
{
    attn_tensor view = *t;
    if (t->data != NULL) {
        view.data = (char *)t->data + first * t->stride[1] * (int64_t)attn_dtype_size(t->dtype);
    }
    view.shape[1] = count;
    return view;
}

/* How many of the heads from `first` on go together: whole groups of query heads, or a part of one. */
static int64_t run_length(const uint8_t *wanted, int value, int64_t first, int64_t heads, int64_t group)
{
    int64_t end = first;
    while (end < heads && (wanted[end] != 0) == value) {
        end++;
    }
    if (first % group == 0 && end - first >= group) {
        return (end - first) / group * group;
    }
    return attn_min_i64(end, (first / group + 1) * group) - first;
}

attn_status attn_heads_forward(const attn_dense_settings *settings, const attn_dense_inputs *in, const uint8_t *wanted, int value,
                               const attn_tensor *o, const attn_tensor *lse, const attn_exec *exec)
{
    int64_t heads = in->q.shape[1], group = in->k.shape[1] > 0 ? heads / in->k.shape[1] : 1;
    if (wanted == NULL) {
        return attn_dense_forward(settings, in, o, lse, exec);
    }
    for (int64_t h = 0; h < heads;) {
        int64_t count = run_length(wanted, value, h, heads, group);
        if (count == 0) {
            h++;
            continue;
        }
        int64_t kv_count = attn_ceil_div(count, group);
        attn_dense_inputs some = {.q = heads_of(&in->q, h, count), .k = heads_of(&in->k, h / group, kv_count),
                                  .v = heads_of(&in->v, h / group, kv_count), .key_length = in->key_length};
        attn_tensor some_o = heads_of(o, h, count), some_lse = lse != NULL ? heads_of(lse, h, count) : (attn_tensor){0};
        ATTN_TRY(attn_dense_forward(settings, &some, &some_o, lse != NULL ? &some_lse : NULL, exec));
        h += count;
    }
    return ATTN_OK;
}
