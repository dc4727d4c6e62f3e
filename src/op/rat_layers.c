/* RAT in a network (arXiv:2507.04416): the gated layer around the core, rotary sliding-window attention, and the stack that
 * interleaves both.
 */
#include "kernel/linear.h"
#include "kernel/rows.h"
#include "layer/ffn.h"
#include "layer/heads.h"
#include "layer/linear.h"
#include "layer/norm.h"
#include "layer/rope.h"
#include "op/rat.h"
#include <attn/dense.h>

#include <string.h>

#define DIFF ATTN_PORT_DIFF
#define MAYBE (ATTN_PORT_DIFF | ATTN_PORT_OPTIONAL)
#define PART 1024 /* tokens of a sequence that go through a RAT layer together */

static float *floats(attn_call *call, int64_t count, attn_status *status)
{
    float *made = attn_scratch_f32(call, count);
    if (made == NULL) {
        *status = attn_fail_memory((size_t)count * sizeof(float));
    }
    return made;
}

/* Columns [from, from + heads*d) of rows [B*N][width] to [B*heads][N][d], or back. */
static void move_heads(int threads, int64_t batch, int64_t n, int64_t heads, int64_t d, float *rows, int64_t width, int64_t from,
                       float *split, int back)
{
    attn_head_rows shape = {batch, n, heads, d, width, from};
    if (back) {
        attn_heads_join(&shape, threads, split, rows);
    } else {
        attn_heads_split(&shape, threads, rows, split);
    }
}

/* ---- Rotary sliding-window attention ---- */

typedef struct local {
    int64_t batch, heads, kv_heads, n, d, window, rotary_dim;
    double scale, base;
    float *q, *k; /* rotated in place by local_forward */
    const float *v;
    float *o, *lse, *table;
} local;

static attn_tensor heads_of(const float *data, int64_t batch, int64_t heads, int64_t n, int64_t d)
{
    return attn_tensor_make((void *)(uintptr_t)data, ATTN_F32, 4, (int64_t[]){batch, heads, n, d});
}

static void turn_heads(const local *x, int64_t heads, int inverse, float *data)
{
    for (int64_t i = 0; i < x->batch * heads * x->n; i++) {
        attn_rope_apply(x->table + i % x->n * x->rotary_dim, x->rotary_dim, 0, inverse, data + i * x->d);
    }
}

static attn_dense_settings local_settings(const local *x)
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.causal = 1;
    settings.window[0] = x->window;
    settings.scale = x->scale;
    return settings;
}

static attn_status local_forward(attn_call *call, local *x)
{
    ATTN_TRY(attn_rope_table(call->arena, 0, x->n, x->rotary_dim, x->base, &x->table));
    turn_heads(x, x->heads, 0, x->q);
    turn_heads(x, x->kv_heads, 0, x->k);
    attn_dense_settings settings = local_settings(x);
    attn_dense_inputs in = {.q = heads_of(x->q, x->batch, x->heads, x->n, x->d), .k = heads_of(x->k, x->batch, x->kv_heads, x->n, x->d),
                            .v = heads_of(x->v, x->batch, x->kv_heads, x->n, x->d)};
    attn_tensor o = heads_of(x->o, x->batch, x->heads, x->n, x->d);
    attn_tensor lse = attn_tensor_make(x->lse, ATTN_F32, 3, o.shape);
    attn_exec exec = {call->threads, call->arena};
    return attn_dense_forward(&settings, &in, &o, &lse, &exec);
}

/* After local_forward. The gradients are overwritten and belong to the unrotated inputs. */
static attn_status local_backward(attn_call *call, const local *x, const float *grad_o, float *grad_q, float *grad_k, float *grad_v)
{
    attn_dense_settings settings = local_settings(x);
    attn_dense_inputs in = {.q = heads_of(x->q, x->batch, x->heads, x->n, x->d), .k = heads_of(x->k, x->batch, x->kv_heads, x->n, x->d),
                            .v = heads_of(x->v, x->batch, x->kv_heads, x->n, x->d)};
    attn_tensor o = heads_of(x->o, x->batch, x->heads, x->n, x->d), g = heads_of(grad_o, x->batch, x->heads, x->n, x->d);
    attn_tensor lse = attn_tensor_make(x->lse, ATTN_F32, 3, o.shape);
    attn_tensor q = heads_of(grad_q, x->batch, x->heads, x->n, x->d), k = heads_of(grad_k, x->batch, x->kv_heads, x->n, x->d);
    attn_tensor v = heads_of(grad_v, x->batch, x->kv_heads, x->n, x->d);
    attn_dense_gradients gradients = {.q = &q, .k = &k, .v = &v};
    attn_exec exec = {call->threads, call->arena};
    ATTN_TRY(attn_dense_backward(&settings, &in, &o, &lse, &g, &gradients, &exec));
    turn_heads(x, x->heads, 1, grad_q);
    turn_heads(x, x->kv_heads, 1, grad_k);
    return ATTN_OK;
}

