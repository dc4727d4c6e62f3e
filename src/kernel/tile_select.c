#include "kernel/tile.h"

ATTN_KERNEL_TABLES(attn_tile_kernels, attn_tile_kernels_table);

const attn_tile_kernels *attn_tile_kernels_at(attn_isa isa) { return ATTN_KERNEL_SELECT(attn_tile_kernels_table, isa); }

const attn_tile_kernels *attn_tile_kernels_get(void) { return attn_tile_kernels_at(attn_isa_current()); }
