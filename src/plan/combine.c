/* Union, intersection and mixes of plans. */
#include "plan/plan.h"
#include "exec/blocks.h"

#include <string.h>

void attn_plan_entry_bits(const attn_plan *plan, int64_t list, int64_t row, int64_t entry, uint8_t *bits)
{
    const attn_plan_layout *y = &plan->layout;
    const attn_plan_shape *s = &y->shape;
    int64_t column = y->column[entry], keys = attn_plan_keys(s, column);
    int32_t mask = y->mask[entry];
    if (mask >= 0) {
        memcpy(bits, y->bits + mask * y->bitmap_bytes, (size_t)y->bitmap_bytes);
        return;
    }
    memset(bits, 0, (size_t)y->bitmap_bytes);
    for (int64_t a = 0; a < attn_plan_queries(s, row); a++) {
        int64_t i = row * s->block_q + a + s->m - s->n;
        for (int64_t j = 0; j < keys; j++) {
            if (mask == ATTN_PLAN_FULL || attn_rule_sees(&y->rules[list], i, column * s->block_k + j)) {
                int64_t at = a * s->block_k + j;
                bits[at >> 3] |= (uint8_t)(1 << (at & 7));
            }
        }
    }
}

static attn_status check_alike(const attn_plan_shape *a, const attn_plan_shape *b)
{
    const struct {
        const char *name;
        int64_t a, b;
        int broadcasts;
    } extents[] = {{"n", a->n, b->n, 0},
                   {"m", a->m, b->m, 0},
                   {"block_q", a->block_q, b->block_q, 0},
                   {"block_k", a->block_k, b->block_k, 0},
                   {"batch", a->batch, b->batch, 1},
                   {"heads", a->heads, b->heads, 1}};
    for (int i = 0; i < 6; i++) {
        if (extents[i].a != extents[i].b && !(extents[i].broadcasts && (extents[i].a == 1 || extents[i].b == 1))) {
            return attn_fail(ATTN_ERR_SHAPE, "plans with %s = %lld and %lld do not combine", extents[i].name, (long long)extents[i].a,
                             (long long)extents[i].b);
        }
    }
    return ATTN_OK;
}

static int lists_use_rule(const attn_plan *plan, int64_t list)
{
    const attn_plan_layout *y = &plan->layout;
    for (int64_t e = y->start[list * y->rows]; e < y->start[(list + 1) * y->rows]; e++) {
        if (y->mask[e] == ATTN_PLAN_RULE) {
            return 1;
        }
    }
    return 0;
}

typedef struct operand {
    const attn_plan *plan;
    int64_t list, at, last;
} operand;

static int same_rule(const attn_plan_rule *a, const attn_plan_rule *b) { return memcmp(a, b, sizeof *a) == 0; }

/* An entry of one operand as it is, under the rule of the result. */
static attn_status add_entry(attn_plan *plan, const operand *x, int64_t row, int64_t list)
{
    const attn_plan_layout *y = &x->plan->layout;
    int32_t mask = y->mask[x->at];
    if (mask == ATTN_PLAN_FULL || (mask == ATTN_PLAN_RULE && same_rule(&y->rules[x->list], &plan->rules[list]))) {
        return attn_plan_add(plan, y->column[x->at], mask);
    }
    attn_plan_entry_bits(x->plan, x->list, row, x->at, plan->scratch);
    return attn_plan_add_bits(plan, y->column[x->at], plan->scratch);
}

static attn_status add_both(attn_plan *plan, const operand *x, const operand *z, int64_t row, int64_t list, int both)
{
    const attn_plan_layout *a = &x->plan->layout, *b = &z->plan->layout;
    int32_t p = a->mask[x->at], q = b->mask[z->at];
    if (p == ATTN_PLAN_FULL || q == ATTN_PLAN_FULL) {
        /* The union is full, the intersection the other one. */
        const operand *full = p == ATTN_PLAN_FULL ? x : z, *other = p == ATTN_PLAN_FULL ? z : x;
        return add_entry(plan, both ? other : full, row, list);
    }
    if (p == ATTN_PLAN_RULE && q == ATTN_PLAN_RULE && same_rule(&a->rules[x->list], &b->rules[z->list])) {
        return add_entry(plan, x, row, list);
    }
    uint8_t *one = plan->scratch, *two = plan->scratch + plan->layout.bitmap_bytes;
    attn_plan_entry_bits(x->plan, x->list, row, x->at, one);
    attn_plan_entry_bits(z->plan, z->list, row, z->at, two);
    for (int64_t i = 0; i < plan->layout.bitmap_bytes; i++) {
        one[i] = both ? one[i] & two[i] : one[i] | two[i];
    }
    return attn_plan_add_bits(plan, a->column[x->at], one);
}

