/* Every mechanism at four sizes beside exact attention: time, ratio to `dense` with the same heads and widths, share of the machine's peak
 * by the mechanism's own account of its work, and the scratch memory of a call beyond its inputs and outputs.
 *     bench_systems [--threads N] [--backward] [--size N] [NAME...]
 */
#include "bench.h"
#include <attn/attn.h>

#include <math.h>

#define HEADS 8
#define WIDTH 64
#define MOST_INPUTS 24

/* In specs and shapes: N tokens, S the side of a square image of N pixels, 2N = 2 * N. `inputs`: "name=shape" with ":u" for numbers in [0, 1],
 * ":s" for small ones (weights), ":t" for token ids below 1000, ":b" for booleans. causal: what dense is compared with. */
typedef struct bench_system {
    const char *spec, *inputs, *outputs;
    int causal;
} bench_system;

#define QKV "q=1,8,N,64 k=1,8,N,64 v=1,8,N,64"
#define LAYER "x=1,N,512 w_qkv=1536,512:s w_proj=512,512:s b_proj=512"

static const bench_system systems[] = {
    {"dense:causal=true", QKV, "o", 1},
    {"streaming:sinks=4,recent=512", QKV, "o", 1},
    {"topk:top_k=256", QKV, "o", 1},
    {"flexprefill:gamma=0.9", QKV, "o", 1},
    {"lightning", QKV " slope=8:u", "o", 1},
    {"tnl:heads=8", "x=1,N,512 w_qkvu=2048,512:s w_o=512,512:s w_1=1408,512:s w_2=1408,512:s w_3=512,1408:s slope=8:u", "o", 1},
    {"rat", QKV " g=1,8,N,64:u", "o", 1},
    {"rat.layer:heads=8", "x=1,N,512 norm_w=512:u w_in=1792,512:s gate_bias=512 w_o=512,512:s", "o", 1},
    {"flow", QKV, "o", 0},
    {"flow:causal=true", QKV, "o", 1},
    {"based", "q=1,8,N,16 k=1,8,N,16 v=1,8,N,64", "o", 1},
    {"based.window:window=128,rotary_dim=64", QKV, "o", 1},
    {"based.conv", "x=1,N,512 in_w=2048,512:s conv_w=1024,3 out_w=512,1024:s", "o", 1},
    {"dsf.attention:phi=elu1,eta=sum", QKV, "o", 1},
    {"dsf.s6", "u=1,N,512 dt=1,N,512:s A_log=512,16 b=1,N,16 c=1,N,16", "o", 1},
    {"davit.window:grid=[S,S]", QKV, "o", 0},
    {"davit.channel", "q=1,8,N,64:s k=1,8,N,64:s v=1,8,N,64", "o", 0},
    {"davit.window_layer:heads=8,grid=[S,S]", LAYER, "o", 0},
    {"agent:grid=[S,S],agent_grid=[7,7]", QKV, "o", 0},
    {"halo:grid=[S,S],block=8,halo=3", QKV " rel_h=27,64 rel_w=27,64", "o", 0},
    {"neighborhood:grid=[S,S],kernel=13", QKV, "o", 0},
    {"neighborhood:grid=[S,S],kernel=24,stride=8", QKV, "o", 0},
    {"moh:shared_heads=2,top_k=2,causal=true", "x=1,N,512 " QKV " wg=6,512:s wg_0=2,512:s wg_1=2,512:s", "o", 1},
    {"bam.moa:heads=8,kv_heads=8,top_k=1", "x=1,N,512 w_router=4,512:s w_q=4,512,512:s w_k=1,512,512:s w_v=1,512,512:s w_o=4,512,512:s", "y", 1},
    {"rcmha:heads=8", "x=1,N,512 w_q=512,512:s w_k=512,512:s w_v=512,512:s conv_q_w=64,3 conv_k_w=64,3 conv_v_w=64,3 w_o=512,512:s", "y", 1},
    {"rcmha.core", QKV " rel_emb=2N,8,64", "o", 1},
    {"softpag:u=0.5", QKV, "o", 0},
    {"mrsa:grid=[S,S]", QKV " k_ref=1,2,8,N,64 v_ref=1,2,8,N,64 ref_mask=2,16,16:u", "o", 0},
    {"disendiff.attention", "q=1,8,N,64 k=1,8,77,64 v=1,8,77,64", "o", 0},
    {"retrieval_head.mask", QKV " heads=8:b", "o", 1},
};

static void *must(void *memory)
{
    if (memory == NULL) {
        fputs("out of memory\n", stderr);
        exit(1);
    }
    return memory;
}

