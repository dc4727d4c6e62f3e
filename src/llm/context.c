/* Evaluation of a transformer over batches of tokens from one or several sequences.
 *
 * A batch is read in spans, and a span goes through a layer in chunks, which bound the memory of what is between two products. A span
 * is one chunk, or longer where a layer's mechanism wants to see many queries at once: then all chunks' keys come first, then the
 * attention of all queries, then the rest of the layer, chunk by chunk.
 *
 * Shapes: N tokens of a chunk, C the width, H query heads and G key heads of width D, F the hidden width,
 * V the vocabulary.
 *
 *     x [N, C] = embedding
 *     each layer:  q, k, v = W norm(x);  rotate q, k;  cache k, v
 *                  x += W attention(q, cache)
 *                  x += W (act(W h) * W h) with h = norm(x)
 *     logits [V] = W norm(x)
 *
 * Where only the last tokens' logits are wanted, the last layer caches the keys and values of all tokens, and goes on with those that
 * answer alone.
 */
#include "llm/context.h"

#include "core/barrier.h"
#include "kernel/rows.h"

#include <math.h>
#include <omp.h>
#include <time.h>

#define STANDARD_LENGTH 32768
#define STANDARD_CHUNK 512
#define EACH_ROWS 12 /* rows of logits that are computed together for `each` */

/* One token of a span. */
typedef struct row {
    int32_t token;
    int sequence;
    int item;         /* of the batch */
    int64_t index;    /* within its item */
    int64_t position;
    int last; /* of its item */
} row;

/* Consecutive rows of one sequence. `begin` counts in the span. */
typedef struct segment {
    int sequence;
    int64_t begin, count, position;
} segment;

struct attn_context {
    const attn_model *model;
    attn_context_settings settings;
    int threads;
    attn_kv *caches;   /* [sequences][layers] */
    int64_t *lengths;  /* [sequences] */
    attn_llm_attention *attention; /* [layers] */
    attn_arena *buffers, *scratch;
    /* Of a span. */
    attn_arena *wide;
    int64_t span;
    row *rows;
    segment *segments;
    float *x, *q, *mixed; /* rows of C, HD, HD */
    float *angles[2];  /* per rope: rows of [cosine, sine][dims / 2] */
    /* Of a chunk. */
    float *h, *k, *v, *gate, *up; /* rows of C, GD, GD, F, F */
    attn_quant_input in_width, in_heads, in_hidden, in_logits;
    attn_barrier barrier; /* of the threads that run a layer's part */
    char *thread_scratch; /* [threads][thread_bytes] */
    size_t thread_bytes;
    int64_t *key_counts;
    float *logits;
    int64_t logit_rows; /* that `logits` has room for */
    int answered;       /* items that attn_context_logits() knows */
    attn_context_stats stats;
};

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static const attn_row_kernels *kernels(void) { return ATTN_KERNEL_SELECT(attn_row_kernels_table, attn_isa_current()); }

static attn_kv *cache_of(const attn_context *c, int sequence, int64_t layer)
{
    return &c->caches[(int64_t)sequence * c->model->info.layers + layer];
}

/* ---- Creation ---- */

static attn_status check_settings(const attn_model *model, attn_context_settings *s)
{
    if (s->length == 0) {
        s->length = attn_min_i64(model->info.context_length, STANDARD_LENGTH);
    }
    if (s->sequences == 0) {
        s->sequences = 1;
    }
    if (s->chunk == 0) {
        s->chunk = STANDARD_CHUNK;
    }
    if (s->length < 1 || s->length > INT32_MAX) {
        return attn_fail(ATTN_ERR_ARGUMENT, "length is %lld, expected 1 to 2^31 - 1 (0: default)",
                         (long long)s->length);
    }
    if (s->sequences < 1 || s->sequences > 1 << 20) {
        return attn_fail(ATTN_ERR_ARGUMENT, "sequences is %d, expected 1 to 2^20 (0: 1)", s->sequences);
    }
    if (s->chunk < 1 || s->chunk > 1 << 20) {
        return attn_fail(ATTN_ERR_ARGUMENT, "chunk is %lld, expected 1 to 2^20 (0: %d)", (long long)s->chunk,
                         STANDARD_CHUNK);
    }
    if (s->threads < 0 || s->threads > 4096) {
        return attn_fail(ATTN_ERR_ARGUMENT, "threads is %d, expected 1 to 4096 (0: automatic)", s->threads);
    }
    if (s->cache != ATTN_F32 && s->cache != ATTN_F16 && s->cache != ATTN_BF16 && s->cache != ATTN_I8) {
        return attn_fail(ATTN_ERR_DTYPE, "cache is %s, expected f32, f16, bf16 or i8", attn_dtype_name(s->cache));
    }
    s->chunk = attn_min_i64(s->chunk, s->length * s->sequences);
    return ATTN_OK;
}

