#!/usr/bin/env bash
# Parsers: a short fuzz run of each (fuzz/run.sh makes long ones)
cd "$(dirname "$0")/../.." || exit 1
build=$1
seconds=${FUZZ_SECONDS:-3}
seeds=$(mktemp -d)
trap 'rm -rf "$seeds"' EXIT
"$build"/fuzz/seeds "$seeds/gguf"
head -c 4000 "$seeds/gguf" >"$seeds/gguf-cut"
"$build"/cli/attn plan make streaming:2,16+strided:8,0 --causal --tokens 100 --block 8 --out "$seeds/plan" >/dev/null
"$build"/cli/attn plan make window:3,2 --tokens 40 --block 8 --out "$seeds/plan-window" >/dev/null
"$build"/cli/attn list | cut -d' ' -f1 | head -n 100 | while read -r name; do
    printf '%s:scale=0.5,grid=[2,3],causal=true,window=[-1,3],heads=2' "$name" >"$seeds/spec-$name"
done
for i in 0 1 2 3; do
    printf "\\$i\\0\\15\\6\\3\\1\\2\\3\\3\\1\\5abc\\2\\1\\7de\\1\\3a b\\3c d The quick brown fox, caf\\303\\251." >"$seeds/tokenizer-$i"
done
passed=0 failed=0
run() {
    name=$1
    shift
    if out=$(OMP_NUM_THREADS=1 timeout $((seconds + 60)) "$build"/fuzz/fuzz_"$name" "$seconds" "$@" 2>&1); then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
    echo "$name: $out"
}
run gguf "$seeds"/gguf*
run model "$seeds"/gguf
run plan "$seeds"/plan*
# shellcheck disable=SC2046
run safetensors $(find tests/golden -name '*.safetensors' -size -16k | sort | head -n 60)
run spec "$seeds"/spec-*
run tokenizer "$seeds"/tokenizer-*
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
