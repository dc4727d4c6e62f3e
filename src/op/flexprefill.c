/* FlexPrefill (arXiv:2502.20766): sparse attention for reading long prompts without training. Per head, the last block of queries tells
 * whether block averages predict where attention goes ("query-aware") or whether it runs along columns and diagonals ("vertical and
 * slash"); just enough key blocks are kept to cover a share gamma of it.
 *
 * The probabilities of the last block are computed a tile of keys at a time, relative to the largest score of each row so far. When the
 * log-sum-exp of each row is known they are added to their columns and diagonals: a few rows in float, these sums in double, since what is
 * kept depends on sums of up to M of them.
 */
#include "op/class.h"
#include "exec/dense.h"
#include "plan/plan.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#define TILE_KEYS 256
#define TILE_ROWS 128 /* so that the usual blocks are one tile, and keys are packed once */
#define SUM_ROWS 16   /* rows that are summed up in float */
#define DIAGONALS (TILE_KEYS + SUM_ROWS)
#define FEW 24        /* numbers that are sorted at once */

typedef struct flexprefill_params {
    double gamma, tau, scale;
    int64_t block, min_budget, max_budget;
} flexprefill_params;

static const attn_param_info params[] = {
    ATTN_P_FLOAT_OPEN("gamma", flexprefill_params, gamma, "0.9", 0, 1, 1, 0, "share of the attention to cover"),
    ATTN_P_FLOAT("tau", flexprefill_params, tau, "0.1", 0, INFINITY,
                 "a head whose averages are closer than this to its attention is query-aware; 0: never"),
    ATTN_P_INT("block", flexprefill_params, block, "128", 1, INFINITY, "size of query and key blocks"),
    ATTN_P_INT("min_budget", flexprefill_params, min_budget, "512", 1, INFINITY, "least number of tokens kept per pattern"),
    ATTN_P_INT("max_budget", flexprefill_params, max_budget, "0", 0, INFINITY, "most; 0: no limit"),
    ATTN_P_SCALE(flexprefill_params, scale),
};

enum { Q, K, V, O, LSE, BLOCKS, PATTERN };

static const attn_port_info ports[] = {
    ATTN_IN("q", "B,H,N,D", FLOAT, ATTN_PORT_DIFF, "queries; query n stands at position n + M - N"),
    ATTN_IN("k", "B,Hkv,M,D", FLOAT, ATTN_PORT_DIFF, "keys, M >= N; query head h reads head h / (H/Hkv)"),
    ATTN_IN("v", "B,Hkv,M,Dv", FLOAT, ATTN_PORT_DIFF, "values"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, ATTN_PORT_DIFF, "the attention output"),
    ATTN_OUT("lse", "B,H,N", FLOAT, ATTN_PORT_F32, "log-sum-exp over the kept keys"),
    ATTN_OUT("blocks", "B,H,nq,nk", BOOL, 0, "kept key blocks per query block"),
    ATTN_OUT("pattern", "B,H", INT, 0, "0 exact, 1 vertical and slash, 2 query-aware"),
};

enum { EXACT, VERTICAL_SLASH, QUERY_AWARE };

typedef struct problem {
    int64_t n, m, d, block, nq, nk, shift; /* shift: absolute block of query block 0 */
    int64_t low, high;                     /* budgets in blocks */
    double scale, gamma, tau;
    int exact;
} problem;

typedef struct ranked {
    double value;
    int64_t at;
} ranked;

/* Scratch memory of a thread. */
typedef struct worker {
    double *vertical, *slash, *sorted; /* [M] */
    double *means;                     /* [nk][D] of keys */
    double *query;                     /* [D] */
    double *estimate;                  /* [nk] */
    double *shares;                    /* [2][nq * nk] */
    ranked *order;                     /* [nk] */
    float *panels, *q;                 /* tiles */
    float *scores;                     /* [tiles of keys][TILE_ROWS][TILE_KEYS] */
    float *m, *l, *alpha;              /* [TILE_ROWS] */
    float *tops;                       /* [tiles of keys][TILE_ROWS]: what the probabilities of a tile are relative to */
    float *columns;                    /* sums of a few rows: [TILE_KEYS] */
    float *diagonals;                  /* [TILE_ROWS / SUM_ROWS][DIAGONALS]: the same, some of them not complete after a tile */
} worker;

