/* Linear attention in chunks against the recurrence in double: outputs, states, gradients. */
#include "core/random.h"
#include "exec/linear.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static float *numbers(attn_random *random, int64_t count)
{
    float *x = malloc((size_t)(count + 1) * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)attn_random_normal(random);
    }
    return x;
}

/* phi(x) = scale * x x^T, so that phi(q).phi(k) = (scale q.k)^2. */
static int64_t square_width(int64_t d) { return d * d; }

static void square_expand(int64_t d, double scale, const float *x, float *phi)
{
    for (int64_t i = 0; i < d * d; i++) {
        phi[i] = (float)scale * x[i / d] * x[i % d];
    }
}

static void square_back(int64_t d, double scale, const float *x, const float *grad_phi, float *grad_x)
{
    for (int64_t i = 0; i < d * d; i++) {
        grad_x[i / d] += (float)scale * grad_phi[i] * x[i % d];
        grad_x[i % d] += (float)scale * grad_phi[i] * x[i / d];
    }
}

static void square_pair(int64_t count, float *s, float *slope)
{
    for (int64_t i = 0; i < count; i++) {
        if (slope != NULL) {
            slope[i] = 2 * s[i];
        }
        s[i] *= s[i];
    }
}

static const attn_feature_map square = {square_width, square_expand, square_back, square_pair};

static int64_t width_of(const attn_linattn *x) { return x->map != NULL ? x->d * x->d : x->d; }

/* Feature f of a row in double; the factor of the output is not in it. */
static double feature(const attn_linattn *x, const float *row, int64_t f)
{
    return x->map != NULL ? x->scale * (double)row[f / x->d] * (double)row[f % x->d] : (double)row[f];
}

static void feature_back(const attn_linattn *x, const float *row, int64_t f, double grad, double *to)
{
    if (x->map == NULL) {
        to[f] += grad;
    } else {
        to[f / x->d] += x->scale * grad * (double)row[f % x->d];
        to[f % x->d] += x->scale * grad * (double)row[f / x->d];
    }
}

static double decay_of(const attn_linattn *x, int64_t head, int64_t t, int64_t f)
{
    int64_t at = head * x->m + t;
    return x->decays != NULL ? (double)x->decays[at * width_of(x) + f] : x->log_decay != NULL ? exp((double)x->log_decay[at])
           : x->slope != NULL ? exp(-(double)x->slope[head % x->heads]) : 1;
}

typedef struct tensors {
    float *q, *k, *v, *start, *g;
} tensors;

typedef struct results {
    double *o, *state, *q, *k, *v, *start;
} results;

/* One head; states: room for all of them, or NULL when no gradients are wanted. */
static void reference_head(const attn_linattn *x, const tensors *in, const results *to, int64_t head, double *states)
{
    int64_t kv = head / x->heads * x->kv_heads + head % x->heads / (x->heads / x->kv_heads), d = x->d, dv = x->dv, width = width_of(x), size = width * dv;
    const float *q = in->q + head * x->n * d, *k = in->k + kv * x->m * d, *v = in->v + kv * x->m * dv, *g = in->g + head * x->n * dv;
    double *state = to->state + head * size, outer = x->map != NULL ? 1 : x->scale;
    for (int64_t c = 0; c < size; c++) {
        state[c] = (double)in->start[head * size + c];
    }
    for (int64_t i = 0; i < x->n * dv; i++) {
        to->o[head * x->n * dv + i] = 0;
    }
    for (int64_t t = 0; t < x->m; t++) {
        for (int64_t c = 0; c < size; c++) {
            state[c] = decay_of(x, head, t, c / dv) * state[c] + feature(x, k + t * d, c / dv) * (double)v[t * dv + c % dv];
        }
        if (states != NULL) {
            memcpy(states + t * size, state, (size_t)size * sizeof *state);
        }
        for (int64_t i = x->causal ? t - (x->m - x->n) : t == x->m - 1 ? 0 : x->n; i >= 0 && i < (x->causal ? t - (x->m - x->n) + 1 : x->n); i++) {
            for (int64_t c = 0; c < size; c++) {
                to->o[(head * x->n + i) * dv + c % dv] += outer * feature(x, q + i * d, c / dv) * state[c];
            }
        }
    }
    if (states == NULL) {
        return;
    }
    double *back = calloc((size_t)size, sizeof *back);
    assert_non_null(back);
    for (int64_t t = x->m - 1; t >= 0; t--) {
        for (int64_t i = x->causal ? t - (x->m - x->n) : t == x->m - 1 ? 0 : x->n; i >= 0 && i < (x->causal ? t - (x->m - x->n) + 1 : x->n); i++) {
            for (int64_t c = 0; c < size; c++) {
                double grad = outer * (double)g[i * dv + c % dv];
                feature_back(x, q + i * d, c / dv, grad * states[t * size + c], to->q + (head * x->n + i) * d);
                back[c] += grad * feature(x, q + i * d, c / dv);
            }
        }
        for (int64_t c = 0; c < size; c++) {
            feature_back(x, k + t * d, c / dv, back[c] * (double)v[t * dv + c % dv], to->k + (kv * x->m + t) * d);
            to->v[(kv * x->m + t) * dv + c % dv] += back[c] * feature(x, k + t * d, c / dv);
            back[c] *= decay_of(x, head, t, c / dv);
        }
    }
    memcpy(to->start + head * size, back, (size_t)size * sizeof *back);
    free(back);
}

