#!/usr/bin/env bash
# Public headers: each compiles alone, as C11 and as C++
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0
for header in include/attn/*.h; do
    name="attn/$(basename "$header")"
    for mode in "-x c -std=c11" "-x c++ -std=c++17"; do
        # shellcheck disable=SC2086
        if printf '#include <%s>\n' "$name" | ${CC:-gcc} $mode -Wall -Wextra -Wpedantic -Werror -Iinclude -fsyntax-only - ; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
        fi
    done
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
