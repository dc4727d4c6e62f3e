/* Plans from patterns, functions, masks and selections. */
#include "plan/plan.h"
#include "exec/blocks.h"

#include <stdlib.h>
#include <string.h>

static attn_status check_rule(const attn_plan_rule *rule)
{
    const struct {
        const char *name;
        int64_t value, min;
    } fields[] = {{"sinks", rule->sinks, 0}, {"left", rule->left, -1}, {"right", rule->right, -1}};
    for (int i = 0; i < 3; i++) {
        if (fields[i].value < fields[i].min) {
            return attn_fail(ATTN_ERR_ARGUMENT, "plan: %s = %lld, expected %lld or more", fields[i].name, (long long)fields[i].value,
                             (long long)fields[i].min);
        }
    }
    return ATTN_OK;
}

/* A builder's end: the plan, or none on failure. */
static attn_status finish(attn_plan **out, attn_plan *plan, attn_status status)
{
    *out = status == ATTN_OK ? plan : NULL;
    if (status != ATTN_OK) {
        attn_plan_destroy(plan);
    }
    return status;
}


/* Positions grow with the rows, and with them both ends of the visible range: its union over a block of rows is one range. */
static void rule_columns(const attn_plan_rule *rule, const attn_plan_shape *s, int64_t row, int64_t *sinks, int64_t *low, int64_t *high)
{
    int64_t i0 = row * s->block_q + s->m - s->n, i1 = i0 + attn_plan_queries(s, row) - 1, unused;
    *sinks = attn_min_i64(rule->sinks, s->m);
    if (rule->causal) {
        *sinks = attn_min_i64(*sinks, i1 + 1);
    }
    attn_rule_range(rule, i0, s->m, low, &unused);
    attn_rule_range(rule, i1, s->m, &unused, high);
}

plan_state attn_plan_rule_state(const attn_plan_rule *rule, const attn_plan_shape *s, int64_t row, int64_t column)
{
    int64_t i0 = row * s->block_q + s->m - s->n, i1 = i0 + attn_plan_queries(s, row) - 1, sinks, low, high, begin, end, unused;
    int64_t first = column * s->block_k, last = first + attn_plan_keys(s, column) - 1;
    rule_columns(rule, s, row, &sinks, &low, &high);
    if (first >= sinks && (first >= high || last < low)) {
        return PLAN_NONE;
    }
    attn_rule_range(rule, i0, s->m, &unused, &end);
    attn_rule_range(rule, i1, s->m, &begin, &unused);
    if ((begin <= first && end > last) || (last < rule->sinks && (!rule->causal || last <= i0))) {
        return PLAN_ALL;
    }
    return PLAN_PART;
}

static attn_status add_by_rule(attn_plan *plan, const attn_plan_rule *rule, int64_t column)
{
    const attn_plan_layout *y = &plan->layout;
    plan_state state = attn_plan_rule_state(rule, &y->shape, plan->rows_done % y->rows, column);
    return state == PLAN_NONE ? ATTN_OK : attn_plan_add(plan, column, state == PLAN_ALL ? ATTN_PLAN_FULL : ATTN_PLAN_RULE);
}

static attn_status fill_rule(attn_plan *plan, const attn_plan_rule *rule)
{
    const attn_plan_shape *s = &plan->layout.shape;
    plan->rules[0] = *rule;
    for (int64_t row = 0; row < plan->layout.rows; row++) {
        int64_t sinks, low, high;
        rule_columns(rule, s, row, &sinks, &low, &high);
        int64_t first = attn_ceil_div(attn_max_i64(sinks, 0), s->block_k);
        for (int64_t c = 0; c < first; c++) {
            ATTN_TRY(add_by_rule(plan, rule, c));
        }
        for (int64_t c = attn_max_i64(first, low / s->block_k); c < attn_ceil_div(attn_max_i64(high, 0), s->block_k); c++) {
            ATTN_TRY(add_by_rule(plan, rule, c));
        }
        attn_plan_end_row(plan);
    }
    return attn_plan_repeat(plan);
}

attn_status attn_plan_from_rule(attn_plan **out, const attn_plan_shape *shape, const attn_plan_rule *rule)
{
    attn_plan *plan;
    attn_plan_rule all = {0, 0, -1, -1};
    *out = NULL;
    ATTN_TRY(check_rule(rule != NULL ? rule : &all));
    ATTN_TRY(attn_plan_create(&plan, shape));
    return finish(out, plan, fill_rule(plan, rule != NULL ? rule : &all));
}

attn_status attn_plan_streaming(attn_plan **plan, const attn_plan_shape *shape, int64_t sinks, int64_t recent)
{
    *plan = NULL;
    if (recent < 1) {
        return attn_fail(ATTN_ERR_ARGUMENT, "plan: recent = %lld, expected 1 or more", (long long)recent);
    }
    return attn_plan_from_rule(plan, shape, &(attn_plan_rule){1, sinks, recent - 1, 0});
}

