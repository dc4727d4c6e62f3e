#include <attn/op.h>
#include <attn/plan.h>
#include <attn/policy.h>

#include "core/random.h"
#include "kernel/rows.h"
#include "llm/model.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PROMPT, GENERATION, PHASES };

static const char *const phase_names[PHASES] = {"prompt", "generation"};

/* Queries that `flexprefill` sees together: its choice is as dear for a chunk as for all of these. */
#define SPAN 8192

/* A mechanism that some heads use. `op` is made on first use, when the model's scale of the scores is known. */
typedef struct mechanism {
    char *spec, *op_spec;  /* as given, and without what concerns the cache alone */
    attn_op *op, *lead_op; /* of the rows before those that `op` can take; NULL: `op` too */
    int64_t sinks, recent; /* of `streaming`; recent 0 for all others */
    int64_t block;         /* of `flexprefill`, whose first query must stand at a multiple of it; 0 for all others */
    int renumber;          /* positions=cache */
    int exact;
} mechanism;

/* One layer: the mechanism of each query head, and whether generation has begun. */
typedef struct layer_policy {
    attn_policy *policy;
    int *used[PHASES]; /* [heads], index into mechanisms */
    int generating;
} layer_policy;

struct attn_policy {
    const attn_model *model;
    int64_t layers, heads, kv_heads;
    mechanism *mechanisms;
    int mechanism_count;
    layer_policy *layer;
    int *used; /* [layers][PHASES][heads] */
    int counting;
    attn_policy_stats stats;
    attn_context *context;
};

/* ---- Mechanisms ---- */

static int has_port(const attn_op_info *info, attn_port_direction direction, const char *name)
{
    for (int i = 0; i < info->port_count; i++) {
        if (info->ports[i].direction == direction && strcmp(info->ports[i].name, name) == 0) {
            return 1;
        }
    }
    return 0;
}

static int has_param(const attn_op_info *info, const char *name)
{
    for (int i = 0; i < info->param_count; i++) {
        if (strcmp(info->params[i].name, name) == 0) {
            return 1;
        }
    }
    return 0;
}

/* Whether the mechanism maps q, k, v and nothing else that it needs to o. */
static attn_status check_ports(const attn_op_info *info)
{
    int fits = has_port(info, ATTN_PORT_OUT, "o");
    for (int i = 0; i < info->port_count; i++) {
        const attn_port_info *port = &info->ports[i];
        if (port->direction == ATTN_PORT_IN && (port->flags & ATTN_PORT_OPTIONAL) == 0) {
            fits = fits && (strcmp(port->name, "q") == 0 || strcmp(port->name, "k") == 0 || strcmp(port->name, "v") == 0);
        }
    }
    if (!fits || !has_port(info, ATTN_PORT_IN, "q") || !has_port(info, ATTN_PORT_IN, "k")) {
        return attn_fail(ATTN_ERR_ARGUMENT, "mechanism %s does not compute o from q, k and v alone, as a language model needs",
                         info->name);
    }
    return ATTN_OK;
}

/* The value of a whole-number parameter as written in a SPEC, or its default. */
static int64_t spec_number(const char *spec, const char *key, int64_t standard)
{
    size_t length = strlen(key);
    for (const char *p = strchr(spec, ':'); p != NULL; p = strchr(p + 1, ',')) {
        if (strncmp(p + 1, key, length) == 0 && p[1 + length] == '=') {
            return strtoll(p + 2 + length, NULL, 10);
        }
    }
    return standard;
}

static int is_name(const char *spec, const char *name)
{
    size_t length = strlen(name);
    return strncmp(spec, name, length) == 0 && (spec[length] == '\0' || spec[length] == ':');
}

/* Cut positions=original|cache out of a SPEC of `streaming`. */
static attn_status take_positions(char *spec, int *renumber)
{
    static const char key[] = "positions=";
    const size_t length = sizeof key - 1;
    for (char *at = strchr(spec, ':'), *item; at != NULL; at = strchr(at + 1, ',')) {
        item = at + 1;
        if (strncmp(item, key, length) != 0) {
            continue;
        }
        const char *value = item + length;
        size_t bytes = strcspn(value, ",");
        *renumber = bytes == 5 && strncmp(value, "cache", 5) == 0;
        if (!*renumber && !(bytes == 8 && strncmp(value, "original", 8) == 0)) {
            return attn_fail(ATTN_ERR_ARGUMENT, "streaming: positions is '%.*s', expected original or cache",
                             (int)attn_min_i64((int64_t)bytes, 40), value);
        }
        if (value[bytes] == ',') {
            memmove(item, value + bytes + 1, strlen(value + bytes + 1) + 1);
        } else {
            *at = '\0';
        }
        break;
    }
    return ATTN_OK;
}

