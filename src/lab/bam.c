/* Branch-Attend-Mix: what the mixture computes, what it costs, and how many parameters it has. */
#include "lab/lab.h"

#include <math.h>
#include <string.h>

enum { EXPERTS = 4 };

/* Weights of attention experts whose heads are C numbers wide together. */
typedef struct weights {
    attn_tensor x, router, q, k, v, o;
} weights;

static weights make(lab *l, int64_t n, int64_t c, int64_t experts, int64_t sets)
{
    double deviation = 1 / sqrt((double)c);
    return (weights){attn_lab_normal(l, 1, LAB_SHAPE(1, n, c)),
                     attn_lab_normal(l, 1, LAB_SHAPE(experts, c)),
                     attn_lab_normal(l, deviation, LAB_SHAPE(experts, c, c)),
                     attn_lab_normal(l, deviation, LAB_SHAPE(sets, c, c)),
                     attn_lab_normal(l, deviation, LAB_SHAPE(sets, c, c)),
                     attn_lab_normal(l, deviation, LAB_SHAPE(experts, c, c))};
}

/* Every expert becomes the first one. */
static void repeat(const attn_tensor *t, int64_t experts)
{
    size_t bytes = (size_t)(attn_tensor_count(t) / experts) * sizeof(float);
    for (int64_t e = 1; e < experts && t->data != NULL; e++) {
        memcpy((char *)t->data + (size_t)e * bytes, t->data, bytes);
    }
}

static attn_tensor first_of(const attn_tensor *t) { return attn_tensor_make(t->data, ATTN_F32, LAB_SHAPE(1, t->shape[1], t->shape[2])); }

static void identity(lab *l)
{
    static const char spec[] = "bam.moa:heads=4,kv_heads=4,rope_theta=10000";
    weights w = make(l, 96, 64, EXPERTS, EXPERTS);
    const attn_tensor *same[] = {&w.q, &w.k, &w.v, &w.o};
    for (int i = 0; i < 4; i++) {
        repeat(same[i], EXPERTS);
    }
    attn_tensor all = attn_lab_output(
        l, spec, LAB_LIST({"x", w.x}, {"w_router", w.router}, {"w_q", w.q}, {"w_k", w.k}, {"w_v", w.v}, {"w_o", w.o}),
        "y");
    attn_tensor router = attn_tensor_make(w.router.data, ATTN_F32, LAB_SHAPE(1, 64));
    attn_tensor one =
        attn_lab_output(l, spec,
                        LAB_LIST({"x", w.x}, {"w_router", router}, {"w_q", first_of(&w.q)}, {"w_k", first_of(&w.k)},
                                 {"w_v", first_of(&w.v)}, {"w_o", first_of(&w.o)}),
                        "y");
    double difference = attn_lab_distance(l, &all, &one);
    attn_lab_claim(l, difference < 1e-5, "equal experts with soft routing are one dense layer, whatever the router",
                   "relative difference %.1e", difference);
}

static void block(lab *l)
{
    int64_t n = attn_lab_small(l) ? 64 : 1024, c = attn_lab_small(l) ? 32 : 512, hidden = 2 * c;
    weights w = make(l, n, c, EXPERTS, EXPERTS);
    attn_tensor ln_w = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(c)), z = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(1, n, c));
    attn_tensor sum = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(1, n, c));
    attn_tensor router = attn_lab_normal(l, 1, LAB_SHAPE(EXPERTS, c)),
                up = attn_lab_normal(l, 0.05, LAB_SHAPE(EXPERTS, 2 * hidden, c));
    attn_tensor down = attn_lab_normal(l, 0.05, LAB_SHAPE(EXPERTS, c, hidden));
    if (l->status != ATTN_OK) {
        return;
    }
    for (int64_t i = 0; i < c; i++) {
        lab_f32(&ln_w)[i] = 1;
    }
    for (int64_t t = 0; t < n; t++) {
        const float *x = lab_f32(&w.x) + t * c;
        double mean = 0, square = 0;
        for (int64_t i = 0; i < c; i++) {
            mean += (double)x[i] / (double)c;
        }
        for (int64_t i = 0; i < c; i++) {
            square += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)c;
        }
        for (int64_t i = 0; i < c; i++) {
            lab_f32(&z)[t * c + i] = (float)(((double)x[i] - mean) / sqrt(square + 1e-5));
        }
    }
    attn_named_tensor whole[] = {{"x", w.x}, {"ln_w", ln_w}, {"w_router_attn", w.router}, {"w_q", w.q}, {"w_k", w.k}, {"w_v", w.v},
                                 {"w_o", w.o}, {"w_router_ffn", router}, {"w_up", up}, {"w_down", down}};
    attn_named_tensor moa[] = {{"x", z}, {"w_router", w.router}, {"w_q", w.q}, {"w_k", w.k}, {"w_v", w.v}, {"w_o", w.o}};
    attn_named_tensor ffn[] = {{"x", z}, {"w_router", router}, {"w_up", up}, {"w_down", down}};
    attn_tensor y = attn_lab_output(l, "bam:heads=8,kv_heads=8", whole, 10, "y"),
                a = attn_lab_output(l, "bam.moa:heads=8,kv_heads=8", moa, 6, "y");
    attn_tensor b = attn_lab_output(l, "bam.ffn", ffn, 4, "y");
    for (int64_t i = 0; l->status == ATTN_OK && i < n * c; i++) {
        lab_f32(&sum)[i] = lab_f32(&w.x)[i] + lab_f32(&a)[i] + lab_f32(&b)[i];
    }
    double difference = attn_lab_distance(l, &y, &sum),
           together = attn_lab_seconds(l, "bam:heads=8,kv_heads=8", whole, 10, "y", 0);
    double apart = attn_lab_seconds(l, "bam.moa:heads=8,kv_heads=8", moa, 6, "y", 0) +
                   attn_lab_seconds(l, "bam.ffn", ffn, 4, "y", 0);
    attn_lab_claim(l, difference < 1e-5, "the block is x plus both mixtures of the same normalised input",
                   "relative difference %.1e", difference);
    attn_lab_print(l, "block %.2f ms, its two mixtures %.2f ms", 1e3 * together, 1e3 * apart);
}

