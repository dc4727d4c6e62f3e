#include "cli.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char help[] =
    "Usage: attn plan make PATTERN[+PATTERN...] --out PLAN --tokens N [--keys M] [--block B] [--causal]\n"
    "       attn plan select SPEC --in A.safetensors --out PLAN\n"
    "       attn plan info PLAN\n"
    "       attn plan draw PLAN [--item B] [--head H] [--width W] [--png FILE]\n"
    "       attn plan time PLAN [--dim D] [--threads N]\n\n"
    "Sparse plans: which blocks of keys each block of queries sees.\n\n"
    "make    a plan from patterns, joined; --causal cuts the result above the diagonal. Patterns:\n"
    "          full  causal  window:LEFT,RIGHT  streaming:SINKS,RECENT  global:TOKENS  strided:STRIDE,COUNT\n"
    "select  the plan that a mechanism selects for the q, k (and v) of a file\n"
    "info    shape, density, blocks, ideal speed-up\n"
    "draw    as text ('#' full, '+' partly masked, '.' none) or as a picture of at most --width pixels\n"
    "time    attention over the plan beside dense attention on random tensors: predicted and measured speed-up\n\n"
    "Examples:\n"
    "  attn plan make streaming:4,1024+strided:256,0 --causal --tokens 8192 --out a.plan\n"
    "  attn plan draw a.plan --png a.png\n"
    "  attn plan select flexprefill:gamma=0.95 --in qkv.safetensors --out b.plan\n";

typedef struct arguments {
    const char *in, *out, *png;
    long tokens, keys, block, item, head, width, dim, threads;
    int causal;
} arguments;

static int report(attn_status status) { return status == ATTN_OK ? 0 : cli_library_error(); }

/* One pattern: name:A,B */
static int make_pattern(attn_plan **plan, const attn_plan_shape *shape, const char *text, size_t length)
{
    static const struct {
        const char *name;
        int numbers;
    } patterns[] = {{"full", 0}, {"causal", 0}, {"window", 2}, {"streaming", 2}, {"global", 1}, {"strided", 2}};
    char name[32] = "";
    long long a = 0, b = 0;
    char copy[96];
    if (length < sizeof copy) {
        memcpy(copy, text, length);
        copy[length] = '\0';
        int got = sscanf(copy, "%31[a-z]:%lld,%lld", name, &a, &b) - 1;
        for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++) {
            if (strcmp(name, patterns[i].name) == 0 && got == patterns[i].numbers) {
                attn_plan_rule rule = {i == 1, 0, i == 2 ? a : -1, i == 2 ? b : -1};
                return report(i < 3    ? attn_plan_from_rule(plan, shape, &rule)
                              : i == 3 ? attn_plan_streaming(plan, shape, a, b)
                              : i == 4 ? attn_plan_global(plan, shape, a)
                                       : attn_plan_strided(plan, shape, a, b));
            }
        }
    }
    return cli_usage_error("plan", "'%.*s' is not a pattern", (int)length, text);
}

static int make(const char *text, const arguments *a)
{
    if (a->out == NULL || a->tokens < 0) {
        return cli_usage_error("plan", "make needs --out PLAN and --tokens N");
    }
    attn_plan_shape shape = {1, 1, a->tokens, a->keys >= 0 ? a->keys : a->tokens, a->block, a->block};
    attn_plan *plan = NULL;
    int failed = 0;
    while (!failed && *text != '\0') {
        size_t length = strcspn(text, "+");
        attn_plan *next = NULL, *both = NULL;
        failed = make_pattern(&next, &shape, text, length);
        if (!failed && plan != NULL) {
            failed = report(attn_plan_union(&both, plan, next));
            attn_plan_destroy(plan);
            attn_plan_destroy(next);
            plan = both;
        } else if (!failed) {
            plan = next;
        }
        text += length + (text[length] == '+');
    }
    if (!failed && a->causal && plan != NULL) {
        attn_plan *cut;
        failed = report(attn_plan_causal(&cut, plan));
        attn_plan_destroy(plan);
        plan = cut;
    }
    if (!failed) {
        failed = plan != NULL ? report(attn_plan_save(plan, a->out)) : cli_usage_error("plan", "make needs a pattern");
    }
    attn_plan_destroy(plan);
    return failed;
}