typedef struct local_params {
    int64_t window, rotary_dim;
    double rotary_base, scale;
} local_params;

#define ROTARY_DIM(S, F, what)                                                                                           \
    {.name = "rotary_dim", .type = ATTN_PARAM_INT, .standard = "null", .standard_text = what, .min = 0, .max = INFINITY, \
     .help = "channels turned, even; 0: no positions", .offset = offsetof(S, F)}

static const attn_param_info local_param_table[] = {
    ATTN_P_INT("window", local_params, window, NULL, 0, INFINITY, "token t sees t - window ... t"),
    ROTARY_DIM(local_params, rotary_dim, "D"),
    ATTN_P_FLOAT_OPEN("rotary_base", local_params, rotary_base, "10000", 0, 1, INFINITY, 0, "base of the rotary angles"),
    ATTN_P_SCALE_POSITIVE(local_params, scale),
};

enum { L_Q, L_K, L_V, L_O };

static const attn_port_info local_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, DIFF, "queries, not rotated"),
    ATTN_IN("k", "B,Hkv,N,D", FLOAT, DIFF, "keys, not rotated"),
    ATTN_IN("v", "B,Hkv,N,D", FLOAT, DIFF, "values"),
    ATTN_OUT("o", "B,H,N,D", FLOAT, DIFF, "the output"),
};

static attn_status rotary_dim_of(int64_t given, int64_t d, int64_t *dim)
{
    *dim = given == ATTN_UNSET ? d : given;
    if (*dim % 2 != 0 || *dim > d) {
        return attn_fail(ATTN_ERR_ARGUMENT, "rotary_dim = %lld, expected an even number in 0 ... %lld, the head size", (long long)*dim,
                         (long long)d);
    }
    return ATTN_OK;
}

static attn_status local_bind(attn_call *call)
{
    const local_params *p = call->params;
    int64_t dim;
    return rotary_dim_of(p->rotary_dim, attn_dim(call, "D"), &dim);
}

static attn_status local_setup(attn_call *call, local *x)
{
    const local_params *p = call->params;
    attn_status status = ATTN_OK;
    *x = (local){.batch = attn_dim(call, "B"), .heads = attn_dim(call, "H"), .kv_heads = attn_dim(call, "Hkv"), .n = attn_dim(call, "N"),
                 .d = attn_dim(call, "D"), .window = p->window, .base = p->rotary_base, .v = attn_f32(call->t[L_V]),
                 .o = attn_f32(call->t[L_O])};
    ATTN_TRY(rotary_dim_of(p->rotary_dim, x->d, &x->rotary_dim));
    x->scale = attn_default_scale(p->scale, x->d);
    int64_t q = x->batch * x->heads * x->n, k = x->batch * x->kv_heads * x->n;
    x->q = floats(call, q * x->d, &status);
    x->k = floats(call, k * x->d, &status);
    x->lse = floats(call, q, &status);
    if (status == ATTN_OK) {
        memcpy(x->q, call->t[L_Q]->data, (size_t)(q * x->d) * sizeof(float));
        memcpy(x->k, call->t[L_K]->data, (size_t)(k * x->d) * sizeof(float));
    }
    return status;
}

static attn_status rat_local_forward(attn_call *call)
{
    local x;
    ATTN_TRY(local_setup(call, &x));
    return local_forward(call, &x);
}

static attn_status rat_local_backward(attn_call *call)
{
    local x;
    attn_status status = ATTN_OK;
    ATTN_TRY(local_setup(call, &x));
    x.o = floats(call, x.batch * x.heads * x.n * x.d, &status);
    float *grad[3];
    for (int i = 0; i < 3; i++) {
        grad[i] = call->grad[i] != NULL ? attn_f32(call->grad[i]) : floats(call, attn_tensor_count(call->t[i]), &status);
    }
    ATTN_TRY(status);
    ATTN_TRY(local_forward(call, &x));
    return local_backward(call, &x, attn_f32(call->grad[L_O]), grad[0], grad[1], grad[2]);
}

static attn_status rat_local_cost(attn_call *call, attn_cost *cost)
{
    const local_params *p = call->params;
    double keys = 0;
    for (int64_t t = 0; t < attn_dim(call, "N"); t++) {
        keys += (double)attn_min_i64(t, p->window) + 1;
    }
    cost->pairs = keys * (double)(attn_dim(call, "B") * attn_dim(call, "H"));
    cost->flops = 4 * cost->pairs * (double)attn_dim(call, "D");
    return ATTN_OK;
}

