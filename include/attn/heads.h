/* Single attention heads of a language model, watched and masked while it generates: which key each head looks at most, and what
 * happens to the answers without some of them. It finds the heads that copy from the context ("retrieval heads", arXiv:2404.15574).
 *
 *     attn_heads *heads;
 *     attn_heads_create(&heads, model);
 *     attn_heads_use(heads, context);
 *     ... one attn_context_eval() of one token, after the prompt but for its last token ...
 *     const int64_t *top = attn_heads_top(heads);
 *
 * Evaluations of several tokens of a sequence are left as they are: the prompt is neither watched nor masked.
 */
#ifndef ATTN_HEADS_H
#define ATTN_HEADS_H

#include <attn/model.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_heads attn_heads;

ATTN_API attn_status attn_heads_create(attn_heads **heads, const attn_model *model);
ATTN_API void attn_heads_destroy(attn_heads *heads); /* NULL is ignored */

/* Watch a context of the model, in place of any attention mechanism that it uses; one context at a time, which must be destroyed or
 * released (attn_heads_use(NULL, context): back to exact attention) before `heads` is. */
ATTN_API attn_status attn_heads_use(attn_heads *heads, attn_context *context);

/* What a masked head gives. */
typedef enum attn_heads_mask_mode {
    ATTN_HEADS_UNIFORM, /* the mean of the visible values: all its scores are 0 */
    ATTN_HEADS_ZERO
} attn_heads_mask_mode;

/* Mask the query heads with masked[layer * H + head] != 0 from now on; NULL: none. The array is copied. */
ATTN_API attn_status attn_heads_mask(attn_heads *heads, const uint8_t *masked, attn_heads_mask_mode mode);

/* The position that each query head scored highest in the last evaluation of one token, [layers * H]; -1 before the first. Valid
 * until the next evaluation. In layers with a sliding window only positions inside it can be among them. */
ATTN_API const int64_t *attn_heads_top(const attn_heads *heads);

#ifdef __cplusplus
}
#endif
#endif