static void free_mechanism(mechanism *m)
{
    attn_op_destroy(m->op);
    attn_op_destroy(m->lead_op);
    attn_free(m->spec);
    attn_free(m->op_spec);
}

/* Check a SPEC and take it apart; what was made is freed by the caller, also on failure. */
static attn_status read_mechanism(mechanism *m, const char *spec)
{
    *m = (mechanism){.spec = attn_strdup(spec), .op_spec = attn_strdup(spec), .exact = strcmp(spec, "dense") == 0};
    if (m->spec == NULL || m->op_spec == NULL) {
        return attn_fail_memory(strlen(spec) + 1);
    }
    int streaming = is_name(spec, "streaming");
    if (streaming) {
        ATTN_TRY(take_positions(m->op_spec, &m->renumber));
    }
    attn_op *op;
    ATTN_TRY(attn_op_create(&op, m->op_spec));
    attn_status status = check_ports(attn_op_get_info(op));
    attn_op_destroy(op);
    if (streaming) {
        m->sinks = spec_number(spec, "sinks", 4);
        m->recent = spec_number(spec, "recent", 1024);
    }
    if (is_name(spec, "flexprefill")) {
        m->block = spec_number(spec, "block", 128);
    }
    return status;
}

/* Index of a SPEC's mechanism, added when it is new. */
static attn_status add_mechanism(attn_policy *policy, const char *spec, int *index)
{
    for (int i = 0; i < policy->mechanism_count; i++) {
        if (strcmp(policy->mechanisms[i].spec, spec) == 0) {
            *index = i;
            return ATTN_OK;
        }
    }
    size_t bytes = (size_t)policy->mechanism_count * sizeof(mechanism);
    mechanism *grown = attn_realloc(policy->mechanisms, bytes, bytes + sizeof(mechanism));
    if (grown == NULL) {
        return attn_fail_memory(bytes + sizeof(mechanism));
    }
    policy->mechanisms = grown;
    *index = policy->mechanism_count++;
    return read_mechanism(&grown[*index], spec);
}

/* A SPEC's operator with the model's scale and causality, unless it gives its own. */
static attn_status make_op(attn_op **op, const char *spec, double scale)
{
    attn_op *plain;
    ATTN_TRY(attn_op_create(&plain, spec));
    const attn_op_info *info = attn_op_get_info(plain);
    size_t bytes = strlen(spec) + 80;
    char *full = attn_alloc(bytes);
    if (full == NULL) {
        attn_op_destroy(plain);
        return attn_fail_memory(bytes);
    }
    int used = snprintf(full, bytes, "%s", spec);
    const char *join = strchr(spec, ':') != NULL ? "," : ":";
    if (has_param(info, "scale") && strstr(spec, "scale=") == NULL) {
        used += snprintf(full + used, bytes - (size_t)used, "%sscale=%.17g", join, scale);
        join = ",";
    }
    if (has_param(info, "causal") && strstr(spec, "causal=") == NULL) {
        snprintf(full + used, bytes - (size_t)used, "%scausal=true", join);
    }
    attn_op_destroy(plain);
    attn_status status = attn_op_create(op, full);
    attn_free(full);
    return status;
}

/* ---- Making policies ---- */

