/* Opening of models: metadata to dimensions, tensors to weights. */
#include "llm/model.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#define WIDTH_LIMIT (1 << 24)

/* ---- Metadata and small tensors ---- */

attn_status attn_model_int(const attn_gguf *file, const char *prefix, const char *name, int64_t standard, int64_t least,
                           int64_t most, int64_t *value)
{
    char key[192];
    snprintf(key, sizeof key, "%s.%s", prefix, name);
    *value = standard;
    /* A default below the least value: the key is required. */
    if (attn_gguf_metadata_find(file, key) != NULL || standard < least) {
        ATTN_TRY(attn_gguf_get_int(file, key, value));
    }
    if (*value < least || *value > most) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: key '%s' is %lld, expected %lld to %lld", key, (long long)*value,
                         (long long)least, (long long)most);
    }
    return ATTN_OK;
}

attn_status attn_model_float(const attn_gguf *file, const char *prefix, const char *name, double standard,
                             double *value)
{
    char key[192];
    snprintf(key, sizeof key, "%s.%s", prefix, name);
    *value = standard;
    if (attn_gguf_metadata_find(file, key) != NULL) {
        ATTN_TRY(attn_gguf_get_float(file, key, value));
    }
    return isfinite(*value) ? ATTN_OK : attn_fail(ATTN_ERR_FORMAT, "gguf: key '%s' is not finite", key);
}

static attn_status find_tensor(const attn_gguf *file, const char *name, int optional, int64_t columns, int64_t rows,
                               const attn_gguf_tensor **found)
{
    const attn_gguf_tensor *tensor = *found = attn_gguf_tensor_find(file, name);
    if (tensor == NULL) {
        return optional ? ATTN_OK : attn_fail(ATTN_ERR_FORMAT, "gguf: the tensor '%s' is missing", name);
    }
    if (tensor->shape[0] != columns || tensor->shape[1] != rows || tensor->shape[2] != 1 || tensor->shape[3] != 1) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: tensor '%s' has shape [%lld, %lld, %lld, %lld], expected [%lld, %lld]",
                         name, (long long)tensor->shape[0], (long long)tensor->shape[1], (long long)tensor->shape[2],
                         (long long)tensor->shape[3], (long long)columns, (long long)rows);
    }
    return ATTN_OK;
}

attn_status attn_model_vector(const attn_gguf *file, const char *name, int64_t count, int optional, float **out)
{
    const attn_gguf_tensor *tensor = NULL;
    *out = NULL;
    ATTN_TRY(find_tensor(file, name, optional, count, 1, &tensor));
    if (tensor == NULL) {
        return ATTN_OK;
    }
    *out = attn_alloc_array((size_t)count, sizeof **out);
    if (*out == NULL) {
        return attn_fail_memory((size_t)count * sizeof **out);
    }
    attn_status status = attn_gguf_dequantize(tensor->type, tensor->data, count, *out);
    if (status != ATTN_OK) {
        attn_free(*out);
        *out = NULL;
    }
    return status;
}

/* ---- Architectures ---- */

typedef struct architecture {
    const char *name;
    int interleaved; /* the file's rotary pairs are neighbours (2i, 2i + 1) */
    int head_norms;  /* q_norm and k_norm */
    int post_norms;
    int gelu;
    int scaled_embedding; /* by sqrt(width) */
    int64_t period;       /* of layers, the last of which is global; 0: no sliding windows */
} architecture;

static const architecture architectures[] = {
    {.name = "llama", .interleaved = 1},
    {.name = "qwen2"},
    {.name = "qwen3", .head_norms = 1},
    {.name = "gemma3", .head_norms = 1, .post_norms = 1, .gelu = 1, .scaled_embedding = 1, .period = 6},
};

static attn_status find_architecture(const attn_gguf *file, const architecture **found)
{
    attn_gguf_string name = {"", 0};
    ATTN_TRY(attn_gguf_get_string(file, "general.architecture", &name));
    for (size_t i = 0; i < sizeof architectures / sizeof architectures[0]; i++) {
        if (name.bytes == strlen(architectures[i].name) && memcmp(name.text, architectures[i].name, name.bytes) == 0) {
            *found = &architectures[i];
            return ATTN_OK;
        }
    }
    return attn_fail(ATTN_ERR_UNSUPPORTED,
                     "gguf: general.architecture is '%.*s' (supported: llama, qwen2, qwen3, gemma3)",
                     (int)attn_min_i64((int64_t)name.bytes, 40), name.text);
}

