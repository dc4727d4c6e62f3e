/* DisenDiff (arXiv:2403.18551): attention calibration for learning several new concepts from one picture. A loss on a few columns
 * of the cross-attention map: a concept's modifier must look where its class word looks (bind), different classes must look at
 * different places (separate).
 *
 * The map is never stored: disendiff.train adds up only the 2C watched columns while it runs attention, and puts their
 * gradient back in while it recomputes the probabilities in backward.
 */
#include "op/class.h"

#include <string.h>

typedef struct disendiff_params {
    attn_ints grid;
    int64_t kernel, power, freeze;
    double sigma, smooth, eps, scale;
} disendiff_params;

#define CALIBRATION_PARAMS                                                                                             \
    ATTN_P_LIST(INTS, "grid", disendiff_params, grid, NULL, 1, ATTN_MOST_EXTENT, 2, 2, "picture grid, gh*gw = N"),      \
        ATTN_P_INT("kernel", disendiff_params, kernel, "3", 1, INFINITY, "odd width of the smoothing window; 1 = off"),     \
        ATTN_P_FLOAT_OPEN("sigma", disendiff_params, sigma, "0.5", 0, 1, INFINITY, 0,                                   \
                          "weights are exp(-(d/(2*sigma))^2)"),                                                        \
        ATTN_P_INT("power", disendiff_params, power, "2", 1, INFINITY, "exponent on class maps; 1 = off"),                    \
        ATTN_P_FLOAT_OPEN("smooth", disendiff_params, smooth, "1.0", 0, 1, INFINITY, 0, "added to intersection and union"), \
        ATTN_P_FLOAT("eps", disendiff_params, eps, "1e-8", -INFINITY, INFINITY, "in the min-max division")
#define ATTENTION_PARAMS                                                                                               \
    ATTN_P_INT("freeze", disendiff_params, freeze, "1", 0, INFINITY, "keys and values of the first tokens get no gradient"), \
        ATTN_P_SCALE(disendiff_params, scale)
#define LOSS_PORTS                                                                                                     \
    ATTN_OUT("loss", "1", FLOAT, ATTN_PORT_DIFF, "bind + separate"),                                                   \
        ATTN_OUT("bind", "1", FLOAT, 0, "how far modifiers look from their classes"),                                   \
        ATTN_OUT("separate", "1", FLOAT, 0, "overlap of different classes"),                                            \
        ATTN_OUT("maps", "B,maps,gh,gw", FLOAT, 0, "C modifier maps, then C class maps, as compared")

/* ---- The calibration on watched columns X [B, 2C, N]: modifiers, then classes ---- */

typedef struct calibration {
    const disendiff_params *p;
    int64_t batch, concepts, gh, gw, active;
    const int64_t *modifier;
    double *weights; /* kernel */
    double *scratch; /* 2 N */
} calibration;

/* Per map, kept between forward and backward: where the extremes are, 1/(max - min + eps), and the map before `power`. */
typedef struct processed {
    int64_t low, high;
    double range;
    double *normal, *smooth, *final;
} processed;

static attn_status calibration_bind(attn_call *call)
{
    const disendiff_params *p = call->params;
    int64_t gh = p->grid.items[0], gw = p->grid.items[1], n = attn_dim(call, "N"), radius = (p->kernel - 1) / 2;
    if (gh * gw != n) {
        return attn_fail(ATTN_ERR_ARGUMENT, "grid = [%lld, %lld] does not hold N = %lld positions", (long long)gh, (long long)gw,
                         (long long)n);
    }
    if (p->kernel % 2 == 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "kernel = %lld: expected an odd number", (long long)p->kernel);
    }
    if (gh <= radius || gw <= radius) {
        return attn_fail(ATTN_ERR_ARGUMENT, "grid = [%lld, %lld] is too small for kernel = %lld", (long long)gh, (long long)gw,
                         (long long)p->kernel);
    }
    attn_set_dim(call, "maps", 2 * attn_dim(call, "C"));
    attn_set_dim(call, "gh", gh);
    attn_set_dim(call, "gw", gw);
    return ATTN_OK;
}

