/* Retrieval heads (arXiv:2404.15574): which heads of a model copy from the context while it answers, and what the answers lose without
 * them. Sentences are hidden in a text; a head scores when its strongest key is the very token that the model produces. */
#include "session.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char help[] =
    "Usage: attn heads MODEL.gguf HAYSTACK.txt [OPTION]...\n\n"
    "Find the retrieval heads of a model: those whose strongest attention, while the model repeats a sentence hidden in a long\n"
    "text, lies on the token that it produces. Then mask the best ones while generating, and as many random others: when the\n"
    "best ones carry recall, only their loss destroys it (arXiv:2404.15574).\n\n"
    "  --lengths N,N...         tokens of text (default: 500,1000,2000)\n"
    "  --depths P,P...          percent (default: 0,25,50,75,100)\n"
    "  --threshold X            a mean score above this makes a retrieval head (default: 0.1)\n"
    "  --mask N,N...            how many of the best heads to mask, in turn (default: 5,10,20; 0: no masking)\n"
    "  --controls N             random draws for each of these, retrieval heads excluded (default: 3)\n"
    "  --mode uniform|zero      a masked head gives the mean of the visible values (default), or nothing\n"
    "  --json FILE              scores of all heads and all results\n"
    "  --seed N                 for the random draws (default: 1)\n"
    SESSION_MODEL_HELP
    "\nExamples:\n"
    "  attn heads model.gguf book.txt\n"
    "  attn heads model.gguf book.txt --lengths 4000,8000 --mask 10 --json heads.json\n";

/* The question goes on with the beginning of the answer, so that models that only continue text can be tested; what is left of the
 * sentence is what has to be copied. */
typedef struct hidden {
    const char *begin, *rest, *question;
} hidden;

static const hidden sentences[] = {
    {"The best way to spend a rainy day in Lisbon", " is to ride the old yellow tram up the hill and drink hot chocolate beside the castle wall.",
     "What is the best way to spend a rainy day in Lisbon?"},
    {"The recipe of the lighthouse keeper", " asks for two cups of barley, a handful of dried plums and one spoon of black honey.",
     "What does the recipe of the lighthouse keeper ask for?"},
    {"Before she left, Captain Ferris", " hid the silver key under the third stone of the fountain in the market square.",
     "What did Captain Ferris do before she left?"},
};

enum { MOST = 16, SENTENCES = sizeof sentences / sizeof sentences[0], STEPS = 40, MOST_CONTROLS = 20 };

typedef struct heads_options {
    session_options session;
    long lengths[MOST], depths[MOST], mask[MOST], controls, seed;
    int length_count, depth_count, mask_count;
    double threshold;
    attn_heads_mask_mode mode;
    const char *json;
} heads_options;

/* One needle test: the prompt, where the part to be copied lies in it, and that part. */
typedef struct test {
    long length, depth;
    int sentence;
    int32_t *prompt, *rest;
    int64_t count, rest_count, begin;
    double recall;
    uint8_t success;
} test;

typedef struct experiment {
    session s;
    const heads_options *o;
    attn_heads *heads;
    int64_t layers, per_layer, total; /* heads */
    test tests[MOST * MOST * SENTENCES];
    int test_count, successes;
    float *scores;   /* [tests][total] */
    float *mean, *freq;
    int64_t *order;
    uint8_t *retrieval;
    double masked[MOST], random[MOST][MOST_CONTROLS]; /* recall, relative to all that succeeded without masks */
} experiment;

static int parse_numbers(const char *option, char *text, long min, long max, long values[MOST], int *count)
{
    *count = 0;
    for (char *item = strtok(text, ","); item != NULL; item = strtok(NULL, ",")) {
        if (*count == MOST) {
            cli_usage_error("heads", "%s takes at most %d numbers", option, MOST);
            return 0;
        }
        if (!cli_parse_int("heads", option, item, min, max, &values[*count])) {
            return 0;
        }
        ++*count;
    }
    return *count > 0;
}

