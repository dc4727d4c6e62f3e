/* What a mechanism's table says, as text, Markdown (docs/mechanisms.md) or JSON. */
#include "cli.h"

#include <getopt.h>
#include <math.h>
#include <string.h>

static const char help[] = "Usage: attn describe [--json | --markdown] NAME...\n"
                           "       attn describe --all --markdown\n\n"
                           "What a mechanism is, its parameters, inputs, outputs and paper.\n\n"
                           "  --json       as JSON\n"
                           "  --markdown   as Markdown\n"
                           "  --all        every mechanism\n\n"
                           "Examples:\n"
                           "  attn describe dense\n"
                           "  attn describe --all --markdown > docs/mechanisms.md\n";

static const char *const param_types[] = {"bool", "int", "float", "choice", "list of int", "list of float", "list of bool"};
static const char *const port_types[] = {"float", "float or int8", "int", "bool"};

/* ">= 1, < 5" or the choices; "" when there is no limit. */
static void range_text(const attn_param_info *p, char *text, size_t bytes)
{
    text[0] = '\0';
    if (p->type == ATTN_PARAM_CHOICE) {
        snprintf(text, bytes, "%s", p->choices);
        return;
    }
    if (p->type == ATTN_PARAM_BOOL || p->type == ATTN_PARAM_BOOLS) {
        return;
    }
    size_t used = 0;
    if (isfinite(p->min)) {
        used += (size_t)snprintf(text, bytes, "%s %.10g", p->min_open ? ">" : ">=", p->min);
    }
    if (isfinite(p->max)) {
        snprintf(text + used, bytes - used, "%s%s %.10g", used > 0 ? ", " : "", p->max_open ? "<" : "<=", p->max);
    }
}

static const char *standard_text(const attn_param_info *p)
{
    return p->standard == NULL ? "required" : p->standard_text != NULL ? p->standard_text : p->standard;
}

static const char *port_notes(const attn_port_info *port)
{
    int optional = (port->flags & (ATTN_PORT_OPTIONAL | ATTN_PORT_ON_REQUEST)) != 0;
    int diff = (port->flags & ATTN_PORT_DIFF) != 0;
    return optional ? (diff ? "optional, differentiable" : "optional") : (diff ? "differentiable" : "");
}

static void print_text(const attn_op_info *info)
{
    printf("%s: %s\n%s\n\n%s\n", info->name, info->title, info->paper, info->summary);
    for (int direction = ATTN_PORT_IN; direction <= ATTN_PORT_OUT; direction++) {
        printf("\n%s\n", direction == ATTN_PORT_IN ? "Inputs" : "Outputs");
        for (int i = 0; i < info->port_count; i++) {
            const attn_port_info *port = &info->ports[i];
            if ((int)port->direction == direction) {
                char shape[128];
                snprintf(shape, sizeof shape, "[%s]", port->shape);
                printf("  %-12s %-20s %-14s %s%s%s%s\n", port->name, shape, port_types[port->type], port->help,
                       port_notes(port)[0] ? " (" : "", port_notes(port), port_notes(port)[0] ? ")" : "");
            }
        }
    }
    printf("\nParameters\n");
    for (int i = 0; i < info->param_count; i++) {
        const attn_param_info *p = &info->params[i];
        char range[300];
        range_text(p, range, sizeof range);
        printf("  %-12s %-14s %-14s %s%s%s%s\n", p->name, param_types[p->type], standard_text(p), p->help,
               range[0] ? " (" : "", range, range[0] ? ")" : "");
    }
    if (info->param_count == 0) {
        printf("  none\n");
    }
    printf("\n%s\n", info->differentiable ? "Differentiable." : "No backward.");
}

/* Table cells must not hold a bar. */
static void print_cell(const char *text)
{
    for (; *text != '\0'; text++) {
        fputs(*text == '|' ? "\\|" : (char[]){*text, '\0'}, stdout);
    }
}