static attn_status calibration_begin(attn_call *call, const attn_tensor *modifier, calibration *c)
{
    const disendiff_params *p = call->params;
    int64_t tokens = attn_dim(call, "T"), n = attn_dim(call, "N");
    *c = (calibration){.p = p, .batch = attn_dim(call, "B"), .concepts = attn_dim(call, "C"), .gh = p->grid.items[0],
                       .gw = p->grid.items[1], .modifier = attn_i64(modifier)};
    c->weights = attn_arena_array(call->arena, (size_t)p->kernel, sizeof(double));
    c->scratch = attn_arena_array(call->arena, (size_t)n * 2, sizeof(double));
    if (c->weights == NULL || c->scratch == NULL) {
        return attn_fail_memory((size_t)n * 2 * sizeof(double));
    }
    for (int64_t b = 0; b < c->batch; b++) {
        const int64_t *row = c->modifier + b * c->concepts;
        int skipped = c->concepts > 0 && row[0] == -1;
        for (int64_t i = 0; i < c->concepts; i++) {
            if (skipped ? row[i] != -1 : row[i] < 0 || row[i] + 1 >= tokens) {
                return attn_fail(ATTN_ERR_ARGUMENT,
                                 "modifier[%lld, %lld] = %lld: expected a position in 0 ... T-2 = %lld, or a whole row of -1",
                                 (long long)b, (long long)i, (long long)row[i], (long long)(tokens - 2));
            }
        }
        c->active += !skipped && c->concepts > 0;
    }
    double sum = 0;
    int64_t radius = (p->kernel - 1) / 2;
    for (int64_t d = -radius; d <= radius; d++) {
        double x = (double)d / (2 * p->sigma);
        c->weights[d + radius] = exp(-x * x);
        sum += c->weights[d + radius];
    }
    for (int64_t d = 0; d < p->kernel; d++) {
        c->weights[d] /= sum;
    }
    return ATTN_OK;
}

static int is_active(const calibration *c, int64_t b) { return c->concepts > 0 && c->modifier[b * c->concepts] != -1; }

/* Text position of watched column m (0 ... 2C-1) of sample b. */
static int64_t column(const calibration *c, int64_t b, int64_t m)
{
    return c->modifier[b * c->concepts + m % c->concepts] + (m >= c->concepts);
}

static int64_t reflect(int64_t i, int64_t n) { return i < 0 ? -i : i >= n ? 2 * n - 2 - i : i; }

/* One pass of the separable window along an axis of `n` cells with stride `step`; transposed: scatter instead of gather. */
static void smooth_axis(const calibration *c, const double *from, double *to, int64_t lines, int64_t line_step, int64_t n,
                        int64_t step, int transposed)
{
    int64_t radius = (c->p->kernel - 1) / 2;
    memset(to, 0, (size_t)(c->gh * c->gw) * sizeof *to);
    for (int64_t line = 0; line < lines; line++) {
        for (int64_t i = 0; i < n; i++) {
            for (int64_t d = -radius; d <= radius; d++) {
                int64_t near = line * line_step + reflect(i + d, n) * step, here = line * line_step + i * step;
                to[transposed ? near : here] += c->weights[d + radius] * from[transposed ? here : near];
            }
        }
    }
}

static void smooth_map(const calibration *c, const double *from, double *to, int transposed)
{
    smooth_axis(c, from, c->scratch, c->gh, c->gw, c->gw, 1, transposed);
    smooth_axis(c, c->scratch, to, c->gw, 1, c->gh, c->gw, transposed);
}

static attn_status process_map(attn_call *call, const calibration *c, const double *x, int is_class, processed *m)
{
    int64_t n = c->gh * c->gw;
    m->normal = attn_arena_array(call->arena, (size_t)n * 3, sizeof(double));
    if (m->normal == NULL) {
        return attn_fail_memory((size_t)n * 3 * sizeof(double));
    }
    m->smooth = m->normal + n;
    m->final = m->smooth + n;
    m->low = m->high = 0;
    for (int64_t i = 1; i < n; i++) {
        m->low = x[i] < x[m->low] ? i : m->low;
        m->high = x[i] > x[m->high] ? i : m->high;
    }
    m->range = x[m->high] - x[m->low] + c->p->eps;
    for (int64_t i = 0; i < n; i++) {
        m->normal[i] = (x[i] - x[m->low]) / m->range;
    }
    smooth_map(c, m->normal, m->smooth, 0);
    for (int64_t i = 0; i < n; i++) {
        m->final[i] = is_class ? pow(m->smooth[i], (double)c->p->power) : m->smooth[i];
    }
    return ATTN_OK;
}

static void intersection_union(const calibration *c, const double *x, const double *y, double *i_out, double *u_out)
{
    double inter = 0, sum = 0;
    for (int64_t i = 0; i < c->gh * c->gw; i++) {
        inter += x[i] * y[i];
        sum += x[i] + y[i];
    }
    *i_out = inter + c->p->smooth;
    *u_out = sum - inter + c->p->smooth;
}

static double overlap(const calibration *c, const double *x, const double *y)
{
    double i, u;
    intersection_union(c, x, y, &i, &u);
    return i / u;
}

/* grad[] += g * dJ/dy, x fixed. */
static void overlap_backward(const calibration *c, const double *x, const double *y, double g, double *grad)
{
    double i, u;
    intersection_union(c, x, y, &i, &u);
    for (int64_t p = 0; p < c->gh * c->gw; p++) {
        grad[p] += g * (x[p] * u - (1 - x[p]) * i) / (u * u);
    }
}

