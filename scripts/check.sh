#!/usr/bin/env bash
# Build with tests and run all of them; the last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/.."
build=build-check
passed=0
failed=0

# count NAME LOG: add the last "N passed, N failed[, N skipped]" of a log.
add() {
    passed=$((passed + $1))
    failed=$((failed + $2))
}
heading() { printf '\n== %s\n' "$*"; }

heading "Build"
if [ ! -f $build/build.ninja ]; then
    meson setup $build >$build.log 2>&1 || { cat $build.log; echo "0 passed, 1 failed"; exit 1; }
fi
if ! ninja -C $build >$build.log 2>&1; then
    grep -A8 -E 'error|FAILED' $build.log | head -60
    echo "0 passed, 1 failed"
    exit 1
fi

heading "Unit tests"
meson test -C $build --no-rebuild --print-errorlogs
log=$build/meson-logs/testlog.txt
# Each cmocka program reports its own tests; other programs count as one.
cases=$(grep -aoE '\[  PASSED  \] [0-9]+ test' $log | awk '{s += $4} END {print s + 0}')
bad=$(grep -aoE '\[  FAILED  \] [0-9]+ test' $log | awk '{s += $4} END {print s + 0}')
plain_ok=$(python3 - $build/meson-logs/testlog.json <<'PY'
import json, sys
ok = bad = 0
for line in open(sys.argv[1]):
    t = json.loads(line)
    cm = '[==========]' in (t.get('stdout') or '') + (t.get('stderr') or '')
    if t['result'] in ('OK', 'EXPECTEDFAIL'):
        ok += not cm
    elif t['result'] != 'SKIP':
        bad += not cm or '[  FAILED  ]' not in (t.get('stdout') or '') + (t.get('stderr') or '')
print(ok, bad)
PY
)
add "$cases" "$bad"
# shellcheck disable=SC2086
add ${plain_ok% *} ${plain_ok#* }

heading "Expected results (tests/golden) for each instruction set and thread count"
for isa in scalar avx2 avx512; do
    for threads in 1 2; do
        out=$(ATTN_ISA=$isa $build/cli/attn check --threads $threads tests/golden)
        line=$(printf '%s\n' "$out" | tail -n 1)
        printf '%s\n' "$out" | grep '^FAIL'
        echo "$isa, $threads threads: $line"
        add "$(echo "$line" | cut -d' ' -f1)" "$(echo "$line" | cut -d' ' -f3)"
    done
done

for step in tests/steps/*.sh; do
    [ -f "$step" ] || continue
    heading "$(sed -n '2s/^# //p' "$step")"
    out=$(mktemp)
    bash "$step" $build 2>&1 | tee "$out"
    status=${PIPESTATUS[0]}
    line=$(grep -aE '^[0-9]+ passed, [0-9]+ failed' "$out" | tail -n 1)
    rm -f "$out"
    if [ -n "$line" ]; then
        add "$(echo "$line" | cut -d' ' -f1)" "$(echo "$line" | cut -d' ' -f3)"
    elif [ "$status" -eq 0 ]; then
        add 1 0
    else
        add 0 1
    fi
done

echo
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
