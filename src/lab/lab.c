#include "lab/lab.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPERIMENTS(X) X(agent) X(bam) X(based) X(disendiff) X(dsf) X(lightning) X(moh) X(mrsa) X(neighborhood) X(rat) X(rcmha) X(retrieval_head) X(softpag) X(tnl)

#define X(name) extern const attn_lab_class attn_lab_##name;
EXPERIMENTS(X)
#undef X
#define X(name) &attn_lab_##name,
static const attn_lab_class *const experiments[] = {EXPERIMENTS(X)};
#undef X

#define COUNT ((int)(sizeof experiments / sizeof experiments[0]))

int attn_lab_count(void) { return COUNT; }

const attn_lab_info *attn_lab_at(int index) { return index >= 0 && index < COUNT ? &experiments[index]->info : NULL; }

attn_status attn_lab_run(const char *name, const attn_lab_settings *settings, attn_lab_result *result)
{
    static const attn_lab_settings standard;
    char names[256] = "";
    const attn_lab_class *found = NULL;
    *result = (attn_lab_result){0};
    for (int i = 0; i < COUNT; i++) {
        found = strcmp(experiments[i]->info.name, name) == 0 ? experiments[i] : found;
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i > 0 ? ", " : "", experiments[i]->info.name);
    }
    if (found == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "there is no experiment '%s', expected one of %s", name, names);
    }
    lab l = {.settings = settings != NULL ? settings : &standard};
    attn_random_seed(&l.random, 1);
    ATTN_TRY(attn_arena_create(&l.arena, 0));
    found->run(&l);
    attn_arena_destroy(l.arena);
    *result = l.result;
    return l.status;
}

int attn_lab_small(const lab *l)
{
    return l->settings->small;
}

void attn_lab_check(lab *l, attn_status status)
{
    if (l->status == ATTN_OK) {
        l->status = status;
    }
}

/* ---- Tensors ---- */

static attn_tensor zeros_in(lab *l, attn_arena *arena, attn_dtype dtype, int ndim, const int64_t *shape)
{
    attn_tensor t = attn_tensor_make(NULL, dtype, ndim, shape);
    size_t bytes = (size_t)attn_tensor_count(&t) * attn_dtype_size(dtype);
    t.data = l->status == ATTN_OK ? attn_arena_alloc(arena, bytes > 0 ? bytes : 1) : NULL;
    if (t.data != NULL) {
        memset(t.data, 0, bytes);
    } else if (l->status == ATTN_OK) {
        l->status = attn_fail_memory(bytes);
    }
    return t;
}

attn_tensor attn_lab_zeros(lab *l, attn_dtype dtype, int ndim, const int64_t *shape)
{
    return zeros_in(l, l->arena, dtype, ndim, shape);
}

static attn_tensor normal_in(lab *l, attn_arena *arena, double deviation, int ndim, const int64_t *shape)
{
    attn_tensor t = zeros_in(l, arena, ATTN_F32, ndim, shape);
    for (int64_t i = 0; t.data != NULL && i < attn_tensor_count(&t); i++) {
        lab_f32(&t)[i] = (float)(deviation * attn_random_normal(&l->random));
    }
    return t;
}

attn_tensor attn_lab_normal(lab *l, double deviation, int ndim, const int64_t *shape)
{
    return normal_in(l, l->arena, deviation, ndim, shape);
}

attn_tensor attn_lab_uniform(lab *l, double low, double high, int ndim, const int64_t *shape)
{
    attn_tensor t = attn_lab_zeros(l, ATTN_F32, ndim, shape);
    for (int64_t i = 0; t.data != NULL && i < attn_tensor_count(&t); i++) {
        lab_f32(&t)[i] = (float)(low + (high - low) * attn_random_uniform(&l->random));
    }
    return t;
}

double attn_lab_distance(const lab *l, const attn_tensor *a, const attn_tensor *b)
{
    double difference = 0, size = 0;
    for (int64_t i = 0; l->status == ATTN_OK && i < attn_tensor_count(b); i++) {
        double x = (double)lab_f32(a)[i], y = (double)lab_f32(b)[i];
        difference += (x - y) * (x - y);
        size += y * y;
    }
    return size > 0 ? sqrt(difference / size) : sqrt(difference);
}

/* ---- Mechanisms ---- */

#define MOST_PORTS 48