/* From the gradient of a final map to that of its column (overwrites both). */
static void process_map_backward(const calibration *c, const processed *m, int is_class, double *grad, double *grad_x)
{
    int64_t n = c->gh * c->gw;
    double power = (double)c->p->power;
    for (int64_t i = 0; i < n && is_class; i++) {
        grad[i] *= power * pow(m->smooth[i], power - 1);
    }
    smooth_map(c, grad, c->scratch + n, 1);
    double at_high = 0, at_low = 0;
    for (int64_t i = 0; i < n; i++) {
        double dy = c->scratch[n + i];
        grad_x[i] = dy / m->range;
        at_high -= dy * m->normal[i] / m->range;
        at_low += dy * (m->normal[i] - 1) / m->range;
    }
    grad_x[m->high] += at_high;
    grad_x[m->low] += at_low;
}

/* Losses and maps from the columns; with grad_x (2C N per sample) also g * dloss/dX. */
static attn_status calibrate(attn_call *call, const calibration *c, const double *x, float *maps, double *bind, double *separate,
                             double g, double *grad_x)
{
    int64_t n = c->gh * c->gw, concepts = c->concepts, pairs = concepts * (concepts - 1) / 2;
    processed *m = attn_arena_array(call->arena, (size_t)(2 * concepts), sizeof *m);
    double *grad = attn_arena_array(call->arena, (size_t)(2 * concepts * n), sizeof *grad);
    if (m == NULL || grad == NULL) {
        return attn_fail_memory((size_t)(2 * concepts * n) * sizeof *grad);
    }
    *bind = *separate = 0;
    for (int64_t b = 0; b < c->batch; b++) {
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        if (!is_active(c, b)) {
            if (maps != NULL && concepts > 0) {
                memset(maps + b * 2 * concepts * n, 0, (size_t)(2 * concepts * n) * sizeof *maps);
            }
            continue;
        }
        for (int64_t i = 0; i < 2 * concepts; i++) {
            ATTN_TRY(process_map(call, c, x + (b * 2 * concepts + i) * n, i >= concepts, &m[i]));
            for (int64_t j = 0; j < n && maps != NULL; j++) {
                maps[(b * 2 * concepts + i) * n + j] = (float)m[i].final[j];
            }
        }
        double share = 1.0 / (double)c->active;
        memset(grad, 0, (size_t)(2 * concepts * n) * sizeof *grad);
        for (int64_t i = 0; i < concepts; i++) {
            const double *class_map = m[concepts + i].final;
            *bind += (1 - overlap(c, class_map, m[i].final)) * share;
            overlap_backward(c, class_map, m[i].final, -g * share, grad + i * n);
            for (int64_t j = i + 1; j < concepts; j++) {
                const double *other = m[concepts + j].final;
                *separate += overlap(c, class_map, other) * share / (double)pairs;
                overlap_backward(c, class_map, other, g * share / (double)pairs, grad + (concepts + j) * n);
                overlap_backward(c, other, class_map, g * share / (double)pairs, grad + (concepts + i) * n);
            }
        }
        for (int64_t i = 0; i < 2 * concepts && grad_x != NULL; i++) {
            process_map_backward(c, &m[i], i >= concepts, grad + i * n, grad_x + (b * 2 * concepts + i) * n);
        }
        attn_arena_release(call->arena, mark);
    }
    return ATTN_OK;
}

static void put_losses(attn_call *call, int first_port, double bind, double separate)
{
    attn_f32(call->t[first_port])[0] = (float)(bind + separate);
    attn_f32(call->t[first_port + 1])[0] = (float)bind;
    attn_f32(call->t[first_port + 2])[0] = (float)separate;
}

static double *columns_scratch(attn_call *call, const calibration *c)
{
    size_t count = (size_t)(c->batch * 2 * c->concepts * c->gh * c->gw);
    double *x = attn_arena_array(call->arena, count, sizeof *x);
    if (x != NULL) {
        memset(x, 0, count * sizeof *x);
    }
    return x;
}

/* ---- disendiff: the loss on given maps ---- */

static const attn_param_info loss_param_table[] = {CALIBRATION_PARAMS};

enum { LOSS_ATTN, LOSS_MODIFIER, LOSS_LOSS, LOSS_BIND, LOSS_SEPARATE, LOSS_MAPS };

static const attn_port_info loss_ports[] = {
    ATTN_IN("attn", "B,S,N,T", FLOAT, ATTN_PORT_DIFF, "attention probabilities of picture positions over text tokens"),
    ATTN_IN("modifier", "B,C", INT, 0, "text position of each concept's modifier, its class word follows; a row of -1: none"),
    LOSS_PORTS,
};