static attn_status policy_begin(attn_policy **policy, const attn_model *model)
{
    *policy = NULL;
    const attn_model_info *info = attn_model_get_info(model);
    attn_policy *made = attn_calloc_array(1, sizeof *made);
    if (made == NULL) {
        return attn_fail_memory(sizeof *made);
    }
    made->model = model;
    made->layers = info->layers;
    made->heads = info->heads;
    made->kv_heads = info->kv_heads;
    made->layer = attn_calloc_array((size_t)info->layers, sizeof *made->layer);
    made->used = attn_calloc_array((size_t)(info->layers * PHASES * info->heads), sizeof *made->used);
    if (made->layer == NULL || made->used == NULL) {
        attn_policy_destroy(made);
        return attn_fail_memory((size_t)(info->layers * info->heads) * sizeof *made->used);
    }
    for (int64_t l = 0; l < info->layers; l++) {
        made->layer[l].policy = made;
        for (int phase = 0; phase < PHASES; phase++) {
            made->layer[l].used[phase] = made->used + (l * PHASES + phase) * info->heads;
        }
    }
    *policy = made;
    return ATTN_OK;
}

static attn_status set_all(attn_policy *policy, int phase, const char *spec)
{
    int index;
    ATTN_TRY(add_mechanism(policy, spec != NULL ? spec : "dense", &index));
    for (int64_t l = 0; l < policy->layers; l++) {
        for (int64_t h = 0; h < policy->heads; h++) {
            policy->layer[l].used[phase][h] = index;
        }
    }
    return ATTN_OK;
}

#define TRIAL 16 /* tokens */

/* A prompt's queries may not see later keys, which the text does not have yet when its tokens are generated. Mechanisms are tried
 * on a few tokens, twice, with another last key and value. Those that such a trial does not suit say why when they run. */
static attn_status check_causal(const attn_policy *policy, const mechanism *m)
{
    int64_t width = policy->model->info.head_width, rows = policy->heads * TRIAL, kv_rows = policy->kv_heads * TRIAL;
    size_t size = (size_t)(3 * rows + 2 * kv_rows) * (size_t)width;
    float *memory = attn_alloc_array(size, sizeof *memory);
    if (memory == NULL) {
        return attn_fail_memory(size * sizeof *memory);
    }
    attn_random random;
    attn_random_seed(&random, 1);
    for (size_t i = 0; i < size; i++) {
        memory[i] = (float)attn_random_normal(&random);
    }
    float *q = memory, *k = q + rows * width, *v = k + kv_rows * width, *o[2] = {v + kv_rows * width, v + (kv_rows + rows) * width};
    int64_t shape[] = {1, policy->heads, TRIAL, width}, kv_shape[] = {1, policy->kv_heads, TRIAL, width};
    const attn_named_tensor in[] = {{"q", attn_tensor_make(q, ATTN_F32, 4, shape)},
                                    {"k", attn_tensor_make(k, ATTN_F32, 4, kv_shape)},
                                    {"v", attn_tensor_make(v, ATTN_F32, 4, kv_shape)}};
    attn_op *op = NULL;
    attn_status status = make_op(&op, m->op_spec, 1);
    for (int i = 0; i < 2 && status == ATTN_OK; i++) {
        const attn_named_tensor out = {"o", attn_tensor_make(o[i], ATTN_F32, 4, shape)};
        status = attn_op_forward(op, in, 3, &out, 1, NULL);
        for (int64_t h = 0; h < policy->kv_heads; h++) {
            for (int64_t d = 0, last = (h * TRIAL + TRIAL - 1) * width; d < width; d++) {
                k[last + d] += 3;
                v[last + d] += 3;
            }
        }
    }
    attn_op_destroy(op);
    double difference = 0;
    for (int64_t i = 0; i < rows * width && status == ATTN_OK; i++) {
        double d = i / width % TRIAL == TRIAL - 1 ? 0 : fabs((double)o[0][i] - (double)o[1][i]);
        difference = d > difference ? d : difference;
    }
    attn_free(memory);
    if (difference > 1e-5) {
        return attn_fail(ATTN_ERR_ARGUMENT, "mechanism %s is not causal: its queries see tokens that come later in the prompt", m->spec);
    }
    return status == ATTN_ERR_MEMORY ? status : ATTN_OK;
}

static attn_status check_prompts(const attn_policy *policy)
{
    for (int i = 0; i < policy->mechanism_count; i++) {
        int used = 0;
        for (int64_t j = 0; j < policy->layers * policy->heads && !used; j++) {
            used = policy->layer[j / policy->heads].used[PROMPT][j % policy->heads] == i;
        }
        if (used && !policy->mechanisms[i].exact) {
            ATTN_TRY(check_causal(policy, &policy->mechanisms[i]));
        }
    }
    return ATTN_OK;
}