static attn_status combine_row(attn_plan *plan, int64_t list, int64_t row, operand x, operand z, int both)
{
    const int32_t *a = x.plan->layout.column, *b = z.plan->layout.column;
    while (x.at < x.last || z.at < z.last) {
        int64_t first = x.at < x.last ? a[x.at] : INT64_MAX, second = z.at < z.last ? b[z.at] : INT64_MAX;
        if (first == second) {
            ATTN_TRY(add_both(plan, &x, &z, row, list, both));
        } else if (!both) {
            ATTN_TRY(add_entry(plan, first < second ? &x : &z, row, list));
        }
        x.at += first <= second;
        z.at += second <= first;
    }
    attn_plan_end_row(plan);
    return ATTN_OK;
}

static operand operand_of(const attn_plan *plan, int64_t b, int64_t h, int64_t row)
{
    const attn_plan_layout *y = &plan->layout;
    int64_t list = attn_plan_list(plan, b, h), at = list * y->rows + row;
    return (operand){plan, list, y->start[at], y->start[at + 1]};
}

static attn_status combine(attn_plan **out, const attn_plan *a, const attn_plan *b, int both)
{
    attn_plan *plan;
    attn_plan_shape shape = a->layout.shape;
    *out = NULL;
    ATTN_TRY(check_alike(&shape, &b->layout.shape));
    shape.batch = attn_max_i64(shape.batch, b->layout.shape.batch);
    shape.heads = attn_max_i64(shape.heads, b->layout.shape.heads);
    ATTN_TRY(attn_plan_create(&plan, &shape));
    attn_status status = attn_plan_bitmaps(plan, 2, &plan->scratch);
    for (int64_t list = 0; list < plan->lists && status == ATTN_OK; list++) {
        int64_t first = attn_plan_list(a, list / shape.heads, list % shape.heads);
        int64_t second = attn_plan_list(b, list / shape.heads, list % shape.heads);
        plan->rules[list] = lists_use_rule(a, first) ? a->rules[first] : b->rules[second];
        for (int64_t row = 0; row < plan->layout.rows && status == ATTN_OK; row++) {
            status = combine_row(plan, list, row, operand_of(a, list / shape.heads, list % shape.heads, row),
                                 operand_of(b, list / shape.heads, list % shape.heads, row), both);
        }
    }
    if (status != ATTN_OK) {
        attn_plan_destroy(plan);
        return status;
    }
    *out = plan;
    return ATTN_OK;
}

attn_status attn_plan_union(attn_plan **plan, const attn_plan *a, const attn_plan *b) { return combine(plan, a, b, 0); }

attn_status attn_plan_intersection(attn_plan **plan, const attn_plan *a, const attn_plan *b) { return combine(plan, a, b, 1); }

attn_status attn_plan_causal(attn_plan **plan, const attn_plan *from)
{
    attn_plan *causal;
    attn_plan_shape shape = from->layout.shape;
    shape.batch = shape.heads = 1;
    *plan = NULL;
    ATTN_TRY(attn_plan_from_rule(&causal, &shape, &(attn_plan_rule){1, 0, -1, -1}));
    attn_status status = combine(plan, from, causal, 1);
    attn_plan_destroy(causal);
    return status;
}

attn_status attn_plan_mix(attn_plan **out, int64_t heads, const attn_plan *const *plans, const int64_t *which)
{
    attn_plan *plan;
    *out = NULL;
    if (heads < 1) {
        return attn_fail(ATTN_ERR_ARGUMENT, "plan: heads = %lld, expected 1 or more", (long long)heads);
    }
    attn_plan_shape shape = plans[which[0]]->layout.shape;
    shape.heads = heads;
    for (int64_t h = 0; h < heads; h++) {
        ATTN_TRY(check_alike(&shape, &plans[which[h]]->layout.shape));
        shape.batch = attn_max_i64(shape.batch, plans[which[h]]->layout.shape.batch);
    }
    ATTN_TRY(attn_plan_create(&plan, &shape));
    attn_status status = attn_plan_bitmaps(plan, 1, &plan->scratch);
    for (int64_t list = 0; list < plan->lists; list++) {
        const attn_plan *from = plans[which[list % heads]];
        plan->rules[list] = from->rules[attn_plan_list(from, list / heads, list % heads)];
        for (int64_t row = 0; row < plan->layout.rows && status == ATTN_OK; row++) {
            operand x = operand_of(from, list / heads, list % heads, row);
            for (; x.at < x.last && status == ATTN_OK; x.at++) {
                status = add_entry(plan, &x, row, list);
            }
            attn_plan_end_row(plan);
        }
    }
    if (status != ATTN_OK) {
        attn_plan_destroy(plan);
        return status;
    }
    *out = plan;
    return ATTN_OK;
}
