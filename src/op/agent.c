/* Agent attention (arXiv:2312.08874): a few agent tokens, pooled from the queries, collect values from all keys by softmax attention and
 * hand them on to all queries by a second one: linear in the number of tokens. With positional biases for vision models, the vision layer
 * around it. Token merging for diffusion models is in agent_merge.c.
 */
#include "exec/pool.h"
#include "layer/conv.h"
#include "layer/heads.h"
#include "layer/linear.h"
#include "layer/norm.h"
#include "layer/patch.h"
#include "layer/pool.h"
#include "layer/resize.h"
#include "op/class.h"
#include <attn/dense.h>

#include <string.h>

#define PAPER "arXiv:2312.08874"
#define LAYER_NORM_EPS 1e-5

static void add(float *to, const float *from, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        to[i] += from[i];
    }
}

/* ---- The core: two softmax attentions with the agents between them ---- */

typedef struct core {
    int64_t batch, heads, kv_heads, n, m, a, d, dv;
    double scale, scale2, shortcut;
    float *q, *k, *v, *agents;    /* [B,H,N,D], [B,Hkv,M,D], [B,Hkv,M,Dv], [B,H,A,D] */
    float *bias_an, *bias_na;     /* [bias batch,H,A,M], [bias batch,H,N,A], or NULL */
    int64_t an_batch, na_batch;
    float *agent_v, *o;           /* [B,H,A,Dv], [B,H,N,Dv] */
    float *lse1, *lse2;           /* [B,H,A], [B,H,N]; NULL when no backward follows */
} core;

typedef struct core_gradients {
    float *o; /* incoming */
    float *q, *k, *v, *agents, *bias_an, *bias_na; /* overwritten; the biases may be NULL */
} core_gradients;

static attn_tensor view(float *data, int64_t b, int64_t h, int64_t n, int64_t c)
{
    return attn_tensor_make(data, ATTN_F32, 4, (int64_t[]){b, h, n, c});
}

static attn_tensor view3(float *data, int64_t b, int64_t h, int64_t n) { return attn_tensor_make(data, ATTN_F32, 3, (int64_t[]){b, h, n}); }

/* The two attentions' inputs; bias views live in the caller. */
static attn_dense_inputs collect_inputs(const core *c, attn_tensor *bias)
{
    *bias = view(c->bias_an, c->an_batch, c->heads, c->a, c->m);
    return (attn_dense_inputs){.q = view(c->agents, c->batch, c->heads, c->a, c->d), .k = view(c->k, c->batch, c->kv_heads, c->m, c->d),
                               .v = view(c->v, c->batch, c->kv_heads, c->m, c->dv), .bias = c->bias_an != NULL ? bias : NULL};
}

static attn_dense_inputs hand_on_inputs(const core *c, attn_tensor *bias)
{
    *bias = view(c->bias_na, c->na_batch, c->heads, c->n, c->a);
    return (attn_dense_inputs){.q = view(c->q, c->batch, c->heads, c->n, c->d), .k = view(c->agents, c->batch, c->heads, c->a, c->d),
                               .v = view(c->agent_v, c->batch, c->heads, c->a, c->dv), .bias = c->bias_na != NULL ? bias : NULL};
}

static attn_dense_settings scaled(double scale)
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = scale;
    return settings;
}

/* o without the shortcut. */
static attn_status core_attend(attn_call *call, const core *c)
{
    attn_tensor bias, o = view(c->agent_v, c->batch, c->heads, c->a, c->dv), lse = view3(c->lse1, c->batch, c->heads, c->a);
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    attn_dense_settings first = scaled(c->scale), second = scaled(c->scale2);
    attn_dense_inputs in = collect_inputs(c, &bias);
    ATTN_TRY(attn_pool_forward(&first, &in, &o, c->lse1 != NULL ? &lse : NULL, &exec));
    in = hand_on_inputs(c, &bias);
    o = view(c->o, c->batch, c->heads, c->n, c->dv);
    lse = view3(c->lse2, c->batch, c->heads, c->n);
    return attn_dense_forward(&second, &in, &o, c->lse2 != NULL ? &lse : NULL, &exec);
}

/* to [B,H,N,Dv] += shortcut * v, or (back) v's gradient [B,Hkv,M,Dv] += shortcut * the output's. */
static void add_shortcut(const core *c, const float *from, float *to, int back)
{
    int64_t group = c->kv_heads > 0 ? c->heads / c->kv_heads : 0, size = c->n * c->dv;
    for (int64_t h = 0; h < c->batch * c->heads && c->shortcut != 0; h++) {
        const float *x = from + (back ? h : h / group) * size;
        float *y = to + (back ? h / group : h) * size;
        for (int64_t i = 0; i < size; i++) {
            y[i] += (float)c->shortcut * x[i];
        }
    }
}

/* After core_attend(), with o still without the shortcut. */
static attn_status core_back(attn_call *call, const core *c, const core_gradients *g)
{
    float *grad_agent_v, *more;
    ATTN_TRY(attn_take_f32(call, c->batch * c->heads * c->a * c->dv, &grad_agent_v));
    ATTN_TRY(attn_take_f32(call, c->batch * c->heads * c->a * c->d, &more));
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    attn_dense_settings first = scaled(c->scale), second = scaled(c->scale2);
    attn_tensor bias, o = view(c->o, c->batch, c->heads, c->n, c->dv), lse = view3(c->lse2, c->batch, c->heads, c->n);
    attn_tensor grad_o = view(g->o, c->batch, c->heads, c->n, c->dv), gq = view(g->q, c->batch, c->heads, c->n, c->d);
    attn_tensor gagents = view(g->agents, c->batch, c->heads, c->a, c->d), gav = view(grad_agent_v, c->batch, c->heads, c->a, c->dv);
    attn_tensor gbias = view(g->bias_na, c->na_batch, c->heads, c->n, c->a);
    attn_dense_inputs in = hand_on_inputs(c, &bias);
    attn_dense_gradients to = {.q = &gq, .k = &gagents, .v = &gav, .bias = g->bias_na != NULL ? &gbias : NULL};
    ATTN_TRY(attn_dense_backward(&second, &in, &o, &lse, &grad_o, &to, &exec));
    o = view(c->agent_v, c->batch, c->heads, c->a, c->dv);
    lse = view3(c->lse1, c->batch, c->heads, c->a);
    attn_tensor gmore = view(more, c->batch, c->heads, c->a, c->d), gk = view(g->k, c->batch, c->kv_heads, c->m, c->d);
    attn_tensor gv = view(g->v, c->batch, c->kv_heads, c->m, c->dv);
    gbias = view(g->bias_an, c->an_batch, c->heads, c->a, c->m);
    in = collect_inputs(c, &bias);
    to = (attn_dense_gradients){.q = &gmore, .k = &gk, .v = &gv, .bias = g->bias_an != NULL ? &gbias : NULL};
    ATTN_TRY(attn_pool_backward(&first, &in, &o, &lse, &gav, &to, &exec));
    add(g->agents, more, c->batch * c->heads * c->a * c->d);
    add_shortcut(c, g->o, g->v, 1);
    return ATTN_OK;
}

