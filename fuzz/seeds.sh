#!/usr/bin/env bash
# Inputs that the fuzzers start from: fuzz/seeds.sh ATTN SEEDS DIR
# ATTN is the attn command, SEEDS the program of seeds.c; writes DIR/TARGET/* for each target.
set -e
attn=$1 seeds=$2 dir=$3
cd "$(dirname "$0")/.."
mkdir -p "$dir"/{gguf,model,plan,safetensors,spec,tokenizer}
"$seeds" "$dir/gguf/llama"
head -c 4000 "$dir/gguf/llama" >"$dir/gguf/llama-cut"
cp "$dir/gguf/llama" "$dir/model/"
"$attn" plan make streaming:2,16+strided:8,0 --causal --tokens 100 --block 8 --out "$dir/plan/streaming" >/dev/null
"$attn" plan make window:3,2 --tokens 40 --block 8 --out "$dir/plan/window" >/dev/null
find tests/golden -name '*.safetensors' -size -16k | sort | head -n 60 | while read -r case; do
    cp "$case" "$dir/safetensors/"
done
"$attn" list | cut -d' ' -f1 | while read -r name; do
    printf '%s:scale=0.5,grid=[2,3],causal=true,window=[-1,3],heads=2' "$name" >"$dir/spec/$name"
done
for i in 0 1 2 3; do
    printf "\\$i\\0\\15\\6\\3\\1\\2\\3\\3\\1\\5abc\\2\\1\\7de\\1\\3a b\\3c d The quick brown fox, caf\\303\\251." >"$dir/tokenizer/$i"
done