/* The paper counts a layer's attention per token at M keys as E (8 C^2 + 2 M C): routers and the token itself, of which a causal query sees
 * half an average too many, are left out. */
static void operations(lab *l)
{
    enum { C = 1024, M = 256 };
    double each[2];
    for (int i = 0; i < 2; i++) {
        int64_t experts = i == 0 ? EXPERTS : 1;
        attn_tensor x = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(1, M, C)),
                    router = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(experts, C));
        attn_tensor w = attn_lab_zeros(l, ATTN_F32, LAB_SHAPE(experts, C, C));
        attn_cost cost =
            attn_lab_cost(l, "bam.moa:heads=8,kv_heads=8",
                          LAB_LIST({"x", x}, {"w_router", router}, {"w_q", w}, {"w_k", w}, {"w_v", w}, {"w_o", w}));
        each[i] = cost.flops / M - 4.0 * (double)experts * C;
    }
    attn_lab_claim(l, each[0] == 35651584 && each[1] == 8912896,
                   "operations per token and layer at 256 keys: 35,651,584, four times those of one expert",
                   "%.0f and %.0f", each[0], each[1]);
}

/* Parameters of a model of 6 such blocks, from the shapes that bam.upcycle gives. */
static int64_t parameters(lab *l, const char *spec, int64_t experts, int64_t routers)
{
    enum { C = 1024, V = 256000, HIDDEN = 2048, BLOCKS = 6, OUTPUTS = 8 };
    static const char *const names[] = {"ln_w", "emb", "w_q", "w_k", "w_v", "w_o", "w_up", "w_down"};
    const int64_t rows[] = {0, V, C, C, C, C, 2 * HIDDEN, C}, columns[] = {C, C, C, C, C, C, C, HIDDEN};
    attn_named_tensor in[OUTPUTS], out[2 * OUTPUTS];
    attn_op *op = NULL;
    int count = 2 * OUTPUTS;
    int64_t total = C; /* the last norm */
    for (int i = 0; i < OUTPUTS; i++) {
        in[i].name = names[i];
        in[i].tensor = i == 0 ? attn_tensor_make(NULL, ATTN_F32, LAB_SHAPE(experts, C))
                              : attn_tensor_make(NULL, ATTN_F32, LAB_SHAPE(experts, rows[i], columns[i]));
    }
    if (l->status == ATTN_OK) {
        attn_lab_check(l, attn_op_create(&op, spec));
    }
    if (l->status == ATTN_OK) {
        attn_lab_check(l, attn_op_outputs(op, in, OUTPUTS, out, &count)); /* shapes only: no data is needed */
    }
    for (int i = 0; l->status == ATTN_OK && i < count; i++) {
        /* Embeddings on both ends, everything else once a block. */
        total += attn_tensor_count(&out[i].tensor) * (strcmp(out[i].name, "emb") == 0 ? 2 : BLOCKS);
    }
    attn_op_destroy(op);
    return total + BLOCKS * routers * experts * C;
}

static void run(lab *l)
{
    identity(l);
    block(l);
    operations(l);
    int64_t own = parameters(l, "bam.upcycle:kv=expert", EXPERTS, 2), shared = parameters(l, "bam.upcycle:kv=shared", EXPERTS, 2);
    int64_t seed = parameters(l, "bam.upcycle:kv=expert", 1, 0);
    attn_lab_claim(l, own == 776002560 && shared == 738253824 && seed == 587209728,
                   "776,002,560 parameters with keys and values per expert, 738,253,824 with shared ones, from a seed "
                   "of 587,209,728",
                   "%lld, %lld and %lld", (long long)own, (long long)shared, (long long)seed);
}

const attn_lab_class attn_lab_bam = {
    .info = {.name = "bam", .title = "equal experts are one layer; operations and parameters", .paper = "arXiv:2408.08274"},
    .run = run,
};