static void core_cost(const core *c, attn_cost *cost)
{
    double heads = (double)(c->batch * c->heads), width = (double)(c->d + c->dv);
    cost->pairs += heads * (double)c->a * (double)(c->n + c->m);
    cost->flops += 2 * heads * (double)c->a * (double)(c->n + c->m) * width;
}

/* ---- agent ---- */

typedef struct agent_params {
    attn_ints grid, agent_grid, key_grid, window;
    double scale, scale2, shortcut;
    int64_t heads, cls, reduction;
} agent_params;

static const attn_param_info agent_param_table[] = {
    ATTN_P_LIST(INTS, "grid", agent_params, grid, "null", 1, ATTN_MOST_EXTENT, 2, 2, "rows and columns of the queries; needed without agents"),
    ATTN_P_LIST(INTS, "agent_grid", agent_params, agent_grid, "null", 1, ATTN_MOST_STEP, 2, 2, "rows and columns of the agents; needed without agents"),
    ATTN_P_FLOAT_AUTO("scale", agent_params, scale, "1/sqrt(D)", -INFINITY, INFINITY, "multiplies agent.key"),
    ATTN_P_FLOAT_AUTO("scale2", agent_params, scale2, "scale", -INFINITY, INFINITY, "multiplies query.agent"),
    ATTN_P_FLOAT("shortcut", agent_params, shortcut, "0", -INFINITY, INFINITY, "adds shortcut * v to the output; needs N = M"),
};

enum { Q, K, V, AGENTS, BIAS_AN, BIAS_NA, O, AGENT_V, AGENTS_OUT };

static const attn_port_info agent_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_IN("agents", "B,H,A,D", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "agent tokens; absent: pooled from q"),
    ATTN_IN("bias_an", "1|B,H,Aan,M", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "added to the agent-key scores"),
    ATTN_IN("bias_na", "1|B,H,N,Ana", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "added to the query-agent scores"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("agent_v", "B,H,Acount,Dv", FLOAT, 0, "what the agents collected"),
    ATTN_OUT("agents", "B,H,Acount,D", FLOAT, 0, "the pooled agents"),
};

static attn_status agent_setup(const attn_call *call, core *c)
{
    const agent_params *p = call->params;
    *c = (core){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"), .n = attn_dim(call, "N"),
                .m = attn_dim(call, "M"), .a = attn_dim(call, "A"), .d = attn_dim(call, "D"), .dv = attn_dim(call, "Dv"),
                .scale = attn_default_scale(p->scale, attn_dim(call, "D")), .shortcut = p->shortcut,
                .q = attn_f32(call->t[Q]), .k = attn_f32(call->t[K]), .v = attn_f32(call->t[V]), .bias_an = attn_f32(call->t[BIAS_AN]),
                .bias_na = attn_f32(call->t[BIAS_NA]), .an_batch = 1, .na_batch = 1};
    c->scale2 = isnan(p->scale2) ? c->scale : p->scale2;
    if (call->t[AGENTS] == NULL && (p->grid.count == 0 || p->agent_grid.count == 0)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s is needed to pool agents from q, or give agents", p->grid.count == 0 ? "grid" : "agent_grid");
    }
    if (p->grid.count > 0 && p->grid.items[0] * p->grid.items[1] != c->n) {
        return attn_fail(ATTN_ERR_SHAPE, "grid = [%lld, %lld] does not hold the %lld queries", (long long)p->grid.items[0],
                         (long long)p->grid.items[1], (long long)c->n);
    }
    if (p->agent_grid.count > 0) {
        c->a = p->agent_grid.items[0] * p->agent_grid.items[1];
    }
    if (call->t[AGENTS] != NULL && c->a != attn_dim(call, "A")) {
        return attn_fail(ATTN_ERR_SHAPE, "agent_grid = [%lld, %lld] does not hold the %lld agents", (long long)p->agent_grid.items[0],
                         (long long)p->agent_grid.items[1], (long long)attn_dim(call, "A"));
    }
    if (c->a < 1 || c->m < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "A = %lld agents and M = %lld keys, expected at least 1 each", (long long)c->a, (long long)c->m);
    }
    if (p->shortcut != 0 && c->n != c->m) {
        return attn_fail(ATTN_ERR_SHAPE, "N = %lld and M = %lld, shortcut needs as many queries as keys", (long long)c->n, (long long)c->m);
    }
    if (call->t[BIAS_AN] != NULL && call->t[BIAS_AN]->shape[2] != c->a) {
        return attn_fail(ATTN_ERR_SHAPE, "bias_an is for %lld agents, expected %lld", (long long)call->t[BIAS_AN]->shape[2], (long long)c->a);
    }
    if (call->t[BIAS_NA] != NULL && call->t[BIAS_NA]->shape[3] != c->a) {
        return attn_fail(ATTN_ERR_SHAPE, "bias_na is for %lld agents, expected %lld", (long long)call->t[BIAS_NA]->shape[3], (long long)c->a);
    }
    c->an_batch = call->t[BIAS_AN] != NULL ? call->t[BIAS_AN]->shape[0] : 1;
    c->na_batch = call->t[BIAS_NA] != NULL ? call->t[BIAS_NA]->shape[0] : 1;
    return ATTN_OK;
}

static attn_status agent_bind(attn_call *call)
{
    core c;
    ATTN_TRY(agent_setup(call, &c));
    attn_set_dim(call, "Acount", c.a);
    if (call->t[AGENTS] != NULL) {
        attn_drop_output(call, AGENTS_OUT);
    }
    return ATTN_OK;
}

static attn_pool_grid pool_of(const attn_call *call, const core *c)
{
    const agent_params *p = call->params;
    return (attn_pool_grid){.images = c->batch * c->heads, .height = p->grid.items[0], .width = p->grid.items[1], .channels = c->d,
                            .stride = c->n * c->d, .cell_rows = p->agent_grid.items[0], .cell_columns = p->agent_grid.items[1]};
}

