/* Mixture of attention experts (arXiv:2408.08274), bam.moa: every expert is a whole multi-head layer. The projections of an expert are one
 * product over the list of its tokens, and the heads of all experts are one batch of attention heads. Keys and values exist for every
 * token. */
#include "op/bam.h"

#include "layer/heads.h"
#include "layer/linear.h"
#include "layer/rope.h"

#include <string.h>

/* Where head h of expert e has its rows: they begin at this row of q, o and lse. */
static int64_t rows_of(const bam_moa *m, int64_t e, int64_t h)
{
    return m->route.lists.first[e] * m->p->heads + h * bam_count(&m->route, e);
}

/* The heads of expert e's rows [count][H*size], which q (and o) have one after the other. */
static attn_head_rows heads_of(const bam_moa *m, int64_t e, int64_t size)
{
    return (attn_head_rows){1, bam_count(&m->route, e), m->p->heads, size, m->p->heads * size, 0};
}

static attn_head_rows key_heads(const bam_moa *m, int64_t size)
{
    int64_t heads = m->kv_sets * m->p->kv_heads;
    return (attn_head_rows){m->batch, m->n, heads, size, heads * size, 0};
}

static void turn(const bam_moa *m, int64_t position, int inverse, float *x)
{
    if (m->table != NULL) {
        attn_rope_apply(m->table + position * m->d, m->d, m->p->rope_style == 1, inverse, x);
    }
}

static void turn_keys(const attn_call *call, const bam_moa *m, int inverse, float *k)
{
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < m->batch * m->kv_sets * m->p->kv_heads * m->n; i++) {
        turn(m, i % m->n, inverse, k + i * m->d);
    }
}

static void turn_queries(const attn_call *call, const bam_moa *m, int64_t e, int inverse, float *q)
{
    int64_t count = bam_count(&m->route, e);
    float *rows = q + rows_of(m, e, 0) * m->d;
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < count * m->p->heads; i++) {
        turn(m, bam_list(&m->route, e)[i % count] % m->n, inverse, rows + i * m->d);
    }
}