static attn_status loss_forward_or_backward(attn_call *call, int backward)
{
    calibration c;
    ATTN_TRY(calibration_begin(call, call->t[LOSS_MODIFIER], &c));
    int64_t maps = attn_dim(call, "S"), n = attn_dim(call, "N"), tokens = attn_dim(call, "T");
    double *x = columns_scratch(call, &c), *grad_x = columns_scratch(call, &c);
    if (x == NULL || grad_x == NULL) {
        return attn_fail_memory((size_t)(c.batch * c.concepts * n) * 2 * sizeof *x);
    }
    const float *attn = attn_f32(call->t[LOSS_ATTN]);
    for (int64_t b = 0; b < c.batch; b++) {
        for (int64_t m = 0; m < 2 * c.concepts && is_active(&c, b); m++) {
            double *to = x + (b * 2 * c.concepts + m) * n;
            for (int64_t s = 0; s < maps; s++) {
                for (int64_t p = 0; p < n; p++) {
                    to[p] += (double)attn[((b * maps + s) * n + p) * tokens + column(&c, b, m)] / (double)maps;
                }
            }
        }
    }
    double bind, separate;
    if (!backward) {
        ATTN_TRY(calibrate(call, &c, x, attn_f32(call->t[LOSS_MAPS]), &bind, &separate, 0, NULL));
        put_losses(call, LOSS_LOSS, bind, separate);
        return ATTN_OK;
    }
    ATTN_TRY(calibrate(call, &c, x, NULL, &bind, &separate, (double)attn_f32(call->grad[LOSS_LOSS])[0], grad_x));
    float *grad = attn_f32(call->grad[LOSS_ATTN]);
    for (int64_t b = 0; b < c.batch && grad != NULL; b++) {
        for (int64_t m = 0; m < 2 * c.concepts && is_active(&c, b); m++) {
            const double *from = grad_x + (b * 2 * c.concepts + m) * n;
            for (int64_t s = 0; s < maps; s++) {
                for (int64_t p = 0; p < n; p++) {
                    grad[((b * maps + s) * n + p) * tokens + column(&c, b, m)] += (float)(from[p] / (double)maps);
                }
            }
        }
    }
    return ATTN_OK;
}

static attn_status loss_forward(attn_call *call) { return loss_forward_or_backward(call, 0); }

static attn_status loss_backward(attn_call *call) { return loss_forward_or_backward(call, 1); }

const attn_op_class attn_op_disendiff = {
    .info = {.name = "disendiff",
             .title = "Attention calibration loss for disentangled concepts",
             .summary = "A loss on cross-attention maps: modifiers must look where their class words look, different classes at different "
                        "places. For fine-tuning a text-to-image model on several concepts from one picture.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE(loss_param_table, loss_ports)},
    .params_size = sizeof(disendiff_params),
    .bind = calibration_bind,
    .forward = loss_forward,
    .backward = loss_backward,
};

/* ---- Cross-attention over a short text: a row of probabilities at a time ---- */

/* One attention map: N rows over T tokens. kt is k transposed, [D, T], so that inner loops run along the tokens. */
typedef struct cross {
    int64_t n, tokens, d, dv;
    float scale;
    const float *q, *k, *v, *kt;
    float *vt; /* [Dv, T], backward only */
} cross;

static void transpose(const float *from, float *to, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++) {
            to[j * rows + i] = from[i * columns + j];
        }
    }
}

/* to[t] = sum over c of x[c] * m[c][t] */
static void row_times(const float *x, const float *m, int64_t count, int64_t tokens, float *to)
{
    memset(to, 0, (size_t)tokens * sizeof *to);
    for (int64_t c = 0; c < count; c++) {
        for (int64_t t = 0; t < tokens; t++) {
            to[t] += x[c] * m[c * tokens + t];
        }
    }
}

static void probabilities(const cross *x, int64_t row, float *p)
{
    row_times(x->q + row * x->d, x->kt, x->d, x->tokens, p);
    float top = -INFINITY;
    for (int64_t t = 0; t < x->tokens; t++) {
        p[t] *= x->scale;
        top = p[t] > top ? p[t] : top;
    }
    double sum = 0;
    for (int64_t t = 0; t < x->tokens; t++) {
        p[t] = expf(p[t] - top);
        sum += (double)p[t];
    }
    for (int64_t t = 0; t < x->tokens; t++) {
        p[t] = (float)((double)p[t] / sum);
    }
}

static void weighted_values(const cross *x, const float *p, float *o)
{
    memset(o, 0, (size_t)x->dv * sizeof *o);
    for (int64_t t = 0; t < x->tokens; t++) {
        for (int64_t c = 0; c < x->dv; c++) {
            o[c] += p[t] * x->v[t * x->dv + c];
        }
    }
}

/* Gradients of one row from da (the gradient of its probabilities, overwritten): grad_q is set, grad_k and grad_v are added to
 * for tokens from `freeze` on. Each may be NULL. */
