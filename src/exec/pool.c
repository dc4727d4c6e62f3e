#include "exec/pool.h"

#include "exec/dense.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define PART 2048     /* keys of a part */
#define DECODE_ROWS 16
#define FEW_TASKS 8   /* from so many on, dense has work for all threads by itself, */
#define TASK_ROWS 192 /* but packs all keys at once, which from so many query rows on (one of its tasks) is worth it */

/* A view of keys [first, first + count) along an axis. */
static attn_tensor slice(const attn_tensor *t, int axis, int64_t first, int64_t count)
{
    attn_tensor out = *t;
    out.shape[axis] = count;
    out.data = (char *)t->data + (size_t)(first * t->stride[axis]) * attn_dtype_size(t->dtype);
    return out;
}

/* The inputs of one part; views live in `parts`. */
typedef struct part_inputs {
    attn_dense_inputs in;
    attn_tensor bias, k_scale, v_scale;
} part_inputs;

static void make_part(const attn_dense_inputs *in, int64_t first, int64_t count, part_inputs *part)
{
    part->in = (attn_dense_inputs){.q = in->q, .k = slice(&in->k, 2, first, count), .v = slice(&in->v, 2, first, count)};
    if (in->bias != NULL) {
        part->bias = slice(in->bias, 3, first, count);
        part->in.bias = &part->bias;
    }
    if (in->k_scale != NULL) {
        part->k_scale = slice(in->k_scale, 2, first, count);
        part->in.k_scale = &part->k_scale;
    }
    if (in->v_scale != NULL) {
        part->v_scale = slice(in->v_scale, 2, first, count);
        part->in.v_scale = &part->v_scale;
    }
}

/* Tasks that dense would make of the keys at once, if it gets all arguments right. */
static int64_t dense_tasks(const attn_dense_inputs *in)
{
    return in->q.shape[0] * in->k.shape[1] * attn_ceil_div(in->q.shape[1] / in->k.shape[1] * in->q.shape[2], TASK_ROWS);
}

static int64_t part_count(const attn_dense_inputs *in)
{
    if (in->q.ndim != 4 || in->k.ndim != 4 || in->v.ndim != 4 || in->k.shape[1] < 1 || in->v.shape[2] != in->k.shape[2]) {
        return 1; /* dense says what is wrong */
    }
    int64_t rows = in->q.shape[1] / in->k.shape[1] * in->q.shape[2];
    /* Up to a few rows dense itself splits the keys. */
    return (dense_tasks(in) < FEW_TASKS || rows <= TASK_ROWS) && rows > DECODE_ROWS ? attn_ceil_div(in->k.shape[2], PART) : 1;
}

/* What each part gives: o [parts][B,H,N,Dv] and lse [parts][B,H,N]. Parts are computed side by side, by one thread and in an arena each,
 * unless each alone has work for all threads. */
typedef struct work {
    int64_t parts, rows, dv;
    float *o, *lse;
    double *share; /* [parts] of a row */
    attn_arena **arenas;
    attn_exec each;
    int threads, arena_count;
} work;

static void work_end(work *w)
{
    for (int i = 0; i < w->arena_count; i++) {
        attn_arena_destroy(w->arenas[i]);
    }
}

