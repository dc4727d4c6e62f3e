#include "session.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number)
{
    (void)signal_number;
    if (interrupted) { /* pressed again: now */
        _Exit(130);
    }
    interrupted = 1;
}

int session_interrupted(void) { return interrupted; }

void session_resume(void) { interrupted = 0; }

double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int session_option(const char *command, session_options *o, int option, const char *value)
{
    switch (option) {
    case SESSION_OPTION: return cli_parse_int(command, "--ctx", value, 1, 1L << 24, &o->ctx);
    case SESSION_OPTION + 1: return cli_parse_int(command, "--threads", value, 1, 1024, &o->threads);
    case SESSION_OPTION + 2: o->cache = value; return 1;
    case SESSION_OPTION + 3: o->attention = value; return 1;
    case SESSION_OPTION + 4: o->decode_attention = value; return 1;
    case SESSION_OPTION + 5: o->policy = value; return 1;
    case SESSION_OPTION + 6: return cli_parse_int(command, "--chunk", value, 1, 65536, &o->chunk);
    default: cli_option_error(command); return 0;
    }
}

int session_open(session *s, const session_options *o, int sequences, attn_progress progress, void *user)
{
    *s = (session){.threads = o->threads};
    if (o->policy != NULL && (o->attention != NULL || o->decode_attention != NULL)) {
        return cli_error("--policy excludes --attention and --decode-attention");
    }
    attn_context_settings settings = {.length = o->ctx, .sequences = sequences, .chunk = o->chunk, .threads = (int)o->threads,
                                      .cache = ATTN_F16, .progress = progress, .user = user};
    if (o->cache != NULL && attn_dtype_parse(o->cache, &settings.cache) != ATTN_OK) {
        return cli_error("--cache %s: expected f32, f16, bf16 or i8", o->cache);
    }
    attn_model_settings model_settings = {.threads = (int)o->threads};
    attn_status status = attn_model_open(&s->model, o->model, &model_settings);
    if (status == ATTN_OK) {
        status = attn_tokenizer_from_gguf(&s->tokenizer, attn_model_file(s->model));
    }
    if (status == ATTN_OK) {
        status = attn_context_create(&s->context, s->model, &settings);
    }
    if (status == ATTN_OK && o->policy != NULL) {
        status = attn_policy_load(&s->policy, s->model, o->policy);
    } else if (status == ATTN_OK && (o->attention != NULL || o->decode_attention != NULL)) {
        status = attn_policy_create(&s->policy, s->model, o->attention, o->decode_attention);
    }
    if (status == ATTN_OK && s->policy != NULL) {
        status = attn_policy_use(s->policy, s->context);
    }
    if (status != ATTN_OK) {
        session_close(s);
        return cli_library_error();
    }
    struct sigaction action = {.sa_handler = on_interrupt};
    sigaction(SIGINT, &action, NULL);
    return 0;
}

void session_close(session *s)
{
    attn_context_destroy(s->context);
    attn_policy_destroy(s->policy);
    attn_tokenizer_destroy(s->tokenizer);
    attn_model_close(s->model);
    *s = (session){0};
}

char *read_file(const char *path, size_t *bytes)
{
    int is_stdin = strcmp(path, "-") == 0;
    FILE *file = is_stdin ? stdin : fopen(path, "rb");
    if (file == NULL) {
        cli_error("cannot open '%s': %s", path, strerror(errno));
        return NULL;
    }
    char *data = NULL;
    size_t room = 0;
    *bytes = 0;
    for (;;) {
        if (room - *bytes < 65536) {
            room = room * 2 + 131072;
            char *grown = realloc(data, room);
            if (grown == NULL) {
                free(data);
                cli_error("out of memory for '%s'", path);
                data = NULL;
                break;
            }
            data = grown;
        }
        size_t got = fread(data + *bytes, 1, room - *bytes - 1, file);
        *bytes += got;
        if (got == 0) {
            data[*bytes] = '\0';
            break;
        }
    }
    if (data != NULL && ferror(file)) {
        cli_error("cannot read '%s'", path);
        free(data);
        data = NULL;
    }
    if (!is_stdin) {
        fclose(file);
    }
    return data;
}
