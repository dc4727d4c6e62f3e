/* Branch-Attend-Mix (arXiv:2408.08274): a block whose attention and feed-forward parts are mixtures of experts.
 *
 * An expert works on the list of tokens that use it (all of them in soft routing): its projections are one product over the list,
 * and the heads of all experts are one batch of attention heads. Keys and values exist for every token.
 */
#include "exec/stairs.h"
#include "layer/ffn.h"
#include "layer/linear.h"
#include "layer/norm.h"
#include "layer/rope.h"
#include "layer/route.h"
#include "op/class.h"

#include <string.h>

#define DIFF ATTN_PORT_DIFF

/* ---- Routing ---- */

typedef struct choice {
    int64_t tokens, experts, chosen; /* chosen 0: all experts for every token */
    float *p;                        /* [tokens, experts], the full softmax */
    int64_t *indices;                /* [tokens, chosen] or NULL */
    double *lse;                     /* [tokens] of the logits */
    int64_t *list, *first;           /* tokens of expert e: list[first[e]] ... list[first[e+1] - 1], ascending */
    int64_t *slot;                   /* for each entry of the list: where that pair stands in p */
} choice;

static attn_status route(attn_call *call, choice *r, int64_t width, const float *x, const float *w)
{
    int64_t per_token = r->chosen > 0 ? r->chosen : r->experts, pairs = r->tokens * per_token;
    r->p = attn_scratch_f32(call, r->tokens * r->experts);
    r->indices = r->chosen > 0 ? attn_arena_array(call->arena, (size_t)pairs, sizeof(int64_t)) : NULL;
    r->lse = attn_arena_array(call->arena, (size_t)r->tokens, sizeof(double));
    r->list = attn_arena_array(call->arena, (size_t)pairs, sizeof(int64_t));
    r->slot = attn_arena_array(call->arena, (size_t)pairs, sizeof(int64_t));
    r->first = attn_arena_array(call->arena, (size_t)r->experts + 1, sizeof(int64_t));
    if (r->p == NULL || r->lse == NULL || r->list == NULL || r->slot == NULL || r->first == NULL ||
        (r->chosen > 0 && r->indices == NULL)) {
        return attn_fail_memory((size_t)pairs * 3 * sizeof(int64_t));
    }
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, r->tokens, width, r->experts, x, w, NULL, r->p));
    for (int64_t t = 0; t < r->tokens; t++) {
        if (r->chosen > 0) {
            attn_top_k(r->experts, r->chosen, r->p + t * r->experts, r->indices + t * r->chosen);
        }
        r->lse[t] = attn_softmax_row(r->experts, r->p + t * r->experts);
    }
    int64_t at = 0;
    for (int64_t e = 0; e < r->experts; e++) {
        r->first[e] = at;
        for (int64_t t = 0; t < r->tokens; t++) {
            int uses = r->chosen == 0;
            for (int64_t i = 0; i < r->chosen; i++) {
                uses |= r->indices[t * r->chosen + i] == e;
            }
            if (uses) {
                r->list[at] = t;
                r->slot[at++] = t * r->experts + e;
            }
        }
    }
    r->first[r->experts] = at;
    return ATTN_OK;
}

static void gather(int64_t width, const float *x, const int64_t *list, int64_t count, float *rows)
{
    for (int64_t r = 0; r < count; r++) {
        memcpy(rows + r * width, x + list[r] * width, (size_t)width * sizeof(float));
    }
}

static void scatter_add(int64_t width, const float *rows, const int64_t *list, int64_t count, float *x)
{
    for (int64_t r = 0; r < count; r++) {
        for (int64_t c = 0; c < width; c++) {
            x[list[r] * width + c] += rows[r * width + c];
        }
    }
}

/* grad_logits [tokens, experts] to x and the router's weight, both added to. */
static attn_status route_back(attn_call *call, const choice *r, int64_t width, const float *x, const float *w,
                              const float *grad_logits, float *grad_x, float *grad_w)
{
    float *part = attn_scratch_f32(call, r->tokens * width);
    if (part == NULL) {
        return attn_fail_memory((size_t)(r->tokens * width) * sizeof(float));
    }
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, r->tokens, width, r->experts, x, w, grad_logits, part, grad_w, NULL));
    for (int64_t i = 0; i < r->tokens * width; i++) {
        grad_x[i] += part[i];
    }
    return ATTN_OK;
}

/* ---- Mixture of attention experts ---- */

typedef struct moa_params {
    int64_t heads, kv_heads, causal, rope_style, top_k, decode;
    double scale, rope_theta;
} moa_params;

typedef struct moa {
    const moa_params *p;
    int64_t batch, n, width, experts, kv_sets, d, dv; /* kv_sets: experts, or 1 when keys and values are shared */
    double scale;
    const float *x, *w_router, *w_q, *w_k, *w_v, *w_o;
    choice route;
    float *table;    /* rotary, or NULL */
    float *k, *v;    /* [batch][kv_sets][Hkv][n][d or dv] */
    float *q, *o, *lse; /* per expert, head and row of its list */
    attn_stairs stairs;
} moa;

/* Where head h of expert e has its rows: they begin at this row of q, o and lse. */
static int64_t rows_of(const moa *m, int64_t e, int64_t h)
{
    int64_t count = m->route.first[e + 1] - m->route.first[e];
    return m->route.first[e] * m->p->heads + h * count;
}

static void turn(const moa *m, int64_t position, int inverse, float *x)
{
    if (m->table != NULL) {
        attn_rope_apply(m->table + position * m->d, m->d, m->p->rope_style == 1, inverse, x);
    }
}