/* The given agents, or pooled ones. */
static void agent_prepare(const attn_call *call, core *c, float *pooled)
{
    c->agents = attn_f32(call->t[AGENTS]);
    if (c->agents == NULL) {
        attn_pool_grid pool = pool_of(call, c);
        attn_pool_forward_mean(&pool, call->threads, c->q, pooled);
        c->agents = pooled;
    }
}

static attn_status agent_forward(attn_call *call)
{
    core c;
    ATTN_TRY(agent_setup(call, &c));
    agent_prepare(call, &c, attn_f32(call->t[AGENTS_OUT]));
    c.agent_v = attn_f32(call->t[AGENT_V]);
    c.o = attn_f32(call->t[O]);
    ATTN_TRY(core_attend(call, &c));
    add_shortcut(&c, c.v, c.o, 0);
    return ATTN_OK;
}

static attn_status agent_backward(attn_call *call)
{
    core c;
    float *pooled;
    ATTN_TRY(agent_setup(call, &c));
    int64_t heads = c.batch * c.heads, kv = c.batch * c.kv_heads;
    ATTN_TRY(attn_take_f32(call, heads * c.a * c.d, &pooled));
    agent_prepare(call, &c, pooled);
    ATTN_TRY(attn_take_f32(call, heads * c.a, &c.lse1));
    ATTN_TRY(attn_take_f32(call, heads * c.n, &c.lse2));
    ATTN_TRY(attn_take_f32(call, heads * c.a * c.dv, &c.agent_v));
    ATTN_TRY(attn_take_f32(call, heads * c.n * c.dv, &c.o));
    ATTN_TRY(core_attend(call, &c));
    core_gradients g = {.o = attn_f32(call->grad[O]), .bias_an = attn_f32(call->grad[BIAS_AN]), .bias_na = attn_f32(call->grad[BIAS_NA])};
    float **wanted[] = {&g.q, &g.k, &g.v, &g.agents};
    int64_t sizes[] = {heads * c.n * c.d, kv * c.m * c.d, kv * c.m * c.dv, heads * c.a * c.d};
    for (int i = 0; i < 4; i++) {
        *wanted[i] = attn_f32(call->grad[i]);
        if (*wanted[i] == NULL) {
            ATTN_TRY(attn_take_f32(call, sizes[i], wanted[i]));
        }
    }
    ATTN_TRY(core_back(call, &c, &g));
    if (call->t[AGENTS] == NULL) {
        attn_pool_grid pool = pool_of(call, &c);
        attn_pool_backward_mean(&pool, call->threads, g.agents, g.q);
    }
    return ATTN_OK;
}

static attn_status agent_cost(attn_call *call, attn_cost *cost)
{
    core c;
    ATTN_TRY(agent_setup(call, &c));
    core_cost(&c, cost);
    return ATTN_OK;
}

