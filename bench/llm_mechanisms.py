#!/usr/bin/env python3
"""What attention mechanisms do to a language model on a long document, as one table: time to read the prompt (and of it in attention),
speed of generation, cache memory, perplexity, density and needles found, beside exact attention.

    bench/llm_mechanisms.py ATTN MODEL.gguf TEXT.txt [--length 7500] [--threads 2] [--rows 0,4] ...

Each row is a pair (mechanism while reading, mechanism while generating). Perplexity is read, not generated: rows that read alike share
it. Progress goes to stderr. Needs nothing but Python and the attn command.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time

PAIRS = [
    (None, None),
    ("streaming:sinks=4,recent=1024", None),
    (None, "streaming:sinks=4,recent=1024"),
    ("streaming:sinks=4,recent=1024,positions=cache", "streaming:sinks=4,recent=1024,positions=cache"),
    ("flexprefill:gamma=0.95,min_budget=1024", None),
    ("flexprefill:gamma=0.9", None),
    ("flexprefill:gamma=0.8,min_budget=256", None),
    ("topk.blocks:top_k=16", None),
    (None, "topk:top_k=256"),
]


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit("%s\n%s" % (" ".join(command), done.stderr))
    return done.stdout


def options(pair):
    return [o for name, spec in zip(("--attention", "--decode-attention"), pair) if spec for o in (name, spec)]


def speed(args, document, pair):
    """The best of the repeats."""
    best = None
    for _ in range(args.repeats):
        stats = json.loads(run(args.attn, "run", args.model, "-f", document, "-n", str(args.generate), "--ignore-end", "--json",
                               *args.common, "--ctx", str(args.length + args.generate + 600), *options(pair)), strict=False)
        if best is None or stats["prompt_seconds"] < best["prompt_seconds"]:
            best = stats
    return best


def perplexity(args, document, pair):
    """Perplexity and density; the whole document unless there are to be fewer tokens."""
    line = run(args.attn, "perplexity", args.model, document, "--ctx", str(args.length), "--alone", *args.common, *options(pair),
               *(["--limit", str(args.perplexity)] if args.perplexity else [])).strip().splitlines()[-1]
    return [re.search(name + r" +([\d.]+)", line).group(1) for name in ("perplexity", "density")]


def needles(args, pair):
    out = run(args.attn, "needle", args.model, args.text, "--lengths", str(args.length - 200), "--depths", args.depths, "--alone",
              "--needles", str(args.needles), *args.common, "--ctx", str(args.length + 600), *options(pair))
    return re.findall(r"found ([\d.]+)", out)[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attn")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--length", type=int, default=7500, help="tokens of the document (7500)")
    parser.add_argument("--generate", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="of the speed; the best counts (1)")
    parser.add_argument("--needles", type=int, default=1, help="different needles at each depth, 1 to 3; 0: none (1)")
    parser.add_argument("--depths", default="10,50,90", help="percent (10,50,90)")
    parser.add_argument("--perplexity", type=int, default=0, help="tokens to read for the perplexity (the whole document); -1: none")
    parser.add_argument("--rows", help="numbers of the rows to measure, e.g. 0,3,5 (all): " +
                        "; ".join("%d %s / %s" % (i, a or "dense", b or "dense") for i, (a, b) in enumerate(PAIRS)))
    args = parser.parse_args()
    args.common = ["--threads", str(args.threads)]
    count = int(run(args.attn, "tokenize", args.model, args.text, "--count"))
    if count < args.length:
        raise SystemExit("the text has %d tokens, --length asks for %d" % (count, args.length))
    whole = open(args.text, encoding="utf-8", errors="ignore").read()
    text = whole[: len(whole) * args.length // count]
    pairs = [PAIRS[int(i)] for i in args.rows.split(",")] if args.rows else PAIRS
    print("%s, about %d tokens, %d threads\n" % (os.path.basename(args.model), args.length, args.threads))
    print("| reading | generating | prompt s | of it attention s | tokens/s | cache MB | perplexity | density | needles |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    start, read = time.monotonic(), {}

    def progress(number, what):
        print("[%5.0f s] row %d of %d: %s" % (time.monotonic() - start, number + 1, len(pairs), what), file=sys.stderr, flush=True)

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as document:
        document.write(text)
        document.flush()
        for number, pair in enumerate(pairs):
            progress(number, "speed")
            stats = speed(args, document.name, pair)
            if pair[0] not in read and args.perplexity >= 0:
                progress(number, "perplexity")
                read[pair[0]] = perplexity(args, document.name, (pair[0], None))
            found = "-"
            if args.needles > 0:
                progress(number, "needles")
                found = needles(args, pair)
            print("| %s | %s | %.2f | %.2f | %.1f | %.1f | %s | %s | %s |" % (
                pair[0] or "dense", pair[1] or "dense", stats["prompt_seconds"], stats["prompt_attention_seconds"],
                (stats["generated_tokens"] - 1) / stats["generate_seconds"], stats["cache_bytes"] * 1e-6,
                *read.get(pair[0], ("-", "-")), found), flush=True)


if __name__ == "__main__":
    main()