/* Replace N, S and 2N by their numbers. */
static void fill(char *to, size_t room, const char *from, long n)
{
    size_t at = 0;
    for (; *from != '\0' && at + 16 < room; from++) {
        int is_digit = *from >= '0' && *from <= '9';
        if (is_digit && from[1] == 'N') {
            at += (size_t)snprintf(to + at, room - at, "%ld", (*from - '0') * n);
            from++;
        } else if (*from == 'N' || *from == 'S') {
            at += (size_t)snprintf(to + at, room - at, "%ld", *from == 'N' ? n : (long)(sqrt((double)n) + 0.5));
        } else {
            to[at++] = *from;
        }
    }
    to[at] = '\0';
}

static attn_tensor make(const int64_t *shape, int ndim, char kind, uint64_t *seed)
{
    attn_tensor t = attn_tensor_make(NULL, kind == 'b' ? ATTN_BOOL : kind == 't' ? ATTN_I64 : ATTN_F32, ndim, shape);
    int64_t count = attn_tensor_count(&t);
    t.data = must(calloc((size_t)count + 1, attn_dtype_size(t.dtype)));
    for (int64_t i = 0; i < count; i++) {
        *seed = *seed * 6364136223846793005u + 1442695040888963407u;
        double u = (double)(*seed >> 40) / 16777216.0;
        if (t.dtype == ATTN_BOOL) {
            ((uint8_t *)t.data)[i] = i % 4 == 1;
        } else if (t.dtype == ATTN_I64) {
            ((int64_t *)t.data)[i] = (int64_t)(u * 1000);
        } else {
            ((float *)t.data)[i] = (float)(kind == 'u' ? u : (u - 0.5) * (kind == 's' ? 0.1 : 3.46));
        }
    }
    return t;
}

static int parse_inputs(const char *text, attn_named_tensor *in, char *names)
{
    uint64_t seed = 1;
    int count = 0;
    while (*text != '\0') {
        int64_t shape[ATTN_MAX_DIMS];
        int ndim = 0;
        size_t length = strcspn(text, "=");
        memcpy(names, text, length);
        names[length] = '\0';
        in[count].name = names;
        names += length + 1;
        text += length + 1;
        char kind = ' ', *end;
        for (;;) {
            shape[ndim++] = strtol(text, &end, 10);
            text = end;
            if (*text != ',') {
                break;
            }
            text++;
        }
        if (*text == ':') {
            kind = text[1];
            text += 2;
        }
        text += *text == ' ';
        in[count++].tensor = make(shape, ndim, kind, &seed);
    }
    return count;
}

/* The most that the library holds from its allocator. */
static size_t held, most_held;

static void *count_alloc(void *user, size_t bytes)
{
    (void)user;
    size_t *block = malloc(bytes + 64);
    if (block == NULL) {
        return NULL;
    }
    block[0] = bytes;
#pragma omp critical
    {
        held += bytes;
        most_held = held > most_held ? held : most_held;
    }
    return (char *)block + 64;
}

static void count_free(void *user, void *memory)
{
    (void)user;
    if (memory != NULL) {
        size_t *block = (void *)((char *)memory - 64);
#pragma omp critical
        held -= block[0];
        free(block);
    }
}

typedef struct result {
    double seconds, flops, bytes, memory;
} result;

