/* Attention of few queries over many tokens (learned queries, agents): keys are split in parts whose results are merged by their
 * log-sum-exp, so that all threads work although there are few queries. How keys are split does not depend on the threads.
 */
#ifndef ATTN_EXEC_POOL_H
#define ATTN_EXEC_POOL_H

#include "core/internal.h"
#include <attn/dense.h>

/* As attn_dense_forward and attn_dense_backward, without causality, windows, sinks, slopes and key_length: settings give scale and softcap,
 * inputs q, k, v (with scales) and bias. Where splitting cannot help, dense does the work. Errors as there. */
attn_status attn_pool_forward(const attn_dense_settings *settings, const attn_dense_inputs *inputs, const attn_tensor *o,
                              const attn_tensor *lse, const attn_exec *exec);
/* Gradients of q, k, v and bias. */
attn_status attn_pool_backward(const attn_dense_settings *settings, const attn_dense_inputs *inputs, const attn_tensor *o,
                               const attn_tensor *lse, const attn_tensor *grad_o, const attn_dense_gradients *gradients,
                               const attn_exec *exec);

#endif