const attn_op_class attn_op_rat_local = {
    .info = {.name = "rat.local",
             .title = "Rotary sliding-window attention",
             .summary = "Causal attention over the last window + 1 tokens with rotary positions: the local layer that is interleaved with rat.",
             .paper = "arXiv:2507.04416",
             .differentiable = 1,
             ATTN_TABLE(local_param_table, local_ports)},
    .params_size = sizeof(local_params),
    .bind = local_bind,
    .forward = rat_local_forward,
    .backward = rat_local_backward,
    .cost = rat_local_cost,
};

/* ---- Layers: x [B,N,C] to o; all recompute in backward ---- */

typedef struct shape {
    int64_t batch, n, width, heads, groups, chunk, rotary_dim, window, hidden;
    double base, eps;
    int residual;
} shape;

typedef struct weights {
    const float *norm, *in, *bias, *out; /* norm [C]; feed-forward: in is ffn_1, out is ffn_2 */
} weights;

typedef struct weight_gradients {
    float *norm, *in, *bias, *out; /* added to; NULL: not wanted */
} weight_gradients;

/* What a layer of either kind computes before its output projection. */
typedef struct mixed {
    int64_t columns;            /* of proj */
    float *y, *proj, *v, *g, *q, *k, *a, *m; /* norm, projection, heads, attention by head, what w_o reads */
    rat_rows rows;
    local local;
} mixed;

static attn_status mix_begin(attn_call *call, const shape *s, const weights *w, const float *x, int64_t columns, mixed *f)
{
    int64_t tokens = s->batch * s->n, size = tokens * s->width;
    attn_status status = ATTN_OK;
    *f = (mixed){.columns = columns};
    f->y = floats(call, size, &status);
    f->proj = floats(call, tokens * columns, &status);
    f->v = floats(call, size, &status);
    f->g = floats(call, size, &status);
    f->q = floats(call, size, &status);
    f->k = floats(call, size, &status);
    f->a = floats(call, size, &status);
    f->m = floats(call, size, &status);
    ATTN_TRY(status);
    attn_norm_forward(ATTN_NORM_RMS, call->threads, tokens, s->width, s->eps, x, w->norm, NULL, f->y);
    return attn_linear_forward(call->arena, call->threads, tokens, s->width, columns, f->y, w->in, NULL, f->proj);
}

static int64_t rat_columns(const shape *s) { return 3 * s->width + 2 * s->groups * (s->width / s->heads); }

static rat_core core_of(const shape *s)
{
    int64_t d = s->width / s->heads;
    return (rat_core){.batch = s->batch, .heads = s->heads, .q_heads = s->groups, .k_heads = s->groups, .n = s->n, .d = d, .chunk = s->chunk,
                      .rotary_dim = s->rotary_dim, .tiled = 1, .scale = 1 / sqrt((double)d), .base = s->base};
}

/* Columns: z, v, g, q, k; z and g become gates there. x holds the tokens from `first` on that `s` describes, of an open core. */
static attn_status rat_mix(attn_call *call, const shape *s, const weights *w, const float *x, rat_core *core, int64_t first, mixed *f)
{
    int64_t c = s->width, d = c / s->heads, tokens = s->batch * s->n;
    const attn_row_kernels *kernels = ATTN_KERNEL_SELECT(attn_row_kernels_table, attn_isa_current());
    ATTN_TRY(mix_begin(call, s, w, x, rat_columns(s), f));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        float *z = f->proj + t * f->columns, *gate = z + 2 * c;
        kernels->add(gate, w->bias, c);
        kernels->function(ATTN_ROW_SIGMOID, gate, NULL, c, gate);
        kernels->function(ATTN_ROW_SIGMOID, z, NULL, c, z);
    }
    move_heads(call->threads, s->batch, s->n, s->heads, d, f->proj, f->columns, c, f->v, 0);
    move_heads(call->threads, s->batch, s->n, s->heads, d, f->proj, f->columns, 2 * c, f->g, 0);
    move_heads(call->threads, s->batch, s->n, s->groups, d, f->proj, f->columns, 3 * c, f->q, 0);
    move_heads(call->threads, s->batch, s->n, s->groups, d, f->proj, f->columns, 3 * c + s->groups * d, f->k, 0);
    f->rows = (rat_rows){first, s->n, s->n, f->q, f->k, f->v, f->g, f->a};
    ATTN_TRY(attn_rat_core_forward(call, core, &f->rows));
    move_heads(call->threads, s->batch, s->n, s->heads, d, f->m, c, 0, f->a, 1);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        attn_linear_kernels_get()->multiply(f->m + t * c, f->m + t * c, f->proj + t * f->columns, c);
    }
    return ATTN_OK;
}

