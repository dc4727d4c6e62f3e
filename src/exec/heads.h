/* Exact attention of some query heads of a call, for mechanisms that treat heads apart. */
#ifndef ATTN_EXEC_HEADS_H
#define ATTN_EXEC_HEADS_H

#include "core/internal.h"
#include <attn/dense.h>

/* attn_dense_forward for the heads with wanted[h] == `value` (wanted NULL: all of them); the others' part of o and lse stays as it is.
 * Without bias, slopes and sinks. lse may be NULL. */
attn_status attn_heads_forward(const attn_dense_settings *settings, const attn_dense_inputs *inputs, const uint8_t *wanted, int value,
                               const attn_tensor *o, const attn_tensor *lse, const attn_exec *exec);

#endif
