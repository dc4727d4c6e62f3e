/* Deterministic random numbers: xoshiro256** (Blackman and Vigna) seeded by splitmix64; the same on every machine. */
#ifndef ATTN_CORE_RANDOM_H
#define ATTN_CORE_RANDOM_H

#include <stdint.h>

typedef struct attn_random {
    uint64_t state[4];
} attn_random;

void attn_random_seed(attn_random *random, uint64_t seed);
uint64_t attn_random_u64(attn_random *random);
/* Uniform in 0 ... bound-1, bound >= 1, without modulo bias. */
uint64_t attn_random_below(attn_random *random, uint64_t bound);
/* Uniform in [0, 1). */
double attn_random_uniform(attn_random *random);
/* Standard normal. */
double attn_random_normal(attn_random *random);

#endif