static void print_markdown(const attn_op_info *info)
{
    printf("## `%s`\n\n**%s** (%s)%s\n\n%s\n\n", info->name, info->title, info->paper,
           info->differentiable ? ", differentiable" : "", info->summary);
    printf("| port | shape | type | meaning |\n| --- | --- | --- | --- |\n");
    for (int i = 0; i < info->port_count; i++) {
        const attn_port_info *port = &info->ports[i];
        printf("| %s `%s` | [", port->direction == ATTN_PORT_IN ? "in" : "out", port->name);
        print_cell(port->shape);
        printf("] | %s | ", port_types[port->type]);
        print_cell(port->help);
        printf("%s%s%s |\n", port_notes(port)[0] ? " (" : "", port_notes(port), port_notes(port)[0] ? ")" : "");
    }
    if (info->param_count > 0) {
        printf("\n| parameter | type | default | meaning |\n| --- | --- | --- | --- |\n");
    }
    for (int i = 0; i < info->param_count; i++) {
        const attn_param_info *p = &info->params[i];
        char range[300];
        range_text(p, range, sizeof range);
        printf("| `%s` | %s | %s | ", p->name, param_types[p->type], standard_text(p));
        print_cell(p->help);
        printf("%s", range[0] ? " (" : "");
        print_cell(range);
        printf("%s |\n", range[0] ? ")" : "");
    }
    printf("\n");
}

static void print_json_field(const char *key, const char *value, const char *after)
{
    printf("\"%s\": ", key);
    if (value == NULL) {
        printf("null");
    } else {
        cli_print_json_text(value);
    }
    fputs(after, stdout);
}

static void print_json(const attn_op_info *info)
{
    printf("{");
    print_json_field("name", info->name, ", ");
    print_json_field("title", info->title, ", ");
    print_json_field("paper", info->paper, ", ");
    print_json_field("summary", info->summary, ", ");
    printf("\"differentiable\": %s, \"ports\": [", info->differentiable ? "true" : "false");
    for (int i = 0; i < info->port_count; i++) {
        const attn_port_info *port = &info->ports[i];
        printf("%s{", i > 0 ? ", " : "");
        print_json_field("direction", port->direction == ATTN_PORT_IN ? "in" : "out", ", ");
        print_json_field("name", port->name, ", ");
        print_json_field("shape", port->shape, ", ");
        print_json_field("type", port_types[port->type], ", ");
        printf("\"optional\": %s, \"differentiable\": %s, ", (port->flags & ATTN_PORT_OPTIONAL) ? "true" : "false",
               (port->flags & ATTN_PORT_DIFF) ? "true" : "false");
        print_json_field("help", port->help, "}");
    }
    printf("], \"params\": [");
    for (int i = 0; i < info->param_count; i++) {
        const attn_param_info *p = &info->params[i];
        char range[300];
        range_text(p, range, sizeof range);
        printf("%s{", i > 0 ? ", " : "");
        print_json_field("name", p->name, ", ");
        print_json_field("type", param_types[p->type], ", ");
        print_json_field("default", p->standard, ", ");
        print_json_field("default_text", p->standard_text, ", ");
        print_json_field("range", range, ", ");
        print_json_field("help", p->help, "}");
    }
    printf("]}");
}

int cli_describe(int argc, char **argv)
{
    static const struct option options[] = {{"json", no_argument, NULL, 'j'},
                                            {"markdown", no_argument, NULL, 'm'},
                                            {"all", no_argument, NULL, 'a'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    int option, format = 't', all = 0;
    while ((option = getopt_long(argc, argv, "jmah", options, NULL)) != -1) {
        switch (option) {
        case 'j':
        case 'm': format = option; break;
        case 'a': all = 1; break;
        case 'h': fputs(help, stdout); return 0;
        default: return cli_option_error("describe");
        }
    }
    if (!all && optind == argc) {
        return cli_usage_error("describe", "a NAME or --all is needed");
    }
    int count = all ? attn_op_count() : argc - optind;
    if (format == 'm' && all) {
        printf("# Mechanisms\n\nGenerated by `attn describe --all --markdown` from the mechanisms' own tables.\n\n");
    }
    if (format == 'j') {
        printf("[");
    }
    for (int i = 0; i < count; i++) {
        const attn_op_info *info = all ? attn_op_at(i) : attn_op_find(argv[optind + i]);
        if (info == NULL) {
            return cli_error("there is no mechanism '%s' ('attn list' shows them)", argv[optind + i]);
        }
        if (format == 'j') {
            printf("%s", i > 0 ? ",\n " : "");
            print_json(info);
        } else if (format == 'm') {
            print_markdown(info);
        } else {
            printf("%s", i > 0 ? "\n\n" : "");
            print_text(info);
        }
    }
    printf("%s", format == 'j' ? "]\n" : "");
    return 0;
}