/* Keys (or values) of tokens [t0, t1) of each batch item into their place. */
static attn_status project_keys(attn_call *call, const moa *m, int64_t t0, int64_t t1, const float *w, int64_t size, int rotate, float *to)
{
    int64_t length = t1 - t0, rows = m->batch * length, heads = m->kv_sets * m->p->kv_heads;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    float *part = attn_scratch_f32(call, rows * (heads * size + m->width));
    if (part == NULL) {
        return attn_fail_memory((size_t)(rows * heads * size) * sizeof(float));
    }
    float *x = part + rows * heads * size;
    for (int64_t r = 0; r < rows; r++) {
        memcpy(x + r * m->width, m->x + (r / length * m->n + t0 + r % length) * m->width, (size_t)m->width * sizeof(float));
    }
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, m->width, heads * size, x, w, NULL, part));
    for (int64_t i = 0; i < rows * heads; i++) {
        int64_t b = i / heads / length, t = t0 + i / heads % length;
        float *place = to + ((b * heads + i % heads) * m->n + t) * size;
        memcpy(place, part + i * size, (size_t)size * sizeof(float));
        if (rotate) {
            turn(m, t, 0, place);
        }
    }
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* Queries of the rows of expert e into q. */
static attn_status project_queries(attn_call *call, const moa *m, int64_t e)
{
    int64_t first = m->route.first[e], count = m->route.first[e + 1] - first, size = m->p->heads * m->d;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    float *x = attn_scratch_f32(call, count * (m->width + size)), *part = x + count * m->width;
    if (x == NULL) {
        return attn_fail_memory((size_t)(count * (m->width + size)) * sizeof(float));
    }
    gather(m->width, m->x, m->route.list + first, count, x);
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, count, m->width, size, x, m->w_q + e * size * m->width, NULL, part));
    for (int64_t h = 0; h < m->p->heads; h++) {
        float *to = m->q + rows_of(m, e, h) * m->d;
        for (int64_t r = 0; r < count; r++) {
            memcpy(to + r * m->d, part + r * size + h * m->d, (size_t)m->d * sizeof(float));
            turn(m, m->route.list[first + r] % m->n, 0, to + r * m->d);
        }
    }
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* The batch of heads for tokens [t0, t1); those with the same keys lie together. */
static attn_status list_heads(attn_call *call, moa *m, int64_t t0, int64_t t1)
{
    int64_t heads = m->p->heads, kv_heads = m->p->kv_heads, group = heads / kv_heads, all = m->batch * m->experts * heads, at = 0;
    attn_stairs_head *list = attn_arena_array(call->arena, (size_t)all, sizeof *list);
    int64_t *ends = attn_arena_array(call->arena, (size_t)m->route.first[m->experts], sizeof *ends);
    if (list == NULL || ends == NULL) {
        return attn_fail_memory((size_t)all * sizeof *list);
    }
    for (int64_t i = 0; i < m->route.first[m->experts]; i++) {
        ends[i] = m->p->causal ? m->route.list[i] % m->n + 1 : m->n;
    }
    for (int64_t i = 0; i < all; i++) {
        /* expert keys: (batch, expert, head); shared keys: (batch, key head, expert, head of the group) */
        int64_t b = i / (m->experts * heads), rest = i % (m->experts * heads), e = rest / heads, h = rest % heads;
        if (m->kv_sets == 1) {
            e = rest % (m->experts * group) / group;
            h = rest / (m->experts * group) * group + rest % group;
        }
        int64_t first = m->route.first[e], low = first, high;
        while (low < m->route.first[e + 1] && m->route.list[low] < b * m->n + t0) {
            low++;
        }
        for (high = low; high < m->route.first[e + 1] && m->route.list[high] < b * m->n + t1; high++) {
        }
        int64_t row = rows_of(m, e, h) + low - first, kv = (b * m->kv_sets + (m->kv_sets == 1 ? 0 : e)) * kv_heads + h / group;
        list[at++] = (attn_stairs_head){.rows = high - low, .kv = kv, .q = m->q + row * m->d, .end = ends + low,
                                        .k = m->k + kv * m->n * m->d, .v = m->v + kv * m->n * m->dv, .o = m->o + row * m->dv,
                                        .lse = m->lse + row};
    }
    m->stairs = (attn_stairs){m->p->causal ? t1 : m->n, m->d, m->dv, m->batch * m->kv_sets * kv_heads, all, m->scale, list};
    return ATTN_OK;
}

/* Routing, projections and attention: everything up to the output projection. */
static attn_status moa_attend(attn_call *call, moa *m)
{
    int64_t heads = m->p->heads, kv_rows = m->batch * m->kv_sets * m->p->kv_heads * m->n;
    m->route = (choice){.tokens = m->batch * m->n, .experts = m->experts, .chosen = m->p->top_k};
    ATTN_TRY(route(call, &m->route, m->width, m->x, m->w_router));
    int64_t rows = m->route.first[m->experts] * heads;
    m->k = attn_scratch_f32(call, kv_rows * m->d);
    m->v = attn_scratch_f32(call, kv_rows * m->dv);
    m->q = attn_scratch_f32(call, rows * m->d);
    m->o = attn_scratch_f32(call, rows * m->dv);
    m->lse = attn_scratch_f32(call, rows);
    if (m->k == NULL || m->v == NULL || m->q == NULL || m->o == NULL || m->lse == NULL) {
        return attn_fail_memory((size_t)(rows * (m->d + m->dv)) * sizeof(float));
    }
    if (m->p->rope_theta > 0) {
        ATTN_TRY(attn_rope_table(call->arena, 0, m->n, m->d, m->p->rope_theta, &m->table));
    }
    for (int64_t e = 0; e < m->experts; e++) {
        ATTN_TRY(project_queries(call, m, e));
    }
    int64_t step = m->p->decode ? 1 : m->n;
    for (int64_t t = 0; t < m->n; t += step) {
        ATTN_TRY(project_keys(call, m, t, t + step, m->w_k, m->d, 1, m->k));
        ATTN_TRY(project_keys(call, m, t, t + step, m->w_v, m->dv, 0, m->v));
        ATTN_TRY(list_heads(call, m, t, t + step));
        ATTN_TRY(attn_stairs_forward(&m->stairs, call->arena, call->threads));
    }
    return ATTN_OK;
}

/* The concatenated heads of expert e: rows [count][H*Dv], times the gates unless plain. */
static void concatenate(const moa *m, int64_t e, int plain, float *to)
{
    int64_t first = m->route.first[e], count = m->route.first[e + 1] - first, heads = m->p->heads;
    for (int64_t h = 0; h < heads; h++) {
        const float *from = m->o + rows_of(m, e, h) * m->dv;
        for (int64_t r = 0; r < count; r++) {
            float gate = plain ? 1.0f : m->route.p[m->route.slot[first + r]];
            for (int64_t c = 0; c < m->dv; c++) {
                to[(r * heads + h) * m->dv + c] = gate * from[r * m->dv + c];
            }
        }
    }
}

/* y [tokens, C] is added to. */
static attn_status moa_forward(attn_call *call, moa *m, float *y)
{
    ATTN_TRY(moa_attend(call, m));
    int64_t tokens = m->batch * m->n, size = m->p->heads * m->dv;
    float *rows = attn_scratch_f32(call, tokens * (size + m->width)), *part = rows + tokens * size;
    if (rows == NULL) {
        return attn_fail_memory((size_t)(tokens * (size + m->width)) * sizeof(float));
    }
    for (int64_t e = 0; e < m->experts; e++) {
        int64_t first = m->route.first[e], count = m->route.first[e + 1] - first;
        concatenate(m, e, 0, rows);
        ATTN_TRY(attn_linear_forward(call->arena, call->threads, count, size, m->width, rows, m->w_o + e * m->width * size, NULL, part));
        scatter_add(m->width, part, m->route.list + first, count, y);
    }
    return ATTN_OK;
}

