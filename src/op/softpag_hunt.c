/* HeadHunter (arXiv:2506.10978), the rest of softpag.c: combining predictions, and choosing the heads to perturb. */
#include "op/class.h"

#include <string.h>

/* ---- softpag.guide ---- */

typedef struct guide_params {
    double perturb_scale, guidance_scale;
} guide_params;

static const attn_param_info guide_param_table[] = {
    ATTN_P_FLOAT("perturb_scale", guide_params, perturb_scale, "3.0", -INFINITY, INFINITY, "how far away from the perturbed prediction"),
    ATTN_P_FLOAT("guidance_scale", guide_params, guidance_scale, "0.0", -INFINITY, INFINITY,
                 "classifier-free guidance, with uncond only"),
};

enum { GUIDE_COND, GUIDE_PERTURBED, GUIDE_UNCOND, GUIDE_O };

static const attn_port_info guide_ports[] = {
    ATTN_IN("cond", "...", FLOAT, 0, "prediction with the condition"),
    ATTN_IN("perturbed", "...", FLOAT, 0, "prediction with perturbed heads"),
    ATTN_IN("uncond", "...", FLOAT, ATTN_PORT_OPTIONAL, "prediction without the condition"),
    ATTN_OUT("o", "...", FLOAT, 0, "the guided prediction"),
};

static attn_status guide_bind(attn_call *call)
{
    const attn_tensor *cond = call->t[GUIDE_COND];
    for (int port = GUIDE_PERTURBED; port <= GUIDE_UNCOND; port++) {
        const attn_tensor *other = call->t[port];
        if (other != NULL &&
            (other->ndim != cond->ndim || memcmp(other->shape, cond->shape, (size_t)cond->ndim * sizeof cond->shape[0]) != 0)) {
            return attn_fail(ATTN_ERR_SHAPE, "%s and cond differ in shape", guide_ports[port].name);
        }
    }
    return ATTN_OK;
}

static attn_status guide_forward(attn_call *call)
{
    const guide_params *p = call->params;
    const float *cond = attn_f32(call->t[GUIDE_COND]), *perturbed = attn_f32(call->t[GUIDE_PERTURBED]);
    const float *uncond = attn_f32(call->t[GUIDE_UNCOND]);
    for (int64_t i = 0; i < attn_tensor_count(call->t[GUIDE_COND]); i++) {
        double c = (double)cond[i];
        double base = uncond != NULL ? (double)uncond[i] + p->guidance_scale * (c - (double)uncond[i]) : c;
        attn_f32(call->t[GUIDE_O])[i] = (float)(base + p->perturb_scale * (c - (double)perturbed[i]));
    }
    return ATTN_OK;
}

const attn_op_class attn_op_softpag_guide = {
    .info = {.name = "softpag.guide",
             .title = "Perturbed attention heads: combine predictions",
             .summary = "Move the conditional prediction away from the perturbed one, with or without classifier-free guidance.",
             .paper = "arXiv:2506.10978",
             ATTN_TABLE(guide_param_table, guide_ports)},
    .params_size = sizeof(guide_params),
    .bind = guide_bind,
    .forward = guide_forward,
};

/* ---- softpag.select: one expansion step of HeadHunter ---- */

enum { METHOD_MEAN, METHOD_HARMONIC, METHOD_THRESHOLD };

typedef struct select_params {
    int64_t top_k, method;
    double pick_min, laion_min;
} select_params;

static const attn_param_info select_param_table[] = {
    ATTN_P_INT("top_k", select_params, top_k, NULL, 1, 1e6, "heads to add"),
    ATTN_P_CHOICE("method", select_params, method, "mean", "mean|harmonic|threshold",
                  "mean score; harmonic mean with clip; clip among heads that pass both minima"),
    ATTN_P_FLOAT("pick_min", select_params, pick_min, "20", -INFINITY, INFINITY, "least mean score (threshold)"),
    ATTN_P_FLOAT("laion_min", select_params, laion_min, "6", -INFINITY, INFINITY, "least mean laion (threshold)"),
};

enum { SELECT_SCORE, SELECT_SELECTED, SELECT_CLIP, SELECT_LAION, SELECT_VALUE, SELECT_HEADS, SELECT_UPDATED };