const attn_op_class attn_op_agent = {
    .info = {.name = "agent",
             .title = "Agent attention: softmax attention through a few agent tokens",
             .summary = "A few agents, pooled from the queries of a grid or given, attend to all keys; all queries attend to the agents. Close "
                        "to softmax attention where tokens are redundant (images), at 2*A*(N + M)*(D + Dv) operations per head.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(agent_param_table, agent_ports)},
    .params_size = sizeof(agent_params),
    .bind = agent_bind,
    .forward = agent_forward,
    .backward = agent_backward,
    .cost = agent_cost,
};

/* ---- Positional biases ---- */

/* Inputs of a head's biases, their gradients, or what they make. */
typedef struct bias_set {
    float *an, *na, *ah, *aw, *ha, *wa, *ac, *ca; /* ac, ca: class token, NULL without */
} bias_set;

typedef struct bias_shape {
    int64_t heads, a, base[2], grid[2], keys[2];
    int cls;
} bias_shape;

static int64_t bias_keys(const bias_shape *s) { return s->keys[0] * s->keys[1] + s->cls; }
static int64_t bias_queries(const bias_shape *s) { return s->grid[0] * s->grid[1] + s->cls; }

/* planes: scratch [heads, A, grid]. */
static void make_bias_an(const bias_shape *s, int threads, const bias_set *in, float *planes, float *out)
{
    attn_resize resize = {.images = s->heads * s->a, .channels = 1, .from = {s->base[0], s->base[1]}, .to = {s->keys[0], s->keys[1]}};
    attn_resize_forward(&resize, threads, in->an, planes);
    for (int64_t r = 0; r < s->heads * s->a; r++, out += bias_keys(s)) {
        if (s->cls) {
            out[0] = in->ac[r];
        }
        for (int64_t y = 0; y < s->keys[0]; y++) {
            for (int64_t x = 0; x < s->keys[1]; x++) {
                out[s->cls + y * s->keys[1] + x] =
                    planes[(r * s->keys[0] + y) * s->keys[1] + x] + in->ah[r * s->keys[0] + y] + in->aw[r * s->keys[1] + x];
            }
        }
    }
}

static void make_bias_na(const bias_shape *s, int threads, const bias_set *in, float *planes, float *out)
{
    attn_resize resize = {.images = s->heads * s->a, .channels = 1, .from = {s->base[0], s->base[1]}, .to = {s->grid[0], s->grid[1]}};
    attn_resize_forward(&resize, threads, in->na, planes);
    for (int64_t h = 0; h < s->heads; h++, out += bias_queries(s) * s->a) {
        for (int64_t a = 0; a < s->a; a++) {
            if (s->cls) {
                out[a] = in->ca[h * s->a + a];
            }
            for (int64_t y = 0; y < s->grid[0]; y++) {
                for (int64_t x = 0; x < s->grid[1]; x++) {
                    out[(s->cls + y * s->grid[1] + x) * s->a + a] = planes[((h * s->a + a) * s->grid[0] + y) * s->grid[1] + x] +
                                                                    in->ha[(h * s->grid[0] + y) * s->a + a] +
                                                                    in->wa[(h * s->grid[1] + x) * s->a + a];
                }
            }
        }
    }
}

static void add_to(float *to, int64_t at, float x)
{
    if (to != NULL) {
        to[at] += x;
    }
}

/* Gradients of the inputs are added to; each may be NULL. planes: scratch; small: scratch [heads, A, base]. */
static void bias_an_back(const bias_shape *s, int threads, const float *grad, float *planes, float *small, const bias_set *to)
{
    attn_resize resize = {.images = s->heads * s->a, .channels = 1, .from = {s->base[0], s->base[1]}, .to = {s->keys[0], s->keys[1]}};
    for (int64_t r = 0; r < s->heads * s->a; r++, grad += bias_keys(s)) {
        if (s->cls) {
            add_to(to->ac, r, grad[0]);
        }
        for (int64_t i = 0; i < s->keys[0] * s->keys[1]; i++) {
            float g = grad[s->cls + i];
            planes[r * s->keys[0] * s->keys[1] + i] = g;
            add_to(to->ah, r * s->keys[0] + i / s->keys[1], g);
            add_to(to->aw, r * s->keys[1] + i % s->keys[1], g);
        }
    }
    attn_resize_backward(&resize, threads, planes, small);
    if (to->an != NULL) {
        add(to->an, small, s->heads * s->a * s->base[0] * s->base[1]);
    }
}

static void bias_na_back(const bias_shape *s, int threads, const float *grad, float *planes, float *small, const bias_set *to)
{
    attn_resize resize = {.images = s->heads * s->a, .channels = 1, .from = {s->base[0], s->base[1]}, .to = {s->grid[0], s->grid[1]}};
    for (int64_t h = 0; h < s->heads; h++, grad += bias_queries(s) * s->a) {
        for (int64_t a = 0; a < s->a; a++) {
            if (s->cls) {
                add_to(to->ca, h * s->a + a, grad[a]);
            }
            for (int64_t i = 0; i < s->grid[0] * s->grid[1]; i++) {
                float g = grad[(s->cls + i) * s->a + a];
                planes[(h * s->a + a) * s->grid[0] * s->grid[1] + i] = g;
                add_to(to->ha, (h * s->grid[0] + i / s->grid[1]) * s->a + a, g);
                add_to(to->wa, (h * s->grid[1] + i % s->grid[1]) * s->a + a, g);
            }
        }
    }
    attn_resize_backward(&resize, threads, planes, small);
    if (to->na != NULL) {
        add(to->na, small, s->heads * s->a * s->base[0] * s->base[1]);
    }
}

/* Scratch for all of these. */
static attn_status bias_scratch(attn_call *call, const bias_shape *s, float **planes, float **small)
{
    int64_t cells = attn_max_i64(s->grid[0] * s->grid[1], s->keys[0] * s->keys[1]);
    ATTN_TRY(attn_take_f32(call, s->heads * s->a * cells, planes));
    return attn_take_f32(call, s->heads * s->a * s->base[0] * s->base[1], small);
}

#define BIAS_PORTS                                                                                                     \
    ATTN_IN("an_bias", "H,A,p,p2", FLOAT, ATTN_PORT_DIFF, "base bias of agents to keys, resized to the key grid"),     \
        ATTN_IN("na_bias", "H,A,p,p2", FLOAT, ATTN_PORT_DIFF, "base bias of queries to agents, resized to the grid"),  \
        ATTN_IN("ah_bias", "H,A,hk", FLOAT, ATTN_PORT_DIFF, "by row of the key grid"),                                 \
        ATTN_IN("aw_bias", "H,A,wk", FLOAT, ATTN_PORT_DIFF, "by column of the key grid"),                              \
        ATTN_IN("ha_bias", "H,h,A", FLOAT, ATTN_PORT_DIFF, "by row of the query grid"),                                \
        ATTN_IN("wa_bias", "H,w,A", FLOAT, ATTN_PORT_DIFF, "by column of the query grid"),                             \
        ATTN_IN("ac_bias", "H,A", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "agents to the class token"),            \
        ATTN_IN("ca_bias", "H,A", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "class token to the agents")
#define BIAS_COUNT 8

static bias_set bias_inputs(attn_tensor *const *t)
{
    return (bias_set){attn_f32(t[0]), attn_f32(t[1]), attn_f32(t[2]), attn_f32(t[3]), attn_f32(t[4]), attn_f32(t[5]), attn_f32(t[6]),
                      attn_f32(t[7])};
}

/* Against the grids; first: port of an_bias. */
static attn_status check_bias(const attn_call *call, int first, const bias_shape *s)
{
    if ((call->t[first + 6] == NULL) != (call->t[first + 7] == NULL)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "ac_bias and ca_bias go together");
    }
    const struct {
        const char *name;
        int64_t got, want;
    } extents[] = {{"ah_bias", attn_dim(call, "hk"), s->keys[0]}, {"aw_bias", attn_dim(call, "wk"), s->keys[1]},
                   {"ha_bias", attn_dim(call, "h"), s->grid[0]}, {"wa_bias", attn_dim(call, "w"), s->grid[1]}};
    for (int i = 0; i < 4; i++) {
        if (extents[i].got != extents[i].want) {
            return attn_fail(ATTN_ERR_SHAPE, "%s is for a grid with extent %lld, expected %lld", extents[i].name, (long long)extents[i].got,
                             (long long)extents[i].want);
        }
    }
    if (s->base[0] < 1 || s->base[1] < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "an_bias and na_bias have no area");
    }
    return ATTN_OK;
}

static const attn_param_info bias_param_table[] = {
    ATTN_P_LIST(INTS, "grid", agent_params, grid, NULL, 1, ATTN_MOST_EXTENT, 2, 2, "rows and columns of the queries"),
    ATTN_P_LIST(INTS, "key_grid", agent_params, key_grid, "null", 1, ATTN_MOST_EXTENT, 2, 2, "rows and columns of the keys (default: grid)"),
};

enum { BIAS_OUT_AN = BIAS_COUNT, BIAS_OUT_NA };

static const attn_port_info bias_ports[] = {
    BIAS_PORTS,
    ATTN_OUT("bias_an", "H,A,keys", FLOAT, ATTN_PORT_DIFF, "bias of agents to keys"),
    ATTN_OUT("bias_na", "H,queries,A", FLOAT, ATTN_PORT_DIFF, "bias of queries to agents"),
};

static attn_status bias_setup(const attn_call *call, bias_shape *s)
{
    const agent_params *p = call->params;
    const attn_ints *keys = p->key_grid.count > 0 ? &p->key_grid : &p->grid;
    *s = (bias_shape){.heads = attn_dim(call, "H"), .a = attn_dim(call, "A"), .base = {attn_dim(call, "p"), attn_dim(call, "p2")},
                      .grid = {p->grid.items[0], p->grid.items[1]}, .keys = {keys->items[0], keys->items[1]}, .cls = call->t[6] != NULL};
    return check_bias(call, 0, s);
}