static void write_choice(const choice *r, int applied, attn_tensor *gates, attn_tensor *indices)
{
    if (gates != NULL) {
        memcpy(gates->data, r->p, (size_t)(r->tokens * r->experts) * sizeof(float));
        for (int64_t i = 0; i < r->tokens * r->experts && applied && r->chosen > 0; i++) {
            attn_f32(gates)[i] = 0;
        }
        for (int64_t i = 0; i < r->first[r->experts] && applied && r->chosen > 0; i++) {
            attn_f32(gates)[r->slot[i]] = r->p[r->slot[i]];
        }
    }
    if (indices != NULL && r->chosen > 0) {
        memcpy(indices->data, r->indices, (size_t)(r->tokens * r->chosen) * sizeof(int64_t));
    }
}

typedef struct moa_gradients {
    float *x; /* added to, never NULL */
    float *w_router, *w_q, *w_k, *w_v, *w_o; /* added to; NULL: not wanted */
} moa_gradients;

/* grad_k or grad_v in their place [batch][sets][Hkv][n][size] back through the projection. */
static attn_status keys_back(attn_call *call, const moa *m, const float *w, int64_t size, int rotate, float *grad, float *grad_x,
                             float *grad_w)
{
    int64_t tokens = m->batch * m->n, heads = m->kv_sets * m->p->kv_heads;
    float *part = attn_scratch_f32(call, tokens * (heads * size + m->width));
    if (part == NULL) {
        return attn_fail_memory((size_t)(tokens * heads * size) * sizeof(float));
    }
    for (int64_t i = 0; i < tokens * heads; i++) {
        int64_t b = i / heads / m->n, t = i / heads % m->n;
        float *from = grad + ((b * heads + i % heads) * m->n + t) * size;
        if (rotate) {
            turn(m, t, 1, from);
        }
        memcpy(part + i * size, from, (size_t)size * sizeof(float));
    }
    float *part_x = part + tokens * heads * size;
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, tokens, m->width, heads * size, m->x, w, part, part_x, grad_w, NULL));
    for (int64_t i = 0; i < tokens * m->width; i++) {
        grad_x[i] += part_x[i];
    }
    return ATTN_OK;
}

static attn_status moa_backward(attn_call *call, moa *m, const float *grad_y, const float *grad_gates, const moa_gradients *to)
{
    ATTN_TRY(moa_attend(call, m));
    if (m->p->decode) {
        ATTN_TRY(list_heads(call, m, 0, m->n));
    }
    const choice *r = &m->route;
    int64_t heads = m->p->heads, tokens = r->tokens, size = heads * m->dv, rows = r->first[r->experts] * heads;
    int64_t kv_rows = m->batch * m->kv_sets * m->p->kv_heads * m->n, wide = attn_max_i64(size, heads * m->d);
    float *grad_o = attn_scratch_f32(call, rows * m->dv), *grad_q = attn_scratch_f32(call, rows * m->d);
    float *grad_k = attn_scratch_f32(call, kv_rows * m->d), *grad_v = attn_scratch_f32(call, kv_rows * m->dv);
    float *gy = attn_scratch_f32(call, 2 * tokens * m->width), *rows_x = gy + tokens * m->width;
    float *plain = attn_scratch_f32(call, tokens * wide);
    float *part = attn_scratch_f32(call, tokens * wide), *logits = attn_scratch_f32(call, tokens * r->experts);
    attn_stairs_gradient *gradients = attn_arena_array(call->arena, (size_t)m->stairs.head_count, sizeof *gradients);
    if (grad_o == NULL || grad_q == NULL || grad_k == NULL || grad_v == NULL || gy == NULL || plain == NULL || part == NULL ||
        logits == NULL || gradients == NULL) {
        return attn_fail_memory((size_t)(rows * (m->d + m->dv)) * sizeof(float));
    }
    memset(logits, 0, (size_t)(tokens * r->experts) * sizeof(float));
    for (int64_t e = 0; e < r->experts; e++) {
        int64_t first = r->first[e], count = r->first[e + 1] - first;
        const float *w = m->w_o + e * m->width * size;
        gather(m->width, grad_y, r->list + first, count, gy);
        ATTN_TRY(attn_linear_backward(call->arena, call->threads, count, size, m->width, NULL, w, gy, part, NULL, NULL));
        concatenate(m, e, 1, plain);
        for (int64_t i = 0; i < count; i++) {
            float gate = r->p[r->slot[first + i]];
            double sum = grad_gates != NULL ? (double)grad_gates[r->slot[first + i]] : 0;
            for (int64_t c = 0; c < size; c++) {
                sum += (double)plain[i * size + c] * (double)part[i * size + c];
                plain[i * size + c] *= gate;
                grad_o[(rows_of(m, e, c / m->dv) + i) * m->dv + c % m->dv] = gate * part[i * size + c];
            }
            logits[r->slot[first + i]] = (float)sum;
        }
        if (to->w_o != NULL) {
            ATTN_TRY(attn_linear_backward(call->arena, call->threads, count, size, m->width, plain, w, gy, NULL,
                                          to->w_o + e * m->width * size, NULL));
        }
    }
    for (int64_t i = 0; i < m->stairs.head_count; i++) {
        int64_t row = (m->stairs.heads[i].o - m->o) / m->dv;
        gradients[i] = (attn_stairs_gradient){.grad_o = grad_o + row * m->dv, .q = grad_q + row * m->d};
    }
    ATTN_TRY(attn_stairs_backward(&m->stairs, gradients, grad_k, grad_v, call->arena, call->threads));
    for (int64_t e = 0; e < r->experts; e++) {
        int64_t first = r->first[e], count = r->first[e + 1] - first, width = heads * m->d;
        for (int64_t i = 0; i < count * heads; i++) {
            float *from = grad_q + (rows_of(m, e, i % heads) + i / heads) * m->d;
            turn(m, r->list[first + i / heads] % m->n, 1, from);
            memcpy(part + i * m->d, from, (size_t)m->d * sizeof(float));
        }
        gather(m->width, m->x, r->list + first, count, rows_x);
        ATTN_TRY(attn_linear_backward(call->arena, call->threads, count, m->width, width, rows_x, m->w_q + e * width * m->width, part, gy,
                                      to->w_q != NULL ? to->w_q + e * width * m->width : NULL, NULL));
        scatter_add(m->width, gy, r->list + first, count, to->x);
    }
    ATTN_TRY(keys_back(call, m, m->w_k, m->d, 1, grad_k, to->x, to->w_k));
    ATTN_TRY(keys_back(call, m, m->w_v, m->dv, 0, grad_v, to->x, to->w_v));
    for (int64_t t = 0; t < tokens; t++) {
        attn_softmax_row_back(r->experts, r->p + t * r->experts, logits + t * r->experts);
    }
    return route_back(call, r, m->width, m->x, m->w_router, logits, to->x, to->w_router);
}

