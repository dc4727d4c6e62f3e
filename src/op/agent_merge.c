/* Token merging of agent attention's training-free diffusion form (AgentSD, arXiv:2312.08874): tokens of an image are merged into similar
 * destinations, one per region; agents are made the same way with a larger share; a result for the merged tokens is spread over all of
 * them again.
 */
#include "op/class.h"

#include <stdlib.h>
#include <string.h>

typedef struct merge_params {
    attn_ints grid, stride;
    double ratio, agent_ratio;
} merge_params;

static const attn_param_info merge_param_table[] = {
    ATTN_P_LIST(INTS, "grid", merge_params, grid, NULL, 1, ATTN_MOST_EXTENT, 2, 2, "rows and columns of the tokens"),
    ATTN_P_LIST(INTS, "stride", merge_params, stride, "2", 1, ATTN_MOST_STEP, 1, 2, "rows and columns of a region with one destination"),
    ATTN_P_FLOAT_OPEN("ratio", merge_params, ratio, "0.5", 0, 0, 1, 1, "share of the tokens that are merged into others"),
    ATTN_P_FLOAT_OPEN("agent_ratio", merge_params, agent_ratio, "0.8", 0, 0, 1, 1, "the same for the agents"),
};

enum { G_X, G_Y, G_OFFSETS, G_MERGED, G_AGENTS, G_RESTORED, G_DST, G_KEPT, G_GONE, G_TARGET };

static const attn_port_info merge_ports[] = {
    ATTN_IN("x", "B,n,C", FLOAT, 0, "normalised features"),
    ATTN_IN("y", "B,ny,Cy", FLOAT, ATTN_PORT_OPTIONAL, "what attention returned for the merged tokens, to be un-merged"),
    ATTN_IN("offsets", "ry,rx", INT, ATTN_PORT_OPTIONAL, "which token of each region is the destination, row by row (absent: the first)"),
    ATTN_OUT("merged", "B,left,C", FLOAT, 0, "tokens that stay, then the means of destinations and what was merged into them"),
    ATTN_OUT("agents", "B,agents_left,C", FLOAT, 0, "the same with agent_ratio; only when few enough to pay"),
    ATTN_OUT("restored", "B,n,Cy", FLOAT, 0, "y, un-merged"),
    ATTN_OUT("dst", "T", INT, 0, "destinations, ascending"),
    ATTN_OUT("kept", "B,kept_count", INT, 0, "sources that stay, by falling similarity"),
    ATTN_OUT("gone", "B,gone_count", INT, 0, "sources that are merged, by falling similarity"),
    ATTN_OUT("target", "B,gone_count", INT, 0, "into which destination each, as its place in dst"),
};

typedef struct merge {
    int64_t batch, n, c, grid[2], stride[2], regions[2], targets, r, ra;
    int with_agents;
} merge;

static attn_status merge_setup(const attn_call *call, merge *m)
{
    const merge_params *p = call->params;
    *m = (merge){.batch = attn_dim(call, "B"), .n = attn_dim(call, "n"), .c = attn_dim(call, "C")};
    for (int axis = 0; axis < 2; axis++) {
        m->grid[axis] = p->grid.items[axis];
        m->stride[axis] = p->stride.items[p->stride.count > 1 ? axis : 0];
        m->regions[axis] = m->grid[axis] / m->stride[axis];
    }
    if (m->grid[0] * m->grid[1] != m->n) {
        return attn_fail(ATTN_ERR_SHAPE, "grid = [%lld, %lld] does not hold the %lld tokens of x", (long long)m->grid[0],
                         (long long)m->grid[1], (long long)m->n);
    }
    m->targets = m->regions[0] * m->regions[1];
    if (m->targets < 1) {
        return attn_fail(ATTN_ERR_ARGUMENT, "stride = [%lld, %lld] exceeds grid = [%lld, %lld]: there is no region", (long long)m->stride[0],
                         (long long)m->stride[1], (long long)m->grid[0], (long long)m->grid[1]);
    }
    m->r = attn_min_i64((int64_t)((double)m->n * p->ratio), m->n - m->targets);
    m->ra = attn_min_i64((int64_t)((double)m->n * p->agent_ratio), m->n - m->targets);
    m->with_agents = 2 * (m->n - m->ra) < m->n - m->r;
    if (call->t[G_OFFSETS] != NULL && (attn_dim(call, "ry") != m->regions[0] || attn_dim(call, "rx") != m->regions[1])) {
        return attn_fail(ATTN_ERR_SHAPE, "offsets is [%lld, %lld], expected one for each of [%lld, %lld] regions",
                         (long long)attn_dim(call, "ry"), (long long)attn_dim(call, "rx"), (long long)m->regions[0], (long long)m->regions[1]);
    }
    if (call->t[G_Y] != NULL && attn_dim(call, "ny") != m->n - m->r) {
        return attn_fail(ATTN_ERR_SHAPE, "y has %lld tokens, expected the %lld that are left after merging", (long long)attn_dim(call, "ny"),
                         (long long)(m->n - m->r));
    }
    return ATTN_OK;
}

