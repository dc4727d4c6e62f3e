/* Transformers: small random models of each architecture against a plain float64 implementation, and what contexts
 * promise. */
#include <attn/model.h>

#include "core/internal.h"
#include "gguf_build.h"
#include "kernel/dispatch.h"
#include "tensor/half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum { WIDTH = 32, HEADS = 4, KV = 2, HIDDEN = 64, VOCABULARY = 50, LAYERS = 3, WINDOW = 5, TENSORS = 80, TOKENS = 24 };

typedef struct weights {
    char name[64];
    int rows, columns;
    double *data; /* as the file's quantisation leaves them */
} weights;

typedef enum scaling { NONE, LINEAR, YARN, FACTORS } scaling;

typedef struct spec {
    const char *arch;
    int head; /* width of a head */
    int quantised;
    int tied;
    scaling scaling;
    const char *omit, *misshape, *extra; /* for files that must be refused */
} spec;

typedef struct tiny {
    spec spec;
    gguf_build file;
    weights tensors[TENSORS];
    int count;
} tiny;

static uint32_t state;
static double uniform(void)
{
    state = state * 1664525u + 1013904223u;
    return (double)(state >> 8) / 8388608.0 - 1.0;
}

static int is(const spec *s, const char *arch) { return strcmp(s->arch, arch) == 0; }

static void add(tiny *t, const char *name, int rows, int columns, double centre, double spread)
{
    weights *w = &t->tensors[t->count++];
    snprintf(w->name, sizeof w->name, "%s", name);
    w->rows = rows;
    w->columns = columns;
    w->data = malloc(sizeof(double) * (size_t)(rows * columns));
    for (int i = 0; i < rows * columns; i++) {
        w->data[i] = (float)(centre + spread * uniform());
    }
}

static const double *get(const tiny *t, int layer, const char *part)
{
    char name[64];
    if (layer >= 0) {
        snprintf(name, sizeof name, "blk.%d.%s", layer, part);
    } else {
        snprintf(name, sizeof name, "%s", part);
    }
    for (int i = 0; i < t->count; i++) {
        if (strcmp(t->tensors[i].name, name) == 0) {
            return t->tensors[i].data;
        }
    }
    return NULL;
}

static void write_metadata(tiny *t)
{
    gguf_build *b = &t->file;
    const spec *s = &t->spec;
    char key[96];
    struct {
        const char *name;
        uint32_t value;
    } numbers[] = {{"block_count", LAYERS},
                   {"embedding_length", WIDTH},
                   {"context_length", 64},
                   {"feed_forward_length", HIDDEN},
                   {"attention.head_count", HEADS},
                   {"attention.head_count_kv", KV},
                   {"attention.key_length", (uint32_t)s->head},
                   {"attention.value_length", (uint32_t)s->head},
                   {"attention.sliding_window", WINDOW},
                   {"attention.sliding_window_pattern", 3},
                   {"rope.scaling.original_context_length", 16}};
    int entries = 0;
    gguf_build body = {0};
    put_text(&body, "general.architecture", s->arch);
    entries++;
#define KEY(part) (snprintf(key, sizeof key, "%s.%s", s->arch, part), key)
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        if (s->omit == NULL || strcmp(s->omit, numbers[i].name) != 0) {
            put_u32(&body, KEY(numbers[i].name), numbers[i].value);
            entries++;
        }
    }
    put_f32(&body, KEY("attention.layer_norm_rms_epsilon"), 1e-5f);
    put_f32(&body, KEY("rope.freq_base"), 100.0f);
    entries += 2;
    if (s->scaling == LINEAR || s->scaling == YARN) {
        put_text(&body, KEY("rope.scaling.type"), s->scaling == LINEAR ? "linear" : "yarn");
        put_f32(&body, KEY("rope.scaling.factor"), 4.0f);
        entries += 2;
    }
#undef KEY
    put_header(b, 3, (uint64_t)t->count, (uint64_t)entries);
    put(b, body.data, body.bytes);
    free(body.data);
}

/* Q8_0, and back into w->data. */
static void put_q8(gguf_build *b, weights *w)
{
    for (int i = 0; i < w->rows * w->columns; i += 32) {
        double top = 0;
        for (int j = 0; j < 32; j++) {
            top = fmax(top, fabs(w->data[i + j]));
        }
        uint16_t half = attn_f32_to_f16((float)(top / 127));
        double d = attn_f16_to_f32(half);
        put_uint(b, half, 2);
        for (int j = 0; j < 32; j++) {
            int q = (int)lrint(fmin(127, fmax(-127, w->data[i + j] / d)));
            put_uint(b, (uint64_t)(uint8_t)(int8_t)q, 1);
            w->data[i + j] = d * q;
        }
    }
}