static attn_status make_caches(attn_context *c)
{
    const attn_model_info *info = &c->model->info;
    c->caches = attn_calloc_array((size_t)c->settings.sequences * (size_t)info->layers, sizeof *c->caches);
    c->lengths = attn_calloc_array((size_t)c->settings.sequences, sizeof *c->lengths);
    c->attention = attn_calloc_array((size_t)info->layers, sizeof *c->attention);
    if (c->caches == NULL || c->lengths == NULL || c->attention == NULL) {
        return attn_fail(ATTN_ERR_MEMORY, "out of memory (%d sequences)", c->settings.sequences);
    }
    for (int s = 0; s < c->settings.sequences; s++) {
        for (int64_t l = 0; l < info->layers; l++) {
            int64_t window = c->model->layers[l].window, capacity = c->settings.length;
            if (window > 0) {
                capacity = attn_min_i64(capacity, window + attn_max_i64(c->settings.chunk, 256));
            }
            ATTN_TRY(attn_kv_make(cache_of(c, s, l), info->kv_heads, info->head_width, capacity, window,
                                  c->settings.cache));
        }
    }
    return ATTN_OK;
}

static attn_status make_floats(attn_arena *arena, int64_t rows, int64_t width, float **out)
{
    *out = attn_arena_array(arena, (size_t)rows, (size_t)width * sizeof **out);
    return *out != NULL ? ATTN_OK : attn_fail_memory((size_t)rows * (size_t)width * sizeof **out);
}

static attn_status fill_wide(attn_context *c, int64_t n)
{
    const attn_model_info *info = &c->model->info;
    int64_t q_width = info->heads * info->head_width;
    c->wide = NULL;
    ATTN_TRY(attn_arena_create(&c->wide, 0));
    c->rows = attn_arena_array(c->wide, (size_t)n, sizeof *c->rows);
    c->segments = attn_arena_array(c->wide, (size_t)n, sizeof *c->segments);
    if (c->rows == NULL || c->segments == NULL) {
        return attn_fail_memory((size_t)n * (sizeof *c->rows + sizeof *c->segments));
    }
    ATTN_TRY(make_floats(c->wide, n, info->width, &c->x));
    ATTN_TRY(make_floats(c->wide, n, q_width, &c->q));
    ATTN_TRY(make_floats(c->wide, n, q_width, &c->mixed));
    for (int i = 0; i < 2 && c->model->ropes[i].frequency != NULL; i++) {
        ATTN_TRY(make_floats(c->wide, n, c->model->ropes[i].dims, &c->angles[i]));
    }
    c->span = n;
    return ATTN_OK;
}

/* Room for spans of n tokens instead of what there was, which stays when there is no memory. */
static attn_status make_wide(attn_context *c, int64_t n)
{
    attn_context before = *c;
    attn_status status = fill_wide(c, n);
    attn_arena_destroy(status == ATTN_OK ? before.wide : c->wide);
    if (status != ATTN_OK) {
        *c = before;
    }
    return status;
}

static attn_status make_buffers(attn_context *c)
{
    const attn_model_info *info = &c->model->info;
    int64_t n = c->settings.chunk;
    int64_t q_width = info->heads * info->head_width, k_width = info->kv_heads * info->head_width;
    ATTN_TRY(attn_arena_create(&c->buffers, 0));
    ATTN_TRY(attn_arena_create(&c->scratch, 0));
    c->key_counts = attn_arena_array(c->buffers, (size_t)info->kv_heads, sizeof *c->key_counts);
    if (c->key_counts == NULL) {
        return attn_fail_memory((size_t)info->kv_heads * sizeof *c->key_counts);
    }
    ATTN_TRY(make_floats(c->buffers, n, info->width, &c->h));
    ATTN_TRY(make_floats(c->buffers, n, k_width, &c->k));
    ATTN_TRY(make_floats(c->buffers, n, k_width, &c->v));
    ATTN_TRY(make_floats(c->buffers, n, info->hidden, &c->gate));
    ATTN_TRY(make_floats(c->buffers, n, info->hidden, &c->up));
    ATTN_TRY(attn_quant_input_make(&c->in_width, c->buffers, n, info->width));
    ATTN_TRY(attn_quant_input_make(&c->in_heads, c->buffers, n, q_width));
    ATTN_TRY(attn_quant_input_make(&c->in_hidden, c->buffers, n, info->hidden));
    c->in_width.x = c->h;
    c->in_hidden.x = c->gate;
    c->in_logits = c->in_width; /* the last norm comes when nothing else needs the memory */
    c->thread_bytes = attn_quant_scratch_bytes(attn_max_i64(info->width, attn_max_i64(q_width, info->hidden)));
    c->thread_scratch = attn_arena_array(c->buffers, (size_t)c->threads, c->thread_bytes);
    return c->thread_scratch != NULL ? make_wide(c, n) : attn_fail_memory((size_t)c->threads * c->thread_bytes);
}

attn_status attn_context_create(attn_context **context, const attn_model *model, const attn_context_settings *settings)
{
    *context = NULL;
    attn_context *made = attn_calloc_array(1, sizeof *made);
    if (made == NULL) {
        return attn_fail_memory(sizeof *made);
    }
    made->model = model;
    if (settings != NULL) {
        made->settings = *settings;
    }
    attn_status status = check_settings(model, &made->settings);
    if (status == ATTN_OK) {
        made->threads = made->settings.threads > 0 ? made->settings.threads : omp_get_max_threads();
        attn_barrier_init(&made->barrier, made->threads);
        status = make_caches(made);
    }
    if (status == ATTN_OK) {
        status = make_buffers(made);
    }
    if (status != ATTN_OK) {
        attn_context_destroy(made);
        return status;
    }
    *context = made;
    return ATTN_OK;
}

