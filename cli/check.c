#include "cli.h"

#include <dirent.h>
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char help[] =
    "Usage: attn check [OPTION]... PATH...\n\n"
    "Run the cases in safetensors files (a folder stands for all files below it) and compare. Each file holds inputs\n"
    "in.NAME, expected outputs out.NAME, and in its metadata the mechanism, its params (JSON), rtol and atol. A value passes\n"
    "when |got - want| <= atol + rtol * |want|; whole numbers and booleans must be equal.\n\n"
    "  --threads N   threads to use (default: all)\n"
    "  -v            print the passing cases too\n\n"
    "Prints each failure and closes with 'N passed, N failed'. Exit status 1 when any failed.\n\n"
    "Example:\n"
    "  attn check tests/golden\n";

typedef struct totals {
    int passed, failed, verbose;
    attn_exec exec;
} totals;

static void fail(totals *t, const char *path, const char *what)
{
    printf("FAIL %s: %s\n", path, what);
    t->failed++;
}

/* Compare one tensor; 0 and a message when it differs. */
static int compare(const char *name, const attn_tensor *got, const attn_tensor *want, double rtol, double atol,
                   char *message, size_t bytes)
{
    if (got->ndim != want->ndim || memcmp(got->shape, want->shape, sizeof got->shape[0] * (size_t)got->ndim) != 0) {
        snprintf(message, bytes, "%s: shapes differ", name);
        return 0;
    }
    int64_t count = attn_tensor_count(want), bad = 0, worst = -1;
    double worst_excess = 0, worst_got = 0, worst_want = 0;
    for (int64_t i = 0; i < count; i++) {
        double g = 0, w = 0, allowed = 0;
        switch (want->dtype) {
        case ATTN_I64:
            g = (double)((const int64_t *)got->data)[i];
            w = (double)((const int64_t *)want->data)[i];
            break;
        case ATTN_BOOL:
            g = ((const uint8_t *)got->data)[i];
            w = ((const uint8_t *)want->data)[i];
            break;
        default:
            g = (double)((const float *)got->data)[i];
            w = (double)((const float *)want->data)[i];
            allowed = atol + rtol * fabs(w);
        }
        if (g == w || (isnan(g) && isnan(w)) || fabs(g - w) <= allowed) {
            continue;
        }
        double excess = isfinite(g) && isfinite(w) ? fabs(g - w) / (allowed > 0 ? allowed : 1) : INFINITY;
        bad++;
        if (worst < 0 || excess > worst_excess) {
            worst = i;
            worst_excess = excess;
            worst_got = g;
            worst_want = w;
        }
    }
    if (bad > 0) {
        snprintf(message, bytes, "%s: %lld of %lld values differ; worst at %lld: got %.9g, want %.9g (%.3g times the tolerance)",
                 name, (long long)bad, (long long)count, (long long)worst, worst_got, worst_want, worst_excess);
    }
    return bad == 0;
}

static const attn_tensor *find(const attn_named_tensor *tensors, int count, const char *name)
{
    for (int i = 0; i < count; i++) {
        if (strcmp(tensors[i].name, name) == 0) {
            return &tensors[i].tensor;
        }
    }
    return NULL;
}

static int compare_all(const cli_call *call, const attn_safetensors *file, double rtol, double atol, char *message,
                       size_t bytes)
{
    for (int i = 0; i < attn_safetensors_count(file); i++) {
        const char *name = attn_safetensors_name(file, i);
        if (strncmp(name, "out.", 4) != 0) {
            continue;
        }
        attn_tensor want, wide;
        if (attn_safetensors_get(file, i, &want) != ATTN_OK) {
            return 0;
        }
        const attn_tensor *got = find(call->out, call->out_count, name + 4);
        if (got == NULL && strncmp(name + 4, "grad_", 5) == 0) {
            got = find(call->grad_in, call->grad_in_count, name + 9);
        }
        if (got == NULL) {
            snprintf(message, bytes, "%s is not among the results", name);
            return 0;
        }
        wide = want; /* in the type that results have */
        wide.dtype = got->dtype;
        void *memory = NULL;
        if (want.dtype != got->dtype) {
            memory = malloc((size_t)attn_tensor_count(&want) * attn_dtype_size(got->dtype) + 1);
            wide.data = memory;
            if (memory == NULL || attn_tensor_copy(&wide, &want) != ATTN_OK) {
                free(memory);
                snprintf(message, bytes, "%s: %s", name, attn_last_error());
                return 0;
            }
        }
        int same = compare(name + 4, got, &wide, rtol, atol, message, bytes);
        free(memory);
        if (!same) {
            return 0;
        }
    }
    return 1;
}

