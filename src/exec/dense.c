/* Exact attention, forward. One task is a block of query rows of one key/value head: for each block of keys it computes a few rows'
 * scores, updates their softmax and accumulates values while everything is in cache. Keys are packed transposed once, so that
 * scores come out with keys along the vector lanes. */
#include "exec/dense.h"
#include "tensor/half.h"

#include <math.h>
#include <omp.h>
#include <string.h>

/* Soft caps below it are it: their reciprocals are no floats, and scores between 0 and it are 0 to any softmax. */
#define LEAST_CAP 1e-30

void attn_dense_defaults(attn_dense_settings *settings)
{
    *settings = (attn_dense_settings){.window = {-1, -1}, .scale = NAN};
}

/* ---- Checks ---- */

attn_status attn_dense_check_tensor(const char *name, const attn_tensor *tensor, const char *what, int ndim,
                                    const int64_t *shape, int float_only)
{
    if (tensor->ndim != ndim) {
        return attn_fail(ATTN_ERR_SHAPE, "%s has %d dimensions, expected %s", name, tensor->ndim, what);
    }
    int64_t count = 1;
    for (int i = 0; i < ndim; i++) {
        if (tensor->shape[i] != shape[i]) {
            return attn_fail(ATTN_ERR_SHAPE, "%s has extent %lld on axis %d, expected %lld (%s)", name,
                             (long long)tensor->shape[i], i, (long long)shape[i], what);
        }
        count *= shape[i];
    }
    if (float_only && tensor->dtype != ATTN_F32 && tensor->dtype != ATTN_F16 && tensor->dtype != ATTN_BF16) {
        return attn_fail(ATTN_ERR_DTYPE, "%s has data type %s, expected f32, f16 or bf16", name, attn_dtype_name(tensor->dtype));
    }
    if (count > 0 && tensor->data == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s has no data", name);
    }
    return ATTN_OK;
}

attn_status attn_dense_check_f32(const char *name, const attn_tensor *tensor, const char *what, int ndim, const int64_t *shape)
{
    ATTN_TRY(attn_dense_check_tensor(name, tensor, what, ndim, shape, 0));
    return tensor->dtype == ATTN_F32 ? ATTN_OK
                                     : attn_fail(ATTN_ERR_DTYPE, "%s has data type %s, expected f32", name,
                                                 attn_dtype_name(tensor->dtype));
}

static attn_status check_cache(const char *name, const attn_tensor *tensor, const char *what, const int64_t *shape,
                               const char *scale_name, const attn_tensor *scale)
{
    ATTN_TRY(attn_dense_check_tensor(name, tensor, what, 4, shape, tensor->dtype != ATTN_I8));
    if (tensor->dtype == ATTN_I8 && scale == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s is i8, so %s is needed", name, scale_name);
    }
    if (tensor->dtype != ATTN_I8 && scale != NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s goes with i8 only, %s is %s", scale_name, name, attn_dtype_name(tensor->dtype));
    }
    return scale != NULL ? attn_dense_check_f32(scale_name, scale, "[B,Hkv,M]", 3, shape) : ATTN_OK;
}

static attn_status check_key_length(const dense_problem *p, const attn_tensor *lengths)
{
    ATTN_TRY(attn_dense_check_tensor("key_length", lengths, "[B]", 1, &p->batch, 0));
    if (lengths->dtype != ATTN_I32 && lengths->dtype != ATTN_I64) {
        return attn_fail(ATTN_ERR_DTYPE, "key_length has data type %s, expected i32 or i64", attn_dtype_name(lengths->dtype));
    }
    for (int64_t b = 0; b < p->batch; b++) {
        int64_t at = b * lengths->stride[0];
        int64_t length = lengths->dtype == ATTN_I64 ? ((const int64_t *)lengths->data)[at] : ((const int32_t *)lengths->data)[at];
        if (length < 0 || length > p->m) {
            return attn_fail(ATTN_ERR_ARGUMENT, "key_length[%lld] = %lld, expected 0 ... M = %lld", (long long)b,
                             (long long)length, (long long)p->m);
        }
    }
    return ATTN_OK;
}