static void compare(const char *what, const float *got, const double *want, int64_t count, double tolerance)
{
    double top = 1e-30, worst = 0;
    for (int64_t i = 0; i < count; i++) {
        top = fmax(top, fabs(want[i]));
        worst = fmax(worst, fabs((double)got[i] - want[i]));
    }
    if (!(worst <= tolerance * top)) {
        print_error("%s: off by %g of %g\n", what, worst, top);
    }
    assert_true(worst <= tolerance * top);
}

enum { NO_DECAY, BY_HEAD, BY_TOKEN, BY_FEATURE, DECAYS };
static const char *decay_names[] = {"none", "by head", "by token", "by feature"};

/* Forward, decode and backward of one shape; `steepness`: how far from 1 decays are. */
static void one(attn_linattn x, int decay, double steepness)
{
    attn_random random;
    attn_random_seed(&random, (uint64_t)(x.m * 31 + x.d));
    int64_t all = x.batch * x.heads, groups = x.batch * x.kv_heads, width = width_of(&x);
    int64_t sizes[6] = {all * x.n * x.dv, all * width * x.dv, all * x.n * x.d, groups * x.m * x.d, groups * x.m * x.dv, all * width * x.dv};
    tensors in = {numbers(&random, sizes[2]), numbers(&random, sizes[3]), numbers(&random, sizes[4]), numbers(&random, sizes[5]),
                  numbers(&random, sizes[0])};
    float *logs = numbers(&random, all * x.m), *slope = numbers(&random, x.heads), *decays = numbers(&random, all * x.m * width);
    for (int64_t i = 0; i < all * x.m; i++) {
        logs[i] = -fabsf(logs[i]) * (i % 7 == 0 ? 200.0f : 0.1f) * (float)steepness;
    }
    for (int64_t i = 0; i < all * x.m * width; i++) {
        decays[i] = i % 11 == 0 ? 0.0f : i % 7 == 0 ? 1.0f : i % 5 == 0 ? 1e-30f : expf(-fabsf(decays[i]) * (float)steepness);
    }
    for (int64_t h = 0; h < x.heads; h++) {
        slope[h] = h == 0 ? 0.0f : h == 1 ? 150.0f : fabsf(slope[h]) * 0.1f * (float)steepness;
    }
    x.slope = decay == BY_HEAD ? slope : NULL;
    x.log_decay = decay == BY_TOKEN ? logs : NULL;
    x.decays = decay == BY_FEATURE ? decays : NULL;
    double *want[6], *states = malloc((size_t)(x.m * width * x.dv) * sizeof *states);
    float *got[6], *again[6];
    for (int i = 0; i < 6; i++) {
        want[i] = calloc((size_t)sizes[i], sizeof **want);
        got[i] = numbers(&random, sizes[i]);
        again[i] = numbers(&random, sizes[i]);
        assert_non_null(want[i]);
    }
    assert_non_null(states);
    for (int64_t head = 0; head < all; head++) {
        reference_head(&x, &in, &(results){want[0], want[1], want[2], want[3], want[4], want[5]}, head, states);
    }
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    for (int run = 0; run < 2; run++) {
        float **to = run == 0 ? got : again;
        int threads = run == 0 ? 1 : 7;
        assert_int_equal(attn_linattn_forward(&x, arena, threads, in.q, in.k, in.v, in.start, to[0], to[1]), ATTN_OK);
        assert_int_equal(attn_linattn_backward(&x, arena, threads, in.q, in.k, in.v, in.start, in.g, to[2], to[3], to[4], to[5]), ATTN_OK);
    }
    static const char *names[] = {"o", "state", "grad_q", "grad_k", "grad_v", "grad_state"};
    for (int i = 0; i < 6; i++) {
        char what[128];
        snprintf(what, sizeof what, "%s of %dx%d heads, %dx%d tokens, %dx%d, causal %d, map %d, decay %s", names[i], (int)x.heads, (int)x.kv_heads,
                 (int)x.n, (int)x.m, (int)x.d, (int)x.dv, x.causal, x.map != NULL, decay_names[decay]);
        compare(what, got[i], want[i], sizes[i], 1e-5);
        assert_memory_equal(got[i], again[i], (size_t)sizes[i] * sizeof **got);
    }
    if (x.causal && x.n == x.m) {
        memcpy(got[1], in.start, (size_t)sizes[1] * sizeof **got);
        assert_int_equal(attn_linattn_decode(&x, arena, 3, in.q, in.k, in.v, got[1], got[1], got[0]), ATTN_OK);
        compare("decoded o", got[0], want[0], sizes[0], 1e-5);
        compare("decoded state", got[1], want[1], sizes[1], 1e-5);
    }
    attn_arena_destroy(arena);
    for (int i = 0; i < 6; i++) {
        free(want[i]);
        free(got[i]);
        free(again[i]);
    }
    float *made[] = {in.q, in.k, in.v, in.start, in.g, logs, slope, decays};
    for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
        free(made[i]);
    }
    free(states);
}