static void row_backward(const cross *x, int64_t row, const float *p, float *da, const float *grad_o, int64_t freeze,
                         float *grad_q, float *grad_k, float *grad_v)
{
    double sum = 0;
    for (int64_t t = 0; t < x->tokens; t++) {
        sum += (double)p[t] * (double)da[t];
    }
    for (int64_t t = 0; t < x->tokens; t++) {
        da[t] = p[t] * (da[t] - (float)sum) * x->scale; /* dS times scale */
    }
    if (grad_q != NULL) {
        memset(grad_q, 0, (size_t)x->d * sizeof *grad_q);
    }
    for (int64_t t = 0; t < x->tokens; t++) {
        for (int64_t c = 0; c < x->d && grad_q != NULL; c++) {
            grad_q[c] += da[t] * x->k[t * x->d + c];
        }
        if (t < freeze) {
            continue;
        }
        for (int64_t c = 0; c < x->d && grad_k != NULL; c++) {
            grad_k[t * x->d + c] += da[t] * x->q[row * x->d + c];
        }
        for (int64_t c = 0; c < x->dv && grad_v != NULL && grad_o != NULL; c++) {
            grad_v[t * x->dv + c] += p[t] * grad_o[c];
        }
    }
}

/* Per thread: transposed keys and values, a row of probabilities and one of their gradients. */
static int64_t cross_scratch_floats(int64_t tokens, int64_t d, int64_t dv) { return tokens * (d + dv + 2); }

static void cross_begin(cross *x, float *scratch)
{
    transpose(x->k, scratch, x->tokens, x->d);
    x->kt = scratch;
    x->vt = scratch + x->tokens * x->d;
}

static float *offset(const attn_tensor *tensor, int64_t by) { return tensor != NULL ? attn_f32(tensor) + by : NULL; }

/* ---- disendiff.attention ---- */

static const attn_param_info attention_param_table[] = {ATTENTION_PARAMS};

enum { ATT_Q, ATT_K, ATT_V, ATT_O, ATT_ATTN };

static const attn_port_info attention_ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries (picture positions)"),
    ATTN_IN("k", "B,Hkv,T,D", FLOAT, ATTN_PORT_DIFF, "keys (text tokens)"),
    ATTN_IN("v", "B,Hkv,T,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("attn", "B,H,N,T", FLOAT, ATTN_PORT_DIFF, "the attention map"),
};

static attn_status attention_bind(attn_call *call)
{
    if (attn_dim(call, "T") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "k needs at least one token");
    }
    return ATTN_OK;
}

static attn_status attention_run(attn_call *call, int backward)
{
    const disendiff_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), n = attn_dim(call, "N"), tokens = attn_dim(call, "T");
    int64_t d = attn_dim(call, "D"), dv = attn_dim(call, "Dv"), groups = attn_dim(call, "B") * kv_heads, group = kv_heads > 0 ? heads / kv_heads : 0;
    int64_t each = cross_scratch_floats(tokens, d, dv);
    float *scratch = attn_scratch_f32(call, each * groups);
    if (scratch == NULL) {
        return attn_fail_memory((size_t)(each * groups) * sizeof *scratch);
    }
    float scale = (float)attn_default_scale(p->scale, d);
    const float *grad_o = backward ? attn_f32(call->grad[ATT_O]) : NULL;
    const float *grad_attn = backward ? attn_f32(call->grad[ATT_ATTN]) : NULL;
    /* All query heads of a key/value head together: their gradients meet in it. */
#pragma omp parallel for num_threads(call->threads)
    for (int64_t g = 0; g < groups; g++) {
        float *own = scratch + g * each, *row = own + tokens * (d + dv), *da = row + tokens;
        for (int64_t i = g * group; i < (g + 1) * group; i++) {
            cross x = {n, tokens, d, dv, scale, attn_f32(call->t[ATT_Q]) + i * n * d, attn_f32(call->t[ATT_K]) + g * tokens * d,
                       attn_f32(call->t[ATT_V]) + g * tokens * dv, NULL, NULL};
            cross_begin(&x, own);
            if (backward) {
                transpose(x.v, x.vt, tokens, dv);
            }
            for (int64_t r = 0; r < n; r++) {
                int64_t at = i * n + r;
                float *p_row = backward ? row : attn_f32(call->t[ATT_ATTN]) + at * tokens;
                probabilities(&x, r, p_row);
                if (!backward) {
                    weighted_values(&x, p_row, attn_f32(call->t[ATT_O]) + at * dv);
                    continue;
                }
                memset(da, 0, (size_t)tokens * sizeof *da);
                if (grad_o != NULL) {
                    row_times(grad_o + at * dv, x.vt, dv, tokens, da);
                }
                for (int64_t t = 0; t < tokens && grad_attn != NULL; t++) {
                    da[t] += grad_attn[at * tokens + t];
                }
                row_backward(&x, r, p_row, da, grad_o != NULL ? grad_o + at * dv : NULL, p->freeze,
                             offset(call->grad[ATT_Q], at * d), offset(call->grad[ATT_K], g * tokens * d),
                             offset(call->grad[ATT_V], g * tokens * dv));
            }
        }
    }
    return ATTN_OK;
}