/* Columns: v, q, k. */
static attn_status local_mix(attn_call *call, const shape *s, const weights *w, const float *x, mixed *f)
{
    int64_t c = s->width, d = c / s->heads;
    attn_status status = ATTN_OK;
    ATTN_TRY(mix_begin(call, s, w, x, 3 * c, f));
    move_heads(call->threads, s->batch, s->n, s->heads, d, f->proj, f->columns, 0, f->v, 0);
    move_heads(call->threads, s->batch, s->n, s->heads, d, f->proj, f->columns, c, f->q, 0);
    move_heads(call->threads, s->batch, s->n, s->heads, d, f->proj, f->columns, 2 * c, f->k, 0);
    f->local = (local){.batch = s->batch, .heads = s->heads, .kv_heads = s->heads, .n = s->n, .d = d, .window = s->window,
                       .rotary_dim = s->rotary_dim, .scale = 1 / sqrt((double)d), .base = s->base, .q = f->q, .k = f->k, .v = f->v,
                       .o = f->a, .lse = floats(call, s->batch * s->heads * s->n, &status)};
    ATTN_TRY(status);
    ATTN_TRY(local_forward(call, &f->local));
    move_heads(call->threads, s->batch, s->n, s->heads, d, f->m, c, 0, f->a, 1);
    return ATTN_OK;
}

static attn_status mixer_end(attn_call *call, const shape *s, const weights *w, const mixed *f, const float *x, float *o)
{
    int64_t tokens = s->batch * s->n;
    ATTN_TRY(attn_linear_forward(call->arena, call->threads, tokens, s->width, s->width, f->m, w->out, NULL, o));
    if (s->residual) {
        attn_add_f32(call->threads, tokens * s->width, o, x);
    }
    return ATTN_OK;
}

/* One sequence in parts, so that what lies between stays in the caches. */
static attn_status rat_parts(attn_call *call, const shape *sequence, const weights *w, const float *x, float *o)
{
    shape s = *sequence;
    rat_core core = core_of(&s);
    ATTN_TRY(attn_rat_core_open(call, &core));
    for (int64_t first = 0; first < sequence->n; first += PART) {
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        int64_t at = first * s.width;
        mixed f;
        s.n = attn_min_i64(PART, sequence->n - first);
        ATTN_TRY(rat_mix(call, &s, w, x + at, &core, first, &f));
        ATTN_TRY(mixer_end(call, &s, w, &f, x + at, o + at));
        attn_arena_release(call->arena, mark);
    }
    return ATTN_OK;
}

/* Is the layer a RAT layer (is_rat) or a local one. */
static attn_status mixer_forward(attn_call *call, const shape *s, int is_rat, const weights *w, const float *x, float *o)
{
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    if (is_rat) {
        shape one = *s;
        one.batch = 1;
        for (int64_t b = 0; b < s->batch; b++) {
            ATTN_TRY(rat_parts(call, &one, w, x + b * s->n * s->width, o + b * s->n * s->width));
            attn_arena_release(call->arena, mark);
        }
        return ATTN_OK;
    }
    mixed f;
    ATTN_TRY(local_mix(call, s, w, x, &f));
    ATTN_TRY(mixer_end(call, s, w, &f, x, o));
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* grad_x is overwritten. */
static attn_status mixer_backward(attn_call *call, const shape *s, int is_rat, const weights *w, const float *x, const float *grad_o,
                                  float *grad_x, const weight_gradients *to)
{
    int64_t c = s->width, d = c / s->heads, tokens = s->batch * s->n, size = tokens * c;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    attn_status status = ATTN_OK;
    mixed f;
    rat_core core = core_of(s);
    ATTN_TRY(is_rat ? attn_rat_core_open(call, &core) : ATTN_OK);
    ATTN_TRY(is_rat ? rat_mix(call, s, w, x, &core, 0, &f) : local_mix(call, s, w, x, &f));
    float *dm = floats(call, size, &status), *da = floats(call, size, &status), *dv = floats(call, size, &status);
    float *dg = floats(call, size, &status), *dq = floats(call, size, &status), *dk = floats(call, size, &status);
    float *proj = floats(call, tokens * f.columns, &status);
    ATTN_TRY(status);
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, tokens, c, c, f.m, w->out, grad_o, dm, to->out, NULL));
    if (is_rat) {
        float *a = f.m; /* the attention by token; m itself is done with */
        move_heads(call->threads, s->batch, s->n, s->heads, d, a, c, 0, f.a, 1);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
        for (int64_t t = 0; t < tokens; t++) {
            const float *z = f.proj + t * f.columns, *at = a + t * c;
            float *to_z = proj + t * f.columns, *by = dm + t * c;
            for (int64_t i = 0; i < c; i++) {
                float out = by[i] * z[i];
                to_z[i] = out * at[i] * (1 - z[i]);
                by[i] = out;
            }
        }
        move_heads(call->threads, s->batch, s->n, s->heads, d, dm, c, 0, da, 0);
        memset(dq, 0, (size_t)size * sizeof(float));
        memset(dk, 0, (size_t)size * sizeof(float));
        rat_gradients g = {da, dq, dk, dv, dg};
        ATTN_TRY(attn_rat_core_backward(call, &core, &f.rows, &g));
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
        for (int64_t i = 0; i < size; i++) {
            dg[i] *= f.g[i] * (1 - f.g[i]);
        }
        move_heads(call->threads, s->batch, s->n, s->heads, d, proj, f.columns, c, dv, 1);
        move_heads(call->threads, s->batch, s->n, s->heads, d, proj, f.columns, 2 * c, dg, 1);
        move_heads(call->threads, s->batch, s->n, s->groups, d, proj, f.columns, 3 * c, dq, 1);
        move_heads(call->threads, s->batch, s->n, s->groups, d, proj, f.columns, 3 * c + s->groups * d, dk, 1);
        attn_linear_add_columns(call->threads, tokens, c, proj + 2 * c, f.columns, to->bias);
    } else {
        move_heads(call->threads, s->batch, s->n, s->heads, d, dm, c, 0, da, 0);
        ATTN_TRY(local_backward(call, &f.local, da, dq, dk, dv));
        move_heads(call->threads, s->batch, s->n, s->heads, d, proj, f.columns, 0, dv, 1);
        move_heads(call->threads, s->batch, s->n, s->heads, d, proj, f.columns, c, dq, 1);
        move_heads(call->threads, s->batch, s->n, s->heads, d, proj, f.columns, 2 * c, dk, 1);
    }
    ATTN_TRY(attn_linear_backward(call->arena, call->threads, tokens, c, f.columns, f.y, w->in, proj, dm, to->in, NULL));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, tokens, c, s->eps, x, w->norm, dm, grad_x, to->norm, NULL));
    if (s->residual) {
        attn_add_f32(call->threads, size, grad_x, grad_o);
    }
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