static void shapes(void **unused)
{
    (void)unused;
    static const int64_t all[][8] = {/* batch, heads, kv_heads, n, m, d, dv, chunk */
                                     {1, 1, 1, 1, 1, 1, 1, 0},       {2, 4, 2, 131, 131, 17, 5, 0}, {1, 3, 1, 200, 200, 33, 70, 100},
                                     {1, 3, 3, 77, 77, 8, 16, 1},    {1, 2, 2, 257, 257, 64, 64, 256}, {1, 2, 1, 50, 117, 9, 20, 16},
                                     {1, 2, 2, 100, 39, 16, 3, 0},   {2, 2, 1, 1, 90, 70, 33, 0}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const int64_t *s = all[i];
        for (int decay = 0; decay < DECAYS; decay++) {
            attn_linattn x = {.batch = s[0], .heads = s[1], .kv_heads = s[2], .n = s[3], .m = s[4], .d = s[5], .dv = s[6], .causal = 1,
                              .chunk = s[7], .scale = 0.7};
            one(x, decay, 1);
            one(x, decay, 1e-4);
            x.causal = 0;
            if (decay == NO_DECAY) {
                one(x, decay, 1);
            }
        }
    }
}

static void maps(void **unused)
{
    (void)unused;
    static const int64_t lengths[][2] = {{1, 1}, {90, 90}, {40, 71}, {150, 33}};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (int decay = 0; decay < DECAYS; decay++) {
            attn_linattn x = {.batch = 1, .heads = 4, .kv_heads = 2, .n = lengths[i][0], .m = lengths[i][1], .d = 5, .dv = 19, .causal = 1,
                              .chunk = 32, .scale = 0.6, .map = &square};
            one(x, decay, 1);
            x.causal = 0;
            if (decay == NO_DECAY) {
                one(x, decay, 1);
            }
        }
    }
}

