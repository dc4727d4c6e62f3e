#!/usr/bin/env bash
# The measurements behind docs/performance.md: scripts/bench.sh BUILD
set -eu
build=${1:-build}
"$build"/cli/attn bench --machine
for threads in 1 2; do
    echo
    "$build"/cli/attn bench --threads $threads dense -n 512,4096
done
if [ -x build-check/bench/bench_dense ]; then
    for threads in 1 2; do
        build-check/bench/bench_dense --threads $threads
    done
    build-check/tests/checkkernel --bench
else
    echo "The full set (bench/) is built by 'make check'."
fi