static attn_status finish(attn_policy **policy, attn_status status)
{
    if (status == ATTN_OK) {
        status = check_prompts(*policy);
    }
    if (status != ATTN_OK) {
        attn_policy_destroy(*policy);
        *policy = NULL;
    }
    return status;
}

attn_status attn_policy_create(attn_policy **policy, const attn_model *model, const char *prompt, const char *generation)
{
    ATTN_TRY(policy_begin(policy, model));
    attn_status status = set_all(*policy, PROMPT, prompt);
    if (status == ATTN_OK) {
        status = set_all(*policy, GENERATION, generation);
    }
    return finish(policy, status);
}

/* Whether a list (NULL: all) names a number; numbers outside 0 ... limit-1 are an error that the caller has checked. */
static int listed(const cJSON *list, int64_t number)
{
    const cJSON *item;
    if (list == NULL) {
        return 1;
    }
    cJSON_ArrayForEach(item, list)
    {
        if (item->valuedouble == (double)number) {
            return 1;
        }
    }
    return 0;
}

static attn_status check_list(const cJSON *list, const char *name, int64_t limit)
{
    const cJSON *item;
    if (list != NULL && !cJSON_IsArray(list)) {
        return attn_fail(ATTN_ERR_FORMAT, "policy: %s must be a list of whole numbers", name);
    }
    cJSON_ArrayForEach(item, list)
    {
        if (!cJSON_IsNumber(item) || item->valuedouble < 0 || item->valuedouble >= (double)limit ||
            item->valuedouble != floor(item->valuedouble)) {
            return attn_fail(ATTN_ERR_FORMAT, "policy: %s must hold whole numbers in 0 ... %lld", name, (long long)(limit - 1));
        }
    }
    return ATTN_OK;
}

static attn_status spec_of(const cJSON *object, int phase, const char **spec)
{
    *spec = NULL;
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, phase_names[phase]);
    if (item != NULL && !cJSON_IsString(item)) {
        return attn_fail(ATTN_ERR_FORMAT, "policy: %s must be a SPEC in quotes", phase_names[phase]);
    }
    *spec = item != NULL ? item->valuestring : NULL;
    return ATTN_OK;
}

static attn_status check_keys(const cJSON *object, int is_entry)
{
    const cJSON *item;
    cJSON_ArrayForEach(item, object)
    {
        if (strcmp(item->string, "prompt") != 0 && strcmp(item->string, "generation") != 0 && strcmp(item->string, "layers") != 0 &&
            !(is_entry && strcmp(item->string, "heads") == 0)) {
            return attn_fail(ATTN_ERR_FORMAT, "policy: unknown key '%.60s' (%s)", item->string,
                             is_entry ? "layers, heads, prompt, generation" : "prompt, generation, layers");
        }
    }
    return ATTN_OK;
}

static attn_status read_entry(attn_policy *policy, const cJSON *entry)
{
    if (!cJSON_IsObject(entry)) {
        return attn_fail(ATTN_ERR_FORMAT, "policy: entries of layers must be objects");
    }
    const cJSON *layers = cJSON_GetObjectItemCaseSensitive(entry, "layers");
    const cJSON *heads = cJSON_GetObjectItemCaseSensitive(entry, "heads");
    ATTN_TRY(check_keys(entry, 1));
    ATTN_TRY(check_list(layers, "layers", policy->layers));
    ATTN_TRY(check_list(heads, "heads", policy->heads));
    for (int phase = 0; phase < PHASES; phase++) {
        const char *spec = NULL;
        int index;
        ATTN_TRY(spec_of(entry, phase, &spec));
        if (spec == NULL) {
            continue;
        }
        ATTN_TRY(add_mechanism(policy, spec, &index));
        for (int64_t l = 0; l < policy->layers; l++) {
            for (int64_t h = 0; h < policy->heads; h++) {
                if (listed(layers, l) && listed(heads, h)) {
                    policy->layer[l].used[phase][h] = index;
                }
            }
        }
    }
    return ATTN_OK;
}

