/* Around neighborhood attention: the pattern as masks and windows, merging of partial attentions, tile-major token order, and the
 * analytical model of what tiles can save (GNA, arXiv:2504.16922).
 */
#include "op/neighborhood.h"

#include <string.h>

/* Coordinates of a token. */
static void coordinates(const attn_na *na, int64_t token, int64_t x[3])
{
    for (int axis = na->rank - 1; axis >= 0; axis--) {
        x[axis] = token % na->axis[axis].n;
        token /= na->axis[axis].n;
    }
}

/* ---- neighborhood.mask ---- */

static const attn_param_info mask_param_table[] = {ATTN_NA_PATTERN_PARAMS};

enum { MASK, START, END };

static const attn_port_info mask_ports[] = {
    ATTN_OUT("mask", "N,N", BOOL, ATTN_PORT_ON_REQUEST, "row = query, column = key"),
    ATTN_OUT("start", "N,rank", INT, 0, "first key of each query's window per axis, in members of its dilation group"),
    ATTN_OUT("end", "N,rank", INT, 0, "key after the last one"),
};

static attn_status mask_bind(attn_call *call)
{
    attn_na na;
    ATTN_TRY(attn_na_setup(call->params, -1, &na));
    attn_set_dim(call, "N", na.tokens);
    attn_set_dim(call, "rank", na.rank);
    return ATTN_OK;
}

/* Whether the key at y is in the window of the query at x. */
static int sees(const attn_na *na, const int64_t x[3], const int64_t y[3])
{
    for (int axis = 0; axis < na->rank; axis++) {
        const attn_na_axis *a = &na->axis[axis];
        int64_t member = y[axis] / a->dilation;
        if (y[axis] % a->dilation != x[axis] % a->dilation || member < a->start[x[axis]] || member >= a->end[x[axis]]) {
            return 0;
        }
    }
    return 1;
}