/* ---- The operators of the paper, through the generic interface ---- */

static attn_tensor ints(int64_t *data, int64_t count) { return attn_tensor_make(data, ATTN_I64, 1, &count); }

static int64_t *widen(const int32_t *tokens, int64_t count)
{
    int64_t *wide = malloc((size_t)(count > 0 ? count : 1) * sizeof *wide);
    for (int64_t i = 0; i < count && wide != NULL; i++) {
        wide[i] = tokens[i];
    }
    return wide;
}

static attn_status run_op(const char *name, const char *params, const attn_named_tensor *in, int in_count, const attn_named_tensor *out,
                          int out_count)
{
    attn_op *op;
    attn_status status = attn_op_create_json(&op, name, params);
    if (status == ATTN_OK) {
        status = attn_op_forward(op, in, in_count, out, out_count, NULL);
        attn_op_destroy(op);
    }
    return status;
}

static attn_status recall_of(const int32_t *reference, int64_t n, const int32_t *response, int64_t m, double *recall, uint8_t *success)
{
    int64_t *a = widen(reference, n), *b = widen(response, m), one = 1;
    float value = 0;
    attn_named_tensor in[] = {{"reference", ints(a, n)}, {"response", ints(b, m)}};
    attn_named_tensor out[] = {{"recall", attn_tensor_make(&value, ATTN_F32, 1, &one)},
                               {"success", attn_tensor_make(success, ATTN_BOOL, 1, &one)}};
    attn_status status = run_op("retrieval_head.recall", NULL, in, 2, out, 2);
    *recall = (double)value;
    free(a);
    free(b);
    return status;
}

/* ---- Tests ---- */

static int ends_sentence(const session *s, int32_t token)
{
    size_t bytes;
    const char *text = attn_token_text(s->tokenizer, token, 0, &bytes);
    return bytes > 0 && strchr(".!?", text[bytes - 1]) != NULL;
}

/* The parameters of retrieval_head.insert, with the tokens of the haystack that end a sentence. */
static char *insert_params(const experiment *e, const int32_t *hay, long length, long depth, int64_t needle)
{
    cli_text text = {NULL, 0};
    cli_text_add(&text, "{\"depth\": %ld, \"context_length\": %lld, \"buffer\": 0, \"stops\": [", depth, (long long)(length + needle));
    size_t vocabulary = (size_t)attn_tokenizer_count(e->s.tokenizer);
    uint8_t *seen = calloc(vocabulary, 1);
    int any = 0;
    for (long i = 0; i < length && seen != NULL; i++) {
        if (hay[i] >= 0 && (size_t)hay[i] < vocabulary && !seen[hay[i]]) {
            seen[hay[i]] = 1;
            if (ends_sentence(&e->s, hay[i])) {
                cli_text_add(&text, "%s%d", any ? ", " : "", hay[i]);
                any = 1;
            }
        }
    }
    free(seen);
    cli_text_add(&text, "]}");
    return text.data;
}

static attn_status tokenize(const experiment *e, const char *text, int32_t **tokens, int64_t *count)
{
    return attn_tokenize(e->s.tokenizer, text, strlen(text), 0, tokens, count);
}

