#!/usr/bin/env python3
"""What attention mechanisms do to a language model on a long document, as one table: time to read the prompt, speed of generation,
cache memory, perplexity, and needles found, beside exact attention.

    bench/llm_mechanisms.py ATTN MODEL.gguf TEXT.txt [--length 7500] [--threads 2]

Each row is a pair (mechanism while reading, mechanism while generating). Needs nothing but Python and the attn command.
"""
import argparse
import json
import os
import re
import subprocess
import tempfile

PAIRS = [
    (None, None),
    ("streaming:sinks=4,recent=1024", None),
    (None, "streaming:sinks=4,recent=1024"),
    ("streaming:sinks=4,recent=1024", "streaming:sinks=4,recent=1024"),
    ("flexprefill:gamma=0.9", None),
    ("flexprefill:gamma=0.8,min_budget=256", None),
    ("topk.blocks:top_k=16", None),
    (None, "topk:top_k=256"),
]


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit("%s\n%s" % (" ".join(command), done.stderr))
    return done.stdout


def options(pair):
    return [o for name, spec in zip(("--attention", "--decode-attention"), pair) if spec for o in (name, spec)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attn")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--length", type=int, default=7500, help="tokens of the document")
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--needles", type=int, default=1, help="different needles at each of 3 depths, 1 to 3")
    parser.add_argument("--perplexity", type=int, default=0, help="tokens of the perplexity windows (default: the length)")
    args = parser.parse_args()
    count = int(run(args.attn, "tokenize", args.model, args.text, "--count"))
    if count < args.length:
        raise SystemExit("the text has %d tokens, --length asks for %d" % (count, args.length))
    whole = open(args.text, encoding="utf-8", errors="ignore").read()
    text = whole[: len(whole) * args.length // count]
    common = ["--threads", str(args.threads)]
    window = str(args.perplexity or args.length)
    print("%s, about %d tokens, %d threads\n" % (os.path.basename(args.model), args.length, args.threads))
    print("| reading | generating | prompt s | tokens/s | cache MB | perplexity | density | needles |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as document:
        document.write(text)
        document.flush()
        room = ["--ctx", str(args.length + args.generate + 600)]
        for pair in PAIRS:
            stats = json.loads(run(args.attn, "run", args.model, "-f", document.name, "-n", str(args.generate), "--ignore-end", "--json",
                                   *common, *room, *options(pair)), strict=False)
            # Perplexity is read, not generated: what the mechanism for reading does to it.
            last = run(args.attn, "perplexity", args.model, document.name, "--ctx", window, *common, *options((pair[0], None))).strip().splitlines()[-1]
            needles = run(args.attn, "needle", args.model, args.text, "--lengths", str(args.length - 200), "--depths", "10,50,90",
                          "--needles", str(args.needles), *common, "--ctx", str(args.length + 600), *options(pair))
            print("| %s | %s | %.2f | %.1f | %.1f | %s | %s | %s |" % (
                pair[0] or "dense", pair[1] or "dense", stats["prompt_seconds"],
                stats["generated_tokens"] / stats["generate_seconds"], stats["cache_bytes"] * 1e-6,
                re.search(r"perplexity +([\d.]+)", last).group(1), re.search(r"density +([\d.]+)", last).group(1),
                re.findall(r"found ([\d.]+)", needles)[-1]), flush=True)


if __name__ == "__main__":
    main()