static void make(tiny *t, spec s)
{
    static const char *const parts[] = {"attn_norm",   "ffn_norm", "attn_q", "attn_k",  "attn_v",
                                        "attn_output", "ffn_gate", "ffn_up", "ffn_down"};
    int q = HEADS * s.head, k = KV * s.head;
    int shapes[][2] = {{1, WIDTH}, {1, WIDTH},      {q, WIDTH},      {k, WIDTH},     {k, WIDTH},
                       {WIDTH, q}, {HIDDEN, WIDTH}, {HIDDEN, WIDTH}, {WIDTH, HIDDEN}};
    *t = (tiny){.spec = s};
    state = 4711;
    add(t, "token_embd.weight", VOCABULARY, WIDTH, 0, 1);
    add(t, "output_norm.weight", 1, WIDTH, 1, 0.3);
    if (!s.tied) {
        add(t, "output.weight", VOCABULARY, WIDTH, 0, 0.5);
    }
    if (s.scaling == FACTORS) {
        add(t, "rope_freqs.weight", 1, s.head / 2, 3, 2);
    }
    for (int l = 0; l < LAYERS; l++) {
        char name[64];
#define NAME(part) (snprintf(name, sizeof name, "blk.%d.%s", l, part), name)
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            char part[32];
            snprintf(part, sizeof part, "%s.weight", parts[i]);
            add(t, NAME(part), shapes[i][0], shapes[i][1], i < 2 ? 1 : 0, 0.3);
        }
        if (is(&s, "qwen2")) {
            add(t, NAME("attn_q.bias"), 1, q, 0, 0.5);
            add(t, NAME("attn_k.bias"), 1, k, 0, 0.5);
            add(t, NAME("attn_v.bias"), 1, k, 0, 0.5);
        }
        if (is(&s, "qwen3") || is(&s, "gemma3")) {
            add(t, NAME("attn_q_norm.weight"), 1, s.head, 1, 0.3);
            add(t, NAME("attn_k_norm.weight"), 1, s.head, 1, 0.3);
        }
        if (is(&s, "gemma3")) {
            add(t, NAME("post_attention_norm.weight"), 1, WIDTH, 1, 0.3);
            add(t, NAME("post_ffw_norm.weight"), 1, WIDTH, 1, 0.3);
        }
#undef NAME
    }
    if (s.extra != NULL) {
        add(t, s.extra, 1, WIDTH, 0, 1);
    }
    for (int i = 0; i < t->count && s.omit != NULL; i++) {
        if (strcmp(t->tensors[i].name, s.omit) == 0) {
            free(t->tensors[i].data);
            t->tensors[i] = t->tensors[--t->count];
        }
    }
    write_metadata(t);
    uint64_t offset = 0;
    for (int i = 0; i < t->count; i++) {
        weights *w = &t->tensors[i];
        int q8 = s.quantised && w->rows > 1, wrong = s.misshape != NULL && strcmp(s.misshape, w->name) == 0;
        uint64_t shape[2] = {(uint64_t)w->columns, (uint64_t)w->rows + (uint64_t)wrong};
        put_tensor(&t->file, w->name, q8 ? 8 : 0, w->rows > 1 ? 2 : 1, shape, offset);
        offset += (uint64_t)((w->rows + wrong) * w->columns) * (q8 ? 34 : 128) / 32 + 31;
        offset -= offset % 32;
    }
    put_padding(&t->file, 32);
    for (int i = 0; i < t->count; i++) {
        weights *w = &t->tensors[i];
        if (s.quantised && w->rows > 1) {
            put_q8(&t->file, w);
        } else {
            for (int j = 0; j < w->rows * w->columns; j++) {
                float x = (float)w->data[j];
                put(&t->file, &x, 4);
            }
        }
        for (int j = 0; s.misshape != NULL && strcmp(s.misshape, w->name) == 0 && j < w->columns; j++) {
            put_uint(&t->file, 0, 4);
        }
        put_padding(&t->file, 32);
    }
}

static void drop(tiny *t)
{
    for (int i = 0; i < t->count; i++) {
        free(t->tensors[i].data);
    }
    free(t->file.data);
}

/* ---- The plain implementation ---- */

static void norm(const double *x, const double *w, int n, double *out)
{
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += x[i] * x[i];
    }
    double factor = 1 / sqrt(sum / n + 1e-5);
    for (int i = 0; i < n; i++) {
        out[i] = x[i] * factor * w[i];
    }
}

static void linear(const double *w, const double *bias, const double *x, int rows, int columns, double *out)
{
    for (int r = 0; r < rows; r++) {
        out[r] = bias != NULL ? bias[r] : 0;
        for (int c = 0; c < columns; c++) {
            out[r] += w[r * columns + c] * x[c];
        }
    }
}

static void rotate(const tiny *t, double *x, int position, int sliding)
{
    const spec *s = &t->spec;
    int half = s->head / 2;
    double base = sliding ? 10000 : 100, magnitude = 1;
    const double *factors = get(t, -1, "rope_freqs.weight");
    for (int i = 0; i < half; i++) {
        double frequency = pow(base, -(double)i / half);
        if (!sliding && s->scaling == LINEAR) {
            frequency /= 4;
        } else if (!sliding && s->scaling == YARN) {
            /* The dimensions that turn 32 times and once within 16 tokens. */
            double low = floor(s->head * log(16 / (32 * 2 * M_PI)) / (2 * log(base)));
            double high = ceil(s->head * log(16 / (2 * M_PI)) / (2 * log(base)));
            low = low < 0 ? 0 : low;
            high = high > s->head - 1 ? s->head - 1 : high;
            double ramp = (i - low) / fmax(0.001, high - low);
            ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
            frequency = frequency / 4 * ramp + frequency * (1 - ramp);
            magnitude = 1 + 0.1 * log(4);
        } else if (!sliding && factors != NULL) {
            frequency /= factors[i];
        }
        int a = is(s, "llama") ? 2 * i : i, b = is(s, "llama") ? 2 * i + 1 : i + half;
        double c = magnitude * cos(position * frequency), n = magnitude * sin(position * frequency);
        double first = x[a] * c - x[b] * n, second = x[b] * c + x[a] * n;
        x[a] = first;
        x[b] = second;
    }
}