static int select_from(const char *spec, const arguments *a)
{
    if (a->in == NULL || a->out == NULL) {
        return cli_usage_error("plan", "select needs --in A.safetensors and --out PLAN");
    }
    attn_safetensors *file;
    attn_plan *plan = NULL;
    cli_call call = {0};
    if (attn_safetensors_open(&file, a->in) != ATTN_OK) {
        return cli_library_error();
    }
    attn_exec exec = {.threads = (int)a->threads};
    attn_status status = attn_op_create(&call.op, spec);
    if (status == ATTN_OK) {
        status = cli_call_inputs(&call, file);
    }
    if (status == ATTN_OK) {
        status = attn_op_select(call.op, call.in, call.in_count, &plan, &exec);
    }
    if (status == ATTN_OK) {
        status = attn_plan_save(plan, a->out);
    }
    int failed = report(status);
    attn_plan_destroy(plan);
    cli_call_free(&call);
    attn_safetensors_close(file);
    return failed;
}

static int info(const attn_plan *plan)
{
    const attn_plan_shape *s = &attn_plan_get_layout(plan)->shape;
    attn_plan_measures m;
    attn_plan_measure(plan, 1, 1, &m);
    printf("queries %lld, keys %lld, blocks of %lld x %lld, %lld batch items, %lld heads\n", (long long)s->n, (long long)s->m,
           (long long)s->block_q, (long long)s->block_k, (long long)s->batch, (long long)s->heads);
    printf("blocks %.0f: %.0f full, %.0f partly masked\n", m.entries, m.full, m.partial);
    printf("pairs %.0f, density %.4g%%; computed %.0f\n", m.pairs, 100 * m.density, m.touched_pairs);
    printf("ideal speed-up %.2f over dense, %.2f over causal dense\n", m.speedup, m.causal_speedup);
    return 0;
}

static int draw(const attn_plan *plan, const arguments *a)
{
    if (a->png != NULL) {
        return report(attn_plan_draw_png(plan, a->item, a->head, a->width > 0 ? a->width : 1024, a->png));
    }
    char *text;
    if (attn_plan_draw_text(plan, a->item, a->head, a->width > 0 ? a->width : 100, &text) != ATTN_OK) {
        return cli_library_error();
    }
    fputs(text, stdout);
    attn_plan_free_text(text);
    return 0;
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* The fastest of three runs; plan NULL: dense. */
static attn_status best_time(const attn_plan *plan, const attn_dense_inputs *in, const attn_tensor *o, const attn_exec *exec, double *best)
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    attn_status status = ATTN_OK;
    *best = 1e30;
    for (int i = 0; i < 3 && status == ATTN_OK; i++) {
        double start = seconds();
        status = plan != NULL ? attn_plan_forward(plan, &settings, in, o, NULL, exec) : attn_dense_forward(&settings, in, o, NULL, exec);
        double took = seconds() - start;
        *best = took < *best ? took : *best;
    }
    return status;
}

