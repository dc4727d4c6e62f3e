#include "kernel/linear.h"

ATTN_KERNEL_TABLES(attn_linear_kernels, attn_linear_kernels_table);

const attn_linear_kernels *attn_linear_kernels_at(attn_isa isa) { return ATTN_KERNEL_SELECT(attn_linear_kernels_table, isa); }

const attn_linear_kernels *attn_linear_kernels_get(void) { return attn_linear_kernels_at(attn_isa_current()); }