static const attn_port_info select_ports[] = {
    ATTN_IN("score", "L,H,M", FLOAT, 0, "objective of each candidate head on each prompt-seed pair"),
    ATTN_IN("selected", "L,H", BOOL, 0, "heads selected before"),
    ATTN_IN("clip", "L,H,M", FLOAT, ATTN_PORT_OPTIONAL, "second objective (harmonic, threshold)"),
    ATTN_IN("laion", "L,H,M", FLOAT, ATTN_PORT_OPTIONAL, "third objective (threshold)"),
    ATTN_OUT("value", "L,H", FLOAT, 0, "the ranking value"),
    ATTN_OUT("heads", "top_k,2", INT, 0, "layer and head, best first; -1 when candidates run out"),
    ATTN_OUT("selected", "L,H", BOOL, 0, "heads selected now"),
};

static attn_status select_bind(attn_call *call)
{
    const select_params *p = call->params;
    if (p->method != METHOD_MEAN && call->t[SELECT_CLIP] == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "method harmonic and threshold need input clip");
    }
    if (p->method == METHOD_THRESHOLD && call->t[SELECT_LAION] == NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "method threshold needs input laion");
    }
    if (attn_dim(call, "M") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "score needs at least one prompt-seed pair");
    }
    attn_set_dim(call, "top_k", p->top_k);
    return ATTN_OK;
}

static double mean_of(const attn_tensor *scores, int64_t i, int64_t m)
{
    double sum = 0;
    for (int64_t j = 0; j < m && scores != NULL; j++) {
        sum += (double)attn_f32(scores)[i * m + j];
    }
    return sum / (double)m;
}

/* The best candidate that is left (lowest index on ties), -1 when there is none. */
static int64_t best_candidate(const double *value, const uint8_t *taken, int64_t count)
{
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++) {
        if (!taken[i] && (best < 0 || value[i] > value[best])) {
            best = i;
        }
    }
    return best;
}

