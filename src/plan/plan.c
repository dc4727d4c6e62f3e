/* Plans as objects, and computing with them. */
#include "plan/plan.h"
#include "exec/blocks.h"

#include <string.h>

#define LARGEST_BITMAP (1 << 26) /* bytes */

static attn_status check_extent(const char *name, int64_t value, int64_t min, int64_t max)
{
    return value >= min && value <= max ? ATTN_OK
                                        : attn_fail(ATTN_ERR_ARGUMENT, "plan: %s = %lld, expected %lld ... %lld", name, (long long)value,
                                                    (long long)min, (long long)max);
}

static void set_layout(attn_plan *plan)
{
    attn_plan_layout *y = &plan->layout;
    y->start = plan->start;
    y->column = plan->column;
    y->mask = plan->mask;
    y->bits = plan->bits;
    y->rules = plan->rules;
}

attn_status attn_plan_create(attn_plan **out, const attn_plan_shape *shape)
{
    *out = NULL;
    ATTN_TRY(check_extent("batch", shape->batch, 1, 1 << 20));
    ATTN_TRY(check_extent("heads", shape->heads, 1, 1 << 20));
    ATTN_TRY(check_extent("n", shape->n, 0, (int64_t)1 << 31));
    ATTN_TRY(check_extent("m", shape->m, 0, (int64_t)1 << 31));
    ATTN_TRY(check_extent("block_q", shape->block_q, 1, 1 << 20));
    ATTN_TRY(check_extent("block_k", shape->block_k, 1, 1 << 20));
    int64_t rows = attn_ceil_div(shape->n, shape->block_q), lists = shape->batch * shape->heads;
    if (lists > ((int64_t)1 << 40) / attn_max_i64(rows, 1)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "plan: %lld lists of %lld rows are too many", (long long)lists, (long long)rows);
    }
    attn_plan *plan = attn_calloc_array(1, sizeof *plan);
    if (plan == NULL) {
        return attn_fail_memory(sizeof *plan);
    }
    attn_plan_layout *y = &plan->layout;
    y->shape = *shape;
    y->rows = rows;
    y->columns = attn_ceil_div(shape->m, shape->block_k);
    y->bitmap_bytes = (shape->block_q * shape->block_k + 7) / 8;
    plan->lists = lists;
    plan->start = attn_calloc_array((size_t)(lists * rows + 1), sizeof *plan->start);
    plan->rules = attn_calloc_array((size_t)lists, sizeof *plan->rules);
    if (plan->start == NULL || plan->rules == NULL) {
        attn_plan_destroy(plan);
        return attn_fail_memory((size_t)(lists * rows + 1) * sizeof *plan->start);
    }
    for (int64_t i = 0; i < lists; i++) {
        plan->rules[i] = (attn_plan_rule){0, 0, -1, -1};
    }
    set_layout(plan);
    *out = plan;
    return ATTN_OK;
}

void attn_plan_destroy(attn_plan *plan)
{
    if (plan != NULL) {
        attn_free(plan->start);
        attn_free(plan->column);
        attn_free(plan->mask);
        attn_free(plan->bits);
        attn_free(plan->rules);
        attn_free(plan->scratch);
        attn_free(plan);
    }
}

void attn_plan_take(attn_plan *to, attn_plan *from)
{
    attn_plan before = *to;
    *to = *from;
    *from = before;
    attn_plan_destroy(from);
}

const attn_plan_layout *attn_plan_get_layout(const attn_plan *plan) { return &plan->layout; }

attn_status attn_plan_add(attn_plan *plan, int64_t column, int32_t mask)
{
    if (plan->entries == plan->entry_room) {
        size_t before = (size_t)plan->entry_room, room = before * 2 + 64;
        int32_t *columns = attn_realloc(plan->column, before * sizeof *columns, room * sizeof *columns);
        if (columns != NULL) {
            plan->column = columns;
        }
        int32_t *masks = attn_realloc(plan->mask, before * sizeof *masks, room * sizeof *masks);
        if (masks != NULL) {
            plan->mask = masks;
        }
        set_layout(plan);
        if (columns == NULL || masks == NULL) {
            return attn_fail_memory(room * sizeof *columns);
        }
        plan->entry_room = (int64_t)room;
    }
    plan->column[plan->entries] = (int32_t)column;
    plan->mask[plan->entries++] = mask;
    return ATTN_OK;
}