/* ---- From functions ---- */

static attn_status fill_function(attn_plan *plan, attn_plan_visible visible, void *user, int64_t lists)
{
    const attn_plan_layout *y = &plan->layout;
    const attn_plan_shape *s = &y->shape;
    ATTN_TRY(attn_plan_bitmaps(plan, 1, &plan->scratch));
    for (int64_t i = 0; i < lists * y->rows; i++) {
        int64_t list = i / y->rows, row = i % y->rows;
        for (int64_t c = 0; c < y->columns; c++) {
            memset(plan->scratch, 0, (size_t)y->bitmap_bytes);
            for (int64_t a = 0; a < attn_plan_queries(s, row); a++) {
                for (int64_t j = 0; j < attn_plan_keys(s, c); j++) {
                    if (visible(user, list / s->heads, list % s->heads, row * s->block_q + a, c * s->block_k + j)) {
                        int64_t at = a * s->block_k + j;
                        plan->scratch[at >> 3] |= (uint8_t)(1 << (at & 7));
                    }
                }
            }
            ATTN_TRY(attn_plan_add_bits(plan, c, plan->scratch));
        }
        attn_plan_end_row(plan);
    }
    return lists == 1 ? attn_plan_repeat(plan) : ATTN_OK;
}

attn_status attn_plan_from_function(attn_plan **out, const attn_plan_shape *shape, attn_plan_visible visible, void *user)
{
    attn_plan *plan;
    *out = NULL;
    ATTN_TRY(attn_plan_create(&plan, shape));
    return finish(out, plan, fill_function(plan, visible, user, plan->lists));
}

/* The same for all heads. */
static attn_status from_pattern(attn_plan **out, const attn_plan_shape *shape, attn_plan_visible visible, void *user)
{
    attn_plan *plan;
    ATTN_TRY(attn_plan_create(&plan, shape));
    return finish(out, plan, fill_function(plan, visible, user, 1));
}

typedef struct pattern {
    int64_t tokens, stride, count, shift; /* shift: M - N */
} pattern;

static int global_visible(void *user, int64_t b, int64_t h, int64_t n, int64_t m)
{
    const pattern *p = user;
    (void)b;
    (void)h;
    return n < p->tokens || m < p->tokens;
}

static int strided_visible(void *user, int64_t b, int64_t h, int64_t n, int64_t m)
{
    const pattern *p = user;
    int64_t distance = n + p->shift - m;
    (void)b;
    (void)h;
    distance = distance < 0 ? -distance : distance;
    return distance % p->stride == 0 && (p->count == 0 || distance / p->stride <= p->count);
}

attn_status attn_plan_global(attn_plan **plan, const attn_plan_shape *shape, int64_t tokens)
{
    *plan = NULL;
    if (tokens < 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "plan: tokens = %lld, expected 0 or more", (long long)tokens);
    }
    return from_pattern(plan, shape, global_visible, &(pattern){.tokens = tokens});
}

attn_status attn_plan_strided(attn_plan **plan, const attn_plan_shape *shape, int64_t stride, int64_t count)
{
    *plan = NULL;
    if (stride < 1 || count < 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "plan: stride = %lld and count = %lld, expected at least 1 and 0", (long long)stride,
                         (long long)count);
    }
    return from_pattern(plan, shape, strided_visible, &(pattern){.stride = stride, .count = count, .shift = shape->m - shape->n});
}

static int mask_visible(void *user, int64_t b, int64_t h, int64_t n, int64_t m)
{
    const attn_tensor *t = user;
    return ((const uint8_t *)t->data)[b * t->stride[0] + h * t->stride[1] + n * t->stride[2] + m * t->stride[3]] != 0;
}

static attn_status check_tensor(const char *name, const attn_tensor *t)
{
    if (t->ndim != 4) {
        return attn_fail(ATTN_ERR_SHAPE, "%s has %d dimensions, expected 4", name, t->ndim);
    }
    if (t->data == NULL && attn_tensor_count(t) > 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s has no data", name);
    }
    return ATTN_OK;
}

attn_status attn_plan_from_mask(attn_plan **plan, const attn_tensor *mask, int64_t block_q, int64_t block_k)
{
    *plan = NULL;
    ATTN_TRY(check_tensor("mask", mask));
    if (mask->dtype != ATTN_BOOL) {
        return attn_fail(ATTN_ERR_DTYPE, "mask has data type %s, expected bool", attn_dtype_name(mask->dtype));
    }
    attn_plan_shape shape = {mask->shape[0], mask->shape[1], mask->shape[2], mask->shape[3], block_q, block_k};
    attn_tensor view = *mask;
    return attn_plan_from_function(plan, &shape, mask_visible, &view);
}

/* ---- From selections ---- */