/* Logits [n][VOCABULARY] of n tokens. */
static void reference(const tiny *t, const int32_t *tokens, int n, double *logits)
{
    const spec *s = &t->spec;
    int head = s->head, q_width = HEADS * head, k_width = KV * head, gemma = is(s, "gemma3");
    double x[TOKENS][WIDTH], h[HIDDEN], up[HIDDEN], q[256], mixed[256],
        *k = malloc(sizeof(double) * (size_t)(n * k_width)), *v = malloc(sizeof(double) * (size_t)(n * k_width));
    for (int i = 0; i < n; i++) {
        for (int c = 0; c < WIDTH; c++) {
            x[i][c] = get(t, -1, "token_embd.weight")[tokens[i] * WIDTH + c] * (gemma ? sqrt(WIDTH) : 1);
        }
    }
    for (int l = 0; l < LAYERS; l++) {
        int sliding = gemma && (l + 1) % 3 != 0;
        for (int i = 0; i < n; i++) {
            norm(x[i], get(t, l, "attn_norm.weight"), WIDTH, h);
            linear(get(t, l, "attn_k.weight"), get(t, l, "attn_k.bias"), h, k_width, WIDTH, k + i * k_width);
            linear(get(t, l, "attn_v.weight"), get(t, l, "attn_v.bias"), h, k_width, WIDTH, v + i * k_width);
            linear(get(t, l, "attn_q.weight"), get(t, l, "attn_q.bias"), h, q_width, WIDTH, q);
            for (int g = 0; g < KV; g++) {
                double *row = k + i * k_width + g * head;
                if (get(t, l, "attn_k_norm.weight") != NULL) {
                    norm(row, get(t, l, "attn_k_norm.weight"), head, row);
                }
                rotate(t, row, i, sliding);
            }
            for (int g = 0; g < HEADS; g++) {
                double *row = q + g * head, scores[TOKENS], sum = 0;
                if (get(t, l, "attn_q_norm.weight") != NULL) {
                    norm(row, get(t, l, "attn_q_norm.weight"), head, row);
                }
                rotate(t, row, i, sliding);
                for (int d = 0; d < head; d++) {
                    mixed[g * head + d] = 0;
                }
                for (int j = sliding && i >= WINDOW ? i - WINDOW + 1 : 0; j <= i; j++) {
                    const double *key = k + j * k_width + g / (HEADS / KV) * head;
                    scores[j] = 0;
                    for (int d = 0; d < head; d++) {
                        scores[j] += row[d] * key[d] / sqrt(head);
                    }
                    scores[j] = exp(scores[j]);
                    sum += scores[j];
                    for (int d = 0; d < head; d++) {
                        mixed[g * head + d] += scores[j] * v[j * k_width + g / (HEADS / KV) * head + d];
                    }
                }
                for (int d = 0; d < head; d++) {
                    mixed[g * head + d] /= sum;
                }
            }
            linear(get(t, l, "attn_output.weight"), NULL, mixed, WIDTH, q_width, h);
            if (gemma) {
                norm(h, get(t, l, "post_attention_norm.weight"), WIDTH, h);
            }
            for (int c = 0; c < WIDTH; c++) {
                x[i][c] += h[c];
            }
            norm(x[i], get(t, l, "ffn_norm.weight"), WIDTH, mixed);
            linear(get(t, l, "ffn_gate.weight"), NULL, mixed, HIDDEN, WIDTH, h);
            linear(get(t, l, "ffn_up.weight"), NULL, mixed, HIDDEN, WIDTH, up);
            for (int c = 0; c < HIDDEN; c++) {
                h[c] = up[c] * (gemma ? 0.5 * h[c] * (1 + tanh(sqrt(2 / M_PI) * (h[c] + 0.044715 * h[c] * h[c] * h[c])))
                                      : h[c] / (1 + exp(-h[c])));
            }
            linear(get(t, l, "ffn_down.weight"), NULL, h, WIDTH, HIDDEN, mixed);
            if (gemma) {
                norm(mixed, get(t, l, "post_ffw_norm.weight"), WIDTH, mixed);
            }
            for (int c = 0; c < WIDTH; c++) {
                x[i][c] += mixed[c];
            }
        }
    }
    const double *output = get(t, -1, "output.weight");
    for (int i = 0; i < n; i++) {
        norm(x[i], get(t, -1, "output_norm.weight"), WIDTH, h);
        linear(output != NULL ? output : get(t, -1, "token_embd.weight"), NULL, h, VOCABULARY, WIDTH,
               logits + i * VOCABULARY);
    }
    free(k);
    free(v);
}

/* ---- Tests ---- */

static const int32_t *test_tokens(void)
{
    static int32_t tokens[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        tokens[i] = (i * 17 + 3) % VOCABULARY;
    }
    return tokens;
}

static attn_model *open_model(const tiny *t)
{
    attn_model *model;
    if (attn_model_open_memory(&model, t->file.data, t->file.bytes, NULL) != ATTN_OK) {
        fail_msg("%s: %s", t->spec.arch, attn_last_error());
    }
    return model;
}

static attn_context *make_context(const attn_model *model, attn_context_settings settings)
{
    attn_context *context;
    if (attn_context_create(&context, model, &settings) != ATTN_OK) {
        fail_msg("%s", attn_last_error());
    }
    return context;
}