attn_status attn_dense_check(dense_problem *p, const attn_dense_settings *settings, const attn_dense_inputs *in)
{
    *p = (dense_problem){.settings = *settings, .in = in, .kernels = attn_tile_kernels_get(), .decode = attn_decode_kernels_get()};
    if (in->q.ndim != 4 || in->k.ndim != 4 || in->v.ndim != 4) {
        return attn_fail(ATTN_ERR_SHAPE, "q, k and v have %d, %d and %d dimensions, expected 4: [B,H,N,D], [B,Hkv,M,D], [B,Hkv,M,Dv]",
                         in->q.ndim, in->k.ndim, in->v.ndim);
    }
    p->batch = in->q.shape[0], p->heads = in->q.shape[1], p->n = in->q.shape[2], p->d = in->q.shape[3];
    p->kv_heads = in->k.shape[1], p->m = in->k.shape[2], p->dv = in->v.shape[3];
    if (p->d < 1 || p->dv < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "D = %lld and Dv = %lld, expected at least 1", (long long)p->d, (long long)p->dv);
    }
    if (p->kv_heads < 1 ? p->heads > 0 : p->heads % p->kv_heads != 0) {
        return attn_fail(ATTN_ERR_SHAPE, "%lld query heads are not a multiple of %lld key/value heads", (long long)p->heads,
                         (long long)p->kv_heads);
    }
    p->group = p->kv_heads > 0 ? p->heads / p->kv_heads : 0;
    ATTN_TRY(attn_dense_check_tensor("q", &in->q, "[B,H,N,D]", 4, in->q.shape, 1));
    ATTN_TRY(check_cache("k", &in->k, "[B,Hkv,M,D]", (int64_t[]){p->batch, p->kv_heads, p->m, p->d}, "k_scale", in->k_scale));
    ATTN_TRY(check_cache("v", &in->v, "[B,Hkv,M,Dv]", (int64_t[]){p->batch, p->kv_heads, p->m, p->dv}, "v_scale", in->v_scale));
    if (in->bias != NULL) {
        int64_t b = in->bias->ndim == 4 && in->bias->shape[0] == 1 ? 1 : p->batch;
        int64_t h = in->bias->ndim == 4 && in->bias->shape[1] == 1 ? 1 : p->heads;
        ATTN_TRY(attn_dense_check_tensor("bias", in->bias, "[1 or B, 1 or H, N, M]", 4, (int64_t[]){b, h, p->n, p->m}, 1));
    }
    if (in->slopes != NULL) {
        ATTN_TRY(attn_dense_check_f32("slopes", in->slopes, "[H]", 1, &p->heads));
    }
    if (in->sinks != NULL) {
        ATTN_TRY(attn_dense_check_f32("sinks", in->sinks, "[H]", 1, &p->heads));
    }
    if (in->key_length != NULL) {
        ATTN_TRY(check_key_length(p, in->key_length));
    }
    for (int side = 0; side < 2; side++) {
        if (settings->window[side] < -1) {
            return attn_fail(ATTN_ERR_ARGUMENT, "window[%d] = %lld, expected -1 or more", side, (long long)settings->window[side]);
        }
    }
    if (!(settings->softcap >= 0) || isinf(settings->softcap)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "softcap = %g, expected 0 or more", settings->softcap);
    }
    if (isinf(settings->scale)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "scale = %g, expected a finite number", settings->scale);
    }
    if (settings->softcap > 0 && settings->softcap < LEAST_CAP) {
        p->settings.softcap = LEAST_CAP;
    }
    p->scale = isnan(settings->scale) ? 1 / sqrt((double)p->d) : settings->scale;
    p->base2 = settings->softcap == 0;
    p->dv_pad = attn_ceil_div(p->dv, p->kernels->vw) * p->kernels->vw;
    return ATTN_OK;
}

/* ---- Rows ---- */

void attn_dense_visible(const dense_problem *p, int64_t b, int64_t n, int64_t *begin, int64_t *end)
{
    int64_t i = n + (p->m - p->n), low = 0, high = p->m;
    const attn_tensor *lengths = p->in->key_length;
    if (lengths != NULL) {
        int64_t at = b * lengths->stride[0];
        high = lengths->dtype == ATTN_I64 ? ((const int64_t *)lengths->data)[at] : ((const int32_t *)lengths->data)[at];
    }
    if (p->settings.causal) {
        high = attn_min_i64(high, i + 1);
    }
    /* Compared as differences, so that a huge window cannot overflow. */
    if (p->settings.window[0] >= 0 && p->settings.window[0] < i) {
        low = i - p->settings.window[0];
    }
    if (p->settings.window[1] >= 0 && p->settings.window[1] < high - i) {
        high = i + p->settings.window[1] + 1;
    }
    *begin = low;
    *end = attn_max_i64(high, 0);
}

