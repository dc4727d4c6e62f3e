/* The windows of neighborhood attention, which its operators share. */
#ifndef ATTN_OP_NEIGHBORHOOD_H
#define ATTN_OP_NEIGHBORHOOD_H

#include "op/class.h"

#define ATTN_NA_PAPER "arXiv:2403.04690, arXiv:2504.16922"

typedef struct attn_na_params {
    attn_ints grid, kernel, stride, dilation, causal, tile, q_tile, kv_tile;
    double scale;
    int64_t decode, tiling, kv_start, extra;
} attn_na_params;

#define ATTN_NA_PATTERN_PARAMS                                                                                         \
    ATTN_P_LIST(INTS, "grid", attn_na_params, grid, NULL, 1, ATTN_MOST_EXTENT, 1, 3, "positions per axis; their product is N"), \
        ATTN_P_LIST(INTS, "kernel", attn_na_params, kernel, NULL, 1, ATTN_MOST_EXTENT, 1, 3, "window size per axis, or one for all"), \
        ATTN_P_LIST(INTS, "stride", attn_na_params, stride, "1", 1, ATTN_MOST_EXTENT, 1, 3, "queries that share a window; at most kernel"), \
        ATTN_P_LIST(INTS, "dilation", attn_na_params, dilation, "1", 1, ATTN_MOST_EXTENT, 1, 3, "distance between keys of a window"), \
        ATTN_P_LIST(BOOLS, "causal", attn_na_params, causal, "false", 0, 1, 1, 3, "per axis: later keys are invisible")

typedef struct attn_na_axis {
    int64_t n, kernel, stride, dilation;
    int causal;
    int64_t *start, *end; /* [n]: window of each position, in members of its dilation group; made by attn_na_windows() */
} attn_na_axis;

typedef struct attn_na {
    int rank;
    int64_t tokens;
    attn_na_axis axis[3];
} attn_na;

/* From the parameters, checked; tokens -1: any. */
attn_status attn_na_setup(const attn_na_params *p, int64_t tokens, attn_na *na);
attn_status attn_na_windows(attn_na *na, attn_arena *arena);
/* Members of a dilation group. */
int64_t attn_na_members(int64_t n, int64_t dilation, int64_t group);
/* Visible pairs. */
double attn_na_pairs(const attn_na *na);

#endif