static int time_plan(const attn_plan *plan, const arguments *a)
{
    const attn_plan_shape *s = &attn_plan_get_layout(plan)->shape;
    int64_t lists = s->batch * s->heads, longest = s->n > s->m ? s->n : s->m, count = lists * longest * a->dim;
    float *data = malloc((size_t)(count > 0 ? count : 1) * 4 * sizeof *data);
    if (data == NULL) {
        return cli_error("out of memory");
    }
    for (int64_t i = 0; i < count * 4; i++) {
        data[i] = (float)((i * 7919) % 2003) / 1001.5f - 1;
    }
    const int64_t q[] = {s->batch, s->heads, s->n, a->dim}, k[] = {s->batch, s->heads, s->m, a->dim};
    attn_dense_inputs in = {.q = attn_tensor_make(data, ATTN_F32, 4, q), .k = attn_tensor_make(data + count, ATTN_F32, 4, k),
                            .v = attn_tensor_make(data + 2 * count, ATTN_F32, 4, k)};
    attn_tensor o = attn_tensor_make(data + 3 * count, ATTN_F32, 4, q);
    attn_exec exec = {.threads = (int)a->threads};
    attn_plan_measures m;
    double sparse = 0, dense = 0;
    attn_plan_measure(plan, a->dim, a->dim, &m);
    attn_status status = best_time(NULL, &in, &o, &exec, &dense);
    if (status == ATTN_OK) {
        status = best_time(plan, &in, &o, &exec, &sparse);
    }
    if (status == ATTN_OK) {
        printf("dense %.3f ms, plan %.3f ms: speed-up %.2f, predicted %.2f (%.0f%% of it)\n", dense * 1e3, sparse * 1e3, dense / sparse,
               m.speedup, 100 * dense / sparse / m.speedup);
    }
    free(data);
    return report(status);
}

static int with_file(const char *action, const char *path, const arguments *a)
{
    attn_plan *plan;
    if (attn_plan_load(&plan, path) != ATTN_OK) {
        return cli_library_error();
    }
    int failed = strcmp(action, "info") == 0 ? info(plan) : strcmp(action, "draw") == 0 ? draw(plan, a) : time_plan(plan, a);
    attn_plan_destroy(plan);
    return failed;
}

int cli_plan(int argc, char **argv)
{
    static const struct option options[] = {
        {"help", no_argument, NULL, 'h'},         {"in", required_argument, NULL, 'i'},    {"out", required_argument, NULL, 'o'},
        {"png", required_argument, NULL, 'p'},    {"tokens", required_argument, NULL, 'n'}, {"keys", required_argument, NULL, 'm'},
        {"block", required_argument, NULL, 'b'},  {"item", required_argument, NULL, 'I'},  {"head", required_argument, NULL, 'H'},
        {"width", required_argument, NULL, 'w'},  {"dim", required_argument, NULL, 'd'},   {"threads", required_argument, NULL, 't'},
        {"causal", no_argument, NULL, 'c'},       {NULL, 0, NULL, 0}};
    arguments a = {.tokens = -1, .keys = -1, .block = 64, .dim = 64};
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        long *number = NULL, low = 0, high = 1L << 31;
        switch (option) {
        case 'h': fputs(help, stdout); return 0;
        case 'i': a.in = optarg; break;
        case 'o': a.out = optarg; break;
        case 'p': a.png = optarg; break;
        case 'c': a.causal = 1; break;
        case 'n': number = &a.tokens; break;
        case 'm': number = &a.keys; break;
        case 'b': number = &a.block, low = 1, high = 1L << 20; break;
        case 'I': number = &a.item; break;
        case 'H': number = &a.head; break;
        case 'w': number = &a.width, low = 1, high = 1L << 14; break;
        case 'd': number = &a.dim, low = 1, high = 4096; break;
        case 't': number = &a.threads, low = 1, high = 1024; break;
        default: return cli_option_error("plan");
        }
        if (number != NULL && !cli_parse_int("plan", argv[optind - 2], optarg, low, high, number)) {
            return 2;
        }
    }
    if (argc - optind != 2) {
        return cli_usage_error("plan", "expected an action and a plan, pattern or mechanism");
    }
    const char *action = argv[optind], *what = argv[optind + 1];
    if (strcmp(action, "make") == 0) {
        return make(what, &a);
    }
    if (strcmp(action, "select") == 0) {
        return select_from(what, &a);
    }
    if (strcmp(action, "info") == 0 || strcmp(action, "draw") == 0 || strcmp(action, "time") == 0) {
        return with_file(action, what, &a);
    }
    return cli_usage_error("plan", "there is no action '%s'", action);
}