static attn_status read_policy(attn_policy *policy, const cJSON *root)
{
    if (!cJSON_IsObject(root)) {
        return attn_fail(ATTN_ERR_FORMAT, "policy: not a JSON object");
    }
    ATTN_TRY(check_keys(root, 0));
    for (int phase = 0; phase < PHASES; phase++) {
        const char *spec = NULL;
        ATTN_TRY(spec_of(root, phase, &spec));
        ATTN_TRY(set_all(policy, phase, spec));
    }
    const cJSON *entries = cJSON_GetObjectItemCaseSensitive(root, "layers"), *entry;
    if (entries != NULL && !cJSON_IsArray(entries)) {
        return attn_fail(ATTN_ERR_FORMAT, "policy: layers must be a list");
    }
    cJSON_ArrayForEach(entry, entries)
    {
        ATTN_TRY(read_entry(policy, entry));
    }
    return ATTN_OK;
}

#define FILE_LIMIT (1 << 20)

attn_status attn_policy_load(attn_policy **policy, const attn_model *model, const char *path)
{
    *policy = NULL;
    FILE *file = fopen(path, "rb");
    char *text = attn_alloc(FILE_LIMIT);
    if (file == NULL || text == NULL) {
        attn_status status = file == NULL ? attn_fail(ATTN_ERR_IO, "cannot open policy '%s'", path) : attn_fail_memory(FILE_LIMIT);
        if (file != NULL) {
            fclose(file);
        }
        attn_free(text);
        return status;
    }
    size_t bytes = fread(text, 1, FILE_LIMIT, file);
    fclose(file);
    cJSON *root = cJSON_ParseWithLength(text, bytes);
    attn_free(text);
    attn_status status = policy_begin(policy, model);
    if (status == ATTN_OK) {
        status = finish(policy, read_policy(*policy, root));
    }
    cJSON_Delete(root);
    return status == ATTN_OK ? status : attn_fail(status, "'%s': %s", path, attn_last_error());
}

void attn_policy_destroy(attn_policy *policy)
{
    if (policy == NULL) {
        return;
    }
    for (int i = 0; i < policy->mechanism_count; i++) {
        free_mechanism(&policy->mechanisms[i]);
    }
    attn_free(policy->mechanisms);
    attn_free(policy->layer);
    attn_free(policy->used);
    attn_free(policy);
}

/* ---- Running ---- */

/* Heads begin ... begin+count-1 of a [heads, rows, D] view as [1, count, rows, D], rows first_row ... first_row+rows-1. */
static attn_tensor head_range(const attn_tensor *all, int64_t begin, int64_t count, int64_t first_row, int64_t rows)
{
    attn_tensor view = {.dtype = all->dtype, .ndim = 4};
    int64_t offset = begin * all->stride[0] + first_row * all->stride[1];
    view.data = (char *)all->data + offset * (int64_t)attn_dtype_size(all->dtype);
    view.shape[0] = 1, view.stride[0] = 0;
    view.shape[1] = count, view.stride[1] = all->stride[0];
    view.shape[2] = rows, view.stride[2] = all->stride[1];
    view.shape[3] = all->shape[2], view.stride[3] = all->stride[2];
    return view;
}

/* ---- Query heads h ... h+count-1, which share one mechanism and read whole key heads or a part of one ---- */

typedef struct head_run {
    const attn_llm_call *call;
    const mechanism *m;
    int64_t h, count, kv, kv_count;
    int64_t n, keys; /* queries, and the keys that the last one sees */
    double *pairs;   /* those that were computed are added; NULL: not counted */
} head_run;

/* The pairs of a mechanism: of its selection, or by its own account, or `otherwise`. */
static double count_pairs(const attn_op *op, const attn_named_tensor in[3], double otherwise, const attn_exec *exec)
{
    attn_plan *plan;
    attn_cost cost;
    if (attn_op_select(op, in, 3, &plan, exec) == ATTN_OK) {
        attn_plan_measures measures;
        attn_plan_measure(plan, 1, 1, &measures);
        double pairs = measures.pairs * (double)in[0].tensor.shape[1] / (double)attn_plan_get_layout(plan)->shape.heads;
        attn_plan_destroy(plan);
        return pairs;
    }
    return attn_op_cost(op, in, 3, &cost) == ATTN_OK ? cost.pairs : otherwise;
}

