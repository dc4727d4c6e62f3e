#include "session.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static const char help[] =
    "Usage: attn run MODEL.gguf [-p TEXT] [-f FILE] [OPTION]...\n\n"
    "Generate text with a language model. The prompt is FILE, then TEXT; without either an interactive chat begins.\n\n"
    "  -p, --prompt TEXT        what to continue, or with --chat what to answer\n"
    "  -f, --file FILE          a text to put before it ('-': standard input)\n"
    "  --chat                   the prompt is a message that the model answers (its chat template)\n"
    "  --system TEXT            system message of the chat\n"
    "  -n, --tokens N           tokens to generate at most (default: 256)\n"
    "  --temperature X          0 (default): always the most likely token\n"
    "  --top-k N, --top-p X, --min-p X, --repeat-penalty X, --seed N\n"
    "                           other tokens that may be drawn (off), and the seed (0)\n"
    SESSION_HELP
    "  --stats                  print speed and memory at the end\n"
    "  --json                   print one JSON object with the text and the statistics instead; with --stats the answer\n"
    "                           goes to standard error as it comes\n"
    "  --ignore-end             go on after the model has ended its text (to measure speed)\n\n"
    "Ctrl-C stops the answer; pressed again it ends the program.\n\n"
    "Examples:\n"
    "  attn run model.gguf -p 'The capital of France is' -n 20\n"
    "  attn run model.gguf --chat -f report.txt -p 'What does this report say about costs?' --stats\n"
    "  attn run model.gguf --chat -f book.txt -p 'Who is the hero?' --attention flexprefill:gamma=0.9\n"
    "  attn run model.gguf -p 'Once upon a time' -n 100000 --decode-attention streaming:recent=1024,positions=cache\n"
    "  attn run model.gguf\n";

typedef struct run_options {
    session_options session;
    attn_sampler_settings sampler;
    const char *prompt, *file, *system;
    int chat, stats, json, ignore_end;
    long tokens;
} run_options;

typedef struct run_stats {
    int64_t prompt_tokens, generated;
    double prompt_seconds, first_token_seconds, generate_seconds;
    attn_context_stats prompt, generation;
} run_stats;

static int show_progress(void *user, double done)
{
    (void)user;
    if (isatty(STDERR_FILENO) && done < 1) {
        fprintf(stderr, "\rreading the prompt: %3.0f%%", done * 100);
        fflush(stderr);
    }
    return session_interrupted();
}

static void clear_progress(void)
{
    if (isatty(STDERR_FILENO)) {
        fprintf(stderr, "\r%30s\r", "");
        fflush(stderr);
    }
}

/* Bytes that may be shown: everything but an unfinished UTF-8 character at the end. */
static size_t finished_bytes(const char *text, size_t length)
{
    size_t back = 0;
    while (back < 3 && back < length && ((unsigned char)text[length - 1 - back] & 0xc0) == 0x80) {
        back++;
    }
    if (back >= length) {
        return length;
    }
    unsigned char lead = (unsigned char)text[length - 1 - back];
    size_t need = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
    return need > back + 1 ? length - 1 - back : length;
}

static attn_status feed(session *s, const int32_t *tokens, int64_t count)
{
    attn_context_batch batch = {.sequence = 0, .tokens = tokens, .count = count};
    return attn_context_eval(s->context, &batch, 1, NULL, NULL);
}

/* Read the prompt, then generate. The answer goes to stdout as it comes (--json: to stderr with --stats, else nowhere);
 * *answer gets all of it. */
