/* Needle in a haystack: sentences hidden in a long text at several depths, and whether the model finds them again. */
#include "session.h"

#include <getopt.h>
#include <png.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char help[] =
    "Usage: attn needle MODEL.gguf HAYSTACK.txt [OPTION]...\n\n"
    "Hide a sentence at several depths of texts of several lengths and ask for it. Prints the share of needles found for each\n"
    "length and depth, beside exact attention when a mechanism is given, with the density of (query, key) pairs and the time.\n\n"
    "  --lengths N,N...         tokens of text (default: 1000,2000,4000)\n"
    "  --depths P,P...          percent (default: 0,25,50,75,100)\n"
    "  --needles N              different needles per cell, 1 to 3 (default: 3)\n"
    "  --alone                  no exact attention beside\n"
    "  --png FILE               a heat map of the last table\n"
    SESSION_HELP
    "\nExamples:\n"
    "  attn needle model.gguf book.txt\n"
    "  attn needle model.gguf book.txt --lengths 2000,7000 --attention flexprefill:gamma=0.9 --png map.png\n";

typedef struct needle {
    const char *sentence, *question, *begin, *answer;
} needle;

/* What follows the question begins as the sentence does, so that models that only continue text can answer too. */
static const needle needles[] = {
    {"The secret number of the blue house is 7341.", "What is the secret number of the blue house?", "The secret number of the blue house is", "7341"},
    {"The password for the old library is marigold.", "What is the password for the old library?", "The password for the old library is", "marigold"},
    {"Captain Ferris hid the silver key under the fountain.", "Where did Captain Ferris hide the silver key?", "Captain Ferris hid the silver key under the", "fountain"},
};

#define MOST 16

typedef struct needle_options {
    session_options session;
    long lengths[MOST], depths[MOST], count;
    int length_count, depth_count, alone;
    const char *png;
} needle_options;

static int parse_list(const char *option, char *text, long max, long values[MOST], int *count)
{
    *count = 0;
    for (char *item = strtok(text, ","); item != NULL; item = strtok(NULL, ",")) {
        if (*count == MOST || !cli_parse_int("needle", option, item, 0, max, &values[*count])) {
            return 0;
        }
        ++*count;
    }
    return *count > 0;
}

/* The first `length` tokens of the haystack with the sentence after the last full stop before the depth. */
static attn_status make_prompt(const session *s, const int32_t *hay, int64_t length, long depth, const needle *n, cli_text *prompt)
{
    size_t total = 0, at, bytes;
    cli_text text = {NULL, 0};
    cli_text_add(&text, "%s", "");
    for (int64_t i = 0; i < length; i++) {
        const char *piece = attn_token_text(s->tokenizer, hay[i], 0, &bytes);
        cli_text_add(&text, "%.*s", (int)bytes, piece);
    }
    total = text.length;
    at = total * (size_t)depth / 100;
    while (at > 0 && at < total && !(text.data[at - 1] == '.' && (text.data[at] == ' ' || text.data[at] == '\n'))) {
        at--;
    }
    cli_text_add(prompt, "%.*s %s %s\n\nQuestion: %s\nAnswer: %s", (int)at, text.data, n->sentence, text.data + at, n->question, n->begin);
    free(text.data);
    return ATTN_OK;
}

/* 1 when the greedy continuation holds the answer, 0 when not, -1 on failure. */
static int find(session *s, const int32_t *hay, int64_t length, long depth, const needle *n)
{
    cli_text prompt = {NULL, 0}, answer = {NULL, 0};
    cli_text_add(&answer, "%s", "");
    int32_t *tokens = NULL;
    int64_t count;
    attn_status status = make_prompt(s, hay, length, depth, n, &prompt);
    if (status == ATTN_OK) {
        status = attn_tokenize(s->tokenizer, prompt.data, prompt.length, ATTN_TOKENIZE_SPECIAL, &tokens, &count);
    }
    if (status == ATTN_OK) {
        status = attn_context_truncate(s->context, 0, 0);
    }
    attn_context_batch batch = {.tokens = tokens, .count = status == ATTN_OK ? count : 0};
    for (int step = 0; step < 10 && status == ATTN_OK && !session_interrupted(); step++) {
        status = attn_context_eval(s->context, &batch, 1, NULL, NULL);
        if (status == ATTN_OK) {
            const float *logits = attn_context_logits(s->context, 0);
            int32_t best = 0;
            for (int32_t i = 1; i < attn_model_get_info(s->model)->vocabulary; i++) {
                best = logits[i] > logits[best] ? i : best;
            }
            size_t bytes;
            const char *piece = attn_token_text(s->tokenizer, best, 0, &bytes);
            cli_text_add(&answer, "%.*s", (int)bytes, piece);
            tokens[0] = best;
            batch.count = 1;
        }
    }
    int found = status != ATTN_OK ? -1 : strstr(answer.data, n->answer) != NULL;
    attn_tokens_free(tokens);
    free(prompt.data);
    free(answer.data);
    return found;
}

