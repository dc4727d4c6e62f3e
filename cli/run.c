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
    "  --temperature X          0 (default): always the most likely token; above 0: tokens are drawn\n"
    "  --top-k N, --top-p X, --min-p X, --seed N\n"
    "                           which tokens may be drawn (off), and the seed (0)\n"
    "  --repeat-penalty X       above 1: recent tokens become less likely (1)\n"
    SESSION_HELP
    "  --stats                  print speed and memory at the end\n"
    "  --json                   print one JSON object with the text and the statistics instead; with --stats the answer\n"
    "                           goes to standard error as it comes\n"
    "  --ignore-end             go on after the model has ended its text (to measure speed)\n\n"
    "Ctrl-C stops the answer; pressed again, or at the prompt of a chat, it ends the program.\n\n"
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
    int32_t unread; /* the last token, when the context has not got it; -1: none */
    int64_t prompt_tokens, generated;
    double prompt_seconds, first_token_seconds, generate_seconds;
    attn_context_stats prompt, generation;
} run_stats;

/* Not while it generates: that is the answer's place on the terminal. */
static int reading_prompt;

static int show_progress(void *user, double done)
{
    (void)user;
    if (reading_prompt && isatty(STDERR_FILENO) && done < 1) {
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

/* A chat as the model's template writes it goes on after an answer with this: from the end mark of the answer to the
 * beginning of the next one. */
static attn_status next_turn(const session *s, const char *message, char **text)
{
    static const char answer[] = "\001"; /* stands for what the context holds already */
    const attn_chat_message turns[] = {{"assistant", answer}, {"user", message}};
    attn_status status = attn_chat_render(s->tokenizer, turns, 2, 1, text);
    char *end = status == ATTN_OK ? strstr(*text, answer) : NULL;
    if (end != NULL) {
        memmove(*text, end + strlen(answer), strlen(end + strlen(answer)) + 1);
    }
    return status;
}

static attn_status feed(session *s, const int32_t *tokens, int64_t count)
{
    attn_context_batch batch = {.sequence = 0, .tokens = tokens, .count = count};
    return attn_context_eval(s->context, &batch, 1, NULL, NULL);
}

/* Read the prompt, then generate; errors are printed. The answer goes to stdout as it comes (--json: to stderr with
 * --stats, else nowhere); *answer gets all of it. */
static attn_status generate(session *s, attn_sampler *sampler, const run_options *o, const int32_t *prompt, int64_t count,
                            cli_text *answer, run_stats *stats)
{
    double start = now_seconds();
    int64_t room = attn_context_room(s->context, 0);
    stats->unread = -1;
    if (count > room) {
        cli_error("the prompt has %lld tokens, but the context has room for %lld (--ctx N: for N; the model was made for "
                  "%lld)",
                  (long long)count, (long long)room, (long long)attn_model_get_info(s->model)->context_length);
        return ATTN_ERR_ARGUMENT;
    }
    attn_context_reset_stats(s->context);
    for (int64_t i = 0; i < count; i++) {
        attn_sampler_accept(sampler, prompt[i]);
    }
    reading_prompt = 1;
    attn_status status = feed(s, prompt, count);
    reading_prompt = 0;
    clear_progress();
    stats->prompt_seconds = now_seconds() - start;
    stats->prompt_tokens = count;
    FILE *stream = !o->json ? stdout : o->stats ? stderr : NULL;
    stats->prompt = attn_context_get_stats(s->context);
    attn_context_reset_stats(s->context);
    if (status != ATTN_OK) {
        return status == ATTN_ERR_CANCELLED ? status : (cli_library_error(), status);
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
        stats->unread = token;
        if (n + 1 == o->tokens || attn_context_room(s->context, 0) < 1) {
            break;
        }
        status = feed(s, &token, 1);
        if (status != ATTN_OK) {
            break;
        }
        stats->unread = -1;
    }
    stats->generate_seconds = now_seconds() - begin;
    stats->generation = attn_context_get_stats(s->context);
    if (stream != NULL) {
        fwrite(answer->data + shown, 1, answer->length - shown, stream);
        putc('\n', stream);
        fflush(stream);
    }
    if (status != ATTN_OK && status != ATTN_ERR_CANCELLED) {
        cli_library_error();
    } else if (attn_context_room(s->context, 0) < 1) {
        fprintf(stderr, "attn: the context is full (--ctx N: room for N tokens)\n");
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

static void print_result(const session *s, const run_options *o, const run_stats *stats, const cli_text *answer)
{
    if (o->json) {
        print_json(s, stats, answer);
        fflush(stdout);
    } else if (o->stats) {
        print_stats(s, stats);
    }
}

static int run_once(session *s, attn_sampler *sampler, const run_options *o)
{
    cli_text prompt = {NULL, 0}, answer = {NULL, 0};
    cli_text_add(&prompt, "%s", "");
    cli_text_add(&answer, "%s", "");
    if (o->file != NULL) {
        size_t bytes;
        char *text = read_file(o->file, &bytes);
        if (text != NULL && strlen(text) < bytes) {
            cli_error("'%s' is no text in UTF-8: byte %zu is 0", o->file, strlen(text) + 1);
            free(text);
            text = NULL;
        }
        if (text == NULL) {
            free(prompt.data);
            free(answer.data);
            return 1;
        }
        size_t at = 0;
        for (int size = 1; at < bytes && size > 0; at += (size_t)size) {
            size = cli_utf8_size(text + at, bytes - at);
        }
        if (at < bytes) {
            fprintf(stderr, "attn: note: '%s' is not in UTF-8 from byte %zu on: the model may not understand it "
                            "(iconv converts)\n", o->file, at + 1);
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
        int flags = ATTN_TOKENIZE_SPECIAL | (o->chat ? ATTN_TOKENIZE_PARSE : 0);
        status = attn_tokenize(s->tokenizer, text, strlen(text), flags, &tokens, &count);
    }
    if (status != ATTN_OK) {
        cli_library_error();
    } else if (count == 0 || (o->file != NULL && prompt.length == 0)) {
        status = ATTN_ERR_ARGUMENT;
        cli_error("the prompt is empty");
    } else {
        status = generate(s, sampler, o, tokens, count, &answer, &stats);
    }
    if (status == ATTN_OK) {
        print_result(s, o, &stats, &answer);
    }
    attn_tokens_free(tokens);
    attn_text_free(rendered);
    free(prompt.data);
    free(answer.data);
    return session_interrupted() ? 130 : status != ATTN_OK;
}

/* Forget a turn that was not read to its end. Where the cache cannot go back so far the chat begins anew. */
static void forget_turn(session *s, int64_t length)
{
    if (attn_context_length(s->context, 0) > length && attn_context_truncate(s->context, 0, length) != ATTN_OK) {
        attn_context_truncate(s->context, 0, 0);
    }
    if (attn_context_length(s->context, 0) < length) {
        fprintf(stderr, "attn: the chat begins anew\n");
    }
}

/* One message and its answer. */
static attn_status run_turn(session *s, attn_sampler *sampler, const run_options *o, const char *message)
{
    int64_t before = attn_context_length(s->context, 0), count = 0;
    const attn_chat_message messages[] = {{"system", o->system}, {"user", message}};
    int skip = o->system == NULL, flags = ATTN_TOKENIZE_PARSE | (before == 0 ? ATTN_TOKENIZE_SPECIAL : 0);
    char *rendered = NULL;
    int32_t *tokens = NULL;
    cli_text answer = {NULL, 0};
    cli_text_add(&answer, "%s", "");
    run_stats stats = {.unread = -1};
    attn_status status = before == 0 ? attn_chat_render(s->tokenizer, messages + skip, 2 - skip, 1, &rendered)
                                     : next_turn(s, message, &rendered);
    if (status == ATTN_OK) {
        status = attn_tokenize(s->tokenizer, rendered, strlen(rendered), flags, &tokens, &count);
    }
    if (status != ATTN_OK) {
        cli_library_error();
    } else {
        status = generate(s, sampler, o, tokens, count, &answer, &stats);
        if (status == ATTN_OK && stats.unread >= 0 && attn_context_room(s->context, 0) > 0) {
            status = feed(s, &stats.unread, 1);
        }
        if (attn_context_length(s->context, 0) < before + count) {
            forget_turn(s, before);
        }
        if (status == ATTN_OK) {
            print_result(s, o, &stats, &answer);
        }
    }
    attn_tokens_free(tokens);
    attn_text_free(rendered);
    free(answer.data);
    return status;
}

/* One line from the terminal (or a pipe) after another. The conversation stays in the cache: only what is new is read. */
static int run_chat(session *s, attn_sampler *sampler, const run_options *o)
{
    char *line = NULL;
    size_t room = 0;
    int result = 0, tty = isatty(STDIN_FILENO);
    if (tty) {
        fprintf(stderr, "Type a message; an empty line or Ctrl-D ends the chat.\n");
    }
    while (result == 0 && !session_interrupted()) {
        if (tty) {
            fprintf(stderr, "> ");
            fflush(stderr);
        }
        ssize_t length = getline(&line, &room, stdin);
        if (length < 1 || line[0] == '\n') {
            break;
        }
        line[length - 1] = line[length - 1] == '\n' ? '\0' : line[length - 1];
        attn_status status = run_turn(s, sampler, o, line);
        result = status != ATTN_OK && status != ATTN_ERR_CANCELLED;
        if (tty && status != ATTN_OK) {
            result = 0; /* the message was printed: shorter ones may do */
        }
        if (tty) {
            session_resume(); /* Ctrl-C has stopped the answer */
        }
    }
    free(line);
    return session_interrupted() ? 130 : result;
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
