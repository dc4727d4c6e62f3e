#include "session.h"

#include <getopt.h>
#include <stdlib.h>

static const char help[] = "Usage: attn tokenize MODEL.gguf FILE\n\n"
                           "The token ids of a text ('-': standard input), separated by spaces.\n\n"
                           "  --special   add the begin token that the model asks for, and read names like <|im_start|> as tokens\n"
                           "  --text      a line per token instead: id, and its text in quotes\n"
                           "  --count     only how many there are\n\n"
                           "Example:\n"
                           "  echo 'Hello, world' | attn tokenize model.gguf -\n";

int cli_tokenize(int argc, char **argv)
{
    static const struct option options[] = {{"special", no_argument, NULL, 's'}, {"text", no_argument, NULL, 't'},
                                            {"count", no_argument, NULL, 'c'},   {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    int option, special = 0, as_text = 0, only_count = 0;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case 's': special = 1; break;
        case 't': as_text = 1; break;
        case 'c': only_count = 1; break;
        case 'h': fputs(help, stdout); return 0;
        default: return cli_option_error("tokenize");
        }
    }
    if (optind != argc - 2) {
        return cli_usage_error("tokenize", "MODEL.gguf and FILE are needed");
    }
    attn_gguf *file;
    attn_tokenizer *tokenizer = NULL;
    if (attn_gguf_open(&file, argv[optind]) != ATTN_OK || attn_tokenizer_from_gguf(&tokenizer, file) != ATTN_OK) {
        return cli_library_error();
    }
    size_t bytes;
    char *text = read_file(argv[optind + 1], &bytes);
    int32_t *tokens = NULL;
    int64_t count;
    int result = text == NULL;
    if (text != NULL &&
        attn_tokenize(tokenizer, text, bytes, special ? ATTN_TOKENIZE_SPECIAL | ATTN_TOKENIZE_PARSE : 0, &tokens, &count) != ATTN_OK) {
        result = cli_library_error();
    } else if (text != NULL && only_count) {
        printf("%lld\n", (long long)count);
    } else if (text != NULL) {
        for (int64_t i = 0; i < count; i++) {
            size_t length;
            const char *piece = attn_token_text(tokenizer, tokens[i], 1, &length);
            if (as_text) {
                printf("%d \"%.*s\"\n", tokens[i], (int)length, piece);
            } else {
                printf("%s%d", i > 0 ? " " : "", tokens[i]);
            }
        }
        printf("%s", as_text ? "" : "\n");
    }
    attn_tokens_free(tokens);
    free(text);
    attn_tokenizer_destroy(tokenizer);
    attn_gguf_close(file);
    return result;
}