static attn_status mask_forward(attn_call *call)
{
    attn_na na;
    ATTN_TRY(attn_na_setup(call->params, -1, &na));
    ATTN_TRY(attn_na_windows(&na, call->arena));
    uint8_t *mask = attn_bool(call->t[MASK]);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t n = 0; n < na.tokens; n++) {
        int64_t x[3], y[3];
        coordinates(&na, n, x);
        for (int axis = 0; axis < na.rank; axis++) {
            attn_i64(call->t[START])[n * na.rank + axis] = na.axis[axis].start[x[axis]];
            attn_i64(call->t[END])[n * na.rank + axis] = na.axis[axis].end[x[axis]];
        }
        for (int64_t m = 0; m < na.tokens && mask != NULL; m++) {
            coordinates(&na, m, y);
            mask[n * na.tokens + m] = (uint8_t)sees(&na, x, y);
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_neighborhood_mask = {
    .info = {.name = "neighborhood.mask",
             .title = "Neighborhood attention: the pattern itself",
             .summary = "Which keys each query of a grid sees: the window per axis, and the whole mask (N*N bytes, for small grids).",
             .paper = ATTN_NA_PAPER,
             ATTN_TABLE(mask_param_table, mask_ports)},
    .params_size = sizeof(attn_na_params),
    .bind = mask_bind,
    .forward = mask_forward,
};

/* ---- neighborhood.merge ---- */

enum { OS, LSES, M_O, M_LSE };

static const attn_port_info merge_ports[] = {
    ATTN_IN("os", "S,B,H,N,Dv", FLOAT, 0, "outputs over disjoint sets of keys"),
    ATTN_IN("lses", "S,B,H,N", FLOAT, 0, "their log-sum-exps; -inf: the part saw nothing"),
    ATTN_OUT("o", "B,H,N,Dv", FLOAT, 0, "the output over all keys"),
    ATTN_OUT("lse", "B,H,N", FLOAT, ATTN_PORT_F32, "its log-sum-exp"),
};

static attn_status merge_forward(attn_call *call)
{
    int64_t parts = attn_dim(call, "S"), rows = attn_dim(call, "B") * attn_dim(call, "H") * attn_dim(call, "N"), dv = attn_dim(call, "Dv");
    const float *os = attn_f32(call->t[OS]), *lses = attn_f32(call->t[LSES]);
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        float *o = attn_f32(call->t[M_O]) + r * dv;
        double top = -INFINITY, sum = 0;
        memset(o, 0, (size_t)dv * sizeof *o);
        for (int64_t s = 0; s < parts; s++) {
            double lse = (double)lses[s * rows + r];
            top = lse <= top ? top : lse; /* NaN too: it is not to be taken for a part that saw nothing */
        }
        for (int64_t s = 0; s < parts && top != -INFINITY; s++) {
            sum += exp((double)lses[s * rows + r] - top);
        }
        for (int64_t s = 0; s < parts && sum != 0; s++) {
            double weight = exp((double)lses[s * rows + r] - top) / sum;
            for (int64_t c = 0; c < dv && weight != 0; c++) {
                o[c] += (float)(weight * (double)os[(s * rows + r) * dv + c]);
            }
        }
        attn_f32(call->t[M_LSE])[r] = sum != 0 ? (float)(top + log(sum)) : -INFINITY;
    }
    return ATTN_OK;
}

const attn_op_class attn_op_neighborhood_merge = {
    .info = {.name = "neighborhood.merge",
             .title = "Merge partial attentions of the same queries",
             .summary = "Outputs of the same queries over disjoint sets of keys become the output over all of them, by their log-sum-exps.",
             .paper = ATTN_NA_PAPER,
             ATTN_TABLE_NO_PARAMS(merge_ports)},
    .forward = merge_forward,
};

/* ---- neighborhood.permute ---- */

static const attn_param_info permute_param_table[] = {
    ATTN_P_LIST(INTS, "grid", attn_na_params, grid, NULL, 1, ATTN_MOST_EXTENT, 1, 3, "positions per axis; their product is N"),
    ATTN_P_LIST(INTS, "tile", attn_na_params, tile, NULL, 1, ATTN_MOST_STEP, 1, 3, "positions of a tile per axis, or one for all"),
    ATTN_P_LIST(INTS, "dilation", attn_na_params, dilation, "1", 1, ATTN_MOST_STEP, 1, 3, "distance between members of a group"),
};

enum { P_X, P_Y, P_INDEX };

static const attn_port_info permute_ports[] = {
    ATTN_IN("x", "B,N,C", FLOAT, 0, "tokens, the grid row by row"),
    ATTN_OUT("y", "B,G,P,C", FLOAT, 0, "tokens by dilation group, tile and place in the tile; padding is zero"),
    ATTN_OUT("index", "G,P", INT, 0, "which token each slot holds; -1 for padding"),
};

typedef struct order {
    int rank;
    int64_t n[3], tile[3], dilation[3], tiles[3], groups, slots;
} order;

static attn_status permute_setup(const attn_call *call, order *o)
{
    const attn_na_params *p = call->params;
    int64_t tokens = 1;
    *o = (order){.rank = p->grid.count, .groups = 1, .slots = 1};
    if ((p->tile.count > 1 && p->tile.count != o->rank) || (p->dilation.count > 1 && p->dilation.count != o->rank)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "tile and dilation have %d and %d items, expected one, or %d as grid", p->tile.count,
                         p->dilation.count, o->rank);
    }
    for (int axis = 0; axis < o->rank; axis++) {
        o->n[axis] = p->grid.items[axis];
        o->tile[axis] = p->tile.items[p->tile.count > 1 ? axis : 0];
        o->dilation[axis] = p->dilation.items[p->dilation.count > 1 ? axis : 0];
        o->tiles[axis] = attn_ceil_div(o->n[axis], o->tile[axis] * o->dilation[axis]);
        if (o->tiles[axis] * o->tile[axis] * o->dilation[axis] > INT64_MAX / 4096 / (o->groups * o->slots)) {
            return attn_fail(ATTN_ERR_ARGUMENT, "grid, tile and dilation make too many slots");
        }
        o->groups *= o->dilation[axis];
        o->slots *= o->tiles[axis] * o->tile[axis];
        tokens *= o->n[axis];
    }
    if (tokens != attn_dim(call, "N")) {
        return attn_fail(ATTN_ERR_SHAPE, "grid holds %lld tokens, x has %lld", (long long)tokens, (long long)attn_dim(call, "N"));
    }
    return ATTN_OK;
}