/* Queries first ... end-1 by an operator. */
static attn_status run_rows(const head_run *r, const attn_op *op, int64_t first, int64_t end)
{
    const attn_llm_call *call = r->call;
    int64_t rows = end - first, keys = r->keys - (r->n - end);
    if (rows <= 0) {
        return ATTN_OK;
    }
    attn_named_tensor in[] = {{"q", head_range(&call->q, r->h, r->count, first, rows)},
                              {"k", head_range(&call->k, r->kv, r->kv_count, 0, keys)},
                              {"v", head_range(&call->v, r->kv, r->kv_count, 0, keys)}};
    attn_named_tensor out = {"o", head_range(&call->o, r->h, r->count, first, rows)};
    ATTN_TRY(attn_op_forward(op, in, 3, &out, 1, &call->exec));
    if (r->pairs != NULL) {
        *r->pairs += count_pairs(op, in, (double)r->count * (double)rows * ((double)keys - (double)(rows - 1) / 2), &call->exec);
    }
    return ATTN_OK;
}

/* o, of scores with log-sum-exp lse, takes in the result `more` over other keys: [count][rows] rows. */
static void merge(attn_tensor *o, const float *lse, const attn_tensor *more, const float *more_lse, int threads)
{
    int64_t heads = o->shape[1], rows = o->shape[2], width = o->shape[3];
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (rows > 8)
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t i = 0; i < rows; i++) {
            float *to = (float *)o->data + h * o->stride[1] + i * o->stride[2];
            const float *from = (const float *)more->data + (h * rows + i) * width;
            float share = 1 / (1 + expf(lse[h * rows + i] - more_lse[h * rows + i]));
            for (int64_t c = 0; c < width; c++) {
                to[c] += share * (from[c] - to[c]);
            }
        }
    }
}

/* Queries first ... n-1 of `streaming` with positions=cache, all of which stand at sinks + recent or later. To them it looks as if the
 * recent keys followed the sinks at once. Distances to recent keys are the true ones; the sinks are sinks + recent - 1 before the query,
 * so for these the query turns back to that position. Cached keys never change. */
static attn_status run_renumbered(const head_run *r, int64_t first)
{
    const attn_llm_call *call = r->call;
    const attn_model *model = call->model;
    const attn_rope *rope = &model->ropes[model->layers[call->layer].rope];
    const attn_row_kernels *kernels = ATTN_KERNEL_SELECT(attn_row_kernels_table, attn_isa_current());
    int64_t rows = r->n - first, half = rope->dims / 2, d = model->info.head_width, sinks = r->m->sinks, all = r->count * rows;
    if (rows <= 0) {
        return ATTN_OK;
    }
    attn_arena *arena = call->exec.arena;
    float *angles = attn_arena_array(arena, (size_t)rows, (size_t)rope->dims * sizeof(float));
    float *turned = attn_arena_array(arena, (size_t)all, (size_t)d * sizeof(float));
    float *beside = attn_arena_array(arena, (size_t)all, (size_t)d * sizeof(float));
    float *lse = attn_arena_array(arena, (size_t)all, 2 * sizeof(float));
    if (angles == NULL || turned == NULL || beside == NULL || lse == NULL) {
        return attn_fail_memory((size_t)(all * d) * 2 * sizeof(float));
    }
    attn_rope_angles(rope, sinks + r->m->recent - 1 - (call->position + first), -1, rows, 1, call->exec.threads, angles);
    attn_tensor q = head_range(&call->q, r->h, r->count, first, rows), o = head_range(&call->o, r->h, r->count, first, rows);
#pragma omp parallel for collapse(2) schedule(static) num_threads(call->exec.threads) if (rows > 8)
    for (int64_t h = 0; h < r->count; h++) {
        for (int64_t i = 0; i < rows; i++) {
            float *to = turned + (h * rows + i) * d;
            memcpy(to, (const float *)q.data + h * q.stride[1] + i * q.stride[2], (size_t)d * sizeof *to);
            kernels->rotate(to, 1, d, half, angles + i * rope->dims, angles + i * rope->dims + half);
        }
    }
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = call->scale;
    const int64_t shape[] = {1, r->count, rows, d};
    attn_tensor beside_view = attn_tensor_make(beside, ATTN_F32, 4, shape);
    attn_tensor beside_lse = attn_tensor_make(lse, ATTN_F32, 3, shape), recent_lse = attn_tensor_make(lse + all, ATTN_F32, 3, shape);
    attn_dense_inputs in = {.q = attn_tensor_make(turned, ATTN_F32, 4, shape),
                            .k = head_range(&call->k, r->kv, r->kv_count, 0, sinks),
                            .v = head_range(&call->v, r->kv, r->kv_count, 0, sinks)};
    attn_exec few = {.threads = rows <= 8 ? 1 : call->exec.threads, .arena = arena}; /* sinks are too few to share among threads */
    ATTN_TRY(attn_dense_forward(&settings, &in, &beside_view, &beside_lse, &few));
    settings.causal = 1;
    settings.window[0] = r->m->recent - 1;
    in.q = q;
    in.k = head_range(&call->k, r->kv, r->kv_count, sinks, r->keys - sinks);
    in.v = head_range(&call->v, r->kv, r->kv_count, sinks, r->keys - sinks);
    ATTN_TRY(attn_dense_forward(&settings, &in, &o, &recent_lse, &call->exec));
    merge(&o, lse + all, &beside_view, lse, call->exec.threads);
    if (r->pairs != NULL) {
        *r->pairs += (double)all * (double)(sinks + r->m->recent);
    }
    return ATTN_OK;
}