void attn_context_destroy(attn_context *c)
{
    if (c == NULL) {
        return;
    }
    for (int64_t i = 0; c->caches != NULL && i < c->settings.sequences * c->model->info.layers; i++) {
        attn_kv_free(&c->caches[i]);
    }
    attn_free(c->caches);
    attn_free(c->lengths);
    attn_free(c->attention);
    attn_arena_destroy(c->buffers);
    attn_arena_destroy(c->wide);
    attn_arena_destroy(c->scratch);
    attn_free(c->logits);
    attn_free(c);
}

/* ---- The parts of a layer, run by each thread of a parallel region. Barriers between the steps. ---- */

typedef struct worker {
    attn_context *c;
    const attn_model_layer *layer;
    int64_t layer_index, begin, n; /* rows of the span that make the chunk */
    int thread, threads;
} worker;

static void meet(const worker *w) { attn_barrier_wait(&w->c->barrier, w->threads); }

static int64_t first_row(const worker *w, int thread) { return w->n * thread / w->threads; }

#define EACH_ROW(w, r) for (int64_t r = first_row(w, (w)->thread); r < first_row(w, (w)->thread + 1); r++)

static void *thread_memory(const worker *w) { return w->c->thread_scratch + (size_t)w->thread * w->c->thread_bytes; }

static void multiply(const worker *w, const attn_quant_input *in, const attn_quant_product *products, int count)
{
    attn_quant_multiply(in, products, count, thread_memory(w), w->thread, w->threads);
    meet(w);
}

/* h = norm(x), quantised. */
static void norm_rows(const worker *w, const float *weight)
{
    int64_t width = w->c->model->info.width;
    EACH_ROW(w, r) {
        kernels()->rms_norm(w->c->x + (w->begin + r) * width, weight, width, w->c->model->epsilon, w->c->h + r * width);
        attn_quant_input_row(&w->c->in_width, r);
    }
    meet(w);
}

/* x += update, through the bias and norm that may follow a block. */
static void add_rows(const worker *w, float *update, const float *bias, const float *post_norm)
{
    int64_t width = w->c->model->info.width;
    EACH_ROW(w, r) {
        float *u = update + r * width;
        if (bias != NULL) {
            kernels()->add(u, bias, width);
        }
        if (post_norm != NULL) {
            kernels()->rms_norm(u, post_norm, width, w->c->model->epsilon, u);
        }
        kernels()->add(w->c->x + (w->begin + r) * width, u, width);
    }
}

/* Heads of row r of the span: bias, norm, rotation. */
static void finish_heads(const worker *w, float *x, int64_t heads, const float *bias, const float *norm, int64_t r)
{
    int64_t width = w->c->model->info.head_width, half = w->c->model->ropes[w->layer->rope].dims / 2;
    const float *cosine = w->c->angles[w->layer->rope] + r * 2 * half;
    if (bias != NULL) {
        kernels()->add(x, bias, heads * width);
    }
    for (int64_t h = 0; h < (norm != NULL ? heads : 0); h++) {
        kernels()->rms_norm(x + h * width, norm, width, w->c->model->epsilon, x + h * width);
    }
    kernels()->rotate(x, heads, width, half, cosine, cosine + half);
}

/* int8 rounds to 1/127 of a row's largest number, and single channels of keys are far larger than the rest: the cache holds rows that a
 * Hadamard matrix has spread over all channels (arXiv:2404.00456), where no channel stands out. Queries are turned alike, which leaves
 * the scores as they are, and the mixed values back. */
static void spread(const attn_context *c, float *x, int64_t heads)
{
    int64_t width = c->model->info.head_width;
    for (int64_t h = 0; h < heads && c->settings.cache == ATTN_I8; h++) {
        kernels()->hadamard(x + h * width, width);
    }
}

/* x to rotated queries. */
static void finish_queries(const worker *w)
{
    const attn_model_info *info = &w->c->model->info;
    int64_t width = info->heads * info->head_width;
    EACH_ROW(w, r) {
        float *q = w->c->q + (w->begin + r) * width;
        finish_heads(w, q, info->heads, w->layer->q_bias, w->layer->q_norm, w->begin + r);
        spread(w->c, q, info->heads);
    }
}

/* Keys and values to the cache. */
static void finish_keys(const worker *w)
{
    attn_context *c = w->c;
    const attn_model_layer *l = w->layer;
    const attn_model_info *info = &c->model->info;
    int64_t width = info->kv_heads * info->head_width;
    EACH_ROW(w, r) {
        float *k = c->k + r * width, *v = c->v + r * width;
        const row *token = &c->rows[w->begin + r];
        finish_heads(w, k, info->kv_heads, l->k_bias, l->k_norm, w->begin + r);
        if (l->v_bias != NULL) {
            kernels()->add(v, l->v_bias, width);
        }
        spread(c, k, info->kv_heads);
        spread(c, v, info->kv_heads);
        attn_kv *kv = cache_of(c, token->sequence, w->layer_index);
        for (int64_t g = 0; g < info->kv_heads; g++) {
            attn_kv_store(kv, g, token->position, k + g * info->head_width, v + g * info->head_width);
        }
    }
}

static void project(const worker *w, int queries, int keys)
{
    attn_context *c = w->c;
    const attn_model_layer *l = w->layer;
    int64_t q_width = c->model->info.heads * c->model->info.head_width, k_width = c->model->info.kv_heads * c->model->info.head_width;
    const attn_quant_product products[] = {{&l->q, c->q + w->begin * q_width, q_width}, {&l->k, c->k, k_width}, {&l->v, c->v, k_width}};
    norm_rows(w, l->attention_norm);
    multiply(w, &c->in_width, products + !queries, queries + 2 * keys);
    if (queries) {
        finish_queries(w);
    }
    if (keys) {
        finish_keys(w);
    }
}