static attn_ffn ffn_of(const shape *s, const weights *w)
{
    return (attn_ffn){.in = s->width, .hidden = s->hidden, .out = s->width, .activation = ATTN_ACTIVATION_GELU, .up = w->in, .down = w->out};
}

static attn_status block_ffn_forward(attn_call *call, const shape *s, const weights *w, const float *x, float *o)
{
    int64_t tokens = s->batch * s->n;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    attn_status status = ATTN_OK;
    float *y = floats(call, tokens * s->width, &status);
    attn_ffn ffn = ffn_of(s, w);
    ATTN_TRY(status);
    attn_norm_forward(ATTN_NORM_RMS, call->threads, tokens, s->width, s->eps, x, w->norm, NULL, y);
    ATTN_TRY(attn_ffn_forward(&ffn, call->arena, call->threads, tokens, y, o));
    attn_add_f32(call->threads, tokens * s->width, o, x);
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

static attn_status block_ffn_backward(attn_call *call, const shape *s, const weights *w, const float *x, const float *grad_o,
                                      float *grad_x, const weight_gradients *to)
{
    int64_t tokens = s->batch * s->n, size = tokens * s->width;
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    attn_status status = ATTN_OK;
    float *y = floats(call, size, &status), *dy = floats(call, size, &status);
    attn_ffn ffn = ffn_of(s, w);
    ATTN_TRY(status);
    attn_norm_forward(ATTN_NORM_RMS, call->threads, tokens, s->width, s->eps, x, w->norm, NULL, y);
    ATTN_TRY(attn_ffn_backward(&ffn, call->arena, call->threads, tokens, y, grad_o, dy, to->in, NULL, to->out, NULL));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, tokens, s->width, s->eps, x, w->norm, dy, grad_x, to->norm, NULL));
    attn_add_f32(call->threads, size, grad_x, grad_o);
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

static attn_status check_shape(const shape *s, int64_t rows_in, const char *name)
{
    if (s->width % s->heads != 0 || s->width < s->heads) {
        return attn_fail(ATTN_ERR_ARGUMENT, "heads = %lld does not divide C = %lld", (long long)s->heads, (long long)s->width);
    }
    if (s->heads % s->groups != 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "groups = %lld does not divide heads = %lld", (long long)s->groups, (long long)s->heads);
    }
    if (rows_in != rat_columns(s)) {
        return attn_fail(ATTN_ERR_SHAPE, "%s has %lld rows, expected 3C + 2*groups*d = %lld", name, (long long)rows_in,
                         (long long)rat_columns(s));
    }
    return ATTN_OK;
}

/* ---- rat.layer ---- */

typedef struct layer_params {
    int64_t heads, groups, chunk, rotary_dim, residual;
    double rotary_base, eps;
} layer_params;

