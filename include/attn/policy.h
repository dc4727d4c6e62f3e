/* Attention policies: which mechanism each layer and head of a language model uses, for prompts and for generation, and what
 * their caches keep.
 *
 * A mechanism is a SPEC ("flexprefill:gamma=0.95"). "dense" is exact attention. A head whose generation mechanism is `streaming` holds
 * only its sinks and recent keys once generation has begun (from the first chunk on when its prompt mechanism is `streaming` too):
 * the memory of the others is freed. Layers with a sliding window of their own stay as they are.
 *
 * The SPEC of `streaming` takes one parameter more here, positions=original|cache (StreamingLLM, arXiv:2309.17453). original, the default:
 * keys keep the positions of their tokens. cache: to a query it looks as if the recent keys followed the sinks at once, so that no distance
 * is larger than sinks + recent. When all heads generate so, a sequence may grow beyond the context's length; prompts that are longer than
 * that need it while reading too.
 *
 * `flexprefill` chooses once for up to 8,192 queries of a prompt (attn_llm_attention.span).
 */
#ifndef ATTN_POLICY_H
#define ATTN_POLICY_H

#include <attn/model.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_policy attn_policy;

/* The same mechanisms for all layers and heads. Each SPEC may be NULL (exact). It is checked here: ATTN_ERR_ARGUMENT names what
 * is wrong with it, that the mechanism has no inputs q, k, v and output o of the shapes that a language model needs, or that as one for
 * prompts it is not causal. */
ATTN_API attn_status attn_policy_create(attn_policy **policy, const attn_model *model, const char *prompt,
                                        const char *generation);

/* From a JSON file:
 *     {"prompt": "flexprefill", "generation": "dense",
 *      "layers": [{"layers": [0, 1], "heads": [0, 3], "prompt": "dense", "generation": "streaming:recent=256"}]}
 * Entries of "layers" overrule what comes before them, for the query heads of the layers that they list (absent: all). */
ATTN_API attn_status attn_policy_load(attn_policy **policy, const attn_model *model, const char *path);

/* Use the policy in a context, which must be destroyed or given another one (NULL: exact attention) before the policy is. One policy
 * serves one context at a time. */
ATTN_API attn_status attn_policy_use(attn_policy *policy, attn_context *context);
ATTN_API void attn_policy_destroy(attn_policy *policy); /* NULL is ignored */

/* What the policy's mechanisms did since it was made: (query, key) pairs computed and those that exact attention would have computed, by
 * the mechanisms' own account, over the layers that the policy covers. Counting makes selections twice, so it is off at first. */
typedef struct attn_policy_stats {
    double prompt_pairs, prompt_exact_pairs;
    double generation_pairs, generation_exact_pairs;
} attn_policy_stats;
ATTN_API void attn_policy_count(attn_policy *policy, int on);
ATTN_API attn_policy_stats attn_policy_get_stats(const attn_policy *policy);

#ifdef __cplusplus
}
#endif
#endif