static void before_attention(const worker *w) { project(w, 1, 1); }
static void only_queries(const worker *w) { project(w, 1, 0); }
static void only_keys(const worker *w) { project(w, 0, 1); }

/* What attention mixed, through the output projection and the feed-forward part. */
static void after_attention(const worker *w)
{
    attn_context *c = w->c;
    const attn_model_layer *l = w->layer;
    const attn_model_info *info = &c->model->info;
    const attn_quant_product out = {&l->out, c->h, info->width}, down = {&l->down, c->h, info->width};
    const attn_quant_product hidden[] = {{&l->gate, c->gate, info->hidden}, {&l->up, c->up, info->hidden}};
    EACH_ROW(w, r) {
        spread(c, c->mixed + (w->begin + r) * info->heads * info->head_width, info->heads);
        attn_quant_input_row(&c->in_heads, r);
    }
    meet(w);
    multiply(w, &c->in_heads, &out, 1);
    add_rows(w, c->h, l->out_bias, l->post_attention_norm);
    norm_rows(w, l->ffn_norm);
    multiply(w, &c->in_width, hidden, 2);
    EACH_ROW(w, r) {
        float *gate = c->gate + r * info->hidden, *up = c->up + r * info->hidden;
        if (c->model->gelu) {
            kernels()->gelu_gate(gate, up, info->hidden);
        } else {
            kernels()->silu_gate(gate, up, info->hidden);
        }
        attn_quant_input_row(&c->in_hidden, r);
    }
    meet(w);
    multiply(w, &c->in_hidden, &down, 1);
    add_rows(w, c->h, NULL, l->post_ffn_norm);
}

/* One part of a layer for rows begin ... begin+n-1 of the span, a chunk at a time. */
static void run_parts(attn_context *c, int64_t layer, int64_t begin, int64_t n, void (*part)(const worker *w))
{
    double start = seconds_now();
    for (int64_t end = begin + n, rows; begin < end; begin += rows) {
        rows = attn_min_i64(c->settings.chunk, end - begin);
        c->in_width.tokens = c->in_heads.tokens = c->in_hidden.tokens = rows;
        c->in_heads.x = c->mixed + begin * c->model->info.heads * c->model->info.head_width;
#pragma omp parallel num_threads(c->threads)
        {
            worker w = {c, &c->model->layers[layer], layer, begin, rows, omp_get_thread_num(), omp_get_num_threads()};
            part(&w);
            meet(&w);
        }
    }
    c->stats.linear_seconds += seconds_now() - start;
}

/* ---- A span ---- */

static void embed(attn_context *c, int64_t n)
{
    const attn_model *model = c->model;
    int64_t width = model->info.width;
#pragma omp parallel for num_threads(c->threads) schedule(static) if (n > 1)
    for (int64_t r = 0; r < n; r++) {
        float *x = c->x + r * width;
        int64_t token = c->rows[r].token;
        if (model->embedding.data != NULL) {
            attn_quant_matrix_row(&model->embedding, token, x);
        } else {
            const attn_gguf_tensor *t = model->embedding_tensor;
            size_t bytes = t->bytes / (size_t)t->shape[1];
            /* Cannot fail: the type was checked when the model was opened. */
            attn_gguf_dequantize(t->type, (const char *)t->data + (size_t)token * bytes, width, x);
        }
        if (model->embedding_scale != 1) {
            kernels()->scale(x, model->embedding_scale, width);
        }
    }
}

/* Cosines and sines of all rows. */
static void fill_angles(attn_context *c, int which, int64_t segment_count)
{
    const attn_rope *rope = &c->model->ropes[which];
    for (int64_t s = 0; s < segment_count; s++) {
        const segment *seg = &c->segments[s];
        attn_rope_angles(rope, seg->position, 1, seg->count, rope->magnitude, c->threads, c->angles[which] + seg->begin * rope->dims);
    }
}

static attn_tensor cache_view(const attn_kv *kv, void *data, attn_dtype dtype, int64_t count, int64_t width)
{
    int64_t shape[3] = {kv->heads, count, width};
    attn_tensor view = attn_tensor_make(data, dtype, width > 1 ? 3 : 2, shape);
    view.stride[0] = kv->capacity * width;
    return view;
}

static attn_tensor row_view(float *data, int64_t heads, int64_t count, int64_t width)
{
    int64_t shape[3] = {heads, count, width};
    attn_tensor view = attn_tensor_make(data, ATTN_F32, 3, shape);
    view.stride[0] = width;
    view.stride[1] = heads * width;
    return view;
}

/* Pairs of queries and keys that attention sees, for one head with `before` keys ahead of the `n` queries. */
static double count_pairs(int64_t before, int64_t n, int64_t window)
{
    double pairs = 0;
    if (window == 0) {
        return (double)n * (double)before + (double)n * (double)(n + 1) / 2;
    }
    for (int64_t i = 1; i <= n; i++) {
        pairs += (double)attn_min_i64(before + i, window);
    }
    return pairs;
}