static attn_status merge_bind(attn_call *call)
{
    merge m;
    ATTN_TRY(merge_setup(call, &m));
    attn_set_dim(call, "left", m.n - m.r);
    attn_set_dim(call, "agents_left", m.n - m.ra);
    attn_set_dim(call, "T", m.targets);
    attn_set_dim(call, "kept_count", m.n - m.targets - m.r);
    attn_set_dim(call, "gone_count", m.r);
    if (!m.with_agents) {
        attn_drop_output(call, G_AGENTS);
    }
    if (call->t[G_Y] == NULL) {
        attn_drop_output(call, G_RESTORED);
    }
    return ATTN_OK;
}

/* A source token with its best destination. */
typedef struct source {
    double similarity;
    int64_t token, target;
} source;

static int by_similarity(const void *a, const void *b)
{
    const source *x = a, *y = b;
    if (x->similarity != y->similarity) {
        return x->similarity > y->similarity ? -1 : 1;
    }
    return (x->token > y->token) - (x->token < y->token);
}

static attn_status find_targets(const attn_call *call, const merge *m, int64_t *dst)
{
    const int64_t *offsets = attn_i64(call->t[G_OFFSETS]);
    uint8_t *chosen = attn_arena_array(call->arena, (size_t)m->n, 1);
    if (chosen == NULL) {
        return attn_fail_memory((size_t)m->n);
    }
    memset(chosen, 0, (size_t)m->n);
    for (int64_t i = 0; i < m->targets; i++) {
        int64_t offset = offsets != NULL ? offsets[i] : 0;
        if (offset < 0 || offset >= m->stride[0] * m->stride[1]) {
            return attn_fail(ATTN_ERR_ARGUMENT, "offsets holds %lld, expected 0 ... %lld", (long long)offset,
                             (long long)(m->stride[0] * m->stride[1] - 1));
        }
        int64_t y = i / m->regions[1] * m->stride[0] + offset / m->stride[1], x = i % m->regions[1] * m->stride[1] + offset % m->stride[1];
        chosen[y * m->grid[1] + x] = 1;
    }
    for (int64_t t = 0, at = 0; t < m->n; t++) {
        if (chosen[t]) {
            dst[at++] = t;
        }
    }
    return ATTN_OK;
}

