#!/usr/bin/env bash
# Build all fuzzers with clang, address and undefined-behaviour sanitizers, and run each: fuzz/run.sh SECONDS [NAME...]
# Ends with "N passed, N failed"; inputs that crash are left in build-fuzz/crashes/.
set -u
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
build=build-fuzz
if [ ! -f $build/build.ninja ]; then
    CC=clang meson setup $build -Dfuzz=true -Dtests=disabled -Dbuildtype=debugoptimized -Db_sanitize=address,undefined -Db_lundef=false \
        -Dwerror=false -Dc_args=-fsanitize=fuzzer-no-link >$build.log 2>&1 || { cat $build.log; exit 1; }
fi
ninja -C $build >$build.log 2>&1 || { tail -n 30 $build.log; exit 1; }
mkdir -p $build/crashes
${CC:-cc} -o $build/seeds fuzz/seeds.c && fuzz/seeds.sh $build/cli/attn $build/seeds $build/corpus || exit 1
passed=0 failed=0
for name in ${*:-gguf model plan safetensors spec tokenizer}; do
    log=$build/fuzz_$name.log
    if OMP_NUM_THREADS=1 $build/fuzz/fuzz_"$name" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=3000 -max_len=65536 \
        -artifact_prefix=$build/crashes/"$name"- $build/corpus/"$name" >"$log" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        grep -aE 'ERROR|runtime error|SUMMARY|Test unit' "$log" | head
    fi
    echo "$name: $(grep -aoE '(stat::number_of_executed_units|Done) *:? *[0-9]+' "$log" | tail -n 1 | grep -oE '[0-9]+') executions, $(grep -aoE 'cov: [0-9]+' "$log" | tail -n 1)"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