static attn_status generate(session *s, attn_sampler *sampler, const run_options *o, const int32_t *prompt, int64_t count,
                            cli_text *answer, run_stats *stats)
{
    double start = now_seconds();
    attn_context_reset_stats(s->context);
    for (int64_t i = 0; i < count; i++) {
        attn_sampler_accept(sampler, prompt[i]);
    }
    attn_status status = feed(s, prompt, count);
    clear_progress();
    stats->prompt_seconds = now_seconds() - start;
    stats->prompt_tokens = count;
    FILE *stream = !o->json ? stdout : o->stats ? stderr : NULL;
    stats->prompt = attn_context_get_stats(s->context);
    attn_context_reset_stats(s->context);
    if (status != ATTN_OK) {
        return status;
    }
    size_t shown = 0;
    double begin = now_seconds();
    for (long n = 0; n < o->tokens && !session_interrupted(); n++) {
        int32_t token = attn_sampler_next(sampler, attn_context_logits(s->context, 0));
        if (n == 0) {
            stats->first_token_seconds = now_seconds() - start;
        }
        stats->generated++;
        if (attn_tokenizer_is_end(s->tokenizer, token) && !o->ignore_end) {
            break;
        }
        attn_sampler_accept(sampler, token);
        size_t bytes;
        const char *text = attn_token_text(s->tokenizer, token, 0, &bytes);
        cli_text_add(answer, "%.*s", (int)bytes, text);
        size_t ready = finished_bytes(answer->data, answer->length);
        if (stream != NULL && ready > shown) {
            fwrite(answer->data + shown, 1, ready - shown, stream);
            fflush(stream);
            shown = ready;
        }
        if (n + 1 == o->tokens) {
            break;
        }
        status = feed(s, &token, 1);
        if (status != ATTN_OK) {
            break;
        }
    }
    stats->generate_seconds = now_seconds() - begin;
    stats->generation = attn_context_get_stats(s->context);
    if (stream != NULL) {
        fwrite(answer->data + shown, 1, answer->length - shown, stream);
        putc('\n', stream);
    }
    return status;
}

static double share(double part, double whole) { return whole > 0 ? part / whole : 0; }

static size_t peak_memory(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (size_t)usage.ru_maxrss * 1024 : 0;
}

static void print_stats(const session *s, const run_stats *r)
{
    double peak = attn_machine_peak_flops((int)s->threads);
    double flops = share(r->prompt.attention_flops, r->prompt.attention_seconds);
    fprintf(stderr,
            "\n"
            "  prompt               %8lld tokens, %.0f tokens/s\n"
            "  time to first token  %8.2f s\n"
            "  generation           %8lld tokens, %.1f tokens/s\n"
            "  attention            %8.0f %% of the prompt's time, %.0f GFLOP/s = %.0f %% of this machine's peak (%.0f)\n"
            "  cache                %8.1f MB\n"
            "  peak memory          %8.1f MB\n",
            (long long)r->prompt_tokens, share((double)r->prompt_tokens, r->prompt_seconds), r->first_token_seconds,
            (long long)r->generated, share((double)(r->generated > 1 ? r->generated - 1 : 0), r->generate_seconds),
            100 * share(r->prompt.attention_seconds, r->prompt.seconds), flops * 1e-9, 100 * share(flops, peak), peak * 1e-9,
            (double)r->generation.cache_bytes * 1e-6, (double)peak_memory() * 1e-6);
}

static void print_json(const session *s, const run_stats *r, const cli_text *answer)
{
    double peak = attn_machine_peak_flops((int)s->threads);
    printf("{\"text\": ");
    cli_print_json_text(answer->data != NULL ? answer->data : "");
    printf(", \"prompt_tokens\": %lld, \"prompt_seconds\": %.6f, \"first_token_seconds\": %.6f, \"generated_tokens\": %lld, "
           "\"generate_seconds\": %.6f, \"prompt_attention_seconds\": %.6f, \"prompt_attention_flops\": %.6g, "
           "\"generate_attention_seconds\": %.6f, \"peak_flops_per_second\": %.6g, \"cache_bytes\": %zu, \"cache_peak_bytes\": %zu, "
           "\"peak_memory_bytes\": %zu}\n",
           (long long)r->prompt_tokens, r->prompt_seconds, r->first_token_seconds, (long long)r->generated, r->generate_seconds,
           r->prompt.attention_seconds, r->prompt.attention_flops, r->generation.attention_seconds, peak, r->generation.cache_bytes,
           r->generation.cache_peak_bytes, peak_memory());
}

/* Tokens of a text that a template rendered (it may begin with the begin token itself), or of plain text. */
static attn_status to_tokens(const session *s, const char *text, size_t length, int rendered, int first, int32_t **tokens,
                             int64_t *count)
{
    int flags = rendered ? ATTN_TOKENIZE_PARSE : 0;
    size_t bos_length = 0;
    const char *bos = attn_token_text(s->tokenizer, attn_tokenizer_bos(s->tokenizer), 1, &bos_length);
    int has_bos = rendered && bos_length > 0 && length >= bos_length && memcmp(text, bos, bos_length) == 0;
    if (first && !has_bos) {
        flags |= ATTN_TOKENIZE_SPECIAL;
    }
    return attn_tokenize(s->tokenizer, text, length, flags, tokens, count);
}