static const attn_param_info layer_param_table[] = {
    ATTN_P_INT("heads", layer_params, heads, NULL, 1, INFINITY, "heads; divides C"),
    ATTN_P_INT("groups", layer_params, groups, "2", 1, INFINITY, "query and key heads; divides heads"),
    ATTN_P_INT("chunk", layer_params, chunk, "16", 1, INFINITY, "tokens of a chunk"),
    ROTARY_DIM(layer_params, rotary_dim, "the head size"),
    ATTN_P_FLOAT_OPEN("rotary_base", layer_params, rotary_base, "10000", 0, 1, INFINITY, 0, "base of the rotary angles"),
    ATTN_P_FLOAT("eps", layer_params, eps, "1e-6", 0, INFINITY, "of the norm"),
    ATTN_P_BOOL("residual", layer_params, residual, "true", "add the input"),
};

enum { Y_X, Y_NORM, Y_IN, Y_BIAS, Y_OUT_W, Y_O };

static const attn_port_info layer_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "tokens"),
    ATTN_IN("norm_w", "C", FLOAT, DIFF, "weight of the RMS norm"),
    ATTN_IN("w_in", "Rin,C", FLOAT, DIFF, "[3C + 2*groups*d, C]: rows of z, v, g, q, k"),
    ATTN_IN("gate_bias", "C", FLOAT, DIFF, "added to g before the sigmoid"),
    ATTN_IN("w_o", "C,C", FLOAT, DIFF, "output projection"),
    ATTN_OUT("o", "B,N,C", FLOAT, DIFF, "the layer's output"),
};

static attn_status layer_setup(const attn_call *call, shape *s, weights *w)
{
    const layer_params *p = call->params;
    *s = (shape){.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .width = attn_dim(call, "C"), .heads = p->heads,
                 .groups = p->groups, .chunk = p->chunk, .base = p->rotary_base, .eps = p->eps, .residual = (int)p->residual};
    *w = (weights){attn_f32(call->t[Y_NORM]), attn_f32(call->t[Y_IN]), attn_f32(call->t[Y_BIAS]), attn_f32(call->t[Y_OUT_W])};
    ATTN_TRY(check_shape(s, attn_dim(call, "Rin"), "w_in"));
    return rotary_dim_of(p->rotary_dim, s->width / s->heads, &s->rotary_dim);
}

static attn_status layer_bind(attn_call *call)
{
    shape s;
    weights w;
    return layer_setup(call, &s, &w);
}

static attn_status layer_forward(attn_call *call)
{
    shape s;
    weights w;
    ATTN_TRY(layer_setup(call, &s, &w));
    return mixer_forward(call, &s, 1, &w, attn_f32(call->t[Y_X]), attn_f32(call->t[Y_O]));
}

static attn_status layer_backward(attn_call *call)
{
    shape s;
    weights w;
    attn_status status = ATTN_OK;
    ATTN_TRY(layer_setup(call, &s, &w));
    weight_gradients to = {attn_f32(call->grad[Y_NORM]), attn_f32(call->grad[Y_IN]), attn_f32(call->grad[Y_BIAS]),
                           attn_f32(call->grad[Y_OUT_W])};
    float *grad_x = call->grad[Y_X] != NULL ? attn_f32(call->grad[Y_X]) : floats(call, s.batch * s.n * s.width, &status);
    ATTN_TRY(status);
    return mixer_backward(call, &s, 1, &w, attn_f32(call->t[Y_X]), attn_f32(call->grad[Y_O]), grad_x, &to);
}

static attn_status layer_cost(attn_call *call, attn_cost *cost)
{
    shape s;
    weights w;
    ATTN_TRY(layer_setup(call, &s, &w));
    double tokens = (double)(s.batch * s.n), c = (double)s.width;
    for (int64_t t = 0; t < s.n; t++) {
        cost->pairs += (double)(t / s.chunk + 1) * (double)(s.batch * s.heads);
    }
    cost->flops = tokens * (2 * c * ((double)rat_columns(&s) + c) + 6 * c) + 4 * cost->pairs * c / (double)s.heads;
    return ATTN_OK;
}

const attn_op_class attn_op_rat_layer = {
    .info = {.name = "rat.layer",
             .title = "A RAT layer: norm, projections, gates, core, output projection",
             .summary = "rat with everything around it: RMS norm, one projection to output gate, values, forget gate, queries and keys (shared by "
                        "the heads of a group), gated output, residual.",
             .paper = "arXiv:2507.04416",
             .differentiable = 1,
             ATTN_TABLE(layer_param_table, layer_ports)},
    .params_size = sizeof(layer_params),
    .bind = layer_bind,
    .forward = layer_forward,
    .backward = layer_backward,
    .cost = layer_cost,
};

/* ---- rat.hybrid ---- */

typedef struct hybrid_params {
    int64_t heads, groups, chunk, window, interleave;
    double rotary_base, eps;
} hybrid_params;