static int keep_logits(void *user, int item, int64_t token, const float *logits)
{
    (void)item;
    memcpy((float *)user + token * VOCABULARY, logits, VOCABULARY * sizeof(float));
    return 0;
}

static void eval(attn_context *context, int sequence, const int32_t *tokens, int64_t count, float *all)
{
    attn_context_batch batch = {sequence, tokens, count};
    if (attn_context_eval(context, &batch, 1, all != NULL ? keep_logits : NULL, all) != ATTN_OK) {
        fail_msg("%s", attn_last_error());
    }
}

static void compare(const char *what, const float *got, const double *expected, double limit)
{
    for (int i = 0; i < TOKENS * VOCABULARY; i++) {
        if (!(fabs(got[i] - expected[i]) <= limit * (1 + fabs(expected[i])))) {
            fail_msg("%s: token %d, logit %d: %g, expected %g", what, i / VOCABULARY, i % VOCABULARY, got[i],
                     expected[i]);
        }
    }
}

static const spec specs[] = {
    {.arch = "llama", .head = 8},
    {.arch = "llama", .head = 16, .quantised = 1, .tied = 1},
    {.arch = "llama", .head = 8, .scaling = LINEAR},
    {.arch = "llama", .head = 16, .scaling = YARN},
    {.arch = "llama", .head = 8, .scaling = FACTORS, .tied = 1},
    {.arch = "qwen2", .head = 8, .quantised = 1},
    {.arch = "qwen3", .head = 16, .tied = 1},
    {.arch = "gemma3", .head = 16, .tied = 1},
    {.arch = "gemma3", .head = 8, .quantised = 1, .tied = 1, .scaling = LINEAR},
};
#define SPECS (sizeof specs / sizeof specs[0])

static void architectures_match_here(void)
{
    static float got[TOKENS * VOCABULARY];
    static double expected[TOKENS * VOCABULARY];
    for (size_t i = 0; i < SPECS; i++) {
        tiny t;
        make(&t, specs[i]);
        reference(&t, test_tokens(), TOKENS, expected);
        attn_model *model = open_model(&t);
        /* Whole, in pieces, and token by token. */
        for (int64_t chunk = 1; chunk <= 64; chunk *= 8) {
            attn_context *context = make_context(model, (attn_context_settings){.chunk = chunk, .threads = 2});
            eval(context, 0, test_tokens(), TOKENS, got);
            compare(specs[i].arch, got, expected, specs[i].quantised ? 5e-3 : 1e-4);
            attn_context_destroy(context);
        }
        attn_model_close(model);
        drop(&t);
    }
}

static void architectures_match(void **unused)
{
    (void)unused;
    attn_isa best = attn_isa_current();
    for (int isa = ATTN_ISA_LEVEL_SCALAR; isa <= (int)best; isa++) {
        if (attn_isa_available((attn_isa)isa)) {
            attn_isa_force((attn_isa)isa);
            architectures_match_here();
        }
    }
    attn_isa_force(best);
}

static void caches_match(void **unused)
{
    (void)unused;
    static float got[TOKENS * VOCABULARY];
    static double expected[TOKENS * VOCABULARY];
    static const struct {
        attn_dtype type;
        double limit;
    } caches[] = {{ATTN_F32, 1e-4}, {ATTN_F16, 2e-2}, {ATTN_BF16, 0.2}, {ATTN_I8, 0.3}};
    for (size_t i = 0; i < 4; i++) {
        tiny t;
        make(&t, specs[7]);
        reference(&t, test_tokens(), TOKENS, expected);
        attn_model *model = open_model(&t);
        attn_context *context = make_context(model, (attn_context_settings){.cache = caches[i].type, .chunk = 7});
        eval(context, 0, test_tokens(), TOKENS, got);
        compare(attn_dtype_name(caches[i].type), got, expected, caches[i].limit);
        attn_context_stats stats = attn_context_get_stats(context);
        assert_int_equal(stats.tokens, TOKENS);
        assert_true(stats.cache_bytes > 0 && stats.cache_peak_bytes == stats.cache_bytes && stats.attention_flops > 0);
        attn_context_destroy(context);
        attn_model_close(model);
        drop(&t);
    }
}

/* The same bits for any number of threads, in a batch or alone. */
static void threads_and_batches_agree(void **unused)
{
    (void)unused;
    static float one[TOKENS * VOCABULARY], other[TOKENS * VOCABULARY];
    tiny t;
    make(&t, specs[8]);
    attn_model *model = open_model(&t);
    const int32_t *tokens = test_tokens();
    for (int threads = 1; threads <= 5; threads += 2) {
        attn_context *context = make_context(model, (attn_context_settings){.threads = threads, .sequences = 3});
        eval(context, 1, tokens, TOKENS, threads == 1 ? one : other);
        if (threads > 1) {
            assert_memory_equal(one, other, sizeof one);
        }
        /* Two sequences at once, prompts and then single tokens. */
        assert_int_equal(attn_context_truncate(context, 1, 0), ATTN_OK);
        attn_context_batch batch[] = {{0, tokens, 10}, {2, tokens, 15}};
        assert_int_equal(attn_context_eval(context, batch, 2, NULL, NULL), ATTN_OK);
        for (int i = 0; i < 2; i++) {
            const float *last = one + (batch[i].count - 1) * VOCABULARY;
            for (int v = 0; v < VOCABULARY; v++) {
                assert_true(fabsf(attn_context_logits(context, i)[v] - last[v]) < 1e-3f);
            }
        }
        batch[0] = (attn_context_batch){2, tokens + 15, 1};
        batch[1] = (attn_context_batch){0, tokens + 10, 1};
        assert_int_equal(attn_context_eval(context, batch, 2, NULL, NULL), ATTN_OK);
        for (int v = 0; v < VOCABULARY; v++) {
            assert_true(fabsf(attn_context_logits(context, 0)[v] - one[15 * VOCABULARY + v]) < 1e-3f);
            assert_true(fabsf(attn_context_logits(context, 1)[v] - one[10 * VOCABULARY + v]) < 1e-3f);
        }
        assert_null(attn_context_logits(context, 2));
        assert_int_equal(attn_context_length(context, 2), 16);
        attn_context_destroy(context);
    }
    attn_model_close(model);
    drop(&t);
}