static attn_status bind(attn_call *call)
{
    const flexprefill_params *p = call->params;
    int64_t n = attn_dim(call, "N"), m = attn_dim(call, "M");
    if (m < n) {
        return attn_fail(ATTN_ERR_SHAPE, "M = %lld keys, expected at least N = %lld", (long long)m, (long long)n);
    }
    if ((m - n) % p->block != 0) {
        return attn_fail(ATTN_ERR_SHAPE, "M - N = %lld, expected a multiple of block = %lld: a chunk starts on a block",
                         (long long)(m - n), (long long)p->block);
    }
    if (p->max_budget > 0 && p->max_budget < p->min_budget) {
        return attn_fail(ATTN_ERR_ARGUMENT, "max_budget = %lld, expected 0 or at least min_budget = %lld",
                         (long long)p->max_budget, (long long)p->min_budget);
    }
    /* n / block rounded up, without the overflow of adding a huge block */
    attn_set_dim(call, "nq", n / p->block + (n % p->block != 0));
    attn_set_dim(call, "nk", m / p->block + (m % p->block != 0));
    return ATTN_OK;
}

static problem problem_of(const attn_call *call)
{
    const flexprefill_params *p = call->params;
    problem x = {.n = attn_dim(call, "N"), .m = attn_dim(call, "M"), .d = attn_dim(call, "D"), .block = p->block,
                 .nq = attn_dim(call, "nq"), .nk = attn_dim(call, "nk"), .gamma = p->gamma, .tau = p->tau};
    x.shift = (x.m - x.n) / x.block;
    x.scale = attn_default_scale(p->scale, x.d);
    x.low = p->min_budget / x.block + (p->min_budget % x.block != 0);
    x.high = x.nk;
    if (p->max_budget > 0) {
        x.high = attn_min_i64(x.nk, p->max_budget / x.block + (p->max_budget % x.block != 0));
    }
    /* M <= max(2, low) blocks, again without overflow */
    x.exact = x.n < x.block || x.m / x.block + (x.m % x.block != 0) <= attn_max_i64(2, x.low);
    return x;
}

/* ---- Steps 2 and 3: columns and diagonals of the last block's probabilities ---- */

/* One tile of scores s in base 2, -inf above the diagonal: rows first ... of the block, keys key ... */
static int64_t score_tile(const problem *x, worker *w, float *s, int64_t first, int64_t rows, int64_t key, int64_t keys)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    int64_t nr = kernels->nr, count = attn_ceil_div(keys, nr) * nr;
    kernels->product(rows, count, x->d, w->q, x->d, 1, w->panels, nr, x->d * nr, s, TILE_KEYS, 0);
    for (int64_t r = 0; r < rows; r++) {
        attn_dense_mask_row(s + r * TILE_KEYS, key, count, 0, attn_min_i64(key + keys, x->m - x->block + first + r + 1));
    }
    return count;
}

static void pack_keys(const problem *x, worker *w, const float *k, int64_t keys)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    int64_t nr = kernels->nr;
    for (int64_t j = 0; j < keys; j += nr) {
        int64_t some = attn_min_i64(nr, keys - j);
        float *to = w->panels + j * x->d;
        if (some < nr) {
            memset(to, 0, (size_t)(nr * x->d) * sizeof *to);
        }
        kernels->pack_transposed(to, nr, k + j * x->d, ATTN_F32, x->d, some, x->d);
    }
}

static void add_doubles(double *to, const float *from, int64_t count)
{
    for (int64_t j = 0; j < count; j++) {
        to[j] += (double)from[j];
    }
}