static attn_status bias_bind(attn_call *call)
{
    bias_shape s;
    ATTN_TRY(bias_setup(call, &s));
    attn_set_dim(call, "keys", bias_keys(&s));
    attn_set_dim(call, "queries", bias_queries(&s));
    return ATTN_OK;
}

static attn_status bias_forward(attn_call *call)
{
    bias_shape s;
    float *planes, *small;
    ATTN_TRY(bias_setup(call, &s));
    ATTN_TRY(bias_scratch(call, &s, &planes, &small));
    bias_set in = bias_inputs(call->t);
    make_bias_an(&s, call->threads, &in, planes, attn_f32(call->t[BIAS_OUT_AN]));
    make_bias_na(&s, call->threads, &in, planes, attn_f32(call->t[BIAS_OUT_NA]));
    return ATTN_OK;
}

static attn_status bias_backward(attn_call *call)
{
    bias_shape s;
    float *planes, *small;
    ATTN_TRY(bias_setup(call, &s));
    ATTN_TRY(bias_scratch(call, &s, &planes, &small));
    bias_set to = bias_inputs(call->grad);
    if (call->grad[BIAS_OUT_AN] != NULL) {
        bias_an_back(&s, call->threads, attn_f32(call->grad[BIAS_OUT_AN]), planes, small, &to);
    }
    if (call->grad[BIAS_OUT_NA] != NULL) {
        bias_na_back(&s, call->threads, attn_f32(call->grad[BIAS_OUT_NA]), planes, small, &to);
    }
    return ATTN_OK;
}

const attn_op_class attn_op_agent_bias = {
    .info = {.name = "agent.bias",
             .title = "Agent attention: positional biases",
             .summary = "The biases of agent attention for a grid, from base biases that are resized bilinearly and biases by row and column; "
                        "with a class token in front when ac_bias and ca_bias are given.",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(bias_param_table, bias_ports)},
    .params_size = sizeof(agent_params),
    .bind = bias_bind,
    .forward = bias_forward,
    .backward = bias_backward,
};

/* ---- agent.layer ---- */

static const attn_param_info layer_param_table[] = {
    ATTN_P_INT("heads", agent_params, heads, NULL, 1, INFINITY, "attention heads; divides C"),
    ATTN_P_LIST(INTS, "grid", agent_params, grid, NULL, 1, ATTN_MOST_EXTENT, 2, 2, "rows and columns of the tokens"),
    ATTN_P_LIST(INTS, "agent_grid", agent_params, agent_grid, NULL, 1, ATTN_MOST_STEP, 2, 2, "rows and columns of the agents"),
    ATTN_P_BOOL("cls", agent_params, cls, "false", "a class token comes first"),
    ATTN_P_INT("reduction", agent_params, reduction, "1", 1, ATTN_MOST_STEP, "keys and values come from a grid reduced by this factor"),
    ATTN_P_LIST(INTS, "window", agent_params, window, "null", 1, ATTN_MOST_STEP, 2, 2,
                "rows and columns of windows that attend apart (default: the whole grid)"),
};

enum { X, W_QKV, B_QKV, W_PROJ, B_PROJ, DWC_W, DWC_B, BIAS, SR_W = BIAS + BIAS_COUNT, SR_B, LN_W, LN_B, Y };

static const attn_port_info layer_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, ATTN_PORT_DIFF, "tokens, row by row; the class token first"),
    ATTN_IN("w_qkv", "3*C,C", FLOAT, ATTN_PORT_DIFF, "projection to queries, keys and values"),
    ATTN_IN("b_qkv", "3*C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "its bias"),
    ATTN_IN("w_proj", "C,C", FLOAT, ATTN_PORT_DIFF, "output projection"),
    ATTN_IN("b_proj", "C", FLOAT, ATTN_PORT_DIFF, "its bias"),
    ATTN_IN("dwc_w", "C,3,3", FLOAT, ATTN_PORT_DIFF, "depthwise convolution of the values"),
    ATTN_IN("dwc_b", "C", FLOAT, ATTN_PORT_DIFF, "its bias"),
    BIAS_PORTS,
    ATTN_IN("sr_w", "C,C,r,r", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "convolution that reduces the grid"),
    ATTN_IN("sr_b", "C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "its bias"),
    ATTN_IN("ln_w", "C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "layer norm after it"),
    ATTN_IN("ln_b", "C", FLOAT, ATTN_PORT_OPTIONAL | ATTN_PORT_DIFF, "bias of the layer norm"),
    ATTN_OUT("o", "B,N,C", FLOAT, ATTN_PORT_DIFF, "the layer's output"),
};

typedef struct layer {
    int64_t batch, n, c, heads, images, cells; /* images: windows of all items; cells: tokens of one without class token */
    int64_t grid[2], windows[2], keys[2];      /* of a window */
    int64_t reduction;
    int cls, windowed;
    bias_shape bias;
    core core;
} layer;

static attn_status layer_setup(const attn_call *call, layer *y)
{
    const agent_params *p = call->params;
    *y = (layer){.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .c = attn_dim(call, "C"), .heads = p->heads,
                 .grid = {p->grid.items[0], p->grid.items[1]}, .windows = {1, 1}, .reduction = p->reduction, .cls = (int)p->cls,
                 .windowed = p->window.count > 0};
    if (y->c % p->heads != 0 || y->c < 1) {
        return attn_fail(ATTN_ERR_ARGUMENT, "heads = %lld does not divide C = %lld", (long long)p->heads, (long long)y->c);
    }
    if (y->grid[0] * y->grid[1] + y->cls != y->n) {
        return attn_fail(ATTN_ERR_SHAPE, "grid = [%lld, %lld] does not hold the %lld tokens of x", (long long)y->grid[0],
                         (long long)y->grid[1], (long long)y->n);
    }
    if (y->cls + (p->reduction > 1) + y->windowed > 1) {
        return attn_fail(ATTN_ERR_ARGUMENT, "cls, reduction above 1 and window exclude one another");
    }
    for (int axis = 0; axis < 2 && y->windowed; axis++) {
        int64_t window = p->window.items[axis];
        if (y->grid[axis] % window != 0) {
            return attn_fail(ATTN_ERR_ARGUMENT, "window = [%lld, %lld] does not divide grid = [%lld, %lld]", (long long)p->window.items[0],
                             (long long)p->window.items[1], (long long)y->grid[0], (long long)y->grid[1]);
        }
        y->windows[axis] = y->grid[axis] / window;
    }
    for (int axis = 0; axis < 2; axis++) {
        y->grid[axis] /= y->windows[axis];
        y->keys[axis] = y->grid[axis] / y->reduction;
        if (y->keys[axis] < 1) {
            return attn_fail(ATTN_ERR_ARGUMENT, "reduction = %lld exceeds the grid", (long long)y->reduction);
        }
    }
    int given = 0;
    for (int i = SR_W; i <= LN_B; i++) {
        given += call->t[i] != NULL;
    }
    if (given != (y->reduction > 1 ? 4 : 0)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "sr_w, sr_b, ln_w and ln_b go with reduction above 1, and all of them: %d are given", given);
    }
    if (y->reduction > 1 && attn_dim(call, "r") != y->reduction) {
        return attn_fail(ATTN_ERR_SHAPE, "sr_w has a kernel of %lld, expected reduction = %lld", (long long)attn_dim(call, "r"),
                         (long long)y->reduction);
    }
    if ((call->t[BIAS + 6] != NULL) != y->cls) {
        return attn_fail(ATTN_ERR_ARGUMENT, "ac_bias and ca_bias go with cls");
    }
    y->images = y->batch * y->windows[0] * y->windows[1];
    y->cells = y->grid[0] * y->grid[1];
    y->bias = (bias_shape){.heads = attn_dim(call, "H"), .a = attn_dim(call, "A"), .base = {attn_dim(call, "p"), attn_dim(call, "p2")},
                           .grid = {y->grid[0], y->grid[1]}, .keys = {y->keys[0], y->keys[1]}, .cls = y->cls};
    ATTN_TRY(check_bias(call, BIAS, &y->bias));
    int64_t agents = p->agent_grid.items[0] * p->agent_grid.items[1];
    if (y->bias.heads != y->heads || y->bias.a != agents) {
        return attn_fail(ATTN_ERR_SHAPE, "an_bias is for %lld heads and %lld agents, expected %lld and %lld", (long long)y->bias.heads,
                         (long long)y->bias.a, (long long)y->heads, (long long)agents);
    }
    int64_t d = y->c / y->heads;
    y->core = (core){.batch = y->images, .heads = y->heads, .kv_heads = y->heads, .n = y->cells + y->cls,
                     .m = y->keys[0] * y->keys[1] + y->cls, .a = agents, .d = d, .dv = d, .scale = attn_default_scale(NAN, d),
                     .scale2 = attn_default_scale(NAN, d), .an_batch = 1, .na_batch = 1};
    return ATTN_OK;
}

static attn_status layer_bind(attn_call *call)
{
    layer y;
    return layer_setup(call, &y);
}

/* Tokens [B, N, C] to windows [images, cells + cls, C], or back. */
static void to_windows(const layer *y, int threads, const float *from, float *to, int back)
{
    int64_t across = y->grid[1] * y->windows[1], per_item = y->windows[0] * y->windows[1];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t image = 0; image < y->images; image++) {
        int64_t window = image % per_item, top = window / y->windows[1] * y->grid[0], left = window % y->windows[1] * y->grid[1];
        for (int64_t i = 0; i < y->cells; i++) {
            int64_t token = (top + i / y->grid[1]) * across + left + i % y->grid[1];
            int64_t outside = (image / per_item * y->n + token) * y->c, inside = (image * y->cells + i) * y->c;
            memcpy(to + (back ? outside : inside), from + (back ? inside : outside), (size_t)y->c * sizeof *to);
        }
    }
}