/* The operators, when they are needed for the first time. */
static attn_status prepare(mechanism *m, double scale)
{
    if (m->op == NULL) {
        ATTN_TRY(make_op(&m->op, m->op_spec, scale));
    }
    return m->block > 0 && m->lead_op == NULL ? make_op(&m->lead_op, "dense", scale) : ATTN_OK;
}

static attn_status run_mechanism(const head_run *r)
{
    const attn_llm_call *call = r->call;
    const mechanism *m = r->m;
    if (call->softcap != 0) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s cannot replace attention with soft-capped scores", m->spec);
    }
    if (call->k.dtype == ATTN_I8) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s needs a cache in f32, f16 or bf16", m->spec);
    }
    if (m->renumber && m->sinks > 0) {
        /* Queries that see all keys before them need no new numbers. */
        int64_t lead = attn_max_i64(0, attn_min_i64(r->n, m->sinks + m->recent - call->position));
        ATTN_TRY(run_rows(r, m->op, 0, lead));
        attn_arena_mark mark = attn_arena_get_mark(call->exec.arena);
        attn_status status = run_renumbered(r, lead);
        attn_arena_release(call->exec.arena, mark);
        return status;
    }
    int64_t over = m->block > 0 ? (r->keys - r->n) % m->block : 0, lead = over > 0 ? attn_min_i64(r->n, m->block - over) : 0;
    ATTN_TRY(run_rows(r, m->lead_op, 0, lead));
    return run_rows(r, m->op, lead, r->n);
}

static attn_status run_heads(attn_policy *policy, const attn_llm_call *call, mechanism *m, int64_t h, int64_t count, int phase)
{
    int64_t group = policy->heads / policy->kv_heads, kv = h / group, kv_count = attn_ceil_div(count, group);
    double n = (double)call->q.shape[1], all = (double)call->position + n; /* the keys that exact attention would hold */
    double exact = (double)count * (n * all - n * (n - 1) / 2), pairs = 0;
    head_run r = {call, m, h, count, kv, kv_count, call->q.shape[1], call->key_counts[kv], policy->counting ? &pairs : NULL};
    if (m->exact && count == kv_count * group) {
        ATTN_TRY(attn_llm_exact(call, kv, kv + kv_count));
        pairs = exact;
    } else {
        ATTN_TRY(prepare(m, call->scale));
        ATTN_TRY(run_mechanism(&r));
    }
    if (policy->counting) {
        double *done = phase == PROMPT ? &policy->stats.prompt_pairs : &policy->stats.generation_pairs;
        double *full = phase == PROMPT ? &policy->stats.prompt_exact_pairs : &policy->stats.generation_exact_pairs;
        *done += pairs;
        *full += exact;
    }
    return ATTN_OK;
}