static float load_element(const void *data, attn_dtype dtype, int64_t at)
{
    switch (dtype) {
    case ATTN_F16: return attn_f16_to_f32(((const uint16_t *)data)[at]);
    case ATTN_BF16: return attn_bf16_to_f32(((const uint16_t *)data)[at]);
    case ATTN_I8: return ((const int8_t *)data)[at];
    default: return ((const float *)data)[at];
    }
}

void attn_dense_load_row(const dense_problem *p, float *to, const attn_tensor *t, int64_t b, int64_t h, int64_t row,
                         int64_t count, float factor)
{
    const char *from = attn_dense_row(t, b, h, row);
    if (t->stride[3] == 1 || count == 1) {
        p->kernels->load_row(to, from, t->dtype, count, factor);
        return;
    }
    for (int64_t c = 0; c < count; c++) {
        to[c] = factor * load_element(from, t->dtype, c * t->stride[3]);
    }
}

void attn_dense_store_row(const attn_tensor *t, int64_t b, int64_t h, int64_t row, const float *from, int64_t count)
{
    void *to = (void *)(uintptr_t)attn_dense_row(t, b, h, row);
    int64_t stride = t->stride[3];
    if (t->dtype == ATTN_F32 && stride == 1) {
        memcpy(to, from, (size_t)count * sizeof *from);
        return;
    }
    for (int64_t c = 0; c < count; c++) {
        switch (t->dtype) {
        case ATTN_F16: ((uint16_t *)to)[c * stride] = attn_f32_to_f16(from[c]); break;
        case ATTN_BF16: ((uint16_t *)to)[c * stride] = attn_f32_to_bf16(from[c]); break;
        default: ((float *)to)[c * stride] = from[c]; break;
        }
    }
}

float attn_dense_row_scale(const attn_tensor *scales, int64_t b, int64_t h, int64_t row)
{
    return scales != NULL
               ? ((const float *)scales->data)[b * scales->stride[0] + h * scales->stride[1] + row * scales->stride[2]]
               : 1.0f;
}

void attn_dense_pack_transposed(const dense_problem *p, float *to, int64_t panel, const attn_tensor *t, const attn_tensor *scales,
                                int64_t b, int64_t h, int64_t first, int64_t count, float *rows)
{
    int64_t width = t->shape[3];
    for (int64_t j = 0; j < count; j += panel, to += width * panel) {
        int64_t keys = attn_min_i64(panel, count - j);
        if (keys < panel) {
            memset(to, 0, (size_t)(width * panel) * sizeof *to);
        }
        if (t->stride[3] == 1 && scales == NULL) {
            p->kernels->pack_transposed(to, panel, attn_dense_row(t, b, h, first + j), t->dtype, t->stride[2], keys, width);
            continue;
        }
        for (int64_t r = 0; r < keys; r += DENSE_PACK_ROWS) {
            int64_t some = attn_min_i64(DENSE_PACK_ROWS, keys - r);
            for (int64_t i = 0; i < some; i++) {
                int64_t row = first + j + r + i;
                attn_dense_load_row(p, rows + i * width, t, b, h, row, width, attn_dense_row_scale(scales, b, h, row));
            }
            p->kernels->pack_transposed(to + r, panel, rows, ATTN_F32, width, some, width);
        }
    }
}

void attn_dense_pack_rows(const dense_problem *p, float *to, const attn_tensor *t, const attn_tensor *scales, int64_t b,
                          int64_t h, int64_t first, int64_t count, int64_t pad)
{
    int64_t width = t->shape[3];
    for (int64_t j = 0; j < count; j++, to += pad) {
        attn_dense_load_row(p, to, t, b, h, first + j, width, attn_dense_row_scale(scales, b, h, first + j));
        memset(to + width, 0, (size_t)(pad - width) * sizeof *to);
    }
}

int attn_dense_needs_adjust(const dense_problem *p)
{
    return p->settings.softcap > 0 || p->in->slopes != NULL || p->in->bias != NULL;
}

void attn_dense_adjust(const dense_problem *p, float *s, int64_t b, int64_t h, int64_t n, int64_t first, int64_t count)
{
    if (p->settings.softcap > 0) {
        p->kernels->softcap(s, count, (float)p->settings.softcap);
        p->kernels->scale(s, count, (float)ATTN_LOG2E);
    }
    attn_dense_shift(p, s, b, h, n, first, count);
}