/* A number, or an array with one number for each layer, which must then be equal. */
static attn_status read_uniform(const attn_gguf *file, const char *prefix, const char *name, int64_t layers,
                                int64_t standard, int64_t *value)
{
    char key[192];
    snprintf(key, sizeof key, "%s.%s", prefix, name);
    const attn_gguf_metadata *entry = attn_gguf_metadata_find(file, key);
    if (entry == NULL || entry->type != ATTN_GGUF_ARRAY) {
        return attn_model_int(file, prefix, name, standard, 1, WIDTH_LIMIT, value);
    }
    int64_t *values = attn_alloc_array((size_t)layers, sizeof *values);
    if (values == NULL) {
        return attn_fail_memory((size_t)layers * sizeof *values);
    }
    attn_status status = attn_gguf_get_ints(file, key, values, layers);
    for (int64_t i = 0; i < layers && status == ATTN_OK; i++) {
        if (values[i] != values[0] || values[i] < 1 || values[i] > WIDTH_LIMIT) {
            status = attn_fail(ATTN_ERR_UNSUPPORTED,
                               "gguf: key '%s' is %lld in layer %lld and %lld in layer 0; layers that "
                               "differ are not supported",
                               key, (long long)values[i], (long long)i, (long long)values[0]);
        }
    }
    *value = status == ATTN_OK ? values[0] : 0;
    attn_free(values);
    return status;
}

static attn_status read_info(attn_model *model)
{
    const attn_gguf *file = model->file;
    const char *prefix = model->architecture;
    attn_model_info *info = &model->info;
    int64_t value_width, vocabulary;
    info->architecture = prefix;
    /* Each layer has tensors, so their number bounds that of the layers. */
    ATTN_TRY(attn_model_int(file, prefix, "block_count", 0, 1, attn_gguf_tensor_count(file), &info->layers));
    ATTN_TRY(attn_model_int(file, prefix, "embedding_length", 0, 1, WIDTH_LIMIT, &info->width));
    ATTN_TRY(attn_model_int(file, prefix, "context_length", 0, 1, INT32_MAX, &info->context_length));
    ATTN_TRY(read_uniform(file, prefix, "attention.head_count", info->layers, 0, &info->heads));
    ATTN_TRY(read_uniform(file, prefix, "attention.head_count_kv", info->layers, info->heads, &info->kv_heads));
    ATTN_TRY(read_uniform(file, prefix, "feed_forward_length", info->layers, 0, &info->hidden));
    if (info->heads % info->kv_heads != 0) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: '%s.attention.head_count' %lld is no multiple of head_count_kv %lld",
                         prefix, (long long)info->heads, (long long)info->kv_heads);
    }
    ATTN_TRY(attn_model_int(file, prefix, "attention.key_length", info->width / info->heads, 1, WIDTH_LIMIT,
                            &info->head_width));
    ATTN_TRY(attn_model_int(file, prefix, "attention.value_length", info->head_width, 1, WIDTH_LIMIT, &value_width));
    if (value_width != info->head_width) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "gguf: '%s.attention.value_length' %lld differs from key_length %lld",
                         prefix, (long long)value_width, (long long)info->head_width);
    }
    if (info->heads * info->head_width > WIDTH_LIMIT) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: '%s': %lld heads of width %lld are too many", prefix,
                         (long long)info->heads, (long long)info->head_width);
    }
    const attn_gguf_tensor *embedding = attn_gguf_tensor_find(file, "token_embd.weight");
    vocabulary = embedding != NULL ? embedding->shape[1] : 1;
    if (vocabulary > INT32_MAX) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: tensor 'token_embd.weight' has %lld rows", (long long)vocabulary);
    }
    info->vocabulary = vocabulary;
    return ATTN_OK;
}