/* A tile's probabilities s, relative to tops, of rows first ... of the block, a few at a time; m holds their log-sum-exp now. */
static void add_lines(const problem *x, worker *w, const float *s, const float *tops, int64_t first, int64_t rows, int64_t key, int64_t keys)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    for (int64_t r0 = 0; r0 < rows; r0 += SUM_ROWS) {
        int64_t some = attn_min_i64(SUM_ROWS, rows - r0), last = x->m - x->block + first + r0 + some - 1; /* position of the last row */
        int64_t most = attn_min_i64(keys, last + 1 - key);
        if (most <= 0) {
            continue;
        }
        float *diagonals = w->diagonals + r0 / SUM_ROWS * DIAGONALS;
        int64_t carried = key > 0 ? some - 1 : 0;
        memset(w->columns, 0, (size_t)most * sizeof *w->columns);
        memset(diagonals + carried, 0, (size_t)(most + some - 1 - carried) * sizeof *diagonals);
        for (int64_t i = 0; i < some; i++) {
            const float *row = s + (r0 + i) * TILE_KEYS;
            float factor = exp2f(tops[r0 + i] - w->m[r0 + i]);
            int64_t before = some - 1 - i, end = attn_max_i64(0, attn_min_i64(keys, last - before + 1 - key));
            kernels->axpy(w->columns, row, end, factor);
            kernels->axpy(diagonals + before, row, end, factor);
        }
        add_doubles(w->vertical + key, w->columns, most);
        /* diagonals[c]: of the last row's key c. Entries past the main diagonal stay 0. The last ones continue in the next tile, in the same
         * order of rows as all others: equal probabilities make equal sums. */
        int64_t from = x->m - 1 - last + key, complete = last + 1 > key + keys ? keys : attn_min_i64(most + some - 1, x->m - from);
        add_doubles(w->slash + from, diagonals, complete);
        memmove(diagonals, diagonals + keys, (size_t)(some - 1) * sizeof *diagonals);
    }
}

static void last_block_lines(const problem *x, worker *w, const float *q, const float *k)
{
    const attn_tile_kernels *kernels = attn_tile_kernels_get();
    memset(w->vertical, 0, (size_t)x->m * sizeof(double));
    memset(w->slash, 0, (size_t)x->m * sizeof(double));
    for (int64_t first = 0; first < x->block; first += TILE_ROWS) {
        int64_t rows = attn_min_i64(TILE_ROWS, x->block - first), end = x->m - x->block + first + rows;
        kernels->load_row(w->q, q + (x->n - x->block + first) * x->d, ATTN_F32, rows * x->d, (float)(x->scale * ATTN_LOG2E));
        for (int64_t r = 0; r < rows; r++) {
            w->m[r] = -INFINITY;
            w->l[r] = 0;
        }
        float *s = w->scores, *tops = w->tops;
        for (int64_t key = 0; key < end; key += TILE_KEYS, s += rows * TILE_KEYS, tops += rows) {
            int64_t keys = attn_min_i64(TILE_KEYS, end - key);
            pack_keys(x, w, k + key * x->d, keys);
            int64_t count = score_tile(x, w, s, first, rows, key, keys);
            kernels->softmax(rows, s, TILE_KEYS, count, w->m, w->l, w->alpha);
            memcpy(tops, w->m, (size_t)rows * sizeof *tops);
        }
        for (int64_t r = 0; r < rows; r++) {
            w->m[r] = (float)((double)w->m[r] + log2((double)w->l[r]));
        }
        s = w->scores, tops = w->tops;
        for (int64_t key = 0; key < end; key += TILE_KEYS, s += rows * TILE_KEYS, tops += rows) {
            add_lines(x, w, s, tops, first, rows, key, attn_min_i64(TILE_KEYS, end - key));
        }
    }
    for (int64_t j = 0; j < x->m; j++) {
        w->vertical[j] /= (double)x->block;
        w->slash[j] /= (double)x->block;
    }
}

/* ---- Steps 4 to 9 ---- */