/* The best destination of each source, in order of falling similarity. unit: scratch [n, C]. */
static void match(const merge *m, int threads, const float *x, const int64_t *dst, double *unit, source *sources)
{
    for (int64_t t = 0; t < m->n; t++) {
        double size = 0;
        for (int64_t c = 0; c < m->c; c++) {
            size += (double)x[t * m->c + c] * (double)x[t * m->c + c];
        }
        for (int64_t c = 0; c < m->c; c++) {
            unit[t * m->c + c] = size > 0 ? (double)x[t * m->c + c] / sqrt(size) : 0;
        }
    }
    int64_t count = 0;
    for (int64_t t = 0, next = 0; t < m->n; t++) {
        if (next < m->targets && dst[next] == t) {
            next++;
        } else {
            sources[count++] = (source){.token = t, .similarity = -INFINITY};
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        const double *a = unit + sources[i].token * m->c;
        for (int64_t j = 0; j < m->targets; j++) {
            const double *b = unit + dst[j] * m->c;
            double sum[4] = {0, 0, 0, 0};
            int64_t c = 0;
            for (; c + 4 <= m->c; c += 4) {
                for (int k = 0; k < 4; k++) {
                    sum[k] += a[c + k] * b[c + k];
                }
            }
            for (; c < m->c; c++) {
                sum[0] += a[c] * b[c];
            }
            double similarity = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            if (similarity > sources[i].similarity) {
                sources[i].similarity = similarity;
                sources[i].target = j;
            }
        }
    }
    qsort(sources, (size_t)count, sizeof *sources, by_similarity);
}

/* [kept | means], with the first r sources merged. sums, counts: scratch [T, C], [T]. */
static void merge_tokens(const merge *m, int64_t r, const float *x, const int64_t *dst, const source *sources, double *sums, int64_t *counts,
                         float *out)
{
    int64_t kept = m->n - m->targets - r;
    for (int64_t j = 0; j < m->targets; j++) {
        counts[j] = 1;
        for (int64_t c = 0; c < m->c; c++) {
            sums[j * m->c + c] = (double)x[dst[j] * m->c + c];
        }
    }
    for (int64_t i = 0; i < r; i++) {
        counts[sources[i].target]++;
        for (int64_t c = 0; c < m->c; c++) {
            sums[sources[i].target * m->c + c] += (double)x[sources[i].token * m->c + c];
        }
    }
    for (int64_t i = 0; i < kept; i++) {
        memcpy(out + i * m->c, x + sources[r + i].token * m->c, (size_t)m->c * sizeof *out);
    }
    for (int64_t i = 0; i < m->targets * m->c; i++) {
        out[kept * m->c + i] = (float)(sums[i] / (double)counts[i / m->c]);
    }
}

static void restore(const merge *m, int64_t width, const float *y, const int64_t *dst, const source *sources, float *out)
{
    int64_t kept = m->n - m->targets - m->r;
    size_t row = (size_t)width * sizeof *out;
    for (int64_t j = 0; j < m->targets; j++) {
        memcpy(out + dst[j] * width, y + (kept + j) * width, row);
    }
    for (int64_t i = 0; i < m->n - m->targets; i++) {
        memcpy(out + sources[i].token * width, y + (i < m->r ? kept + sources[i].target : i - m->r) * width, row);
    }
}

static attn_status merge_forward(attn_call *call)
{
    merge m;
    ATTN_TRY(merge_setup(call, &m));
    int64_t sources_count = m.n - m.targets, kept = sources_count - m.r, *dst = attn_i64(call->t[G_DST]);
    double *unit = attn_arena_array(call->arena, (size_t)m.n, (size_t)m.c * sizeof *unit);
    double *sums = attn_arena_array(call->arena, (size_t)m.targets, (size_t)m.c * sizeof *sums);
    int64_t *counts = attn_arena_array(call->arena, (size_t)m.targets, sizeof *counts);
    source *sources = attn_arena_array(call->arena, (size_t)sources_count, sizeof *sources);
    if (unit == NULL || sums == NULL || counts == NULL || sources == NULL) {
        return attn_fail_memory((size_t)(m.n * m.c) * sizeof *unit);
    }
    ATTN_TRY(find_targets(call, &m, dst));
    for (int64_t b = 0; b < m.batch; b++) {
        const float *x = attn_f32(call->t[G_X]) + b * m.n * m.c;
        match(&m, call->threads, x, dst, unit, sources);
        merge_tokens(&m, m.r, x, dst, sources, sums, counts, attn_f32(call->t[G_MERGED]) + b * (m.n - m.r) * m.c);
        if (m.with_agents) {
            merge_tokens(&m, m.ra, x, dst, sources, sums, counts, attn_f32(call->t[G_AGENTS]) + b * (m.n - m.ra) * m.c);
        }
        if (call->t[G_Y] != NULL) {
            int64_t width = attn_dim(call, "Cy");
            restore(&m, width, attn_f32(call->t[G_Y]) + b * (m.n - m.r) * width, dst, sources,
                    attn_f32(call->t[G_RESTORED]) + b * m.n * width);
        }
        for (int64_t i = 0; i < sources_count; i++) {
            if (i < m.r) {
                attn_i64(call->t[G_GONE])[b * m.r + i] = sources[i].token;
                attn_i64(call->t[G_TARGET])[b * m.r + i] = sources[i].target;
            } else {
                attn_i64(call->t[G_KEPT])[b * kept + i - m.r] = sources[i].token;
            }
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_agent_merge = {
    .info = {.name = "agent.merge",
             .title = "Agent attention: token merging for diffusion models",
             .summary = "Merges tokens of an image into similar destinations, one per region, makes agents the same way with a larger share, and "
                        "spreads a result for the merged tokens over all of them again. Needs no training.",
             .paper = "arXiv:2312.08874",
             ATTN_TABLE(merge_param_table, merge_ports)},
    .params_size = sizeof(merge_params),
    .bind = merge_bind,
    .forward = merge_forward,
};
