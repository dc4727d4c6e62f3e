/* DisenDiff (arXiv:2403.18551): attention calibration for learning several new concepts from one picture. A loss on a few columns
 * of the cross-attention map: a concept's modifier must look where its class word looks (bind), different classes must look at
 * different places (separate). The attention itself is in disendiff_attention.c, the rest of the training in disendiff_train.c.
 */
#include "op/disendiff.h"

#include <string.h>

/* ---- The calibration of watched columns ---- */

/* Per map, kept between forward and backward: where the extremes are, 1/(max - min + eps), and the map before `power`. */
typedef struct processed {
    int64_t low, high;
    double range;
    double *normal, *smooth, *final;
} processed;

attn_status attn_disendiff_bind(attn_call *call)
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

attn_status attn_disendiff_begin(attn_call *call, const attn_tensor *modifier, calibration *c)
{
    const disendiff_params *p = call->params;
    int64_t tokens = attn_dim(call, "T"), n = attn_dim(call, "N");
    *c = (calibration){.p = p, .batch = attn_dim(call, "B"), .concepts = attn_dim(call, "C"), .gh = p->grid.items[0],
                       .gw = p->grid.items[1], .modifier = attn_i64(modifier)};
    c->weights = attn_arena_array(call->arena, (size_t)p->kernel, sizeof(double));
    c->scratch = attn_arena_array(call->arena, (size_t)n * 2, sizeof(double));
    size_t count = (size_t)(c->batch * 2 * c->concepts * n);
    c->columns = attn_arena_array(call->arena, count, sizeof(double));
    c->grad_columns = attn_arena_array(call->arena, count, sizeof(double));
    if (c->weights == NULL || c->scratch == NULL || c->columns == NULL || c->grad_columns == NULL) {
        return attn_fail_memory(count * 2 * sizeof(double));
    }
    memset(c->columns, 0, count * sizeof(double));
    memset(c->grad_columns, 0, count * sizeof(double));
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

int attn_disendiff_is_active(const calibration *c, int64_t b)
{
    return c->concepts > 0 && c->modifier[b * c->concepts] != -1;
}

int64_t attn_disendiff_column(const calibration *c, int64_t b, int64_t m)
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

/* Losses, and the maps (or NULL); with grad_x (2C N per sample) also g * dloss/dX. */
static attn_status calibrate(attn_call *call, const calibration *c, float *maps, double *bind, double *separate, double g,
                             double *grad_x)
{
    const double *x = c->columns;
    int64_t n = c->gh * c->gw, concepts = c->concepts, pairs = concepts * (concepts - 1) / 2;
    processed *m = attn_arena_array(call->arena, (size_t)(2 * concepts), sizeof *m);
    double *grad = attn_arena_array(call->arena, (size_t)(2 * concepts * n), sizeof *grad);
    if (m == NULL || grad == NULL) {
        return attn_fail_memory((size_t)(2 * concepts * n) * sizeof *grad);
    }
    *bind = *separate = 0;
    for (int64_t b = 0; b < c->batch; b++) {
        attn_arena_mark mark = attn_arena_get_mark(call->arena);
        if (!attn_disendiff_is_active(c, b)) {
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

attn_status attn_disendiff_loss(attn_call *call, calibration *c, int first_port)
{
    double bind = 0, separate = 0;
    ATTN_TRY(calibrate(call, c, attn_f32(call->t[first_port + 3]), &bind, &separate, 0, NULL));
    attn_f32(call->t[first_port])[0] = (float)(bind + separate);
    attn_f32(call->t[first_port + 1])[0] = (float)bind;
    attn_f32(call->t[first_port + 2])[0] = (float)separate;
    return ATTN_OK;
}

attn_status attn_disendiff_loss_backward(attn_call *call, calibration *c, double grad_loss)
{
    double bind = 0, separate = 0;
    return calibrate(call, c, NULL, &bind, &separate, grad_loss, c->grad_columns);
}

/* ---- disendiff: the loss on given maps ---- */

static const attn_param_info loss_param_table[] = {CALIBRATION_PARAMS};

enum { LOSS_ATTN, LOSS_MODIFIER, LOSS_LOSS, LOSS_BIND, LOSS_SEPARATE, LOSS_MAPS };

static const attn_port_info loss_ports[] = {
    ATTN_IN("attn", "B,S,N,T", FLOAT, ATTN_PORT_DIFF, "attention probabilities of picture positions over text tokens"),
    ATTN_IN("modifier", "B,C", INT, 0, "text position of each concept's modifier, its class word follows; a row of -1: none"),
    LOSS_PORTS,
};

#define ROWS 64 /* positions of a task */

/* For each sample and block of positions all maps in order, so that columns add up without a reduction: columns from the maps, or
 * grad_columns into their gradient. */
static void pass_columns(attn_call *call, const calibration *c, const float *attn, float *grad)
{
    int64_t maps = attn_dim(call, "S"), n = attn_dim(call, "N"), tokens = attn_dim(call, "T"), blocks = attn_ceil_div(n, ROWS);
#pragma omp parallel for num_threads(call->threads)
    for (int64_t task = 0; task < c->batch * blocks; task++) {
        int64_t b = task / blocks, first = task % blocks * ROWS, end = attn_min_i64(n, first + ROWS);
        for (int64_t s = 0; s < maps && attn_disendiff_is_active(c, b); s++) {
            for (int64_t p = first; p < end; p++) {
                for (int64_t m = 0; m < 2 * c->concepts; m++) {
                    int64_t at = (b * 2 * c->concepts + m) * n + p,
                            from = ((b * maps + s) * n + p) * tokens + attn_disendiff_column(c, b, m);
                    if (grad != NULL) {
                        grad[from] += (float)(c->grad_columns[at] / (double)maps);
                    } else {
                        c->columns[at] += (double)attn[from] / (double)maps;
                    }
                }
            }
        }
    }
}

static attn_status loss_forward(attn_call *call)
{
    calibration c;
    ATTN_TRY(attn_disendiff_begin(call, call->t[LOSS_MODIFIER], &c));
    pass_columns(call, &c, attn_f32(call->t[LOSS_ATTN]), NULL);
    return attn_disendiff_loss(call, &c, LOSS_LOSS);
}

static attn_status loss_backward(attn_call *call)
{
    calibration c;
    ATTN_TRY(attn_disendiff_begin(call, call->t[LOSS_MODIFIER], &c));
    pass_columns(call, &c, attn_f32(call->t[LOSS_ATTN]), NULL);
    ATTN_TRY(attn_disendiff_loss_backward(call, &c, (double)attn_f32(call->grad[LOSS_LOSS])[0]));
    if (call->grad[LOSS_ATTN] != NULL) {
        pass_columns(call, &c, NULL, attn_f32(call->grad[LOSS_ATTN]));
    }
    return ATTN_OK;
}

/* Little beside reading the columns. */
static attn_status loss_cost(attn_call *call, attn_cost *cost)
{
    double numbers = (double)attn_dim(call, "B") * (double)attn_dim(call, "S") * (double)attn_dim(call, "N") * (double)attn_dim(call, "maps");
    *cost = (attn_cost){.flops = numbers, .bytes = numbers * sizeof(float)};
    return ATTN_OK;
}

const attn_op_class attn_op_disendiff = {
    .info = {.name = "disendiff",
             .title = "Attention calibration loss for disentangled concepts",
             .summary = "A loss on cross-attention maps: modifiers must look where their class words look, different "
                        "classes at different "
                        "places. For fine-tuning a text-to-image model on several concepts from one picture.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE(loss_param_table, loss_ports)},
    .params_size = sizeof(disendiff_params),
    .bind = attn_disendiff_bind,
    .forward = loss_forward,
    .backward = loss_backward,
    .cost = loss_cost,
};
