/* Timing mechanisms on random inputs made from their own tables. */
#include "cli.h"

#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char help[] =
    "Usage: attn bench [OPTION]... [SPEC]...\n"
    "       attn bench --machine\n"
    "       attn bench --plan PLAN [--dim D] [--threads N]     (the same as attn plan time)\n\n"
    "Time mechanisms on random inputs beside exact attention, in one run: time, GFLOP/s of the work that the mechanism\n"
    "counts, its share of this machine's measured multiply-add peak, and the speed-up over dense on the same inputs.\n"
    "Without SPEC: dense and every mechanism that needs only q, k, v and default parameters.\n\n"
    "  -n, --tokens N[,N...]   sequence lengths (default: 2048)\n"
    "  -d, --width N           width of a head (default: 64)\n"
    "  --heads N               query heads (default: 8)\n"
    "  --kv-heads N            key/value heads (default: as many as query heads)\n"
    "  --full                  compare with attention over all keys instead of causal\n"
    "  --backward              time backward\n"
    "  --repeats N             runs of which the median counts (default: 5)\n"
    "  --threads N             threads to use (default: all)\n"
    "  --machine               only the machine: peak and bandwidth on one thread and on all\n\n"
    "Examples:\n"
    "  attn bench --machine\n"
    "  attn bench dense streaming:recent=512 flexprefill:gamma=0.9 -n 4096,16384\n"
    "  attn bench neighborhood:grid=[64,64],kernel=[13,13] -n 4096 --full\n";

typedef struct bench_options {
    int64_t lengths[16];
    int length_count;
    long width, heads, kv_heads, repeats, threads;
    int full, backward;
} bench_options;

/* Sizes of the symbols that tables use. */
static int64_t symbol_size(const bench_options *o, const char *name, size_t length, int64_t n)
{
    struct {
        const char *name;
        int64_t size;
    } sizes[] = {{"B", 1},          {"H", o->heads},  {"G", o->heads}, {"Hkv", o->kv_heads}, {"N", n},     {"M", n},
                 {"T", n},          {"D", o->width},  {"Dv", o->width}, {"I", o->width},      {"J", o->width}, {"C", o->heads * o->width}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (strlen(sizes[i].name) == length && memcmp(sizes[i].name, name, length) == 0) {
            return sizes[i].size;
        }
    }
    return -1;
}