/* Fill m from tensors: x, router, w_q, w_k, w_v, w_o lie at ports first ... of the call, x apart. */
static attn_status moa_setup(const attn_call *call, const moa_params *p, int first, moa *m)
{
    const attn_tensor *const *t = (const attn_tensor *const *)call->t;
    int64_t rows_q = t[first + 1]->shape[1], rows_k = t[first + 2]->shape[1], rows_v = t[first + 3]->shape[1];
    *m = (moa){.p = p, .batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .width = attn_dim(call, "C"),
               .experts = attn_dim(call, "E"), .kv_sets = t[first + 2]->shape[0], .w_router = attn_f32(t[first]),
               .w_q = attn_f32(t[first + 1]), .w_k = attn_f32(t[first + 2]), .w_v = attn_f32(t[first + 3]),
               .w_o = attn_f32(t[first + 4])};
    if (p->heads % p->kv_heads != 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "heads = %lld is not a multiple of kv_heads = %lld", (long long)p->heads,
                         (long long)p->kv_heads);
    }
    if (rows_q % p->heads != 0 || rows_k % p->kv_heads != 0 || rows_v % p->kv_heads != 0) {
        return attn_fail(ATTN_ERR_SHAPE, "w_q, w_k and w_v have %lld, %lld and %lld rows per expert, expected multiples of %lld heads and "
                         "%lld key/value heads", (long long)rows_q, (long long)rows_k, (long long)rows_v, (long long)p->heads,
                         (long long)p->kv_heads);
    }
    m->d = rows_q / p->heads;
    m->dv = rows_v / p->kv_heads;
    if (rows_k != p->kv_heads * m->d) {
        return attn_fail(ATTN_ERR_SHAPE, "w_k has %lld rows per expert, expected kv_heads * D = %lld", (long long)rows_k,
                         (long long)(p->kv_heads * m->d));
    }
    if (t[first + 3]->shape[0] != m->kv_sets) {
        return attn_fail(ATTN_ERR_SHAPE, "w_k and w_v have leading sizes %lld and %lld, expected the same", (long long)m->kv_sets,
                         (long long)t[first + 3]->shape[0]);
    }
    if (t[first + 4]->shape[2] != p->heads * m->dv) {
        return attn_fail(ATTN_ERR_SHAPE, "w_o has %lld columns per expert, expected heads * Dv = %lld",
                         (long long)t[first + 4]->shape[2], (long long)(p->heads * m->dv));
    }
    if (m->d < 1 || m->dv < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "heads of size D = %lld and Dv = %lld, expected at least 1", (long long)m->d, (long long)m->dv);
    }
    if (p->rope_theta > 0 && m->d % 2 != 0) {
        return attn_fail(ATTN_ERR_SHAPE, "rope_theta = %g needs an even head size, D = %lld", p->rope_theta, (long long)m->d);
    }
    if (p->top_k > m->experts) {
        return attn_fail(ATTN_ERR_ARGUMENT, "top_k = %lld, expected at most E = %lld", (long long)p->top_k, (long long)m->experts);
    }
    if (p->decode && !p->causal) {
        return attn_fail(ATTN_ERR_ARGUMENT, "decode = true needs causal = true");
    }
    m->scale = attn_default_scale(p->scale, m->d);
    return ATTN_OK;
}

static void moa_cost(const moa *m, attn_cost *cost)
{
    double c = (double)m->width, tokens = (double)(m->batch * m->n), heads = (double)m->p->heads, e = (double)m->experts;
    double active = m->p->top_k > 0 ? (double)m->p->top_k : e, keys = m->p->causal ? (double)(m->n + 1) / 2 : (double)m->n;
    cost->pairs = tokens * active * heads * keys;
    cost->flops += 2 * cost->pairs * (double)(m->d + m->dv) +
                   2 * tokens * c * (e + active * heads * (double)(m->d + m->dv) +
                                     (double)(m->kv_sets * m->p->kv_heads) * (double)(m->d + m->dv));
}

#define MOA_ENTRIES(S, F)                                                                                                      \
    ATTN_P_INT("heads", S, F heads, NULL, 1, INFINITY, "query heads of each expert"),                                          \
    ATTN_P_INT("kv_heads", S, F kv_heads, NULL, 1, INFINITY, "key/value heads of each expert; divides heads"),                 \
    ATTN_P_BOOL("causal", S, F causal, "true", "tokens see only earlier ones and themselves"),                                 \
    ATTN_P_SCALE(S, F scale),                                                                                                  \
    ATTN_P_FLOAT("rope_theta", S, F rope_theta, "0", 0, INFINITY, "base of the rotary positions; 0: none"),                    \
    ATTN_P_CHOICE("rope_style", S, F rope_style, "half", "half|interleaved", "pairs (d, d + D/2) or (2d, 2d + 1)"),            \
    ATTN_P_BOOL("decode", S, F decode, "false", "run token by token with caches; the result is the same")

static const attn_param_info moa_param_table[] = {
    MOA_ENTRIES(moa_params, ),
    ATTN_P_INT("top_k", moa_params, top_k, "0", 0, INFINITY, "0: every expert for every token; else only the best top_k"),
};

enum { A_X, A_W_ROUTER, A_W_Q, A_W_K, A_W_V, A_W_O, A_Y, A_GATES, A_INDICES };

static const attn_port_info moa_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "normalised layer input"),
    ATTN_IN("w_router", "E,C", FLOAT, DIFF, "router"),
    ATTN_IN("w_q", "E,*,C", FLOAT, DIFF, "query projections [E, heads*D, C]"),
    ATTN_IN("w_k", "1|E,*,C", FLOAT, DIFF, "key projections [E or 1, kv_heads*D, C]; 1: shared by the experts"),
    ATTN_IN("w_v", "1|E,*,C", FLOAT, DIFF, "value projections [E or 1, kv_heads*Dv, C]"),
    ATTN_IN("w_o", "E,C,*", FLOAT, DIFF, "output projections [E, C, heads*Dv]"),
    ATTN_OUT("y", "B,N,C", FLOAT, DIFF, "the mixture"),
    ATTN_OUT("gates", "B,N,E", FLOAT, DIFF, "weight of each expert; 0 when it was not chosen"),
    ATTN_OUT("indices", "B,N,K", INT, ATTN_PORT_OPTIONAL, "chosen experts, best first, with top_k > 0"),
};