static int write_png(const char *path, const needle_options *o, double scores[MOST][MOST])
{
    enum { CELL = 48, GAP = 2 };
    int width = o->length_count * CELL, height = o->depth_count * CELL;
    png_bytep pixels = malloc((size_t)(width * height) * 3);
    png_image image = {.version = PNG_IMAGE_VERSION, .width = (png_uint_32)width, .height = (png_uint_32)height,
                       .format = PNG_FORMAT_RGB};
    for (int y = 0; y < height && pixels != NULL; y++) {
        for (int x = 0; x < width; x++) {
            double score = scores[x / CELL][y / CELL];
            int gap = x % CELL < GAP || y % CELL < GAP;
            png_bytep p = pixels + (y * width + x) * 3;
            p[0] = gap ? 255 : (png_byte)(220 - 180 * score); /* from red to green */
            p[1] = gap ? 255 : (png_byte)(60 + 120 * score);
            p[2] = gap ? 255 : 70;
        }
    }
    int ok = pixels != NULL && png_image_write_to_file(&image, path, 0, pixels, 0, NULL);
    free(pixels);
    return ok ? 0 : cli_error("cannot write '%s'", path);
}

/* One table; 0 when done. */
static int measure(session *s, const needle_options *o, const int32_t *hay, const char *name, double scores[MOST][MOST])
{
    double sum = 0, start = now_seconds();
    printf("%s\n%8s", name, "tokens");
    for (int d = 0; d < o->depth_count; d++) {
        printf("  %4ld%%", o->depths[d]);
    }
    printf("\n");
    attn_context_reset_stats(s->context);
    for (int l = 0; l < o->length_count; l++) {
        printf("%8ld", o->lengths[l]);
        for (int d = 0; d < o->depth_count; d++) {
            scores[l][d] = 0;
            for (int n = 0; n < o->count; n++) {
                int found = find(s, hay, o->lengths[l], o->depths[d], &needles[n]);
                if (found < 0 || session_interrupted()) {
                    printf("\n");
                    return found < 0 ? cli_library_error() : 130;
                }
                scores[l][d] += (double)found / (double)o->count;
            }
            sum += scores[l][d];
            printf("  %5.2f", scores[l][d]);
            fflush(stdout);
        }
        printf("\n");
    }
    attn_context_stats stats = attn_context_get_stats(s->context);
    printf("found %.3f, time %.2f s, attention %.2f s, cache %.1f MB", sum / (o->length_count * o->depth_count), now_seconds() - start,
           stats.attention_seconds, (double)stats.cache_bytes * 1e-6);
    return 0;
}

int cli_needle(int argc, char **argv)
{
    enum { LENGTHS = 256, DEPTHS, NEEDLES, ALONE, PNG };
    static const struct option options[] = {{"lengths", required_argument, NULL, LENGTHS}, {"depths", required_argument, NULL, DEPTHS},
                                            {"needles", required_argument, NULL, NEEDLES}, {"png", required_argument, NULL, PNG},
                                            {"alone", no_argument, NULL, ALONE},
                                            SESSION_OPTIONS, {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
    needle_options o = {.lengths = {1000, 2000, 4000}, .depths = {0, 25, 50, 75, 100}, .count = 3, .length_count = 3, .depth_count = 5};
    int option, ok = 1;
    while (ok && (option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case LENGTHS: ok = parse_list("--lengths", optarg, 1L << 24, o.lengths, &o.length_count); break;
        case DEPTHS: ok = parse_list("--depths", optarg, 100, o.depths, &o.depth_count); break;
        case NEEDLES: ok = cli_parse_int("needle", "--needles", optarg, 1, 3, &o.count); break;
        case ALONE: o.alone = 1; break;
        case PNG: o.png = optarg; break;
        case 'h': fputs(help, stdout); return 0;
        default: ok = session_option("needle", &o.session, option, optarg);
        }
    }
    if (!ok) {
        return 2;
    }
    if (optind != argc - 2) {
        return cli_usage_error("needle", "MODEL.gguf and HAYSTACK.txt are needed");
    }
    o.session.model = argv[optind];
    session s;
    if (session_open(&s, &o.session, 1, NULL, NULL) != 0) {
        return 1;
    }
    size_t bytes;
    char *text = read_file(argv[optind + 1], &bytes);
    int32_t *hay = NULL;
    int64_t count = 0;
    int result = text == NULL;
    if (result == 0 && attn_tokenize(s.tokenizer, text, bytes, 0, &hay, &count) != ATTN_OK) {
        result = cli_library_error();
    }
    for (int l = 0; l < o.length_count && result == 0; l++) {
        if (o.lengths[l] < 1 || o.lengths[l] > count) {
            result = cli_error("--lengths %ld: the haystack has %lld tokens", o.lengths[l], (long long)count);
        }
    }
    double scores[MOST][MOST];
    attn_policy *policy = s.policy;
    if (result == 0 && attn_policy_use(NULL, s.context) != ATTN_OK) {
        result = cli_library_error();
    }
    if (result == 0 && (policy == NULL || !o.alone)) {
        result = measure(&s, &o, hay, "dense", scores);
        printf("\n");
    }
    if (result == 0 && policy != NULL) {
        const char *name = o.session.policy != NULL ? o.session.policy : o.session.attention != NULL ? o.session.attention : o.session.decode_attention;
        attn_policy_count(policy, 1);
        result = attn_policy_use(policy, s.context) == ATTN_OK ? measure(&s, &o, hay, name, scores) : cli_library_error();
        attn_policy_stats pairs = attn_policy_get_stats(policy);
        double all = pairs.prompt_exact_pairs + pairs.generation_exact_pairs;
        printf(", density %.3f\n", all > 0 ? (pairs.prompt_pairs + pairs.generation_pairs) / all : 1);
    }
    if (result == 0 && o.png != NULL) {
        result = write_png(o.png, &o, scores);
    }
    attn_tokens_free(hay);
    free(text);
    session_close(&s);
    return result;
}