/* A random tensor for a port; 0 when its shape uses a symbol that has no size here. */
static int make_input(const bench_options *o, const attn_port_info *port, int64_t n, attn_tensor *tensor)
{
    int64_t shape[ATTN_MAX_DIMS];
    int ndim = 0;
    for (const char *text = port->shape; *text != '\0';) {
        size_t length = strcspn(text, ",");
        shape[ndim] = symbol_size(o, text, length, n);
        if (shape[ndim++] < 0) {
            return 0;
        }
        text += length + (text[length] == ',');
    }
    *tensor = attn_tensor_make(NULL, ATTN_F32, ndim, shape);
    int64_t count = attn_tensor_count(tensor);
    float *data = malloc((size_t)(count + 1) * sizeof *data);
    tensor->data = data;
    uint64_t state = 88172645463325252u + (uint64_t)(unsigned char)port->name[0];
    for (int64_t i = 0; data != NULL && i < count; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        data[i] = (float)(state >> 40) / 8388608.0f - 1.0f;
    }
    return data != NULL;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Why a mechanism was not timed; NULL when it was. */
static const char *time_one(const bench_options *o, const char *spec, int64_t n, attn_arena *arena, double *seconds, attn_cost *cost)
{
    cli_call call = {0};
    const char *why = NULL;
    if (attn_op_create(&call.op, spec) != ATTN_OK) {
        return attn_last_error();
    }
    const attn_op_info *info = attn_op_get_info(call.op);
    for (int i = 0; i < info->port_count && why == NULL; i++) {
        const attn_port_info *port = &info->ports[i];
        if (port->direction == ATTN_PORT_IN && (port->flags & ATTN_PORT_OPTIONAL) == 0) {
            attn_named_tensor *in = &call.in[call.in_count];
            in->name = port->name;
            if ((port->type != ATTN_PORT_FLOAT && port->type != ATTN_PORT_CACHE) || !make_input(o, port, n, &in->tensor)) {
                why = "it needs inputs that are not made here (see 'attn apply')";
            } else {
                call.memory[call.memory_count++] = in->tensor.data;
                call.in_count++;
            }
        }
    }
    if (why == NULL && o->backward && !info->differentiable) {
        why = "it has no backward";
    }
    double times[101];
    attn_exec exec = {.threads = (int)o->threads, .arena = arena};
    attn_named_tensor grads[2];
    for (int r = -1; r < o->repeats && why == NULL; r++) {
        double start = now();
        attn_status status;
        if (r < 0) { /* warms up, and gives the outputs */
            status = cli_call_run(&call, &exec, 0, NULL);
            if (status == ATTN_OK && o->backward) {
                grads[0] = call.out[0];
                call.grad_out_count = 1;
                call.grad_out[0] = grads[0];
                call.out_count = 0;
                status = cli_call_run(&call, &exec, 0, NULL);
            }
        } else if (o->backward) {
            status = attn_op_backward(call.op, call.in, call.in_count, call.out, call.out_count, call.grad_out, 1, call.grad_in,
                                      call.grad_in_count, &exec);
        } else {
            status = attn_op_forward(call.op, call.in, call.in_count, call.out, call.out_count, &exec);
        }
        if (status != ATTN_OK) {
            why = attn_last_error();
        } else if (r >= 0) {
            times[r] = now() - start;
        }
    }
    if (why == NULL) {
        qsort(times, (size_t)o->repeats, sizeof times[0], by_value);
        *seconds = times[o->repeats / 2];
        if (attn_op_cost(call.op, call.in, call.in_count, cost) != ATTN_OK) {
            *cost = (attn_cost){0};
        }
    }
    cli_call_free(&call);
    return why;
}

static void print_machine(void)
{
    printf("instruction set %s\n", attn_machine_isa());
    printf("1 thread:    multiply-add peak (f32) %7.1f GFLOP/s, read bandwidth %6.1f GB/s\n", attn_machine_peak_flops(1) * 1e-9,
           attn_machine_bandwidth(1) * 1e-9);
    printf("all threads: multiply-add peak (f32) %7.1f GFLOP/s, read bandwidth %6.1f GB/s\n", attn_machine_peak_flops(0) * 1e-9,
           attn_machine_bandwidth(0) * 1e-9);
}

static void print_row(const bench_options *o, const char *spec, int64_t n, attn_arena *arena, double peak, double dense, int quiet)
{
    double seconds;
    attn_cost cost;
    const char *why = time_one(o, spec, n, arena, &seconds, &cost);
    if (why != NULL) {
        if (!quiet) {
            printf("%-40s %7lld   not timed: %s\n", spec, (long long)n, why);
        }
        return;
    }
    double flops = cost.flops * (o->backward ? 2.5 : 1);
    printf("%-40s %7lld  %9.3f ms", spec, (long long)n, seconds * 1e3);
    if (flops > 0) {
        printf("  %7.1f GFLOP/s  %5.1f%% of peak", flops / seconds * 1e-9, 100 * flops / seconds / peak);
    } else {
        printf("  %31s", "");
    }
    printf("  %7.2fx dense\n", dense / seconds);
    fflush(stdout);
}

int cli_bench(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--plan") == 0) {
        argv[0] = "plan";
        argv[1] = "time";
        return cli_plan(argc, argv);
    }
    enum { HEADS = 256, KV_HEADS, FULL, BACKWARD, REPEATS, THREADS, MACHINE };
    static const struct option options[] = {{"tokens", required_argument, NULL, 'n'},    {"width", required_argument, NULL, 'd'},
                                            {"heads", required_argument, NULL, HEADS},   {"kv-heads", required_argument, NULL, KV_HEADS},
                                            {"full", no_argument, NULL, FULL},           {"backward", no_argument, NULL, BACKWARD},
                                            {"repeats", required_argument, NULL, REPEATS}, {"threads", required_argument, NULL, THREADS},
                                            {"machine", no_argument, NULL, MACHINE},     {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    bench_options o = {.lengths = {2048}, .length_count = 1, .width = 64, .heads = 8, .repeats = 5};
    int option, ok = 1, machine = 0;
    while (ok && (option = getopt_long(argc, argv, "n:d:h", options, NULL)) != -1) {
        switch (option) {
        case 'n':
            o.length_count = 0;
            for (char *item = strtok(optarg, ","); ok && item != NULL && o.length_count < 16; item = strtok(NULL, ",")) {
                long n;
                ok = cli_parse_int("bench", "--tokens", item, 1, 1L << 24, &n);
                o.lengths[o.length_count++] = n;
            }
            break;
        case 'd': ok = cli_parse_int("bench", "--width", optarg, 1, 512, &o.width); break;
        case HEADS: ok = cli_parse_int("bench", "--heads", optarg, 1, 4096, &o.heads); break;
        case KV_HEADS: ok = cli_parse_int("bench", "--kv-heads", optarg, 1, 4096, &o.kv_heads); break;
        case FULL: o.full = 1; break;
        case BACKWARD: o.backward = 1; break;
        case REPEATS: ok = cli_parse_int("bench", "--repeats", optarg, 1, 101, &o.repeats); break;
        case THREADS: ok = cli_parse_int("bench", "--threads", optarg, 1, 1024, &o.threads); break;
        case MACHINE: machine = 1; break;
        case 'h': fputs(help, stdout); return 0;
        default: return cli_option_error("bench");
        }
    }
    if (!ok) {
        return 2;
    }
    if (machine) {
        print_machine();
        return 0;
    }
    for (int i = optind; i < argc; i++) { /* before anything is measured */
        attn_op *op;
        if (attn_op_create(&op, argv[i]) != ATTN_OK) {
            return cli_library_error();
        }
        attn_op_destroy(op);
    }
    o.kv_heads = o.kv_heads > 0 ? o.kv_heads : o.heads;
    attn_arena *arena;
    if (attn_arena_create(&arena, 0) != ATTN_OK) {
        return cli_library_error();
    }
    double peak = attn_machine_peak_flops((int)o.threads);
    const char *dense_spec = o.full ? "dense" : "dense:causal=true";
    printf("peak %.1f GFLOP/s (%s); B = 1, H = %ld, Hkv = %ld, D = %ld, f32, %s, medians of %ld\n", peak * 1e-9, attn_machine_isa(), o.heads,
           o.kv_heads, o.width, o.backward ? "backward" : "forward", o.repeats);
    int result = 0;
    for (int i = 0; i < o.length_count; i++) {
        double dense;
        attn_cost cost;
        const char *why = time_one(&o, dense_spec, o.lengths[i], arena, &dense, &cost);
        if (why != NULL) {
            result = cli_error("%s", why);
            break;
        }
        print_row(&o, dense_spec, o.lengths[i], arena, peak, dense, 0);
        for (int j = optind; j < argc; j++) {
            if (strcmp(argv[j], "dense") != 0) {
                print_row(&o, argv[j], o.lengths[i], arena, peak, dense, 0);
            }
        }
        for (int j = 0; optind == argc && j < attn_op_count(); j++) {
            if (strcmp(attn_op_at(j)->name, "dense") != 0) {
                print_row(&o, attn_op_at(j)->name, o.lengths[i], arena, peak, dense, 1);
            }
        }
    }
    attn_arena_destroy(arena);
    return result;
}