/* Sums of weights, division by them, and functions of the rows of q and k: against values of ones, and rows made beforehand. */
static void one_with_sums(attn_linattn x, int decay, int with_rows, int divide)
{
    static const attn_row_function elu1 = ATTN_ROW_ELU1;
    attn_random random;
    attn_random_seed(&random, (uint64_t)(x.m * 17 + x.n));
    int64_t all = x.batch * x.heads, groups = x.batch * x.kv_heads, width = width_of(&x), queries = all * x.n * x.d, keys = groups * x.m * x.d;
    float *q = numbers(&random, queries), *k = numbers(&random, keys), *v = numbers(&random, groups * x.m * x.dv);
    float *ones = calloc((size_t)(groups * x.m), sizeof *ones), *zeros = calloc((size_t)(all * width * x.dv), sizeof *zeros);
    float *decays = numbers(&random, all * x.m * width), *fq = numbers(&random, queries), *fk = numbers(&random, keys);
    double *want = calloc((size_t)(all * x.n * x.dv), sizeof *want), *want_sums = calloc((size_t)(all * x.n), sizeof *want_sums);
    double *want_last = calloc((size_t)(all * width), sizeof *want_last), *state = calloc((size_t)(all * width * x.dv), sizeof *state);
    assert_true(ones != NULL && zeros != NULL && want != NULL && want_sums != NULL && want_last != NULL && state != NULL);
    for (int64_t i = 0; i < groups * x.m; i++) {
        ones[i] = 1;
    }
    for (int64_t i = 0; i < all * x.m * width; i++) {
        decays[i] = decay == BY_TOKEN ? -fabsf(decays[i]) : expf(-fabsf(decays[i]));
    }
    for (int64_t i = 0; i < queries + keys; i++) { /* positive, so that sums are far from 0 */
        float *from = i < queries ? q + i : k + i - queries, *to = i < queries ? fq + i : fk + i - queries;
        *from = with_rows ? *from : fabsf(*from);
        *to = !with_rows ? *from : *from > 0 ? *from + 1 : expf(*from);
    }
    x.log_decay = decay == BY_TOKEN ? decays : NULL;
    x.decays = decay == BY_FEATURE ? decays : NULL;
    attn_linattn narrow = x;
    narrow.dv = 1;
    for (int64_t head = 0; head < all; head++) {
        reference_head(&x, &(tensors){fq, fk, v, zeros, zeros}, &(results){.o = want, .state = state}, head, NULL);
        reference_head(&narrow, &(tensors){fq, fk, ones, zeros, zeros}, &(results){.o = want_sums, .state = want_last}, head, NULL);
    }
    for (int64_t i = 0; i < all * x.n * x.dv && divide; i++) {
        want[i] = want_sums[i / x.dv] == 0 ? 0 : want[i] / (want_sums[i / x.dv] + 1e-3);
    }
    float *o = numbers(&random, all * x.n * x.dv), *sums = numbers(&random, all * x.n), *last = numbers(&random, all * width);
    float *again = numbers(&random, all * x.n * x.dv);
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    x.sums = &(attn_linattn_sums){sums, x.map == NULL ? last : NULL, divide, 1e-3};
    x.rows = with_rows ? &elu1 : NULL;
    assert_int_equal(attn_linattn_forward(&x, arena, 7, q, k, v, NULL, again, NULL), ATTN_OK);
    assert_int_equal(attn_linattn_forward(&x, arena, 1, q, k, v, NULL, o, NULL), ATTN_OK);
    assert_memory_equal(o, again, (size_t)(all * x.n * x.dv) * sizeof *o);
    char what[96];
    snprintf(what, sizeof what, "o with sums, %dx%d tokens, causal %d, decay %s, map %d", (int)x.n, (int)x.m, x.causal, decay_names[decay],
             x.map != NULL);
    compare(what, o, want, all * x.n * x.dv, 1e-5);
    what[0] = ' ';
    compare(what + 1, sums, want_sums, all * x.n, 1e-5);
    if (x.map == NULL) {
        compare("sums of keys", last, want_last, all * width, 1e-5);
    }
    attn_arena_destroy(arena);
    void *made[] = {q, k, v, ones, zeros, decays, fq, fk, want, want_sums, want_last, state, o, sums, last, again};
    for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
        free(made[i]);
    }
}

