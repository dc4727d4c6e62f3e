/* A model, its tokenizer and a context, as the commands for language models share them. */
#ifndef ATTN_CLI_SESSION_H
#define ATTN_CLI_SESSION_H

#include "cli.h"

typedef struct session_options {
    const char *model, *cache, *attention, *decode_attention, *policy;
    long ctx, threads, chunk;
} session_options;

typedef struct session {
    attn_model *model;
    attn_tokenizer *tokenizer;
    attn_context *context;
    attn_policy *policy;
    long threads;
} session;

/* The options of all such commands, for getopt_long tables and help texts. Their values start at SESSION_OPTION. */
#define SESSION_OPTION 1000
#define SESSION_MODEL_OPTIONS                                                                                          \
    {"ctx", required_argument, NULL, SESSION_OPTION}, {"threads", required_argument, NULL, SESSION_OPTION + 1},        \
        {"cache", required_argument, NULL, SESSION_OPTION + 2}, {"chunk", required_argument, NULL, SESSION_OPTION + 6}
#define SESSION_MODEL_HELP                                                                                             \
    "  --ctx N                  tokens that fit (default: what the model was made for, at most 32768)\n"               \
    "  --threads N              threads to use (default: all)\n"                                                       \
    "  --cache TYPE             keys and values in f32, f16 (default), bf16 or i8\n"                                   \
    "  --chunk N                tokens of the prompt read together (default: 512; flexprefill chooses for 8192 together)\n"
/* With the choice of attention mechanisms. */
#define SESSION_OPTIONS                                                                                                \
    SESSION_MODEL_OPTIONS, {"attention", required_argument, NULL, SESSION_OPTION + 3},                                 \
        {"decode-attention", required_argument, NULL, SESSION_OPTION + 4}, {"policy", required_argument, NULL, SESSION_OPTION + 5}
#define SESSION_HELP                                                                                                   \
    SESSION_MODEL_HELP                                                                                                 \
    "  --attention SPEC         mechanism while reading the prompt, name:key=value,... (default: dense)\n"             \
    "  --decode-attention SPEC  mechanism while generating (default: dense); with streaming the cache forgets, and with\n" \
    "                           streaming:positions=cache the kept keys are numbered anew, so that the text may grow\n"   \
    "                           without end (in --attention too: prompts of any length)\n"                                \
    "  --policy FILE            both, per layer and head, from a JSON file\n"

/* Take one of the options above; 0 and a message when its value is wrong. */
int session_option(const char *command, session_options *options, int option, const char *value);
/* 0 when open; prints what is wrong otherwise. */
int session_open(session *s, const session_options *options, int sequences, attn_progress progress, void *user);
void session_close(session *s);
/* The whole of a file ("-": standard input), 0-terminated, to be freed; NULL and a message on failure. */
char *read_file(const char *path, size_t *bytes);
/* Ctrl-C was pressed (handled from session_open on), since session_resume() was called. */
int session_interrupted(void);
void session_resume(void);
double now_seconds(void);

#endif