void attn_dense_shift(const dense_problem *p, float *s, int64_t b, int64_t h, int64_t n, int64_t first, int64_t count)
{
    const attn_tensor *bias = p->in->bias, *slopes = p->in->slopes;
    if (slopes != NULL) {
        float slope = (float)((double)((const float *)slopes->data)[h * slopes->stride[0]] * ATTN_LOG2E);
        int64_t i = n + (p->m - p->n);
        for (int64_t j = 0; j < count; j++) {
            int64_t distance = i - (first + j);
            s[j] -= slope * (float)(distance < 0 ? -distance : distance);
        }
    }
    if (bias != NULL) {
        const char *row = attn_dense_row(bias, bias->shape[0] == 1 ? 0 : b, bias->shape[1] == 1 ? 0 : h, n);
        int64_t stride = bias->stride[3], inside = attn_min_i64(count, p->m - first);
        if (bias->dtype == ATTN_F32 && stride == 1) {
            p->kernels->axpy(s, (const float *)(const void *)row + first, inside, (float)ATTN_LOG2E);
        } else {
            for (int64_t j = 0; j < inside; j++) {
                s[j] += (float)ATTN_LOG2E * load_element(row, bias->dtype, (first + j) * stride);
            }
        }
    }
}

void attn_dense_begin_row(const dense_problem *p, int64_t h, float *m, float *l)
{
    const attn_tensor *sinks = p->in->sinks;
    float sink = sinks != NULL ? ((const float *)sinks->data)[h * sinks->stride[0]] : -INFINITY;
    *m = (float)((double)sink * ATTN_LOG2E);
    *l = sink > -INFINITY ? 1.0f : 0.0f;
}

void attn_dense_store_lse(const attn_tensor *lse, int64_t b, int64_t h, int64_t n, float m, float l)
{
    ((float *)lse->data)[b * lse->stride[0] + h * lse->stride[1] + n * lse->stride[2]] = attn_softmax_lse(m, l);
}

void attn_dense_finish_row(const dense_problem *p, const attn_tensor *o, const attn_tensor *lse, int64_t b, int64_t h, int64_t n,
                           float *row, float m, float l)
{
    p->kernels->scale(row, p->dv, attn_softmax_inverse(l));
    attn_dense_store_row(o, b, h, n, row, p->dv);
    if (lse != NULL) {
        attn_dense_store_lse(lse, b, h, n, m, l);
    }
}

/* ---- The tiled forward ---- */

#define MOST_TASK_FLOATS (4 * DENSE_BLOCK_Q * 256) /* of the queries and sums of a task */
#define TASKS_EACH 8                               /* of a thread, so that all of them end at about the same time */

/* Packed keys [B*Hkv][m_pad * D] and values: packed [B*Hkv][M][dv_pad], or as they lie when they are whole rows of f32. */
typedef struct packed {
    int64_t m_pad;
    float *k, *v;
} packed;

typedef struct worker {
    float *q, *s, *o, *m, *l, *alpha, *rows;
    int64_t *begin, *end;
} worker;

int attn_dense_values_as_they_lie(const dense_problem *p)
{
    const attn_tensor *v = &p->in->v;
    return v->dtype == ATTN_F32 && v->stride[3] == 1 && p->dv % p->kernels->vw == 0;
}

static attn_status packed_create(const dense_problem *p, packed *to, attn_arena *arena)
{
    to->m_pad = attn_ceil_div(p->m, p->kernels->nr) * p->kernels->nr;
    size_t pairs = (size_t)(p->batch * p->kv_heads);
    to->k = attn_arena_array(arena, pairs * (size_t)to->m_pad, (size_t)p->d * sizeof(float));
    to->v = attn_dense_values_as_they_lie(p) ? NULL : attn_arena_array(arena, pairs * (size_t)p->m, (size_t)p->dv_pad * sizeof(float));
    if (to->k == NULL || (to->v == NULL && !attn_dense_values_as_they_lie(p))) {
        return attn_fail_memory(pairs * (size_t)to->m_pad * (size_t)(p->d + p->dv) * sizeof(float));
    }
    return ATTN_OK;
}

/* Keys first ... of one pair; chunks of DENSE_BLOCK_K. A chunk that no query sees (few queries with a window, at the end of a long
 * cache) is left out: the queries' ranges begin and end in order. */
