/* What the subcommands of attn share. */
#ifndef ATTN_CLI_H
#define ATTN_CLI_H

#include <attn/attn.h>
#include <stdio.h>

/* A subcommand: argv[0] is its name. Returns the exit status: 0 done, 1 failed, 2 wrong usage. */
typedef struct cli_command {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *line; /* one line for `attn --help` */
} cli_command;

/* Print "attn: MESSAGE" to stderr and return 1. */
int cli_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The library's last error, the same way. */
int cli_library_error(void);
/* "attn: MESSAGE", a hint at --help, return 2. */
int cli_usage_error(const char *command, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same after getopt's own message about an option. */
int cli_option_error(const char *command);
/* Parse a whole number in min ... max; 0 and a message when it is not one. */
int cli_parse_int(const char *command, const char *option, const char *text, long min, long max, long *value);

/* Bytes of the UTF-8 character that a text begins with; 0: it is not valid, or cut off. */
int cli_utf8_size(const char *text, size_t length);
/* A text as a JSON string, quotes included, to stdout. What is not UTF-8 becomes U+FFFD. */
void cli_print_json_text(const char *text);

/* A growing string for SPECs. */
typedef struct cli_text {
    char *data;
    size_t length;
} cli_text;
void cli_text_add(cli_text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));

int cli_apply(int argc, char **argv);
int cli_bench(int argc, char **argv);
int cli_check(int argc, char **argv);
int cli_describe(int argc, char **argv);
int cli_heads(int argc, char **argv);
int cli_info(int argc, char **argv);
int cli_lab(int argc, char **argv);
int cli_list(int argc, char **argv);
int cli_plan(int argc, char **argv);
int cli_needle(int argc, char **argv);
int cli_perplexity(int argc, char **argv);
int cli_run(int argc, char **argv);
int cli_tokenize(int argc, char **argv);

/* Running a mechanism on the tensors of a file (apply and check). */
typedef struct cli_call {
    attn_op *op;
    attn_named_tensor in[80], out[80], grad_out[80], grad_in[80];
    int in_count, out_count, grad_out_count, grad_in_count;
    int prefixed; /* the file names its tensors in.NAME */
    void *memory[160];
    int memory_count;
} cli_call;
/* Sort a file's tensors into inputs and gradients of outputs. */
attn_status cli_call_inputs(cli_call *call, const attn_safetensors *file);
/* Allocate and compute all outputs (or those in `wanted`), and the gradients when there are incoming ones. */
attn_status cli_call_run(cli_call *call, const attn_exec *exec, int want_only_count, const char *const *want_only);
void cli_call_free(cli_call *call);

#endif