static int falling(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* How many of x, in falling order, have a running sum of at most `most`; *least: the last of them. x is reordered: the range that the sum
 * ends in is halved again and again, so that only a few numbers are ever sorted. */
static int64_t covered(double *x, int64_t count, double most, double *least)
{
    int64_t low = 0, high = count, taken = 0;
    double sum = 0;
    *least = INFINITY;
    while (high - low > FEW) {
        double a = x[low], b = x[low + (high - low) / 2], c = x[high - 1], above = 0;
        double pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        int64_t greater = low, i = low, less = high;
        while (i < less) {
            double value = x[i];
            if (value > pivot) {
                x[i++] = x[greater];
                x[greater++] = value;
                above += value;
            } else if (value == pivot) {
                i++;
            } else {
                x[i] = x[--less];
                x[less] = value;
            }
        }
        if (greater == low && less == low) {
            return taken; /* no numbers */
        }
        if (!(sum + above <= most)) {
            high = greater;
            continue;
        }
        taken += greater - low;
        sum += above;
        for (int64_t j = low; j < greater; j++) {
            *least = x[j] < *least ? x[j] : *least;
        }
        for (; i > greater && sum + pivot <= most; i--) {
            sum += pivot;
            taken++;
            *least = pivot;
        }
        if (i > greater) {
            return taken;
        }
        low = less;
    }
    qsort(x + low, (size_t)(high - low), sizeof *x, falling);
    for (; low < high && sum + x[low] <= most; low++) {
        sum += x[low];
        taken++;
        *least = x[low];
    }
    return taken;
}

/* The share gamma of a sum: all of it is never exceeded, whatever rounding says. */
static double share_of(const problem *x, double sum) { return x->gamma < 1 ? x->gamma * sum : INFINITY; }

static int64_t budget(const problem *x, const double *line, double *scratch)
{
    double least;
    memcpy(scratch, line, (size_t)x->m * sizeof *scratch);
    int64_t count = 1 + covered(scratch, x->m, share_of(x, 1), &least);
    return attn_max_i64(x->low, attn_min_i64(count / x->block + 1, x->high));
}

/* Sums over blocks, in place: entry c is written after its block is read. */
static void pool(const problem *x, double *line)
{
    for (int64_t c = 0; c < x->nk; c++) {
        double sum = 0;
        for (int64_t j = c * x->block; j < attn_min_i64(x->m, (c + 1) * x->block); j++) {
            sum += line[j];
        }
        line[c] = sum;
    }
}

static void mean_rows(double *to, const float *from, int64_t rows, int64_t width)
{
    memset(to, 0, (size_t)width * sizeof *to);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < width; c++) {
            to[c] += (double)from[r * width + c];
        }
    }
    for (int64_t c = 0; c < width; c++) {
        to[c] /= (double)rows;
    }
}

/* softmax over the first `count` key blocks of scale * mean query . mean keys */
static void block_softmax(const problem *x, const worker *w, int64_t count, double *to)
{
    double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < count; j++) {
        const double *mean = w->means + j * x->d;
        double s[4] = {0};
        int64_t c = 0;
        for (; c + 4 <= x->d; c += 4) {
            for (int i = 0; i < 4; i++) {
                s[i] += w->query[c + i] * mean[c + i];
            }
        }
        for (; c < x->d; c++) {
            s[0] += w->query[c] * mean[c];
        }
        to[j] = x->scale * (s[0] + s[1] + s[2] + s[3]);
        top = to[j] > top ? to[j] : top;
    }
    for (int64_t j = 0; j < count; j++) {
        to[j] = exp(to[j] - top);
        sum += to[j];
    }
    for (int64_t j = 0; j < count; j++) {
        to[j] /= sum;
    }
}

/* Square root of the Jensen-Shannon divergence. */
static double distance(const double *a, const double *b, int64_t count)
{
    double sum = 0;
    for (int64_t j = 0; j < count; j++) {
        double middle = (a[j] + b[j]) / 2;
        sum += a[j] > 0 ? a[j] * log(a[j] / middle) / 2 : 0;
        sum += b[j] > 0 ? b[j] * log(b[j] / middle) / 2 : 0;
    }
    return sqrt(sum > 0 ? sum : 0);
}

/* Largest first, ties to the lower place. */
static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    return x->value != y->value ? (x->value < y->value) - (x->value > y->value) : (x->at > y->at) - (x->at < y->at);
}

static void keep_lines(const problem *x, worker *w, int64_t verticals, int64_t slashes, uint8_t *kept)
{
    ranked *order = w->order;
    w->vertical[0] = INFINITY;
    w->slash[x->nk - 1] = INFINITY;
    for (int slash = 0; slash < 2; slash++) {
        for (int64_t c = 0; c < x->nk; c++) {
            order[c] = (ranked){slash ? w->slash[c] : w->vertical[c], c};
        }
        qsort(order, (size_t)x->nk, sizeof *order, by_rank);
        for (int64_t k = 0; k < attn_min_i64(x->nk, slash ? slashes : verticals); k++) {
            for (int64_t i = 0; i < x->nq; i++) {
                int64_t r = i + x->shift, column = slash ? r - (x->nk - 1 - order[k].at) : order[k].at;
                if (column >= 0 && column <= r) {
                    kept[i * x->nk + column] = 1;
                }
            }
        }
    }
}