static void pack_chunk(const dense_problem *p, const packed *to, int64_t pair, int64_t chunk, float *rows)
{
    int64_t b = pair / p->kv_heads, h = pair % p->kv_heads, first = chunk * DENSE_BLOCK_K;
    int64_t count = attn_min_i64(DENSE_BLOCK_K, p->m - first), low, high, unused;
    attn_dense_visible(p, b, 0, &low, &unused);
    attn_dense_visible(p, b, p->n - 1, &unused, &high);
    if (first + count <= low || first >= high) {
        return;
    }
    attn_dense_pack_transposed(p, to->k + (pair * to->m_pad + first) * p->d, p->kernels->nr, &p->in->k, p->in->k_scale, b, h, first, count,
                               rows);
    if (to->v != NULL) {
        attn_dense_pack_rows(p, to->v + (pair * p->m + first) * p->dv_pad, &p->in->v, p->in->v_scale, b, h, first, count, p->dv_pad);
    }
}

/* The rows of a group of query heads, head after head: row r is query r % N of head r / N of the group. */
static void load_queries(const dense_problem *p, worker *w, int64_t pair, int64_t first, int64_t count)
{
    int64_t b = pair / p->kv_heads, h0 = pair % p->kv_heads * p->group;
    float factor = (float)(p->base2 ? p->scale * ATTN_LOG2E : p->scale);
    for (int64_t r = 0; r < count; r++) {
        int64_t h = h0 + (first + r) / p->n, n = (first + r) % p->n;
        attn_dense_load_row(p, w->q + r * p->d, &p->in->q, b, h, n, p->d, factor);
        attn_dense_visible(p, b, n, &w->begin[r], &w->end[r]);
        attn_dense_begin_row(p, h, &w->m[r], &w->l[r]);
    }
    memset(w->o, 0, (size_t)(count * p->dv_pad) * sizeof *w->o);
}

/* Some rows against keys [low, high), low a multiple of the panel width; masks where a row's own range is narrower. */
static void attend_keys(const dense_problem *p, const packed *kv, worker *w, int64_t pair, int64_t first, int64_t r, int64_t rows,
                        int64_t low, int64_t high, int masked)
{
    const attn_tile_kernels *kernels = p->kernels;
    int64_t nr = kernels->nr, count = attn_ceil_div(high - low, kernels->vw) * kernels->vw;
    int64_t b = pair / p->kv_heads, h0 = pair % p->kv_heads * p->group;
    kernels->product(rows, count, p->d, w->q + r * p->d, p->d, 1, kv->k + (pair * kv->m_pad + low) * p->d, nr, p->d * nr, w->s,
                     DENSE_BLOCK_K, 0);
    for (int64_t i = 0; i < rows && attn_dense_needs_adjust(p); i++) {
        int64_t at = first + r + i;
        attn_dense_adjust(p, w->s + i * DENSE_BLOCK_K, b, h0 + at / p->n, at % p->n, low, count);
    }
    for (int64_t i = 0; i < rows && (masked || count > high - low); i++) {
        attn_dense_mask_row(w->s + i * DENSE_BLOCK_K, low, count, w->begin[r + i], attn_min_i64(high, w->end[r + i]));
    }
    kernels->softmax(rows, w->s, DENSE_BLOCK_K, count, w->m + r, w->l + r, w->alpha);
    for (int64_t i = 0; i < rows; i++) {
        if (w->alpha[i] != 1.0f) {
            kernels->scale(w->o + (r + i) * p->dv_pad, p->dv_pad, w->alpha[i]);
        }
    }
    const float *v = kv->v != NULL
                         ? kv->v + (pair * p->m + low) * p->dv_pad
                         : (const float *)(const void *)attn_dense_row(&p->in->v, b, pair % p->kv_heads, low);
    int64_t ldv = kv->v != NULL ? p->dv_pad : p->in->v.stride[2];
    kernels->product(rows, p->dv_pad, high - low, w->s, DENSE_BLOCK_K, 1, v, ldv, nr, w->o + r * p->dv_pad, p->dv_pad, 1);
}