static attn_status read_numbers(attn_model *model, const architecture *kind)
{
    const attn_gguf *file = model->file;
    const char *prefix = model->architecture;
    double epsilon, base, local_base, scale, attention_cap, output_cap;
    double head_width = (double)model->info.head_width;
    /* Gemma 3 of 27 billion (62 layers) scales by the width per head instead of the head's own; files do not say. */
    if (kind->period > 0 && model->info.layers == 62) {
        head_width = (double)model->info.width / (double)model->info.heads;
    }
    ATTN_TRY(attn_model_float(file, prefix, "attention.layer_norm_rms_epsilon", 1e-6, &epsilon));
    ATTN_TRY(attn_model_float(file, prefix, "attention.scale", 1 / sqrt(head_width), &scale));
    ATTN_TRY(attn_model_float(file, prefix, "attn_logit_softcapping", 0, &attention_cap));
    ATTN_TRY(attn_model_float(file, prefix, "final_logit_softcapping", 0, &output_cap));
    ATTN_TRY(attn_model_float(file, prefix, "rope.freq_base", 10000, &base));
    ATTN_TRY(attn_model_float(file, prefix, "rope.freq_base_swa", 10000, &local_base));
    if (epsilon < 0 || attention_cap < 0 || output_cap < 0 || epsilon > 1) {
        return attn_fail(ATTN_ERR_FORMAT, "gguf: '%s': layer_norm_rms_epsilon %g or soft caps %g, %g are out of range",
                         prefix, epsilon, attention_cap, output_cap);
    }
    model->epsilon = (float)epsilon;
    model->attention_scale = (float)scale;
    model->attention_softcap = (float)attention_cap;
    model->output_softcap = (float)output_cap;
    model->embedding_scale = kind->scaled_embedding ? sqrtf((float)model->info.width) : 1;
    model->gelu = kind->gelu;
    ATTN_TRY(
        attn_rope_make(&model->ropes[0], file, prefix, model->info.head_width, model->info.context_length, base, 1));
    return kind->period == 0 ? ATTN_OK
                             : attn_rope_make(&model->ropes[1], file, prefix, model->info.head_width,
                                              model->info.context_length, local_base, 0);
}

/* Which layers have a sliding window. */
static attn_status read_windows(attn_model *model, const architecture *kind)
{
    const attn_gguf *file = model->file;
    int64_t layers = model->info.layers, window, period = kind->period;
    ATTN_TRY(attn_model_int(file, model->architecture, "attention.sliding_window", 0, 0, INT32_MAX, &window));
    if (window == 0 || kind->period == 0) {
        return ATTN_OK;
    }
    char key[128];
    snprintf(key, sizeof key, "%s.attention.sliding_window_pattern", model->architecture);
    const attn_gguf_metadata *pattern = attn_gguf_metadata_find(file, key);
    int64_t *slides = attn_alloc_array((size_t)layers, sizeof *slides);
    if (slides == NULL) {
        return attn_fail_memory((size_t)layers * sizeof *slides);
    }
    attn_status status = ATTN_OK;
    if (pattern != NULL && pattern->type == ATTN_GGUF_ARRAY) {
        status = attn_gguf_get_ints(file, key, slides, layers);
    } else {
        status = attn_model_int(file, model->architecture, "attention.sliding_window_pattern", period, 1, INT32_MAX,
                                &period);
        for (int64_t i = 0; i < layers; i++) {
            slides[i] = (i + 1) % period != 0;
        }
    }
    for (int64_t i = 0; i < layers && status == ATTN_OK; i++) {
        model->layers[i].window = slides[i] != 0 ? window : 0;
        model->layers[i].rope = slides[i] != 0;
    }
    attn_free(slides);
    return status;
}

/* ---- Weights ---- */

/* Rows of q and k in files with interleaved rotary pairs: back to halves, so that there is one layout. */
typedef struct pairing {
    int64_t head_width, dims;
} pairing;

static int64_t paired_row(const void *user, int64_t row)
{
    const pairing *p = user;
    int64_t head = row / p->head_width, i = row % p->head_width;
    if (i < p->dims) {
        i = i < p->dims / 2 ? 2 * i : 2 * (i - p->dims / 2) + 1;
    }
    return head * p->head_width + i;
}

typedef struct loader {
    attn_model *model;
    const attn_model_settings *settings;
    int threads;
    pairing pairs;
    int interleaved;
    int mapped;
    int64_t used; /* tensors that the model consists of */
    size_t loaded_bytes, total_bytes;
} loader;