/* shares: scratch for those of all blocks, twice. */
static void keep_aware(const problem *x, worker *w, double *shares, const float *q, uint8_t *kept)
{
    int64_t count = 0, all = x->nq * x->nk;
    double least;
    for (int64_t i = 0; i < x->nq; i++) {
        mean_rows(w->query, q + i * x->block * x->d, attn_min_i64(x->block, x->n - i * x->block), x->d);
        block_softmax(x, w, i + x->shift + 1, shares + count);
        count += i + x->shift + 1;
    }
    memcpy(shares + all, shares, (size_t)count * sizeof *shares);
    int64_t ties = covered(shares + all, count, share_of(x, (double)x->nq), &least);
    for (int64_t c = 0; c < count; c++) {
        ties -= shares[c] > least;
    }
    for (int64_t i = 0, c = 0; i < x->nq; i++) {
        for (int64_t j = 0; j <= i + x->shift; j++, c++) {
            /* of equal ones the first */
            if (shares[c] > least || (shares[c] == least && ties-- > 0)) {
                kept[i * x->nk + j] = 1;
            }
        }
    }
}

/* The kept blocks of one head; returns its pattern. */
static int64_t select_head(const problem *x, worker *w, const float *q, const float *k, uint8_t *kept)
{
    int64_t pattern = VERTICAL_SLASH;
    memset(kept, 0, (size_t)(x->nq * x->nk));
    last_block_lines(x, w, q, k);
    int64_t verticals = budget(x, w->vertical, w->sorted), slashes = budget(x, w->slash, w->sorted);
    pool(x, w->vertical);
    pool(x, w->slash);
    for (int64_t j = 0; j < x->nk; j++) {
        mean_rows(w->means + j * x->d, k + j * x->block * x->d, attn_min_i64(x->block, x->m - j * x->block), x->d);
    }
    mean_rows(w->query, q + (x->n - x->block) * x->d, x->block, x->d);
    block_softmax(x, w, x->nk, w->estimate);
    if (distance(w->estimate, w->vertical, x->nk) < x->tau) {
        pattern = QUERY_AWARE;
        verticals = slashes = x->low;
    }
    keep_lines(x, w, verticals, slashes, kept);
    if (pattern == QUERY_AWARE) {
        keep_aware(x, w, w->shares, q, kept);
    }
    return pattern;
}

static attn_status workers_create(attn_call *call, const problem *x, int threads, worker **workers)
{
    int64_t nk = x->nk, pad = 64;
    *workers = attn_arena_array(call->arena, (size_t)threads, sizeof **workers);
    for (int t = 0; t < threads && *workers != NULL; t++) {
        worker *w = &(*workers)[t];
        double **doubles[] = {&w->vertical, &w->slash, &w->sorted, &w->means, &w->query, &w->estimate, &w->shares};
        int64_t double_sizes[] = {x->m, x->m, x->m, nk * x->d, x->d, nk, x->tau > 0 ? 2 * x->nq * nk : 0};
        float **floats[] = {&w->panels, &w->q, &w->scores, &w->tops, &w->m, &w->l, &w->alpha, &w->columns, &w->diagonals};
        int64_t rows = attn_min_i64(TILE_ROWS, x->block), tiles = attn_ceil_div(x->m, TILE_KEYS);
        int64_t float_sizes[] = {TILE_KEYS * x->d, rows * x->d, tiles * rows * TILE_KEYS, tiles * rows, rows, rows, rows, TILE_KEYS,
                                 TILE_ROWS / SUM_ROWS * DIAGONALS};
        for (size_t i = 0; i < sizeof doubles / sizeof doubles[0]; i++) {
            *doubles[i] = attn_arena_array(call->arena, (size_t)(double_sizes[i] + pad), sizeof(double));
            if (*doubles[i] == NULL) {
                return attn_fail_memory((size_t)double_sizes[i] * sizeof(double));
            }
        }
        for (size_t i = 0; i < sizeof floats / sizeof floats[0]; i++) {
            *floats[i] = attn_arena_array(call->arena, (size_t)(float_sizes[i] + pad), sizeof(float));
            if (*floats[i] == NULL) {
                return attn_fail_memory((size_t)float_sizes[i] * sizeof(float));
            }
        }
        w->order = attn_arena_array(call->arena, (size_t)nk, sizeof *w->order);
        if (w->order == NULL) {
            return attn_fail_memory((size_t)nk * sizeof *w->order);
        }
    }
    return *workers != NULL ? ATTN_OK : attn_fail_memory((size_t)threads * sizeof **workers);
}