static attn_status permute_bind(attn_call *call)
{
    order o;
    ATTN_TRY(permute_setup(call, &o));
    attn_set_dim(call, "G", o.groups);
    attn_set_dim(call, "P", o.slots);
    return ATTN_OK;
}

/* The token of a slot of a group; -1 for padding. */
static int64_t token_at(const order *o, int64_t group, int64_t slot)
{
    int64_t place[3], tile[3], token = 0, x[3];
    for (int axis = o->rank - 1; axis >= 0; axis--) {
        place[axis] = slot % o->tile[axis];
        slot /= o->tile[axis];
    }
    for (int axis = o->rank - 1; axis >= 0; axis--) {
        tile[axis] = slot % o->tiles[axis];
        slot /= o->tiles[axis];
    }
    for (int axis = o->rank - 1; axis >= 0; axis--) {
        x[axis] = (tile[axis] * o->tile[axis] + place[axis]) * o->dilation[axis] + group % o->dilation[axis];
        group /= o->dilation[axis];
    }
    for (int axis = 0; axis < o->rank; axis++) {
        if (x[axis] >= o->n[axis]) {
            return -1;
        }
        token = token * o->n[axis] + x[axis];
    }
    return token;
}

static attn_status permute_forward(attn_call *call)
{
    order o;
    ATTN_TRY(permute_setup(call, &o));
    int64_t batch = attn_dim(call, "B"), n = attn_dim(call, "N"), c = attn_dim(call, "C"), all = o.groups * o.slots;
#pragma omp parallel for schedule(static) num_threads(call->threads) if (call->threads > 1)
    for (int64_t i = 0; i < all; i++) {
        int64_t token = token_at(&o, i / o.slots, i % o.slots);
        attn_i64(call->t[P_INDEX])[i] = token;
        for (int64_t b = 0; b < batch; b++) {
            float *to = attn_f32(call->t[P_Y]) + (b * all + i) * c;
            if (token < 0) {
                memset(to, 0, (size_t)c * sizeof *to);
            } else {
                memcpy(to, attn_f32(call->t[P_X]) + (b * n + token) * c, (size_t)c * sizeof *to);
            }
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_neighborhood_permute = {
    .info = {.name = "neighborhood.permute",
             .title = "Neighborhood attention: tile-major token order",
             .summary = "Tokens of a grid ordered so that each tile of each dilation group is contiguous, padded to whole tiles.",
             .paper = ATTN_NA_PAPER,
             ATTN_TABLE(permute_param_table, permute_ports)},
    .params_size = sizeof(attn_na_params),
    .bind = permute_bind,
    .forward = permute_forward,
};

/* ---- neighborhood.simulate ---- */

enum { TILING_MULTI, TILING_SINGLE };
enum { KV_STATIC, KV_DYNAMIC };

static const attn_param_info simulate_param_table[] = {
    ATTN_NA_PATTERN_PARAMS,
    ATTN_P_LIST(INTS, "q_tile", attn_na_params, q_tile, NULL, 1, ATTN_MOST_STEP, 1, 3, "query tile per axis"),
    ATTN_P_LIST(INTS, "kv_tile", attn_na_params, kv_tile, NULL, 1, ATTN_MOST_STEP, 1, 3, "key tile per axis"),
    ATTN_P_CHOICE("tiling", attn_na_params, tiling, "multi", "multi|single",
                  "tiles of the grid, or of consecutive tokens (of the products of q_tile and kv_tile)"),
    ATTN_P_CHOICE("kv_start", attn_na_params, kv_start, "static", "static|dynamic",
                  "key tiles at multiples of the tile, or from the first key that the query tile needs"),
    ATTN_P_INT("extra", attn_na_params, extra, "0", 0, ATTN_MOST_EXTENT, "additional keys that every query sees"),
};

enum { VISITED, TILES_VISITED, TILES_MASKED, TILES_DENSE, PAIRS, BLOCK_SPARSE, SPEEDUP, FLOP_SPEEDUP, EFFICIENCY };

static const attn_port_info simulate_ports[] = {
    ATTN_OUT("visited", "query_tiles", INT, 0, "key tiles that each query tile visits, group after group"),
    ATTN_OUT("tiles_visited", "1", INT, 0, "all of them"),
    ATTN_OUT("tiles_masked", "1", INT, 0, "those that need masking"),
    ATTN_OUT("tiles_dense", "1", INT, 0, "tiles of dense attention"),
    ATTN_OUT("pairs", "1", INT, 0, "visible pairs"),
    ATTN_OUT("block_sparse", "1", BOOL, 0, "no tile needs masking"),
    ATTN_OUT("speedup", "1", FLOAT, 0, "tiles_dense / tiles_visited"),
    ATTN_OUT("flop_speedup", "1", FLOAT, 0, "all pairs / visible pairs: the bound"),
    ATTN_OUT("efficiency", "1", FLOAT, 0, "visible pairs / pairs of the visited tiles"),
};

typedef struct simulation {
    attn_na na;
    int64_t tq[3], tk[3], q_area, k_area, groups, query_tiles, extra;
    int single, dynamic;
} simulation;

/* Extents of a dilation group: its coordinates from its number. */
static void group_of(const simulation *s, int64_t number, int64_t group[3], int64_t length[3])
{
    for (int axis = s->na.rank - 1; axis >= 0; axis--) {
        const attn_na_axis *a = &s->na.axis[axis];
        group[axis] = number % a->dilation;
        length[axis] = attn_na_members(a->n, a->dilation, group[axis]);
        number /= a->dilation;
    }
}

static attn_status simulate_setup(const attn_call *call, simulation *s)
{
    const attn_na_params *p = call->params;
    *s = (simulation){.q_area = 1, .k_area = 1, .groups = 1, .extra = p->extra, .single = p->tiling == TILING_SINGLE,
                      .dynamic = p->kv_start == KV_DYNAMIC};
    ATTN_TRY(attn_na_setup(p, -1, &s->na));
    if ((p->q_tile.count > 1 && p->q_tile.count != s->na.rank) || (p->kv_tile.count > 1 && p->kv_tile.count != s->na.rank)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "q_tile and kv_tile have %d and %d items, expected %d as grid", p->q_tile.count, p->kv_tile.count,
                         s->na.rank);
    }
    for (int axis = 0; axis < s->na.rank; axis++) {
        s->tq[axis] = p->q_tile.items[p->q_tile.count > 1 ? axis : 0];
        s->tk[axis] = p->kv_tile.items[p->kv_tile.count > 1 ? axis : 0];
        s->q_area *= s->tq[axis];
        s->k_area *= s->tk[axis];
        s->groups *= s->na.axis[axis].dilation;
    }
    if ((double)s->na.tokens * ((double)s->na.tokens + (double)s->extra) > (double)(INT64_MAX / 2)) {
        return attn_fail(ATTN_ERR_ARGUMENT, "grid and extra make too many pairs");
    }
    /* The groups of an axis have one of two lengths, n / d or one more: of up to eight kinds of groups there are `count` each. */
    for (int kind = 0; kind < 1 << s->na.rank; kind++) {
        int64_t count = 1, tiles = 1, tokens = 1;
        for (int axis = 0; axis < s->na.rank; axis++) {
            const attn_na_axis *a = &s->na.axis[axis];
            int64_t longer = kind >> axis & 1, length = a->n / a->dilation + longer;
            count *= longer ? a->n % a->dilation : a->dilation - a->n % a->dilation;
            tiles *= attn_ceil_div(length, s->tq[axis]);
            tokens *= length;
        }
        s->query_tiles += count * (s->single ? attn_ceil_div(tokens, s->q_area) : tiles);
    }
    return ATTN_OK;
}

static attn_status simulate_bind(attn_call *call)
{
    simulation s;
    ATTN_TRY(simulate_setup(call, &s));
    attn_set_dim(call, "query_tiles", s.query_tiles);
    return ATTN_OK;
}

/* Key tiles that a range of queries [first, last] of one axis visits, and those that need no mask on it. */
static void axis_tiles(const simulation *s, int axis, int64_t group, int64_t first, int64_t last, int64_t *visited, int64_t *plain)
{
    const attn_na_axis *a = &s->na.axis[axis];
    int64_t low = INT64_MAX, high = 0, all_low = 0, all_high = INT64_MAX, t = s->tk[axis];
    for (int64_t p = first; p <= last; p++) {
        int64_t start = a->start[p * a->dilation + group], end = a->end[p * a->dilation + group];
        low = attn_min_i64(low, start);
        high = attn_max_i64(high, end);
        all_low = attn_max_i64(all_low, start);
        all_high = attn_min_i64(all_high, end);
    }
    *visited = *plain = 0;
    for (int64_t x = s->dynamic ? low : low / t * t; x < high; x += t) {
        ++*visited;
        *plain += x >= all_low && x + t <= all_high;
    }
}

/* One group, tiles of the grid: visited tiles per query tile into out; the number of masked ones. */
static int64_t simulate_multi(const simulation *s, const int64_t group[3], const int64_t length[3], int64_t **out)
{
    int64_t tiles[3] = {1, 1, 1}, masked = 0;
    for (int axis = 0; axis < s->na.rank; axis++) {
        tiles[axis] = attn_ceil_div(length[axis], s->tq[axis]);
    }
    for (int64_t i = 0; i < tiles[0] * tiles[1] * tiles[2]; i++) {
        int64_t at[3] = {i / (tiles[1] * tiles[2]), i / tiles[2] % tiles[1], i % tiles[2]}, visited = 1, plain = 1;
        for (int axis = 0; axis < s->na.rank; axis++) {
            int64_t first = at[axis] * s->tq[axis], some, some_plain;
            axis_tiles(s, axis, group[axis], first, attn_min_i64(first + s->tq[axis], length[axis]) - 1, &some, &some_plain);
            visited *= some;
            plain *= some_plain;
        }
        *(*out)++ = visited;
        masked += visited - plain;
    }
    return masked;
}

/* The flattened runs of visible keys of a query of a group (place `at` in the flattened group): each is [begin, begin + count). */
typedef struct runs {
    int64_t low[3], high[3], length[3];
} runs;

static void find_runs(const simulation *s, const int64_t group[3], const int64_t length[3], int64_t at, runs *r)
{
    *r = (runs){.high = {1, 1, 1}, .length = {1, 1, 1}};
    int shift = 3 - s->na.rank; /* the last axis is always the third */
    for (int axis = s->na.rank - 1; axis >= 0; axis--) {
        const attn_na_axis *a = &s->na.axis[axis];
        int64_t x = at % length[axis] * a->dilation + group[axis];
        at /= length[axis];
        r->low[axis + shift] = a->start[x];
        r->high[axis + shift] = a->end[x];
        r->length[axis + shift] = length[axis];
    }
}

static int64_t first_key(const runs *r) { return (r->low[0] * r->length[1] + r->low[1]) * r->length[2] + r->low[2]; }

/* One group, tiles of consecutive tokens. counts: scratch of one number per key tile. */
static int64_t simulate_single(const simulation *s, const int64_t group[3], const int64_t length[3], int64_t *counts, int64_t **out)
{
    int64_t tokens = 1, masked = 0, tk = s->k_area;
    for (int axis = 0; axis < s->na.rank; axis++) {
        tokens *= length[axis];
    }
    int64_t tiles = attn_ceil_div(tokens, tk) + 1;
    for (int64_t first = 0; first < tokens; first += s->q_area) {
        int64_t end = attn_min_i64(first + s->q_area, tokens), base = INT64_MAX, visited = 0;
        runs r;
        memset(counts, 0, (size_t)tiles * sizeof *counts);
        for (int64_t q = first; q < end && s->dynamic; q++) {
            find_runs(s, group, length, q, &r);
            base = attn_min_i64(base, first_key(&r));
        }
        base = s->dynamic ? base : 0;
        for (int64_t q = first; q < end; q++) {
            find_runs(s, group, length, q, &r);
            for (int64_t a = r.low[0]; a < r.high[0]; a++) {
                for (int64_t b = r.low[1]; b < r.high[1]; b++) {
                    int64_t begin = (a * r.length[1] + b) * r.length[2] + r.low[2] - base, stop = begin + r.high[2] - r.low[2];
                    for (int64_t tile = begin / tk; tile * tk < stop; tile++) {
                        counts[tile] += attn_min_i64(stop, (tile + 1) * tk) - attn_max_i64(begin, tile * tk);
                    }
                }
            }
        }
        for (int64_t tile = 0; tile < tiles; tile++) {
            visited += counts[tile] > 0;
            masked += counts[tile] > 0 && (base + (tile + 1) * tk > tokens || counts[tile] < (end - first) * tk);
        }
        *(*out)++ = visited;
    }
    return masked;
}

static attn_status simulate_forward(attn_call *call)
{
    simulation s;
    ATTN_TRY(simulate_setup(call, &s));
    ATTN_TRY(attn_na_windows(&s.na, call->arena));
    int64_t *visited = attn_i64(call->t[VISITED]), *at = visited, masked = 0, total = 0, n = s.na.tokens;
    int64_t *counts = attn_arena_array(call->arena, (size_t)(n / s.k_area + 3), sizeof *counts);
    if (counts == NULL) {
        return attn_fail_memory((size_t)(n / s.k_area + 3) * sizeof *counts);
    }
    for (int64_t g = 0; g < s.groups; g++) {
        int64_t group[3] = {0}, length[3] = {0};
        group_of(&s, g, group, length);
        masked += s.single ? simulate_single(&s, group, length, counts, &at) : simulate_multi(&s, group, length, &at);
    }
    int64_t extra_tiles = attn_ceil_div(s.extra, s.k_area);
    for (int64_t i = 0; i < s.query_tiles; i++) {
        visited[i] += extra_tiles;
        masked += s.extra % s.k_area != 0;
        total += visited[i];
    }
    int64_t dense = attn_ceil_div(n, s.q_area) * attn_ceil_div(n + s.extra, s.k_area);
    int64_t pairs = (int64_t)attn_na_pairs(&s.na) + n * s.extra;
    attn_i64(call->t[TILES_VISITED])[0] = total;
    attn_i64(call->t[TILES_MASKED])[0] = masked;
    attn_i64(call->t[TILES_DENSE])[0] = dense;
    attn_i64(call->t[PAIRS])[0] = pairs;
    attn_bool(call->t[BLOCK_SPARSE])[0] = masked == 0;
    attn_f32(call->t[SPEEDUP])[0] = (float)((double)dense / (double)total);
    attn_f32(call->t[FLOP_SPEEDUP])[0] = (float)((double)n * (double)(n + s.extra) / (double)pairs);
    attn_f32(call->t[EFFICIENCY])[0] = (float)((double)pairs / ((double)total * (double)s.q_area * (double)s.k_area));
    return ATTN_OK;
}

const attn_op_class attn_op_neighborhood_simulate = {
    .info = {.name = "neighborhood.simulate",
             .title = "Neighborhood attention: what tiles can save",
             .summary = "The analytical model: which key tiles each query tile visits and which of these need masking, and the speed-up over dense "
                        "attention that follows. Strides that fit the tiles make a pattern block-sparse: then nothing is masked and the "
                        "whole saving in operations can be realised.",
             .paper = ATTN_NA_PAPER,
             ATTN_TABLE(simulate_param_table, simulate_ports)},
    .params_size = sizeof(attn_na_params),
    .bind = simulate_bind,
    .forward = simulate_forward,
};
