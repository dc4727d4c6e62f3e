#include "session.h"

#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char help[] =
    "Usage: attn perplexity MODEL.gguf FILE [OPTION]...\n\n"
    "How well the model predicts a text: exp of the mean negative log-likelihood per token. With --attention,\n"
    "--decode-attention or --policy the mechanism is measured beside exact attention.\n\n"
    "  --stride N               tokens that each window adds (default: the context; less gives every token a longer past)\n"
    "  --limit N                use the first N tokens only\n"
    "  --alone                  no exact attention beside\n"
    "  --endless                one window over the whole text, however long, for mechanisms that forget\n"
    "                           (streaming:positions=cache); alone\n"
    SESSION_HELP
    "  --json                   print JSON\n\n"
    "Examples:\n"
    "  attn perplexity model.gguf book.txt --ctx 8000\n"
    "  attn perplexity model.gguf book.txt --ctx 8000 --attention streaming:sinks=4,recent=1024\n"
    "  S=streaming:sinks=4,recent=1024,positions=cache\n"
    "  attn perplexity model.gguf book.txt --endless --attention $S --decode-attention $S\n";

typedef struct result {
    double loss, seconds, attention_seconds;
    int64_t tokens, windows;
    attn_policy_stats pairs;
} result;

/* Log-likelihoods of the tokens that follow, from logits as they come. */
typedef struct scorer {
    const int32_t *tokens; /* of the window */
    int64_t first, count, vocabulary;
    double loss;
    int64_t scored;
} scorer;

static int score(void *user, int item, int64_t token, const float *logits)
{
    scorer *s = user;
    (void)item;
    if (token + 1 < s->first || token + 1 >= s->count) {
        return session_interrupted();
    }
    float top = -INFINITY;
    double sum = 0;
    for (int64_t i = 0; i < s->vocabulary; i++) {
        top = logits[i] > top ? logits[i] : top;
    }
    for (int64_t i = 0; i < s->vocabulary; i++) {
        sum += (double)expf(logits[i] - top);
    }
    s->loss += (double)top + log(sum) - (double)logits[s->tokens[token + 1]];
    s->scored++;
    return session_interrupted();
}

/* Windows of `ctx` tokens, each `stride` further; in all but the first only what is new counts. */
static attn_status measure(session *s, const int32_t *tokens, int64_t count, int64_t ctx, int64_t stride, result *r)
{
    *r = (result){0};
    double start = now_seconds();
    attn_context_reset_stats(s->context);
    for (int64_t begin = 0, done = 0; done < count && begin + 1 < count; begin += stride) {
        int64_t window = count - begin < ctx ? count - begin : ctx;
        scorer sc = {tokens + begin, done == 0 ? 1 : done - begin, window, attn_model_get_info(s->model)->vocabulary, 0, 0};
        attn_status status = attn_context_truncate(s->context, 0, 0);
        attn_context_batch batch = {.sequence = 0, .tokens = tokens + begin, .count = window};
        if (status == ATTN_OK) {
            status = attn_context_eval(s->context, &batch, 1, score, &sc);
        }
        if (status != ATTN_OK) {
            return status;
        }
        r->loss += sc.loss;
        r->tokens += sc.scored;
        r->windows++;
        done = begin + window;
        if (isatty(STDERR_FILENO)) {
            fprintf(stderr, "\r%3.0f%%  perplexity %.4f ", 100.0 * (double)done / (double)count, exp(r->loss / (double)r->tokens));
        }
    }
    if (isatty(STDERR_FILENO)) {
        fprintf(stderr, "\r%40s\r", "");
    }
    r->seconds = now_seconds() - start;
    r->attention_seconds = attn_context_get_stats(s->context).attention_seconds;
    return ATTN_OK;
}

