/* Which instruction set the micro-kernels use. */
#ifndef ATTN_KERNEL_DISPATCH_H
#define ATTN_KERNEL_DISPATCH_H

typedef enum attn_isa {
    ATTN_ISA_LEVEL_SCALAR = 0,
    ATTN_ISA_LEVEL_NEON = 1,
    ATTN_ISA_LEVEL_AVX2 = 2,
    ATTN_ISA_LEVEL_AVX512 = 3,
    ATTN_ISA_LEVEL_AVX512VNNI = 4 /* only the 8-bit kernels differ from AVX512 */
} attn_isa;

/* The best one that this machine has, or what ATTN_ISA=scalar|neon|avx2|avx512|avx512vnni asks for when the machine has
 * it (plain avx512 includes VNNI where there is). Read once; an unknown or unavailable value falls to the best
 * available one below it and is reported by attn_isa_name(). */
attn_isa attn_isa_current(void);
const char *attn_isa_name(attn_isa isa);
/* Whether this machine (and build) can run kernels of a level; tests loop over the levels with it. */
int attn_isa_available(attn_isa isa);
/* For tests: use this level from now on. Not thread-safe. */
void attn_isa_force(attn_isa isa);

/* A family of kernels is a struct of function pointers, in one file written over vec.h, which ends with
 *     const attn_foo_kernels ATTN_K(attn_foo_kernels_table) = { ... };
 * ATTN_KERNEL_TABLES declares the tables of a family, ATTN_KERNEL_SELECT picks by level. */
#if defined(__x86_64__)
#define ATTN_KERNEL_TABLES(type, name) extern const type name##_scalar, name##_avx2, name##_avx512
#define ATTN_KERNEL_SELECT(name, isa)                            \
    ((isa) >= ATTN_ISA_LEVEL_AVX512 ? &name##_avx512             \
     : (isa) == ATTN_ISA_LEVEL_AVX2 ? &name##_avx2               \
                                    : &name##_scalar)
#define ATTN_KERNEL_DOT_TABLES(type, name) extern const type name##_scalar, name##_avx2, name##_avx512, name##_avx512vnni
#define ATTN_KERNEL_DOT_SELECT(name, isa)                        \
    ((isa) >= ATTN_ISA_LEVEL_AVX512VNNI ? &name##_avx512vnni     \
                                        : ATTN_KERNEL_SELECT(name, isa))
#elif defined(__aarch64__)
#define ATTN_KERNEL_TABLES(type, name) extern const type name##_scalar, name##_neon
#define ATTN_KERNEL_SELECT(name, isa) ((isa) == ATTN_ISA_LEVEL_NEON ? &name##_neon : &name##_scalar)
#define ATTN_KERNEL_DOT_TABLES(type, name) ATTN_KERNEL_TABLES(type, name)
#define ATTN_KERNEL_DOT_SELECT(name, isa) ATTN_KERNEL_SELECT(name, isa)
#else
#define ATTN_KERNEL_TABLES(type, name) extern const type name##_scalar
#define ATTN_KERNEL_SELECT(name, isa) ((void)(isa), &name##_scalar)
#define ATTN_KERNEL_DOT_TABLES(type, name) ATTN_KERNEL_TABLES(type, name)
#define ATTN_KERNEL_DOT_SELECT(name, isa) ATTN_KERNEL_SELECT(name, isa)
#endif

#endif