static attn_status select_all(attn_call *call, const problem *x, uint8_t *blocks, int64_t *pattern)
{
    int64_t heads = attn_dim(call, "H"), kv_heads = attn_dim(call, "Hkv"), lists = attn_dim(call, "B") * heads;
    if (x->exact) {
        for (int64_t i = 0; i < lists * x->nq; i++) {
            for (int64_t j = 0; j < x->nk; j++) {
                blocks[i * x->nk + j] = j <= i % x->nq + x->shift;
            }
        }
        for (int64_t i = 0; i < lists; i++) {
            pattern[i] = EXACT;
        }
        return ATTN_OK;
    }
    attn_arena_mark mark = attn_arena_get_mark(call->arena);
    worker *workers;
    int threads = (int)attn_max_i64(1, attn_min_i64(call->threads, lists));
    ATTN_TRY(workers_create(call, x, threads, &workers));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < lists; i++) {
        int64_t kv = i / heads * kv_heads + i % heads / (heads / kv_heads);
        pattern[i] = select_head(x, &workers[omp_get_thread_num()], attn_f32(call->t[Q]) + i * x->n * x->d,
                                 attn_f32(call->t[K]) + kv * x->m * x->d, blocks + i * x->nq * x->nk);
    }
    attn_arena_release(call->arena, mark);
    return ATTN_OK;
}

/* Full below the diagonal, causal on it. */
static attn_status make_plan(const attn_call *call, const problem *x, const uint8_t *blocks, attn_plan **plan)
{
    attn_plan_shape shape = {attn_dim(call, "B"), attn_dim(call, "H"), x->n, x->m, x->block, x->block};
    attn_plan_rule rule = {1, 0, -1, -1};
    attn_tensor flags = attn_tensor_make((void *)(uintptr_t)blocks, ATTN_BOOL, 4,
                                         (int64_t[]){shape.batch, shape.heads, x->nq, x->nk});
    if (x->exact) {
        /* One list for all; a block may be larger than a plan's can be. */
        shape.batch = shape.heads = 1;
        shape.block_q = shape.block_k = 64;
        return attn_plan_from_rule(plan, &shape, &rule);
    }
    return attn_plan_from_flags(plan, &shape, &flags, &rule);
}

static attn_status select_plan(attn_call *call, attn_plan *plan)
{
    problem x = problem_of(call);
    int64_t lists = attn_dim(call, "B") * attn_dim(call, "H");
    uint8_t *blocks = attn_arena_array(call->arena, (size_t)(lists * x.nq * x.nk) + 1, 1);
    int64_t *pattern = attn_arena_array(call->arena, (size_t)lists + 1, sizeof(int64_t));
    attn_plan *made;
    if (blocks == NULL || pattern == NULL) {
        return attn_fail_memory((size_t)(lists * x.nq * x.nk));
    }
    ATTN_TRY(select_all(call, &x, blocks, pattern));
    ATTN_TRY(make_plan(call, &x, blocks, &made));
    attn_plan_take(plan, made);
    return ATTN_OK;
}

static attn_dense_settings settings_of(const problem *x)
{
    attn_dense_settings settings;
    attn_dense_defaults(&settings);
    settings.scale = x->scale;
    settings.causal = x->exact;
    return settings;
}