static attn_status load_matrix(loader *in, const char *name, int64_t columns, int64_t rows, int paired,
                               attn_quant_matrix *matrix)
{
    const attn_gguf_tensor *tensor = NULL;
    ATTN_TRY(find_tensor(in->model->file, name, 0, columns, rows, &tensor));
    ATTN_TRY(attn_quant_matrix_pack(matrix, in->model->weights, tensor, rows, columns, paired ? paired_row : NULL,
                                    &in->pairs, in->mapped, in->threads));
    in->used++;
    in->loaded_bytes += tensor->bytes;
    in->model->info.weight_bytes += attn_quant_packed_bytes(tensor->type, rows, columns);
    if (in->settings->progress != NULL &&
        in->settings->progress(in->settings->user, (double)in->loaded_bytes / (double)in->total_bytes) != 0) {
        return attn_fail(ATTN_ERR_CANCELLED, "opening of the model was cancelled");
    }
    return ATTN_OK;
}

static attn_status load_vector(loader *in, const char *name, int64_t count, int optional, float **out)
{
    ATTN_TRY(attn_model_vector(in->model->file, name, count, optional, out));
    in->used += *out != NULL;
    return ATTN_OK;
}

/* As load_vector, with the rows' order of interleaved q and k. */
static attn_status load_bias(loader *in, const char *name, int64_t count, int paired, float **out)
{
    ATTN_TRY(load_vector(in, name, count, 1, out));
    if (*out == NULL || !paired) {
        return ATTN_OK;
    }
    float *copy = attn_alloc_array((size_t)count, sizeof *copy);
    if (copy == NULL) {
        return attn_fail_memory((size_t)count * sizeof *copy);
    }
    for (int64_t i = 0; i < count; i++) {
        copy[i] = (*out)[paired_row(&in->pairs, i)];
    }
    attn_free(*out);
    *out = copy;
    return ATTN_OK;
}

static attn_status load_layer(loader *in, const architecture *kind, int64_t index)
{
    const attn_model_info *info = &in->model->info;
    attn_model_layer *layer = &in->model->layers[index];
    int64_t width = info->width, q_width = info->heads * info->head_width, k_width = info->kv_heads * info->head_width;
    char name[64];
#define NAME(part) (snprintf(name, sizeof name, "blk.%lld." part, (long long)index), name)
    ATTN_TRY(load_vector(in, NAME("attn_norm.weight"), width, 0, &layer->attention_norm));
    ATTN_TRY(load_vector(in, NAME("ffn_norm.weight"), width, 0, &layer->ffn_norm));
    if (kind->head_norms) {
        ATTN_TRY(load_vector(in, NAME("attn_q_norm.weight"), info->head_width, 0, &layer->q_norm));
        ATTN_TRY(load_vector(in, NAME("attn_k_norm.weight"), info->head_width, 0, &layer->k_norm));
    }
    if (kind->post_norms) {
        ATTN_TRY(load_vector(in, NAME("post_attention_norm.weight"), width, 0, &layer->post_attention_norm));
        ATTN_TRY(load_vector(in, NAME("post_ffw_norm.weight"), width, 0, &layer->post_ffn_norm));
    }
    ATTN_TRY(load_bias(in, NAME("attn_q.bias"), q_width, in->interleaved, &layer->q_bias));
    ATTN_TRY(load_bias(in, NAME("attn_k.bias"), k_width, in->interleaved, &layer->k_bias));
    ATTN_TRY(load_bias(in, NAME("attn_v.bias"), k_width, 0, &layer->v_bias));
    ATTN_TRY(load_bias(in, NAME("attn_output.bias"), width, 0, &layer->out_bias));
    ATTN_TRY(load_matrix(in, NAME("attn_q.weight"), width, q_width, in->interleaved, &layer->q));
    ATTN_TRY(load_matrix(in, NAME("attn_k.weight"), width, k_width, in->interleaved, &layer->k));
    ATTN_TRY(load_matrix(in, NAME("attn_v.weight"), width, k_width, 0, &layer->v));
    ATTN_TRY(load_matrix(in, NAME("attn_output.weight"), q_width, width, 0, &layer->out));
    ATTN_TRY(load_matrix(in, NAME("ffn_gate.weight"), width, info->hidden, 0, &layer->gate));
    ATTN_TRY(load_matrix(in, NAME("ffn_up.weight"), width, info->hidden, 0, &layer->up));
    return load_matrix(in, NAME("ffn_down.weight"), info->hidden, width, 0, &layer->down);
#undef NAME
}

/* Rotary factors, which attn_rope_make() reads where they apply. */
static int is_rope_tensor(const char *name)
{
    return strcmp(name, "rope_freqs.weight") == 0 || strcmp(name, "rope_factors_long.weight") == 0 ||
           strcmp(name, "rope_factors_short.weight") == 0;
}