/* `compute` NULL: exactly. */
static attn_status attend(attn_context *c, int64_t layer, const segment *s, attn_status (*compute)(void *, const attn_llm_call *))
{
    const attn_model_info *info = &c->model->info;
    attn_kv *kv = cache_of(c, s->sequence, layer);
    int64_t most = 0, group = info->heads / info->kv_heads, q_width = info->heads * info->head_width;
    for (int64_t g = 0; g < info->kv_heads; g++) {
        c->key_counts[g] = kv->counts[g] + s->count;
        most = attn_max_i64(most, c->key_counts[g]);
        c->stats.attention_flops +=
            4.0 * (double)(info->head_width * group) * count_pairs(kv->counts[g], s->count, kv->window);
    }
    attn_kv_announce(kv, s->count);
    attn_llm_call call = {
        .model = c->model, .layer = (int)layer, .sequence = s->sequence, .position = s->position,
        .q = row_view(c->q + s->begin * q_width, info->heads, s->count, info->head_width),
        .o = row_view(c->mixed + s->begin * q_width, info->heads, s->count, info->head_width),
        .k = cache_view(kv, kv->k, kv->dtype, most, info->head_width),
        .v = cache_view(kv, kv->v, kv->dtype, most, info->head_width),
        .key_counts = c->key_counts, .key_positions = (const int64_t *const *)kv->positions,
        .scale = c->model->attention_scale, .softcap = c->model->attention_softcap, .window = kv->window,
        .exec = {c->threads, c->scratch},
    };
    if (kv->dtype == ATTN_I8) {
        call.k_scale = cache_view(kv, kv->k_scale, ATTN_F32, most, 1);
        call.v_scale = cache_view(kv, kv->v_scale, ATTN_F32, most, 1);
    }
    double start = seconds_now();
    attn_status status = compute != NULL ? compute(c->attention[layer].user, &call) : attn_llm_exact(&call, 0, info->kv_heads);
    c->stats.attention_seconds += seconds_now() - start;
    return status;
}

/* The part of a segment that lies in rows begin ... begin+n-1; count below 1 when none does. */
static segment cut(const segment *s, int64_t begin, int64_t n)
{
    int64_t first = attn_max_i64(s->begin, begin), end = attn_min_i64(s->begin + s->count, begin + n);
    return (segment){s->sequence, first, end - first, s->position + first - s->begin};
}

/* Room in the caches of a layer for rows begin ... begin+n-1. */
static attn_status reserve(attn_context *c, int64_t layer, int64_t begin, int64_t n, int64_t segment_count)
{
    for (int64_t s = 0; s < segment_count; s++) {
        segment piece = cut(&c->segments[s], begin, n);
        if (piece.count > 0) {
            attn_kv *kv = cache_of(c, piece.sequence, layer);
            attn_kv_advance(kv, piece.position); /* past the rows before */
            ATTN_TRY(attn_kv_reserve(kv, piece.count));
        }
    }
    return ATTN_OK;
}

static attn_status attend_rows(attn_context *c, int64_t layer, int64_t begin, int64_t n, int64_t segment_count)
{
    const attn_llm_attention *mechanism = &c->attention[layer];
    for (int64_t s = 0; s < segment_count; s++) {
        segment piece = cut(&c->segments[s], begin, n);
        if (piece.count > 0) {
            ATTN_TRY(attend(c, layer, &piece, piece.count > 1 ? mechanism->prefill : mechanism->decode));
        }
    }
    return ATTN_OK;
}

/* The rows that end an item become the first of the span. */
static void keep_answers(attn_context *c, int64_t n)
{
    int64_t width = c->model->info.width, heads_width = c->model->info.heads * c->model->info.head_width, to = 0;
    for (int64_t r = 0; r < n; r++) {
        if (!c->rows[r].last || to++ == r) {
            continue;
        }
        c->rows[to - 1] = c->rows[r];
        memcpy(c->x + (to - 1) * width, c->x + r * width, (size_t)width * sizeof *c->x);
        memcpy(c->mixed + (to - 1) * heads_width, c->mixed + r * heads_width, (size_t)heads_width * sizeof *c->mixed);
        for (int i = 0; i < 2 && c->angles[i] != NULL; i++) {
            int64_t dims = c->model->ropes[i].dims;
            memcpy(c->angles[i] + (to - 1) * dims, c->angles[i] + r * dims, (size_t)dims * sizeof(float));
        }
    }
}

/* The queries of the answers, once the keys of all rows are stored. */
static attn_status attend_answers(attn_context *c, int64_t layer, int64_t answers)
{
    run_parts(c, layer, 0, answers, only_queries);
    for (int64_t r = 0; r < answers; r++) {
        const row *token = &c->rows[r];
        segment last = {token->sequence, r, 1, token->position};
        attn_kv_advance(cache_of(c, last.sequence, layer), last.position);
        ATTN_TRY(attend(c, layer, &last, token->index == 0 ? c->attention[layer].decode : NULL)); /* 0: an item of one token */
    }
    return ATTN_OK;
}

/* A layer, chunk after chunk, or at once when its mechanism sees all queries of the span. `answers` rows go on after it: all n, or,
 * after the last layer, those that end an item. Exact attention leaves out the queries of the others; mechanisms choose by them. */