attn_status attn_plan_add_bits(attn_plan *plan, int64_t column, const uint8_t *bits)
{
    attn_plan_layout *y = &plan->layout;
    int64_t pairs = attn_plan_queries(&y->shape, plan->rows_done % y->rows) * attn_plan_keys(&y->shape, column), seen = 0;
    for (int64_t i = 0; i < y->bitmap_bytes; i++) {
        seen += __builtin_popcount(bits[i]);
    }
    if (seen == 0) {
        return ATTN_OK;
    }
    if (seen == pairs) {
        return attn_plan_add(plan, column, ATTN_PLAN_FULL);
    }
    /* The edge of a pattern looks the same from row to row: the last few bitmaps are looked at before another is stored. */
    for (int64_t i = y->bitmaps - 1; i >= 0 && i >= y->bitmaps - 8; i--) {
        if (memcmp(plan->bits + i * y->bitmap_bytes, bits, (size_t)y->bitmap_bytes) == 0) {
            return attn_plan_add(plan, column, (int32_t)i);
        }
    }
    if (y->bitmaps == INT32_MAX) {
        return attn_fail(ATTN_ERR_ARGUMENT, "plan: more than %d partly masked blocks", INT32_MAX);
    }
    if (y->bitmaps == plan->bitmap_room) {
        size_t before = (size_t)plan->bitmap_room, room = before * 2 + 16, size = (size_t)y->bitmap_bytes;
        uint8_t *grown = attn_realloc(plan->bits, before * size, room * size);
        if (grown == NULL) {
            return attn_fail_memory(room * size);
        }
        plan->bits = grown;
        plan->bitmap_room = (int64_t)room;
        set_layout(plan);
    }
    memcpy(plan->bits + y->bitmaps * y->bitmap_bytes, bits, (size_t)y->bitmap_bytes);
    return attn_plan_add(plan, column, (int32_t)y->bitmaps++);
}

attn_status attn_plan_bitmaps(const attn_plan *plan, int64_t count, uint8_t **bits)
{
    const attn_plan_layout *y = &plan->layout;
    *bits = NULL;
    if (y->bitmap_bytes > LARGEST_BITMAP) {
        return attn_fail(ATTN_ERR_ARGUMENT, "plan: blocks of %lld x %lld are too large for token-level masks", (long long)y->shape.block_q,
                         (long long)y->shape.block_k);
    }
    *bits = attn_alloc((size_t)(y->bitmap_bytes * count));
    return *bits != NULL ? ATTN_OK : attn_fail_memory((size_t)(y->bitmap_bytes * count));
}

void attn_plan_end_row(attn_plan *plan) { plan->start[++plan->rows_done] = plan->entries; }

attn_status attn_plan_repeat(attn_plan *plan)
{
    int64_t rows = plan->layout.rows;
    for (int64_t list = 1; list < plan->lists; list++) {
        plan->rules[list] = plan->rules[0];
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t e = plan->start[r]; e < plan->start[r + 1]; e++) {
                ATTN_TRY(attn_plan_add(plan, plan->column[e], plan->mask[e]));
            }
            attn_plan_end_row(plan);
        }
    }
    return ATTN_OK;
}

attn_status attn_plan_fits(const attn_plan *plan, int64_t b, int64_t h, int64_t hkv, int64_t n, int64_t m)
{
    dense_problem p = {.batch = b, .heads = h, .kv_heads = hkv, .n = n, .m = m};
    return attn_layout_check(&plan->layout, &p);
}

/* Lists of single keys go to `gather`, everything else to `blocks`. */
attn_status attn_plan_forward(const attn_plan *plan, const attn_dense_settings *settings, const attn_dense_inputs *inputs,
                              const attn_tensor *o, const attn_tensor *lse, const attn_exec *exec)
{
    return plan->layout.shape.block_k == 1 ? attn_gather_forward(&plan->layout, settings, inputs, o, lse, exec)
                                           : attn_blocks_forward(&plan->layout, settings, inputs, o, lse, exec);
}

attn_status attn_plan_backward(const attn_plan *plan, const attn_dense_settings *settings, const attn_dense_inputs *inputs,
                               const attn_tensor *o, const attn_tensor *lse, const attn_tensor *grad_o,
                               const attn_dense_gradients *gradients, const attn_exec *exec)
{
    return plan->layout.shape.block_k == 1
               ? attn_gather_backward(&plan->layout, settings, inputs, o, lse, grad_o, gradients, exec)
               : attn_blocks_backward(&plan->layout, settings, inputs, o, lse, grad_o, gradients, exec);
}
