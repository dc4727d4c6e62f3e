#include "session.h"

#include <getopt.h>
#include <string.h>

static const char help[] = "Usage: attn info MODEL.gguf [--tensors] [--metadata]\n\n"
                           "What a model file holds.\n\n"
                           "  --metadata   every key with its value\n"
                           "  --tensors    every tensor with its type and shape\n";

static void print_metadata(const attn_gguf *file)
{
    for (int64_t i = 0; i < attn_gguf_metadata_count(file); i++) {
        const attn_gguf_metadata *entry = attn_gguf_metadata_at(file, i);
        int64_t whole;
        double real;
        attn_gguf_string text;
        printf("  %-48s ", entry->key);
        if (entry->type == ATTN_GGUF_ARRAY) {
            printf("%lld items\n", (long long)entry->count);
        } else if (entry->type == ATTN_GGUF_STRING && attn_gguf_get_string(file, entry->key, &text) == ATTN_OK) {
            int shown = text.bytes > 60 ? 60 : (int)text.bytes;
            for (int j = 0; j < shown; j++) {
                putchar((unsigned char)text.text[j] < 0x20 ? ' ' : text.text[j]);
            }
            printf("%s\n", text.bytes > 60 ? "..." : "");
        } else if (entry->type != ATTN_GGUF_F32 && entry->type != ATTN_GGUF_F64 && attn_gguf_get_int(file, entry->key, &whole) == ATTN_OK) {
            printf("%lld\n", (long long)whole);
        } else if (attn_gguf_get_float(file, entry->key, &real) == ATTN_OK) {
            printf("%.7g\n", real);
        } else {
            printf("?\n");
        }
    }
}

static void print_tensors(const attn_gguf *file)
{
    for (int64_t i = 0; i < attn_gguf_tensor_count(file); i++) {
        const attn_gguf_tensor *t = attn_gguf_tensor_at(file, i);
        printf("  %-40s %-6s [", t->name, attn_gguf_tensor_type_name(t->type));
        for (int d = t->ndim - 1; d >= 0; d--) {
            printf("%lld%s", (long long)t->shape[d], d > 0 ? ", " : "]\n");
        }
    }
}

int cli_info(int argc, char **argv)
{
    static const struct option options[] = {{"metadata", no_argument, NULL, 'm'}, {"tensors", no_argument, NULL, 't'},
                                            {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
    int option, metadata = 0, tensors = 0;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case 'm': metadata = 1; break;
        case 't': tensors = 1; break;
        case 'h': fputs(help, stdout); return 0;
        default: return cli_option_error("info");
        }
    }
    if (optind != argc - 1) {
        return cli_usage_error("info", "one MODEL.gguf is needed");
    }
    attn_gguf *file;
    if (attn_gguf_open(&file, argv[optind]) != ATTN_OK) {
        return cli_library_error();
    }
    attn_gguf_string name = {"?", 1}, architecture = {"?", 1};
    attn_gguf_get_string(file, "general.name", &name);
    attn_gguf_get_string(file, "general.architecture", &architecture);
    printf("GGUF version %d, %lld tensors: %.*s (%.*s)\n", attn_gguf_version(file), (long long)attn_gguf_tensor_count(file),
           (int)name.bytes, name.text, (int)architecture.bytes, architecture.text);
    if (metadata) {
        print_metadata(file);
    }
    if (tensors) {
        print_tensors(file);
    }
    attn_gguf_close(file);
    attn_model *model;
    if (attn_model_open(&model, argv[optind], NULL) != ATTN_OK) {
        return cli_error("this model cannot be run: %s", attn_last_error());
    }
    const attn_model_info *info = attn_model_get_info(model);
    int windowed = 0;
    for (int64_t l = 0; l < info->layers; l++) {
        windowed += attn_model_window(model, (int)l) > 0;
    }
    printf("layers %lld (%d with a sliding window), width %lld, heads %lld query / %lld key-value of %lld, feed-forward %lld\n"
           "vocabulary %lld, context %lld tokens, weights %.1f MB\n",
           (long long)info->layers, windowed, (long long)info->width, (long long)info->heads, (long long)info->kv_heads,
           (long long)info->head_width, (long long)info->hidden, (long long)info->vocabulary, (long long)info->context_length,
           (double)info->weight_bytes * 1e-6);
    attn_model_close(model);
    return 0;
}
