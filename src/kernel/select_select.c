#include "kernel/select.h"

ATTN_KERNEL_TABLES(attn_select_kernels, attn_select_kernels_table);

const attn_select_kernels *attn_select_kernels_at(attn_isa isa) { return ATTN_KERNEL_SELECT(attn_select_kernels_table, isa); }

const attn_select_kernels *attn_select_kernels_get(void) { return attn_select_kernels_at(attn_isa_current()); }