/* Heads in rows [images, tokens, C]. */
static attn_head_rows heads_of(const layer *y, int64_t tokens) { return (attn_head_rows){y->images, tokens, y->heads, y->core.d, y->c, 0}; }

static attn_pool_grid layer_pool(const attn_call *call, const layer *y)
{
    const agent_params *p = call->params;
    return (attn_pool_grid){.images = y->images * y->heads, .height = y->grid[0], .width = y->grid[1], .channels = y->core.d,
                            .stride = y->core.n * y->core.d, .cell_rows = p->agent_grid.items[0], .cell_columns = p->agent_grid.items[1]};
}

static attn_patch layer_patch(const layer *y)
{
    return (attn_patch){.images = y->images, .in = y->c, .out = y->c, .grid = {y->grid[0], y->grid[1]}, .cells = {y->keys[0], y->keys[1]},
                        .kernel = {y->reduction, y->reduction}, .stride = y->reduction};
}

static attn_resize layer_resize(const layer *y)
{
    return (attn_resize){.images = y->images, .channels = y->c, .from = {y->keys[0], y->keys[1]}, .to = {y->grid[0], y->grid[1]}};
}

/* What forward makes on its way. */
typedef struct inner {
    float *x;              /* by window: x itself without windows */
    float *patches, *kv_x; /* reduced grid before and after its norm; kv_x = x without reduction */
    float *v_rows;         /* [images, m, C] */
    float *v_image;        /* [images, cells, C]: what the convolution reads */
    float *rows;           /* attention and convolution, [images, n, C] */
} inner;

static attn_status project(attn_call *call, const layer *y, inner *t)
{
    core *c = (core *)&y->core;
    int64_t queries = y->images * c->n, keys = y->images * c->m;
    attn_head_rows by_query = heads_of(y, c->n), by_key = heads_of(y, c->m);
    const float *w = attn_f32(call->t[W_QKV]), *b = attn_f32(call->t[B_QKV]);
    float *rows;
    attn_arena *arena = call->arena;
    ATTN_TRY(attn_take_f32(call, queries * y->c, &c->q));
    ATTN_TRY(attn_take_f32(call, keys * y->c, &c->k));
    ATTN_TRY(attn_take_f32(call, keys * y->c, &c->v));
    ATTN_TRY(attn_take_f32(call, attn_max_i64(queries, keys) * y->c, &rows));
    ATTN_TRY(attn_take_f32(call, keys * y->c, &t->v_rows));
    ATTN_TRY(attn_linear_forward(arena, call->threads, queries, y->c, y->c, t->x, w, b, rows));
    attn_heads_split(&by_query, call->threads, rows, c->q);
    ATTN_TRY(attn_linear_forward(arena, call->threads, keys, y->c, y->c, t->kv_x, w + y->c * y->c, b != NULL ? b + y->c : NULL, rows));
    attn_heads_split(&by_key, call->threads, rows, c->k);
    ATTN_TRY(attn_linear_forward(arena, call->threads, keys, y->c, y->c, t->kv_x, w + 2 * y->c * y->c, b != NULL ? b + 2 * y->c : NULL,
                                 t->v_rows));
    attn_heads_split(&by_key, call->threads, t->v_rows, c->v);
    return ATTN_OK;
}

