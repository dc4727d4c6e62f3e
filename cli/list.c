#include "cli.h"

#include <getopt.h>
#include <string.h>

static const char help[] = "Usage: attn list [PREFIX]\n\n"
                           "The mechanisms whose names begin with PREFIX (default: all), a line each: name, paper, title.\n\n"
                           "Examples:\n"
                           "  attn list\n"
                           "  attn list neighborhood\n";

int cli_list(int argc, char **argv)
{
    static const struct option options[] = {{"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (option == 'h') {
            fputs(help, stdout);
            return 0;
        }
        return cli_option_error("list");
    }
    const char *prefix = optind < argc ? argv[optind] : "";
    int shown = 0;
    for (int i = 0; i < attn_op_count(); i++) {
        const attn_op_info *info = attn_op_at(i);
        if (strncmp(info->name, prefix, strlen(prefix)) == 0) {
            printf("%-22s %-18s %s\n", info->name, info->paper, info->title);
            shown++;
        }
    }
    return shown > 0 ? 0 : cli_error("no mechanism begins with '%s'", prefix);
}