/* What the model puts before and after every text is put before here; the text goes on, so nothing comes after. */
static attn_status make_test(const experiment *e, const int32_t *hay, test *t)
{
    const hidden *h = &sentences[t->sentence];
    cli_text ask = {NULL, 0}, begin = {NULL, 0};
    cli_text_add(&ask, "\n\nQuestion: %s\nAnswer: %s", h->question, h->begin);
    cli_text_add(&begin, " %s", h->begin);
    int32_t *head = NULL, *question = NULL, bos = attn_tokenizer_bos(e->s.tokenizer), *probe = NULL;
    int64_t head_count = 0, question_count = 0, probe_count = 0, position = 0, one = 1;
    attn_status status = tokenize(e, begin.data, &head, &head_count);
    if (status == ATTN_OK) {
        status = tokenize(e, h->rest, &t->rest, &t->rest_count);
    }
    if (status == ATTN_OK) {
        status = tokenize(e, ask.data, &question, &question_count);
    }
    if (status == ATTN_OK) {
        status = attn_tokenize(e->s.tokenizer, "a", 1, ATTN_TOKENIZE_SPECIAL, &probe, &probe_count);
    }
    if (status == ATTN_OK) {
        int64_t first = probe_count > 0 && bos >= 0 && probe[0] == bos, needle_count = head_count + t->rest_count;
        int64_t *context = widen(hay, t->length), *needle = malloc((size_t)needle_count * sizeof *needle);
        int64_t total = t->length + needle_count, *tokens = malloc((size_t)total * sizeof *tokens);
        t->prompt = malloc((size_t)(first + total + question_count + STEPS) * sizeof *t->prompt);
        for (int64_t i = 0; i < needle_count; i++) {
            needle[i] = i < head_count ? head[i] : t->rest[i - head_count];
        }
        char *params = insert_params(e, hay, t->length, t->depth, needle_count);
        attn_named_tensor in[] = {{"context", ints(context, t->length)}, {"needle", ints(needle, needle_count)}};
        attn_named_tensor out[] = {{"tokens", ints(tokens, total)}, {"position", ints(&position, one)}};
        status = run_op("retrieval_head.insert", params, in, 2, out, 2);
        t->count = 0;
        if (first) {
            t->prompt[t->count++] = bos;
        }
        for (int64_t i = 0; i < total; i++) {
            t->prompt[t->count++] = (int32_t)tokens[i];
        }
        memcpy(t->prompt + t->count, question, (size_t)question_count * sizeof *question);
        t->count += question_count;
        t->begin = first + position + head_count;
        free(params);
        free(context);
        free(needle);
        free(tokens);
    }
    attn_tokens_free(head);
    attn_tokens_free(question);
    attn_tokens_free(probe);
    free(ask.data);
    free(begin.data);
    return status;
}

/* Read the prompt but for its last token into sequence 0. */
static attn_status read_prompt(experiment *e, const test *t)
{
    attn_status status = attn_context_truncate(e->s.context, 0, 0);
    attn_context_batch batch = {.sequence = 0, .tokens = t->prompt, .count = t->count - 1};
    return status == ATTN_OK ? attn_context_eval(e->s.context, &batch, 1, NULL, NULL) : status;
}

/* Answer greedily from a copy of the prompt's sequence; scores [total] may be NULL. */
static attn_status answer(experiment *e, const test *t, float *scores, double *recall, uint8_t *success)
{
    attn_context *c = e->s.context;
    int32_t produced[STEPS], token = t->prompt[t->count - 1];
    int64_t steps = 0, vocabulary = attn_model_get_info(e->s.model)->vocabulary;
    attn_status status = attn_context_copy(c, 1, 0);
    for (int ended = 0; steps < STEPS && !ended && status == ATTN_OK && !session_interrupted();) {
        attn_context_batch batch = {.sequence = 1, .tokens = &token, .count = 1};
        status = attn_context_eval(c, &batch, 1, NULL, NULL);
        if (status != ATTN_OK) {
            break;
        }
        const float *logits = attn_context_logits(c, 0);
        token = 0;
        for (int32_t i = 1; i < vocabulary; i++) {
            token = logits[i] > logits[token] ? i : token;
        }
        produced[steps++] = token;
        const int64_t *top = attn_heads_top(e->heads);
        for (int64_t h = 0; h < e->total && scores != NULL; h++) {
            int64_t at = top[h];
            if (at >= t->begin && at < t->begin + t->rest_count && t->prompt[at] == token) {
                scores[h] += 1.0f / (float)t->rest_count;
            }
        }
        size_t bytes;
        const char *text = attn_token_text(e->s.tokenizer, token, 0, &bytes);
        ended = memchr(text, '\n', bytes) != NULL || attn_tokenizer_is_end(e->s.tokenizer, token);
    }
    return status == ATTN_OK ? recall_of(t->rest, t->rest_count, produced, steps, recall, success) : status;
}