static attn_status run_layer(attn_context *c, int64_t layer, int64_t n, int64_t segment_count, int64_t answers)
{
    int together = c->attention[layer].span > 0 && c->model->layers[layer].window == 0;
    int all = answers == n, queries = all || c->attention[layer].prefill != NULL;
    for (int64_t begin = 0, rows; begin < n; begin += rows) {
        rows = attn_min_i64(together ? n : c->settings.chunk, n - begin);
        ATTN_TRY(reserve(c, layer, begin, rows, segment_count));
        run_parts(c, layer, begin, rows, queries ? before_attention : only_keys);
        if (queries) {
            ATTN_TRY(attend_rows(c, layer, begin, rows, segment_count));
        }
        if (all) {
            run_parts(c, layer, begin, rows, after_attention);
        }
    }
    if (!all) {
        keep_answers(c, n);
        if (!queries) {
            ATTN_TRY(attend_answers(c, layer, answers));
        }
        run_parts(c, layer, 0, answers, after_attention);
    }
    return ATTN_OK;
}

static attn_status run_layers(attn_context *c, int64_t n, int64_t segment_count, int64_t answers, double done, double share)
{
    int64_t layers = c->model->info.layers;
    for (int64_t layer = 0; layer < layers; layer++) {
        if (c->settings.progress != NULL &&
            c->settings.progress(c->settings.user, done + share * (double)layer / (double)layers) != 0) {
            return attn_fail(ATTN_ERR_CANCELLED, "evaluation was cancelled");
        }
        ATTN_TRY(run_layer(c, layer, n, segment_count, layer == layers - 1 ? answers : n));
    }
    return ATTN_OK;
}

/* Back to what the sequences held before a span that failed, where some layers may have gone on already. One whose layers have
 * forgotten too much for that is cleared. */
static void roll_back(attn_context *c, int64_t segment_count)
{
    for (int64_t s = 0; s < segment_count; s++) {
        int sequence = c->segments[s].sequence;
        int64_t length = c->lengths[sequence];
        for (int64_t l = 0; l < c->model->info.layers; l++) {
            length = attn_kv_truncate(cache_of(c, sequence, l), length, 1) == ATTN_OK ? length : 0;
        }
        for (int64_t l = 0; l < c->model->info.layers; l++) {
            attn_kv_truncate(cache_of(c, sequence, l), length, 0);
        }
        c->lengths[sequence] = length;
    }
}

static void commit(attn_context *c, int64_t segment_count)
{
    for (int64_t s = 0; s < segment_count; s++) {
        const segment *seg = &c->segments[s];
        for (int64_t l = 0; l < c->model->info.layers; l++) {
            attn_kv_advance(cache_of(c, seg->sequence, l), seg->position + seg->count);
        }
        c->lengths[seg->sequence] += seg->count;
        c->stats.tokens += seg->count;
    }
    size_t bytes = 0;
    for (int64_t i = 0; i < c->settings.sequences * c->model->info.layers; i++) {
        bytes += attn_kv_bytes(&c->caches[i]);
    }
    c->stats.cache_bytes = bytes;
    c->stats.cache_peak_bytes = bytes > c->stats.cache_peak_bytes ? bytes : c->stats.cache_peak_bytes;
}

static attn_status update_caches(attn_context *c, int64_t segment_count)
{
    for (int64_t l = 0; l < c->model->info.layers; l++) {
        const attn_llm_attention *mechanism = &c->attention[l];
        for (int64_t s = 0; s < segment_count && mechanism->update != NULL; s++) {
            ATTN_TRY(mechanism->update(mechanism->user, c, c->segments[s].sequence, (int)l));
        }
    }
    return ATTN_OK;
}

/* ---- Logits ---- */

static attn_status reserve_logits(attn_context *c, int64_t rows)
{
    if (rows > c->logit_rows) {
        attn_free(c->logits);
        c->logits = attn_alloc_array((size_t)rows, (size_t)c->model->info.vocabulary * sizeof *c->logits);
        c->logit_rows = c->logits != NULL ? rows : 0;
    }
    return c->logits != NULL ? ATTN_OK
                             : attn_fail_memory((size_t)rows * (size_t)c->model->info.vocabulary * sizeof *c->logits);
}

/* Logits of rows begin ... begin+count-1 of x into out. */
static void compute_logits(attn_context *c, int64_t begin, int64_t count, float *out)
{
    double start = seconds_now();
    int64_t width = c->model->info.width, vocabulary = c->model->info.vocabulary;
    for (int64_t i = 0; i < count; i++) {
        kernels()->rms_norm(c->x + (begin + i) * width, c->model->output_norm, width, c->model->epsilon, c->h + i * width);
    }
    c->in_logits.tokens = count;
    for (int64_t i = 0; i < count; i++) {
        attn_quant_input_row(&c->in_logits, i);
    }
    const attn_quant_product product = {attn_model_output(c->model), out, vocabulary};
    float cap = c->model->output_softcap;
#pragma omp parallel num_threads(c->threads)
    {
        worker w = {c, NULL, 0, 0, count, omp_get_thread_num(), omp_get_num_threads()};
        multiply(&w, &c->in_logits, &product, 1);
        if (cap > 0) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count * vocabulary; i++) {
                out[i] = cap * tanhf(out[i] / cap);
            }
        }
    }
    c->stats.linear_seconds += seconds_now() - start;
}

/* Rows whose logits are computed together: a chunk's buffers hold what is on the way. */
static int64_t each_rows(const attn_context *c) { return attn_min_i64(EACH_ROWS, c->settings.chunk); }