/* Runs of heads that can go together: the same mechanism, whole groups with equally many keys, or part of one group. */
static attn_status run_layer(layer_policy *layer, const attn_llm_call *call, int phase)
{
    attn_policy *policy = layer->policy;
    int64_t group = policy->heads / policy->kv_heads;
    const int *used = layer->used[phase];
    for (int64_t h = 0, next; h < policy->heads; h = next) {
        int64_t end = (h / group + 1) * group; /* of this group */
        next = h + 1;
        while (next < end && used[next] == used[h]) {
            next++;
        }
        int whole = h % group == 0 && next == end;
        while (whole && next < policy->heads && call->key_counts[next / group] == call->key_counts[h / group]) {
            int same = 1;
            for (int64_t i = next; i < next + group; i++) {
                same &= used[i] == used[h];
            }
            if (!same) {
                break;
            }
            next += group;
        }
        ATTN_TRY(run_heads(policy, call, &policy->mechanisms[used[h]], h, next - h, phase));
    }
    return ATTN_OK;
}

static attn_status on_prefill(void *user, const attn_llm_call *call)
{
    layer_policy *layer = user;
    if (call->position == 0) {
        layer->generating = 0;
    }
    return run_layer(layer, call, PROMPT);
}

static attn_status on_decode(void *user, const attn_llm_call *call)
{
    layer_policy *layer = user;
    layer->generating = 1;
    return run_layer(layer, call, GENERATION);
}

/* Sinks and recent keys that a key head must hold for all its query heads; recent 0: all keys. */
static void needed_keys(const layer_policy *layer, int64_t kv, int64_t *sinks, int64_t *recent)
{
    const attn_policy *policy = layer->policy;
    int64_t group = policy->heads / policy->kv_heads;
    *sinks = *recent = 0;
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        for (int phase = layer->generating ? GENERATION : PROMPT; phase < PHASES; phase++) {
            const mechanism *m = &policy->mechanisms[layer->used[phase][h]];
            if (m->recent == 0) {
                *recent = 0;
                return;
            }
            *sinks = attn_max_i64(*sinks, m->sinks);
            *recent = attn_max_i64(*recent, m->recent);
        }
    }
}

static attn_status on_update(void *user, attn_context *context, int sequence, int index)
{
    layer_policy *layer = user;
    for (int64_t kv = 0; kv < layer->policy->kv_heads; kv++) {
        int64_t sinks, recent, keys = attn_context_keys(context, sequence, index, kv);
        needed_keys(layer, kv, &sinks, &recent);
        /* Some slack, so that keys move only now and then; the mechanism masks what it does not see. */
        if (recent == 0 || keys <= sinks + recent + attn_max_i64(64, recent / 8)) {
            continue;
        }
        int64_t *kept = attn_alloc_array((size_t)(sinks + recent), sizeof *kept);
        if (kept == NULL) {
            return attn_fail_memory((size_t)(sinks + recent) * sizeof *kept);
        }
        for (int64_t i = 0; i < sinks + recent; i++) {
            kept[i] = i < sinks ? i : keys - recent + (i - sinks);
        }
        attn_status status = attn_context_keep(context, sequence, index, kv, kept, sinks + recent);
        attn_free(kept);
        ATTN_TRY(status);
    }
    return ATTN_OK;
}

attn_status attn_policy_use(attn_policy *policy, attn_context *context)
{
    if (policy == NULL) {
        return attn_context_set_attention(context, -1, NULL);
    }
    for (int64_t l = 0; l < policy->layers; l++) {
        attn_llm_attention attention = {on_prefill, on_decode, on_update, &policy->layer[l], 0, 1};
        for (int64_t h = 0; h < policy->heads; h++) {
            attention.span = policy->mechanisms[policy->layer[l].used[PROMPT][h]].block > 0 ? SPAN : attention.span;
            attention.endless &= policy->mechanisms[policy->layer[l].used[GENERATION][h]].renumber;
        }
        int windowed = attn_model_window(policy->model, (int)l) > 0;
        ATTN_TRY(attn_context_set_attention(context, (int)l, windowed ? NULL : &attention));
        policy->layer[l].generating = 0;
    }
    return ATTN_OK;
}

void attn_policy_count(attn_policy *policy, int on) { policy->counting = on; }

attn_policy_stats attn_policy_get_stats(const attn_policy *policy) { return policy->stats; }