static int by_number(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static int64_t whole_at(const attn_tensor *t, int64_t at)
{
    return t->dtype == ATTN_I64 ? ((const int64_t *)t->data)[at] : ((const int32_t *)t->data)[at];
}

static attn_status fill_lists(attn_plan *plan, const attn_tensor *lists, const attn_plan_rule *rule, int64_t *sorted)
{
    const attn_plan_layout *y = &plan->layout;
    int64_t heads = y->shape.heads;
    for (int64_t i = 0; i < plan->lists * y->rows; i++) {
        int64_t list = i / y->rows, row = i % y->rows, count = 0, before = -1;
        int64_t at = list / heads * lists->stride[0] + list % heads * lists->stride[1] + row * lists->stride[2];
        plan->rules[list] = *rule;
        for (int64_t j = 0; j < lists->shape[3]; j++) {
            int64_t value = whole_at(lists, at + j * lists->stride[3]);
            if (value < -1 || value >= y->columns) {
                return attn_fail(ATTN_ERR_ARGUMENT, "plan: lists[%lld,%lld,%lld,%lld] = %lld, expected -1 ... %lld",
                                 (long long)(list / heads), (long long)(list % heads), (long long)row, (long long)j, (long long)value,
                                 (long long)(y->columns - 1));
            }
            if (value >= 0) {
                sorted[count++] = value;
            }
        }
        qsort(sorted, (size_t)count, sizeof *sorted, by_number);
        for (int64_t j = 0; j < count; j++) {
            if (sorted[j] != before) {
                ATTN_TRY(add_by_rule(plan, rule, sorted[j]));
                before = sorted[j];
            }
        }
        attn_plan_end_row(plan);
    }
    return ATTN_OK;
}

static attn_status check_selection(const attn_plan *plan, const char *name, const attn_tensor *t, int64_t last)
{
    const attn_plan_shape *s = &plan->layout.shape;
    const int64_t shape[] = {s->batch, s->heads, plan->layout.rows, last};
    for (int i = 0; i < 4; i++) {
        if (t->shape[i] != shape[i]) {
            return attn_fail(ATTN_ERR_SHAPE, "%s has extent %lld on axis %d, the plan's shape makes it %lld", name,
                             (long long)t->shape[i], i, (long long)shape[i]);
        }
    }
    return ATTN_OK;
}

attn_status attn_plan_from_lists(attn_plan **out, const attn_plan_shape *shape, const attn_tensor *lists, const attn_plan_rule *rule)
{
    attn_plan *plan;
    attn_plan_rule all = {0, 0, -1, -1};
    *out = NULL;
    ATTN_TRY(check_rule(rule != NULL ? rule : &all));
    ATTN_TRY(check_tensor("lists", lists));
    if (lists->dtype != ATTN_I32 && lists->dtype != ATTN_I64) {
        return attn_fail(ATTN_ERR_DTYPE, "lists has data type %s, expected i32 or i64", attn_dtype_name(lists->dtype));
    }
    ATTN_TRY(attn_plan_create(&plan, shape));
    attn_status status = check_selection(plan, "lists", lists, lists->shape[3]);
    if (status == ATTN_OK) {
        int64_t *sorted = attn_alloc_array((size_t)lists->shape[3] + 1, sizeof *sorted);
        status = sorted != NULL ? fill_lists(plan, lists, rule != NULL ? rule : &all, sorted)
                                : attn_fail_memory((size_t)lists->shape[3] * sizeof *sorted);
        attn_free(sorted);
    }
    return finish(out, plan, status);
}

static attn_status fill_flags(attn_plan *plan, const attn_tensor *flags, const attn_plan_rule *rule)
{
    const attn_plan_layout *y = &plan->layout;
    for (int64_t i = 0; i < plan->lists * y->rows; i++) {
        int64_t list = i / y->rows, row = i % y->rows;
        plan->rules[list] = *rule;
        for (int64_t c = 0; c < y->columns; c++) {
            if (mask_visible((void *)(uintptr_t)flags, list / y->shape.heads, list % y->shape.heads, row, c)) {
                ATTN_TRY(add_by_rule(plan, rule, c));
            }
        }
        attn_plan_end_row(plan);
    }
    return ATTN_OK;
}

attn_status attn_plan_from_flags(attn_plan **out, const attn_plan_shape *shape, const attn_tensor *flags, const attn_plan_rule *rule)
{
    attn_plan *plan;
    attn_plan_rule all = {0, 0, -1, -1};
    *out = NULL;
    ATTN_TRY(check_rule(rule != NULL ? rule : &all));
    ATTN_TRY(check_tensor("flags", flags));
    if (flags->dtype != ATTN_BOOL) {
        return attn_fail(ATTN_ERR_DTYPE, "flags has data type %s, expected bool", attn_dtype_name(flags->dtype));
    }
    ATTN_TRY(attn_plan_create(&plan, shape));
    attn_status status = check_selection(plan, "flags", flags, plan->layout.columns);
    return finish(out, plan, status == ATTN_OK ? fill_flags(plan, flags, rule != NULL ? rule : &all) : status);
}
