#include "core/random.h"

#include <math.h>

void attn_random_seed(attn_random *random, uint64_t seed)
{
    for (int i = 0; i < 4; i++) {
        seed += UINT64_C(0x9e3779b97f4a7c15);
        uint64_t z = seed;
        z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
        random->state[i] = z ^ (z >> 31);
    }
}

static uint64_t rotate_left(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }

uint64_t attn_random_u64(attn_random *random)
{
    uint64_t *s = random->state;
    uint64_t result = rotate_left(s[1] * 5, 7) * 9;
    uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return result;
}

uint64_t attn_random_below(attn_random *random, uint64_t bound)
{
    uint64_t limit = UINT64_MAX - UINT64_MAX % bound;
    uint64_t value;
    do {
        value = attn_random_u64(random);
    } while (value >= limit);
    return value % bound;
}

double attn_random_uniform(attn_random *random)
{
    return (double)(attn_random_u64(random) >> 11) * 0x1.0p-53;
}

double attn_random_normal(attn_random *random)
{
    /* Box-Muller; 1 - u is never 0. */
    double radius = sqrt(-2.0 * log(1.0 - attn_random_uniform(random)));
    return radius * cos(6.283185307179586476925 * attn_random_uniform(random));
}