static void progress(const char *what, int done, int total)
{
    if (isatty(STDERR_FILENO)) {
        fprintf(stderr, "\r%s %d of %d ", what, done, total);
        if (done == total) {
            fprintf(stderr, "\r%40s\r", "");
        }
    }
}

static attn_status detect(experiment *e)
{
    for (int i = 0; i < e->test_count && !session_interrupted(); i++) {
        test *t = &e->tests[i];
        progress("Test", i, e->test_count);
        attn_status status = read_prompt(e, t);
        if (status == ATTN_OK) {
            status = answer(e, t, e->scores + i * e->total, &t->recall, &t->success);
        }
        if (status != ATTN_OK) {
            return status;
        }
        e->successes += t->success;
    }
    progress("Test", e->test_count, e->test_count);
    uint8_t success[MOST * MOST * SENTENCES];
    for (int i = 0; i < e->test_count; i++) {
        success[i] = e->tests[i].success;
    }
    int64_t by_test[] = {e->test_count, e->layers, e->per_layer};
    attn_named_tensor in[] = {{"scores", attn_tensor_make(e->scores, ATTN_F32, 3, by_test)},
                              {"success", attn_tensor_make(success, ATTN_BOOL, 1, by_test)}};
    attn_named_tensor out[] = {{"mean", attn_tensor_make(e->mean, ATTN_F32, 2, by_test + 1)},
                               {"freq", attn_tensor_make(e->freq, ATTN_F32, 2, by_test + 1)},
                               {"order", ints(e->order, e->total)},
                               {"retrieval", attn_tensor_make(e->retrieval, ATTN_BOOL, 2, by_test + 1)}};
    char params[64];
    snprintf(params, sizeof params, "{\"threshold\": %.17g}", e->o->threshold);
    return run_op("retrieval_head.rank", params, in, 2, out, 4);
}

/* ---- Masks ---- */

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

/* `count` heads that are neither retrieval heads nor among the `count` best; 0 when there are not so many. */
static int draw_others(const experiment *e, int64_t count, uint64_t *state, uint8_t *mask)
{
    int64_t *others = malloc((size_t)e->total * sizeof *others), left = 0;
    memset(mask, 0, (size_t)e->total);
    for (int64_t i = count; i < e->total && others != NULL; i++) {
        if (!e->retrieval[e->order[i]]) {
            others[left++] = e->order[i];
        }
    }
    int enough = left >= count;
    for (int64_t i = 0; i < count && enough; i++) {
        int64_t at = (int64_t)(next_random(state) % (uint64_t)left);
        mask[others[at]] = 1;
        others[at] = others[--left];
    }
    free(others);
    return enough;
}

/* Recall over the tests that succeed without masks. Each prompt is read once for all masks. */
static attn_status mask_all(experiment *e)
{
    int64_t runs = 0, per_mask = 1 + e->o->controls;
    uint8_t *masks = calloc((size_t)(e->o->mask_count * per_mask), (size_t)e->total);
    uint64_t state = (uint64_t)e->o->seed;
    attn_status status = ATTN_OK;
    for (int m = 0; m < e->o->mask_count && masks != NULL; m++) {
        uint8_t *mask = masks + m * per_mask * e->total;
        for (long i = 0; i < e->o->mask[m]; i++) {
            mask[e->order[i]] = 1;
        }
        for (long r = 0; r < e->o->controls; r++) {
            draw_others(e, e->o->mask[m], &state, mask + (1 + r) * e->total);
        }
    }
    for (int i = 0; i < e->test_count && masks != NULL && status == ATTN_OK && !session_interrupted(); i++) {
        const test *t = &e->tests[i];
        if (!t->success) {
            continue;
        }
        progress("Masked test", (int)runs, e->successes);
        runs++;
        status = read_prompt(e, t);
        for (int64_t k = 0; k < e->o->mask_count * per_mask && status == ATTN_OK; k++) {
            double recall;
            uint8_t success;
            status = attn_heads_mask(e->heads, masks + k * e->total, e->o->mode);
            if (status == ATTN_OK) {
                status = answer(e, t, NULL, &recall, &success);
            }
            if (status == ATTN_OK) {
                double *to = k % per_mask == 0 ? &e->masked[k / per_mask] : &e->random[k / per_mask][k % per_mask - 1];
                *to += recall / e->successes;
            }
        }
        attn_heads_mask(e->heads, NULL, e->o->mode);
    }
    progress("Masked test", e->successes, e->successes);
    free(masks);
    return status;
}