static int run_once(session *s, attn_sampler *sampler, const run_options *o)
{
    cli_text prompt = {NULL, 0}, answer = {NULL, 0};
    cli_text_add(&prompt, "%s", "");
    cli_text_add(&answer, "%s", "");
    if (o->file != NULL) {
        size_t bytes;
        char *text = read_file(o->file, &bytes);
        if (text == NULL) {
            free(prompt.data);
            free(answer.data);
            return 1;
        }
        cli_text_add(&prompt, "%s", text);
        free(text);
    }
    if (o->prompt != NULL) {
        cli_text_add(&prompt, "%s%s", prompt.length > 0 ? "\n\n" : "", o->prompt);
    }
    char *rendered = NULL;
    attn_status status = ATTN_OK;
    if (o->chat) {
        attn_chat_message messages[] = {{"system", o->system}, {"user", prompt.data}};
        int skip = o->system == NULL;
        status = attn_chat_render(s->tokenizer, messages + skip, 2 - skip, 1, &rendered);
    }
    int32_t *tokens = NULL;
    int64_t count = 0;
    run_stats stats = {0};
    if (status == ATTN_OK) {
        const char *text = rendered != NULL ? rendered : prompt.data;
        status = to_tokens(s, text, strlen(text), o->chat, 1, &tokens, &count);
    }
    if (status == ATTN_OK && count == 0) {
        status = ATTN_ERR_ARGUMENT;
        cli_error("the prompt is empty");
    } else if (status == ATTN_OK) {
        status = generate(s, sampler, o, tokens, count, &answer, &stats);
        if (status != ATTN_OK && status != ATTN_ERR_CANCELLED) {
            cli_library_error();
        }
    } else {
        cli_library_error();
    }
    if (status == ATTN_OK && o->json) {
        print_json(s, &stats, &answer);
    } else if (status == ATTN_OK && o->stats) {
        print_stats(s, &stats);
    }
    attn_tokens_free(tokens);
    attn_text_free(rendered);
    free(prompt.data);
    free(answer.data);
    return session_interrupted() ? 130 : status != ATTN_OK;
}

/* One line from the terminal (or a pipe) after another. The conversation stays in the cache: only what is new is read. */
static int run_chat(session *s, attn_sampler *sampler, const run_options *o)
{
    char *line = NULL;
    size_t room = 0;
    int first = 1, result = 0, tty = isatty(STDIN_FILENO);
    if (tty) {
        fprintf(stderr, "Type a message; an empty line or Ctrl-D ends the chat.\n");
    }
    while (result == 0 && !session_interrupted()) {
        if (tty) {
            fprintf(stderr, "> ");
            fflush(stderr);
        }
        ssize_t length = getline(&line, &room, stdin);
        if (length <= 1) {
            break;
        }
        line[length - 1] = line[length - 1] == '\n' ? '\0' : line[length - 1];
        attn_chat_message messages[] = {{"system", o->system}, {"user", line}};
        int skip = o->system == NULL || !first;
        char *rendered = NULL;
        int32_t *tokens = NULL;
        int64_t count = 0;
        run_stats stats = {0};
        cli_text answer = {NULL, 0};
        cli_text_add(&answer, "%s", "");
        attn_status status;
        if (first) {
            status = attn_chat_render(s->tokenizer, messages + skip, 2 - skip, 1, &rendered);
        } else { /* rendered after the assistant's turn, so that no default system message is added again */
            attn_chat_message turn[] = {{"assistant", ""}, {"user", line}};
            char *before = NULL;
            status = attn_chat_render(s->tokenizer, turn, 2, 1, &rendered);
            if (status == ATTN_OK) {
                status = attn_chat_render(s->tokenizer, turn, 1, 0, &before);
            }
            if (status == ATTN_OK) {
                memmove(rendered, rendered + strlen(before), strlen(rendered) - strlen(before) + 1);
            }
            attn_text_free(before);
        }
        if (status == ATTN_OK) {
            status = to_tokens(s, rendered, strlen(rendered), 1, first, &tokens, &count);
        }
        int32_t end = attn_tokenizer_find(s->tokenizer, "<|im_end|>");
        end = end < 0 ? attn_tokenizer_find(s->tokenizer, "<end_of_turn>") : end;
        end = end < 0 ? attn_tokenizer_find(s->tokenizer, "<|eot_id|>") : end;
        if (status == ATTN_OK) {
            status = generate(s, sampler, o, tokens, count, &answer, &stats);
        }
        if (status == ATTN_OK && end >= 0) {
            status = feed(s, &end, 1); /* the end of the answer is part of the conversation */
        }
        if (status != ATTN_OK && status != ATTN_ERR_CANCELLED) {
            result = cli_library_error();
        } else if (o->stats) {
            print_stats(s, &stats);
        }
        first = 0;
        attn_tokens_free(tokens);
        attn_text_free(rendered);
        free(answer.data);
    }
    free(line);
    return result;
}