static const attn_param_info hybrid_param_table[] = {
    ATTN_P_INT("heads", hybrid_params, heads, NULL, 1, INFINITY, "heads; divides C"),
    ATTN_P_INT("groups", hybrid_params, groups, "2", 1, INFINITY, "query and key heads of RAT layers; divides heads"),
    ATTN_P_INT("chunk", hybrid_params, chunk, "16", 1, INFINITY, "tokens of a chunk"),
    ATTN_P_INT("window", hybrid_params, window, "1024", 0, INFINITY, "local layers see this many earlier tokens"),
    ATTN_P_INT("interleave", hybrid_params, interleave, "2", 1, INFINITY, "layer i is RAT when i mod interleave = 0, else local"),
    ATTN_P_FLOAT_OPEN("rotary_base", hybrid_params, rotary_base, "10000", 0, 1, INFINITY, 0, "base of the rotary angles"),
    ATTN_P_FLOAT("eps", hybrid_params, eps, "1e-6", 0, INFINITY, "of the norms"),
};

enum { X, RAT_NORM, RAT_IN, RAT_BIAS, RAT_OUT, LOCAL_NORM, LOCAL_IN, LOCAL_OUT, FFN_NORM, FFN_1, FFN_2, FINAL_NORM, O };

static const attn_port_info hybrid_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, DIFF, "tokens"),
    ATTN_IN("rat_norm", "R,C", FLOAT, DIFF, "norm weights of the R RAT layers"),
    ATTN_IN("rat_in", "R,Rin,C", FLOAT, DIFF, "[R, 3C + 2*groups*d, C]: rows of z, v, g, q, k"),
    ATTN_IN("rat_gate_bias", "R,C", FLOAT, DIFF, "gate biases"),
    ATTN_IN("rat_out", "R,C,C", FLOAT, DIFF, "output projections"),
    ATTN_IN("local_norm", "S,C", FLOAT, MAYBE, "norm weights of the S local layers"),
    ATTN_IN("local_in", "S,3*C,C", FLOAT, MAYBE, "rows of v, q, k"),
    ATTN_IN("local_out", "S,C,C", FLOAT, MAYBE, "output projections"),
    ATTN_IN("ffn_norm", "L,C", FLOAT, DIFF, "norm weights of the R+S feed-forward layers"),
    ATTN_IN("ffn_1", "L,F,C", FLOAT, DIFF, "first matrices"),
    ATTN_IN("ffn_2", "L,C,F", FLOAT, DIFF, "second matrices"),
    ATTN_IN("final_norm", "C", FLOAT, DIFF, "weight of the last norm"),
    ATTN_OUT("o", "B,N,C", FLOAT, DIFF, "the stack's output"),
};

static attn_status hybrid_setup(const attn_call *call, shape *s)
{
    const hybrid_params *p = call->params;
    int64_t layers = attn_dim(call, "L"), rat = attn_dim(call, "R"), locals = attn_max_i64(0, attn_dim(call, "S"));
    *s = (shape){.batch = attn_dim(call, "B"), .n = attn_dim(call, "N"), .width = attn_dim(call, "C"), .heads = p->heads,
                 .groups = p->groups, .chunk = p->chunk, .window = p->window, .hidden = attn_dim(call, "F"), .base = p->rotary_base,
                 .eps = p->eps, .residual = 1};
    if ((call->t[LOCAL_NORM] == NULL) != (call->t[LOCAL_IN] == NULL) || (call->t[LOCAL_IN] == NULL) != (call->t[LOCAL_OUT] == NULL)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "local_norm, local_in and local_out: expected all or none");
    }
    if (layers != rat + locals || rat != attn_ceil_div(layers, p->interleave)) {
        return attn_fail(ATTN_ERR_SHAPE, "%lld RAT and %lld local layers with %lld feed-forward layers do not fit interleave = %lld",
                         (long long)rat, (long long)locals, (long long)layers, (long long)p->interleave);
    }
    ATTN_TRY(check_shape(s, attn_dim(call, "Rin"), "rat_in"));
    return rotary_dim_of(ATTN_UNSET, s->width / s->heads, &s->rotary_dim);
}

static attn_status hybrid_bind(attn_call *call)
{
    shape s;
    return hybrid_setup(call, &s);
}

/* Slice i of stacked tensors; NULL for NULL. */
static float *slice(const attn_tensor *t, int64_t i)
{
    return t != NULL ? attn_f32(t) + i * (attn_tensor_count(t) / attn_max_i64(1, t->shape[0])) : NULL;
}