static void sequences_cut_and_copy(void **unused)
{
    (void)unused;
    static float one[TOKENS * VOCABULARY], other[TOKENS * VOCABULARY];
    const int32_t *tokens = test_tokens();
    tiny t;
    make(&t, specs[0]);
    attn_model *model = open_model(&t);
    attn_context *context = make_context(model, (attn_context_settings){.sequences = 2, .cache = ATTN_I8});
    eval(context, 0, tokens, TOKENS, one);
    assert_int_equal(attn_context_truncate(context, 0, 12), ATTN_OK);
    assert_int_equal(attn_context_copy(context, 1, 0), ATTN_OK);
    for (int s = 0; s < 2; s++) {
        eval(context, s, tokens + 12, TOKENS - 12, other);
        for (int i = 0; i < (TOKENS - 12) * VOCABULARY; i++) {
            assert_true(fabsf(other[i] - one[12 * VOCABULARY + i]) < 1e-3f);
        }
    }
    assert_int_equal(attn_context_truncate(context, 0, 99), ATTN_ERR_ARGUMENT);
    assert_int_equal(attn_context_truncate(context, 2, 0), ATTN_ERR_ARGUMENT);
    assert_int_equal(attn_context_length(context, 2), -1);
    attn_context_destroy(context);
    attn_model_close(model);
    drop(&t);
    /* Sliding windows: what has slid out cannot come back. */
    make(&t, specs[7]);
    model = open_model(&t);
    context = make_context(model, (attn_context_settings){.length = 2000});
    for (int i = 0; i < 40; i++) {
        eval(context, 0, tokens, TOKENS, NULL);
    }
    assert_int_equal(attn_context_truncate(context, 0, 40 * TOKENS - 2), ATTN_OK);
    assert_int_equal(attn_context_truncate(context, 0, 100), ATTN_ERR_ARGUMENT);
    assert_non_null(strstr(attn_last_error(), "window"));
    assert_int_equal(attn_context_length(context, 0), 40 * TOKENS - 2);
    assert_int_equal(attn_context_truncate(context, 0, 0), ATTN_OK);
    attn_context_destroy(context);
    attn_model_close(model);
    drop(&t);
}

/* A mechanism that computes the key heads one at a time and counts calls, and a policy that keeps the even keys of
 * head 0. */
typedef struct plugged {
    int prefills, decodes, updates, evict;
} plugged;

static attn_status head_by_head(const attn_llm_call *call)
{
    for (int64_t g = KV - 1; g >= 0; g--) {
        ATTN_TRY(attn_llm_exact(call, g, g + 1));
    }
    return ATTN_OK;
}

static attn_status on_prefill(void *user, const attn_llm_call *call)
{
    ((plugged *)user)->prefills++;
    return head_by_head(call);
}

static attn_status on_decode(void *user, const attn_llm_call *call)
{
    plugged *p = user;
    p->decodes++;
    if (p->evict) {
        /* Half of the keys of head 0 are gone, and the positions tell which are left. */
        assert_non_null(call->key_positions);
        assert_true(call->key_counts[0] < call->key_counts[1]);
        assert_int_equal(call->key_positions[0][1], 2);
        assert_int_equal(call->key_positions[0][call->key_counts[0] - 1], call->position);
        assert_int_equal(call->k.shape[1], call->key_counts[1]);
    }
    return head_by_head(call);
}

static attn_status on_update(void *user, attn_context *context, int sequence, int layer)
{
    plugged *p = user;
    p->updates++;
    if (p->evict && p->updates == 1) {
        int64_t count = attn_context_keys(context, sequence, layer, 0), kept[TOKENS], n = 0;
        for (int64_t i = 0; i < count; i += 2) {
            kept[n++] = i;
        }
        return attn_context_keep(context, sequence, layer, 0, kept, n);
    }
    return ATTN_OK;
}

