/* Experiments that reproduce what papers claim. */
#include "cli.h"

#include <getopt.h>
#include <string.h>

static const char help[] =
    "Usage: attn lab                 the experiments\n"
    "       attn lab NAME... [OPTION]...\n"
    "       attn lab all [OPTION]...\n\n"
    "Measure on this machine what a paper claims about its mechanism and what needs no trained model. Each claim ends in HOLDS or\n"
    "FAILS with the measured numbers; the exit status is 0 when all hold.\n\n"
    "  --small       sizes that take a second; speed is shown (\"seen\") but not judged\n"
    "  --threads N   threads to use (default: all)\n\n"
    "Examples:\n"
    "  attn lab based\n"
    "  attn lab all --small\n";

static void print_line(void *user, const char *line)
{
    (void)user;
    printf("  %s\n", line);
    fflush(stdout);
}

static int run_one(const char *name, const attn_lab_settings *settings, attn_lab_result *sum)
{
    attn_lab_result result;
    for (int i = 0; i < attn_lab_count(); i++) {
        const attn_lab_info *info = attn_lab_at(i);
        if (strcmp(info->name, name) == 0) {
            printf("%s: %s (%s)\n", info->name, info->title, info->paper);
        }
    }
    if (attn_lab_run(name, settings, &result) != ATTN_OK) {
        return cli_library_error();
    }
    sum->claims += result.claims;
    sum->held += result.held;
    return 0;
}

int cli_lab(int argc, char **argv)
{
    static const struct option options[] = {{"small", no_argument, NULL, 's'}, {"threads", required_argument, NULL, 't'},
                                            {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
    attn_lab_settings settings = {.print = print_line};
    attn_lab_result sum = {0};
    long threads = 0;
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case 's': settings.small = 1; break;
        case 't':
            if (!cli_parse_int("lab", "--threads", optarg, 1, 1024, &threads)) {
                return 2;
            }
            settings.threads = (int)threads;
            break;
        case 'h': fputs(help, stdout); return 0;
        default: return cli_option_error("lab");
        }
    }
    for (int i = 0; i < attn_lab_count() && optind == argc; i++) {
        const attn_lab_info *info = attn_lab_at(i);
        printf("%-16s %s (%s)\n", info->name, info->title, info->paper);
    }
    int result = 0;
    for (int a = optind; a < argc && result == 0; a++) {
        if (strcmp(argv[a], "all") != 0) {
            result = run_one(argv[a], &settings, &sum);
            continue;
        }
        for (int i = 0; i < attn_lab_count() && result == 0; i++) {
            result = run_one(attn_lab_at(i)->name, &settings, &sum);
        }
    }
    if (result == 0 && optind < argc) {
        printf("%d of %d claims hold\n", sum.held, sum.claims);
        result = sum.held < sum.claims;
    }
    return result;
}
