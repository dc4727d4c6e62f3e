#!/usr/bin/env bash
# Reference: docs/mechanisms.md is what the mechanisms' tables say
cd "$(dirname "$0")/../.." || exit 1
if "$1"/cli/attn describe --all --markdown | diff -q - docs/mechanisms.md >/dev/null; then
    echo "1 passed, 0 failed"
else
    echo "docs/mechanisms.md is out of date: attn describe --all --markdown > docs/mechanisms.md"
    echo "0 passed, 1 failed"
    exit 1
fi
