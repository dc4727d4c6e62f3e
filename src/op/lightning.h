/* The decay schedule of lightning attention, which tnl shares. */
#ifndef ATTN_OP_LIGHTNING_H
#define ATTN_OP_LIGHTNING_H

#include "op/class.h"

enum { ATTN_SLOPES_GEOMETRIC, ATTN_SLOPES_LINEAR };

/* slope [heads] of layer `layer` of `layers`. */
void attn_lightning_slopes(int64_t schedule, int64_t heads, int64_t layer, int64_t layers, double eps, float *slope);
/* ATTN_ERR_ARGUMENT unless every slope is finite and not negative; NULL is fine. */
attn_status attn_lightning_check_slopes(const float *slope, int64_t heads);

#endif