static attn_status bam_moa_bind(attn_call *call)
{
    const moa_params *p = call->params;
    moa m;
    attn_set_dim(call, "K", p->top_k);
    if (p->top_k == 0) {
        attn_drop_output(call, A_INDICES);
    }
    return moa_setup(call, p, A_W_ROUTER, &m);
}

static attn_status bam_moa_forward(attn_call *call)
{
    moa m;
    ATTN_TRY(moa_setup(call, call->params, A_W_ROUTER, &m));
    m.x = attn_f32(call->t[A_X]);
    float *y = attn_f32(call->t[A_Y]);
    memset(y, 0, (size_t)(m.batch * m.n * m.width) * sizeof *y);
    ATTN_TRY(moa_forward(call, &m, y));
    write_choice(&m.route, 1, call->t[A_GATES], call->t[A_INDICES]);
    return ATTN_OK;
}

/* A gradient's memory, or zeroed scratch when nobody wants it (or it is not given); NULL when memory is short. */
static float *gradient_or_scratch(attn_call *call, const attn_tensor *grad, int64_t count)
{
    if (grad != NULL) {
        return attn_f32(grad);
    }
    float *scratch = attn_scratch_f32(call, count);
    if (scratch != NULL) {
        memset(scratch, 0, (size_t)count * sizeof *scratch);
    }
    return scratch;
}

