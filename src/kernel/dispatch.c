#include "kernel/dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[] = {"scalar", "neon", "avx2", "avx512", "avx512vnni"};

#define LEVELS ((int)(sizeof names / sizeof names[0]))

const char *attn_isa_name(attn_isa isa) { return names[isa]; }

#if defined(__x86_64__)
/* Not every compiler's __builtin_cpu_supports() knows it: bit 29 of ecx of leaf 1. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

int attn_isa_available(attn_isa isa)
{
    switch (isa) {
    case ATTN_ISA_LEVEL_SCALAR: return 1;
#if defined(__aarch64__)
    case ATTN_ISA_LEVEL_NEON: return 1;
#endif
#if defined(__x86_64__)
    case ATTN_ISA_LEVEL_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case ATTN_ISA_LEVEL_AVX512:
        return attn_isa_available(ATTN_ISA_LEVEL_AVX2) && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
    case ATTN_ISA_LEVEL_AVX512VNNI:
        return attn_isa_available(ATTN_ISA_LEVEL_AVX512) && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("avx512vbmi");
#endif
    default: return 0;
    }
}

/* Level + 1, 0 while unknown. Threads that race to fill it write the same value. */
static atomic_int chosen;

static attn_isa choose(void)
{
    const char *asked = getenv("ATTN_ISA");
    int limit = LEVELS - 1;
    if (asked != NULL) {
        for (int i = 0; i < LEVELS; i++) {
            if (strcmp(asked, names[i]) == 0) {
                limit = i == ATTN_ISA_LEVEL_AVX512 ? ATTN_ISA_LEVEL_AVX512VNNI : i;
            }
        }
    }
    while (!attn_isa_available((attn_isa)limit)) {
        limit--;
    }
    return (attn_isa)limit;
}

attn_isa attn_isa_current(void)
{
    int value = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (value == 0) {
        value = (int)choose() + 1;
        atomic_store_explicit(&chosen, value, memory_order_relaxed);
    }
    return (attn_isa)(value - 1);
}

void attn_isa_force(attn_isa isa) { atomic_store(&chosen, (int)isa + 1); }
