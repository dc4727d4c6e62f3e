/* What the library found out about this machine. */
#ifndef ATTN_MACHINE_H
#define ATTN_MACHINE_H

#include <attn/status.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The instruction set in use: "scalar", "neon", "avx2", "avx512", "avx512vnni" (see ATTN_ISA in the environment). */
ATTN_API const char *attn_machine_isa(void);
/* Measured f32 multiply-add peak on `threads` threads (0: all), FLOP/s, two per multiply-add. Takes about a second. */
ATTN_API double attn_machine_peak_flops(int threads);
/* Measured read bandwidth of memory on `threads` threads (0: all), bytes/s. Takes about a second and 256 MB. */
ATTN_API double attn_machine_bandwidth(int threads);

#ifdef __cplusplus
}
#endif
#endif
