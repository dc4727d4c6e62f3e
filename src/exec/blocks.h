/* Exact softmax attention over a plan's key blocks (blocks.c, blocks_backward.c) and over lists of keys (gather.c). Both take the
 * checked inputs of the dense executor; its causal flag, window and key_length mask further what the layout lists. */
#ifndef ATTN_EXEC_BLOCKS_H
#define ATTN_EXEC_BLOCKS_H

#include "exec/dense.h"
#include <attn/plan.h>

attn_status attn_blocks_forward(const attn_plan_layout *layout, const attn_dense_settings *settings,
                                const attn_dense_inputs *inputs, const attn_tensor *o, const attn_tensor *lse, const attn_exec *exec);
attn_status attn_blocks_backward(const attn_plan_layout *layout, const attn_dense_settings *settings,
                                 const attn_dense_inputs *inputs, const attn_tensor *o, const attn_tensor *lse,
                                 const attn_tensor *grad_o, const attn_dense_gradients *gradients, const attn_exec *exec);

/* Layouts with block_k = 1. Each gathered row is read once for all queries of a row's block and, when the layout has one list per
 * key/value head, for all query heads of the group. */
attn_status attn_gather_forward(const attn_plan_layout *layout, const attn_dense_settings *settings,
                                const attn_dense_inputs *inputs, const attn_tensor *o, const attn_tensor *lse, const attn_exec *exec);
attn_status attn_gather_backward(const attn_plan_layout *layout, const attn_dense_settings *settings,
                                 const attn_dense_inputs *inputs, const attn_tensor *o, const attn_tensor *lse,
                                 const attn_tensor *grad_o, const attn_dense_gradients *gradients, const attn_exec *exec);

/* ---- Shared parts (layout.c) ---- */

/* Whether the layout fits the problem. */
attn_status attn_layout_check(const attn_plan_layout *layout, const dense_problem *problem);
attn_status attn_layout_check_backward(const attn_plan_layout *layout, const dense_problem *problem, const attn_tensor *o,
                                       const attn_tensor *lse, const attn_tensor *grad_o, const attn_dense_gradients *gradients);

/* The row of the layout that holds query block `block` of query head h. */
static inline int64_t attn_layout_list(const attn_plan_layout *y, const dense_problem *p, int64_t b, int64_t h)
{
    int64_t head = y->shape.heads == p->heads ? h : y->shape.heads == 1 ? 0 : h / p->group;
    return (y->shape.batch == 1 ? 0 : b) * y->shape.heads + head;
}

/* Keys [begin, end) that a rule's window and causality leave from position i; sinks come on top. */
static inline void attn_rule_range(const attn_plan_rule *rule, int64_t i, int64_t m, int64_t *begin, int64_t *end)
{
    *begin = rule->left >= 0 && rule->left < i ? i - rule->left : 0;
    *end = m;
    if (rule->right >= 0 && rule->right < m - i) {
        *end = i + rule->right + 1;
    }
    if (rule->causal && i + 1 < *end) {
        *end = i + 1;
    }
}

static inline int attn_rule_sees(const attn_plan_rule *rule, int64_t i, int64_t j)
{
    if (rule->causal && j > i) {
        return 0;
    }
    return j < rule->sinks || ((rule->left < 0 || j >= i - rule->left) && (rule->right < 0 || j - i <= rule->right));
}

/* -inf for the keys first ... first+count-1 of query n that an entry's mask hides. `query` is n's place in its block, `key` that of
 * `first` in its own. */
void attn_layout_mask(const attn_plan_layout *layout, int64_t list, int32_t mask, float *s, int64_t position, int64_t query,
                      int64_t first, int64_t key, int64_t count);

/* lse in base 2 (+inf for a row that sees nothing) and grad_o . o, for all rows; grad_o and q as f32 rows. */
typedef struct exec_rows {
    const float *data;
    int64_t batch, head, row; /* strides */
} exec_rows;
typedef struct exec_backward {
    exec_rows q, grad_o;   /* q not scaled; widths padded to whole vectors */
    float *lse2, *delta;   /* [B*H*N] */
    int64_t d_pad;
} exec_backward;
attn_status attn_exec_backward_begin(exec_backward *to, const dense_problem *problem, const attn_tensor *o, const attn_tensor *lse,
                                     const attn_tensor *grad_o, attn_arena *arena, int threads);
/* The gradient of the sinks, from lse2 and delta. */
void attn_exec_sink_gradients(const exec_backward *w, const dense_problem *problem, const attn_tensor *to);

/* Ask for `count` rows of `width` floats to be brought near. */
static inline void attn_exec_prefetch(const float *row, int64_t stride, int64_t count, int64_t width)
{
    attn_prefetch(row, (ptrdiff_t)(stride * (int64_t)sizeof *row), count, (size_t)width * sizeof *row);
}

static inline const float *attn_exec_row(const exec_rows *rows, int64_t b, int64_t h, int64_t n)
{
    return rows->data + b * rows->batch + h * rows->head + n * rows->row;
}

#endif