static void print_row(const char *name, const result *r, double density, int json)
{
    double perplexity = exp(r->loss / (double)(r->tokens > 0 ? r->tokens : 1));
    if (json) {
        fputs("{\"attention\": ", stdout);
        cli_print_json_text(name);
    } else {
        printf("%-40s", name);
    }
    printf(json ? ", \"perplexity\": %.6f, \"tokens\": %lld, \"density\": %.4f, \"seconds\": %.3f, "
                  "\"attention_seconds\": %.3f}\n"
                : " perplexity %9.4f  tokens %7lld  density %6.3f  time %8.2f s  attention %8.2f s\n",
           perplexity, (long long)r->tokens, density, r->seconds, r->attention_seconds);
}

int cli_perplexity(int argc, char **argv)
{
    enum { STRIDE = 256, LIMIT, ALONE, ENDLESS, JSON };
    static const struct option options[] = {{"stride", required_argument, NULL, STRIDE}, {"limit", required_argument, NULL, LIMIT},
                                            {"alone", no_argument, NULL, ALONE}, {"endless", no_argument, NULL, ENDLESS}, {"json", no_argument, NULL, JSON}, SESSION_OPTIONS,
                                            {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
    session_options o = {0};
    long stride = 0, limit = 0;
    int option, alone = 0, endless = 0, json = 0, ok = 1;
    while (ok && (option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case STRIDE: ok = cli_parse_int("perplexity", "--stride", optarg, 1, 1L << 24, &stride); break;
        case LIMIT: ok = cli_parse_int("perplexity", "--limit", optarg, 2, 1L << 30, &limit); break;
        case ALONE: alone = 1; break;
        case ENDLESS: endless = alone = 1; break;
        case JSON: json = 1; break;
        case 'h': fputs(help, stdout); return 0;
        default: ok = session_option("perplexity", &o, option, optarg);
        }
    }
    if (!ok) {
        return 2;
    }
    if (optind != argc - 2) {
        return cli_usage_error("perplexity", "MODEL.gguf and FILE are needed");
    }
    o.model = argv[optind];
    session s;
    if (session_open(&s, &o, 1, NULL, NULL) != 0) {
        return 1;
    }
    size_t bytes;
    char *text = read_file(argv[optind + 1], &bytes);
    int32_t *tokens = NULL;
    int64_t count = 0;
    int failed = text == NULL;
    if (!failed && attn_tokenize(s.tokenizer, text, bytes, ATTN_TOKENIZE_SPECIAL, &tokens, &count) != ATTN_OK) {
        failed = cli_library_error();
    }
    count = limit > 0 && count > limit ? limit : count;
    int64_t made_for = attn_model_get_info(s.model)->context_length, ctx = o.ctx > 0 ? o.ctx : made_for < 32768 ? made_for : 32768;
    ctx = endless ? count : ctx;
    stride = stride > 0 ? stride : ctx;
    if (!failed && count < 2) {
        failed = cli_error("the text has fewer than two tokens");
    }
    result exact, other;
    if (!failed) {
        attn_policy *policy = s.policy;
        if (policy == NULL || !alone) {
            if (attn_policy_use(NULL, s.context) != ATTN_OK || measure(&s, tokens, count, ctx, stride, &exact) != ATTN_OK) {
                failed = cli_library_error();
            } else {
                print_row("dense", &exact, 1, json);
            }
        }
        if (!failed && policy != NULL) {
            attn_policy_count(policy, 1);
            if (attn_policy_use(policy, s.context) != ATTN_OK ||
                measure(&s, tokens, count, ctx, stride, &other) != ATTN_OK) {
                failed = cli_library_error();
            } else {
                attn_policy_stats pairs = attn_policy_get_stats(policy);
                double all = pairs.prompt_exact_pairs + pairs.generation_exact_pairs;
                double done = pairs.prompt_pairs + pairs.generation_pairs;
                print_row(o.policy != NULL ? o.policy : o.attention != NULL ? o.attention : o.decode_attention, &other,
                          all > 0 ? done / all : 1, json);
            }
        }
    }
    attn_tokens_free(tokens);
    free(text);
    session_close(&s);
    return failed;
}
