#include <attn/machine.h>

#include "core/internal.h"
#include "kernel/peak.h"

const char *attn_machine_isa(void) { return attn_isa_name(attn_isa_current()); }

double attn_machine_peak_flops(int threads) { return attn_peak_flops(attn_exec_threads(&(attn_exec){.threads = threads})); }

double attn_machine_bandwidth(int threads) { return attn_peak_bandwidth(attn_exec_threads(&(attn_exec){.threads = threads})); }
