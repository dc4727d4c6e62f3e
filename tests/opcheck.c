#include "opcheck.h"

#include "core/random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void *add(opcheck_case *c, const char *name, attn_dtype dtype, int ndim, const int64_t *shape)
{
    attn_named_tensor *in = &c->in[c->in_count++];
    in->name = name;
    in->tensor = attn_tensor_make(NULL, dtype, ndim, shape);
    in->tensor.data = calloc((size_t)attn_tensor_count(&in->tensor) + 1, attn_dtype_size(dtype));
    assert_non_null(in->tensor.data);
    return in->tensor.data;
}

static attn_random input_random(const opcheck_case *c)
{
    attn_random random;
    attn_random_seed(&random, c->seed * 1000 + (uint64_t)c->in_count);
    return random;
}

float *opcheck_input(opcheck_case *c, const char *name, int ndim, const int64_t *shape)
{
    float *data = add(c, name, ATTN_F32, ndim, shape);
    attn_random random = input_random(c);
    for (int64_t i = 0; i < attn_tensor_count(&c->in[c->in_count - 1].tensor); i++) {
        data[i] = (float)attn_random_normal(&random);
    }
    return data;
}

float *opcheck_uniform(opcheck_case *c, const char *name, int ndim, const int64_t *shape, double low, double high)
{
    float *data = add(c, name, ATTN_F32, ndim, shape);
    attn_random random = input_random(c);
    for (int64_t i = 0; i < attn_tensor_count(&c->in[c->in_count - 1].tensor); i++) {
        data[i] = (float)(low + (high - low) * attn_random_uniform(&random));
    }
    return data;
}

int64_t *opcheck_whole(opcheck_case *c, const char *name, int ndim, const int64_t *shape, int64_t low, int64_t high)
{
    int64_t *data = add(c, name, ATTN_I64, ndim, shape);
    attn_random random = input_random(c);
    for (int64_t i = 0; i < attn_tensor_count(&c->in[c->in_count - 1].tensor); i++) {
        data[i] = low + (int64_t)attn_random_below(&random, (uint64_t)(high - low + 1));
    }
    return data;
}

uint8_t *opcheck_bool(opcheck_case *c, const char *name, int ndim, const int64_t *shape, double share)
{
    uint8_t *data = add(c, name, ATTN_BOOL, ndim, shape);
    attn_random random = input_random(c);
    for (int64_t i = 0; i < attn_tensor_count(&c->in[c->in_count - 1].tensor); i++) {
        data[i] = attn_random_uniform(&random) < share;
    }
    return data;
}

static void must(attn_status status, const opcheck_case *c)
{
    if (status != ATTN_OK) {
        fail_msg("%s: %s", c->spec, attn_last_error());
    }
}

static const attn_port_info *port_of(const attn_op_info *info, attn_port_direction direction, const char *name)
{
    for (int i = 0; i < info->port_count; i++) {
        if (info->ports[i].direction == direction && strcmp(info->ports[i].name, name) == 0) {
            return &info->ports[i];
        }
    }
    fail_msg("%s has no port %s", info->name, name);
    return NULL;
}

static void allocate(attn_named_tensor *tensors, int count)
{
    for (int i = 0; i < count; i++) {
        attn_tensor *t = &tensors[i].tensor;
        t->data = calloc((size_t)attn_tensor_count(t) + 1, attn_dtype_size(t->dtype));
        assert_non_null(t->data);
    }
}

static void release(attn_named_tensor *tensors, int count)
{
    for (int i = 0; i < count; i++) {
        free(tensors[i].tensor.data);
    }
}

static size_t bytes_of(const attn_tensor *t) { return (size_t)attn_tensor_count(t) * attn_dtype_size(t->dtype); }

static const int many_threads[2] = {2, 7};
static const char *const thread_counts[2] = {"1 and 2 threads", "1 and 7 threads"};

static void same_bits(const opcheck_case *c, const char *what, const attn_named_tensor *a, const attn_named_tensor *b,
                      int count, const char *between)
{
    for (int i = 0; i < count; i++) {
        if (memcmp(a[i].tensor.data, b[i].tensor.data, bytes_of(&a[i].tensor)) != 0) {
            fail_msg("%s: %s%s differs between %s", c->spec, what, a[i].name, between);
        }
    }
}

/* sum(g * o) in double. */
static double loss(const attn_op *op, const opcheck_case *c, attn_named_tensor *out, int out_count,
                   const attn_named_tensor *grad_out, int grad_count)
{
    must(attn_op_forward(op, c->in, c->in_count, out, out_count, NULL), c);
    double sum = 0;
    for (int g = 0; g < grad_count; g++) {
        for (int i = 0; i < out_count; i++) {
            if (strcmp(out[i].name, grad_out[g].name) == 0) {
                const float *o = out[i].tensor.data, *w = grad_out[g].tensor.data;
                for (int64_t j = 0; j < attn_tensor_count(&out[i].tensor); j++) {
                    sum += (double)o[j] * (double)w[j];
                }
            }
        }
    }
    return sum;
}