/* Keys (or values) of token t of each batch item into their place. */
static attn_status project_token(attn_call *call, const bam_moa *m, int64_t t, const float *w, int64_t size, int rotate, float *to)
{
    int64_t heads = m->kv_sets * m->p->kv_heads;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    float *rows;
    ATTN_TRY(attn_take_f32(call, heads * size, &rows));
    for (int64_t b = 0; b < m->batch; b++) {
        const float *x = m->x + (b * m->n + t) * m->width;
        ATTN_TRY(attn_linear_forward(call->arena, call->threads, 1, m->width, heads * size, x, w, NULL, rows));
        for (int64_t h = 0; h < heads; h++) {
            float *place = to + ((b * heads + h) * m->n + t) * size;
            memcpy(place, rows + h * size, (size_t)size * sizeof *rows);
            if (rotate) {
                turn(m, t, 0, place);
            }
        }
    }
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* Queries of the rows of expert e into q. */
static attn_status project_queries(attn_call *call, const bam_moa *m, int64_t e)
{
    int64_t all = bam_count(&m->route, e), size = m->p->heads * m->d, most = attn_min_i64(ATTN_LINEAR_SPAN, all);
    attn_head_rows heads = heads_of(m, e, m->d);
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    float *part, *x;
    ATTN_TRY(attn_take_f32(call, most * size, &part));
    ATTN_TRY(attn_take_f32(call, most * m->width, &x));
    for (int64_t first = 0, count; first < all; first += count) {
        count = attn_min_i64(ATTN_LINEAR_SPAN, all - first);
        attn_rows_gather(call->threads, m->width, m->x, bam_list(&m->route, e) + first, count, x);
        ATTN_TRY(attn_linear_forward(call->arena, call->threads, count, m->width, size, x, m->w_q + e * size * m->width, NULL, part));
        attn_heads_split_some(&heads, call->threads, first, count, part, m->q + rows_of(m, e, 0) * m->d);
    }
    turn_queries(call, m, e, 0, m->q);
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* The batch of heads for all tokens; those with the same keys lie together. */
static attn_status list_heads(attn_call *call, bam_moa *m)
{
    int64_t heads = m->p->heads, kv_heads = m->p->kv_heads, group = heads / kv_heads, all = m->batch * m->experts * heads;
    int64_t pairs = m->route.lists.first[m->experts];
    attn_stairs_head *list = attn_arena_array(call->arena, (size_t)all, sizeof *list);
    int64_t *ends = attn_arena_array(call->arena, (size_t)pairs, sizeof *ends);
    int64_t *begin = attn_arena_array(call->arena, (size_t)m->experts, (size_t)(m->batch + 1) * sizeof *begin);
    if (list == NULL || ends == NULL || begin == NULL) {
        return attn_fail_memory((size_t)all * sizeof *list);
    }
    for (int64_t i = 0; i < pairs; i++) {
        ends[i] = m->p->causal ? m->route.lists.token[i] % m->n + 1 : m->n;
    }
    for (int64_t e = 0; e < m->experts; e++) { /* where the batch items begin in the expert's list */
        for (int64_t b = 0, at = 0; b <= m->batch; b++) {
            while (at < bam_count(&m->route, e) && bam_list(&m->route, e)[at] < b * m->n) {
                at++;
            }
            begin[e * (m->batch + 1) + b] = at;
        }
    }
    for (int64_t i = 0; i < all; i++) {
        /* expert keys: (batch, expert, head); shared keys: (batch, key head, expert, head of the group) */
        int64_t b = i / (m->experts * heads), rest = i % (m->experts * heads), e = rest / heads, h = rest % heads;
        if (m->kv_sets == 1) {
            e = rest % (m->experts * group) / group;
            h = rest / (m->experts * group) * group + rest % group;
        }
        int64_t low = begin[e * (m->batch + 1) + b], high = begin[e * (m->batch + 1) + b + 1], row = rows_of(m, e, h) + low;
        int64_t kv = (b * m->kv_sets + (m->kv_sets == 1 ? 0 : e)) * kv_heads + h / group;
        list[i] = (attn_stairs_head){.rows = high - low, .kv = kv, .q = m->q + row * m->d, .end = ends + m->route.lists.first[e] + low,
                                     .k = m->k + kv * m->n * m->d, .v = m->v + kv * m->n * m->dv, .o = m->o + row * m->dv,
                                     .lse = m->lse + row};
    }
    m->stairs = (attn_stairs){.keys = m->n, .d = m->d, .dv = m->dv, .kv_count = m->batch * m->kv_sets * kv_heads, .head_count = all, .scale = m->scale, .heads = list};
    return ATTN_OK;
}

static attn_status decode(attn_call *call, const bam_moa *m)
{
    attn_stairs_head *step = attn_arena_array(call->arena, (size_t)m->stairs.head_count, sizeof *step);
    if (step == NULL) {
        return attn_fail_memory((size_t)m->stairs.head_count * sizeof *step);
    }
    attn_stairs_steps steps = attn_stairs_steps_begin(&m->stairs, step);
    for (int64_t t = 0; t < m->n; t++) {
        ATTN_TRY(project_token(call, m, t, m->w_k, m->d, 1, m->k));
        ATTN_TRY(project_token(call, m, t, m->w_v, m->dv, 0, m->v));
        /* Causal: the row of token t is the one that sees t + 1 keys. */
        ATTN_TRY(attn_stairs_steps_next(&steps, t + 1, call->arena, call->threads));
    }
    return ATTN_OK;
}

/* Routing, projections and attention: everything up to the output projection. keep: the queries, too; else outputs may take their place. */
static attn_status attend(attn_call *call, bam_moa *m, int keep)
{
    attn_head_rows k_heads = key_heads(m, m->d), v_heads = key_heads(m, m->dv);
    int64_t kv_rows = m->batch * m->kv_sets * m->p->kv_heads * m->n;
    m->route = (bam_choice){.tokens = m->batch * m->n, .experts = m->experts, .chosen = m->p->top_k};
    ATTN_TRY(attn_bam_route(call, &m->route, m->width, m->x, m->w_router));
    int64_t rows = m->route.lists.first[m->experts] * m->p->heads;
    ATTN_TRY(attn_take_f32(call, kv_rows * m->d, &m->k));
    ATTN_TRY(attn_take_f32(call, kv_rows * m->dv, &m->v));
    ATTN_TRY(attn_take_f32(call, rows * m->d, &m->q));
    m->o = m->q;
    if (keep || m->d != m->dv) {
        ATTN_TRY(attn_take_f32(call, rows * m->dv, &m->o));
    }
    ATTN_TRY(attn_take_f32(call, rows, &m->lse));
    if (m->p->rope_theta > 0) {
        ATTN_TRY(attn_rope_table(call->arena, 0, m->n, m->d, m->p->rope_theta, &m->table));
    }
    for (int64_t e = 0; e < m->experts; e++) {
        ATTN_TRY(project_queries(call, m, e));
    }
    ATTN_TRY(list_heads(call, m));
    if (m->p->decode) {
        return decode(call, m);
    }
    ATTN_TRY(attn_heads_project(&k_heads, call->arena, call->threads, m->width, m->x, m->w_k, NULL, m->k));
    turn_keys(call, m, 0, m->k);
    ATTN_TRY(attn_heads_project(&v_heads, call->arena, call->threads, m->width, m->x, m->w_v, NULL, m->v));
    return attn_stairs_forward(&m->stairs, call->arena, call->threads);
}

attn_status attn_bam_moa_forward(attn_call *call, bam_moa *m, float *y)
{
    ATTN_TRY(attend(call, m, 0));
    int64_t size = m->p->heads * m->dv, most = attn_min_i64(ATTN_LINEAR_SPAN, m->batch * m->n);
    float *rows, *part;
    ATTN_TRY(attn_take_f32(call, most * size, &rows));
    ATTN_TRY(attn_take_f32(call, most * m->width, &part));
    for (int64_t e = 0; e < m->experts; e++) {
        attn_head_rows heads = heads_of(m, e, m->dv);
        for (int64_t first = 0, count; first < heads.n; first += count) {
            count = attn_min_i64(ATTN_LINEAR_SPAN, heads.n - first);
            attn_heads_join_some(&heads, call->threads, first, count, m->o + rows_of(m, e, 0) * m->dv, rows);
            attn_bam_weigh(call, &m->route, e, first, count, size, rows);
            ATTN_TRY(attn_linear_forward(call->arena, call->threads, count, size, m->width, rows, m->w_o + e * m->width * size, NULL, part));
            attn_rows_scatter_add(call->threads, m->width, part, bam_list(&m->route, e) + first, count, y);
        }
    }
    return ATTN_OK;
}

/* grad_k or grad_v in their place [batch][sets][Hkv][n][size] back through the projection. */
static attn_status keys_back(attn_call *call, const bam_moa *m, const float *w, int64_t size, const float *grad, float *grad_x,
                             float *grad_w)
{
    attn_head_rows heads = key_heads(m, size);
    float *rows;
    ATTN_TRY(attn_take_f32(call, m->batch * m->n * heads.width, &rows));
    attn_heads_join(&heads, call->threads, grad, rows);
    return attn_linear_backward_add(call->arena, call->threads, m->batch * m->n, m->width, heads.width, m->x, w, rows, grad_x, grad_w,
                                    NULL);
}

/* A gradient's part that belongs to expert e; NULL when it is not wanted. */
static float *part_of(const attn_tensor *grad, int64_t e, int64_t size) { return grad != NULL ? attn_f32(grad) + e * size : NULL; }

/* The output projection of all experts: to grad_o (like o), w_o, and the logits' share from the gates. */
static attn_status outputs_back(attn_call *call, const bam_moa *m, const float *grad_y, const float *grad_gates, float *grad_o,
                                float *logits, const attn_tensor *grad_w)
{
    const bam_choice *r = &m->route;
    int64_t tokens = r->tokens, size = m->p->heads * m->dv;
    float *room, *plain, *part;
    ATTN_TRY(attn_take_f32(call, tokens * m->width, &room));
    ATTN_TRY(attn_take_f32(call, tokens * size, &plain));
    ATTN_TRY(attn_take_f32(call, tokens * size, &part));
    for (int64_t e = 0; e < r->experts; e++) {
        int64_t count = bam_count(r, e);
        const int64_t *list = bam_list(r, e);
        const float *w = m->w_o + e * m->width * size, *gy = attn_bam_rows(call, r, e, m->width, grad_y, room);
        attn_head_rows heads = heads_of(m, e, m->dv);
        ATTN_TRY(attn_linear_backward(call->arena, call->threads, count, size, m->width, NULL, w, gy, part, NULL, NULL));
        attn_heads_join(&heads, call->threads, m->o + rows_of(m, e, 0) * m->dv, plain);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
        for (int64_t i = 0; i < count; i++) {
            double sum = grad_gates != NULL ? (double)grad_gates[list[i] * r->experts + e] : 0;
            for (int64_t c = 0; c < size; c++) {
                sum += (double)plain[i * size + c] * (double)part[i * size + c];
            }
            logits[list[i] * r->experts + e] = (float)sum;
        }
        attn_bam_weigh(call, r, e, 0, count, size, plain);
        attn_bam_weigh(call, r, e, 0, count, size, part);
        attn_heads_split(&heads, call->threads, part, grad_o + rows_of(m, e, 0) * m->dv);
        if (grad_w != NULL) {
            ATTN_TRY(attn_linear_backward(call->arena, call->threads, count, size, m->width, plain, w, gy, NULL,
                                          part_of(grad_w, e, m->width * size), NULL));
        }
    }
    return ATTN_OK;
}

/* grad_q (like q) back through the projections. */
static attn_status queries_back(attn_call *call, const bam_moa *m, float *grad_q, float *x, const attn_tensor *grad_w)
{
    const bam_choice *r = &m->route;
    int64_t tokens = r->tokens, size = m->p->heads * m->d;
    float *room, *part, *grad;
    ATTN_TRY(attn_take_f32(call, tokens * m->width, &room));
    ATTN_TRY(attn_take_f32(call, tokens * size, &part));
    ATTN_TRY(attn_take_f32(call, tokens * m->width, &grad));
    for (int64_t e = 0; e < r->experts; e++) {
        attn_head_rows heads = heads_of(m, e, m->d);
        turn_queries(call, m, e, 1, grad_q);
        attn_heads_join(&heads, call->threads, grad_q + rows_of(m, e, 0) * m->d, part);
        const float *rows = attn_bam_rows(call, r, e, m->width, m->x, room);
        ATTN_TRY(attn_linear_backward(call->arena, call->threads, bam_count(r, e), m->width, size, rows, m->w_q + e * size * m->width, part,
                                      grad, part_of(grad_w, e, size * m->width), NULL));
        attn_rows_scatter_add(call->threads, m->width, grad, bam_list(r, e), bam_count(r, e), x);
    }
    return ATTN_OK;
}

attn_status attn_bam_moa_backward(attn_call *call, bam_moa *m, const float *grad_y, const float *grad_gates, float *x, int first)
{
    ATTN_TRY(attend(call, m, 1));
    const bam_choice *r = &m->route;
    int64_t tokens = r->tokens, rows = r->lists.first[r->experts] * m->p->heads;
    int64_t kv_rows = m->batch * m->kv_sets * m->p->kv_heads * m->n;
    float *grad_o, *grad_q, *grad_k, *grad_v, *logits;
    ATTN_TRY(attn_take_f32(call, rows * m->dv, &grad_o));
    ATTN_TRY(attn_take_f32(call, rows * m->d, &grad_q));
    ATTN_TRY(attn_take_f32(call, kv_rows * m->d, &grad_k));
    ATTN_TRY(attn_take_f32(call, kv_rows * m->dv, &grad_v));
    ATTN_TRY(attn_take_f32(call, tokens * r->experts, &logits));
    attn_stairs_gradient *gradients = attn_arena_array(call->arena, (size_t)m->stairs.head_count, sizeof *gradients);
    if (gradients == NULL) {
        return attn_fail_memory((size_t)m->stairs.head_count * sizeof *gradients);
    }
    memset(logits, 0, (size_t)(tokens * r->experts) * sizeof *logits);
    ATTN_TRY(outputs_back(call, m, grad_y, grad_gates, grad_o, logits, call->grad[first + 4]));
    for (int64_t i = 0; i < m->stairs.head_count; i++) {
        int64_t row = (m->stairs.heads[i].o - m->o) / m->dv;
        gradients[i] = (attn_stairs_gradient){.grad_o = grad_o + row * m->dv, .q = grad_q + row * m->d};
    }
    ATTN_TRY(attn_stairs_backward(&m->stairs, gradients, grad_k, grad_v, call->arena, call->threads));
    ATTN_TRY(queries_back(call, m, grad_q, x, call->grad[first + 1]));
    turn_keys(call, m, 1, grad_k);
    ATTN_TRY(keys_back(call, m, m->w_k, m->d, grad_k, x, attn_f32(call->grad[first + 2])));
    ATTN_TRY(keys_back(call, m, m->w_v, m->dv, grad_v, x, attn_f32(call->grad[first + 3])));
    for (int64_t t = 0; t < tokens; t++) {
        attn_softmax_row_back(r->experts, r->p + t * r->experts, logits + t * r->experts);
    }
    return attn_linear_backward_add(call->arena, call->threads, tokens, m->width, r->experts, m->x, m->w_router, logits, x,
                                    attn_f32(call->grad[first]), NULL);
}

attn_status attn_bam_moa_setup(const attn_call *call, const bam_moa_params *p, const char *top_k, int first, bam_moa *m)
{
    const attn_tensor *const *t = (const attn_tensor *const *)call->t;
    int64_t rows_q = t[first + 1]->shape[1], rows_k = t[first + 2]->shape[1], rows_v = t[first + 3]->shape[1];
    *m = (bam_moa){.p = p, .batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .width = attn_dim(call, "C"),
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
    if (m->experts < 1 || m->d < 1 || m->dv < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "E = %lld experts with heads of D = %lld and Dv = %lld, expected at least 1 each",
                         (long long)m->experts, (long long)m->d, (long long)m->dv);
    }
    if (p->rope_theta > 0 && m->d % 2 != 0) {
        return attn_fail(ATTN_ERR_SHAPE, "rope_theta = %g needs an even head size, D = %lld", p->rope_theta, (long long)m->d);
    }
    if (p->top_k > m->experts) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s = %lld, expected at most E = %lld", top_k, (long long)p->top_k, (long long)m->experts);
    }
    if (p->decode && !p->causal) {
        return attn_fail(ATTN_ERR_ARGUMENT, "decode = true needs causal = true");
    }
    m->scale = attn_default_scale(p->scale, m->d);
    return ATTN_OK;
}

void attn_bam_moa_cost(const bam_moa *m, attn_cost *cost)
{
    double c = (double)m->width, tokens = (double)(m->batch * m->n), heads = (double)m->p->heads, e = (double)m->experts;
    double active = m->p->top_k > 0 ? (double)m->p->top_k : e, keys = m->p->causal ? (double)(m->n + 1) / 2 : (double)m->n;
    cost->pairs = tokens * active * heads * keys;
    cost->flops += 2 * cost->pairs * (double)(m->d + m->dv) +
                   2 * tokens * c * (e + active * heads * (double)(m->d + m->dv) +
                                     (double)(m->kv_sets * m->p->kv_heads) * (double)(m->d + m->dv));
}

/* ---- bam.moa ---- */

static const attn_param_info moa_param_table[] = {
    BAM_MOA_ENTRIES(bam_moa_params, ),
    ATTN_P_INT("top_k", bam_moa_params, top_k, "0", 0, INFINITY, "0: every expert for every token; else only the best top_k"),
};

enum { A_X, A_W_ROUTER, A_W_Q, A_W_K, A_W_V, A_W_O, A_Y, A_GATES, A_INDICES };

static const attn_port_info moa_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "normalised layer input"),
    ATTN_IN("w_router", "E,C", FLOAT, ATTN_PORT_DIFF, "router"),
    ATTN_IN("w_q", "E,*,C", FLOAT, ATTN_PORT_DIFF, "query projections [E, heads*D, C]"),
    ATTN_IN("w_k", "1|E,*,C", FLOAT, ATTN_PORT_DIFF, "key projections [E or 1, kv_heads*D, C]; 1: shared by the experts"),
    ATTN_IN("w_v", "1|E,*,C", FLOAT, ATTN_PORT_DIFF, "value projections [E or 1, kv_heads*Dv, C]"),
    ATTN_IN("w_o", "E,C,*", FLOAT, ATTN_PORT_DIFF, "output projections [E, C, heads*Dv]"),
    ATTN_OUT("y", "B,N,C", FLOAT, ATTN_PORT_DIFF, "the mixture"),
    ATTN_OUT("gates", "B,N,E", FLOAT, ATTN_PORT_DIFF, "weight of each expert; 0 when it was not chosen"),
    ATTN_OUT("indices", "B,N,K", INT, ATTN_PORT_OPTIONAL, "chosen experts, best first, with top_k > 0"),
};

