"""`dense` beside PyTorch: scaled_dot_product_attention and, compiled, FlexAttention; one run, as a Markdown table.

    python bench/peers.py [--seconds 0.3] [--tokens 1024] [--heads 4] [--width 64]
    python bench/peers.py --no-flex --cases full causal --types float32 --heads 8 --tokens 16384 --repeats 1

Each cell is the peer's time divided by ours: above 1 means that `dense` is faster. Times are medians of alternating repeats,
so that both meet the same state of the machine. Every result is compared with the peer's before it is timed. FlexAttention is
compiled once per case, outside the timing; "-" stands for what it does not do on this machine.
"""

import argparse
import math
import statistics
import time
import warnings

import torch
import torch.nn.functional as F

import attn.torch

WINDOW = 256


def cases(n):
    """(name, keyword arguments of dense, boolean mask for SDPA or None, mask function for FlexAttention or None)."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    documents = torch.arange(n) // (n // 4)
    same = documents[:, None] == documents[None, :]

    def causal(b, h, q, k):
        return q >= k

    def window(b, h, q, k):
        return (q >= k) & (q - k < WINDOW)

    def document(b, h, q, k):
        return (q >= k) & (documents[q] == documents[k])

    yield "full", {}, None, None
    yield "causal", {"causal": True}, None, causal
    yield f"window {WINDOW}", {"causal": True, "window": (WINDOW - 1, 0)}, (i >= j) & (i - j < WINDOW), window
    yield "4 documents", {"causal": True, "bias": same}, (i >= j) & same, document


def seconds_of(calls, budget, repeats):
    """Median times of several calls that take turns, at least `repeats` each after one that is not counted."""
    times = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + budget * len(calls)
    while time.perf_counter() < end or len(times[0]) < repeats:
        for call, list_ in zip(calls, times):
            begin = time.perf_counter()
            call()
            list_.append(time.perf_counter() - begin)
    return [statistics.median(t) for t in times]


def with_backward(function, inputs, grad):
    def call():
        torch.autograd.grad(function(*inputs), inputs, grad)

    return call


def flex_of(mask, n, scale):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # otherwise PyTorch stops compiling after a few cases
    block_mask = create_block_mask(mask, None, None, n, n, device="cpu") if mask else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, scale=scale)


def run(options, name, keywords, mask, mask_function, dtype, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    n, scale = options.tokens, 1 / math.sqrt(options.width)
    q, k, v, grad = (torch.randn(1, options.heads, n, options.width).to(dtype) for _ in range(4))
    keywords = dict(keywords)
    if "bias" in keywords:  # documents, as an additive mask
        keywords["bias"] = torch.zeros(1, 1, n, n).masked_fill(~keywords["bias"], float("-inf")).to(dtype)

    def ours(q, k, v):
        return attn.torch.dense(q, k, v, **keywords, outputs="o")

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and keywords.get("causal", False))

    peers = [sdpa]
    if not options.no_flex:
        peers.append(flex_of(mask_function, n, scale))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    cells = []
    for backward in (False, True):
        good = []
        for peer in peers:
            try:
                if backward:
                    want = torch.autograd.grad(peer(*leaves), leaves, grad)
                    got = torch.autograd.grad(ours(*leaves), leaves, grad)
                    torch.testing.assert_close(got, want, rtol=4 * tolerance, atol=4 * tolerance)
                else:
                    with torch.no_grad():
                        torch.testing.assert_close(ours(q, k, v), peer(q, k, v), rtol=tolerance, atol=tolerance)
                good.append(peer)
            except (NotImplementedError, RuntimeError) as error:
                if options.verbose:
                    print(f"<!-- {name} {dtype} {'backward' if backward else 'forward'}: {str(error).splitlines()[0]} -->")
        if backward:
            calls = [with_backward(f, leaves, grad) for f in (ours, *good)]
        else:
            calls = [lambda f=f: f(q, k, v) for f in (ours, *good)]
        with torch.set_grad_enabled(backward):
            mine, *theirs = seconds_of(calls, options.seconds, options.repeats)
        ratio = {peer: t / mine for peer, t in zip(good, theirs)}
        cells.append((mine, [f"{ratio[p]:.2f}" if p in ratio else "-" for p in peers]))
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    parser.add_argument("--repeats", type=int, default=5, help="fewest repeats of each measurement")
    names, types = [name for name, *_ in cases(4)], ["float32", "bfloat16"]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--types", nargs="+", choices=types, default=types)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out (it needs a C++ compiler)")
    parser.add_argument("--verbose", action="store_true", help="say why a cell is empty")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"argument --repeats: expected at least 1, got {options.repeats}")
    warnings.simplefilter("ignore")
    print(f"`dense` beside PyTorch {torch.__version__}: {options.heads} heads, {options.tokens} tokens, {options.width} wide. "
          "Cells: the peer's time / ours (above 1: ours is faster).\n")
    peers = ["SDPA"] + ([] if options.no_flex else ["FlexAttention"])
    heads = ["case", "type", "threads", "ours, ms", *peers, "forward and backward: ours, ms", *peers]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for threads in options.threads:
        for dtype in (getattr(torch, name) for name in options.types):
            for case in cases(options.tokens):
                if case[0] not in options.cases:
                    continue
                (forward, a), (both, b) = run(options, *case, dtype, threads)
                row = [case[0], str(dtype).removeprefix("torch."), str(threads), f"{forward * 1e3:.2f}", *a, f"{both * 1e3:.2f}", *b]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