static result measure(const char *spec, const attn_named_tensor *in, int in_count, const char *output, int backward, int threads)
{
    enum { REPEATS = 7 };
    attn_op *op;
    attn_arena *arena;
    attn_named_tensor all[80], out = {NULL, {0}}, grad_in[MOST_INPUTS], grad_out;
    int count = 80, grads = 0;
    result r = {0, 0, 0, 0};
    uint64_t seed = 9;
    if (attn_op_create(&op, spec) != ATTN_OK || attn_op_outputs(op, in, in_count, all, &count) != ATTN_OK ||
        attn_arena_create(&arena, 0) != ATTN_OK) {
        fprintf(stderr, "%s: %s\n", spec, attn_last_error());
        exit(1);
    }
    for (int i = 0; i < count; i++) {
        if (strcmp(all[i].name, output) == 0) {
            out = all[i];
            out.tensor = make(all[i].tensor.shape, all[i].tensor.ndim, ' ', &seed);
        }
    }
    grad_out = (attn_named_tensor){out.name, make(out.tensor.shape, out.tensor.ndim, ' ', &seed)};
    const attn_op_info *info = attn_op_get_info(op);
    for (int i = 0; i < in_count && backward; i++) {
        for (int p = 0; p < info->port_count; p++) {
            if (strcmp(info->ports[p].name, in[i].name) == 0 && info->ports[p].direction == ATTN_PORT_IN &&
                (info->ports[p].flags & ATTN_PORT_DIFF) != 0) {
                grad_in[grads++] = (attn_named_tensor){in[i].name, make(in[i].tensor.shape, in[i].tensor.ndim, ' ', &seed)};
            }
        }
    }
    attn_exec exec = {.threads = threads, .arena = arena};
    double times[REPEATS];
    size_t before = held;
    most_held = held;
    for (int i = -2; i < REPEATS; i++) {
        double start = bench_now(0);
        attn_status status = attn_op_forward(op, in, in_count, &out, 1, &exec);
        if (status == ATTN_OK && backward && grads > 0) {
            start = bench_now(0);
            status = attn_op_backward(op, in, in_count, &out, 1, &grad_out, 1, grad_in, grads, &exec);
        }
        if (status != ATTN_OK) {
            fprintf(stderr, "%s: %s\n", spec, attn_last_error());
            exit(1);
        }
        times[i < 0 ? 0 : i] = bench_now(0) - start;
        if (i == -2) {
            r.memory = (double)(most_held - before);
        }
    }
    r.seconds = bench_median(times, REPEATS);
    attn_cost cost = {0, 0, 0};
    if (!backward && attn_op_cost(op, in, in_count, &cost) == ATTN_OK) {
        r.flops = cost.flops;
        r.bytes = cost.bytes;
    }
    free(out.tensor.data);
    free(grad_out.tensor.data);
    for (int i = 0; i < grads; i++) {
        free(grad_in[i].tensor.data);
    }
    attn_arena_destroy(arena);
    attn_op_destroy(op);
    return r;
}

static void run(const bench_system *s, long n, int backward, int threads, double peak)
{
    char spec[256], inputs[512], names[512], dense_spec[32];
    attn_named_tensor in[MOST_INPUTS], qkv[3];
    uint64_t seed = 5;
    static const char *const qkv_names[] = {"q", "k", "v"};
    fill(spec, sizeof spec, s->spec, n);
    fill(inputs, sizeof inputs, s->inputs, n);
    int count = parse_inputs(inputs, in, names);
    for (int i = 0; i < 3; i++) {
        qkv[i] = (attn_named_tensor){qkv_names[i], make((int64_t[]){1, HEADS, n, WIDTH}, 4, ' ', &seed)};
    }
    snprintf(dense_spec, sizeof dense_spec, "dense:causal=%s", s->causal ? "true" : "false");
    result own = measure(spec, in, count, s->outputs, backward, threads), dense = measure(dense_spec, qkv, 3, "o", backward, threads);
    printf("| `%s` | %ld | %.2f | %.2f |", spec, n, 1e3 * own.seconds, dense.seconds / own.seconds);
    if (own.flops > 0) {
        printf(" %.0f %% |", 100 * own.flops / own.seconds / peak);
    } else {
        printf(" |");
    }
    printf(" %.1f |\n", own.memory * 1e-6);
    fflush(stdout);
    for (int i = 0; i < count; i++) {
        free(in[i].tensor.data);
    }
    for (int i = 0; i < 3; i++) {
        free(qkv[i].tensor.data);
    }
}

int main(int argc, char **argv)
{
    int64_t sizes[] = {1024, 4096, 9216, 16384}, size = 0, threads = 2; /* squares, for images */
    int backward = 0, count = 4;
    const bench_option options[] = {BENCH_THREADS(threads), {.name = "--backward", .flag = &backward},
                                    {.name = "--size", .number = &size, .least = 1, .most = INT32_MAX}};
    int names = bench_options(argc, argv, "bench_systems [--threads N] [--backward] [--size N] [NAME...]", argc, options, 3);
    const attn_exec exec = {.threads = (int)threads};
    threads = attn_exec_threads(&exec);
    if (size > 0) {
        sizes[0] = size;
        count = 1;
    }
    attn_allocator allocator = {count_alloc, count_free, NULL};
    attn_set_allocator(&allocator);
    double peak = attn_machine_peak_flops((int)threads);
    printf("%d thread(s), peak %.0f GFLOP/s; %d heads of %d, dense beside each at the same N\n\n", (int)threads, peak * 1e-9, HEADS, WIDTH);
    printf("| mechanism | N | ms | times as fast as dense | share of peak | scratch MB |\n| --- | --- | --- | --- | --- | --- |\n");
    for (size_t i = 0; i < sizeof systems / sizeof systems[0]; i++) {
        int wanted = names == 0;
        for (int a = 0; a < names; a++) {
            wanted |= strncmp(systems[i].spec, argv[a], strlen(argv[a])) == 0;
        }
        for (int k = 0; k < count && wanted; k++) {
            run(&systems[i], (long)sizes[k], backward, (int)threads, peak);
        }
    }
    return 0;
}