static attn_status bam_moa_backward(attn_call *call)
{
    moa m;
    ATTN_TRY(moa_setup(call, call->params, A_W_ROUTER, &m));
    m.x = attn_f32(call->t[A_X]);
    int64_t count = m.batch * m.n * m.width;
    float *grad_x = gradient_or_scratch(call, call->grad[A_X], count), *grad_y = gradient_or_scratch(call, call->grad[A_Y], count);
    if (grad_x == NULL || grad_y == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    moa_gradients to = {grad_x, attn_f32(call->grad[A_W_ROUTER]), attn_f32(call->grad[A_W_Q]), attn_f32(call->grad[A_W_K]),
                        attn_f32(call->grad[A_W_V]), attn_f32(call->grad[A_W_O])};
    return moa_backward(call, &m, grad_y, attn_f32(call->grad[A_GATES]), &to);
}

static attn_status bam_moa_cost(attn_call *call, attn_cost *cost)
{
    moa m;
    ATTN_TRY(moa_setup(call, call->params, A_W_ROUTER, &m));
    moa_cost(&m, cost);
    return ATTN_OK;
}

const attn_op_class attn_op_bam_moa = {
    .info = {.name = "bam.moa",
             .title = "Mixture of attention experts",
             .summary = "Every expert is a whole multi-head attention layer; a router's softmax weighs their outputs. In soft routing (top_k = "
                        "0) all experts run, as one batch of heads; with top_k > 0 queries and outputs of the others are not computed. "
                        "Keys and values belong to the experts or are shared by them, which saves memory.",
             .paper = "arXiv:2408.08274",
             .differentiable = 1,
             ATTN_TABLE(moa_param_table, moa_ports)},
    .params_size = sizeof(moa_params),
    .bind = bam_moa_bind,
    .forward = bam_moa_forward,
    .backward = bam_moa_backward,
    .cost = bam_moa_cost,
};

/* ---- Sparse feed-forward experts ---- */

typedef struct ffn_experts {
    int64_t tokens, width, experts, hidden, chosen;
    const float *x, *w_router, *w_up, *w_down;
    choice route;
} ffn_experts;

static attn_status ffn_setup(const attn_call *call, int first, int64_t chosen, ffn_experts *f)
{
    const attn_tensor *up = call->t[first + 1], *down = call->t[first + 2];
    *f = (ffn_experts){.tokens = attn_dim(call, "B") * attn_dim(call, "N"), .width = attn_dim(call, "C"), .experts = attn_dim(call, "E"),
                       .hidden = down->shape[2], .chosen = chosen, .w_router = attn_f32(call->t[first]), .w_up = attn_f32(up),
                       .w_down = attn_f32(down)};
    if (up->shape[1] != 2 * f->hidden) {
        return attn_fail(ATTN_ERR_SHAPE, "w_up has %lld rows per expert, expected 2F = %lld", (long long)up->shape[1],
                         (long long)(2 * f->hidden));
    }
    if (chosen > f->experts) {
        return attn_fail(ATTN_ERR_ARGUMENT, "top_k = %lld of the feed-forward experts, expected 1 ... E = %lld", (long long)chosen,
                         (long long)f->experts);
    }
    return ATTN_OK;
}

static attn_ffn expert_at(const ffn_experts *f, int64_t e)
{
    return (attn_ffn){.in = f->width, .hidden = f->hidden, .out = f->width, .activation = ATTN_ACTIVATION_SILU, .gated = 1,
                      .up = f->w_up + e * 2 * f->hidden * f->width, .down = f->w_down + e * f->width * f->hidden};
}

static attn_status ffn_route(attn_call *call, ffn_experts *f)
{
    f->route = (choice){.tokens = f->tokens, .experts = f->experts, .chosen = f->chosen};
    return route(call, &f->route, f->width, f->x, f->w_router);
}

static attn_status ffn_forward(attn_call *call, ffn_experts *f, float *y, float *lb_loss, float *z_loss)
{
    ATTN_TRY(ffn_route(call, f));
    const choice *r = &f->route;
    float *x = attn_scratch_f32(call, 2 * f->tokens * f->width), *part = x + f->tokens * f->width;
    double balance = 0, z = 0, tokens = (double)f->tokens;
    if (x == NULL) {
        return attn_fail_memory((size_t)(2 * f->tokens * f->width) * sizeof(float));
    }
    for (int64_t e = 0; e < f->experts; e++) {
        int64_t first = r->first[e], count = r->first[e + 1] - first;
        attn_ffn expert = expert_at(f, e);
        double probability = 0;
        for (int64_t t = 0; t < f->tokens; t++) {
            probability += (double)r->p[t * f->experts + e];
        }
        balance += probability * (double)count;
        if (count == 0) {
            continue;
        }
        gather(f->width, f->x, r->list + first, count, x);
        ATTN_TRY(attn_ffn_forward(&expert, call->arena, call->threads, count, x, part));
        for (int64_t i = 0; i < count * f->width; i++) {
            part[i] *= r->p[r->slot[first + i / f->width]];
        }
        scatter_add(f->width, part, r->list + first, count, y);
    }
    for (int64_t t = 0; t < f->tokens; t++) {
        z += r->lse[t] * r->lse[t];
    }
    *lb_loss = f->tokens > 0 ? (float)((double)f->experts * balance / (tokens * tokens)) : 0.0f;
    *z_loss = f->tokens > 0 ? (float)(z / tokens) : 0.0f;
    return ATTN_OK;
}

typedef struct ffn_gradients {
    const float *y, *gates; /* incoming; gates may be NULL */
    double lb_loss, z_loss;
    float *x; /* added to, never NULL */
    float *w_router, *w_up, *w_down;
} ffn_gradients;

static attn_status ffn_backward(attn_call *call, ffn_experts *f, const ffn_gradients *g)
{
    ATTN_TRY(ffn_route(call, f));
    const choice *r = &f->route;
    int64_t size = f->tokens * f->width;
    float *x = attn_scratch_f32(call, 4 * size), *out = x + size, *gy = out + size, *gx = gy + size;
    float *logits = attn_scratch_f32(call, f->tokens * f->experts);
    double tokens = (double)f->tokens;
    if (x == NULL || logits == NULL) {
        return attn_fail_memory((size_t)(4 * size) * sizeof(float));
    }
    for (int64_t e = 0; e < f->experts; e++) {
        int64_t first = r->first[e], count = r->first[e + 1] - first, up = 2 * f->hidden * f->width, down = f->width * f->hidden;
        attn_ffn expert = expert_at(f, e);
        for (int64_t t = 0; t < f->tokens; t++) {
            int64_t at = t * f->experts + e;
            logits[at] = (float)((g->gates != NULL ? (double)g->gates[at] : 0) +
                                 g->lb_loss * (double)f->experts * (double)count / (tokens * tokens));
        }
        if (count == 0) {
            continue;
        }
        gather(f->width, f->x, r->list + first, count, x);
        gather(f->width, g->y, r->list + first, count, gy);
        ATTN_TRY(attn_ffn_forward(&expert, call->arena, call->threads, count, x, out));
        for (int64_t i = 0; i < count; i++) {
            double sum = 0;
            for (int64_t c = 0; c < f->width; c++) {
                sum += (double)gy[i * f->width + c] * (double)out[i * f->width + c];
                gy[i * f->width + c] *= r->p[r->slot[first + i]];
            }
            logits[r->slot[first + i]] += (float)sum;
        }
        ATTN_TRY(attn_ffn_backward(&expert, call->arena, call->threads, count, x, gy, gx, g->w_up != NULL ? g->w_up + e * up : NULL, NULL,
                                   g->w_down != NULL ? g->w_down + e * down : NULL, NULL));
        scatter_add(f->width, gx, r->list + first, count, g->x);
    }
    for (int64_t t = 0; t < f->tokens; t++) {
        const float *p = r->p + t * f->experts;
        attn_softmax_row_back(f->experts, p, logits + t * f->experts);
        for (int64_t e = 0; e < f->experts; e++) {
            logits[t * f->experts + e] += (float)(2 * g->z_loss * r->lse[t] * (double)p[e] / tokens);
        }
    }
    return route_back(call, r, f->width, f->x, f->w_router, logits, g->x, g->w_router);
}

static double scalar(const attn_tensor *t) { return t != NULL ? (double)attn_f32(t)[0] : 0; }

typedef struct ffn_params {
    int64_t top_k;
} ffn_params;

static const attn_param_info ffn_param_table[] = {
    ATTN_P_INT("top_k", ffn_params, top_k, "1", 1, INFINITY, "experts per token"),
};

enum { F_X, F_W_ROUTER, F_W_UP, F_W_DOWN, F_Y, F_GATES, F_INDICES, F_LB_LOSS, F_Z_LOSS };

static const attn_port_info ffn_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "normalised layer input"),
    ATTN_IN("w_router", "E,C", FLOAT, DIFF, "router"),
    ATTN_IN("w_up", "E,*,C", FLOAT, DIFF, "[E, 2F, C]: F rows of the gate, then F of the linear part"),
    ATTN_IN("w_down", "E,C,F", FLOAT, DIFF, "output projections"),
    ATTN_OUT("y", "B,N,C", FLOAT, DIFF, "the mixture"),
    ATTN_OUT("gates", "B,N,E", FLOAT, DIFF, "the full softmax of the router"),
    ATTN_OUT("indices", "B,N,K", INT, 0, "chosen experts, best first"),
    ATTN_OUT("lb_loss", "1", FLOAT, DIFF, "load balance"),
    ATTN_OUT("z_loss", "1", FLOAT, DIFF, "mean square of the router's log-sum-exp"),
};

static attn_status bam_ffn_bind(attn_call *call)
{
    const ffn_params *p = call->params;
    ffn_experts f;
    attn_set_dim(call, "K", p->top_k);
    return ffn_setup(call, F_W_ROUTER, p->top_k, &f);
}

static attn_status bam_ffn_forward(attn_call *call)
{
    const ffn_params *p = call->params;
    ffn_experts f;
    ATTN_TRY(ffn_setup(call, F_W_ROUTER, p->top_k, &f));
    f.x = attn_f32(call->t[F_X]);
    float *y = attn_f32(call->t[F_Y]);
    memset(y, 0, (size_t)(f.tokens * f.width) * sizeof *y);
    ATTN_TRY(ffn_forward(call, &f, y, attn_f32(call->t[F_LB_LOSS]), attn_f32(call->t[F_Z_LOSS])));
    write_choice(&f.route, 0, call->t[F_GATES], call->t[F_INDICES]);
    return ATTN_OK;
}