/* All rows of the span, a few at a time. */
static attn_status give_each(attn_context *c, int64_t n, attn_context_each each, void *user)
{
    int64_t most = each_rows(c);
    ATTN_TRY(reserve_logits(c, attn_min_i64(n, most)));
    for (int64_t begin = 0; begin < n; begin += most) {
        int64_t count = attn_min_i64(most, n - begin);
        compute_logits(c, begin, count, c->logits);
        for (int64_t i = 0; i < count; i++) {
            const row *r = &c->rows[begin + i];
            if (each(user, r->item, r->index, c->logits + i * c->model->info.vocabulary) != 0) {
                return attn_fail(ATTN_ERR_CANCELLED, "evaluation was cancelled");
            }
        }
    }
    return ATTN_OK;
}

/* The first n rows, each of which ends an item. Items come in order, so their logits are neighbours. */
static void answer_last(attn_context *c, int64_t n)
{
    for (int64_t begin = 0, count; begin < n; begin += count) {
        count = attn_min_i64(each_rows(c), n - begin);
        compute_logits(c, begin, count, c->logits + c->answered * c->model->info.vocabulary);
        c->answered += (int)count;
    }
}

/* ---- Evaluation ---- */

int64_t attn_context_room(const attn_context *c, int sequence)
{
    if (sequence < 0 || sequence >= c->settings.sequences) {
        return -1;
    }
    for (int64_t l = 0; l < c->model->info.layers; l++) {
        if (c->model->layers[l].window == 0 && !c->attention[l].endless) {
            return c->settings.length - c->lengths[sequence];
        }
    }
    return INT64_MAX - c->lengths[sequence];
}

static attn_status check_batch(const attn_context *c, const attn_context_batch *batch, int count)
{
    if (count < 1 || batch == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "the batch has %d items, expected at least 1", count);
    }
    for (int i = 0; i < count; i++) {
        int s = batch[i].sequence;
        if (s < 0 || s >= c->settings.sequences) {
            return attn_fail(ATTN_ERR_ARGUMENT, "batch[%d].sequence is %d, the context has %d", i, s,
                             c->settings.sequences);
        }
        if (batch[i].count < 1 || batch[i].tokens == NULL) {
            return attn_fail(ATTN_ERR_ARGUMENT, "batch[%d] has %lld tokens, expected at least 1", i,
                             batch[i].tokens != NULL ? (long long)batch[i].count : 0);
        }
        if (batch[i].count > attn_context_room(c, s)) {
            return attn_fail(ATTN_ERR_ARGUMENT,
                             "batch[%d] has %lld tokens, but sequence %d holds %lld and has room for %lld more", i,
                             (long long)batch[i].count, s, (long long)c->lengths[s], (long long)attn_context_room(c, s));
        }
        for (int64_t t = 0; t < batch[i].count; t++) {
            if (batch[i].tokens[t] < 0 || batch[i].tokens[t] >= c->model->info.vocabulary) {
                return attn_fail(ATTN_ERR_ARGUMENT, "batch[%d].tokens[%lld] is %d, the vocabulary has %lld", i,
                                 (long long)t, (int)batch[i].tokens[t], (long long)c->model->info.vocabulary);
            }
        }
        for (int j = 0; j < i; j++) {
            if (batch[j].sequence == s) {
                return attn_fail(ATTN_ERR_ARGUMENT, "batch[%d] and batch[%d] are both of sequence %d", j, i, s);
            }
        }
    }
    return ATTN_OK;
}

/* The next rows of the batch, from token *token of item *item on. */
static int64_t next_span(attn_context *c, const attn_context_batch *batch, int count, int *item, int64_t *token,
                          int64_t *segment_count)
{
    int64_t n = 0;
    *segment_count = 0;
    while (n < c->span && *item < count) {
        const attn_context_batch *b = &batch[*item];
        int64_t take = attn_min_i64(b->count - *token, c->span - n), position = c->lengths[b->sequence];
        c->segments[(*segment_count)++] = (segment){b->sequence, n, take, position};
        for (int64_t i = 0; i < take; i++) {
            c->rows[n++] = (row){b->tokens[*token + i], b->sequence, *item, *token + i, position + i,
                                    *token + i == b->count - 1};
        }
        *token += take;
        if (*token == b->count) {
            *token = 0;
            ++*item;
        }
    }
    return n;
}

/* Rows that end an item. */
static int64_t count_last(const attn_context *c, int64_t n)
{
    int64_t count = 0;
    for (int64_t r = 0; r < n; r++) {
        count += c->rows[r].last;
    }
    return count;
}

static attn_status eval(attn_context *c, const attn_context_batch *batch, int count, attn_context_each each, void *user)
{
    int64_t total = 0, done = 0, token = 0, segment_count;
    int item = 0;
    c->answered = 0;
    ATTN_TRY(check_batch(c, batch, count));
    for (int i = 0; i < count; i++) {
        total += batch[i].count;
    }
    if (each == NULL) {
        ATTN_TRY(reserve_logits(c, count));
    }
    while (item < count) {
        int64_t n = next_span(c, batch, count, &item, &token, &segment_count);
        embed(c, n);
        for (int i = 0; i < 2 && c->angles[i] != NULL; i++) {
            fill_angles(c, i, segment_count);
        }
        int64_t answers = each != NULL ? n : count_last(c, n);
        attn_status status = run_layers(c, n, segment_count, answers, (double)done / (double)total, (double)n / (double)total);
        if (status != ATTN_OK) {
            roll_back(c, segment_count);
            return status;
        }
        commit(c, segment_count);
        ATTN_TRY(update_caches(c, segment_count));
        if (each != NULL) {
            ATTN_TRY(give_each(c, n, each, user));
        } else {
            answer_last(c, answers);
        }
        done += n;
    }
    return ATTN_OK;
}