/* The outputs in `names`, made in an arena. */
static int make_outputs(lab *l, attn_arena *arena, const attn_op *op, const attn_named_tensor *in, int in_count, const char *names,
                        attn_named_tensor *out)
{
    attn_named_tensor all[MOST_PORTS];
    int count = MOST_PORTS, made = 0;
    attn_lab_check(l, attn_op_outputs(op, in, in_count, all, &count));
    for (const char *name = names; l->status == ATTN_OK && *name != '\0';) {
        size_t length = strcspn(name, " ");
        for (int i = 0; i < count; i++) {
            if (strlen(all[i].name) == length && memcmp(all[i].name, name, length) == 0) {
                out[made].name = all[i].name;
                out[made++].tensor = zeros_in(l, arena, all[i].tensor.dtype, all[i].tensor.ndim, all[i].tensor.shape);
            }
        }
        name += length + (name[length] == ' ');
    }
    return made;
}

attn_tensor attn_lab_output(lab *l, const char *spec, const attn_named_tensor *in, int in_count, const char *name)
{
    attn_op *op = NULL;
    attn_named_tensor out[MOST_PORTS];
    out[0].tensor = (attn_tensor){0};
    if (l->status == ATTN_OK) {
        attn_lab_check(l, attn_op_create(&op, spec));
    }
    if (l->status == ATTN_OK) {
        int count = make_outputs(l, l->arena, op, in, in_count, name, out);
        if (l->status == ATTN_OK && count != 1) {
            l->status = attn_fail(ATTN_ERR_ARGUMENT, "%s gives no output '%s' here", spec, name);
        }
        if (l->status == ATTN_OK) {
            l->status = attn_op_forward(op, in, in_count, out, 1, &(attn_exec){.threads = l->settings->threads});
        }
    }
    attn_op_destroy(op);
    return out[0].tensor;
}

attn_cost attn_lab_cost(lab *l, const char *spec, const attn_named_tensor *in, int in_count)
{
    attn_op *op = NULL;
    attn_cost cost = {0};
    if (l->status == ATTN_OK) {
        attn_lab_check(l, attn_op_create(&op, spec));
    }
    if (l->status == ATTN_OK) {
        l->status = attn_op_cost(op, in, in_count, &cost);
    }
    attn_op_destroy(op);
    return cost;
}

double attn_lab_memory(lab *l, const char *spec, const attn_named_tensor *in, int in_count, const char *names)
{
    attn_op *op = NULL;
    attn_arena *arena = NULL, *scratch = NULL;
    attn_named_tensor out[MOST_PORTS];
    double bytes = 0;
    if (l->status == ATTN_OK) {
        attn_lab_check(l, attn_op_create(&op, spec));
        attn_lab_check(l, attn_arena_create(&arena, 0));
        attn_lab_check(l, attn_arena_create(&scratch, 0));
    }
    if (l->status == ATTN_OK) {
        int count = make_outputs(l, arena, op, in, in_count, names, out);
        attn_exec exec = {.threads = l->settings->threads, .arena = scratch};
        if (l->status == ATTN_OK) {
            l->status = attn_op_forward(op, in, in_count, out, count, &exec);
        }
        bytes = (double)attn_arena_capacity(scratch); /* one block of what was in use at most */
    }
    attn_arena_destroy(arena);
    attn_arena_destroy(scratch);
    attn_op_destroy(op);
    return bytes;
}

double attn_lab_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct timed_call {
    attn_op *op;
    const attn_named_tensor *in;
    attn_named_tensor out[MOST_PORTS], grad_in[MOST_PORTS], grad_out[MOST_PORTS];
    int in_count, out_count, grad_count, grad_out_count;
    attn_exec exec;
} timed_call;

/* Whether there is such a port, and it is differentiable. */
static int has_gradient(const attn_op_info *info, attn_port_direction direction, const char *name)
{
    for (int i = 0; i < info->port_count; i++) {
        const attn_port_info *port = &info->ports[i];
        if (port->direction == direction && (port->flags & ATTN_PORT_DIFF) != 0 && strcmp(port->name, name) == 0) {
            return 1;
        }
    }
    return 0;
}

