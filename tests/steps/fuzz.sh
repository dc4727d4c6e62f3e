#!/usr/bin/env bash
# Parsers: a short fuzz run of each (fuzz/run.sh makes long ones)
cd "$(dirname "$0")/../.." || exit 1
build=$1
seconds=${FUZZ_SECONDS:-3}
seeds=$(mktemp -d)
trap 'rm -rf "$seeds"' EXIT
fuzz/seeds.sh "$build/cli/attn" "$build/fuzz/seeds" "$seeds" || exit 1
passed=0 failed=0
for name in gguf model plan safetensors spec tokenizer; do
    if out=$(OMP_NUM_THREADS=1 timeout $((seconds + 60)) "$build/fuzz/fuzz_$name" "$seconds" "$seeds/$name"/* 2>&1); then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
    echo "$name: $out"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
