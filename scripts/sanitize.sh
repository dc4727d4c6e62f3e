#!/usr/bin/env bash
# All C tests under the sanitizers: address and undefined behaviour with gcc, threads with clang (whose OpenMP it understands).
set -eu
cd "$(dirname "$0")/.."
asan=build-asan
[ -f $asan/build.ninja ] || meson setup $asan -Dbuildtype=debugoptimized -Db_sanitize=address,undefined -Db_lundef=false -Dwerror=false
ninja -C $asan
meson test -C $asan --no-rebuild --print-errorlogs -t 10
for isa in scalar avx2 avx512; do
    ATTN_ISA=$isa $asan/cli/attn check tests/golden
done
tsan=build-tsan
[ -f $tsan/build.ninja ] || CC=clang meson setup $tsan -Dbuildtype=debugoptimized -Db_sanitize=thread -Db_lundef=false -Dwerror=false
ninja -C $tsan
TSAN_OPTIONS="ignore_noninstrumented_modules=1" meson test -C $tsan --no-rebuild --print-errorlogs -t 20
TSAN_OPTIONS="ignore_noninstrumented_modules=1" $tsan/cli/attn check tests/golden
