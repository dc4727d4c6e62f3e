#include "cli.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>

static const char help[] =
    "Usage: attn apply NAME --in A.safetensors --out B.safetensors [-p KEY=VALUE]...\n\n"
    "Run the mechanism NAME on the tensors of A and write its outputs to B. Tensors of A carry the names of the mechanism's\n"
    "inputs ('attn describe NAME'), plain or as in.NAME; B uses plain names or out.NAME in the same way. When A also\n"
    "holds gradients of outputs (grad_o), the gradients of the inputs (grad_q ...) are computed too.\n\n"
    "  --in FILE          the inputs\n"
    "  --out FILE         where the outputs go\n"
    "  -p KEY=VALUE       a parameter; lists as [1,2]. May be repeated, and NAME may be a SPEC name:key=value,...\n"
    "                     Without any parameter, those in A's metadata (\"params\") are used when A has them\n"
    "  --threads N        threads to use (default: all)\n\n"
    "Example:\n"
    "  attn apply streaming --in qkv.safetensors --out o.safetensors -p sinks=4 -p recent=256\n";

static int write_results(const cli_call *call, const char *path)
{
    static char names[160][128];
    const char *name_list[160];
    attn_tensor tensors[160];
    int count = 0;
    const char *prefix = call->prefixed ? "out." : "";
    for (int i = 0; i < call->out_count; i++, count++) {
        snprintf(names[count], sizeof names[count], "%s%s", prefix, call->out[i].name);
        tensors[count] = call->out[i].tensor;
    }
    for (int i = 0; i < call->grad_in_count; i++, count++) {
        snprintf(names[count], sizeof names[count], "%sgrad_%s", prefix, call->grad_in[i].name);
        tensors[count] = call->grad_in[i].tensor;
    }
    for (int i = 0; i < count; i++) {
        name_list[i] = names[i];
    }
    const char *key = "mechanism", *value = attn_op_get_info(call->op)->name;
    return attn_safetensors_write(path, count, name_list, tensors, 1, &key, &value) == ATTN_OK ? 0 : cli_library_error();
}

int cli_apply(int argc, char **argv)
{
    static const struct option options[] = {{"in", required_argument, NULL, 'i'},
                                            {"out", required_argument, NULL, 'o'},
                                            {"param", required_argument, NULL, 'p'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    const char *in_path = NULL, *out_path = NULL;
    cli_text params = {NULL, 0};
    long threads = 0;
    int option;
    while ((option = getopt_long(argc, argv, "i:o:p:t:h", options, NULL)) != -1) {
        switch (option) {
        case 'i': in_path = optarg; break;
        case 'o': out_path = optarg; break;
        case 'p': cli_text_add(&params, "%s%s", params.length > 0 ? "," : "", optarg); break;
        case 't':
            if (!cli_parse_int("apply", "--threads", optarg, 1, 1024, &threads)) {
                return 2;
            }
            break;
        case 'h': fputs(help, stdout); return 0;
        default: return cli_option_error("apply");
        }
    }
    if (optind != argc - 1 || in_path == NULL || out_path == NULL) {
        return cli_usage_error("apply", "one NAME, --in and --out are needed");
    }
    const char *name = argv[optind];
    attn_safetensors *file;
    if (attn_safetensors_open(&file, in_path) != ATTN_OK) {
        return cli_library_error();
    }
    cli_text spec = {NULL, 0};
    int has_params = strchr(name, ':') != NULL;
    cli_text_add(&spec, "%s%s%s", name, params.length == 0 ? "" : has_params ? "," : ":",
                 params.length > 0 ? params.data : "");
    static cli_call call;
    const char *stored = attn_safetensors_metadata(file, "params");
    attn_status status = stored != NULL && params.length == 0 && !has_params
                             ? attn_op_create_json(&call.op, name, stored)
                             : attn_op_create(&call.op, spec.data);
    if (status == ATTN_OK) {
        status = cli_call_inputs(&call, file);
    }
    if (status == ATTN_OK) {
        attn_exec exec = {.threads = (int)threads};
        status = cli_call_run(&call, &exec, 0, NULL);
    }
    int result = status == ATTN_OK ? write_results(&call, out_path) : cli_library_error();
    cli_call_free(&call);
    free(params.data);
    free(spec.data);
    attn_safetensors_close(file);
    return result;
}