/* The same at the edge of a mask: a tile's height at a time follows it more closely. */
static void attend_edge(const dense_problem *p, const packed *kv, worker *w, int64_t pair, int64_t first, int64_t r, int64_t rows,
                        int64_t low, int64_t high)
{
    int64_t height = p->kernels->mr, nr = p->kernels->nr;
    for (int64_t i = r; i < r + rows; i += height) {
        int64_t some = attn_min_i64(height, r + rows - i), from = high, to = low;
        for (int64_t j = i; j < i + some; j++) {
            if (w->begin[j] < w->end[j]) {
                from = attn_min_i64(from, w->begin[j]);
                to = attn_max_i64(to, w->end[j]);
            }
        }
        from = low + (attn_max_i64(from, low) - low) / nr * nr;
        to = attn_min_i64(to, high);
        if (from < to) {
            attend_keys(p, kv, w, pair, first, i, some, from, to, 1);
        }
    }
}

/* Rows against one block of keys: those that all of them see together, so many rows that a panel of keys or values serves several
 * tiles while it is in L1, and the edges apart. */
static void attend_block(const dense_problem *p, const packed *kv, worker *w, int64_t pair, int64_t first, int64_t r,
                         int64_t rows, int64_t block)
{
    int64_t end = attn_min_i64(block + DENSE_BLOCK_K, p->m), all_low = block, all_high = end, nr = p->kernels->nr;
    for (int64_t i = r; i < r + rows; i++) {
        all_low = attn_max_i64(all_low, w->begin[i]);
        all_high = attn_min_i64(all_high, w->end[i]);
    }
    all_low = block + attn_ceil_div(all_low - block, nr) * nr;
    all_high = all_high >= end ? end : block + (attn_max_i64(all_high, block) - block) / nr * nr;
    if (all_low >= all_high) {
        attend_edge(p, kv, w, pair, first, r, rows, block, end);
        return;
    }
    if (block < all_low) {
        attend_edge(p, kv, w, pair, first, r, rows, block, all_low);
    }
    attend_keys(p, kv, w, pair, first, r, rows, all_low, all_high, 0);
    if (all_high < end) {
        attend_edge(p, kv, w, pair, first, r, rows, all_high, end);
    }
}

static void store_results(const dense_problem *p, worker *w, int64_t pair, int64_t first, int64_t count, const attn_tensor *o,
                          const attn_tensor *lse)
{
    int64_t b = pair / p->kv_heads, h0 = pair % p->kv_heads * p->group;
    for (int64_t r = 0; r < count; r++) {
        int64_t h = h0 + (first + r) / p->n, n = (first + r) % p->n;
        attn_dense_finish_row(p, o, lse, b, h, n, w->o + r * p->dv_pad, w->m[r], w->l[r]);
    }
}

/* Query rows of a task: the more, the less often keys and values are read from afar, but their rows and sums must stay in L2, and threads
 * want many tasks to share. Results do not depend on it. */
static int64_t task_rows(const dense_problem *p, int threads)
{
    int64_t pairs = p->batch * p->kv_heads, all = p->group * p->n, rows = DENSE_BLOCK_Q;
    while (rows < 4 * DENSE_BLOCK_Q && 2 * rows * (p->d + p->dv) <= MOST_TASK_FLOATS && pairs * (all / (2 * rows)) >= TASKS_EACH * threads) {
        rows *= 2;
    }
    return rows;
}

static attn_status workers_create(const dense_problem *p, worker **workers, int64_t rows, int threads, attn_arena *arena)
{
    worker *made = attn_arena_array(arena, (size_t)threads, sizeof *made);
    for (int t = 0; t < threads && made != NULL; t++) {
        worker *w = &made[t];
        w->q = attn_arena_array(arena, (size_t)rows, (size_t)p->d * sizeof(float));
        w->s = attn_arena_array(arena, DENSE_ROWS * DENSE_BLOCK_K, sizeof(float));
        w->o = attn_arena_array(arena, (size_t)rows, (size_t)p->dv_pad * sizeof(float));
        w->m = attn_arena_array(arena, 3 * (size_t)rows, sizeof(float));
        w->rows = attn_arena_array(arena, DENSE_PACK_ROWS, (size_t)attn_max_i64(p->d, p->dv) * sizeof(float));
        w->begin = attn_arena_array(arena, 2 * (size_t)rows, sizeof(int64_t));
        if (w->q == NULL || w->s == NULL || w->o == NULL || w->m == NULL || w->rows == NULL || w->begin == NULL) {
            made = NULL;
            break;
        }
        w->l = w->m + rows;
        w->alpha = w->l + rows;
        w->end = w->begin + rows;
    }
    *workers = made;
    return made != NULL ? ATTN_OK : attn_fail_memory((size_t)threads * (size_t)(rows * (p->d + p->dv)) * sizeof(float));
}

