/* Where the threads of a parallel region wait for each other when it happens often: OpenMP's own barrier asks the kernel every time and soon
 * puts threads to sleep, and generating one token of a small model takes hundreds of steps of a few microseconds. This one spins for up to a
 * third of a millisecond, then gives its turn away; at once when there are more threads than processors. */
#ifndef ATTN_CORE_BARRIER_H
#define ATTN_CORE_BARRIER_H

#include <stdatomic.h>

typedef struct attn_barrier {
    atomic_uint arrived, phase;
    int spins;
} attn_barrier;

/* For regions of up to `threads` threads. */
void attn_barrier_init(attn_barrier *barrier, int threads);
/* Returns when `threads` threads, all of the region, have called it. */
void attn_barrier_wait(attn_barrier *barrier, int threads);

#endif
