#include "cli.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* In the order in which `attn --help` shows them. */
static const cli_command commands[] = {
    {"run", cli_run, "generate text or chat with a language model (GGUF)"},
    {"perplexity", cli_perplexity, "how well a model predicts a text, also with sparse attention"},
    {"needle", cli_needle, "whether a model finds a sentence hidden in a long text"},
    {"heads", cli_heads, "which heads of a model copy from the context, and what it loses without them"},
    {"tokenize", cli_tokenize, "token ids of a text"},
    {"info", cli_info, "what a model file holds"},
    {"list", cli_list, "the mechanisms"},
    {"describe", cli_describe, "one mechanism: parameters, inputs, outputs, paper"},
    {"apply", cli_apply, "run a mechanism on tensors from a file"},
    {"check", cli_check, "compare mechanisms with files of expected results"},
    {"bench", cli_bench, "time mechanisms beside exact attention"},
    {"lab", cli_lab, "experiments that reproduce what papers claim"},
    {"plan", cli_plan, "make, draw, describe and time sparse plans"},
};

#define COMMAND_COUNT (sizeof commands / sizeof commands[0])

int cli_error(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("attn: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return 1;
}

int cli_library_error(void)
{
    const char *message = attn_last_error();
    return cli_error("%s", message[0] != '\0' ? message : "out of memory"); /* only the command's own allocations leave no message */
}

int cli_usage_error(const char *command, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "attn %s: ", command);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\nSee 'attn %s --help'.\n", command);
    va_end(arguments);
    return 2;
}

int cli_option_error(const char *command)
{
    fprintf(stderr, "See 'attn %s --help'.\n", command);
    return 2;
}

int cli_parse_int(const char *command, const char *option, const char *text, long min, long max, long *value)
{
    char *end;
    errno = 0;
    long parsed = strtol(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || parsed < min || parsed > max) {
        cli_usage_error(command, "%s %s: expected a whole number from %ld to %ld", option, text, min, max);
        return 0;
    }
    *value = parsed;
    return 1;
}

void cli_text_add(cli_text *text, const char *format, ...)
{
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    size_t more = (size_t)vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    char *grown = realloc(text->data, text->length + more + 1);
    if (grown == NULL) {
        cli_error("out of memory");
        exit(1);
    }
    text->data = grown;
    vsnprintf(grown + text->length, more + 1, format, again);
    va_end(again);
    text->length += more;
}

int cli_utf8_size(const char *text, size_t length)
{
    const unsigned char *c = (const unsigned char *)text;
    if (length == 0 || (c[0] >= 0x80 && c[0] < 0xc2) || c[0] > 0xf4) {
        return 0;
    }
    int size = c[0] < 0x80 ? 1 : c[0] < 0xe0 ? 2 : c[0] < 0xf0 ? 3 : 4;
    for (int i = 1; i < size; i++) {
        /* The second byte excludes long spellings, surrogates and what lies beyond Unicode. */
        int low = i > 1 ? 0x80 : c[0] == 0xe0 ? 0xa0 : c[0] == 0xf0 ? 0x90 : 0x80;
        int high = i > 1 ? 0xbf : c[0] == 0xed ? 0x9f : c[0] == 0xf4 ? 0x8f : 0xbf;
        if ((size_t)i >= length || c[i] < low || c[i] > high) {
            return 0;
        }
    }
    return size;
}

void cli_print_json_text(const char *text)
{
    size_t length = strlen(text);
    putchar('"');
    for (size_t i = 0; i < length;) {
        unsigned char c = (unsigned char)text[i];
        int size = cli_utf8_size(text + i, length - i);
        if (c == '"' || c == '\\') {
            printf("\\%c", c);
        } else if (c < 0x20) {
            printf("\\u%04x", c);
        } else if (size == 0) {
            fputs("\\ufffd", stdout);
        } else {
            fwrite(text + i, 1, (size_t)size, stdout);
        }
        i += size > 0 ? (size_t)size : 1;
    }
    putchar('"');
}

static void print_help(FILE *out)
{
    fprintf(out, "attn %s: attention on CPUs\n\nUsage: attn COMMAND [ARGUMENT...]\n\nCommands:\n", attn_version());
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        fprintf(out, "  %-12s %s\n", commands[i].name, commands[i].line);
    }
    fputs("\n'attn COMMAND --help' explains a command, with examples.\n"
          "ATTN_ISA=scalar|avx2|avx512 in the environment chooses the instruction set, OMP_NUM_THREADS the threads.\n",
          out);
}

/* OpenMP threads wait for each other by spinning for milliseconds before they sleep, which is ruinous where other programs want the
 * processors too (a language model was 4 times slower beside another one), and gains little. The runtime reads its settings before
 * main(), hence the new start. OMP_WAIT_POLICY or GOMP_SPINCOUNT in the environment overrule this. */
static void wait_briefly(char **argv)
{
    if (getenv("OMP_WAIT_POLICY") == NULL && getenv("GOMP_SPINCOUNT") == NULL && setenv("GOMP_SPINCOUNT", "500", 0) == 0) {
        execv("/proc/self/exe", argv);
    }
}

int main(int argc, char **argv)
{
    wait_briefly(argv);
    if (argc < 2) {
        print_help(stderr);
        return 2;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        print_help(stdout);
        return 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("attn %s\n", attn_version());
        return 0;
    }
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) {
            char name[32]; /* getopt's messages begin with it */
            snprintf(name, sizeof name, "attn %s", commands[i].name);
            argv[1] = name;
            return commands[i].run(argc - 1, argv + 1);
        }
    }
    fprintf(stderr, "attn: there is no command '%s'\n\n", argv[1]);
    print_help(stderr);
    return 2;
}