attn_status attn_context_eval(attn_context *context, const attn_context_batch *batch, int count, attn_context_each each,
                              void *user)
{
    double start = seconds_now();
    attn_status status = eval(context, batch, count, each, user);
    context->stats.seconds += seconds_now() - start;
    return status;
}

const float *attn_context_logits(const attn_context *context, int item)
{
    return item >= 0 && item < context->answered ? context->logits + item * context->model->info.vocabulary : NULL;
}

/* ---- Sequences ---- */

static attn_status check_sequence(const attn_context *c, const char *name, int sequence)
{
    return sequence >= 0 && sequence < c->settings.sequences
               ? ATTN_OK
               : attn_fail(ATTN_ERR_ARGUMENT, "%s is %d, the context has %d sequences", name, sequence,
                           c->settings.sequences);
}

int64_t attn_context_length(const attn_context *context, int sequence)
{
    return sequence >= 0 && sequence < context->settings.sequences ? context->lengths[sequence] : -1;
}

attn_status attn_context_truncate(attn_context *c, int sequence, int64_t length)
{
    ATTN_TRY(check_sequence(c, "sequence", sequence));
    if (length < 0 || length > c->lengths[sequence]) {
        return attn_fail(ATTN_ERR_ARGUMENT, "length is %lld, the sequence holds %lld tokens", (long long)length,
                         (long long)c->lengths[sequence]);
    }
    for (int only_check = 1; only_check >= 0; only_check--) {
        for (int64_t l = 0; l < c->model->info.layers; l++) {
            ATTN_TRY(attn_kv_truncate(cache_of(c, sequence, l), length, only_check));
        }
    }
    c->lengths[sequence] = length;
    return ATTN_OK;
}

attn_status attn_context_copy(attn_context *c, int to, int from)
{
    ATTN_TRY(check_sequence(c, "to", to));
    ATTN_TRY(check_sequence(c, "from", from));
    if (to == from) {
        return ATTN_OK;
    }
    ATTN_TRY(attn_context_truncate(c, to, 0)); /* what a failure leaves */
    attn_status status = ATTN_OK;
    for (int64_t l = 0; l < c->model->info.layers && status == ATTN_OK; l++) {
        status = attn_kv_copy(cache_of(c, to, l), cache_of(c, from, l));
    }
    c->lengths[to] = c->lengths[from];
    if (status != ATTN_OK) {
        attn_context_truncate(c, to, 0);
    }
    return status;
}

static attn_status check_layer(const attn_context *c, int layer)
{
    return layer >= 0 && layer < c->model->info.layers ? ATTN_OK
                                                       : attn_fail(ATTN_ERR_ARGUMENT, "layer is %d, the model has %lld",
                                                                   layer, (long long)c->model->info.layers);
}

attn_status attn_context_set_attention(attn_context *c, int layer, const attn_llm_attention *attention)
{
    if (layer != -1) {
        ATTN_TRY(check_layer(c, layer));
    }
    if (attention != NULL && attention->span < 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "attention->span is %lld, expected at least 0", (long long)attention->span);
    }
    int64_t span = c->settings.chunk;
    attn_llm_attention set = attention != NULL ? *attention : (attn_llm_attention){0};
    for (int64_t l = 0; l < c->model->info.layers; l++) {
        span = attn_max_i64(span, layer == -1 || layer == l ? set.span : c->attention[l].span);
    }
    span = attn_min_i64(span, c->settings.length * c->settings.sequences);
    if (span != c->span) {
        ATTN_TRY(make_wide(c, span));
    }
    for (int64_t l = 0; l < c->model->info.layers; l++) {
        if (layer == -1 || layer == l) {
            c->attention[l] = set;
        }
    }
    return ATTN_OK;
}

attn_status attn_context_keep(attn_context *c, int sequence, int layer, int64_t kv_head, const int64_t *indices,
                              int64_t count)
{
    ATTN_TRY(check_sequence(c, "sequence", sequence));
    ATTN_TRY(check_layer(c, layer));
    if (kv_head < 0 || kv_head >= c->model->info.kv_heads || count < 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "kv_head is %lld and count %lld, the model has %lld key heads",
                         (long long)kv_head, (long long)count, (long long)c->model->info.kv_heads);
    }
    return attn_kv_keep(cache_of(c, sequence, layer), kv_head, indices, count);
}

int64_t attn_context_keys(const attn_context *c, int sequence, int layer, int64_t kv_head)
{
    if (sequence < 0 || sequence >= c->settings.sequences || layer < 0 || layer >= c->model->info.layers ||
        kv_head < 0 || kv_head >= c->model->info.kv_heads) {
        return -1;
    }
    return cache_of(c, sequence, layer)->counts[kv_head];
}

attn_context_stats attn_context_get_stats(const attn_context *context) { return context->stats; }

void attn_context_reset_stats(attn_context *context)
{
    attn_context_stats kept = {.cache_bytes = context->stats.cache_bytes,
                               .cache_peak_bytes = context->stats.cache_peak_bytes};
    context->stats = kept;
}