static int parse_double(const char *option, const char *text, double *value)
{
    char *end;
    *value = strtod(text, &end);
    if (end == text || *end != '\0') {
        cli_usage_error("run", "%s %s: expected a number", option, text);
        return 0;
    }
    return 1;
}

int cli_run(int argc, char **argv)
{
    enum { CHAT = 256, SYSTEM, TEMPERATURE, TOP_K, TOP_P, MIN_P, REPEAT, SEED, STATS, JSON, IGNORE_END };
    static const struct option options[] = {{"prompt", required_argument, NULL, 'p'},
                                            {"file", required_argument, NULL, 'f'},
                                            {"tokens", required_argument, NULL, 'n'},
                                            {"chat", no_argument, NULL, CHAT},
                                            {"system", required_argument, NULL, SYSTEM},
                                            {"temperature", required_argument, NULL, TEMPERATURE},
                                            {"top-k", required_argument, NULL, TOP_K},
                                            {"top-p", required_argument, NULL, TOP_P},
                                            {"min-p", required_argument, NULL, MIN_P},
                                            {"repeat-penalty", required_argument, NULL, REPEAT},
                                            {"seed", required_argument, NULL, SEED},
                                            {"stats", no_argument, NULL, STATS},
                                            {"json", no_argument, NULL, JSON},
                                            {"ignore-end", no_argument, NULL, IGNORE_END},
                                            SESSION_OPTIONS,
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    run_options o = {.tokens = 256};
    attn_sampler_defaults(&o.sampler);
    int option, ok = 1;
    long number;
    while (ok && (option = getopt_long(argc, argv, "p:f:n:h", options, NULL)) != -1) {
        switch (option) {
        case 'p': o.prompt = optarg; break;
        case 'f': o.file = optarg; break;
        case 'n': ok = cli_parse_int("run", "--tokens", optarg, 1, 1L << 24, &o.tokens); break;
        case CHAT: o.chat = 1; break;
        case SYSTEM: o.system = optarg; o.chat = 1; break;
        case TEMPERATURE: ok = parse_double("--temperature", optarg, &o.sampler.temperature); break;
        case TOP_K: ok = cli_parse_int("run", "--top-k", optarg, 0, 1L << 24, &number), o.sampler.top_k = ok ? number : 0; break;
        case TOP_P: ok = parse_double("--top-p", optarg, &o.sampler.top_p); break;
        case MIN_P: ok = parse_double("--min-p", optarg, &o.sampler.min_p); break;
        case REPEAT: ok = parse_double("--repeat-penalty", optarg, &o.sampler.repeat_penalty); break;
        case SEED: ok = cli_parse_int("run", "--seed", optarg, 0, 1L << 62, &number), o.sampler.seed = ok ? (uint64_t)number : 0; break;
        case STATS: o.stats = 1; break;
        case JSON: o.json = 1; break;
        case IGNORE_END: o.ignore_end = 1; break;
        case 'h': fputs(help, stdout); return 0;
        default: ok = session_option("run", &o.session, option, optarg);
        }
    }
    if (!ok) {
        return 2;
    }
    if (optind != argc - 1) {
        return cli_usage_error("run", "one MODEL.gguf is needed");
    }
    o.session.model = argv[optind];
    session s;
    int result = session_open(&s, &o.session, 1, show_progress, NULL);
    if (result != 0) {
        return result;
    }
    attn_sampler *sampler;
    if (attn_sampler_create(&sampler, &o.sampler, attn_model_get_info(s.model)->vocabulary) != ATTN_OK) {
        result = cli_library_error();
    } else {
        result = o.prompt != NULL || o.file != NULL ? run_once(&s, sampler, &o) : run_chat(&s, sampler, &o);
        attn_sampler_destroy(sampler);
    }
    session_close(&s);
    return result;
}
