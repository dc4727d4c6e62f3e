#!/usr/bin/env bash
# Python package: built, installed in a virtual environment, tested (pytest)
cd "$(dirname "$0")/../.." || exit 1
log=$(mktemp)
bash tests/python/run.sh build-python 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
# pytest: "== 120 passed, 3 skipped in 60.00s =="
summary=$(grep -aE '[0-9]+ (passed|failed|error)' "$log" | tail -n 1)
number() { printf '%s' "$summary" | grep -oE "[0-9]+ $1" | grep -oE '[0-9]+' || echo 0; }
rm -f "$log"
failed=$(($(number failed) + $(number error)))
[ "$status" -ne 0 ] && [ "$failed" -eq 0 ] && failed=1
echo "$(number passed) passed, $failed failed"
[ "$failed" -eq 0 ]