static void compare_gradients(const attn_op *op, opcheck_case *c, attn_named_tensor *out, int out_count,
                              const attn_named_tensor *grad_out, int grad_count, const attn_named_tensor *grad_in,
                              int grad_in_count, double tolerance)
{
    double step = c->step > 0 ? c->step : 1e-2;
    attn_random random;
    attn_random_seed(&random, c->seed + 77);
    for (int g = 0; g < grad_in_count; g++) {
        attn_named_tensor *in = NULL;
        for (int i = 0; i < c->in_count; i++) {
            if (strcmp(c->in[i].name, grad_in[g].name) == 0) {
                in = &c->in[i];
            }
        }
        int64_t count = attn_tensor_count(&in->tensor);
        const float *grad = grad_in[g].tensor.data;
        double size = 0;
        for (int64_t i = 0; i < count; i++) {
            size = fmax(size, fabs((double)grad[i]));
        }
        int samples = c->samples > 0 ? c->samples : 24;
        for (int s = 0; s < samples && count > 0; s++) {
            int64_t at = (int64_t)attn_random_below(&random, (uint64_t)count);
            float *x = (float *)in->tensor.data + at;
            float saved = *x;
            *x = (float)(saved + step);
            double above = (double)*x, up = loss(op, c, out, out_count, grad_out, grad_count);
            *x = (float)(saved - step);
            double below = (double)*x, down = loss(op, c, out, out_count, grad_out, grad_count);
            *x = saved;
            double want = (up - down) / (above - below);
            if (!(fabs(want - (double)grad[at]) <= tolerance * (fabs(want) + 0.1 * size + 1e-3))) {
                fail_msg("%s: gradient of %s[%lld]: got %.8g, differences give %.8g (largest gradient %.3g)", c->spec,
                         in->name, (long long)at, (double)grad[at], want, size);
            }
        }
    }
}

void opcheck_run(opcheck_case *c, double tolerance)
{
    attn_op *op;
    must(attn_op_create(&op, c->spec), c);
    const attn_op_info *info = attn_op_get_info(op);
    attn_named_tensor out[80], again[80], grad_out[80], grad_in[80], grad_again[80];
    int out_count = 80, grad_count = 0, grad_in_count = 0;
    must(attn_op_outputs(op, c->in, c->in_count, out, &out_count), c);
    memcpy(again, out, sizeof out);
    allocate(out, out_count);
    allocate(again, out_count);
    attn_exec one = {.threads = 1};
    must(attn_op_forward(op, c->in, c->in_count, out, out_count, &one), c);
    for (int i = 0; i < 2; i++) {
        attn_exec many = {.threads = many_threads[i]};
        must(attn_op_forward(op, c->in, c->in_count, again, out_count, &many), c);
        same_bits(c, "output ", out, again, out_count, thread_counts[i]);
    }
    if (info->differentiable) {
        attn_random random;
        attn_random_seed(&random, c->seed + 99);
        for (int i = 0; i < out_count; i++) {
            if ((port_of(info, ATTN_PORT_OUT, out[i].name)->flags & ATTN_PORT_DIFF) != 0 &&
                (c->only_output == NULL || strcmp(c->only_output, out[i].name) == 0)) {
                grad_out[grad_count] = out[i];
                allocate(&grad_out[grad_count], 1);
                for (int64_t j = 0; j < attn_tensor_count(&out[i].tensor); j++) {
                    ((float *)grad_out[grad_count].tensor.data)[j] = (float)attn_random_normal(&random);
                }
                grad_count++;
            }
        }
        for (int i = 0; i < c->in_count; i++) {
            if ((port_of(info, ATTN_PORT_IN, c->in[i].name)->flags & ATTN_PORT_DIFF) != 0) {
                grad_in[grad_in_count] = c->in[i];
                grad_again[grad_in_count++] = c->in[i];
            }
        }
        allocate(grad_in, grad_in_count);
        allocate(grad_again, grad_in_count);
        must(attn_op_backward(op, c->in, c->in_count, out, out_count, grad_out, grad_count, grad_in, grad_in_count, &one), c);
        same_bits(c, "output ", out, again, out_count, "forward and backward, which must leave it alone");
        for (int i = 0; i < 2; i++) {
            attn_exec many = {.threads = many_threads[i]};
            must(attn_op_backward(op, c->in, c->in_count, out, out_count, grad_out, grad_count, grad_again,
                                  grad_in_count, &many), c);
            same_bits(c, "gradient of ", grad_in, grad_again, grad_in_count, thread_counts[i]);
        }
        if (tolerance > 0) {
            compare_gradients(op, c, again, out_count, grad_out, grad_count, grad_in, grad_in_count, tolerance);
        }
        release(grad_out, grad_count);
        release(grad_in, grad_in_count);
        release(grad_again, grad_in_count);
    }
    release(out, out_count);
    release(again, out_count);
    release(c->in, c->in_count);
    attn_op_destroy(op);
}

void opcheck_fails(opcheck_case *c, attn_status status, const char *words)
{
    attn_op *op;
    attn_status got = attn_op_create(&op, c->spec);
    if (got == ATTN_OK) {
        attn_named_tensor out[80];
        int out_count = 80;
        got = attn_op_outputs(op, c->in, c->in_count, out, &out_count);
        if (got == ATTN_OK) {
            allocate(out, out_count);
            got = attn_op_forward(op, c->in, c->in_count, out, out_count, NULL);
            release(out, out_count);
        }
        attn_op_destroy(op);
    }
    if (got != status || strstr(attn_last_error(), words) == NULL) {
        fail_msg("%s: expected '%s' and a message with '%s', got '%s': %s", c->spec, attn_status_name(status), words,
                 attn_status_name(got), got == ATTN_OK ? "" : attn_last_error());
    }
    release(c->in, c->in_count);
}