static void mechanisms_plug_in(void **unused)
{
    (void)unused;
    static float one[TOKENS * VOCABULARY], other[TOKENS * VOCABULARY];
    const int32_t *tokens = test_tokens();
    tiny t;
    make(&t, specs[0]);
    attn_model *model = open_model(&t);
    for (int evict = 0; evict < 2; evict++) {
        attn_context *context = make_context(model, (attn_context_settings){.sequences = 2});
        eval(context, 0, tokens, TOKENS, one);
        plugged p = {.evict = evict};
        attn_llm_attention mechanism = {.prefill = on_prefill, .decode = on_decode, .update = on_update, .user = &p};
        assert_int_equal(attn_context_set_attention(context, 1, &mechanism), ATTN_OK);
        assert_int_equal(attn_context_set_attention(context, LAYERS, &mechanism), ATTN_ERR_ARGUMENT);
        eval(context, 1, tokens, TOKENS - 2, other);
        eval(context, 1, tokens + TOKENS - 2, 1, other + (TOKENS - 2) * VOCABULARY);
        eval(context, 1, tokens + TOKENS - 1, 1, other + (TOKENS - 1) * VOCABULARY);
        assert_int_equal(p.prefills, 1);
        assert_int_equal(p.decodes, 2);
        assert_int_equal(p.updates, 3);
        double most = 0;
        for (int i = 0; i < TOKENS * VOCABULARY; i++) {
            most = fmax(most, fabs(one[i] - other[i]));
        }
        assert_true(evict ? most > 1e-3 : most < 1e-3);
        assert_int_equal(attn_context_keys(context, 1, 1, 0), evict ? TOKENS / 2 - 1 + 2 : TOKENS);
        assert_int_equal(attn_context_keys(context, 1, 0, 0), TOKENS);
        if (evict) {
            static const int64_t bad[] = {1, 1};
            assert_int_equal(attn_context_keep(context, 1, 1, 0, bad, 2), ATTN_ERR_ARGUMENT);
            assert_int_equal(attn_context_truncate(context, 1, 5), ATTN_ERR_ARGUMENT);
            assert_int_equal(attn_context_copy(context, 0, 1), ATTN_OK);
            assert_int_equal(attn_context_keys(context, 0, 1, 0), TOKENS / 2 + 1);
            assert_int_equal(attn_context_truncate(context, 1, 0), ATTN_OK);
            assert_int_equal(attn_context_keys(context, 1, 1, 0), 0);
        }
        attn_context_destroy(context);
    }
    attn_model_close(model);
    drop(&t);
}

static int stop_later(void *user, double done)
{
    assert_true(done >= 0 && done <= 1);
    return --*(int *)user < 0;
}

/* A layer that reads spans, among others that read chunks, in two sequences at once. */
static void spans_change_nothing(void **unused)
{
    (void)unused;
    enum { LONG = 300, BEFORE = 3 };
    static float one[LONG * VOCABULARY], other[LONG * VOCABULARY];
    static int32_t tokens[LONG];
    for (int i = 0; i < LONG; i++) {
        tokens[i] = (i * 31 + i / 7) % VOCABULARY;
    }
    for (int gemma = 0; gemma < 2; gemma++) {
        tiny t;
        make(&t, specs[gemma ? 7 : 0]);
        attn_model *model = open_model(&t);
        int left = 1000000;
        attn_context *context = make_context(model, (attn_context_settings){.length = 2000, .sequences = 2, .chunk = 8,
                                                                            .progress = stop_later, .user = &left});
        eval(context, 0, tokens, LONG, one);
        assert_int_equal(attn_context_truncate(context, 0, 0), ATTN_OK);
        plugged p = {0};
        attn_llm_attention mechanism = {.prefill = on_prefill, .user = &p, .span = 100};
        assert_int_equal(attn_context_set_attention(context, LAYERS - 1, &mechanism), ATTN_OK);
        /* Sequence 1 comes first, so that the spans of sequence 0 start anywhere. */
        eval(context, 0, tokens, BEFORE, other);
        attn_context_batch batch[] = {{1, tokens, 37}, {0, tokens + BEFORE, LONG - BEFORE - 100}};
        assert_int_equal(attn_context_eval(context, batch, 2, NULL, NULL), ATTN_OK);
        assert_int_equal(p.prefills, 1 + 4); /* 100 + 100 + 34 rows, the first ones of two sequences */
        for (int v = 0; v < VOCABULARY; v++) {
            assert_true(fabsf(attn_context_logits(context, 0)[v] - one[36 * VOCABULARY + v]) < 1e-3f);
            assert_true(fabsf(attn_context_logits(context, 1)[v] - one[199 * VOCABULARY + v]) < 1e-3f);
        }
        eval(context, 0, tokens + LONG - 100, 100, other);
        for (int i = 0; i < 100 * VOCABULARY; i++) {
            if (!(fabsf(other[i] - one[(LONG - 100) * VOCABULARY + i]) < 1e-3f)) {
                fail_msg("%s: token %d, logit %d: %g, by chunks %g", specs[gemma ? 7 : 0].arch, 200 + i / VOCABULARY, i % VOCABULARY,
                         (double)other[i], (double)one[(LONG - 100) * VOCABULARY + i]);
            }
        }
        /* Cancelled when two layers have read a span: back to before it, or to nothing where windows have slid on. */
        mechanism.span = 300;
        assert_int_equal(attn_context_set_attention(context, LAYERS - 1, &mechanism), ATTN_OK);
        left = LAYERS - 1;
        attn_context_batch again = {1, tokens, 290};
        assert_int_equal(attn_context_eval(context, &again, 1, NULL, NULL), ATTN_ERR_CANCELLED);
        assert_int_equal(attn_context_length(context, 1), gemma ? 0 : 37);
        for (int l = 0; l < LAYERS; l++) {
            assert_int_equal(attn_context_keys(context, 1, l, 0), gemma ? 0 : 37);
        }
        left = 1000000;
        eval(context, 1, tokens + (gemma ? 0 : 37), 38, other);
        int first = gemma ? 0 : 37;
        for (int i = 0; i < 38 * VOCABULARY; i++) {
            assert_true(fabsf(other[i] - one[first * VOCABULARY + i]) < 1e-3f);
        }
        mechanism.span = -1;
        assert_int_equal(attn_context_set_attention(context, -1, &mechanism), ATTN_ERR_ARGUMENT);
        attn_context_destroy(context);
        attn_model_close(model);
        drop(&t);
    }
}