static attn_status bam_ffn_backward(attn_call *call)
{
    const ffn_params *p = call->params;
    ffn_experts f;
    ATTN_TRY(ffn_setup(call, F_W_ROUTER, p->top_k, &f));
    f.x = attn_f32(call->t[F_X]);
    int64_t count = f.tokens * f.width;
    float *grad_x = gradient_or_scratch(call, call->grad[F_X], count), *grad_y = gradient_or_scratch(call, call->grad[F_Y], count);
    if (grad_x == NULL || grad_y == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    ffn_gradients g = {grad_y, attn_f32(call->grad[F_GATES]), scalar(call->grad[F_LB_LOSS]), scalar(call->grad[F_Z_LOSS]), grad_x,
                       attn_f32(call->grad[F_W_ROUTER]), attn_f32(call->grad[F_W_UP]), attn_f32(call->grad[F_W_DOWN])};
    return ffn_backward(call, &f, &g);
}

static double ffn_flops(const ffn_experts *f)
{
    return 2 * (double)f->tokens * (double)f->width * ((double)f->experts + 3 * (double)f->chosen * (double)f->hidden);
}

static attn_status bam_ffn_cost(attn_call *call, attn_cost *cost)
{
    const ffn_params *p = call->params;
    ffn_experts f;
    ATTN_TRY(ffn_setup(call, F_W_ROUTER, p->top_k, &f));
    cost->flops = ffn_flops(&f);
    return ATTN_OK;
}

const attn_op_class attn_op_bam_ffn = {
    .info = {.name = "bam.ffn",
             .title = "Sparse mixture of gated feed-forward experts",
             .summary = "Each token goes through its top_k experts (gated SiLU layers), weighed by the router's softmax without "
                        "renormalisation. Only chosen experts compute; the losses keep the router balanced and its logits small.",
             .paper = "arXiv:2408.08274",
             .differentiable = 1,
             ATTN_TABLE(ffn_param_table, ffn_ports)},
    .params_size = sizeof(ffn_params),
    .bind = bam_ffn_bind,
    .forward = bam_ffn_forward,
    .backward = bam_ffn_backward,
    .cost = bam_ffn_cost,
};

/* ---- The parallel block ---- */

typedef struct bam_params {
    moa_params attn; /* its top_k is attn_top_k */
    int64_t ffn_top_k;
    double eps;
} bam_params;

static const attn_param_info bam_param_table[] = {
    MOA_ENTRIES(bam_params, attn.),
    ATTN_P_INT("attn_top_k", bam_params, attn.top_k, "0", 0, INFINITY, "attention experts per token; 0: all"),
    ATTN_P_INT("ffn_top_k", bam_params, ffn_top_k, "1", 1, INFINITY, "feed-forward experts per token"),
    ATTN_P_FLOAT("eps", bam_params, eps, "1e-5", 0, INFINITY, "added to the variance of the layer norm"),
};

enum { X, LN_W, W_ROUTER_ATTN, W_Q, W_K, W_V, W_O, W_ROUTER_FFN, W_UP, W_DOWN,
       Y, ATTN_GATES, ATTN_INDICES, FFN_GATES, FFN_INDICES, LB_LOSS, Z_LOSS };

static const attn_port_info bam_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "layer input"),
    ATTN_IN("ln_w", "C", FLOAT, DIFF, "weight of the layer norm"),
    ATTN_IN("w_router_attn", "E,C", FLOAT, DIFF, "router of the attention experts"),
    ATTN_IN("w_q", "E,*,C", FLOAT, DIFF, "as in bam.moa"),
    ATTN_IN("w_k", "1|E,*,C", FLOAT, DIFF, "as in bam.moa"),
    ATTN_IN("w_v", "1|E,*,C", FLOAT, DIFF, "as in bam.moa"),
    ATTN_IN("w_o", "E,C,*", FLOAT, DIFF, "as in bam.moa"),
    ATTN_IN("w_router_ffn", "E,C", FLOAT, DIFF, "router of the feed-forward experts"),
    ATTN_IN("w_up", "E,*,C", FLOAT, DIFF, "as in bam.ffn"),
    ATTN_IN("w_down", "E,C,F", FLOAT, DIFF, "as in bam.ffn"),
    ATTN_OUT("y", "B,N,C", FLOAT, DIFF, "x + attention experts + feed-forward experts"),
    ATTN_OUT("attn_gates", "B,N,E", FLOAT, DIFF, "weights of the attention experts"),
    ATTN_OUT("attn_indices", "B,N,Ka", INT, ATTN_PORT_OPTIONAL, "chosen attention experts, with attn_top_k > 0"),
    ATTN_OUT("ffn_gates", "B,N,E", FLOAT, DIFF, "full softmax of the feed-forward router"),
    ATTN_OUT("ffn_indices", "B,N,Kf", INT, 0, "chosen feed-forward experts"),
    ATTN_OUT("lb_loss", "1", FLOAT, DIFF, "load balance of the feed-forward router"),
    ATTN_OUT("z_loss", "1", FLOAT, DIFF, "z loss of the feed-forward router"),
};

static attn_status bam_setup(const attn_call *call, moa *m, ffn_experts *f)
{
    const bam_params *p = call->params;
    ATTN_TRY(moa_setup(call, &p->attn, W_ROUTER_ATTN, m));
    return ffn_setup(call, W_ROUTER_FFN, p->ffn_top_k, f);
}

static attn_status bam_bind(attn_call *call)
{
    const bam_params *p = call->params;
    moa m;
    ffn_experts f;
    attn_set_dim(call, "Ka", p->attn.top_k);
    attn_set_dim(call, "Kf", p->ffn_top_k);
    if (p->attn.top_k == 0) {
        attn_drop_output(call, ATTN_INDICES);
    }
    return bam_setup(call, &m, &f);
}

/* The normalised input both parts read. */
static attn_status normalise(attn_call *call, moa *m, ffn_experts *f)
{
    const bam_params *p = call->params;
    float *z = attn_scratch_f32(call, f->tokens * f->width);
    if (z == NULL) {
        return attn_fail_memory((size_t)(f->tokens * f->width) * sizeof(float));
    }
    attn_norm_forward(ATTN_NORM_LAYER, call->threads, f->tokens, f->width, p->eps, attn_f32(call->t[X]), attn_f32(call->t[LN_W]), NULL, z);
    m->x = f->x = z;
    return ATTN_OK;
}

static attn_status bam_forward(attn_call *call)
{
    moa m;
    ffn_experts f;
    ATTN_TRY(bam_setup(call, &m, &f));
    ATTN_TRY(normalise(call, &m, &f));
    float *y = attn_f32(call->t[Y]);
    memcpy(y, call->t[X]->data, (size_t)(f.tokens * f.width) * sizeof *y);
    ATTN_TRY(moa_forward(call, &m, y));
    ATTN_TRY(ffn_forward(call, &f, y, attn_f32(call->t[LB_LOSS]), attn_f32(call->t[Z_LOSS])));
    write_choice(&m.route, 1, call->t[ATTN_GATES], call->t[ATTN_INDICES]);
    write_choice(&f.route, 0, call->t[FFN_GATES], call->t[FFN_INDICES]);
    return ATTN_OK;
}