static void make_gradients(lab *l, attn_arena *arena, timed_call *c)
{
    const attn_op_info *info = attn_op_get_info(c->op);
    for (int i = 0; i < c->out_count; i++) {
        const attn_tensor *o = &c->out[i].tensor;
        if (has_gradient(info, ATTN_PORT_OUT, c->out[i].name)) {
            c->grad_out[c->grad_out_count++] = (attn_named_tensor){c->out[i].name, normal_in(l, arena, 1, o->ndim, o->shape)};
        }
    }
    for (int i = 0; i < c->in_count; i++) {
        const attn_tensor *x = &c->in[i].tensor;
        if (has_gradient(info, ATTN_PORT_IN, c->in[i].name)) {
            c->grad_in[c->grad_count++] = (attn_named_tensor){c->in[i].name, zeros_in(l, arena, ATTN_F32, x->ndim, x->shape)};
        }
    }
}

static attn_status call_once(timed_call *c, int backward)
{
    ATTN_TRY(attn_op_forward(c->op, c->in, c->in_count, c->out, c->out_count, &c->exec));
    return backward ? attn_op_backward(c->op, c->in, c->in_count, c->out, c->out_count, c->grad_out, c->grad_out_count, c->grad_in,
                                       c->grad_count, &c->exec)
                    : ATTN_OK;
}

double attn_lab_seconds(lab *l, const char *spec, const attn_named_tensor *in, int in_count, const char *names,
                        int backward)
{
    enum { MOST_REPEATS = 51, LEAST_REPEATS = 3 };
    const double budget = attn_lab_small(l) ? 0.02 : 0.6;
    double times[MOST_REPEATS], total = 0;
    int repeats = 0;
    attn_arena *arena = NULL, *scratch = NULL;
    timed_call c = {.in = in, .in_count = in_count};
    if (l->status == ATTN_OK) {
        attn_lab_check(l, attn_op_create(&c.op, spec));
        attn_lab_check(l, attn_arena_create(&arena, 0));
        attn_lab_check(l, attn_arena_create(&scratch, 0));
    }
    if (l->status == ATTN_OK) {
        c.exec = (attn_exec){.threads = l->settings->threads, .arena = scratch};
        c.out_count = make_outputs(l, arena, c.op, in, in_count, names, c.out);
        if (backward && l->status == ATTN_OK) {
            make_gradients(l, arena, &c);
        }
        /* First touch of all memory, then of the scratch memory in its final form. */
        for (int warm = 0; warm < 2 && l->status == ATTN_OK; warm++) {
            l->status = call_once(&c, backward);
            attn_arena_reset(scratch);
        }
    }
    while (l->status == ATTN_OK && repeats < MOST_REPEATS && (repeats < LEAST_REPEATS || total < budget)) {
        attn_arena_reset(scratch);
        double start = attn_lab_now();
        l->status = call_once(&c, backward);
        times[repeats] = attn_lab_now() - start;
        total += times[repeats++];
    }
    attn_arena_destroy(arena);
    attn_arena_destroy(scratch);
    attn_op_destroy(c.op);
    if (l->status != ATTN_OK) {
        return 1;
    }
    qsort(times, (size_t)repeats, sizeof *times, ascending);
    return times[repeats / 2];
}

/* ---- The report ---- */

static void print_list(lab *l, const char *format, va_list arguments)
{
    char line[512];
    vsnprintf(line, sizeof line, format, arguments);
    if (l->settings->print != NULL) {
        l->settings->print(l->settings->user, line);
    }
}

void attn_lab_print(lab *l, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (l->status == ATTN_OK) {
        print_list(l, format, arguments);
    }
    va_end(arguments);
}

static void verdict(lab *l, int judged, int holds, const char *claim, const char *measured, va_list arguments)
{
    char numbers[256];
    if (l->status != ATTN_OK) {
        return;
    }
    vsnprintf(numbers, sizeof numbers, measured, arguments);
    l->result.claims += judged;
    l->result.held += judged && holds;
    attn_lab_print(l, "%s: %s. Measured: %s", judged ? (holds ? "HOLDS" : "FAILS") : "seen", claim, numbers);
}

void attn_lab_claim(lab *l, int holds, const char *claim, const char *measured, ...)
{
    va_list arguments;
    va_start(arguments, measured);
    verdict(l, 1, holds, claim, measured, arguments);
    va_end(arguments);
}

void attn_lab_claim_speed(lab *l, int holds, const char *claim, const char *measured, ...)
{
    va_list arguments;
    va_start(arguments, measured);
    verdict(l, !attn_lab_small(l), holds, claim, measured, arguments);
    va_end(arguments);
}