/* ---- Results ---- */

static double mean_recall(const experiment *e)
{
    double sum = 0;
    for (int i = 0; i < e->test_count; i++) {
        sum += e->tests[i].success ? e->tests[i].recall / e->successes : 0;
    }
    return sum;
}

static void control_range(const experiment *e, int m, double *mean, double *low, double *high)
{
    *mean = 0, *low = 1e9, *high = 0;
    for (long r = 0; r < e->o->controls; r++) {
        double x = e->random[m][r];
        *mean += x / (double)e->o->controls;
        *low = x < *low ? x : *low;
        *high = x > *high ? x : *high;
    }
}

static void print_results(const experiment *e)
{
    int64_t found = 0, silent = 0;
    for (int64_t h = 0; h < e->total; h++) {
        found += e->retrieval[h];
        silent += e->freq[h] == 0.0f;
    }
    printf("%d of %d sentences repeated; %lld of %lld heads (%.1f %%) score above %g, %lld (%.1f %%) never score\n\n", e->successes,
           e->test_count, (long long)found, (long long)e->total, 100.0 * (double)found / (double)e->total, e->o->threshold, (long long)silent,
           100.0 * (double)silent / (double)e->total);
    printf("%6s %5s %8s %8s\n", "layer", "head", "score", "active");
    for (int64_t i = 0; i < e->total && i < 15; i++) {
        int64_t h = e->order[i];
        printf("%6lld %5lld %8.3f %7.0f%%\n", (long long)(h / e->per_layer), (long long)(h % e->per_layer), (double)e->mean[h],
               100 * (double)e->freq[h]);
    }
    if (e->o->mask_count == 0) {
        return;
    }
    printf("\nRecall of these sentences with heads masked (%s) while answering:\n", e->o->mode == ATTN_HEADS_ZERO ? "zero" : "uniform");
    printf("%8s %8s %22s\n%8d %8.3f\n", "masked", "best", "random others", 0, mean_recall(e));
    for (int m = 0; m < e->o->mask_count; m++) {
        double mean, low, high;
        control_range(e, m, &mean, &low, &high);
        printf("%8ld %8.3f %8.3f (%.3f-%.3f)\n", e->o->mask[m], e->masked[m], mean, low, high);
    }
}