static attn_status select_forward(attn_call *call)
{
    const select_params *p = call->params;
    int64_t heads = attn_dim(call, "H"), count = attn_dim(call, "L") * heads, m = attn_dim(call, "M");
    double *value = attn_arena_array(call->arena, (size_t)count, sizeof *value);
    uint8_t *taken = attn_arena_alloc(call->arena, (size_t)count), *selected = attn_bool(call->t[SELECT_UPDATED]);
    if (value == NULL || taken == NULL) {
        return attn_fail_memory((size_t)count * sizeof *value);
    }
    for (int64_t i = 0; i < count; i++) {
        double score = mean_of(call->t[SELECT_SCORE], i, m), clip = mean_of(call->t[SELECT_CLIP], i, m);
        int passes = p->method != METHOD_THRESHOLD ||
                     (score >= p->pick_min && mean_of(call->t[SELECT_LAION], i, m) >= p->laion_min);
        value[i] = p->method == METHOD_MEAN       ? score
                   : p->method == METHOD_HARMONIC ? (score + clip > 0 ? 2 * score * clip / (score + clip) : 0)
                   : passes                       ? clip
                                                  : -INFINITY;
        selected[i] = attn_bool(call->t[SELECT_SELECTED])[i] != 0;
        taken[i] = selected[i] || !passes;
        attn_f32(call->t[SELECT_VALUE])[i] = (float)value[i];
    }
    for (int64_t r = 0; r < p->top_k; r++) {
        int64_t best = best_candidate(value, taken, count);
        attn_i64(call->t[SELECT_HEADS])[2 * r] = best >= 0 ? best / heads : -1;
        attn_i64(call->t[SELECT_HEADS])[2 * r + 1] = best >= 0 ? best % heads : -1;
        if (best >= 0) {
            taken[best] = selected[best] = 1;
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_softpag_select = {
    .info = {.name = "softpag.select",
             .title = "HeadHunter: one expansion step",
             .summary = "Rank candidate heads by an objective measured with each of them perturbed, and add the best to the selected set.",
             .paper = "arXiv:2506.10978",
             ATTN_TABLE(select_param_table, select_ports)},
    .params_size = sizeof(select_params),
    .bind = select_bind,
    .forward = select_forward,
};

/* ---- softpag.hunt: the greedy loop on a quadratic objective ---- */

typedef struct hunt_params {
    int64_t heads, top_k, rounds;
} hunt_params;

static const attn_param_info hunt_param_table[] = {
    ATTN_P_INT("heads", hunt_params, heads, NULL, 1, INFINITY, "heads per layer"),
    ATTN_P_INT("top_k", hunt_params, top_k, NULL, 1, 1e6, "heads added per round"),
    ATTN_P_INT("rounds", hunt_params, rounds, NULL, 1, 1e6, "rounds"),
};

enum { HUNT_GAIN, HUNT_PAIR, HUNT_HEADS, HUNT_SELECTED, HUNT_VALUE };

static const attn_port_info hunt_ports[] = {
    ATTN_IN("gain", "M,all", FLOAT, 0, "gain of each head (flat l*H + h) on each prompt-seed pair"),
    ATTN_IN("pair", "all,all", FLOAT, 0, "symmetric pair terms; the diagonal is ignored"),
    ATTN_OUT("heads", "rounds,top_k,2", INT, 0, "layer and head added in each round; -1 when none is left"),
    ATTN_OUT("selected", "L,H", BOOL, 0, "the final set"),
    ATTN_OUT("value", "rounds", FLOAT, 0, "mean objective of the set after each round"),
};

static attn_status hunt_bind(attn_call *call)
{
    const hunt_params *p = call->params;
    int64_t all = attn_dim(call, "all");
    if (all % p->heads != 0) {
        return attn_fail(ATTN_ERR_ARGUMENT, "heads = %lld does not divide the %lld columns of gain", (long long)p->heads,
                         (long long)all);
    }
    if (attn_dim(call, "M") < 1) {
        return attn_fail(ATTN_ERR_SHAPE, "gain needs at least one row");
    }
    attn_set_dim(call, "L", all / p->heads);
    attn_set_dim(call, "H", p->heads);
    attn_set_dim(call, "rounds", p->rounds);
    attn_set_dim(call, "top_k", p->top_k);
    return ATTN_OK;
}

/* What the pairs of head i with the selected ones add to the objective. */
static double pair_terms(const float *pair, int64_t all, const uint8_t *selected, int64_t i)
{
    double sum = 0;
    for (int64_t j = 0; j < all; j++) {
        sum += selected[j] && j != i ? (double)pair[attn_min_i64(i, j) * all + attn_max_i64(i, j)] : 0;
    }
    return sum;
}

static attn_status hunt_forward(attn_call *call)
{
    const hunt_params *p = call->params;
    int64_t all = attn_dim(call, "all"), m = attn_dim(call, "M");
    const float *pair = attn_f32(call->t[HUNT_PAIR]);
    uint8_t *selected = attn_bool(call->t[HUNT_SELECTED]);
    double *gain = attn_arena_array(call->arena, (size_t)all, sizeof *gain);
    double *value = attn_arena_array(call->arena, (size_t)all, sizeof *value);
    uint8_t *taken = attn_arena_alloc(call->arena, (size_t)all);
    if (gain == NULL || value == NULL || taken == NULL) {
        return attn_fail_memory((size_t)all * sizeof *gain);
    }
    for (int64_t i = 0; i < all; i++) {
        gain[i] = 0;
        selected[i] = taken[i] = 0;
        for (int64_t j = 0; j < m; j++) {
            gain[i] += (double)attn_f32(call->t[HUNT_GAIN])[j * all + i];
        }
    }
    double objective = 0; /* sums over the prompt-seed pairs: means would round, and equal heads would differ */
    for (int64_t round = 0; round < p->rounds; round++) {
        for (int64_t i = 0; i < all; i++) { /* what head i would add to the set as it was before this round */
            value[i] = gain[i] + (double)m * pair_terms(pair, all, selected, i);
        }
        int64_t *heads = attn_i64(call->t[HUNT_HEADS]) + round * p->top_k * 2;
        for (int64_t r = 0; r < p->top_k; r++) {
            int64_t best = best_candidate(value, taken, all);
            heads[2 * r] = best >= 0 ? best / p->heads : -1;
            heads[2 * r + 1] = best >= 0 ? best % p->heads : -1;
            if (best < 0) {
                continue;
            }
            objective += gain[best] + (double)m * pair_terms(pair, all, selected, best);
            taken[best] = selected[best] = 1;
        }
        attn_f32(call->t[HUNT_VALUE])[round] = (float)(objective / (double)m);
    }
    return ATTN_OK;
}

const attn_op_class attn_op_softpag_hunt = {
    .info = {.name = "softpag.hunt",
             .title = "HeadHunter: the greedy loop on a quadratic objective",
             .summary = "Rounds of ranking all remaining heads with the selected set and adding the best top_k, on a closed-form objective "
                        "with pair terms: for studying how many rounds a search needs.",
             .paper = "arXiv:2506.10978",
             ATTN_TABLE(hunt_param_table, hunt_ports)},
    .params_size = sizeof(hunt_params),
    .bind = hunt_bind,
    .forward = hunt_forward,
};