static attn_status moa_bind(attn_call *call)
{
    const bam_moa_params *p = call->params;
    bam_moa m;
    attn_set_dim(call, "K", p->top_k);
    if (p->top_k == 0) {
        attn_drop_output(call, A_INDICES);
    }
    return attn_bam_moa_setup(call, p, "top_k", A_W_ROUTER, &m);
}

static attn_status moa_forward(attn_call *call)
{
    bam_moa m;
    ATTN_TRY(attn_bam_moa_setup(call, call->params, "top_k", A_W_ROUTER, &m));
    m.x = attn_f32(call->t[A_X]);
    float *y = attn_f32(call->t[A_Y]);
    memset(y, 0, (size_t)(m.batch * m.n * m.width) * sizeof *y);
    ATTN_TRY(attn_bam_moa_forward(call, &m, y));
    attn_bam_write_choice(&m.route, 1, call->t[A_GATES], call->t[A_INDICES]);
    return ATTN_OK;
}

static attn_status moa_backward(attn_call *call)
{
    bam_moa m;
    ATTN_TRY(attn_bam_moa_setup(call, call->params, "top_k", A_W_ROUTER, &m));
    m.x = attn_f32(call->t[A_X]);
    int64_t count = m.batch * m.n * m.width;
    float *grad_x = attn_bam_gradient(call, call->grad[A_X], count), *grad_y = attn_bam_gradient(call, call->grad[A_Y], count);
    if (grad_x == NULL || grad_y == NULL) {
        return attn_fail_memory((size_t)count * sizeof(float));
    }
    return attn_bam_moa_backward(call, &m, grad_y, attn_f32(call->grad[A_GATES]), grad_x, A_W_ROUTER);
}

static attn_status moa_cost(attn_call *call, attn_cost *cost)
{
    bam_moa m;
    ATTN_TRY(attn_bam_moa_setup(call, call->params, "top_k", A_W_ROUTER, &m));
    attn_bam_moa_cost(&m, cost);
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
    .params_size = sizeof(bam_moa_params),
    .bind = moa_bind,
    .forward = moa_forward,
    .backward = moa_backward,
    .cost = moa_cost,
};