/* The values as an image: without the class token, or resized to the whole grid. */
static attn_status make_image(attn_call *call, const layer *y, inner *t)
{
    t->v_image = t->v_rows;
    if (y->cls || y->reduction > 1) {
        ATTN_TRY(attn_take_f32(call, y->images * y->cells * y->c, &t->v_image));
    }
    if (y->reduction > 1) {
        attn_resize resize = layer_resize(y);
        attn_resize_forward(&resize, call->threads, t->v_rows, t->v_image);
    }
    for (int64_t i = 0; i < y->images && y->cls; i++) {
        memcpy(t->v_image + i * y->cells * y->c, t->v_rows + (i * y->core.m + 1) * y->c, (size_t)(y->cells * y->c) * sizeof(float));
    }
    return ATTN_OK;
}

static attn_status layer_inner(attn_call *call, layer *y, inner *t)
{
    core *c = &y->core;
    float *planes, *small, *by_row, *convolved;
    int64_t rows = y->images * c->n * y->c;
    attn_head_rows by_query = heads_of(y, c->n);
    t->x = attn_f32(call->t[X]);
    if (y->windowed) {
        ATTN_TRY(attn_take_f32(call, rows, &t->x));
        to_windows(y, call->threads, attn_f32(call->t[X]), t->x, 0);
    }
    t->kv_x = t->x;
    if (y->reduction > 1) {
        attn_patch patch = layer_patch(y);
        int64_t keys = y->images * c->m;
        ATTN_TRY(attn_take_f32(call, keys * y->c, &t->patches));
        ATTN_TRY(attn_take_f32(call, keys * y->c, &t->kv_x));
        ATTN_TRY(attn_patch_forward(&patch, call->arena, call->threads, t->x, attn_f32(call->t[SR_W]), attn_f32(call->t[SR_B]), t->patches));
        attn_norm_forward(ATTN_NORM_LAYER, call->threads, keys, y->c, LAYER_NORM_EPS, t->patches, attn_f32(call->t[LN_W]),
                          attn_f32(call->t[LN_B]), t->kv_x);
    }
    ATTN_TRY(project(call, y, t));
    ATTN_TRY(bias_scratch(call, &y->bias, &planes, &small));
    ATTN_TRY(attn_take_f32(call, y->heads * c->a * c->m, &c->bias_an));
    ATTN_TRY(attn_take_f32(call, y->heads * c->n * c->a, &c->bias_na));
    bias_set biases = bias_inputs(call->t + BIAS);
    make_bias_an(&y->bias, call->threads, &biases, planes, c->bias_an);
    make_bias_na(&y->bias, call->threads, &biases, planes, c->bias_na);
    ATTN_TRY(attn_take_f32(call, y->images * y->heads * c->a * c->d, &c->agents));
    ATTN_TRY(attn_take_f32(call, y->images * y->heads * c->a * c->d, &c->agent_v));
    ATTN_TRY(attn_take_f32(call, y->images * y->heads * c->a, &c->lse1));
    ATTN_TRY(attn_take_f32(call, y->images * y->heads * c->n, &c->lse2));
    ATTN_TRY(attn_take_f32(call, rows, &c->o));
    ATTN_TRY(attn_take_f32(call, rows, &by_row));
    ATTN_TRY(attn_take_f32(call, y->images * y->cells * y->c, &convolved));
    attn_pool_grid pool = layer_pool(call, y);
    attn_pool_forward_mean(&pool, call->threads, c->q + y->cls * c->d, c->agents);
    ATTN_TRY(core_attend(call, c));
    attn_heads_join(&by_query, call->threads, c->o, by_row);
    ATTN_TRY(make_image(call, y, t));
    attn_conv2d_forward(call->threads, y->images, y->grid[0], y->grid[1], y->c, 3, t->v_image, attn_f32(call->t[DWC_W]),
                        attn_f32(call->t[DWC_B]), convolved);
    for (int64_t i = 0; i < y->images; i++) {
        add(by_row + (i * c->n + y->cls) * y->c, convolved + i * y->cells * y->c, y->cells * y->c);
    }
    t->rows = by_row;
    return ATTN_OK;
}

static attn_status layer_forward(attn_call *call)
{
    layer y;
    inner t;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(layer_inner(call, &y, &t));
    int64_t rows = y.images * y.core.n;
    float *o = attn_f32(call->t[Y]), *to = o;
    if (y.windowed) {
        ATTN_TRY(attn_take_f32(call, rows * y.c, &to));
    }
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, rows, y.c, y.c, t.rows, attn_f32(call->t[W_PROJ]), attn_f32(call->t[B_PROJ]),
                                 to));
    if (y.windowed) {
        to_windows(&y, call->threads, to, o, 1);
    }
    return ATTN_OK;
}

/* The convolution's part: grad_v_rows [images, m, C] += what reaches the values through the image. */
static attn_status image_back(attn_call *call, const layer *y, const inner *t, const float *grad_rows, float *grad_v_rows)
{
    const core *c = &y->core;
    float *grad_cells, *grad_image, *small;
    ATTN_TRY(attn_take_f32(call, y->images * y->cells * y->c, &grad_cells));
    ATTN_TRY(attn_take_f32(call, y->images * y->cells * y->c, &grad_image));
    ATTN_TRY(attn_take_f32(call, y->images * c->m * y->c, &small));
    for (int64_t i = 0; i < y->images; i++) {
        memcpy(grad_cells + i * y->cells * y->c, grad_rows + (i * c->n + y->cls) * y->c, (size_t)(y->cells * y->c) * sizeof(float));
    }
    attn_conv2d_backward(call->threads, y->images, y->grid[0], y->grid[1], y->c, 3, t->v_image, attn_f32(call->t[DWC_W]), grad_cells,
                         grad_image, attn_f32(call->grad[DWC_W]), attn_f32(call->grad[DWC_B]));
    if (y->reduction > 1) {
        attn_resize resize = layer_resize(y);
        attn_resize_backward(&resize, call->threads, grad_image, small);
        add(grad_v_rows, small, y->images * c->m * y->c);
        return ATTN_OK;
    }
    for (int64_t i = 0; i < y->images; i++) {
        add(grad_v_rows + (i * c->m + y->cls) * y->c, grad_image + i * y->cells * y->c, y->cells * y->c);
    }
    return ATTN_OK;
}

