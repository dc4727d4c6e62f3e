/* Plans from the inside: an object whose lists grow row by row. */
#ifndef ATTN_PLAN_PLAN_H
#define ATTN_PLAN_PLAN_H

#include "core/internal.h"
#include <attn/plan.h>

struct attn_plan {
    attn_plan_layout layout; /* its pointers are those below */
    int64_t *start;
    int32_t *column, *mask;
    uint8_t *bits;
    attn_plan_rule *rules;
    int64_t lists, rows_done, entries, entry_room, bitmap_room;
    uint8_t *scratch; /* one bitmap */
};

/* A plan without rows; its shape is checked. Then, for each row of each list: add blocks in ascending order, end the row. */
attn_status attn_plan_create(attn_plan **plan, const attn_plan_shape *shape);
attn_status attn_plan_add(attn_plan *plan, int64_t column, int32_t mask);
/* A block by its bitmap: left out when no pair is visible, full when all are. */
attn_status attn_plan_add_bits(attn_plan *plan, int64_t column, const uint8_t *bits);
/* Room for `count` bitmaps; ATTN_ERR_ARGUMENT for blocks that are too large for them. */
attn_status attn_plan_bitmaps(const attn_plan *plan, int64_t count, uint8_t **bits);
void attn_plan_end_row(attn_plan *plan);
/* Rows of list 0 again, for all other lists. */
attn_status attn_plan_repeat(attn_plan *plan);
/* Move the contents of `from`, which is destroyed, into a plan. */
void attn_plan_take(attn_plan *to, attn_plan *from);

/* What a rule leaves of a block. */
typedef enum plan_state { PLAN_NONE, PLAN_PART, PLAN_ALL } plan_state;
plan_state attn_plan_rule_state(const attn_plan_rule *rule, const attn_plan_shape *shape, int64_t row, int64_t column);
/* The visible pairs of an entry as a bitmap; bits beyond N and M are 0. */
void attn_plan_entry_bits(const attn_plan *plan, int64_t list, int64_t row, int64_t entry, uint8_t *bits);

/* Queries and keys of a block that exist. */
static inline int64_t attn_plan_queries(const attn_plan_shape *s, int64_t row) { return attn_min_i64(s->block_q, s->n - row * s->block_q); }
static inline int64_t attn_plan_keys(const attn_plan_shape *s, int64_t column)
{
    return attn_min_i64(s->block_k, s->m - column * s->block_k);
}
/* The list of a batch item and head, where an extent of 1 stands for all. */
static inline int64_t attn_plan_list(const attn_plan *plan, int64_t b, int64_t h)
{
    const attn_plan_shape *s = &plan->layout.shape;
    return (s->batch == 1 ? 0 : b) * s->heads + (s->heads == 1 ? 0 : h);
}

#endif