/* When only the last logits are wanted, the last layer does without the other tokens' queries. */
static void last_tokens_alone(void **unused)
{
    (void)unused;
    static float one[TOKENS * VOCABULARY];
    for (int i = 0; i < 8; i++) {
        int gemma = i & 1, watched = i & 2, bytes = i & 4;
        tiny t;
        make(&t, specs[gemma ? 7 : 0]);
        attn_model *model = open_model(&t);
        attn_context *context = make_context(
            model, (attn_context_settings){.sequences = 4, .chunk = 8, .threads = 2, .cache = bytes ? ATTN_I8 : ATTN_F32});
        eval(context, 3, test_tokens(), TOKENS, one);
        plugged p = {0};
        attn_llm_attention mechanism = {.prefill = watched ? on_prefill : NULL, .decode = on_decode, .user = &p};
        assert_int_equal(attn_context_set_attention(context, LAYERS - 1, &mechanism), ATTN_OK);
        eval(context, 1, test_tokens(), 5, NULL);
        attn_context_batch batch[] = {{0, test_tokens(), 21}, {1, test_tokens() + 5, 1}, {2, test_tokens(), 18}};
        assert_int_equal(attn_context_eval(context, batch, 3, NULL, NULL), ATTN_OK);
        assert_int_equal(p.decodes, 1);
        static const int last[3] = {20, 5, 17};
        for (int j = 0; j < 3 * VOCABULARY; j++) {
            float got = attn_context_logits(context, j / VOCABULARY)[j % VOCABULARY];
            float expected = one[last[j / VOCABULARY] * VOCABULARY + j % VOCABULARY];
            if (!(fabsf(got - expected) < (bytes ? 0.05f : 1e-4f))) {
                fail_msg("%s, i = %d: item %d, logit %d: %g, with all logits %g", t.spec.arch, i, j / VOCABULARY, j % VOCABULARY,
                         (double)got, (double)expected);
            }
        }
        /* What the caches hold serves what follows. */
        attn_context_batch next = {2, test_tokens() + 18, 1};
        assert_int_equal(attn_context_eval(context, &next, 1, NULL, NULL), ATTN_OK);
        for (int v = 0; v < VOCABULARY; v++) {
            assert_true(fabsf(attn_context_logits(context, 0)[v] - one[18 * VOCABULARY + v]) < (bytes ? 0.05f : 1e-4f));
        }
        attn_context_destroy(context);
        attn_model_close(model);
        drop(&t);
    }
}

static void evaluation_is_checked(void **unused)
{
    (void)unused;
    tiny t;
    make(&t, specs[0]);
    attn_model *model;
    int left = 2;
    attn_model_settings opening = {.progress = stop_later, .user = &left};
    assert_int_equal(attn_model_open_memory(&model, t.file.data, t.file.bytes, &opening), ATTN_ERR_CANCELLED);
    model = open_model(&t);
    left = LAYERS + 1; /* the second chunk does not get through */
    attn_context *context =
        make_context(model, (attn_context_settings){.chunk = 8, .progress = stop_later, .user = &left});
    attn_context_batch batch[] = {{0, test_tokens(), TOKENS}, {0, test_tokens(), 1}};
    assert_int_equal(attn_context_eval(context, batch, 1, NULL, NULL), ATTN_ERR_CANCELLED);
    assert_int_equal(attn_context_length(context, 0), 8);
    assert_int_equal(attn_context_keys(context, 0, 0, 0), 8);
    left = 1000;
    assert_int_equal(attn_context_eval(context, batch, 2, NULL, NULL), ATTN_ERR_ARGUMENT); /* one sequence twice */
    batch[0].sequence = 1;
    assert_int_equal(attn_context_eval(context, batch, 1, NULL, NULL), ATTN_ERR_ARGUMENT);
    static const int32_t bad[] = {VOCABULARY, -1};
    for (int i = 0; i < 2; i++) {
        batch[0] = (attn_context_batch){0, bad + i, 1};
        assert_int_equal(attn_context_eval(context, batch, 1, NULL, NULL), ATTN_ERR_ARGUMENT);
    }
    batch[0] = (attn_context_batch){0, test_tokens(), 57}; /* 8 + 57 > 64 */
    assert_int_equal(attn_context_eval(context, batch, 1, NULL, NULL), ATTN_ERR_ARGUMENT);
    assert_non_null(strstr(attn_last_error(), "57"));
    attn_context_destroy(context);
    attn_context_settings wrong[] = {
        {.length = -1}, {.sequences = -1}, {.chunk = -1}, {.threads = -1}, {.cache = ATTN_I64}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        assert_int_not_equal(attn_context_create(&context, model, &wrong[i]), ATTN_OK);
        assert_null(context);
    }
    attn_model_close(model);
    drop(&t);
}

