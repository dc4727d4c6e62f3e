/* Dynamical systems: every architecture is the general system on its matrices, and Taylor features approach softmax. */
#include "lab/lab.h"

#include <math.h>
#include <stdio.h>

static void same_system(lab *l, const char *arch, const char *spec, const attn_named_tensor *in, int count, const attn_tensor *signal)
{
    char matrices[96];
    snprintf(matrices, sizeof matrices, "dsf.matrices:arch=%s", arch);
    attn_named_tensor parts[5] = {{"u", *signal}};
    static const char *const names[] = {"lam", "bm", "cm", "dm"};
    for (int i = 0; i < 4; i++) {
        parts[i + 1] = (attn_named_tensor){names[i], attn_lab_output(l, matrices, in, count, names[i])};
    }
    attn_tensor general = attn_lab_output(l, "dsf", parts, 5, "y"), own = attn_lab_output(l, spec, in, count, "o");
    own = attn_tensor_make(own.data, ATTN_F32, general.ndim, general.shape); /* attention has an axis of one head more */
    double difference = attn_lab_distance(l, &own, &general);
    char claim[96];
    snprintf(claim, sizeof claim, "%s is the general system", spec);
    attn_lab_claim(l, difference < 1e-5, claim, "relative difference %.1e", difference);
}

static void equivalences(lab *l)
{
    int64_t n = 40, d = 4;
    attn_tensor u = attn_lab_normal(l, 1, LAB_SHAPE(1, n, d)), r = attn_lab_normal(l, 1, LAB_SHAPE(1, n, d)),
                g = attn_lab_normal(l, 1, LAB_SHAPE(1, n, d));
    attn_tensor rates = attn_lab_normal(l, 1, LAB_SHAPE(d, 3)), b = attn_lab_normal(l, 1, LAB_SHAPE(1, n, 3)),
                c = attn_lab_normal(l, 1, LAB_SHAPE(1, n, 3));
    attn_tensor w = attn_lab_normal(l, 0.5, LAB_SHAPE(3 * d, d)), bias = attn_lab_normal(l, 1, LAB_SHAPE(3 * d)),
                one = attn_lab_uniform(l, 1, 1, LAB_SHAPE(1));
    attn_tensor a = attn_lab_normal(l, 1, LAB_SHAPE(d)), q = attn_lab_uniform(l, 0.2, 1, LAB_SHAPE(1, 1, n, d)),
                k = attn_lab_uniform(l, 0.2, 1, LAB_SHAPE(1, 1, n, d));
    attn_tensor v = attn_tensor_make(u.data, ATTN_F32, 4, (int64_t[]){1, 1, n, d}),
                pre = attn_lab_normal(l, 1, LAB_SHAPE(1, 1, n));
    attn_named_tensor heads[] = {{"q", q}, {"k", k}, {"v", v}, {"n", pre}};
    static const char *const options[] = {"phi=elu1,eta=sum", "phi=identity,eta=exp", "phi=taylor,order=2,eta=softplus"};
    for (int i = 0; i < 3; i++) {
        char arch[64], spec[64];
        snprintf(arch, sizeof arch, "attention,%s", options[i]);
        snprintf(spec, sizeof spec, "dsf.attention:%s", options[i]);
        same_system(l, arch, spec, heads, 4, &u);
    }
    same_system(l, "s6", "dsf.s6", LAB_LIST({"u", u}, {"dt", r}, {"A_log", rates}, {"b", b}, {"c", c}, {"skip", a}), &u);
    same_system(l, "qlstm", "dsf.qlstm", LAB_LIST({"x", u}, {"w_gates", w}, {"b_gates", bias}, {"alpha", one}), &u);
    same_system(l, "rglru", "dsf.rglru", LAB_LIST({"x", u}, {"r", r}, {"g", g}, {"a_param", a}), &u);
}

/* The scale at which the greatest score is 1 or -1, and the error of each order there. */
static void expansion(lab *l)
{
    int64_t n = 60, d = 4, most = attn_lab_small(l) ? 4 : 6;
    attn_tensor q = attn_lab_normal(l, 1, LAB_SHAPE(1, 1, n, d)), k = attn_lab_normal(l, 1, LAB_SHAPE(1, 1, n, d)),
                v = attn_lab_normal(l, 1, LAB_SHAPE(1, 1, n, d));
    double top = 0, before = INFINITY, worst = 0;
    for (int64_t i = 0; i < n * n && l->status == ATTN_OK; i++) {
        double sum = 0;
        for (int64_t c = 0; c < d && i % n <= i / n; c++) {
            sum += (double)lab_f32(&q)[i / n * d + c] * (double)lab_f32(&k)[i % n * d + c];
        }
        top = fmax(top, fabs(sum));
    }
    char spec[96];
    snprintf(spec, sizeof spec, "dense:causal=true,scale=%.9g", 1 / fmax(top, 1e-9));
    attn_tensor exact = attn_lab_output(l, spec, LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o");
    int falls = 1;
    for (int64_t order = 0; order <= most; order++) {
        snprintf(spec, sizeof spec, "dsf.attention:phi=taylor,eta=sum,order=%lld,scale=%.9g", (long long)order, 1 / fmax(top, 1e-9));
        attn_tensor o = attn_lab_output(l, spec, LAB_LIST({"q", q}, {"k", k}, {"v", v}), "o");
        worst = 0;
        for (int64_t i = 0; i < n * d && l->status == ATTN_OK; i++) {
            worst = fmax(worst, fabs((double)lab_f32(&o)[i] - (double)lab_f32(&exact)[i]));
        }
        attn_lab_print(l, "Taylor features of order %lld: greatest error %.1e", (long long)order, worst);
        falls = falls && (worst < before / 2 || worst < 3e-6); /* as close as float32 sums come */
        before = worst;
    }
    attn_lab_claim(l, falls && worst < 1e-3, "every order of Taylor features is closer to softmax",
                   "%.1e at order %lld", worst, (long long)most);
}

static void run(lab *l)
{
    equivalences(l);
    expansion(l);
}

const attn_lab_class attn_lab_dsf = {
    .info = {.name = "dsf", .title = "architectures as one system; softmax as the limit of growing state", .paper = "arXiv:2405.15731"},
    .run = run,
};
