#include "kernel/decode.h"

ATTN_KERNEL_DOT_TABLES(attn_decode_kernels, attn_decode_kernels_table);

const attn_decode_kernels *attn_decode_kernels_at(attn_isa isa) { return ATTN_KERNEL_DOT_SELECT(attn_decode_kernels_table, isa); }

const attn_decode_kernels *attn_decode_kernels_get(void) { return attn_decode_kernels_at(attn_isa_current()); }