/* A tensor that the model has no place for would be ignored silently, and the results be wrong. */
static attn_status check_all_used(const loader *in, int tied)
{
    const attn_gguf *file = in->model->file;
    static const char *const parts[] = {"attn_norm.weight",
                                        "ffn_norm.weight",
                                        "attn_q_norm.weight",
                                        "attn_k_norm.weight",
                                        "post_attention_norm.weight",
                                        "post_ffw_norm.weight",
                                        "attn_q.bias",
                                        "attn_k.bias",
                                        "attn_v.bias",
                                        "attn_output.bias",
                                        "attn_q.weight",
                                        "attn_k.weight",
                                        "attn_v.weight",
                                        "attn_output.weight",
                                        "ffn_gate.weight",
                                        "ffn_up.weight",
                                        "ffn_down.weight"};
    int64_t used = in->used;
    for (int64_t i = 0; i < attn_gguf_tensor_count(file); i++) {
        used += is_rope_tensor(attn_gguf_tensor_at(file, i)->name);
    }
    if (used == attn_gguf_tensor_count(file)) {
        return ATTN_OK;
    }
    for (int64_t i = 0; i < attn_gguf_tensor_count(file); i++) {
        const char *name = attn_gguf_tensor_at(file, i)->name, *part = name;
        int known = is_rope_tensor(name) || strcmp(name, "token_embd.weight") == 0 ||
                    strcmp(name, "output_norm.weight") == 0 || (!tied && strcmp(name, "output.weight") == 0);
        if (strncmp(name, "blk.", 4) == 0) {
            part = strchr(name + 4, '.');
        }
        for (size_t j = 0; part != NULL && j < sizeof parts / sizeof parts[0]; j++) {
            known |= strcmp(part + 1, parts[j]) == 0;
        }
        if (!known) {
            return attn_fail(ATTN_ERR_UNSUPPORTED, "gguf: the architecture '%s' has no tensor '%.80s'",
                             in->model->architecture, name);
        }
    }
    return attn_fail(ATTN_ERR_UNSUPPORTED, "gguf: the architecture '%s' uses %lld of the file's %lld tensors",
                     in->model->architecture, (long long)used, (long long)attn_gguf_tensor_count(file));
}

/* One block of memory for all matrices. Generation streams through it, so large pages help. */
static attn_status reserve_weights(attn_model *model, int tied)
{
    size_t total = 0;
    for (int64_t i = 0; i < attn_gguf_tensor_count(model->file); i++) {
        const attn_gguf_tensor *t = attn_gguf_tensor_at(model->file, i);
        if (t->ndim == 2 && (tied || strcmp(t->name, "token_embd.weight") != 0)) {
            size_t bytes = attn_quant_packed_bytes(t->type, t->shape[1], t->shape[0]) + 64;
            total = bytes < SIZE_MAX - total ? total + bytes : SIZE_MAX;
        }
    }
    ATTN_TRY(attn_arena_create(&model->weights, total));
#ifdef MADV_HUGEPAGE
    attn_arena_mark mark = attn_arena_get_mark(model->weights);
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)attn_arena_alloc(model->weights, total);
    if (start != 0 && total > 2 * page) {
        start = (start + page - 1) / page * page;
        madvise((void *)start, (total - page) / page * page, MADV_HUGEPAGE);
    }
    attn_arena_release(model->weights, mark);
#endif
    return ATTN_OK;
}