static int write_json(const experiment *e, const char *path)
{
    FILE *file = fopen(path, "w");
    if (file == NULL) {
        return cli_error("cannot write '%s'", path);
    }
    fprintf(file, "{\"layers\": %lld, \"heads\": %lld, \"threshold\": %g, \"tests\": [", (long long)e->layers, (long long)e->per_layer,
            e->o->threshold);
    for (int i = 0; i < e->test_count; i++) {
        const test *t = &e->tests[i];
        fprintf(file, "%s\n  {\"length\": %ld, \"depth\": %ld, \"sentence\": %d, \"recall\": %.4f, \"success\": %s}", i > 0 ? "," : "",
                t->length, t->depth, t->sentence, t->recall, t->success ? "true" : "false");
    }
    fprintf(file, "],\n \"ranking\": [");
    for (int64_t i = 0; i < e->total; i++) {
        int64_t h = e->order[i];
        fprintf(file, "%s\n  {\"layer\": %lld, \"head\": %lld, \"score\": %.6f, \"active\": %.4f, \"retrieval\": %s}", i > 0 ? "," : "",
                (long long)(h / e->per_layer), (long long)(h % e->per_layer), (double)e->mean[h], (double)e->freq[h],
                e->retrieval[h] ? "true" : "false");
    }
    fprintf(file, "],\n \"recall\": %.4f, \"masked\": [", mean_recall(e));
    for (int m = 0; m < e->o->mask_count; m++) {
        fprintf(file, "%s\n  {\"heads\": %ld, \"mode\": \"%s\", \"best\": %.4f, \"random\": [", m > 0 ? "," : "", e->o->mask[m],
                e->o->mode == ATTN_HEADS_ZERO ? "zero" : "uniform", e->masked[m]);
        for (long r = 0; r < e->o->controls; r++) {
            fprintf(file, "%s%.4f", r > 0 ? ", " : "", e->random[m][r]);
        }
        fprintf(file, "]}");
    }
    fprintf(file, "]}\n");
    return fclose(file) == 0 ? 0 : cli_error("cannot write '%s'", path);
}

/* ---- The command ---- */

static int prepare(experiment *e, const char *path)
{
    const heads_options *o = e->o;
    const attn_model_info *info = attn_model_get_info(e->s.model);
    e->layers = info->layers, e->per_layer = info->heads, e->total = info->layers * info->heads;
    e->test_count = 0;
    for (int m = 0; m < o->mask_count; m++) {
        if (o->mask[m] * 2 > e->total) {
            return cli_error("--mask %ld: the model has %lld heads, at most half of them can be masked", o->mask[m], (long long)e->total);
        }
    }
    size_t bytes;
    char *text = read_file(path, &bytes);
    int32_t *hay = NULL;
    int64_t count = 0;
    int result = text == NULL;
    if (result == 0 && attn_tokenize(e->s.tokenizer, text, bytes, 0, &hay, &count) != ATTN_OK) {
        result = cli_library_error();
    }
    for (int l = 0; l < o->length_count && result == 0; l++) {
        if (o->lengths[l] > count) {
            result = cli_error("--lengths %ld: the haystack has %lld tokens", o->lengths[l], (long long)count);
        }
        for (int d = 0; d < o->depth_count && result == 0; d++) {
            for (int n = 0; n < SENTENCES && result == 0; n++) {
                test *t = &e->tests[e->test_count++];
                *t = (test){.length = o->lengths[l], .depth = o->depths[d], .sentence = n};
                result = make_test(e, hay, t) == ATTN_OK ? 0 : cli_library_error();
            }
        }
    }
    attn_tokens_free(hay);
    free(text);
    size_t total = (size_t)e->total;
    e->scores = calloc((size_t)e->test_count * total + 1, sizeof *e->scores);
    e->mean = calloc(total, sizeof *e->mean);
    e->freq = calloc(total, sizeof *e->freq);
    e->order = calloc(total, sizeof *e->order);
    e->retrieval = calloc(total, 1);
    if (result == 0 && (e->scores == NULL || e->mean == NULL || e->freq == NULL || e->order == NULL || e->retrieval == NULL)) {
        result = cli_error("out of memory");
    }
    return result;
}

static int run_experiment(experiment *e, const char *haystack)
{
    int result = prepare(e, haystack);
    if (result == 0 && (attn_heads_create(&e->heads, e->s.model) != ATTN_OK || attn_heads_use(e->heads, e->s.context) != ATTN_OK ||
                        detect(e) != ATTN_OK)) {
        result = cli_library_error();
    }
    if (result == 0 && e->successes == 0 && !session_interrupted()) {
        result = cli_error("the model repeats none of the %d sentences, so its heads cannot be ranked; try shorter --lengths", e->test_count);
    }
    if (result == 0 && e->o->mask_count > 0 && mask_all(e) != ATTN_OK) {
        result = cli_library_error();
    }
    if (result == 0 && session_interrupted()) {
        return 130;
    }
    if (result == 0) {
        print_results(e);
    }
    return result == 0 && e->o->json != NULL ? write_json(e, e->o->json) : result;
}