static attn_status work_begin(work *w, const attn_dense_inputs *in, int64_t parts, attn_arena *arena, int threads)
{
    *w = (work){.parts = parts, .rows = in->q.shape[0] * in->q.shape[1] * in->q.shape[2], .dv = in->v.shape[3]};
    int64_t most = attn_max_i64(w->dv, in->q.shape[3]);
    int one_by_one = threads == 1 || dense_tasks(in) >= FEW_TASKS;
    w->threads = one_by_one ? 1 : threads;
    w->each = (attn_exec){.threads = one_by_one ? threads : 1, .arena = arena};
    w->o = attn_arena_array(arena, (size_t)(parts * w->rows), (size_t)most * sizeof *w->o);
    w->lse = attn_arena_array(arena, (size_t)(parts * w->rows), sizeof *w->lse);
    w->share = attn_arena_array(arena, (size_t)parts, sizeof *w->share);
    w->arenas = attn_arena_array(arena, (size_t)threads, sizeof *w->arenas);
    if (w->o == NULL || w->lse == NULL || w->share == NULL || w->arenas == NULL) {
        return attn_fail_memory((size_t)(parts * w->rows * (most + 1)) * sizeof(float));
    }
    for (; w->arena_count < w->threads && !one_by_one; w->arena_count++) {
        attn_status status = attn_arena_create(&w->arenas[w->arena_count], 0);
        if (status != ATTN_OK) {
            work_end(w);
            return status;
        }
    }
    return ATTN_OK;
}

static attn_exec exec_of(const work *w)
{
    return w->arena_count == 0 ? w->each : (attn_exec){.threads = 1, .arena = w->arenas[omp_get_thread_num()]};
}

static attn_tensor part_o(const work *w, const attn_dense_inputs *in, int64_t part, int64_t width)
{
    return attn_tensor_make(w->o + part * w->rows * width, ATTN_F32, 4,
                            (int64_t[]){in->q.shape[0], in->q.shape[1], in->q.shape[2], width});
}

/* What one of the parts is to be given to, and with what. */
typedef struct part_call {
    const attn_dense_settings *settings;
    const attn_dense_inputs *in;
    const attn_tensor *o, *lse, *grad_o; /* backward */
    const attn_dense_gradients *to;
    const work *w;
} part_call;

/* In no parallel region when each part has all threads: inside one, even of a single thread, OpenMP would start new threads for each part. */
static attn_status run_parts(const part_call *c, attn_status (*run)(const part_call *, int64_t part))
{
    attn_status result = ATTN_OK;
    for (int64_t i = 0; i < c->w->parts && c->w->arena_count == 0; i++) {
        ATTN_TRY(run(c, i));
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(c->w->threads) if (c->w->arena_count > 0)
    for (int64_t i = 0; i < (c->w->arena_count > 0 ? c->w->parts : 0); i++) {
        attn_status status = run(c, i);
        if (status != ATTN_OK) {
#pragma omp critical(attn_pool_failure)
            result = status;
        }
    }
    return result == ATTN_OK ? ATTN_OK : attn_fail(result, "a part of the keys failed: %s", attn_status_name(result));
}

static attn_status forward_part(const part_call *c, int64_t i)
{
    part_inputs part;
    make_part(c->in, i * PART, attn_min_i64(PART, c->in->k.shape[2] - i * PART), &part);
    attn_tensor o = part_o(c->w, c->in, i, c->w->dv);
    attn_tensor lse = attn_tensor_make(c->w->lse + i * c->w->rows, ATTN_F32, 3, c->in->q.shape);
    attn_exec exec = exec_of(c->w);
    return attn_dense_forward(c->settings, &part.in, &o, &lse, &exec);
}

/* Row r of the parts into the first one's row of o. */
static double merge_row(const work *w, int64_t r)
{
    double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < w->parts; i++) {
        double lse = (double)w->lse[i * w->rows + r];
        top = lse <= top ? top : lse; /* NaN too: such a part did see something */
    }
    if (top == -INFINITY) {
        return top;
    }
    for (int64_t i = 0; i < w->parts; i++) {
        w->share[i] = exp((double)w->lse[i * w->rows + r] - top);
        sum += w->share[i];
    }
    for (int64_t c = 0; c < w->dv; c++) {
        double value = 0;
        for (int64_t i = 0; i < w->parts; i++) {
            value += w->share[i] * (double)w->o[(i * w->rows + r) * w->dv + c];
        }
        w->o[r * w->dv + c] = (float)(value / sum);
    }
    return top + log(sum);
}