static void bad_files_are_refused(void **unused)
{
    (void)unused;
    static const struct {
        spec spec;
        attn_status status;
        const char *part;
    } cases[] = {
        {{.arch = "mamba", .head = 8}, ATTN_ERR_UNSUPPORTED, "mamba"},
        {{.arch = "llama", .head = 8, .omit = "block_count"}, ATTN_ERR_FORMAT, "llama.block_count"},
        {{.arch = "llama", .head = 8, .omit = "attention.head_count"}, ATTN_ERR_FORMAT, "llama.attention.head_count"},
        {{.arch = "llama", .head = 8, .omit = "blk.1.ffn_up.weight"}, ATTN_ERR_FORMAT, "blk.1.ffn_up.weight"},
        {{.arch = "llama", .head = 8, .omit = "token_embd.weight"}, ATTN_ERR_FORMAT, "token_embd.weight"},
        {{.arch = "qwen3", .head = 8, .omit = "blk.2.attn_k_norm.weight"}, ATTN_ERR_FORMAT, "blk.2.attn_k_norm.weight"},
        {{.arch = "llama", .head = 8, .misshape = "blk.0.attn_v.weight"}, ATTN_ERR_FORMAT, "blk.0.attn_v.weight"},
        {{.arch = "llama", .head = 8, .misshape = "output.weight"}, ATTN_ERR_FORMAT, "output.weight"},
        {{.arch = "llama", .head = 8, .extra = "blk.0.ffn_gate_inp.weight"}, ATTN_ERR_UNSUPPORTED, "ffn_gate_inp"},
        {{.arch = "llama", .head = 8, .extra = "blk.9.attn_norm.weight"}, ATTN_ERR_UNSUPPORTED, "tensors"},
        {{.arch = "llama", .head = 7}, ATTN_ERR_FORMAT, "rope"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tiny t;
        attn_model *model;
        make(&t, cases[i].spec);
        attn_status status = attn_model_open_memory(&model, t.file.data, t.file.bytes, NULL);
        if (status != cases[i].status || strstr(attn_last_error(), cases[i].part) == NULL) {
            fail_msg("case %zu: %s (%s), expected %s with '%s'", i, attn_status_name(status), attn_last_error(),
                     attn_status_name(cases[i].status), cases[i].part);
        }
        assert_null(model);
        drop(&t);
    }
}

/* Changed bytes of the header give a status or a model that computes something, never a crash. */
static void survives_damage(void **unused)
{
    (void)unused;
    tiny t;
    make(&t, specs[8]);
    for (size_t i = 24; i < 1600; i++) {
        t.file.data[i] ^= (unsigned char)(1 << i % 8);
        attn_model *model;
        attn_context *context;
        if (attn_model_open_memory(&model, t.file.data, t.file.bytes, NULL) == ATTN_OK) {
            attn_context_settings settings = {.length = 8, .threads = 1};
            if (attn_context_create(&context, model, &settings) == ATTN_OK) {
                attn_context_batch batch = {0, test_tokens(), 3};
                attn_context_eval(context, &batch, 1, NULL, NULL);
                attn_context_destroy(context);
            }
            attn_model_close(model);
        }
        t.file.data[i] ^= (unsigned char)(1 << i % 8);
    }
    drop(&t);
}

/* ---- Failing allocations ---- */

static int allocations_left;

static void *failing_alloc(void *user, size_t bytes)
{
    (void)user;
    return allocations_left-- > 0 ? malloc(bytes) : NULL;
}

static void plain_free(void *user, void *memory)
{
    (void)user;
    free(memory);
}

static attn_status open_and_evaluate(const tiny *t)
{
    attn_model *model;
    attn_context *context = NULL;
    ATTN_TRY(attn_model_open_memory(&model, t->file.data, t->file.bytes, NULL));
    attn_context_settings settings = {.length = 32, .sequences = 2, .threads = 1, .cache = ATTN_I8};
    attn_status status = attn_context_create(&context, model, &settings);
    static const int64_t kept[] = {0, 2};
    attn_context_batch batch = {0, test_tokens(), 6};
    if (status == ATTN_OK) {
        status = attn_context_eval(context, &batch, 1, NULL, NULL);
    }
    if (status == ATTN_OK) {
        status = attn_context_keep(context, 0, 2, 0, kept, 2);
    }
    if (status == ATTN_OK) {
        status = attn_context_copy(context, 1, 0);
    }
    attn_context_destroy(context);
    attn_model_close(model);
    return status;
}

static void allocations_may_fail(void **unused)
{
    (void)unused;
    static const attn_allocator failing = {failing_alloc, plain_free, NULL};
    for (size_t i = 0; i < SPECS; i += SPECS - 1) {
        tiny t;
        make(&t, specs[i]);
        int count = 0;
        for (attn_status status = ATTN_ERR_MEMORY; status != ATTN_OK; count++) {
            attn_set_allocator(&failing);
            allocations_left = count;
            status = open_and_evaluate(&t);
            attn_set_allocator(NULL);
            if (status != ATTN_OK && status != ATTN_ERR_MEMORY) {
                fail_msg("allocation %d: %s", count, attn_last_error());
            }
            assert_true(count < 10000);
        }
        assert_true(count > 50);
        drop(&t);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(architectures_match),    cmocka_unit_test(caches_match),
        cmocka_unit_test(threads_and_batches_agree), cmocka_unit_test(sequences_cut_and_copy),
        cmocka_unit_test(mechanisms_plug_in),     cmocka_unit_test(spans_change_nothing),
        cmocka_unit_test(last_tokens_alone),      cmocka_unit_test(evaluation_is_checked),
        cmocka_unit_test(bad_files_are_refused),  cmocka_unit_test(survives_damage),
        cmocka_unit_test(allocations_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