static void check_file(totals *t, const char *path)
{
    attn_safetensors *file;
    if (attn_safetensors_open(&file, path) != ATTN_OK) {
        fail(t, path, attn_last_error());
        return;
    }
    const char *mechanism = attn_safetensors_metadata(file, "mechanism"), *params = attn_safetensors_metadata(file, "params");
    const char *rtol = attn_safetensors_metadata(file, "rtol"), *atol = attn_safetensors_metadata(file, "atol");
    static cli_call call;
    memset(&call, 0, sizeof call);
    char message[1200];
    if (mechanism == NULL) {
        fail(t, path, "its metadata names no mechanism");
    } else if (attn_op_create_json(&call.op, mechanism, params) != ATTN_OK) {
        fail(t, path, attn_last_error());
    } else {
        const char *want[256];
        int want_count = 0;
        for (int i = 0; i < attn_safetensors_count(file) && want_count < 256; i++) {
            const char *name = attn_safetensors_name(file, i);
            if (strncmp(name, "out.", 4) == 0) {
                want[want_count++] = name + 4;
            }
        }
        if (want_count == 0) {
            fail(t, path, "it holds no expected output (out.NAME)");
        } else if (cli_call_inputs(&call, file) != ATTN_OK || cli_call_run(&call, &t->exec, want_count, want) != ATTN_OK) {
            fail(t, path, attn_last_error());
        } else if (!compare_all(&call, file, rtol != NULL ? strtod(rtol, NULL) : 1e-4, atol != NULL ? strtod(atol, NULL) : 1e-5,
                                message, sizeof message)) {
            fail(t, path, message);
        } else {
            t->passed++;
            if (t->verbose) {
                printf("ok   %s\n", path);
            }
        }
    }
    cli_call_free(&call);
    attn_safetensors_close(file);
}

static void check_path(totals *t, const char *path)
{
    struct stat info;
    if (stat(path, &info) != 0) {
        fail(t, path, "no such file or folder");
        return;
    }
    if (!S_ISDIR(info.st_mode)) {
        check_file(t, path);
        return;
    }
    struct dirent **entries;
    int count = scandir(path, &entries, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        const char *name = entries[i]->d_name;
        size_t length = strlen(name);
        cli_text below = {NULL, 0};
        cli_text_add(&below, "%s/%s", path, name);
        if (name[0] != '.' && stat(below.data, &info) == 0 &&
            (S_ISDIR(info.st_mode) || (length > 12 && strcmp(name + length - 12, ".safetensors") == 0))) {
            check_path(t, below.data);
        }
        free(below.data);
        free(entries[i]);
    }
    if (count >= 0) {
        free(entries);
    }
}

int cli_check(int argc, char **argv)
{
    static const struct option options[] = {{"threads", required_argument, NULL, 't'},
                                            {"verbose", no_argument, NULL, 'v'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    totals t = {0};
    int option;
    long threads = 0;
    while ((option = getopt_long(argc, argv, "t:vh", options, NULL)) != -1) {
        switch (option) {
        case 't':
            if (!cli_parse_int("check", "--threads", optarg, 1, 1024, &threads)) {
                return 2;
            }
            break;
        case 'v': t.verbose = 1; break;
        case 'h': fputs(help, stdout); return 0;
        default: return cli_option_error("check");
        }
    }
    if (optind == argc) {
        return cli_usage_error("check", "at least one PATH is needed");
    }
    t.exec.threads = (int)threads;
    for (int i = optind; i < argc; i++) {
        check_path(&t, argv[i]);
    }
    printf("%d passed, %d failed\n", t.passed, t.failed);
    return t.failed > 0;
}