static int plain_f32(const attn_tensor *t)
{
    return t->dtype == ATTN_F32 && attn_tensor_is_contiguous(t);
}

attn_status attn_pool_forward(const attn_dense_settings *settings, const attn_dense_inputs *inputs, const attn_tensor *o,
                              const attn_tensor *lse, const attn_exec *exec)
{
    int64_t parts = part_count(inputs);
    if (parts < 2 || !plain_f32(o) || (lse != NULL && !plain_f32(lse))) {
        return attn_dense_forward(settings, inputs, o, lse, exec);
    }
    dense_problem problem;
    attn_scratch scratch;
    work w;
    ATTN_TRY(attn_dense_check(&problem, settings, inputs)); /* here, so that this thread has the message */
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    attn_status status = work_begin(&w, inputs, parts, scratch.arena, attn_exec_threads(exec));
    if (status == ATTN_OK) {
        status = run_parts(&(part_call){.settings = settings, .in = inputs, .w = &w}, forward_part);
        for (int64_t r = 0; r < w.rows && status == ATTN_OK; r++) {
            double sum = merge_row(&w, r);
            if (lse != NULL) {
                ((float *)lse->data)[r] = (float)sum;
            }
        }
        if (status == ATTN_OK) {
            memcpy(o->data, w.o, (size_t)(w.rows * w.dv) * sizeof(float));
        }
        work_end(&w);
    }
    attn_scratch_end(&scratch);
    return status;
}

/* dq of each part into w->o, the others straight into their slices. */
static attn_status backward_part(const part_call *c, int64_t i)
{
    int64_t first = i * PART, count = attn_min_i64(PART, c->in->k.shape[2] - first);
    part_inputs part;
    make_part(c->in, first, count, &part);
    attn_tensor q = part_o(c->w, c->in, i, c->in->q.shape[3]), k, v, bias;
    attn_dense_gradients some = {.q = c->to->q != NULL ? &q : NULL};
    if (c->to->k != NULL) {
        k = slice(c->to->k, 2, first, count);
        some.k = &k;
    }
    if (c->to->v != NULL) {
        v = slice(c->to->v, 2, first, count);
        some.v = &v;
    }
    if (c->to->bias != NULL) {
        bias = slice(c->to->bias, 3, first, count);
        some.bias = &bias;
    }
    attn_exec exec = exec_of(c->w);
    return attn_dense_backward(c->settings, &part.in, c->o, c->lse, c->grad_o, &some, &exec);
}

attn_status attn_pool_backward(const attn_dense_settings *settings, const attn_dense_inputs *inputs, const attn_tensor *o,
                               const attn_tensor *lse, const attn_tensor *grad_o, const attn_dense_gradients *gradients,
                               const attn_exec *exec)
{
    int64_t parts = part_count(inputs);
    if (parts < 2 || (gradients->q != NULL && !plain_f32(gradients->q))) {
        return attn_dense_backward(settings, inputs, o, lse, grad_o, gradients, exec);
    }
    dense_problem problem;
    attn_scratch scratch;
    work w;
    ATTN_TRY(attn_dense_check(&problem, settings, inputs)); /* here, so that this thread has the message */
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    attn_status status = work_begin(&w, inputs, parts, scratch.arena, attn_exec_threads(exec));
    if (status == ATTN_OK) {
        status = run_parts(&(part_call){settings, inputs, o, lse, grad_o, gradients, &w}, backward_part);
        int64_t size = w.rows * inputs->q.shape[3];
        for (int64_t e = 0; e < size && gradients->q != NULL && status == ATTN_OK; e++) {
            double sum = 0;
            for (int64_t i = 0; i < parts; i++) {
                sum += (double)w.o[i * size + e];
            }
            ((float *)gradients->q->data)[e] = (float)sum;
        }
        work_end(&w);
    }
    attn_scratch_end(&scratch);
    return status;
}