static attn_status bam_backward(attn_call *call)
{
    const bam_params *p = call->params;
    moa m;
    ffn_experts f;
    ATTN_TRY(bam_setup(call, &m, &f));
    ATTN_TRY(normalise(call, &m, &f));
    int64_t count = f.tokens * f.width;
    float *grad_z = gradient_or_scratch(call, NULL, count), *grad_y = gradient_or_scratch(call, call->grad[Y], count);
    if (grad_z == NULL || grad_y == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    moa_gradients to = {grad_z, attn_f32(call->grad[W_ROUTER_ATTN]), attn_f32(call->grad[W_Q]), attn_f32(call->grad[W_K]),
                        attn_f32(call->grad[W_V]), attn_f32(call->grad[W_O])};
    ffn_gradients g = {grad_y, attn_f32(call->grad[FFN_GATES]), scalar(call->grad[LB_LOSS]), scalar(call->grad[Z_LOSS]), grad_z,
                       attn_f32(call->grad[W_ROUTER_FFN]), attn_f32(call->grad[W_UP]), attn_f32(call->grad[W_DOWN])};
    ATTN_TRY(moa_backward(call, &m, grad_y, attn_f32(call->grad[ATTN_GATES]), &to));
    ATTN_TRY(ffn_backward(call, &f, &g));
    float *grad_x = attn_f32(call->grad[X]);
    ATTN_TRY(attn_norm_backward(ATTN_NORM_LAYER, call->arena, call->threads, f.tokens, f.width, p->eps, attn_f32(call->t[X]),
                                attn_f32(call->t[LN_W]), grad_z, grad_x, attn_f32(call->grad[LN_W]), NULL));
    for (int64_t i = 0; i < count && grad_x != NULL; i++) {
        grad_x[i] += grad_y[i];
    }
    return ATTN_OK;
}

static attn_status bam_cost(attn_call *call, attn_cost *cost)
{
    moa m;
    ffn_experts f;
    ATTN_TRY(bam_setup(call, &m, &f));
    moa_cost(&m, cost);
    cost->flops += ffn_flops(&f);
    return ATTN_OK;
}

const attn_op_class attn_op_bam = {
    .info = {.name = "bam",
             .title = "Branch-Attend-Mix: a parallel block of attention and feed-forward experts",
             .summary = "One model out of several specialised ones: y = x + mixture of attention experts + sparse feed-forward experts, both of "
                        "the layer-normalised input. Attention is soft (every expert runs, E times the cost of one), the feed-forward part runs "
                        "ffn_top_k experts per token.",
             .paper = "arXiv:2408.08274",
             .differentiable = 1,
             ATTN_TABLE(bam_param_table, bam_ports)},
    .params_size = sizeof(bam_params),
    .bind = bam_bind,
    .forward = bam_forward,
    .backward = bam_backward,
    .cost = bam_cost,
};

/* ---- Parameters of the mixture ---- */

typedef struct upcycle_params {
    int64_t kv;
} upcycle_params;

static const attn_param_info upcycle_param_table[] = {
    ATTN_P_CHOICE("kv", upcycle_params, kv, "expert", "expert|shared", "expert: each keeps its key and value projections; shared: averaged"),
};

enum { U_INPUTS = 8, U_W_K = 3, U_W_V = 4 };

static const attn_port_info upcycle_ports[] = {
    ATTN_IN("ln_w", "E,C", FLOAT, 0, "layer norm weights of the dense models"),
    ATTN_IN("emb", "E,V,C", FLOAT, 0, "embeddings"),
    ATTN_IN("w_q", "E,Rq,C", FLOAT, 0, "query projections"),
    ATTN_IN("w_k", "E,Rk,C", FLOAT, 0, "key projections"),
    ATTN_IN("w_v", "E,Rv,C", FLOAT, 0, "value projections"),
    ATTN_IN("w_o", "E,C,Ro", FLOAT, 0, "output projections"),
    ATTN_IN("w_up", "E,Ru,C", FLOAT, 0, "feed-forward up projections"),
    ATTN_IN("w_down", "E,C,F", FLOAT, 0, "feed-forward down projections"),
    ATTN_OUT("ln_w", "C", FLOAT, 0, "the average"),
    ATTN_OUT("emb", "V,C", FLOAT, 0, "the average"),
    ATTN_OUT("w_q", "E,Rq,C", FLOAT, 0, "the experts'"),
    ATTN_OUT("w_k", "Ekv,Rk,C", FLOAT, 0, "the experts' or their average"),
    ATTN_OUT("w_v", "Ekv,Rv,C", FLOAT, 0, "the experts' or their average"),
    ATTN_OUT("w_o", "E,C,Ro", FLOAT, 0, "the experts'"),
    ATTN_OUT("w_up", "E,Ru,C", FLOAT, 0, "the experts'"),
    ATTN_OUT("w_down", "E,C,F", FLOAT, 0, "the experts'"),
};

static attn_status upcycle_bind(attn_call *call)
{
    const upcycle_params *p = call->params;
    if (attn_dim(call, "E") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "there are no models to combine: E = 0");
    }
    attn_set_dim(call, "Ekv", p->kv == 1 ? 1 : attn_dim(call, "E"));
    return ATTN_OK;
}

static attn_status upcycle_forward(attn_call *call)
{
    const upcycle_params *p = call->params;
    int64_t experts = attn_dim(call, "E");
    for (int port = 0; port < U_INPUTS; port++) {
        const float *from = attn_f32(call->t[port]);
        float *to = attn_f32(call->t[U_INPUTS + port]);
        int64_t count = attn_tensor_count(call->t[port]);
        if (port > 1 && !(p->kv == 1 && (port == U_W_K || port == U_W_V))) {
            memcpy(to, from, (size_t)count * sizeof *to);
            continue;
        }
        for (int64_t i = 0; i < attn_tensor_count(call->t[U_INPUTS + port]); i++) {
            double sum = 0;
            for (int64_t e = 0; e < experts; e++) {
                sum += (double)from[e * (count / experts) + i];
            }
            to[i] = (float)(sum / (double)experts);
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_bam_upcycle = {
    .info = {.name = "bam.upcycle",
             .title = "Parameters of a Branch-Attend-Mix block from dense models",
             .summary = "Copies the experts' projections, averages norms and embeddings and, with kv = shared, keys and values. Routers are "
                        "left to random initialisation.",
             .paper = "arXiv:2408.08274",
             ATTN_TABLE(upcycle_param_table, upcycle_ports)},
    .params_size = sizeof(upcycle_params),
    .bind = upcycle_bind,
    .forward = upcycle_forward,
};
