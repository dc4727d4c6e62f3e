#include "core/barrier.h"

#include <omp.h>
#include <sched.h>

#define SPINS 20000

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

void attn_barrier_init(attn_barrier *barrier, int threads)
{
    atomic_init(&barrier->arrived, 0);
    atomic_init(&barrier->phase, 0);
    static atomic_int processors; /* asked for once: it is a system call */
    int known = atomic_load_explicit(&processors, memory_order_relaxed);
    if (known == 0) {
        known = omp_get_num_procs();
        atomic_store_explicit(&processors, known, memory_order_relaxed);
    }
    barrier->spins = threads <= known ? SPINS : 0;
}

void attn_barrier_wait(attn_barrier *barrier, int threads)
{
    unsigned phase = atomic_load_explicit(&barrier->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == (unsigned)threads - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&barrier->phase, memory_order_acquire) == phase;) {
        if (spins < barrier->spins) {
            spins++;
            RELAX();
        } else {
            sched_yield();
        }
    }
}
