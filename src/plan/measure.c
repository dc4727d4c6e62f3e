/* Looking into plans. */
#include "plan/plan.h"
#include "exec/blocks.h"

int attn_plan_sees(const attn_plan *plan, int64_t b, int64_t h, int64_t n, int64_t m)
{
    const attn_plan_layout *y = &plan->layout;
    const attn_plan_shape *s = &y->shape;
    if (n < 0 || m < 0 || n >= s->n || m >= s->m || b < 0 || h < 0 || (s->batch > 1 && b >= s->batch) || (s->heads > 1 && h >= s->heads)) {
        return 0;
    }
    int64_t list = attn_plan_list(plan, b, h), row = list * y->rows + n / s->block_q;
    for (int64_t e = y->start[row]; e < y->start[row + 1]; e++) {
        if (y->column[e] == m / s->block_k) {
            int64_t at = n % s->block_q * s->block_k + m % s->block_k;
            switch (y->mask[e]) {
            case ATTN_PLAN_FULL: return 1;
            case ATTN_PLAN_RULE: return attn_rule_sees(&y->rules[list], n + s->m - s->n, m);
            default: return y->bits[y->mask[e] * y->bitmap_bytes + (at >> 3)] >> (at & 7) & 1;
            }
        }
    }
    return 0;
}

/* Keys of [first, last) that a rule shows to position i. */
static int64_t rule_count(const attn_plan_rule *rule, int64_t i, int64_t m, int64_t first, int64_t last)
{
    int64_t begin, end, sinks = attn_min_i64(rule->sinks, last);
    attn_rule_range(rule, i, m, &begin, &end);
    if (rule->causal) {
        sinks = attn_min_i64(sinks, i + 1);
    }
    begin = attn_max_i64(begin, first);
    end = attn_min_i64(end, last);
    int64_t in_range = attn_max_i64(0, end - begin), in_sinks = attn_max_i64(0, sinks - first);
    int64_t in_both = attn_max_i64(0, attn_min_i64(end, sinks) - begin);
    return in_range + in_sinks - in_both;
}

void attn_plan_measure(const attn_plan *plan, int64_t d, int64_t dv, attn_plan_measures *measures)
{
    const attn_plan_layout *y = &plan->layout;
    const attn_plan_shape *s = &y->shape;
    *measures = (attn_plan_measures){0};
    for (int64_t i = 0; i < plan->lists * y->rows; i++) {
        int64_t list = i / y->rows, row = i % y->rows, queries = attn_plan_queries(s, row);
        for (int64_t e = y->start[i]; e < y->start[i + 1]; e++) {
            int64_t first = y->column[e] * s->block_k, keys = attn_plan_keys(s, y->column[e]), seen = 0;
            if (y->mask[e] == ATTN_PLAN_FULL) {
                seen = queries * keys;
            } else if (y->mask[e] == ATTN_PLAN_RULE) {
                for (int64_t a = 0; a < queries; a++) {
                    seen += rule_count(&y->rules[list], row * s->block_q + a + s->m - s->n, s->m, first, first + keys);
                }
            } else {
                const uint8_t *bits = y->bits + y->mask[e] * y->bitmap_bytes;
                for (int64_t j = 0; j < y->bitmap_bytes; j++) {
                    seen += __builtin_popcount(bits[j]);
                }
            }
            measures->pairs += (double)seen;
            measures->touched_pairs += (double)(queries * keys);
            measures->full += y->mask[e] == ATTN_PLAN_FULL;
            measures->partial += y->mask[e] != ATTN_PLAN_FULL;
            measures->entries += 1;
        }
    }
    double all = (double)plan->lists * (double)s->n * (double)s->m, queries = (double)attn_min_i64(s->n, s->m);
    double causal = queries * (2 * (double)s->m - queries + 1) / 2;
    measures->density = all > 0 ? measures->pairs / all : 0;
    measures->speedup = measures->touched_pairs > 0 ? all / measures->touched_pairs : INFINITY;
    measures->causal_speedup = measures->touched_pairs > 0 ? (double)plan->lists * causal / measures->touched_pairs : INFINITY;
    measures->flops = 2 * measures->touched_pairs * (double)(d + dv);
}
