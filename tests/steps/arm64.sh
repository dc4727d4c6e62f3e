#!/usr/bin/env bash
# arm64: every source file compiles, the kernels for NEON and plain
cd "$(dirname "$0")/../.." || exit 1
cc=aarch64-linux-gnu-gcc
command -v $cc >/dev/null || { echo "no $cc"; exit 1; }
flags="-std=c11 -O1 -Wall -Wextra -Werror -Wno-psabi -fopenmp -D_DEFAULT_SOURCE -D_POSIX_C_SOURCE=200809L -Iinclude -Isrc -idirafter /usr/include"
passed=0 failed=0
compile() {
    # shellcheck disable=SC2086
    if $cc $flags "$@" -c -o /dev/null; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}
kernels=$(grep -lE '"kernel/vec\.h"|"vec\.h"' src/kernel/*.c)
for file in $(git ls-files 'src/*.c'); do
    if echo "$kernels" | grep -qx "$file"; then
        compile -DATTN_ISA=neon -DATTN_ISA_NEON=1 "$file"
        compile -DATTN_ISA=scalar -DATTN_ISA_SCALAR=1 "$file"
    else
        compile "$file"
    fi
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
