/* Any text as a mechanism's SPEC, and as a name with JSON parameters. */
#include <attn/op.h>

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);
    memcpy(text, data, size);
    text[size] = '\0';
    attn_op *op;
    if (attn_op_create(&op, text) == ATTN_OK) {
        attn_op_destroy(op);
    }
    if (size > 0) {
        const attn_op_info *info = attn_op_at(data[0] % attn_op_count());
        if (attn_op_create_json(&op, info->name, text + 1) == ATTN_OK) {
            attn_op_destroy(op);
        }
        char *spec = malloc(size + 80);
        strcpy(spec, info->name);
        strcat(spec, ":");
        strcat(spec, text + 1);
        if (attn_op_create(&op, spec) == ATTN_OK) {
            attn_op_destroy(op);
        }
        free(spec);
    }
    free(text);
    return 0;
}