static attn_status tiled(const dense_problem *p, const attn_tensor *o, const attn_tensor *lse, attn_arena *arena, int threads)
{
    packed kv;
    worker *workers;
    ATTN_TRY(packed_create(p, &kv, arena));
    int64_t pairs = p->batch * p->kv_heads, chunks = attn_ceil_div(p->m, DENSE_BLOCK_K);
    int64_t rows = p->group * p->n, block_q = task_rows(p, threads), blocks = attn_ceil_div(rows, block_q);
    ATTN_TRY(workers_create(p, &workers, block_q, threads, arena));
#pragma omp parallel num_threads(threads)
    {
        worker *w = &workers[omp_get_thread_num()];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pairs * chunks; i++) {
            pack_chunk(p, &kv, i / chunks, i % chunks, w->rows);
        }
        /* Pair after pair, whose keys and values then stay near; of each, late blocks first: under causality they are the long ones. */
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < pairs * blocks; i++) {
            int64_t pair = i / blocks, first = (blocks - 1 - i % blocks) * block_q;
            int64_t count = attn_min_i64(block_q, rows - first), low = INT64_MAX, high = 0;
            load_queries(p, w, pair, first, count);
            for (int64_t r = 0; r < count; r++) {
                low = attn_min_i64(low, w->begin[r]);
                high = attn_max_i64(high, w->end[r]);
            }
            for (int64_t block = low / DENSE_BLOCK_K * DENSE_BLOCK_K; block < high; block += DENSE_BLOCK_K) {
                for (int64_t r = 0; r < count; r += DENSE_ROWS) {
                    attend_block(p, &kv, w, pair, first, r, attn_min_i64(DENSE_ROWS, count - r), block);
                }
            }
            store_results(p, w, pair, first, count, o, lse);
        }
    }
    return ATTN_OK;
}

static attn_status check_top(dense_problem *p, const attn_tensor *top)
{
    p->top = top;
    if (top == NULL) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_dense_check_tensor("top", top, "[B,H,N]", 3, (int64_t[]){p->batch, p->heads, p->n}, 0));
    if (top->dtype != ATTN_I64) {
        return attn_fail(ATTN_ERR_DTYPE, "top has data type %s, expected i64", attn_dtype_name(top->dtype));
    }
    return attn_dense_is_decode(p) ? ATTN_OK
                                   : attn_fail(ATTN_ERR_UNSUPPORTED, "top needs N * H/Hkv of at most 16 and rows of k and v that "
                                                                     "are contiguous, N * H/Hkv is %lld",
                                               (long long)(p->group * p->n));
}

attn_status attn_dense_forward(const attn_dense_settings *settings, const attn_dense_inputs *inputs, const attn_tensor *o,
                               const attn_tensor *lse, const attn_exec *exec)
{
    return attn_dense_forward_top(settings, inputs, o, lse, NULL, exec);
}

attn_status attn_dense_forward_top(const attn_dense_settings *settings, const attn_dense_inputs *inputs, const attn_tensor *o,
                                   const attn_tensor *lse, const attn_tensor *top, const attn_exec *exec)
{
    dense_problem p;
    attn_scratch scratch;
    ATTN_TRY(attn_dense_check(&p, settings, inputs));
    ATTN_TRY(check_top(&p, top));
    ATTN_TRY(attn_dense_check_tensor("o", o, "[B,H,N,Dv]", 4, (int64_t[]){p.batch, p.heads, p.n, p.dv}, 1));
    if (lse != NULL) {
        ATTN_TRY(attn_dense_check_f32("lse", lse, "[B,H,N]", 3, (int64_t[]){p.batch, p.heads, p.n}));
    }
    if (p.batch * p.heads * p.n == 0) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_scratch_begin(&scratch, exec));
    int threads = attn_exec_threads(exec);
    attn_status status = attn_dense_is_decode(&p)  ? attn_dense_decode(&p, o, lse, scratch.arena, threads)
                         : attn_dense_is_short(&p) ? attn_dense_short(&p, o, lse, scratch.arena, threads)
                                                   : tiled(&p, o, lse, scratch.arena, threads);
    attn_scratch_end(&scratch);
    return status;
}