static attn_status forward(attn_call *call)
{
    problem x = problem_of(call);
    if (attn_dim(call, "B") * attn_dim(call, "H") == 0) {
        return ATTN_OK;
    }
    attn_dense_settings settings = settings_of(&x);
    attn_dense_inputs in = {.q = *call->t[Q], .k = *call->t[K], .v = *call->t[V]};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    ATTN_TRY(select_all(call, &x, attn_bool(call->t[BLOCKS]), attn_i64(call->t[PATTERN])));
    if (x.exact) {
        return attn_dense_forward(&settings, &in, call->t[O], call->t[LSE], &exec);
    }
    attn_plan *plan;
    ATTN_TRY(make_plan(call, &x, attn_bool(call->t[BLOCKS]), &plan));
    attn_status status = attn_plan_forward(plan, &settings, &in, call->t[O], call->t[LSE], &exec);
    attn_plan_destroy(plan);
    return status;
}

static attn_status backward(attn_call *call)
{
    problem x = problem_of(call);
    if (attn_dim(call, "B") * attn_dim(call, "H") == 0) {
        return ATTN_OK;
    }
    attn_dense_settings settings = settings_of(&x);
    attn_dense_inputs in = {.q = *call->t[Q], .k = *call->t[K], .v = *call->t[V]};
    attn_dense_gradients to = {.q = call->grad[Q], .k = call->grad[K], .v = call->grad[V]};
    attn_exec exec = {.threads = call->threads, .arena = call->arena};
    if (x.exact) {
        return attn_dense_backward(&settings, &in, call->t[O], call->t[LSE], call->grad[O], &to, &exec);
    }
    attn_plan *plan;
    ATTN_TRY(make_plan(call, &x, attn_bool(call->t[BLOCKS]), &plan));
    attn_status status = attn_plan_backward(plan, &settings, &in, call->t[O], call->t[LSE], call->grad[O], &to, &exec);
    attn_plan_destroy(plan);
    return status;
}

/* With contiguous f32 inputs the selection is made and counted; otherwise the account is that of exact attention. */
static attn_status cost(attn_call *call, attn_cost *cost)
{
    problem x = problem_of(call);
    const attn_tensor *q = call->t[Q], *k = call->t[K];
    double lists = (double)attn_dim(call, "B") * (double)attn_dim(call, "H"), first = (double)(x.m - x.n) + 1;
    int ready = q->data != NULL && k->data != NULL && q->dtype == ATTN_F32 && k->dtype == ATTN_F32 && attn_tensor_is_contiguous(q) &&
                attn_tensor_is_contiguous(k);
    cost->pairs = lists * (double)x.n * (first + (double)x.m) / 2;
    if (!x.exact && lists > 0 && ready) {
        attn_plan *plan;
        attn_plan_measures measures;
        attn_plan_shape shape = {1, 1, 1, 1, 1, 1};
        ATTN_TRY(attn_plan_create(&plan, &shape));
        attn_status status = select_plan(call, plan);
        if (status == ATTN_OK) {
            attn_plan_measure(plan, x.d, attn_dim(call, "Dv"), &measures);
            cost->pairs = measures.pairs;
        }
        attn_plan_destroy(plan);
        ATTN_TRY(status);
    }
    cost->flops = 2 * cost->pairs * (double)(x.d + attn_dim(call, "Dv"));
    if (!x.exact) {
        cost->flops += lists * 2 * (double)x.block * (double)x.m * (double)x.d;
    }
    return ATTN_OK;
}

const attn_op_class attn_op_flexprefill = {
    .info = {.name = "flexprefill",
             .title = "Context-aware sparse attention for prompts (FlexPrefill)",
             .summary = "Reads long prompts sparsely without training. The last block of queries decides, per head and prompt, between key "
                        "blocks that block averages predict and vertical and slash lines, and how many cover a share gamma of the attention. "
                        "Density falls as prompts grow. Causal. Costs the kept blocks, plus 2 block M D operations per head for the choice; "
                        "generation stays exact.",
             .paper = "arXiv:2502.20766",
             .differentiable = 1,
             ATTN_TABLE(params, ports)},
    .params_size = sizeof(flexprefill_params),
    .bind = bind,
    .select = select_plan,
    .forward = forward,
    .backward = backward,
    .cost = cost,
};