static int parse_options(heads_options *o, int argc, char **argv)
{
    enum { LENGTHS = 256, DEPTHS, THRESHOLD, MASK, CONTROLS, MODE, JSON, SEED };
    static const struct option options[] = {
        {"lengths", required_argument, NULL, LENGTHS}, {"depths", required_argument, NULL, DEPTHS},
        {"threshold", required_argument, NULL, THRESHOLD}, {"mask", required_argument, NULL, MASK},
        {"controls", required_argument, NULL, CONTROLS}, {"mode", required_argument, NULL, MODE}, {"json", required_argument, NULL, JSON},
        {"seed", required_argument, NULL, SEED}, SESSION_MODEL_OPTIONS, {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
    int option, ok = 1;
    char *end;
    while (ok && (option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case LENGTHS: ok = parse_numbers("--lengths", optarg, 1, 1L << 24, o->lengths, &o->length_count); break;
        case DEPTHS: ok = parse_numbers("--depths", optarg, 0, 100, o->depths, &o->depth_count); break;
        case THRESHOLD:
            o->threshold = strtod(optarg, &end);
            ok = *optarg != '\0' && *end == '\0' && o->threshold >= 0;
            if (!ok) {
                cli_usage_error("heads", "--threshold %s: expected a number from 0", optarg);
            }
            break;
        case MASK:
            ok = parse_numbers("--mask", optarg, 0, 1L << 20, o->mask, &o->mask_count);
            o->mask_count = ok && o->mask_count == 1 && o->mask[0] == 0 ? 0 : o->mask_count;
            break;
        case CONTROLS: ok = cli_parse_int("heads", "--controls", optarg, 1, MOST_CONTROLS, &o->controls); break;
        case MODE:
            ok = strcmp(optarg, "uniform") == 0 || strcmp(optarg, "zero") == 0;
            o->mode = strcmp(optarg, "zero") == 0 ? ATTN_HEADS_ZERO : ATTN_HEADS_UNIFORM;
            if (!ok) {
                cli_usage_error("heads", "--mode %s: expected uniform or zero", optarg);
            }
            break;
        case JSON: o->json = optarg; break;
        case SEED: ok = cli_parse_int("heads", "--seed", optarg, 0, 1L << 30, &o->seed); break;
        case 'h': fputs(help, stdout); exit(0);
        default: ok = session_option("heads", &o->session, option, optarg);
        }
    }
    return ok;
}

int cli_heads(int argc, char **argv)
{
    heads_options o = {.lengths = {500, 1000, 2000}, .length_count = 3, .depths = {0, 25, 50, 75, 100}, .depth_count = 5,
                       .mask = {5, 10, 20}, .mask_count = 3, .controls = 3, .threshold = 0.1, .seed = 1};
    if (!parse_options(&o, argc, argv)) {
        return 2;
    }
    if (optind != argc - 2) {
        return cli_usage_error("heads", "MODEL.gguf and HAYSTACK.txt are needed");
    }
    o.session.model = argv[optind];
    experiment *e = calloc(1, sizeof *e);
    if (e == NULL) {
        return cli_error("out of memory");
    }
    e->o = &o;
    int result = 1;
    if (session_open(&e->s, &o.session, 2, NULL, NULL) == 0) {
        result = run_experiment(e, argv[optind + 1]);
        session_close(&e->s);
    }
    for (int i = 0; i < e->test_count; i++) {
        free(e->tests[i].prompt);
        attn_tokens_free(e->tests[i].rest);
    }
    attn_heads_destroy(e->heads);
    free(e->scores);
    free(e->mean);
    free(e->freq);
    free(e->order);
    free(e->retrieval);
    free(e);
    return result;
}