/* The mixer of layer i, and its feed-forward layer. */
static int layer_at(const attn_call *call, attn_tensor *const *t, int64_t i, float *mixer[4], float *ffn[4])
{
    const hybrid_params *p = call->params;
    int64_t rat = i / p->interleave, local_index = i - rat - 1;
    int is_rat = i % p->interleave == 0;
    mixer[0] = is_rat ? slice(t[RAT_NORM], rat) : slice(t[LOCAL_NORM], local_index);
    mixer[1] = is_rat ? slice(t[RAT_IN], rat) : slice(t[LOCAL_IN], local_index);
    mixer[2] = is_rat ? slice(t[RAT_BIAS], rat) : NULL;
    mixer[3] = is_rat ? slice(t[RAT_OUT], rat) : slice(t[LOCAL_OUT], local_index);
    ffn[0] = slice(t[FFN_NORM], i);
    ffn[1] = slice(t[FFN_1], i);
    ffn[2] = NULL;
    ffn[3] = slice(t[FFN_2], i);
    return is_rat;
}

/* states [2L + 1][tokens, C]: the input of every mixer and feed-forward layer, and the input of the last norm. */
static attn_status run_stack(attn_call *call, const shape *s, float *states)
{
    int64_t size = s->batch * s->n * s->width;
    memcpy(states, call->t[X]->data, (size_t)size * sizeof(float));
    for (int64_t i = 0; i < attn_dim(call, "L"); i++) {
        float *m[4], *f[4], *x = states + 2 * i * size;
        int is_rat = layer_at(call, call->t, i, m, f);
        weights mixer = {m[0], m[1], m[2], m[3]}, ffn = {f[0], f[1], f[2], f[3]};
        ATTN_TRY(mixer_forward(call, s, is_rat, &mixer, x, x + size));
        ATTN_TRY(block_ffn_forward(call, s, &ffn, x + size, x + 2 * size));
    }
    return ATTN_OK;
}

static attn_status hybrid_forward(attn_call *call)
{
    shape s;
    attn_status status = ATTN_OK;
    ATTN_TRY(hybrid_setup(call, &s));
    int64_t layers = attn_dim(call, "L"), tokens = s.batch * s.n, size = tokens * s.width;
    float *states = floats(call, (2 * layers + 1) * size, &status);
    ATTN_TRY(status);
    ATTN_TRY(run_stack(call, &s, states));
    attn_norm_forward(ATTN_NORM_RMS, call->threads, tokens, s.width, s.eps, states + 2 * layers * size, attn_f32(call->t[FINAL_NORM]), NULL,
                      attn_f32(call->t[O]));
    return ATTN_OK;
}

static attn_status hybrid_backward(attn_call *call)
{
    shape s;
    attn_status status = ATTN_OK;
    ATTN_TRY(hybrid_setup(call, &s));
    int64_t layers = attn_dim(call, "L"), tokens = s.batch * s.n, size = tokens * s.width;
    float *states = floats(call, (2 * layers + 1) * size, &status), *a = floats(call, size, &status), *b = floats(call, size, &status);
    ATTN_TRY(status);
    ATTN_TRY(run_stack(call, &s, states));
    ATTN_TRY(attn_norm_backward(ATTN_NORM_RMS, call->arena, call->threads, tokens, s.width, s.eps, states + 2 * layers * size,
                                attn_f32(call->t[FINAL_NORM]), attn_f32(call->grad[O]), a, attn_f32(call->grad[FINAL_NORM]), NULL));
    for (int64_t i = layers - 1; i >= 0; i--) {
        float *m[4], *f[4], *gm[4], *gf[4], *x = states + 2 * i * size;
        int is_rat = layer_at(call, call->t, i, m, f);
        layer_at(call, call->grad, i, gm, gf);
        weights mixer = {m[0], m[1], m[2], m[3]}, ffn = {f[0], f[1], f[2], f[3]};
        weight_gradients to_mixer = {gm[0], gm[1], gm[2], gm[3]}, to_ffn = {gf[0], gf[1], gf[2], gf[3]};
        ATTN_TRY(block_ffn_backward(call, &s, &ffn, x + size, a, b, &to_ffn));
        ATTN_TRY(mixer_backward(call, &s, is_rat, &mixer, x, b, a, &to_mixer));
    }
    if (call->grad[X] != NULL) {
        memcpy(call->grad[X]->data, a, (size_t)size * sizeof(float));
    }
    return ATTN_OK;
}

const attn_op_class attn_op_rat_hybrid = {
    .info = {.name = "rat.hybrid",
             .title = "Stack of RAT and sliding-window layers",
             .summary = "RAT layers for the long range interleaved with local attention for the short, each followed by a feed-forward layer "
                        "(GELU), and a last norm: the best model of the paper.",
             .paper = "arXiv:2507.04416",
             .differentiable = 1,
             ATTN_TABLE(hybrid_param_table, hybrid_ports)},
    .params_size = sizeof(hybrid_params),
    .bind = hybrid_bind,
    .forward = hybrid_forward,
    .backward = hybrid_backward,
};