/* grad_x [images, n, C] from the gradients of q, k and v as rows. */
static attn_status project_back(attn_call *call, const layer *y, const inner *t, float *const grads[3], float *grad_x)
{
    const core *c = &y->core;
    float *more, *grad_kv, *w = attn_f32(call->t[W_QKV]), *gw = attn_f32(call->grad[W_QKV]), *gb = attn_f32(call->grad[B_QKV]);
    int64_t queries = y->images * c->n, keys = y->images * c->m, square = y->c * y->c;
    ATTN_TRY(attn_take_f32(call, attn_max_i64(queries, keys) * y->c, &more));
    ATTN_TRY(attn_take_f32(call, keys * y->c, &grad_kv));
    for (int i = 0; i < 3; i++) {
        float *to = i == 0 ? grad_x : i == 1 ? grad_kv : more;
        ATTN_TRY(attn_linear_backward(call->arena, call->threads, i == 0 ? queries : keys, y->c, y->c, i == 0 ? t->x : t->kv_x, w + i * square,
                                      grads[i], to, gw != NULL ? gw + i * square : NULL, gb != NULL ? gb + i * y->c : NULL));
    }
    add(grad_kv, more, keys * y->c);
    if (y->reduction > 1) {
        attn_patch patch = layer_patch(y);
        float *grad_patches;
        ATTN_TRY(attn_take_f32(call, keys * y->c, &grad_patches));
        ATTN_TRY(attn_norm_backward(ATTN_NORM_LAYER, call->arena, call->threads, keys, y->c, LAYER_NORM_EPS, t->patches,
                                    attn_f32(call->t[LN_W]), grad_kv, grad_patches, attn_f32(call->grad[LN_W]), attn_f32(call->grad[LN_B])));
        ATTN_TRY(attn_patch_backward(&patch, call->arena, call->threads, t->x, attn_f32(call->t[SR_W]), grad_patches, more,
                                     attn_f32(call->grad[SR_W]), attn_f32(call->grad[SR_B])));
        grad_kv = more;
    }
    add(grad_x, grad_kv, queries * y->c);
    return ATTN_OK;
}

static attn_status layer_backward(attn_call *call)
{
    layer y;
    inner t;
    ATTN_TRY(layer_setup(call, &y));
    ATTN_TRY(layer_inner(call, &y, &t));
    core *c = &y.core;
    int64_t queries = y.images * c->n * y.c, keys = y.images * c->m * y.c, agents = y.images * y.heads * c->a * c->d;
    float *grad_o = attn_f32(call->grad[Y]), *grad_rows, *grads[3], *planes, *small, *grad_x;
    attn_head_rows by_query = heads_of(&y, c->n), by_key = heads_of(&y, c->m);
    core_gradients g;
    if (y.windowed) {
        ATTN_TRY(attn_take_f32(call, queries, &grad_o));
        to_windows(&y, call->threads, attn_f32(call->grad[Y]), grad_o, 0);
    }
    ATTN_TRY(attn_take_f32(call, queries, &grad_rows));
    ATTN_TRY(attn_take_f32(call, queries, &g.o));
    ATTN_TRY(attn_take_f32(call, queries, &g.q));
    ATTN_TRY(attn_take_f32(call, keys, &g.k));
    ATTN_TRY(attn_take_f32(call, keys, &g.v));
    ATTN_TRY(attn_take_f32(call, agents, &g.agents));
    ATTN_TRY(attn_take_f32(call, y.heads * c->a * c->m, &g.bias_an));
    ATTN_TRY(attn_take_f32(call, y.heads * c->n * c->a, &g.bias_na));
    ATTN_TRY(attn_take_f32(call, queries, &grads[0]));
    ATTN_TRY(attn_take_f32(call, keys, &grads[1]));
    ATTN_TRY(attn_take_f32(call, keys, &grads[2]));
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, y.images * c->n, y.c, y.c, t.rows, attn_f32(call->t[W_PROJ]), grad_o, grad_rows,
                                  attn_f32(call->grad[W_PROJ]), attn_f32(call->grad[B_PROJ])));
    attn_heads_split(&by_query, call->threads, grad_rows, g.o);
    ATTN_TRY(core_back(call, c, &g));
    attn_pool_grid pool = layer_pool(call, &y);
    attn_pool_backward_mean(&pool, call->threads, g.agents, g.q + y.cls * c->d);
    ATTN_TRY(bias_scratch(call, &y.bias, &planes, &small));
    bias_set to = bias_inputs(call->grad + BIAS);
    bias_an_back(&y.bias, call->threads, g.bias_an, planes, small, &to);
    bias_na_back(&y.bias, call->threads, g.bias_na, planes, small, &to);
    attn_heads_join(&by_query, call->threads, g.q, grads[0]);
    attn_heads_join(&by_key, call->threads, g.k, grads[1]);
    attn_heads_join(&by_key, call->threads, g.v, grads[2]);
    ATTN_TRY(image_back(call, &y, &t, grad_rows, grads[2]));
    grad_x = attn_f32(call->grad[X]);
    if (y.windowed || grad_x == NULL) {
        ATTN_TRY(attn_take_f32(call, queries, &grad_x));
    }
    ATTN_TRY(project_back(call, &y, &t, grads, grad_x));
    if (y.windowed && call->grad[X] != NULL) {
        to_windows(&y, call->threads, grad_x, attn_f32(call->grad[X]), 1);
    }
    return ATTN_OK;
}

static attn_status layer_cost(attn_call *call, attn_cost *cost)
{
    layer y;
    ATTN_TRY(layer_setup(call, &y));
    double queries = (double)(y.images * y.core.n), keys = (double)(y.images * y.core.m), c = (double)y.c;
    core_cost(&y.core, cost);
    cost->flops += 4 * queries * c * c + 4 * keys * c * c + 18 * (double)(y.images * y.cells) * c;
    if (y.reduction > 1) {
        cost->flops += 2 * keys * c * c * (double)(y.reduction * y.reduction);
    }
    return ATTN_OK;
}

const attn_op_class attn_op_agent_layer = {
    .info = {.name = "agent.layer",
             .title = "An agent attention layer for vision models",
             .summary = "Agent attention between projections with positional biases and a depthwise convolution of the values; with a class "
                        "token (DeiT), on windows or stripes (Swin, CSwin), or with keys and values from a reduced grid (PVT).",
             .paper = PAPER,
             .differentiable = 1,
             ATTN_TABLE(layer_param_table, layer_ports)},
    .params_size = sizeof(agent_params),
    .bind = layer_bind,
    .forward = layer_forward,
    .backward = layer_backward,
    .cost = layer_cost,
};
