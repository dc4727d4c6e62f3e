#!/usr/bin/env bash
# Layering: each folder of src/ includes only the ones before it
cd "$(dirname "$0")/../.." || exit 1
order="core tensor kernel layer exec plan cache op nn llm lab"
bad=0
for folder in $order; do
    [ -d "src/$folder" ] || continue
    while IFS=: read -r file include; do
        used=$(printf '%s' "$include" | sed -E 's/.*"([a-z]+)\/.*/\1/')
        position() { echo " $order " | sed -E "s/ $1 .*//" | wc -w; }
        if [ -d "src/$used" ] && [ "$(position "$used")" -gt "$(position "$folder")" ]; then
            echo "src/$folder may not use src/$used: $file includes $include"
            bad=$((bad + 1))
        fi
    done < <(grep -rHoE '#include "[a-z]+/[^"]+"' "src/$folder" --include='*.c' --include='*.h')
done
[ $bad -eq 0 ] && echo "1 passed, 0 failed" || { echo "0 passed, 1 failed"; exit 1; }