static attn_status load_weights(attn_model *model, const architecture *kind, const attn_model_settings *settings,
                                int mapped)
{
    const attn_model_info *info = &model->info;
    loader in = {.model = model, .settings = settings, .interleaved = kind->interleaved, .mapped = mapped,
                 .total_bytes = 1,
                 .threads = settings->threads > 0 ? settings->threads : omp_get_max_threads(),
                 .pairs = {info->head_width, model->ropes[0].dims}};
    for (int64_t i = 0; i < attn_gguf_tensor_count(model->file); i++) {
        in.total_bytes += attn_gguf_tensor_at(model->file, i)->bytes;
    }
    int tied = attn_gguf_tensor_find(model->file, "output.weight") == NULL;
    ATTN_TRY(reserve_weights(model, tied));
    if (tied) {
        ATTN_TRY(load_matrix(&in, "token_embd.weight", info->width, info->vocabulary, 0, &model->embedding));
    } else {
        /* Only single rows are needed: they are read from the file. */
        ATTN_TRY(find_tensor(model->file, "token_embd.weight", 0, info->width, info->vocabulary,
                             &model->embedding_tensor));
        float *row = attn_alloc_array((size_t)info->width, sizeof *row);
        if (row == NULL) {
            return attn_fail_memory((size_t)info->width * sizeof *row);
        }
        attn_status status = attn_gguf_dequantize(model->embedding_tensor->type, model->embedding_tensor->data,
                                                  info->width, row);
        attn_free(row);
        ATTN_TRY(status);
        in.used++;
        ATTN_TRY(load_matrix(&in, "output.weight", info->width, info->vocabulary, 0, &model->output));
    }
    ATTN_TRY(load_vector(&in, "output_norm.weight", info->width, 0, &model->output_norm));
    for (int64_t i = 0; i < info->layers; i++) {
        ATTN_TRY(load_layer(&in, kind, i));
    }
    return check_all_used(&in, tied);
}

static attn_status load(attn_model *model, const attn_model_settings *settings, int mapped)
{
    const architecture *kind = NULL;
    ATTN_TRY(find_architecture(model->file, &kind));
    model->architecture = attn_strdup(kind->name);
    if (model->architecture == NULL) {
        return attn_fail_memory(strlen(kind->name));
    }
    ATTN_TRY(read_info(model));
    model->layers = attn_calloc_array((size_t)model->info.layers, sizeof *model->layers);
    if (model->layers == NULL) {
        return attn_fail_memory((size_t)model->info.layers * sizeof *model->layers);
    }
    ATTN_TRY(read_numbers(model, kind));
    ATTN_TRY(read_windows(model, kind));
    return load_weights(model, kind, settings, mapped);
}

static attn_status finish_open(attn_model **model, attn_gguf *file, const attn_model_settings *settings, int mapped)
{
    static const attn_model_settings standard = {0};
    attn_model *made = attn_calloc_array(1, sizeof *made);
    if (made == NULL) {
        attn_gguf_close(file);
        return attn_fail_memory(sizeof *made);
    }
    made->file = file;
    attn_status status = load(made, settings != NULL ? settings : &standard, mapped);
    if (status != ATTN_OK) {
        attn_model_close(made);
        return status;
    }
    *model = made;
    return ATTN_OK;
}

attn_status attn_model_open(attn_model **model, const char *path, const attn_model_settings *settings)
{
    attn_gguf *file;
    *model = NULL;
    ATTN_TRY(attn_gguf_open(&file, path));
    attn_status status = finish_open(model, file, settings, 1);
    return status == ATTN_OK ? ATTN_OK : attn_fail(status, "'%s': %s", path, attn_last_error());
}

attn_status attn_model_open_memory(attn_model **model, const void *data, size_t bytes,
                                   const attn_model_settings *settings)
{
    attn_gguf *file;
    *model = NULL;
    ATTN_TRY(attn_gguf_open_memory(&file, data, bytes));
    return finish_open(model, file, settings, 0);
}

void attn_model_close(attn_model *model)
{
    if (model == NULL) {
        return;
    }
    for (int64_t i = 0; model->layers != NULL && i < model->info.layers; i++) {
        attn_model_layer *l = &model->layers[i];
        float *vectors[] = {l->attention_norm, l->ffn_norm, l->q_norm, l->k_norm, l->post_attention_norm,
                            l->post_ffn_norm,  l->q_bias,   l->k_bias, l->v_bias, l->out_bias};
        for (size_t j = 0; j < sizeof vectors / sizeof vectors[0]; j++) {
            attn_free(vectors[j]);
        }
    }
    attn_free(model->layers);
    attn_arena_destroy(model->weights);
    attn_free(model->output_norm);
    attn_rope_free(&model->ropes[0]);
    attn_rope_free(&model->ropes[1]);
    attn_free(model->architecture);
    attn_gguf_close(model->file);
    attn_free(model);
}

const attn_model_info *attn_model_get_info(const attn_model *model) { return &model->info; }

int64_t attn_model_window(const attn_model *model, int layer)
{
    return layer >= 0 && layer < model->info.layers ? model->layers[layer].window : 0;
}

const attn_gguf *attn_model_file(const attn_model *model) { return model->file; }