static void sums(void **unused)
{
    (void)unused;
    static const int64_t lengths[][2] = {{1, 1}, {131, 131}, {40, 171}, {150, 33}};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (int run = 0; run < 2 * DECAYS; run++) {
            int decay = run / 2;
            attn_linattn x = {.batch = 1, .heads = 4, .kv_heads = 2, .n = lengths[i][0], .m = lengths[i][1], .d = 13, .dv = 19, .causal = 1,
                              .scale = 1};
            if (decay == BY_HEAD) { /* here: by pairs or by features */
                x.map = &square;
                x.d = 5;
                decay = NO_DECAY;
            }
            one_with_sums(x, decay, run % 2 != 0 && x.map == NULL, run % 2 != 0);
            x.causal = 0;
            if (decay == NO_DECAY) {
                one_with_sums(x, decay, run % 2 == 0 && x.map == NULL, 1);
            }
        }
    }
}

/* A million tokens whose decays are all but 1, or next to nothing, or anything. */
static void long_sequences(void **unused)
{
    (void)unused;
    enum { N = 1000000, D = 3, DV = 2 };
    attn_random random;
    attn_random_seed(&random, 9);
    tensors in = {numbers(&random, N * D), numbers(&random, N * D), numbers(&random, N * DV), numbers(&random, D * DV), NULL};
    float *decays = numbers(&random, N * D), *o = numbers(&random, N * DV), state[D * DV];
    double *want = calloc(N * DV, sizeof *want), want_state[D * DV];
    assert_non_null(want);
    for (int64_t i = 0; i < N * D; i++) {
        float size = fabsf(decays[i]);
        decays[i] = i % D == 0 ? 1 - 1e-6f * size : i % D == 1 ? 1e-20f * size : expf(-size);
    }
    attn_arena *arena;
    assert_int_equal(attn_arena_create(&arena, 0), ATTN_OK);
    for (int decay = BY_TOKEN; decay < DECAYS; decay++) {
        attn_linattn x = {.batch = 1, .heads = 1, .kv_heads = 1, .n = N, .m = N, .d = D, .dv = DV, .causal = 1, .scale = 1};
        x.decays = decay == BY_FEATURE ? decays : NULL;
        for (int64_t i = 0; i < N && decay == BY_TOKEN; i++) {
            o[i] = i % 100000 == 0 ? -200.0f : -1e-6f;
        }
        float *logs = decay == BY_TOKEN ? numbers(&random, N) : NULL;
        if (logs != NULL) {
            memcpy(logs, o, N * sizeof *logs);
            x.log_decay = logs;
        }
        reference_head(&x, &in, &(results){.o = want, .state = want_state}, 0, NULL);
        assert_int_equal(attn_linattn_forward(&x, arena, 1, in.q, in.k, in.v, in.start, o, state), ATTN_OK);
        compare("o of a million tokens", o, want, N * DV, 2e-5);
        compare("state after a million tokens", state, want_state, D * DV, 2e-5);
        memcpy(state, in.start, sizeof state);
        assert_int_equal(attn_linattn_decode(&x, arena, 1, in.q, in.k, in.v, state, state, o), ATTN_OK);
        compare("o of a million tokens, one by one", o, want, N * DV, 2e-5);
        free(logs);
    }
    attn_arena_destroy(arena);
    float *made[] = {in.q, in.k, in.v, in.start, decays, o};
    for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
        free(made[i]);
    }
    free(want);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(shapes), cmocka_unit_test(maps), cmocka_unit_test(sums), cmocka_unit_test(long_sequences)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
