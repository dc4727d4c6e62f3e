/* Speed that does not depend on the length, which several papers claim. */
#ifndef ATTN_LAB_SPEED_H
#define ATTN_LAB_SPEED_H

#include "lab/lab.h"

/* The spread of some times per token: largest over smallest, less 1. */
static inline double lab_spread(const double *times, int count)
{
    double low = times[0], high = times[0];
    for (int i = 1; i < count; i++) {
        low = times[i] < low ? times[i] : low;
        high = times[i] > high ? times[i] : high;
    }
    return high / low - 1;
}

#endif