static attn_status attention_forward(attn_call *call) { return attention_run(call, 0); }

static attn_status attention_backward(attn_call *call) { return attention_run(call, 1); }

const attn_op_class attn_op_disendiff_attention = {
    .info = {.name = "disendiff.attention",
             .title = "Cross-attention with a frozen start token",
             .summary = "Softmax cross-attention over a short text that returns its map; the first tokens' keys and values get no gradient.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE(attention_param_table, attention_ports)},
    .params_size = sizeof(disendiff_params),
    .bind = attention_bind,
    .forward = attention_forward,
    .backward = attention_backward,
};

/* ---- disendiff.train: attention of all layers and the loss on it, fused ---- */

static const attn_param_info train_param_table[] = {CALIBRATION_PARAMS, ATTENTION_PARAMS};

enum { TRAIN_Q, TRAIN_K, TRAIN_V, TRAIN_MODIFIER, TRAIN_O, TRAIN_LOSS, TRAIN_BIND, TRAIN_SEPARATE, TRAIN_MAPS };

static const attn_port_info train_ports[] = {
    ATTN_IN("q", "L,B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries of L layers of one resolution"),
    ATTN_IN("k", "L,B,H,T,D", FLOAT, ATTN_PORT_DIFF, "keys (text tokens)"),
    ATTN_IN("v", "L,B,H,T,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_IN("modifier", "B,C", INT, 0, "text position of each concept's modifier, its class word follows; a row of -1: none"),
    ATTN_OUT("o", "L,B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    LOSS_PORTS,
};

static attn_status train_bind(attn_call *call)
{
    ATTN_TRY(attention_bind(call));
    return calibration_bind(call);
}

/* Rows of a sample that one thread takes together; a fixed number, so that results do not depend on the threads. */
#define ROW_BLOCK 32

/* Attention of all layers: o (may be NULL) and the watched columns. Each thread owns rows of a sample and goes through all its
 * layers and heads in order, so that columns add up without a reduction. */
static attn_status train_attend(attn_call *call, const calibration *c, float *o, double *columns)
{
    const disendiff_params *p = call->params;
    int64_t layers = attn_dim(call, "L"), batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), n = attn_dim(call, "N");
    int64_t tokens = attn_dim(call, "T"), d = attn_dim(call, "D"), dv = attn_dim(call, "Dv"), maps = layers * heads;
    int64_t all = layers * batch * heads, blocks = attn_ceil_div(n, ROW_BLOCK);
    float *kt = attn_scratch_f32(call, all * tokens * d), *rows = attn_scratch_f32(call, batch * blocks * tokens);
    if (kt == NULL || rows == NULL) {
        return attn_fail_memory((size_t)(all * tokens * d) * sizeof *kt);
    }
    float scale = (float)attn_default_scale(p->scale, d);
#pragma omp parallel for num_threads(call->threads)
    for (int64_t i = 0; i < all; i++) {
        transpose(attn_f32(call->t[TRAIN_K]) + i * tokens * d, kt + i * tokens * d, tokens, d);
    }
#pragma omp parallel for num_threads(call->threads)
    for (int64_t work = 0; work < batch * blocks; work++) {
        int64_t b = work / blocks, first = work % blocks * ROW_BLOCK, last = attn_min_i64(n, first + ROW_BLOCK);
        float *row = rows + work * tokens;
        for (int64_t s = 0; s < maps; s++) {
            int64_t i = (s / heads * batch + b) * heads + s % heads;
            cross x = {n, tokens, d, dv, scale, attn_f32(call->t[TRAIN_Q]) + i * n * d, NULL,
                       attn_f32(call->t[TRAIN_V]) + i * tokens * dv, kt + i * tokens * d, NULL};
            for (int64_t r = first; r < last; r++) {
                probabilities(&x, r, row);
                if (o != NULL) {
                    weighted_values(&x, row, o + (i * n + r) * dv);
                }
                for (int64_t m = 0; m < 2 * c->concepts && is_active(c, b); m++) {
                    columns[(b * 2 * c->concepts + m) * n + r] += (double)row[column(c, b, m)] / (double)maps;
                }
            }
        }
    }
    return ATTN_OK;
}

static attn_status train_forward(attn_call *call)
{
    calibration c;
    ATTN_TRY(calibration_begin(call, call->t[TRAIN_MODIFIER], &c));
    double *columns = columns_scratch(call, &c), bind, separate;
    if (columns == NULL) {
        return attn_fail_memory((size_t)(c.batch * c.concepts * attn_dim(call, "N")) * 2 * sizeof *columns);
    }
    ATTN_TRY(train_attend(call, &c, attn_f32(call->t[TRAIN_O]), columns));
    ATTN_TRY(calibrate(call, &c, columns, attn_f32(call->t[TRAIN_MAPS]), &bind, &separate, 0, NULL));
    put_losses(call, TRAIN_LOSS, bind, separate);
    return ATTN_OK;
}

static attn_status train_backward(attn_call *call)
{
    const disendiff_params *p = call->params;
    int64_t batch = attn_dim(call, "B"), heads = attn_dim(call, "H"), n = attn_dim(call, "N"), tokens = attn_dim(call, "T");
    int64_t d = attn_dim(call, "D"), dv = attn_dim(call, "Dv"), maps = attn_dim(call, "L") * heads, all = maps * batch;
    int64_t each = cross_scratch_floats(tokens, d, dv);
    calibration c;
    ATTN_TRY(calibration_begin(call, call->t[TRAIN_MODIFIER], &c));
    double *columns = columns_scratch(call, &c), *grad_x = columns_scratch(call, &c), bind, separate;
    float *scratch = attn_scratch_f32(call, each * all);
    if (columns == NULL || grad_x == NULL || scratch == NULL) {
        return attn_fail_memory((size_t)(each * all) * sizeof *scratch);
    }
    const float *grad_o = attn_f32(call->grad[TRAIN_O]), *grad_loss = attn_f32(call->grad[TRAIN_LOSS]);
    if (grad_loss != NULL) {
        ATTN_TRY(train_attend(call, &c, NULL, columns));
        ATTN_TRY(calibrate(call, &c, columns, NULL, &bind, &separate, (double)grad_loss[0], grad_x));
    }
    float scale = (float)attn_default_scale(p->scale, d);
#pragma omp parallel for num_threads(call->threads)
    for (int64_t i = 0; i < all; i++) {
        int64_t b = i / heads % batch;
        float *own = scratch + i * each, *row = own + tokens * (d + dv), *da = row + tokens;
        cross x = {n, tokens, d, dv, scale, attn_f32(call->t[TRAIN_Q]) + i * n * d, attn_f32(call->t[TRAIN_K]) + i * tokens * d,
                   attn_f32(call->t[TRAIN_V]) + i * tokens * dv, NULL, NULL};
        cross_begin(&x, own);
        transpose(x.v, x.vt, tokens, dv);
        for (int64_t r = 0; r < n; r++) {
            int64_t at = i * n + r;
            probabilities(&x, r, row);
            memset(da, 0, (size_t)tokens * sizeof *da);
            if (grad_o != NULL) {
                row_times(grad_o + at * dv, x.vt, dv, tokens, da);
            }
            for (int64_t m = 0; m < 2 * c.concepts && grad_loss != NULL && is_active(&c, b); m++) {
                da[column(&c, b, m)] += (float)(grad_x[(b * 2 * c.concepts + m) * n + r] / (double)maps);
            }
            row_backward(&x, r, row, da, grad_o != NULL ? grad_o + at * dv : NULL, p->freeze, offset(call->grad[TRAIN_Q], at * d),
                         offset(call->grad[TRAIN_K], i * tokens * d), offset(call->grad[TRAIN_V], i * tokens * dv));
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_disendiff_train = {
    .info = {.name = "disendiff.train",
             .title = "Cross-attention with the calibration loss, fused",
             .summary = "Attention of several layers and the calibration loss on their maps. Only the watched columns of the maps are kept, "
                        "so the cost is that of the attention and memory is linear.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE(train_param_table, train_ports)},
    .params_size = sizeof(disendiff_params),
    .bind = train_bind,
    .forward = train_forward,
    .backward = train_backward,
};

/* ---- disendiff.recon ---- */

enum { RECON_PRED, RECON_TARGET, RECON_MASK, RECON_LOSS };

static const attn_port_info recon_ports[] = {
    ATTN_IN("pred", "B,Ch,h,w", FLOAT, ATTN_PORT_DIFF, "prediction"),
    ATTN_IN("target", "B,Ch,h,w", FLOAT, 0, "what it should be"),
    ATTN_IN("mask", "B,1,h,w", FLOAT, 0, "weight of each position"),
    ATTN_OUT("loss", "1", FLOAT, ATTN_PORT_DIFF, "masked squared error"),
};

static double mask_area(const attn_call *call, int64_t b, int64_t cells)
{
    double area = 0;
    for (int64_t i = 0; i < cells; i++) {
        area += (double)attn_f32(call->t[RECON_MASK])[b * cells + i];
    }
    return area;
}

/* backward: the gradient instead of the loss. */
static attn_status recon_run(attn_call *call, int backward)
{
    int64_t batch = attn_dim(call, "B"), channels = attn_dim(call, "Ch"), cells = attn_dim(call, "h") * attn_dim(call, "w");
    const float *pred = attn_f32(call->t[RECON_PRED]), *target = attn_f32(call->t[RECON_TARGET]);
    const float *mask = attn_f32(call->t[RECON_MASK]);
    float *grad = backward ? attn_f32(call->grad[RECON_PRED]) : NULL;
    double loss = 0;
    for (int64_t b = 0; b < batch; b++) {
        double area = mask_area(call, b, cells);
        if (!(area > 0)) {
            return attn_fail(ATTN_ERR_ARGUMENT, "mask of sample %lld has no area", (long long)b);
        }
        double sum = 0, share = 1 / (area * (double)batch);
        for (int64_t i = 0; i < channels * cells; i++) {
            int64_t at = b * channels * cells + i;
            double error = (double)pred[at] - (double)target[at], weight = (double)mask[b * cells + i % cells];
            sum += error * error * weight;
            if (grad != NULL) {
                grad[at] = (float)((double)attn_f32(call->grad[RECON_LOSS])[0] * 2 * error * weight * share);
            }
        }
        loss += sum * share;
    }
    if (!backward) {
        attn_f32(call->t[RECON_LOSS])[0] = (float)loss;
    }
    return ATTN_OK;
}

static attn_status recon_forward(attn_call *call) { return recon_run(call, 0); }

static attn_status recon_backward(attn_call *call) { return recon_run(call, 1); }

const attn_op_class attn_op_disendiff_recon = {
    .info = {.name = "disendiff.recon",
             .title = "Masked reconstruction loss",
             .summary = "Per sample the masked squared error, summed over channels, divided by the mask's area; averaged over the batch.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(recon_ports)},
    .forward = recon_forward,
    .backward = recon_backward,
};

/* ---- disendiff.embed ---- */

enum { EMBED_TABLE, EMBED_IDS, EMBED_MODIFIERS, EMBED_O };

static const attn_port_info embed_ports[] = {
    ATTN_IN("table", "V,C", FLOAT, ATTN_PORT_DIFF, "embedding rows"),
    ATTN_IN("ids", "B,T", INT, 0, "token ids"),
    ATTN_IN("modifiers", "n", INT, 0, "ids whose rows get a gradient"),
    ATTN_OUT("o", "B,T,C", FLOAT, ATTN_PORT_DIFF, "the rows of the ids"),
};

static attn_status check_ids(const attn_tensor *ids, const char *name, int64_t rows)
{
    for (int64_t i = 0; i < attn_tensor_count(ids); i++) {
        if (attn_i64(ids)[i] < 0 || attn_i64(ids)[i] >= rows) {
            return attn_fail(ATTN_ERR_ARGUMENT, "%s[%lld] = %lld: expected an id in 0 ... %lld", name, (long long)i,
                             (long long)attn_i64(ids)[i], (long long)(rows - 1));
        }
    }
    return ATTN_OK;
}

static attn_status check_all_ids(const attn_call *call)
{
    ATTN_TRY(check_ids(call->t[EMBED_IDS], "ids", attn_dim(call, "V")));
    return check_ids(call->t[EMBED_MODIFIERS], "modifiers", attn_dim(call, "V"));
}

static attn_status embed_forward(attn_call *call)
{
    int64_t width = attn_dim(call, "C");
    ATTN_TRY(check_all_ids(call));
    for (int64_t i = 0; i < attn_tensor_count(call->t[EMBED_IDS]); i++) {
        memcpy(attn_f32(call->t[EMBED_O]) + i * width, attn_f32(call->t[EMBED_TABLE]) + attn_i64(call->t[EMBED_IDS])[i] * width,
               (size_t)width * sizeof(float));
    }
    return ATTN_OK;
}

static attn_status embed_backward(attn_call *call)
{
    int64_t width = attn_dim(call, "C"), count = attn_tensor_count(call->t[EMBED_MODIFIERS]);
    float *grad = attn_f32(call->grad[EMBED_TABLE]);
    ATTN_TRY(check_all_ids(call));
    for (int64_t i = 0; i < attn_tensor_count(call->t[EMBED_IDS]) && grad != NULL; i++) {
        int64_t id = attn_i64(call->t[EMBED_IDS])[i];
        int moves = 0;
        for (int64_t j = 0; j < count; j++) {
            moves |= attn_i64(call->t[EMBED_MODIFIERS])[j] == id;
        }
        for (int64_t c = 0; c < width && moves; c++) {
            grad[id * width + c] += attn_f32(call->grad[EMBED_O])[i * width + c];
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_disendiff_embed = {
    .info = {.name = "disendiff.embed",
             .title = "Embedding whose gradient reaches modifiers only",
             .summary = "Looks up rows of a table; in backward only the modifiers' rows get a gradient.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(embed_ports)},
    .forward = embed_forward,
    .backward = embed_backward,
};
